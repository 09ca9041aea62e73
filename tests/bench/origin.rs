//! The origin, in clear and over TLS, and the authorization server behind a stopwatch: one process.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use countersign::config::SigningAlgorithm;
use countersign::dev::{
    AuthorizationServer, AuthorizationServerOptions, CertificateAuthority, Client,
    ClientCredential, ServerCertificate,
};
use countersign::jwt::{SigningKey, VerifyingKey};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::{Fallible, HOST, one_thread};

const AUTHORIZATION_SERVER: &str = "auth.countersign.test";
const BODY: &[u8] = br#"{"orders":[{"id":7,"state":"shipped"}]}"#;
/// What is asked for below this path has a body of [`LARGE_BODY`] bytes.
pub const LARGE_BODIES: &str = "/v1/bodies";
const LARGE_BODY: usize = 1024 * 1024;

/// Where the origin's process listens.
#[derive(Debug, Serialize, Deserialize)]
pub struct Addresses {
    pub http: SocketAddr,
    pub https: SocketAddr,
    /// The stopwatch, behind which the authorization server is.
    pub authorization_server: SocketAddr,
}

/// What was asked of the authorization server since it was started.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Tokens {
    pub requests: usize,
    /// The time that the server took itself: from bytes that came for it to bytes that came of it.
    pub own_time: Duration,
}

/// The origin's process, as the benchmark holds it.
pub struct Origin {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub addresses: Addresses,
    /// The certificate that vouches for the origin and for the authorization server.
    pub certificate: PathBuf,
    /// The key that the agent signs its assertions with.
    pub client_key: PathBuf,
}

impl Origin {
    /// Starts it; its files are put into `directory`.
    pub fn start(directory: &Path) -> Fallible<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("origin")
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let commands = child.stdin.take().ok_or("no input")?;
        let mut answers = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        Ok(Self {
            addresses: serde_json::from_str(&line)?,
            certificate: directory.join("origin-ca.pem"),
            client_key: directory.join("client.pem"),
            child,
            commands,
            answers,
        })
    }

    /// What was asked of the authorization server up to now.
    pub fn tokens(&mut self) -> Fallible<Tokens> {
        self.commands.write_all(b"tokens\n")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves, prints the addresses, then answers each line of its input with [`Tokens`]; ends with its input.
pub fn serve(directory: &Path) -> Fallible<()> {
    one_thread()?.block_on(async {
        let authority = CertificateAuthority::new("bench")?;
        let (key, private_pem) = SigningKey::generate(SigningAlgorithm::Es256)?;
        let client_key = VerifyingKey::from_jwk(&key.public_jwk()?).ok_or("no verifying key")?;
        std::fs::write(directory.join("origin-ca.pem"), authority.pem())?;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(directory.join("client.pem"))?
            .write_all(private_pem.as_bytes())?;

        let server = AuthorizationServer::start(AuthorizationServerOptions {
            issuer: format!("https://{AUTHORIZATION_SERVER}"),
            address: "127.0.0.1:0".parse()?,
            certificate: authority.issue(&[AUTHORIZATION_SERVER])?,
            clients: vec![Client {
                client_id: "bench".to_owned(),
                credential: ClientCredential::Keys(vec![client_key]),
                scopes: vec!["orders.read".to_owned()],
            }],
            token_lifetime: Duration::from_secs(3600),
            default_audience: format!("https://{HOST}"),
        })
        .await?;
        let http = TcpListener::bind("127.0.0.1:0").await?;
        let https = TcpListener::bind("127.0.0.1:0").await?;
        let stopwatch = TcpListener::bind("127.0.0.1:0").await?;
        let addresses = Addresses {
            http: http.local_addr()?,
            https: https.local_addr()?,
            authorization_server: stopwatch.local_addr()?,
        };
        let own_time = Rc::new(Cell::new(Duration::ZERO));
        tokio::task::spawn_local(answer(http, None));
        // By its address too, for a proxy that is told to go there and not to the host.
        let certificate = authority.issue(&[HOST, "127.0.0.1"])?;
        tokio::task::spawn_local(answer(https, Some(acceptor(certificate)?)));
        tokio::task::spawn_local(time(stopwatch, server.address(), Rc::clone(&own_time)));
        println!("{}", serde_json::to_string(&addresses)?);

        let mut lines = lines_of_input();
        while lines.recv().await.is_some() {
            let tokens = Tokens {
                requests: server.state().token_requests(),
                own_time: own_time.get(),
            };
            println!("{}", serde_json::to_string(&tokens)?);
        }
        Ok(())
    })
}

/// Reads them on a thread of its own; the channel ends with the input.
fn lines_of_input() -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// An acceptor of TLS that speaks HTTP/1.1.
pub fn acceptor(certificate: ServerCertificate) -> Fallible<TlsAcceptor> {
    let mut configuration = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key)?;
    configuration.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(configuration)))
}

async fn answer(listener: TcpListener, tls: Option<TlsAcceptor>) -> Fallible<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let tls = tls.clone();
        tokio::task::spawn_local(async move {
            match tls {
                None => answer_on(stream).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        answer_on(stream).await;
                    }
                }
            }
        });
    }
}

async fn answer_on(stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
    thread_local! {
        static LARGE: Bytes = Bytes::from(vec![b'a'; LARGE_BODY]);
    }
    let service = service_fn(|request: Request<Incoming>| async move {
        let body = match request.uri().path().starts_with(LARGE_BODIES) {
            true => LARGE.with(Bytes::clone),
            false => Bytes::from_static(BODY),
        };
        let mut response = Response::new(Full::new(body));
        // Nothing counts that came without a credential.
        if !request.headers().contains_key("authorization") {
            *response.status_mut() = StatusCode::UNAUTHORIZED;
        }
        Ok::<_, Infallible>(response)
    });
    // A connection that breaks is seen by who broke it.
    let _ = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Relays connections to the authorization server and adds up the time that it takes to answer.
async fn time(
    listener: TcpListener,
    server: SocketAddr,
    own_time: Rc<Cell<Duration>>,
) -> Fallible<()> {
    loop {
        let (caller, _) = listener.accept().await?;
        let server = TcpStream::connect(server).await?;
        caller.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (mut from_caller, mut to_caller) = caller.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let asked: Rc<RefCell<Option<Instant>>> = Rc::default();
        let asks = Rc::clone(&asked);
        tokio::task::spawn_local(async move {
            let mut buffer = [0; 16 * 1024];
            while let Some(bytes) = read(&mut from_caller, &mut buffer).await {
                asks.borrow_mut().get_or_insert_with(Instant::now);
                if to_server.write_all(bytes).await.is_err() {
                    break;
                }
            }
        });
        let own_time = Rc::clone(&own_time);
        tokio::task::spawn_local(async move {
            let mut buffer = [0; 16 * 1024];
            while let Some(bytes) = read(&mut from_server, &mut buffer).await {
                if let Some(asked) = asked.borrow_mut().take() {
                    own_time.set(own_time.get() + asked.elapsed());
                }
                if to_caller.write_all(bytes).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// What comes next; `None` at the end.
async fn read<'a>(from: &mut (impl AsyncRead + Unpin), buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    match from.read(buffer).await {
        Ok(read) if read > 0 => buffer.get(..read),
        _ => None,
    }
}
