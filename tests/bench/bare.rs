//! The bare hyper proxy that everything is compared with: a current-thread runtime, its own pool, the
//! same header timer as the agent, a static header. It intercepts under a static leaf.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use countersign::dev::CertificateAuthority;
use http::{HeaderValue, Method, Request, Response, Uri};
use http_body_util::{Either, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::origin::acceptor;
use crate::{Fallible, HOST, one_thread};

/// What a bare proxy is started with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Forwards to `origin`; CONNECT is intercepted and forwarded to `https_origin`.
    pub address: SocketAddr,
    /// Forwards to `https_origin`.
    pub https_address: SocketAddr,
    pub origin: SocketAddr,
    pub https_origin: SocketAddr,
    /// The roots by which the origin is verified.
    pub origin_certificate: PathBuf,
    /// Where the root of the static leaf is written.
    pub certificate: PathBuf,
    pub authorization: String,
    /// Gives every caller's connection an upstream connection of its own.
    pub pool_per_connection: bool,
}

type Body = Either<Incoming, Empty<Bytes>>;

/// Where requests are sent, and the connections there that are idle.
struct Upstream {
    address: SocketAddr,
    tls: Option<TlsConnector>,
    idle: RefCell<Vec<client::SendRequest<Incoming>>>,
}

struct Proxy {
    authorization: HeaderValue,
    header_read_timeout: Duration,
    leaf: TlsAcceptor,
    https_upstream: Rc<Upstream>,
    pool_per_connection: bool,
}

/// Serves until it is killed.
pub fn serve(settings: &Settings) -> Fallible<()> {
    let authority = CertificateAuthority::new("bare")?;
    std::fs::write(&settings.certificate, authority.pem())?;
    one_thread()?.block_on(async {
        let tls = connector(settings)?;
        let https_upstream = Rc::new(Upstream::new(settings.https_origin, Some(tls)));
        let proxy = Rc::new(Proxy {
            authorization: HeaderValue::try_from(&settings.authorization)?,
            header_read_timeout: Duration::from_secs(30),
            leaf: acceptor(authority.issue(&[HOST])?)?,
            https_upstream: Rc::clone(&https_upstream),
            pool_per_connection: settings.pool_per_connection,
        });
        let to_https = TcpListener::bind(settings.https_address).await?;
        tokio::task::spawn_local(accept(to_https, Rc::clone(&proxy), https_upstream));
        let listener = TcpListener::bind(settings.address).await?;
        accept(
            listener,
            proxy,
            Rc::new(Upstream::new(settings.origin, None)),
        )
        .await
    })
}

fn connector(settings: &Settings) -> Fallible<TlsConnector> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&settings.origin_certificate)? {
        roots.add(certificate?)?;
    }
    let mut configuration = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    configuration.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(configuration)))
}

async fn accept(listener: TcpListener, proxy: Rc<Proxy>, upstream: Rc<Upstream>) -> Fallible<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let upstream = match proxy.pool_per_connection {
            true => Rc::new(Upstream::new(upstream.address, upstream.tls.clone())),
            false => Rc::clone(&upstream),
        };
        tokio::task::spawn_local(forward(Rc::clone(&proxy), stream, upstream));
    }
}

/// Serves one connection of a caller.
async fn forward(
    proxy: Rc<Proxy>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    upstream: Rc<Upstream>,
) {
    let header_read_timeout = proxy.header_read_timeout;
    let service = service_fn(move |request: Request<Incoming>| {
        let (proxy, upstream) = (Rc::clone(&proxy), Rc::clone(&upstream));
        async move {
            if request.method() == Method::CONNECT {
                tokio::task::spawn_local(intercept(proxy, hyper::upgrade::on(request)));
                return Ok(Response::new(Body::Right(Empty::new())));
            }
            upstream.send(request, &proxy.authorization).await
        }
    });
    // A connection that breaks is seen by who broke it.
    let _ = server::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_read_timeout)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
}

async fn intercept(proxy: Rc<Proxy>, upgrade: hyper::upgrade::OnUpgrade) -> Fallible<()> {
    let upgraded: Upgraded = upgrade.await?;
    // The stream itself: nothing was read ahead, for a client waits for the answer to CONNECT.
    let parts = upgraded
        .downcast::<TokioIo<TcpStream>>()
        .map_err(|_| "not a connection of ours")?;
    let stream = proxy.leaf.accept(parts.io.into_inner()).await?;
    let upstream = Rc::clone(&proxy.https_upstream);
    // In a box: the future would otherwise contain itself.
    let forwarded: std::pin::Pin<Box<dyn Future<Output = ()>>> =
        Box::pin(forward(proxy, stream, upstream));
    forwarded.await;
    Ok(())
}

impl Upstream {
    fn new(address: SocketAddr, tls: Option<TlsConnector>) -> Self {
        Self {
            address,
            tls,
            idle: RefCell::default(),
        }
    }

    async fn send(
        &self,
        mut request: Request<Incoming>,
        authorization: &HeaderValue,
    ) -> Fallible<Response<Body>> {
        let mut sender = match self.take_idle() {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        sender.ready().await?;
        if let Some(path_and_query) = request.uri().path_and_query().cloned() {
            *request.uri_mut() = Uri::from(path_and_query);
        }
        request
            .headers_mut()
            .insert("authorization", authorization.clone());
        let response = sender.send_request(request).await?;
        self.idle.borrow_mut().push(sender);
        Ok(response.map(Body::Left))
    }

    /// The connection that was used last and has sent its whole answer.
    fn take_idle(&self) -> Option<client::SendRequest<Incoming>> {
        let mut idle = self.idle.borrow_mut();
        let last = idle.iter().rposition(client::SendRequest::is_ready)?;
        Some(idle.remove(last))
    }

    async fn connect(&self) -> Fallible<client::SendRequest<Incoming>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => handshake(stream).await,
            Some(tls) => handshake(tls.connect(ServerName::try_from(HOST)?, stream).await?).await,
        }
    }
}

async fn handshake(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
) -> Fallible<client::SendRequest<Incoming>> {
    let (sender, connection) = client::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}
