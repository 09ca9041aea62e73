//! The servers of `countersign dev` and the configuration that leads an agent to them.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use super::{
    Api, ApiOptions, AuthorizationServer, AuthorizationServerOptions, CertificateAuthority, Client,
    ClientCredential, Directory,
};
use crate::config::{AuthorizationServer as ConfiguredServer, Config, TokenSource};
use crate::jwt::VerifyingKey;

/// The API's host.
pub const API_HOST: &str = "orders.countersign.test";
/// The API's base URL, and the audience of its tokens.
pub const API_URL: &str = "https://orders.countersign.test";
/// The authorization server's host.
pub const ISSUER_HOST: &str = "auth.countersign.test";
/// The authorization server's issuer.
pub const ISSUER: &str = "https://auth.countersign.test";
/// How long the authorization server's tokens live.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// The agent's key.
pub const KEY_FILE: &str = "client.pem";
/// The roots of the embedded servers, which the configuration trusts.
pub const SERVERS_CA_FILE: &str = "servers-ca.pem";
/// The interception root, which clients trust.
pub const CA_FILE: &str = "ca.pem";
/// The configuration.
pub const CONFIG_FILE: &str = "countersign.yaml";
/// The policy that users edit.
pub const POLICY_FILE: &str = "policies/orders.cedar";
/// The policy's cases.
pub const CASES_FILE: &str = "policies/orders.test.yaml";

const CLIENT_ID: &str = "countersign-dev";
const SCOPE: &str = "orders.read";

/// The embedded authorization server and API, on loopback.
#[derive(Debug)]
pub struct EmbeddedServers {
    /// The authorization server.
    pub authorization_server: AuthorizationServer,
    /// The API that demands its tokens.
    pub api: Api,
}

/// The ports of the embedded servers; 0 is any free one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ports {
    /// The authorization server's.
    pub authorization_server: u16,
    /// The API's.
    pub api: u16,
}

impl Ports {
    /// The ports at which a configuration looks for the embedded servers; any where it does not.
    pub fn named_in(config: &Config) -> Self {
        let port = |connect_to: Option<SocketAddr>| {
            connect_to
                .filter(|address| address.ip().is_loopback())
                .map_or(0, |address| address.port())
        };
        let issuer = config.credentials.iter().find_map(|credential| {
            let TokenSource::OauthClientCredentials(settings) = &credential.source;
            match &settings.server {
                ConfiguredServer::Issuer(issuer) if issuer.as_str() == ISSUER => {
                    settings.connect_to
                }
                _ => None,
            }
        });
        let api = config.destinations.iter().find_map(|destination| {
            let is_ours = destination.hosts.iter().any(|host| host == API_HOST);
            is_ours.then_some(destination.connect_to).flatten()
        });
        Self {
            authorization_server: port(issuer),
            api: port(api),
        }
    }
}

impl EmbeddedServers {
    /// Starts both on the current runtime, knowing the key in `directory`, and writes the roots of
    /// their certificates there.
    pub async fn start(directory: &Directory, ports: Ports) -> io::Result<Self> {
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let key = directory
            .client_key()?
            .public_jwk()
            .map_err(io::Error::other)?;
        let authority =
            CertificateAuthority::new("countersign dev servers").map_err(io::Error::other)?;
        let certificate = |host| authority.issue(&[host]).map_err(io::Error::other);
        let authorization_server = AuthorizationServer::start(AuthorizationServerOptions {
            issuer: ISSUER.to_owned(),
            address: loopback(ports.authorization_server),
            certificate: certificate(ISSUER_HOST)?,
            clients: vec![Client {
                client_id: CLIENT_ID.to_owned(),
                credential: ClientCredential::Keys(
                    VerifyingKey::from_jwk(&key).into_iter().collect(),
                ),
                scopes: vec![SCOPE.to_owned()],
            }],
            token_lifetime: TOKEN_LIFETIME,
            default_audience: API_URL.to_owned(),
        })
        .await?;
        let api = Api::start(ApiOptions {
            address: loopback(ports.api),
            certificate: Some(certificate(API_HOST)?),
            issuer: ISSUER.to_owned(),
            audience: API_URL.to_owned(),
            keys: authorization_server.state().verifying_keys(),
        })
        .await?;
        directory.write(SERVERS_CA_FILE, authority.pem())?;
        Ok(Self {
            authorization_server,
            api,
        })
    }
}

/// Where the generated configuration listens on TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listeners {
    /// The forward proxy.
    pub proxy: SocketAddr,
    /// The gateway to the API.
    pub gateway: SocketAddr,
}

/// Writes configuration, policy and cases. They stay, and `countersign run` takes them as they are.
/// Answers which files of the user's were set aside.
pub fn write_configuration(
    directory: &Directory,
    listeners: Listeners,
    servers: &EmbeddedServers,
) -> io::Result<Vec<&'static str>> {
    directory.write(
        CONFIG_FILE,
        &configuration(
            directory.path(),
            listeners,
            servers.authorization_server.address(),
            servers.api.address(),
        ),
    )?;
    std::fs::create_dir_all(directory.file("policies"))?;
    let uid = nix::unistd::getuid().as_raw();
    let mut set_aside = Vec::new();
    for (name, content) in [(POLICY_FILE, policy(uid)), (CASES_FILE, cases(uid))] {
        if directory.write_afresh(name, &content)? {
            set_aside.push(name);
        }
    }
    Ok(set_aside)
}

/// Paths are whole, so that a copy elsewhere is as good.
fn configuration(
    directory: &Path,
    listeners: Listeners,
    authorization_server: SocketAddr,
    api: SocketAddr,
) -> String {
    let file = |name: &str| {
        // A JSON string is a YAML string.
        serde_json::Value::from(directory.join(name).display().to_string()).to_string()
    };
    let unix = |name: &str| {
        serde_json::Value::from(format!("unix:{}", directory.join(name).display())).to_string()
    };
    let Listeners { proxy, gateway } = listeners;
    format!(
        r#"# Written by `countersign dev` at each start: copy it before you change it.
#   countersign dev --config COPY     with the embedded servers
#   countersign run --config COPY     without
version: 1
listeners:
  - {{name: workloads, type: forward_proxy, bind: "{proxy}"}}
  - {{name: local, type: forward_proxy, bind: {local}}}
  - {{name: orders-gateway, type: gateway, bind: "{gateway}", destination: orders}}
  - {{name: api, type: workload_api, bind: {agent_api}}}   # `countersign token`, `whoami`, `exec`
attestors: {{unix: {{}}, systemd: {{}}}}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    issuer: {ISSUER}
    client_id: {CLIENT_ID}
    client_authentication: {{method: private_key_jwt, key_file: {key}, algorithm: ES256}}
    scopes: [{SCOPE}]
    resources: [{API_URL}]
    ca_file: {servers_ca}
    connect_to: "{authorization_server}"   # where {ISSUER_HOST} really is
destinations:
  - name: orders
    hosts: [{API_HOST}]
    paths: ["/v1/**"]
    credentials: [{{name: orders-api}}]
    ca_file: {servers_ca}
    connect_to: "{api}"
interception:
  ca: {{source: memory}}          # its key is on no disk: clients load the root anew after a restart
  ca_certificate_file: {ca}
policies: {{directory: {policies}}}
audit:
  sinks: [{{type: file, path: {audit}}}]
telemetry: {{log: {{format: text, level: info}}}}
admin: {{socket: {admin}}}
"#,
        local = unix("proxy.sock"),
        agent_api = unix("api.sock"),
        key = file(KEY_FILE),
        servers_ca = file(SERVERS_CA_FILE),
        ca = file(CA_FILE),
        policies = file("policies"),
        audit = file("audit.jsonl"),
        admin = file("admin.sock"),
    )
}

fn policy(uid: u32) -> String {
    format!(
        r#"// Who may use the credential `orders-api`. Edit this file: it is live within a second.
// `countersign policy test` runs the cases in orders.test.yaml beside it.
@id("orders-read") @description("you may read orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{ principal has unix && principal.unix.uid == {uid} && context has request && context.request.safe }};

@id("orders-token") @description("your scripts may hold a short-lived token") @max_lifetime("30s")
permit (principal, action == Action::"issue", resource == Credential::"orders-api")
when {{ principal has unix && principal.unix.uid == {uid} }};
"#
    )
}

fn cases(uid: u32) -> String {
    let another = uid.wrapping_add(1);
    format!(
        r"workloads:
  you: {{unix: {{uid: {uid}}}}}
  another: {{unix: {{uid: {another}}}}}
tests:
  - {{as: you, request: GET {API_URL}/v1/orders, expect: allow, by: orders-read}}
  - {{as: you, request: DELETE {API_URL}/v1/orders/7, expect: deny, by: no_permit}}
  - {{as: another, request: GET {API_URL}/v1/orders, expect: deny, by: no_permit}}
  - {{as: you, issue: orders-api, expect: allow, by: orders-token, max_lifetime: 30s}}
  - {{as: another, issue: orders-api, expect: deny, by: no_permit}}
"
    )
}
