//! What a node can prove about a local workload.
//!
//! Read in this order: [`evidence`] (what the kernel says of a caller, and what the caller presented),
//! [`attestor`] (the trait), [`catalog`] (how evidence becomes a workload), [`workload`] (the result);
//! then the attestors: [`unix`], [`systemd`], [`oidc`]. [`observers`] are the threads that look. This crate never sees an issued token or a policy.

pub mod attestor;
pub mod attribute;
pub mod catalog;
#[cfg_attr(
    not(target_os = "linux"),
    expect(dead_code, reason = "other systems have no cgroups")
)]
mod cgroup;
pub mod clock;
#[cfg(test)]
mod counts;
pub mod evidence;
pub mod fetch;
mod names;
pub mod observers;
pub mod oidc;
#[cfg(all(target_os = "linux", feature = "test-support"))]
#[doc(hidden)]
pub mod readers;
pub mod systemd;
pub mod unix;
pub mod workload;

// Kernel evidence is Linux's. Elsewhere there is none, and the rest builds and runs without it.
#[cfg(not(target_os = "linux"))]
#[path = "elsewhere.rs"]
mod platform;
#[cfg(target_os = "linux")]
#[path = "linux/mod.rs"]
mod platform;

pub use attestor::{Attestation, Attestor, AttributeDeclaration, Evidence, EvidenceKind};
pub use attribute::{AttributeSelection, AttributeType, AttributeValue, Attributes, hexadecimal};
pub use catalog::{Catalog, ConnectionAttestation};
pub use clock::{Clock, SystemClock};
pub use evidence::{EvidenceError, PeerEvidence, PresentedToken};
pub use fetch::{Fetch, FetchError};
pub use oidc::{InvalidIssuerSettings, KeySetStatus, OidcAttestor, OidcIssuerSettings};
pub use platform::{Process, has_cgroup2};
pub use systemd::SystemdAttestor;
pub use unix::UnixAttestor;
pub use workload::{
    AttestationEnded, AttestedWorkload, FailedAttestor, FailureKind, Generation, IsolationKey,
    WorkloadFacts,
};
