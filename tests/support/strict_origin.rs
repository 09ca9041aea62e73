//! Origins that read by the letter, and say of every whole request what it was: `METHOD PATH`, with `+N`
//! for a body of N bytes and the names of its trailers.
//!
//! `/big` is answered with a mebibyte, and what is below `/wait` never.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use countersign::dev::ServerCertificate;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

const BIG: usize = 1024 * 1024;

/// What reached an origin.
#[derive(Clone, Default)]
pub struct StrictOrigin {
    seen: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
}

impl StrictOrigin {
    /// HTTP/1.1 in clear (RFC 9112).
    pub async fn start_http1(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let origin = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let origin = origin.clone();
                tokio::spawn(async move { origin.serve_http1(stream).await });
            }
        });
        address
    }

    /// HTTP/2 over TLS (RFC 9113), with at most so many streams on a connection.
    pub async fn start_http2(&self, certificate: ServerCertificate, streams: u32) -> SocketAddr {
        let acceptor = http2_acceptor(certificate);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let origin = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                origin.connections.fetch_add(1, Ordering::SeqCst);
                let (origin, acceptor) = (origin.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let origin = origin.clone();
                        async move { Ok::<_, Infallible>(origin.answer_http2(request).await) }
                    });
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let _ = http2::Builder::new(TokioExecutor::new())
                            .max_concurrent_streams(streams)
                            .serve_connection(TokioIo::new(stream), service)
                            .await;
                    }
                });
            }
        });
        address
    }

    /// How many connections of HTTP/2 it accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// What was seen since the last time that this was asked.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    fn saw(&self, line: &str, body: &Body) {
        let mut seen = match line.len() > 80 {
            true => format!("{}...", &line[..80]),
            false => line.to_owned(),
        };
        if body.length > 0 {
            seen.push_str(&format!("+{}", body.length));
        }
        for trailer in &body.trailers {
            seen.push_str(&format!(" {trailer}"));
        }
        self.seen.lock().unwrap().push(seen);
    }

    async fn serve_http1(&self, mut stream: TcpStream) {
        loop {
            let head = read_head(&mut stream).await;
            if head.is_empty() {
                return;
            }
            let lower = head.to_ascii_lowercase();
            check_head(&lower);
            let is_chunked = lower.contains("\r\ntransfer-encoding: chunked\r\n");
            let length = lower
                .split_once("\r\ncontent-length: ")
                .and_then(|(_, rest)| rest.split_once("\r\n"))
                .map(|(length, _)| length.parse::<usize>().expect("a length"));
            assert!(!(is_chunked && length.is_some()), "framed twice: {head}");
            let body = match (is_chunked, length) {
                (true, _) => read_chunks(&mut stream).await,
                (false, length) => read_exactly(&mut stream, length.unwrap_or(0)).await,
            };
            // A body that was cut off, and with it its connection, is no request.
            let Some(body) = body else {
                return;
            };
            let line = head.lines().next().unwrap_or_default();
            let line = line.strip_suffix(" HTTP/1.1").expect("a request line");
            self.saw(line, &body);
            let mut answer = match line {
                _ if line.contains(" /wait/") => {
                    let _ = stream.read(&mut [0]).await;
                    return;
                }
                _ if line.ends_with(" /big") => {
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {BIG}\r\n\r\n");
                    [head.into_bytes(), vec![b'x'; BIG]].concat()
                }
                _ => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_vec(),
            };
            if lower.starts_with("head ") {
                answer.truncate(answer.len() - 2);
            }
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }

    async fn answer_http2(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, mut incoming) = request.into_parts();
        check_http2_head(&head.headers);
        let mut body = Body::default();
        while let Some(frame) = incoming.frame().await {
            let Ok(frame) = frame else {
                // What the agent cancelled.
                return Response::new(Full::default());
            };
            match frame.into_trailers() {
                Ok(trailers) => body.trailers = trailers.keys().map(ToString::to_string).collect(),
                Err(frame) => body.length += frame.into_data().unwrap().len(),
            }
        }
        let path = head.uri.path_and_query().unwrap().as_str();
        self.saw(&format!("{} {path}", head.method), &body);
        match path {
            path if path.starts_with("/wait/") => std::future::pending().await,
            "/big" => Response::new(Full::from(vec![b'x'; BIG])),
            _ => Response::new(Full::from("ok")),
        }
    }
}

/// TLS with a certificate, and HTTP/2 in it.
pub fn http2_acceptor(certificate: ServerCertificate) -> TlsAcceptor {
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

#[derive(Default)]
struct Body {
    length: usize,
    /// The names of its trailers.
    trailers: Vec<String>,
}

/// One credential, ours; one host; nothing of the hop before; no line that some reader would split.
fn check_head(lower: &str) {
    assert_eq!(lower.matches("\r\nauthorization:").count(), 1, "{lower}");
    assert!(lower.contains("\r\nauthorization: bearer ey"), "{lower}");
    assert_eq!(lower.matches("\r\nhost:").count(), 1, "{lower}");
    assert!(!lower.contains("\r\nproxy-"), "{lower}");
    let ends = lower.matches("\r\n").count();
    assert_eq!(lower.matches('\r').count(), ends, "{lower:?}");
    assert_eq!(lower.matches('\n').count(), ends, "{lower:?}");
    assert!(
        !lower.contains("\r\n ") && !lower.contains("\r\n\t"),
        "{lower:?}"
    );
}

/// As [`check_head`], of HTTP/2, where the authority is no header (RFC 9113 section 8.3.1).
fn check_http2_head(headers: &HeaderMap) {
    let credentials: Vec<_> = headers.get_all("authorization").iter().collect();
    assert_eq!(credentials.len(), 1, "{headers:?}");
    assert!(
        credentials[0].to_str().unwrap().starts_with("Bearer ey"),
        "{headers:?}"
    );
    for name in headers.keys() {
        let name = name.as_str();
        assert!(!name.starts_with("proxy-") && name != "host", "{headers:?}");
    }
}

/// Bytes up to the empty line; connections may be idle.
async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return String::new(),
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

async fn read_exactly(stream: &mut TcpStream, length: usize) -> Option<Body> {
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Body {
        length,
        trailers: Vec::new(),
    })
}

async fn read_chunks(stream: &mut TcpStream) -> Option<Body> {
    let mut body = Body::default();
    loop {
        let size = read_line(stream).await?;
        let size = usize::from_str_radix(&size, 16).expect("a chunk's size and nothing else");
        if size == 0 {
            loop {
                let line = read_line(stream).await?;
                let Some((name, _)) = line.split_once(": ") else {
                    assert_eq!(line, "");
                    return Some(body);
                };
                body.trailers.push(name.to_ascii_lowercase());
            }
        }
        body.length += read_exactly(stream, size).await?.length;
        assert_eq!(read_line(stream).await?, "");
    }
}

async fn read_line(stream: &mut TcpStream) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await.ok()?);
    }
    line.truncate(line.len() - 2);
    String::from_utf8(line).ok()
}
