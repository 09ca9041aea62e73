//! One key's place in the cache: its token, its flight, and what failed last.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use countersign_attestors::{PresentedToken, WorkloadFacts};
use tokio::sync::watch;

use super::backoff;
use super::token::Token;
use crate::providers::{MintFailure, Recovery, SubjectParts, TokenRequest};
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
    pub(super) max_lifetime: Option<Duration>,
    pub(super) request: TokenRequest,
    pub(super) facts: WorkloadFacts,
    current: ArcSwapOption<Token>,
    last_used_milliseconds: AtomicU64,
    state: Mutex<State>,
    /// Held by the one request for a token to be handed out.
    pub(super) turn: tokio::sync::Mutex<()>,
}

/// How a flight ended; `None` while it lasts.
pub(super) type Landing = watch::Receiver<Option<Result<Arc<Token>, Arc<Failure>>>>;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) flight: Option<Landing>,
    pub(super) blocked: Option<Arc<Failure>>,
    pub(super) last_rejected: Option<Duration>,
    failures: u32,
    last_lifetime: Option<Duration>,
}

/// A failure, and until when (monotonic) it stands for further attempts; `None`: until the
/// configuration changes.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) mint: MintFailure,
    pub(super) until: Option<Duration>,
}

impl Slot {
    pub(super) fn new(ask: &Ask<'_>, request: TokenRequest, now: Duration) -> Self {
        Self {
            purpose: ask.purpose,
            credential: ask.credential.into(),
            max_lifetime: ask.max_lifetime,
            request,
            facts: ask.facts.clone(),
            current: ArcSwapOption::empty(),
            last_used_milliseconds: AtomicU64::new(milliseconds(now)),
            state: Mutex::default(),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Whether this slot is the one that `ask` is about; allocates nothing.
    pub(super) fn answers(&self, ask: &Ask<'_>, parts: &SubjectParts) -> bool {
        self.purpose == ask.purpose
            && *self.credential == *ask.credential
            && self.max_lifetime == ask.max_lifetime
            && self.request.scopes == ask.scopes
            && self.request.audience.as_deref() == ask.audience
            && parts.matches(&self.request.subject, ask.facts, ask.presented)
    }

    pub(super) fn token(&self) -> Option<Arc<Token>> {
        self.current.load_full()
    }

    pub(super) fn usable_token(&self, now: Duration) -> Option<Arc<Token>> {
        self.current
            .load_full()
            .filter(|token| token.is_usable(now))
    }

    pub(super) fn drop_token(&self) {
        self.current.store(None);
    }

    /// Drops `token`, and no other that may have taken its place.
    pub(super) fn drop_this_token(&self, token: &Arc<Token>) {
        let current = self.current.load();
        if current
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, token))
        {
            self.current.compare_and_swap(&*current, None);
        }
    }

    pub(super) fn touch(&self, now: Duration) {
        self.last_used_milliseconds
            .store(milliseconds(now), Ordering::Relaxed);
    }

    pub(super) fn last_used(&self) -> Duration {
        Duration::from_millis(self.last_used_milliseconds.load(Ordering::Relaxed))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a new token.
    pub(super) fn succeed(&self, token: &Arc<Token>) {
        let mut state = self.state();
        state.flight = None;
        state.failures = 0;
        state.blocked = None;
        state.last_lifetime = Some(token.lifetime());
        if self.purpose == Purpose::Inject {
            self.current.store(Some(Arc::clone(token)));
        }
    }

    /// Takes in a failure, and says until when it stands.
    pub(super) fn fail(&self, mint: MintFailure, now: Duration) -> Arc<Failure> {
        let mut state = self.state();
        state.flight = None;
        state.failures = state.failures.saturating_add(1);
        let wait = backoff::wait(
            mint.recovery,
            state.failures,
            state.last_lifetime,
            backoff::random_fraction(),
        );
        let failure = Arc::new(Failure {
            mint,
            until: wait.map(|wait| now + wait),
        });
        state.blocked = Some(Arc::clone(&failure));
        failure
    }

    /// Whether the last attempt, if any, succeeded.
    pub(super) fn is_untroubled(&self) -> bool {
        self.state().failures == 0
    }

    /// Forgets what failed: the configuration has changed.
    pub(super) fn forget_failures(&self) {
        let mut state = self.state();
        state.failures = 0;
        state.blocked = None;
    }
}

impl State {
    /// The flight that others may wait for. One whose task was dropped, by a panic or at the runtime's
    /// end, will never land.
    pub(super) fn flight_in_the_air(&self) -> Option<Landing> {
        let landing = self.flight.clone()?;
        let is_lost = landing.has_changed().is_err() && landing.borrow().is_none();
        (!is_lost).then_some(landing)
    }

    /// The failure that still forbids an attempt at `now`.
    pub(super) fn blocking(&self, now: Duration) -> Option<&Arc<Failure>> {
        self.blocked
            .as_ref()
            .filter(|failure| failure.until.is_none_or(|until| now < until))
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
        has_expired_token: bool,
        now: Duration,
    ) -> Refusal {
        let code = match (self.mint.recovery, has_expired_token) {
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
