//! Every way in: the forward proxy and the gateway, on TCP and on Unix sockets, HTTP/1.1 and HTTP/2.

use http::Version;

use crate::support::counts::reached;
use crate::support::curl::curl;
use crate::support::world::{World, assert_issued};

const ORDERS: &str = "https://orders.example.test/v1/orders";
const PLAIN: &str = "http://plain.example.test/v1/orders";

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_injected_on_every_way_in() {
    let world = World::start().await;
    world.good().await;
    let proxy = world.proxy();
    let root = world.path("ca.pem");
    let root = root.to_str().unwrap();
    let gateway = format!("http://{}/v1/orders", world.address("gateway"));
    let local_gateway = world.path("gateway.sock");
    let local_gateway = local_gateway.to_str().unwrap();
    let base = "http://gateway.local/v1/orders";
    let through = ["--proxy", proxy.as_str(), "--cacert", root];
    let rows: &[(&str, Vec<&str>, &str, Version, &str)] = &[
        (
            "absolute-form",
            [&through[..], &[PLAIN]].concat(),
            "1.1",
            Version::HTTP_11,
            "plain.example.test",
        ),
        (
            "intercepted, HTTP/1.1",
            [&through[..], &["--http1.1", ORDERS]].concat(),
            "1.1",
            Version::HTTP_2,
            "orders.example.test",
        ),
        (
            "intercepted, HTTP/2",
            [&through[..], &["--http2", ORDERS]].concat(),
            "2",
            Version::HTTP_2,
            "orders.example.test",
        ),
        (
            "CONNECT with plain HTTP/1.1",
            [&through[..], &["--proxytunnel", PLAIN]].concat(),
            "1.1",
            Version::HTTP_11,
            "plain.example.test",
        ),
        (
            "CONNECT with plain HTTP/2",
            [
                &through[..],
                &["--proxytunnel", "--http2-prior-knowledge", PLAIN],
            ]
            .concat(),
            "2",
            Version::HTTP_11,
            "plain.example.test",
        ),
        (
            "gateway, HTTP/1.1",
            vec![&gateway],
            "1.1",
            Version::HTTP_2,
            "orders.example.test",
        ),
        (
            "gateway, HTTP/2",
            vec!["--http2-prior-knowledge", &gateway],
            "2",
            Version::HTTP_2,
            "orders.example.test",
        ),
        (
            "gateway on a Unix socket",
            vec!["--unix-socket", local_gateway, base],
            "1.1",
            Version::HTTP_2,
            "orders.example.test",
        ),
        (
            "gateway on a Unix socket, HTTP/2",
            vec![
                "--unix-socket",
                local_gateway,
                "--http2-prior-knowledge",
                base,
            ],
            "2",
            Version::HTTP_2,
            "orders.example.test",
        ),
    ];
    let mut entrances = 0;
    for (name, arguments, version, upstream, authority) in rows {
        world.api.forget();
        world.plain_api.forget();
        let answer = curl(arguments).await;
        assert_eq!(
            (answer.status, answer.version.as_str()),
            (200, *version),
            "{name}: {answer:#?}"
        );
        assert!(answer.header("countersign-request-id").is_some(), "{name}");
        let seen = [world.api.seen(), world.plain_api.seen()].concat();
        assert_eq!(seen.len(), 1, "{name}");
        let seen = &seen[0];
        assert_issued(&world, seen);
        assert_eq!(seen.version, *upstream, "{name}");
        assert_eq!(seen.authority.as_deref(), Some(*authority), "{name}");
        assert_eq!(seen.path, "/v1/orders", "{name}");
        assert_eq!(answer.json()["verified"]["sub"], "orders-agent", "{name}");
        entrances += 1;
    }
    world.good().await;
    // One record for each, with its session, and nothing secret.
    let requests = world.audited_requests().await;
    assert_eq!(requests.len(), entrances + 2);
    for request in &requests {
        assert_eq!(request["decision"], "allow", "{request}");
        assert_eq!(request["status"], 200, "{request}");
    }
    assert_eq!(world.authorization_server.state().token_requests(), 1);
    reached("entrances", entrances);
}
