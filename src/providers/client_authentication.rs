//! How the agent proves at a token endpoint who the client is.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::HeaderValue;
use serde_json::{Value, json};
use url::form_urlencoded;
use zeroize::Zeroizing;

use super::{MintFailure, Recovery, Subject};
use crate::config::SigningAlgorithm;
use crate::jwt::{KeyError, SigningKey, numeric_date, unique_id};
use crate::refusal::RefusalCode;
use crate::secret_file;

/// RFC 7523 section 2.2.
pub(super) const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// RFC 10070: tells a client assertion from other tokens that the same key may sign.
const ASSERTION_TYP: &str = "client-authentication+jwt";

/// How long an assertion may be used. It is sent at once, and only once.
const ASSERTION_LIFETIME: Duration = Duration::from_secs(60);

/// A file that holds a key or a secret. It is read once at a time: who waits for a read that does not end
/// keeps no thread.
#[derive(Debug)]
pub(super) struct SecretFile {
    path: PathBuf,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl SecretFile {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            turn: Arc::default(),
        }
    }

    async fn read(&self) -> Result<Zeroizing<Vec<u8>>, MintFailure> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || {
            // Kept until the read ends, also where nobody waits for it any more.
            let _turn = turn;
            secret_file::read(&path)
        });
        match read.await {
            Ok(outcome) => outcome.map_err(|error| self.unavailable(&error.to_string())),
            Err(_) => Err(MintFailure::new(
                RefusalCode::ShuttingDown,
                "the agent is shutting down",
                Recovery::Backoff { retry_after: None },
            )),
        }
    }

    fn unavailable(&self, reason: &str) -> MintFailure {
        MintFailure::new(
            RefusalCode::ClientKeyUnavailable,
            "the client's key or secret cannot be used",
            Recovery::Backoff { retry_after: None },
        )
        .with_internal(format!("`{}`: {reason}", self.path.display()))
    }
}

/// A private key in a file, read anew for every assertion and parsed when its content has changed.
pub(super) struct KeyFile {
    file: Arc<SecretFile>,
    algorithm: SigningAlgorithm,
    key_id: Option<String>,
    parsed: Mutex<Option<Parsed>>,
}

#[derive(Clone)]
struct Parsed {
    content_sha256: [u8; 32],
    key: Arc<SigningKey>,
}

impl std::fmt::Debug for KeyFile {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("KeyFile")
            .field("path", &self.file.path)
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

impl KeyFile {
    pub(super) fn new(
        file: Arc<SecretFile>,
        algorithm: SigningAlgorithm,
        key_id: Option<String>,
    ) -> Self {
        Self {
            file,
            algorithm,
            key_id,
            parsed: Mutex::new(None),
        }
    }

    async fn read(&self) -> Result<Parsed, MintFailure> {
        let content = self.file.read().await?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &content);
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*parsed
            && known.content_sha256 == digest.as_ref()
        {
            return Ok(known.clone());
        }
        let key = SigningKey::parse(&content, self.algorithm)
            .map_err(|error| self.unavailable(&error))?;
        let key = Arc::new(match &self.key_id {
            Some(key_id) => key.with_key_id(key_id),
            None => key,
        });
        let mut content_sha256 = [0; 32];
        content_sha256.copy_from_slice(digest.as_ref());
        let read = Parsed {
            content_sha256,
            key,
        };
        *parsed = Some(read.clone());
        Ok(read)
    }

    fn unavailable(&self, error: &KeyError) -> MintFailure {
        self.file.unavailable(&error.to_string())
    }
}

/// Makes a credential's client assertions, with a key that others may sign with too.
#[derive(Debug)]
pub(super) struct Assertions {
    file: Arc<KeyFile>,
    typ: String,
    audience: String,
    signed_with: Mutex<SignedWith>,
}

#[derive(Debug, Default)]
struct SignedWith {
    content_sha256: Option<[u8; 32]>,
    /// The id of the key that took another's place, until somebody asked.
    replaced_by: Option<String>,
}

impl Assertions {
    pub(super) fn new(file: Arc<KeyFile>, typ: Option<&str>, audience: &str) -> Self {
        Self {
            file,
            typ: typ.unwrap_or(ASSERTION_TYP).to_owned(),
            audience: audience.to_owned(),
            signed_with: Mutex::default(),
        }
    }

    /// A new client assertion (RFC 7523 section 3): one audience, written as plain text because strict
    /// servers refuse an array of one; a `jti` of its own for each attempt.
    pub(super) async fn assertion(
        &self,
        client_id: &str,
        extra_claims: &[(String, Value)],
        now: SystemTime,
    ) -> Result<Zeroizing<String>, MintFailure> {
        let key = self.key().await?;
        let issued_at = numeric_date(now);
        let mut claims = json!({
            "iss": client_id,
            "sub": client_id,
            "aud": self.audience,
            "jti": unique_id(),
            "iat": issued_at,
            "exp": issued_at.saturating_add(ASSERTION_LIFETIME.as_secs()),
        });
        if let Value::Object(members) = &mut claims {
            for (name, value) in extra_claims {
                members.entry(name).or_insert_with(|| value.clone());
            }
        }
        key.sign(&self.typ, &claims)
            .map(Zeroizing::new)
            .map_err(|error| self.file.unavailable(&error))
    }

    /// Whether the key can be used now.
    pub(super) async fn check(&self) -> Result<(), MintFailure> {
        self.key().await.map(drop)
    }

    /// As [`Provider::take_replaced_key`](super::Provider::take_replaced_key).
    pub(super) fn take_replaced(&self) -> Option<String> {
        self.signed_with().replaced_by.take()
    }

    async fn key(&self) -> Result<Arc<SigningKey>, MintFailure> {
        let Parsed {
            content_sha256,
            key,
        } = self.file.read().await?;
        let mut signed_with = self.signed_with();
        let before = signed_with.content_sha256.replace(content_sha256);
        if before.is_some_and(|before| before != content_sha256) {
            tracing::info!(file = %self.file.file.path.display(), key_id = key.key_id(), "the client key was replaced");
            signed_with.replaced_by = Some(key.key_id().to_owned());
        }
        Ok(key)
    }

    fn signed_with(&self) -> MutexGuard<'_, SignedWith> {
        self.signed_with
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The `Authorization` header of `client_secret_basic` (RFC 6749 section 2.3.1): both halves are
/// form-encoded before they are joined.
pub(super) async fn basic_header(
    client_id: &str,
    secret_file: &SecretFile,
) -> Result<HeaderValue, MintFailure> {
    let content = secret_file.read().await?;
    let secret =
        secret_file::secret_in(&content).ok_or_else(|| secret_file.unavailable("it is empty"))?;
    // Large enough for every byte to be encoded: what a growing buffer leaves behind is not wiped.
    let most = 3 * (client_id.len() + secret.len()) + 1;
    let mut joined = Zeroizing::new(String::with_capacity(most));
    joined.extend(form_urlencoded::byte_serialize(client_id.as_bytes()));
    joined.push(':');
    joined.extend(form_urlencoded::byte_serialize(secret));
    let mut text = Zeroizing::new(Vec::from(b"Basic "));
    let encoded = Zeroizing::new(STANDARD.encode(joined.as_bytes()));
    text.reserve_exact(encoded.len());
    text.extend_from_slice(encoded.as_bytes());
    // The last header that refers to the buffer wipes it.
    let mut header = HeaderValue::from_maybe_shared(Bytes::from_owner(text))
        .map_err(|_| secret_file.unavailable("it cannot stand in a header"))?;
    header.set_sensitive(true);
    Ok(header)
}

/// A claim of the assertion: an attribute alone keeps its type, other templates are text.
pub(super) fn claim_value(
    subject: &Subject,
    template: &crate::config::Template,
) -> Result<Value, MintFailure> {
    use crate::config::TemplatePart;
    use countersign_attestors::AttributeValue;
    if let [TemplatePart::Attribute { group, name }] = template.parts.as_slice()
        && let Some(value) = subject.attribute(group, name)
    {
        return Ok(match value {
            AttributeValue::Boolean(value) => json!(value),
            AttributeValue::Long(value) => json!(value),
            AttributeValue::String(value) => json!(value),
            AttributeValue::StringSet(values) => json!(values),
        });
    }
    subject.render(template).map(Value::String)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_once_at_a_time_though_nobody_waits_for_it() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        std::fs::write(&path, "hunter2").unwrap();
        let file = SecretFile::new(&path);
        let (release, held) = std::sync::mpsc::channel::<()>();
        runtime.block_on(async {
            // Files are read where nothing else is for now.
            tokio::task::spawn_blocking(move || held.recv());
            let soon = Duration::from_millis(10);
            for _ in 0..3 {
                tokio::time::timeout(soon, file.read()).await.unwrap_err();
                // The file, and the one read.
                assert_eq!(Arc::strong_count(&file.turn), 2);
                file.turn.try_lock().unwrap_err();
            }
            drop(release);
            assert_eq!(file.read().await.unwrap().as_slice(), b"hunter2");
        });
    }
}
