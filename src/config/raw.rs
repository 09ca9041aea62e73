//! The file as users write it. The doc comments here are the configuration reference: they become
//! the descriptions in the JSON Schema and in `docs/configuration.md`.

use schemars::JsonSchema;
use serde::Deserialize;

use super::reader::{Entries, Located, Scalar};
use super::{
    InjectionFormat, LogFormat, Mode, OnAuditFailure, Scheme, SigningAlgorithm, Unmatched,
};

/// Text and where it stands.
pub(super) type Text = Located<String>;

/// Kinds of text, for the schema.
mod kind {
    macro_rules! kinds {
        ($($(#[$doc:meta])* $name:ident: $schema:tt;)*) => {
            $(
                $(#[$doc])*
                pub(in crate::config) struct $name;

                impl schemars::JsonSchema for $name {
                    fn inline_schema() -> bool {
                        true
                    }

                    fn schema_name() -> std::borrow::Cow<'static, str> {
                        stringify!($name).into()
                    }

                    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                        schemars::json_schema!($schema)
                    }
                }
            )*
        };
    }

    kinds! {
        /// `5s`.
        Duration: {"type": "string", "title": "duration", "pattern": "^[0-9]+(ms|s|m|h|d)$"};
        /// `64KiB`.
        Size: {"type": "string", "title": "size", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"};
        /// A path, relative to the file that names it.
        FilePath: {"type": "string", "title": "path", "minLength": 1};
        /// `127.0.0.1:7523` or `unix:/PATH`.
        Bind: {"type": "string", "title": "`ADDRESS:PORT` or `unix:/PATH`", "pattern": "^(unix:/.+|.+:[0-9]+)$"};
        /// `127.0.0.1:8443`.
        SocketAddress: {"type": "string", "title": "`ADDRESS:PORT`", "pattern": "^.+:[0-9]+$"};
        /// `10.0.0.0/8`.
        Network: {"type": "string", "title": "address range"};
        /// `https://...`.
        HttpsUrl: {"type": "string", "title": "https URL", "pattern": "^https://"};
        /// `http://HOST:PORT`.
        ProxyUrl: {"type": "string", "title": "`http://HOST:PORT`", "pattern": "^http://"};
        /// `https://HOST`, or `http://` on loopback.
        CollectorUrl: {"type": "string", "title": "https URL, or http on loopback", "pattern": "^https?://"};
        /// Text with holes.
        Template: {"type": "string", "title": "template", "minLength": 1};
        /// Permission bits.
        Permissions: {"type": "string", "title": "octal digits", "pattern": "^[0-7]{3,4}$"};
        /// A path pattern.
        PathPattern: {"type": "string", "title": "path pattern", "pattern": "^/"};
    }
}

/// A configuration file. Unknown keys are errors. Durations are written `500ms`, `5s`, `10m`, `1h`;
/// sizes `64KiB`, `100MiB`; paths are relative to the file that names them. A secret is named by a
/// file, never written inline.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Countersign configuration")]
pub(super) struct Document {
    /// The version of this format.
    #[schemars(range(min = 1, max = 1))]
    pub(super) version: Option<Located<u32>>,
    /// Further files, as glob patterns in the last part of a path. Their lists are appended in the
    /// order of their names, a name used twice is an error, and a section that is not a list stands
    /// in one file only.
    pub(super) include: Option<Vec<Text>>,
    /// Threads, and the agent's end.
    pub(super) runtime: Option<Located<Runtime>>,
    /// Where the agent listens. A listener whose `bind` is unchanged is not bound again on reload.
    pub(super) listeners: Option<Vec<Located<Listener>>>,
    /// Which attestors run: who a caller is, and on which evidence.
    pub(super) attestors: Option<Located<Attestors>>,
    /// `principal.environment` in policies: the name of the first rule whose attributes all equal,
    /// else `unknown`.
    pub(super) environments: Option<Vec<Located<Environment>>>,
    /// Token sources.
    pub(super) credentials: Option<Vec<Located<Credential>>>,
    /// Where traffic may go. The first that covers scheme, host, port and path is a request's.
    pub(super) destinations: Option<Vec<Located<Destination>>>,
    /// What happens to traffic that matches no destination: `refuse`, or `tunnel` it as it is (past
    /// the address guard, for attested callers, where policy permits the action `connect`).
    #[schemars(extend("default" = "refuse"))]
    pub(super) unmatched: Option<Located<Unmatched>>,
    /// TLS interception. Default, where a forward proxy reaches an https destination that carries a
    /// credential: `ca: {source: generated}`, and no file for clients; else none.
    pub(super) interception: Option<Located<Interception>>,
    /// Policies. Default: the directory `policies` beside this file, which must exist.
    pub(super) policies: Option<Located<Policies>>,
    /// Limits.
    pub(super) limits: Option<Located<Limits>>,
    /// Where audit records go.
    pub(super) audit: Option<Located<Audit>>,
    /// Logs and traces.
    pub(super) telemetry: Option<Located<Telemetry>>,
    /// The admin socket: health, readiness, metrics, status, reload and revocation.
    pub(super) admin: Option<Located<Admin>>,
}

/// Threads, and the agent's end.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Runtime {
    /// Number of data workers. Default: the cgroup's CPU quota, at most 4.
    #[schemars(range(min = 1, max = 64))]
    pub(super) workers: Option<Located<u32>>,
    /// How long requests and tunnels under way may live on after SIGTERM, before they are cut.
    #[schemars(with = "Option<kind::Duration>", extend("default" = "30s"))]
    pub(super) drain: Option<Text>,
}

/// A listener.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Listener {
    /// Unique among listeners.
    pub(super) name: Text,
    /// `forward_proxy`: absolute-form requests and CONNECT. `gateway`: a base URL for one destination.
    /// `workload_api`: tokens and answers about the caller only.
    #[serde(rename = "type")]
    pub(super) kind: Located<ListenerType>,
    /// Where. Port 0 is any free one.
    #[schemars(with = "kind::Bind")]
    pub(super) bind: Text,
    /// Who may open a Unix socket.
    pub(super) access: Option<Located<Access>>,
    /// The destination that a `gateway` serves.
    pub(super) destination: Option<Text>,
}

/// The type of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum ListenerType {
    ForwardProxy,
    Gateway,
    WorkloadApi,
}

/// Who may open a Unix socket.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Access {
    /// Permission bits, in quotes.
    #[schemars(with = "Option<kind::Permissions>", extend("default" = "0600"))]
    pub(super) mode: Option<Text>,
    /// The group that owns the socket.
    pub(super) group: Option<Text>,
}

/// Attestors. One that is not written does not run.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Attestors {
    /// Kernel evidence of the calling process: `principal.unix`, and `principal.container` where it
    /// runs in one. Written `{}`.
    pub(super) unix: Option<Located<NoKeys>>,
    /// The systemd unit of the calling process: `principal.systemd`. Written `{}`.
    pub(super) systemd: Option<Located<NoKeys>>,
    /// Tokens that callers present.
    pub(super) oidc: Option<Located<Oidc>>,
}

/// An attestor without settings.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub(super) struct NoKeys {}

/// Tokens that callers present.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Oidc {
    /// The exact allow-list of issuers.
    pub(super) issuers: Vec<Located<Issuer>>,
}

/// An OIDC issuer whose tokens are evidence.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Issuer {
    /// Unique among issuers: the group in policies, `principal.NAME`.
    pub(super) name: Text,
    /// The exact `iss` of its tokens; its keys are found by `/.well-known/openid-configuration`.
    #[schemars(with = "kind::HttpsUrl")]
    pub(super) issuer: Text,
    /// A token must carry one of these in `aud`.
    pub(super) audiences: Located<Vec<Text>>,
    /// The claims of a known kind of issuer.
    pub(super) preset: Option<Located<Preset>>,
    /// Claims that become attributes, with their types; they add to a preset's.
    pub(super) claims: Option<Located<Entries<ClaimType>>>,
    /// Roots that replace the system's (PEM).
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) ca_file: Option<Text>,
    /// Where the issuer's host really is.
    #[schemars(with = "Option<kind::SocketAddress>")]
    pub(super) connect_to: Option<Text>,
    /// Address ranges that the issuer may be in although the address guard refuses them.
    #[schemars(with = "Option<Vec<kind::Network>>")]
    pub(super) allow_addresses: Option<Vec<Text>>,
}

/// A known kind of issuer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Preset {
    Github,
    Gitlab,
}

/// The type of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum ClaimType {
    String,
    Long,
    Boolean,
    StringSet,
}

/// A rule for `principal.environment`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Environment {
    /// The environment's name.
    pub(super) name: Text,
    /// `GROUP.ATTRIBUTE` and the value that it must equal; all must.
    pub(super) when: Located<Entries<Scalar>>,
}

/// A token source.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Credential {
    /// Unique among credentials: `Credential::"NAME"` in policies.
    pub(super) name: Text,
    /// `oauth_client_credentials`: an OAuth 2.0 access token by the client credentials grant (RFC 6749
    /// section 4.4).
    #[serde(rename = "type")]
    pub(super) kind: Located<CredentialType>,
    /// Groups: `CredentialGroup::"GROUP"` in policies.
    pub(super) groups: Option<Vec<Text>>,
    /// `resource.environment` in policies.
    pub(super) environment: Option<Text>,
    /// The authorization server, found by its metadata (RFC 8414, else OpenID configuration). Required
    /// where `token_endpoint` is absent.
    #[schemars(with = "Option<kind::HttpsUrl>")]
    pub(super) issuer: Option<Text>,
    /// The token endpoint of a server without metadata; with `private_key_jwt` `issuer` is written beside it, the
    /// audience of assertions.
    #[schemars(with = "Option<kind::HttpsUrl>")]
    pub(super) token_endpoint: Option<Text>,
    /// The client id, or a template over attested attributes: `svc-${systemd.system_unit}`.
    #[schemars(with = "kind::Template")]
    pub(super) client_id: Text,
    /// How the client proves who it is.
    pub(super) client_authentication: Located<ClientAuthentication>,
    /// The most that is asked for; a destination may ask for less.
    pub(super) scopes: Option<Vec<Text>>,
    /// Resource indicators (RFC 8707), sent as written.
    pub(super) resources: Option<Vec<Text>>,
    /// The `audience` parameter, for servers that have one.
    pub(super) audience: Option<Text>,
    /// Further parameters of the token request.
    pub(super) parameters: Option<Located<Entries<Text>>>,
    /// Whether `client_id` is sent beside an assertion.
    #[schemars(extend("default" = false))]
    pub(super) send_client_id: Option<bool>,
    /// Claims put into the assertion, each a template over attested attributes. With
    /// `private_key_jwt` only.
    #[schemars(with = "Option<std::collections::BTreeMap<String, kind::Template>>")]
    pub(super) assertion_claims: Option<Located<Entries<Text>>>,
    /// Roots that replace the system's (PEM).
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) ca_file: Option<Text>,
    /// The whole time for one token request, connection included.
    #[schemars(with = "Option<kind::Duration>", extend("default" = "5s"))]
    pub(super) timeout: Option<Text>,
    /// Where the server's host really is.
    #[schemars(with = "Option<kind::SocketAddress>")]
    pub(super) connect_to: Option<Text>,
    /// An HTTP proxy on the way to the server.
    #[schemars(with = "Option<kind::ProxyUrl>")]
    pub(super) outbound_proxy: Option<Text>,
    /// Address ranges that the server may be in although the address guard refuses them.
    #[schemars(with = "Option<Vec<kind::Network>>")]
    pub(super) allow_addresses: Option<Vec<Text>>,
}

/// The type of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum CredentialType {
    OauthClientCredentials,
}

/// How a client proves who it is at the token endpoint.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ClientAuthentication {
    /// `private_key_jwt`: an assertion signed by the agent's key (RFC 7523). `workload_assertion`: the
    /// token that the workload presented, as it is. `client_secret_basic`: a secret from a file.
    pub(super) method: Located<Method>,
    /// `private_key_jwt`: the private key, PEM or JWK; parsed at each load, and read again when it changes.
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) key_file: Option<Text>,
    /// `private_key_jwt`: the signature algorithm.
    pub(super) algorithm: Option<Located<SigningAlgorithm>>,
    /// `private_key_jwt`: the `kid` header. Default: the key's thumbprint (RFC 7638).
    pub(super) key_id: Option<Text>,
    /// `private_key_jwt`: the `typ` header; `JWT` for servers that refuse the default.
    #[schemars(extend("default" = "client-authentication+jwt"))]
    pub(super) assertion_type_header: Option<Text>,
    /// `private_key_jwt`: whom the assertion is for. Default: the credential's `issuer`. Only for old servers
    /// that demand another audience, such as the URL of their token endpoint.
    pub(super) audience: Option<Text>,
    /// `workload_assertion`: the name of the configured issuer whose token is used. Default: any.
    pub(super) issuer: Option<Text>,
    /// `client_secret_basic`: the file that holds the secret; one line end at its end is removed.
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) secret_file: Option<Text>,
}

/// A method of client authentication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Method {
    PrivateKeyJwt,
    WorkloadAssertion,
    ClientSecretBasic,
}

/// Where traffic may go.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Destination {
    /// Unique among destinations: `Destination::"NAME"` in policies.
    pub(super) name: Text,
    /// Exact host names or IP addresses.
    pub(super) hosts: Located<Vec<Text>>,
    /// Ports. Default: the scheme's.
    pub(super) ports: Option<Vec<Located<u16>>>,
    /// Writing `http` is the permission to send the credential in clear.
    #[schemars(extend("default" = "https"))]
    pub(super) scheme: Option<Located<Scheme>>,
    /// Path patterns: `*` stands within a segment, `**` for any number of segments.
    #[schemars(with = "Option<Vec<kind::PathPattern>>", extend("default" = ["/**"]))]
    pub(super) paths: Option<Located<Vec<Text>>>,
    /// `resource.environment` in policies.
    pub(super) environment: Option<Text>,
    /// Credentials; the first that policy permits is put on the request.
    pub(super) credentials: Option<Vec<Located<CredentialUse>>>,
    /// Roots that replace the system's (PEM).
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) ca_file: Option<Text>,
    /// Where the host really is.
    #[schemars(with = "Option<kind::SocketAddress>")]
    pub(super) connect_to: Option<Text>,
    /// Address ranges that the host may be in although the address guard refuses them.
    #[schemars(with = "Option<Vec<kind::Network>>")]
    pub(super) allow_addresses: Option<Vec<Text>>,
    /// `enforce`: what policy denies is refused. `report_only`: it is forwarded without our credential,
    /// and recorded.
    #[schemars(extend("default" = "enforce"))]
    pub(super) mode: Option<Located<Mode>>,
    /// Time limits.
    pub(super) timeouts: Option<Located<Timeouts>>,
}

/// A credential as a destination uses it.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CredentialUse {
    /// The credential.
    pub(super) name: Text,
    /// The scopes asked for: one of the credential's at least. Default: all of them.
    pub(super) scopes: Option<Located<Vec<Text>>>,
    /// How it is put on the request.
    pub(super) inject: Option<Located<Inject>>,
}

/// How a credential is put on a request.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Inject {
    /// The header.
    #[schemars(extend("default" = "authorization"))]
    pub(super) header: Option<Text>,
    /// `bearer`: `Bearer TOKEN` (RFC 6750). `raw`: the token alone.
    #[schemars(extend("default" = "bearer"))]
    pub(super) format: Option<Located<InjectionFormat>>,
}

/// Time limits of a destination.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Timeouts {
    /// Connection and TLS handshake.
    #[schemars(with = "Option<kind::Duration>", extend("default" = "5s"))]
    pub(super) connect: Option<Text>,
    /// From the request's end to the head of the response.
    #[schemars(with = "Option<kind::Duration>", extend("default" = "60s"))]
    pub(super) response_headers: Option<Text>,
    /// No byte in either direction.
    #[schemars(with = "Option<kind::Duration>", extend("default" = "10m"))]
    pub(super) idle: Option<Text>,
}

/// TLS interception.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Interception {
    /// The certificate authority.
    pub(super) ca: Option<Located<CertificateAuthority>>,
    /// Where our root certificate is written for clients.
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) ca_certificate_file: Option<Text>,
    /// Where the system's roots and ours are written for clients: `SSL_CERT_FILE` and its like replace
    /// the roots.
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) trust_bundle_file: Option<Text>,
}

/// The certificate authority of interception.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CertificateAuthority {
    /// `generated`: a root of the agent's own, kept in `state_directory`. `files`: an intermediate under
    /// a root of yours. `memory`: a root that ends with the agent.
    #[schemars(extend("default" = "generated"))]
    pub(super) source: Option<Located<CaSourceName>>,
    /// `generated`: the directory, mode 0700.
    #[schemars(with = "Option<kind::FilePath>", extend("default" = "/run/countersign/ca"))]
    pub(super) state_directory: Option<Text>,
    /// `files`: the intermediate, then its chain up to and including the root (PEM).
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) certificate_file: Option<Text>,
    /// `files`: the intermediate's private key (PEM).
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) key_file: Option<Text>,
}

/// Where the certificate authority comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum CaSourceName {
    Generated,
    Files,
    Memory,
}

/// Policies.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Policies {
    /// The directory of `*.cedar` files and their `*.test.yaml`.
    #[schemars(with = "kind::FilePath")]
    pub(super) directory: Text,
}

/// Limits.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    /// For each identity.
    pub(super) per_identity: Option<Located<PerIdentity>>,
}

/// Limits for each identity.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PerIdentity {
    /// Open connections to all listeners together, and tunnels that share an HTTP/2 connection.
    #[schemars(range(min = 1), extend("default" = 4096))]
    pub(super) connections: Option<Located<u32>>,
    /// Requests in flight.
    #[schemars(range(min = 1), extend("default" = 4096))]
    pub(super) requests_in_flight: Option<Located<u32>>,
    /// Requests a second, and as many at once. More wait for a second at most.
    #[schemars(range(min = 1), extend("default" = 5000))]
    pub(super) requests_per_second: Option<Located<u32>>,
    /// The largest request head, between 8 KiB and 1 MiB. A larger one gets 431.
    #[schemars(with = "Option<kind::Size>", extend("default" = "64KiB"))]
    pub(super) head_size: Option<Text>,
    /// How long a request head may take, and the next request of an HTTP/1 connection.
    #[schemars(with = "Option<kind::Duration>", extend("default" = "30s"))]
    pub(super) head_timeout: Option<Text>,
}

/// Where audit records go.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Audit {
    /// When records cannot be written: `block` refuses new requests, `degrade` goes on, drops records
    /// and counts them.
    #[schemars(extend("default" = "block"))]
    pub(super) on_failure: Option<Located<OnAuditFailure>>,
    /// The sinks; at least one. Default: standard output.
    #[schemars(extend("default" = [{"type": "stdout"}]))]
    pub(super) sinks: Option<Located<Vec<Located<Sink>>>>,
}

/// A sink of audit records.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Sink {
    /// `file` or `stdout`.
    #[serde(rename = "type")]
    pub(super) kind: Located<SinkType>,
    /// `file`: its path.
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) path: Option<Text>,
    /// `file`: the size at which it is rotated.
    #[schemars(with = "Option<kind::Size>", extend("default" = "100MiB"))]
    pub(super) rotate_size: Option<Text>,
    /// `file`: how many rotated files are kept.
    #[schemars(range(min = 1), extend("default" = 10))]
    pub(super) keep: Option<Located<u32>>,
}

/// The type of a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum SinkType {
    File,
    Stdout,
}

/// Logs and traces.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Telemetry {
    /// The log, on standard error.
    pub(super) log: Option<Located<Log>>,
    /// A span for each request. Default: none.
    pub(super) traces: Option<Located<Traces>>,
}

/// The log.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Log {
    /// The form of a line.
    #[schemars(extend("default" = "text"))]
    pub(super) format: Option<Located<LogFormat>>,
    /// A level, or directives by module: `info,countersign::policy=debug`.
    #[schemars(extend("default" = "info"))]
    pub(super) level: Option<Text>,
}

/// Traces.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Traces {
    /// An OpenTelemetry collector, which is sent spans by OTLP over HTTP, in protobuf.
    pub(super) otlp: Located<Otlp>,
}

/// An OpenTelemetry collector.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Otlp {
    /// Its base URL, to which `/v1/traces` is appended.
    #[schemars(with = "kind::CollectorUrl")]
    pub(super) endpoint: Text,
    /// Roots that replace the system's (PEM).
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) ca_file: Option<Text>,
    /// The share, from 0 to 1, of the requests that are traced where no `traceparent` of the caller says.
    #[schemars(range(min = 0, max = 1), extend("default" = 1))]
    pub(super) sample_ratio: Option<Located<f64>>,
}

/// The admin socket.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Admin {
    /// A Unix socket, mode 0600; the verbs look for it at `/run/countersign/admin.sock`. Default: none.
    #[schemars(with = "Option<kind::FilePath>")]
    pub(super) socket: Option<Text>,
    /// Metrics and health on TCP as well, for 64 connections at one time: for one more the oldest is closed. Default: none.
    #[schemars(with = "Option<kind::SocketAddress>")]
    pub(super) metrics_bind: Option<Text>,
}
