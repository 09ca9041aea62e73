use http::HeaderValue;
use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::*;
use crate::counts::reached_in;

/// A case of `tests/corpora/token-responses.yaml`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    status: u16,
    retry_after: Option<String>,
    body: String,
    expect: String,
}

/// Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110 section 5.6.7.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
}

fn describe(outcome: Result<TokenResponse, MintFailure>) -> String {
    match outcome {
        Ok(token) => {
            let seconds = token.expires_in.as_secs();
            match token.scope {
                Some(scope) => format!("token {seconds} {scope}"),
                None => format!("token {seconds}"),
            }
        }
        Err(failure) => {
            let code = failure.code.as_str();
            match failure.recovery {
                Recovery::Backoff {
                    retry_after: Some(wait),
                } => format!("{code} backoff not before {}", wait.as_secs()),
                Recovery::Backoff { retry_after: None } => format!("{code} backoff"),
                Recovery::Hold => format!("{code} hold"),
                Recovery::Permanent => format!("{code} permanent"),
            }
        }
    }
}

#[test]
fn answers_mean_what_the_corpus_says() {
    let corpus = include_str!("../../tests/corpora/token-responses.yaml");
    let cases: Vec<Case> = serde_saphyr::from_str(corpus).unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let mut headers = HeaderMap::new();
        if let Some(retry_after) = &case.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from_str(retry_after).unwrap());
        }
        let status = StatusCode::from_u16(case.status).unwrap();
        let found = describe(parse_token_response(
            status,
            &headers,
            case.body.as_bytes(),
            now(),
        ));
        if found != case.expect {
            wrong.push(format!(
                "{status} `{}`: {found}, not {}",
                case.body, case.expect
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    reached_in("corpora", "token_responses", cases.len());
    let classes = corpus.matches("\n## ").count();
    reached_in("corpora", "token_responses_classes", classes);
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let body = b"{\"access_token\":\"ab\xff\",\"token_type\":\"Bearer\"}";
    let outcome = parse_token_response(StatusCode::OK, &HeaderMap::new(), body, now());
    assert_eq!(describe(outcome), "token_response_invalid backoff");
}

#[test]
fn what_the_server_quotes_is_not_repeated() {
    let secret = "s".repeat(60);
    let body = format!(
        "{{\"error\":\"invalid_client\",\"error_description\":\"assertion {secret} is wrong\"}}"
    );
    let failure = parse_token_response(
        StatusCode::UNAUTHORIZED,
        &HeaderMap::new(),
        body.as_bytes(),
        now(),
    )
    .unwrap_err();
    assert!(!format!("{failure:?}").contains(&secret));
    assert_eq!(
        failure.internal.as_deref(),
        Some("assertion [left out] is wrong")
    );
}

proptest! {
    #[test]
    fn no_answer_makes_it_panic_or_yields_a_token_that_a_header_cannot_carry(
        status in 100_u16..600,
        token in ".{0,20}",
        kind in "(?i:bearer)|.{0,6}",
        lifetime in "-?[0-9]{1,25}(\\.[0-9]{1,3})?(e[0-9]{1,3})?",
        noise in prop::collection::vec(any::<u8>(), 0..40),
        keep in 0_usize..200,
    ) {
        let body = format!(
            "{{\"access_token\":{},\"token_type\":{},\"expires_in\":{lifetime}}}",
            Value::from(token.as_str()),
            Value::from(kind.as_str()),
        );
        let status = StatusCode::from_u16(status).unwrap();
        for bytes in [body.as_bytes(), &noise, body.as_bytes().get(..keep).unwrap_or_default()] {
            if let Ok(response) = parse_token_response(status, &HeaderMap::new(), bytes, now()) {
                prop_assert_eq!(status, StatusCode::OK);
                prop_assert!(HeaderValue::from_str(response.access_token.expose_secret()).is_ok());
                prop_assert!(response.expires_in >= Duration::from_secs(1));
            }
        }
    }
}
