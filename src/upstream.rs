//! Connections to destinations. Sends an [`UpstreamRequest`] and nothing else; follows no redirect.
//!
//! One [`Upstreams`] per data worker, so that no lock and no other thread stands in a request's way.
//! Connections are keyed by the workload's isolation key first: two identities never share one.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::fmt::Debug;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use countersign_attestors::IsolationKey;
use foldhash::fast::RandomState;
use http::header::{CONTENT_LENGTH, COOKIE, HOST, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Notify};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use crate::address::{AddressGuard, AddressRefused};
use crate::clock::Clock;
use crate::config::{Destination, Scheme};
use crate::descriptors::{few_are_left, is_out_of_descriptors};
use crate::diagnostics::system_words;
use crate::inject::{UpstreamRequest, check_expiry};
use crate::local::LocalExecutor;
use crate::lookups::{Asker, lookups};
use crate::refusal::{Refusal, RefusalCode};
use crate::request::Target;
use crate::short_writes::ShortWrites;
use crate::streams::RequestBody;
use crate::tls::ALPN_HTTP2;

const IDLE: Duration = Duration::from_secs(30);
const MAXIMUM_AGE: Duration = Duration::from_secs(300);
/// Spread of the maximum age, so that connections opened together are not replaced together.
const AGE_JITTER: Duration = Duration::from_secs(60);
/// So many streams make a connection worth waiting for to those who find none free.
const WORTH_SHARING: usize = 10;
/// How long a connection that was given back may take to be free.
const READY: Duration = Duration::from_millis(100);
/// How long a request waits for a free descriptor at most, and how often it looks.
const DESCRIPTOR_WAIT: Duration = Duration::from_secs(2);
const DESCRIPTOR_PAUSE: Duration = Duration::from_millis(10);
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(20);
/// How much of an HTTP/2 response may wait for a caller that does not read it.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// How much of all responses on one connection. Windows that adapt are the same for both, so that one
/// caller that does not read holds up whatever else its identity asks for.
const CONNECTION_WINDOW: u32 = 64 * STREAM_WINDOW;

/// The verified TLS of one destination.
#[derive(Debug, Clone)]
pub struct DestinationTls {
    /// Offers HTTP/2 and HTTP/1.1.
    pub any: Arc<ClientConfig>,
    /// Offers HTTP/1.1 only, for upgrades.
    pub http1: Arc<ClientConfig>,
}

/// Where one request goes and how it gets there.
#[derive(Debug)]
pub struct Way<'a> {
    /// The isolation key of the workload that asks.
    pub isolation: &'a IsolationKey,
    /// The destination; `None` for unmatched traffic.
    pub destination: Option<&'a Arc<Destination>>,
    /// Scheme of the connection.
    pub scheme: Scheme,
    /// Host and port.
    pub target: &'a Target,
    /// Verified TLS, where the scheme is https.
    pub tls: Option<&'a DestinationTls>,
    /// Which addresses may be connected to: all but the agent's own for a `connect_to`.
    pub guard: &'a AddressGuard,
    /// Time for connection and handshake.
    pub connect_timeout: Duration,
    /// Where the host really is.
    pub connect_to: Option<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PoolKey {
    isolation: IsolationKey,
    scheme: Scheme,
    target: Target,
    /// A destination's address identifies its TLS settings and `connect_to`; the pool holds the
    /// destination, so that an address is not used again while it is a key.
    destination: usize,
    /// In clear there is no ALPN: every HTTP server speaks HTTP/1.1, and only gRPC needs more.
    http2_by_prior_knowledge: bool,
}

/// One identity's connections to one destination.
#[derive(Debug)]
struct Pool {
    _destination: Option<Arc<Destination>>,
    /// More than one where all streams of the first are in use.
    http2: RefCell<Vec<Http2Connection>>,
    idle: RefCell<Vec<Http1Connection>>,
    /// A connection under way that all may share; whoever waits is woken when it is there, or failed.
    connecting: RefCell<Option<Rc<Notify>>>,
}

#[derive(Debug)]
struct Http1Connection {
    sender: http1::SendRequest<RequestBody>,
    retire_at: Instant,
    /// When a sweep first found it idle.
    idle_since: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Http2Connection {
    sender: http2::SendRequest<RequestBody>,
    retire_at: Instant,
    /// Whether it was taken since the last sweep.
    used: bool,
    unused: Unused,
    settings: Rc<dyn Settings>,
    /// The pool's, of which every stream that is lent has a clone.
    stream: LentStream,
}

/// An HTTP/2 stream lent to one exchange, for as long as either of its bodies goes on.
#[derive(Debug, Clone, Default)]
pub struct LentStream(Rc<()>);

/// What the destination's last SETTINGS said (RFC 9113 section 6.5).
trait Settings: Debug {
    /// How many streams may be open at once.
    fn max_concurrent_streams(&self) -> usize;
}

/// What drives an HTTP/2 connection, until it is closed.
type Driver<Io> = RefCell<Option<http2::Connection<TokioIo<Io>, RequestBody, LocalExecutor>>>;

impl<Io: AsyncRead + AsyncWrite + Unpin + Debug + 'static> Settings for Driver<Io> {
    fn max_concurrent_streams(&self) -> usize {
        self.borrow()
            .as_ref()
            .map_or(0, |connection| connection.current_max_send_streams())
    }
}

async fn drive<Io: AsyncRead + AsyncWrite + Unpin + 'static>(driver: Rc<Driver<Io>>) {
    poll_fn(|context| match driver.borrow_mut().as_mut() {
        Some(connection) => Pin::new(connection).poll(context).map(drop),
        None => Poll::Ready(()),
    })
    .await;
    driver.take();
}

impl Http2Connection {
    fn is_usable(&self, now: Instant) -> bool {
        !self.sender.is_closed() && now < self.retire_at
    }

    /// Whether the destination takes one more request now. What is given to the client beyond that would wait
    /// there with its token, and leave also after it was refused.
    fn has_free_stream(&self) -> bool {
        Rc::strong_count(&self.stream.0) <= self.settings.max_concurrent_streams()
    }
}

impl Pool {
    fn is_worth_sharing(&self) -> bool {
        let http2 = self.http2.borrow();
        let last = http2.last();
        last.is_some_and(|last| last.settings.max_concurrent_streams() >= WORTH_SHARING)
    }
}

/// Since when sweeps have found that no request took a connection.
#[derive(Debug, Clone, Copy, Default)]
struct Unused(Option<Instant>);

impl Unused {
    fn so_far(&mut self, was_used: bool, now: Instant) -> Duration {
        if was_used {
            self.0 = None;
            return Duration::ZERO;
        }
        now.duration_since(*self.0.get_or_insert(now))
    }
}

/// The one that connects for all who may share the connection.
struct Connecting(Rc<Pool>);

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.connecting.take() {
            waiting.notify_waiters();
        }
    }
}

/// A data worker's connections to destinations.
#[derive(Debug)]
pub struct Upstreams {
    pools: RefCell<HashMap<PoolKey, Rc<Pool>, RandomState>>,
    /// When connections were last swept: near enough to tell which are too old.
    swept_at: Cell<Instant>,
    /// Targets that answered an offer of HTTP/2 with HTTP/1.1: as many as are configured.
    http1_only: RefCell<HashSet<Target>>,
    /// How many of [`SHORTAGES`] it has made room for.
    shortages_seen: Cell<u64>,
    /// Held by the request that looks for a free descriptor; the others wait in the order in which they came.
    waiting: Mutex<()>,
    control: tokio::runtime::Handle,
    clock: Arc<dyn Clock>,
}

/// How often a request of any worker looked for a free descriptor in vain: the process has one table of
/// them, and every worker closes what it does not use.
static SHORTAGES: AtomicU64 = AtomicU64::new(0);

/// An HTTP/1 connection lent to one exchange.
#[derive(Debug)]
pub struct Lent {
    connection: Http1Connection,
    pool: Rc<Pool>,
}

impl Lent {
    /// Puts the connection back, to be used by the same identity again.
    pub fn give_back(self) {
        let Self {
            mut connection,
            pool,
        } = self;
        if !connection.sender.is_closed() {
            connection.idle_since = None;
            pool.idle.borrow_mut().push(connection);
        }
    }
}

/// A response head, and the HTTP/1 connection that its body comes over.
#[derive(Debug)]
pub struct UpstreamResponse {
    /// The response.
    pub response: Response<Incoming>,
    /// The connection to give back at the body's end.
    pub connection: Option<Lent>,
    /// The stream of an HTTP/2 connection that both bodies are on.
    pub http2_stream: Option<LentStream>,
}

enum Connected {
    Http1(Http1Connection),
    Http2(Http2Connection),
}

/// Why a request on a connection got no answer.
enum Unanswered {
    /// The connection was already closed; the request was not sent and is given back.
    NotSent(Box<Request<RequestBody>>),
    Failed(hyper::Error),
}

impl Upstreams {
    /// No connections yet. Names are resolved on `control`; by `clock` tokens expire.
    pub fn new(control: tokio::runtime::Handle, clock: Arc<dyn Clock>) -> Self {
        Self {
            pools: RefCell::default(),
            swept_at: Cell::new(Instant::now()),
            http1_only: RefCell::default(),
            shortages_seen: Cell::default(),
            waiting: Mutex::default(),
            control,
            clock,
        }
    }

    /// Sends a request and waits for the response head.
    ///
    /// # Errors
    /// [`RefusalCode::CredentialExpired`] where the token expired while a connection was waited for; the
    /// connection is there for those that come after. Else what is wrong with the destination.
    pub async fn send(
        &self,
        request: UpstreamRequest,
        way: &Way<'_>,
    ) -> Result<UpstreamResponse, Refusal> {
        let upgrade = request.is_upgrade();
        let needs_http2 = request.is_grpc();
        let key = PoolKey {
            isolation: way.isolation.clone(),
            scheme: way.scheme,
            target: way.target.clone(),
            destination: way
                .destination
                .map_or(0, |destination| Arc::as_ptr(destination) as usize),
            http2_by_prior_knowledge: way.scheme == Scheme::Http && needs_http2 && !upgrade,
        };
        let http2_by_prior_knowledge = key.http2_by_prior_knowledge;
        let pool = self.pool(key, way);
        let usable_until = request.usable_until();
        let mut request = request.into_http();
        // The token was checked just now.
        let mut has_waited = false;
        let mut connecting = None;
        let mut shared = 0;
        let mut looks_in_pool = !upgrade;
        while looks_in_pool {
            while let Some(connection) = self.pooled(&pool, &mut has_waited).await {
                let connection = match has_waited {
                    true => self.check_expiry(usable_until, connection, Some(&pool))?,
                    false => connection,
                };
                match attempt(connection, &pool, way, request).await {
                    Ok(response) => return Ok(response),
                    Err(Unanswered::NotSent(returned)) => request = returned,
                    Err(Unanswered::Failed(error)) => return Err(protocol_refusal(way, &error)),
                }
                has_waited = true;
            }
            // Where that brought no streams to share, or HTTP/1 is spoken, the rest go each their own way.
            let now_shared = pool.http2.borrow().len();
            let one_more = shared < now_shared && pool.is_worth_sharing();
            looks_in_pool = (connecting.is_none() || one_more)
                && self.may_be_shared(way, http2_by_prior_knowledge);
            shared = now_shared;
            if looks_in_pool {
                connecting = Some(connect_or_wait(&pool).await);
                has_waited = true;
                looks_in_pool = matches!(connecting, Some(None));
            }
        }
        // Boxed: connecting is rare, and its state would make every request's future large.
        let connection = Box::pin(self.connect(way, upgrade, http2_by_prior_knowledge)).await?;
        if let (Connected::Http2(connection), false) = (&connection, upgrade) {
            let mut http2 = pool.http2.borrow_mut();
            http2.retain(|known| known.is_usable(self.swept_at.get()));
            http2.push(connection.clone());
        }
        drop(connecting);
        // One that was made for an upgrade speaks less than others may need.
        let keeper = (!upgrade).then_some(&pool);
        let connection = self.check_expiry(usable_until, connection, keeper)?;
        match attempt(connection, &pool, way, request).await {
            Ok(mut response) => {
                if upgrade {
                    // An upgraded or once-used connection is never shared.
                    response.connection = None;
                }
                Ok(response)
            }
            Err(Unanswered::NotSent(_)) => Err(Refusal::new(
                RefusalCode::UpstreamUnreachable,
                format!(
                    "`{}` closed the connection before the request was sent",
                    way.target
                ),
            )),
            Err(Unanswered::Failed(error)) => Err(protocol_refusal(way, &error)),
        }
    }

    fn pool(&self, key: PoolKey, way: &Way<'_>) -> Rc<Pool> {
        let mut pools = self.pools.borrow_mut();
        let pool = pools.entry(key).or_insert_with(|| {
            Rc::new(Pool {
                _destination: way.destination.cloned(),
                http2: RefCell::default(),
                idle: RefCell::default(),
                connecting: RefCell::default(),
            })
        });
        Rc::clone(pool)
    }

    /// Whether a new connection may turn out to be HTTP/2, which all requests share.
    fn may_be_shared(&self, way: &Way<'_>, http2_by_prior_knowledge: bool) -> bool {
        match way.scheme {
            Scheme::Http => http2_by_prior_knowledge,
            Scheme::Https => !self.speaks_http1_only(way.target),
        }
    }

    /// Refuses a request whose token expired while `connection` was waited for, which `keeper` then gets; one
    /// of HTTP/2 it has.
    fn check_expiry(
        &self,
        usable_until: Option<Duration>,
        connection: Connected,
        keeper: Option<&Rc<Pool>>,
    ) -> Result<Connected, Refusal> {
        let checked = check_expiry(usable_until, self.clock.monotonic());
        match (checked, connection, keeper) {
            (Ok(()), connection, _) => Ok(connection),
            (Err(refusal), Connected::Http1(connection), Some(pool)) => {
                let pool = Rc::clone(pool);
                Lent { connection, pool }.give_back();
                Err(refusal)
            }
            (Err(refusal), ..) => Err(refusal),
        }
    }

    /// A connection that this identity used before and that is still usable. Sets `has_waited` where it was
    /// not free at once.
    async fn pooled(&self, pool: &Pool, has_waited: &mut bool) -> Option<Connected> {
        let now = self.swept_at.get();
        let is_free =
            |known: &&mut Http2Connection| known.is_usable(now) && known.has_free_stream();
        if let Some(connection) = pool.http2.borrow_mut().iter_mut().find(is_free) {
            connection.used = true;
            return Some(Connected::Http2(connection.clone()));
        }
        loop {
            let mut candidate = pool.idle.borrow_mut().pop()?;
            if now >= candidate.retire_at {
                continue;
            }
            if candidate.sender.is_ready() {
                return Some(Connected::Http1(candidate));
            }
            // One that answered before it had the whole request is busy until the rest is sent.
            *has_waited = true;
            if let Ok(Ok(())) = timeout(READY, candidate.sender.ready()).await {
                return Some(Connected::Http1(candidate));
            }
        }
    }

    async fn connect(
        &self,
        way: &Way<'_>,
        http1_only: bool,
        http2_by_prior_knowledge: bool,
    ) -> Result<Connected, Refusal> {
        let connect = async {
            let stream = ShortWrites(self.dial(way).await?);
            match (way.scheme, way.tls) {
                (Scheme::Http, _) => handshake(stream, http2_by_prior_knowledge, way).await,
                (Scheme::Https, Some(tls)) => {
                    let client_config = if http1_only { &tls.http1 } else { &tls.any };
                    let name =
                        ServerName::try_from(way.target.host().to_owned()).map_err(|error| {
                            Refusal::new(
                                RefusalCode::MalformedRequest,
                                format!("`{}` is not a server name: {error}", way.target.host()),
                            )
                        })?;
                    let stream = TlsConnector::from(Arc::clone(client_config))
                        .connect(name, stream)
                        .await
                        .map_err(|error| tls_refusal(way, &error))?;
                    let http2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_HTTP2);
                    if !http1_only {
                        self.remember_protocol(way, http2);
                    }
                    handshake(stream, http2, way).await
                }
                (Scheme::Https, None) => Err(Refusal::new(
                    RefusalCode::UpstreamTls,
                    format!("no trusted roots are loaded for `{}`", way.target),
                )),
            }
        };
        timeout(way.connect_timeout, connect)
            .await
            .unwrap_or_else(|_| {
                Err(Refusal::new(
                    RefusalCode::UpstreamTimeout,
                    format!(
                        "`{}` accepted no connection in {:?}",
                        way.target, way.connect_timeout
                    ),
                ))
            })
    }

    /// Of unmatched traffic nothing is remembered: callers choose where it goes.
    fn remember_protocol(&self, way: &Way<'_>, http2: bool) {
        if way.destination.is_none() {
            return;
        }
        let mut http1_only = self.http1_only.borrow_mut();
        match http2 {
            true => http1_only.remove(way.target),
            false => http1_only.insert(way.target.clone()),
        };
    }

    /// Opens a TCP connection to an address that the guard allows. Where no descriptor is free,
    /// connections that nobody uses are closed, and those in use are waited for.
    pub async fn dial(&self, way: &Way<'_>) -> Result<TcpStream, Refusal> {
        let gives_up_at = Instant::now() + DESCRIPTOR_WAIT.min(way.connect_timeout / 2);
        let mut turn = None;
        loop {
            let refusal = match self.dial_once(way).await {
                Err(refusal) if refusal.code == RefusalCode::OutOfDescriptors => refusal,
                dialled => return dialled,
            };
            if Instant::now() >= gives_up_at {
                return Err(refusal);
            }
            if turn.is_some() {
                SHORTAGES.fetch_add(1, Ordering::Relaxed);
                self.close_unused();
                sleep(DESCRIPTOR_PAUSE).await;
                continue;
            }
            match timeout_at(gives_up_at.into(), self.waiting.lock()).await {
                Ok(next) => turn = Some(next),
                Err(_) => return Err(refusal),
            }
        }
    }

    async fn dial_once(&self, way: &Way<'_>) -> Result<TcpStream, Refusal> {
        let addresses = match (way.connect_to, way.target.address()) {
            (Some(address), _) => vec![address],
            (None, Some(address)) => vec![SocketAddr::new(address, way.target.port())],
            (None, None) => self.resolve(way).await?.to_vec(),
        };
        let mut last_error = None;
        let mut guarded = None;
        for address in addresses {
            if let Err(refused) = way.guard.check(address.ip(), address.port()) {
                guarded = Some(refused);
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // Without it the second small write of an exchange waits for an acknowledgement.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(error) if is_out_of_descriptors(&error) => {
                    return Err(out_of_descriptors(way.target));
                }
                Err(error) => last_error = Some(error),
            }
        }
        Err(match (last_error, guarded) {
            (Some(error), _) => Refusal::new(
                RefusalCode::UpstreamUnreachable,
                format!(
                    "`{}` could not be reached: {}",
                    way.target,
                    system_words(&error)
                ),
            ),
            (None, Some(refused)) => {
                let code = match refused {
                    AddressRefused::OwnListener(_) => RefusalCode::OwnListener,
                    AddressRefused::Class(..) => RefusalCode::AddressNotAllowed,
                };
                Refusal::new(code, format!("`{}`: {refused}", way.target))
            }
            (None, None) => Refusal::new(
                RefusalCode::UpstreamNameUnresolved,
                format!("`{}` has no address", way.target.host()),
            ),
        })
    }

    /// Closes the connections that no request uses. Streams that are open on one of HTTP/2 end in their
    /// own time.
    fn close_unused(&self) {
        self.shortages_seen.set(SHORTAGES.load(Ordering::Relaxed));
        for pool in self.pools.borrow().values() {
            pool.idle.borrow_mut().clear();
            pool.http2.borrow_mut().retain(|connection| connection.used);
        }
    }

    async fn resolve(&self, way: &Way<'_>) -> Result<Arc<[SocketAddr]>, Refusal> {
        let target = way.target;
        let asker = match way.destination {
            Some(_) => Asker::Destinations,
            None => Asker::Identity(way.isolation.clone()),
        };
        let resolved = lookups()
            .resolve(asker, target.host(), target.port(), &self.control)
            .await;
        match resolved {
            Some(Ok(addresses)) => Ok(addresses),
            // For want of a descriptor the system may say that there is no such name.
            Some(Err(error)) if is_out_of_descriptors(&error) || few_are_left() => {
                Err(out_of_descriptors(target))
            }
            Some(Err(error)) => Err(Refusal::new(
                RefusalCode::UpstreamNameUnresolved,
                format!(
                    "`{}` does not resolve: {}",
                    target.host(),
                    system_words(&error)
                ),
            )),
            None => Err(Refusal::new(
                RefusalCode::ShuttingDown,
                "the agent is shutting down",
            )),
        }
    }

    /// Whether the last connection to a target spoke HTTP/1.1 though HTTP/2 was offered.
    pub fn speaks_http1_only(&self, target: &Target) -> bool {
        self.http1_only.borrow().contains(target)
    }

    /// Drops what is idle for too long or too old.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.swept_at.set(now);
        if self.shortages_seen.get() != SHORTAGES.load(Ordering::Relaxed) {
            self.close_unused();
        }
        self.pools.borrow_mut().retain(|_, pool| {
            pool.idle.borrow_mut().retain_mut(|connection| {
                let idle_since = *connection.idle_since.get_or_insert(now);
                now < connection.retire_at
                    && now.duration_since(idle_since) < IDLE
                    && !connection.sender.is_closed()
            });
            // Streams that are open on one that is let go end in their own time.
            pool.http2.borrow_mut().retain_mut(|connection| {
                let was_used = std::mem::take(&mut connection.used);
                connection.is_usable(now) && connection.unused.so_far(was_used, now) < IDLE
            });
            // A request under way gives its connection back to the pool that it came from.
            Rc::strong_count(pool) > 1
                || !pool.http2.borrow().is_empty()
                || !pool.idle.borrow().is_empty()
        });
    }
}

/// Makes the caller the one that connects, or waits until another has.
async fn connect_or_wait(pool: &Rc<Pool>) -> Option<Connecting> {
    let under_way = pool.connecting.borrow().clone();
    match under_way {
        Some(under_way) => {
            under_way.notified().await;
            None
        }
        None => {
            *pool.connecting.borrow_mut() = Some(Rc::default());
            Some(Connecting(Rc::clone(pool)))
        }
    }
}

fn out_of_descriptors(target: &Target) -> Refusal {
    Refusal::new(
        RefusalCode::OutOfDescriptors,
        format!("no descriptor was free for a connection to `{target}`"),
    )
    .with_retry_after(DESCRIPTOR_WAIT)
}

async fn attempt(
    connection: Connected,
    pool: &Rc<Pool>,
    way: &Way<'_>,
    request: Box<Request<RequestBody>>,
) -> Result<UpstreamResponse, Unanswered> {
    match connection {
        Connected::Http1(mut connection) => {
            let request = as_http1(request, way);
            let response = connection.sender.try_send_request(*request).await?;
            Ok(UpstreamResponse {
                response,
                connection: Some(Lent {
                    connection,
                    pool: Rc::clone(pool),
                }),
                http2_stream: None,
            })
        }
        Connected::Http2(mut connection) => {
            let request = as_http2(request, way);
            let response = connection.sender.try_send_request(*request).await?;
            Ok(UpstreamResponse {
                response,
                connection: None,
                http2_stream: Some(connection.stream),
            })
        }
    }
}

impl From<TrySendError<Request<RequestBody>>> for Unanswered {
    fn from(mut error: TrySendError<Request<RequestBody>>) -> Self {
        match error.take_message() {
            Some(request) => Self::NotSent(Box::new(request)),
            None => Self::Failed(error.into_error()),
        }
    }
}

async fn handshake<Io>(stream: Io, http2: bool, way: &Way<'_>) -> Result<Connected, Refusal>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + Debug + 'static,
{
    let now = Instant::now();
    let jitter = AGE_JITTER.mul_f64(f64::from(rand_fraction(now)));
    let retire_at = now + MAXIMUM_AGE - jitter;
    let io = TokioIo::new(stream);
    if http2 {
        let (sender, connection) = http2::Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .keep_alive_interval(HTTP2_PING_INTERVAL)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(io)
            .await
            .map_err(|error| protocol_refusal(way, &error))?;
        let driver = Rc::new(RefCell::new(Some(connection)));
        spawn_local(drive(Rc::clone(&driver)));
        Ok(Connected::Http2(Http2Connection {
            sender,
            retire_at,
            used: false,
            unused: Unused::default(),
            settings: driver,
            stream: LentStream::default(),
        }))
    } else {
        let (sender, connection) = http1::Builder::new()
            .handshake(io)
            .await
            .map_err(|error| protocol_refusal(way, &error))?;
        spawn_local(connection.with_upgrades());
        Ok(Connected::Http1(Http1Connection {
            sender,
            retire_at,
            idle_since: None,
        }))
    }
}

/// A fraction in 0..1 that differs between connections; not for secrets.
fn rand_fraction(now: Instant) -> f32 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(now) >> 40) as f32 / (1_u64 << 24) as f32
}

/// Origin-form target and `Host` (RFC 9112 section 3.2), and one `Cookie`.
fn as_http1(mut request: Box<Request<RequestBody>>, way: &Way<'_>) -> Box<Request<RequestBody>> {
    *request.version_mut() = Version::HTTP_11;
    // Never the caller's spelling: a gateway's own name, for one, means nothing to the destination.
    let authority = way.target.to_authority(way.scheme);
    let is_set = request
        .headers()
        .get(HOST)
        .is_some_and(|host| host.as_bytes() == authority.as_bytes());
    if !is_set && let Ok(host) = HeaderValue::from_str(&authority) {
        request.headers_mut().insert(HOST, host);
    }
    if request.uri().authority().is_some() {
        let path_and_query = path_and_query(request.uri());
        *request.uri_mut() = Uri::from(path_and_query);
    }
    join_cookies(request.headers_mut());
    // The client takes it that these methods have no body, and leaves out one that has no length.
    if matches!(*request.method(), Method::GET | Method::HEAD)
        && !request.body().is_end_stream()
        && !request.headers().contains_key(CONTENT_LENGTH)
    {
        let chunked = HeaderValue::from_static("chunked");
        request.headers_mut().insert(TRANSFER_ENCODING, chunked);
    }
    request
}

/// Makes one field of a `Cookie` that HTTP/2 has split into several (RFC 9113 section 8.2.3).
fn join_cookies(fields: &mut HeaderMap) {
    let cookies = fields.get_all(COOKIE);
    if cookies.iter().nth(1).is_none() {
        return;
    }
    let is_sensitive = cookies.iter().any(HeaderValue::is_sensitive);
    let values: Vec<&[u8]> = cookies.iter().map(HeaderValue::as_bytes).collect();
    if let Ok(mut joined) = HeaderValue::from_bytes(&values.join(b"; ".as_slice())) {
        joined.set_sensitive(is_sensitive);
        fields.insert(COOKIE, joined);
    }
}

/// `:scheme`, `:authority` and `:path` (RFC 9113 section 8.3.1).
fn as_http2(mut request: Box<Request<RequestBody>>, way: &Way<'_>) -> Box<Request<RequestBody>> {
    *request.version_mut() = Version::HTTP_2;
    request.headers_mut().remove(HOST);
    let uri = Uri::builder()
        .scheme(way.scheme.as_str())
        .authority(&*way.target.to_authority(way.scheme))
        .path_and_query(path_and_query(request.uri()))
        .build();
    if let Ok(uri) = uri {
        *request.uri_mut() = uri;
    }
    request
}

fn path_and_query(uri: &Uri) -> PathAndQuery {
    uri.path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"))
}

fn tls_refusal(way: &Way<'_>, error: &io::Error) -> Refusal {
    let certificate = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match certificate {
        Some(error) => Refusal::new(
            RefusalCode::UpstreamTls,
            format!("TLS with `{}` failed: {error}", way.target),
        ),
        None => Refusal::new(
            RefusalCode::UpstreamUnreachable,
            format!(
                "`{}` broke off the TLS handshake: {}",
                way.target,
                system_words(error)
            ),
        ),
    }
}

fn protocol_refusal(way: &Way<'_>, error: &hyper::Error) -> Refusal {
    // The other end of the exchange: what was read from the caller.
    let is_the_callers = error.is_user()
        && error
            .source()
            .is_some_and(|source| source.is::<hyper::Error>());
    let http2 = error
        .source()
        .and_then(|source| source.downcast_ref::<h2::Error>());
    let is_refused = http2.is_some_and(|error| match error.reason() {
        Some(h2::Reason::REFUSED_STREAM) => error.is_remote(),
        Some(h2::Reason::NO_ERROR) => error.is_remote() && error.is_go_away(),
        Some(_) | None => false,
    });
    let words = http2.map_or_else(|| error.to_string(), ToString::to_string);
    match (is_the_callers, is_refused) {
        (true, _) => Refusal::new(
            RefusalCode::MalformedRequest,
            "the request's body is malformed or was cut off",
        ),
        (false, true) => Refusal::new(
            RefusalCode::UpstreamRefusedStream,
            format!("`{}` takes no more on this connection: {words}", way.target),
        ),
        (false, false) => Refusal::new(
            RefusalCode::UpstreamProtocol,
            format!("`{}` did not answer in HTTP: {words}", way.target),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_unused_since_the_sweep_that_found_it_so() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut unused = Unused::default();
        assert_eq!(unused.so_far(true, at(0)), Duration::ZERO);
        assert_eq!(unused.so_far(false, at(1)), Duration::ZERO);
        assert_eq!(unused.so_far(false, at(31)), IDLE);
        assert_eq!(unused.so_far(true, at(32)), Duration::ZERO);
        assert_eq!(unused.so_far(false, at(90)), Duration::ZERO);
    }

    #[tokio::test]
    async fn nothing_is_remembered_of_where_unmatched_traffic_goes() {
        let upstreams = Upstreams::new(
            tokio::runtime::Handle::current(),
            Arc::new(crate::clock::SystemClock::new()),
        );
        let target = Target::parse("any.example.test:443", None).unwrap();
        let way = Way {
            isolation: &IsolationKey("one".into()),
            destination: None,
            scheme: Scheme::Https,
            target: &target,
            tls: None,
            guard: &AddressGuard::new(&[], Arc::new([])),
            connect_timeout: READY,
            connect_to: None,
        };
        upstreams.remember_protocol(&way, false);
        assert!(upstreams.http1_only.borrow().is_empty());
    }
}
