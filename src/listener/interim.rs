//! Interim responses (RFC 9110 section 15.2) of a destination, passed on to an HTTP/1.1 caller.
//!
//! The server sends final responses only, so they are written around it: before its next byte, and
//! never in the middle of what it writes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use http::{HeaderMap, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::inject::strip_hop_by_hop;

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
    connection: Option<Waker>,
}

impl Interim {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes an interim response on. 100 is the server's own to send, and 101 is not interim.
    pub fn push(&self, status: StatusCode, headers: &HeaderMap) {
        if !status.is_informational() || matches!(status.as_u16(), 100 | 101) {
            return;
        }
        let mut headers = headers.clone();
        strip_hop_by_hop(&mut headers);
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

    /// The final response is next: what could not be written before it never will be.
    pub fn settle(&self) {
        let mut state = self.state();
        if state.midway && state.written == 0 {
            state.waiting.clear();
        }
    }
}

/// A caller's connection, into which interim responses are written.
#[derive(Debug)]
pub struct WithInterim<Io> {
    /// The connection.
    pub io: Io,
    /// What waits for it.
    pub interim: Arc<Interim>,
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
        length: usize,
        write: impl FnOnce(Pin<&mut Io>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if !self.interim.state().midway {
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
        self.poll_server_write(context, buffer.len(), |io, context| {
            io.poll_write(context, buffer)
        })
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = buffers.iter().map(|buffer| buffer.len()).sum();
        self.poll_server_write(context, length, |io, context| {
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
            match &state.connection {
                Some(waker) if waker.will_wake(context.waker()) => {}
                _ => state.connection = Some(context.waker().clone()),
            }
        }
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
