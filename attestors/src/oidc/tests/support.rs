//! An issuer, its keys, and a clock that tests move.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use url::Url;

use crate::attribute::AttributeType;
use crate::clock::Clock;
use crate::fetch::{Fetch, FetchError};
use crate::oidc::{OidcAttestor, OidcIssuerSettings};
use crate::{Attestation, Attestor, Evidence, PresentedToken};

pub(super) const ISSUER: &str = "https://ci.example.com";
pub(super) const NOW: u64 = 1_800_000_000;

#[derive(Debug, Default)]
pub(super) struct TestClock {
    since_start: Mutex<Duration>,
}

impl TestClock {
    pub(super) fn advance(&self, by: Duration) {
        *self.since_start.lock().unwrap() += by;
    }
}

impl Clock for TestClock {
    fn monotonic(&self) -> Duration {
        *self.since_start.lock().unwrap()
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(NOW) + self.monotonic()
    }
}

/// The issuer's keys. The attacker's stand beside them and are published by nobody.
pub(super) struct Keys {
    pub(super) p256: EcdsaKeyPair,
    pub(super) p384: EcdsaKeyPair,
    pub(super) ed25519: Ed25519KeyPair,
    pub(super) rsa: RsaKeyPair,
    pub(super) attacker: EcdsaKeyPair,
}

pub(super) static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    p256: EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
    p384: EcdsaKeyPair::generate(&signature::ECDSA_P384_SHA384_FIXED_SIGNING).unwrap(),
    ed25519: Ed25519KeyPair::generate().unwrap(),
    rsa: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
    attacker: EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
});

/// Who signs a token, and how.
#[derive(Clone, Copy)]
pub(super) enum Signer {
    Es256,
    Es384,
    EdDsa,
    Rs256,
    Rs512,
    Ps256,
    Attacker,
}

impl Signer {
    pub(super) fn sign(self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        let rsa = |encoding: &'static dyn signature::RsaEncoding| {
            let mut signed = vec![0; KEYS.rsa.public_modulus_len()];
            KEYS.rsa
                .sign(encoding, &random, message, &mut signed)
                .unwrap();
            signed
        };
        match self {
            Self::Es256 => KEYS.p256.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Es384 => KEYS.p384.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::EdDsa => KEYS.ed25519.sign(message).as_ref().to_vec(),
            Self::Rs256 => rsa(&signature::RSA_PKCS1_SHA256),
            Self::Rs512 => rsa(&signature::RSA_PKCS1_SHA512),
            Self::Ps256 => rsa(&signature::RSA_PSS_SHA256),
            Self::Attacker => KEYS
                .attacker
                .sign(&random, message)
                .unwrap()
                .as_ref()
                .to_vec(),
        }
    }
}

pub(super) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The public key of a P-256 or P-384 pair as a JWK.
pub(super) fn elliptic_curve_key(pair: &EcdsaKeyPair, curve: &str, id: &str) -> Value {
    let point = &pair.public_key().as_ref()[1..];
    let (x, y) = point.split_at(point.len() / 2);
    json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y), "kid": id})
}

pub(super) fn rsa_key(id: &str) -> Value {
    // RSAPublicKey in DER (RFC 8017 appendix A.1.1): two headers, a zero byte, 256 bytes of modulus.
    let modulus = &KEYS.rsa.public_key().as_ref()[9..265];
    json!({"kty": "RSA", "kid": id, "n": encode(modulus), "e": "AQAB"})
}

pub(super) fn with(mut value: Value, fields: Value) -> Value {
    for (name, field) in fields.as_object().unwrap() {
        value[name] = field.clone();
    }
    value
}

pub(super) fn without(mut value: Value, field: &str) -> Value {
    value.as_object_mut().unwrap().remove(field);
    value
}

/// What the issuer publishes: good keys of every kind, and some that must not be used.
pub(super) fn published_keys() -> Value {
    let p256 = |id| elliptic_curve_key(&KEYS.p256, "P-256", id);
    json!({"keys": [
        p256("ec"),
        elliptic_curve_key(&KEYS.p384, "P-384", "ec384"),
        {"kty": "OKP", "crv": "Ed25519", "x": encode(KEYS.ed25519.public_key()), "kid": "ed"},
        with(rsa_key("rsa"), json!({"alg": "RS256", "use": "sig"})),
        rsa_key("rsa-unsaid"),
        with(rsa_key("ps"), json!({"alg": "PS256"})),
        with(p256("for-encryption"), json!({"use": "enc"})),
        with(p256("for-signing"), json!({"key_ops": ["sign"]})),
        with(p256("says-rsa"), json!({"alg": "RS256"})),
        {"kty": "oct", "k": encode("0123456789abcdef0123456789abcdef"), "kid": "symmetric", "alg": "HS256"},
        {"kty": "RSA", "kid": "weak", "alg": "RS256", "e": "AQAB", "n": WEAK_MODULUS},
    ]})
}

/// A modulus of 1,024 bits, and a token that its key signed (its `exp` is in the year 2100).
pub(super) const WEAK_MODULUS: &str = "nVcIoF0hoLfWel3rPE7SmjAu_Hlj9xLJ2-meZGH6AA8XEXPVE2tglE2Qd0fyIqH_v1_v9N8Ha6sBNfr_fyODYKAyc-MeqiFUadrDOzLLwFoES__jCjVX86EVEsduYpRsKBAS7qyJR075KM5AzUJ6-GNONfUHSq3o6NXPOBNQ60s";
pub(super) const WEAK_TOKEN: &str = "eyJhbGciOiAiUlMyNTYiLCAia2lkIjogIndlYWsiLCAidHlwIjogIkpXVCJ9.eyJpc3MiOiAiaHR0cHM6Ly9jaS5leGFtcGxlLmNvbSIsICJzdWIiOiAiam9iIiwgImF1ZCI6ICJjb3VudGVyc2lnbiIsICJleHAiOiA0MTAyNDQ0ODAwfQ.K_u9rGPEm7Bjaeyaf_UMywJ4YUY30B_jjWd9V-Am_iKVxXuSXbAnuPBzWeRfojyZsMc6yV7zhL849txMkZjwUK9ZzBcoyzr5idoYKPDzFdAhu4Vikb700IUWElhS2FsjdnWXOn_PMyFytdMKSLogU6ba3Q6uXupBUfwimGly7lk";

pub(super) fn header() -> Value {
    json!({"alg": "ES256", "kid": "ec", "typ": "JWT"})
}

pub(super) fn claims() -> Value {
    json!({
        "iss": ISSUER, "sub": "job", "aud": "countersign",
        "iat": NOW - 10, "nbf": NOW - 10, "exp": NOW + 300,
        "repository_id": "74", "run": 5, "protected": true, "labels": ["linux", "x64"],
    })
}

/// A token of exactly these texts.
pub(super) fn token_of(header: &str, claims: &str, signer: Signer) -> String {
    let message = format!("{}.{}", encode(header), encode(claims));
    let signed = signer.sign(message.as_bytes());
    format!("{message}.{}", encode(signed))
}

pub(super) fn token(header: Value, claims: Value, signer: Signer) -> String {
    token_of(&header.to_string(), &claims.to_string(), signer)
}

pub(super) fn good_token() -> String {
    token(header(), claims(), Signer::Es256)
}

/// What the issuer's server answers.
#[derive(Debug, Clone)]
pub(super) struct Documents {
    pub(super) metadata: String,
    pub(super) keys: String,
    pub(super) status: u16,
}

/// An issuer's server on a loopback port, and the counts of what was asked of it.
pub(super) struct TestIssuer {
    pub(super) address: SocketAddr,
    pub(super) documents: Arc<Mutex<Documents>>,
    metadata_requests: Arc<AtomicUsize>,
    key_requests: Arc<AtomicUsize>,
}

impl TestIssuer {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let issuer = Self {
            address: listener.local_addr().unwrap(),
            documents: Arc::new(Mutex::new(Documents {
                metadata: json!({"issuer": ISSUER, "jwks_uri": format!("{ISSUER}/keys")})
                    .to_string(),
                keys: published_keys().to_string(),
                status: 200,
            })),
            metadata_requests: Arc::default(),
            key_requests: Arc::default(),
        };
        let documents = Arc::clone(&issuer.documents);
        let counts = (
            Arc::clone(&issuer.metadata_requests),
            Arc::clone(&issuer.key_requests),
        );
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let read = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                let documents = documents.lock().unwrap().clone();
                let (status, body) =
                    if request.starts_with("GET /.well-known/openid-configuration ") {
                        counts.0.fetch_add(1, Ordering::SeqCst);
                        (documents.status, documents.metadata)
                    } else if request.starts_with("GET /keys ") {
                        counts.1.fetch_add(1, Ordering::SeqCst);
                        (documents.status, documents.keys)
                    } else {
                        (404, String::new())
                    };
                let answer = format!(
                    "HTTP/1.1 {status} -\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        issuer
    }

    /// How often the key set was asked for.
    pub(super) fn key_requests(&self) -> usize {
        self.key_requests.load(Ordering::SeqCst)
    }

    /// How often anything was asked for.
    pub(super) fn requests(&self) -> usize {
        self.key_requests() + self.metadata_requests.load(Ordering::SeqCst)
    }

    pub(super) fn publish(&self, keys: &Value) {
        self.documents.lock().unwrap().keys = keys.to_string();
    }

    pub(super) fn answer_with(&self, status: u16) {
        self.documents.lock().unwrap().status = status;
    }
}

/// Asks the test issuer in place of any host. TLS and the address guard are the agent's part.
#[derive(Debug)]
pub(super) struct LoopbackFetch {
    pub(super) address: SocketAddr,
}

#[async_trait]
impl Fetch for LoopbackFetch {
    async fn get(&self, url: &Url) -> Result<Vec<u8>, FetchError> {
        let unreachable = |error: std::io::Error| FetchError::Unreachable {
            url: url.to_string(),
            detail: error.to_string(),
        };
        let mut stream = TcpStream::connect(self.address)
            .await
            .map_err(unreachable)?;
        let request = format!(
            "GET {} HTTP/1.1\r\nhost: {}\r\n\r\n",
            url.path(),
            url.host_str().unwrap()
        );
        stream
            .write_all(request.as_bytes())
            .await
            .map_err(unreachable)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.map_err(unreachable)?;
        let text = String::from_utf8(answer).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        match head.starts_with("HTTP/1.1 200 ") {
            true => Ok(body.as_bytes().to_vec()),
            false => Err(FetchError::Refused {
                url: url.to_string(),
                detail: head.lines().next().unwrap_or("nothing").to_owned(),
            }),
        }
    }
}

pub(super) fn settings() -> OidcIssuerSettings {
    OidcIssuerSettings {
        name: "ci".to_owned(),
        issuer: ISSUER.to_owned(),
        audiences: vec!["countersign".to_owned(), "countersign-staging".to_owned()],
        claims: BTreeMap::from([
            ("repository_id".to_owned(), AttributeType::String),
            ("run".to_owned(), AttributeType::Long),
            ("protected".to_owned(), AttributeType::Boolean),
            ("labels".to_owned(), AttributeType::StringSet),
        ]),
    }
}

pub(super) fn attestor(issuer: &TestIssuer, clock: &Arc<TestClock>) -> OidcAttestor {
    let fetch = Arc::new(LoopbackFetch {
        address: issuer.address,
    });
    OidcAttestor::new(settings(), fetch, Arc::clone(clock) as Arc<dyn Clock>).unwrap()
}

pub(super) async fn attest(attestor: &OidcAttestor, token: &str) -> Attestation {
    let token = PresentedToken::new(token.to_owned());
    attestor.attest(Evidence::Presented(&token)).await
}
