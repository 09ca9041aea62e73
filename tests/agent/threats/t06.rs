//! T6: a workload that has the proxy connect to the agent's own listeners, however it spells their address.

use tokio::io::AsyncWriteExt;

use crate::support::counts::reached;
use crate::support::curl::curl_as;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{open_tunnel, read_response};
use crate::support::world::{COMMON, POLICIES, World};
use crate::support::{hold, unprivileged};

/// The agent's listeners, at an address that is nobody else's; the ports are free ones.
const LISTENERS: &str = r#"
listeners:
  - {name: proxy, type: forward_proxy, bind: "127.0.6.1:{proxy-port}"}
  - {name: gateway, type: gateway, bind: "127.0.6.1:{gateway-port}", destination: orders}
  - {name: api, type: workload_api, bind: "127.0.6.1:{api-port}"}
"#;
const ADMIN: &str = "admin: {socket: admin.sock, metrics_bind: \"127.0.6.1:{metrics-port}\"}\n";
const PORTS: [&str; 4] = [
    "{proxy-port}",
    "{gateway-port}",
    "{api-port}",
    "{metrics-port}",
];

/// All of loopback may be reached, so that nothing but being the agent's own keeps a listener out.
const DESTINATIONS: &str = r#"
destinations:
  - name: orders
    hosts: [orders.example.test]
    credentials: [{name: orders-api}]
    ca_file: servers.pem
    connect_to: "{api}"
  - name: loopback
    hosts: ["127.0.6.1", "::ffff:127.0.6.1", "64:ff9b::7f00:601", "2002:7f00:601::", "::127.0.6.1", "::1", "127.0.0.1"]
    ports: [{proxy-port}, {gateway-port}, {api-port}, {metrics-port}, {origin-port}]
    allow_addresses: ["127.0.0.0/8", "::1/128"]
  - {name: led-here, hosts: [led-here.example.test], ports: [{proxy-port}], connect_to: "127.0.6.1:{proxy-port}"}
unmatched: tunnel
"#;

const CONNECTS: &str = r#"
@id("connects")
permit (principal, action == Action::"connect", resource)
when { principal has unix };
"#;

/// 127.0.6.1.
const SPELLINGS: [&str; 30] = [
    "127.0.6.1",
    "127.0.6.1.",
    "127.0.006.001",
    "127.1537",
    "127.0.1537",
    "127.0x0.0x6.0x1",
    "0x7f.0.6.1",
    "0x7f000601",
    "0X7F000601",
    "0177.0.6.1",
    "0177.0.06.01",
    "017700003001",
    "2130707969",
    "%31%32%37.0.6.1",
    "127。0。6。1",
    "①②⑦.0.6.1",
    "[::ffff:127.0.6.1]",
    "[::FFFF:127.0.6.1]",
    "[::ffff:7f00:601]",
    "[::ffff:7f00:0601]",
    "[0:0:0:0:0:ffff:7f00:601]",
    "[0000:0000:0000:0000:0000:ffff:7f00:0601]",
    "[::ffff:0:127.0.6.1]",
    "[::127.0.6.1]",
    "[64:ff9b::7f00:601]",
    "[64:ff9b::127.0.6.1]",
    "[2002:7f00:601::]",
    "[::ffff:127.0.6.1%25lo]",
    "me@127.0.6.1",
    "127.0.6.1#@orders.example.test",
];

/// The status of an answer to a head.
async fn ask(caller: &Puppet, head: &str) -> (u16, String) {
    let mut io = caller.connect().await;
    io.write_all(head.as_bytes()).await.unwrap();
    let answer = read_response(&mut io).await;
    (answer.status, answer.code())
}

async fn connect(caller: &Puppet, authority: &str) -> (u16, String) {
    let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    ask(caller, &head).await
}

#[tokio::test(flavor = "multi_thread")]
async fn t06_no_spelling_of_its_own_listeners_leads_the_agent_to_them() {
    let mut world = World::servers().await;
    let ok = |_: &str| vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()];
    let origin = Origin::start(None, ok).await;
    let port = origin.address.port();
    let (before, after) = COMMON.split_once("\nlisteners:").unwrap();
    let (_, after) = after.split_once("\nattestors:").unwrap();
    let destinations = DESTINATIONS.replace("{origin-port}", &port.to_string());
    let mut configuration = format!("{before}{LISTENERS}attestors:{after}{ADMIN}{destinations}");
    let held = PORTS.map(|_| hold("127.0.6.1:0".parse().unwrap()).unwrap());
    let ports = held.each_ref().map(|(_, address)| address.port());
    for (written, port) in PORTS.iter().zip(ports) {
        configuration = configuration.replace(written, &port.to_string());
    }
    world
        .start_agent(&configuration, &format!("{POLICIES}{CONNECTS}"))
        .await;
    let caller = Puppet::start(&world.target("proxy"), unprivileged()).await;
    world.good().await;
    let others = format!("127.0.0.1:{port}");
    open_tunnel(&mut caller.connect().await, &others)
        .await
        .expect(200);

    let (mut refused, mut judged) = (0, 0);
    for spelling in SPELLINGS {
        for own in ports {
            let authority = format!("{spelling}:{own}");
            let url = format!("GET http://{authority}/ HTTP/1.1\r\nHost: {authority}\r\n\r\n");
            for (status, code) in [connect(&caller, &authority).await, ask(&caller, &url).await] {
                assert!(matches!(status, 400 | 403), "{authority}: {status} {code}");
                judged += usize::from(matches!(&*code, "own_listener" | "address_not_allowed"));
                refused += 1;
            }
        }
    }
    let led_here = format!("led-here.example.test:{}", ports[0]);
    let answer = connect(&caller, &led_here).await;
    assert_eq!(answer, (403, "own_listener".to_owned()));
    // The admin socket has no address, and its file is its owner's.
    let socket = world.path("admin.sock");
    let socket = socket.to_str().unwrap();
    for authority in [format!("unix:{socket}"), socket.to_owned()] {
        assert_eq!(connect(&caller, &authority).await.0, 400, "{authority}");
    }
    let own = ["--unix-socket", socket, "http://agent/v1/status"];
    curl_as(None, &own).await.expect(200);
    if let Some(uid) = unprivileged() {
        assert_eq!(curl_as(Some(uid), &own).await.expect(0).exit, 7);
    }
    open_tunnel(&mut caller.connect().await, &others)
        .await
        .expect(200);
    world.good().await;
    reached("own_listeners_refused", refused);
    reached("own_listeners_judged_by_address", judged);
}
