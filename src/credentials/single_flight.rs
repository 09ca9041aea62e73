//! One flight for many callers: who asks for a key's token while it is fetched waits for that one.
//!
//! Knows neither authorization servers nor networks, and is built of what [`super::primitives`] names.
//! `tests/model` builds it of loom's, and goes through the orders in which its threads can run.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::primitives::{ArcSwapOption, Mutex, MutexGuard, watch};

/// What a flight brings.
pub(super) trait Perishable {
    /// Whether it can be handed out at `now`, on the monotonic clock.
    fn is_usable(&self, now: Duration) -> bool;

    /// From when it was asked for to its end.
    fn lifetime(&self) -> Duration;
}

/// Why a flight brought nothing.
pub(super) trait Obstacle {
    /// Whether it forbids another attempt at `now`, on the monotonic clock.
    fn stands(&self, now: Duration) -> bool;
}

/// How a flight ended.
pub(super) type Outcome<T, F> = Result<Arc<T>, Arc<F>>;

/// Where those who wait learn how a flight ended; `None` while it lasts.
pub(super) type Landing<T, F> = watch::Receiver<Option<Outcome<T, F>>>;

/// By which a flight tells how it ended, once. Dropped untold, the flight is lost, and the next caller starts
/// another.
pub(super) struct Departure<T, F>(watch::Sender<Option<Outcome<T, F>>>);

/// What forbids an attempt to all keys that share it.
#[derive(Debug)]
pub(super) struct SharedObstacle<F>(Mutex<Option<Arc<F>>>);

impl<F: Obstacle> SharedObstacle<F> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Takes in one that stands until `until`, on the monotonic clock, unless another stands longer.
    pub(super) fn raise(&self, obstacle: &Arc<F>, until: Duration) {
        let mut raised = self.raised();
        if !raised.as_ref().is_some_and(|other| other.stands(until)) {
            *raised = Some(Arc::clone(obstacle));
        }
    }

    pub(super) fn forget(&self) {
        *self.raised() = None;
    }

    /// The one that stands at `now`.
    pub(super) fn at(&self, now: Duration) -> Option<Arc<F>> {
        let raised = self.raised();
        raised.as_ref().filter(|it| it.stands(now)).map(Arc::clone)
    }

    fn raised(&self) -> MutexGuard<'_, Option<Arc<F>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One key's token, and the flight that fetches it.
#[derive(Debug)]
pub(super) struct SingleFlight<T, F> {
    current: ArcSwapOption<T>,
    state: Mutex<State<T, F>>,
    shared: Arc<SharedObstacle<F>>,
}

#[derive(Debug)]
struct State<T, F> {
    flight: Option<Landing<T, F>>,
    blocked: Option<Arc<F>>,
    history: History,
    last_rejected: Option<Duration>,
}

/// What is known of the attempts made so far.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct History {
    /// Failures since the last success.
    pub(super) failures: u32,
    /// The lifetime of the token that came last.
    pub(super) last_lifetime: Option<Duration>,
}

/// What a caller finds where no token is usable at first sight.
pub(super) enum Found<T, F> {
    /// A flight, and whether this caller started it.
    Flight(Landing<T, F>, bool),
    /// A token that arrived meanwhile.
    Token(Arc<T>),
    /// What forbids an attempt.
    Obstacle(Arc<F>),
}

/// What became of a token that an API refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rejection {
    /// It is gone.
    Dropped,
    /// It was gone already.
    Replaced,
    /// It stays: another was rejected just before, or no other could be had.
    Kept,
}

impl<T: Perishable, F: Obstacle> SingleFlight<T, F> {
    pub(super) fn new(shared: Arc<SharedObstacle<F>>) -> Self {
        Self {
            shared,
            current: ArcSwapOption::empty(),
            state: Mutex::new(State {
                flight: None,
                blocked: None,
                history: History::default(),
                last_rejected: None,
            }),
        }
    }

    /// The token that came last, usable or not.
    pub(super) fn token(&self) -> Option<Arc<T>> {
        self.current.load_full()
    }

    pub(super) fn usable_token(&self, now: Duration) -> Option<Arc<T>> {
        self.token().filter(|token| token.is_usable(now))
    }

    /// Waits for a flight in the air, or starts one: `take_off` is called with the state locked, and only
    /// starts what tells its outcome later.
    pub(super) fn join_or_start(
        &self,
        now: Duration,
        take_off: impl FnOnce(Departure<T, F>),
    ) -> Found<T, F> {
        let mut state = self.state();
        // A flight may have landed since the caller looked.
        if let Some(token) = self.usable_token(now) {
            return Found::Token(token);
        }
        if let Some(landing) = state.flight_in_the_air() {
            return Found::Flight(landing, false);
        }
        if let Some(obstacle) = self.obstacle_in(&state, now) {
            return Found::Obstacle(obstacle);
        }
        Found::Flight(state.start(take_off), true)
    }

    /// Starts a flight that brings the successor of `token`, unless there is one, one is on its way, or an
    /// obstacle stands. `take_off` as in [`Self::join_or_start`].
    pub(super) fn renew(
        &self,
        token: &Arc<T>,
        now: Duration,
        take_off: impl FnOnce(Departure<T, F>),
    ) {
        let mut state = self.state();
        if self.holds(token)
            && state.flight_in_the_air().is_none()
            && self.obstacle_in(&state, now).is_none()
        {
            state.start(take_off);
        }
    }

    /// Takes in a token that a flight brought.
    pub(super) fn succeed(&self, token: &Arc<T>) {
        let mut state = self.state();
        state.flight = None;
        state.blocked = None;
        state.history = History {
            failures: 0,
            last_lifetime: Some(token.lifetime()),
        };
        self.current.store(Some(Arc::clone(token)));
    }

    /// Takes in what stopped a flight, made from the history that it is now part of.
    pub(super) fn fail(&self, obstacle: impl FnOnce(History) -> F) -> Arc<F> {
        let mut state = self.state();
        state.flight = None;
        state.history.failures = state.history.failures.saturating_add(1);
        let obstacle = Arc::new(obstacle(state.history));
        state.blocked = Some(Arc::clone(&obstacle));
        obstacle
    }

    /// Drops `token`, which an API refused, at most once in `interval`.
    pub(super) fn reject(&self, token: &Arc<T>, now: Duration, interval: Duration) -> Rejection {
        let mut state = self.state();
        if !self.holds(token) {
            return Rejection::Replaced;
        }
        let was_just_replaced = state
            .last_rejected
            .is_some_and(|last| now < last + interval);
        if was_just_replaced || self.obstacle_in(&state, now).is_some() {
            return Rejection::Kept;
        }
        state.last_rejected = Some(now);
        self.drop_token(token);
        Rejection::Dropped
    }

    /// Drops `token`, and no other that may have taken its place.
    pub(super) fn drop_token(&self, token: &Arc<T>) {
        let current = self.current.load();
        if current
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, token))
        {
            self.current.compare_and_swap(&*current, None);
        }
    }

    /// Forgets what failed for this key: the configuration has changed, or an attempt outside of a flight succeeded.
    pub(super) fn forget_failures(&self) {
        let mut state = self.state();
        state.history.failures = 0;
        state.blocked = None;
    }

    /// The obstacle that came last, whether it still stands or not.
    pub(super) fn last_obstacle(&self) -> Option<Arc<F>> {
        self.state().blocked.clone()
    }

    /// The obstacle that forbids an attempt at `now`.
    pub(super) fn obstacle(&self, now: Duration) -> Option<Arc<F>> {
        self.obstacle_in(&self.state(), now)
    }

    /// What forbids an attempt to this key and others.
    pub(super) fn shared(&self) -> &SharedObstacle<F> {
        &self.shared
    }

    /// Whether a flight is on its way.
    pub(super) fn is_in_the_air(&self) -> bool {
        self.state().flight_in_the_air().is_some()
    }

    /// Whether the last attempt, if any, succeeded.
    pub(super) fn is_untroubled(&self) -> bool {
        self.state().history.failures == 0
    }

    fn holds(&self, token: &Arc<T>) -> bool {
        self.token()
            .is_some_and(|current| Arc::ptr_eq(&current, token))
    }

    fn obstacle_in(&self, state: &State<T, F>, now: Duration) -> Option<Arc<F>> {
        let own = state.blocked.as_ref().filter(|own| own.stands(now));
        own.map(Arc::clone).or_else(|| self.shared.at(now))
    }

    fn state(&self) -> MutexGuard<'_, State<T, F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, F> Departure<T, F> {
    /// Tells all who wait how the flight ended.
    pub(super) fn land(self, outcome: Outcome<T, F>) {
        // Nobody may be waiting any more.
        let _ = self.0.send(Some(outcome));
    }
}

impl<T, F> State<T, F> {
    fn start(&mut self, take_off: impl FnOnce(Departure<T, F>)) -> Landing<T, F> {
        let (arrivals, landing) = watch::channel(None);
        take_off(Departure(arrivals));
        self.flight = Some(landing.clone());
        landing
    }

    /// The flight that others may wait for. One whose task was dropped, by a panic or at the runtime's end,
    /// will never land.
    fn flight_in_the_air(&self) -> Option<Landing<T, F>> {
        let landing = self.flight.clone()?;
        let is_lost = landing.has_changed().is_err() && landing.borrow().is_none();
        (!is_lost).then_some(landing)
    }
}

/// How the flight ended; `None` where it was lost.
pub(super) async fn wait<T, F>(mut landing: Landing<T, F>) -> Option<Outcome<T, F>> {
    match landing.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone(),
        Err(_) => None,
    }
}
