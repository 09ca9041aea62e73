//! One issuer's key set: found by discovery, fetched rarely, kept through the issuer's absences.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use serde_json::Value;
use url::Url;

use super::keys::{KeySet, VerificationKey};
use super::token::{Header, InvalidToken, StrictValue};
use crate::clock::Clock;
use crate::fetch::Fetch;

/// Tokens with unknown keys cause one fetch in this time; the first of them at once.
const UNKNOWN_KEY_COOL_DOWN: Duration = Duration::from_secs(10);
/// A fetch that failed is not repeated sooner.
const FAILURE_COOL_DOWN: Duration = Duration::from_secs(2);
/// A key set of this age is fetched again before it is next used: a key that the issuer has withdrawn
/// counts no longer than this, while the issuer answers.
const REFRESH_AFTER: Duration = Duration::from_secs(5 * 60);
/// How long that is waited for.
const REFRESH_WAIT: Duration = Duration::from_secs(2);
/// A key set of this age is not used, however long the issuer has been away.
const USABLE_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// Where the keys are is asked again after this time, and after a failure.
const DISCOVER_AFTER: Duration = Duration::from_secs(60 * 60);

/// The state of an issuer's key set, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeySetStatus {
    /// How many usable keys there are.
    pub keys: usize,
    /// How old they are; `None` while there are none.
    pub age: Option<Duration>,
    /// How often the key set was asked for.
    pub fetches: u64,
    /// How often that failed, discovery included.
    pub failures: u64,
}

/// Why there is no key for a token.
#[derive(Debug)]
pub(super) enum NoKey {
    /// The token is at fault.
    Invalid(InvalidToken),
    /// The issuer cannot be asked.
    Unavailable(String),
}

pub(super) struct Issuer {
    /// The exact issuer identifier.
    identifier: String,
    url: Url,
    fetch: Arc<dyn Fetch>,
    clock: Arc<dyn Clock>,
    loaded: ArcSwapOption<Loaded>,
    /// Held by the one fetch in flight.
    flight: Arc<tokio::sync::Mutex<()>>,
    schedule: Mutex<Schedule>,
    fetches: AtomicU64,
    failures: AtomicU64,
}

/// A fetched key set.
pub(super) struct Loaded {
    keys: KeySet,
    at: Duration,
}

/// When what may be asked next, in monotonic time.
#[derive(Default)]
struct Schedule {
    unknown_key_from: Duration,
    any_from: Duration,
    /// Why the last fetch failed.
    failure: Option<String>,
    /// Where the keys are, and when that was learnt.
    key_set: Option<(Url, Duration)>,
}

impl fmt::Debug for Issuer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Issuer")
            .field("identifier", &self.identifier)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Issuer {
    pub(super) fn new(
        identifier: String,
        url: Url,
        fetch: Arc<dyn Fetch>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            identifier,
            url,
            fetch,
            clock,
            loaded: ArcSwapOption::empty(),
            flight: Arc::default(),
            schedule: Mutex::default(),
            fetches: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }
    }

    pub(super) fn identifier(&self) -> &str {
        &self.identifier
    }

    pub(super) fn status(&self) -> KeySetStatus {
        let loaded = self.loaded.load();
        let loaded = loaded.as_ref();
        KeySetStatus {
            keys: loaded.map_or(0, |loaded| loaded.keys.len()),
            age: loaded.map(|loaded| self.clock.monotonic().saturating_sub(loaded.at)),
            fetches: self.fetches.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }

    /// Checks the signature by the key that the header names, fetching the key set where that may help.
    pub(super) async fn verify(
        self: &Arc<Self>,
        header: &Header,
        signed: &str,
        signature: &[u8],
    ) -> Result<(), NoKey> {
        let verify = |key: &VerificationKey| key.verify(signed, signature).map_err(NoKey::Invalid);

        let before = self.usable();
        if let Some(loaded) = &before {
            match loaded.keys.select(header) {
                Ok(key) if !self.is_due(loaded) => return verify(key),
                Ok(_) => {
                    // Where that takes too long, or fails, the last key set is used.
                    let _ = tokio::time::timeout(REFRESH_WAIT, self.refresh(loaded)).await;
                    let newest = self.usable();
                    let newest = newest.as_ref().unwrap_or(loaded);
                    return verify(newest.keys.select(header).map_err(NoKey::Invalid)?);
                }
                Err(InvalidToken::UnknownKey) => {}
                Err(invalid) => return Err(NoKey::Invalid(invalid)),
            }
        }

        let flight = Arc::clone(&self.flight).lock_owned().await;
        // Somebody else may have fetched while we waited for the turn.
        let meanwhile = self.usable().filter(|now| {
            before
                .as_ref()
                .is_none_or(|before| !Arc::ptr_eq(before, now))
        });
        let loaded = match meanwhile {
            Some(loaded)
                if !matches!(loaded.keys.select(header), Err(InvalidToken::UnknownKey)) =>
            {
                loaded
            }
            _ => {
                self.permit_fetch()?;
                let issuer = Arc::clone(self);
                // On a task of its own: a caller that goes away must not leave the cool-down
                // running with nothing fetched.
                let fetch = tokio::spawn(async move {
                    let outcome = issuer.load().await;
                    drop(flight);
                    outcome
                });
                match fetch.await {
                    Ok(outcome) => outcome.map_err(NoKey::Unavailable)?,
                    Err(error) => return Err(NoKey::Unavailable(error.to_string())),
                }
            }
        };
        let key = loaded.keys.select(header).map_err(NoKey::Invalid)?;
        verify(key)
    }

    fn usable(&self) -> Option<Arc<Loaded>> {
        self.loaded
            .load_full()
            .filter(|loaded| self.clock.monotonic().saturating_sub(loaded.at) < USABLE_FOR)
    }

    /// Whether a fetch may be made now. With no key set at all it may unless one has just failed;
    /// with one, a token's unknown key is reason enough once in the cool-down.
    fn permit_fetch(&self) -> Result<(), NoKey> {
        let now = self.clock.monotonic();
        let has_keys = self.usable().is_some();
        let mut schedule = self.schedule();
        let permitted = now >= schedule.any_from && (!has_keys || now >= schedule.unknown_key_from);
        match (&schedule.failure, permitted) {
            (_, true) => {
                if has_keys {
                    schedule.unknown_key_from = now + UNKNOWN_KEY_COOL_DOWN;
                }
                Ok(())
            }
            (Some(failure), false) => Err(NoKey::Unavailable(failure.clone())),
            (None, false) => Err(NoKey::Invalid(InvalidToken::UnknownKey)),
        }
    }

    /// Whether a key set is old, and may be asked for again.
    fn is_due(&self, loaded: &Loaded) -> bool {
        let now = self.clock.monotonic();
        now.saturating_sub(loaded.at) >= REFRESH_AFTER && now >= self.schedule().any_from
    }

    /// Fetches the key set in place of an old one, unless somebody else has meanwhile.
    async fn refresh(self: &Arc<Self>, old: &Arc<Loaded>) {
        let flight = Arc::clone(&self.flight).lock_owned().await;
        let is_in_use = self.usable().is_some_and(|now| Arc::ptr_eq(&now, old));
        if !is_in_use || !self.is_due(old) {
            return;
        }
        let issuer = Arc::clone(self);
        // On a task of its own: it goes on where nobody waits any more.
        let fetch = tokio::spawn(async move {
            if let Err(detail) = issuer.load().await {
                tracing::warn!(
                    issuer = issuer.identifier,
                    detail,
                    "the key set could not be refreshed"
                );
            }
            drop(flight);
        });
        let _ = fetch.await;
    }

    pub(super) async fn load(&self) -> Result<Arc<Loaded>, String> {
        match self.fetch_keys().await {
            Ok(keys) => {
                self.schedule().failure = None;
                let loaded = Arc::new(Loaded {
                    keys,
                    at: self.clock.monotonic(),
                });
                self.loaded.store(Some(Arc::clone(&loaded)));
                Ok(loaded)
            }
            Err(detail) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                let mut schedule = self.schedule();
                schedule.any_from = self.clock.monotonic() + FAILURE_COOL_DOWN;
                schedule.key_set = None;
                schedule.failure = Some(detail.clone());
                Err(detail)
            }
        }
    }

    async fn fetch_keys(&self) -> Result<KeySet, String> {
        let location = self.key_set_location().await?;
        self.fetches.fetch_add(1, Ordering::Relaxed);
        let document = self
            .fetch
            .get(&location)
            .await
            .map_err(|error| error.to_string())?;
        KeySet::parse(&document)
            .map_err(|detail| format!("the key set at `{location}` cannot be used: {detail}"))
    }

    /// Where the issuer keeps its keys (OpenID Connect Discovery 1.0 section 4).
    async fn key_set_location(&self) -> Result<Url, String> {
        let known = self.schedule().key_set.clone();
        if let Some((location, at)) = known
            && self.clock.monotonic().saturating_sub(at) < DISCOVER_AFTER
        {
            return Ok(location);
        }
        let metadata_location = self.metadata_location();
        let document = self
            .fetch
            .get(&metadata_location)
            .await
            .map_err(|error| error.to_string())?;
        let location = read_metadata(&document, &self.identifier, &self.url).map_err(|detail| {
            format!("the metadata at `{metadata_location}` cannot be used: {detail}")
        })?;
        self.schedule().key_set = Some((location.clone(), self.clock.monotonic()));
        Ok(location)
    }

    /// The well-known suffix is appended to the issuer (section 4.1), whatever its path.
    fn metadata_location(&self) -> Url {
        let mut location = self.url.clone();
        let path = location.path().trim_end_matches('/').to_owned();
        location.set_path(&format!("{path}/.well-known/openid-configuration"));
        location
    }

    fn schedule(&self) -> std::sync::MutexGuard<'_, Schedule> {
        // Every change of the schedule is one assignment: there is no broken state to fear.
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The `jwks_uri` of a metadata document, if the document is the issuer's own (section 4.3) and the
/// address that it teaches is https on the issuer's host.
fn read_metadata(document: &[u8], identifier: &str, issuer: &Url) -> Result<Url, String> {
    let StrictValue(document) =
        serde_json::from_slice(document).map_err(|error| format!("it is not JSON: {error}"))?;
    let text = |name: &str| document.get(name).and_then(Value::as_str);
    match text("issuer") {
        Some(stated) if stated == identifier => {}
        Some(stated) => {
            let stated = super::token::shortened(stated);
            return Err(format!("its issuer is `{stated}`, not `{identifier}`"));
        }
        None => return Err("it has no `issuer`".to_owned()),
    }
    let location = text("jwks_uri").ok_or("it has no `jwks_uri`")?;
    let location =
        Url::parse(location).map_err(|error| format!("its `jwks_uri` is no URL: {error}"))?;
    let proper = location.scheme() == "https"
        && location.host_str() == issuer.host_str()
        && location.username().is_empty()
        && location.password().is_none();
    match proper {
        true => Ok(location),
        false => Err(format!(
            "its `jwks_uri` is `{location}`, which is not https on the issuer's host"
        )),
    }
}
