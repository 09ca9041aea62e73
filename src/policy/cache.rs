//! Decisions remembered: one cache per data worker, of one snapshot at a time.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use countersign_attestors::{AttestedWorkload, Generation};
use foldhash::fast::RandomState;
use http::Method;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{Equivalent, UnitWeighter};

use super::decision::{Decision, Denial};
use super::engine::{PolicyEngine, Slice};
use super::grant::{Grant, Permitted};
use super::principal::Principal;
use super::question::{Action, OwnedResource, Question, Resource};
use super::reads::PathRead;
use super::snapshot::PolicySnapshot;
use crate::config::Destination;

/// The most decisions that one worker remembers.
pub const CAPACITY: usize = 65_536;

/// The most bytes of a path and a method by which a decision is remembered: their length is the caller's choice.
const LONGEST: usize = 1_024;

/// The most workloads whose entity one worker remembers.
const PRINCIPALS: usize = 4_096;

/// Remembers decisions for one data worker. Another snapshot empties it; liveness is checked every time.
#[derive(Debug)]
pub struct DecisionCache {
    snapshot: Option<Arc<PolicySnapshot>>,
    decisions: Cache<Key, Remembered, UnitWeighter, RandomState>,
    /// By which keys are hashed, once each.
    hashes: RandomState,
    principals: Cache<Generation, Arc<Principal>>,
    hits: u64,
    misses: u64,
}

type Remembered = Result<Arc<Permitted>, Arc<Denial>>;

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
            hashes: RandomState::default(),
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
        let key = KeyView::new(snapshot.engine(), workload, question, &self.hashes);
        if let Some(remembered) = key.as_ref().and_then(|key| self.remembered(key, question)) {
            let answer = answer(remembered, workload);
            self.hits += 1;
            return answer;
        }
        self.misses += 1;
        let principal = self.principal(snapshot, workload);
        let decided = match snapshot.evaluate(workload, &principal, question) {
            Decision::Allow(permission) => Ok(Permitted::new(permission, question, snapshot)),
            Decision::Deny(denial) => Err(denial),
        };
        let answer = answer(&decided, workload);
        if let Some(key) = key {
            let key = match &decided {
                Ok(_) => key,
                // What came nearest says which path was asked for.
                Err(_) => key
                    .with_the_path_itself(question, &self.hashes)
                    .unwrap_or(key),
            };
            if key.length() <= LONGEST {
                self.decisions.insert(key.to_key(), decided);
            }
        }
        answer
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

    /// What is known of the question: no permission that has ended. A weekday and an hour of the local time,
    /// which are in the key, come round again.
    fn remembered(&self, key: &KeyView<'_>, question: &Question<'_>) -> Option<&Remembered> {
        let known = self.decisions.get(key).or_else(|| {
            let key = key.with_the_path_itself(question, &self.hashes)?;
            self.decisions.get(&key)
        })?;
        let holds = match known {
            Ok(permitted) => permitted.holds_at(question.wall),
            Err(_) => true,
        };
        holds.then_some(known)
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

fn answer(remembered: &Remembered, workload: &Arc<AttestedWorkload>) -> Result<Grant, Arc<Denial>> {
    match remembered {
        Ok(permitted) => Ok(Grant::new(Arc::clone(permitted), workload)),
        Err(denial) => Err(Arc::clone(denial)),
    }
}

/// Everything that the decision depends on, in full. The generation stands for the workload's attributes;
/// of the request and the time only what the slice reads is there. What is of the configuration is held, so
/// that nothing else has its address.
#[derive(Debug)]
struct Key {
    hash: u64,
    plain: Plain,
    resource: OwnedResource,
    destination: Option<Arc<Destination>>,
    method: Option<Method>,
    path: PathKey<String>,
}

/// The part of a key that is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plain {
    generation: Generation,
    action: Action,
    has_request: bool,
    ambiguous: bool,
    second: Option<u64>,
    local: Option<(i8, i8)>,
    expired: usize,
}

/// What a decision depends on of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
            hash: self.hash,
            plain: self.plain,
            resource: self.resource.as_resource(),
            destination: self.destination.as_ref(),
            method: self.method.as_ref(),
            path: self.path.borrowed(),
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.view().equivalent(other)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// A [`Key`] that borrows: the hit path allocates nothing.
#[derive(Debug, Clone, Copy)]
struct KeyView<'a> {
    hash: u64,
    plain: Plain,
    resource: Resource<'a>,
    destination: Option<&'a Arc<Destination>>,
    method: Option<&'a Method>,
    path: PathKey<&'a str>,
}

impl<'a> KeyView<'a> {
    /// `None` for a resource that is not in the engine's configuration.
    fn new(
        engine: &PolicyEngine,
        workload: &AttestedWorkload,
        question: &Question<'a>,
        hashes: &RandomState,
    ) -> Option<Self> {
        let slice = engine.slice(question)?;
        let reads = &slice.reads;
        let request = question.request;
        let seconds = || {
            let since = question.wall.duration_since(UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs())
        };
        let mut key = Self {
            hash: 0,
            plain: Plain {
                generation: workload.generation(),
                action: question.action,
                has_request: request.is_some(),
                ambiguous: reads.path.is_read()
                    && request.is_some_and(|request| request.path.is_ambiguous()),
                second: reads.time.then(seconds),
                local: reads.local.then(|| engine.local_time(question.wall)),
                expired: slice.expired(question.wall),
            },
            resource: question.resource,
            destination: question.destination,
            // Where a request is not safe, a denial says of which method it is.
            method: request
                .filter(|_| reads.method || reads.safe)
                .map(|request| &request.method),
            path: request.map_or(PathKey::Nothing, |request| {
                PathKey::new(slice, request.path.as_str())
            }),
        };
        key.hash = key.hash_by(hashes);
        Some(key)
    }

    /// The same with the path instead of what it matches; `None` where that is not what is read of it.
    fn with_the_path_itself(
        mut self,
        question: &Question<'a>,
        hashes: &RandomState,
    ) -> Option<Self> {
        let (PathKey::Outcomes(_), Some(request)) = (self.path, question.request) else {
            return None;
        };
        self.path = PathKey::Whole(request.path.as_str());
        self.hash = self.hash_by(hashes);
        Some(self)
    }

    /// Hashes what takes many values. Keys that differ in the rest only are told apart by comparison.
    fn hash_by(&self, hashes: &RandomState) -> u64 {
        let resource = match self.resource {
            Resource::Credential { credential, .. } => Arc::as_ptr(credential).addr(),
            Resource::Destination(destination) => Arc::as_ptr(destination).addr(),
            Resource::Unmatched => 0,
        };
        let destination = self
            .destination
            .map_or(0, |destination| Arc::as_ptr(destination).addr());
        let outcomes = match self.path {
            PathKey::Outcomes(outcomes) => outcomes,
            PathKey::Nothing | PathKey::Whole(_) => 0,
        };
        let mut state = hashes.build_hasher();
        self.plain.generation.hash(&mut state);
        state.write_usize(resource);
        state.write_usize(destination);
        state.write_u64(outcomes);
        let (scopes, audience) = self.resource.asked();
        for scope in scopes {
            state.write(scope.as_bytes());
        }
        if let Some(audience) = audience {
            state.write(audience.as_bytes());
        }
        if let PathKey::Whole(path) = self.path {
            state.write(path.as_bytes());
        }
        if let Some(method) = self.method {
            method.hash(&mut state);
        }
        if let Some(second) = self.plain.second {
            state.write_u64(second);
        }
        if let Some(local) = self.plain.local {
            local.hash(&mut state);
        }
        state.finish()
    }

    /// How many bytes of the caller's choice it holds.
    fn length(&self) -> usize {
        let path = match self.path {
            PathKey::Whole(path) => path.len(),
            PathKey::Nothing | PathKey::Outcomes(_) => 0,
        };
        path + self.method.map_or(0, |method| method.as_str().len())
    }

    fn to_key(self) -> Key {
        Key {
            hash: self.hash,
            plain: self.plain,
            resource: self.resource.to_owned(),
            destination: self.destination.cloned(),
            method: self.method.cloned(),
            path: self.path.to_owned(),
        }
    }
}

impl Hash for KeyView<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Equivalent<Key> for KeyView<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        let same_destination = match (self.destination, &key.destination) {
            (Some(asked), Some(known)) => Arc::ptr_eq(asked, known),
            (None, None) => true,
            _ => false,
        };
        self.hash == key.hash
            && self.plain == key.plain
            && same_destination
            && asks_for_the_same(self.resource, &key.resource)
            && self.method == key.method.as_ref()
            && self.path == key.path.borrowed()
    }
}

fn asks_for_the_same(asked: Resource<'_>, known: &OwnedResource) -> bool {
    match (asked, known) {
        (
            Resource::Credential {
                credential,
                scopes,
                audience,
            },
            OwnedResource::Credential {
                credential: known,
                scopes: known_scopes,
                audience: known_audience,
            },
        ) => {
            Arc::ptr_eq(credential, known)
                // Those of a configuration are the same list.
                && (Arc::ptr_eq(scopes, known_scopes) || scopes == known_scopes)
                && audience == known_audience.as_ref()
        }
        (Resource::Destination(asked), OwnedResource::Destination(known)) => {
            Arc::ptr_eq(asked, known)
        }
        (Resource::Unmatched, OwnedResource::Unmatched) => true,
        _ => false,
    }
}
