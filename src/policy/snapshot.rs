//! What decisions are made under at one time.

use std::sync::Arc;

use countersign_attestors::AttestedWorkload;

use super::decision::{Decision, Denial, DenialKind};
use super::engine::PolicyEngine;
use super::grant::{Grant, Permitted};
use super::principal::Principal;
use super::question::Question;
use super::revocations::Revocations;

/// Policies and revocations. A reload or a revocation makes another; leases compare by `Arc::ptr_eq`.
#[derive(Debug)]
pub struct PolicySnapshot {
    engine: Arc<PolicyEngine>,
    revocations: Arc<Revocations>,
}

impl PolicySnapshot {
    /// A snapshot. Every call makes one that differs from all others by `Arc::ptr_eq`.
    pub fn new(engine: Arc<PolicyEngine>, revocations: Arc<Revocations>) -> Arc<Self> {
        Arc::new(Self {
            engine,
            revocations,
        })
    }

    /// The policies.
    pub fn engine(&self) -> &Arc<PolicyEngine> {
        &self.engine
    }

    /// The revocations.
    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.revocations
    }

    /// Decides without a cache: the workload must live, nothing may be revoked, and policies must permit.
    pub fn decide(
        self: &Arc<Self>,
        workload: &Arc<AttestedWorkload>,
        question: &Question<'_>,
    ) -> Result<Grant, Arc<Denial>> {
        self.check_liveness(workload, question)?;
        let principal = Principal::new(workload.facts(), &self.engine);
        match self.evaluate(workload, &principal, question) {
            Decision::Allow(permission) => {
                let permitted = Permitted::new(permission, question, self);
                Ok(Grant::new(permitted, workload))
            }
            Decision::Deny(denial) => Err(denial),
        }
    }

    pub(super) fn check_liveness(
        &self,
        workload: &AttestedWorkload,
        question: &Question<'_>,
    ) -> Result<(), Arc<Denial>> {
        workload.check_liveness(question.wall).map_err(|ended| {
            Arc::new(Denial::before_policies(
                DenialKind::AttestationEnded { ended },
                self.engine.version(),
            ))
        })
    }

    /// Revocations, then policies.
    pub(super) fn evaluate(
        &self,
        workload: &AttestedWorkload,
        principal: &Principal,
        question: &Question<'_>,
    ) -> Decision {
        match self.revocations.covering(workload.facts(), question) {
            Some(revocation) => Decision::Deny(Arc::new(Denial::before_policies(
                DenialKind::Revoked {
                    id: revocation.id.clone(),
                },
                self.engine.version(),
            ))),
            None => self
                .engine
                .evaluate_for(workload.facts(), principal, question),
        }
    }
}
