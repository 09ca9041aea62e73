//! What one identity may hold of the agent at one time, and how often it may ask, so that its neighbours
//! are served.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use countersign_attestors::IsolationKey;

use crate::config::Limits;
use crate::refusal::{Refusal, RefusalCode};

/// How many identities are remembered before those that hold nothing are forgotten.
const SWEEP_ABOVE: usize = 1024;

/// What may be asked of this time at once; and how long who asks more often is kept waiting at most.
const BURST: Duration = Duration::from_secs(1);

/// What every identity holds.
#[derive(Debug, Default)]
pub struct IdentityLimits {
    holdings: Mutex<HashMap<IsolationKey, Arc<Holding>>>,
}

/// What one identity holds now.
#[derive(Debug, Default)]
pub struct Holding {
    connections: AtomicUsize,
    requests: AtomicUsize,
    unattested: AtomicUsize,
    /// Monotonic nanoseconds at which everything that it asked would be done at its rate.
    asked_until: AtomicU64,
}

/// One connection or request, held until it is dropped.
#[derive(Debug)]
pub struct Held {
    holding: Arc<Holding>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Connection,
    Request,
    Unattested,
}

impl IdentityLimits {
    /// What an identity holds, at the monotonic time `now`. Looked up once per connection and identity.
    pub fn of(&self, identity: &IsolationKey, now: Duration) -> Arc<Holding> {
        let mut holdings = self.holdings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holding) = holdings.get(identity) {
            return Arc::clone(holding);
        }
        if holdings.len() > SWEEP_ABOVE {
            // One that asks over new connections must not be forgotten between two of them.
            holdings.retain(|_, holding| {
                Arc::strong_count(holding) > 1
                    || holding.asked_until.load(Ordering::Relaxed) > nanoseconds(now)
            });
        }
        Arc::clone(holdings.entry(identity.clone()).or_default())
    }

    /// How many identities hold something.
    pub fn active(&self) -> usize {
        let holdings = self.holdings.lock().unwrap_or_else(PoisonError::into_inner);
        holdings
            .values()
            .filter(|holding| Arc::strong_count(holding) > 1)
            .count()
    }
}

impl Holding {
    /// Takes one connection.
    ///
    /// # Errors
    /// [`RefusalCode::TooManyRequests`] when `limits.connections` are held.
    pub fn connection(self: &Arc<Self>, limits: &Limits) -> Result<Held, Refusal> {
        self.take(Kind::Connection, limits.connections, "connections")
    }

    /// Waits for a request's turn, which came at the monotonic time `now`, and takes one in flight. One that
    /// would wait too long is refused after it waited, so that refusals are no faster than what is served.
    ///
    /// # Errors
    /// [`RefusalCode::TooManyRequests`] when `limits.requests_in_flight` are held, or a second is too short a
    /// wait for `limits.requests_per_second`.
    pub async fn request(
        self: &Arc<Self>,
        limits: &Limits,
        now: Duration,
    ) -> Result<Held, Refusal> {
        let turn = self.turn(limits, now);
        let wait = turn.as_ref().map_or(BURST, |wait| *wait);
        if !wait.is_zero() {
            // Boxed: waiting is rare, and a timer would make every request's future larger.
            Box::pin(tokio::time::sleep(wait)).await;
        }
        turn?;
        self.take(
            Kind::Request,
            limits.requests_in_flight,
            "requests_in_flight",
        )
    }

    /// How long a request has to wait at the monotonic time `now`, so that the identity asks
    /// `limits.requests_per_second` (generic cell rate algorithm, ITU-T I.371 annex A). As many may come
    /// at once.
    ///
    /// # Errors
    /// [`RefusalCode::TooManyRequests`] when that would be longer than a second.
    fn turn(&self, limits: &Limits, now: Duration) -> Result<Duration, Refusal> {
        let (now, burst) = (nanoseconds(now), nanoseconds(BURST));
        let each = burst / limits.requests_per_second.max(1) as u64;
        let after = |asked_until: u64| asked_until.max(now) + each;
        let earlier = self
            .asked_until
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |asked_until| {
                let next = after(asked_until);
                (next - now <= 2 * burst).then_some(next)
            })
            .map_err(|_| {
                let most = limits.requests_per_second;
                Refusal::new(
                    RefusalCode::TooManyRequests,
                    format!("this identity asks more than its {most} `limits.per_identity.requests_per_second`"),
                )
                .with_retry_after(BURST)
            })?;
        Ok(Duration::from_nanos(
            (after(earlier) - now).saturating_sub(burst),
        ))
    }

    /// Takes one connection or tunnel in which no request was attested yet; `None` where `most` are held.
    pub fn unattested(self: &Arc<Self>, most: usize) -> Option<Held> {
        self.try_take(Kind::Unattested, most)
    }

    fn take(self: &Arc<Self>, kind: Kind, most: usize, setting: &str) -> Result<Held, Refusal> {
        self.try_take(kind, most).ok_or_else(|| {
            Refusal::new(
                RefusalCode::TooManyRequests,
                format!("this identity holds its {most} `limits.per_identity.{setting}`"),
            )
        })
    }

    fn try_take(self: &Arc<Self>, kind: Kind, most: usize) -> Option<Held> {
        // Counted first: two that arrive at once must not both take the last place.
        let held = Held {
            holding: Arc::clone(self),
            kind,
        };
        (self.counter(kind).fetch_add(1, Ordering::Relaxed) < most).then_some(held)
    }

    fn counter(&self, kind: Kind) -> &AtomicUsize {
        match kind {
            Kind::Connection => &self.connections,
            Kind::Request => &self.requests,
            Kind::Unattested => &self.unattested,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.holding
            .counter(self.kind)
            .fetch_sub(1, Ordering::Relaxed);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    #[tokio::test]
    async fn an_identity_holds_no_more_than_its_limit_and_takes_nothing_from_others() {
        let limits = Limits {
            connections: 1,
            requests_in_flight: 2,
            requests_per_second: 1000,
            ..Limits::default()
        };
        let identities = IdentityLimits::default();
        let one = identities.of(&IsolationKey("one".into()), NOW);
        let other = identities.of(&IsolationKey("other".into()), NOW);
        let held = [
            one.request(&limits, NOW).await.unwrap(),
            one.request(&limits, NOW).await.unwrap(),
        ];
        let refusal = one.request(&limits, NOW).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TooManyRequests);
        other.request(&limits, NOW).await.unwrap();
        drop(held);
        one.request(&limits, NOW).await.unwrap();
        let connection = one.connection(&limits).unwrap();
        one.connection(&limits).unwrap_err();
        drop(connection);
        one.connection(&limits).unwrap();
        assert_eq!(identities.active(), 2);
        drop((one, other));
        assert_eq!(identities.active(), 0);
    }

    #[test]
    fn who_asks_too_often_waits_and_who_would_wait_too_long_is_refused() {
        let limits = Limits {
            connections: 1,
            requests_in_flight: 1,
            requests_per_second: 10,
            ..Limits::default()
        };
        let identities = IdentityLimits::default();
        let identity = IsolationKey("one".into());
        let turn = |milliseconds: u64| {
            let now = NOW + Duration::from_millis(milliseconds);
            // Over a new connection each time.
            identities.of(&identity, now).turn(&limits, now)
        };
        let waits: Vec<u128> = (0..20).map(|_| turn(0).unwrap().as_millis()).collect();
        let expected: Vec<u128> = (0..20)
            .map(|number: u128| number.saturating_sub(9) * 100)
            .collect();
        assert_eq!(waits, expected);
        let refusal = turn(0).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TooManyRequests);
        assert_eq!(refusal.retry_after, Some(BURST));
        // What is refused is not waited for by the next.
        assert_eq!(turn(100).unwrap(), BURST);
        assert_eq!(turn(5_000).unwrap(), Duration::ZERO);
        let other = identities.of(&IsolationKey("other".into()), NOW);
        assert_eq!(other.turn(&limits, NOW).unwrap(), Duration::ZERO);
    }

    #[test]
    fn an_identity_is_forgotten_when_it_holds_nothing_and_what_it_asked_is_over() {
        let limits = Limits {
            connections: 1,
            requests_in_flight: 1,
            requests_per_second: 10,
            ..Limits::default()
        };
        let identities = IdentityLimits::default();
        for number in 0..=SWEEP_ABOVE {
            let holding = identities.of(&IsolationKey(number.to_string().into()), NOW);
            holding.turn(&limits, NOW).unwrap();
        }
        let remembered = || identities.holdings.lock().unwrap().len();
        identities.of(&IsolationKey("soon".into()), NOW);
        assert_eq!(remembered(), SWEEP_ABOVE + 2);
        identities.of(&IsolationKey("later".into()), NOW + BURST);
        assert_eq!(remembered(), 1);
    }
}
