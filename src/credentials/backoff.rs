//! How long the broker waits after a failure.

use std::time::Duration;

use crate::providers::{LONGEST_RETRY_AFTER, Recovery};

/// How long a refused client or grant is left alone.
pub(super) const HOLD: Duration = Duration::from_secs(30);

/// The first backoff's ceiling; it doubles with each failure.
const FIRST_CEILING: Duration = Duration::from_millis(250);

/// No backoff grows beyond this, so that recovery is seen within it.
const HIGHEST_CEILING: Duration = Duration::from_secs(5);

/// No backoff's ceiling is lower, however short tokens live.
const LOWEST_CEILING: Duration = Duration::from_millis(50);

/// How long to wait before the next attempt after the `failures`-th failure in a row; `None` until the
/// configuration changes. `lifetime` is that of the last token, where there was one; `fraction` is
/// random in 0..1.
pub(super) fn wait(
    recovery: Recovery,
    failures: u32,
    lifetime: Option<Duration>,
    fraction: f64,
) -> Option<Duration> {
    let retry_after = match recovery {
        Recovery::Permanent => return None,
        Recovery::Hold => return Some(HOLD),
        Recovery::Backoff { retry_after } => retry_after,
    };
    let highest = lifetime.map_or(HIGHEST_CEILING, highest_ceiling);
    let doubled = FIRST_CEILING.saturating_mul(1_u32 << failures.saturating_sub(1).min(10));
    let ceiling = doubled.min(highest);
    // Full jitter, and never at once.
    let jitter = ceiling.mul_f64(fraction).max(Duration::from_millis(10));
    Some(match retry_after {
        // What the server asks for is a lower bound: jitter only adds.
        Some(retry_after) => retry_after.min(LONGEST_RETRY_AFTER) + jitter,
        None => jitter,
    })
}

/// How long one of many renewals that may begin at the same time waits, so that they do not. `lifetime` is that of
/// the token that is renewed; `fraction` is random in 0..1.
pub(super) fn spread(lifetime: Duration, fraction: f64) -> Duration {
    highest_ceiling(lifetime).mul_f64(fraction)
}

fn highest_ceiling(lifetime: Duration) -> Duration {
    (lifetime / 20).clamp(LOWEST_CEILING, HIGHEST_CEILING)
}

/// A random number in 0..1.
pub(super) fn random_fraction() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness, waits are still spread by when they began.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Recovery = Recovery::Backoff { retry_after: None };

    #[test]
    fn waits_grow_to_the_ceiling_and_no_further() {
        let at_most = |failures, lifetime| wait(PLAIN, failures, lifetime, 0.999_999);
        let milliseconds = |wait: Option<Duration>| wait.map(|wait| wait.as_millis());
        assert_eq!(milliseconds(at_most(1, None)), Some(249));
        assert_eq!(milliseconds(at_most(2, None)), Some(499));
        assert_eq!(milliseconds(at_most(5, None)), Some(3999));
        assert_eq!(milliseconds(at_most(6, None)), Some(4999));
        assert_eq!(milliseconds(at_most(4_000_000, None)), Some(4999));
        let lifetime = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(milliseconds(at_most(9, lifetime(60))), Some(2999));
        assert_eq!(milliseconds(at_most(9, lifetime(2))), Some(99));
        assert_eq!(milliseconds(at_most(9, lifetime(1))), Some(49));
        assert_eq!(milliseconds(at_most(9, lifetime(86400))), Some(4999));
        assert_eq!(milliseconds(wait(PLAIN, 9, None, 0.0)), Some(10));
    }

    #[test]
    fn renewals_are_spread_over_a_part_of_what_tokens_live() {
        for (lifetime, most) in [(86_400, 5000), (600, 5000), (60, 3000), (0, 50)] {
            let of = |fraction| spread(Duration::from_secs(lifetime), fraction).as_millis();
            assert_eq!([of(0.0), of(0.5), of(1.0)], [0, most / 2, most]);
        }
    }

    #[test]
    fn what_the_server_asks_for_is_never_undercut() {
        let asked = |seconds| Recovery::Backoff {
            retry_after: Some(Duration::from_secs(seconds)),
        };
        for fraction in [0.0, 0.3, 0.999] {
            let waited = wait(asked(7), 1, None, fraction);
            assert!(waited >= Some(Duration::from_secs(7)));
            assert!(waited <= Some(Duration::from_secs(8)));
            let capped = wait(asked(u64::MAX), 1, None, fraction);
            assert!(capped >= Some(LONGEST_RETRY_AFTER));
            assert!(capped <= Some(LONGEST_RETRY_AFTER + Duration::from_secs(1)));
        }
        assert_eq!(wait(Recovery::Hold, 1, None, 0.5), Some(HOLD));
        assert_eq!(wait(Recovery::Permanent, 1, None, 0.5), None);
    }
}
