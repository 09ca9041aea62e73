//! An issuer's keys (RFC 7517), each for exactly one algorithm.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::{Map, Value};

use super::token::{Header, InvalidToken, StrictValue};

/// More keys than any issuer publishes; the rest of a longer set is not read.
const MOST_KEYS: usize = 100;

/// The signature algorithms that are accepted (RFC 7518 section 3.1, RFC 8037). None is symmetric.
/// Names are compared byte for byte.
pub(super) fn accepted_algorithm(name: &str) -> Option<Algorithm> {
    Some(match name {
        "RS256" => Algorithm::RS256,
        "RS384" => Algorithm::RS384,
        "RS512" => Algorithm::RS512,
        "PS256" => Algorithm::PS256,
        "PS384" => Algorithm::PS384,
        "PS512" => Algorithm::PS512,
        "ES256" => Algorithm::ES256,
        "ES384" => Algorithm::ES384,
        // RFC 9864 gives EdDSA over Curve25519 a name of its own.
        "EdDSA" | "Ed25519" => Algorithm::EdDSA,
        _ => return None,
    })
}

fn is_of_rsa(algorithm: Algorithm) -> bool {
    !matches!(
        algorithm,
        Algorithm::ES256 | Algorithm::ES384 | Algorithm::EdDSA
    )
}

/// The usable keys of a set. What is of another kind, for encryption, or too weak is left out: a
/// token that names it is refused as signed by no known key.
#[derive(Debug)]
pub(super) struct KeySet {
    keys: Vec<VerificationKey>,
}

#[derive(Debug)]
pub(super) struct VerificationKey {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

impl KeySet {
    /// Reads a JWK Set (RFC 7517 section 5).
    pub(super) fn parse(document: &[u8]) -> Result<Self, String> {
        let StrictValue(document) =
            serde_json::from_slice(document).map_err(|error| format!("it is not JSON: {error}"))?;
        let keys = document
            .get("keys")
            .and_then(Value::as_array)
            .ok_or("it has no array `keys`")?;
        let keys: Vec<_> = keys
            .iter()
            .filter_map(Value::as_object)
            .filter_map(VerificationKey::read)
            .take(MOST_KEYS)
            .collect();
        match keys.is_empty() {
            true => Err("it has no usable signature key".to_owned()),
            false => Ok(Self { keys }),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The key that the token names. A token that names none is of the only key, where there is
    /// only one.
    pub(super) fn select(&self, header: &Header) -> Result<&VerificationKey, InvalidToken> {
        let named: Vec<&VerificationKey> = match &header.key_id {
            Some(id) => {
                let named = self.keys.iter().filter(|key| key.id.as_ref() == Some(id));
                named.collect()
            }
            None if self.keys.len() == 1 => self.keys.iter().collect(),
            None => return Err(InvalidToken::KeyIdMissing),
        };
        if named.is_empty() {
            return Err(InvalidToken::UnknownKey);
        }
        named
            .into_iter()
            .find(|key| key.algorithm == header.algorithm)
            .ok_or(InvalidToken::AlgorithmOfKey)
    }
}

impl VerificationKey {
    fn read(key: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        let octets = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();

        let for_signatures = key.get("use").is_none_or(|value| value == "sig");
        let may_verify = key.get("key_ops").is_none_or(|operations| {
            operations
                .as_array()
                .is_some_and(|operations| operations.iter().any(|operation| operation == "verify"))
        });
        if !for_signatures || !may_verify {
            return None;
        }
        let stated = match key.get("alg") {
            None => None,
            Some(name) => Some(accepted_algorithm(name.as_str()?)?),
        };
        let (algorithm, decoding_key) = match (text("kty")?, text("crv")) {
            ("RSA", _) => {
                // An RSA key that does not say is for RS256, what OpenID Connect Core defaults to.
                let algorithm = stated.unwrap_or(Algorithm::RS256);
                let modulus = octets("n").filter(|modulus| bits(modulus) >= 2048)?;
                let key = DecodingKey::from_rsa_raw_components(&modulus, &octets("e")?);
                (is_of_rsa(algorithm).then_some(algorithm)?, key)
            }
            ("EC", Some("P-256")) => (Algorithm::ES256, point(text("x")?, text("y")?, 32)?),
            ("EC", Some("P-384")) => (Algorithm::ES384, point(text("x")?, text("y")?, 48)?),
            ("OKP", Some("Ed25519")) => {
                let point = octets("x").filter(|point| point.len() == 32)?;
                (Algorithm::EdDSA, DecodingKey::from_ed_der(&point))
            }
            _ => return None,
        };
        if stated.is_some_and(|stated| stated != algorithm) {
            return None;
        }
        Some(Self {
            id: text("kid").map(str::to_owned),
            algorithm,
            key: decoding_key,
        })
    }

    pub(super) fn verify(&self, signed: &str, signature: &[u8]) -> Result<(), InvalidToken> {
        let signature = URL_SAFE_NO_PAD.encode(signature);
        let verified =
            jsonwebtoken::crypto::verify(&signature, signed.as_bytes(), &self.key, self.algorithm);
        match verified {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(InvalidToken::Signature),
        }
    }
}

/// A curve point, whose coordinates have the field's full length (RFC 7518 section 6.2.1.2).
fn point(x: &str, y: &str, length: usize) -> Option<DecodingKey> {
    let is_whole = |text| {
        URL_SAFE_NO_PAD
            .decode(text)
            .is_ok_and(|octets| octets.len() == length)
    };
    (is_whole(x) && is_whole(y)).then(|| DecodingKey::from_ec_components(x, y).ok())?
}

fn bits(number: &[u8]) -> usize {
    let leading = number.iter().take_while(|byte| **byte == 0).count();
    match number.get(leading) {
        Some(first) => (number.len() - leading) * 8 - first.leading_zeros() as usize,
        None => 0,
    }
}
