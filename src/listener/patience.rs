//! What is put up with from callers of whom nothing is known yet: until they are attested, no limit
//! of an identity holds.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::telemetry::metrics::ListenerMetrics;

/// How many connections and tunnels of one listener may wait for a request whose caller is attested: more than
/// any fleet of honest callers opens at once, and 64 MiB or so while they say nothing.
pub const UNATTESTED: usize = 16_384;

/// A listener's places for connections and tunnels whose callers are not attested yet.
#[derive(Debug, Clone)]
pub struct Places {
    free: Arc<Semaphore>,
    metrics: ListenerMetrics,
}

/// One place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Places {
    /// As many places as `unattested` says, all free.
    pub fn new(unattested: usize, metrics: ListenerMetrics) -> Self {
        Self {
            free: Arc::new(Semaphore::new(unattested)),
            metrics,
        }
    }

    /// Takes a place; `None`, which is counted, where none is free: the caller is to be closed.
    pub fn take(&self) -> Option<Place> {
        match Arc::clone(&self.free).try_acquire_owned() {
            Ok(permit) => Some(Place { _permit: permit }),
            Err(_) => {
                self.metrics.connection_refused();
                None
            }
        }
    }
}
