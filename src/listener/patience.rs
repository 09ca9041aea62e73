//! What is put up with from callers of whom nothing is known yet: until they are attested, no limit
//! of an identity holds.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::telemetry::metrics::ListenerMetrics;

/// How long and how many.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How many connections and opening tunnels of one listener may wait to be attested.
    pub unattested: usize,
    /// How long a request head may take (slowloris), and the next request of an HTTP/1 connection.
    pub head: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            // More than any fleet of honest callers opens at once, and 64 MiB or so.
            unattested: 16_384,
            head: Duration::from_secs(30),
        }
    }
}

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
    /// As many as `patience` has, all free.
    pub fn new(patience: &Patience, metrics: ListenerMetrics) -> Self {
        Self {
            free: Arc::new(Semaphore::new(patience.unattested)),
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
