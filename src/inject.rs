//! Puts a credential on a request: the caller's own credentials are stripped, ours is set last.
//!
//! An [`UpstreamRequest`] can be made in three ways only, each from a decision: with a credential,
//! without one where `connect` was granted, and without one where a denial is only reported.
//!
//! | Made by | The caller's `Authorization`, and headers in which the destination takes a credential | Ours |
//! |---|---|---|
//! | [`inject`] | removed | set last |
//! | [`pass`], [`report`] | forwarded, but for a token that was presented to a gateway | none |
//!
//! In trailers all of these are removed whoever made it ([`crate::streams`]), and
//! `Proxy-Authorization` is forwarded nowhere.
//!
//! ```compile_fail,E0451
//! // Nothing reaches an upstream without a decision: the fields are private.
//! let request = countersign::inject::UpstreamRequest { request: todo!(), upgrade: false, usable_until: None };
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::header::{
    ALT_SVC, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Request};

use crate::config::{Destination, Mode};
use crate::credentials::Credential;
use crate::policy::{Action, Denial, DenialKind, Grant, LeaseEnded, PolicySnapshot, Revocation};
use crate::refusal::{Refusal, RefusalCode};
use crate::request::EgressRequest;
use crate::streams::RequestBody;

/// A request that may leave. Only this is sent.
#[derive(Debug)]
pub struct UpstreamRequest {
    request: Box<Request<RequestBody>>,
    upgrade: bool,
    /// Until when (monotonic) what was injected may be sent; without a credential for ever.
    usable_until: Option<Duration>,
}

impl UpstreamRequest {
    /// Whether the request asks to change protocols (RFC 9110 section 7.8).
    pub fn is_upgrade(&self) -> bool {
        self.upgrade
    }

    /// Whether it is gRPC, which is spoken over HTTP/2 only.
    pub fn is_grpc(&self) -> bool {
        is_grpc(self.request.headers())
    }

    /// Its headers, as they leave.
    pub fn headers(&self) -> &HeaderMap {
        self.request.headers()
    }

    /// Until when (monotonic) it may be sent; `None` for ever.
    pub fn usable_until(&self) -> Option<Duration> {
        self.usable_until
    }

    /// The request, for the one place that sends it.
    pub(crate) fn into_http(self) -> Box<Request<RequestBody>> {
        self.request
    }
}

/// Whether a head's content is gRPC's (gRPC over HTTP/2, "Requests").
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Why a credential was not put on a request.
#[derive(Debug)]
pub enum NotInjected {
    /// Policies were replaced while the token was obtained: decide again. The request is given back.
    DecideAgain(Box<Request<RequestBody>>),
    /// The request is refused.
    Refused(Refusal),
}

/// Puts `credential` on `request`. Checks again, since time passed while the token was obtained: the
/// lease, the token's remaining life, its revocation, and that this is the credential's destination.
pub fn inject(
    credential: &Credential,
    asked: &EgressRequest,
    mut request: Box<Request<RequestBody>>,
    current: &Arc<PolicySnapshot>,
    monotonic: Duration,
    wall: SystemTime,
) -> Result<UpstreamRequest, NotInjected> {
    let grant = credential.grant();
    request = check_lease(grant, request, current, wall)?;
    let usable_until = Some(credential.usable_until());
    check_expiry(usable_until, monotonic).map_err(NotInjected::Refused)?;
    if let Some(revocation) = current
        .revocations()
        .token_is_revoked(credential.token_sha256())
    {
        return Err(NotInjected::Refused(token_revoked(revocation)));
    }
    let place = grant
        .destination()
        .filter(|destination| covers(destination, asked))
        .and_then(|destination| Some((destination, injected_header(destination, grant)?)));
    let Some((destination, header)) = place else {
        return Err(NotInjected::Refused(Refusal::new(
            RefusalCode::DestinationNotConfigured,
            format!("the credential is not for `{}`", asked.target),
        )));
    };
    let upgrade = put(
        request.headers_mut(),
        destination,
        header,
        credential.header_value(),
    );
    Ok(UpstreamRequest {
        request,
        upgrade,
        usable_until,
    })
}

/// Refuses what may no longer be sent at the monotonic time `now`.
///
/// # Errors
/// [`RefusalCode::CredentialExpired`] from `usable_until` on.
pub fn check_expiry(usable_until: Option<Duration>, now: Duration) -> Result<(), Refusal> {
    if usable_until.is_none_or(|until| now < until) {
        return Ok(());
    }
    Err(Refusal::new(
        RefusalCode::CredentialExpired,
        "the token expired before it could be used",
    )
    .with_retry_after(Duration::from_secs(1)))
}

/// What is answered to a request whose token an operator revoked.
pub fn token_revoked(revocation: &Revocation) -> Refusal {
    Refusal::new(
        RefusalCode::Revoked,
        format!("the token is revoked by `{}`", revocation.id),
    )
}

/// Removes what concerns one connection and the caller's own credentials, and sets ours last. Returns
/// whether the request asks for an upgrade.
fn put(
    headers: &mut HeaderMap,
    destination: &Destination,
    header: &HeaderName,
    value: &HeaderValue,
) -> bool {
    let upgrade = strip_hop_by_hop(headers);
    strip_credentials(headers, destination);
    headers.insert(header.clone(), value.clone());
    upgrade
}

/// Lets a request through that carries no credential of ours, as `connect` was granted.
pub fn pass(
    grant: &Grant,
    mut request: Box<Request<RequestBody>>,
    current: &Arc<PolicySnapshot>,
    wall: SystemTime,
) -> Result<UpstreamRequest, NotInjected> {
    if grant.action() != Action::Connect {
        return Err(NotInjected::Refused(Refusal::new(
            RefusalCode::PolicyDenied,
            "what was granted is not a connection",
        )));
    }
    request = check_lease(grant, request, current, wall)?;
    let upgrade = strip_hop_by_hop(request.headers_mut());
    Ok(UpstreamRequest {
        request,
        upgrade,
        usable_until: None,
    })
}

/// Gives the request back while the grant's lease holds.
fn check_lease(
    grant: &Grant,
    request: Box<Request<RequestBody>>,
    current: &Arc<PolicySnapshot>,
    wall: SystemTime,
) -> Result<Box<Request<RequestBody>>, NotInjected> {
    match grant.lease().check(current, wall) {
        Ok(()) => Ok(request),
        Err(LeaseEnded::SnapshotReplaced | LeaseEnded::PolicyExpired) => {
            Err(NotInjected::DecideAgain(request))
        }
        Err(LeaseEnded::Attestation(ended)) => Err(NotInjected::Refused(ended.into())),
    }
}

/// Whether a denial at `destination` is only reported. Missing evidence, revocations, the address
/// guard and malformed requests are refused all the same.
pub fn is_reported(denial: &Denial, destination: &Destination) -> bool {
    destination.mode == Mode::ReportOnly
        && matches!(denial.kind, DenialKind::NoPermit | DenialKind::Forbidden)
}

/// Lets a request through without our credential where a destination only reports denials; the
/// caller's own headers stay.
pub fn report(
    denial: &Denial,
    destination: &Destination,
    mut request: Box<Request<RequestBody>>,
) -> Result<UpstreamRequest, NotInjected> {
    if !is_reported(denial, destination) {
        return Err(NotInjected::Refused(Refusal::new(
            RefusalCode::PolicyDenied,
            "the denial is enforced",
        )));
    }
    let upgrade = strip_hop_by_hop(request.headers_mut());
    Ok(UpstreamRequest {
        request,
        upgrade,
        usable_until: None,
    })
}

/// The header in which a destination takes the granted credential.
fn injected_header<'a>(destination: &'a Destination, grant: &Grant) -> Option<&'a HeaderName> {
    let granted = grant.credential()?;
    destination
        .credentials
        .iter()
        .find(|credential_use| credential_use.credential.name == granted.name)
        .map(|credential_use| &credential_use.inject.header)
}

/// Whether a destination covers the request's scheme, host, port and every reading of its path.
pub fn covers(destination: &Destination, asked: &EgressRequest) -> bool {
    destination.scheme == asked.scheme
        && destination.ports.contains(&asked.target.port())
        && destination
            .hosts
            .iter()
            .any(|host| host == asked.target.host())
        && asked.path.is_covered_by(&destination.paths)
}

/// Removes the fields in which a caller may have put a credential of its own: `Authorization`, and
/// every one in which the destination takes a credential.
pub fn strip_credentials(fields: &mut HeaderMap, destination: &Destination) {
    fields.remove(AUTHORIZATION);
    for credential_use in &destination.credentials {
        let header = &credential_use.inject.header;
        if *header != AUTHORIZATION {
            fields.remove(header);
        }
    }
}

static CONNECTION_HEADERS: [HeaderName; 9] = [
    CONNECTION,
    TE,
    TRANSFER_ENCODING,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authentication-info"),
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("http2-settings"),
];

fn concerns_one_connection(name: &HeaderName) -> bool {
    *name == UPGRADE || CONNECTION_HEADERS.contains(name)
}

/// Removes from a response, final or not, what is not for the caller: what concerns the upstream
/// connection, and `Alt-Svc`, which would lead the client past the agent (RFC 7838).
pub fn strip_response(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
    headers.remove(ALT_SVC);
}

/// Removes what concerns one connection only (RFC 9110 section 7.6.1). Returns whether the request
/// asks for an upgrade; then `Connection` and `Upgrade` are set anew.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) -> bool {
    if !headers.keys().any(concerns_one_connection) {
        return false;
    }
    let mut named: Vec<HeaderName> = Vec::new();
    let mut upgrade = false;
    for value in headers.get_all(CONNECTION) {
        for option in value.as_bytes().split(|byte| *byte == b',') {
            let option = option.trim_ascii();
            if option.eq_ignore_ascii_case(b"upgrade") {
                upgrade = true;
            } else if let Ok(name) = HeaderName::from_bytes(option) {
                named.push(name);
            }
        }
    }
    for name in named {
        // A caller must not have the header removed that says where the request goes.
        if name != HOST {
            headers.remove(name);
        }
    }
    let trailers_accepted = headers
        .get_all(TE)
        .iter()
        .any(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in &CONNECTION_HEADERS {
        headers.remove(name);
    }
    if trailers_accepted {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    // An HTTP/2 inside would carry requests that nobody decides on (RFC 9113 section 3.1).
    let leads_past_us = headers.get_all(UPGRADE).iter().any(|protocol| {
        let protocol = protocol.as_bytes().to_ascii_lowercase();
        protocol.starts_with(b"h2c") || protocol.starts_with(b"tls") || protocol.contains(&b',')
    });
    match (upgrade && !leads_past_us, headers.contains_key(UPGRADE)) {
        (true, true) => {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            true
        }
        _ => {
            headers.remove(UPGRADE);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    fn stripped(headers: &[(&str, &str)]) -> (bool, Vec<String>) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        let upgrade = strip_hop_by_hop(&mut map);
        let mut left: Vec<String> = map
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        left.sort();
        (upgrade, left)
    }

    #[test]
    fn removes_what_concerns_one_connection() {
        type Row<'a> = (&'a [(&'a str, &'a str)], bool, &'a [&'a str]);
        let rows: &[Row<'_>] = &[
            (&[("accept", "*/*")], false, &["accept: */*"]),
            (
                &[
                    ("connection", "x-a, close"),
                    ("x-a", "1"),
                    ("keep-alive", "5"),
                ],
                false,
                &[],
            ),
            (
                &[("connection", "host"), ("host", "a.example")],
                false,
                &["host: a.example"],
            ),
            (
                &[
                    ("connection", "authorization"),
                    ("authorization", "Bearer a"),
                ],
                false,
                &[],
            ),
            (&[("te", "trailers")], false, &["te: trailers"]),
            (&[("te", "gzip")], false, &[]),
            (
                &[
                    ("proxy-authorization", "Basic eDp5"),
                    ("proxy-connection", "keep-alive"),
                ],
                false,
                &[],
            ),
            (&[("upgrade", "websocket")], false, &[]),
            (
                &[("connection", "Upgrade"), ("upgrade", "websocket")],
                true,
                &["connection: upgrade", "upgrade: websocket"],
            ),
            (&[("connection", "upgrade")], false, &[]),
            (&[("connection", "upgrade"), ("upgrade", "h2c")], false, &[]),
            (
                &[("connection", "upgrade"), ("upgrade", "websocket, h2c")],
                false,
                &[],
            ),
            (&[("transfer-encoding", "chunked")], false, &[]),
        ];
        for (headers, upgrade, left) in rows {
            let left: Vec<String> = left.iter().map(ToString::to_string).collect();
            assert_eq!(stripped(headers), (*upgrade, left), "{headers:?}");
        }
    }

    /// A destination that takes one credential in `authorization` and one in a header of its own.
    static TWO_HEADERS: LazyLock<Arc<Destination>> = LazyLock::new(|| {
        const CONFIGURATION: &str = r#"
version: 1
listeners: [{name: proxy, type: forward_proxy, bind: "127.0.0.1:0"}]
attestors: {unix: {}}
credentials:
  - {name: one, type: oauth_client_credentials, issuer: "https://auth.example.com", client_id: agent, client_authentication: {method: client_secret_basic, secret_file: secret}}
  - {name: two, type: oauth_client_credentials, issuer: "https://auth.example.com", client_id: agent, client_authentication: {method: client_secret_basic, secret_file: secret}}
destinations:
  - {name: api, hosts: [api.example.com], credentials: [{name: one}, {name: two, inject: {header: x-api-key}}]}
interception: {ca: {source: memory}}
policies: {directory: policies}
audit: {sinks: [{type: stdout}]}
"#;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("countersign.yaml");
        std::fs::create_dir(directory.path().join("policies")).unwrap();
        std::fs::write(directory.path().join("secret"), "secret").unwrap();
        std::fs::write(&path, CONFIGURATION).unwrap();
        let config = crate::config::Config::load(&path)
            .unwrap_or_else(|diagnostics| panic!("{}", diagnostics.render(false)));
        config.destinations.first().unwrap().clone()
    });

    /// Fields of a head or of trailers, those that hold credentials and those that name others among
    /// them.
    fn fields() -> impl Strategy<Value = HeaderMap> {
        let name = prop::sample::select(vec![
            "authorization",
            "x-api-key",
            "proxy-authorization",
            "connection",
            "te",
            "trailer",
            "upgrade",
            "host",
            "x-other",
        ]);
        let value = prop::sample::select(vec![
            "Bearer of-the-caller",
            "x-api-key",
            "authorization, x-api-key",
            "upgrade, Authorization",
            "websocket",
            "trailers",
            "",
        ]);
        prop::collection::vec((name, value), 0..12).prop_map(|fields| {
            let mut map = HeaderMap::new();
            for (name, value) in fields {
                map.append(name, HeaderValue::from_static(value));
            }
            map
        })
    }

    proptest! {
        #[test]
        fn no_input_puts_two_credentials_or_none_on_a_request(
            mut head in fields(),
            trailers in fields(),
            header in prop::sample::select(vec![AUTHORIZATION, HeaderName::from_static("x-api-key")]),
        ) {
            let destination = &*TWO_HEADERS;
            let ours = HeaderValue::from_static("Bearer ours");
            put(&mut head, destination, &header, &ours);
            let stream = crate::streams::Stream::new(Duration::from_secs(1), std::rc::Weak::new());
            stream.leads_to(Some(destination));
            let trailers = stream.without_credentials(trailers);
            let held: Vec<_> = [&head, &trailers]
                .into_iter()
                .flatten()
                .filter(|(name, _)| {
                    matches!(name.as_str(), "authorization" | "x-api-key" | "proxy-authorization")
                })
                .collect();
            prop_assert_eq!(held, vec![(&header, &ours)]);
        }
    }
}
