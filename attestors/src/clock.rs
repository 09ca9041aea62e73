//! Time is passed in, so that tests move it.

use std::time::{Duration, Instant, SystemTime};

/// Reads the time. Deadlines use [`Clock::monotonic`]; claims and records use [`Clock::wall`].
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Time since an arbitrary fixed origin. Never goes back; unaffected by steps of the wall clock.
    fn monotonic(&self) -> Duration;

    /// Wall-clock time, as in `exp` and `iat` (RFC 7519 section 2, NumericDate).
    fn wall(&self) -> SystemTime;
}

/// The machine's clock. Its monotonic time counts the time that the machine was suspended, where the
/// system can tell: a token expires while a laptop sleeps.
#[derive(Debug, Clone)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    /// A clock whose monotonic origin is fixed from now on.
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
        since_boot().unwrap_or_else(|| self.origin.elapsed())
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// `CLOCK_BOOTTIME` (clock_gettime(2)): monotonic, suspension included.
#[cfg(target_os = "linux")]
fn since_boot() -> Option<Duration> {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .ok()
        .map(Duration::from)
}

#[cfg(not(target_os = "linux"))]
fn since_boot() -> Option<Duration> {
    None
}
