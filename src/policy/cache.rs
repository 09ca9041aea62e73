//! Decisions remembered: one cache per data worker, hung on the snapshot.

use std::hash::Hash;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use countersign_attestors::{AttestedWorkload, Generation};
use foldhash::fast::RandomState;
use http::Method;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{Equivalent, UnitWeighter};

use super::decision::{Decision, Denial};
use super::grant::Grant;
use super::principal::Principal;
use super::question::{Action, Question, ResourceType};
use super::snapshot::PolicySnapshot;

/// The most decisions that one worker remembers.
pub const CAPACITY: usize = 65_536;

/// The most workloads whose entity one worker remembers.
const PRINCIPALS: usize = 4_096;

/// Remembers decisions for one data worker. Another snapshot empties it; liveness is checked every time.
#[derive(Debug)]
pub struct DecisionCache {
    snapshot: Option<Arc<PolicySnapshot>>,
    decisions: Cache<Key, Decision, UnitWeighter, RandomState>,
    principals: Cache<Generation, Arc<Principal>>,
    hits: u64,
    misses: u64,
}

impl DecisionCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self {
            snapshot: None,
            decisions: Cache::with(
                CAPACITY,
                CAPACITY as u64,
                UnitWeighter,
                RandomState::default(),
                DefaultLifecycle::default(),
            ),
            principals: Cache::new(PRINCIPALS),
            hits: 0,
            misses: 0,
        }
    }

    /// Decides as [`PolicySnapshot::decide`] would, from memory where it can.
    pub fn decide(
        &mut self,
        snapshot: &Arc<PolicySnapshot>,
        workload: &Arc<AttestedWorkload>,
        question: &Question<'_>,
    ) -> Result<Grant, Arc<Denial>> {
        if !self
            .snapshot
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, snapshot))
        {
            self.decisions.clear();
            self.principals.clear();
            self.snapshot = Some(Arc::clone(snapshot));
        }
        snapshot.check_liveness(workload, question)?;
        let view = KeyView::new(snapshot, workload, question);
        let decision = match self.decisions.get(&view) {
            Some(decision) => {
                self.hits += 1;
                decision.clone()
            }
            None => {
                self.misses += 1;
                let principal = self.principal(snapshot, workload);
                let decision = snapshot.evaluate(workload, &principal, question);
                self.decisions.insert(view.to_key(), decision.clone());
                decision
            }
        };
        match decision {
            Decision::Allow(permission) => Ok(Grant::new(permission, question, snapshot, workload)),
            Decision::Deny(denial) => Err(denial),
        }
    }

    /// How many decisions came from memory.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// How many decisions were made.
    pub fn misses(&self) -> u64 {
        self.misses
    }

    /// How many decisions are remembered.
    pub fn len(&self) -> usize {
        self.decisions.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.decisions.is_empty()
    }

    fn principal(
        &mut self,
        snapshot: &PolicySnapshot,
        workload: &AttestedWorkload,
    ) -> Arc<Principal> {
        let generation = workload.generation();
        match self.principals.get(&generation) {
            Some(principal) => Arc::clone(principal),
            None => {
                let principal = Arc::new(Principal::new(workload.facts(), snapshot.engine()));
                self.principals.insert(generation, Arc::clone(&principal));
                principal
            }
        }
    }
}

impl Default for DecisionCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Everything that the decision depends on, in full. The generation stands for the workload's attributes;
/// of the request and the time only what the slice reads is there.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    generation: Generation,
    action: Action,
    resource_type: ResourceType,
    resource: String,
    destination: Option<String>,
    has_request: bool,
    ambiguous: bool,
    method: Option<Method>,
    path: Option<String>,
    safe: Option<bool>,
    scopes: Vec<String>,
    audience: Option<String>,
    second: Option<u64>,
    local: Option<(i8, i8)>,
    expired: usize,
}

/// A [`Key`] that borrows: the hit path allocates nothing. Fields are in the order of [`Key`], so that both hash alike.
#[derive(Debug, Hash)]
struct KeyView<'a> {
    generation: Generation,
    action: Action,
    resource_type: ResourceType,
    resource: &'a str,
    destination: Option<&'a str>,
    has_request: bool,
    ambiguous: bool,
    method: Option<&'a Method>,
    path: Option<&'a str>,
    safe: Option<bool>,
    scopes: &'a [String],
    audience: Option<&'a str>,
    second: Option<u64>,
    local: Option<(i8, i8)>,
    expired: usize,
}

impl<'a> KeyView<'a> {
    fn new(
        snapshot: &PolicySnapshot,
        workload: &AttestedWorkload,
        question: &Question<'a>,
    ) -> Self {
        let engine = snapshot.engine();
        let (resource_type, resource) = question.resource.identity();
        let (scopes, audience) = question.resource.asked();
        let slice = engine.slice(question);
        let reads = slice.map(|slice| &slice.reads);
        let read = |flag: fn(&super::reads::Reads) -> bool| reads.is_some_and(flag);
        let request = question.request;
        Self {
            generation: workload.generation(),
            action: question.action,
            resource_type,
            resource,
            destination: question.destination.map(|destination| &*destination.name),
            has_request: request.is_some(),
            ambiguous: read(|reads| reads.path)
                && request.is_some_and(|request| request.path.is_ambiguous()),
            method: request
                .filter(|_| read(|reads| reads.method))
                .map(|request| &request.method),
            path: request
                .filter(|_| read(|reads| reads.path))
                .map(|request| request.path.as_str()),
            safe: request
                .filter(|_| read(|reads| reads.safe))
                .map(|request| request.is_safe()),
            scopes,
            audience,
            second: read(|reads| reads.time).then(|| {
                question
                    .wall
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| since.as_secs())
            }),
            local: read(|reads| reads.local).then(|| engine.local_time(question.wall)),
            expired: slice.map_or(0, |slice| slice.expired(question.wall)),
        }
    }

    fn to_key(&self) -> Key {
        Key {
            generation: self.generation,
            action: self.action,
            resource_type: self.resource_type,
            resource: self.resource.to_owned(),
            destination: self.destination.map(str::to_owned),
            has_request: self.has_request,
            ambiguous: self.ambiguous,
            method: self.method.cloned(),
            path: self.path.map(str::to_owned),
            safe: self.safe,
            scopes: self.scopes.to_vec(),
            audience: self.audience.map(str::to_owned),
            second: self.second,
            local: self.local,
            expired: self.expired,
        }
    }
}

impl Equivalent<Key> for KeyView<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.generation == key.generation
            && self.action == key.action
            && self.resource_type == key.resource_type
            && self.resource == key.resource
            && self.destination == key.destination.as_deref()
            && self.has_request == key.has_request
            && self.ambiguous == key.ambiguous
            && self.method == key.method.as_ref()
            && self.path == key.path.as_deref()
            && self.safe == key.safe
            && self.scopes == key.scopes
            && self.audience == key.audience.as_deref()
            && self.second == key.second
            && self.local == key.local
            && self.expired == key.expired
    }
}
