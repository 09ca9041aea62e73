//! Decisions remembered: one cache per data worker, of one snapshot at a time.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use countersign_attestors::{AttestedWorkload, Generation};
use foldhash::fast::RandomState;
use http::Method;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{Equivalent, UnitWeighter};

use super::decision::{Decision, Denial};
use super::engine::PolicyEngine;
use super::grant::{Grant, Permitted};
use super::principal::Principal;
use super::question::{Action, OwnedResource, Question, Resource};
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
                Err(_) => key.with_the_path_itself(question).unwrap_or(key),
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
            let key = key.with_the_path_itself(question)?;
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
    plain: Plain,
    resource: OwnedResource,
    destination: Option<Arc<Destination>>,
    method: Option<Method>,
    path: Option<Box<str>>,
}

/// The part of a key that is copied. What the slice of the resource and the action does not read is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plain {
    generation: Generation,
    /// The address of what the action is on.
    resource: usize,
    /// The address of the destination; 0 without one.
    destination: usize,
    /// One bit for each of the slice's patterns, where nothing else is read of the path: whether it matches.
    outcomes: Option<u64>,
    /// Seconds since 1970 where `context.time` is read, else the hour of the week for `context.local`.
    time: u64,
    expired: usize,
    action: Action,
    has_request: bool,
    ambiguous: bool,
}

impl Key {
    fn view(&self) -> KeyView<'_> {
        KeyView {
            plain: self.plain,
            resource: self.resource.as_resource(),
            destination: self.destination.as_ref(),
            method: self.method.as_ref(),
            path: self.path.as_deref(),
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
        self.view().hash(state);
    }
}

/// A [`Key`] that borrows: the hit path allocates nothing.
#[derive(Debug, Clone, Copy)]
struct KeyView<'a> {
    plain: Plain,
    resource: Resource<'a>,
    destination: Option<&'a Arc<Destination>>,
    method: Option<&'a Method>,
    path: Option<&'a str>,
}

impl<'a> KeyView<'a> {
    /// `None` for a resource that is not in the engine's configuration.
    fn new(
        engine: &PolicyEngine,
        workload: &AttestedWorkload,
        question: &Question<'a>,
    ) -> Option<Self> {
        let slice = engine.slice(question)?;
        let reads = &slice.reads;
        let request = question.request;
        let path = request.map(|request| request.path.as_str());
        let matching = |path| Some(slice.path_patterns.as_ref()?.matching(path));
        let outcomes = path.and_then(matching);
        let address = |destination: &Arc<Destination>| Arc::as_ptr(destination).addr();
        Some(Self {
            plain: Plain {
                generation: workload.generation(),
                resource: question.resource.address(),
                destination: question.destination.map_or(0, address),
                outcomes,
                time: match (reads.time, reads.local) {
                    (true, _) => seconds(question.wall),
                    (false, true) => hour_of_the_week(engine.local_time(question.wall)),
                    (false, false) => 0,
                },
                expired: slice.expired(question.wall),
                action: question.action,
                has_request: request.is_some(),
                ambiguous: reads.path.is_read()
                    && request.is_some_and(|request| request.path.is_ambiguous()),
            },
            resource: question.resource,
            destination: question.destination,
            // Where a request is not safe, a denial says of which method it is.
            method: request
                .filter(|_| reads.method || reads.safe)
                .map(|request| &request.method),
            path: path.filter(|_| outcomes.is_none() && reads.path.is_read()),
        })
    }

    /// The same with the path instead of what it matches; `None` where that is not what is read of it.
    fn with_the_path_itself(mut self, question: &Question<'a>) -> Option<Self> {
        self.plain.outcomes.take()?;
        self.path = Some(question.request?.path.as_str());
        Some(self)
    }

    /// How many bytes of the caller's choice it holds.
    fn length(&self) -> usize {
        self.path.map_or(0, str::len) + self.method.map_or(0, |method| method.as_str().len())
    }

    fn to_key(self) -> Key {
        Key {
            plain: self.plain,
            resource: self.resource.to_owned(),
            destination: self.destination.cloned(),
            method: self.method.cloned(),
            path: self.path.map(Box::from),
        }
    }
}

impl Hash for KeyView<'_> {
    /// Hashes what takes many values. Keys that differ in the rest only are told apart by comparison.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let plain = &self.plain;
        plain.generation.hash(state);
        state.write_usize(plain.resource);
        state.write_usize(plain.destination);
        state.write_u64(plain.outcomes.unwrap_or(0));
        state.write_u64(plain.time);
        let (scopes, audience) = self.resource.asked();
        for scope in scopes {
            state.write(scope.as_bytes());
        }
        let method = self.method.map(Method::as_str);
        for text in [audience, self.path, method].into_iter().flatten() {
            state.write(text.as_bytes());
        }
    }
}

impl Equivalent<Key> for KeyView<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        let known = key.resource.as_resource();
        self.plain == key.plain
            && self.method == key.method.as_ref()
            && self.path == key.path.as_deref()
            && self.resource.asks_as_much_as(&known)
    }
}

/// Seconds since 1970; 0 before.
fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Of a weekday and an hour.
fn hour_of_the_week((weekday, hour): (i8, i8)) -> u64 {
    24 * u64::from(weekday.unsigned_abs()) + u64::from(hour.unsigned_abs())
}
