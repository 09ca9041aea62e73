//! A cold token: what the first request waits for beyond the authorization server, and many that wait
//! for one token.

use std::time::Duration;

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::{Command, Form};
use crate::load::IDENTITIES;
use crate::measure::median;
use crate::peers::Proxy;
use crate::report::Must;
use crate::works::size::{further, host};

const CALLERS: usize = 10_000;
/// So many connect at a time, and so much apart, that they find room in the listener's queue.
const AT_A_TIME: usize = 200;
const PAUSE: Duration = Duration::from_millis(50);

pub fn run(bench: &mut Bench) -> Fallible<()> {
    first_requests(bench)?;
    many_at_once(bench)
}

/// Each caller asks, once, for a destination that needs a token of its own.
fn first_requests(bench: &mut Bench) -> Fallible<()> {
    let origin = bench.origin.addresses.http.to_string();
    let further = further(IDENTITIES, &origin);
    let mut agent = bench.start_with(Proxy::Countersign, Form::Absolute, &further)?;
    let mut beyond = Vec::new();
    for caller in 0..IDENTITIES {
        let mut route = agent.route(Form::Absolute)?;
        route.host = host(caller);
        let command = Command::Open {
            route,
            connections: 1,
        };
        let before = bench.origin.tokens()?;
        let report = bench.load.tell_one(caller, &command)?;
        let report = bench.all_served(&mut agent, report)?;
        let after = bench.origin.tokens()?;
        if after.requests != before.requests + 1 {
            return Err("not valid: the request was not the first that needed this token".into());
        }
        let own_time = after.own_time.saturating_sub(before.own_time);
        let took = report.percentile(1.0).saturating_sub(own_time);
        beyond.push(took.as_secs_f64() * 1e3);
    }
    bench.load.close()?;
    agent.end()?;
    bench.report.must(Must::at_most(
        "cold token: first request, beyond the authorization server's own time",
        median(beyond)?,
        "ms",
        1.0,
        Some(0.5),
    ));
    Ok(())
}

fn many_at_once(bench: &mut Bench) -> Fallible<()> {
    let origin = bench.origin.addresses.http.to_string();
    let further = further(1, &origin);
    let mut agent = bench.start_with(Proxy::Countersign, Form::Absolute, &further)?;
    let mut route = agent.route(Form::Absolute)?;
    // The token of the other destination is there since the agent was ready.
    route.host = host(0);
    let before = bench.origin.tokens()?.requests;
    for _ in 0..CALLERS / AT_A_TIME {
        bench.load.connect(&route, AT_A_TIME)?;
        std::thread::sleep(PAUSE);
    }
    let report = bench.load.repeat(Duration::ZERO)?;
    bench.load.close()?;
    agent.served += bench.load.take_served();
    let requests = bench.origin.tokens()?.requests - before;
    if let Some(failure) = report.failure {
        bench.report.note(format!(
            "Cold token: {} of {CALLERS} callers at once failed: {}",
            report.failed,
            failure.lines().next().unwrap_or_default()
        ));
    }
    bench.report.must(Must::at_most(
        format!("cold token: token requests for {CALLERS} callers at once"),
        requests as f64,
        "",
        1.0,
        None,
    ));
    bench.report.must(Must::at_least(
        format!("cold token: of {CALLERS} callers at once, answered 200"),
        report.served as f64,
        "",
        CALLERS as f64,
        None,
    ));
    agent.end()
}
