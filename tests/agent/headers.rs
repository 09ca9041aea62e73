//! The caller's own credentials, wherever they stand, never arrive; ours arrives once.

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World, assert_issued};

const CANARY: &str = "canary-of-the-caller";

/// Header lines, as a caller sends them beside a request line and `Host`.
const ATTEMPTS: &[&str] = &[
    "Authorization: Bearer canary-of-the-caller\r\n",
    "authorization: bearer canary-of-the-caller\r\n",
    "AUTHORIZATION: Basic canary-of-the-caller\r\n",
    "Authorization: canary-of-the-caller\r\n",
    "Authorization:\r\n",
    "Authorization: Bearer canary-of-the-caller\r\nAuthorization: Bearer canary-of-the-caller\r\n",
    "Authorization: Bearer canary-of-the-caller\r\nConnection: authorization\r\n",
    "Connection: authorization\r\nAuthorization: Bearer canary-of-the-caller\r\n",
    "Connection: close, Authorization\r\n",
    "Connection: host\r\n",
    "Connection: countersign-request-id, te, authorization\r\nTE: trailers\r\n",
    "Proxy-Authorization: Bearer canary-of-the-caller\r\n",
    "Proxy-Authorization: Basic Y2FuYXJ5OmNhbmFyeS1vZi10aGUtY2FsbGVy\r\n",
    "Proxy-Connection: keep-alive\r\nProxy-Authorization: Negotiate canary-of-the-caller\r\n",
    "Keep-Alive: timeout=5\r\nUpgrade: h2c\r\nHTTP2-Settings: canary-of-the-caller\r\nConnection: upgrade, http2-settings, authorization\r\n",
];

#[tokio::test(flavor = "multi_thread")]
async fn t11_the_callers_own_credentials_never_arrive() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |_| {
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()]
    })
    .await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: origin, hosts: [origin.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    let local = Puppet::start(world.path("proxy.sock").to_str().unwrap(), None).await;
    world.good().await;
    let mut sent = 0;
    for caller in [&puppet, &local] {
        for attempt in ATTEMPTS {
            let mut io = caller.connect().await;
            let head = format!(
                "GET http://origin.example.test/a?q=%2f HTTP/1.1\r\nHost: ORIGIN.example.test:80\r\n{attempt}X-Kept: 1\r\n\r\n"
            );
            exchange(&mut io, &head).await.expect(200);
            sent += 1;
        }
    }
    let heads = origin.heads();
    assert_eq!(heads.len(), sent);
    for (head, attempt) in heads.iter().zip(ATTEMPTS.iter().cycle()) {
        let lower = head.to_ascii_lowercase();
        assert!(!head.contains(CANARY), "{attempt}: {head}");
        assert!(!lower.contains("y2fuyxj5"), "{attempt}: {head}");
        assert_eq!(
            lower.matches("\r\nauthorization:").count(),
            1,
            "{attempt}: {head}"
        );
        assert_eq!(
            lower.matches("\r\nauthorization: bearer ey").count(),
            1,
            "{attempt}: {head}"
        );
        assert_eq!(
            lower.matches("\r\nhost: origin.example.test\r\n").count(),
            1,
            "{attempt}: {head}"
        );
        for gone in ["proxy-", "keep-alive", "http2-settings"] {
            assert!(!lower.contains(gone), "{attempt}: {head}");
        }
        assert!(lower.contains("\r\nx-kept: 1\r\n"), "{attempt}: {head}");
        assert!(
            head.starts_with("GET /a?q=%2f HTTP/1.1\r\n"),
            "{attempt}: {head}"
        );
    }

    // Trailers, which a server may merge into the head.
    for (chunks, trailers) in [
        (
            "2\r\nhi\r\n0\r\n",
            "Authorization: Bearer canary-of-the-caller\r\n",
        ),
        (
            "0\r\n",
            "Proxy-Authorization: Bearer canary-of-the-caller\r\n",
        ),
    ] {
        let mut io = puppet.connect().await;
        let request = format!(
            "POST http://plain.example.test/v1/echo HTTP/1.1\r\nHost: plain.example.test\r\nTransfer-Encoding: chunked\r\nTrailer: authorization\r\nTE: trailers\r\n\r\n{chunks}{trailers}\r\n"
        );
        let answer = exchange(&mut io, &request).await.expect(200);
        assert!(!answer.body.contains(CANARY));
        sent += 1;
    }
    for seen in world.plain_api.seen() {
        assert_issued(&world, &seen);
        assert!(!format!("{seen:?}").contains(CANARY));
    }
    let audit = std::fs::read_to_string(world.path("audit.jsonl")).unwrap();
    assert!(!audit.contains(CANARY));
    world.good().await;
    reached("headers", sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_destination_takes_as_a_credential_comes_from_us_only() {
    let mut world = World::servers().await;
    // Answers once it has seen the trailers, which it reads as another head.
    let origin = Origin::start(None, |head| match head.starts_with("POST") {
        true => Vec::new(),
        false => vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()],
    })
    .await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: keyed, hosts: [keyed.example.test], scheme: http, credentials: [{name: orders-api, inject: {header: x-api-key}}, {name: billing-api, inject: {header: x-billing}}], connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let fields = "X-Api-Key: canary-of-the-caller\r\nX-Billing: canary-of-the-caller\r\nAuthorization: canary-of-the-caller\r\nX-Kept: 1\r\n";
    let mut sent = 0;
    for connection in ["", "Connection: x-api-key, x-billing\r\n"] {
        let mut io = puppet.connect().await;
        let request = format!(
            "POST http://keyed.example.test/ HTTP/1.1\r\nHost: keyed.example.test\r\n{fields}{connection}Transfer-Encoding: chunked\r\nTrailer: x-api-key, x-billing, authorization, x-kept\r\n\r\n2\r\nhi\r\n0\r\n{fields}\r\n"
        );
        exchange(&mut io, &request).await.expect(200);
        sent += 1;
    }
    let seen = origin.heads();
    assert_eq!(seen.len(), 2 * sent);
    for pair in seen.chunks(2) {
        let (head, trailers) = (pair[0].to_lowercase(), pair[1].to_lowercase());
        assert!(!head.contains(CANARY), "{head}");
        assert_eq!(head.matches("\r\nx-api-key:").count(), 1, "{head}");
        assert!(head.contains("\r\nx-api-key: bearer ey"), "{head}");
        assert!(!trailers.contains(CANARY), "{trailers}");
        // The others pass.
        assert!(trailers.contains("\r\nx-kept: 1\r\n"), "{trailers}");
    }
    world.good().await;
    reached("taken_from_us_only", sent);
}
