//! Refusals on the wire: `application/problem+json` (RFC 9457) with `Proxy-Status` (RFC 9209), the
//! forms of gRPC and git, and the reason phrase, which is all that some clients show of a refusal.

use bytes::Bytes;
use http::header::{
    CONTENT_TYPE, HeaderName, HeaderValue, PROXY_AUTHENTICATE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{Response, StatusCode};
use hyper::ext::ReasonPhrase;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Serialize;

use crate::refusal::{Cause, Refusal, RefusalCode};
use crate::request_id::{REQUEST_ID_HEADER, RequestId};

/// The media type of a problem (RFC 9457 section 3).
pub const CONTENT_TYPE_PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// How long a reason phrase may be: servers and clients hold a status line in small buffers.
const REASON_PHRASE_CHARACTERS: usize = 240;

/// What the caller speaks, and therefore where it looks for a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// A proxy request in absolute form, or one inside an intercepted tunnel.
    Proxy,
    /// CONNECT: many clients hide the body, and show the reason phrase alone.
    Connect,
    /// A gateway, or the agent's own API: an origin server to the caller.
    Gateway,
    /// gRPC on any of them: trailers-only.
    Grpc,
    /// git on any of them but CONNECT: it shows a body that is text, and no other.
    Git,
}

/// The members of a problem (RFC 9457 section 3.1) and ours.
#[derive(Debug, Serialize)]
struct Problem<'a> {
    r#type: String,
    code: &'a str,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'static str>,
    request_id: String,
    detail: &'a str,
    next: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    nearest: Option<&'a str>,
}

/// Where a code is explained.
fn documentation(code: &str) -> String {
    format!(
        concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/main/docs/errors.md#{}"),
        code
    )
}

/// The response that a refusal becomes. Never says [`Refusal::internal`].
pub fn response(refusal: &Refusal, request_id: RequestId, surface: Surface) -> Response<Bytes> {
    let properties = refusal.code.properties();
    let next = properties
        .next
        .replace("REQUEST_ID", &request_id.to_string());
    let mut response = match surface {
        Surface::Grpc => trailers_only(refusal, &next),
        Surface::Git => text(refusal, &next),
        Surface::Proxy | Surface::Connect | Surface::Gateway => {
            let problem = Problem {
                r#type: documentation(properties.code),
                code: properties.code,
                status: properties.status.as_u16(),
                cause: properties.cause.map(Cause::as_str),
                request_id: request_id.to_string(),
                detail: &refusal.detail,
                next,
                nearest: refusal.nearest.as_deref(),
            };
            problem_response(properties.status, &problem)
        }
    };
    challenge(&mut response);
    if surface != Surface::Grpc
        && let Some(phrase) = reason_phrase(refusal)
    {
        response.extensions_mut().insert(phrase);
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID_HEADER, request_id.to_header_value());
    if let Ok(value) = HeaderValue::try_from(format!(
        "countersign; error={}; details=\"{}\"",
        properties.proxy_error, properties.code
    )) {
        headers.insert(PROXY_STATUS, value);
    }
    if let Some(retry_after) = refusal.retry_after {
        // Whole seconds (RFC 9110 section 10.2.3), never earlier than it is worth it.
        let seconds = retry_after.as_millis().div_ceil(1000).max(1);
        let seconds = u64::try_from(seconds).unwrap_or(u64::MAX);
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A JSON body with its media type.
pub fn json_response(status: StatusCode, value: &impl Serialize) -> Response<Bytes> {
    body_response(status, HeaderValue::from_static("application/json"), value)
}

/// A problem that is not a refusal of the data path, such as the admin socket's.
pub fn problem_response(status: StatusCode, problem: &impl Serialize) -> Response<Bytes> {
    body_response(status, CONTENT_TYPE_PROBLEM, problem)
}

fn body_response(
    status: StatusCode,
    content_type: HeaderValue,
    value: &impl Serialize,
) -> Response<Bytes> {
    // What is answered here has text keys only, and so can always be written.
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// What a 401 and a 407 must carry (RFC 9110 sections 11.6.1 and 11.7.1).
fn challenge(response: &mut Response<Bytes>) {
    const BASIC: HeaderValue = HeaderValue::from_static(r#"Basic realm="countersign""#);
    const BEARER: HeaderValue = HeaderValue::from_static(r#"Bearer realm="countersign""#);
    match response.status() {
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            // Two lines: clients that read one challenge a line find the one that they know.
            let headers = response.headers_mut();
            headers.append(PROXY_AUTHENTICATE, BASIC);
            headers.append(PROXY_AUTHENTICATE, BEARER);
        }
        StatusCode::UNAUTHORIZED => {
            response.headers_mut().insert(WWW_AUTHENTICATE, BEARER);
        }
        _ => {}
    }
}

/// `CODE: DETAIL` in visible ASCII.
fn reason_phrase(refusal: &Refusal) -> Option<ReasonPhrase> {
    let phrase: String = format!("{}: {}", refusal.code.as_str(), refusal.detail)
        .chars()
        .take(REASON_PHRASE_CHARACTERS)
        .map(|character| match character {
            ' '..='~' => character,
            _ => '?',
        })
        .collect();
    ReasonPhrase::try_from(phrase.as_bytes()).ok()
}

/// `CODE: DETAIL` and the next step, a line each.
fn text(refusal: &Refusal, next: &str) -> Response<Bytes> {
    let text = format!(
        "{}: {}\nnext: {next}\n",
        refusal.code.as_str(),
        refusal.detail
    );
    let mut response = Response::new(Bytes::from(text));
    *response.status_mut() = refusal.code.properties().status;
    let content_type = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// Trailers-Only (gRPC over HTTP/2, "Responses"): one header block with the status in it.
fn trailers_only(refusal: &Refusal, next: &str) -> Response<Bytes> {
    /// `Percent-Encoded`: everything but space to `~`, less `%`.
    const MESSAGE: &AsciiSet = &CONTROLS.add(b'%');
    let message = format!("{}: {} ({next})", refusal.code.as_str(), refusal.detail);
    let message = utf8_percent_encode(&message, MESSAGE).to_string();
    let mut response = Response::new(Bytes::new());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(grpc_status(refusal.code)));
    if let Ok(message) = HeaderValue::try_from(message) {
        headers.insert(GRPC_MESSAGE, message);
    }
    response
}

/// The gRPC status code (`grpc/doc/statuscodes.md`) that says what the HTTP status says.
pub fn grpc_status(code: RefusalCode) -> u16 {
    match code.properties().status {
        // INVALID_ARGUMENT
        StatusCode::BAD_REQUEST
        | StatusCode::MISDIRECTED_REQUEST
        | StatusCode::URI_TOO_LONG
        | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => 3,
        StatusCode::UNAUTHORIZED | StatusCode::PROXY_AUTHENTICATION_REQUIRED => 16, // UNAUTHENTICATED
        StatusCode::FORBIDDEN => 7,           // PERMISSION_DENIED
        StatusCode::METHOD_NOT_ALLOWED => 12, // UNIMPLEMENTED
        StatusCode::TOO_MANY_REQUESTS => 8,   // RESOURCE_EXHAUSTED
        StatusCode::GATEWAY_TIMEOUT => 4,     // DEADLINE_EXCEEDED
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE => 14, // UNAVAILABLE
        _ => 13,                              // INTERNAL
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::time::{Duration, SystemTime};

    fn answered(refusal: &Refusal, surface: Surface) -> (Response<Bytes>, RequestId) {
        let id = RequestId::new(SystemTime::now());
        (response(refusal, id, surface), id)
    }

    #[test]
    fn every_code_is_a_problem_on_every_surface_and_never_says_what_is_internal() {
        let mut answers = 0;
        for code in RefusalCode::ALL {
            let properties = code.properties();
            let refusal = Refusal::new(*code, "destination `o` is \u{fc}ber \r\n limit 100%")
                .with_internal("canary-internal");
            for surface in [
                Surface::Proxy,
                Surface::Connect,
                Surface::Gateway,
                Surface::Grpc,
                Surface::Git,
            ] {
                let (response, id) = answered(&refusal, surface);
                assert_eq!(response.headers()["countersign-request-id"], id.to_string());
                assert_eq!(
                    response.headers()["proxy-status"],
                    format!(
                        "countersign; error={}; details=\"{}\"",
                        properties.proxy_error, properties.code
                    )
                );
                let wire = format!("{response:?}");
                assert!(!wire.contains("canary-internal"));
                if surface == Surface::Grpc {
                    assert_eq!(response.status(), StatusCode::OK);
                    assert_eq!(
                        response.headers()["grpc-status"],
                        grpc_status(*code).to_string().as_str()
                    );
                    assert_ne!(grpc_status(*code), 13, "{code:?}");
                    let message = response.headers()["grpc-message"].to_str().unwrap();
                    assert!(
                        message.contains("%C3%BCber %0D%0A limit 100%25"),
                        "{message}"
                    );
                    assert!(response.body().is_empty());
                    assert!(response.extensions().get::<ReasonPhrase>().is_none());
                    answers += 1;
                    continue;
                }
                assert_eq!(response.status(), properties.status);
                let phrase = response.extensions().get::<ReasonPhrase>().unwrap();
                let phrase = std::str::from_utf8(phrase.as_bytes()).unwrap();
                assert!(phrase.starts_with(&format!("{}: ", properties.code)));
                assert!(phrase.ends_with("?ber ?? limit 100%"), "{phrase}");
                if surface == Surface::Git {
                    let content_type = &response.headers()["content-type"];
                    assert_eq!(content_type, "text/plain; charset=utf-8");
                    let body = std::str::from_utf8(response.body()).unwrap();
                    assert!(body.starts_with(&format!("{}: {}", properties.code, refusal.detail)));
                    assert!(body.contains("\nnext: ") && !body.contains("REQUEST_ID"));
                } else {
                    let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
                    assert_eq!(body["code"], properties.code);
                    assert_eq!(body["status"], properties.status.as_u16());
                    let cause = properties.cause.map(Cause::as_str);
                    assert_eq!(body["cause"].as_str(), cause);
                    assert_eq!(body["request_id"], id.to_string());
                    assert!(!body["next"].as_str().unwrap().contains("REQUEST_ID"));
                    assert!(body["type"].as_str().unwrap().starts_with("https://"));
                }
                answers += 1;
            }
        }
        assert_eq!(answers, 5 * RefusalCode::ALL.len());
    }

    #[test]
    fn every_trouble_of_another_server_has_one_of_four_causes() {
        // What is wrong with the agent itself, or what it was not able to look at, is none of them.
        const OWN: [RefusalCode; 5] = [
            RefusalCode::CallerHidden,
            RefusalCode::AttestationUnavailable,
            RefusalCode::AuditUnavailable,
            RefusalCode::OutOfDescriptors,
            RefusalCode::ShuttingDown,
        ];
        let mut causes = BTreeSet::new();
        for code in RefusalCode::ALL {
            let properties = code.properties();
            let is_trouble = matches!(properties.status.as_u16(), 502..=504);
            if is_trouble && !OWN.contains(code) {
                causes.insert(properties.cause.expect(properties.code).as_str());
            }
        }
        assert_eq!(causes.len(), 4, "{causes:?}");
    }

    #[test]
    fn a_denial_reads_as_in_the_documentation() {
        let refusal = Refusal::new(RefusalCode::PolicyDenied, "no policy permits it");
        let (response, id) = answered(&refusal, Surface::Proxy);
        let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(body["next"], format!("countersign policy explain {id}"));
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
        assert_eq!(
            response.headers()["proxy-status"],
            r#"countersign; error=http_request_denied; details="policy_denied""#
        );
    }

    #[test]
    fn a_missing_token_is_challenged() {
        let refusal = Refusal::new(RefusalCode::ProxyTokenRequired, "a token is needed");
        let (response, _) = answered(&refusal, Surface::Connect);
        let challenges: Vec<_> = response
            .headers()
            .get_all("proxy-authenticate")
            .iter()
            .collect();
        assert_eq!(
            challenges,
            [
                r#"Basic realm="countersign""#,
                r#"Bearer realm="countersign""#
            ]
        );
        let refusal = Refusal::new(RefusalCode::TokenRequired, "a token is needed");
        let (response, _) = answered(&refusal, Surface::Gateway);
        assert_eq!(
            response.headers()["www-authenticate"],
            r#"Bearer realm="countersign""#
        );
    }

    #[test]
    fn retry_after_is_rounded_up() {
        for (wait, seconds) in [(0, "1"), (1, "1"), (1000, "1"), (1001, "2"), (30_000, "30")] {
            let refusal = Refusal::new(RefusalCode::TokenBackoff, "later")
                .with_retry_after(Duration::from_millis(wait));
            let (response, _) = answered(&refusal, Surface::Proxy);
            assert_eq!(response.headers()["retry-after"], seconds);
        }
    }

    #[test]
    fn the_documentation_lists_the_same_codes() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/errors.md"))
            .unwrap();
        let (_, section) = text.split_once("\n## Codes\n").unwrap();
        let section = section.split("\n## ").next().unwrap();
        let mut documented = BTreeSet::new();
        for entry in section.split("\n### ").skip(1) {
            let (heading, body) = entry.split_once('\n').unwrap();
            let code = RefusalCode::ALL
                .iter()
                .find(|code| code.as_str() == heading)
                .unwrap_or_else(|| panic!("docs/errors.md has `{heading}`, which is no code"));
            assert!(
                documented.insert(heading),
                "`{heading}` is documented twice"
            );
            let properties = code.properties();
            let status = format!("Status {}", properties.status.as_u16());
            assert!(body.contains(&status), "`{heading}` lacks `{status}`");
            let cause = properties
                .cause
                .map(|cause| format!("cause label `{}`", cause.as_str()));
            assert!(
                cause.is_none_or(|cause| body.contains(&cause)),
                "`{heading}` lacks its cause label"
            );
            for member in ["**Cause.**", "**Meaning.**", "**Next step.**"] {
                assert!(body.contains(member), "`{heading}` lacks {member}");
            }
        }
        let codes: BTreeSet<&str> = RefusalCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(documented, codes);
    }
}
