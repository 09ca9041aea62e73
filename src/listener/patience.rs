//! What is put up with from callers of whom nothing is known yet: until they are attested, no limit
//! of an identity holds.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::agent::Agent;
use crate::connection::CallerAttestation;
use crate::limits::{Held, Holding};
use crate::telemetry::metrics::ListenerMetrics;

/// How many connections and tunnels of one listener may wait for a request whose caller is attested: more than
/// any fleet of honest callers opens at once, and 64 MiB or so while they say nothing. Whoever the kernel knows has
/// a quarter of them at most, and all whom it does not know half: nobody takes them all.
pub const UNATTESTED: usize = 16_384;

/// A listener's places for connections and tunnels whose callers are not attested yet.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    most_of_known: usize,
    most_of_unknown: usize,
    /// What those hold whom the kernel does not know.
    unknown: Arc<Holding>,
    metrics: ListenerMetrics,
}

/// One place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
    _held: Option<Held>,
}

impl Places {
    /// As many places as `unattested` says, all free.
    pub fn new(unattested: usize, metrics: ListenerMetrics) -> Self {
        Self {
            free: Arc::new(Semaphore::new(unattested)),
            most_of_known: unattested.div_ceil(4),
            most_of_unknown: unattested.div_ceil(2),
            unknown: Arc::default(),
            metrics,
        }
    }

    /// Takes a place; `None`, which is counted, where none is free: the caller is to be closed.
    pub fn take(&self) -> Option<Place> {
        self.or_refused(Arc::clone(&self.free).try_acquire_owned().ok())
            .map(|permit| Place {
                _permit: permit,
                _held: None,
            })
    }

    /// Has a place count for whom the kernel knows the caller as; `None`, which is counted, where too many do:
    /// the caller is to be closed.
    pub fn attribute(
        &self,
        place: Place,
        attestation: &CallerAttestation,
        agent: &Agent,
    ) -> Option<Place> {
        let known = attestation
            .as_ref()
            .ok()
            .and_then(|attestation| attestation.kernel_identity());
        let held = match known {
            Some(identity) => agent
                .limits
                .of(identity, agent.clock.monotonic())
                .unattested(self.most_of_known),
            None => self.unknown.unattested(self.most_of_unknown),
        };
        self.or_refused(held).map(|held| Place {
            _held: Some(held),
            ..place
        })
    }

    fn or_refused<Taken>(&self, taken: Option<Taken>) -> Option<Taken> {
        if taken.is_none() {
            self.metrics.connection_refused();
        }
        taken
    }
}
