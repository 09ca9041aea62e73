//! What is measured of a proxy's processes.

use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::Fallible;
use crate::caller::Report;
use crate::peers::Proxy;

/// One round.
#[derive(Debug, Default)]
pub struct Sample {
    pub report: Report,
    pub cpu: Duration,
    pub wall: Duration,
}

impl Sample {
    fn add(&mut self, other: &Self) {
        self.report.add(&other.report);
        self.cpu += other.cpu;
        self.wall += other.wall;
    }

    /// In microseconds.
    pub fn cpu_per_request(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.report.served as f64
    }

    /// Requests a second.
    pub fn rate(&self) -> f64 {
        self.report.served as f64 / self.wall.as_secs_f64()
    }

    /// In microseconds.
    pub fn p99(&self) -> f64 {
        self.report.percentile(0.99).as_secs_f64() * 1e6
    }
}

/// Rounds that proxies took in turns.
#[derive(Debug, Default)]
pub struct Rounds {
    samples: Vec<(Proxy, Vec<Sample>)>,
}

impl Rounds {
    /// Puts the next round of a proxy.
    pub fn add(&mut self, proxy: Proxy, sample: Sample) {
        match self.samples.iter_mut().find(|(known, _)| *known == proxy) {
            Some((_, samples)) => samples.push(sample),
            None => self.samples.push((proxy, vec![sample])),
        }
    }

    /// The rounds of a proxy.
    pub fn of(&self, proxy: Proxy) -> &[Sample] {
        self.samples
            .iter()
            .find(|(known, _)| *known == proxy)
            .map_or(&[], |(_, samples)| samples)
    }

    /// All rounds of a proxy together.
    pub fn total(&self, proxy: Proxy) -> Sample {
        let mut total = Sample::default();
        for sample in self.of(proxy) {
            total.add(sample);
        }
        total
    }

    /// A figure of one proxy over that of another: of the rounds' ratios the middle one.
    pub fn ratio(
        &self,
        one: Proxy,
        other: Proxy,
        figure: impl Fn(&Sample) -> f64,
    ) -> Fallible<f64> {
        median(
            self.of(one)
                .iter()
                .zip(self.of(other))
                .map(|(one, other)| figure(one) / figure(other))
                .collect(),
        )
    }
}

/// The middle one: what a neighbour on the machine spoils lies at the ends.
pub fn median(mut figures: Vec<f64>) -> Fallible<f64> {
    figures.sort_unstable_by(f64::total_cmp);
    figures
        .get(figures.len() / 2)
        .copied()
        .ok_or_else(|| "nothing was measured".into())
}

/// CPU time of these processes, threads that have ended included.
pub fn cpu(processes: &[u32]) -> Fallible<Duration> {
    let mut total = Duration::ZERO;
    for process in processes {
        let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(*process)?))?;
        total += Duration::from(clock_gettime(clock)?);
    }
    Ok(total)
}

/// The memory of these processes that is in RAM, in bytes.
pub fn resident(processes: &[u32]) -> Fallible<u64> {
    let mut total = 0;
    for process in processes {
        let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
        let kibibytes: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok())
            .ok_or("no VmRSS")?;
        total += kibibytes * 1024;
    }
    Ok(total)
}

/// A process and those below it.
pub fn tree(root: u32) -> Fallible<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(process) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // It may have ended meanwhile.
        let Ok(statistics) = std::fs::read_to_string(format!("/proc/{process}/stat")) else {
            continue;
        };
        // The name, in parentheses, may hold anything; after it: state, parent.
        let parent = statistics
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.push((process, parent));
    }
    let mut tree = vec![root];
    let mut looked_at = 0;
    while let Some(process) = tree.get(looked_at).copied() {
        looked_at += 1;
        let children = parents
            .iter()
            .filter(|(_, parent)| *parent == Some(process))
            .map(|(child, _)| *child);
        tree.extend(children);
    }
    Ok(tree)
}
