//! Configuration: YAML files, read strictly, into the types below.
//!
//! [`load`](Config::load) goes through four stages, each a file here:
//! [`tree`] parses text into values that know their place, [`reader`] fits them into the [`raw`] serde
//! types, [`convert`] makes the typed form of each section, and [`load`](mod@load) joins the files.
//! *All* problems are reported at once, each with file, line, column and a suggestion.

mod convert;
mod load;
mod raw;
mod reader;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
mod text;
mod tree;
pub mod watch;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use countersign_attestors::{
    Attestor, AttributeDeclaration, AttributeSelection, AttributeType, OidcIssuerSettings,
    SystemdAttestor, UnixAttestor,
};
use http::HeaderName;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::Deserialize;
use url::Url;

pub(crate) use load::suggestion;
pub use load::{Checked, check, schema};

/// A whole, valid configuration. Immutable; a reload makes another.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file that it was read from.
    pub path: PathBuf,
    /// Number of data workers; `None` is min(4, the cgroup's CPU quota).
    pub workers: Option<usize>,
    /// How long what is under way may live on after SIGTERM. Default 30 s.
    pub drain: Duration,
    /// Where the agent listens.
    pub listeners: Vec<Listener>,
    /// Which attestors run.
    pub attestors: Attestors,
    /// `principal.environment`: the first rule that matches.
    pub environments: Vec<EnvironmentRule>,
    /// Token sources, by unique name.
    pub credentials: Vec<Arc<CredentialConfig>>,
    /// Where traffic may go, by unique name; the first match wins.
    pub destinations: Vec<Arc<Destination>>,
    /// What happens to traffic that matches no destination.
    pub unmatched: Unmatched,
    /// TLS interception; `None` when no destination needs it and none is configured.
    pub interception: Option<Interception>,
    /// The directory of `*.cedar` files (and `*.test.yaml`).
    pub policy_directory: PathBuf,
    /// Limits per identity.
    pub limits: Limits,
    /// Where audit records go.
    pub audit: AuditConfig,
    /// Logging.
    pub log: LogConfig,
    /// Tracing; `None`: no request is traced.
    pub traces: Option<TracesConfig>,
    /// The admin socket.
    pub admin: AdminConfig,
    /// Every file that this configuration was read from or names and that a change of must cause a reload.
    pub watched_files: Vec<PathBuf>,
}

/// A listener.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// Unique name.
    pub name: String,
    /// What it speaks.
    pub kind: ListenerKind,
    /// Where.
    pub bind: Bind,
    /// Mode and group of a Unix socket.
    pub access: SocketAccess,
}

/// What a listener speaks.
#[derive(Debug, Clone, PartialEq)]
pub enum ListenerKind {
    /// Absolute-form requests and CONNECT.
    ForwardProxy,
    /// A base URL for one destination.
    Gateway {
        /// The destination served.
        destination: Arc<Destination>,
    },
    /// `/v1/token`, `/v1/whoami`, `/v1/explain/ID`, `/v1/proxy`: about the caller only.
    WorkloadApi,
}

/// An address to bind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Bind {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket's path.
    Unix(PathBuf),
}

impl std::fmt::Display for Bind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(formatter),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

/// Who may open a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SocketAccess {
    /// Permission bits; default 0600.
    pub mode: Option<u32>,
    /// Group name.
    pub group: Option<String>,
}

/// The configured attestors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Attestors {
    /// `unix: {}` present.
    pub unix: bool,
    /// `systemd: {}` present.
    pub systemd: bool,
    /// OIDC issuers, by unique name.
    pub oidc_issuers: Vec<OidcIssuer>,
}

impl Attestors {
    /// Every attribute that the configured attestors may state.
    pub fn declarations(&self) -> Vec<AttributeDeclaration> {
        let Self {
            unix,
            systemd,
            oidc_issuers,
        } = self;
        let mut declarations = Vec::new();
        if *unix {
            declarations.extend(UnixAttestor::new(AttributeSelection::all()).declarations());
        }
        if *systemd {
            declarations.extend(SystemdAttestor::new().declarations());
        }
        for issuer in oidc_issuers {
            declarations.extend(issuer.settings().declarations());
        }
        declarations
    }
}

/// An OIDC issuer on the allow-list.
#[derive(Debug, Clone, PartialEq)]
pub struct OidcIssuer {
    /// The group in policies: `principal.NAME`.
    pub name: String,
    /// The exact `iss`.
    pub issuer: ExactUrl,
    /// Audiences, one of which a token must carry.
    pub audiences: Vec<String>,
    /// Claims mapped to typed attributes (a preset already expanded).
    pub claims: BTreeMap<String, AttributeType>,
    /// Roots that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// Where the issuer's host really is.
    pub connect_to: Option<SocketAddr>,
    /// Address ranges exempt from the address guard.
    pub allow_addresses: Vec<IpNet>,
}

impl OidcIssuer {
    /// What the attestor of this issuer is made from.
    pub fn settings(&self) -> OidcIssuerSettings {
        OidcIssuerSettings {
            name: self.name.clone(),
            issuer: self.issuer.as_str().to_owned(),
            audiences: self.audiences.clone(),
            claims: self.claims.clone(),
        }
    }
}

/// One rule of the environment mapping: all attributes must equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvironmentRule {
    /// The environment's name.
    pub name: String,
    /// `GROUP.ATTRIBUTE` to its value, as text.
    pub when: BTreeMap<String, String>,
}

/// A token source.
#[derive(Debug, Clone, PartialEq)]
pub struct CredentialConfig {
    /// Unique name: `Credential::"NAME"`.
    pub name: Arc<str>,
    /// Groups: `CredentialGroup::"GROUP"`.
    pub groups: Vec<String>,
    /// `resource.environment`.
    pub environment: Option<String>,
    /// Where tokens come from.
    pub source: TokenSource,
}

impl CredentialConfig {
    /// The file of the roots that its server is verified by; `None` where they are the system's.
    pub fn ca_file(&self) -> Option<&PathBuf> {
        let TokenSource::OauthClientCredentials(settings) = &self.source;
        settings.ca_file.as_ref()
    }
}

/// Where a credential's tokens come from: one variant for each `type`.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenSource {
    /// `oauth_client_credentials`: RFC 6749 section 4.4.
    OauthClientCredentials(Box<OauthClientCredentials>),
}

/// The settings of `oauth_client_credentials`.
#[derive(Debug, Clone, PartialEq)]
pub struct OauthClientCredentials {
    /// The authorization server.
    pub server: AuthorizationServer,
    /// The client id, a literal or a template over attested attributes (`svc-${systemd.system_unit}`).
    pub client_id: Template,
    /// How the client authenticates.
    pub client_authentication: ClientAuthentication,
    /// The most that is asked for; a destination may ask for less.
    pub scopes: Arc<[String]>,
    /// RFC 8707 resource indicators.
    pub resources: Vec<ExactUrl>,
    /// The `audience` request parameter.
    pub audience: Option<String>,
    /// Extra form parameters.
    pub parameters: BTreeMap<String, String>,
    /// Whether `client_id` is sent beside an assertion. Default false.
    pub send_client_id: bool,
    /// Claims put into the assertion, each a template over attested attributes.
    pub assertion_claims: BTreeMap<String, Template>,
    /// Roots that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// Whole time for one token request, connection included. Default 5 s.
    pub timeout: Duration,
    /// Where the server's host really is.
    pub connect_to: Option<SocketAddr>,
    /// An HTTP proxy to the server (`http://HOST:PORT`).
    pub outbound_proxy: Option<Url>,
    /// Address ranges exempt from the address guard.
    pub allow_addresses: Vec<IpNet>,
}

/// How an authorization server is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthorizationServer {
    /// By metadata (RFC 8414, or OpenID configuration).
    Issuer(ExactUrl),
    /// By its token endpoint, for servers without metadata.
    TokenEndpoint(Url),
}

impl AuthorizationServer {
    /// The URL that it is found by.
    pub fn url(&self) -> &Url {
        match self {
            Self::Issuer(issuer) => issuer.url(),
            Self::TokenEndpoint(endpoint) => endpoint,
        }
    }
}

/// A URL that keeps the text in which it was written: [`Url`] adds a slash to `https://host`, and an
/// issuer (RFC 8414 section 3.3) or a resource (RFC 8707) is compared byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExactUrl {
    text: String,
    url: Url,
}

impl ExactUrl {
    /// Parses an absolute URL.
    pub fn parse(text: &str) -> Result<Self, url::ParseError> {
        Ok(Self {
            text: text.to_owned(),
            url: Url::parse(text)?,
        })
    }

    /// The text as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The parsed form, for connecting.
    pub fn url(&self) -> &Url {
        &self.url
    }
}

impl std::fmt::Display for ExactUrl {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// How the client authenticates at the token endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientAuthentication {
    /// RFC 7523 section 2.2, signed by the agent's key.
    PrivateKeyJwt {
        /// PEM (PKCS#8, SEC1, PKCS#1) or JWK; reloaded on change.
        key_file: PathBuf,
        /// The signature algorithm.
        algorithm: SigningAlgorithm,
        /// The `kid` header; default the key's RFC 7638 thumbprint.
        key_id: Option<String>,
        /// The `typ` header; default `client-authentication+jwt` (RFC 10070), `JWT` for servers that refuse it.
        assertion_type_header: Option<String>,
        /// The `aud` claim: the server's issuer identifier (RFC 10070), or what the configuration says instead.
        audience: String,
    },
    /// The workload's own presented token, byte-identical.
    WorkloadAssertion {
        /// The configured OIDC issuer whose token is used; any, where absent.
        issuer: Option<String>,
    },
    /// RFC 6749 section 2.3.1.
    ClientSecretBasic {
        /// The file that holds the secret; one trailing line end is removed.
        secret_file: PathBuf,
    },
}

/// Signature algorithms of client assertions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(inline)]
pub enum SigningAlgorithm {
    /// ECDSA with P-256 and SHA-256.
    Es256,
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    EdDsa,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
}

/// Text with `${GROUP.ATTRIBUTE}` holes, filled from attested attributes. Parsed at load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Literal text and holes, in order.
    pub parts: Vec<TemplatePart>,
}

/// A part of a [`Template`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplatePart {
    /// Literal text.
    Literal(String),
    /// `${group.name}`.
    Attribute {
        /// The group.
        group: String,
        /// The attribute.
        name: String,
    },
}

/// Where traffic may go.
#[derive(Debug, Clone, PartialEq)]
pub struct Destination {
    /// Unique name: `Destination::"NAME"`.
    pub name: Arc<str>,
    /// Exact host names (lower case, no trailing dot) or IP addresses.
    pub hosts: Vec<String>,
    /// Ports; the scheme's default where not written.
    pub ports: Vec<u16>,
    /// `https`, or `http`, which is the permission to send the credential in clear.
    pub scheme: Scheme,
    /// Path patterns: `*` within a segment, `**` across segments. Default `/**`.
    pub paths: PathPatterns,
    /// `resource.environment`.
    pub environment: Option<String>,
    /// Credentials that may be injected; the first that policy permits is.
    pub credentials: Vec<CredentialUse>,
    /// Roots that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// Where the host really is.
    pub connect_to: Option<SocketAddr>,
    /// Address ranges exempt from the address guard.
    pub allow_addresses: Vec<IpNet>,
    /// Whether policy is enforced.
    pub mode: Mode,
    /// Time limits.
    pub timeouts: Timeouts,
}

/// Path patterns with their source text.
#[derive(Debug, Clone)]
pub struct PathPatterns {
    /// As written.
    pub patterns: Vec<String>,
    /// Those of the form `/literal/**`, without the asterisks: the usual ones, and quick to match.
    prefixes: Vec<String>,
    /// All of them, compiled (`literal_separator`: `*` does not cross `/`).
    compiled: globset::GlobSet,
}

impl PathPatterns {
    /// Compiles patterns.
    ///
    /// # Errors
    /// When they are too large together.
    pub(crate) fn new(globs: &[globset::Glob]) -> Result<Self, globset::Error> {
        let mut compiled = globset::GlobSetBuilder::new();
        for glob in globs {
            compiled.add(glob.clone());
        }
        Ok(Self {
            patterns: globs.iter().map(|glob| glob.glob().to_owned()).collect(),
            prefixes: globs
                .iter()
                .filter_map(|glob| glob.glob().strip_suffix("**"))
                .filter(|prefix| prefix.ends_with('/') && !prefix.contains('*'))
                .map(str::to_owned)
                .collect(),
            compiled: compiled.build()?,
        })
    }

    /// Whether a path is covered.
    pub fn is_match(&self, path: &str) -> bool {
        self.prefixes.iter().any(|prefix| path.starts_with(prefix)) || self.compiled.is_match(path)
    }

    /// Whether every path is covered, also one of which no reading is known.
    pub fn cover_everything(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern == "/**")
    }
}

impl PartialEq for PathPatterns {
    fn eq(&self, other: &Self) -> bool {
        self.patterns == other.patterns
    }
}

/// A URL scheme of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Scheme {
    /// Plain HTTP.
    Http,
    /// HTTP over TLS.
    Https,
}

impl Scheme {
    /// `http` or `https`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// 80 or 443.
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// A credential as a destination uses it.
#[derive(Debug, Clone, PartialEq)]
pub struct CredentialUse {
    /// The credential.
    pub credential: Arc<CredentialConfig>,
    /// The scopes asked for; the credential's where not written.
    pub scopes: Arc<[String]>,
    /// How it is put on the request.
    pub inject: Injection,
}

/// How a credential is put on a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injection {
    /// The header; default `authorization`.
    pub header: HeaderName,
    /// The header's form; default bearer.
    pub format: InjectionFormat,
}

/// The form of an injected header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum InjectionFormat {
    /// `Bearer TOKEN` (RFC 6750 section 2.1).
    Bearer,
    /// The token alone.
    Raw,
}

/// Whether policy is enforced at a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Mode {
    /// A denial refuses the request.
    Enforce,
    /// A denial forwards the request without our credential, and is recorded.
    ReportOnly,
}

/// Time limits of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Connection and TLS handshake. Default 5 s.
    pub connect: Duration,
    /// From the request's end to the response head. Default 60 s.
    pub response_headers: Duration,
    /// No byte in either direction. Default 10 min.
    pub idle: Duration,
}

/// What happens to traffic that matches no destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Unmatched {
    /// It is refused.
    Refuse,
    /// It is tunnelled or forwarded as it is: guarded, attested callers, action `connect`.
    Tunnel,
}

/// TLS interception.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interception {
    /// Where the certificate authority comes from.
    pub source: CaSource,
    /// Where the root certificate is written for clients.
    pub ca_certificate_file: Option<PathBuf>,
    /// Where the system's roots and ours are written for clients.
    pub trust_bundle_file: Option<PathBuf>,
}

/// Where the interception certificate authority comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaSource {
    /// A root of the agent's own, kept in this directory (0700, key 0600).
    Generated {
        /// The directory.
        state_directory: PathBuf,
    },
    /// An intermediate under the operator's own root.
    Files {
        /// PEM: the intermediate, then its chain up to and including the root.
        certificate_file: PathBuf,
        /// PEM: the intermediate's key.
        key_file: PathBuf,
    },
    /// A root whose key is dropped at once.
    Memory,
}

/// Limits per identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open connections, and tunnels that share an HTTP/2 connection. Default 4096.
    pub connections: usize,
    /// Requests in flight. Default 4096.
    pub requests_in_flight: usize,
    /// Requests a second. Default 5000.
    pub requests_per_second: usize,
    /// The largest request head, in bytes. Default 64 KiB.
    pub head_size: u32,
    /// How long a request head may take, and the next request of an HTTP/1 connection. Default 30 s.
    pub head_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            requests_in_flight: 4096,
            requests_per_second: 5000,
            head_size: 64 << 10,
            head_timeout: Duration::from_secs(30),
        }
    }
}

/// Where audit records go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// What happens when records cannot be written.
    pub on_failure: OnAuditFailure,
    /// The sinks; at least one.
    pub sinks: Vec<AuditSink>,
}

/// What happens when audit records cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum OnAuditFailure {
    /// New requests are refused.
    Block,
    /// Requests go on; records are dropped and counted.
    Degrade,
}

/// A sink of audit records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuditSink {
    /// A file, rotated by size.
    File {
        /// Its path.
        path: PathBuf,
        /// The size at which it is rotated, in bytes. Default 100 MiB.
        rotate_size: u64,
        /// How many rotated files are kept. Default 10.
        keep: usize,
    },
    /// Standard output.
    Stdout,
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The form of a line.
    pub format: LogFormat,
    /// A level, or `tracing` directives. Default `info`.
    pub level: String,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Tracing, by OTLP over HTTP.
#[derive(Debug, Clone, PartialEq)]
pub struct TracesConfig {
    /// Where spans are sent: the collector's `/v1/traces`.
    pub url: Url,
    /// Roots that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// The share of the requests that are traced where the caller does not say: 0 to 1. Default 1.
    pub sample_ratio: f64,
}

/// The admin socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    /// A Unix socket, mode 0600. `None`: no admin socket.
    pub socket: Option<PathBuf>,
    /// Metrics and health on TCP as well.
    pub metrics_bind: Option<SocketAddr>,
}
