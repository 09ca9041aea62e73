//! A way to a server that is shut until a test opens it: connections are accepted, and nothing passes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::eventually;

/// A running gate.
pub struct Gate {
    pub address: SocketAddr,
    open: watch::Sender<bool>,
    connections: watch::Receiver<usize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Gate {
    /// A gate before the server at an address, shut.
    pub async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, opened) = watch::channel(false);
        let (accepted, connections) = watch::channel(0);
        let task = tokio::spawn(async move {
            loop {
                let (mut caller, _) = listener.accept().await.unwrap();
                accepted.send_modify(|count| *count += 1);
                let mut opened = opened.clone();
                tokio::spawn(async move {
                    opened.wait_for(|is_open| *is_open).await.unwrap();
                    let mut server = TcpStream::connect(server).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut caller, &mut server).await;
                });
            }
        });
        Self {
            address,
            open,
            connections,
            task,
        }
    }

    /// Lets everything through, from now on.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// How many connections came.
    pub fn connections(&self) -> usize {
        *self.connections.borrow()
    }

    /// Waits until somebody waits.
    pub async fn is_waited_at(&self) {
        eventually(Duration::from_secs(30), || async {
            (self.connections() > 0).then_some(())
        })
        .await;
    }
}
