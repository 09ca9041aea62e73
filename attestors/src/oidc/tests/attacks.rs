//! The table of tokens. To add one: a line with its class, what is special about it, the token, and
//! a part of the reason for which it is refused.

use std::collections::BTreeSet;
use std::sync::Arc;

use aws_lc_rs::hmac;
use aws_lc_rs::signature::KeyPair;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use serde_json::{Value, json};

use super::support::*;
use crate::counts;
use crate::evidence::PresentedToken;
use crate::oidc::why_no_issuer;
use crate::{Attestation, FailureKind};

struct Case {
    class: &'static str,
    what: String,
    token: String,
    /// A part of the reason; `None` where the token is good.
    refused: Option<&'static str>,
}

fn case(
    class: &'static str,
    what: impl Into<String>,
    token: String,
    refused: &'static str,
) -> Case {
    Case {
        class,
        what: what.into(),
        token,
        refused: Some(refused),
    }
}

fn good(class: &'static str, what: &str, token: String) -> Case {
    Case {
        class,
        what: what.to_owned(),
        token,
        refused: None,
    }
}

fn es256(header: Value, claims: Value) -> String {
    token(header, claims, Signer::Es256)
}

fn headed(fields: Value) -> String {
    es256(with(header(), fields), claims())
}

fn claiming(fields: Value) -> String {
    es256(header(), with(claims(), fields))
}

fn lacking(claim: &str) -> String {
    es256(header(), without(claims(), claim))
}

/// The claims with this text in place of `exp`'s value.
fn expiring(text: &str) -> String {
    let claims = without(claims(), "exp").to_string();
    let claims = format!(r#"{{"exp":{text},{}"#, &claims[1..]);
    token_of(&header().to_string(), &claims, Signer::Es256)
}

/// A signature by HMAC over these bytes as the shared secret.
fn symmetric(algorithm: &str, hash: hmac::Algorithm, kid: &str, secret: &[u8]) -> String {
    let header = json!({"alg": algorithm, "kid": kid, "typ": "JWT"});
    let message = format!(
        "{}.{}",
        encode(header.to_string()),
        encode(claims().to_string())
    );
    let tag = hmac::sign(&hmac::Key::new(hash, secret), message.as_bytes());
    format!("{message}.{}", encode(tag))
}

/// A good token's first two parts with another third.
fn resigned(signature: impl AsRef<[u8]>) -> String {
    let good = good_token();
    format!("{}.{}", good.rsplit_once('.').unwrap().0, encode(signature))
}

fn signature_of(token: &str) -> Vec<u8> {
    base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token.rsplit_once('.').unwrap().1)
        .unwrap()
}

/// DER of an ECDSA signature in JOSE's fixed form.
fn der(fixed: &[u8]) -> Vec<u8> {
    let integer = |half: &[u8]| {
        let mut bytes = half.to_vec();
        if bytes[0] & 0x80 != 0 {
            bytes.insert(0, 0);
        }
        [vec![2, bytes.len() as u8], bytes].concat()
    };
    let body = [integer(&fixed[..32]), integer(&fixed[32..])].concat();
    [vec![0x30, body.len() as u8], body].concat()
}

/// The order of P-256 (SEC 2 section 2.4.2).
const P256_ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6,
    0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
];

fn table() -> Vec<Case> {
    let mut cases = vec![good("good", "ES256", good_token())];
    good_tokens(&mut cases);
    algorithms(&mut cases);
    keys_in_the_token(&mut cases);
    key_ids(&mut cases);
    unusable_keys(&mut cases);
    signatures(&mut cases);
    serialisations(&mut cases);
    json_readings(&mut cases);
    header_fields(&mut cases);
    issuers(&mut cases);
    audiences(&mut cases);
    times(&mut cases);
    other_claims(&mut cases);
    cases.push(good("good", "ES256 again", good_token()));
    cases
}

fn good_tokens(cases: &mut Vec<Case>) {
    let by = |kid: &str, algorithm: &str, signer| {
        token(json!({"alg": algorithm, "kid": kid}), claims(), signer)
    };
    cases.extend([
        good("good", "ES384", by("ec384", "ES384", Signer::Es384)),
        good("good", "EdDSA", by("ed", "EdDSA", Signer::EdDsa)),
        good(
            "good",
            "Ed25519, its newer name",
            by("ed", "Ed25519", Signer::EdDsa),
        ),
        good("good", "RS256", by("rsa", "RS256", Signer::Rs256)),
        good(
            "good",
            "RS256 with a key that does not say",
            by("rsa-unsaid", "RS256", Signer::Rs256),
        ),
        good("good", "PS256", by("ps", "PS256", Signer::Ps256)),
        good("good", "no type", es256(without(header(), "typ"), claims())),
        good(
            "good",
            "a type in lower case",
            headed(json!({"typ": "jwt"})),
        ),
        good(
            "good",
            "one audience in an array",
            claiming(json!({"aud": ["countersign"]})),
        ),
        good(
            "good",
            "two audiences, both ours",
            claiming(json!({"aud": ["countersign", "countersign-staging"]})),
        ),
        good(
            "good",
            "an issuer's clock half a minute ahead",
            claiming(json!({"iat": NOW + 30, "nbf": NOW + 30})),
        ),
        good(
            "good",
            "neither iat nor nbf",
            es256(header(), without(without(claims(), "iat"), "nbf")),
        ),
        good(
            "good",
            "an embedded key that nobody reads",
            headed(json!({"jwk": elliptic_curve_key(&KEYS.attacker, "P-256", "ec")})),
        ),
        good(
            "good",
            "key URLs that nobody fetches",
            headed(json!({"jku": "https://127.0.0.1/k", "x5u": "https://169.254.169.254/"})),
        ),
    ]);
}

fn algorithms(cases: &mut Vec<Case>) {
    let unsigned = |algorithm: &str, signature: &str| {
        let header = json!({"alg": algorithm, "kid": "ec", "typ": "JWT"});
        format!(
            "{}.{}.{signature}",
            encode(header.to_string()),
            encode(claims().to_string())
        )
    };
    for name in ["none", "None", "NONE", "nOnE"] {
        cases.push(case("none", name, unsigned(name, ""), "is signed by"));
    }
    cases.push(case(
        "none",
        "with a signature",
        headed(json!({"alg": "none"})),
        "is signed by",
    ));
    cases.push(case(
        "empty signature",
        "ES256",
        unsigned("ES256", ""),
        "signature",
    ));

    let components = KEYS.rsa.public_key();
    let der = components.as_ref();
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
        STANDARD.encode(der)
    );
    let jwk = rsa_key("rsa").to_string();
    for (what, secret) in [
        ("PEM", pem.as_bytes()),
        ("DER", der),
        ("JWK", jwk.as_bytes()),
    ] {
        cases.push(case(
            "RS to HS",
            what,
            symmetric("HS256", hmac::HMAC_SHA256, "rsa", secret),
            "is signed by",
        ));
    }
    cases.push(case(
        "RS to HS",
        "HS384",
        symmetric("HS384", hmac::HMAC_SHA384, "rsa", der),
        "is signed by",
    ));
    cases.push(case(
        "RS to HS",
        "HS512",
        symmetric("HS512", hmac::HMAC_SHA512, "rsa", der),
        "is signed by",
    ));
    let point = KEYS.p256.public_key().as_ref();
    cases.push(case(
        "ES to HS",
        "the point",
        symmetric("HS256", hmac::HMAC_SHA256, "ec", point),
        "is signed by",
    ));
    let shared = b"0123456789abcdef0123456789abcdef";
    cases.push(case(
        "symmetric key in the set",
        "HS256",
        symmetric("HS256", hmac::HMAC_SHA256, "symmetric", shared),
        "is signed by",
    ));

    for (what, kid, algorithm, signer) in [
        ("RS512 by a key for RS256", "rsa", "RS512", Signer::Rs512),
        ("PS256 by a key for RS256", "rsa", "PS256", Signer::Ps256),
        ("RS256 by a key for PS256", "ps", "RS256", Signer::Rs256),
        (
            "PS256 by a key that does not say",
            "rsa-unsaid",
            "PS256",
            Signer::Ps256,
        ),
        ("ES256 named for an RSA key", "rsa", "ES256", Signer::Es256),
        ("ES384 named for a P-256 key", "ec", "ES384", Signer::Es384),
        ("EdDSA named for a P-256 key", "ec", "EdDSA", Signer::EdDsa),
        (
            "ES256 named for an Ed25519 key",
            "ed",
            "ES256",
            Signer::Es256,
        ),
    ] {
        let token = token(json!({"alg": algorithm, "kid": kid}), claims(), signer);
        cases.push(case(
            "algorithm of another key",
            what,
            token,
            "another algorithm than its key",
        ));
    }
    for name in ["es256", "Es256", "ES256 ", "ES256\0"] {
        cases.push(case(
            "algorithm's spelling",
            name.escape_debug().to_string(),
            headed(json!({"alg": name})),
            "is signed by",
        ));
    }
    for name in ["ES512", "ES256K", "RSA-OAEP", "dir", "A128KW", "XX256", ""] {
        cases.push(case(
            "unknown algorithm",
            name,
            headed(json!({"alg": name})),
            "is signed by",
        ));
    }
    cases.push(case(
        "algorithm's type",
        "missing",
        es256(without(header(), "alg"), claims()),
        "header field `alg`",
    ));
    for value in [
        json!(256),
        json!(null),
        json!(["ES256"]),
        json!({"alg": "ES256"}),
    ] {
        cases.push(case(
            "algorithm's type",
            value.to_string(),
            headed(json!({"alg": value})),
            "header field `alg`",
        ));
    }
}

fn keys_in_the_token(cases: &mut Vec<Case>) {
    let own = elliptic_curve_key(&KEYS.attacker, "P-256", "ec");
    let forged = |fields: Value| token(with(header(), fields), claims(), Signer::Attacker);
    let certificate = STANDARD.encode(KEYS.attacker.public_key().as_ref());
    cases.extend([
        case(
            "embedded jwk",
            "under a published key id",
            forged(json!({"jwk": own})),
            "signature is not",
        ),
        case(
            "embedded jwk",
            "under its own key id",
            forged(json!({"jwk": own, "kid": "mine"})),
            "not in its issuer's key set",
        ),
        case(
            "embedded jwk",
            "without a key id",
            token(
                json!({"alg": "ES256", "jwk": own}),
                claims(),
                Signer::Attacker,
            ),
            "names no key",
        ),
        case(
            "jku",
            "the attacker's server",
            forged(json!({"jku": "https://attacker.example/keys"})),
            "signature is not",
        ),
        case(
            "jku",
            "metadata",
            forged(json!({"jku": "http://169.254.169.254/", "kid": "x"})),
            "not in its issuer's key set",
        ),
        case(
            "x5u",
            "the attacker's server",
            forged(json!({"x5u": "https://attacker.example/chain"})),
            "signature is not",
        ),
        case(
            "x5c",
            "the attacker's certificate",
            forged(json!({"x5c": [certificate]})),
            "signature is not",
        ),
        case(
            "key of somebody else",
            "under a published key id",
            forged(json!({})),
            "signature is not",
        ),
    ]);
}

fn key_ids(cases: &mut Vec<Case>) {
    let long = "k".repeat(1025);
    let unknown = "not in its issuer's key set";
    for (class, kid, refused) in [
        ("kid as path", "../../../../dev/null", unknown),
        ("kid as path", "/etc/hostname", unknown),
        ("kid as SQL", "ec' OR '1'='1", unknown),
        ("kid as SQL", "x' UNION SELECT 'key' -- ", unknown),
        ("kid as URL", "https://attacker.example/key", unknown),
        ("kid as command", "ec|id", unknown),
        ("kid's spelling", "EC", unknown),
        ("kid's spelling", "ec\0", unknown),
        ("kid's spelling", "ec ", unknown),
        ("kid empty", "", "key id is empty"),
        ("kid over 1 KB", long.as_str(), "key id is empty or longer"),
    ] {
        cases.push(case(
            class,
            kid.escape_debug().to_string(),
            headed(json!({"kid": kid})),
            refused,
        ));
    }
    for value in [
        json!(1),
        json!(null),
        json!(["ec"]),
        json!({"kid": "ec"}),
        json!(true),
    ] {
        cases.push(case(
            "kid's type",
            value.to_string(),
            headed(json!({"kid": value})),
            "header field `kid`",
        ));
    }
    cases.push(case(
        "kid missing",
        "with several keys",
        es256(without(header(), "kid"), claims()),
        "names no key",
    ));
}

fn unusable_keys(cases: &mut Vec<Case>) {
    let unknown = "not in its issuer's key set";
    cases.push(case(
        "RSA under 2048 bits",
        "1024",
        WEAK_TOKEN.to_owned(),
        unknown,
    ));
    for (class, kid) in [
        ("key for encryption", "for-encryption"),
        ("key for other operations", "for-signing"),
        ("key that contradicts itself", "says-rsa"),
        ("symmetric key in the set", "symmetric"),
    ] {
        cases.push(case(class, kid, headed(json!({"kid": kid})), unknown));
    }
}

fn signatures(cases: &mut Vec<Case>) {
    let fixed = signature_of(&good_token());
    let zero = [0_u8; 32];
    let mut flipped = signature_of(&good_token());
    flipped[40] ^= 1;
    let refused = "signature is not";
    for (class, what, signature) in [
        (
            "ECDSA r or s out of range",
            "r = s = 0",
            [zero, zero].concat(),
        ),
        (
            "ECDSA r or s out of range",
            "r = 0",
            [&zero, &fixed[32..]].concat(),
        ),
        (
            "ECDSA r or s out of range",
            "s = 0",
            [&fixed[..32], &zero].concat(),
        ),
        (
            "ECDSA r or s out of range",
            "r = s = n",
            [P256_ORDER, P256_ORDER].concat(),
        ),
        ("ECDSA r or s out of range", "all ones", vec![0xff; 64]),
        (
            "DER-encoded ECDSA",
            "of a right signature",
            der(&signature_of(&good_token())),
        ),
        ("signature's length", "one byte less", fixed[..63].to_vec()),
        (
            "signature's length",
            "one byte more",
            [&fixed[..], &[0]].concat(),
        ),
        ("signature's length", "twice", [&fixed[..], &fixed].concat()),
        ("signature of something else", "a bit flipped", flipped),
        (
            "signature of something else",
            "of other bytes",
            Signer::Es256.sign(b"other bytes"),
        ),
    ] {
        cases.push(case(class, what, resigned(signature), refused));
    }
    let good = good_token();
    let parts: Vec<&str> = good.split('.').collect();
    let other = encode(with(claims(), json!({"sub": "admin"})).to_string());
    cases.push(case(
        "claims swapped",
        "another subject",
        format!("{}.{other}.{}", parts[0], parts[2]),
        refused,
    ));
    let other = encode(with(header(), json!({"x": 1})).to_string());
    cases.push(case(
        "header swapped",
        "another field",
        format!("{other}.{}.{}", parts[1], parts[2]),
        refused,
    ));
    let rsa = |signature: Vec<u8>| {
        let message = format!(
            "{}.{}",
            encode(json!({"alg": "RS256", "kid": "rsa"}).to_string()),
            encode(claims().to_string())
        );
        format!("{message}.{}", encode(signature))
    };
    cases.push(case(
        "RSA signature out of range",
        "zero",
        rsa(vec![0; 256]),
        refused,
    ));
    cases.push(case(
        "RSA signature out of range",
        "one",
        rsa([vec![0; 255], vec![1]].concat()),
        refused,
    ));
}

fn serialisations(cases: &mut Vec<Case>) {
    let good = good_token();
    let parts: Vec<&str> = good.split('.').collect();
    let (header_part, claims_part, signature_part) = (parts[0], parts[1], parts[2]);
    let not_compact = "three parts of base64url";
    let flattened =
        json!({"protected": header_part, "payload": claims_part, "signature": signature_part});
    let general = json!({"payload": claims_part, "signatures": [{"protected": header_part, "signature": signature_part}]});
    let encrypted = json!({"alg": "RSA-OAEP", "enc": "A256GCM"}).to_string();
    cases.extend([
        case(
            "JSON serialisation",
            "flattened",
            flattened.to_string(),
            not_compact,
        ),
        case(
            "JSON serialisation",
            "general",
            general.to_string(),
            not_compact,
        ),
        case(
            "JWE",
            "five parts",
            format!("{}.a.b.c.d", encode(encrypted)),
            "encrypted",
        ),
        case("JWE", "five empty parts", "....".to_owned(), "encrypted"),
        case("number of parts", "none", String::new(), not_compact),
        case(
            "number of parts",
            "two",
            format!("{header_part}.{claims_part}"),
            not_compact,
        ),
        case("number of parts", "four", format!("{good}."), not_compact),
        case(
            "number of parts",
            "three empty",
            "..".to_owned(),
            "not a JSON object",
        ),
        case(
            "base64",
            "padding",
            format!(
                "{header_part}.{claims_part}.{}",
                URL_SAFE.encode(signature_of(&good))
            ),
            not_compact,
        ),
        case(
            "base64",
            "the other alphabet",
            format!(
                "{header_part}.{claims_part}.{}",
                STANDARD_NO_PAD.encode([0xff; 64])
            ),
            not_compact,
        ),
        case(
            "base64",
            "a line feed",
            format!("{header_part}.{claims_part}\n.{signature_part}"),
            not_compact,
        ),
        case(
            "base64",
            "a space in front",
            format!(" {good}"),
            not_compact,
        ),
        case(
            "base64",
            "a zero byte behind",
            format!("{good}\0"),
            not_compact,
        ),
        case(
            "base64",
            "bits left over",
            format!(
                "{header_part}.{claims_part}.{}B",
                &signature_part[..signature_part.len() - 1]
            ),
            not_compact,
        ),
        case(
            "scheme in front",
            "Bearer",
            format!("Bearer {good}"),
            not_compact,
        ),
        case("garbage", "text", "not a token".to_owned(), not_compact),
        case(
            "garbage",
            "other scripts",
            "токен.токен.токен".to_owned(),
            not_compact,
        ),
        case(
            "too long",
            "a header of 1 MB",
            headed(json!({"x": "y".repeat(1 << 20)})),
            "bytes long; at most 16384",
        ),
        case(
            "too long",
            "claims of 20 KB",
            claiming(json!({"x": "y".repeat(20_000)})),
            "bytes long; at most 16384",
        ),
        case(
            "header too long",
            "9 KB",
            headed(json!({"x": "y".repeat(6_500)})),
            "header is",
        ),
    ]);
}

fn json_readings(cases: &mut Vec<Case>) {
    let text = claims().to_string();
    let twice = |first: &str| {
        let claims = format!("{{{first},{}", &text[1..]);
        token_of(&header().to_string(), &claims, Signer::Es256)
    };
    let duplicate = "without duplicate keys";
    for (what, first) in [
        ("sub", r#""sub":"admin""#),
        ("aud", r#""aud":"other""#),
        ("exp", r#""exp":1"#),
        ("iss", r#""iss":"https://other.example""#),
        ("sub, written with an escape", r#""\u0073ub":"admin""#),
        ("inside a claim", r#""a":{"b":1,"b":2}"#),
        ("inside an array", r#""a":[{"b":1,"b":2}]"#),
    ] {
        cases.push(case("duplicate keys", what, twice(first), duplicate));
    }
    for header in [
        r#"{"alg":"none","alg":"ES256","kid":"ec"}"#,
        r#"{"alg":"ES256","kid":"x","kid":"ec"}"#,
    ] {
        cases.push(case(
            "duplicate keys",
            header,
            token_of(header, &text, Signer::Es256),
            duplicate,
        ));
    }
    for header in [
        "[]",
        "\"ES256\"",
        "null",
        "",
        "{",
        r#"{"alg":"ES256"} x"#,
        "\u{feff}{\"alg\":\"ES256\"}",
        r#"{"alg":"ES256",}"#,
        r#"{'alg':'ES256'}"#,
    ] {
        cases.push(case(
            "header not an object",
            header,
            token_of(header, &text, Signer::Es256),
            "header is not a JSON object",
        ));
    }
    for claims in ["[]", "null", "1", "", "{}{}", &"[".repeat(2_000)] {
        let what: String = claims.chars().take(10).collect();
        cases.push(case(
            "claims not an object",
            what,
            token_of(&header().to_string(), claims, Signer::Es256),
            "claims is not a JSON object",
        ));
    }
    let message = format!(
        "{}.{}",
        encode(header().to_string()),
        encode([b"{\"sub\":\"", &[0xff_u8, 0xfe][..], b"\"}"].concat())
    );
    let signed = encode(Signer::Es256.sign(message.as_bytes()));
    cases.push(case(
        "not UTF-8",
        "in a claim",
        format!("{message}.{signed}"),
        "claims is not a JSON object",
    ));
}

fn header_fields(cases: &mut Vec<Case>) {
    for value in [
        json!(["unknown"]),
        json!([]),
        json!(["exp"]),
        json!(["b64"]),
        json!("exp"),
        json!(null),
    ] {
        cases.push(case(
            "crit",
            value.to_string(),
            headed(json!({"crit": value, "unknown": 1})),
            "extension by `crit`",
        ));
    }
    cases.push(case(
        "b64",
        "false",
        headed(json!({"b64": false})),
        "extension by `b64`",
    ));
    cases.push(case(
        "b64",
        "false, and critical",
        headed(json!({"b64": false, "crit": ["b64"]})),
        "extension by `crit`",
    ));
    cases.push(case(
        "b64",
        "true",
        headed(json!({"b64": true})),
        "extension by `b64`",
    ));
    cases.push(case(
        "zip",
        "DEF",
        headed(json!({"zip": "DEF"})),
        "extension by `zip`",
    ));
    cases.push(case(
        "enc",
        "in a signed token",
        headed(json!({"enc": "A256GCM"})),
        "extension by `enc`",
    ));
    for kind in [
        "dpop+jwt",
        "client-authentication+jwt",
        "logout+jwt",
        "at+jwt",
        "wpt+jwt",
        "",
    ] {
        cases.push(case(
            "token of another kind",
            kind,
            headed(json!({"typ": kind})),
            "a JWT is due",
        ));
    }
    cases.push(case(
        "type's type",
        "a number",
        headed(json!({"typ": 1})),
        "header field `typ`",
    ));
}

fn issuers(cases: &mut Vec<Case>) {
    let other = "is not configured";
    for (class, issuer) in [
        ("issuer's spelling", "https://ci.example.com/"),
        ("issuer's spelling", "https://CI.example.com"),
        ("issuer's spelling", "https://ci.example.com:443"),
        ("issuer's spelling", "http://ci.example.com"),
        ("issuer's spelling", "ci.example.com"),
        ("issuer's spelling", "https://ci.example.com?x=1"),
        (
            "issuer's spelling",
            "https://ci.example.com@attacker.example",
        ),
        ("another issuer", "https://attacker.example"),
        ("issuer that steers a fetch", "https://127.0.0.1"),
        ("issuer that steers a fetch", "https://169.254.169.254"),
        ("issuer that steers a fetch", "https://169.254.0.1/latest"),
        ("issuer that steers a fetch", "https://[::1]:8443"),
        ("issuer that steers a fetch", "file:///etc/passwd"),
    ] {
        cases.push(case(class, issuer, claiming(json!({"iss": issuer})), other));
    }
    cases.push(case(
        "issuer's type",
        "missing",
        lacking("iss"),
        "claim `iss` is missing",
    ));
    for value in [json!(1), json!(null), json!([ISSUER]), json!("")] {
        cases.push(case(
            "issuer's type",
            value.to_string(),
            claiming(json!({"iss": value})),
            "claim `iss` is not",
        ));
    }
}

fn audiences(cases: &mut Vec<Case>) {
    cases.push(case(
        "audience missing",
        "no claim",
        lacking("aud"),
        "has no audience",
    ));
    cases.push(case(
        "audience missing",
        "an empty array",
        claiming(json!({"aud": []})),
        "has no audience",
    ));
    for value in [
        json!(1),
        json!(null),
        json!(true),
        json!({"countersign": 1}),
        json!([["countersign"]]),
        json!(["countersign", 1]),
        json!(["countersign", null]),
    ] {
        cases.push(case(
            "audience's type",
            value.to_string(),
            claiming(json!({"aud": value})),
            "claim `aud` is not",
        ));
    }
    for value in [
        "",
        "Countersign",
        "countersign/",
        " countersign",
        "counter",
        "countersign,other",
        "https://github.com/acme",
        "*",
    ] {
        cases.push(case(
            "another audience",
            value,
            claiming(json!({"aud": value})),
            "is for audience",
        ));
    }
    cases.push(case(
        "several audiences",
        "one is somebody else",
        claiming(json!({"aud": ["countersign", "other"]})),
        "is for audience `other`",
    ));
    cases.push(case(
        "several audiences",
        "all are somebody else",
        claiming(json!({"aud": ["a", "b"]})),
        "is for audience",
    ));
}

fn times(cases: &mut Vec<Case>) {
    cases.push(case(
        "exp missing",
        "no claim",
        lacking("exp"),
        "claim `exp` is missing",
    ));
    for text in [
        "\"4102444800\"",
        "null",
        "true",
        "[4102444800]",
        "{}",
        "-1",
        "4102444800.0",
        "4102444800.5",
        "4e9",
        "18446744073709551615",
        "18446744073709551616",
    ] {
        cases.push(case(
            "exp's type",
            text,
            expiring(text),
            "claim `exp` is not",
        ));
    }
    cases.push(case(
        "exp's range",
        "1e400",
        expiring("1e400"),
        "not a JSON object",
    ));
    for (what, exp) in [("now", NOW), ("a second ago", NOW - 1), ("in 1970", 0)] {
        cases.push(case("expired", what, expiring(&exp.to_string()), "expired"));
    }
    for claim in ["nbf", "iat"] {
        cases.push(case(
            "not yet",
            claim,
            claiming(json!({claim: NOW + 120})),
            "not yet valid",
        ));
        for value in [json!("1"), json!(1.5), json!(null), json!([1])] {
            cases.push(case(
                "nbf's and iat's type",
                format!("{claim} {value}"),
                claiming(json!({claim: value})),
                "whole number",
            ));
        }
    }
}

fn other_claims(cases: &mut Vec<Case>) {
    cases.push(case(
        "subject",
        "missing",
        lacking("sub"),
        "claim `sub` is missing",
    ));
    for value in [json!(""), json!(1), json!(null), json!(["job"])] {
        cases.push(case(
            "subject",
            value.to_string(),
            claiming(json!({"sub": value})),
            "claim `sub` is not",
        ));
    }
    for (claim, value) in [
        ("repository_id", json!(74)),
        ("repository_id", json!(["74"])),
        ("repository_id", json!(null)),
        ("run", json!("5")),
        ("run", json!(5.0)),
        ("run", json!(u64::MAX)),
        ("protected", json!("true")),
        ("protected", json!(1)),
        ("labels", json!("linux")),
        ("labels", json!(["linux", 1])),
    ] {
        cases.push(case(
            "claim of another type",
            format!("{claim} {value}"),
            claiming(json!({claim: value})),
            "is not",
        ));
    }
}

#[tokio::test]
async fn every_token_of_the_table_meets_its_fate() {
    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let attestor = attestor(&issuer, &clock);
    let cases = table();
    for case in &cases {
        let told = format!("{}: {}", case.class, case.what);
        match (attest(&attestor, &case.token).await, case.refused) {
            (Attestation::Attested { groups, .. }, None) => {
                assert_eq!(groups["ci"]["sub"].to_string(), "job", "{told}");
            }
            (Attestation::Failed { kind, detail }, Some(refused)) => {
                assert_eq!(kind, FailureKind::InvalidEvidence, "{told}: {detail}");
                assert!(detail.contains(refused), "{told}: {detail}");
            }
            // What no issuer takes is explained in another place.
            (Attestation::NotApplicable, Some(refused)) => {
                let detail = why_no_issuer(&PresentedToken::new(case.token.clone()));
                assert!(detail.contains(refused), "{told}: {detail}");
            }
            (outcome, _) => panic!("{told}: {outcome:?}"),
        }
    }

    let refused: Vec<&Case> = cases.iter().filter(|case| case.refused.is_some()).collect();
    let classes: BTreeSet<&str> = refused.iter().map(|case| case.class).collect();
    counts::expect("tokens-refused", refused.len());
    counts::expect("tokens-refused-classes", classes.len());
    counts::expect("tokens-accepted", cases.len() - refused.len());
    // The whole table caused two fetches: the first key set, and one for the first unknown key.
    assert_eq!(issuer.key_requests(), 2);
}
