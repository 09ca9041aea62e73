//! The result of attestation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde::Serialize;

use crate::attribute::{AttributeValue, Attributes};
use crate::evidence::PresentedToken;

/// Everything established about a workload; what policies and records read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct WorkloadFacts {
    /// Attributes by group: `unix`, `systemd`, `container`, or an OIDC issuer's configured name.
    pub groups: BTreeMap<String, Attributes>,
    /// Attestors that applied and failed.
    pub failed_attestors: Vec<FailedAttestor>,
    /// What the facts rest on, in words for records (`pidfd`, `sock_diag`, `oidc:ci`; `weaker:peercred`).
    pub evidence: Vec<String>,
}

impl WorkloadFacts {
    /// The value of `GROUP.NAME`, if established.
    pub fn attribute(&self, group: &str, name: &str) -> Option<&AttributeValue> {
        self.groups.get(group)?.get(name)
    }
}

/// An attestor that applied and failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailedAttestor {
    /// The attestor's name.
    pub name: String,
    /// Whether it could not run, or the evidence is bad.
    pub kind: FailureKind,
    /// Why, without secrets.
    pub detail: String,
}

/// How an attestor failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// It could not run: an API was away. Policies that mention its attributes cannot be decided.
    CouldNotRun,
    /// The evidence was checked and is wrong.
    InvalidEvidence,
}

/// Names one immutable set of facts: equal generations have equal facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation(u64);

impl Generation {
    /// A generation never seen before in this process.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What connections and tokens are never shared across: container, unit and uid, issuer and subject, or uid; never a pid.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IsolationKey(pub Arc<str>);

/// A workload whose evidence held at the last liveness check.
#[derive(Debug)]
pub struct AttestedWorkload {
    facts: WorkloadFacts,
    generation: Generation,
    isolation_key: IsolationKey,
    valid_until: Option<SystemTime>,
    presented: Option<PresentedToken>,
}

impl AttestedWorkload {
    /// What was established.
    pub fn facts(&self) -> &WorkloadFacts {
        &self.facts
    }

    /// The name of this set of facts.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What upstream connections are keyed by.
    pub fn isolation_key(&self) -> &IsolationKey {
        &self.isolation_key
    }

    /// When presented evidence expires; `None` while only kernel evidence is used.
    pub fn valid_until(&self) -> Option<SystemTime> {
        self.valid_until
    }

    /// The verified token that the workload presented, for federated client assertions.
    pub fn presented(&self) -> Option<&PresentedToken> {
        self.presented.as_ref()
    }

    /// Checks that the process still lives and runs the same executable, and that presented
    /// evidence has not expired at `now`.
    pub fn check_liveness(&self, now: SystemTime) -> Result<(), AttestationEnded> {
        match self.valid_until {
            Some(valid_until) if now >= valid_until => Err(AttestationEnded::EvidenceExpired),
            _ => Ok(()),
        }
    }
}

/// Why an attestation that held no longer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AttestationEnded {
    /// The process exited.
    #[error("the calling process exited")]
    Exited,
    /// The process runs another executable than the one that was attested.
    #[error("the calling process runs another executable than when it was attested")]
    Executed,
    /// The presented token expired.
    #[error("the presented token expired")]
    EvidenceExpired,
}
