//! What callers get of whom nothing is known yet: not much, and not for long.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use countersign::config::{Bind, Listener};
use countersign::listener::{BoundListener, Workers, accept};
use futures_util::future::select_all;
use http::{Method, Request};
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::support::counts::reached;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{NOBODY, eventually, is_root};

const PLAIN: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
/// Much less than the patience that agents have, and more than a busy machine takes.
const SOON: Duration = Duration::from_secs(20);

/// A further proxy of the world's agent.
struct Proxy {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    async fn start(world: &World, unattested: usize) -> Self {
        let agent = Arc::clone(world.app().agent());
        let listeners = agent.snapshot.load().config.listeners.clone();
        let is_local = |listener: &Listener| listener.name == "local";
        let mut listener = listeners.into_iter().find(is_local).unwrap();
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let path = world.path(&format!("patient-{number}.sock"));
        listener.name = "patient".to_owned();
        listener.bind = Bind::Unix(path.clone());
        let bound = BoundListener::bind(&listener.bind, &listener.access).unwrap();
        let workers = Workers::start(&agent, 1).unwrap();
        let task = tokio::spawn(accept(
            agent,
            workers,
            Arc::new(bound),
            listener,
            unattested,
        ));
        Self { path, task }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).await.unwrap()
    }
}

/// HTTP/2 in clear, and what ends with the connection.
async fn http2(io: UnixStream) -> (http2::SendRequest<Empty<Bytes>>, JoinHandle<()>) {
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io))
        .await
        .unwrap();
    let ended = tokio::spawn(async move {
        let _ = connection.await;
    });
    (sender, ended)
}

/// A request without a body.
fn asked(method: Method, uri: &str) -> Request<Empty<Bytes>> {
    let request = Request::builder().method(method).uri(uri);
    request.body(Empty::new()).unwrap()
}

/// The inside of a tunnel that is intercepted.
async fn tunnel(sender: &mut http2::SendRequest<Empty<Bytes>>) -> TokioIo<Upgraded> {
    let connect = asked(Method::CONNECT, "plain.example.test:80");
    let opened = sender.send_request(connect).await.unwrap();
    assert_eq!(opened.status(), 200);
    TokioIo::new(hyper::upgrade::on(opened).await.unwrap())
}

/// Waits until nothing more comes; when that was.
async fn closed(mut io: UnixStream) -> Instant {
    let rest = async { while matches!(io.read(&mut [0; 512]).await, Ok(1..)) {} };
    tokio::time::timeout(SOON, rest)
        .await
        .expect("the connection is closed");
    Instant::now()
}

/// Waits until one of these connections is closed, and takes it away.
async fn one_is_closed(open: &mut Vec<UnixStream>) {
    let ends = open.iter_mut().map(|io| {
        Box::pin(async move { while matches!(io.read(&mut [0; 512]).await, Ok(1..)) {} })
    });
    let ended = tokio::time::timeout(SOON, select_all(ends)).await;
    let ((), closed, _) = ended.expect("a connection is closed");
    open.remove(closed);
}

/// An agent that waits so long for a head.
async fn impatient(head: Duration) -> World {
    let mut world = World::servers().await;
    let limits = format!(
        "limits: {{per_identity: {{head_timeout: {}s}}}}",
        head.as_secs()
    );
    world
        .start_agent(&format!("{COMMON}{limits}\n{DESTINATIONS}"), POLICIES)
        .await;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_says_nothing_is_closed() {
    const HEAD: Duration = Duration::from_secs(5);
    let world = impatient(HEAD).await;
    let seen = world.plain_api.seen().len();
    let mut waiting = Vec::new();
    for said in [
        "",
        "G",
        "PRI * HTTP/2.0\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        // SETTINGS, and HEADERS whose block of fields does not end.
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x05\x01\x01\0\0\0\x01\0\x01x\x01y",
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\n",
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\nX: ",
    ] {
        let began = Instant::now();
        let mut io = world.connect().await;
        io.write_all(said.as_bytes()).await.unwrap();
        waiting.push((began, tokio::spawn(closed(io))));
    }
    // One that drips: every byte is new, and the head never whole.
    let began = Instant::now();
    let mut io = world.connect().await;
    io.write_all(b"GET http://plain.example.test/ HTTP/1.1\r\nX: ")
        .await
        .unwrap();
    let dripping = async move {
        while io.write_all(b"x").await.is_ok() {
            assert!(began.elapsed() < SOON, "the connection is closed");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Instant::now()
    };
    waiting.push((began, tokio::spawn(dripping)));
    // And one that is idle between two requests.
    let began = Instant::now();
    let mut io = world.connect().await;
    exchange(&mut io, PLAIN).await.expect(200);
    waiting.push((began, tokio::spawn(closed(io))));
    let mut silent = 0;
    for (began, closed) in waiting {
        let waited = closed.await.unwrap() - began;
        // Not at once either.
        assert!(waited > HEAD / 2, "{waited:?}");
        silent += 1;
    }
    assert_eq!(world.plain_api.seen().len(), seen + 1);
    reached("silent", silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_so_many_wait_to_be_attested() {
    let world = World::start().await;
    world.good().await;
    // One identity may have a quarter of them.
    let proxy = Proxy::start(&world, 8).await;
    let refused = || {
        let metrics = world.app().agent().metrics.encode();
        metrics
            .lines()
            .find_map(|line| {
                line.strip_prefix("countersign_refused_connections_total{listener=\"patient\"} ")
            })
            .map_or(0, |count| count.parse::<usize>().unwrap())
    };
    // Which of them are let in is not said.
    let mut waiting = vec![
        proxy.connect().await,
        proxy.connect().await,
        proxy.connect().await,
    ];
    one_is_closed(&mut waiting).await;
    assert_eq!(refused(), 1);
    let (mut first, second) = (waiting.remove(0), waiting.remove(0));
    // Who is attested has no place any more, and stays.
    exchange(&mut first, PLAIN).await.expect(200);
    let mut waiting = vec![proxy.connect().await, proxy.connect().await];
    one_is_closed(&mut waiting).await;
    assert_eq!(refused(), 2);
    let mut third = waiting.remove(0);
    exchange(&mut first, PLAIN).await.expect(200);
    exchange(&mut third, PLAIN).await.expect(200);
    assert_eq!(refused(), 2);
    // A tunnel in which nothing is said needs one, too, and there is one left.
    for io in [&mut first, &mut third] {
        open_tunnel(io, "orders.example.test:443").await.expect(200);
    }
    eventually(SOON, || async { (refused() == 3).then_some(()) }).await;
    tokio::select! {
        _ = closed(first) => {}
        _ = closed(third) => {}
    }
    // All places are free once those who have them leave.
    drop(second);
    eventually(SOON, || async {
        let mut io = proxy.connect().await;
        io.write_all(PLAIN.as_bytes()).await.ok()?;
        let mut status = [0; 12];
        io.read_exact(&mut status).await.ok()?;
        (&status == b"HTTP/1.1 200").then_some(())
    })
    .await;
    world.good().await;
    reached("refused_places", 3);
}

/// Tunnels in one connection cost whoever opens them next to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn one_identity_does_not_take_the_places_of_others() {
    const PLACES: usize = 40;
    if !is_root("one_identity_does_not_take_the_places_of_others") {
        return;
    }
    let world = World::start().await;
    world.good().await;
    let proxy = Proxy::start(&world, PLACES).await;
    let other = Puppet::start(proxy.path.to_str().unwrap(), Some(NOBODY)).await;
    let (mut sender, _) = http2(proxy.connect().await).await;
    let mut tunnels = Vec::new();
    for _ in 0..2 * PLACES {
        let mut inside = tunnel(&mut sender).await;
        // It may be closed by now.
        let _ = inside.write_all(b"G").await;
        tunnels.push(inside);
    }
    exchange(&mut other.connect().await, PLAIN)
        .await
        .expect(200);
}

/// Whoever asks only what is refused before the caller is attested has no more time than who asks nothing.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_attested_keeps_no_connection() {
    let world = impatient(Duration::from_secs(5)).await;
    let proxy = world.connect().await;
    let (mut sender, ended) = http2(proxy).await;
    let trace = asked(Method::TRACE, "http://plain.example.test/v1/orders");
    let refused = sender.send_request(trace).await.unwrap();
    assert_eq!(refused.status(), 405);
    let closed = tokio::time::timeout(SOON, ended).await;
    closed.expect("the connection is closed").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_stays_for_the_tunnels_in_it() {
    const INSIDE: &str = "GET /v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    /// Longer than a connection that is cut has to end.
    const LONG: Duration = Duration::from_secs(18);
    let world = impatient(Duration::from_secs(10)).await;
    let proxy = world.connect().await;
    let (mut sender, ended) = http2(proxy).await;
    let mut inside = tunnel(&mut sender).await;
    let began = Instant::now();
    while began.elapsed() < LONG {
        exchange(&mut inside, INSIDE).await.expect(200);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(!ended.is_finished());
    drop(inside);
    let closed = tokio::time::timeout(SOON, ended).await;
    closed.expect("the connection is closed").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_has_a_place_until_somebody_in_it_is_attested() {
    let world = World::start().await;
    world.good().await;
    // A newcomer that is let in may have a tunnel's place: then anew.
    let (proxy, _sender, mut tunnels) = eventually(SOON, || async {
        let proxy = Proxy::start(&world, 12).await;
        let (mut sender, _) = http2(proxy.connect().await).await;
        let mut tunnels = [tunnel(&mut sender).await, tunnel(&mut sender).await];
        for inside in &mut tunnels {
            let begun = b"GET /v1/orders HTTP/1.1\r\nX: ";
            inside.write_all(begun).await.unwrap();
        }
        let newcomer = closed(proxy.connect().await);
        let waited = tokio::time::timeout(Duration::from_secs(1), newcomer).await;
        waited.is_ok().then_some((proxy, sender, tunnels))
    })
    .await;
    // The connection's place, and that of one tunnel.
    let rest = "x\r\nHost: plain.example.test\r\n\r\n";
    exchange(&mut tunnels[0], rest).await.expect(200);
    let mut attested = vec![
        proxy.connect().await,
        proxy.connect().await,
        proxy.connect().await,
    ];
    one_is_closed(&mut attested).await;
    for io in &mut attested {
        exchange(io, PLAIN).await.expect(200);
    }
    exchange(&mut tunnels[1], rest).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_tunnel_of_an_http2_connection_counts_for_its_identity() {
    const INSIDE: &str = "GET /v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let mut world = World::servers().await;
    let limits = "limits: {per_identity: {connections: 3}}";
    world
        .start_agent(&format!("{COMMON}{limits}\n{DESTINATIONS}"), POLICIES)
        .await;
    let proxy = world.connect().await;
    let (mut sender, _) = http2(proxy).await;
    let mut tunnels = Vec::new();
    for _ in 0..3 {
        tunnels.push(tunnel(&mut sender).await);
    }
    for (inside, status) in tunnels.iter_mut().zip([200, 200, 429]) {
        let answer = exchange(inside, INSIDE).await.expect(status);
        assert_eq!(answer.code() == "too_many_requests", status == 429);
    }
    // The place of one that has ended is free.
    drop(tunnels.remove(0));
    let mut last = tunnels.pop().unwrap();
    served(&mut last, INSIDE).await;
    // An HTTP/1 connection that is a tunnel is one.
    drop(last);
    let mut proxy = world.connect().await;
    open_tunnel(&mut proxy, "plain.example.test:80")
        .await
        .expect(200);
    served(&mut proxy, INSIDE).await;
}

/// Asks until the answer is 200.
async fn served<Io: AsyncRead + AsyncWrite + Unpin>(io: &mut Io, request: &str) {
    let began = Instant::now();
    while exchange(io, request).await.status != 200 {
        assert!(began.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
