//! An issuer's JWK Set: a token is accepted only by a key that the set really holds, for signatures, and
//! for the token's algorithm.

use countersign_attestors::Attestation;
use serde_json::{Map, Value};

use super::tokens::{self, AUDIENCE, ED25519_X, ES256_X, ES256_Y, ISSUER, NOW};

/// One by whose key tokens are accepted.
const GOOD: &[u8] = include_bytes!("../seeds/key_set/es256.json");

/// More are not read.
const MOST_KEYS: usize = 100;

pub fn run(input: &[u8]) {
    let attestor = tokens::attestor(input);
    let document: Value = serde_json::from_slice(input).unwrap_or(Value::Null);
    let keys: Vec<&Map<String, Value>> = document["keys"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_object)
        .collect();
    let expiry = NOW + 600;
    let claims = format!(r#"{{"iss":"{ISSUER}","sub":"job","aud":"{AUDIENCE}","exp":{expiry}}}"#);
    let mut accepted = 0;
    for (algorithm, key_id) in [
        ("ES256", Some("orders")),
        ("EdDSA", Some("orders")),
        ("ES256", None),
    ] {
        let header = match key_id {
            Some(key_id) => format!(r#"{{"alg":"{algorithm}","kid":"{key_id}"}}"#),
            None => format!(r#"{{"alg":"{algorithm}"}}"#),
        };
        let token = tokens::token(header.as_bytes(), claims.as_bytes(), algorithm);
        let attested = tokens::attest(&attestor, &token.expect("a signer"));
        if let Attestation::Attested { .. } = attested {
            accepted += 1;
            assert!(
                keys.iter().any(|key| verifies(key, algorithm)
                    && key_id.is_none_or(|id| key.get("kid").is_some_and(|kid| kid == id))),
                "{algorithm} {key_id:?} is accepted by no key of the set"
            );
        }
    }
    assert!(input != GOOD || accepted == 2, "accepted {accepted} of two");
    let status = attestor.key_set_status();
    assert!(status.keys <= keys.len().min(MOST_KEYS));
    if status.keys == 0 {
        assert_eq!(status.age, None, "a set without keys is none");
    }
}

/// RFC 7517 section 4, RFC 7518 section 6.2, RFC 8037 section 2: our key, and what it is for.
fn verifies(key: &Map<String, Value>, algorithm: &str) -> bool {
    let is = |name: &str, value: &str| key.get(name).is_some_and(|held| held == value);
    let is_ours = match algorithm {
        "ES256" => is("kty", "EC") && is("crv", "P-256") && is("x", ES256_X) && is("y", ES256_Y),
        _ => is("kty", "OKP") && is("crv", "Ed25519") && is("x", ED25519_X),
    };
    let named = [
        algorithm,
        if algorithm == "EdDSA" {
            "Ed25519"
        } else {
            algorithm
        },
    ];
    is_ours
        && key
            .get("alg")
            .is_none_or(|held| named.iter().any(|name| held == name))
        && key.get("use").is_none_or(|held| held == "sig")
        && key.get("key_ops").is_none_or(|held| {
            held.as_array()
                .is_some_and(|operations| operations.iter().any(|one| one == "verify"))
        })
}
