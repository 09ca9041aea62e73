//! An origin that answers with bytes of the test's choosing, and keeps the heads that reached it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use countersign::dev::ServerCertificate;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::raw::read_head;

/// A running origin. It speaks HTTP/1.1; a body whose length is given is read and forgotten, and what
/// is sent otherwise is taken for another head.
pub struct Origin {
    pub address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Origin {
    /// Answers every head with what `answer` says of it, in parts that are flushed one by one. An empty
    /// part closes the connection.
    pub async fn start(
        certificate: Option<&ServerCertificate>,
        answer: impl Fn(&str) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), certificate, answer).await
    }

    /// As [`Origin::start`], at an address.
    pub async fn start_at(
        address: SocketAddr,
        certificate: Option<&ServerCertificate>,
        answer: impl Fn(&str) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        let acceptor = certificate.cloned().map(|certificate| {
            let mut config = rustls::ServerConfig::builder()
                .with_no_client_auth()
                .with_single_cert(certificate.chain, certificate.key)
                .unwrap();
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            TlsAcceptor::from(Arc::new(config))
        });
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(answer);
        let seen = Arc::clone(&heads);
        let connections = Arc::<AtomicUsize>::default();
        let accepted = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                accepted.fetch_add(1, Ordering::SeqCst);
                let _ = stream.set_nodelay(true);
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    match acceptor {
                        None => serve(stream, &seen, answer.as_ref()).await,
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, &seen, answer.as_ref()).await;
                            }
                        }
                    }
                });
            }
        });
        Self {
            address,
            heads,
            connections,
            task,
        }
    }

    /// How many connections it accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The heads that reached it.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

async fn serve(
    mut io: impl AsyncRead + AsyncWrite + Unpin,
    seen: &Mutex<Vec<String>>,
    answer: &(impl Fn(&str) -> Vec<String> + ?Sized),
) {
    loop {
        let head = read_head(&mut io).await;
        if head.is_empty() {
            return;
        }
        seen.lock().unwrap().push(head.clone());
        let mut body = vec![0; content_length(&head)];
        if io.read_exact(&mut body).await.is_err() {
            return;
        }
        for part in answer(&head) {
            if part.is_empty() {
                let _ = io.shutdown().await;
                return;
            }
            if io.write_all(part.as_bytes()).await.is_err() || io.flush().await.is_err() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

fn content_length(head: &str) -> usize {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, length)| length.trim().parse().unwrap())
}
