//! A private relay to the proxy, and to the workload API, that adds the current token to every
//! request: clients cannot renew a token that stands in `HTTPS_PROXY`, and must not hold one.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use countersign_attestors::PeerEvidence;
use countersign_attestors::observers::look_here;
use http::header::{
    AUTHORIZATION, CONTENT_TYPE, PROXY_AUTHORIZATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self as client, SendRequest};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use crate::cli::presented::Presenter;
use crate::client::{AgentAddress, ask};
use crate::problem::{self, Surface};
use crate::refusal::{Refusal, RefusalCode};
use crate::request_id::{REQUEST_ID_HEADER, RequestId};

/// How many ancestors of a caller are looked at.
const GENERATIONS: usize = 64;

/// The largest body that is passed on to the workload API.
const BODY_LIMIT_BYTES: usize = 64 * 1024;

type Body = BoxBody<Bytes, hyper::Error>;

/// A listening relay; it lives as long as the process.
#[derive(Debug)]
pub(super) struct Relay {
    address: SocketAddr,
}

/// What every connection needs.
struct Shared {
    /// Where the relay is.
    address: SocketAddr,
    proxy: SocketAddr,
    workload_api: AgentAddress,
    presenter: Arc<Presenter>,
}

impl Relay {
    /// Listens on loopback for this process's descendants, and relays requests in absolute form and
    /// CONNECT to `proxy`, others to `workload_api`.
    pub(super) async fn start(
        proxy: SocketAddr,
        workload_api: AgentAddress,
        presenter: Arc<Presenter>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            address,
            proxy,
            workload_api,
            presenter,
        });
        tokio::spawn(async move {
            loop {
                let Ok((stream, peer)) = listener.accept().await else {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    let judged = tokio::task::spawn_blocking(move || descendant(stream)).await;
                    match judged {
                        Ok(Ok(Some(stream))) => relay(shared, stream).await,
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

/// The connection, if the process that made it descends from this one. Anybody on the node can reach a
/// loopback port; the token is the command's alone.
fn descendant(stream: TcpStream) -> io::Result<Option<TcpStream>> {
    let stream = stream.into_std()?;
    match is_descendant(&stream) {
        true => TcpStream::from_std(stream).map(Some),
        false => Ok(None),
    }
}

fn is_descendant(stream: &std::net::TcpStream) -> bool {
    let Ok(evidence) = look_here(PeerEvidence::of_loopback_tcp(stream)) else {
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
    if request.uri().authority().is_none() {
        return ask_workload_api(shared, request, token).await;
    }
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

/// The verbs of the command ask here, and are answered as the workload that the token names.
async fn ask_workload_api(
    shared: &Shared,
    request: Request<Incoming>,
    token: Option<HeaderValue>,
) -> Result<Response<Body>, Refusal> {
    let (head, body) = request.into_parts();
    let malformed = |_| {
        Refusal::new(
            RefusalCode::MalformedRequest,
            "the body is no JSON, or is too large",
        )
    };
    let body = Limited::new(body, BODY_LIMIT_BYTES)
        .collect()
        .await
        .map_err(malformed)?
        .to_bytes();
    let body: Option<Value> = match body.is_empty() {
        true => None,
        false => Some(serde_json::from_slice(&body).map_err(|error| malformed(error.into()))?),
    };
    let mut headers = HeaderMap::new();
    headers.extend(token.map(|token| (AUTHORIZATION, token)));
    let path = head.uri.path();
    let answer = ask(
        &shared.workload_api,
        head.method,
        path,
        headers,
        body.as_ref(),
    )
    .await
    .map_err(|error| Refusal::new(RefusalCode::UpstreamUnreachable, error.to_string()))?;
    let mut content = answer.body.clone();
    if path == "/v1/proxy" && answer.status.is_success() {
        let mut proxy = answer.json();
        // The proxy of the command's own commands is this relay.
        if let Some(members) = proxy.as_object_mut() {
            members.insert(
                "proxy".to_owned(),
                format!("http://{}", shared.address).into(),
            );
        }
        content = Bytes::from(proxy.to_string());
    }
    let mut response = Response::new(full(content));
    *response.status_mut() = answer.status;
    for name in [
        CONTENT_TYPE,
        WWW_AUTHENTICATE,
        RETRY_AFTER,
        REQUEST_ID_HEADER,
    ] {
        if let Some(value) = answer.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    Ok(response)
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
    problem::response(refusal, RequestId::new(SystemTime::now()), Surface::Connect).map(full)
}

fn full(body: Bytes) -> Body {
    Full::new(body).map_err(|never| match never {}).boxed()
}
