//! A clock that the test moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use countersign::clock::{Clock, SystemClock};

/// The machine's clock, moved.
#[derive(Debug)]
pub struct MovedClock {
    system: SystemClock,
    /// How many seconds the time of day is off.
    off: AtomicI64,
    /// How many seconds have passed that nobody waited for.
    passed: AtomicU64,
}

impl MovedClock {
    /// One that is not moved yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            system: SystemClock::new(),
            off: AtomicI64::new(0),
            passed: AtomicU64::new(0),
        })
    }

    pub fn set(&self, off: i64) {
        self.off.store(off, Ordering::SeqCst);
    }

    pub fn pass(&self, duration: Duration) {
        self.passed.fetch_add(duration.as_secs(), Ordering::SeqCst);
    }
}

impl Clock for MovedClock {
    fn monotonic(&self) -> Duration {
        self.system.monotonic() + Duration::from_secs(self.passed.load(Ordering::SeqCst))
    }

    fn wall(&self) -> SystemTime {
        let off = self.off.load(Ordering::SeqCst);
        let by = Duration::from_secs(off.unsigned_abs());
        match off < 0 {
            true => self.system.wall() - by,
            false => self.system.wall() + by,
        }
    }
}
