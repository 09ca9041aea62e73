//! An OIDC issuer of tokens such as CI systems give to their jobs: discovery, a key set, and tokens
//! minted on demand.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::certificates::ServerCertificate;
use super::server::{Listening, full, json_answer, listen};
use crate::config::SigningAlgorithm;
use crate::jwt::{KeyError, SigningKey, VerifyingKey, numeric_date, unique_id};

/// A running issuer. Ends when dropped.
#[derive(Debug)]
pub struct OidcIssuer {
    shared: Arc<Shared>,
    listening: Listening,
}

#[derive(Debug)]
struct Shared {
    issuer: String,
    keys: Mutex<Keys>,
    key_set_requests: AtomicUsize,
}

#[derive(Debug)]
struct Keys {
    signing: Arc<SigningKey>,
    /// Keys that signed before, still in the key set.
    former: Vec<Arc<SigningKey>>,
}

impl OidcIssuer {
    /// Serves `issuer` (a URL without a trailing slash) at `address`; port 0 is any free one.
    pub async fn start(
        issuer: &str,
        address: SocketAddr,
        certificate: &ServerCertificate,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            issuer: issuer.to_owned(),
            keys: Mutex::new(Keys {
                signing: new_key()?,
                former: Vec::new(),
            }),
            key_set_requests: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        let listening = listen(
            address,
            Some(certificate),
            Arc::new(move |request| {
                let answer = serving.respond(&request).map(full);
                Box::pin(async move { answer })
            }),
        )
        .await?;
        Ok(Self { shared, listening })
    }

    /// The issuer's URL.
    pub fn issuer(&self) -> &str {
        &self.shared.issuer
    }

    /// The address bound.
    pub fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    /// A token for a workload: `claims` over the standard ones (`iss`, `iat`, `nbf`, `exp`, `jti`).
    pub fn mint(
        &self,
        subject: &str,
        audience: &str,
        lifetime: Duration,
        claims: &Value,
    ) -> Result<String, KeyError> {
        let now = numeric_date(SystemTime::now());
        let mut all = json!({
            "iss": self.shared.issuer,
            "sub": subject,
            "aud": audience,
            "iat": now,
            "nbf": now,
            "exp": now.saturating_add(lifetime.as_secs()),
            "jti": unique_id(),
        });
        if let (Value::Object(all), Value::Object(claims)) = (&mut all, claims) {
            all.extend(claims.clone());
        }
        self.signing_key().sign("JWT", &all)
    }

    /// The key that signs.
    pub fn signing_key(&self) -> Arc<SigningKey> {
        Arc::clone(&self.shared.keys().signing)
    }

    /// Signs with a new key from now on; the old ones stay in the key set.
    pub fn rotate(&self) -> io::Result<()> {
        let key = new_key()?;
        let mut keys = self.shared.keys();
        let former = std::mem::replace(&mut keys.signing, key);
        keys.former.push(former);
        Ok(())
    }

    /// The public keys.
    pub fn verifying_keys(&self) -> Vec<VerifyingKey> {
        self.shared.verifying_keys()
    }

    /// How often the key set was fetched.
    pub fn key_set_requests(&self) -> usize {
        self.shared.key_set_requests.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn keys(&self) -> std::sync::MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn public_jwks(&self) -> Vec<Value> {
        let keys = self.keys();
        std::iter::once(&keys.signing)
            .chain(&keys.former)
            .filter_map(|key| key.public_jwk().ok())
            .collect()
    }

    fn verifying_keys(&self) -> Vec<VerifyingKey> {
        self.public_jwks()
            .iter()
            .filter_map(VerifyingKey::from_jwk)
            .collect()
    }

    fn respond(&self, request: &Request<Incoming>) -> Response<Bytes> {
        match request.uri().path() {
            "/.well-known/openid-configuration" => json_answer(
                StatusCode::OK,
                &json!({
                    "issuer": self.issuer,
                    "jwks_uri": format!("{}/jwks", self.issuer),
                    "response_types_supported": ["id_token"],
                    "subject_types_supported": ["public"],
                    "id_token_signing_alg_values_supported": ["ES256"],
                }),
            ),
            "/jwks" => {
                self.key_set_requests.fetch_add(1, Ordering::Relaxed);
                json_answer(StatusCode::OK, &json!({"keys": self.public_jwks()}))
            }
            _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not_found"})),
        }
    }
}

fn new_key() -> io::Result<Arc<SigningKey>> {
    SigningKey::generate(SigningAlgorithm::Es256)
        .map(|(key, _)| Arc::new(key))
        .map_err(io::Error::other)
}
