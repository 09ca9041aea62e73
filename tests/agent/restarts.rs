//! One agent after another on the same sockets. The test is the service manager: it holds the listening
//! sockets, starts agents on them and ends agents, one over the other and one after the other, while
//! clients go on.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use countersign::audit::verify::verify;
use nix::sys::signal::Signal;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::support::counts::reached;
use crate::support::curl::{Answer, curl};
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::manager::Service;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel, read_head, read_response};
use crate::support::repetitions::repetitions;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World, audit_lines};

const ORDERS: &str = "https://orders.example.test/v1/orders";

/// A destination that answers when it is let, and one without a credential, for tunnels whose inside nobody sees.
const GATED_AND_TUNNELLED: &str = r#"
  - {name: gated, hosts: [gated.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{gated}"}
  - {name: tunnelled, hosts: [tunnel.example.test], ports: [7000], scheme: http, connect_to: "{tunnel}"}
"#;

const CONNECTS: &str = r#"
@id("connects")
permit (principal, action == Action::"connect", resource == Destination::"tunnelled");
"#;

/// A world whose agents listen on two sockets: `proxy` (TCP) and `local` (Unix).
async fn world(drain: &str) -> World {
    let world = World::servers().await;
    configure(&world, drain, "");
    world.write_policies(POLICIES);
    world
}

fn configure(world: &World, drain: &str, extra: &str) {
    let common: String = COMMON
        .lines()
        .filter(|line| !line.contains("type: gateway"))
        .map(|line| format!("{line}\n"))
        .collect();
    let common = common.replace("workers: 2", &format!("workers: 2, drain: {drain}"));
    assert!(common.contains(drain));
    // On a machine with other things to do a token takes its time, which is not what is tested here.
    let common = common.replace("timeout: 20s", "timeout: 60s");
    let admin = "admin: {socket: admin.sock}\n";
    let configuration = format!("{common}{admin}{DESTINATIONS}{extra}");
    world.write("countersign.yaml", &world.fill(&configuration));
}

/// The sockets that a socket unit would listen on.
struct Sockets {
    proxy: std::net::TcpListener,
    local: UnixListener,
}

impl Sockets {
    /// Listens, `proxy` at any port, `local` where the configuration has it.
    fn listen(world: &World) -> Self {
        let proxy = TcpSocket::new_v4().unwrap();
        proxy.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let proxy = proxy.listen(4096).unwrap().into_std().unwrap();
        let local = UnixListener::bind(world.path("proxy.sock")).unwrap();
        rustix::net::listen(&local, 4096).unwrap();
        Self { proxy, local }
    }

    fn address(&self) -> SocketAddr {
        self.proxy.local_addr().unwrap()
    }

    /// Copies for an agent. One is known by its name, the other by where it is bound.
    fn handed_over(&self) -> Vec<(&'static str, OwnedFd)> {
        vec![
            ("proxy", self.proxy.try_clone().unwrap().into()),
            ("countersign.socket", self.local.try_clone().unwrap().into()),
        ]
    }
}

async fn proxied(world: &World, proxy: SocketAddr) -> Answer {
    let (proxy, root) = (format!("http://{proxy}"), world.path("ca.pem"));
    curl(&[
        "--proxy",
        &proxy,
        "--cacert",
        root.to_str().unwrap(),
        ORDERS,
    ])
    .await
}

/// A request that succeeds, and that the origin saw.
async fn good(world: &World, proxy: SocketAddr) {
    let before = world.api.seen().len();
    proxied(world, proxy).await.expect(200);
    assert_eq!(world.api.seen().len(), before + 1);
}

async fn admin(world: &World, path: &str) -> Answer {
    let (socket, url) = (world.path("admin.sock"), format!("http://agent{path}"));
    curl(&["--unix-socket", socket.to_str().unwrap(), &url]).await
}

async fn status(world: &World) -> Value {
    admin(world, "/v1/status").await.expect(200).json()
}

/// Where the agent's `proxy` listens.
async fn proxy_address(world: &World) -> SocketAddr {
    let status = status(world).await;
    let mut listeners = status["listeners"].as_array().unwrap().iter();
    let proxy = listeners.find(|known| known["name"] == "proxy").unwrap();
    proxy["bind"].as_str().unwrap().parse().unwrap()
}

// --- Clients that go on.

/// How clients get to the API.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// In clear, through the proxy on TCP.
    Clear,
    /// In clear, on the Unix socket.
    LocalClear,
    /// TLS in a tunnel, through the proxy on TCP.
    Tls,
    /// TLS in a tunnel, on the Unix socket.
    LocalTls,
}

/// What all clients count together.
#[derive(Default)]
struct Tally {
    answered: AtomicUsize,
    connections: AtomicUsize,
    /// Answers after which the agent closes: `connection: close`.
    said_last: AtomicUsize,
    /// Requests sent again because the agent had closed a connection that it had served before.
    sent_again: AtomicUsize,
    refused: Mutex<Vec<String>>,
}

/// What clients need to know.
struct Course {
    /// Connects to the proxy on TCP.
    puppet: Puppet,
    local: PathBuf,
    tls: TlsConnector,
    tally: Tally,
    ends: CancellationToken,
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What came of a request.
enum Outcome {
    /// 200, and whether the connection is good for another.
    Answered {
        stays: bool,
    },
    /// The connection was closed before a byte of an answer.
    Closed,
    Wrong(String),
}

struct Busy {
    way: Way,
    answered: Arc<AtomicUsize>,
}

impl Busy {
    fn start(course: &Arc<Course>, way: Way) -> Self {
        let answered = Arc::<AtomicUsize>::default();
        let (course, counted) = (Arc::clone(course), Arc::clone(&answered));
        tokio::spawn(async move { go_on(&course, way, &counted).await });
        Self { way, answered }
    }
}

/// Waits until every client is answered once more.
async fn all_are_answered(clients: &[Busy]) {
    let answered = |client: &Busy| client.answered.load(Ordering::Relaxed);
    let before: Vec<usize> = clients.iter().map(answered).collect();
    let deadline = Instant::now() + Duration::from_secs(300);
    loop {
        let waits: Vec<Way> = clients
            .iter()
            .zip(&before)
            .filter(|(client, before)| answered(client) <= **before)
            .map(|(client, _)| client.way)
            .collect();
        if waits.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "not answered: {waits:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks again and again on a connection kept alive, until the course ends or something is wrong.
async fn go_on(course: &Course, way: Way, answered: &AtomicUsize) {
    let tally = &course.tally;
    let wrong = |what: String| {
        tally
            .refused
            .lock()
            .unwrap()
            .push(format!("{way:?}: {what}"))
    };
    let mut connection: Option<(Box<dyn Io>, usize)> = None;
    while !course.ends.is_cancelled() {
        let (mut io, served) = match connection.take() {
            Some(open) => open,
            None => match connect(course, way).await {
                Ok(io) => {
                    tally.connections.fetch_add(1, Ordering::Relaxed);
                    (io, 0)
                }
                Err(what) => return wrong(what),
            },
        };
        match ask(&mut io, way).await {
            Outcome::Answered { stays } => {
                tally.answered.fetch_add(1, Ordering::Relaxed);
                answered.fetch_add(1, Ordering::Relaxed);
                match stays {
                    true => connection = Some((io, served + 1)),
                    false => _ = tally.said_last.fetch_add(1, Ordering::Relaxed),
                }
                // A client thinks between requests; 200 that do not would measure the machine.
                tokio::time::sleep(Duration::from_millis(1000)).await;
            }
            // RFC 9112 section 9.3.1: a connection that served before may be closed at any time.
            Outcome::Closed if served > 0 => _ = tally.sent_again.fetch_add(1, Ordering::Relaxed),
            Outcome::Closed => return wrong("a new connection was closed unanswered".to_owned()),
            Outcome::Wrong(what) => return wrong(what),
        }
    }
}

async fn connect(course: &Course, way: Way) -> Result<Box<dyn Io>, String> {
    let io: Box<dyn Io> = match way {
        Way::Clear | Way::Tls => Box::new(course.puppet.connect().await),
        Way::LocalClear | Way::LocalTls => {
            let io = UnixStream::connect(&course.local).await;
            Box::new(io.map_err(|error| format!("connect: {error}"))?)
        }
    };
    match way {
        Way::Clear | Way::LocalClear => Ok(io),
        Way::Tls | Way::LocalTls => into_tunnel(course, io).await,
    }
}

async fn into_tunnel(course: &Course, mut io: Box<dyn Io>) -> Result<Box<dyn Io>, String> {
    let request =
        "CONNECT orders.example.test:443 HTTP/1.1\r\nHost: orders.example.test:443\r\n\r\n";
    let asked = io.write_all(request.as_bytes()).await;
    asked.map_err(|error| format!("CONNECT: {error}"))?;
    let head = head(&mut io).await;
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(format!("CONNECT: {head}"));
    }
    let name = ServerName::try_from("orders.example.test").unwrap();
    let io = course.tls.connect(name, io).await;
    Ok(Box::new(io.map_err(|error| format!("TLS: {error}"))?))
}

/// A head, however long it takes; what came of it where the connection ends before.
async fn head(io: &mut Box<dyn Io>) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && io.read(&mut byte).await.is_ok_and(|read| read == 1) {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}

async fn ask(io: &mut Box<dyn Io>, way: Way) -> Outcome {
    let request = match way {
        Way::Tls | Way::LocalTls => "GET /v1/orders HTTP/1.1\r\nHost: orders.example.test\r\n\r\n",
        Way::Clear | Way::LocalClear => {
            "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n"
        }
    };
    if io.write_all(request.as_bytes()).await.is_err() || io.flush().await.is_err() {
        return Outcome::Closed;
    }
    let head = head(io).await;
    if head.is_empty() {
        return Outcome::Closed;
    }
    let header = |wanted: &str| {
        head.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case(wanted))
            .map(|(_, value)| value.trim().to_owned())
    };
    let length: usize = header("content-length")
        .and_then(|length| length.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    if !head.starts_with("HTTP/1.1 200 ") || length == 0 {
        return Outcome::Wrong(format!("answered {head}"));
    }
    if let Err(error) = io.read_exact(&mut body).await {
        return Outcome::Wrong(format!("an answer was cut off: {error}"));
    }
    Outcome::Answered {
        stays: header("connection").is_none_or(|value| value != "close"),
    }
}

fn tls_trusting(root: &Path) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(root).unwrap())
        .unwrap();
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_go_on_over_restarts() {
    const CLIENTS: usize = 200;
    let began = Instant::now();
    let restarts = repetitions(20);
    let world = world("20s").await;
    let sockets = Sockets::listen(&world);
    let start = || Service::start(world.directory.path(), sockets.handed_over());
    let mut agent = start();
    agent.says("READY=1").await;
    let course = Arc::new(Course {
        puppet: Puppet::start(&sockets.address().to_string(), None).await,
        local: world.path("proxy.sock"),
        tls: tls_trusting(&world.path("ca.pem")),
        tally: Tally::default(),
        ends: CancellationToken::new(),
    });
    let clients: Vec<Busy> = (0..CLIENTS)
        // Most on the Unix socket: to find out whose a TCP connection is takes a look at every process.
        .map(|number| match number % 10 {
            0 => Busy::start(&course, Way::Clear),
            1 => Busy::start(&course, Way::Tls),
            2..6 => Busy::start(&course, Way::LocalClear),
            _ => Busy::start(&course, Way::LocalTls),
        })
        .collect();
    all_are_answered(&clients).await;
    println!(
        "all are served after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    let mut done = 0;
    for restart in 0..restarts {
        // In turn: the next agent serves beside the one that drains, or clients wait for it.
        let is_over_the_other = restart % 2 == 0;
        let mut next = None;
        if is_over_the_other {
            let next = next.insert(start());
            next.says("READY=1").await;
        }
        agent.signal(Signal::SIGTERM);
        agent.says("STOPPING=1").await;
        let ended = agent.ended().await;
        assert!(ended.success(), "{ended}: {}", agent.log());
        agent = match next {
            Some(next) => next,
            None => start(),
        };
        agent.says("READY=1").await;
        all_are_answered(&clients).await;
        done += 1;
        println!(
            "restart {done} after {:.1} s",
            began.elapsed().as_secs_f64()
        );
    }
    course.ends.cancel();
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());

    let tally = &course.tally;
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let refused = tally.refused.lock().unwrap().clone();
    println!(
        "{CLIENTS} clients, {done} restarts: {} answered on {} connections, {} last answers, {} sent again, {} refused",
        count(&tally.answered),
        count(&tally.connections),
        count(&tally.said_last),
        count(&tally.sent_again),
        refused.len(),
    );
    assert_eq!(refused, Vec::<String>::new());
    // Every client had to connect anew each time.
    assert!(count(&tally.connections) >= CLIENTS * (done + 1));
    assert!(count(&tally.answered) >= CLIENTS * (done + 1));
    // What was answered is recorded, each in a chain that is whole.
    let recorded = recorded_with_200(&world);
    assert!(
        (count(&tally.answered)..=count(&tally.answered) + count(&tally.sent_again) + CLIENTS)
            .contains(&recorded),
        "{recorded} recorded"
    );
    reached("restart_clients", clients.len());
    reached("restarts", done);
    reached("refused_over_restarts", refused.len());
}

/// Verifies every chain of the audit, and counts requests that were answered.
fn recorded_with_200(world: &World) -> usize {
    ["audit.jsonl", "audit.jsonl.beside1"]
        .into_iter()
        .map(|name| world.path(name))
        .map(|path| {
            verify(&path, None).unwrap_or_else(|error| panic!("{error}"));
            let lines = audit_lines(&path);
            let is_answered = |line: &&Value| line["kind"] == "request" && line["status"] == 200;
            lines.iter().filter(is_answered).count()
        })
        .sum()
}

// --- What lives on, and for how long.

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_live_through_the_drain_window_and_then_are_cut() {
    const WINDOW: Duration = Duration::from_secs(7);
    let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut world = World::servers().await;
    let gate = Gate::before(world.plain_api.address()).await;
    world.origins = vec![
        ("tunnel".to_owned(), echo.local_addr().unwrap()),
        ("gated".to_owned(), gate.address),
    ];
    configure(&world, "7s", GATED_AND_TUNNELLED);
    world.write_policies(&format!("{POLICIES}{CONNECTS}"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.into_split();
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    });
    let sockets = Sockets::listen(&world);
    let mut agent = Service::start(world.directory.path(), sockets.handed_over());
    agent.says("READY=1").await;
    let proxy = sockets.address();
    good(&world, proxy).await;
    let mut tunnel = world.connect().await;
    open_tunnel(&mut tunnel, "tunnel.example.test:7000")
        .await
        .expect(200);
    let mut idle = world.connect().await;
    let asked =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    exchange(&mut idle, asked).await.expect(200);
    let mut busy = world.connect().await;
    let gated = asked.replace("plain", "gated");
    busy.write_all(gated.as_bytes()).await.unwrap();
    gate.is_waited_at().await;

    let told = Instant::now();
    agent.signal(Signal::SIGTERM);
    agent.says("STOPPING=1").await;
    let readiness = admin(&world, "/readyz").await.expect(503);
    assert_eq!(readiness.json()["reasons"][0], "the agent is shutting down");
    gate.open();
    let last = read_response(&mut busy).await.expect(200);
    assert_eq!(last.headers("connection"), ["close"]);
    assert_eq!(busy.read(&mut [0]).await.unwrap(), 0);
    // In good order: an end, not a reset.
    assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
    let mut echoed = [0; 4];
    tunnel.write_all(b"ping").await.unwrap();
    tunnel.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"ping");
    assert!(told.elapsed() < WINDOW, "the machine is too slow for this");
    // Nobody takes this one up yet, and nobody refuses it.
    let waiting = world.connect().await;

    assert!(tunnel.read(&mut [0]).await.is_ok_and(|read| read == 0));
    assert!(told.elapsed() >= WINDOW, "{:?}", told.elapsed());
    assert!(agent.ended().await.success(), "{}", agent.log());
    assert!(!world.path("admin.sock").exists());
    assert!(world.path("proxy.sock").exists());

    let mut next = Service::start(world.directory.path(), sockets.handed_over());
    next.says("READY=1").await;
    let mut waiting = waiting;
    exchange(&mut waiting, asked).await.expect(200);
    good(&world, proxy).await;
    let events: Vec<Value> = audit_lines(&world.path("audit.jsonl"))
        .into_iter()
        .filter(|line| line["kind"] == "lifecycle")
        .map(|line| line["event"].clone())
        .collect();
    let began = ["start", "interception_authority"];
    assert_eq!(events, [&began[..], &["stop"], &began].concat());
    verify(&world.path("audit.jsonl"), None).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_drain() {
    let world = world("1h").await;
    let sockets = Sockets::listen(&world);
    let mut agent = Service::start(world.directory.path(), sockets.handed_over());
    agent.says("READY=1").await;
    good(&world, sockets.address()).await;
    // Upgraded, so that nothing ends it but its client.
    let mut upgraded = world.connect().await;
    let request = "GET http://plain.example.test/v1/echo HTTP/1.1\r\nHost: plain.example.test\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    upgraded.write_all(request.as_bytes()).await.unwrap();
    let head = read_head(&mut upgraded).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    agent.signal(Signal::SIGTERM);
    let stopping = agent.says("STOPPING=1").await;
    assert!(stopping.contains("EXTEND_TIMEOUT_USEC="), "{stopping}");
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    assert_eq!(upgraded.read(&mut [0]).await.unwrap_or(0), 0);
    verify(&world.path("audit.jsonl"), None).unwrap();
}

// --- What the service manager is told, and what it keeps.

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_hangs_does_not_keep_an_agent_from_ending() {
    const WINDOW: Duration = Duration::from_secs(30);
    // What is read before anything is bound anew, and what is read after.
    for hangs in ["countersign.yaml", "servers.pem"] {
        let world = world("30s").await;
        let mut agent = Service::start(world.directory.path(), Vec::new());
        agent.says("READY=1").await;
        let (pipe, path) = (world.path("pipe"), world.path(hangs));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::rename(&pipe, &path).unwrap();
        agent.signal(Signal::SIGHUP);
        agent.says("RELOADING=1").await;
        // Returns once it is read; nothing is ever written.
        let opening = move || std::fs::File::options().write(true).open(path).unwrap();
        let _writer = tokio::task::spawn_blocking(opening).await.unwrap();
        let began = Instant::now();
        agent.signal(Signal::SIGTERM);
        agent.says("STOPPING=1").await;
        assert!(agent.ended().await.success(), "{}", agent.log());
        assert!(began.elapsed() < WINDOW, "{:?}", began.elapsed());
        let records = audit_lines(&world.path("audit.jsonl"));
        assert_eq!(records.last().unwrap()["event"], "stop", "{hangs}");
        assert!(!world.path("admin.sock").exists(), "{hangs}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_is_told_and_keeps_sockets() {
    let world = world("10s").await;
    let mut agent = Service::start(world.directory.path(), Vec::new());
    let ready = agent.says("READY=1").await;
    assert!(ready.contains("\nSTATUS=serving; policies "), "{ready}");
    let proxy = proxy_address(&world).await;
    good(&world, proxy).await;

    // A reload that fails, and one that succeeds: each begins and ends.
    world.write("policies/broken.cedar", "permit (");
    agent.signal(Signal::SIGHUP);
    agent
        .says("RELOADING=1")
        .await
        .lines()
        .find_map(|line| line.strip_prefix("MONOTONIC_USEC=")?.parse::<u64>().ok())
        .expect("when it began");
    eventually(Duration::from_secs(30), || async {
        let last = agent.said().pop()?;
        last.contains("a reload failed").then_some(())
    })
    .await;
    std::fs::remove_file(world.path("policies/broken.cedar")).unwrap();
    agent.signal(Signal::SIGHUP);
    eventually(Duration::from_secs(30), || async {
        let last = agent.said().pop()?;
        last.contains("STATUS=serving; policies ").then_some(())
    })
    .await;

    let kept = agent.kept();
    assert_eq!(kept.len(), 2);
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    let socket = world.path("proxy.sock");
    let asked =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    // Both wait for the next agent.
    let puppet = Puppet::start(&proxy.to_string(), None).await;
    let mut tcp = puppet.connect().await;
    let mut unix = UnixStream::connect(&socket).await.unwrap();

    // Meanwhile fewer may connect to the Unix socket.
    let written = std::fs::read_to_string(world.path("countersign.yaml")).unwrap();
    let restricted = written.replace("mode: \"0666\"", "mode: \"0660\"");
    assert_ne!(restricted, written);
    world.write("countersign.yaml", &restricted);

    let mut next = Service::start(world.directory.path(), again(&kept));
    next.says("READY=1").await;
    let file = std::fs::metadata(&socket).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o660);
    assert_eq!(proxy_address(&world).await, proxy);
    exchange(&mut tcp, asked).await.expect(200);
    exchange(&mut unix, asked).await.expect(200);
    assert!(next.kept().is_empty(), "it has them already");
    good(&world, proxy).await;
    next.signal(Signal::SIGTERM);
    assert!(next.ended().await.success(), "{}", next.log());
    assert!(socket.exists());
}

/// What was kept, as it is handed over to the next agent.
fn again(kept: &[(String, OwnedFd)]) -> Vec<(&str, OwnedFd)> {
    kept.iter()
        .map(|(name, socket)| (name.as_str(), socket.try_clone().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_was_kept_is_for_who_is_bound_there_next() {
    const ASKED: &str =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let world = world("10s").await;
    let written = std::fs::read_to_string(world.path("countersign.yaml")).unwrap();
    let port = TcpSocket::new_v4().unwrap();
    port.set_reuseaddr(true).unwrap();
    port.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let fixed = port.local_addr().unwrap();
    let proxy = |name: &str, bind: &str| {
        format!("  - {{name: {name}, type: forward_proxy, bind: \"{bind}\"}}\n")
    };
    let before = written.replace(
        &proxy("proxy", "127.0.0.1:0"),
        &proxy("proxy", &fixed.to_string()),
    );
    assert_ne!(before, written);
    world.write("countersign.yaml", &before);
    let mut agent = Service::start(world.directory.path(), Vec::new());
    agent.says("READY=1").await;
    let kept = agent.kept();
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());

    // The name is elsewhere now, its address another's, and the Unix socket is at another path.
    let both = proxy("proxy", "127.0.0.1:0") + &proxy("other", &fixed.to_string());
    let after = before
        .replace(&proxy("proxy", &fixed.to_string()), &both)
        .replace("/proxy.sock", "/moved.sock");
    assert_ne!(after, before);
    world.write("countersign.yaml", &after);
    let puppet = Puppet::start(&fixed.to_string(), None).await;
    let mut tcp = puppet.connect().await;
    let mut next = Service::start(world.directory.path(), again(&kept));
    next.says("READY=1").await;
    exchange(&mut tcp, ASKED).await.expect(200);
    let moved = proxy_address(&world).await;
    assert_ne!(moved, fixed);
    good(&world, moved).await;
    let mut unix = UnixStream::connect(world.path("moved.sock")).await.unwrap();
    exchange(&mut unix, ASKED).await.expect(200);
    assert_eq!(next.kept().len(), 2);
    let said = next.said();
    let forgotten = said
        .iter()
        .filter(|message| message.contains("FDSTOREREMOVE=1"));
    assert_eq!(forgotten.count(), 1, "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_handed_over_twice_is_taken_once() {
    let world = world("10s").await;
    let sockets = Sockets::listen(&world);
    let [_, local] = sockets.handed_over().try_into().unwrap();
    let mut agent = Service::start(world.directory.path(), vec![local]);
    agent.says("READY=1").await;
    let proxy = proxy_address(&world).await;
    good(&world, proxy).await;
    // Once renamed, the listener's socket is stored, beside the socket unit's.
    let configuration = std::fs::read_to_string(world.path("countersign.yaml")).unwrap();
    world.write(
        "countersign.yaml",
        &configuration.replace("name: local,", "name: renamed,"),
    );
    agent.signal(Signal::SIGHUP);
    let (name, renamed) = eventually(Duration::from_secs(30), || async {
        let mut kept = agent.kept();
        (kept.len() == 2).then(|| kept.pop())?
    })
    .await;
    good(&world, proxy).await;
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());

    // Who may connect is for the socket unit to say.
    let mode = PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(world.path("proxy.sock"), mode).unwrap();
    let [_, local] = sockets.handed_over().try_into().unwrap();
    let handed_over = vec![local, (&*name, renamed)];
    let mut next = Service::start(world.directory.path(), handed_over);
    next.says("READY=1").await;
    let asked =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let mut unix = UnixStream::connect(world.path("proxy.sock")).await.unwrap();
    exchange(&mut unix, asked).await.expect(200);
    let file = std::fs::metadata(world.path("proxy.sock")).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    good(&world, proxy_address(&world).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_nobody_keeps_are_closed_when_the_agent_ends() {
    let world = world("1h").await;
    let mut agent = Service::start_without_store(world.directory.path(), Vec::new());
    agent.says("READY=1").await;
    let proxy = proxy_address(&world).await;
    good(&world, proxy).await;
    // Upgraded, so that nothing ends it but its client.
    let mut upgraded = world.connect().await;
    let request = "GET http://plain.example.test/v1/echo HTTP/1.1\r\nHost: plain.example.test\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    upgraded.write_all(request.as_bytes()).await.unwrap();
    let head = read_head(&mut upgraded).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    agent.signal(Signal::SIGTERM);
    agent.says("STOPPING=1").await;
    eventually(Duration::from_secs(30), || async {
        let refused = TcpStream::connect(proxy).await.err()?;
        let is_refused = refused.kind() == ErrorKind::ConnectionRefused;
        (is_refused && !world.path("proxy.sock").exists()).then_some(())
    })
    .await;
    let mut echoed = [0; 4];
    upgraded.write_all(b"ping").await.unwrap();
    upgraded.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"ping");
    assert!(agent.kept().is_empty());
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_cannot_be_taken_keep_an_agent_from_starting() {
    let world = world("10s").await;
    let sockets = Sockets::listen(&world);
    let mut agent = Service::start(world.directory.path(), sockets.handed_over());
    agent.says("READY=1").await;
    good(&world, sockets.address()).await;
    let other = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = std::net::TcpStream::connect(sockets.address()).unwrap();
    let cases: Vec<(&str, &str, OwnedFd)> = vec![
        ("nobody", "handed_over_socket_unused", other().into()),
        ("local", "handed_over_socket_unusable", other().into()),
        (
            "proxy",
            "handed_over_socket_unusable",
            UdpSocket::bind("127.0.0.1:0").unwrap().into(),
        ),
        ("proxy", "handed_over_socket_unusable", connected.into()),
        (
            "proxy",
            "handed_over_socket_unusable",
            std::fs::File::open("/dev/null").unwrap().into(),
        ),
        ("proxy:twice", "handed_over_socket_unusable", other().into()),
    ];
    let mut refused = 0;
    for (name, code, socket) in cases {
        let mut handed_over = vec![(name, socket)];
        if code == "handed_over_socket_unused" {
            handed_over.push(("local", sockets.local.try_clone().unwrap().into()));
        }
        let mut second = Service::start(world.directory.path(), handed_over);
        let ended = second.ended().await;
        let log = second.log();
        assert_eq!(ended.code(), Some(78), "{name}: {log}");
        assert!(log.contains(code), "{name}: {log}");
        assert!(
            log.contains(name.split(':').next().unwrap()) || name.contains(':'),
            "{log}"
        );
        assert!(
            second
                .said()
                .iter()
                .all(|message| !message.contains("READY=1")),
            "{name}"
        );
        // The agent that serves lost nothing to it.
        good(&world, sockets.address()).await;
        assert_eq!(status(&world).await["ready"], true);
        refused += 1;
    }
    reached("sockets_refused", refused);
}

// --- The units that are shipped.

/// The values of a key, in order.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(known, _)| *known == key)
        .map(|(_, value)| value)
        .collect()
}

/// Seconds, as both the units and the configuration write them.
fn seconds(text: &str) -> u64 {
    text.strip_suffix('s').unwrap().parse().unwrap()
}

#[test]
fn the_units_fit_each_other_and_the_examples() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
    let service = read("deploy/systemd/countersign.service");
    let socket = read("deploy/systemd/countersign.socket");
    let readme = read("README.md");
    let (_, first) = readme.split_once("\n```yaml\n").unwrap();
    let (first, _) = first.split_once("\n```\n").unwrap();
    let schema = countersign::config::schema();
    let drain = schema["$defs"]["Runtime"]["properties"]["drain"]["default"].as_str();

    // A socket that no listener takes keeps the agent from starting.
    let listened = values(&socket, "ListenStream");
    let mut sorted = listened.clone();
    sorted.sort_unstable();
    for example in [&read("deploy/examples/one-machine.yaml"), first] {
        let mut wanted: Vec<&str> = example
            .lines()
            .filter_map(|line| line.split_once("bind: \"")?.1.split_once('"'))
            .map(|(bind, _)| bind.strip_prefix("unix:").unwrap_or(bind))
            .collect();
        wanted.sort_unstable();
        assert_eq!(sorted, wanted, "{example}");
    }
    let one = |key: &str| match values(&service, key).as_slice() {
        [value] => (*value).to_owned(),
        values => panic!("{key}: {values:?}"),
    };
    assert_eq!(one("Type"), "notify");
    assert_eq!(one("Requires"), "countersign.socket");
    assert!(one("ExecReload").contains("-HUP $MAINPID"));
    let stored = one("FileDescriptorStoreMax");
    assert!(stored.parse::<usize>().unwrap() >= listened.len());
    assert_eq!(one("Environment"), format!("FDSTORE={stored}"));
    assert!(seconds(&one("TimeoutStopSec")) > seconds(drain.unwrap()));
    assert_eq!(one("RuntimeDirectoryPreserve"), "yes");
    assert_eq!(one("NoNewPrivileges"), "yes");

    let directory = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_countersign");
    let installed = service.replace("/usr/bin/countersign", program);
    assert!(installed.contains(program));
    let units =
        ["countersign.service", "countersign.socket"].map(|name| directory.path().join(name));
    std::fs::write(&units[0], installed).unwrap();
    std::fs::write(&units[1], socket).unwrap();
    let verified = std::process::Command::new("systemd-analyze")
        .arg("verify")
        .args(&units)
        .output();
    match verified {
        Ok(output) => {
            let complaints = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && complaints.is_empty(),
                "{complaints}"
            );
        }
        Err(error) => println!("systemd-analyze did not look at the units: {error}"),
    }
}
