//! The attestor trait.

use std::collections::BTreeMap;
use std::time::SystemTime;

use async_trait::async_trait;

use crate::attribute::{AttributeType, Attributes};
use crate::evidence::{PeerEvidence, PresentedToken};
use crate::workload::FailureKind;

/// What kind of evidence an attestor reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvidenceKind {
    /// Nobody presents anything: the agent looks at the caller. Read once per connection, and
    /// again where an attestor could not run.
    Kernel,
    /// The caller presents a token. Read per request head or tunnel.
    Presented,
}

/// The evidence that an attestor may look at.
#[derive(Debug, Clone, Copy)]
pub enum Evidence<'a> {
    /// Kernel evidence of a connection.
    Kernel(&'a PeerEvidence),
    /// A presented token.
    Presented(&'a PresentedToken),
}

/// One attribute that an attestor may state, for the generated policy schema and the documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributeDeclaration {
    /// The group: `principal.GROUP`.
    pub group: String,
    /// The attribute's name in the group.
    pub name: String,
    /// Its type.
    pub attribute_type: AttributeType,
    /// True when a successful attestation always states it.
    pub required: bool,
    /// What it is, in one line.
    pub description: String,
}

/// What an attestor found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attestation {
    /// The evidence is not of this attestor's kind: it is silent.
    NotApplicable,
    /// The evidence holds.
    Attested {
        /// Attributes by group.
        groups: BTreeMap<String, Attributes>,
        /// When the evidence ceases to hold by itself (`exp` of a token); `None` for kernel evidence.
        valid_until: Option<SystemTime>,
    },
    /// The evidence applies and does not hold, or could not be checked.
    Failed {
        /// Which of the two.
        kind: FailureKind,
        /// Why, without secrets.
        detail: String,
    },
}

/// Turns one kind of evidence into attributes. `README.md` of this crate says all that one more needs.
#[async_trait]
pub trait Attestor: Send + Sync + std::fmt::Debug {
    /// The attestor's configured name: `unix`, `systemd`, or an OIDC issuer's name.
    fn name(&self) -> &str;

    /// The kind of evidence that it reads.
    fn evidence_kind(&self) -> EvidenceKind;

    /// Every attribute that it may state to policies; not what is for records only.
    fn declarations(&self) -> Vec<AttributeDeclaration>;

    /// Looks at the evidence. Kernel attestors may block (procfs): the catalog runs them off the data workers.
    async fn attest(&self, evidence: Evidence<'_>) -> Attestation;
}
