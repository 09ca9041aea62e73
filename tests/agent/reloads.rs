//! What a reload binds, keeps and closes; and what must hold where several destinations share a place.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};

use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const TO_GATEWAY: &str = "GET /v1/orders HTTP/1.1\r\nHost: gateway\r\n\r\n";
const PLAIN: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_moves_listeners_and_changes_who_may_connect() {
    let world = World::start().await;
    let configuration = world.fill(&format!("{COMMON}{DESTINATIONS}"));
    let path = |name: &str| world.path(name);
    let mut io = UnixStream::connect(path("gateway.sock")).await.unwrap();
    exchange(&mut io, TO_GATEWAY).await.expect(200);

    let moved = configuration
        .replace("gateway.sock", "moved.sock")
        .replacen("mode: \"0666\"", "mode: \"0600\"", 1);
    world.write("countersign.yaml", &moved);
    world.app().reload().await.unwrap();

    let mut io = UnixStream::connect(path("moved.sock")).await.unwrap();
    exchange(&mut io, TO_GATEWAY).await.expect(200);
    // Its acceptor ends a moment later, and its socket with it.
    eventually(Duration::from_secs(5), || async {
        (!path("gateway.sock").exists()).then_some(())
    })
    .await;
    let mode = std::fs::metadata(path("proxy.sock")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let mut io = TcpStream::connect(world.address("proxy")).await.unwrap();
    exchange(&mut io, PLAIN).await.expect(200);

    // An address that somebody else has: the reload fails, and takes nothing away.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let conflict = moved.replace(
        "listeners:\n",
        &format!(
            "listeners:\n  - {{name: another, type: forward_proxy, bind: \"{}\"}}\n",
            taken.local_addr().unwrap()
        ),
    );
    world.write("countersign.yaml", &conflict);
    world.app().reload().await.unwrap_err();
    let mut io = UnixStream::connect(path("moved.sock")).await.unwrap();
    exchange(&mut io, TO_GATEWAY).await.expect(200);
    reached("moved", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_keeps_the_token_that_was_presented_to_it() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |_| {
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()]
    })
    .await;
    world.origins.push(("mirror".to_owned(), origin.address));
    let common = COMMON.replace(
        "attestors:\n",
        "  - {name: mirror, type: gateway, bind: \"127.0.0.1:0\", destination: mirror}\nattestors:\n",
    );
    let mirror = r#"
  - {name: mirror, hosts: [mirror.example.test], scheme: http, mode: report_only, credentials: [{name: billing-api}], connect_to: "{mirror}"}
"#;
    world
        .start_agent(&format!("{common}{DESTINATIONS}{mirror}"), POLICIES)
        .await;
    let caller = Puppet::start(&world.target("mirror"), None).await;
    let claims = serde_json::json!({"repository": "acme/orders"});
    let token = world
        .issuer
        .mint("job", "countersign", Duration::from_secs(300), &claims)
        .unwrap();
    let mut io = caller.connect().await;
    for (authorization, arrives) in [
        ("Bearer of-the-workload".to_owned(), true),
        (format!("Bearer {token}"), false),
        ("Bearer of-the-workload".to_owned(), true),
    ] {
        let request =
            format!("GET /v1 HTTP/1.1\r\nHost: gateway\r\nAuthorization: {authorization}\r\n\r\n");
        exchange(&mut io, &request).await.expect(200);
        let head = origin.heads().pop().unwrap();
        assert_eq!(head.contains(&authorization), arrives, "{head}");
        assert_eq!(
            head.to_ascii_lowercase().contains("authorization"),
            arrives,
            "{head}"
        );
    }
    reached("kept_tokens", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blind_tunnel_needs_permission_for_all_that_it_may_reach() {
    let mut world = World::servers().await;
    let destinations = r#"
  - {name: open, hosts: [open.example.test], ports: [7], connect_to: "{plain}"}
  - {name: first, hosts: [shared.example.test], ports: [7], connect_to: "{plain}"}
  - {name: second, hosts: [shared.example.test], ports: [7], scheme: http, connect_to: "{plain}"}
  - {name: partial, hosts: [partial.example.test], ports: [7], paths: ["/public/**"], connect_to: "{plain}"}
"#;
    let policies = r#"
@id("tunnels")
permit (principal, action == Action::"connect", resource)
when { principal has unix && resource != Destination::"second" };
"#;
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destinations}"), policies)
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    let mut refused = 0;
    for (host, status, code) in [
        ("open", 200, ""),
        ("shared", 403, "policy_denied"),
        ("partial", 403, "destination_not_configured"),
        ("open", 200, ""),
    ] {
        let mut io = caller.connect().await;
        let before = world.plain_api.seen().len();
        let answer = open_tunnel(&mut io, &format!("{host}.example.test:7"))
            .await
            .expect(status);
        if status != 200 {
            let status = answer.headers("proxy-status").concat();
            assert!(status.contains(code), "{host}: {status}");
            refused += 1;
        }
        assert_eq!(world.plain_api.seen().len(), before);
    }
    reached("tunnels_refused", refused);
}
