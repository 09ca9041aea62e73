//! The embedded authorization server behind a front that fails on purpose. The front speaks TLS and
//! HTTP/1.1 byte by byte, so that it can also do what no HTTP library would.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use countersign::dev::ServerCertificate;
use countersign::dev::authorization_server::AuthorizationServerState;
use http::{Request, Response};
use rustls::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What goes wrong at the token endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing does.
    None,
    /// Nothing listens.
    Refused,
    /// The connection is reset once the request has arrived.
    Reset,
    /// This status, with `Retry-After` where there is one.
    Status(u16, Option<String>),
    /// A JSON error (RFC 6749 section 5.2) with this status.
    Error(u16, &'static str),
    /// Status 200 and no body.
    Empty,
    /// Status 200 and a page for people.
    Html,
    /// As [`Html`](Self::Html), once it is [let go](FaultyAuthorizationServer::let_go).
    HeldHtml,
    /// Half of the body that `Content-Length` announces.
    Truncated,
    /// A body without an end.
    Endless,
    /// A token with a line end and another header in it.
    LineEndInToken,
    /// `token_type` is not Bearer.
    UnknownTokenType,
    /// A redirect, as the server's own 307 to itself.
    Redirect,
    /// The right answer, after this long.
    Late(Duration),
    /// No answer.
    Hang,
    /// An answer of one byte in 100 ms.
    Drip,
}

/// The server and its front. Ends when dropped.
#[derive(Debug)]
pub struct FaultyAuthorizationServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: Mutex<CancellationToken>,
    /// Bound and never listening: while nothing listens, nobody else gets the port.
    _reserved: TcpSocket,
}

#[derive(Debug)]
struct Shared {
    state: Arc<AuthorizationServerState>,
    certificate: Mutex<ServerCertificate>,
    fault: Mutex<Fault>,
    date_offset_seconds: Mutex<i64>,
    /// The document served as metadata, where it is not the server's own.
    metadata: Mutex<Option<String>>,
    metadata_requests: AtomicUsize,
    /// Whether metadata fails too.
    metadata_fails: AtomicBool,
    let_go: Notify,
    /// What accepts, and the connections.
    tasks: TaskTracker,
}

impl FaultyAuthorizationServer {
    /// Binds a free port of loopback.
    pub async fn start(
        state: Arc<AuthorizationServerState>,
        certificate: ServerCertificate,
    ) -> Self {
        let shared = Arc::new(Shared {
            state,
            certificate: Mutex::new(certificate),
            fault: Mutex::new(Fault::None),
            date_offset_seconds: Mutex::new(0),
            metadata: Mutex::new(None),
            metadata_requests: AtomicUsize::new(0),
            metadata_fails: AtomicBool::new(false),
            let_go: Notify::new(),
            tasks: TaskTracker::new(),
        });
        let stop = CancellationToken::new();
        let reserved = TcpSocket::new_v4().unwrap();
        reserved.set_reuseaddr(true).unwrap();
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        reserved.bind(any_port).unwrap();
        let address = reserved.local_addr().unwrap();
        serve(&shared, address, stop.clone()).await.unwrap();
        Self {
            shared,
            address,
            stop: Mutex::new(stop),
            _reserved: reserved,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets what goes wrong from now on. Existing connections are closed: none is answered afterwards.
    pub async fn set(&self, fault: Fault) {
        let next = CancellationToken::new();
        let previous = std::mem::replace(&mut *self.stop.lock().unwrap(), next.clone());
        previous.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.tasks.reopen();
        *self.shared.fault.lock().unwrap() = fault.clone();
        if fault == Fault::Refused {
            // Until nothing accepts any more.
            while TcpStream::connect(self.address).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            return;
        }
        while let Err(error) = serve(&self.shared, self.address, next.clone()).await {
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sets what goes wrong with requests from now on. Existing connections stay.
    pub fn change(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap() = fault;
    }

    /// Presents another certificate from now on. Existing connections are closed.
    pub async fn present(&self, certificate: ServerCertificate) {
        *self.shared.certificate.lock().unwrap() = certificate;
        let fault = self.shared.fault.lock().unwrap().clone();
        self.set(fault).await;
    }

    /// Sets how far its `Date` header is ahead of the clock.
    pub fn set_date_offset(&self, seconds: i64) {
        *self.shared.date_offset_seconds.lock().unwrap() = seconds;
    }

    /// Serves this document as metadata.
    pub fn set_metadata(&self, document: String) {
        *self.shared.metadata.lock().unwrap() = Some(document);
    }

    /// Lets an answer go that is held, or else the next.
    pub fn let_go(&self) {
        self.shared.let_go.notify_one();
    }

    /// From now on metadata fails as the token endpoint does.
    pub fn let_metadata_fail(&self) {
        self.shared.metadata_fails.store(true, Ordering::SeqCst);
    }

    /// How often metadata was asked for.
    pub fn metadata_requests(&self) -> usize {
        self.shared.metadata_requests.load(Ordering::SeqCst)
    }
}

impl Drop for FaultyAuthorizationServer {
    fn drop(&mut self) {
        self.stop.lock().unwrap().cancel();
    }
}

async fn serve(
    shared: &Arc<Shared>,
    address: SocketAddr,
    stop: CancellationToken,
) -> io::Result<()> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificate = shared.certificate.lock().unwrap().clone();
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind(address).await?;
    let shared = Arc::clone(shared);
    let tasks = shared.tasks.clone();
    tasks.clone().spawn(async move {
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let (shared, acceptor, stop) = (Arc::clone(&shared), acceptor.clone(), stop.clone());
            tasks.spawn(async move {
                let connection = async {
                    if let Ok(mut stream) = acceptor.accept(stream).await {
                        while answer_one(&shared, &mut stream).await.is_ok() {}
                    }
                };
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = connection => {}
                }
            });
        }
    });
    Ok(())
}

/// Reads one request and answers it; an error ends the connection.
async fn answer_one(shared: &Shared, stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let request = read_request(stream).await?;
    if request.uri().path().starts_with("/.well-known/") {
        shared.metadata_requests.fetch_add(1, Ordering::SeqCst);
        let document = shared.metadata.lock().unwrap().clone();
        if let Some(document) = document {
            return write(shared, stream, "200 OK", "application/json", &[], &document).await;
        }
    }
    let fault = shared.fault.lock().unwrap().clone();
    let is_token_request = request.uri().path() == "/token";
    let fails = is_token_request || shared.metadata_fails.load(Ordering::SeqCst);
    if let (true, Fault::Late(time)) = (fails, &fault) {
        tokio::time::sleep(*time).await;
    }
    if !fails || matches!(fault, Fault::None | Fault::Late(_)) {
        let answer = shared.state.respond(&request);
        return write_response(shared, stream, &answer).await;
    }
    if is_token_request {
        shared.state.count_token_request();
    }
    fail(shared, stream, &fault).await
}

async fn fail(shared: &Shared, stream: &mut TlsStream<TcpStream>, fault: &Fault) -> io::Result<()> {
    let done = || io::Error::other("the connection has done its work");
    let json = "application/json";
    match fault {
        Fault::None | Fault::Late(_) | Fault::Refused => Err(done()),
        Fault::Reset => {
            stream.get_ref().0.set_zero_linger()?;
            Err(done())
        }
        Fault::Status(status, retry_after) => {
            let status = format!("{status} Trouble");
            let headers: Vec<(&str, &str)> = retry_after
                .iter()
                .map(|value| ("retry-after", value.as_str()))
                .collect();
            write(shared, stream, &status, "text/plain", &headers, "trouble").await
        }
        Fault::Error(status, error) => {
            let body = format!("{{\"error\":\"{error}\"}}");
            write(
                shared,
                stream,
                &format!("{status} Refused"),
                json,
                &[],
                &body,
            )
            .await
        }
        Fault::Empty => write(shared, stream, "200 OK", json, &[], "").await,
        Fault::Html | Fault::HeldHtml => {
            if *fault == Fault::HeldHtml {
                shared.let_go.notified().await;
            }
            let page = "<!doctype html><title>Sign in</title>";
            write(shared, stream, "200 OK", "text/html", &[], page).await
        }
        Fault::Truncated => {
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(b"{\"access_token\":\"eyJhbGciOi").await?;
            stream.shutdown().await?;
            Err(done())
        }
        Fault::Endless => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            loop {
                stream.write_all(b"1000\r\n").await?;
                stream.write_all(&[b' '; 0x1000]).await?;
                stream.write_all(b"\r\n").await?;
            }
        }
        Fault::LineEndInToken => {
            let body = "{\"access_token\":\"abc\\r\\nx-injected: yes\",\"token_type\":\"Bearer\",\"expires_in\":60}";
            write(shared, stream, "200 OK", json, &[], body).await
        }
        Fault::UnknownTokenType => {
            let body = "{\"access_token\":\"abc\",\"token_type\":\"mac\",\"expires_in\":60}";
            write(shared, stream, "200 OK", json, &[], body).await
        }
        Fault::Redirect => {
            let location = shared.state.token_endpoint();
            let headers = [("location", location.as_str())];
            write(shared, stream, "307 Temporary Redirect", json, &headers, "").await
        }
        Fault::Hang => {
            std::future::pending::<()>().await;
            Err(done())
        }
        Fault::Drip => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10000\r\n\r\n";
            for byte in head.bytes().chain(std::iter::repeat(b' ')) {
                stream.write_all(&[byte]).await?;
                stream.flush().await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(done())
        }
    }
}

async fn read_request(stream: &mut TlsStream<TcpStream>) -> io::Result<Request<Bytes>> {
    let malformed = || io::Error::other("the request is malformed");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(&head).map_err(io::Error::other)?;
    let mut request = Request::builder()
        .method(parsed.method.ok_or_else(malformed)?)
        .uri(parsed.path.ok_or_else(malformed)?);
    let mut length = 0;
    for header in parsed.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            length = std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.parse().ok())
                .ok_or_else(malformed)?;
        }
        request = request.header(header.name, header.value);
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    request.body(Bytes::from(body)).map_err(io::Error::other)
}

async fn write_response(
    shared: &Shared,
    stream: &mut TlsStream<TcpStream>,
    response: &Response<Bytes>,
) -> io::Result<()> {
    let headers: Vec<(&str, &str)> = response
        .headers()
        .iter()
        .filter(|(name, _)| *name != http::header::CONTENT_TYPE)
        .filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)))
        .collect();
    let status = format!("{} Status", response.status().as_u16());
    let body = String::from_utf8_lossy(response.body());
    write(shared, stream, &status, "application/json", &headers, &body).await
}

async fn write(
    shared: &Shared,
    stream: &mut TlsStream<TcpStream>,
    status: &str,
    content_type: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> io::Result<()> {
    let offset = *shared.date_offset_seconds.lock().unwrap();
    let distance = Duration::from_secs(offset.unsigned_abs());
    let date = match offset >= 0 {
        true => SystemTime::now() + distance,
        false => SystemTime::now() - distance,
    };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\ndate: {}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n",
        httpdate::fmt_http_date(date),
        body.len()
    );
    for (name, value) in headers {
        answer.push_str(&format!("{name}: {value}\r\n"));
    }
    answer.push_str("\r\n");
    answer.push_str(body);
    stream.write_all(answer.as_bytes()).await?;
    stream.flush().await
}
