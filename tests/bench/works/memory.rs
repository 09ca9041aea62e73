//! Memory: idle, and for each idle connection that has made a request.

use std::time::Duration;

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::peers::Proxy;
use crate::report::Must;

const PLAIN_CONNECTIONS: usize = 10_000;
const INTERCEPTED_CONNECTIONS: usize = 2_000;
/// What was needed to get there is given back by then.
const SETTLE: Duration = Duration::from_secs(5);

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let (idle, plain) = idle_and_each(bench, Form::Absolute, PLAIN_CONNECTIONS)?;
    let (_, intercepted) = idle_and_each(bench, Form::Tunnel, INTERCEPTED_CONNECTIONS)?;
    bench.report.must(Must::at_most(
        "memory: idle RSS",
        idle / 1024.0 / 1024.0,
        "MiB",
        20.0,
        Some(15.0),
    ));
    bench.report.must(Must::at_most(
        format!("memory: each of {PLAIN_CONNECTIONS} idle connections"),
        plain / 1024.0,
        "KiB",
        14.0,
        Some(11.0),
    ));
    bench.report.must(Must::at_most(
        format!("memory: each of {INTERCEPTED_CONNECTIONS} idle intercepted connections"),
        intercepted / 1024.0,
        "KiB",
        28.0,
        Some(25.0),
    ));
    Ok(())
}

/// The agent's memory after one request, and how much more it has for each connection, in bytes.
fn idle_and_each(bench: &mut Bench, form: Form, connections: usize) -> Fallible<(f64, f64)> {
    let mut agent = bench.start(Proxy::Countersign, form)?;
    std::thread::sleep(SETTLE);
    let idle = agent.resident()? as f64;
    let route = agent.route(form)?;
    let opened = bench.load.open(&route, connections)?;
    bench.all_served(&mut agent, opened)?;
    std::thread::sleep(SETTLE);
    let each = (agent.resident()? as f64 - idle) / connections as f64;
    bench.load.close()?;
    agent.end()?;
    Ok((idle, each))
}
