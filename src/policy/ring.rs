//! The last decisions, for `policy explain ID`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use countersign_attestors::{AttestedWorkload, Generation, IsolationKey, WorkloadFacts};

use super::decision::Denial;
use super::engine::PolicyEngine;
use super::grant::Grant;
use super::question::{OwnedQuestion, Question};
use super::snapshot::PolicySnapshot;
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
    /// Why not; `None` for a yes.
    pub denial: Option<Arc<Denial>>,
}

/// The last [`RING_CAPACITY`] decisions. Shared by all workers.
#[derive(Debug, Default)]
pub struct DecisionRing {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    decisions: VecDeque<RecordedDecision>,
    /// Equal generations have equal facts: they are kept once.
    facts: HashMap<Generation, Weak<WorkloadFacts>>,
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
        let question = question.to_owned();
        let generation = workload.generation();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let known = state.facts.get(&generation).and_then(Weak::upgrade);
        let facts = known.unwrap_or_else(|| {
            let facts = Arc::new(workload.facts().clone());
            state.facts.insert(generation, Arc::downgrade(&facts));
            facts
        });
        if state.decisions.len() >= RING_CAPACITY {
            state.decisions.pop_front();
        }
        if state.facts.len() > RING_CAPACITY {
            state.facts.retain(|_, facts| facts.strong_count() > 0);
        }
        state.decisions.push_back(RecordedDecision {
            request_id,
            facts,
            isolation_key: workload.isolation_key().clone(),
            question,
            engine: Arc::clone(snapshot.engine()),
            denial: outcome.err().map(Arc::clone),
        });
    }

    /// The decision on a request; the last one where a request was decided more than once.
    pub fn find(&self, request_id: RequestId) -> Option<RecordedDecision> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state
            .decisions
            .iter()
            .rev()
            .find(|decision| decision.request_id == request_id)
            .cloned()
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.decisions.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
