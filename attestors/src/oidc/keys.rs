//! An issuer's keys (RFC 7517), each for exactly one algorithm.

use aws_lc_rs::rsa;
use aws_lc_rs::signature::{self, EcdsaVerificationAlgorithm, RsaParameters, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::token::{Header, InvalidToken, StrictValue};

/// More keys than any issuer publishes; the rest of a longer set is not read.
const MOST_KEYS: usize = 100;

/// The signature algorithms that are accepted (RFC 7518 section 3.1, RFC 8037). None is symmetric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

impl Algorithm {
    /// Names are compared byte for byte.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            // RFC 9864 gives EdDSA over Curve25519 a name of its own.
            "EdDSA" | "Ed25519" => Self::EdDsa,
            _ => return None,
        })
    }

    fn rsa(self) -> Option<&'static RsaParameters> {
        // Each of these refuses a modulus under 2048 bits.
        Some(match self {
            Self::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
            Self::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
            Self::Es256 | Self::Es384 | Self::EdDsa => return None,
        })
    }
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
    material: KeyMaterial,
}

#[derive(Debug)]
enum KeyMaterial {
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    EllipticCurve {
        algorithm: &'static EcdsaVerificationAlgorithm,
        point: Vec<u8>,
    },
    Ed25519 {
        point: Vec<u8>,
    },
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
            Some(name) => Some(Algorithm::of_name(name.as_str()?)?),
        };
        let (algorithm, material) = match (text("kty")?, text("crv")) {
            ("RSA", _) => {
                // An RSA key that does not say is for RS256, what OpenID Connect Core defaults to.
                let algorithm = stated.unwrap_or(Algorithm::Rs256);
                algorithm.rsa()?;
                let material = KeyMaterial::Rsa {
                    modulus: octets("n").filter(|modulus| bits(modulus) >= 2048)?,
                    exponent: octets("e")?,
                };
                (algorithm, material)
            }
            ("EC", Some("P-256")) => {
                let algorithm = &signature::ECDSA_P256_SHA256_FIXED;
                let point = point(octets("x")?, octets("y")?, 32)?;
                (
                    Algorithm::Es256,
                    KeyMaterial::EllipticCurve { algorithm, point },
                )
            }
            ("EC", Some("P-384")) => {
                let algorithm = &signature::ECDSA_P384_SHA384_FIXED;
                let point = point(octets("x")?, octets("y")?, 48)?;
                (
                    Algorithm::Es384,
                    KeyMaterial::EllipticCurve { algorithm, point },
                )
            }
            ("OKP", Some("Ed25519")) => {
                let point = octets("x").filter(|point| point.len() == 32)?;
                (Algorithm::EdDsa, KeyMaterial::Ed25519 { point })
            }
            _ => return None,
        };
        if stated.is_some_and(|stated| stated != algorithm) {
            return None;
        }
        Some(Self {
            id: text("kid").map(str::to_owned),
            algorithm,
            material,
        })
    }

    pub(super) fn verify(&self, signed: &str, signature: &[u8]) -> Result<(), InvalidToken> {
        let message = signed.as_bytes();
        let verified = match &self.material {
            KeyMaterial::Rsa { modulus, exponent } => {
                let key = rsa::PublicKeyComponents {
                    n: modulus,
                    e: exponent,
                };
                match self.algorithm.rsa() {
                    Some(parameters) => key.verify(parameters, message, signature),
                    None => return Err(InvalidToken::AlgorithmOfKey),
                }
            }
            KeyMaterial::EllipticCurve { algorithm, point } => {
                UnparsedPublicKey::new(*algorithm, point).verify(message, signature)
            }
            KeyMaterial::Ed25519 { point } => {
                UnparsedPublicKey::new(&signature::ED25519, point).verify(message, signature)
            }
        };
        verified.map_err(|_| InvalidToken::Signature)
    }
}

/// The uncompressed form of a curve point (SEC 1 section 2.3.3). The coordinates have the field's
/// full length (RFC 7518 section 6.2.1.2).
fn point(x: Vec<u8>, y: Vec<u8>, length: usize) -> Option<Vec<u8>> {
    (x.len() == length && y.len() == length).then(|| [vec![4], x, y].concat())
}

fn bits(number: &[u8]) -> usize {
    let leading = number.iter().take_while(|byte| **byte == 0).count();
    match number.get(leading) {
        Some(first) => (number.len() - leading) * 8 - first.leading_zeros() as usize,
        None => 0,
    }
}
