//! What the embedded servers have in common: a listener, TLS or none, HTTP/1.1 and HTTP/2.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::certificates::ServerCertificate;

/// A body that the embedded servers send.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// What a server does with a request.
pub(super) type Handler = Arc<dyn Fn(Request<Incoming>) -> Answer + Send + Sync>;

/// A server that listens until this is dropped; its connections end then too.
#[derive(Debug)]
pub struct Listening {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Listening {
    /// The address bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the listener and its connections.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Binds `address` (port 0: any free one) and serves `handler` there on the current runtime.
pub(super) async fn listen(
    address: SocketAddr,
    certificate: Option<&ServerCertificate>,
    handler: Handler,
) -> io::Result<Listening> {
    let tls = certificate.map(acceptor).transpose()?;
    let listener = TcpListener::bind(address).await?;
    let listening = Listening {
        address: listener.local_addr()?,
        stop: CancellationToken::new(),
    };
    let stop = listening.stop.clone();
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let connection = serve_connection(stream, tls.clone(), Arc::clone(&handler));
            let stop = stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = connection => {}
                }
            });
        }
    });
    Ok(listening)
}

/// A TLS acceptor that offers HTTP/2 and HTTP/1.1.
pub(super) fn acceptor(certificate: &ServerCertificate) -> io::Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificate = certificate.clone();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(certificate.chain, certificate.key)
        })
        .map_err(io::Error::other)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve_connection(stream: TcpStream, tls: Option<TlsAcceptor>, handler: Handler) {
    // Without this small answers wait for the delayed acknowledgement of the last.
    let _ = stream.set_nodelay(true);
    match tls {
        None => serve_http(stream, false, handler).await,
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(stream).await {
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                serve_http(stream, is_http2, handler).await;
            }
        }
    }
}

async fn serve_http<S>(stream: S, is_http2: bool, handler: Handler)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = handler(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let stream = TokioIo::new(stream);
    // A connection that breaks is the client's affair.
    if is_http2 {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .serve_connection(stream, service)
            .await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(stream, service)
            .with_upgrades()
            .await;
    }
}

/// A whole body of at most 64 KiB.
pub(super) async fn read_body(body: Incoming) -> Option<Bytes> {
    let collected = Limited::new(body, 64 * 1024).collect().await.ok()?;
    Some(collected.to_bytes())
}

/// An answer with a JSON body.
pub(super) fn json_answer(status: StatusCode, value: &Value) -> Response<Bytes> {
    let mut answer = Response::new(Bytes::from(value.to_string()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    answer
}

/// A body that is known as a whole.
pub(super) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).boxed_unsync()
}
