//! Reads a token strictly, before anything in it is believed.

use std::collections::BTreeSet;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::keys::accepted_algorithm;

const LARGEST_TOKEN: usize = 16 * 1024;
const LARGEST_HEADER: usize = 8 * 1024;
const LARGEST_KEY_ID: usize = 1024;

/// A token in JWS compact serialisation (RFC 7515 section 3.1) whose signature nobody has checked.
#[derive(Debug)]
pub(super) struct UnverifiedToken<'a> {
    pub(super) header: Header,
    pub(super) claims: Map<String, Value>,
    /// The bytes that are signed (RFC 7515 section 5.2).
    pub(super) signed: &'a str,
    pub(super) signature: Vec<u8>,
}

/// What is read of a JOSE header. `jwk`, `jku`, `x5u` and `x5c` are not: a token does not bring its
/// own key.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) algorithm: jsonwebtoken::Algorithm,
    pub(super) key_id: Option<String>,
}

/// What is wrong with a token. Stands in records; says nothing that is secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidToken {
    #[error("the presented token is {0} bytes long; at most 16384 are read")]
    TooLong(usize),
    #[error("the presented token's header is {0} bytes long; at most 8192 are read")]
    HeaderTooLong(usize),
    #[error("the presented token is encrypted (JWE); a signed one is due")]
    Encrypted,
    #[error(
        "the presented token is not three parts of base64url with dots between (JWS compact serialisation)"
    )]
    NotCompact,
    #[error("the presented token's {part} is not a JSON object without duplicate keys: {detail}")]
    NotJson { part: &'static str, detail: String },
    #[error("the presented token's header field `{0}` is not of its proper type")]
    HeaderField(&'static str),
    #[error("the presented token's header demands an extension by `{0}`, and none is known")]
    Extension(&'static str),
    #[error("the presented token's type is `{0}`; a JWT is due")]
    Type(String),
    #[error(
        "the presented token is signed by `{0}`; only RS, PS and ES 256 to 512 and EdDSA are accepted"
    )]
    Algorithm(String),
    #[error("the presented token's key id is empty or longer than 1024 bytes")]
    KeyId,
    #[error("the presented token names no key, and its issuer has several")]
    KeyIdMissing,
    #[error("the presented token's key is not in its issuer's key set")]
    UnknownKey,
    #[error("the presented token is signed by another algorithm than its key is for")]
    AlgorithmOfKey,
    #[error("the presented token's signature is not that of its issuer's key")]
    Signature,
    #[error("the presented token's claim `{0}` is missing")]
    ClaimMissing(&'static str),
    #[error("the presented token's claim `{claim}` is not {expected}")]
    ClaimType {
        claim: String,
        expected: &'static str,
    },
    #[error(
        "the presented token is for audience `{0}`, which is not one of `audiences`: have it issued for this agent alone, or list that audience too"
    )]
    Audience(String),
    #[error("the presented token has no audience")]
    NoAudience,
    #[error("the presented token expired")]
    Expired,
    #[error("the presented token is not yet valid: claim `{0}` lies in the future")]
    NotYetValid(&'static str),
}

impl<'a> UnverifiedToken<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, InvalidToken> {
        if text.len() > LARGEST_TOKEN {
            return Err(InvalidToken::TooLong(text.len()));
        }
        let parts: Vec<&str> = text.split('.').collect();
        let (header, claims, signature) = match parts.as_slice() {
            [header, claims, signature] => (*header, *claims, *signature),
            [_, _, _, _, _] => return Err(InvalidToken::Encrypted),
            _ => return Err(InvalidToken::NotCompact),
        };
        if header.len() > LARGEST_HEADER {
            return Err(InvalidToken::HeaderTooLong(header.len()));
        }
        let header_fields = object(header, "header")?;
        Ok(Self {
            header: Header::read(&header_fields)?,
            claims: object(claims, "claims")?,
            signed: text
                .get(..header.len() + 1 + claims.len())
                .unwrap_or_default(),
            signature: decode(signature)?,
        })
    }

    /// The issuer that the token names. Nothing proves it yet.
    pub(super) fn issuer(&self) -> Result<&str, InvalidToken> {
        text_claim(&self.claims, "iss")
    }
}

impl Header {
    fn read(fields: &Map<String, Value>) -> Result<Self, InvalidToken> {
        // RFC 7515 section 4.1.11 and RFC 7797 section 6: an extension that is not understood makes
        // the token invalid, and `b64` changes what is signed.
        for extension in ["crit", "b64", "zip", "enc"] {
            if fields.contains_key(extension) {
                return Err(InvalidToken::Extension(extension));
            }
        }
        let text = |name: &'static str| match fields.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(InvalidToken::HeaderField(name)),
        };
        if let Some(kind) = text("typ")? {
            // RFC 8725 section 3.11: a token of another kind (a DPoP proof, a client assertion, a
            // logout token) is not an identity.
            let kind = kind.to_ascii_lowercase();
            if !matches!(kind.as_str(), "jwt" | "application/jwt") {
                return Err(InvalidToken::Type(shortened(&kind)));
            }
        }
        let algorithm = text("alg")?.ok_or(InvalidToken::HeaderField("alg"))?;
        let key_id = text("kid")?.map(str::to_owned);
        if key_id
            .as_ref()
            .is_some_and(|id| id.is_empty() || id.len() > LARGEST_KEY_ID)
        {
            return Err(InvalidToken::KeyId);
        }
        Ok(Self {
            algorithm: accepted_algorithm(algorithm)
                .ok_or_else(|| InvalidToken::Algorithm(shortened(algorithm)))?,
            key_id,
        })
    }
}

/// The issuer that a token names, be it one that is not read otherwise. Of a claim that stands twice, the last.
pub(super) fn claimed_issuer(text: &str) -> Option<String> {
    let claims = text.split('.').nth(1)?.trim_end_matches('=');
    let mut claims: Map<String, Value> = serde_json::from_slice(&decode(claims).ok()?).ok()?;
    match claims.remove("iss") {
        Some(Value::String(issuer)) => Some(issuer),
        _ => None,
    }
}

/// A claim that must be there and be text.
pub(super) fn text_claim<'c>(
    claims: &'c Map<String, Value>,
    name: &'static str,
) -> Result<&'c str, InvalidToken> {
    match claims.get(name) {
        None => Err(InvalidToken::ClaimMissing(name)),
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        Some(_) => Err(InvalidToken::ClaimType {
            claim: name.to_owned(),
            expected: "a string with something in it",
        }),
    }
}

/// At most 200 characters of what a stranger wrote, for a message.
pub(super) fn shortened(text: &str) -> String {
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}

fn decode(part: &str) -> Result<Vec<u8>, InvalidToken> {
    URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| InvalidToken::NotCompact)
}

fn object(part: &str, name: &'static str) -> Result<Map<String, Value>, InvalidToken> {
    let not_json = |detail: String| InvalidToken::NotJson { part: name, detail };
    match serde_json::from_slice(&decode(part)?) {
        Ok(StrictValue(Value::Object(fields))) => Ok(fields),
        Ok(_) => Err(not_json("it is another kind of value".to_owned())),
        Err(error) => Err(not_json(error.to_string())),
    }
}

/// A JSON value in which no object has a key twice, at any depth: of two readings none is chosen
/// (RFC 8725 section 2.4 on what different readers make of one token).
pub(super) struct StrictValue(pub(super) Value);

impl<'de> Deserialize<'de> for StrictValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(StrictValue(value)) = sequence.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format!(
                    "key `{}` stands twice",
                    shortened(&key)
                )));
            }
            let StrictValue(value) = map.next_value()?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

/// The strings of an array; `None` if it is something else.
pub(super) fn string_set(value: &Value) -> Option<BTreeSet<String>> {
    value
        .as_array()?
        .iter()
        .map(|item| item.as_str().map(str::to_owned))
        .collect()
}
