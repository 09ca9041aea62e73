//! Serves HTTP on accepted connections and inside tunnels.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;

use super::interim::{Interim, Owed, WithInterim};
use super::linger::Lingering;
use super::sniff::{Prefixed, Protocol, sniff};
use super::unreadable::Unreadable;
use crate::agent::{Agent, Phase, until};
use crate::config::{Limits, Scheme};
use crate::connection::{Caller, Connection, Counted, Entry, Tunnel};
use crate::local::LocalExecutor;
use crate::proxy::{Worker, answer};
use crate::request::Target;
use crate::streams::{BodyError, CutReason, Permission, ResponseBody, Stream};
use crate::tls::ALPN_HTTP2;
use crate::tls::interception::Offer;
use countersign_attestors::PresentedToken;

/// How long a client may take to say what it speaks inside a tunnel.
const SNIFF_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const MAXIMUM_STREAMS: u32 = 250;
/// How long the first request of a new connection is waited for when the agent ends.
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// How long a connection whose caller was attested may be idle, where HTTP/1 has no shorter limit.
const CONNECTION_IDLE: Duration = Duration::from_secs(3600);

/// How long a connection that was cut may take to end in good order. What is open on it is cut by itself.
const FAREWELL: Duration = Duration::from_secs(5);

/// What serves a connection until it closes.
type Serving = Pin<Box<dyn Future<Output = ()>>>;

/// Serves an accepted connection until it closes.
pub fn serve_connection<Io>(
    worker: Rc<Worker>,
    entry: Arc<Entry>,
    caller: Rc<Caller>,
    io: Io,
) -> impl Future<Output = ()>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    serve_once_begun(begin_connection(worker, entry, caller, io))
}

/// A connection keeps nothing of how it began, but for what serves it.
fn serve_once_begun(
    begun: impl Future<Output = Option<Serving>> + 'static,
) -> impl Future<Output = ()> {
    let begun = Box::pin(begun);
    async {
        if let Some(serving) = begun.await {
            serving.await;
        }
    }
}

async fn begin_connection<Io>(
    worker: Rc<Worker>,
    entry: Arc<Entry>,
    caller: Rc<Caller>,
    io: Io,
) -> Option<Serving>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (protocol, io) = first_bytes(&worker.agent, io).await?;
    let connection = Rc::new(Connection {
        stream: Stream::new(head_timeout(&worker.agent), Weak::new()),
        worker,
        entry,
        caller,
        tunnel: None,
        interim: interim_for(protocol == Protocol::Http1),
        is_used: Cell::new(false),
    });
    match protocol {
        // The proxy itself is spoken to in plain HTTP on loopback or a Unix socket.
        Protocol::Tls => None,
        Protocol::Http1 => Some(serve(connection, io, false)),
        Protocol::Http2 => Some(serve(connection, io, true)),
    }
}

/// Waits for a caller to say what it speaks. `None` where it does not in time, or the agent ends.
async fn first_bytes<Io>(agent: &Agent, io: Io) -> Option<(Protocol, Prefixed<Io>)>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut phases = agent.phase.subscribe();
    tokio::select! {
        biased;
        sniffed = timeout(head_timeout(agent), sniff(io)) => sniffed.ok()?.ok(),
        // A caller that connected just before has said by now what it wants.
        () = until(Phase::Closing, &mut phases) => None,
    }
}

/// How long whoever asks nothing keeps a place, also with the preface of HTTP/2.
fn head_timeout(agent: &Agent) -> Duration {
    agent.snapshot.load().config.limits.head_timeout
}

/// Serves the inside of an intercepted tunnel: TLS under a leaf for its host, or plain HTTP.
pub fn serve_tunnel(
    outer: Rc<Connection>,
    upgrade: OnUpgrade,
    target: Target,
    presented: Option<PresentedToken>,
) -> impl Future<Output = ()> {
    serve_once_begun(begin_tunnel(outer, upgrade, target, presented))
}

async fn begin_tunnel(
    outer: Rc<Connection>,
    upgrade: OnUpgrade,
    target: Target,
    presented: Option<PresentedToken>,
) -> Option<Serving> {
    let upgraded = upgrade.await.ok()?;
    let worker = Rc::clone(&outer.worker);
    // HTTP/1 has no other request on a connection that is a tunnel.
    let is_alone = outer.interim.is_some();
    // Until a request in it is attested: what it asks is its identity's.
    let place = outer
        .caller
        .take_place(is_alone, &outer.entry.places, &worker.agent)?;
    let sniffed = timeout(SNIFF_TIMEOUT, sniff(TokioIo::new(upgraded))).await;
    let (protocol, io) = sniffed.ok()?.ok()?;
    // The tunnel keeps nothing of the connection that it has taken over.
    let inside = move |scheme, target, http1| {
        Rc::new(Connection {
            stream: outer.open(head_timeout(&outer.worker.agent)),
            worker: Rc::clone(&outer.worker),
            entry: Arc::clone(&outer.entry),
            caller: Rc::clone(&outer.caller),
            tunnel: Some(Box::new(Tunnel {
                target,
                scheme,
                presented,
                valid_until: Cell::new(None),
                is_alone,
                counted: RefCell::new(Counted::Unattested(place)),
            })),
            interim: interim_for(http1),
            is_used: Cell::new(false),
        })
    };
    match protocol {
        Protocol::Http1 => Some(serve(inside(Scheme::Http, target, true), io, false)),
        Protocol::Http2 => Some(serve(inside(Scheme::Http, target, false), io, true)),
        Protocol::Tls => {
            let shaken = accept_intercepted(&worker, &target, io);
            match timeout(HANDSHAKE_TIMEOUT, shaken).await {
                Ok(Ok((stream, http2))) => {
                    Some(serve(inside(Scheme::Https, target, !http2), stream, http2))
                }
                Ok(Err(detail)) => {
                    tracing::debug!(
                        host = target.host(),
                        detail,
                        "an intercepted handshake failed"
                    );
                    None
                }
                Err(_) => {
                    tracing::debug!(
                        host = target.host(),
                        "an intercepted handshake took too long"
                    );
                    None
                }
            }
        }
    }
}

fn interim_for(http1: bool) -> Option<Arc<Interim>> {
    http1.then(Arc::default)
}

/// Shakes hands as the tunnel's host. The name that the client asks for must be the tunnel's.
async fn accept_intercepted<Io>(
    worker: &Worker,
    target: &Target,
    io: Io,
) -> Result<(Box<tokio_rustls::server::TlsStream<Io>>, bool), String>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io)
        .await
        .map_err(|error| error.to_string())?;
    if let Some(name) = start.client_hello().server_name()
        && !name.eq_ignore_ascii_case(target.host())
    {
        return Err(format!(
            "the client asks for `{name}` inside a tunnel to another host"
        ));
    }
    let snapshot = worker.agent.snapshot.load_full();
    let authority = snapshot
        .interception
        .as_ref()
        .ok_or("interception is not configured")?;
    let offer = match worker.upstreams.speaks_http1_only(target) {
        true => Offer::Http1,
        false => Offer::Http2AndHttp1,
    };
    let server_config = authority
        .server_config(target.host(), offer, worker.agent.clock.wall())
        .map_err(|error| error.to_string())?
        .ok_or("the host is not configured")?;
    let stream = start
        .into_stream(Arc::clone(&server_config))
        .await
        .map_err(|error| error.to_string())?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_HTTP2);
    Ok((Box::new(stream), http2))
}

/// Ends a connection in good order when the agent is, and when its caller's attestation ends: exit,
/// exec, or expiry of what it presented.
struct CallerLives {
    connection: Weak<Connection>,
    /// The phase of the agent in which it ends.
    ends_in: Phase,
    began: Instant,
}

impl CallerLives {
    /// Whether the connection's place in the agent's end is now. One that has just been opened is owed
    /// its first request: the client has no reason to send that one twice.
    fn is_to_end(&self, connection: &Connection) -> bool {
        connection.worker.agent.has_come_to(self.ends_in)
            && (connection.is_used.get() || self.began.elapsed() >= FIRST_REQUEST)
    }
}

impl Permission for CallerLives {
    fn check(&self) -> Result<(), CutReason> {
        match self.connection.upgrade() {
            Some(connection) if self.is_to_end(&connection) => Err(CutReason::ShuttingDown),
            Some(connection) if connection.is_permitted() => Ok(()),
            _ => Err(CutReason::PermissionEnded),
        }
    }
}

/// Says that no request is served on this connection after this answer (RFC 9112 section 9.6).
pub(super) fn say_last<Body>(response: &mut Response<Body>) {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

fn serve<Io>(connection: Rc<Connection>, io: Io, http2: bool) -> Serving
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let worker = Rc::clone(&connection.worker);
    let Limits {
        head_size,
        head_timeout,
        ..
    } = worker.agent.snapshot.load().config.limits;
    let interim = connection.interim.clone().unwrap_or_default();
    let unreadable = Unreadable::of(&connection);
    let stream = Rc::clone(&connection.stream);
    worker.open_streams.watch(
        &stream,
        Rc::new(CallerLives {
            connection: Rc::downgrade(&connection),
            // GOAWAY says what will be served still; closing an idle HTTP/1 connection does not.
            ends_in: if http2 {
                Phase::LastAnswers
            } else {
                Phase::Closing
            },
            began: Instant::now(),
        }),
    );
    let service = service_fn(move |request: Request<Incoming>| {
        connection.stream.touch();
        connection.stream.may_idle(CONNECTION_IDLE);
        connection.is_used.set(true);
        let connection = Rc::clone(&connection);
        let (mut head, body) = request.into_parts();
        // Boxed: idle connections keep none of its state.
        Box::pin(async move {
            let owed = connection.interim.as_ref().map(Owed::on);
            let agent = Arc::clone(&connection.worker.agent);
            let is_connect = head.method == Method::CONNECT;
            let mut response = answer(&connection, &mut head, body).await;
            connection
                .stream
                .may_idle(match connection.is_unattested() {
                    true => head_timeout,
                    false => CONNECTION_IDLE,
                });
            if let Some(owed) = &owed {
                owed.settle(changes_protocol(is_connect, response.status()));
            }
            if !http2 && !is_connect && agent.has_come_to(Phase::LastAnswers) {
                say_last(&mut response);
            }
            Ok::<_, Infallible>(response.map(|body| OwedBody { body, _owed: owed }))
        })
    });
    if http2 {
        let served = http2::Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAXIMUM_STREAMS)
            .max_header_list_size(head_size)
            .adaptive_window(true)
            .serve_connection(TokioIo::new(io), service);
        let ending = http2::Connection::graceful_shutdown;
        Box::pin(until_ended(Box::pin(served), ending, stream))
    } else {
        let io = WithInterim {
            io: Lingering::new(io, Arc::clone(&worker.agent), Arc::clone(&interim)),
            interim,
            unreadable,
        };
        let head_size = usize::try_from(head_size).unwrap_or(usize::MAX);
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(head_timeout)
            .max_buf_size(head_size)
            .max_header_size(head_size)
            .half_close(true)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        let ending = http1::UpgradeableConnection::graceful_shutdown;
        Box::pin(until_ended(Box::pin(served), ending, stream))
    }
}

/// Serves a connection until it ends. One whose stream is cut is asked to end; but for the end of the agent
/// it has [`FAREWELL`] for that, for a caller that reads nothing and answers nothing would keep it.
async fn until_ended<Served>(
    mut served: Pin<Box<Served>>,
    graceful_shutdown: impl FnOnce(Pin<&mut Served>),
    stream: Rc<Stream>,
) where
    Served: Future<Output = hyper::Result<()>>,
{
    let reason = tokio::select! {
        biased;
        ended = served.as_mut() => return note_end(ended),
        reason = stream.until_cut() => reason,
    };
    graceful_shutdown(served.as_mut());
    note_end(match reason {
        CutReason::ShuttingDown => served.await,
        CutReason::PermissionEnded | CutReason::NoResponse | CutReason::Idle => {
            // Boxed: no connection keeps room for the timer.
            let farewell = Box::pin(timeout(FAREWELL, served));
            farewell.await.unwrap_or(Ok(()))
        }
    });
}

fn note_end(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a workload's connection ended");
    }
}

/// Whether the connection is a tunnel's or another protocol's after a response (RFC 9110 sections 7.8
/// and 9.3.6).
fn changes_protocol(is_connect: bool, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || (is_connect && status.is_success())
}

/// A response's body, which is owed to the caller until the server drops it.
struct OwedBody {
    body: ResponseBody,
    _owed: Option<Owed>,
}

impl Body for OwedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
