//! Clocks that are wrong, are set, and stand still while the machine sleeps.

use std::sync::Arc;
use std::time::Duration;

use countersign::clock::Clock;

use crate::support::clock::MovedClock;
use crate::support::counts::reached;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const PLAIN: &str = "http://plain.example.test/v1/orders";
/// How long the authorization server's tokens live.
const LIFETIME: Duration = Duration::from_secs(300);
/// How long the agent leaves a server alone that refused it.
const BACKOFF: Duration = Duration::from_secs(31);

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_expires_nothing_and_one_that_is_far_off_is_named() {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    let mut world = World::servers().await;
    let clock = MovedClock::new();
    world.clock = Arc::clone(&clock) as Arc<dyn Clock>;
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}"), POLICIES)
        .await;
    world.good().await;
    let server = Arc::clone(world.authorization_server.state());
    let mut steps = 0;
    for off in [1, 30, 55, 2 * MINUTE, HOUR, DAY, 365 * DAY]
        .into_iter()
        .flat_map(|off| [off, -off])
    {
        // The token that is held is as good as before, whatever the time of day is said to be.
        let requests = server.token_requests();
        clock.set(off);
        world.curl(&[PLAIN]).await.expect(200);
        assert_eq!(server.token_requests(), requests, "{off}");
        // The next has to be asked for by that time.
        clock.pass(LIFETIME);
        let mut answer = world.curl(&[PLAIN]).await;
        if off.abs() < MINUTE && answer.status != 200 {
            // What the first answer's `Date` said, the second request makes up for.
            assert_eq!(answer.code(), "invalid_client", "{off}: {answer:#?}");
            clock.pass(BACKOFF);
            answer = world.curl(&[PLAIN]).await;
        }
        match off.abs() < MINUTE {
            true => _ = answer.expect(200),
            false => assert_eq!(
                (answer.status, answer.code().as_str()),
                (502, "clock_skew"),
                "{off}: {answer:#?}"
            ),
        }
        // Once the clock is right, it goes on by itself.
        clock.set(0);
        clock.pass(BACKOFF);
        if world.curl(&[PLAIN]).await.status != 200 {
            clock.pass(BACKOFF);
        }
        world.curl(&[PLAIN]).await.expect(200);
        steps += 1;
    }
    // While the machine slept the token expired: it is not used, but replaced.
    for _ in 0..3 {
        let requests = server.token_requests();
        clock.pass(LIFETIME);
        world.curl(&[PLAIN]).await.expect(200);
        assert_eq!(server.token_requests(), requests + 1);
        steps += 1;
    }
    // No request arrived with a token that had expired.
    assert!(world.plain_api.seen().iter().all(|seen| seen.token.is_ok()));
    println!(
        "{steps} times the clock was set or the machine slept; no expired token arrived in {} requests",
        world.plain_api.seen().len()
    );
    world.app().agent().audit.flush().await;
    countersign::audit::verify::verify(&world.path("audit.jsonl"), None).unwrap();
    reached("clock_steps", steps);
}
