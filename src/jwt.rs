//! JSON Web Tokens (RFC 7519) as the agent makes them: signing keys from PEM or JWK, compact
//! signatures, and the verification that the embedded servers need.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeySize, PublicKeyComponents};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ED25519, EcdsaKeyPair,
    Ed25519KeyPair, KeyPair, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_SHA256, RsaKeyPair, RsaPublicKeyComponents,
    UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Map, Value, json};
use zeroize::{Zeroize, Zeroizing};

use crate::config::SigningAlgorithm;

/// A private key with its algorithm pinned. Shows only its key id.
pub struct SigningKey {
    algorithm: SigningAlgorithm,
    pair: Pair,
    key_id: String,
}

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(RsaKeyPair),
}

/// Why a key cannot be used. Says nothing of the key's content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeyError(String);

impl KeyError {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl SigningAlgorithm {
    /// The `alg` header (RFC 7518 section 3.1, RFC 8037 section 3.1).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::EdDsa => "EdDSA",
            Self::Ps256 => "PS256",
            Self::Rs256 => "RS256",
        }
    }
}

impl SigningKey {
    /// Reads a private key: PEM (PKCS#8, SEC1, PKCS#1) or a JWK (RFC 7517), to be used with `algorithm`
    /// only.
    pub fn parse(content: &[u8], algorithm: SigningAlgorithm) -> Result<Self, KeyError> {
        let is_jwk = content
            .iter()
            .find(|byte| !byte.is_ascii_whitespace())
            .is_some_and(|byte| *byte == b'{');
        let pair = match is_jwk {
            true => pair_from_jwk(content, algorithm)?,
            false => pair_from_pem(content, algorithm)?,
        };
        Self::from_pair(pair, algorithm)
    }

    /// A new key, and its PKCS#8 PEM.
    pub fn generate(algorithm: SigningAlgorithm) -> Result<(Self, Zeroizing<String>), KeyError> {
        let failed = |_| KeyError::new("a key could not be generated");
        let der: Zeroizing<Vec<u8>> = Zeroizing::new(match algorithm {
            SigningAlgorithm::Es256 => EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
                .and_then(|pair| pair.to_pkcs8v1())
                .map_err(failed)?
                .as_ref()
                .to_vec(),
            SigningAlgorithm::EdDsa => Ed25519KeyPair::generate()
                .and_then(|pair| pair.to_pkcs8v1())
                .map_err(failed)?
                .as_ref()
                .to_vec(),
            SigningAlgorithm::Ps256 | SigningAlgorithm::Rs256 => {
                let pair = RsaKeyPair::generate(KeySize::Rsa3072).map_err(failed)?;
                let der: Pkcs8V1Der<'_> = pair.as_der().map_err(failed)?;
                der.as_ref().to_vec()
            }
        });
        let pem = pem("PRIVATE KEY", &der);
        Ok((Self::parse(pem.as_bytes(), algorithm)?, pem))
    }

    fn from_pair(pair: Pair, algorithm: SigningAlgorithm) -> Result<Self, KeyError> {
        let mut key = Self {
            algorithm,
            pair,
            key_id: String::new(),
        };
        key.key_id = key.thumbprint()?;
        Ok(key)
    }

    /// The algorithm.
    pub fn algorithm(&self) -> SigningAlgorithm {
        self.algorithm
    }

    /// The key's RFC 7638 thumbprint, or what [`Self::with_key_id`] set.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The same key under another `kid`.
    #[must_use]
    pub fn with_key_id(mut self, key_id: &str) -> Self {
        key_id.clone_into(&mut self.key_id);
        self
    }

    /// A compact JWS (RFC 7515 section 3.1) over `claims`; the header has `alg`, `kid` and `typ`.
    pub fn sign(&self, typ: &str, claims: &Value) -> Result<String, KeyError> {
        let header = json!({"alg": self.algorithm.as_str(), "kid": self.key_id, "typ": typ});
        let mut token = encode(header.to_string().as_bytes());
        token.push('.');
        token.push_str(&encode(claims.to_string().as_bytes()));
        let signature = self.sign_bytes(token.as_bytes())?;
        token.push('.');
        token.push_str(&encode(&signature));
        Ok(token)
    }

    fn sign_bytes(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let failed = |_| KeyError::new("the key could not sign");
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Ecdsa(pair) => Ok(pair
                .sign(&random, message)
                .map_err(failed)?
                .as_ref()
                .to_vec()),
            Pair::Ed25519(pair) => Ok(pair.try_sign(message).map_err(failed)?.as_ref().to_vec()),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                let encoding: &dyn aws_lc_rs::signature::RsaEncoding = match self.algorithm {
                    SigningAlgorithm::Ps256 => &RSA_PSS_SHA256,
                    _ => &RSA_PKCS1_SHA256,
                };
                pair.sign(encoding, &random, message, &mut signature)
                    .map_err(failed)?;
                Ok(signature)
            }
        }
    }

    /// The public key as a JWK with `kid`, `use` and `alg`.
    pub fn public_jwk(&self) -> Result<Value, KeyError> {
        let mut members = self.required_members()?;
        members.insert("kid".to_owned(), json!(self.key_id));
        members.insert("use".to_owned(), json!("sig"));
        members.insert("alg".to_owned(), json!(self.algorithm.as_str()));
        Ok(Value::Object(members))
    }

    /// The members that a thumbprint is made of, in lexicographic order (`Map` is sorted).
    fn required_members(&self) -> Result<Map<String, Value>, KeyError> {
        let members = match &self.pair {
            Pair::Ecdsa(pair) => match pair.public_key().as_ref() {
                [4, point @ ..] if point.len() == 64 => {
                    let (x, y) = point.split_at(32);
                    json!({"crv": "P-256", "kty": "EC", "x": encode(x), "y": encode(y)})
                }
                _ => return Err(KeyError::new("the public key is not a P-256 point")),
            },
            Pair::Ed25519(pair) => {
                json!({"crv": "Ed25519", "kty": "OKP", "x": encode(pair.public_key().as_ref())})
            }
            Pair::Rsa(pair) => {
                let public = pair.public_key();
                json!({
                    "e": encode(public.exponent().big_endian_without_leading_zero()),
                    "kty": "RSA",
                    "n": encode(public.modulus().big_endian_without_leading_zero()),
                })
            }
        };
        match members {
            Value::Object(members) => Ok(members),
            _ => Err(KeyError::new("the public key cannot be written as a JWK")),
        }
    }

    /// RFC 7638: the SHA-256 of the required members in lexicographic order, without spaces.
    fn thumbprint(&self) -> Result<String, KeyError> {
        let members = self.required_members()?;
        let sorted: std::collections::BTreeMap<_, _> = members.iter().collect();
        let text = serde_json::to_string(&sorted)
            .map_err(|_| KeyError::new("the public key cannot be written as a JWK"))?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
        Ok(encode(digest.as_ref()))
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SigningKey")
            .field("algorithm", &self.algorithm)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

fn pair_from_pem(content: &[u8], algorithm: SigningAlgorithm) -> Result<Pair, KeyError> {
    let key = PrivateKeyDer::from_pem_slice(content)
        .map(Zeroizing::new)
        .map_err(|_| {
            KeyError::new("it holds no private key in PEM (PKCS#8, SEC1 or PKCS#1) or JWK")
        })?;
    let wrong = |_| wrong_key(algorithm);
    match (algorithm, &*key) {
        (SigningAlgorithm::Es256, PrivateKeyDer::Pkcs8(_) | PrivateKeyDer::Sec1(_)) => {
            EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der())
                .map(Pair::Ecdsa)
                .map_err(wrong)
        }
        (SigningAlgorithm::EdDsa, PrivateKeyDer::Pkcs8(_)) => {
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_der())
                .map(Pair::Ed25519)
                .map_err(wrong)
        }
        (SigningAlgorithm::Ps256 | SigningAlgorithm::Rs256, PrivateKeyDer::Pkcs8(_)) => {
            RsaKeyPair::from_pkcs8(key.secret_der())
                .map(Pair::Rsa)
                .map_err(wrong)
        }
        (SigningAlgorithm::Ps256 | SigningAlgorithm::Rs256, PrivateKeyDer::Pkcs1(_)) => {
            RsaKeyPair::from_der(key.secret_der())
                .map(Pair::Rsa)
                .map_err(wrong)
        }
        _ => Err(wrong_key(algorithm)),
    }
}

/// The members of a private key, wiped when dropped.
struct PrivateJwk(Map<String, Value>);

impl Drop for PrivateJwk {
    fn drop(&mut self) {
        for member in self.0.values_mut() {
            if let Value::String(text) = member {
                text.zeroize();
            }
        }
    }
}

fn pair_from_jwk(content: &[u8], algorithm: SigningAlgorithm) -> Result<Pair, KeyError> {
    let jwk: PrivateJwk = serde_json::from_slice(content)
        .map(PrivateJwk)
        .map_err(|_| KeyError::new("it is not a JWK"))?;
    let text = |name: &str| jwk.0.get(name).and_then(Value::as_str);
    let bytes = |name: &str| -> Result<Zeroizing<Vec<u8>>, KeyError> {
        text(name)
            .and_then(|value| URL_SAFE_NO_PAD.decode(value).ok())
            .map(Zeroizing::new)
            .ok_or_else(|| {
                KeyError::new(format!(
                    "member `{name}` of the JWK is missing or not base64url"
                ))
            })
    };
    if let Some(named) = text("alg")
        && named != algorithm.as_str()
    {
        return Err(KeyError::new(format!(
            "the JWK is for `{named}`, and the configuration says `{}`",
            algorithm.as_str()
        )));
    }
    let wrong = |_| wrong_key(algorithm);
    match (algorithm, text("kty"), text("crv")) {
        (SigningAlgorithm::Es256, Some("EC"), Some("P-256")) => {
            let mut point = vec![4];
            point.extend_from_slice(&bytes("x")?);
            point.extend_from_slice(&bytes("y")?);
            EcdsaKeyPair::from_private_key_and_public_key(
                &ECDSA_P256_SHA256_FIXED_SIGNING,
                &bytes("d")?,
                &point,
            )
            .map(Pair::Ecdsa)
            .map_err(wrong)
        }
        (SigningAlgorithm::EdDsa, Some("OKP"), Some("Ed25519")) => {
            Ed25519KeyPair::from_seed_and_public_key(&bytes("d")?, &bytes("x")?)
                .map(Pair::Ed25519)
                .map_err(wrong)
        }
        (SigningAlgorithm::Ps256 | SigningAlgorithm::Rs256, Some("RSA"), _) => {
            let (n, e) = (bytes("n")?, bytes("e")?);
            let (d, p, q) = (bytes("d")?, bytes("p")?, bytes("q")?);
            let (dp, dq, qi) = (bytes("dp")?, bytes("dq")?, bytes("qi")?);
            let components = aws_lc_rs::rsa::KeyPairComponents {
                public_key: PublicKeyComponents {
                    n: n.as_slice(),
                    e: e.as_slice(),
                },
                d: d.as_slice(),
                p: p.as_slice(),
                q: q.as_slice(),
                dP: dp.as_slice(),
                dQ: dq.as_slice(),
                qInv: qi.as_slice(),
            };
            RsaKeyPair::from_components(&components)
                .map(Pair::Rsa)
                .map_err(wrong)
        }
        _ => Err(wrong_key(algorithm)),
    }
}

fn wrong_key(algorithm: SigningAlgorithm) -> KeyError {
    let needed = match algorithm {
        SigningAlgorithm::Es256 => "a P-256 key",
        SigningAlgorithm::EdDsa => "an Ed25519 key",
        SigningAlgorithm::Ps256 | SigningAlgorithm::Rs256 => "an RSA key of at least 2048 bits",
    };
    KeyError::new(format!("`{}` needs {needed}", algorithm.as_str()))
}

/// A public key with its algorithm pinned.
#[derive(Debug, Clone)]
pub struct VerifyingKey {
    algorithm: SigningAlgorithm,
    key_id: Option<String>,
    material: Material,
}

#[derive(Debug, Clone)]
enum Material {
    Point(Vec<u8>),
    Ed25519(Vec<u8>),
    Rsa { n: Vec<u8>, e: Vec<u8> },
}

/// A verified token's content.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// The protected header.
    pub header: Map<String, Value>,
    /// The claims.
    pub claims: Map<String, Value>,
}

impl Verified {
    /// A claim that is text.
    pub fn text(&self, claim: &str) -> Option<&str> {
        self.claims.get(claim).and_then(Value::as_str)
    }

    /// A claim that is a NumericDate in whole seconds.
    pub fn seconds(&self, claim: &str) -> Option<u64> {
        self.claims.get(claim).and_then(Value::as_u64)
    }
}

/// Why a token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidToken(pub &'static str);

impl VerifyingKey {
    /// Reads a public JWK. Without `alg`, RSA keys are RS256.
    pub fn from_jwk(jwk: &Value) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        let (algorithm, material) = match (text("kty")?, text("crv"), text("alg")) {
            ("EC", Some("P-256"), None | Some("ES256")) => {
                let mut point = vec![4];
                point.extend(bytes("x")?);
                point.extend(bytes("y")?);
                (SigningAlgorithm::Es256, Material::Point(point))
            }
            ("OKP", Some("Ed25519"), None | Some("EdDSA" | "Ed25519")) => {
                (SigningAlgorithm::EdDsa, Material::Ed25519(bytes("x")?))
            }
            ("RSA", _, algorithm) => {
                let algorithm = match algorithm {
                    None | Some("RS256") => SigningAlgorithm::Rs256,
                    Some("PS256") => SigningAlgorithm::Ps256,
                    Some(_) => return None,
                };
                let (n, e) = (bytes("n")?, bytes("e")?);
                (algorithm, Material::Rsa { n, e })
            }
            _ => return None,
        };
        Some(Self {
            algorithm,
            key_id: text("kid").map(str::to_owned),
            material,
        })
    }

    /// The `kid`.
    pub fn key_id(&self) -> Option<&str> {
        self.key_id.as_deref()
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Point(point) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            Material::Ed25519(key) => {
                UnparsedPublicKey::new(&ED25519, key).verify(message, signature)
            }
            Material::Rsa { n, e } => {
                let parameters = match self.algorithm {
                    SigningAlgorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
                    _ => &RSA_PKCS1_2048_8192_SHA256,
                };
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)
            }
        }
        .is_ok()
    }
}

/// Verifies a compact JWS by one of `keys`: the one that its `kid` names, or any without one. The
/// algorithm is the key's, never the token's. Claims are not judged here, see [`check_times`].
pub fn verify(token: &str, keys: &[VerifyingKey]) -> Result<Verified, InvalidToken> {
    let mut parts = token.split('.');
    let (Some(header), Some(claims), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(InvalidToken("the token is not a compact JWS"));
    };
    let header_members = decode_object(header).ok_or(InvalidToken("the header is not JSON"))?;
    if header_members.contains_key("crit") {
        return Err(InvalidToken("the header has critical extensions"));
    }
    let algorithm = header_members.get("alg").and_then(Value::as_str);
    let key_id = header_members.get("kid").and_then(Value::as_str);
    let message = token
        .get(..header.len() + 1 + claims.len())
        .ok_or(InvalidToken("the token is not a compact JWS"))?;
    let signature = URL_SAFE_NO_PAD
        .decode(signature)
        .map_err(|_| InvalidToken("the signature is not base64url"))?;
    let verified = keys
        .iter()
        .filter(|key| key_id.is_none() || key.key_id.as_deref() == key_id)
        .filter(|key| Some(key.algorithm.as_str()) == algorithm)
        .any(|key| key.verifies(message.as_bytes(), &signature));
    if !verified {
        return Err(InvalidToken("no known key verifies the signature"));
    }
    Ok(Verified {
        header: header_members,
        claims: decode_object(claims).ok_or(InvalidToken("the claims are not JSON"))?,
    })
}

/// Checks `exp` (required), `nbf` and `iat` at `now`, with 5 s of tolerance for what lies ahead and none
/// for what is past.
pub fn check_times(token: &Verified, now: SystemTime) -> Result<(), InvalidToken> {
    let now = numeric_date(now);
    match token.seconds("exp") {
        Some(expires) if expires > now => {}
        Some(_) => return Err(InvalidToken("the token has expired")),
        None => return Err(InvalidToken("the token has no expiry")),
    }
    for claim in ["nbf", "iat"] {
        if token
            .seconds(claim)
            .is_some_and(|time| time > now.saturating_add(5))
        {
            return Err(InvalidToken("the token is not yet valid"));
        }
    }
    Ok(())
}

/// Whole seconds since the epoch (RFC 7519 section 2, NumericDate).
pub fn numeric_date(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}

/// A new unguessable identifier of 128 bits, for `jti`.
pub fn unique_id() -> String {
    let mut bytes = [0; 16];
    // The system's generator does not fail after start; a UUID is unique, if guessable, should it.
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => encode(&bytes),
        Err(_) => uuid::Uuid::now_v7().to_string(),
    }
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn decode_object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

/// PEM (RFC 7468).
fn pem(label: &str, der: &[u8]) -> Zeroizing<String> {
    let body = Zeroizing::new(STANDARD.encode(der));
    let mut text = Zeroizing::new(format!("-----BEGIN {label}-----\n"));
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [SigningAlgorithm; 4] = [
        SigningAlgorithm::Es256,
        SigningAlgorithm::EdDsa,
        SigningAlgorithm::Ps256,
        SigningAlgorithm::Rs256,
    ];

    #[test]
    fn every_algorithm_signs_what_its_public_key_verifies() {
        for algorithm in ALL {
            let (key, _) = SigningKey::generate(algorithm).unwrap();
            let token = key.sign("JWT", &json!({"sub": "a"})).unwrap();
            let public = VerifyingKey::from_jwk(&key.public_jwk().unwrap()).unwrap();
            let verified = verify(&token, std::slice::from_ref(&public)).unwrap();
            assert_eq!(verified.text("sub"), Some("a"));
            assert_eq!(verified.header["alg"], algorithm.as_str());
            assert_eq!(verified.header["kid"], key.key_id());

            let (other, _) = SigningKey::generate(algorithm).unwrap();
            let other = other.with_key_id(key.key_id());
            let forged = other.sign("JWT", &json!({"sub": "a"})).unwrap();
            assert!(verify(&forged, &[public]).is_err());
        }
    }

    #[test]
    fn a_key_serves_only_its_algorithm() {
        for algorithm in ALL {
            let (_, pem) = SigningKey::generate(algorithm).unwrap();
            for other in ALL {
                let is_rsa = |a| matches!(a, SigningAlgorithm::Ps256 | SigningAlgorithm::Rs256);
                let fits = other == algorithm || (is_rsa(other) && is_rsa(algorithm));
                assert_eq!(SigningKey::parse(pem.as_bytes(), other).is_ok(), fits);
            }
        }
    }

    #[test]
    fn jwk_keys_are_read() {
        // RFC 7515 appendix A.3 and RFC 8037 appendix A.
        let ec = r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","d":"jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"}"#;
        let key = SigningKey::parse(ec.as_bytes(), SigningAlgorithm::Es256).unwrap();
        assert_eq!(
            key.public_jwk().unwrap()["x"],
            "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"
        );
        let ed = r#"{"kty":"OKP","crv":"Ed25519","d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
        let key = SigningKey::parse(ed.as_bytes(), SigningAlgorithm::EdDsa).unwrap();
        // RFC 8037 appendix A.3.
        assert_eq!(key.key_id(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        assert!(SigningKey::parse(ed.as_bytes(), SigningAlgorithm::Es256).is_err());
        assert!(SigningKey::parse(b"{\"kty\":\"EC\"}", SigningAlgorithm::Es256).is_err());
        assert!(SigningKey::parse(b"nothing", SigningAlgorithm::Es256).is_err());
    }

    #[test]
    fn confused_tokens_are_refused() {
        let (key, _) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
        let public = VerifyingKey::from_jwk(&key.public_jwk().unwrap()).unwrap();
        let keys = [public];
        let token = key.sign("JWT", &json!({"sub": "a"})).unwrap();
        let (header_and_claims, _) = token.rsplit_once('.').unwrap();
        let (_, claims) = header_and_claims.split_once('.').unwrap();
        let none = encode(br#"{"alg":"none"}"#);
        let zero = encode(&[0; 64]);
        for forged in [
            format!("{none}.{claims}."),
            format!("{header_and_claims}."),
            format!("{header_and_claims}.{zero}"),
            header_and_claims.to_owned(),
            format!("{token}."),
            String::new(),
        ] {
            assert!(verify(&forged, &keys).is_err(), "{forged}");
        }
        assert!(verify(&token, &keys).is_ok());
    }
}
