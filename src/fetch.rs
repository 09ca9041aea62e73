//! The client for everything the agent asks for itself: token endpoints, metadata, key sets, collectors.
//!
//! One [`FetchClient`] for each way of reaching a server (certificate authority, `connect_to`, outbound
//! proxy, allowed addresses). It bounds the whole request in time and the answer in size, follows no
//! redirect, says what went wrong by class, and connects only to servers that the operator named or
//! that pass the [address guard](crate::address).

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use countersign_attestors::{Fetch, FetchError};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use http::{Extensions, HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ipnet::IpNet;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use url::Url;
use zeroize::Zeroizing;

use crate::address::AddressGuard;
use crate::config::{OidcIssuer, TracesConfig};
use crate::lookups::{Addresses, Asker, lookups};

/// The largest answer that is read.
pub const ANSWER_LIMIT_BYTES: usize = 64 * 1024;

/// The time allowed for documents (metadata, key sets) where no credential says another.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection is kept for the next request: metadata and then a token, many credentials at a
/// start. Half of the shortest time for which servers in use keep one, two seconds: they rarely close it
/// just as a request is sent.
const CONNECTION_KEPT: Duration = Duration::from_secs(1);

/// How long one address of a server may take to answer before the next is tried beside it.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// How servers are reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct FetchSettings {
    /// URLs written in the configuration: their scheme and host are trusted by name.
    pub configured: BTreeSet<Url>,
    /// Roots that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// Where the configured hosts really are.
    pub connect_to: Option<SocketAddr>,
    /// An HTTP proxy to every server (`http://HOST:PORT`).
    pub outbound_proxy: Option<Url>,
    /// Ranges exempt from the address guard.
    pub allow_addresses: Vec<IpNet>,
}

impl FetchSettings {
    /// How the documents of an OIDC issuer are reached.
    pub fn of_issuer(issuer: &OidcIssuer) -> Self {
        Self {
            configured: BTreeSet::from([issuer.issuer.url().clone()]),
            ca_file: issuer.ca_file.clone(),
            connect_to: issuer.connect_to,
            outbound_proxy: None,
            allow_addresses: issuer.allow_addresses.clone(),
        }
    }

    /// How a collector of traces is reached.
    pub fn of_collector(traces: &TracesConfig) -> Self {
        Self {
            configured: BTreeSet::from([traces.url.clone()]),
            ca_file: traces.ca_file.clone(),
            ..Self::default()
        }
    }
}

/// A client. Cheap to clone; may be called from any runtime, the work is done on the one given to
/// [`FetchClient::new`].
#[derive(Clone)]
pub struct FetchClient {
    shared: Arc<Shared>,
}

struct Shared {
    settings: FetchSettings,
    runtime: Handle,
    guard: AddressGuard,
    /// Built at the first request: reading the system's roots takes longer than all the rest of start.
    client: OnceCell<Client<Connector, Full<Bytes>>>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, at most [`ANSWER_LIMIT_BYTES`]; it may hold a token.
    pub body: Zeroizing<Vec<u8>>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct FetchFailure {
    /// The class.
    pub kind: FetchFailureKind,
    /// What happened, without secrets.
    pub detail: String,
}

/// The class of a [`FetchFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FetchFailureKind {
    /// The name does not resolve.
    Dns,
    /// Nothing listens there, or no route leads there.
    Refused,
    /// The connection broke before the answer's head was whole.
    Reset,
    /// As [`Reset`](Self::Reset), of a connection that was kept from a request before: the server may have
    /// closed it just as this one was sent, and whether it took the request is not known.
    KeptConnectionBroke,
    /// The certificate does not verify, or TLS failed otherwise.
    Tls,
    /// The time ran out.
    Timeout,
    /// The connection broke within the answer's body.
    Truncated,
    /// The answer is larger than [`ANSWER_LIMIT_BYTES`].
    TooLarge,
    /// The answer is not HTTP.
    Protocol,
    /// The URL or its address may not be connected to.
    NotAllowed,
    /// The certificate authority's file cannot be used.
    CertificateAuthority,
}

impl FetchFailure {
    fn new(kind: FetchFailureKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
        }
    }
}

impl FetchClient {
    /// A client whose connections live on `runtime`.
    pub fn new(settings: FetchSettings, own_listeners: Arc<[SocketAddr]>, runtime: Handle) -> Self {
        let guard = AddressGuard::new(&settings.allow_addresses, own_listeners);
        Self {
            shared: Arc::new(Shared {
                settings,
                runtime,
                guard,
                client: OnceCell::new(),
            }),
        }
    }

    /// Sends one request and reads the whole answer, in at most `timeout`, name resolution and
    /// connection included.
    pub async fn send(
        &self,
        request: Request<Bytes>,
        timeout: Duration,
    ) -> Result<Answer, FetchFailure> {
        let shared = Arc::clone(&self.shared);
        let exchange = async move {
            match tokio::time::timeout(timeout, shared.exchange(request)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(FetchFailure::new(
                    FetchFailureKind::Timeout,
                    format!("no whole answer within {timeout:?}"),
                )),
            }
        };
        let exchange = AssertUnwindSafe(exchange).catch_unwind();
        let runtime = &self.shared.runtime;
        // Who is on it already needs no other thread.
        let is_on_it = Handle::try_current().is_ok_and(|current| current.id() == runtime.id());
        let ended = match is_on_it {
            true => Ok(exchange.await),
            false => runtime.spawn(exchange).await,
        };
        match ended {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(FetchFailure::new(
                FetchFailureKind::Reset,
                "the request failed within the agent",
            )),
            Err(_) => Err(shutting_down()),
        }
    }

    /// As [`Self::send`], and once more where a kept connection broke: for a request that may be taken twice.
    pub async fn send_repeatable(
        &self,
        request: Request<Bytes>,
        timeout: Duration,
    ) -> Result<Answer, FetchFailure> {
        let began = Instant::now();
        match self.send(request.clone(), timeout).await {
            Err(failure) if failure.kind == FetchFailureKind::KeptConnectionBroke => {
                let left = timeout.saturating_sub(began.elapsed());
                self.send(request, left).await
            }
            outcome => outcome,
        }
    }

    /// `GET url`, with [`Self::send_repeatable`]'s bounds.
    pub async fn get(&self, url: &Url, timeout: Duration) -> Result<Answer, FetchFailure> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(url.as_str())
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::USER_AGENT, USER_AGENT)
            .body(Bytes::new())
            .map_err(|error| FetchFailure::new(FetchFailureKind::NotAllowed, error.to_string()))?;
        self.send_repeatable(request, timeout).await
    }
}

/// What the agent calls itself.
pub const USER_AGENT: &str = concat!("countersign/", env!("CARGO_PKG_VERSION"));

impl std::fmt::Debug for FetchClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("FetchClient")
            .field("settings", &self.shared.settings)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Fetch for FetchClient {
    async fn get(&self, url: &Url) -> Result<Vec<u8>, FetchError> {
        let answer = FetchClient::get(self, url, DOCUMENT_TIMEOUT)
            .await
            .map_err(|failure| match failure.kind {
                FetchFailureKind::NotAllowed => FetchError::NotAllowed {
                    url: url.to_string(),
                    detail: failure.detail,
                },
                FetchFailureKind::TooLarge => FetchError::Refused {
                    url: url.to_string(),
                    detail: failure.detail,
                },
                _ => FetchError::Unreachable {
                    url: url.to_string(),
                    detail: failure.detail,
                },
            })?;
        match answer.status {
            StatusCode::OK => Ok(answer.body.to_vec()),
            status => Err(FetchError::Refused {
                url: url.to_string(),
                detail: format!("status {}", status.as_u16()),
            }),
        }
    }
}

impl Shared {
    async fn exchange(self: Arc<Self>, request: Request<Bytes>) -> Result<Answer, FetchFailure> {
        let client = self.client().await?;
        self.check_uri(request.uri())?;
        let response = client
            .request(request.map(Full::new))
            .await
            .map_err(|error| classify_request(&error))?;
        if let Some(HasAnswered(flag)) = response.extensions().get() {
            flag.store(true, Ordering::Relaxed);
        }
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_LIMIT_BYTES)
            .collect()
            .await
            .map_err(|error| classify_body(error.as_ref()))?;
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: Zeroizing::new(body.to_bytes().to_vec()),
        })
    }

    /// The client, built where none could be before; reading roots blocks.
    async fn client(self: &Arc<Self>) -> Result<&Client<Connector, Full<Bytes>>, FetchFailure> {
        let build = || async {
            let shared = Arc::clone(self);
            tokio::task::spawn_blocking(move || build_client(&shared.settings, &shared.guard))
                .await
                .unwrap_or_else(|_| Err(shutting_down()))
        };
        self.client.get_or_try_init(build).await
    }

    /// A URL that was learnt must be https; its address is judged when connecting.
    fn check_uri(&self, uri: &Uri) -> Result<(), FetchFailure> {
        match uri.scheme_str() == Some("https") || is_configured(&self.settings, uri) {
            true => Ok(()),
            false => Err(FetchFailure::new(
                FetchFailureKind::NotAllowed,
                format!("`{uri}` is not https"),
            )),
        }
    }
}

fn is_configured(settings: &FetchSettings, uri: &Uri) -> bool {
    settings.configured.iter().any(|url| {
        Some(url.scheme()) == uri.scheme_str()
            && url.host_str().is_some_and(|host| {
                uri.host()
                    .is_some_and(|asked| asked.eq_ignore_ascii_case(host))
            })
    })
}

fn shutting_down() -> FetchFailure {
    FetchFailure::new(FetchFailureKind::Reset, "the agent is shutting down")
}

fn build_client(
    settings: &FetchSettings,
    guard: &AddressGuard,
) -> Result<Client<Connector, Full<Bytes>>, FetchFailure> {
    let roots = match &settings.ca_file {
        Some(path) => Arc::new(roots_from_file(path)?),
        None => system_roots(),
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| FetchFailure::new(FetchFailureKind::Tls, error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connector = Connector {
        settings: Arc::new(settings.clone()),
        guard: guard.clone(),
        tls: TlsConnector::from(Arc::new(tls)),
    };
    Ok(Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(CONNECTION_KEPT)
        .pool_max_idle_per_host(1)
        // One that many share is never idle: where it is dead, who waits on it need not wait for TCP to tell.
        .http2_keep_alive_interval(CONNECTION_KEPT)
        .http2_keep_alive_timeout(CONNECTION_KEPT)
        .build(connector))
}

fn roots_from_file(path: &Path) -> Result<RootCertStore, FetchFailure> {
    let unusable = |reason: String| {
        FetchFailure::new(
            FetchFailureKind::CertificateAuthority,
            format!("certificate authority file `{}` {reason}", path.display()),
        )
    };
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path)
        .map_err(|error| unusable(format!("cannot be read: {error}")))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| unusable(format!("is not PEM: {error}")))?;
        roots
            .add(certificate)
            .map_err(|error| unusable(format!("holds an unusable certificate: {error}")))?;
    }
    match roots.is_empty() {
        true => Err(unusable("holds no certificate".to_owned())),
        false => Ok(roots),
    }
}

/// The system's roots, read once.
pub fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    Arc::clone(ROOTS.get_or_init(|| {
        let loaded = rustls_native_certs::load_native_certs();
        for error in &loaded.errors {
            tracing::warn!(%error, "a system certificate could not be read");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(loaded.certs);
        Arc::new(roots)
    }))
}

/// Resolves, guards, connects, and speaks TLS.
#[derive(Clone)]
struct Connector {
    settings: Arc<FetchSettings>,
    guard: AddressGuard,
    tls: TlsConnector,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<FetchStream>;
    type Error = FetchFailure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(uri).await.map(TokioIo::new) })
    }
}

impl Connector {
    async fn connect(self, uri: Uri) -> Result<FetchStream, FetchFailure> {
        let not_allowed = |detail: String| FetchFailure::new(FetchFailureKind::NotAllowed, detail);
        let host = uri
            .host()
            .ok_or_else(|| not_allowed(format!("`{uri}` has no host")))?
            .trim_start_matches('[')
            .trim_end_matches(']');
        let is_https = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_https { 443 } else { 80 });
        let configured = is_configured(&self.settings, &uri);
        let stream = match (&self.settings.outbound_proxy, self.settings.connect_to) {
            (Some(proxy), _) => {
                if !configured {
                    self.judge_for_proxy(host, port).await?;
                }
                connect_through(proxy, &uri, host, port).await?
            }
            (None, Some(address)) if configured => connect_first(&[address]).await?,
            (None, _) => {
                let addresses = self.resolve(host, port, configured).await?;
                connect_first(&addresses).await?
            }
        };
        if !is_https {
            return Ok(FetchStream::Plain(stream));
        }
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| not_allowed(format!("`{host}` is not a host name")))?;
        let stream = self
            .tls
            .connect(name, stream)
            .await
            .map_err(|error| classify_handshake(&error))?;
        Ok(FetchStream::Tls(Box::new(stream)))
    }

    /// Whether a URL that was learnt may be asked for through the outbound proxy, which connects to
    /// what we would not. It resolves the name anew; TLS then holds it to the name.
    async fn judge_for_proxy(&self, host: &str, port: u16) -> Result<(), FetchFailure> {
        match self.resolve(host, port, false).await {
            Ok(_) => Ok(()),
            Err(failure) if failure.kind == FetchFailureKind::Dns => Err(FetchFailure::new(
                FetchFailureKind::NotAllowed,
                format!(
                    "`{host}` is not the configured host, and the address guard cannot judge it: {failure}"
                ),
            )),
            Err(failure) => Err(failure),
        }
    }

    async fn resolve(
        &self,
        host: &str,
        port: u16,
        configured: bool,
    ) -> Result<Vec<SocketAddr>, FetchFailure> {
        let found = look_up(host, port).await?.map_err(|error| {
            FetchFailure::new(
                FetchFailureKind::Dns,
                format!("`{host}` does not resolve: {error}"),
            )
        })?;
        let mut allowed = Vec::new();
        let mut refused = None;
        for &address in &*found {
            match configured {
                true => allowed.push(address),
                false => match self.guard.check(address.ip(), address.port()) {
                    Ok(()) => allowed.push(address),
                    Err(error) => refused = Some(error),
                },
            }
        }
        match (allowed.is_empty(), refused) {
            (false, _) => Ok(allowed),
            (true, Some(error)) => Err(FetchFailure::new(
                FetchFailureKind::NotAllowed,
                format!("`{host}`: {error}"),
            )),
            (true, None) => Err(FetchFailure::new(
                FetchFailureKind::Dns,
                format!("`{host}` has no address"),
            )),
        }
    }
}

/// The addresses of a host; called on the client's runtime.
async fn look_up(host: &str, port: u16) -> Result<Addresses, FetchFailure> {
    lookups()
        .resolve(Asker::Agent, host, port, &Handle::current())
        .await
        .ok_or_else(shutting_down)
}

/// The first connection that comes about: an address that is slow to answer keeps nobody from the next (RFC 8305
/// section 5).
async fn connect_first(addresses: &[SocketAddr]) -> Result<TcpStream, FetchFailure> {
    let mut left = addresses.iter();
    let mut attempts = FuturesUnordered::new();
    let mut last = None;
    loop {
        if let Some(address) = left.next() {
            attempts.push(async move { (address, TcpStream::connect(address).await) });
        }
        match tokio::time::timeout(ATTEMPT_DELAY, attempts.next()).await {
            Ok(Some((_, Ok(stream)))) => {
                // Without this a small request waits for the delayed acknowledgement of the last.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Some((address, Err(error)))) => last = Some((address, error)),
            Ok(None) => break,
            Err(_) => {}
        }
    }
    let detail = match last {
        Some((address, error)) => format!("`{address}` cannot be connected to: {error}"),
        None => "no address to connect to".to_owned(),
    };
    Err(FetchFailure::new(FetchFailureKind::Refused, detail))
}

/// A tunnel by CONNECT (RFC 9110 section 9.3.6) through an HTTP proxy, which resolves the name.
async fn connect_through(
    proxy: &Url,
    uri: &Uri,
    host: &str,
    port: u16,
) -> Result<TcpStream, FetchFailure> {
    let refused = |detail: String| FetchFailure::new(FetchFailureKind::Refused, detail);
    let broken = |error: io::Error| {
        FetchFailure::new(
            FetchFailureKind::Reset,
            format!("the outbound proxy `{proxy}` broke off: {error}"),
        )
    };
    let proxy_host = proxy
        .host_str()
        .ok_or_else(|| refused(format!("outbound proxy `{proxy}` has no host")))?;
    let proxy_port = proxy.port_or_known_default().unwrap_or(80);
    let addresses = look_up(proxy_host, proxy_port).await?.map_err(|error| {
        FetchFailure::new(
            FetchFailureKind::Dns,
            format!("the outbound proxy `{proxy}` does not resolve: {error}"),
        )
    })?;
    let mut stream = connect_first(&addresses).await?;
    let authority = match uri.host().is_some_and(|host| host.starts_with('[')) {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let head = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.map_err(broken)?;
    let mut answer = Vec::with_capacity(256);
    // Byte by byte, so that nothing of the tunnelled stream is taken.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= 8 * 1024 {
            return Err(refused(format!(
                "the outbound proxy `{proxy}` answered with too long a head"
            )));
        }
        answer.push(stream.read_u8().await.map_err(broken)?);
    }
    let status = std::str::from_utf8(&answer)
        .ok()
        .and_then(|text| text.split_whitespace().nth(1))
        .unwrap_or("nothing");
    match status.starts_with('2') {
        true => Ok(stream),
        false => Err(refused(format!(
            "the outbound proxy `{proxy}` answered {status} for `{authority}`"
        ))),
    }
}

/// A connection, with or without TLS.
enum FetchStream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Whether a connection has answered a request before.
#[derive(Clone, Default)]
struct HasAnswered(Arc<AtomicBool>);

impl Connection for FetchStream {
    fn connected(&self) -> Connected {
        let connected = Connected::new().extra(HasAnswered::default());
        match self {
            Self::Tls(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
                connected.negotiated_h2()
            }
            _ => connected,
        }
    }
}

impl AsyncRead for FetchStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for FetchStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

fn classify_handshake(error: &io::Error) -> FetchFailure {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(error) => FetchFailure::new(FetchFailureKind::Tls, error.to_string()),
        None => FetchFailure::new(
            FetchFailureKind::Reset,
            format!("the connection broke during the TLS handshake: {error}"),
        ),
    }
}

/// The client boxes what the connector and the connection said; it is found again in the chain.
fn classify_request(error: &hyper_util::client::legacy::Error) -> FetchFailure {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(failure) = inner.downcast_ref::<FetchFailure>() {
            return failure.clone();
        }
        if let Some(hyper) = inner.downcast_ref::<hyper::Error>()
            && (hyper.is_parse() || hyper.is_parse_too_large())
        {
            return FetchFailure::new(
                FetchFailureKind::Protocol,
                format!("the answer is not HTTP: {hyper}"),
            );
        }
        source = inner.source();
    }
    let mut connection = Extensions::new();
    if let Some(connected) = error.connect_info() {
        connected.get_extras(&mut connection);
    }
    let was_kept = connection
        .get()
        .is_some_and(|HasAnswered(flag)| flag.load(Ordering::Relaxed));
    let kind = match was_kept {
        true => FetchFailureKind::KeptConnectionBroke,
        false => FetchFailureKind::Reset,
    };
    FetchFailure::new(
        kind,
        format!("the connection broke before an answer: {error}"),
    )
}

fn classify_body(error: &(dyn Error + Send + Sync + 'static)) -> FetchFailure {
    match error.is::<LengthLimitError>() {
        true => FetchFailure::new(
            FetchFailureKind::TooLarge,
            format!(
                "the answer is larger than {} KiB",
                ANSWER_LIMIT_BYTES / 1024
            ),
        ),
        false => FetchFailure::new(
            FetchFailureKind::Truncated,
            format!("the answer was cut short: {error}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use tokio::net::TcpListener;

    use super::*;

    fn client(url: &Url, ca_file: PathBuf, runtime: &tokio::runtime::Runtime) -> FetchClient {
        let settings = FetchSettings {
            configured: BTreeSet::from([url.clone()]),
            ca_file: Some(ca_file),
            ..FetchSettings::default()
        };
        FetchClient::new(settings, Arc::default(), runtime.handle().clone())
    }

    fn one_thread() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn roots_are_read_within_the_time_and_off_the_runtime() {
        let directory = tempfile::tempdir().unwrap();
        let ca_file = directory.path().join("ca.pem");
        mkfifo(&ca_file, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        // Who reads it waits for this.
        let (failed, waited) = std::sync::mpsc::channel();
        let writer = std::thread::spawn({
            let ca_file = ca_file.clone();
            move || {
                let _ = waited.recv_timeout(Duration::from_secs(20));
                drop(std::fs::File::create(ca_file).unwrap());
            }
        });
        let url = Url::parse("https://server.test/").unwrap();
        let runtime = one_thread();
        let client = client(&url, ca_file, &runtime);
        let failure = runtime
            .block_on(client.get(&url, Duration::from_millis(50)))
            .unwrap_err();
        assert_eq!(failure.kind, FetchFailureKind::Timeout);
        failed.send(()).unwrap();
        writer.join().unwrap();
    }

    #[test]
    fn roots_that_could_not_be_read_are_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let ca_file = directory.path().join("ca.pem");
        let runtime = one_thread();
        runtime.block_on(async {
            // It is bound, and does not listen.
            let refusing = tokio::net::TcpSocket::new_v4().unwrap();
            refusing
                .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
                .unwrap();
            let address = refusing.local_addr().unwrap();
            let url = Url::parse(&format!("https://{address}/")).unwrap();
            let client = client(&url, ca_file.clone(), &runtime);
            let failure = async || client.get(&url, DOCUMENT_TIMEOUT).await.unwrap_err().kind;
            assert_eq!(failure().await, FetchFailureKind::CertificateAuthority);
            let authority = crate::dev::CertificateAuthority::new("servers").unwrap();
            std::fs::write(&ca_file, authority.pem()).unwrap();
            assert_eq!(failure().await, FetchFailureKind::Refused);
        });
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_keeps_nobody_from_the_next() {
        let live = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let silent = tokio::net::TcpSocket::new_v4().unwrap();
        silent.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let silent = silent.listen(1).unwrap();
        let silent_address = silent.local_addr().unwrap();
        // Its queue is full: who comes now hears nothing.
        let mut queue = Vec::new();
        let within = Duration::from_millis(500);
        while let Ok(stream) =
            tokio::time::timeout(within, TcpStream::connect(silent_address)).await
        {
            queue.push(stream.unwrap());
        }
        let addresses = [silent_address, silent_address, live.local_addr().unwrap()];
        let connecting = tokio::time::timeout(DOCUMENT_TIMEOUT, connect_first(&addresses));
        let stream = connecting.await.expect("in time").unwrap();
        assert_eq!(stream.peer_addr().unwrap(), addresses[2]);
        let failure = connect_first(&[]).await.unwrap_err();
        assert_eq!(failure.kind, FetchFailureKind::Refused);
    }

    #[test]
    fn a_panic_within_is_a_failure_on_every_runtime() {
        // Without timers whatever waits for a time panics.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let url = Url::parse("https://server.test/").unwrap();
        let client = client(&url, PathBuf::from("none"), &runtime);
        let asked = || client.get(&url, DOCUMENT_TIMEOUT);
        for outcome in [runtime.block_on(asked()), one_thread().block_on(asked())] {
            assert_eq!(outcome.unwrap_err().kind, FetchFailureKind::Reset);
        }
    }
}
