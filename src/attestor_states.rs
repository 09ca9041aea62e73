//! What became of attestations lately, attestor by attestor: for metrics and `status`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use countersign_attestors::{FailureKind, WorkloadFacts};
use serde::Serialize;

use crate::config::Attestors;
use crate::telemetry::metrics::Metrics;

/// The state of every attestor.
#[derive(Debug)]
pub struct AttestorStates {
    metrics: Arc<Metrics>,
    /// The last time that each could not run; none since it last established something.
    could_not_run: Mutex<BTreeMap<String, CouldNotRun>>,
}

#[derive(Debug, Clone)]
struct CouldNotRun {
    at: SystemTime,
    detail: String,
}

/// An attestor as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AttestorState {
    /// Its name.
    pub name: String,
    /// False where it could not run when it was last asked about a new caller.
    pub runs: bool,
    /// When that was found, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Why it could not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl AttestorStates {
    /// Nothing was attested yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            could_not_run: Mutex::default(),
        }
    }

    /// Takes in what was found of a caller, at wall-clock time `now`.
    pub fn note(&self, facts: &WorkloadFacts, now: SystemTime) {
        let mut could_not_run = self
            .could_not_run
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for attestor in facts.attestors() {
            self.metrics.attestation(attestor, "attested");
            could_not_run.remove(attestor);
        }
        for failed in &facts.failed_attestors {
            self.metrics.attestation(&failed.name, failed.kind.as_str());
            if failed.kind == FailureKind::CouldNotRun {
                could_not_run.insert(
                    failed.name.clone(),
                    CouldNotRun {
                        at: now,
                        detail: failed.detail.clone(),
                    },
                );
            }
        }
    }

    /// The configured attestors, in the order in which they run.
    pub fn report(&self, configured: &Attestors) -> Vec<AttestorState> {
        let could_not_run = self
            .could_not_run
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Attestors {
            unix,
            systemd,
            oidc_issuers,
        } = configured;
        let of_the_kernel = [("unix", *unix), ("systemd", *systemd)];
        of_the_kernel
            .into_iter()
            .filter_map(|(name, is_configured)| is_configured.then_some(name))
            .chain(oidc_issuers.iter().map(|issuer| issuer.name.as_str()))
            .map(|name| {
                let failure = could_not_run.get(name);
                AttestorState {
                    name: name.to_owned(),
                    runs: failure.is_none(),
                    since: failure
                        .and_then(|failure| jiff::Timestamp::try_from(failure.at).ok())
                        .map(|at| format!("{at:.0}")),
                    detail: failure.map(|failure| failure.detail.clone()),
                }
            })
            .collect()
    }
}
