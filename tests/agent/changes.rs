//! What was allowed ends: by revocation, by a reload, by the workload's exit or another executable.
//! The next request is refused, what is open ends within a second, and what is broken changes nothing.

use std::time::{Duration, Instant};

use countersign::policy::{Revocation, Revoked};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::support::client::Client;
use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::{Departure, Puppet, depart};
use crate::support::raw::{exchange, open_tunnel, read_head, read_response};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{Stalls, a_second, unprivileged};

const MORE_DESTINATIONS: &str = r#"
  - {name: blind, hosts: [blind.example.test], ports: [7], connect_to: "{plain}"}
  - {name: silent, hosts: [silent.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{silent}"}
"#;

const TUNNELS: &str = r#"
@id("tunnels")
permit (principal, action == Action::"connect", resource == Destination::"blind")
when { principal has unix };
"#;

/// Read no attribute but the user's id.
const BY_USER: &str = r#"
@id("uses-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };
@id("tunnels")
permit (principal, action == Action::"connect", resource == Destination::"blind")
when { principal has unix && principal.unix.uid == {uid} };
"#;

const PLAIN: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

struct Setting {
    world: World,
    silent: Origin,
    proxy: Puppet,
    gateway: Puppet,
}

impl Setting {
    async fn start() -> Self {
        Self::under(&format!("{POLICIES}{TUNNELS}")).await
    }

    async fn under(policies: &str) -> Self {
        let mut world = World::servers().await;
        let silent = Origin::start(None, |_| Vec::new()).await;
        world.origins.push(("silent".to_owned(), silent.address));
        world
            .start_agent(
                &format!("{COMMON}{DESTINATIONS}{MORE_DESTINATIONS}"),
                policies,
            )
            .await;
        let proxy = Puppet::start(&world.address("proxy").to_string(), None).await;
        let gateway = Puppet::start(&world.address("gateway").to_string(), None).await;
        Self {
            world,
            silent,
            proxy,
            gateway,
        }
    }

    /// One open exchange of each kind; each task ends when its exchange does.
    async fn open_all(&self) -> Open {
        let mut open = Vec::new();

        let mut io = self.gateway.connect().await;
        io.write_all(b"GET /v1/stream HTTP/1.1\r\nHost: gateway\r\n\r\n")
            .await
            .unwrap();
        assert!(read_head(&mut io).await.starts_with("HTTP/1.1 200"));
        open.push(("events over HTTP/1.1", tokio::spawn(until_end(io))));

        let root = self.world.path("ca.pem");
        let mut client = Client::tls(&self.proxy, "orders.example.test", &root, true).await;
        let request = http::Request::get("https://orders.example.test/v1/stream")
            .body(http_body_util::Empty::new())
            .unwrap();
        let response = client.send(request).await.unwrap();
        assert_eq!(response.status(), 200);
        open.push((
            "events over HTTP/2",
            tokio::spawn(async move {
                let mut body = response.into_body();
                while let Some(Ok(_)) = http_body_util::BodyExt::frame(&mut body).await {}
                drop(client);
                Instant::now()
            }),
        ));

        let mut io = self.proxy.connect().await;
        open_tunnel(&mut io, "plain.example.test:80")
            .await
            .expect(200);
        let upgrade = "GET /v1/socket HTTP/1.1\r\nHost: plain.example.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
        io.write_all(upgrade.as_bytes()).await.unwrap();
        read_response(&mut io).await.expect(101);
        io.write_all(b"hi").await.unwrap();
        io.read_exact(&mut [0; 2]).await.unwrap();
        open.push(("an upgrade", tokio::spawn(until_end(io))));

        let mut io = self.proxy.connect().await;
        open_tunnel(&mut io, "blind.example.test:7")
            .await
            .expect(200);
        open.push(("a blind tunnel", tokio::spawn(until_end(io))));

        let before = self.silent.heads().len();
        let mut io = self.proxy.connect().await;
        io.write_all(b"POST http://silent.example.test/ HTTP/1.1\r\nHost: silent.example.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
            .await
            .unwrap();
        open.push((
            "an upload",
            tokio::spawn(async move {
                read_response(&mut io).await.expect(403);
                Instant::now()
            }),
        ));
        // The last is on its way only once the origin has seen it.
        crate::support::eventually(Duration::from_secs(30), || async {
            (self.silent.heads().len() > before).then_some(())
        })
        .await;
        for (name, task) in &open {
            assert!(!task.is_finished(), "{name} ended by itself");
        }
        open
    }

    /// Everything that was open ends within the limit; returns how many did.
    async fn all_end(open: Open, (changed, stalls): (Instant, Stalls)) -> usize {
        let count = open.len();
        for (name, task) in open {
            let ended = tokio::time::timeout(Duration::from_secs(30), task)
                .await
                .unwrap_or_else(|_| panic!("{name} goes on"))
                .unwrap();
            let took = ended.saturating_duration_since(changed);
            println!("{name} ended after {took:?}");
            assert!(
                took < stalls.allow(a_second()),
                "{name} ended after {took:?}"
            );
        }
        count
    }
}

async fn until_end(mut io: impl tokio::io::AsyncRead + Unpin) -> Instant {
    let mut buffer = [0; 4096];
    while io.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
    Instant::now()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_allowed_ends_within_a_second() {
    let setting = Setting::start().await;
    let world = &setting.world;
    world.good().await;
    let mut ended = 0;
    let mut kept = setting.proxy.connect().await;
    exchange(&mut kept, PLAIN).await.expect(200);

    // What is open survives a reload that changes nothing of it.
    let open = setting.open_all().await;
    world.write_policies(&format!("{POLICIES}{TUNNELS}// a comment\n"));
    world.app().reload().await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    goes_on(&open);

    // A `forbid` is added.
    let forbid = "@id(\"no-more\")\nforbid (principal, action, resource);\n";
    world.write_policies(&format!("{POLICIES}{TUNNELS}{forbid}"));
    let changed = (Instant::now(), Stalls::watch());
    world.app().reload().await.unwrap();
    let answer = exchange(&mut kept, PLAIN).await.expect(403);
    assert_eq!(answer.code(), "policy_denied");
    ended += Setting::all_end(open, changed).await;

    // The permit is gone.
    world.write_policies(&format!("{POLICIES}{TUNNELS}"));
    world.app().reload().await.unwrap();
    exchange(&mut kept, PLAIN).await.expect(200);
    world.good().await;
    let open = setting.open_all().await;
    world.write_policies("@id(\"other\")\npermit (principal, action == Action::\"issue\", resource == Credential::\"orders-api\") when { principal has unix };\n");
    let changed = (Instant::now(), Stalls::watch());
    world.app().reload().await.unwrap();
    let answer = exchange(&mut kept, PLAIN).await.expect(403);
    assert_eq!(answer.code(), "policy_denied");
    ended += Setting::all_end(open, changed).await;

    // A revocation.
    world.write_policies(&format!("{POLICIES}{TUNNELS}"));
    world.app().reload().await.unwrap();
    let open = setting.open_all().await;
    let uid = nix::unistd::geteuid();
    let revocation = Revocation {
        id: "r1".to_owned(),
        what: Revoked::Workload(format!("unix.uid={uid}").parse().unwrap()),
        until: None,
    };
    let changed = (Instant::now(), Stalls::watch());
    assert!(
        world
            .app()
            .replace_revocations(|revocations| Some(revocations.with(revocation.clone())))
    );
    let answer = exchange(&mut kept, PLAIN).await.expect(403);
    assert_eq!(answer.code(), "revoked");
    ended += Setting::all_end(open, changed).await;
    // It survives a reload, and is lifted.
    world.app().reload().await.unwrap();
    let answer = exchange(&mut kept, PLAIN).await.expect(403);
    assert_eq!(answer.code(), "revoked");
    world
        .app()
        .replace_revocations(|revocations| revocations.without("r1"));
    exchange(&mut kept, PLAIN).await.expect(200);
    world.good().await;
    reached("ended_by_policy", ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_change_does_not_concern_goes_on() {
    let setting = Setting::start().await;
    let world = &setting.world;
    world.good().await;
    let mut kept = setting.proxy.connect().await;
    exchange(&mut kept, PLAIN).await.expect(200);
    let mut ended = 0;

    // A credential, then the token that is in use: what carries neither goes on.
    let token = world.audited_requests().await.last().unwrap()["token"]["sha256"].clone();
    let token = token.as_str().unwrap().to_owned();
    for what in [
        Revoked::Credential("orders-api".to_owned()),
        Revoked::TokenSha256(token),
    ] {
        let open = setting.open_all().await;
        let revocation = Revocation {
            id: "r1".to_owned(),
            what,
            until: None,
        };
        let changed = (Instant::now(), Stalls::watch());
        world
            .app()
            .replace_revocations(|revocations| Some(revocations.with(revocation.clone())));
        let answer = exchange(&mut kept, PLAIN).await.expect(403);
        assert_eq!(answer.code(), "revoked");
        let (blind, others) = part(open, |name| name == "a blind tunnel");
        ended += Setting::all_end(others, changed).await;
        goes_on(&blind);
        world
            .app()
            .replace_revocations(|revocations| revocations.without("r1"));
        exchange(&mut kept, PLAIN).await.expect(200);
    }
    world.good().await;

    // Two destinations are taken out of the configuration.
    let open = setting.open_all().await;
    world.write(
        "countersign.yaml",
        &world.fill(&format!("{COMMON}{DESTINATIONS}")),
    );
    world.write_policies(POLICIES);
    let changed = (Instant::now(), Stalls::watch());
    world.app().reload().await.unwrap();
    let (gone, others) = part(open, |name| ["a blind tunnel", "an upload"].contains(&name));
    ended += Setting::all_end(gone, changed).await;
    goes_on(&others);
    let mut io = setting.proxy.connect().await;
    let answer = open_tunnel(&mut io, "blind.example.test:7").await;
    assert_eq!(answer.expect(403).headers("proxy-status").len(), 1);
    exchange(&mut kept, PLAIN).await.expect(200);
    world.good().await;
    reached("ended_by_what_concerns_them", ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_ends_when_other_attributes_are_collected() {
    let setting = Setting::under(BY_USER).await;
    let world = &setting.world;
    world.good().await;
    let mut kept = setting.proxy.connect().await;
    exchange(&mut kept, PLAIN).await.expect(200);
    let forbid = |what: &str| {
        world.write_policies(&format!(
            "{BY_USER}@id(\"not\")\nforbid (principal, action, resource) when {{ {what} }};\n"
        ));
    };

    // A token's attributes, and one that records name a workload by, are there already.
    let open = setting.open_all().await;
    forbid("principal has ci && principal.ci has repository");
    world.app().reload().await.unwrap();
    forbid(
        "principal has unix && principal.unix has executable && principal.unix.executable == \"/x\"",
    );
    world.app().reload().await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    goes_on(&open);

    // Of what is open nobody knows the digest.
    forbid("principal has unix && principal.unix has executable_sha256");
    let changed = (Instant::now(), Stalls::watch());
    world.app().reload().await.unwrap();
    let answer = exchange(&mut kept, PLAIN).await.expect(403);
    assert_eq!(answer.code(), "policy_denied");
    let mut ended = Setting::all_end(open, changed).await;
    world.write_policies(BY_USER);
    world.app().reload().await.unwrap();
    exchange(&mut kept, PLAIN).await.expect(200);
    world.good().await;

    // Nor whether the user's name could be had.
    let open = setting.open_all().await;
    forbid("principal has unix && principal.unix has user && principal.unix.user == \"x\"");
    let changed = (Instant::now(), Stalls::watch());
    world.app().reload().await.unwrap();
    exchange(&mut kept, PLAIN).await.expect(200);
    ended += Setting::all_end(open, changed).await;
    reached("ended_by_attributes", ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_token_is_revoked_before_the_answer_is_told_so() {
    let setting = Setting::start().await;
    let world = &setting.world;
    world.good().await;
    let token = world.audited_requests().await.last().unwrap()["token"]["sha256"].clone();
    let mut io = setting.proxy.connect().await;
    io.write_all(b"GET http://silent.example.test/ HTTP/1.1\r\nHost: silent.example.test\r\n\r\n")
        .await
        .unwrap();
    crate::support::eventually(Duration::from_secs(30), || async {
        (!setting.silent.heads().is_empty()).then_some(())
    })
    .await;
    let revocation = Revocation {
        id: "r1".to_owned(),
        what: Revoked::TokenSha256(token.as_str().unwrap().to_owned()),
        until: None,
    };
    world
        .app()
        .replace_revocations(|revocations| Some(revocations.with(revocation.clone())));
    let answer = read_response(&mut io).await.expect(403);
    assert_eq!(answer.code(), "revoked", "{answer:#?}");
    world
        .app()
        .replace_revocations(|revocations| revocations.without("r1"));
    world.good().await;
}

type Open = Vec<(&'static str, JoinHandle<Instant>)>;

fn part(open: Open, belongs: impl Fn(&'static str) -> bool) -> (Open, Open) {
    open.into_iter().partition(|(name, _)| belongs(name))
}

fn goes_on(open: &Open) {
    for (name, task) in open {
        assert!(!task.is_finished(), "{name} ended although it may go on");
    }
}

/// An HTTP/2 request for `/v1/stream`, without the compression of headers: the preface, empty
/// SETTINGS, and HEADERS of stream 1 with its end.
const HTTP2_STREAM: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
    \0\0\0\x04\0\0\0\0\0\
    \0\0\x20\x01\x05\0\0\0\x01\
    \x02\x03GET\x06\x04http\x04\x0a/v1/stream\x01\x07gateway";

#[tokio::test(flavor = "multi_thread")]
async fn what_a_workload_opened_ends_with_it() {
    let setting = Setting::start().await;
    let world = &setting.world;
    world.good().await;
    let events = "GET /v1/stream HTTP/1.1\r\nHost: gateway\r\n\r\n";
    let event = "data: 0\n\n";
    let tunnel = "CONNECT plain.example.test:80 HTTP/1.1\r\nHost: plain.example.test:80\r\n\r\n";
    let upgrade = "GET /v1/socket HTTP/1.1\r\nHost: plain.example.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let blind = "CONNECT blind.example.test:7 HTTP/1.1\r\nHost: blind.example.test:7\r\n\r\n";
    let mut ended = 0;
    for departure in [Departure::Exec, Departure::Exit] {
        for (name, listener, steps, closes) in [
            ("events", "gateway", vec![(events, event)], true),
            ("events", "local-gateway", vec![(events, event)], true),
            (
                "events over HTTP/2",
                "gateway",
                vec![(HTTP2_STREAM, event)],
                false,
            ),
            (
                "an upgrade",
                "proxy",
                vec![(tunnel, ""), (upgrade, ""), ("hi", "hi")],
                true,
            ),
            ("a blind tunnel", "proxy", vec![(blind, "")], true),
        ] {
            let target = world.target(listener);
            let stalls = Stalls::watch();
            let silence = Duration::from_secs(if closes { 30 } else { 2 });
            let departed = depart(departure, &target, unprivileged(), &steps, "", silence).await;
            let took = match closes {
                true => departed.closed.unwrap(),
                false => departed.last_byte,
            };
            println!("{name} ended {took:?} after {departure:?}");
            assert!(took < stalls.allow(a_second()), "{name}: {departed:#?}");
            assert!(
                departed.before.contains(" 200 ") || departed.before.contains(event),
                "{departed:#?}"
            );
            ended += 1;
        }
    }
    world.good().await;
    reached("ended_by_departure", ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_broken_changes_nothing() {
    let world = World::start().await;
    world.good().await;
    let configuration = std::fs::read_to_string(world.path("countersign.yaml")).unwrap();
    let mut broken = 0;
    for (configuration, policies) in [
        (configuration.as_str(), "permit (principal"),
        (
            configuration.as_str(),
            "@id(\"a\")\npermit (principal, action, resource == Credential::\"nowhere\") when { principal has unix };",
        ),
        (
            configuration.as_str(),
            "@id(\"a\")\nforbid (principal, action, resource) when { principal has unxi };",
        ),
        ("version: 1\n", POLICIES),
        ("", POLICIES),
        (&configuration.replace("version: 1", "version: 2"), POLICIES),
        (&configuration.replace("listeners:", "listners:"), POLICIES),
        (
            &configuration.replace("key_file: client.key", "key_file: gone.key"),
            POLICIES,
        ),
    ] {
        world.write("countersign.yaml", configuration);
        world.write_policies(policies);
        assert!(
            world.app().reload().await.is_err(),
            "{configuration}{policies}"
        );
        assert_eq!(last_reload_success(&world), "0");
        world.good().await;
        broken += 1;
    }
    world.write("countersign.yaml", &configuration);
    world.write_policies(POLICIES);
    // A key that is half written.
    let key = std::fs::read_to_string(world.path("client.key")).unwrap();
    world.write("client.key", &key[..key.len() / 2]);
    let problems = world.app().reload().await.unwrap_err().to_string();
    assert!(
        problems.contains("client.key` cannot be used"),
        "{problems}"
    );
    assert_eq!(last_reload_success(&world), "0");
    world.good().await;
    broken += 1;
    world.write("client.key", &key);
    world.app().reload().await.unwrap();
    assert_eq!(last_reload_success(&world), "1");
    let audit = world.audit().await;
    let failed = audit
        .iter()
        .filter(|line| line["event"] == "reload_failed")
        .count();
    assert_eq!(failed, broken);
    world.good().await;
    reached("broken", broken);
}

/// The gauge that says whether what is in force is what stands in the files.
fn last_reload_success(world: &World) -> String {
    let metrics = world.app().agent().metrics.encode();
    metrics
        .lines()
        .find_map(|line| line.strip_prefix("countersign_last_reload_success "))
        .unwrap()
        .to_owned()
}
