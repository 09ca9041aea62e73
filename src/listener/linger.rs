//! Closes a caller's connection so that the last answer arrives (RFC 9112 section 9.6).
//!
//! A caller that is refused in the middle of what it sends goes on sending. Were the socket closed
//! with bytes of it unread, the kernel would reset the connection and the caller lose the answer. A
//! stream of HTTP/2 is reset likewise, and curl reports that, not the answer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, Version};
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::spawn_local;
use tokio::time::{Sleep, timeout};

use crate::agent::{Agent, Phase, until};
use crate::listener::interim::Interim;
use crate::streams::RequestBody;

/// How long the rest of what a caller sends is read and thrown away.
const LONGEST: Duration = Duration::from_secs(2);
/// How much of it.
const MOST_BYTES: usize = 1024 * 1024;

/// A caller's connection that, when this side has ended, waits until the other has.
pub struct Lingering<Io> {
    io: Io,
    agent: Arc<Agent>,
    interim: Arc<Interim>,
    caller_ended: bool,
    waiting: Option<Waiting>,
}

struct Waiting {
    deadline: Pin<Box<Sleep>>,
    bytes_left: usize,
}

impl<Io> Lingering<Io> {
    /// Wraps a connection of an agent, which waits for nobody once its drain window is over, nor where the
    /// connection became a tunnel's: then what the caller sends is the tunnel's to read.
    pub fn new(io: Io, agent: Arc<Agent>, interim: Arc<Interim>) -> Self {
        Self {
            io,
            agent,
            interim,
            caller_ended: false,
            waiting: None,
        }
    }

    fn waits(&self) -> bool {
        !self.caller_ended && !self.interim.is_handed_over() && !self.agent.has_come_to(Phase::Over)
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Lingering<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.io).poll_read(context, buffer));
        self.caller_ended |= read.is_err() || buffer.filled().len() == filled;
        Poll::Ready(read)
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let mut waiting = match this.waiting.take() {
            Some(waiting) => waiting,
            None => {
                ready!(Pin::new(&mut this.io).poll_shutdown(context))?;
                Waiting {
                    deadline: Box::pin(tokio::time::sleep(LONGEST)),
                    bytes_left: MOST_BYTES,
                }
            }
        };
        let mut bytes = [0; 4096];
        while this.waits() && waiting.bytes_left > 0 {
            let mut buffer = ReadBuf::new(&mut bytes);
            let read = Pin::new(&mut *this).poll_read(context, &mut buffer);
            if read.is_pending() && waiting.deadline.as_mut().poll(context).is_pending() {
                this.waiting = Some(waiting);
                return Poll::Pending;
            }
            if read.is_pending() {
                break;
            }
            waiting.bytes_left = waiting.bytes_left.saturating_sub(buffer.filled().len());
        }
        Poll::Ready(Ok(()))
    }
}

/// Of a refused request over HTTP/2, whose stream would be reset with its body dropped (RFC 9113
/// section 8.1), reads what the caller still sends and throws it away.
pub fn read_on(agent: &Agent, request: Request<RequestBody>) {
    let version = request.version();
    let mut body = request.into_body();
    if version != Version::HTTP_2 || body.is_end_stream() {
        return;
    }
    let mut phases = agent.phase.subscribe();
    spawn_local(async move {
        let rest = async {
            let mut bytes_left = MOST_BYTES;
            while bytes_left > 0
                && let Some(Ok(frame)) = body.frame().await
            {
                let bytes = frame.data_ref().map_or(0, bytes::Bytes::len);
                bytes_left = bytes_left.saturating_sub(bytes);
            }
        };
        tokio::select! {
            () = until(Phase::Over, &mut phases) => {}
            _ = timeout(LONGEST, rest) => {}
        }
    });
}
