//! What is refused, how it is said, and that the origin saw nothing of it.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::Request;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel, read_response};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

/// One head, its status and its code.
struct Row {
    head: &'static str,
    status: u16,
    code: &'static str,
}

const fn row(head: &'static str, status: u16, code: &'static str) -> Row {
    Row { head, status, code }
}

/// On the proxy itself.
const ON_THE_PROXY: &[Row] = &[
    row(
        "DELETE http://plain.example.test/v1/orders/7 HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        403,
        "policy_denied",
    ),
    row(
        "TRACE http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        405,
        "method_not_allowed",
    ),
    row(
        "GET /v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET ftp://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: other.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    row(
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test:81\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    row(
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\nHost: plain.example.test\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://me@plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://plain.example.test:0/v1/orders HTTP/1.1\r\nHost: plain.example.test:0\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://plain.example.test:81/v1/orders HTTP/1.1\r\nHost: plain.example.test:81\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "GET https://plain.example.test:80/v1/orders HTTP/1.1\r\nHost: plain.example.test:80\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "GET http://orders.example.test:443/v1/orders HTTP/1.1\r\nHost: orders.example.test:443\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "GET http://plain.example.test/v2/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "GET http://plain.example.test/v1/%2e%2e/v2/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "GET http://plain.example.test/v1/..%2fv2/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "GET http://plain.example.test/v1/a%2fb HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        400,
        "ambiguous_path",
    ),
    row(
        "GET http://plain.example.test/v1//orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        400,
        "ambiguous_path",
    ),
    row(
        "GET http://nowhere.example.test/ HTTP/1.1\r\nHost: nowhere.example.test\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "CONNECT nowhere.example.test:443 HTTP/1.1\r\nHost: nowhere.example.test:443\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "CONNECT orders.example.test:444 HTTP/1.1\r\nHost: orders.example.test:444\r\n\r\n",
        403,
        "destination_not_configured",
    ),
    row(
        "CONNECT orders.example.test HTTP/1.1\r\nHost: orders.example.test\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://0x7f000001/ HTTP/1.1\r\nHost: 0x7f000001\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://127.1/ HTTP/1.1\r\nHost: 127.1\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://2130706433/ HTTP/1.1\r\nHost: 2130706433\r\n\r\n",
        400,
        "malformed_request",
    ),
    row(
        "GET http://0177.0.0.1/ HTTP/1.1\r\nHost: 0177.0.0.1\r\n\r\n",
        400,
        "malformed_request",
    ),
];

/// Inside a tunnel to `plain.example.test:80`.
const IN_A_TUNNEL: &[Row] = &[
    row(
        "GET /v1/orders HTTP/1.1\r\nHost: other.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    row(
        "GET /v1/orders HTTP/1.1\r\nHost: plain.example.test:8080\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    row(
        "GET http://other.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        421,
        "authority_mismatch",
    ),
    row(
        "GET https://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        400,
        "malformed_request",
    ),
    row("GET /v1/orders HTTP/1.0\r\n\r\n", 400, "malformed_request"),
    row(
        "TRACE /v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        405,
        "method_not_allowed",
    ),
    row(
        "DELETE /v1/orders/7 HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
        403,
        "policy_denied",
    ),
    row(
        "CONNECT other.example.test:443 HTTP/1.1\r\nHost: other.example.test:443\r\n\r\n",
        400,
        "malformed_request",
    ),
];

/// A policy that reads the path, so that an ambiguous one cannot be decided.
const READS_PATHS: &str = r#"
@id("reads-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && context has request && context.request.safe && context.request.path like "/v1/*" };
"#;

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_problems_and_reach_no_origin() {
    let mut world = World::servers().await;
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}"), READS_PATHS)
        .await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    world.good().await;
    world.api.forget();
    let mut refused = 0;
    let rows = ON_THE_PROXY
        .iter()
        .map(|row| (false, row))
        .chain(IN_A_TUNNEL.iter().map(|row| (true, row)));
    for (in_tunnel, Row { head, status, code }) in rows {
        let mut io = puppet.connect().await;
        if in_tunnel {
            let opened = open_tunnel(&mut io, "plain.example.test:80")
                .await
                .expect(200);
            // Its requests are recorded, and the tunnel is not.
            assert!(opened.headers("countersign-request-id").is_empty());
        }
        let answer = exchange(&mut io, head).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (*status, *code),
            "{head}: {answer:#?}"
        );
        assert_eq!(
            answer.headers("content-type"),
            ["application/problem+json"],
            "{head}"
        );
        let details = format!("details=\"{code}\"");
        assert!(
            answer.headers("proxy-status")[0].contains(&details),
            "{head}"
        );
        let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(
            answer.headers("countersign-request-id"),
            [body["request_id"].as_str().unwrap()]
        );
        assert!(
            answer.reason.starts_with(&format!("{code}: ")),
            "{head}: {}",
            answer.reason
        );
        refused += 1;
    }
    assert!(world.api.seen().is_empty(), "{:#?}", world.api.seen());
    assert!(world.plain_api.seen().is_empty());
    let requests = world.audited_requests().await;
    let not_allowed = requests
        .iter()
        .filter(|request| request["decision"] != "allow")
        .count();
    assert_eq!(not_allowed, refused, "each refusal is recorded once");
    world.good().await;
    reached("refusals", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cause_is_said_in_every_protocol() {
    let world = World::start().await;
    world.good().await;
    world.api.forget();
    let url = "https://orders.example.test/v1/orders/7";
    for version in ["--http1.1", "--http2"] {
        let answer = world.curl(&[version, "-X", "DELETE", url]).await;
        assert_eq!(
            (answer.connect_status, answer.status),
            (200, 403),
            "{answer:#?}"
        );
        assert_eq!(answer.code(), "policy_denied");
        let next = answer.json()["next"].as_str().unwrap().to_owned();
        assert!(next.starts_with("countersign policy explain "), "{next}");
        let answer = world
            .curl(&[
                version,
                "-X",
                "DELETE",
                "-H",
                "content-type: application/grpc",
                url,
            ])
            .await;
        assert_eq!(answer.status, 200, "{answer:#?}");
        assert_eq!(answer.header("grpc-status").as_deref(), Some("7"));
        let message = answer.header("grpc-message").unwrap();
        assert!(message.starts_with("policy_denied: "), "{message}");
    }
    // A CONNECT to nowhere: curl shows no body of it, but the head.
    let answer = world.curl(&["https://nowhere.example.test/"]).await;
    assert_eq!(answer.connect_status, 403);
    assert!(
        answer.heads.contains("403 destination_not_configured: "),
        "{}",
        answer.heads
    );
    assert!(world.api.seen().is_empty());
    world.good().await;
}

/// 401 from the destination is its own, and a redirect is the client's to follow.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_destination_says_is_passed_on() {
    let mut world = World::servers().await;
    let certificate = world.authority.issue(&["origin.example.test"]).unwrap();
    let origin = Origin::start(Some(&certificate), |head| {
        let answer = if head.starts_with("GET /redirect") {
            "HTTP/1.1 302 Found\r\nlocation: https://elsewhere.example.test/\r\ncontent-length: 0\r\n\r\n"
        } else if head.starts_with("GET /forbidden") {
            "HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno"
        } else {
            "HTTP/1.1 200 OK\r\nalt-svc: h3=\":443\"\r\nconnection: x-hop\r\nx-hop: 1\r\nx-kept: 1\r\nkeep-alive: timeout=5\r\ncontent-length: 2\r\n\r\nok"
        };
        vec![answer.to_owned()]
    })
    .await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: origin, hosts: [origin.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    world.good().await;
    let get = |path: &'static str| async move { format!("https://origin.example.test{path}") };
    let plain = world.curl(&[&get("/").await]).await.expect(200);
    assert_eq!(plain.header("alt-svc"), None);
    assert_eq!(plain.header("x-hop"), None);
    assert_eq!(plain.header("keep-alive"), None);
    assert_eq!(plain.header("x-kept").as_deref(), Some("1"));
    assert_eq!(plain.header("proxy-status"), None);
    // The origin offers HTTP/1.1 only: from now on so does the agent.
    let again = world.curl(&["--http2", &get("/").await]).await.expect(200);
    assert_eq!(again.version, "1.1");
    let redirect = world.curl(&[&get("/redirect").await]).await.expect(302);
    assert_eq!(
        redirect.header("location").as_deref(),
        Some("https://elsewhere.example.test/")
    );
    let forbidden = world.curl(&[&get("/forbidden").await]).await.expect(403);
    assert_eq!(forbidden.body, "no");
    assert_eq!(forbidden.header("proxy-status"), None);
    // curl follows the redirect: that is a request of its own, which is decided and refused.
    let followed = world.curl(&["-L", &get("/redirect").await]).await;
    assert_eq!(followed.connect_status, 403, "{followed:#?}");
    let heads = origin.heads();
    assert_eq!(heads.len(), 5);
    for head in &heads {
        assert_eq!(
            head.to_ascii_lowercase()
                .matches("authorization: bearer ")
                .count(),
            1,
            "{head}"
        );
    }
    world.good().await;
}

/// A caller that is refused in the middle of what it sends can send the rest, and reads the answer.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_arrives_though_the_caller_goes_on_sending() {
    let world = World::start().await;
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let upload = "Host: plain.example.test\r\nContent-Length: 524288\r\n\r\n";
    let denied = format!("DELETE http://plain.example.test/v1/orders HTTP/1.1\r\n{upload}");
    let elsewhere = format!("POST http://plain.example.test/v2/orders HTTP/1.1\r\n{upload}");
    let many_lines = format!(
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\n{}",
        "X: a\r\n".repeat(200)
    );
    let mut arrived = 0;
    for (head, status) in [(denied, 403), (elsewhere, 403), (many_lines, 431)] {
        let mut io = puppet.connect().await;
        io.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..8 {
            io.write_all(&[b'x'; 64 * 1024]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        read_response(&mut io).await.expect(status);
        io.shutdown().await.unwrap();
        assert_eq!(io.read(&mut [0]).await.unwrap(), 0);
        arrived += 1;
    }
    assert!(world.plain_api.seen().is_empty());
    world.good().await;
    reached("answers_arrived", arrived);
}

/// What the HTTP parser refuses is a refusal like every other: code, request id, and one record, which
/// names the workload where it is known.
#[tokio::test(flavor = "multi_thread")]
async fn heads_that_cannot_be_read_are_refused_and_recorded() {
    const GOOD: &str =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let mut world = World::servers().await;
    let configuration =
        format!("{COMMON}{DESTINATIONS}limits: {{per_identity: {{head_size: 128KiB}}}}\n");
    world.start_agent(&configuration, POLICIES).await;
    world.good().await;
    let proxy = world.target("local");
    let gateway = world.target("local-gateway");
    let many_lines = format!("GET /v1/orders HTTP/1.1\r\n{}\r\n", "X: a\r\n".repeat(200));
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(70_000));
    let large = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(140_000));
    let rows = [
        (&proxy, "nonsense\r\n\r\n", 400, "malformed_request"),
        (
            &proxy,
            "GET / HTTP/1.1\r\nX : a\r\n\r\n",
            400,
            "malformed_request",
        ),
        (&proxy, &many_lines, 431, "head_too_large"),
        (&proxy, &large, 431, "head_too_large"),
        (&proxy, &long, 414, "uri_too_long"),
        (&gateway, "GET / HTTP/9.9\r\n\r\n", 400, "malformed_request"),
    ];
    let mut refused = 0;
    for (path, head, status, code) in rows {
        let known = *path == proxy;
        let mut io = UnixStream::connect(path).await.unwrap();
        if known {
            exchange(&mut io, GOOD).await.expect(200);
        }
        let answer = exchange(&mut io, head).await.expect(status);
        assert_eq!(answer.code(), code, "{answer:#?}");
        assert_eq!(answer.headers("connection"), ["close"]);
        assert_eq!(answer.headers("proxy-status").len(), 1);
        assert_eq!(io.read(&mut [0]).await.unwrap(), 0, "it is closed");
        let id = answer.headers("countersign-request-id")[0].to_owned();
        let records = world.audited_requests().await;
        let of_it: Vec<_> = records
            .iter()
            .filter(|record| record["request_id"] == id.as_str())
            .collect();
        let [record] = of_it.as_slice() else {
            panic!("{id} has {} records", of_it.len());
        };
        assert_eq!(record["outcome"], code);
        assert_eq!(record["status"], status);
        assert_eq!(record["decision"], "error");
        assert_eq!(record["session"].is_string(), known, "{record}");
        refused += 1;
    }
    let (code, count) = ("malformed_request", 3);
    let metrics = world.app().agent().metrics.encode();
    let line = format!("countersign_refusals_total{{code=\"{code}\"}} {count}\n");
    assert!(metrics.contains(&line), "{metrics}");
    // A password in the authority is not said again.
    let mut io = UnixStream::connect(&proxy).await.unwrap();
    let secret =
        "GET http://me:s3cret@plain.example.test/ HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let answer = exchange(&mut io, secret).await.expect(400);
    assert!(!format!("{answer:?}").contains("s3cret"), "{answer:#?}");
    assert_eq!(world.plain_api.seen().len(), 5, "the good ones only");
    world.good().await;
    reached("unreadable_heads", refused);
}

/// Over HTTP/2 the stream of such a caller is read to its end, and not reset.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_stream_is_not_reset_while_the_caller_sends() {
    let world = World::start().await;
    world.good().await;
    let seen = world.api.seen().len();
    let io = UnixStream::connect(world.target("local-gateway"))
        .await
        .unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io))
        .await
        .unwrap();
    tokio::spawn(connection);
    let (chunks, queue) = mpsc::channel::<Bytes>(1);
    let body = StreamBody::new(stream::unfold(queue, |mut queue| async move {
        let chunk = queue.recv().await?;
        Some((Ok::<_, Infallible>(Frame::data(chunk)), queue))
    }));
    let denied = Request::delete("http://gateway/v1/orders").body(Box::pin(body));
    let response = sender.send_request(denied.unwrap()).await.unwrap();
    assert_eq!(response.status(), 403);
    let answer = response.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&answer).contains("policy_denied"));
    for chunk in 0..8 {
        // Refused where the stream was reset, for nobody takes what is sent then.
        let sent = chunks.send(Bytes::from(vec![b'x'; 64 * 1024])).await;
        assert!(sent.is_ok(), "the stream was reset before chunk {chunk}");
    }
    assert_eq!(world.api.seen().len(), seen);
    world.good().await;
}
