//! What a work has at hand, and the order of a run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::caller::{Form, Report as Served, Route};
use crate::load::Load;
use crate::measure::{Rounds, Sample};
use crate::origin::Origin;
use crate::peers::{AddedFile, Peer, Proxy, Surroundings};
use crate::report::Report;
use crate::works::request_path::COMPARED;
use crate::{Fallible, LOAD_CORE, pin, works};

/// The seconds of a round; for trying a work out, not for figures.
const ROUND: &str = "COUNTERSIGN_BENCH_ROUND";

/// What a work has at hand.
pub struct Bench {
    agent: PathBuf,
    pub directory: PathBuf,
    pub origin: Origin,
    pub load: Load,
    pub report: Report,
    /// How long a round is.
    pub round: Duration,
}

/// Runs the named works, or all, and prints what came of it.
pub fn run(agent: &Path, arguments: &[&str]) -> Fallible<ExitCode> {
    let (write, names) = match arguments {
        ["--write", names @ ..] => (true, names),
        names => (false, names),
    };
    let works = works::named(names)?;
    if write && !names.is_empty() {
        return Err("the page holds the tables of all works: --write goes without names".into());
    }
    let report = in_directory(|directory| measure(agent, directory, &works))?;
    print!("{}", report.markdown());
    println!("\n{}", report.json());
    if write {
        report.write(Path::new("docs/performance.md"))?;
    }
    Ok(match report.is_met() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Has an agent that counts what its code does serve each form of the request path, and puts what it wrote at its
/// end, `agent.profraw`, into `counts`.
pub fn train(agent: &Path, counts: &Path) -> Fallible<()> {
    in_directory(|directory| {
        let mut bench = Bench::new(agent, directory)?;
        for (name, form) in [
            ("absolute", Form::Absolute),
            ("origin", Form::Origin),
            ("tunnel", Form::Tunnel),
        ] {
            let mut peer = bench.start(Proxy::Countersign, form)?;
            bench.repeat(&mut peer, form, COMPARED)?;
            peer.stop()?;
            let written = peer.directory.join("agent.profraw");
            std::fs::copy(&written, counts.join(name).with_extension("profraw"))?;
        }
        Ok(())
    })
}

/// Works on the core of the load, in a directory that is gone afterwards.
fn in_directory<T>(work: impl FnOnce(&Path) -> Fallible<T>) -> Fallible<T> {
    pin(LOAD_CORE)?;
    let directory = std::env::temp_dir().join(format!("countersign-bench-{}", std::process::id()));
    std::fs::create_dir(&directory)?;
    let outcome = work(&directory);
    std::fs::remove_dir_all(&directory)?;
    outcome
}

fn measure(agent: &Path, directory: &Path, works: &[works::Work]) -> Fallible<Report> {
    let mut bench = Bench::new(agent, directory)?;
    for work in works {
        let began = Instant::now();
        if let Err(error) = (work.run)(&mut bench) {
            // The works after it are measured all the same.
            bench
                .report
                .valid_if(false, format!("{}: {error}", work.name));
            bench.load.close()?;
            bench.load.take_served();
        }
        eprintln!("{}: {:.0?}", work.name, began.elapsed());
    }
    Ok(bench.report)
}

impl Bench {
    fn new(agent: &Path, directory: &Path) -> Fallible<Self> {
        let round = match std::env::var(ROUND) {
            Ok(seconds) => Duration::from_secs_f64(seconds.parse()?),
            Err(_) => Duration::from_secs(3),
        };
        Ok(Self {
            agent: agent.to_owned(),
            directory: directory.to_owned(),
            origin: Origin::start(directory)?,
            load: Load::start(directory)?,
            report: Report::default(),
            round,
        })
    }

    /// Starts a proxy, without waiting for it.
    pub fn launch(&self, proxy: Proxy, added: &[AddedFile]) -> Fallible<Peer> {
        let surroundings = Surroundings {
            agent: &self.agent,
            directory: &self.directory,
            origin: &self.origin,
        };
        Peer::start(proxy, &surroundings, added)
    }

    /// Starts a proxy and waits until it answers a request of this form with 200.
    pub fn start(&mut self, proxy: Proxy, form: Form) -> Fallible<Peer> {
        self.start_with(proxy, form, &[])
    }

    pub fn start_with(&mut self, proxy: Proxy, form: Form, added: &[AddedFile]) -> Fallible<Peer> {
        let mut peer = self.launch(proxy, added)?;
        peer.wait_until_ready(&mut self.load, form)?;
        Ok(peer)
    }

    pub fn start_all(&mut self, proxies: &[Proxy], form: Form) -> Fallible<Vec<Peer>> {
        proxies
            .iter()
            .map(|proxy| self.start(*proxy, form))
            .collect()
    }

    /// Has proxies take turns at a work, so that the machine's noise meets all alike. A first round is
    /// to warm up and does not count.
    pub fn take_turns(
        &mut self,
        peers: &mut [Peer],
        rounds: usize,
        mut work: impl FnMut(&mut Self, &mut Peer) -> Fallible<Sample>,
    ) -> Fallible<Rounds> {
        let mut measured = Rounds::default();
        for round in 0..=rounds {
            for peer in peers.iter_mut() {
                let sample = work(self, peer)?;
                if round > 0 {
                    measured.add(peer.proxy, sample);
                }
            }
        }
        Ok(measured)
    }

    /// One round of requests over so many connections, each when the one before it was answered.
    pub fn repeat(&mut self, peer: &mut Peer, form: Form, connections: usize) -> Fallible<Sample> {
        let route = peer.route(form)?;
        let length = self.round;
        self.over(peer, &route, connections, |load| load.repeat(length))
    }

    /// Measures `peer` while `work` asks it over so many connections, which are opened before.
    pub fn over(
        &mut self,
        peer: &mut Peer,
        route: &Route,
        connections: usize,
        work: impl FnOnce(&mut Load) -> Fallible<Served>,
    ) -> Fallible<Sample> {
        let opened = self.load.open(route, connections)?;
        self.all_served(peer, opened)?;
        let sample = self.sample(peer, work)?;
        self.load.close()?;
        Ok(sample)
    }

    /// Measures `peer` while `work` asks it; what it served counts as its.
    pub fn sample(
        &mut self,
        peer: &mut Peer,
        work: impl FnOnce(&mut Load) -> Fallible<Served>,
    ) -> Fallible<Sample> {
        let (began, before) = (Instant::now(), peer.cpu()?);
        let report = work(&mut self.load)?;
        let cpu = peer.cpu()?.saturating_sub(before);
        let wall = began.elapsed();
        let report = self.all_served(peer, report)?;
        Ok(Sample { report, cpu, wall })
    }

    /// Takes what was served as served by `peer`; nothing may have failed.
    pub fn all_served(&mut self, peer: &mut Peer, report: Served) -> Fallible<Served> {
        peer.served += self.load.take_served();
        match &report.failure {
            None => Ok(report),
            Some(failure) => Err(format!(
                "{}: {} of {} requests failed: {failure}",
                peer.proxy.name(),
                report.failed,
                report.failed + report.served
            )
            .into()),
        }
    }

    /// Ends proxies in good order.
    pub fn end(&self, peers: Vec<Peer>) -> Fallible<()> {
        peers.into_iter().try_for_each(Peer::end)
    }
}
