//! The result of attestation.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use serde::Serialize;

use crate::attribute::{AttributeValue, Attributes};
use crate::catalog::Catalog;
use crate::evidence::{PeerEvidence, PresentedToken};

/// Everything established about a workload; what policies and records read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
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

    /// The attestors that established something. The one of processes states their container too.
    pub fn attestors(&self) -> impl Iterator<Item = &str> {
        const OF_PROCESSES: [&str; 2] = ["container", "unix"];
        let unix = OF_PROCESSES
            .iter()
            .any(|group| self.groups.contains_key(*group))
            .then_some("unix");
        let others = self.groups.keys().map(String::as_str);
        unix.into_iter()
            .chain(others.filter(|group| !OF_PROCESSES.contains(group)))
    }

    /// A short name for people: `ci sub repo:acme/orders`, `unit orders.service`,
    /// `container 4b825dc642cb`, `uid 1000 (ana)`, `unknown`. Nothing is keyed by it.
    pub fn subject(&self) -> String {
        let presented = self
            .groups
            .keys()
            .filter(|group| !KERNEL_GROUPS.contains(&group.as_str()))
            .find_map(|group| Some(format!("{group} sub {}", self.attribute(group, "sub")?)));
        let unit = || {
            Some(format!(
                "unit {}",
                self.attribute("systemd", "system_unit")?
            ))
        };
        let container = || {
            let id = self.attribute("container", "id")?.to_string();
            Some(format!("container {}", id.get(..12).unwrap_or(&id)))
        };
        let user = || {
            let uid = self.attribute("unix", "uid")?;
            Some(match self.attribute("unix", "user") {
                Some(user) => format!("uid {uid} ({user})"),
                None => format!("uid {uid}"),
            })
        };
        presented
            .or_else(container)
            .or_else(unit)
            .or_else(user)
            .unwrap_or_else(|| "unknown".to_owned())
    }

    fn text(&self, group: &str, name: &str) -> Option<String> {
        Some(self.attribute(group, name)?.to_string())
    }

    /// Whom the kernel shows: container, unit and uid, or uid; `None` where no attestor states any of them.
    pub(crate) fn kernel_identity(&self) -> Option<String> {
        let container = || Some(format!("container {}", self.text("container", "id")?));
        // Not the unit of a user's manager: its processes go from one to another as they like.
        let unit = || {
            let unit = self.text("systemd", "system_unit")?;
            let uid = self.text("unix", "uid").unwrap_or_default();
            Some(format!("unit {unit} uid {uid}"))
        };
        let user = || Some(format!("uid {}", self.text("unix", "uid")?));
        container().or_else(unit).or_else(user)
    }

    /// What connections and tokens of a workload with these facts are never shared across.
    pub fn isolation_key(&self) -> IsolationKey {
        let mut key = self
            .kernel_identity()
            .unwrap_or_else(|| "unknown".to_owned());
        for group in self
            .groups
            .keys()
            .filter(|group| !KERNEL_GROUPS.contains(&group.as_str()))
        {
            if let (Some(issuer), Some(subject)) =
                (self.text(group, "iss"), self.text(group, "sub"))
            {
                // The lengths keep two fields from reading as two others.
                key.push_str(&format!(
                    " issuer {}:{issuer} sub {}:{subject}",
                    issuer.len(),
                    subject.len()
                ));
            }
        }
        IsolationKey(Arc::from(key))
    }
}

/// The groups that kernel attestors state; any other is an issuer's configured name.
pub(crate) const KERNEL_GROUPS: [&str; 3] = ["container", "systemd", "unix"];

/// An attestor that applied and failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct FailedAttestor {
    /// The attestor's name.
    pub name: String,
    /// Whether it could not run, or the evidence is bad.
    pub kind: FailureKind,
    /// Why, without secrets.
    pub detail: String,
}

/// How an attestor failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// It could not run: an API was away. Policies that mention its attributes cannot be decided.
    CouldNotRun,
    /// The evidence was checked and is wrong.
    InvalidEvidence,
}

impl FailureKind {
    /// The word in records and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CouldNotRun => "could_not_run",
            Self::InvalidEvidence => "invalid_evidence",
        }
    }
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

/// A workload whose evidence held at the last liveness check. Only attestation makes one:
///
/// ```compile_fail,E0451
/// use countersign_attestors::{AttestedWorkload, Generation, WorkloadFacts};
///
/// let facts = WorkloadFacts::default();
/// let isolation_key = countersign_attestors::IsolationKey("uid 0".into());
/// let forged = AttestedWorkload {
///     facts,
///     generation: Generation::next(),
///     isolation_key,
///     valid_until: None,
///     presented: None,
///     peer: std::sync::Arc::new(countersign_attestors::PeerEvidence::none()),
///     catalog: std::sync::Weak::new(),
/// };
/// ```
#[derive(Debug)]
pub struct AttestedWorkload {
    facts: Arc<WorkloadFacts>,
    generation: Generation,
    isolation_key: IsolationKey,
    valid_until: Option<SystemTime>,
    presented: Option<PresentedToken>,
    peer: Arc<PeerEvidence>,
    catalog: Weak<Catalog>,
}

/// A set of facts and what follows from it; shared by all workloads of which it was established.
#[derive(Debug, Clone)]
pub(crate) struct Established {
    facts: Arc<WorkloadFacts>,
    generation: Generation,
    isolation_key: IsolationKey,
}

impl Established {
    /// A set of facts under a generation of its own.
    pub(crate) fn new(facts: Arc<WorkloadFacts>) -> Self {
        Self {
            generation: Generation::next(),
            isolation_key: facts.isolation_key(),
            facts,
        }
    }
}

impl AttestedWorkload {
    pub(crate) fn new(
        established: Established,
        valid_until: Option<SystemTime>,
        presented: Option<PresentedToken>,
        peer: Arc<PeerEvidence>,
        catalog: Weak<Catalog>,
    ) -> Self {
        let Established {
            facts,
            generation,
            isolation_key,
        } = established;
        Self {
            facts,
            generation,
            isolation_key,
            valid_until,
            presented,
            peer,
            catalog,
        }
    }

    /// A workload described by hand, without evidence, for the tests of other crates.
    #[cfg(any(test, feature = "test-support"))]
    pub fn described(facts: WorkloadFacts) -> Self {
        let established = Established::new(Arc::new(facts));
        let peer = Arc::new(PeerEvidence::none());
        Self::new(established, None, None, peer, Weak::new())
    }

    /// As [`AttestedWorkload::described`], with a token that counts as verified until `valid_until`.
    #[cfg(any(test, feature = "test-support"))]
    pub fn described_with_token(
        facts: WorkloadFacts,
        presented: PresentedToken,
        valid_until: SystemTime,
    ) -> Self {
        let established = Established::new(Arc::new(facts));
        let peer = Arc::new(PeerEvidence::none());
        Self::new(
            established,
            Some(valid_until),
            Some(presented),
            peer,
            Weak::new(),
        )
    }

    /// What was established; outlives the workload where it is shared.
    pub fn facts(&self) -> &Arc<WorkloadFacts> {
        &self.facts
    }

    /// The name of this set of facts.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether `catalog` attested it. Another may collect what this workload's facts lack.
    pub fn is_attested_by(&self, catalog: &Arc<Catalog>) -> bool {
        std::ptr::eq(self.catalog.as_ptr(), Arc::as_ptr(catalog))
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

    /// Checks that the process still lives and has executed nothing since, and that presented evidence has
    /// not expired at `now`.
    pub fn check_liveness(&self, now: SystemTime) -> Result<(), AttestationEnded> {
        match self.valid_until {
            Some(valid_until) if now >= valid_until => Err(AttestationEnded::EvidenceExpired),
            _ => self.peer.check_liveness(),
        }
    }
}

/// Why an attestation that held no longer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AttestationEnded {
    /// The process exited.
    #[error("the calling process exited")]
    Exited,
    /// The process has executed a program, be it the same one again.
    #[error("the calling process has executed a program since it was attested")]
    Executed,
    /// The presented token expired.
    #[error("the presented token expired")]
    EvidenceExpired,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(groups: &[(&str, &[(&str, &str)])]) -> String {
        let attributes = |stated: &[(&str, &str)]| {
            let attribute = |(name, value): &(&str, &str)| {
                let value = AttributeValue::String((*value).to_owned());
                ((*name).to_owned(), value)
            };
            stated.iter().map(attribute).collect()
        };
        let facts = WorkloadFacts {
            groups: groups
                .iter()
                .map(|(group, stated)| ((*group).to_owned(), attributes(stated)))
                .collect(),
            ..WorkloadFacts::default()
        };
        facts.isolation_key().0.to_string()
    }

    #[test]
    fn units_are_kept_apart_and_what_a_user_calls_its_own_is_not() {
        let unit = |name| key(&[("systemd", &[("system_unit", name)])]);
        assert_ne!(unit("orders.service"), unit("billing.service"));
        let of_user = |name| {
            let stated: &[_] = &[("system_unit", "user@1000.service"), ("user_unit", name)];
            key(&[("systemd", stated), ("unix", &[("uid", "1000")])])
        };
        assert_eq!(of_user("one.service"), of_user("other.service"));
        assert_ne!(of_user("one.service"), unit("user@1000.service"));
        assert_eq!(key(&[]), "unknown");
    }
}
