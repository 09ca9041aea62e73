//! The visible list of attestors, and how evidence becomes a workload.

use std::sync::Arc;

use crate::attestor::{Attestor, AttributeDeclaration};
use crate::clock::Clock;
use crate::evidence::{PeerEvidence, PresentedToken};
use crate::workload::{AttestationEnded, AttestedWorkload};

/// The configured attestors. Immutable; a reload builds another.
#[derive(Debug)]
pub struct Catalog {
    attestors: Vec<Arc<dyn Attestor>>,
}

impl Catalog {
    /// A catalog of `attestors`, in the order in which failures are reported.
    pub fn new(attestors: Vec<Arc<dyn Attestor>>, _clock: Arc<dyn Clock>) -> Self {
        Self { attestors }
    }

    /// Every attribute that this catalog may state.
    pub fn declarations(&self) -> Vec<AttributeDeclaration> {
        self.attestors
            .iter()
            .flat_map(|attestor| attestor.declarations())
            .collect()
    }
}

/// One connection's attestation: kernel evidence attested once, presented evidence per head.
#[derive(Debug)]
pub struct ConnectionAttestation {}

impl ConnectionAttestation {
    /// Attests the kernel evidence of a connection. Blocking work runs in tokio's blocking pool.
    pub async fn new(_catalog: Arc<Catalog>, _peer: PeerEvidence) -> Self {
        Self {}
    }

    /// The workload behind the connection, with what this head presents; checks liveness first.
    /// Cheap when nothing changed: a clone of an `Arc`.
    pub async fn attest(
        &self,
        _presented: Option<&PresentedToken>,
    ) -> Result<Arc<AttestedWorkload>, AttestationEnded> {
        Err(AttestationEnded::Exited)
    }
}
