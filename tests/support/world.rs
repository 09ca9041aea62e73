//! An agent with everything around it: an authorization server, an API over TLS and one in clear, an
//! OIDC issuer, a configuration and policies in a directory of its own.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use countersign::app::{App, StartOptions};
use countersign::clock::{Clock, SystemClock};
use countersign::config::{Bind, Config, SigningAlgorithm};
use countersign::dev::api::Seen;
use countersign::dev::{
    Api, ApiOptions, AuthorizationServer, AuthorizationServerOptions, CertificateAuthority, Client,
    ClientCredential, OidcIssuer,
};
use countersign::jwt::{SigningKey, VerifyingKey};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixStream;

use super::curl::{Answer, curl_as};

/// The authorization server.
pub const AUTHORIZATION_SERVER: &str = "https://auth.example.test";
/// The audience of the API's tokens.
pub const AUDIENCE: &str = "https://orders.example.test";
/// The OIDC issuer.
pub const ISSUER: &str = "https://ci.example.test";

/// What stands in every configuration of these tests. `{...}` are filled in by [`World::fill`]. A busy machine
/// may write no record for a tenth of a second, and no request is refused for that.
pub const COMMON: &str = r#"
version: 1
runtime: {workers: 2}
listeners:
  - {name: proxy, type: forward_proxy, bind: "127.0.0.1:0"}
  - {name: local, type: forward_proxy, bind: "unix:{directory}/proxy.sock", access: {mode: "0666"}}
  - {name: gateway, type: gateway, bind: "127.0.0.1:0", destination: orders}
  - {name: local-gateway, type: gateway, bind: "unix:{directory}/gateway.sock", destination: orders, access: {mode: "0666"}}
attestors:
  unix: {}
  oidc:
    issuers:
      - {name: ci, issuer: "https://ci.example.test", audiences: [countersign], claims: {repository: string}, ca_file: servers.pem, connect_to: "{issuer}"}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    issuer: https://auth.example.test
    client_id: orders-agent
    client_authentication: {method: private_key_jwt, key_file: client.key, algorithm: ES256}
    scopes: [orders.read]
    resources: [https://orders.example.test]
    ca_file: servers.pem
    connect_to: "{auth}"
    timeout: 20s
  - name: billing-api
    type: oauth_client_credentials
    issuer: https://auth.example.test
    client_id: billing-agent
    client_authentication: {method: private_key_jwt, key_file: client.key, algorithm: ES256}
    scopes: [orders.read]
    resources: [https://orders.example.test]
    ca_file: servers.pem
    connect_to: "{auth}"
    timeout: 20s
interception:
  ca: {source: generated, state_directory: ca}
  ca_certificate_file: ca.pem
  trust_bundle_file: bundle.pem
policies: {directory: policies}
audit:
  on_failure: degrade
  sinks: [{type: file, path: audit.jsonl}]
"#;

/// The destinations of most tests: the API over TLS, and in clear.
pub const DESTINATIONS: &str = r#"
destinations:
  - name: orders
    hosts: [orders.example.test]
    paths: ["/v1/**"]
    credentials: [{name: orders-api}]
    ca_file: servers.pem
    connect_to: "{api}"
  - name: plain
    hosts: [plain.example.test]
    scheme: http
    paths: ["/v1/**"]
    credentials: [{name: orders-api}]
    connect_to: "{plain}"
"#;

/// Policies that let every caller of the machine use `orders-api` with safe methods and POST.
pub const POLICIES: &str = r#"
@id("reads-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && context has request && (context.request.safe || context.request.method == "POST") };
"#;

/// Everything that one test talks to.
pub struct World {
    pub directory: TempDir,
    pub authority: CertificateAuthority,
    pub authorization_server: AuthorizationServer,
    pub api: Api,
    pub plain_api: Api,
    pub issuer: OidcIssuer,
    /// Further `{name}` placeholders.
    pub origins: Vec<(String, SocketAddr)>,
    /// The agent's clock.
    pub clock: Arc<dyn Clock>,
    /// What the next agent is started with.
    pub options: StartOptions,
    app: Option<Arc<App>>,
}

impl World {
    /// The servers, without an agent.
    pub async fn servers() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("countersign-test-")
            .tempdir()
            .unwrap();
        // Callers of other users read the certificates in it.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let authority = CertificateAuthority::new("test servers").unwrap();
        let certificate = authority
            .issue(&[
                "orders.example.test",
                "auth.example.test",
                "ci.example.test",
                "origin.example.test",
            ])
            .unwrap();
        let (key, pem) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
        let verifying = VerifyingKey::from_jwk(&key.public_jwk().unwrap()).unwrap();
        let client = |id: &str| Client {
            client_id: id.to_owned(),
            credential: ClientCredential::Keys(vec![verifying.clone()]),
            scopes: vec!["orders.read".to_owned()],
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let authorization_server = AuthorizationServer::start(AuthorizationServerOptions {
            issuer: AUTHORIZATION_SERVER.to_owned(),
            address: any,
            certificate: certificate.clone(),
            clients: vec![client("orders-agent"), client("billing-agent")],
            token_lifetime: Duration::from_secs(300),
            default_audience: AUDIENCE.to_owned(),
        })
        .await
        .unwrap();
        let api = |certificate| {
            Api::start(ApiOptions {
                address: any,
                certificate,
                issuer: AUTHORIZATION_SERVER.to_owned(),
                audience: AUDIENCE.to_owned(),
                keys: authorization_server.state().verifying_keys(),
            })
        };
        let tls_api = api(Some(certificate.clone())).await.unwrap();
        let plain_api = api(None).await.unwrap();
        let issuer = OidcIssuer::start(ISSUER, any, &certificate).await.unwrap();
        let world = Self {
            api: tls_api,
            plain_api,
            issuer,
            authority,
            authorization_server,
            origins: Vec::new(),
            clock: Arc::new(SystemClock::new()),
            options: StartOptions::default(),
            app: None,
            directory,
        };
        world.write("servers.pem", world.authority.pem());
        world.write("client.key", &pem);
        std::fs::set_permissions(world.path("client.key"), PermissionsExt::from_mode(0o600))
            .unwrap();
        world
    }

    /// The servers and an agent under the usual configuration.
    pub async fn start() -> Self {
        let mut world = Self::servers().await;
        world
            .start_agent(&format!("{COMMON}{DESTINATIONS}"), POLICIES)
            .await;
        world
    }

    /// Starts the agent in this process.
    pub async fn start_agent(&mut self, configuration: &str, policies: &str) {
        log();
        self.write_policies(policies);
        self.write("countersign.yaml", &self.fill(configuration));
        let config = match Config::load(&self.path("countersign.yaml")) {
            Ok(config) => config,
            Err(diagnostics) => panic!("{}", diagnostics.render(false)),
        };
        let options = std::mem::take(&mut self.options);
        match App::start_with(config, Arc::clone(&self.clock), options).await {
            Ok(app) => self.app = Some(app),
            Err(diagnostics) => panic!("{}", diagnostics.render(false)),
        }
    }

    /// Replaces the placeholders of a configuration.
    pub fn fill(&self, configuration: &str) -> String {
        let mut filled = configuration.to_owned();
        let known = [
            ("api".to_owned(), self.api.address()),
            ("plain".to_owned(), self.plain_api.address()),
            ("auth".to_owned(), self.authorization_server.address()),
            ("issuer".to_owned(), self.issuer.address()),
        ];
        // What a test brings replaces what is usual.
        for (name, address) in self.origins.iter().chain(&known) {
            filled = filled.replace(&format!("{{{name}}}"), &address.to_string());
        }
        let directory = self.directory.path().display();
        filled
            .replace("{directory}", &directory.to_string())
            .replace("{uid}", &nix::unistd::geteuid().to_string())
    }

    pub fn write_policies(&self, policies: &str) {
        let directory = self.path("policies");
        std::fs::create_dir_all(&directory).unwrap();
        let policies = policies.replace("{uid}", &nix::unistd::geteuid().to_string());
        // Whole at once, whenever an agent looks.
        std::fs::write(directory.join(".all.cedar.new"), policies).unwrap();
        std::fs::rename(
            directory.join(".all.cedar.new"),
            directory.join("all.cedar"),
        )
        .unwrap();
    }

    pub fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn app(&self) -> &Arc<App> {
        self.app.as_ref().expect("an agent was started")
    }

    /// The address of a TCP listener.
    pub fn address(&self, listener: &str) -> SocketAddr {
        match &self.app().bound().listeners[listener] {
            Bind::Tcp(address) => *address,
            Bind::Unix(path) => panic!("`{listener}` is at {}", path.display()),
        }
    }

    /// Where callers of a listener connect: `ADDRESS:PORT` or a path.
    pub fn target(&self, listener: &str) -> String {
        match &self.app().bound().listeners[listener] {
            Bind::Tcp(address) => address.to_string(),
            Bind::Unix(path) => path.display().to_string(),
        }
    }

    /// Connects to the proxy from this process, on its Unix socket. A TCP connection of this process is held by
    /// whatever another test starts, too, until that executes: the agent may find two callers.
    pub async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path("proxy.sock")).await.unwrap()
    }

    /// The proxy's URL.
    pub fn proxy(&self) -> String {
        format!("http://{}", self.address("proxy"))
    }

    /// curl through the proxy, trusting the agent's root.
    pub async fn curl(&self, arguments: &[&str]) -> Answer {
        self.curl_as(None, arguments).await
    }

    /// As [`World::curl`], as another user.
    pub async fn curl_as(&self, uid: Option<u32>, arguments: &[&str]) -> Answer {
        let proxy = self.proxy();
        let root = self.path("ca.pem");
        let mut all = vec!["--proxy", &proxy, "--cacert", root.to_str().unwrap()];
        all.extend(arguments);
        curl_as(uid, &all).await
    }

    /// A good request, with which every refusal test begins and ends: it succeeds, and the origin saw
    /// it with a token that the authorization server issued.
    #[track_caller]
    pub fn good(&self) -> impl Future<Output = ()> + '_ {
        let location = std::panic::Location::caller();
        async move {
            let before = self.api.seen().len();
            let answer = self.curl(&["https://orders.example.test/v1/orders"]).await;
            assert_eq!(
                answer.status, 200,
                "a good request at {location}: {answer:#?}"
            );
            let seen = self.api.seen();
            assert_eq!(seen.len(), before + 1);
            assert_issued(self, seen.last().unwrap());
        }
    }

    /// The records of the audit so far, flushed.
    pub async fn audit(&self) -> Vec<Value> {
        self.app().agent().audit.flush().await;
        audit_lines(&self.path("audit.jsonl"))
    }

    /// The requests of the audit so far.
    pub async fn audited_requests(&self) -> Vec<Value> {
        self.audit()
            .await
            .into_iter()
            .filter(|line| line["kind"] == "request")
            .collect()
    }
}

/// The lines of an audit file; one that is still being written is left out.
pub fn audit_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The origin saw a token, and the authorization server issued it.
#[track_caller]
pub fn assert_issued(world: &World, seen: &Seen) {
    let claims = seen.token.as_ref().unwrap_or_else(|reason| {
        panic!("the origin refused the token: {reason}; {seen:#?}");
    });
    let jti = claims["jti"].as_str().unwrap();
    assert!(
        world
            .authorization_server
            .state()
            .issued()
            .iter()
            .any(|issued| issued.jti == jti),
        "the token was not issued: {seen:#?}"
    );
}

/// Logs of the agent, where `COUNTERSIGN_TEST_LOG` names a level.
pub fn log() {
    if let Ok(level) = std::env::var("COUNTERSIGN_TEST_LOG") {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::new(level))
            .with_test_writer()
            .try_init();
    }
}
