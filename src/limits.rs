//! What one identity may hold of the agent at one time, so that its neighbours are served.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use countersign_attestors::IsolationKey;

use crate::config::Limits;
use crate::refusal::{Refusal, RefusalCode};

/// How many identities are remembered before those that hold nothing are forgotten.
const SWEEP_ABOVE: usize = 1024;

/// What every identity holds.
#[derive(Debug, Default)]
pub struct IdentityLimits {
    holdings: Mutex<HashMap<IsolationKey, Weak<Holding>>>,
}

/// What one identity holds now.
#[derive(Debug, Default)]
pub struct Holding {
    connections: AtomicUsize,
    requests: AtomicUsize,
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
}

impl IdentityLimits {
    /// What an identity holds. Looked up once per connection and identity.
    pub fn of(&self, identity: &IsolationKey) -> Arc<Holding> {
        let mut holdings = self.holdings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holding) = holdings.get(identity).and_then(Weak::upgrade) {
            return holding;
        }
        if holdings.len() > SWEEP_ABOVE {
            holdings.retain(|_, holding| holding.strong_count() > 0);
        }
        let holding = Arc::<Holding>::default();
        holdings.insert(identity.clone(), Arc::downgrade(&holding));
        holding
    }

    /// How many identities hold something.
    pub fn active(&self) -> usize {
        let holdings = self.holdings.lock().unwrap_or_else(PoisonError::into_inner);
        holdings
            .values()
            .filter(|holding| holding.strong_count() > 0)
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

    /// Takes one request in flight.
    ///
    /// # Errors
    /// [`RefusalCode::TooManyRequests`] when `limits.requests_in_flight` are held.
    pub fn request(self: &Arc<Self>, limits: &Limits) -> Result<Held, Refusal> {
        self.take(
            Kind::Request,
            limits.requests_in_flight,
            "requests_in_flight",
        )
    }

    fn take(self: &Arc<Self>, kind: Kind, most: usize, setting: &str) -> Result<Held, Refusal> {
        // Counted first: two that arrive at once must not both take the last place.
        let held = Held {
            holding: Arc::clone(self),
            kind,
        };
        match self.counter(kind).fetch_add(1, Ordering::Relaxed) < most {
            true => Ok(held),
            false => Err(Refusal::new(
                RefusalCode::TooManyRequests,
                format!("this identity holds its {most} `limits.per_identity.{setting}`"),
            )),
        }
    }

    fn counter(&self, kind: Kind) -> &AtomicUsize {
        match kind {
            Kind::Connection => &self.connections,
            Kind::Request => &self.requests,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_holds_no_more_than_its_limit_and_takes_nothing_from_others() {
        let limits = Limits {
            connections: 1,
            requests_in_flight: 2,
        };
        let identities = IdentityLimits::default();
        let one = identities.of(&IsolationKey("one".into()));
        let other = identities.of(&IsolationKey("other".into()));
        let held = [one.request(&limits).unwrap(), one.request(&limits).unwrap()];
        let refusal = one.request(&limits).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TooManyRequests);
        other.request(&limits).unwrap();
        drop(held);
        one.request(&limits).unwrap();
        let connection = one.connection(&limits).unwrap();
        one.connection(&limits).unwrap_err();
        drop(connection);
        one.connection(&limits).unwrap();
        assert_eq!(identities.active(), 2);
        drop((one, other));
        assert_eq!(identities.active(), 0);
    }
}
