//! Decisions remembered: one cache per data worker, hung on the snapshot.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use countersign_attestors::{AttestedWorkload, Generation};
use foldhash::fast::RandomState;
use http::Method;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{Equivalent, UnitWeighter};

use super::decision::{Decision, Denial};
use super::engine::{PolicyEngine, Slice};
use super::grant::Grant;
use super::principal::Principal;
use super::question::{Action, Question, Resource};
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
        let key = KeyView::new(snapshot.engine(), workload, question);
        let remembered = key.as_ref().and_then(|key| self.remembered(key, question));
        let decision = match remembered {
            Some(decision) => {
                self.hits += 1;
                decision
            }
            None => {
                self.misses += 1;
                let principal = self.principal(snapshot, workload);
                let decision = snapshot.evaluate(workload, &principal, question);
                if let Some(key) = key {
                    let key = match &decision {
                        Decision::Allow(_) => key.to_key(),
                        // What came nearest says which path was asked for.
                        Decision::Deny(_) => key.with_the_path_itself(question).to_key(),
                    };
                    self.decisions.insert(key, decision.clone());
                }
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

    fn remembered(&self, key: &KeyView<'_>, question: &Question<'_>) -> Option<Decision> {
        self.decisions
            .get(key)
            .or_else(|| self.decisions.get(&key.with_the_path_itself(question)))
            .cloned()
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
#[derive(Debug, PartialEq, Eq)]
struct Key {
    plain: Plain,
    destination: Option<Arc<str>>,
    method: Option<Method>,
    path: PathKey<String>,
    scopes: Option<Arc<[String]>>,
    audience: Option<Arc<str>>,
}

/// The part of a key that is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plain {
    generation: Generation,
    action: Action,
    /// Its number in the engine.
    resource: usize,
    has_request: bool,
    ambiguous: bool,
    safe: Option<bool>,
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
    fn new(slice: &Slice, path: &'a str) -> Self {
        match (&slice.path_patterns, &slice.reads.path) {
            (Some(patterns), _) => Self::Outcomes(patterns.matching(path)),
            (None, PathRead::Unread) => Self::Nothing,
            (None, PathRead::Matched(_) | PathRead::Whole) => Self::Whole(path),
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

impl Key {
    fn view(&self) -> KeyView<'_> {
        KeyView {
            plain: self.plain,
            destination: self.destination.as_ref(),
            method: self.method.as_ref(),
            path: self.path.borrowed(),
            scopes: self.scopes.as_ref(),
            audience: self.audience.as_ref(),
        }
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.view().hash(state);
    }
}

/// A [`Key`] that borrows: the hit path allocates nothing.
#[derive(Debug, Clone)]
struct KeyView<'a> {
    plain: Plain,
    destination: Option<&'a Arc<str>>,
    method: Option<&'a Method>,
    path: PathKey<&'a str>,
    scopes: Option<&'a Arc<[String]>>,
    audience: Option<&'a Arc<str>>,
}

impl<'a> KeyView<'a> {
    /// `None` for a resource that is not in the engine's configuration: it has no number.
    fn new(
        engine: &PolicyEngine,
        workload: &AttestedWorkload,
        question: &Question<'a>,
    ) -> Option<Self> {
        let (resource, slice) = engine.applicable(question)?;
        let (scopes, audience) = match question.resource {
            Resource::Credential {
                scopes, audience, ..
            } => (Some(scopes), audience),
            Resource::Destination(_) | Resource::Unmatched => (None, None),
        };
        let reads = &slice.reads;
        let request = question.request;
        let seconds = || {
            let since = question.wall.duration_since(UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs())
        };
        Some(Self {
            plain: Plain {
                generation: workload.generation(),
                action: question.action,
                resource: resource.number,
                has_request: request.is_some(),
                ambiguous: reads.path.is_read()
                    && request.is_some_and(|request| request.path.is_ambiguous()),
                safe: request
                    .filter(|_| reads.safe)
                    .map(|request| request.is_safe()),
                second: reads.time.then(seconds),
                local: reads.local.then(|| engine.local_time(question.wall)),
                expired: slice.expired(question.wall),
            },
            destination: question.destination.map(|destination| &destination.name),
            method: request
                .filter(|_| reads.method)
                .map(|request| &request.method),
            path: request.map_or(PathKey::Nothing, |request| {
                PathKey::new(slice, request.path.as_str())
            }),
            scopes,
            audience,
        })
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
            plain: self.plain,
            destination: self.destination.cloned(),
            method: self.method.cloned(),
            path: self.path.to_owned(),
            scopes: self.scopes.cloned(),
            audience: self.audience.cloned(),
        }
    }
}

impl Hash for KeyView<'_> {
    /// Hashes what takes many values. Keys that differ in the rest only are told apart by comparison.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.plain.generation.hash(state);
        self.plain.resource.hash(state);
        self.plain.second.hash(state);
        self.plain.local.hash(state);
        self.destination.hash(state);
        self.method.hash(state);
        self.path.hash(state);
        self.scopes.hash(state);
        self.audience.hash(state);
    }
}

impl Equivalent<Key> for KeyView<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        let asks_for_the_same = match (self.scopes, &key.scopes) {
            // Those of a configuration are the same list.
            (Some(asked), Some(known)) => Arc::ptr_eq(asked, known) || asked == known,
            (None, None) => true,
            _ => false,
        };
        self.plain == key.plain
            && self.destination == key.destination.as_ref()
            && self.method == key.method.as_ref()
            && self.path == key.path.borrowed()
            && asks_for_the_same
            && self.audience == key.audience.as_ref()
    }
}
