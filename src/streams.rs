//! Bodies, and what is open: each response stream, upgrade and tunnel keeps the lease that it was
//! granted under, and is cut within a second when the lease ends.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{AUTHORIZATION, PROXY_AUTHORIZATION};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use slab::Slab;
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::config::Destination;
use crate::inject::strip_credentials;
use crate::limits::Held;
use crate::upstream::{Lent, LentStream};

/// The error of every body of ours.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Why a stream was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CutReason {
    /// Policy, revocation or the workload's attestation no longer permits it.
    #[error("the stream's permission ended")]
    PermissionEnded,
    /// The destination was quiet for `timeouts.response_headers` before it answered.
    #[error("the destination sent no response head in time")]
    NoResponse,
    /// No byte passed in either direction for the destination's `timeouts.idle`.
    #[error("the stream was idle for too long")]
    Idle,
    /// The agent is shutting down.
    #[error("the agent is shutting down")]
    ShuttingDown,
}

/// One open stream, shared by the bodies or the tunnel that carry it.
#[derive(Debug)]
pub struct Stream {
    cut: Cell<Option<CutReason>>,
    /// Whether bytes passed since the last sweep, which reads the clock for all of them.
    active: Cell<bool>,
    /// When a sweep last found it active.
    last_activity: Cell<Option<Instant>>,
    idle: Cell<Duration>,
    /// How long the destination may be quiet while its answer is awaited.
    awaited: Cell<Option<Duration>>,
    /// Of the caller's task, and of the upstream connection's where a body is sent.
    wakers: RefCell<SmallVec<[Waker; 2]>>,
    held: RefCell<Option<Held>>,
    http2_stream: RefCell<Option<LentStream>>,
    destination: RefCell<Option<Arc<Destination>>>,
    watched: RefCell<Option<Watch>>,
    /// The caller's connection that it is open on, if it is on one.
    outer: Weak<Stream>,
}

impl Stream {
    /// A stream that may be idle for `idle`. While it may go on, `outer` is not idle.
    pub fn new(idle: Duration, outer: Weak<Self>) -> Rc<Self> {
        Rc::new(Self {
            cut: Cell::new(None),
            active: Cell::new(true),
            last_activity: Cell::new(None),
            idle: Cell::new(idle),
            awaited: Cell::new(None),
            wakers: RefCell::default(),
            held: RefCell::new(None),
            http2_stream: RefCell::new(None),
            destination: RefCell::new(None),
            watched: RefCell::new(None),
            outer,
        })
    }

    /// Says where the request goes: its trailers lose every header in which that takes a credential.
    pub fn leads_to(&self, destination: Option<&Arc<Destination>>) {
        *self.destination.borrow_mut() = destination.cloned();
    }

    /// Servers may merge trailers into the head (RFC 9110 section 6.5.1), where they would stand beside
    /// ours.
    pub(crate) fn without_credentials(&self, mut trailers: HeaderMap) -> HeaderMap {
        trailers.remove(PROXY_AUTHORIZATION);
        match &*self.destination.borrow() {
            Some(destination) => strip_credentials(&mut trailers, destination),
            None => {
                trailers.remove(AUTHORIZATION);
            }
        }
        trailers
    }

    /// Sets how long it may be idle.
    pub fn may_idle(&self, idle: Duration) {
        self.idle.set(idle);
    }

    /// Keeps an identity's place among its requests in flight until the stream ends.
    pub fn hold(&self, held: Option<Held>) {
        if held.is_some() {
            *self.held.borrow_mut() = held;
        }
    }

    /// Keeps the destination's HTTP/2 stream that its bodies are on until both have ended.
    pub fn is_on(&self, http2_stream: Option<LentStream>) {
        *self.http2_stream.borrow_mut() = http2_stream;
    }

    /// Notes that bytes passed.
    pub fn touch(&self) {
        self.active.set(true);
    }

    /// Ends the stream: its bodies fail, its tunnel closes.
    pub fn cut(&self, reason: CutReason) {
        if self.cut.get().is_none() {
            self.cut.set(Some(reason));
            for waker in self.wakers.take() {
                waker.wake();
            }
        }
    }

    /// Limits how long nothing may pass until [`Stream::answered`].
    pub fn await_answer(&self, quiet: Duration) {
        self.touch();
        self.awaited.set(Some(quiet));
    }

    /// Notes that the response's head has come.
    pub fn answered(&self) {
        self.awaited.set(None);
    }

    /// Called at every sweep: a limit is exceeded by less than two of them.
    fn check_activity(&self, now: Instant) -> Result<(), CutReason> {
        if self.active.replace(false) {
            self.last_activity.set(Some(now));
        }
        let quiet = self
            .last_activity
            .get()
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        match self.awaited.get() {
            Some(limit) if quiet > limit => Err(CutReason::NoResponse),
            None if quiet > self.idle.get() => Err(CutReason::Idle),
            _ => Ok(()),
        }
    }

    fn poll_cut(&self, context: &mut Context<'_>) -> Poll<CutReason> {
        match self.cut.get() {
            Some(reason) => Poll::Ready(reason),
            None => {
                let mut wakers = self.wakers.borrow_mut();
                if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                    wakers.push(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    /// Why the stream was cut, if it was.
    pub fn cut_reason(&self) -> Option<CutReason> {
        self.cut.get()
    }

    /// Waits until the stream is cut.
    pub async fn until_cut(&self) -> CutReason {
        std::future::poll_fn(|context| self.poll_cut(context)).await
    }
}

/// What decides whether an open stream may go on: a request's answer and an upgrade ([`crate::proxy`]), a
/// blind tunnel (there too), and a caller's connection ([`crate::listener::serve`]).
pub trait Permission {
    /// `Err` when the stream must end. Called when time has passed or the policy snapshot changed.
    fn check(&self) -> Result<(), CutReason>;
}

/// A data worker's open streams.
#[derive(Default)]
pub struct OpenStreams {
    watched: Rc<RefCell<Slab<Watched>>>,
}

type Watched = (Weak<Stream>, Rc<dyn Permission>);

/// A stream's place among those that are watched, until the stream is dropped.
struct Watch {
    all: Rc<RefCell<Slab<Watched>>>,
    key: usize,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Watch").field(&self.key).finish()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Dropped after the borrow: a permission may hold what leads back here.
        let _ended = self.all.borrow_mut().try_remove(self.key);
    }
}

impl OpenStreams {
    /// Watches `stream` for as long as anybody holds it.
    pub fn watch(&self, stream: &Rc<Stream>, permission: Rc<dyn Permission>) {
        let key = self
            .watched
            .borrow_mut()
            .insert((Rc::downgrade(stream), permission));
        let all = Rc::clone(&self.watched);
        *stream.watched.borrow_mut() = Some(Watch { all, key });
    }

    /// Cuts the streams whose permission ended or that are idle.
    pub fn sweep(&self) {
        let now = Instant::now();
        for (stream, permission) in self.open() {
            let verdict = stream.check_activity(now);
            if let Err(reason) = verdict.and_then(|()| permission.check()) {
                tracing::debug!(%reason, "a stream was cut");
                stream.cut(reason);
            } else if let Some(outer) = stream.outer.upgrade() {
                outer.touch();
            }
        }
    }

    /// Cuts everything.
    pub fn cut_all(&self, reason: CutReason) {
        for (stream, _) in self.open() {
            stream.cut(reason);
        }
    }

    /// What is open and not yet cut. A check may end streams, so that nothing is borrowed meanwhile.
    fn open(&self) -> Vec<(Rc<Stream>, Rc<dyn Permission>)> {
        self.watched
            .borrow()
            .iter()
            .filter_map(|(_, (stream, permission))| {
                let stream = stream.upgrade()?;
                let open = stream.cut.get().is_none();
                open.then(|| (stream, Rc::clone(permission)))
            })
            .collect()
    }
}

/// A connection whose every read counts as activity of a stream.
#[derive(Debug)]
pub struct Touching<'a, Io> {
    /// The connection.
    pub io: Io,
    /// The stream.
    pub stream: &'a Stream,
}

impl<Io: AsyncRead + Unpin> AsyncRead for Touching<'_, Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(context, buffer);
        if polled.is_ready() {
            self.stream.touch();
        }
        polled
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Touching<'_, Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(context, buffer);
        if polled.is_ready() {
            self.stream.touch();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// A request body on its way to a destination.
#[derive(Debug)]
pub enum RequestBody {
    /// Nothing: such a request can be replayed.
    Empty,
    /// The workload's own body, streamed.
    Streamed(Incoming, Rc<Stream>),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Streamed(incoming, stream) => {
                poll_streamed(incoming, stream, context).map_ok(|frame| {
                    match frame.into_trailers() {
                        Ok(trailers) => Frame::trailers(stream.without_credentials(trailers)),
                        Err(frame) => frame,
                    }
                })
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Streamed(incoming, _) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Streamed(incoming, _) => incoming.size_hint(),
        }
    }
}

fn poll_streamed(
    incoming: &mut Incoming,
    stream: &Stream,
    context: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
    if let Some(reason) = stream.cut.get() {
        return Poll::Ready(Some(Err(reason.into())));
    }
    match Pin::new(incoming).poll_frame(context) {
        Poll::Ready(frame) => {
            stream.touch();
            Poll::Ready(frame.map(|result| result.map_err(Into::into)))
        }
        Poll::Pending => {
            let reason = ready!(stream.poll_cut(context));
            Poll::Ready(Some(Err(reason.into())))
        }
    }
}

/// A response body on its way to the workload.
#[derive(Debug)]
pub enum ResponseBody {
    /// A few bytes of ours.
    Whole(Option<Bytes>),
    /// The destination's body, streamed; gives its connection back at its end.
    Streamed {
        /// The body.
        incoming: Incoming,
        /// The stream that it belongs to.
        stream: Rc<Stream>,
        /// The HTTP/1 connection that it came over.
        connection: Option<Lent>,
    },
}

impl ResponseBody {
    /// A body of ours.
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self::Whole((!bytes.is_empty()).then_some(bytes))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Streamed {
                incoming,
                stream,
                connection,
            } => {
                let polled = poll_streamed(incoming, stream, context);
                if let Poll::Ready(None) = polled {
                    give_back(connection);
                }
                polled
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Streamed { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Streamed { incoming, .. } => incoming.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // A server stops polling a body of known length at its last byte and never sees `None`.
        if let Self::Streamed {
            incoming,
            connection,
            ..
        } = self
            && incoming.is_end_stream()
        {
            give_back(connection);
        }
    }
}

fn give_back(connection: &mut Option<Lent>) {
    if let Some(lent) = connection.take() {
        lent.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Always;

    impl Permission for Always {
        fn check(&self) -> Result<(), CutReason> {
            Ok(())
        }
    }

    #[test]
    fn a_connection_is_idle_when_nothing_on_it_may_go_on() {
        const IDLE: Duration = Duration::from_millis(50);
        let streams = OpenStreams::default();
        let open = |idle, outer| {
            let stream = Stream::new(idle, outer);
            streams.watch(&stream, Rc::new(Always));
            stream
        };
        let sweep_while = |goes_on: &dyn Fn(Duration) -> bool| {
            let began = Instant::now();
            while goes_on(began.elapsed()) {
                streams.sweep();
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let connection = open(IDLE, Weak::new());
        let tunnel = open(IDLE, Rc::downgrade(&connection));
        let response = open(60 * IDLE, Rc::downgrade(&tunnel));
        sweep_while(&|period| period < 3 * IDLE);
        assert_eq!(connection.cut_reason(), None);
        assert_eq!(tunnel.cut_reason(), None);
        // Nobody reads it: it is held, and does not hold the others.
        sweep_while(&|period| connection.cut_reason().is_none() && period < 600 * IDLE);
        for stream in [response, tunnel, connection] {
            assert_eq!(stream.cut_reason(), Some(CutReason::Idle));
        }
    }
}
