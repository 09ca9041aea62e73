//! What a node can prove about a local workload.
//!
//! Read in this order: [`evidence`] (what the kernel says of a caller, and what the caller presented),
//! [`attestor`] (the trait), [`catalog`] (the visible list, and how evidence becomes a workload),
//! [`workload`] (the result). This crate never sees an issued token or a policy.

pub mod attestor;
pub mod attribute;
pub mod catalog;
pub mod clock;
pub mod evidence;
pub mod fetch;
pub mod workload;

pub use attestor::{Attestation, Attestor, AttributeDeclaration, EvidenceKind};
pub use attribute::{AttributeType, AttributeValue, Attributes};
pub use catalog::{Catalog, ConnectionAttestation};
pub use clock::{Clock, SystemClock};
pub use evidence::{PeerEvidence, PresentedToken};
pub use fetch::{Fetch, FetchError};
pub use workload::{
    AttestationEnded, AttestedWorkload, FailedAttestor, FailureKind, Generation, IsolationKey,
    WorkloadFacts,
};
