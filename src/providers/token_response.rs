//! What a token endpoint's answer means (RFC 6749 section 5, RFC 6750 section 2.1). Pure: bytes in,
//! a token or a classified failure out, whatever the bytes.

use std::time::{Duration, SystemTime};

use http::StatusCode;
use http::header::{DATE, HeaderMap, RETRY_AFTER};
use secrecy::SecretString;
use serde_json::{Map, Value};
use zeroize::Zeroize;

use super::{MintFailure, Recovery};
use crate::refusal::RefusalCode;
use crate::request::printable;

/// The lifetime assumed where the server states none (RFC 6749 section 5.1 only recommends it).
pub(super) const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// No lifetime is taken to be longer than this.
const LONGEST_LIFETIME_SECONDS: u64 = 366 * 24 * 3600;

/// A successful token response.
#[derive(Debug)]
pub struct TokenResponse {
    /// The token: token68, so that it can stand in a header.
    pub access_token: SecretString,
    /// The lifetime, at least 1 s.
    pub expires_in: Duration,
    /// The scope granted, where the server said.
    pub scope: Option<String>,
}

/// The members of an answer, among them secrets: wiped when dropped.
struct Members(Map<String, Value>);

impl Drop for Members {
    fn drop(&mut self) {
        self.0.values_mut().for_each(wipe);
    }
}

/// Wipes every text in a value.
pub(crate) fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(members) => members.values_mut().for_each(wipe),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Reads an answer of a token endpoint. `now` is as in [`parse_retry_after`].
pub fn parse_token_response(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
) -> Result<TokenResponse, MintFailure> {
    let retry_after = parse_retry_after(headers, now);
    if status.is_redirection() {
        return Err(MintFailure::new(
            RefusalCode::TokenServerRedirected,
            format!("the token endpoint redirects (status {})", status.as_u16()),
            Recovery::Backoff { retry_after: None },
        ));
    }
    if status == StatusCode::TOO_MANY_REQUESTS {
        return Err(MintFailure::new(
            RefusalCode::TokenServerThrottled,
            "the authorization server asks for fewer requests (status 429)",
            Recovery::Backoff { retry_after },
        ));
    }
    if status.is_server_error() {
        return Err(MintFailure::new(
            RefusalCode::TokenServerError,
            format!("the token endpoint answered status {}", status.as_u16()),
            Recovery::Backoff { retry_after },
        ));
    }
    let members = match serde_json::from_slice(body) {
        Ok(members) => Members(members),
        Err(_) if status == StatusCode::UNAUTHORIZED => {
            return Err(oauth_error("invalid_client", None, retry_after));
        }
        Err(_) => return Err(invalid(status, body)),
    };
    if let Some(error) = members.0.get("error") {
        let description = members.0.get("error_description").and_then(Value::as_str);
        return Err(match error.as_str() {
            Some(error) => oauth_error(error, description, retry_after),
            None => unacceptable("`error` is not text"),
        });
    }
    match status {
        StatusCode::OK => parse_success(&members.0),
        StatusCode::UNAUTHORIZED => Err(oauth_error("invalid_client", None, retry_after)),
        _ => Err(invalid(status, body)),
    }
}

fn parse_success(members: &Map<String, Value>) -> Result<TokenResponse, MintFailure> {
    let token = match members.get("access_token") {
        Some(Value::String(token)) => token,
        Some(_) => return Err(unacceptable("`access_token` is not text")),
        None => return Err(unacceptable("`access_token` is missing")),
    };
    if !is_token68(token) {
        return Err(unacceptable(
            "`access_token` has characters that a header cannot carry",
        ));
    }
    match members.get("token_type") {
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("bearer") => {}
        Some(Value::String(kind)) => {
            return Err(unacceptable(&format!(
                "`token_type` is `{}`, not `Bearer`",
                printable(kind)
            )));
        }
        Some(_) => return Err(unacceptable("`token_type` is not text")),
        None => return Err(unacceptable("`token_type` is missing")),
    }
    let scope = match members.get("scope") {
        None | Some(Value::Null) => None,
        Some(Value::String(scope)) => Some(scope.clone()),
        Some(_) => return Err(unacceptable("`scope` is not text")),
    };
    Ok(TokenResponse {
        access_token: SecretString::from(token.as_str()),
        expires_in: parse_lifetime(members.get("expires_in"))?,
        scope,
    })
}

/// RFC 6749 says a number of seconds; servers in use also send it as text or as a whole float.
fn parse_lifetime(value: Option<&Value>) -> Result<Duration, MintFailure> {
    let seconds = match value {
        None | Some(Value::Null) => return Ok(DEFAULT_LIFETIME),
        Some(Value::Number(number)) => number.as_u64().or_else(|| whole_seconds(number.as_f64()?)),
        // Digits only, so that this can fail by being too large alone.
        Some(Value::String(text))
            if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            Some(text.parse().unwrap_or(u64::MAX))
        }
        Some(_) => None,
    };
    match seconds {
        Some(0) => Err(unacceptable("`expires_in` says that the token has expired")),
        Some(seconds) => Ok(Duration::from_secs(seconds.min(LONGEST_LIFETIME_SECONDS))),
        None => Err(unacceptable("`expires_in` is not a number of seconds")),
    }
}

fn whole_seconds(seconds: f64) -> Option<u64> {
    // A saturating cast: the cap is applied afterwards.
    (seconds >= 0.0).then_some(seconds as u64)
}

/// RFC 9110 section 11.2: `1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="`.
fn is_token68(text: &str) -> bool {
    let body = text.trim_end_matches('=');
    !body.is_empty()
        && body.bytes().all(|byte| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'+' | b'/')
        })
}

/// RFC 6749 section 5.2, RFC 8707 section 2.
fn oauth_error(
    error: &str,
    description: Option<&str>,
    retry_after: Option<Duration>,
) -> MintFailure {
    let error = printable(error);
    let (code, recovery) = match error.as_str() {
        "invalid_client" => (RefusalCode::InvalidClient, Recovery::Hold),
        "invalid_grant" => (RefusalCode::TokenRequestDenied, Recovery::Hold),
        "invalid_request"
        | "unsupported_grant_type"
        | "unauthorized_client"
        | "invalid_scope"
        | "invalid_target" => (RefusalCode::TokenRequestDenied, Recovery::Permanent),
        "temporarily_unavailable" | "server_error" => (
            RefusalCode::TokenServerError,
            Recovery::Backoff { retry_after },
        ),
        "slow_down" => (
            RefusalCode::TokenServerThrottled,
            Recovery::Backoff { retry_after },
        ),
        _ => (RefusalCode::TokenRequestDenied, Recovery::Hold),
    };
    let failure = MintFailure::new(
        code,
        format!("the authorization server answered `{error}`"),
        recovery,
    );
    match description {
        Some(description) => failure.with_internal(without_secrets(description)),
        None => failure,
    }
}

/// A description may quote what was sent: long words are left out.
fn without_secrets(description: &str) -> String {
    let words: Vec<&str> = description
        .split_whitespace()
        .map(|word| match word.len() > 40 {
            true => "[left out]",
            false => word,
        })
        .collect();
    printable(&words.join(" "))
}

fn invalid(status: StatusCode, body: &[u8]) -> MintFailure {
    let what = match body.is_empty() {
        true => "nothing".to_owned(),
        false => format!("{} bytes that are not a token response", body.len()),
    };
    unacceptable(&format!("status {} came with {what}", status.as_u16()))
}

fn unacceptable(reason: &str) -> MintFailure {
    MintFailure::new(
        RefusalCode::TokenResponseInvalid,
        format!("the token endpoint's answer is not acceptable: {reason}"),
        Recovery::Backoff { retry_after: None },
    )
}

/// RFC 9110 section 10.2.3: seconds, or a date, which is of the server's clock: it counts from the answer's `Date`
/// (section 6.6.1), and from `now` where there is none.
pub(super) fn parse_retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    let from = parse_date(headers).unwrap_or(now);
    Some(date.duration_since(from).unwrap_or(Duration::ZERO))
}

/// The server's wall clock when it answered.
pub(super) fn parse_date(headers: &HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()
}

#[cfg(test)]
#[path = "token_response_tests.rs"]
mod tests;
