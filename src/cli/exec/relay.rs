//! A private relay to the proxy that adds the current token to every request: clients cannot renew a
//! token that stands in `HTTPS_PROXY`, and must not hold one.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use countersign_attestors::PeerEvidence;
use http::header::PROXY_AUTHORIZATION;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self as client, SendRequest};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use crate::cli::presented::Presenter;
use crate::problem::{self, Surface};
use crate::refusal::{Refusal, RefusalCode};
use crate::request_id::RequestId;

/// How many ancestors of a caller are looked at.
const GENERATIONS: usize = 64;

type Body = BoxBody<Bytes, hyper::Error>;

/// A listening relay; it lives as long as the process.
#[derive(Debug)]
pub(super) struct Relay {
    address: SocketAddr,
}

/// What every connection needs.
struct Shared {
    proxy: SocketAddr,
    presenter: Arc<Presenter>,
}

impl Relay {
    /// Listens on loopback for this process's descendants, and relays to `proxy`.
    pub(super) async fn start(proxy: SocketAddr, presenter: Arc<Presenter>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { proxy, presenter });
        tokio::spawn(async move {
            loop {
                let Ok((stream, peer)) = listener.accept().await else {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    let judged =
                        tokio::task::spawn_blocking(move || is_descendant(address, peer)).await;
                    match judged {
                        Ok(true) => relay(shared, stream).await,
                        _ => tracing::warn!(%peer, "a stranger connected to the private relay"),
                    }
                });
            }
        });
        Ok(Self { address })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Whether the process that connected descends from this one. Anybody on the node can reach a
/// loopback port; the token is the command's alone.
fn is_descendant(local: SocketAddr, peer: SocketAddr) -> bool {
    let Ok(evidence) = PeerEvidence::of_loopback_tcp(local, peer) else {
        return false;
    };
    let Some(process) = evidence.process() else {
        return false;
    };
    let ours = std::process::id();
    let mut pid = process.pid();
    for _ in 0..GENERATIONS {
        if pid == ours {
            // What was read of /proc was read of the process that connected.
            return evidence.check_liveness().is_ok();
        }
        match parent_of(pid) {
            Some(parent) if parent > 1 => pid = parent,
            _ => return false,
        }
    }
    false
}

/// proc_pid_stat(5), field 4.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(1)?.parse().ok()
}

async fn relay(shared: Arc<Shared>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    // One connection to the proxy for one of the command's, so that neither waits for another's.
    let upstream = Arc::new(Mutex::new(None));
    let service = service_fn(move |request| {
        let (shared, upstream) = (Arc::clone(&shared), Arc::clone(&upstream));
        async move {
            let answered = forward(&shared, &upstream, request).await;
            Ok::<_, Infallible>(answered.unwrap_or_else(|refusal| refused(&refusal)))
        }
    });
    let served = server::Builder::new()
        .preserve_header_case(true)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = served.await {
        tracing::debug!(%error, "a relayed connection ended");
    }
}

async fn forward(
    shared: &Shared,
    upstream: &Mutex<Option<SendRequest<Incoming>>>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let token = shared
        .presenter
        .header()
        .await
        .map_err(|problem| Refusal::new(RefusalCode::AttestationUnavailable, problem))?;
    request.headers_mut().remove(PROXY_AUTHORIZATION);
    if let Some(token) = token {
        request.headers_mut().insert(PROXY_AUTHORIZATION, token);
    }
    let is_connect = request.method() == Method::CONNECT;
    let inner = request.extensions_mut().remove::<OnUpgrade>();
    let unreachable = |error: &dyn std::fmt::Display| {
        Refusal::new(
            RefusalCode::UpstreamUnreachable,
            format!(
                "the agent's proxy at `{}` does not answer: {error}",
                shared.proxy
            ),
        )
    };
    let mut held = upstream.lock().await;
    let kept = match held.take().filter(|_| !is_connect) {
        Some(mut sender) => sender.ready().await.is_ok().then_some(sender),
        None => None,
    };
    let mut sender = match kept {
        Some(sender) => sender,
        None => connect(shared.proxy)
            .await
            .map_err(|error| unreachable(&error))?,
    };
    let mut response = sender
        .send_request(request)
        .await
        .map_err(|error| unreachable(&error))?;
    let switches = match is_connect {
        true => response.status().is_success(),
        false => response.status() == StatusCode::SWITCHING_PROTOCOLS,
    };
    if !switches {
        *held = Some(sender);
        return Ok(response.map(BodyExt::boxed));
    }
    let outer = hyper::upgrade::on(&mut response);
    if let Some(inner) = inner {
        tokio::spawn(async move {
            if let (Ok(inner), Ok(outer)) = (inner.await, outer.await) {
                let (mut inner, mut outer) = (TokioIo::new(inner), TokioIo::new(outer));
                // The tunnel ends when either side does.
                let _ = tokio::io::copy_bidirectional(&mut inner, &mut outer).await;
            }
        });
    }
    Ok(response.map(|_| Empty::new().map_err(|never| match never {}).boxed()))
}

async fn connect(
    proxy: SocketAddr,
) -> Result<SendRequest<Incoming>, Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(proxy).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = client::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to the proxy ended");
        }
    });
    Ok(sender)
}

fn refused(refusal: &Refusal) -> Response<Body> {
    problem::response(refusal, RequestId::new(SystemTime::now()), Surface::Connect)
        .map(|body| Full::new(body).map_err(|never| match never {}).boxed())
}
