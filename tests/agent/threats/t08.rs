//! T8: a credential that is asked for at one place and sent to another: another host, another port, in clear,
//! or a server that is not the one that the destination names.

use tokio::io::AsyncWriteExt;

use crate::support::client::Client;
use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel, read_response};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::tunnels::tls_for;

/// Beside the usual ones: one over TLS at an origin that speaks none, and one whose server has a certificate
/// for another name.
const MORE_DESTINATIONS: &str = r#"
  - {name: secure, hosts: [secure.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, timeouts: {connect: 1s}, connect_to: "{clear}"}
  - {name: impostor, hosts: [impostor.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{impostor}"}
"#;

/// Heads on the proxy, and what is answered.
const ON_THE_PROXY: [(&str, u16, &str); 8] = [
    (
        "GET http://plain.example.test/v1/a HTTP/1.1\r\nHost: orders.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    (
        "GET http://secure.example.test/v1/a HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    (
        "GET http://plain.example.test/v1/a HTTP/1.1\r\nHost: plain.example.test:443\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    (
        "GET http://plain.example.test:443/v1/a HTTP/1.1\r\nHost: plain.example.test:443\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    (
        "GET http://secure.example.test:443/ HTTP/1.1\r\nHost: secure.example.test:443\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    (
        "GET http://secure.example.test/ HTTP/1.1\r\nHost: secure.example.test\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    (
        "GET https://secure.example.test/ HTTP/1.1\r\nHost: secure.example.test\r\n\r\n",
        504,
        "upstream_timeout",
    ),
    (
        "GET https://impostor.example.test/ HTTP/1.1\r\nHost: impostor.example.test\r\n\r\n",
        502,
        "upstream_tls",
    ),
];

/// In clear inside a tunnel to secure.example.test:443.
const IN_A_TUNNEL: [(&str, u16, &str); 3] = [
    (
        "GET / HTTP/1.1\r\nHost: secure.example.test:443\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    (
        "GET / HTTP/1.1\r\nHost: secure.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    (
        "GET /v1/a HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn t08_a_credential_goes_to_its_own_destination_only() {
    let mut world = World::servers().await;
    let ok = |_: &str| vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()];
    let clear = Origin::start(None, ok).await;
    let certificate = world.authority.issue(&["other.example.test"]).unwrap();
    let impostor = Origin::start(Some(&certificate), ok).await;
    world.origins.push(("clear".to_owned(), clear.address));
    world
        .origins
        .push(("impostor".to_owned(), impostor.address));
    let configuration = format!("{COMMON}{DESTINATIONS}{MORE_DESTINATIONS}");
    world.start_agent(&configuration, POLICIES).await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let seen = || (world.api.seen().len(), world.plain_api.seen().len());
    let before = seen();
    let mut refused = 0;
    let rows = ON_THE_PROXY
        .iter()
        .map(|row| (false, row))
        .chain(IN_A_TUNNEL.iter().map(|row| (true, row)));
    for (in_tunnel, (head, status, code)) in rows {
        let mut io = caller.connect().await;
        if in_tunnel {
            let opened = open_tunnel(&mut io, "secure.example.test:443").await;
            opened.expect(200);
        }
        io.write_all(head.as_bytes()).await.unwrap();
        let answer = read_response(&mut io).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (*status, *code),
            "{head}"
        );
        refused += 1;
    }

    // The name in the handshake and the authority inside it, on one connection of many hosts.
    for name in ["secure.example.test", "plain.example.test"] {
        tls_for(&world, &caller, name).await.unwrap_err();
        refused += 1;
    }
    let root = world.path("ca.pem");
    let mut http2 = Client::tls(&caller, "orders.example.test", &root, true).await;
    let orders = "https://orders.example.test/v1/orders";
    assert_eq!(http2.get(orders, "").await.unwrap().0, 200);
    for url in [
        "https://secure.example.test/v1/a",
        "https://orders.example.test:444/v1/a",
    ] {
        assert_eq!(http2.get(url, "").await.unwrap().0, 421, "{url}");
        refused += 1;
    }
    assert_eq!(http2.get(orders, "").await.unwrap().0, 200);
    let mut http1 = tls_for(&world, &caller, "orders.example.test")
        .await
        .unwrap();
    let other = "GET /v1/a HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    exchange(&mut http1, other).await.expect(421);
    refused += 1;

    assert_eq!(seen(), (before.0 + 2, before.1));
    // What speaks no TLS saw the beginning of a handshake, and no request.
    assert!(!clear.heads().concat().to_lowercase().contains("bearer"));
    assert_eq!(impostor.heads(), Vec::<String>::new());
    world.good().await;
    reached("sent_nowhere_else", refused);
}
