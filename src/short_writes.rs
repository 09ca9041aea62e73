//! Short writes in one piece: a head and its short body leave by one send(2), which takes the kernel less
//! than writev(2).

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most bytes that are copied to be written in one piece. Copying more costs more than it saves.
const SHORT: usize = 2048;

thread_local! {
    static PIECE: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(SHORT));
}

/// A connection that writes several short buffers as one.
#[derive(Debug)]
pub struct ShortWrites<Io>(pub Io);

impl<Io: AsyncRead + Unpin> AsyncRead for ShortWrites<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for ShortWrites<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let io = Pin::new(&mut self.0);
        if let [buffer] = buffers {
            return io.poll_write(context, buffer);
        }
        if buffers.iter().map(|buffer| buffer.len()).sum::<usize>() > SHORT {
            return io.poll_write_vectored(context, buffers);
        }
        PIECE.with_borrow_mut(|piece| {
            piece.clear();
            for buffer in buffers {
                piece.extend_from_slice(buffer);
            }
            io.poll_write(context, piece)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::task::Waker;

    use super::*;

    /// What was written, and by how many buffers at once.
    #[derive(Default)]
    struct Written(Vec<(Vec<u8>, usize)>);

    impl AsyncWrite for Written {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.push((buffer.to_vec(), 1));
            Poll::Ready(Ok(buffer.len()))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffers: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = buffers
                .iter()
                .flat_map(|buffer| buffer.iter().copied())
                .collect();
            let length = all.len();
            self.0.push((all, buffers.len()));
            Poll::Ready(Ok(length))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn short_buffers_leave_in_one_piece_and_long_ones_uncopied() {
        let short = vec![b'b'; SHORT - 4];
        let long = vec![b'b'; SHORT - 3];
        for (buffers, at_once) in [
            (vec![b"head".as_slice()], 1),
            (vec![b"head", b"body", b""], 1),
            (vec![b"head", &short], 1),
            (vec![b"head", &long], 2),
            (vec![&long, &long, &long], 3),
        ] {
            let mut io = ShortWrites(Written::default());
            let slices: Vec<_> = buffers.iter().map(|buffer| IoSlice::new(buffer)).collect();
            let mut context = Context::from_waker(Waker::noop());
            let written = Pin::new(&mut io).poll_write_vectored(&mut context, &slices);
            let all = buffers.concat();
            assert!(matches!(written, Poll::Ready(Ok(length)) if length == all.len()));
            assert_eq!(io.0.0, [(all, at_once)]);
        }
    }
}
