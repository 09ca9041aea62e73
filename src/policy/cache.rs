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
use super::reads::PathRead;
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
        let key = KeyView::new(snapshot, workload, question);
        let remembered = self
            .decisions
            .get(&key)
            .or_else(|| self.decisions.get(&key.with_the_path_itself(question)));
        let decision = match remembered {
            Some(decision) => {
                self.hits += 1;
                decision.clone()
            }
            None => {
                self.misses += 1;
                let principal = self.principal(snapshot, workload);
                let decision = snapshot.evaluate(workload, &principal, question);
                let key = match &decision {
                    Decision::Allow(_) => key.to_key(),
                    // What came nearest says which path was asked for.
                    Decision::Deny(_) => key.with_the_path_itself(question).to_key(),
                };
                self.decisions.insert(key, decision.clone());
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
    path: PathKey<String>,
    safe: Option<bool>,
    scopes: Vec<String>,
    audience: Option<String>,
    second: Option<u64>,
    local: Option<(i8, i8)>,
    expired: usize,
}

/// What a decision depends on of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PathKey<Path> {
    /// Nothing: it is not read, or there is no request.
    Nothing,
    /// One bit for each of the slice's patterns: whether it matches.
    Outcomes(u64),
    Whole(Path),
}

impl<'a> PathKey<&'a str> {
    fn new(read: &PathRead, path: &'a str) -> Self {
        match read {
            PathRead::Unread => Self::Nothing,
            PathRead::Matched(patterns) if patterns.len() <= u64::BITS as usize => {
                Self::Outcomes(patterns.iter().fold(0, |outcomes, pattern| {
                    outcomes << 1 | u64::from(pattern.matches(path))
                }))
            }
            PathRead::Matched(_) | PathRead::Whole => Self::Whole(path),
        }
    }

    fn to_owned(self) -> PathKey<String> {
        match self {
            Self::Nothing => PathKey::Nothing,
            Self::Outcomes(outcomes) => PathKey::Outcomes(outcomes),
            Self::Whole(path) => PathKey::Whole(path.to_owned()),
        }
    }
}

impl PathKey<String> {
    fn borrowed(&self) -> PathKey<&str> {
        match self {
            Self::Nothing => PathKey::Nothing,
            Self::Outcomes(outcomes) => PathKey::Outcomes(*outcomes),
            Self::Whole(path) => PathKey::Whole(path),
        }
    }
}

/// A [`Key`] that borrows: the hit path allocates nothing. Fields are in the order of [`Key`], so that both hash alike.
#[derive(Debug, Clone, Hash)]
struct KeyView<'a> {
    generation: Generation,
    action: Action,
    resource_type: ResourceType,
    resource: &'a str,
    destination: Option<&'a str>,
    has_request: bool,
    ambiguous: bool,
    method: Option<&'a Method>,
    path: PathKey<&'a str>,
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
            ambiguous: read(|reads| reads.path.is_read())
                && request.is_some_and(|request| request.path.is_ambiguous()),
            method: request
                .filter(|_| read(|reads| reads.method))
                .map(|request| &request.method),
            path: match (reads, request) {
                (Some(reads), Some(request)) => PathKey::new(&reads.path, request.path.as_str()),
                _ => PathKey::Nothing,
            },
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

    /// The same, where the path is read, with the path instead of what it matches.
    fn with_the_path_itself(&self, question: &Question<'a>) -> Self {
        let mut key = self.clone();
        if let (PathKey::Outcomes(_), Some(request)) = (self.path, question.request) {
            key.path = PathKey::Whole(request.path.as_str());
        }
        key
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
            path: self.path.to_owned(),
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
            && self.path == key.path.borrowed()
            && self.safe == key.safe
            && self.scopes == key.scopes
            && self.audience == key.audience.as_deref()
            && self.second == key.second
            && self.local == key.local
            && self.expired == key.expired
    }
}
