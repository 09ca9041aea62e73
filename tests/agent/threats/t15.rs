//! T15: tokens that are to be verified by something other than the issuer's key and its one algorithm, or
//! that two readers read differently.

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use serde_json::{Value, json};

use super::forged::{Key, Setting, claims, encode, header};
use crate::support::counts::reached;

/// The head of a SubjectPublicKeyInfo with a point of P-256 (RFC 5480).
const SPKI: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// Changes of the header under which the issuer's own signature is not to count.
fn headers() -> Vec<Value> {
    vec![
        json!({"alg": "none"}),
        json!({"alg": "None"}),
        json!({"alg": "nOnE"}),
        json!({"alg": ""}),
        json!({"alg": null}),
        json!({"alg": ["ES256"]}),
        json!({"alg": "es256"}),
        json!({"alg": "ES256K"}),
        json!({"alg": "ES384"}),
        json!({"alg": "ES512"}),
        json!({"alg": "EdDSA"}),
        json!({"alg": "RS256"}),
        json!({"alg": "PS256"}),
        json!({"alg": "HS256"}),
        json!({"crit": ["exp"], "exp": 1}),
        json!({"crit": []}),
        json!({"crit": ["b64"], "b64": false}),
        json!({"b64": false}),
        json!({"b64": true}),
        json!({"zip": "DEF"}),
        json!({"enc": "A256GCM"}),
        json!({"typ": "at+jwt"}),
        json!({"typ": "dpop+jwt"}),
        json!({"typ": "logout+jwt"}),
        json!({"typ": 1}),
        json!({"kid": ""}),
        json!({"kid": 1}),
        json!({"kid": ["issuers-key"]}),
        json!({"kid": "issuers-key\u{0}"}),
        json!({"kid": "../../issuers-key"}),
        json!({"kid": "../../../../dev/null"}),
        json!({"kid": "' UNION SELECT 'key"}),
        json!({"kid": "https://127.0.0.1/key"}),
    ]
}

/// Changes of the claims that the issuer's own key signed.
fn all_claims() -> Vec<Value> {
    vec![
        json!({"iss": null}),
        json!({"iss": "https://ci.example.test/"}),
        json!({"iss": "https://CI.example.test"}),
        json!({"iss": ["https://ci.example.test"]}),
        json!({"iss": "https://elsewhere.example.test"}),
        json!({"sub": null}),
        json!({"sub": ""}),
        json!({"sub": 7}),
        json!({"aud": null}),
        json!({"aud": []}),
        json!({"aud": "elsewhere"}),
        json!({"aud": "Countersign"}),
        json!({"aud": ["countersign", "elsewhere"]}),
        json!({"aud": {"countersign": true}}),
        json!({"exp": null}),
        json!({"exp": 1}),
        json!({"exp": "4102444800"}),
        json!({"exp": 4102444800.5}),
        json!({"exp": -1}),
        json!({"exp": u64::MAX}),
        json!({"nbf": 4102444800_u64}),
        json!({"nbf": "0"}),
        json!({"iat": 4102444800_u64}),
        json!({"repository": ["acme/orders"]}),
        json!({"repository": true}),
    ]
}

/// Tokens that the issuer's key did not sign as they stand.
fn unsigned(issuers: &Key) -> Vec<(String, String)> {
    let attackers = Key::generate();
    let good = issuers.sign(&header(json!({})), &claims(json!({})));
    let parts: Vec<&str> = good.split('.').collect();
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let mut tokens: Vec<(String, String)> = Vec::new();
    let mut add = |what: &str, token: String| tokens.push((what.to_owned(), token));

    let none = format!("{}.{}", encode(header(json!({"alg": "none"}))), parts[1]);
    add("none, and no signature", format!("{none}."));
    add("none, and no third part", none);
    // The public key is known to everybody, in whatever form it is taken for a secret.
    let spki = [&SPKI, issuers.point()].concat();
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
        STANDARD.encode(&spki)
    );
    let jwk = issuers.jwk().to_string();
    let secrets: [&[u8]; 5] = [&spki, pem.as_bytes(), issuers.point(), jwk.as_bytes(), b""];
    for secret in secrets {
        for (name, algorithm) in [("HS256", hmac::HMAC_SHA256), ("HS512", hmac::HMAC_SHA512)] {
            let signed = format!("{}.{}", encode(header(json!({"alg": name}))), parts[1]);
            let tag = hmac::sign(&hmac::Key::new(algorithm, secret), signed.as_bytes());
            add(name, format!("{signed}.{}", encode(tag)));
        }
    }
    // A key that the token brings or names.
    let own = attackers.jwk();
    for brings in [
        json!({}),
        json!({"jwk": own}),
        json!({"jwk": own, "kid": null}),
        json!({"jku": "https://127.0.0.1/jwks"}),
        json!({"x5u": "https://127.0.0.1/certificate"}),
        json!({"x5c": [STANDARD.encode(&spki)]}),
        json!({"x5t": "AAAA", "kid": null}),
        json!({"kid": "attackers-key", "jwk": own}),
    ] {
        let token = attackers.sign(&header(brings.clone()), &claims(json!({})));
        add(&brings.to_string(), token);
    }
    // CVE-2022-21449, and signatures of another form or length.
    for (what, bytes) in [
        ("zeros", vec![0; 64]),
        ("ones", vec![0xff; 64]),
        ("nothing", Vec::new()),
        ("half", issuers.signature(signed)[..32].to_vec()),
        ("a byte more", [issuers.signature(signed), vec![0]].concat()),
    ] {
        add(what, format!("{signed}.{}", encode(bytes)));
    }
    for other in [claims(json!({"sub": "other"})), claims(json!({"nbf": 0}))] {
        let token = format!("{}.{}.{signature}", parts[0], encode(other));
        add("other claims", token);
    }
    add("encrypted", format!("{good}.AAAA.AAAA"));
    add("four parts", format!("{good}.AAAA"));
    add("padded", format!("{}=.{}.{signature}", parts[0], parts[1]));
    let standard = URL_SAFE.encode(claims(json!({})));
    add(
        "padding in the claims",
        format!("{}.{standard}.{signature}", parts[0]),
    );
    add(
        "a line of JSON",
        json!({"payload": parts[1]}).to_string().replace(' ', ""),
    );
    tokens
}

/// Texts in which something stands twice, or which are no object.
fn texts() -> Vec<(String, String)> {
    let (header, claims) = (header(json!({})), claims(json!({})));
    let twice = |text: &str, field: &str| text.replacen('{', &format!("{{{field},"), 1);
    vec![
        (twice(&header, r#""alg":"none""#), claims.clone()),
        (twice(&header, r#""alg":"ES256""#), claims.clone()),
        (twice(&header, r#""kid":"issuers-key""#), claims.clone()),
        (
            header.clone(),
            twice(&claims, r#""iss":"https://elsewhere.example.test""#),
        ),
        (
            header.clone(),
            twice(&claims, r#""repository":"acme/other""#),
        ),
        (header.clone(), twice(&claims, r#""x":{"a":1,"a":2}"#)),
        (header.clone(), format!("[{claims}]")),
        (format!("[{header}]"), claims.clone()),
        (header.clone(), format!("{claims}{{}}")),
        (header, "null".to_owned()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn t15_a_token_is_verified_by_its_issuers_key_and_algorithm_alone() {
    let setting = Setting::start("").await;
    setting.good().await;
    let mut refused = 0;
    let key = &setting.key;
    let mut tokens = unsigned(key);
    for changes in headers() {
        let token = key.sign(&header(changes.clone()), &claims(json!({})));
        tokens.push((changes.to_string(), token));
    }
    for changes in all_claims() {
        let token = key.sign(&header(json!({})), &claims(changes.clone()));
        tokens.push((changes.to_string(), token));
    }
    for (header, claims) in texts() {
        tokens.push((format!("{header} {claims}"), key.sign(&header, &claims)));
    }
    for (what, token) in &tokens {
        setting.is_refused(what, token).await;
        refused += 1;
    }
    setting.good().await;
    reached("forged_tokens", refused);
}
