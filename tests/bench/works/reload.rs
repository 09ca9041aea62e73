//! Policies that change under load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::peers::{Peer, Proxy};
use crate::report::Must;

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 5;
const EVERY: Duration = Duration::from_millis(100);

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let mut agent = bench.start(Proxy::Countersign, Form::Absolute)?;
    let (mut undisturbed, mut disturbed) = (Vec::new(), Vec::new());
    let mut failed = 0;
    for _ in 0..ROUNDS {
        let sample = bench.repeat(&mut agent, Form::Absolute, CONNECTIONS)?;
        undisturbed.push(sample.p99());
        let route = agent.route(Form::Absolute)?;
        let opened = bench.load.open(&route, CONNECTIONS)?;
        bench.all_served(&mut agent, opened)?;
        let report = while_reloading(&agent, || bench.load.repeat(bench.round))?;
        agent.served += bench.load.take_served();
        bench.load.close()?;
        failed += report.failed;
        disturbed.push(report.percentile(0.99).as_secs_f64() * 1e6);
    }
    let reloads = std::fs::read_to_string(agent.log())?
        .lines()
        .filter(|line| line.contains("reloaded"))
        .count();
    agent.end()?;
    bench.report.must(Must::at_most(
        format!("policy reload under load: requests that failed, with {reloads} reloads"),
        failed as f64,
        "",
        0.0,
        None,
    ));
    bench.report.note(format!(
        "Policy reload under load: p99 {:.0} µs with a reload every {EVERY:?}, {:.0} µs without.",
        crate::measure::median(disturbed)?,
        crate::measure::median(undisturbed)?,
    ));
    bench
        .report
        .valid_if(reloads > 0, format!("the policies changed {reloads} times"));
    Ok(())
}

/// Changes the policies again and again while `work` runs.
fn while_reloading<T>(agent: &Peer, work: impl FnOnce() -> Fallible<T>) -> Fallible<T> {
    let process = Pid::from_raw(i32::try_from(agent.id())?);
    let policy = agent.directory.join("policies/orders.cedar");
    let text = std::fs::read_to_string(&policy)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reloading = scope.spawn(|| -> Fallible<()> {
            let mut change = 0_u64;
            while !done.load(Ordering::Relaxed) {
                std::fs::write(&policy, format!("// {change}\n{text}"))?;
                kill(process, Signal::SIGHUP)?;
                change += 1;
                std::thread::sleep(EVERY);
            }
            Ok(())
        });
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        reloading
            .join()
            .map_err(|_| "the reloading thread ended")??;
        outcome
    })
}
