//! What an HTTP/1.1 caller is sent beside the server's own final responses: interim responses (RFC 9110
//! section 15.2) of a destination, and a refusal of ours where the server would send its bare answer to
//! a head that it cannot read.
//!
//! They are written around the server: before its next byte, and never in the middle of what it writes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use http::{HeaderMap, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::inject::strip_response;
use crate::listener::unreadable::Unreadable;

/// More than this of interim responses that wait for one caller is dropped.
const MAXIMUM_WAITING: usize = 64 * 1024;

/// The interim responses that wait for one connection.
#[derive(Debug, Default)]
pub struct Interim(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// How much of `waiting` was written: never dropped in the middle.
    written: usize,
    /// The server has begun to write bytes of which some are left.
    midway: bool,
    /// How many requests the service was asked of which the server has not had the whole response.
    owed: usize,
    /// A response was owed, and the server has not flushed since.
    unflushed: bool,
    /// The connection is no longer the server's: an upgrade or a tunnel has it.
    handed_over: bool,
    connection: Option<Waker>,
}

impl Interim {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the connection is no longer the server's.
    pub fn is_handed_over(&self) -> bool {
        self.state().handed_over
    }

    /// Passes an interim response on. 100 is the server's own to send, and 101 is not interim.
    pub fn push(&self, status: StatusCode, headers: &HeaderMap) {
        if !status.is_informational() || matches!(status.as_u16(), 100 | 101) {
            return;
        }
        let mut headers = headers.clone();
        strip_response(&mut headers);
        let mut state = self.state();
        if state.waiting.len() > MAXIMUM_WAITING {
            return;
        }
        let reason = status.canonical_reason().unwrap_or_default();
        let line = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16());
        state.waiting.extend_from_slice(line.as_bytes());
        for (name, value) in &headers {
            state.waiting.extend_from_slice(name.as_str().as_bytes());
            state.waiting.extend_from_slice(b": ");
            state.waiting.extend_from_slice(value.as_bytes());
            state.waiting.extend_from_slice(b"\r\n");
        }
        state.waiting.extend_from_slice(b"\r\n");
        if let Some(connection) = state.connection.take() {
            connection.wake();
        }
    }
}

/// The response that a request is owed, until the server has had the whole of it.
#[derive(Debug)]
pub struct Owed(Arc<Interim>);

impl Owed {
    /// One more is owed on a connection.
    pub fn on(interim: &Arc<Interim>) -> Self {
        let mut state = interim.state();
        state.owed += 1;
        state.unflushed = true;
        Self(Arc::clone(interim))
    }

    /// The final response is next: what could not be written before it never will be. After one that
    /// changes the protocol nothing is the server's to write.
    pub fn settle(&self, changes_protocol: bool) {
        let mut state = self.0.state();
        state.handed_over |= changes_protocol;
        if state.midway && state.written == 0 {
            state.waiting.clear();
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.0.state().owed -= 1;
    }
}

impl State {
    /// Whether what the server begins to write answers nothing that the service was asked: its buffer
    /// was empty, and no response is owed. Then it is what it says of a head that it cannot read.
    fn is_unasked(&self) -> bool {
        self.owed == 0 && !self.unflushed && !self.handed_over && !self.midway
    }
}

/// A caller's connection, into which is written what does not come from the server.
pub struct WithInterim<Io> {
    /// The connection.
    pub io: Io,
    /// What waits for it.
    pub interim: Arc<Interim>,
    /// Refuses what the server cannot read.
    pub unreadable: Unreadable,
}

impl<Io: AsyncWrite + Unpin> WithInterim<Io> {
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.interim.state();
        while let Some(rest) = state
            .waiting
            .get(state.written..)
            .filter(|rest| !rest.is_empty())
        {
            let written = ready!(Pin::new(&mut self.io).poll_write(context, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            state.written += written;
        }
        state.waiting.clear();
        state.written = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_server_write(
        &mut self,
        context: &mut Context<'_>,
        first: &[u8],
        length: usize,
        write: impl FnOnce(Pin<&mut Io>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let (is_unasked, midway) = {
            let state = self.interim.state();
            (state.is_unasked(), state.midway)
        };
        if is_unasked {
            let answer = self.unreadable.answer(first);
            self.interim.state().waiting.extend_from_slice(&answer);
            return Poll::Ready(Ok(length));
        }
        if !midway {
            ready!(self.poll_drain(context))?;
        }
        let written = ready!(write(Pin::new(&mut self.io), context))?;
        self.interim.state().midway = written < length;
        Poll::Ready(Ok(written))
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for WithInterim<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for WithInterim<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_server_write(context, buffer, buffer.len(), |io, context| {
            io.poll_write(context, buffer)
        })
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = buffers.iter().map(|buffer| buffer.len()).sum();
        let first = buffers.iter().find(|buffer| !buffer.is_empty());
        let first = first.map_or(&[][..], |buffer| buffer);
        self.poll_server_write(context, first, length, |io, context| {
            io.poll_write_vectored(context, buffers)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    /// The server flushes whenever it is polled and has nothing of its own left to write.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        {
            let mut state = self.interim.state();
            state.midway = false;
            state.unflushed = state.owed > 0;
            match &state.connection {
                Some(waker) if waker.will_wake(context.waker()) => {}
                _ => state.connection = Some(context.waker().clone()),
            }
        }
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.interim.state().midway {
            ready!(self.poll_drain(context))?;
        }
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
