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
/// a quarter of them at most, and so have all together about whom it cannot tell; callers of other hosts have half.
pub const UNATTESTED: usize = 16_384;

/// A listener's places for connections and tunnels whose callers are not attested yet.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    most_of_one: usize,
    most_of_other_hosts: usize,
    /// What those hold about whom the kernel cannot tell: who left, or whose socket several processes have.
    unattestable: Arc<Holding>,
    /// What those hold whom this kernel does not know.
    of_other_hosts: Arc<Holding>,
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
            most_of_one: unattested.div_ceil(4),
            most_of_other_hosts: unattested.div_ceil(2),
            unattestable: Arc::default(),
            of_other_hosts: Arc::default(),
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
        let held = match attestation.as_ref().map(|found| found.kernel_identity()) {
            Ok(Some(identity)) => agent
                .limits
                .of(&identity, agent.clock.monotonic())
                .unattested(self.most_of_one),
            Ok(None) => self.of_other_hosts.unattested(self.most_of_other_hosts),
            Err(_) => self.unattestable.unattested(self.most_of_one),
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
