//! The tables, and what must hold.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use crate::Fallible;
use crate::measure::{Rounds, Sample};
use crate::peers::Peer;

/// Around the tables in the page.
const BEGIN: &str = "<!-- tests/bench/run --write: begin -->\n";
const END: &str = "<!-- tests/bench/run --write: end -->\n";

/// How many musts may be missed.
const MAY_MISS: usize = 2;

/// What a run found.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
    musts: Vec<Must>,
    conditions: Vec<Condition>,
    notes: Vec<String>,
}

/// Without which the figures of a run count for nothing.
#[derive(Debug, Serialize)]
struct Condition {
    condition: String,
    holds: bool,
}

/// A proxy at a work.
#[derive(Debug, Serialize)]
struct Row {
    work: &'static str,
    connections: usize,
    proxy: &'static str,
    cpu_microseconds: f64,
    requests_per_second: f64,
    p50_microseconds: f64,
    p99_microseconds: f64,
    resident_mebibytes: f64,
}

/// A figure and its bounds.
#[derive(Debug, Serialize)]
pub struct Must {
    pub name: String,
    pub figure: f64,
    pub unit: &'static str,
    pub must: f64,
    pub aim: Option<f64>,
    pub bound: Bound,
    /// No must against Envoy may be missed.
    pub against_envoy: bool,
}

/// On which side of the bound a figure must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtMost,
    AtLeast,
}

impl Must {
    /// A figure that must not be over `must`.
    pub fn at_most(
        name: impl Into<String>,
        figure: f64,
        unit: &'static str,
        must: f64,
        aim: Option<f64>,
    ) -> Self {
        Self {
            name: name.into(),
            figure,
            unit,
            must,
            aim,
            bound: Bound::AtMost,
            against_envoy: false,
        }
    }

    /// A figure that must not be below `must`.
    pub fn at_least(
        name: impl Into<String>,
        figure: f64,
        unit: &'static str,
        must: f64,
        aim: Option<f64>,
    ) -> Self {
        Self {
            bound: Bound::AtLeast,
            ..Self::at_most(name, figure, unit, must, aim)
        }
    }

    /// This one may not be missed.
    pub fn against_envoy(self) -> Self {
        Self {
            against_envoy: true,
            ..self
        }
    }

    fn meets(&self, bound: f64) -> bool {
        match self.bound {
            Bound::AtMost => self.figure <= bound,
            Bound::AtLeast => self.figure >= bound,
        }
    }

    fn is_met(&self) -> bool {
        self.meets(self.must)
    }

    fn verdict(&self) -> &'static str {
        match (self.is_met(), self.aim.map(|aim| self.meets(aim))) {
            (false, _) => "**missed**",
            (true, Some(true)) => "met, and the aim",
            (true, _) => "met",
        }
    }
}

impl Report {
    /// Puts what proxies did at a work.
    pub fn rows(
        &mut self,
        work: &'static str,
        connections: usize,
        peers: &[Peer],
        rounds: &Rounds,
    ) -> Fallible<()> {
        for peer in peers {
            self.row(work, connections, peer, &rounds.total(peer.proxy))?;
        }
        Ok(())
    }

    fn row(
        &mut self,
        work: &'static str,
        connections: usize,
        peer: &Peer,
        sample: &Sample,
    ) -> Fallible<()> {
        self.rows.push(Row {
            work,
            connections,
            proxy: peer.proxy.name(),
            cpu_microseconds: sample.cpu_per_request(),
            requests_per_second: sample.rate(),
            p50_microseconds: sample.report.percentile(0.5).as_secs_f64() * 1e6,
            p99_microseconds: sample.p99(),
            resident_mebibytes: peer.resident()? as f64 / 1024.0 / 1024.0,
        });
        Ok(())
    }

    pub fn must(&mut self, must: Must) {
        self.musts.push(must);
    }

    /// Says what makes a run valid, and whether it holds.
    pub fn valid_if(&mut self, holds: bool, condition: String) {
        self.conditions.push(Condition { condition, holds });
    }

    /// Something that readers of the figures must know.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Whether the run is valid and meets as much as it must.
    pub fn is_met(&self) -> bool {
        let is_valid = self.conditions.iter().all(|condition| condition.holds);
        let missed: Vec<&Must> = self.musts.iter().filter(|must| !must.is_met()).collect();
        is_valid && missed.len() <= MAY_MISS && !missed.iter().any(|must| must.against_envoy)
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        if !self.rows.is_empty() {
            text.push_str(
                "| Work | Connections | Proxy | CPU per request (µs) | Requests/s | p50 (µs) | p99 (µs) | RSS (MiB) |\n\
                 |---|---|---|---|---|---|---|---|\n",
            );
        }
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.2} | {:.0} | {:.0} | {:.0} | {:.1} |",
                row.work,
                row.connections,
                row.proxy,
                row.cpu_microseconds,
                row.requests_per_second,
                row.p50_microseconds,
                row.p99_microseconds,
                row.resident_mebibytes,
            );
        }
        text.push_str("\n| Must | Figure | Bound | Aim | |\n|---|---|---|---|---|\n");
        for must in &self.musts {
            let bound = match must.bound {
                Bound::AtMost => "at most",
                Bound::AtLeast => "at least",
            };
            let aim = must.aim.map_or_else(String::new, |aim| aim.to_string());
            let _ = writeln!(
                text,
                "| {} | {:.3} {} | {bound} {} | {aim} | {} |",
                must.name,
                must.figure,
                must.unit,
                must.must,
                must.verdict(),
            );
        }
        for Condition { condition, holds } in &self.conditions {
            let verdict = if *holds { "valid" } else { "**not valid**" };
            let _ = writeln!(text, "\n{verdict}: {condition}.");
        }
        let met = self.musts.iter().filter(|must| must.is_met()).count();
        let _ = writeln!(text, "\n{met} of {} musts met.", self.musts.len());
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        text
    }

    /// One line.
    pub fn json(&self) -> String {
        json!({"rows": self.rows, "musts": self.musts, "conditions": self.conditions, "notes": self.notes, "met": self.is_met()})
            .to_string()
    }

    /// Puts the tables between the marks in a page.
    pub fn write(&self, page: &Path) -> Fallible<()> {
        let text = std::fs::read_to_string(page)?;
        let without_marks = || format!("{} lacks its marks", page.display());
        let (before, rest) = text.split_once(BEGIN).ok_or_else(without_marks)?;
        let (_, after) = rest.split_once(END).ok_or_else(without_marks)?;
        let tables = self.markdown();
        std::fs::write(page, format!("{before}{BEGIN}\n{tables}\n{END}{after}"))?;
        Ok(())
    }
}
