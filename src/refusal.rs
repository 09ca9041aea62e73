//! Every way in which the agent refuses a request, and what the caller is told.
//!
//! One enum, [`RefusalCode`], and one total match, [`RefusalCode::properties`]: status, stable code,
//! `Proxy-Status` error, cause label and next step. `docs/errors.md` has one entry per code.

use std::time::Duration;

use countersign_attestors::AttestationEnded;
use http::StatusCode;

/// A refusal: the code, what happened in this case, and when to come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which refusal.
    pub code: RefusalCode,
    /// What happened, for the caller: lower case, input in backticks, never a secret.
    pub detail: String,
    /// What the log and the audit may say beyond [`Self::detail`].
    pub internal: Option<String>,
    /// How long the caller should wait (`Retry-After`, RFC 9110 section 10.2.3).
    pub retry_after: Option<Duration>,
    /// The policy that came nearest and what it wanted: told in `dev` only.
    pub nearest: Option<String>,
}

impl Refusal {
    /// A refusal with a detail for the caller.
    pub fn new(code: RefusalCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
            internal: None,
            retry_after: None,
            nearest: None,
        }
    }

    /// Adds what only the log and the audit may say.
    #[must_use]
    pub fn with_internal(mut self, internal: impl Into<String>) -> Self {
        self.internal = Some(internal.into());
        self
    }

    /// The refusal where the agent is an origin server to the caller: a gateway, or its own API.
    #[must_use]
    pub fn to_origin(mut self) -> Self {
        if self.code == RefusalCode::ProxyTokenRequired {
            self.code = RefusalCode::TokenRequired;
        }
        self
    }

    /// Adds `Retry-After`.
    #[must_use]
    pub fn with_retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }
}

/// The four causes of trouble with an authorization server or a destination, for dashboards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The agent's configuration for the server is wrong.
    ClientMisconfiguration,
    /// The authorization server refused.
    AuthorizationServerDenial,
    /// The credential expired and no newer one could be had.
    ExpiredCredential,
    /// The network, or a server that is down.
    Network,
}

impl Cause {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClientMisconfiguration => "client_misconfiguration",
            Self::AuthorizationServerDenial => "authorization_server_denial",
            Self::ExpiredCredential => "expired_credential",
            Self::Network => "network",
        }
    }
}

/// What a code means on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Properties {
    /// The HTTP status.
    pub status: StatusCode,
    /// The stable code, also the metric label.
    pub code: &'static str,
    /// The `Proxy-Status` error (RFC 9209 section 2.3).
    pub proxy_error: &'static str,
    /// The cause label, where an authorization server or a destination is concerned.
    pub cause: Option<Cause>,
    /// The next step.
    pub next: &'static str,
}

macro_rules! refusal_codes {
    ($($(#[$documentation:meta])* $name:ident = $status:ident, $code:literal, $proxy_error:literal, $cause:expr, $next:literal;)*) => {
        /// Every refusal.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum RefusalCode {
            $($(#[$documentation])* $name,)*
        }

        impl RefusalCode {
            /// Every code, in the order of `docs/errors.md`.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// What the code means on the wire.
            pub const fn properties(self) -> Properties {
                match self {
                    $(Self::$name => Properties {
                        status: StatusCode::$status,
                        code: $code,
                        proxy_error: $proxy_error,
                        cause: $cause,
                        next: $next,
                    },)*
                }
            }
        }
    };
}

refusal_codes! {
    /// The request cannot be read in one way only.
    MalformedRequest = BAD_REQUEST, "malformed_request", "http_request_error", None,
        "send a well-formed HTTP request with one authority";
    /// The request's target is longer than the agent reads.
    UriTooLong = URI_TOO_LONG, "uri_too_long", "http_request_error", None,
        "send a shorter path and query";
    /// The head has more lines or bytes than the agent reads.
    HeadTooLarge = REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large", "http_request_error", None,
        "send fewer or shorter header fields";
    /// The path reads differently raw and decoded, where a policy reads the path.
    AmbiguousPath = BAD_REQUEST, "ambiguous_path", "http_request_error", None,
        "send the path without encoded slashes, dot segments or empty segments";
    /// TRACE would echo the token.
    MethodNotAllowed = METHOD_NOT_ALLOWED, "method_not_allowed", "http_request_denied", None,
        "use another method: TRACE would echo the injected token, and CONNECT is for the forward proxy";
    /// The inner authority is not the tunnel's.
    AuthorityMismatch = MISDIRECTED_REQUEST, "authority_mismatch", "http_request_denied", None,
        "send requests for another host through a tunnel of their own";
    /// What the workload API is asked for is no token of the configuration.
    TokenRequestInvalid = BAD_REQUEST, "token_request_invalid", "http_request_error", None,
        "name a credential of the agent's configuration, and no scope or audience that it is not configured with";
    /// The process at the other end is gone, or its socket is being closed.
    CallerGone = FORBIDDEN, "caller_gone", "http_request_denied", None,
        "keep the connection open until the response has arrived";
    /// The socket is held by processes that attest differently.
    CallerAmbiguous = FORBIDDEN, "caller_ambiguous", "http_request_denied", None,
        "do not share one connection between processes of different identities";
    /// The agent may not look at processes of the caller's user.
    CallerHidden = SERVICE_UNAVAILABLE, "caller_hidden", "proxy_internal_error", None,
        "run the agent as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; or use a Unix socket of the agent's, which needs neither";
    /// The process exited, or has executed a program since it was attested.
    AttestationEnded = FORBIDDEN, "attestation_ended", "http_request_denied", None,
        "open a new connection";
    /// Evidence that a policy needs could not be checked.
    AttestationUnavailable = SERVICE_UNAVAILABLE, "attestation_unavailable", "proxy_internal_error", None,
        "try again; `countersign status` names the attestor that could not run";
    /// A proxy request needs a presented token.
    ProxyTokenRequired = PROXY_AUTHENTICATION_REQUIRED, "proxy_token_required", "http_request_denied", None,
        "present a token of a configured issuer in `Proxy-Authorization` (`HTTPS_PROXY=http://token:JWT@host`, or `countersign exec`, which says whether it has one)";
    /// A gateway request needs a presented token.
    TokenRequired = UNAUTHORIZED, "token_required", "http_request_denied", None,
        "present a token of a configured issuer in `Authorization: Bearer`";
    /// No policy permits it, or one forbids it.
    PolicyDenied = FORBIDDEN, "policy_denied", "http_request_denied", None,
        "countersign policy explain REQUEST_ID";
    /// A revocation is in force.
    Revoked = FORBIDDEN, "revoked", "http_request_denied", None,
        "ask your platform team; `countersign revoke --lift ID` ends a revocation";
    /// The destination is in no configuration.
    DestinationNotConfigured = FORBIDDEN, "destination_not_configured", "http_request_denied", None,
        "add a destination that covers this scheme, host, port and path";
    /// The host resolves to an address that is not allowed.
    AddressNotAllowed = FORBIDDEN, "address_not_allowed", "destination_ip_prohibited", None,
        "add the range to the destination's `allow_addresses` if it is meant";
    /// The host is at a listener of the agent's own.
    OwnListener = FORBIDDEN, "own_listener", "destination_ip_prohibited", None,
        "lead the host, or the destination's `connect_to`, elsewhere: no configuration leads the agent to itself";
    /// A limit of this identity is reached.
    TooManyRequests = TOO_MANY_REQUESTS, "too_many_requests", "http_request_denied", None,
        "ask less at once or less often, or raise `limits.per_identity`";
    /// Audit records cannot be written.
    AuditUnavailable = SERVICE_UNAVAILABLE, "audit_unavailable", "proxy_internal_error", None,
        "free space for the audit file; `countersign status` shows the sink";
    /// As many files are open as may be.
    OutOfDescriptors = SERVICE_UNAVAILABLE, "out_of_descriptors", "proxy_internal_error", None,
        "try again after `Retry-After`; raise the agent's limit of open files (`LimitNOFILE=`)";
    /// The agent is shutting down.
    ShuttingDown = SERVICE_UNAVAILABLE, "shutting_down", "proxy_internal_error", None,
        "try again on a new connection";
    /// The authorization server refuses or resets connections, or its name does not resolve.
    TokenServerUnreachable = SERVICE_UNAVAILABLE, "token_server_unreachable", "destination_unavailable", Some(Cause::Network),
        "check that the authorization server is up and reachable from this node";
    /// The authorization server's certificate does not verify.
    TokenServerTls = BAD_GATEWAY, "token_server_tls", "tls_certificate_error", Some(Cause::ClientMisconfiguration),
        "check the credential's `ca_file` against the authorization server's certificate";
    /// The authorization server's metadata names a URL that the agent may not connect to.
    TokenServerNotAllowed = BAD_GATEWAY, "token_server_not_allowed", "destination_ip_prohibited", Some(Cause::ClientMisconfiguration),
        "check the server's metadata; add the range to the credential's `allow_addresses` if it is meant";
    /// The authorization server answered 5xx.
    TokenServerError = SERVICE_UNAVAILABLE, "token_server_error", "destination_unavailable", Some(Cause::Network),
        "try again after `Retry-After`; the authorization server is in trouble";
    /// The authorization server answered 429.
    TokenServerThrottled = SERVICE_UNAVAILABLE, "token_server_throttled", "destination_unavailable", Some(Cause::AuthorizationServerDenial),
        "try again after `Retry-After`";
    /// A failed attempt is recent; no new one is made before its time.
    TokenBackoff = SERVICE_UNAVAILABLE, "token_backoff", "destination_unavailable", Some(Cause::Network),
        "try again after `Retry-After`";
    /// The authorization server did not answer in time.
    TokenServerTimeout = GATEWAY_TIMEOUT, "token_server_timeout", "http_response_timeout", Some(Cause::Network),
        "try again; raise the credential's `timeout` if the server is always this slow";
    /// `invalid_client`: the server does not accept the client's authentication.
    InvalidClient = BAD_GATEWAY, "invalid_client", "http_request_denied", Some(Cause::ClientMisconfiguration),
        "check `client_id` and the key or secret registered at the authorization server";
    /// This node's clock and the authorization server's differ by more than a minute.
    ClockSkew = BAD_GATEWAY, "clock_skew", "http_request_denied", Some(Cause::ClientMisconfiguration),
        "set this node's clock, or the authorization server's";
    /// The authorization server refused the request with another OAuth error.
    TokenRequestDenied = BAD_GATEWAY, "token_request_denied", "http_request_denied", Some(Cause::AuthorizationServerDenial),
        "check the credential's scopes, resources and grant at the authorization server";
    /// The answer is not an acceptable token response.
    TokenResponseInvalid = BAD_GATEWAY, "token_response_invalid", "http_response_incomplete", Some(Cause::AuthorizationServerDenial),
        "check what answers at the token endpoint";
    /// The authorization server redirected; redirects are never followed.
    TokenServerRedirected = BAD_GATEWAY, "token_server_redirected", "http_request_denied", Some(Cause::ClientMisconfiguration),
        "configure the final URL of the authorization server";
    /// Metadata could not be used.
    MetadataInvalid = BAD_GATEWAY, "metadata_invalid", "http_response_incomplete", Some(Cause::ClientMisconfiguration),
        "check that `issuer` equals the `issuer` in the server's metadata, byte for byte";
    /// The agent's own key or secret cannot be used.
    ClientKeyUnavailable = BAD_GATEWAY, "client_key_unavailable", "proxy_internal_error", Some(Cause::ClientMisconfiguration),
        "check the credential's key or secret file";
    /// An attribute that a template needs was not attested.
    AttributeMissing = FORBIDDEN, "attribute_missing", "http_request_denied", Some(Cause::ClientMisconfiguration),
        "present the evidence that the credential's `client_id` or `assertion_claims` is made of";
    /// The token's remaining life is too short and no newer one could be had.
    CredentialExpired = SERVICE_UNAVAILABLE, "credential_expired", "destination_unavailable", Some(Cause::ExpiredCredential),
        "try again after `Retry-After`";
    /// The destination's name does not resolve.
    UpstreamNameUnresolved = BAD_GATEWAY, "upstream_name_unresolved", "dns_error", Some(Cause::Network),
        "check the host's name, or set the destination's `connect_to`";
    /// The destination refuses or resets connections.
    UpstreamUnreachable = BAD_GATEWAY, "upstream_unreachable", "connection_refused", Some(Cause::Network),
        "check that the destination is up and reachable from this node";
    /// The destination's certificate does not verify; nothing was sent.
    UpstreamTls = BAD_GATEWAY, "upstream_tls", "tls_certificate_error", Some(Cause::ClientMisconfiguration),
        "check the destination's `ca_file` against its certificate";
    /// The destination did not accept a connection, or did not answer, in time.
    UpstreamTimeout = GATEWAY_TIMEOUT, "upstream_timeout", "http_response_timeout", Some(Cause::Network),
        "try again; raise the destination's `timeouts` if it is always this slow";
    /// The destination refused the stream or ended the HTTP/2 connection, before it began with the request or after.
    UpstreamRefusedStream = BAD_GATEWAY, "upstream_refused_stream", "http_protocol_error", Some(Cause::Network),
        "send the request again, where it may be sent twice";
    /// The destination broke off, or its answer is not HTTP.
    UpstreamProtocol = BAD_GATEWAY, "upstream_protocol", "http_protocol_error", Some(Cause::Network),
        "check what answers at the destination";
}

impl RefusalCode {
    /// The code with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == name)
    }

    /// The stable code.
    pub const fn as_str(self) -> &'static str {
        self.properties().code
    }
}

impl From<AttestationEnded> for Refusal {
    fn from(ended: AttestationEnded) -> Self {
        let code = match ended {
            AttestationEnded::EvidenceExpired => RefusalCode::ProxyTokenRequired,
            AttestationEnded::Exited | AttestationEnded::Executed => RefusalCode::AttestationEnded,
        };
        Self::new(code, ended.to_string())
    }
}
