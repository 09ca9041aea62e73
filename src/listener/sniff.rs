//! Tells TLS, HTTP/2 and HTTP/1 apart by a connection's first bytes, without consuming them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// The connection preface of HTTP/2 (RFC 9113 section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The content type of a TLS handshake record (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TLS, of whatever inside.
    Tls,
    /// HTTP/1.
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
}

/// Reads just enough to know the protocol. `UnexpectedEof` when the peer closed without a byte.
pub async fn sniff<Io>(mut io: Io) -> io::Result<(Protocol, Prefixed<Io>)>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut seen = BytesMut::with_capacity(256);
    let protocol = loop {
        if io.read_buf(&mut seen).await? == 0 {
            match seen.is_empty() {
                true => return Err(io::ErrorKind::UnexpectedEof.into()),
                false => break Protocol::Http1,
            }
        }
        if seen.first() == Some(&TLS_HANDSHAKE) {
            break Protocol::Tls;
        }
        let compared = seen.len().min(HTTP2_PREFACE.len());
        if seen.get(..compared) != HTTP2_PREFACE.get(..compared) {
            break Protocol::Http1;
        }
        if compared == HTTP2_PREFACE.len() {
            break Protocol::Http2;
        }
    };
    Ok((
        protocol,
        Prefixed {
            prefix: seen.freeze(),
            io,
        },
    ))
}

/// A connection whose first bytes were already read, and are read again.
#[derive(Debug)]
pub struct Prefixed<Io> {
    prefix: Bytes,
    io: Io,
}

impl<Io: AsyncRead + Unpin> AsyncRead for Prefixed<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.has_remaining() {
            let length = self.prefix.remaining().min(buffer.remaining());
            buffer.put_slice(&self.prefix.split_to(length));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Prefixed<Io> {
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
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn tells_protocols_apart_and_gives_every_byte_back() {
        let cases: [(&[u8], Protocol); 5] = [
            (b"\x16\x03\x01\x00", Protocol::Tls),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nmore", Protocol::Http2),
            (b"PRI * HTTP/1.1\r\n\r\n", Protocol::Http1),
            (b"GET / HTTP/1.1\r\n\r\n", Protocol::Http1),
            (b"P", Protocol::Http1),
        ];
        for (bytes, expected) in cases {
            let (mut client, server) = tokio::io::duplex(64);
            let writer = tokio::spawn(async move {
                for byte in bytes {
                    client.write_all(&[*byte]).await.unwrap();
                }
            });
            let (protocol, mut rest) = sniff(server).await.unwrap();
            writer.await.unwrap();
            let mut read = Vec::new();
            rest.read_to_end(&mut read).await.unwrap();
            assert_eq!((protocol, read.as_slice()), (expected, bytes));
        }
        let (client, server) = tokio::io::duplex(64);
        drop(client);
        assert_eq!(
            sniff(server).await.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
