//! The broker: from a grant to a token that may be sent now.
//!
//! One [slot](slot) for each key (credential, scopes, audience, and the identity where tokens are not
//! shared). A slot has at most one request in flight; whoever comes meanwhile waits for the same
//! outcome. A token in use is renewed ahead of its expiry; one that expired is never handed out, and
//! a failure is remembered for as long as another attempt would be too early.

mod backoff;
mod single_flight;
mod slot;
mod token;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use countersign_attestors::{Clock, IsolationKey, WorkloadFacts};
use foldhash::fast::RandomState;
use futures_util::StreamExt;
use serde::Serialize;

use self::single_flight::{Departure, Found, Outcome, Perishable, Rejection, SharedObstacle, wait};
use self::slot::{Ask, Failure, Purpose, Slot};
use self::token::{Token, sha256_hexadecimal};
use crate::config::{Config, CredentialConfig};
use crate::policy::{Action, Grant, Selector, TokenHolder};
use crate::providers::{
    Deadline, LONGEST_RETRY_AFTER, MintFailure, MintedToken, Provider, Recovery, SharedParts,
    TokenRequest, provider,
};
use crate::refusal::{Refusal, RefusalCode};
use crate::snapshot::Roots;
use crate::telemetry::metrics::{CredentialMetrics, Metrics};

pub use self::token::{Credential, IssuedToken, Obtained};

/// What [`single_flight`] is built of here.
mod primitives {
    pub(super) use std::sync::{Mutex, MutexGuard};

    pub(super) use arc_swap::ArcSwapOption;
    pub(super) use tokio::sync::watch;
}

/// How often idle slots are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// A slot without a usable token is dropped when nobody asked for it for so long.
const IDLE_WITHOUT_TOKEN: Duration = Duration::from_secs(60);

/// A slot is dropped when nobody asked for it for so long, token or not.
const IDLE_WITH_TOKEN: Duration = Duration::from_secs(600);

/// After a 401 evicted a token, its successors are kept for so long whatever the API says.
const REJECTION_INTERVAL: Duration = Duration::from_secs(30);

/// How long revoking one token upstream again waits after the first failure; doubled with each.
const REVOKE_AGAIN: Duration = Duration::from_secs(1);

/// The longest such wait that the server did not ask for.
const REVOKE_AGAIN_AT_MOST: Duration = Duration::from_secs(60);

/// How many tokens are revoked upstream at one time.
const REVOKED_AT_ONCE: usize = 16;

/// The most tokens that are known to live upstream.
const LIVE_TOKENS: usize = 65_536;

/// Shards of the cache, each replaced as a whole when a slot is added, so that readers take no lock.
const SHARDS: usize = 64;

/// The most slots in a shard: 65,536 in all.
const SLOTS_PER_SHARD: usize = 1024;

/// The broker: one per process.
pub struct Credentials {
    runtime: tokio::runtime::Handle,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    events: TokenEvents,
    entries: ArcSwap<Entries>,
    hasher: RandomState,
    shards: Vec<Shard>,
    /// What was minted and has not expired, whether it is in the cache, was replaced there or was
    /// handed out: all that can be revoked upstream.
    live: Mutex<Vec<LiveToken>>,
}

#[derive(Clone)]
struct LiveToken {
    /// By which it was minted.
    entry: Arc<Entry>,
    slot: Arc<Slot>,
    token: Arc<Token>,
    /// The workload that has it, where it was handed out.
    handed_to: Option<Arc<WorkloadFacts>>,
    /// Whose it is; `None` where workloads share it.
    counts_for: Option<IsolationKey>,
}

impl LiveToken {
    fn new(
        entry: &Arc<Entry>,
        slot: &Arc<Slot>,
        token: &Arc<Token>,
        handed_to: Option<&WorkloadFacts>,
    ) -> Self {
        let holder = handed_to.or_else(|| (!slot.is_shared()).then_some(&slot.facts));
        Self {
            entry: Arc::clone(entry),
            slot: Arc::clone(slot),
            token: Arc::clone(token),
            handed_to: handed_to.cloned().map(Arc::new),
            counts_for: holder.map(WorkloadFacts::isolation_key),
        }
    }
}

/// A configured credential and its provider.
struct Entry {
    config: Arc<CredentialConfig>,
    /// What forbids another attempt for any of its tokens.
    obstacle: Arc<SharedObstacle<Failure>>,
    /// The SHA-256 of the file of roots: another content needs another client.
    roots_sha256: Option<Vec<u8>>,
    provider: Arc<dyn Provider>,
    metrics: CredentialMetrics,
}

/// By the credential's name.
type Entries = HashMap<Arc<str>, Arc<Entry>, RandomState>;

type Slots = HashMap<u64, Vec<Arc<Slot>>, RandomState>;

#[derive(Default)]
struct Shard {
    slots: ArcSwap<Slots>,
    /// Held by the one who replaces `slots`.
    writing: Mutex<()>,
}

/// Told of what happens to tokens, for the log and the audit. Called on the control runtime; must not
/// block.
pub type TokenEvents = Arc<dyn Fn(TokenEvent<'_>) + Send + Sync>;

/// Something that happened to a token.
#[derive(Debug, Clone, Copy)]
pub enum TokenEvent<'a> {
    /// A token was minted.
    Minted {
        /// The credential.
        credential: &'a str,
        /// For whom: attributes, or `shared`.
        identity: &'a str,
        /// Its SHA-256 in hexadecimal.
        token_sha256: &'a str,
        /// When it expires.
        expires_at: SystemTime,
        /// How long the authorization server took.
        upstream: Duration,
    },
    /// A token could not be minted.
    Failed {
        /// The credential.
        credential: &'a str,
        /// For whom: attributes, or `shared`.
        identity: &'a str,
        /// The code.
        code: RefusalCode,
        /// What happened.
        detail: &'a str,
        /// What only the log says.
        internal: Option<&'a str>,
    },
    /// The key that a credential's assertions are signed with is another than before.
    KeyReplaced {
        /// The credential.
        credential: &'a str,
        /// The new key's id.
        key_id: &'a str,
    },
    /// An API refused a token with 401, and it was evicted.
    Rejected {
        /// The credential.
        credential: &'a str,
        /// Its SHA-256 in hexadecimal.
        token_sha256: &'a str,
    },
}

/// One key of the cache, as `credentials list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CredentialStatus {
    /// For whom: attributes and the presented token's digest, or `shared`.
    pub identity: String,
    /// The credential.
    pub credential: String,
    /// The scopes asked for.
    pub scopes: Vec<String>,
    /// The audience asked for.
    pub audience: Option<String>,
    /// When the cached token expires.
    pub expires_at: Option<SystemTime>,
    /// When it was last asked for.
    pub last_used: SystemTime,
    /// The cached token's SHA-256 in hexadecimal.
    pub token_sha256: Option<String>,
    /// The code of the failure that forbids an attempt now.
    pub failure: Option<&'static str>,
}

/// Which tokens to revoke.
#[derive(Debug, Clone)]
pub enum RevokedTokens {
    /// Those of a credential.
    Credential(String),
    /// The one with this SHA-256 in hexadecimal.
    TokenSha256(String),
    /// Those handed to this workload, and those minted for it alone; what workloads share is left.
    Workload(Selector),
}

/// What became of one token that was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RevokedToken {
    /// The credential.
    pub credential: String,
    /// Its SHA-256 in hexadecimal.
    pub token_sha256: String,
    /// Whether the authorization server revoked it too (RFC 7009), does not serve that, or failed.
    pub upstream: UpstreamRevocation,
}

/// What the authorization server did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamRevocation {
    /// It revoked the token.
    Revoked,
    /// It serves no revocation: the token lives to its expiry wherever it was copied to.
    NotServed,
    /// It failed, and asking again would not help: the token must be taken to be live.
    Failed(String),
    /// It has not yet: the token must be taken to be live (RFC 7009 section 2.2.1), and the server is
    /// asked again until the token expires.
    Pending(String),
}

/// Why there is no token.
#[derive(Debug)]
pub struct NotObtained {
    /// What the caller is told.
    pub refusal: Refusal,
    /// How long the authorization server was waited for by a token request that this caller started.
    pub led: Option<Duration>,
}

impl From<Refusal> for NotObtained {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, led: None }
    }
}

impl Credentials {
    /// A broker without credentials, until [`Self::configure`]. All network work is done on `runtime`.
    pub fn new(
        runtime: tokio::runtime::Handle,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
        events: TokenEvents,
    ) -> Arc<Self> {
        let credentials = Arc::new(Self {
            runtime,
            clock,
            metrics,
            events,
            entries: ArcSwap::default(),
            hasher: RandomState::default(),
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            live: Mutex::default(),
        });
        let sweeper = Arc::downgrade(&credentials);
        credentials.runtime.spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                match sweeper.upgrade() {
                    Some(credentials) => credentials.sweep(),
                    None => return,
                }
            }
        });
        credentials
    }

    /// Takes a configuration in, with what the files of roots that its credentials name hold. Tokens of
    /// credentials that did not change are kept; what failed may be tried again. `own_listeners` are the
    /// agent's own addresses, which no server may have. Credentials that are gone can be had until
    /// [`Self::retire`]: requests are decided by the configuration before, until this one is in force, which
    /// is to be at once, since they get tokens of a credential that changed.
    pub fn configure(&self, config: &Config, roots: &Roots, own_listeners: &Arc<[SocketAddr]>) {
        self.configure_credentials(&config.credentials, roots, own_listeners);
    }

    /// Forgets the credentials that are not in the configuration in force, the tokens of what changed, and what
    /// failed.
    pub fn retire(&self, config: &Config) {
        self.retire_others(&config.credentials);
    }

    fn configure_credentials(
        &self,
        credentials: &[Arc<CredentialConfig>],
        roots: &Roots,
        own_listeners: &Arc<[SocketAddr]>,
    ) {
        let known = self.entries.load_full();
        let mut entries = HashMap::clone(&known);
        let mut shared = SharedParts::new(Arc::clone(own_listeners), self.runtime.clone());
        for credential in credentials {
            let roots_sha256 = credential.ca_file().and_then(|path| roots.get(path));
            let unchanged = known.get(&credential.name).filter(|entry| {
                entry.config == *credential && entry.roots_sha256.as_ref() == roots_sha256
            });
            let entry = match unchanged {
                Some(entry) => Arc::clone(entry),
                None => {
                    let (config, obstacle) = match known.get(&credential.name) {
                        Some(entry) if entry.config == *credential => {
                            (Arc::clone(&entry.config), Arc::clone(&entry.obstacle))
                        }
                        _ => (Arc::clone(credential), Arc::new(SharedObstacle::new())),
                    };
                    Arc::new(Entry {
                        config,
                        obstacle,
                        roots_sha256: roots_sha256.cloned(),
                        provider: provider(credential, Arc::clone(&self.clock), &mut shared),
                        metrics: self.metrics.credential(&credential.name),
                    })
                }
            };
            entry.obstacle.forget();
            entry.provider.forget_failures();
            entries.insert(credential.name.clone(), entry);
        }
        self.entries.store(Arc::new(entries));
    }

    fn retire_others(&self, credentials: &[Arc<CredentialConfig>]) {
        let mut entries = HashMap::clone(&self.entries.load());
        entries.retain(|name, _| credentials.iter().any(|kept| kept.name == *name));
        let entries = Arc::new(entries);
        self.entries.store(Arc::clone(&entries));
        self.retain(|slot| {
            slot.flight.forget_failures();
            let entry = entries.get(&*slot.credential);
            entry.is_some_and(|entry| slot.is_of(entry))
        });
    }

    /// A token for the grant's credential, from the cache where it can be. Never returns a token past
    /// its expiry or past what policy allows.
    pub async fn obtain(self: &Arc<Self>, grant: Grant) -> Result<Credential, NotObtained> {
        if grant.action() != Action::Inject {
            let detail = "what was granted is not a token to put on a request";
            return Err(Refusal::new(RefusalCode::PolicyDenied, detail).into());
        }
        let (token, obtained) = self.obtain_token(&ask(&grant, Purpose::Inject)?).await?;
        Ok(Credential::new(token, grant, obtained))
    }

    async fn obtain_token(
        self: &Arc<Self>,
        ask: &Ask<'_>,
    ) -> Result<(Arc<Token>, Obtained), NotObtained> {
        let entries = self.entries.load();
        let entry = entries
            .get(ask.credential)
            .ok_or_else(|| no_longer_configured(ask.credential))?;
        let now = self.clock.monotonic();
        let slot = self.slot(ask, entry, now)?;
        slot.touch(now);
        if let Some(token) = slot.flight.usable_token(now) {
            entry.metrics.cache_hit();
            if token.is_due(now) {
                self.refresh(&slot);
            }
            return Ok((token, Obtained::CacheHit));
        }
        entry.metrics.cache_miss();
        let take_off = |departure| self.take_off(&slot, entry, departure);
        let (landing, is_ours) = match slot.flight.join_or_start(now, take_off) {
            Found::Flight(landing, is_ours) => (landing, is_ours),
            Found::Token(token) => return Ok((token, Obtained::CacheHit)),
            Found::Obstacle(failure) => {
                let has_unusable_token = slot.flight.token().is_some();
                return Err(failure
                    .refusal_while_blocked(ask.credential, has_unusable_token, now)
                    .into());
            }
        };
        drop(entries);
        let started = Instant::now();
        let outcome = wait(landing).await;
        let now = self.clock.monotonic();
        let led = is_ours.then(|| started.elapsed());
        let refusal = match outcome {
            Some(Ok(token)) if token.is_usable(now) => {
                let obtained = match led {
                    Some(upstream) => Obtained::Minted { upstream },
                    None => Obtained::Joined,
                };
                return Ok((token, obtained));
            }
            Some(Ok(_)) => Refusal::new(
                RefusalCode::CredentialExpired,
                format!(
                    "the token for credential `{}` had expired when it arrived",
                    ask.credential
                ),
            )
            .with_retry_after(Duration::from_secs(1)),
            Some(Err(failure)) => failure.refusal(ask.credential, now),
            None => Refusal::new(RefusalCode::ShuttingDown, "the token request was abandoned")
                .with_retry_after(Duration::from_secs(1)),
        };
        Err(NotObtained { refusal, led })
    }

    /// A token to be handed out: minted for this call, one call after another for each key and workload.
    pub async fn issue(self: &Arc<Self>, grant: Grant) -> Result<IssuedToken, Refusal> {
        if grant.action() != Action::Issue {
            return Err(Refusal::new(
                RefusalCode::PolicyDenied,
                "what was granted is not a token to hand out",
            ));
        }
        let started = Instant::now();
        let identity = grant.workload().isolation_key();
        let ask = ask(&grant, Purpose::Issue)?;
        let minted = self.issue_token(&ask, identity).await?;
        let lifetime = grant
            .max_lifetime()
            .map_or(minted.expires_in, |most| most.min(minted.expires_in));
        Ok(IssuedToken {
            token_sha256: token_sha256(&minted).into(),
            expires_at: minted.sent_at_wall + lifetime,
            scope: minted.scope,
            access_token: minted.access_token,
            upstream: started.elapsed(),
            grant,
        })
    }

    async fn issue_token(
        self: &Arc<Self>,
        ask: &Ask<'_>,
        identity: &IsolationKey,
    ) -> Result<MintedToken, Refusal> {
        let entry = self
            .entries
            .load()
            .get(ask.credential)
            .map(Arc::clone)
            .ok_or_else(|| no_longer_configured(ask.credential))?;
        let slot = self.slot(ask, &entry, self.clock.monotonic())?;
        let turn = slot.turns.of(identity);
        let Ok(_turn) = tokio::time::timeout(entry.provider.timeout(), turn.lock()).await else {
            let detail = format!(
                "no token for credential `{}`: others that this workload asked for took all of the time",
                ask.credential
            );
            return Err(Refusal::new(RefusalCode::TokenServerTimeout, detail));
        };
        let now = self.clock.monotonic();
        slot.touch(now);
        if let Some(failure) = slot.flight.obstacle(now) {
            return Err(failure.refusal_while_blocked(ask.credential, false, now));
        }
        let (credentials, flight_slot) = (Arc::clone(self), Arc::clone(&slot));
        let flight_entry = Arc::clone(&entry);
        let task = self.runtime.spawn(async move {
            let outcome = credentials.mint(&flight_slot, &flight_entry).await;
            outcome.map_err(|failure| flight_slot.fail(failure, credentials.clock.monotonic()))
        });
        match task.await {
            Ok(Ok(minted)) => {
                slot.flight.forget_failures();
                if let Some(token) = Token::new(&minted, slot.max_lifetime) {
                    self.keep_revocable(&entry, &slot, &Arc::new(token), Some(ask.facts));
                }
                Ok(minted)
            }
            Ok(Err(failure)) => Err(failure.refusal(ask.credential, self.clock.monotonic())),
            Err(_) => Err(Refusal::new(
                RefusalCode::ShuttingDown,
                "the token request was abandoned",
            )),
        }
    }

    /// An API answered 401 `invalid_token`: evicts this token, once per key in 30 s, and says whether
    /// asking again is worth it.
    pub fn reject(&self, credential: &Credential) -> bool {
        let Ok(ask) = ask(credential.grant(), Purpose::Inject) else {
            return false;
        };
        self.reject_token(&ask, credential.token())
    }

    fn reject_token(&self, ask: &Ask<'_>, token: &Arc<Token>) -> bool {
        let now = self.clock.monotonic();
        let entries = self.entries.load();
        let Some(slot) = entries
            .get(ask.credential)
            .and_then(|entry| self.find(ask, entry))
        else {
            return false;
        };
        match slot.flight.reject(token, now, REJECTION_INTERVAL) {
            Rejection::Dropped => {}
            Rejection::Replaced => return true,
            Rejection::Kept => return false,
        }
        (self.events)(TokenEvent::Rejected {
            credential: ask.credential,
            token_sha256: token.sha256(),
        });
        true
    }

    /// Every key that was asked for lately, by credential and identity.
    pub fn list(&self) -> Vec<CredentialStatus> {
        let (now, wall) = (self.clock.monotonic(), self.clock.wall());
        let mut list: Vec<_> = self
            .all_slots()
            .into_iter()
            .filter(|slot| slot.purpose == Purpose::Inject)
            .map(|slot| {
                let token = slot.flight.usable_token(now);
                let unused_for = now.saturating_sub(slot.last_used());
                CredentialStatus {
                    identity: slot.request.subject.describe(),
                    credential: slot.credential.to_string(),
                    scopes: slot.request.scopes.clone(),
                    audience: slot.request.audience.clone(),
                    expires_at: token.as_ref().map(|token| token.expires_at()),
                    last_used: wall.checked_sub(unused_for).unwrap_or(wall),
                    token_sha256: token.map(|token| token.sha256().to_string()),
                    failure: slot
                        .flight
                        .obstacle(now)
                        .map(|failure| failure.mint.code.as_str()),
                }
            })
            .collect();
        list.sort_by(|left, right| {
            (&left.credential, &left.identity, &left.scopes).cmp(&(
                &right.credential,
                &right.identity,
                &right.scopes,
            ))
        });
        list
    }

    /// Whom the token with this SHA-256 is for; `None` where no such token of ours lives.
    pub fn holder(&self, sha256: &str) -> Option<TokenHolder> {
        let is_it = |token: &Token| token.sha256().eq_ignore_ascii_case(sha256);
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = live.iter().find(|known| is_it(&known.token)) {
            return Some(holder_of(&known.slot, known.handed_to.as_deref()));
        }
        let slots = self.all_slots();
        let slot = slots
            .iter()
            .find(|slot| slot.flight.token().is_some_and(|token| is_it(&token)))?;
        Some(holder_of(slot, None))
    }

    /// Whether a token of this credential is known to live.
    pub fn has_tokens_of(&self, credential: &str) -> bool {
        let now = self.clock.monotonic();
        let lives = |token: &Token| now < token.lives_until();
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.iter()
            .any(|known| &*known.slot.credential == credential && lives(&known.token))
    }

    /// Evicts tokens at once, and asks their authorization servers to revoke them: what was replaced or
    /// handed out as well. Waits for the answers at most `wait`; whoever has not revoked one by then is
    /// asked on.
    pub async fn revoke_upstream(
        self: &Arc<Self>,
        revoked: &RevokedTokens,
        wait: Duration,
    ) -> Vec<RevokedToken> {
        let meant = self.take_live(revoked);
        let mut outcomes: Vec<RevokedToken> = meant
            .iter()
            .map(|known| RevokedToken {
                credential: known.slot.credential.to_string(),
                token_sha256: known.token.sha256().to_string(),
                upstream: UpstreamRevocation::Pending("no answer yet".to_owned()),
            })
            .collect();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let credentials = Arc::clone(self);
        self.runtime.spawn(async move {
            let revoking = meant.into_iter().enumerate().map(|(index, known)| {
                let (credentials, tell) = (Arc::clone(&credentials), tell.clone());
                async move {
                    let (upstream, again_after) = credentials.revoke_one(&known).await;
                    let _ = tell.send((index, upstream));
                    if let Some(pause) = again_after {
                        let again = Arc::clone(&credentials).revoke_again(known, pause);
                        credentials.runtime.spawn(again);
                    }
                }
            });
            futures_util::stream::iter(revoking)
                .buffer_unordered(REVOKED_AT_ONCE)
                .collect::<Vec<()>>()
                .await;
        });
        let collect = async {
            while let Some((index, upstream)) = told.recv().await {
                if let Some(outcome) = outcomes.get_mut(index) {
                    outcome.upstream = upstream;
                }
            }
        };
        let _ = tokio::time::timeout(wait, collect).await;
        outcomes
    }

    /// Takes the tokens that are meant out of what is known to live, and out of the cache.
    fn take_live(&self, revoked: &RevokedTokens) -> Vec<LiveToken> {
        let now = self.clock.monotonic();
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let is_meant = |slot: &Slot, token: &Token, handed_to: Option<&WorkloadFacts>| {
            now < token.lives_until() && is_meant(revoked, slot, token, handed_to)
        };
        let mut meant: Vec<LiveToken> = live
            .extract_if(.., |known| {
                is_meant(&known.slot, &known.token, known.handed_to.as_deref())
            })
            .collect();
        for known in &meant {
            known.slot.flight.drop_token(&known.token);
        }
        // What had to give way to others is in the cache still, and what has just arrived is there first.
        for slot in self.all_slots() {
            if let Some(token) = slot.flight.token()
                && is_meant(&slot, &token, None)
                && let Some(entry) = self.entry_of(&slot)
            {
                slot.flight.drop_token(&token);
                meant.push(LiveToken::new(&entry, &slot, &token, None));
            }
        }
        meant
    }

    /// Asks once; says what came of it, and how long to wait where it is worth asking again.
    async fn revoke_one(&self, known: &LiveToken) -> (UpstreamRevocation, Option<Duration>) {
        let entry = self.entry_to_revoke_by(known);
        let deadline = Deadline::after(entry.provider.timeout());
        let subject = &known.slot.request.subject;
        let revoked = entry
            .provider
            .revoke(&known.token.secret(), subject, deadline)
            .await;
        match revoked {
            Ok(true) => (UpstreamRevocation::Revoked, None),
            Ok(false) => (UpstreamRevocation::NotServed, None),
            Err(failure) => match failure.recovery {
                Recovery::Backoff { retry_after } => (
                    UpstreamRevocation::Pending(failure.detail),
                    Some(retry_after.unwrap_or_default()),
                ),
                Recovery::Hold | Recovery::Permanent => {
                    (UpstreamRevocation::Failed(failure.detail), None)
                }
            },
        }
    }

    /// The one in force where its server and client are those that the token was minted by: its roots may be
    /// newer. Another server would say of a token that it does not know that it is revoked (RFC 7009 section 2.2).
    fn entry_to_revoke_by(&self, known: &LiveToken) -> Arc<Entry> {
        let alike = self.entry_of(&known.slot);
        alike.unwrap_or_else(|| Arc::clone(&known.entry))
    }

    /// The entry in force by which the slot's tokens are minted.
    fn entry_of(&self, slot: &Slot) -> Option<Arc<Entry>> {
        let entries = self.entries.load();
        let entry = entries.get(&*slot.credential)?;
        slot.is_of(entry).then(|| Arc::clone(entry))
    }

    /// Asks until the server has revoked the token or it has expired.
    async fn revoke_again(self: Arc<Self>, known: LiveToken, asked_for: Duration) {
        let (credential, token_sha256) = (&*known.slot.credential, &**known.token.sha256());
        let (mut asked_for, mut ours) = (asked_for, REVOKE_AGAIN);
        loop {
            let pause = ours.mul_f64(0.5 + 0.5 * backoff::random_fraction());
            let pause = pause.max(asked_for.min(LONGEST_RETRY_AFTER));
            if self.clock.monotonic() + pause >= known.token.lives_until() {
                tracing::warn!(
                    credential,
                    token_sha256,
                    "the token expires before its authorization server would have revoked it"
                );
                return;
            }
            tokio::time::sleep(pause).await;
            match self.revoke_one(&known).await {
                (UpstreamRevocation::Pending(detail), again_after) => {
                    tracing::warn!(
                        credential,
                        token_sha256,
                        detail,
                        "token not revoked upstream yet"
                    );
                    asked_for = again_after.unwrap_or_default();
                    ours = (2 * ours).min(REVOKE_AGAIN_AT_MOST);
                }
                (outcome, _) => {
                    tracing::info!(
                        credential,
                        token_sha256,
                        ?outcome,
                        "revoking upstream ended"
                    );
                    return;
                }
            }
        }
    }

    /// Remembers a token for as long as it lives upstream.
    fn keep_revocable(
        &self,
        entry: &Arc<Entry>,
        slot: &Arc<Slot>,
        token: &Arc<Token>,
        handed_to: Option<&WorkloadFacts>,
    ) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if live.len() >= LIVE_TOKENS {
            make_room(&mut live);
        }
        live.push(LiveToken::new(entry, slot, token, handed_to));
    }

    /// The slot of `ask`, made where there is none.
    fn slot(&self, ask: &Ask<'_>, entry: &Entry, now: Duration) -> Result<Arc<Slot>, Refusal> {
        if let Some(slot) = self.find(ask, entry) {
            return Ok(slot);
        }
        let parts = entry.provider.subject_parts();
        let request = TokenRequest {
            scopes: ask.scopes.to_vec(),
            audience: ask.audience.map(str::to_owned),
            subject: parts.of(ask.facts, ask.presented, ask.presented_until)?,
        };
        let hash = self.hash(ask, entry);
        let Some(shard) = self.shard(hash) else {
            return Err(no_longer_configured(ask.credential));
        };
        let _writing = shard.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // Another caller may have made it meanwhile.
        if let Some(slot) = self.find(ask, entry) {
            return Ok(slot);
        }
        let slot = Arc::new(Slot::new(ask, entry, request, now));
        let mut slots = Slots::clone(&shard.slots.load());
        if slots.values().map(Vec::len).sum::<usize>() >= SLOTS_PER_SHARD {
            drop_least_recently_used(&mut slots);
        }
        slots.entry(hash).or_default().push(Arc::clone(&slot));
        shard.slots.store(Arc::new(slots));
        Ok(slot)
    }

    fn find(&self, ask: &Ask<'_>, entry: &Entry) -> Option<Arc<Slot>> {
        let hash = self.hash(ask, entry);
        let slots = self.shard(hash)?.slots.load();
        slots
            .get(&hash)?
            .iter()
            .find(|slot| slot.answers(ask, entry))
            .map(Arc::clone)
    }

    fn hash(&self, ask: &Ask<'_>, entry: &Entry) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        (
            ask.purpose,
            ask.credential,
            ask.scopes,
            ask.audience,
            ask.max_lifetime,
        )
            .hash(&mut hasher);
        let parts = entry.provider.subject_parts();
        for (group, name) in &parts.attributes {
            ask.facts.attribute(group, name).hash(&mut hasher);
        }
        if let Some(token) = parts.presented_in(ask.facts, ask.presented) {
            token.sha256().hash(&mut hasher);
        }
        hasher.finish()
    }

    fn shard(&self, hash: u64) -> Option<&Shard> {
        self.shards
            .get(usize::try_from(hash).unwrap_or_default() % SHARDS)
    }

    fn all_slots(&self) -> Vec<Arc<Slot>> {
        self.shards
            .iter()
            .flat_map(|shard| {
                let slots = shard.slots.load();
                slots.values().flatten().map(Arc::clone).collect::<Vec<_>>()
            })
            .collect()
    }

    fn retain(&self, keep: impl Fn(&Slot) -> bool) {
        for shard in &self.shards {
            let _writing = shard.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let mut slots = Slots::clone(&shard.slots.load());
            slots.retain(|_, same_hash| {
                same_hash.retain(|slot| keep(slot));
                !same_hash.is_empty()
            });
            shard.slots.store(Arc::new(slots));
        }
    }

    /// Wipes what has expired and drops whom nobody asked for.
    fn sweep(&self) {
        let (now, wall) = (self.clock.monotonic(), self.clock.wall());
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|known| now < known.token.lives_until());
        self.retain(|slot| {
            let idle = now.saturating_sub(slot.last_used());
            let is_held = slot.flight.is_in_the_air() || slot.flight.obstacle(now).is_some();
            // Once, and after a flight was looked for: one that lands meanwhile has brought another.
            let token = slot.flight.token();
            let is_usable = token.as_ref().is_some_and(|token| token.is_usable(now));
            if let Some(expired) = token
                && !is_usable
                && idle >= IDLE_WITHOUT_TOKEN
            {
                slot.flight.drop_token(&expired);
            }
            // What only another configuration can mend is remembered until there is one, for as long as
            // the same could be asked for again.
            let is_permanent = slot
                .flight
                .last_obstacle()
                .is_some_and(|failure| failure.until.is_none());
            let subject = &slot.request.subject;
            let can_be_asked_for = subject.presented_until.is_none_or(|until| wall < until);
            if is_permanent && can_be_asked_for {
                return true;
            }
            let is_idle = match is_usable || is_held {
                true => idle >= IDLE_WITH_TOKEN,
                false => idle >= IDLE_WITHOUT_TOKEN,
            };
            !is_idle
        });
    }

    /// Renews a token ahead of its expiry, if it was used in the last half of its life.
    fn refresh(self: &Arc<Self>, slot: &Arc<Slot>) {
        let now = self.clock.monotonic();
        let usable = slot.flight.usable_token(now);
        let Some(token) = usable.filter(|token| token.is_due(now)) else {
            return;
        };
        let unused_for = now.saturating_sub(slot.last_used());
        let subject_has_expired = slot
            .request
            .subject
            .presented_until
            .is_some_and(|until| self.clock.wall() >= until);
        if unused_for >= token.lifetime() / 2 || subject_has_expired {
            return;
        }
        let Some(entry) = self.entry_of(slot) else {
            return;
        };
        let take_off = |departure| self.take_off(slot, &entry, departure);
        slot.flight.renew(&token, now, take_off);
    }

    /// Looks at a slot again at the monotonic time `at`.
    fn refresh_later(self: &Arc<Self>, slot: &Arc<Slot>, at: Duration) {
        let wait = at.saturating_sub(self.clock.monotonic());
        let (credentials, slot) = (Arc::downgrade(self), Arc::downgrade(slot));
        self.runtime.spawn(async move {
            tokio::time::sleep(wait).await;
            if let (Some(credentials), Some(slot)) = (credentials.upgrade(), slot.upgrade()) {
                let shared = slot.flight.shared().at(credentials.clock.monotonic());
                let held_up_until = shared.and_then(|obstacle| obstacle.until);
                match (held_up_until, slot.flight.token()) {
                    (Some(until), Some(token)) => {
                        let spread = backoff::spread(token.lifetime(), backoff::random_fraction());
                        credentials.refresh_later(&slot, until + spread);
                    }
                    _ => credentials.refresh(&slot),
                }
            }
        });
    }

    fn take_off(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        entry: &Arc<Entry>,
        departure: Departure<Token, Failure>,
    ) {
        let (credentials, entry) = (Arc::clone(self), Arc::clone(entry));
        let slot = Arc::clone(slot);
        self.runtime.spawn(async move {
            let minted = credentials.mint(&slot, &entry).await;
            departure.land(credentials.take_in(&entry, &slot, minted));
        });
    }

    async fn mint(&self, slot: &Slot, entry: &Entry) -> Result<MintedToken, MintFailure> {
        let deadline = Deadline::after(entry.provider.timeout());
        let started = Instant::now();
        let is_refresh = slot.flight.usable_token(self.clock.monotonic()).is_some();
        let minted = entry
            .provider
            .mint(&slot.request, slot.flight.is_untroubled(), deadline)
            .await;
        let upstream = started.elapsed();
        if let Some(key_id) = entry.provider.take_replaced_key() {
            (self.events)(TokenEvent::KeyReplaced {
                credential: &slot.credential,
                key_id: &key_id,
            });
        }
        let failure = minted.as_ref().err().map(|failure| failure.code);
        self.metrics
            .token_request(&slot.credential, failure, upstream);
        if is_refresh {
            self.metrics
                .token_refresh(&slot.credential, failure.is_none());
        }
        let identity = slot.request.subject.describe();
        match &minted {
            Ok(token) => (self.events)(TokenEvent::Minted {
                credential: &slot.credential,
                identity: &identity,
                token_sha256: &token_sha256(token),
                expires_at: token.sent_at_wall + token.expires_in,
                upstream,
            }),
            Err(failure) => (self.events)(TokenEvent::Failed {
                credential: &slot.credential,
                identity: &identity,
                code: failure.code,
                detail: &failure.detail,
                internal: failure.internal.as_deref(),
            }),
        }
        minted
    }

    /// Notes what a flight brought in its slot, and when to look at it again.
    fn take_in(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        slot: &Arc<Slot>,
        minted: Result<MintedToken, MintFailure>,
    ) -> Outcome<Token, Failure> {
        let token = minted.and_then(|minted| {
            Token::new(&minted, slot.max_lifetime).ok_or_else(|| {
                MintFailure::new(
                    RefusalCode::TokenResponseInvalid,
                    "the token cannot stand in a header",
                    Recovery::Backoff { retry_after: None },
                )
            })
        });
        match token {
            Ok(token) => {
                let token = Arc::new(token);
                slot.flight.succeed(&token);
                self.keep_revocable(entry, slot, &token, None);
                self.refresh_later(slot, token.refresh_at());
                Ok(token)
            }
            Err(failure) => {
                let now = self.clock.monotonic();
                let failure = slot.fail(failure, now);
                if let Some(until) = failure.until
                    && slot.flight.usable_token(now).is_some()
                {
                    self.refresh_later(slot, until);
                }
                Err(failure)
            }
        }
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Credentials")
            .finish_non_exhaustive()
    }
}

fn is_meant(
    revoked: &RevokedTokens,
    slot: &Slot,
    token: &Token,
    handed_to: Option<&WorkloadFacts>,
) -> bool {
    match revoked {
        RevokedTokens::Credential(name) => *slot.credential == **name,
        RevokedTokens::TokenSha256(sha256) => token.sha256().eq_ignore_ascii_case(sha256),
        RevokedTokens::Workload(selector) => match handed_to {
            Some(facts) => selector.matches(facts),
            None => !slot.is_shared() && selector.matches(&slot.facts),
        },
    }
}

/// Forgets half of the tokens that count for whom most do, first those that live shortest: nobody makes another's
/// impossible to revoke.
fn make_room(live: &mut Vec<LiveToken>) {
    let mut counts: HashMap<&Option<IsolationKey>, usize> = HashMap::new();
    for known in live.iter() {
        *counts.entry(&known.counts_for).or_default() += 1;
    }
    let Some((most, count)) = counts.into_iter().max_by_key(|(_, count)| *count) else {
        return;
    };
    let (most, mut surplus) = (most.clone(), count.div_ceil(2));
    tracing::warn!(
        identity = most.as_ref().map_or("shared", |identity| &*identity.0),
        forgotten = surplus,
        "too many tokens live at once: those that were handed out can no longer be revoked upstream"
    );
    live.sort_by_key(|known| known.token.lives_until());
    live.retain(|known| {
        let goes = surplus > 0 && known.counts_for == most;
        surplus -= usize::from(goes);
        !goes
    });
}

/// Whom a slot's token is for: what makes its tokens differ from others', and, for one that is handed
/// out, who it is handed to.
fn holder_of(slot: &Slot, handed_to: Option<&WorkloadFacts>) -> TokenHolder {
    let subject = &slot.request.subject;
    let mut workload: Vec<Selector> = subject
        .attributes
        .iter()
        .map(|((group, name), value)| Selector {
            group: group.clone(),
            name: name.clone(),
            value: value.to_string(),
        })
        .collect();
    match (handed_to, &subject.presented) {
        (Some(facts), _) => workload.extend(identity_of(facts)),
        // A job presents another token each time: it is known by whose token it is.
        (None, Some(_)) => workload.extend(selectors(&slot.facts, &["iss", "sub"])),
        (None, None) => {}
    }
    TokenHolder {
        credential: slot.credential.to_string(),
        workload,
    }
}

/// What tells a workload from its neighbours, as isolation keys do, whatever its process is.
fn identity_of(facts: &WorkloadFacts) -> Vec<Selector> {
    let container = facts.attribute("container", "id").is_some();
    let names: &[&str] = match container {
        true => &["id", "iss", "sub"],
        false => &["uid", "system_unit", "user_unit", "iss", "sub"],
    };
    selectors(facts, names)
}

/// The attributes with these names, in whichever groups they are.
fn selectors(facts: &WorkloadFacts, names: &[&str]) -> Vec<Selector> {
    facts
        .groups
        .iter()
        .flat_map(|(group, attributes)| {
            names.iter().filter_map(move |name| {
                Some(Selector {
                    group: group.clone(),
                    name: (*name).to_owned(),
                    value: attributes.get(*name)?.to_string(),
                })
            })
        })
        .collect()
}

fn ask(grant: &Grant, purpose: Purpose) -> Result<Ask<'_>, Refusal> {
    let credential = grant.credential().ok_or_else(|| {
        Refusal::new(
            RefusalCode::PolicyDenied,
            "the decision is about no credential",
        )
    })?;
    let workload = grant.workload();
    Ok(Ask {
        purpose,
        credential: &credential.name,
        scopes: grant.scopes(),
        audience: grant.audience().map(AsRef::as_ref),
        max_lifetime: grant.max_lifetime(),
        facts: workload.facts(),
        presented: workload.presented(),
        presented_until: workload.valid_until(),
    })
}

fn no_longer_configured(credential: &str) -> Refusal {
    Refusal::new(
        RefusalCode::PolicyDenied,
        format!("credential `{credential}` is no longer configured"),
    )
}

fn token_sha256(minted: &MintedToken) -> String {
    use secrecy::ExposeSecret;
    sha256_hexadecimal(minted.access_token.expose_secret().as_bytes())
}

fn drop_least_recently_used(slots: &mut Slots) {
    let oldest = slots
        .values()
        .flatten()
        .min_by_key(|slot| slot.last_used())
        .map(Arc::clone);
    if let Some(oldest) = oldest {
        slots.retain(|_, same_hash| {
            same_hash.retain(|slot| !Arc::ptr_eq(slot, &oldest));
            !same_hash.is_empty()
        });
    }
}

#[cfg(test)]
mod tests;
