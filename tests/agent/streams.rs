//! Bodies pass as they come, both ways; upgrades, trailers, events, continuations.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::COOKIE;
use http::{HeaderMap, HeaderValue, Request, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel, read_head, read_response};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World, assert_issued};

const MEBIBYTE: usize = 1 << 20;
/// More than every buffer on the way together.
const LARGE: usize = 64;

type Frames = StreamBody<frames_of::Frames>;

/// Fields of one name, and the one in which they are to arrive, if any.
type SentAndArrived<'a> = (&'a [&'a [u8]], Option<&'a [u8]>);

/// A channel as a body.
mod frames_of {
    use super::*;

    pub(super) type Frames =
        futures_util::stream::BoxStream<'static, Result<Frame<Bytes>, std::io::Error>>;

    pub(super) fn of(receiver: mpsc::Receiver<Frame<Bytes>>) -> StreamBody<Frames> {
        StreamBody::new(
            futures_util::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|frame| (Ok(frame), receiver))
            })
            .boxed(),
        )
    }
}

/// HTTP/2 without TLS to a gateway, as the puppet.
async fn http2(puppet: &Puppet) -> http2::SendRequest<Frames> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(puppet.connect().await))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_arrives_before_the_last_is_made() {
    let world = World::start().await;
    let puppet = Puppet::start(&world.address("gateway").to_string(), None).await;
    world.good().await;
    let mut events = 0;
    // HTTP/1.1: the stream has no end of its own.
    let mut io = puppet.connect().await;
    io.write_all(b"GET /v1/stream?interval_ms=50 HTTP/1.1\r\nHost: gateway\r\n\r\n")
        .await
        .unwrap();
    let head = read_head(&mut io).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains("text/event-stream"), "{head}");
    let mut read = String::new();
    let mut buffer = [0; 4096];
    while !read.contains("data: 3\n") {
        let length = tokio::time::timeout(Duration::from_secs(20), io.read(&mut buffer))
            .await
            .expect("events come one by one")
            .unwrap();
        assert_ne!(length, 0);
        read.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    events += 4;
    drop(io);
    // HTTP/2.
    let mut sender = http2(&puppet).await;
    let (_end, receiver) = mpsc::channel(1);
    let request = Request::get("http://gateway/v1/stream?interval_ms=50")
        .body(frames_of::of(receiver))
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    for event in 0..4 {
        let frame = tokio::time::timeout(Duration::from_secs(20), response.frame())
            .await
            .expect("events come one by one")
            .unwrap()
            .unwrap();
        assert_eq!(
            frame.data_ref().unwrap(),
            format!("data: {event}\n\n").as_bytes()
        );
        events += 1;
    }
    world.good().await;
    reached("events", events);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_pass_both_ways_at_once() {
    let world = World::start().await;
    let proxy = Puppet::start(&world.address("proxy").to_string(), None).await;
    let gateway = Puppet::start(&world.address("gateway").to_string(), None).await;
    world.good().await;

    // Each chunk comes back before the next is sent, over HTTP/1.1 in clear.
    let mut io = proxy.connect().await;
    io.write_all(b"POST http://plain.example.test/v1/echo HTTP/1.1\r\nHost: plain.example.test\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    io.write_all(b"5\r\nhello\r\n").await.unwrap();
    let head = read_head(&mut io).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let mut echoed = [0; 10];
    io.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"5\r\nhello\r\n");
    io.write_all(b"5\r\nagain\r\n0\r\n\r\n").await.unwrap();
    let mut rest = [0; 15];
    io.read_exact(&mut rest).await.unwrap();
    assert_eq!(&rest, b"5\r\nagain\r\n0\r\n\r\n");
    // The connection goes on.
    let more = exchange(
        &mut io,
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n",
    )
    .await;
    more.expect(200);

    // The same through HTTP/2 to the API over TLS, with gRPC's trailers both ways.
    let mut sender = http2(&gateway).await;
    let (frames, receiver) = mpsc::channel(1);
    let request = Request::post("http://gateway/v1/greeter")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(frames_of::of(receiver))
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    for message in ["one", "two", "three"] {
        frames
            .send(Frame::data(Bytes::from(message)))
            .await
            .unwrap();
        let frame = response.frame().await.unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap(), message.as_bytes());
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("authorization", HeaderValue::from_static("Bearer canary"));
    trailers.insert("x-checksum", HeaderValue::from_static("1"));
    frames.send(Frame::trailers(trailers)).await.unwrap();
    drop(frames);
    let frame = response.frame().await.unwrap().unwrap();
    assert_eq!(frame.trailers_ref().unwrap()["grpc-status"], "0");
    let seen = world.api.seen();
    assert_eq!(seen.last().unwrap().version, Version::HTTP_2);
    assert_eq!(seen.last().unwrap().headers["te"], "trailers");
    assert_issued(&world, seen.last().unwrap());

    // A body larger than every buffer on the way, read back as it is written.
    for (caller, to) in [(&gateway, "http://gateway/v1/echo")] {
        let mut sender = http2(caller).await;
        let (frames, receiver) = mpsc::channel(1);
        let request = Request::post(to).body(frames_of::of(receiver)).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let writing = tokio::spawn(async move {
            let chunk = Bytes::from(vec![7_u8; MEBIBYTE / 4]);
            for _ in 0..LARGE * 4 {
                frames.send(Frame::data(chunk.clone())).await.unwrap();
            }
        });
        let mut body = response.into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().data_ref().map_or(0, Bytes::len);
        }
        writing.await.unwrap();
        assert_eq!(length, LARGE * MEBIBYTE);
    }
    world.good().await;
    reached("mebibytes", LARGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_and_continuations_pass() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |_| {
        vec![
            "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n".to_owned(),
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
        ]
    })
    .await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: origin, hosts: [origin.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    let gateway = Puppet::start(&world.address("gateway").to_string(), None).await;
    world.good().await;

    // An upgrade, through the gateway to the API over TLS, and through a tunnel in clear.
    for (caller, in_tunnel) in [(&gateway, false), (&puppet, true)] {
        let mut io = caller.connect().await;
        if in_tunnel {
            open_tunnel(&mut io, "plain.example.test:80")
                .await
                .expect(200);
        }
        let head = "GET /v1/socket HTTP/1.1\r\nHost: plain.example.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: abc\r\n\r\n";
        io.write_all(head.as_bytes()).await.unwrap();
        let answer = read_response(&mut io).await.expect(101);
        assert_eq!(answer.headers("upgrade"), ["websocket"]);
        assert_eq!(answer.headers("countersign-request-id").len(), 1);
        for message in ["ping", "pong"] {
            io.write_all(message.as_bytes()).await.unwrap();
            let mut echoed = [0; 4];
            io.read_exact(&mut echoed).await.unwrap();
            assert_eq!(&echoed, message.as_bytes());
        }
    }
    let seen = world.api.seen();
    assert_eq!(seen.last().unwrap().version, Version::HTTP_11);
    assert_issued(&world, seen.last().unwrap());

    // The body is asked for only after the decision.
    let mut io = puppet.connect().await;
    let post = "POST http://plain.example.test/v1/echo HTTP/1.1\r\nHost: plain.example.test\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    io.write_all(post.as_bytes()).await.unwrap();
    let head = read_head(&mut io).await;
    assert!(head.starts_with("HTTP/1.1 100"), "{head}");
    io.write_all(b"hi").await.unwrap();
    let answer = read_response(&mut io).await.expect(200);
    assert_eq!(answer.body, "hi");
    let mut io = puppet.connect().await;
    let denied = post.replace("POST", "PUT");
    io.write_all(denied.as_bytes()).await.unwrap();
    let answer = read_response(&mut io).await.expect(403);
    assert_eq!(answer.code(), "policy_denied");

    // An interim response of the origin's own.
    let mut io = puppet.connect().await;
    let get = "GET http://origin.example.test/ HTTP/1.1\r\nHost: origin.example.test\r\n\r\n";
    for _ in 0..2 {
        io.write_all(get.as_bytes()).await.unwrap();
        let hints = read_response(&mut io).await.expect(103);
        assert_eq!(hints.headers("link"), ["</style.css>; rel=preload"]);
        let answer = read_response(&mut io).await.expect(200);
        assert_eq!(answer.body, "ok");
    }
    // A client of HTTP/1.0 knows no interim responses (RFC 9110 section 15.2).
    let mut io = puppet.connect().await;
    let old = "GET http://origin.example.test/ HTTP/1.0\r\nHost: origin.example.test\r\n\r\n";
    exchange(&mut io, old).await.expect(200);
    world.good().await;
}

/// HTTP/2 inside a tunnel to an origin that speaks HTTP/1.1 only.
async fn http2_in_a_tunnel(puppet: &Puppet) -> http2::SendRequest<Empty<Bytes>> {
    let mut io = puppet.connect().await;
    open_tunnel(&mut io, "plain.example.test:80")
        .await
        .expect(200);
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(io))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

/// HTTP/2 callers, an origin that speaks HTTP/1.1 only.
#[tokio::test(flavor = "multi_thread")]
async fn http2_callers_reach_http1_destinations() {
    let world = World::start().await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    world.good().await;
    let mut sender = http2_in_a_tunnel(&puppet).await;
    let mut answered = 0;
    for _ in 0..20 {
        let request = Request::get("http://plain.example.test/v1/orders")
            .body(Empty::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.headers().contains_key("countersign-request-id"));
        response.into_body().collect().await.unwrap();
        answered += 1;
    }
    let seen = world.plain_api.seen();
    assert_eq!(seen.len(), answered);
    assert!(seen.iter().all(|seen| seen.version == Version::HTTP_11));
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cookies_that_http2_splits_reach_http1_in_one_field() {
    let world = World::start().await;
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let mut sender = http2_in_a_tunnel(&puppet).await;
    let cases: [SentAndArrived<'_>; 4] = [
        (&[], None),
        (&[b"a=1; b=2"], Some(b"a=1; b=2")),
        (&[b"a=1", b"b=2", b"c=3"], Some(b"a=1; b=2; c=3")),
        (&[b"a=\xff", b"b=\"x y\""], Some(b"a=\xff; b=\"x y\"")),
    ];
    for (sent, expected) in cases {
        let mut request = Request::get("http://plain.example.test/v1/orders")
            .body(Empty::new())
            .unwrap();
        for cookie in sent {
            let mut cookie = HeaderValue::from_bytes(cookie).unwrap();
            cookie.set_sensitive(true);
            request.headers_mut().append(COOKIE, cookie);
        }
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.unwrap();
        let seen = world.plain_api.seen().pop().unwrap();
        assert_eq!(seen.version, Version::HTTP_11);
        let arrived: Vec<&[u8]> = seen
            .headers
            .get_all(COOKIE)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        assert_eq!(arrived, Vec::from_iter(expected));
    }
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_a_destination_is_used_again_while_others_are_swept() {
    const REQUESTS: usize = 5;
    let mut world = World::servers().await;
    // 400 ms for a body, so that connections are looked over while each is in use.
    let body = "b".repeat(20);
    let mut parts = vec!["HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n".to_owned()];
    parts.extend(body.chars().map(String::from));
    let origin = Origin::start(None, move |_| parts.clone()).await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: origin, hosts: [origin.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    let mut io = puppet.connect().await;
    for _ in 0..REQUESTS {
        let request =
            "GET http://origin.example.test/ HTTP/1.1\r\nHost: origin.example.test\r\n\r\n";
        let answer = exchange(&mut io, request).await.expect(200);
        assert_eq!(answer.body, body);
        // And while none is.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(origin.heads().len(), REQUESTS);
    assert_eq!(origin.connections(), 1);
    reached("over_one_connection", REQUESTS);
}
