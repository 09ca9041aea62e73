//! Time is passed in, so that tests move it.

use std::time::{Duration, Instant, SystemTime};

/// Reads the time. Deadlines use [`Clock::monotonic`]; claims and records use [`Clock::wall`].
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Time since an arbitrary fixed origin. Never goes back; unaffected by steps of the wall clock.
    fn monotonic(&self) -> Duration;

    /// Wall-clock time, as in `exp` and `iat` (RFC 7519 section 2, NumericDate).
    fn wall(&self) -> SystemTime;
}

/// The machine's clock.
#[derive(Debug, Clone)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    /// A clock whose monotonic origin is now.
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}
