//! A presented token. Three lines are a header, claims and who signs; anything else is the token itself.
//! What is accepted was signed by the issuer, for us, by the algorithm of its key, and has not expired.

use std::time::{Duration, SystemTime};

use countersign_attestors::{Attestation, AttributeValue, OidcAttestor};
use serde_json::{Map, Value};

use super::tokens::{self, AUDIENCE, ISSUER, NOW};

/// One that is accepted.
const GOOD: &[u8] = include_bytes!("../seeds/jwt/a-good-token");

thread_local! {
    static ATTESTOR: OidcAttestor = tokens::attestor(
        format!(
            r#"{{"keys":[{{"kty":"EC","crv":"P-256","kid":"orders","alg":"ES256","use":"sig","x":"{}","y":"{}"}}]}}"#,
            tokens::ES256_X,
            tokens::ES256_Y,
        )
        .as_bytes(),
    );
}

pub fn run(input: &[u8]) {
    let lines: Vec<&[u8]> = input
        .trim_ascii_end()
        .splitn(3, |byte| *byte == b'\n')
        .collect();
    let [header, claims, signer] = lines.as_slice() else {
        if let Ok(token) = std::str::from_utf8(input) {
            // Nobody who has not the key makes one.
            assert!(!matches!(attest(token), Attestation::Attested { .. }));
        }
        return;
    };
    let signer = std::str::from_utf8(signer).unwrap_or_default();
    let Some(token) = tokens::token(header, claims, signer) else {
        return;
    };
    match attest(&token) {
        Attestation::Attested {
            groups,
            valid_until,
        } => {
            assert_eq!(signer, "ES256", "accepted, and signed by {signer}");
            let (header, claims) = (object(header), object(claims));
            header_is_plain(&header);
            claims_are_ours(&claims);
            let expiry = claims["exp"].as_u64().map(Duration::from_secs);
            assert_eq!(valid_until, expiry.map(|at| SystemTime::UNIX_EPOCH + at));
            for (name, value) in &groups["ci"] {
                assert!(states(value, &claims[name]), "{name}: {value:?}");
            }
        }
        Attestation::Failed { detail, .. } => {
            assert_ne!(input, GOOD, "{detail}");
            assert!(!detail.contains(char::is_control), "{detail:?}");
            assert!(!detail.contains(&token), "the token is told: {detail}");
        }
        Attestation::NotApplicable => assert_ne!(input, GOOD),
    }
}

fn attest(token: &str) -> Attestation {
    ATTESTOR.with(|attestor| tokens::attest(attestor, token))
}

fn object(text: &[u8]) -> Map<String, Value> {
    serde_json::from_slice(text).expect("what was accepted is an object")
}

/// RFC 7515 section 4.1, RFC 8725 sections 3.1 and 3.11.
fn header_is_plain(header: &Map<String, Value>) {
    assert_eq!(header["alg"], "ES256");
    assert!(header.get("kid").is_none_or(|kid| kid == "orders"));
    for extension in ["crit", "b64", "zip", "enc"] {
        assert!(!header.contains_key(extension), "{extension}");
    }
    let kind = header
        .get("typ")
        .map(|kind| kind.as_str().expect("text").to_lowercase());
    assert!(kind.is_none_or(|kind| kind == "jwt" || kind == "application/jwt"));
}

/// RFC 7519 section 4.1.
fn claims_are_ours(claims: &Map<String, Value>) {
    assert_eq!(claims["iss"], ISSUER);
    assert!(
        claims["sub"]
            .as_str()
            .is_some_and(|subject| !subject.is_empty())
    );
    match &claims["aud"] {
        Value::String(audience) => assert_eq!(audience, AUDIENCE),
        Value::Array(audiences) => {
            assert!(!audiences.is_empty() && audiences.iter().all(|audience| audience == AUDIENCE));
        }
        other => panic!("audience {other}"),
    }
    assert!(claims["exp"].as_u64().is_some_and(|expiry| expiry > NOW));
    for claim in ["nbf", "iat"] {
        if let Some(time) = claims.get(claim) {
            assert!(
                time.as_u64().is_some_and(|time| time <= NOW + 60),
                "{claim} {time}"
            );
        }
    }
}

fn states(value: &AttributeValue, claim: &Value) -> bool {
    match value {
        AttributeValue::String(text) => claim.as_str() == Some(text),
        AttributeValue::Long(number) => claim.as_i64() == Some(*number),
        AttributeValue::Boolean(truth) => claim.as_bool() == Some(*truth),
        AttributeValue::StringSet(texts) => claim.as_array().is_some_and(|items| {
            let all: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
            all.is_some_and(|all| {
                all.iter().all(|text| texts.contains(*text))
                    && texts.iter().all(|text| all.contains(&text.as_str()))
            })
        }),
    }
}
