//! Measures the request path against a bare hyper proxy, in one run: `tests/bench/run`.
//!
//! The proxy under test has one core to itself; load and origin share the other. What is compared is
//! CPU time per request, of the whole process, so that a noisy machine matters little.

use std::convert::Infallible;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use countersign::config::SigningAlgorithm;
use countersign::dev::{
    AuthorizationServer, AuthorizationServerOptions, CertificateAuthority, Client, ClientCredential,
};
use countersign::jwt::{SigningKey, VerifyingKey};
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_secs(3);
const PROXY_CORE: usize = 0;
const LOAD_CORE: usize = 1;
/// CPU per request with attestation, policy and audit on, over that of a bare hyper proxy.
const MOST: f64 = 1.5;
const PATH: &str = "/v1/orders";
const HOST: &str = "orders.countersign.test";

/// Requests that the agent answered with 200 to the load, warming up included.
static SERVED_BY_AGENT: AtomicU64 = AtomicU64::new(0);

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Fallible<()> {
    countersign::tls::install_cryptography_provider();
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        // `cargo bench` adds it.
        .filter(|argument| argument != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["origin", directory] => origin(Path::new(directory)),
        ["bare", origin] => bare(origin.parse()?),
        ["compare", agent] => compare(Path::new(agent)),
        _ => Err("usage: request_path compare AGENT_BINARY".into()),
    }
}

fn pin(core: usize) -> Fallible<()> {
    let mut cores = CpuSet::new();
    cores.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &cores)?;
    Ok(())
}

fn one_thread() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// The origin and the authorization server, and the agent's configuration for them. Prints the
/// origin's address; ends with its standard input.
fn origin(directory: &Path) -> Fallible<()> {
    pin(LOAD_CORE)?;
    let runtime = one_thread()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let authority = CertificateAuthority::new("bench")?;
        let (key, private_pem) = SigningKey::generate(SigningAlgorithm::Es256)?;
        let client_key = VerifyingKey::from_jwk(&key.public_jwk()?).ok_or("no verifying key")?;
        let issuer = "https://auth.countersign.test".to_owned();
        let authorization_server = AuthorizationServer::start(AuthorizationServerOptions {
            issuer,
            address: "127.0.0.1:0".parse()?,
            certificate: authority.issue(&["auth.countersign.test"])?,
            clients: vec![Client {
                client_id: "bench".to_owned(),
                credential: ClientCredential::Keys(vec![client_key]),
                scopes: vec!["orders.read".to_owned()],
            }],
            token_lifetime: Duration::from_secs(3600),
            default_audience: format!("https://{HOST}"),
        })
        .await?;
        write_configuration(
            directory,
            address,
            authorization_server.address(),
            authority.pem(),
            &private_pem,
        )?;
        println!("{address}");
        std::io::stdout().flush()?;
        tokio::task::spawn_blocking(|| {
            // The orchestrator's end of the pipe closes with it.
            let _ = std::io::stdin().read_line(&mut String::new());
            std::process::exit(0);
        });
        serve_origin(listener).await
    })
}

async fn serve_origin(listener: TcpListener) -> Fallible<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| async move {
                let authorized = request.headers().contains_key("authorization");
                let mut response = Response::new(Full::new(Bytes::from_static(
                    b"{\"orders\":[{\"id\":7,\"state\":\"shipped\"}]}",
                )));
                if !authorized {
                    *response.status_mut() = StatusCode::UNAUTHORIZED;
                }
                Ok::<_, Infallible>(response)
            });
            let _ = server::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn write_configuration(
    directory: &Path,
    origin: SocketAddr,
    authorization_server: SocketAddr,
    authority_pem: &str,
    private_pem: &str,
) -> Fallible<()> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::create_dir_all(directory.join("policies"))?;
    std::fs::write(directory.join("auth-ca.pem"), authority_pem)?;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(directory.join("client.pem"))?
        .write_all(private_pem.as_bytes())?;
    let uid = nix::unistd::getuid();
    std::fs::write(
        directory.join("policies/orders.cedar"),
        format!(
            r#"@id("orders-read") @max_lifetime("10m")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{ principal has unix && principal.unix.uid == {uid} && context has request && context.request.safe && context.request.path like "/v1/*" }};
"#
        ),
    )?;
    std::fs::write(
        directory.join("countersign.yaml"),
        format!(
            r#"version: 1
runtime: {{workers: 1}}
listeners:
  - {{name: workloads, type: forward_proxy, bind: "127.0.0.1:0"}}
attestors: {{unix: {{}}, systemd: {{}}}}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    issuer: https://auth.countersign.test
    client_id: bench
    client_authentication: {{method: private_key_jwt, key_file: client.pem, algorithm: ES256}}
    scopes: [orders.read]
    ca_file: auth-ca.pem
    connect_to: "{authorization_server}"
destinations:
  - name: orders
    hosts: [{HOST}]
    scheme: http
    ports: [80]
    paths: ["/v1/**"]
    credentials: [{{name: orders-api}}]
    connect_to: "{origin}"
policies: {{directory: policies}}
audit:
  on_failure: block
  sinks: [{{type: file, path: audit.jsonl, rotate_size: 4GiB, keep: 1}}]
telemetry: {{log: {{format: text, level: info}}}}
admin: {{socket: admin.sock}}
"#
        ),
    )?;
    Ok(())
}

/// As long as a token of the authorization server, so that both proxies write alike.
const STATIC_TOKEN_BYTES: usize = 560;

/// A bare hyper proxy that adds a static header: a current-thread runtime, its own pool, the same
/// header timer as the agent.
fn bare(origin: SocketAddr) -> Fallible<()> {
    pin(PROXY_CORE)?;
    let authorization =
        HeaderValue::try_from(format!("Bearer {}", "a".repeat(STATIC_TOKEN_BYTES)))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        std::io::stdout().flush()?;
        let idle: std::rc::Rc<std::cell::RefCell<Vec<client::SendRequest<Incoming>>>> =
            std::rc::Rc::default();
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let (idle, authorization) = (std::rc::Rc::clone(&idle), authorization.clone());
            tokio::task::spawn_local(async move {
                let service = service_fn(move |mut request: Request<Incoming>| {
                    let (idle, authorization) = (std::rc::Rc::clone(&idle), authorization.clone());
                    async move {
                        let pooled = idle.borrow_mut().pop();
                        let mut sender = match pooled {
                            Some(sender) => sender,
                            None => connect_bare(origin).await?,
                        };
                        sender.ready().await?;
                        let path_and_query = request.uri().path_and_query().cloned();
                        if let Some(path_and_query) = path_and_query {
                            *request.uri_mut() = Uri::from(path_and_query);
                        }
                        request.headers_mut().insert("authorization", authorization);
                        let response = sender.send_request(request).await?;
                        idle.borrow_mut().push(sender);
                        Ok::<_, Box<dyn Error + Send + Sync>>(response)
                    }
                });
                let _ = server::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(Duration::from_secs(30))
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    })
}

async fn connect_bare(origin: SocketAddr) -> Fallible<client::SendRequest<Incoming>> {
    let stream = TcpStream::connect(origin).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = client::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}

/// A process of ours that ends with this one.
struct Peer {
    child: Child,
    address: SocketAddr,
    served: Option<&'static AtomicU64>,
}

impl Peer {
    fn count_served(&self) {
        if let Some(served) = self.served {
            served.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn_peer(arguments: &[&str]) -> Fallible<Peer> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    Ok(Peer {
        address: line.trim().parse()?,
        served: None,
        child,
    })
}

/// Starts the agent on the proxy's core and reads its proxy's address from its log.
fn spawn_agent(binary: &Path, directory: &Path) -> Fallible<Peer> {
    let mut child = Command::new("taskset")
        .args(["-c", &PROXY_CORE.to_string()])
        .arg(binary)
        .args(["run", "--config"])
        .arg(directory.join("countersign.yaml"))
        .stderr(Stdio::piped())
        .spawn()?;
    let mut log = BufReader::new(child.stderr.take().ok_or("no log")?);
    let mut line = String::new();
    let address = loop {
        line.clear();
        if log.read_line(&mut line)? == 0 {
            return Err("the agent ended before it listened".into());
        }
        if let Some((_, address)) = line.split_once("address=") {
            break address.split_whitespace().next().unwrap_or("").parse()?;
        }
    };
    std::thread::spawn(move || {
        let mut line = String::new();
        while log.read_line(&mut line).is_ok_and(|read| read > 0) {
            eprint!("{line}");
            line.clear();
        }
    });
    Ok(Peer {
        child,
        address,
        served: Some(&SERVED_BY_AGENT),
    })
}

/// CPU time of a process, all of its threads, in nanoseconds.
fn cpu(process: u32) -> Fallible<Duration> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let statistics = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += statistics
            .split_whitespace()
            .next()
            .ok_or("empty schedstat")?
            .parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

#[derive(Debug, Default)]
struct Measured {
    requests: u64,
    cpu: Duration,
    wall: Duration,
    latencies: Vec<Duration>,
}

impl Measured {
    fn cpu_per_request(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests as f64
    }

    fn percentile(&mut self, fraction: f64) -> f64 {
        self.latencies.sort_unstable();
        let index = (self.latencies.len() as f64 * fraction) as usize;
        self.latencies
            .get(index.min(self.latencies.len().saturating_sub(1)))
            .map_or(0.0, |latency| latency.as_secs_f64() * 1e6)
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.cpu += other.cpu;
        self.wall += other.wall;
        self.latencies.extend(other.latencies);
    }
}

/// Drives one round of requests over kept-alive connections; every answer must be 200.
async fn round(proxy: &Peer, connections: usize, length: Duration) -> Fallible<Measured> {
    let request: Arc<[u8]> =
        format!("GET http://{HOST}{PATH} HTTP/1.1\r\nhost: {HOST}\r\naccept: */*\r\n\r\n")
            .into_bytes()
            .into();
    let served = Arc::new(AtomicU64::new(0));
    let mut streams = Vec::new();
    for _ in 0..connections {
        let mut stream = TcpStream::connect(proxy.address).await?;
        stream.set_nodelay(true)?;
        exchange(&mut stream, &request).await?;
        proxy.count_served();
        streams.push(stream);
    }
    let (began, cpu_before) = (Instant::now(), cpu(proxy.child.id())?);
    let deadline = began + length;
    let tasks: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            let (request, served) = (Arc::clone(&request), Arc::clone(&served));
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                while Instant::now() < deadline {
                    let sent = Instant::now();
                    exchange(&mut stream, &request).await?;
                    latencies.push(sent.elapsed());
                    served.fetch_add(1, Ordering::Relaxed);
                }
                Fallible::Ok(latencies)
            })
        })
        .collect();
    let mut measured = Measured::default();
    for task in tasks {
        measured.latencies.extend(task.await??);
    }
    measured.cpu = cpu(proxy.child.id())?.saturating_sub(cpu_before);
    measured.wall = began.elapsed();
    measured.requests = served.load(Ordering::Relaxed);
    if let Some(total) = proxy.served {
        total.fetch_add(measured.requests, Ordering::Relaxed);
    }
    Ok(measured)
}

async fn exchange(stream: &mut TcpStream, request: &[u8]) -> Fallible<()> {
    stream.write_all(request).await?;
    let mut answer = [0_u8; 4096];
    let mut filled = 0;
    loop {
        let rest = answer.get_mut(filled..).ok_or("the answer is too large")?;
        let read = stream.read(rest).await?;
        if read == 0 {
            return Err("the proxy closed the connection".into());
        }
        filled += read;
        let seen = answer.get(..filled).unwrap_or_default();
        if seen.ends_with(b"}]}") {
            return match seen.starts_with(b"HTTP/1.1 200") {
                true => Ok(()),
                false => Err(String::from_utf8_lossy(seen).into_owned().into()),
            };
        }
        if seen.starts_with(b"HTTP/1.1") && !seen.starts_with(b"HTTP/1.1 200") {
            return Err(String::from_utf8_lossy(seen).into_owned().into());
        }
    }
}

fn compare(agent: &Path) -> Fallible<()> {
    pin(LOAD_CORE)?;
    let directory = std::env::temp_dir().join(format!("countersign-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let outcome = compare_in(agent, &directory);
    std::fs::remove_dir_all(&directory)?;
    outcome
}

fn compare_in(agent: &Path, directory: &Path) -> Fallible<()> {
    let origin = spawn_peer(&["origin", &directory.display().to_string()])?;
    let bare = spawn_peer(&["bare", &origin.address.to_string()])?;
    let agent = spawn_agent(agent, directory)?;
    let runtime = one_thread()?;
    let (mut of_bare, mut of_agent) = (Measured::default(), Measured::default());
    let mut ratios = Vec::new();
    runtime.block_on(async {
        // One round each to warm up; then in turns, so that the machine's noise meets both alike.
        round(&bare, CONNECTIONS, Duration::from_secs(1)).await?;
        round(&agent, CONNECTIONS, Duration::from_secs(1)).await?;
        for _ in 0..ROUNDS {
            let bare = round(&bare, CONNECTIONS, ROUND).await?;
            let agent = round(&agent, CONNECTIONS, ROUND).await?;
            ratios.push(agent.cpu_per_request() / bare.cpu_per_request());
            of_bare.add(bare);
            of_agent.add(agent);
        }
        Fallible::Ok(())
    })?;
    let served = SERVED_BY_AGENT.load(Ordering::Relaxed);
    let records = stop_and_count_records(agent, directory)?;
    ratios.sort_unstable_by(f64::total_cmp);
    // Of the rounds' ratios the middle one: a neighbour on the machine spoils a round, not the figure.
    let ratio = *ratios.get(ROUNDS / 2).ok_or("no rounds")?;
    println!(
        "HTTP to HTTP, {CONNECTIONS} connections, one core for the proxy, {ROUNDS} rounds of {ROUND:?} each in turn\n"
    );
    println!("| proxy | CPU per request (µs) | requests/s | p50 (µs) | p99 (µs) |");
    println!("|---|---|---|---|---|");
    for (name, measured) in [
        ("bare hyper, static header", &mut of_bare),
        ("countersign: attestation, policy, audit", &mut of_agent),
    ] {
        println!(
            "| {name} | {:.2} | {:.0} | {:.0} | {:.0} |",
            measured.cpu_per_request(),
            measured.requests as f64 / measured.wall.as_secs_f64(),
            measured.percentile(0.5),
            measured.percentile(0.99),
        );
    }
    println!(
        "\nratio of CPU per request: {ratio:.3} (must be at most {MOST}), the median of {ratios:.3?}"
    );
    println!(
        "{}",
        serde_json::json!({
            "work": "http_to_http", "connections": CONNECTIONS,
            "bare_cpu_microseconds": of_bare.cpu_per_request(),
            "agent_cpu_microseconds": of_agent.cpu_per_request(),
            "ratio": ratio, "ratios": ratios, "must": MOST,
            "requests_served": served, "records_on_disk": records,
        })
    );
    if records != served {
        return Err(format!("{records} records on disk for {served} requests served").into());
    }
    match ratio <= MOST {
        true => Ok(()),
        false => {
            Err(format!("{ratio:.3} times a bare proxy's CPU per request is over {MOST}").into())
        }
    }
}

/// Stops the agent in good order and counts the requests in its audit.
fn stop_and_count_records(mut agent: Peer, directory: &Path) -> Fallible<u64> {
    let process = Pid::from_raw(i32::try_from(agent.child.id())?);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM)?;
    agent.child.wait()?;
    let audit = BufReader::new(std::fs::File::open(directory.join("audit.jsonl"))?);
    let mut records = 0;
    for line in audit.lines() {
        let record: serde_json::Value = serde_json::from_str(&line?)?;
        records += u64::from(record.get("kind").is_some_and(|kind| kind == "request"));
    }
    Ok(records)
}
