//! What one identity may hold of the agent, while its neighbours are served.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};

use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const SOON: Duration = Duration::from_secs(20);

const MORE_DESTINATIONS: &str = r#"
  - {name: silent, hosts: [silent.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{silent}"}
  - {name: blind, hosts: [blind.example.test], ports: [7], connect_to: "{silent}"}
"#;

const TUNNELS: &str = r#"
@id("tunnels")
permit (principal, action == Action::"connect", resource == Destination::"blind")
when { principal has unix };
"#;

const PLAIN: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n";

struct Setting {
    world: World,
    silent: Origin,
    caller: Puppet,
    /// What makes another identity of a request: a job's token.
    other: String,
}

impl Setting {
    async fn start(limits: &str) -> Self {
        let mut world = World::servers().await;
        let silent = Origin::start(None, |_| Vec::new()).await;
        world.origins.push(("silent".to_owned(), silent.address));
        world
            .start_agent(
                &format!(
                    "{COMMON}limits: {{per_identity: {limits}}}\n{DESTINATIONS}{MORE_DESTINATIONS}"
                ),
                &format!("{POLICIES}{TUNNELS}"),
            )
            .await;
        let caller = Puppet::start(&world.target("proxy"), None).await;
        let claims = serde_json::json!({"repository": "acme/orders"});
        let token = world
            .issuer
            .mint("job", "countersign", Duration::from_secs(300), &claims)
            .unwrap();
        Self {
            world,
            silent,
            caller,
            other: format!("Proxy-Authorization: Bearer {token}\r\n"),
        }
    }

    /// A request that is not answered, once it has arrived.
    async fn in_flight(&self, caller: &Puppet) -> TcpStream {
        let before = self.silent.heads().len();
        let mut io = caller.connect().await;
        io.write_all(
            b"GET http://silent.example.test/ HTTP/1.1\r\nHost: silent.example.test\r\n\r\n",
        )
        .await
        .unwrap();
        eventually(SOON, || async {
            (self.silent.heads().len() > before).then_some(())
        })
        .await;
        io
    }

    /// A request over a connection of its own; what it is told, and whether it arrived.
    async fn ask(&self, fields: &str) -> (u16, String) {
        let before = self.world.plain_api.seen().len();
        let mut io = self.caller.connect().await;
        let answer = exchange(&mut io, &format!("{PLAIN}{fields}\r\n")).await;
        let arrived = self.world.plain_api.seen().len() - before;
        assert_eq!(arrived, usize::from(answer.status == 200), "{answer:#?}");
        (answer.status, answer.code())
    }

    /// The identity is refused, and its neighbour served, though it comes from the same process.
    async fn is_refused(&self) -> usize {
        let (status, code) = self.ask("").await;
        assert_eq!((status, code.as_str()), (429, "too_many_requests"));
        assert_eq!(self.ask(&self.other).await.0, 200);
        let record = self.world.audited_requests().await;
        let record = &record[record.len() - 2];
        assert_eq!(record["outcome"], "too_many_requests", "{record}");
        1
    }

    /// Until no connection to the proxy is open: what has been closed counts until the agent has seen it.
    async fn all_closed(&self) {
        eventually(SOON, || async {
            let metrics = self.world.app().agent().metrics.encode();
            metrics
                .contains("countersign_open_connections{listener=\"proxy\"} 0\n")
                .then_some(())
        })
        .await;
    }

    async fn is_served_again(&self) {
        eventually(SOON, || async {
            (self.ask("").await.0 == 200).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_has_all_its_requests_in_flight_is_refused_the_next() {
    let setting = Setting::start("{requests_in_flight: 3}").await;
    setting.world.good().await;
    // Another process of the same user is the same identity.
    let mut leaving = Puppet::start(&setting.world.target("proxy"), None).await;
    let _first = setting.in_flight(&leaving).await;
    let _second = setting.in_flight(&setting.caller).await;
    assert_eq!(setting.ask("").await.0, 200);
    // A tunnel is one of them for as long as it is open.
    let mut tunnel = setting.caller.connect().await;
    open_tunnel(&mut tunnel, "blind.example.test:7")
        .await
        .expect(200);
    let mut refused = setting.is_refused().await;
    // What ends makes room for one.
    drop(tunnel);
    setting.is_served_again().await;
    let _third = setting.in_flight(&setting.caller).await;
    refused += setting.is_refused().await;
    leaving.kill().await;
    setting.is_served_again().await;
    setting.world.good().await;
    reached("requests_refused", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_has_all_its_connections_is_refused_the_next() {
    let setting = Setting::start("{connections: 2}").await;
    setting.world.good().await;
    setting.all_closed().await;
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut io = setting.caller.connect().await;
        exchange(&mut io, &format!("{PLAIN}\r\n")).await.expect(200);
        kept.push(io);
    }
    let refused = setting.is_refused().await;
    // Those that it has go on.
    for io in &mut kept {
        exchange(io, &format!("{PLAIN}\r\n")).await.expect(200);
    }
    kept.pop();
    setting.is_served_again().await;
    drop(kept);
    setting.all_closed().await;
    setting.world.good().await;
    reached("connections_refused", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_asks_too_often_waits_and_is_refused_what_would_wait_too_long() {
    const A_SECOND: usize = 10;
    const AT_ONCE: usize = 5 * A_SECOND;
    let setting = Setting::start(&format!("{{requests_per_second: {A_SECOND}}}")).await;
    setting.world.good().await;
    let mut connections = Vec::new();
    for _ in 0..AT_ONCE {
        connections.push(setting.caller.connect().await);
    }
    let before = setting.world.plain_api.seen().len();
    let began = Instant::now();
    let asked: Vec<_> = connections
        .into_iter()
        .map(|mut io| tokio::spawn(async move { exchange(&mut io, &format!("{PLAIN}\r\n")).await }))
        .collect();
    let mut served = 0;
    for answer in asked {
        let answer = answer.await.unwrap();
        match answer.status {
            200 => served += 1,
            429 => assert_eq!(answer.code(), "too_many_requests"),
            _ => panic!("{answer:#?}"),
        }
    }
    let took = began.elapsed();
    assert_eq!(setting.world.plain_api.seen().len() - before, served);
    // What comes at once, what may wait, and what became due meanwhile.
    let most = 2 * A_SECOND + (took.as_secs_f64() * A_SECOND as f64).ceil() as usize;
    assert!((A_SECOND..=most).contains(&served), "{served} in {took:?}");
    assert!(took >= Duration::from_millis(900), "{took:?}");
    assert_eq!(setting.ask(&setting.other).await.0, 200);
    setting.is_served_again().await;
    reached("served_and_refused_in_turn", AT_ONCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_as_large_as_its_setting_says() {
    let setting = Setting::start("{head_size: 8KiB}").await;
    setting.world.good().await;
    let before = setting.world.plain_api.seen().len();
    for (size, status) in [(8192, 200), (8193, 431), (14_000, 431)] {
        let begin = format!("{PLAIN}Padding: ");
        let head = format!("{begin}{}\r\n\r\n", "a".repeat(size - begin.len() - 4));
        // However it comes.
        for first in [0, size - 1] {
            let (first, rest) = head.split_at(first);
            let mut io = setting.caller.connect().await;
            io.write_all(first.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            exchange(&mut io, rest).await.expect(status);
        }
    }
    assert_eq!(setting.world.plain_api.seen().len() - before, 2);
    setting.world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_counted_once_whatever_token_comes_on_it() {
    let setting = Setting::start("{connections: 1}").await;
    let mut io = setting.caller.connect().await;
    let job = |subject: &str, seconds: u64| {
        let (lifetime, claims) = (Duration::from_secs(seconds), serde_json::json!({}));
        let token = setting
            .world
            .issuer
            .mint(subject, "countersign", lifetime, &claims)
            .unwrap();
        format!("{PLAIN}Proxy-Authorization: Bearer {token}\r\n\r\n")
    };
    // A token and the next one of the same job, another job, and the first again.
    for request in [job("a", 300), job("a", 301), job("b", 300), job("a", 302)] {
        exchange(&mut io, &request).await.expect(200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_the_workload_api_count_for_their_identity() {
    const WHOAMI: &str = "GET /v1/whoami HTTP/1.1\r\nHost: api\r\n\r\n";
    let mut world = World::servers().await;
    let limits = "limits: {per_identity: {connections: 1}}";
    let configuration = format!("{COMMON}{limits}\n{DESTINATIONS}").replace(
        "listeners:\n",
        "listeners:\n  - {name: api, type: workload_api, bind: \"unix:{directory}/api.sock\"}\n",
    );
    world.start_agent(&configuration, POLICIES).await;
    let connect = || UnixStream::connect(world.path("api.sock"));
    // Who asks for nothing that is the caller's keeps no place.
    let mut unknown = connect().await.unwrap();
    let ready = WHOAMI.replace("whoami", "proxy");
    let answer = exchange(&mut unknown, &ready).await.expect(200);
    assert_eq!(answer.headers("connection"), ["close"]);
    let mut first = connect().await.unwrap();
    for _ in 0..2 {
        exchange(&mut first, WHOAMI).await.expect(200);
        let mut second = connect().await.unwrap();
        let refused = exchange(&mut second, WHOAMI).await.expect(429);
        assert_eq!(refused.code(), "too_many_requests");
    }
    drop(first);
    let began = Instant::now();
    while exchange(&mut connect().await.unwrap(), WHOAMI).await.status != 200 {
        assert!(began.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
