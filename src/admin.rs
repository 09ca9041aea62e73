//! The admin socket: health, metrics, status, reload, credentials, revocations and explanations, over
//! HTTP/1.1 on a Unix socket of mode 0600; by setting, health and metrics alone on TCP as well.
//!
//! What the requests do is behind [`AdminActions`]; this file knows sockets, paths and answers.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::audit::Audit;
use crate::config::{AdminConfig, Bind};
use crate::credentials::CredentialStatus;
use crate::diagnostics::{Diagnostic, is_transient, system_words};
use crate::policy::Revoked;
use crate::problem::{json_response, problem_response};
use crate::request_id::RequestId;
use crate::service_manager::{ListeningSocket, ServiceManager};
use crate::socket_file::SocketFile;
use crate::telemetry::metrics;

/// The largest request body; a revocation is a few dozen bytes.
const BODY_LIMIT_BYTES: usize = 64 * 1024;

/// How long a client may take for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long accepting pauses when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How many connections to `admin.metrics_bind` are open at one time: for one more the oldest is closed. Whoever
/// opens them without end takes no descriptors from requests, and keeps no probe waiting.
const METRICS_CONNECTIONS: usize = 64;

/// What to revoke, and for how long: the body of `POST /v1/revocations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationRequest {
    /// `workload` (`GROUP.NAME=VALUE`), `credential` or `token_sha256`.
    #[serde(flatten)]
    pub what: Revoked,
    /// Seconds until it ends by itself; absent: until it is lifted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_seconds: Option<u64>,
}

/// Why an action was not carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct ActionRefused {
    /// The status answered.
    pub status: StatusCode,
    /// Stable, for programs.
    pub code: &'static str,
    /// What happened.
    pub detail: String,
    /// What to do about it.
    pub next: String,
    /// More, for programs: the diagnostics of a failed reload.
    pub diagnostics: Option<Box<Value>>,
}

impl ActionRefused {
    /// There is no such revocation, decision or path.
    pub fn not_found(detail: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            code: "not_found",
            detail: detail.into(),
            next: next.into(),
            diagnostics: None,
        }
    }

    /// The request is wrong.
    pub fn bad_request(detail: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            code: "bad_request",
            detail: detail.into(),
            next: next.into(),
            diagnostics: None,
        }
    }

    /// A reload failed; the last good configuration is kept. `diagnostics` is a list, in the form of
    /// [`Diagnostics::to_json`](crate::diagnostics::Diagnostics::to_json).
    pub fn reload_failed(detail: impl Into<String>, diagnostics: Value) -> Self {
        Self {
            status: StatusCode::UNPROCESSABLE_ENTITY,
            code: "reload_failed",
            detail: detail.into(),
            next: "do what each diagnostic says; the last good configuration is in force"
                .to_owned(),
            diagnostics: Some(Box::new(diagnostics)),
        }
    }

    /// The path is served, with another method.
    pub(crate) fn method_not_allowed(method: &Method, allowed: &str) -> Self {
        Self {
            status: StatusCode::METHOD_NOT_ALLOWED,
            code: "method_not_allowed",
            detail: format!("method `{method}` is not served here"),
            next: format!("use {allowed}"),
            diagnostics: None,
        }
    }

    /// As a problem (RFC 9457).
    pub(crate) fn to_response(&self) -> Response<Bytes> {
        let mut problem = json!({
            "type": "about:blank",
            "code": self.code,
            "status": self.status.as_u16(),
            "detail": self.detail,
            "next": self.next,
        });
        if let (Some(diagnostics), Some(members)) = (&self.diagnostics, problem.as_object_mut()) {
            members.insert("diagnostics".to_owned(), Value::clone(diagnostics));
        }
        problem_response(self.status, &problem)
    }
}

/// What the admin socket can ask of the agent.
#[async_trait]
pub trait AdminActions: Send + Sync + 'static {
    /// Why new requests would not be served; empty when they would.
    fn not_ready(&self) -> Vec<&'static str>;

    /// The metrics, in the OpenMetrics text format.
    fn metrics(&self) -> String;

    /// The state of every part.
    async fn status(&self) -> Value;

    /// Loads configuration and policies again, whether or not the answer is waited for; answers with what is in
    /// force now.
    async fn reload(self: Arc<Self>) -> Result<Value, ActionRefused>;

    /// The tokens that are held ([`credentials_value`]).
    async fn credentials(&self) -> Value;

    /// The revocations in force.
    async fn revocations(&self) -> Value;

    /// Revokes; answers with the revocation and what became of the tokens.
    async fn revoke(&self, request: RevocationRequest) -> Result<Value, ActionRefused>;

    /// Ends a revocation.
    async fn lift(&self, id: &str) -> Result<Value, ActionRefused>;

    /// Explains a recent decision.
    async fn explain(&self, request_id: RequestId) -> Result<Value, ActionRefused>;
}

/// The audit's part of `status`.
pub fn audit_value(audit: &Audit) -> Value {
    let (sequence, hash) = audit.head();
    let state = audit.state();
    json!({
        "accepting": state.accepting,
        "files": audit.files(),
        "head": format!("{sequence}:{hash}"),
        "queue_depth": state.queue_depth,
        "written": state.written,
        "dropped": state.dropped,
    })
}

/// What `credentials list` shows.
pub fn credentials_value(credentials: &[CredentialStatus]) -> Value {
    let time = |time: SystemTime| {
        jiff::Timestamp::try_from(time).map_or(Value::Null, |time| json!(format!("{time:.0}")))
    };
    credentials
        .iter()
        .map(|status| {
            json!({
                "identity": status.identity,
                "credential": status.credential,
                "scopes": status.scopes,
                "audience": status.audience,
                "expires_at": status.expires_at.map(time),
                "last_used": time(status.last_used),
                "token_sha256": status.token_sha256,
                "failure": status.failure,
            })
        })
        .collect()
}

/// Bound, not yet serving.
#[derive(Debug)]
pub struct AdminServer {
    unix: Option<AdminSocket>,
    tcp: Option<MetricsListener>,
}

/// A socket under a name of its own, to be moved to its path.
#[derive(Debug)]
struct AdminSocket {
    listener: UnixListener,
    file: SocketFile,
    path: PathBuf,
}

#[derive(Debug)]
struct MetricsListener {
    listener: TcpListener,
    /// Whether the service manager has it too: the next agent answers there when this one ends.
    outlives_us: bool,
}

/// The name of a handed-over socket for `admin.metrics_bind`.
const METRICS: &str = "metrics";

impl AdminServer {
    /// Binds what is configured. A socket file is replaced only where nobody listens on it, or where an
    /// agent does that hands over to this one. Metrics may be on a socket that was handed over, named
    /// `metrics` or bound where they are to be.
    ///
    /// # Errors
    /// `admin_socket_unusable`, `metrics_bind_unusable`, and those of [`ServiceManager::take`].
    pub async fn bind(
        config: &AdminConfig,
        manager: &mut ServiceManager,
    ) -> Result<Self, Diagnostic> {
        let tcp = match config.metrics_bind {
            Some(address) => Some(bind_metrics(address, manager).await?),
            None => None,
        };
        let unix = match &config.socket {
            Some(path) => Some(bind_unix(path, manager.has_handed_over())?),
            None => None,
        };
        Ok(Self { unix, tcp })
    }

    /// Moves the socket to its path. Until then an agent that hands over to this one keeps its own there,
    /// should this one not come to serve.
    ///
    /// # Errors
    /// `admin_socket_unusable`.
    pub fn take_place(&mut self) -> Result<(), Diagnostic> {
        let Some(AdminSocket { file, path, .. }) = &mut self.unix else {
            return Ok(());
        };
        file.move_to(path).map_err(|error| {
            let reason = format!("the admin socket cannot be bound: {}", system_words(&error));
            unusable(path, reason)
        })
    }

    /// Where metrics are served, with the port that the kernel chose.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.listener.local_addr().ok()
    }

    /// Serves until `stop` is cancelled; on a socket that the next agent has too, until `ending` is.
    pub async fn run(
        self,
        actions: Arc<dyn AdminActions>,
        ending: CancellationToken,
        stop: CancellationToken,
    ) {
        let unix = async {
            let Some(socket) = &self.unix else { return };
            loop {
                match socket.listener.accept().await {
                    Ok((stream, _)) => {
                        let reach = Reach::Everything;
                        tokio::spawn(serve(stream, Arc::clone(&actions), reach, stop.clone()));
                    }
                    Err(error) => pause(&error).await,
                }
            }
        };
        let tcp = async {
            let Some(metrics) = &self.tcp else { return };
            let mut open: VecDeque<AbortHandle> = VecDeque::new();
            loop {
                let accepted = tokio::select! {
                    () = ending.cancelled(), if metrics.outlives_us => return,
                    accepted = metrics.listener.accept() => accepted,
                };
                match accepted {
                    Ok((stream, _)) => {
                        open.retain(|served| !served.is_finished());
                        if open.len() >= METRICS_CONNECTIONS
                            && let Some(oldest) = open.pop_front()
                        {
                            oldest.abort();
                        }
                        let reach = Reach::HealthAndMetrics;
                        let served = serve(stream, Arc::clone(&actions), reach, stop.clone());
                        open.push_back(tokio::spawn(served).abort_handle());
                        // However many come at once, each is served before it is the oldest.
                        tokio::task::yield_now().await;
                    }
                    Err(error) => pause(&error).await,
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            ((), ()) = futures_util::future::join(unix, tcp) => {}
        }
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(error = %system_words(error), "the admin listener cannot accept");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

fn unusable(path: &Path, reason: String) -> Diagnostic {
    Diagnostic::error("admin_socket_unusable", path, reason)
        .next("set `admin.socket` to a path in a directory that the agent may write to")
}

async fn bind_metrics(
    address: SocketAddr,
    manager: &mut ServiceManager,
) -> Result<MetricsListener, Diagnostic> {
    let taken = manager.take(METRICS, &Bind::Tcp(address))?;
    let handed_over = match taken.map(|handed_over| handed_over.socket) {
        Some(ListeningSocket::Tcp(socket)) => Some(socket),
        Some(ListeningSocket::Unix(..)) | None => None,
    };
    let outlives_us = handed_over.is_some();
    let listener = match handed_over {
        Some(socket) => TcpListener::from_std(socket),
        None => TcpListener::bind(address).await,
    };
    let listener = listener.map_err(|error| {
        Diagnostic::error(
            "metrics_bind_unusable",
            address.to_string(),
            format!(
                "metrics cannot be served at `{address}`: {}",
                system_words(&error)
            ),
        )
        .next("set `admin.metrics_bind` to a free address")
        .is_transient(is_transient(&error))
    })?;
    Ok(MetricsListener {
        listener,
        outlives_us,
    })
}

fn bind_unix(path: &Path, takes_over: bool) -> Result<AdminSocket, Diagnostic> {
    let problem = |reason: String| unusable(path, reason);
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(problem(
                "a file that is no socket stands in its place".to_owned(),
            ));
        }
        Ok(_) => {
            if !takes_over && std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(Diagnostic::error(
                    "admin_socket_unusable",
                    path,
                    "another process listens on the admin socket",
                )
                .next("end the agent that runs there, or set `admin.socket` to another path")
                .is_transient(true));
            }
        }
        Err(_) => {}
    }
    // Bound under a name of its own and moved, so that it never exists with another mode.
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let own_name = PathBuf::from(name);
    let _ = std::fs::remove_file(&own_name);
    let bind = || -> io::Result<AdminSocket> {
        let listener = UnixListener::bind(&own_name)?;
        let file = SocketFile::at(&own_name)?;
        std::fs::set_permissions(&own_name, std::fs::Permissions::from_mode(0o600))?;
        Ok(AdminSocket {
            listener,
            file,
            path: path.to_owned(),
        })
    };
    bind().map_err(|error| {
        problem(format!(
            "the admin socket cannot be bound: {}",
            system_words(&error)
        ))
    })
}

/// What a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Everything,
    HealthAndMetrics,
}

/// Serves a connection until it ends; after `stop` for [`HEAD_TIMEOUT`] at most.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    actions: Arc<dyn AdminActions>,
    reach: Reach,
    stop: CancellationToken,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let actions = Arc::clone(&actions);
        async move {
            let response = answer(request, actions, reach).await;
            Ok::<_, Infallible>(response.map(Full::new))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // A client that went away needs no answer.
        _ = connection.as_mut() => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(HEAD_TIMEOUT, connection).await;
        }
    }
}

async fn answer(
    request: Request<Incoming>,
    actions: Arc<dyn AdminActions>,
    reach: Reach,
) -> Response<Bytes> {
    match route(request, actions, reach).await {
        Ok(response) => response,
        Err(refused) => refused.to_response(),
    }
}

async fn route(
    request: Request<Incoming>,
    actions: Arc<dyn AdminActions>,
    reach: Reach,
) -> Result<Response<Bytes>, ActionRefused> {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let only = |allowed: Method| match head.method == allowed {
        true => Ok(()),
        false => Err(ActionRefused::method_not_allowed(
            &head.method,
            allowed.as_str(),
        )),
    };
    let done = |value: Value| json_response(StatusCode::OK, &value);
    match path {
        "/livez" => {
            only(Method::GET)?;
            return Ok(text(StatusCode::OK, "ok\n"));
        }
        "/readyz" => {
            only(Method::GET)?;
            return Ok(readiness(&actions.not_ready()));
        }
        "/metrics" => {
            only(Method::GET)?;
            let mut response = text(StatusCode::OK, actions.metrics());
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                header::HeaderValue::from_static(metrics::CONTENT_TYPE),
            );
            return Ok(response);
        }
        _ => {}
    }
    let nothing_here = || {
        ActionRefused::not_found(
            format!("`{}` is not served here", crate::request::printable(path)),
            "see the list of paths in docs/admin.md",
        )
    };
    if reach == Reach::HealthAndMetrics {
        return Err(nothing_here());
    }
    match path {
        "/v1/status" => {
            only(Method::GET)?;
            Ok(done(actions.status().await))
        }
        "/v1/reload" => {
            only(Method::POST)?;
            actions.reload().await.map(done)
        }
        "/v1/credentials" => {
            only(Method::GET)?;
            Ok(done(actions.credentials().await))
        }
        "/v1/revocations" => match head.method {
            Method::GET => Ok(done(actions.revocations().await)),
            Method::POST => actions
                .revoke(read(body).await?)
                .await
                .map(|value| json_response(StatusCode::CREATED, &value)),
            _ => Err(ActionRefused::method_not_allowed(
                &head.method,
                "GET or POST",
            )),
        },
        _ => {
            if let Some(id) = path.strip_prefix("/v1/revocations/") {
                only(Method::DELETE)?;
                return actions.lift(id).await.map(done);
            }
            if let Some(id) = path.strip_prefix("/v1/explain/") {
                only(Method::GET)?;
                let request_id: RequestId = id.parse().map_err(|_| {
                    ActionRefused::bad_request(
                        format!("`{}` is no request id", crate::request::printable(id)),
                        "give the `countersign-request-id` of a response",
                    )
                })?;
                return actions.explain(request_id).await.map(done);
            }
            Err(nothing_here())
        }
    }
}

/// 200, or 503 with the reasons.
pub(crate) fn readiness(reasons: &[&str]) -> Response<Bytes> {
    let status = match reasons.is_empty() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    json_response(
        status,
        &json!({"ready": reasons.is_empty(), "reasons": reasons}),
    )
}

async fn read<T: serde::de::DeserializeOwned>(body: Incoming) -> Result<T, ActionRefused> {
    let next = "send a JSON object as docs/admin.md describes it";
    let bytes = Limited::new(body, BODY_LIMIT_BYTES)
        .collect()
        .await
        .map_err(|_| ActionRefused::bad_request("the body cannot be read, or is too large", next))?
        .to_bytes();
    serde_json::from_slice(&bytes).map_err(|error| {
        ActionRefused::bad_request(format!("the body is not understood: {error}"), next)
    })
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

#[cfg(test)]
mod tests;
