//! A CI job: a directory with a configuration and no key, and an issuer that gives the job its tokens.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign::dev::{Client, ClientCredential};
use countersign::jwt::{SigningKey, numeric_date, unique_id};
use serde_json::json;
use tokio::process::Command;

use crate::program::User;
use crate::support::origin::Origin;
use crate::support::world::{AUTHORIZATION_SERVER, ISSUER, World};

/// The API.
pub const API: &str = "https://orders.example.test/v1/orders";
/// The repository whose jobs the policy permits.
pub const REPOSITORY: &str = "acme/orders";
/// The job's own name, as its issuer says it.
pub const SUBJECT: &str = "repo:acme/orders:ref:refs/heads/main";
/// What the token service takes.
pub const REQUEST_TOKEN: &str = "the-request-token-of-this-job";

const CONFIGURATION: &str = r#"
version: 1
listeners:
  - {name: job, type: forward_proxy, bind: "127.0.0.1:0"}
attestors:
  unix: {}
  oidc:
    issuers:
      - {name: ci, issuer: "https://ci.example.test", audiences: ["https://auth.example.test"], claims: {repository: string, ref: string}, ca_file: servers.pem, connect_to: "{issuer}"}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    issuer: https://auth.example.test
    client_id: "${ci.repository}"
    send_client_id: true
    client_authentication: {method: workload_assertion, issuer: ci}
    scopes: [orders.read]
    resources: [https://orders.example.test]
    ca_file: servers.pem
    connect_to: "{auth}"
destinations:
  - name: orders
    hosts: [orders.example.test]
    paths: ["/v1/**"]
    credentials: [{name: orders-api}]
    ca_file: servers.pem
    connect_to: "{api}"
interception: {ca: {source: memory}}
policies: {directory: policies}
audit:
  on_failure: degrade
  sinks: [{type: file, path: audit.jsonl}]
"#;

const POLICIES: &str = r#"
@id("main-reads-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has ci && principal.ci has repository && principal.ci.repository == "acme/orders" && context has request && context.request.safe };

@id("main-holds-a-token")
permit (principal, action == Action::"issue", resource == Credential::"orders-api")
when { principal has ci && principal.ci has repository && principal.ci.repository == "acme/orders" };
"#;

/// Where a job has its token from.
#[derive(Clone, Copy)]
pub enum Token<'a> {
    /// It has none.
    Missing,
    /// The file `token`.
    InFile,
    /// A token service.
    Of(&'a Origin),
}

/// A job's machine.
pub struct Job {
    pub world: World,
    pub user: User,
}

impl Job {
    /// The servers, which know the issuer's jobs; and a directory with `agent.yaml`.
    pub async fn new() -> Self {
        let mut world = World::servers().await;
        world.authorization_server.state().register(Client {
            client_id: REPOSITORY.to_owned(),
            credential: ClientCredential::Federated {
                issuer: ISSUER.to_owned(),
                keys: world.issuer.verifying_keys(),
            },
            scopes: vec!["orders.read".to_owned()],
        });
        let user = User::new();
        user.write("agent.yaml", &world.fill(CONFIGURATION));
        user.write("servers.pem", world.authority.pem());
        user.write("policies/all.cedar", POLICIES);
        // Here is no agent, and nobody's key.
        world.origins.clear();
        std::fs::remove_file(world.path("client.key")).unwrap();
        Self { world, user }
    }

    /// A token as the CI system gives it to this job.
    pub fn token(&self, lifetime: Duration) -> String {
        mint(&self.world.issuer.signing_key(), REPOSITORY, lifetime)
    }

    /// A token file, as a CI system that keeps it fresh would write it.
    pub fn write_token(&self, token: &str) {
        let new = self.user.write("token.new", token);
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::rename(new, self.user.path("token")).unwrap();
    }

    /// A token service as GitHub Actions has it: for a bearer token and an audience, a token of the job.
    pub async fn token_service(&self, lifetime: Duration) -> Origin {
        let key = self.world.issuer.signing_key();
        Origin::start(None, move |head| vec![token_answer(&key, lifetime, head)]).await
    }

    /// `countersign exec -- COMMAND` with an agent of its own.
    pub fn exec(&self, token: Token<'_>, command: &[&str]) -> Command {
        self.countersign("exec", token, &[&["--"], command].concat())
    }

    /// `countersign token --credential orders-api ARGUMENTS`, likewise.
    pub fn ask(&self, token: Token<'_>, arguments: &[&str]) -> Command {
        let arguments = [&["--credential", "orders-api"], arguments].concat();
        self.countersign("token", token, &arguments)
    }

    fn countersign(&self, verb: &str, token: Token<'_>, arguments: &[&str]) -> Command {
        let mut command = self.user.countersign(&[verb, "--config", "agent.yaml"]);
        match token {
            Token::Missing => {}
            Token::InFile => {
                command.args(["--token-file", "token"]);
            }
            Token::Of(service) => {
                command
                    .env(
                        "ACTIONS_ID_TOKEN_REQUEST_URL",
                        format!("http://{}/token?api-version=2.0", service.address),
                    )
                    .env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", REQUEST_TOKEN);
            }
        }
        command.args(arguments);
        command
    }

    /// The assertions that the authorization server got, each once.
    pub fn assertions(&self) -> Vec<String> {
        let mut assertions: Vec<String> = Vec::new();
        for received in self.world.authorization_server.state().received() {
            for assertion in received.values("client_assertion") {
                if !assertions.iter().any(|known| known == assertion) {
                    assertions.push(assertion.to_owned());
                }
            }
        }
        assertions
    }

    /// Everything that the authorization server did is in the name of the workload.
    #[track_caller]
    pub fn assert_the_log_names_the_workload(&self) {
        let state = self.world.authorization_server.state();
        assert!(!state.issued().is_empty());
        for issued in state.issued() {
            assert_eq!(issued.subject, SUBJECT);
            assert_eq!(issued.client_id, REPOSITORY);
        }
        for received in state.received() {
            assert_eq!(received.values("client_id"), [REPOSITORY]);
            assert_eq!(received.authorization, None);
        }
    }

    /// No key is in any file that the job or its agent keeps.
    #[track_caller]
    pub fn assert_no_key_is_on_the_machine(&self) {
        let mut files = 0;
        visit(&self.user.path("."), &mut |path| {
            let content = std::fs::read(path).unwrap_or_default();
            let content = String::from_utf8_lossy(&content);
            assert!(!content.contains("PRIVATE KEY"), "{}", path.display());
            files += 1;
        });
        assert!(files >= 3, "{files} files were read");
    }
}

/// Calls `see` for every file under `directory`.
fn visit(directory: &Path, see: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => visit(&entry.path(), see),
            kind if kind.is_file() => see(&entry.path()),
            _ => {}
        }
    }
}

/// A token with the claims that CI systems put into theirs.
pub fn mint(key: &SigningKey, repository: &str, lifetime: Duration) -> String {
    let now = numeric_date(SystemTime::now());
    let claims = json!({
        "iss": ISSUER,
        "sub": format!("repo:{repository}:ref:refs/heads/main"),
        "aud": AUTHORIZATION_SERVER,
        "iat": now,
        "nbf": now,
        "exp": now + lifetime.as_secs(),
        "jti": unique_id(),
        "repository": repository,
        "ref": "refs/heads/main",
        "run_attempt": "1",
    });
    key.sign("JWT", &claims).unwrap()
}

fn token_answer(key: &Arc<SigningKey>, lifetime: Duration, head: &str) -> String {
    let lower = head.to_lowercase();
    let is_ours = lower.contains(&format!("authorization: bearer {REQUEST_TOKEN}"));
    let asks =
        head.starts_with("GET /token?api-version=2.0&audience=https%3A%2F%2Fauth.example.test ");
    let (status, body) = match (is_ours, asks) {
        (true, true) => {
            let token = mint(key, REPOSITORY, lifetime);
            ("200 OK", json!({"count": token.len(), "value": token}))
        }
        (false, _) => ("401 Unauthorized", json!({"message": "bad credentials"})),
        (true, false) => ("400 Bad Request", json!({"message": "bad audience"})),
    };
    let body = body.to_string();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
