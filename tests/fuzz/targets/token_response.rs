//! A token endpoint's answer, written as `STATUS`, headers, an empty line, the body: what is taken is a
//! token, and what is not is never quoted.

use std::time::{Duration, SystemTime};

use countersign::providers::{Recovery, parse_token_response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use secrecy::ExposeSecret;
use serde_json::Value;

/// Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110 section 5.6.7.
const NOW: Duration = Duration::from_secs(784_111_777);
const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);

const GOOD: &[u8] = include_bytes!("../seeds/token_response/success");

pub fn run(input: &[u8]) {
    let Some((status, headers, body)) = read(input) else {
        return;
    };
    let now = SystemTime::UNIX_EPOCH + NOW;
    let document: Option<Value> = serde_json::from_slice(body).ok();
    let member = |name: &str| document.as_ref()?.get(name);
    match parse_token_response(status, &headers, body, now) {
        Ok(response) => {
            let token = response.access_token.expose_secret();
            assert_eq!(status, StatusCode::OK);
            assert!(member("error").is_none(), "an error is no success");
            assert_eq!(member("access_token").and_then(Value::as_str), Some(token));
            let kind = member("token_type").and_then(Value::as_str);
            assert!(kind.is_some_and(|kind| kind.eq_ignore_ascii_case("bearer")));
            assert_eq!(
                member("scope").and_then(Value::as_str),
                response.scope.as_deref()
            );
            assert!((Duration::from_secs(1)..=YEAR).contains(&response.expires_in));
            // RFC 9110 section 11.2: what stands behind `Bearer ` and ends there.
            let is_of_token68 =
                |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
            assert!(!token.is_empty() && token.bytes().all(is_of_token68));
            assert!(HeaderValue::from_str(&format!("Bearer {token}")).is_ok());
        }
        Err(failure) => {
            assert_ne!(input, GOOD, "{failure:?}");
            let told = format!("{} {:?}", failure.detail, failure.internal);
            // Shorter ones stand in words by chance.
            if let Some(token) = member("access_token").and_then(Value::as_str)
                && token.len() > 40
            {
                assert!(!told.contains(token), "a token is told: {told}");
            }
            assert!(
                !failure.detail.contains(char::is_control),
                "{}",
                failure.detail
            );
            if let Recovery::Backoff {
                retry_after: Some(_),
            } = failure.recovery
            {
                assert!(headers.contains_key("retry-after"));
            }
        }
    }
}

fn read(input: &[u8]) -> Option<(StatusCode, HeaderMap, &[u8])> {
    let mut headers = HeaderMap::new();
    let (status, mut rest) = line(input)?;
    let status = StatusCode::from_bytes(status.get(..3)?).ok()?;
    loop {
        let (field, after) = line(rest)?;
        rest = after;
        if field.is_empty() {
            return Some((status, headers, rest));
        }
        let colon = field.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&field[..colon]).ok()?;
        let value = HeaderValue::from_bytes(field[colon + 1..].trim_ascii()).ok()?;
        headers.append(name, value);
    }
}

fn line(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = input.iter().position(|byte| *byte == b'\n')?;
    Some((&input[..end], &input[end + 1..]))
}
