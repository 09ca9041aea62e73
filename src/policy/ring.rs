//! The last decisions, for `policy explain ID`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use countersign_attestors::{AttestedWorkload, IsolationKey, WorkloadFacts};

use super::decision::{Decision, Denial};
use super::engine::PolicyEngine;
use super::grant::Grant;
use super::question::{OwnedQuestion, Question};
use super::snapshot::PolicySnapshot;
use crate::refusal::Refusal;
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

/// The last [`RING_CAPACITY`] decisions, and as many refusals that came before any. Shared by all workers.
#[derive(Debug, Default)]
pub struct DecisionRing {
    decisions: Ring<RecordedDecision>,
    undecided: Ring<(RequestId, Refusal)>,
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
        self.decisions.push(RecordedDecision {
            request_id,
            facts: Arc::clone(workload.facts()),
            isolation_key: workload.isolation_key().clone(),
            question,
            engine: Arc::clone(snapshot.engine()),
            decision: decided,
        });
    }

    /// Keeps what a request was refused for on which no decision was made.
    pub fn record_undecided(&self, request_id: RequestId, refusal: Refusal) {
        self.undecided.push((request_id, refusal));
    }

    /// The decision on a request; the last one where a request was decided more than once.
    pub fn find(&self, request_id: RequestId) -> Option<RecordedDecision> {
        self.decisions
            .last(|decision| decision.request_id == request_id)
    }

    /// What a request was refused for on which no decision was made.
    pub fn find_undecided(&self, request_id: RequestId) -> Option<Refusal> {
        let (_, refusal) = self.undecided.last(|(known, _)| *known == request_id)?;
        Some(refusal)
    }

    /// How many decisions are kept.
    pub fn len(&self) -> usize {
        self.decisions.lock().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The last [`RING_CAPACITY`] of something.
#[derive(Debug)]
struct Ring<T>(Mutex<VecDeque<T>>);

impl<T> Default for Ring<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Ring<T> {
    fn push(&self, item: T) {
        let mut items = self.lock();
        let oldest = match items.len() < RING_CAPACITY {
            true => None,
            false => items.pop_front(),
        };
        items.push_back(item);
        drop(items);
        // Nobody waits for what it frees.
        drop(oldest);
    }

    fn last(&self, is_it: impl Fn(&T) -> bool) -> Option<T> {
        self.lock().iter().rev().find(|item| is_it(item)).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
