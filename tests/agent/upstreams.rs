//! Destinations in trouble: what the caller is told, when, and what of the request reached them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign::clock::Clock;
use countersign::dev::ServerCertificate;
use futures_util::future::join_all;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::support::clock::MovedClock;
use crate::support::counts::reached;
use crate::support::gate::Gate;
use crate::support::http2_frames::{
    ACK, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, SETTINGS, frame,
};
use crate::support::name_server::{Addresses, with_name_server};
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel, read_head};
use crate::support::strict_origin::{StrictOrigin, http2_acceptor};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{eventually, hold_port};

/// Of `timeouts` in these tests.
const SHORT: Duration = Duration::from_millis(500);
/// More than a busy machine takes, and much less than the default `timeouts`.
const SOON: Duration = Duration::from_secs(20);

const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

const TROUBLED: &str = r#"
  - {name: full, hosts: [full.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{full}", timeouts: {connect: 500ms}}
  - {name: mute, hosts: [mute.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{mute}", timeouts: {connect: 500ms}}
  - {name: silent, hosts: [silent.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{silent}", timeouts: {connect: 500ms, response_headers: 500ms}}
  - {name: refusing, hosts: [refusing.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{refusing}"}
  - {name: hanging-up, hosts: [hanging-up.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{hanging-up}"}
  # No resolver has an address for it (RFC 6761 section 6.4); some take long to say so.
  - {name: unresolved, hosts: [unresolved.invalid], scheme: http, credentials: [{name: orders-api}], timeouts: {connect: 1m}}
  - {name: garbled, hosts: [garbled.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{garbled}"}
  - {name: closing, hosts: [closing.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{closing}"}
  - {name: broken, hosts: [broken.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{broken}"}
  - {name: wordy, hosts: [wordy.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{wordy}"}
"#;

/// A destination, what the caller is told of it, and how many requests reach it.
struct Row {
    host: &'static str,
    status: u16,
    code: &'static str,
    arrive: usize,
    waits: bool,
}

const fn row(host: &'static str, status: u16, code: &'static str, arrive: usize) -> Row {
    Row {
        host,
        status,
        code,
        arrive,
        waits: status == 504,
    }
}

const ROWS: &[Row] = &[
    row("http://full.example.test", 504, "upstream_timeout", 0),
    row("https://mute.example.test", 504, "upstream_timeout", 0),
    row("http://silent.example.test", 504, "upstream_timeout", 1),
    row(
        "http://refusing.example.test",
        502,
        "upstream_unreachable",
        0,
    ),
    row(
        "https://hanging-up.example.test",
        502,
        "upstream_unreachable",
        0,
    ),
    row(
        "http://unresolved.invalid",
        502,
        "upstream_name_unresolved",
        0,
    ),
    row("http://garbled.example.test", 502, "upstream_protocol", 1),
    row("http://closing.example.test", 502, "upstream_protocol", 1),
    row("http://broken.example.test", 502, "upstream_protocol", 1),
    row("http://wordy.example.test", 502, "upstream_protocol", 1),
];

/// A port whose queue of connections is full, so that no further one is answered; with those in it.
async fn full() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(connected) = tokio::time::timeout(SHORT, TcpStream::connect(address)).await {
        waiting.push(connected.unwrap());
    }
    (listener, waiting, address)
}

/// Closes every connection at once.
async fn hanging_up() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    address
}

/// An answer whose head has a field of so many bytes.
fn answer_with_field(length: usize) -> String {
    let field = "a".repeat(length);
    format!("HTTP/1.1 200 OK\r\nx: {field}\r\ncontent-length: 0\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_in_trouble_is_told_by_its_code() {
    let mut world = World::servers().await;
    let answers = |parts: &'static [&'static str]| {
        Origin::start(None, move |_| {
            parts.iter().map(|part| (*part).to_owned()).collect()
        })
    };
    let (_listener, _waiting, full) = full().await;
    let (_reserved, refusing) = hold_port(0).unwrap();
    // The kernel completes the connection; nobody reads what is sent on it.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origins = [
        ("silent", answers(&[]).await),
        ("garbled", answers(&["SSH-2.0-OpenSSH_9.2p1\r\n\r\n"]).await),
        ("closing", answers(&[""]).await),
        (
            "broken",
            answers(&["HTTP/1.1 200 OK\r\ncontent-le", ""]).await,
        ),
        (
            "wordy",
            Origin::start(None, |head| match head.starts_with("GET /less ") {
                true => vec![answer_with_field(60_000)],
                false => vec![answer_with_field(1_000_000)],
            })
            .await,
        ),
    ];
    for (name, origin) in &origins {
        world.origins.push(((*name).to_owned(), origin.address));
    }
    for (name, address) in [
        ("full", full),
        ("mute", mute.local_addr().unwrap()),
        ("refusing", refusing),
        ("hanging-up", hanging_up().await),
    ] {
        world.origins.push((name.to_owned(), address));
    }
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{TROUBLED}"), POLICIES)
        .await;
    world.good().await;
    let answers = join_all(ROWS.iter().map(|row| {
        let (world, url) = (&world, format!("{}/", row.host));
        async move {
            let began = Instant::now();
            (world.curl(&[&url]).await, began.elapsed())
        }
    }))
    .await;
    let records = world.audited_requests().await;
    for (row, (answer, took)) in ROWS.iter().zip(&answers) {
        let Row { host, code, .. } = row;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (row.status, *code),
            "{host}: {answer:#?}"
        );
        let details = format!("details=\"{code}\"");
        let proxy_status = answer.header("proxy-status").unwrap();
        assert!(proxy_status.contains(&details), "{host}: {proxy_status}");
        let request_id = answer.header("countersign-request-id").unwrap();
        let record = records
            .iter()
            .find(|record| record["request_id"] == request_id)
            .unwrap();
        assert_eq!(record["outcome"], *code, "{host}: {record}");
        assert_eq!(record["decision"], "allow", "{host}: {record}");
        if row.waits {
            assert!((SHORT..SOON).contains(took), "{host}: took {took:?}");
            let waited = record["latency_us"]["upstream"].as_u64().unwrap();
            assert!(Duration::from_micros(waited) >= SHORT, "{host}: {record}");
        }
        let arrived = || {
            let origin = origins.iter().find(|(name, _)| host.contains(name));
            origin.map_or(0, |(_, origin)| origin.heads().len())
        };
        eventually(SOON, || async { (arrived() >= row.arrive).then_some(()) }).await;
        assert_eq!(arrived(), row.arrive, "{host}");
    }
    assert_eq!(records.len(), 1 + ROWS.len());
    let less = world.curl(&["http://wordy.example.test/less"]).await;
    assert_eq!(less.status, 200);
    assert_eq!(less.header("x").unwrap().len(), 60_000);
    world.good().await;
    reached("troubled_destinations", answers.len());
}

const QUIET: &str = r#"
  - {name: quiet, hosts: [quiet.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{quiet}", timeouts: {idle: 500ms}}
  - {name: blind, hosts: [blind.example.test], ports: [7], connect_to: "{quiet}", timeouts: {idle: 500ms}}
  - {name: busy, hosts: [busy.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{busy}", timeouts: {idle: 5s}}
"#;

const TUNNELS: &str = r#"
@id("tunnels")
permit (principal, action == Action::"connect", resource == Destination::"blind")
when { principal has unix };
"#;

/// What comes until the connection closes, and when it does.
async fn rest(io: &mut TcpStream) -> (String, Instant) {
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(SOON, io.read_to_end(&mut rest)).await;
    // Closed in good order or not.
    let _ = closed.expect("the connection is closed");
    (String::from_utf8(rest).unwrap(), Instant::now())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_idle_for_too_long_is_cut() {
    const STREAM: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut world = World::servers().await;
    let quiet = Origin::start(None, |head| {
        vec![match head.to_ascii_lowercase().contains("upgrade") {
            true => "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n".to_owned(),
            false => format!("{STREAM}2\r\nhi\r\n"),
        }]
    })
    .await;
    // A part in 20 ms, for longer than it may be idle.
    let busy = Origin::start(None, |_| {
        let parts = std::iter::repeat_n("1\r\nx\r\n", 300);
        let whole = std::iter::once(STREAM).chain(parts).chain(["0\r\n\r\n"]);
        whole.map(str::to_owned).collect()
    })
    .await;
    world.origins.push(("quiet".to_owned(), quiet.address));
    world.origins.push(("busy".to_owned(), busy.address));
    world
        .start_agent(
            &format!("{COMMON}{DESTINATIONS}{QUIET}"),
            &format!("{POLICIES}{TUNNELS}"),
        )
        .await;
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;

    let get = |host: &str, fields: &str| {
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n")
    };
    let began = Instant::now();
    let mut events = puppet.connect().await;
    events
        .write_all(get("quiet.example.test", "").as_bytes())
        .await
        .unwrap();
    let head = read_head(&mut events).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let mut upgrade = puppet.connect().await;
    let fields = "Connection: upgrade\r\nUpgrade: websocket\r\n";
    exchange(&mut upgrade, &get("quiet.example.test", fields))
        .await
        .expect(101);
    let mut blind = puppet.connect().await;
    open_tunnel(&mut blind, "blind.example.test:7")
        .await
        .expect(200);
    let mut lively = puppet.connect().await;
    let lively_answer = async {
        let began = Instant::now();
        let answer = exchange(&mut lively, &get("busy.example.test", "")).await;
        (answer.expect(200), began.elapsed())
    };
    let mut cut = 0;
    let ((answer, took), ended) = tokio::join!(
        lively_answer,
        join_all([&mut events, &mut upgrade, &mut blind].map(rest))
    );
    // What has begun is broken off, never ended as if it were whole.
    for ((said, at), expected) in ended.iter().zip(["2\r\nhi\r\n", "", ""]) {
        assert_eq!(said, expected);
        assert!(*at > began + SHORT, "{:?}", *at - began);
        cut += 1;
    }
    assert_eq!(answer.body, "x".repeat(300));
    assert!(took > Duration::from_secs(5), "{took:?}");
    assert_eq!((quiet.heads().len(), busy.heads().len()), (2, 1));
    world.good().await;
    reached("idle_cut", cut);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_does_not_look_whole() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |head| {
        let (fields, part) = match head.split(' ').nth(1) {
            Some("/length") => ("content-length: 10", "hi"),
            Some("/chunks") => ("transfer-encoding: chunked", "2\r\nhi\r\n"),
            _ => return vec![ANSWER.to_owned()],
        };
        let head = format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n");
        vec![head, part.to_owned(), String::new()]
    })
    .await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: origin, hosts: [origin.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let mut broken_off = 0;
    for (path, said) in [
        ("/", "ok"),
        ("/length", "hi"),
        ("/chunks", "2\r\nhi\r\n"),
        ("/", "ok"),
    ] {
        let mut io = puppet.connect().await;
        let request = format!(
            "GET http://origin.example.test{path} HTTP/1.1\r\nHost: origin.example.test\r\n\r\n"
        );
        if path == "/" {
            let answer = exchange(&mut io, &request).await.expect(200);
            assert_eq!(answer.body, said);
            continue;
        }
        io.write_all(request.as_bytes()).await.unwrap();
        let head = read_head(&mut io).await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(rest(&mut io).await.0, said, "{path}");
        broken_off += 1;
    }
    assert_eq!(origin.heads().len(), broken_off + 2);
    world.good().await;
    reached("broken_off", broken_off);
}

#[test]
fn a_name_server_that_does_not_answer_holds_up_no_other_name() {
    let name = "a_name_server_that_does_not_answer_holds_up_no_other_name";
    with_name_server(name, a_dead_name);
}

/// More than the threads that names are looked up on.
const CALLERS: usize = 600;

async fn a_dead_name(addresses: Addresses) {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |_| vec![ANSWER.to_owned()]).await;
    addresses.lock().unwrap().push(origin.address.ip());
    let port = origin.address.port();
    let destinations = format!(
        r#"
  - {{name: dead, hosts: [dead.example.test], scheme: http, credentials: [{{name: orders-api}}], timeouts: {{connect: 500ms}}}}
  - {{name: live, hosts: [live.example.test], scheme: http, ports: [{port}], credentials: [{{name: orders-api}}], allow_addresses: [127.0.0.0/8], timeouts: {{connect: 10s}}}}
"#
    );
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destinations}"), POLICIES)
        .await;
    world.good().await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    let dead = "GET http://dead.example.test/ HTTP/1.1\r\nHost: dead.example.test\r\n\r\n";
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let mut io = caller.connect().await;
        io.write_all(dead.as_bytes()).await.unwrap();
        callers.push(io);
    }
    let heads = join_all(callers.iter_mut().map(read_head)).await;
    assert!(heads.iter().all(|head| head.starts_with("HTTP/1.1 504 ")));
    let authority = format!("live.example.test:{port}");
    let live = format!("GET http://{authority}/ HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    exchange(&mut caller.connect().await, &live)
        .await
        .expect(200);
    reached("asked_for_a_dead_name", heads.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_waits_for_a_stream_where_it_could_leave_after_its_refusal() {
    const WAITING: usize = 20;
    let mut world = World::servers().await;
    let origin = StrictOrigin::default();
    let certificate = world.authority.issue(&["narrow.example.test"]).unwrap();
    let address = origin.start_http2(certificate, 1).await;
    world.origins.push(("narrow".to_owned(), address));
    let narrow = "  - {name: narrow, hosts: [narrow.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: \"{narrow}\"}\n";
    // Each worker has connections of its own.
    let common = COMMON.replace("workers: 2", "workers: 1");
    world
        .start_agent(&format!("{common}{DESTINATIONS}{narrow}"), POLICIES)
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let get = |path: &str| {
        format!(
            "GET https://narrow.example.test{path} HTTP/1.1\r\nHost: narrow.example.test\r\n\r\n"
        )
    };
    let mut io = caller.connect().await;
    exchange(&mut io, &get("/first")).await.expect(200);
    // Each has the one stream of a connection, and nothing is behind it.
    let mut waiting = Vec::new();
    for number in 1..=WAITING {
        io.write_all(get(&format!("/wait/{number}")).as_bytes())
            .await
            .unwrap();
        waiting.push(std::mem::replace(&mut io, caller.connect().await));
        let answer = tokio::time::timeout(SOON, exchange(&mut io, &get("/beside"))).await;
        answer.expect("it does not wait").expect(200);
    }
    let connections = origin.connections();
    assert_eq!(connections, 1 + WAITING);
    // A stream that was given back is lent again.
    drop(waiting);
    for _ in 0..WAITING {
        exchange(&mut io, &get("/after")).await.expect(200);
    }
    assert_eq!(origin.connections(), connections);
    let seen = origin.take();
    assert_eq!(seen.len(), 1 + 3 * WAITING, "{seen:?}");
    reached("asked_beside_waiting", WAITING);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_while_a_connection_is_made_is_not_sent() {
    const LIFETIME: Duration = Duration::from_secs(300);
    let mut world = World::servers().await;
    let clock = MovedClock::new();
    world.clock = Arc::clone(&clock) as Arc<dyn Clock>;
    let certificate = world.authority.issue(&["origin.example.test"]).unwrap();
    let origin = Origin::start(Some(&certificate), |_| vec![ANSWER.to_owned()]).await;
    // HTTP/2 and HTTP/1.1.
    let gates = [
        ("orders", Gate::before(world.api.address()).await),
        ("origin", Gate::before(origin.address).await),
    ];
    let mut configuration = COMMON.replace("workers: 2", "workers: 1") + "destinations:\n";
    for (name, gate) in &gates {
        configuration.push_str(&format!(
            "  - {{name: {name}, hosts: [{name}.example.test], credentials: [{{name: orders-api}}], ca_file: servers.pem, connect_to: \"{}\", timeouts: {{connect: 60s}}}}\n",
            gate.address
        ));
    }
    world.start_agent(&configuration, POLICIES).await;
    let sent = || world.api.seen().len() + origin.heads().len();
    let server = Arc::clone(world.authorization_server.state());
    let mut refused = 0;
    for (name, gate) in &gates {
        let before = sent();
        let url = format!("https://{name}.example.test/v1/orders");
        let arguments = [url.as_str()];
        let (answer, ()) = tokio::join!(world.curl(&arguments), async {
            gate.is_waited_at().await;
            clock.pass(LIFETIME);
            gate.open();
        });
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (503, "credential_expired"),
            "{answer:#?}"
        );
        assert_eq!(answer.header("retry-after").as_deref(), Some("1"));
        assert_eq!(sent(), before, "{name}");
        refused += 1;
        // The connection is there for the next, which has a token of its own.
        let tokens = server.token_requests();
        world.curl(&arguments).await.expect(200);
        assert_eq!(server.token_requests(), tokens + 1);
        assert_eq!((sent(), gate.connections()), (before + 1, 1), "{name}");
    }
    reached("expired_while_connecting", refused);
}

/// How an HTTP/2 server says that it does not serve a request (RFC 9113 sections 6.8 and 8.7).
#[derive(Clone, Copy)]
enum Refusing {
    Stream,
    Connection,
}

/// An origin that refuses every second request of a connection.
async fn start_refusing(certificate: ServerCertificate, refusing: Refusing) -> SocketAddr {
    let acceptor = http2_acceptor(certificate);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                serve_every_second(stream, refusing).await
            });
        }
    });
    address
}

async fn serve_every_second(
    mut io: impl AsyncRead + AsyncWrite + Unpin,
    refusing: Refusing,
) -> std::io::Result<()> {
    const OK: &[u8] = &[0x88];
    const REFUSED_STREAM: u32 = 7;
    let mut last_served = 0;
    io.read_exact(&mut [0; b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()])
        .await?;
    io.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    loop {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        let [_, high, low, kind, flags, stream @ ..] = head;
        io.read_exact(&mut vec![0; usize::from(u16::from_be_bytes([high, low]))])
            .await?;
        let stream = u32::from_be_bytes(stream);
        let is_second = last_served != 0 && last_served + 2 == stream;
        let answer = match (kind, refusing) {
            (SETTINGS, _) if flags & ACK == 0 => frame(SETTINGS, ACK, 0, &[]),
            (HEADERS, Refusing::Stream) if is_second => {
                last_served = 0;
                frame(RST_STREAM, 0, stream, &REFUSED_STREAM.to_be_bytes())
            }
            (HEADERS, Refusing::Connection) if is_second => {
                let [last, no_error] = [last_served, 0].map(u32::to_be_bytes);
                frame(GOAWAY, 0, 0, &[last, no_error].concat())
            }
            (HEADERS, _) => {
                last_served = stream;
                frame(HEADERS, END_HEADERS | END_STREAM, stream, OK)
            }
            _ => continue,
        };
        io.write_all(&answer).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_an_http2_server_refuses_is_sent_once_more_where_that_is_safe() {
    let mut world = World::servers().await;
    let mut destinations = DESTINATIONS.to_owned();
    for (name, refusing) in [
        ("stream", Refusing::Stream),
        ("connection", Refusing::Connection),
    ] {
        let host = format!("{name}.example.test");
        let certificate = world.authority.issue(&[&host]).unwrap();
        let address = start_refusing(certificate, refusing).await;
        world.origins.push((name.to_owned(), address));
        destinations.push_str(&format!(
            "  - {{name: {name}, hosts: [{host}], credentials: [{{name: orders-api}}], ca_file: servers.pem, connect_to: \"{{{name}}}\"}}\n"
        ));
    }
    // Each worker has connections of its own.
    let common = COMMON.replace("workers: 2", "workers: 1");
    world
        .start_agent(&format!("{common}{destinations}"), POLICIES)
        .await;
    world.good().await;
    for host in ["stream.example.test", "connection.example.test"] {
        let mut io = world.connect().await;
        for (method, status) in [("GET", 200), ("GET", 200), ("POST", 502), ("GET", 200)] {
            let request = format!(
                "{method} https://{host}/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n"
            );
            let answer = exchange(&mut io, &request).await.expect(status);
            if status == 502 {
                assert_eq!(answer.code(), "upstream_refused_stream");
            }
        }
    }
    world.good().await;
}
