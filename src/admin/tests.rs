#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use http::HeaderMap;
use tokio::io::AsyncReadExt;

use super::*;
use crate::cli::{credentials, revoke, status};
use crate::client::{AgentAddress, Answer, ask};

async fn bind(config: &AdminConfig) -> Result<AdminServer, Diagnostic> {
    AdminServer::bind(config, &mut ServiceManager::default()).await
}

/// An agent that notes what it is asked.
#[derive(Default)]
struct Noted {
    asked: Mutex<Vec<String>>,
    not_ready: Mutex<Vec<&'static str>>,
}

impl Noted {
    fn note(&self, what: impl Into<String>) {
        self.asked.lock().unwrap().push(what.into());
    }
}

#[async_trait]
impl AdminActions for Noted {
    fn not_ready(&self) -> Vec<&'static str> {
        self.not_ready.lock().unwrap().clone()
    }

    fn metrics(&self) -> String {
        "# EOF\n".to_owned()
    }

    async fn status(&self) -> Value {
        json!({
            "version": "0.1.0",
            "ready": true,
            "audit": {"accepting": true, "head": "7:00ff"},
            "listeners": [{"name": "workloads", "address": "127.0.0.1:7523"}],
        })
    }

    async fn reload(self: Arc<Self>) -> Result<Value, ActionRefused> {
        self.note("reload");
        Err(ActionRefused::reload_failed(
            "the configuration has 1 problem",
            json!([{"code": "unknown_key", "line": 4}]),
        ))
    }

    async fn credentials(&self) -> Value {
        credentials_value(&[CredentialStatus {
            identity: "uid:1000".to_owned(),
            credential: "orders-api".to_owned(),
            scopes: vec!["orders.read".to_owned()],
            audience: None,
            expires_at: Some(std::time::UNIX_EPOCH + Duration::from_secs(1_800_000_000)),
            last_used: std::time::UNIX_EPOCH,
            token_sha256: Some("ab".repeat(32)),
            failure: None,
        }])
    }

    async fn revocations(&self) -> Value {
        json!([{"id": "r1", "credential": "orders-api"}])
    }

    async fn revoke(&self, request: RevocationRequest) -> Result<Value, ActionRefused> {
        self.note(format!("revoke {request:?}"));
        Ok(json!({"id": "r1"}))
    }

    async fn lift(&self, id: &str) -> Result<Value, ActionRefused> {
        self.note(format!("lift {id}"));
        match id {
            "r1" => Ok(json!({"id": "r1", "lifted": true})),
            _ => Err(ActionRefused::not_found(
                format!("there is no revocation `{id}`"),
                "countersign revoke --list",
            )),
        }
    }

    async fn explain(&self, request_id: RequestId) -> Result<Value, ActionRefused> {
        self.note(format!("explain {request_id}"));
        match request_id.to_string().ends_with('0') {
            true => Ok(json!({"text": "denied"})),
            false => Err(ActionRefused::not_found("not remembered", "ask sooner")),
        }
    }
}

struct Running {
    directory: tempfile::TempDir,
    actions: Arc<Noted>,
    unix: AgentAddress,
    tcp: AgentAddress,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("admin.sock");
        let config = AdminConfig {
            socket: Some(socket.clone()),
            metrics_bind: Some("127.0.0.1:0".parse().unwrap()),
        };
        let mut server = bind(&config).await.unwrap();
        server.take_place().unwrap();
        let tcp = AgentAddress::Tcp(server.metrics_address().unwrap().to_string());
        let actions = Arc::new(Noted::default());
        let stop = CancellationToken::new();
        let task = tokio::spawn(server.run(
            Arc::clone(&actions) as Arc<dyn AdminActions>,
            CancellationToken::new(),
            stop.clone(),
        ));
        Self {
            directory,
            actions,
            unix: AgentAddress::Unix(socket),
            tcp,
            stop,
            task,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        ask(&self.unix, method, path, HeaderMap::new(), body.as_ref())
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn every_path_does_what_it_says() {
    let running = Running::start().await;
    assert_eq!(running.ask(Method::GET, "/livez", None).await.body, "ok\n");
    assert_eq!(running.ask(Method::GET, "/readyz", None).await.status, 200);
    running
        .actions
        .not_ready
        .lock()
        .unwrap()
        .push("the listener `workloads` is not bound");
    let answer = running.ask(Method::GET, "/readyz", None).await;
    assert_eq!(answer.status, 503);
    assert_eq!(
        answer.json()["reasons"][0],
        "the listener `workloads` is not bound"
    );

    let answer = running.ask(Method::GET, "/metrics", None).await;
    assert_eq!(answer.headers["content-type"], metrics::CONTENT_TYPE);

    let answer = running.ask(Method::POST, "/v1/reload", None).await;
    assert_eq!(answer.status, 422);
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    assert_eq!(answer.json()["diagnostics"][0]["line"], 4);

    let body = json!({"workload": "unix.uid=1000", "for_seconds": 60});
    let answer = running
        .ask(Method::POST, "/v1/revocations", Some(body))
        .await;
    assert_eq!(
        (answer.status, answer.json()["id"].as_str()),
        (StatusCode::CREATED, Some("r1"))
    );
    assert_eq!(
        running
            .ask(Method::DELETE, "/v1/revocations/r1", None)
            .await
            .status,
        200
    );
    assert_eq!(
        running
            .ask(Method::DELETE, "/v1/revocations/r2", None)
            .await
            .status,
        404
    );
    assert_eq!(
        running
            .ask(Method::GET, "/v1/revocations", None)
            .await
            .json()[0]["id"],
        "r1"
    );

    let known = "/v1/explain/0198a2b1-0000-7000-8000-000000000000";
    assert_eq!(
        running.ask(Method::GET, known, None).await.json()["text"],
        "denied"
    );
    let forgotten = "/v1/explain/0198a2b1-0000-7000-8000-000000000001";
    assert_eq!(running.ask(Method::GET, forgotten, None).await.status, 404);

    for (method, path, body, status) in [
        (Method::POST, "/v1/status", None, 405),
        (Method::GET, "/v1/reload", None, 405),
        (Method::GET, "/v1/explain/not-an-id", None, 400),
        (Method::GET, "/v1/nothing", None, 404),
        (Method::GET, "/", None, 404),
        (Method::POST, "/v1/revocations", Some(json!({})), 400),
        (
            Method::POST,
            "/v1/revocations",
            Some(json!({"workload": "no selector"})),
            400,
        ),
        (
            Method::POST,
            "/v1/revocations",
            Some(json!({"credential": "a", "padding": "x".repeat(70_000)})),
            400,
        ),
    ] {
        let answer = running.ask(method, path, body).await;
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.json()["next"].is_string(), "{path}");
    }
    let revoked = running
        .actions
        .asked
        .lock()
        .unwrap()
        .iter()
        .filter(|asked| asked.starts_with("revoke"))
        .count();
    assert_eq!(revoked, 1);
}

#[tokio::test]
async fn tcp_serves_health_and_metrics_and_nothing_else() {
    let running = Running::start().await;
    for (path, status) in [
        ("/livez", 200),
        ("/readyz", 200),
        ("/metrics", 200),
        ("/v1/status", 404),
        ("/v1/credentials", 404),
    ] {
        let answer = ask(&running.tcp, Method::GET, path, HeaderMap::new(), None)
            .await
            .unwrap();
        assert_eq!(answer.status, status, "{path}");
    }
    let answer = ask(
        &running.tcp,
        Method::POST,
        "/v1/reload",
        HeaderMap::new(),
        None,
    )
    .await
    .unwrap();
    assert_eq!(answer.status, 404);
    assert!(running.actions.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn of_many_connections_for_metrics_the_oldest_are_closed() {
    let running = Running::start().await;
    let AgentAddress::Tcp(address) = &running.tcp else {
        panic!("it is TCP");
    };
    let mut idle = Vec::new();
    for _ in 0..METRICS_CONNECTIONS {
        idle.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let probe = ask(&running.tcp, Method::GET, "/livez", HeaderMap::new(), None);
    assert_eq!(probe.await.unwrap().status, 200);
    let mut end = [0];
    let closed = timeout(HEAD_TIMEOUT / 2, idle[0].read(&mut end)).await;
    assert_eq!(closed.unwrap().unwrap(), 0);
    let open = timeout(Duration::from_millis(100), idle[1].read(&mut end)).await;
    assert!(open.is_err());
}

#[tokio::test]
async fn the_socket_is_the_owners_alone_and_is_not_taken_from_a_listener() {
    let running = Running::start().await;
    let mode = std::fs::metadata(running.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let config = AdminConfig {
        socket: Some(running.socket()),
        metrics_bind: None,
    };
    let refused = bind(&config).await.unwrap_err();
    assert!(
        refused.message.contains("another process listens"),
        "{}",
        refused.message
    );
    assert_eq!(running.ask(Method::GET, "/livez", None).await.status, 200);

    running.stop.cancel();
    running.task.await.unwrap();
    let socket = running.directory.path().join("admin.sock");
    assert!(!socket.exists());
    // A file that a killed agent left.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let mut server = bind(&config).await.unwrap();
    server.take_place().unwrap();
    drop(server);
    assert!(!socket.exists());
    // Somebody's file is not removed.
    std::fs::write(&socket, "notes").unwrap();
    assert!(bind(&config).await.is_err());
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "notes");
}

#[derive(Parser)]
enum Verb {
    Status(status::StatusArguments),
    Credentials(credentials::CredentialsArguments),
    Revoke(revoke::RevokeArguments),
}

/// Runs a verb as the command line does, outside the runtime.
async fn verb(socket: PathBuf, arguments: &'static [&'static str]) -> (ExitCode, String, String) {
    tokio::task::spawn_blocking(move || {
        let socket = socket.to_str().unwrap();
        let arguments = [&["countersign"], arguments, &["--admin-socket", socket]].concat();
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let code = match Verb::parse_from(arguments) {
            Verb::Status(arguments) => status::run(&arguments, &mut out, &mut errors),
            Verb::Credentials(arguments) => credentials::run(&arguments, &mut out, &mut errors),
            Verb::Revoke(arguments) => revoke::run(&arguments, &mut out, &mut errors),
        };
        (
            code,
            String::from_utf8(out).unwrap(),
            String::from_utf8(errors).unwrap(),
        )
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn the_verbs_ask_over_the_socket() {
    let running = Running::start().await;
    let socket = running.socket();
    let (code, out, _) = verb(socket.clone(), &["status"]).await;
    assert_eq!(code, ExitCode::SUCCESS);
    assert!(
        out.contains("ready") && out.contains("head 7:00ff"),
        "{out}"
    );
    assert!(out.contains("name workloads"), "{out}");
    let (_, out, _) = verb(socket.clone(), &["status", "--output", "json"]).await;
    assert_eq!(
        serde_json::from_str::<Value>(&out).unwrap()["version"],
        "0.1.0"
    );

    let (_, out, _) = verb(socket.clone(), &["credentials", "list"]).await;
    assert!(
        out.contains("uid:1000") && out.contains("2027-01-15T08:00:00Z"),
        "{out}"
    );

    let (code, out, _) = verb(
        socket.clone(),
        &["revoke", "--workload", "unix.uid=1000", "--for", "1h"],
    )
    .await;
    assert_eq!(code, ExitCode::SUCCESS);
    assert!(out.contains("r1"), "{out}");
    assert!(running.actions.asked.lock().unwrap()[0].contains("for_seconds: Some(3600)"));
    let (code, _, _) = verb(socket.clone(), &["revoke", "--lift", "r1"]).await;
    assert_eq!(code, ExitCode::SUCCESS);
    let (code, _, errors) = verb(socket.clone(), &["revoke", "--lift", "../credentials"]).await;
    assert_eq!(code, ExitCode::from(64));
    assert!(errors.contains("countersign revoke --list"), "{errors}");
    let (_, out, _) = verb(socket.clone(), &["revoke", "--list"]).await;
    assert!(out.contains("orders-api"), "{out}");

    let absent = socket.with_extension("absent");
    let (code, _, errors) = verb(absent, &["status"]).await;
    assert_eq!(code, ExitCode::from(69));
    assert!(errors.contains("no agent is reached at"), "{errors}");
    assert!(
        errors.contains("--admin-socket") && !errors.contains("--agent"),
        "{errors}"
    );
}
