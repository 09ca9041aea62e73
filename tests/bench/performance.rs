//! The benchmark: `tests/bench/run [WORK...]`.
//!
//! Each proxy under test has one core to itself; the load and the origin share the other. What is
//! compared is CPU time per request, of all of the proxy's processes, in rounds that the proxies take in
//! turns: a neighbour on the machine spoils a round, not the figure.
//!
//! Read in this order: [`works`] (what is measured), [`bench`] (what a work has at hand), [`peers`] and
//! [`bare`] (the proxies), [`load`] and [`caller`] (who asks), [`origin`] (who answers), [`measure`],
//! [`report`] (the tables, and what must hold).

#![allow(
    unreachable_pub,
    reason = "modules of a program, named as those of a library"
)]

mod authorizer;
mod bare;
mod bench;
mod caller;
mod cgroups;
mod load;
mod measure;
mod origin;
mod peers;
mod report;
mod works;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// The proxy under test has this core to itself.
const PROXY_CORE: usize = 0;
/// The load, the origin and the authorization server.
const LOAD_CORE: usize = 1;

/// The host that every work asks for.
const HOST: &str = "orders.countersign.test";

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Fallible<ExitCode> {
    countersign::tls::install_cryptography_provider();
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        // `cargo bench` adds it.
        .filter(|argument| argument != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        // The parts that run as processes of their own.
        ["origin", directory] => origin::serve(Path::new(directory))?,
        ["bare", settings] => bare::serve(&serde_json::from_str(settings)?)?,
        ["authorizer", address] => authorizer::serve(address.parse()?)?,
        ["caller"] => caller::obey()?,
        ["measure", agent, rest @ ..] => return bench::run(Path::new(agent), rest),
        ["train", agent, counts] => bench::train(Path::new(agent), Path::new(counts))?,
        _ => {
            let usage =
                "usage: performance measure AGENT [--write] [WORK...] | train AGENT DIRECTORY";
            return Err(usage.into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Keeps this thread, and those that it makes, on one core.
fn pin(core: usize) -> Fallible<()> {
    let mut cores = CpuSet::new();
    cores.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &cores)?;
    Ok(())
}

fn one_thread() -> std::io::Result<tokio::runtime::LocalRuntime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
}
