//! One key's place in the cache: its token, its flight, and what failed last.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use countersign_attestors::{IsolationKey, PresentedToken, WorkloadFacts};

use super::Entry;
use super::backoff;
use super::single_flight::{Obstacle, SingleFlight};
use super::token::Token;
use crate::config::CredentialConfig;
use crate::providers::{MintFailure, Recovery, TokenRequest};
use crate::refusal::{Refusal, RefusalCode};

/// What tokens are for: one handed out is never one that is injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    Inject,
    Issue,
}

/// What a caller asks for, borrowed from its grant.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) purpose: Purpose,
    pub(super) credential: &'a str,
    pub(super) scopes: &'a [String],
    pub(super) audience: Option<&'a str>,
    pub(super) max_lifetime: Option<Duration>,
    pub(super) facts: &'a WorkloadFacts,
    pub(super) presented: Option<&'a PresentedToken>,
    pub(super) presented_until: Option<std::time::SystemTime>,
}

/// A slot of the cache. INVARIANT: `request` and the key's other parts never change.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) purpose: Purpose,
    pub(super) credential: Arc<str>,
    /// By which its tokens are minted.
    config: Arc<CredentialConfig>,
    pub(super) max_lifetime: Option<Duration>,
    pub(super) request: TokenRequest,
    pub(super) facts: WorkloadFacts,
    pub(super) flight: SingleFlight<Token, Failure>,
    last_used_milliseconds: AtomicU64,
    pub(super) turns: Turns,
}

/// A failure, and until when (monotonic) it stands for further attempts; `None`: until the
/// configuration changes.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) mint: MintFailure,
    pub(super) until: Option<Duration>,
}

/// For each workload that asks for a token to be handed out, what its one request holds.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<IsolationKey, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// What to hold while asking for `identity`.
    pub(super) fn of(&self, identity: &IsolationKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(identity.clone()).or_default())
    }
}

impl Slot {
    pub(super) fn new(ask: &Ask<'_>, entry: &Entry, request: TokenRequest, now: Duration) -> Self {
        Self {
            purpose: ask.purpose,
            credential: ask.credential.into(),
            config: Arc::clone(&entry.config),
            max_lifetime: ask.max_lifetime,
            request,
            facts: ask.facts.clone(),
            flight: SingleFlight::new(Arc::clone(&entry.obstacle)),
            last_used_milliseconds: AtomicU64::new(milliseconds(now)),
            turns: Turns::default(),
        }
    }

    /// Whether its tokens are minted by this entry's configuration.
    pub(super) fn is_of(&self, entry: &Entry) -> bool {
        Arc::ptr_eq(&self.config, &entry.config)
    }

    /// Whether this slot is the one that `ask` is about, of the credential of `entry`; allocates nothing.
    pub(super) fn answers(&self, ask: &Ask<'_>, entry: &Entry) -> bool {
        let parts = entry.provider.subject_parts();
        self.is_of(entry)
            && self.purpose == ask.purpose
            && self.max_lifetime == ask.max_lifetime
            && self.request.scopes == ask.scopes
            && self.request.audience.as_deref() == ask.audience
            && parts.matches(&self.request.subject, ask.facts, ask.presented)
    }

    pub(super) fn touch(&self, now: Duration) {
        self.last_used_milliseconds
            .store(milliseconds(now), Ordering::Relaxed);
    }

    pub(super) fn last_used(&self) -> Duration {
        Duration::from_millis(self.last_used_milliseconds.load(Ordering::Relaxed))
    }

    /// Whether workloads share its tokens.
    pub(super) fn is_shared(&self) -> bool {
        let subject = &self.request.subject;
        subject.attributes.is_empty() && subject.presented.is_none()
    }

    /// Takes in a failure, and says until when it stands: for other tokens of the credential too, where the server
    /// is in trouble and asked to be left alone, or throttles or refuses the client that all workloads share.
    pub(super) fn fail(&self, mint: MintFailure, now: Duration) -> Arc<Failure> {
        let is_common = match (mint.recovery, mint.code) {
            (
                Recovery::Backoff {
                    retry_after: Some(_),
                },
                RefusalCode::TokenServerThrottled,
            )
            | (Recovery::Hold, RefusalCode::InvalidClient | RefusalCode::ClockSkew) => {
                self.is_shared()
            }
            (Recovery::Backoff { retry_after }, _) => retry_after.is_some(),
            (Recovery::Hold | Recovery::Permanent, _) => false,
        };
        let failure = self.flight.fail(|history| {
            let wait = backoff::wait(
                mint.recovery,
                history.failures,
                history.last_lifetime,
                backoff::random_fraction(),
            );
            Failure {
                mint,
                until: wait.map(|wait| now + wait),
            }
        });
        if let (true, Some(until)) = (is_common, failure.until) {
            self.flight.shared().raise(&failure, until);
        }
        failure
    }
}

impl Obstacle for Failure {
    fn stands(&self, now: Duration) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

impl Failure {
    /// The refusal of a caller whose own attempt failed so.
    pub(super) fn refusal(&self, credential: &str, now: Duration) -> Refusal {
        self.refuse(self.mint.code, credential, now)
    }

    /// The refusal of a caller for whom no attempt is made because of this failure: what the server
    /// denied keeps its name, while trouble that may pass is a backoff.
    pub(super) fn refusal_while_blocked(
        &self,
        credential: &str,
        has_unusable_token: bool,
        now: Duration,
    ) -> Refusal {
        let code = match (self.mint.recovery, has_unusable_token) {
            (Recovery::Hold | Recovery::Permanent, _) => self.mint.code,
            (Recovery::Backoff { .. }, true) => RefusalCode::CredentialExpired,
            (Recovery::Backoff { .. }, false) => RefusalCode::TokenBackoff,
        };
        self.refuse(code, credential, now)
    }

    fn refuse(&self, code: RefusalCode, credential: &str, now: Duration) -> Refusal {
        let mut refusal = Refusal::new(
            code,
            format!(
                "no token for credential `{credential}`: {}",
                self.mint.detail
            ),
        );
        refusal.internal.clone_from(&self.mint.internal);
        if code.properties().status == http::StatusCode::SERVICE_UNAVAILABLE {
            let remaining = self.until.unwrap_or(now).saturating_sub(now);
            // Whole seconds on the wire: rounded up, so that nobody comes back too early.
            let seconds = remaining.as_millis().div_ceil(1000).max(1);
            refusal.retry_after = Some(Duration::from_secs(
                u64::try_from(seconds).unwrap_or(u64::MAX),
            ));
        }
        refusal
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
