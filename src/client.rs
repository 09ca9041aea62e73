//! A small HTTP client for the verbs that ask a running agent: over its Unix sockets, or over TCP.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// The largest answer that is read.
const ANSWER_LIMIT_BYTES: usize = 64 * 1024 * 1024;

/// How long an answer may take: minting a token included.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The admin socket of an agent that runs as a service.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/countersign/admin.sock";

/// The workload API of an agent that runs as a service.
pub const DEFAULT_AGENT_SOCKET: &str = "/run/countersign/api.sock";

/// Names the workload API where `--agent` does not.
pub const AGENT_VARIABLE: &str = "COUNTERSIGN_AGENT";

/// Where an agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

impl FromStr for AgentAddress {
    type Err = String;

    /// Reads `unix:PATH`, a path, `http://HOST:PORT` or `HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let authority = text
            .strip_prefix("http://")
            .map(|authority| authority.trim_end_matches('/'))
            .unwrap_or(text);
        let port = authority
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        match (authority.contains('/'), port) {
            (false, true) => Ok(Self::Tcp(authority.to_owned())),
            (true, _) if !text.contains("://") => Ok(Self::Unix(text.into())),
            _ => Err(format!(
                "`{text}` is no address: write `unix:PATH`, a path, or `HOST:PORT`"
            )),
        }
    }
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
            Self::Tcp(authority) => formatter.write_str(authority),
        }
    }
}

impl AgentAddress {
    /// The admin socket: the one that is named, else a service's, else `dev`'s.
    pub fn admin(named: Option<PathBuf>) -> Self {
        Self::Unix(named.unwrap_or_else(|| first_that_exists(DEFAULT_ADMIN_SOCKET, "admin.sock")))
    }

    /// The workload API: the one that is named, else `$COUNTERSIGN_AGENT`, else a service's, else `dev`'s.
    pub fn workload_api(named: Option<Self>) -> Result<Self, String> {
        if let Some(address) = named {
            return Ok(address);
        }
        match std::env::var(AGENT_VARIABLE) {
            Ok(address) if !address.is_empty() => address.parse(),
            _ => Ok(Self::Unix(first_that_exists(
                DEFAULT_AGENT_SOCKET,
                "api.sock",
            ))),
        }
    }
}

/// Where `dev` keeps its files: `$XDG_RUNTIME_DIR/countersign-dev`, else `/tmp/countersign-dev-UID`.
pub fn dev_directory() -> PathBuf {
    let runtime_directory = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match runtime_directory.filter(|directory| directory.is_absolute() && directory.is_dir()) {
        Some(directory) => directory.join("countersign-dev"),
        None => PathBuf::from(format!(
            "/tmp/countersign-dev-{}",
            nix::unistd::getuid().as_raw()
        )),
    }
}

fn first_that_exists(service: &str, name_in_dev: &str) -> PathBuf {
    let service = PathBuf::from(service);
    let directory = dev_directory();
    // In /tmp anybody may have made a directory of this name.
    let is_ours = std::fs::symlink_metadata(&directory).is_ok_and(|metadata| {
        metadata.is_dir()
            && metadata.uid() == nix::unistd::getuid().as_raw()
            && metadata.mode() & 0o077 == 0
    });
    let in_dev = directory.join(name_in_dev);
    match !service.exists() && is_ours && in_dev.exists() {
        true => in_dev,
        false => service,
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// What a `/readyz` that answers no gives as its reasons, in one line.
    pub fn not_ready(&self) -> String {
        let body = self.json();
        let reasons = body.get("reasons").and_then(Value::as_array);
        let reasons: Vec<&str> = reasons
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        match reasons.is_empty() {
            true => self.problem(),
            false => reasons.join("; "),
        }
    }

    /// What a problem says, in one line: `CODE: DETAIL (NEXT)`, of which an answer may leave out the code and the next step.
    pub fn problem(&self) -> String {
        let problem = self.json();
        let member = |name: &str| problem.get(name).and_then(Value::as_str);
        let Some(detail) = member("detail") else {
            return format!("the agent answered {}", self.status);
        };
        let code = member("code").map_or_else(String::new, |code| format!("{code}: "));
        let next = member("next").map_or_else(String::new, |next| format!(" ({next})"));
        format!("{code}{detail}{next}")
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there, or we may not connect.
    #[error("no agent is reached at `{address}`: {reason}")]
    Unreachable {
        /// Where.
        address: AgentAddress,
        /// Why.
        reason: String,
    },
    /// It listens, and does not answer in HTTP, whole, in time.
    #[error("the agent at `{address}` does not answer: {reason}")]
    NoAnswer {
        /// Where.
        address: AgentAddress,
        /// Why.
        reason: String,
    },
}

impl ClientError {
    /// What to do about it, where the admin socket was asked.
    pub fn next_for_admin(&self) -> &'static str {
        self.or_where_unreachable(
            "start the agent, with `admin.socket` in its configuration, or name its socket with `--admin-socket`; it is open to root and the agent's own user only",
        )
    }

    /// What to do about it, where the workload API was asked.
    pub fn next_for_workload_api(&self) -> &'static str {
        self.or_where_unreachable(
            "start the agent, with a listener of type `workload_api` in its configuration, or name where it is with `--agent`",
        )
    }

    fn or_where_unreachable(&self, unreachable: &'static str) -> &'static str {
        match self {
            Self::Unreachable { .. } => unreachable,
            Self::NoAnswer { .. } => "see the agent's log",
        }
    }
}

/// Asks an agent, on the current runtime.
pub async fn ask(
    address: &AgentAddress,
    method: Method,
    path: &str,
    headers: HeaderMap,
    body: Option<&Value>,
) -> Result<Answer, ClientError> {
    let unreachable = |error: io::Error| ClientError::Unreachable {
        address: address.clone(),
        reason: match error.kind() {
            io::ErrorKind::NotFound => "there is no such socket".to_owned(),
            io::ErrorKind::ConnectionRefused => "nobody listens".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ => error.to_string(),
        },
    };
    let no_answer = |reason: String| ClientError::NoAnswer {
        address: address.clone(),
        reason,
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "countersign")
        .body(Full::new(Bytes::new()))
        .map_err(|error| no_answer(error.to_string()))?;
    request.headers_mut().extend(headers);
    if let Some(body) = body {
        request.headers_mut().insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static("application/json"),
        );
        *request.body_mut() = Full::new(Bytes::from(body.to_string()));
    }
    let exchange = async {
        match address {
            AgentAddress::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(unreachable)?;
                exchange(stream, request).await.map_err(no_answer)
            }
            AgentAddress::Tcp(authority) => {
                let stream = TcpStream::connect(authority).await.map_err(unreachable)?;
                exchange(stream, request).await.map_err(no_answer)
            }
        }
    };
    tokio::time::timeout(TIMEOUT, exchange)
        .await
        .unwrap_or_else(|_| Err(no_answer(format!("not within {} s", TIMEOUT.as_secs()))))
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Answer, String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let answer = async {
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_LIMIT_BYTES).collect().await?;
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: body.to_bytes(),
        })
    };
    let answer: Result<_, Box<dyn std::error::Error + Send + Sync>> = answer.await;
    connection.abort();
    answer.map_err(|error| error.to_string())
}

/// Asks an agent, from a thread that may or may not belong to a runtime.
pub fn call(
    address: &AgentAddress,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Answer, ClientError> {
    let no_answer = |reason: String| ClientError::NoAnswer {
        address: address.clone(),
        reason,
    };
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .map_err(|error| no_answer(error.to_string()))?
                    .block_on(ask(address, method, path, HeaderMap::new(), body))
            })
            .join()
            .unwrap_or_else(|_| Err(no_answer("the client failed".to_owned())))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_written() {
        for (text, address) in [
            ("unix:/run/a.sock", AgentAddress::Unix("/run/a.sock".into())),
            ("/run/a.sock", AgentAddress::Unix("/run/a.sock".into())),
            ("./a.sock", AgentAddress::Unix("./a.sock".into())),
            (
                "127.0.0.1:7524",
                AgentAddress::Tcp("127.0.0.1:7524".to_owned()),
            ),
            (
                "http://localhost:7524/",
                AgentAddress::Tcp("localhost:7524".to_owned()),
            ),
            ("[::1]:7524", AgentAddress::Tcp("[::1]:7524".to_owned())),
        ] {
            assert_eq!(text.parse::<AgentAddress>().unwrap(), address, "{text}");
        }
        for wrong in [
            "",
            "localhost",
            "https://a.test:443/x",
            "http://a.test:80/x",
            "a:99999",
        ] {
            assert!(wrong.parse::<AgentAddress>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn nobody_there_is_said_so() {
        let directory = tempfile::tempdir().unwrap();
        let address = AgentAddress::Unix(directory.path().join("absent.sock"));
        let error = call(&address, Method::GET, "/v1/status", None).unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { .. }));
        assert!(
            error.to_string().ends_with("there is no such socket"),
            "{error}"
        );
    }
}
