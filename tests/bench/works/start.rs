//! The start: from exec to the first injected 200.

use std::time::Instant;

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::{Command, Form};
use crate::measure::median;
use crate::peers::Proxy;
use crate::report::Must;
use crate::works::size::applicable;

const STARTS: usize = 20;
const POLICIES: usize = 20;

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let added = [applicable(POLICIES - 1)];
    let mut beyond = Vec::new();
    // One more, for the file cache.
    for start in 0..=STARTS {
        let before = bench.origin.tokens()?.own_time;
        let began = Instant::now();
        let mut agent = bench.launch(Proxy::Countersign, &added)?;
        let route = agent.route(Form::Absolute)?;
        let command = Command::OpenFirst { route };
        let report = bench.load.tell_one(0, &command)?;
        let took = began.elapsed();
        bench.all_served(&mut agent, report)?;
        let own_time = bench.origin.tokens()?.own_time.saturating_sub(before);
        if start > 0 {
            beyond.push(took.saturating_sub(own_time).as_secs_f64() * 1e3);
        }
        bench.load.close()?;
        agent.end()?;
    }
    bench.report.must(Must::at_most(
        format!("start: exec to the first injected 200, {POLICIES} policies, without the token's own time"),
        median(beyond)?,
        "ms",
        30.0,
        Some(15.0),
    ));
    Ok(())
}
