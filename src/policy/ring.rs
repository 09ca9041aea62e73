//! The last decisions, for `policy explain ID`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use countersign_attestors::{AttestedWorkload, IsolationKey, WorkloadFacts};

use super::decision::{Decision, Denial};
use super::engine::PolicyEngine;
use super::grant::Grant;
use super::question::{OwnedQuestion, Question};
use super::snapshot::PolicySnapshot;
use crate::request::EgressRequest;
use crate::request_id::RequestId;

/// How many decisions are kept.
pub const RING_CAPACITY: usize = 1_000;

/// A decision that was made. It keeps what the workload was, not the workload: no process handle and no
/// token outlives its request here.
#[derive(Debug, Clone)]
pub struct RecordedDecision {
    /// The request.
    pub request_id: RequestId,
    /// What the workload was.
    pub facts: Arc<WorkloadFacts>,
    /// Whose decision it is: the workload API answers only its own caller.
    pub isolation_key: IsolationKey,
    /// What was asked.
    pub question: OwnedQuestion,
    /// The policies that decided.
    pub engine: Arc<PolicyEngine>,
    /// What was decided; `None` for a yes that the question still gets. One whose path is not kept whole
    /// need not.
    pub decision: Option<Decision>,
}

/// The last [`RING_CAPACITY`] decisions. Shared by all workers.
#[derive(Debug, Default)]
pub struct DecisionRing {
    decisions: Mutex<VecDeque<RecordedDecision>>,
}

impl DecisionRing {
    /// An empty ring.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps a decision, and forgets the oldest if there are too many.
    pub fn record(
        &self,
        request_id: RequestId,
        snapshot: &PolicySnapshot,
        workload: &AttestedWorkload,
        question: &Question<'_>,
        outcome: Result<&Grant, &Arc<Denial>>,
    ) {
        let mut question = question.to_owned();
        let shortened = question
            .request
            .as_deref()
            .and_then(EgressRequest::shortened);
        let decided = match outcome {
            Err(denial) => Some(Decision::Deny(Arc::clone(denial))),
            Ok(grant) => shortened.as_ref().map(|_| grant.decision()),
        };
        if let Some(shortened) = shortened {
            question.request = Some(Arc::new(shortened));
        }
        let decision = RecordedDecision {
            request_id,
            facts: Arc::clone(workload.facts()),
            isolation_key: workload.isolation_key().clone(),
            question,
            engine: Arc::clone(snapshot.engine()),
            decision: decided,
        };
        let mut decisions = self.lock();
        let oldest = match decisions.len() < RING_CAPACITY {
            true => None,
            false => decisions.pop_front(),
        };
        decisions.push_back(decision);
        drop(decisions);
        // Nobody waits for what it frees.
        drop(oldest);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<RecordedDecision>> {
        self.decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The decision on a request; the last one where a request was decided more than once.
    pub fn find(&self, request_id: RequestId) -> Option<RecordedDecision> {
        self.lock()
            .iter()
            .rev()
            .find(|decision| decision.request_id == request_id)
            .cloned()
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
