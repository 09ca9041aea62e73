//! Policies as trees that are evaluated in place, without the entities and the context that Cedar evaluates
//! them on. What a tree says, Cedar says of the same policy; what has no tree, and whatever fails, is left
//! to Cedar. `src/policy/tests/compiled.rs` compares the two.
//!
//! `compile.rs` makes them when a policy is loaded; [`Condition::holds`] and [`Term::value`] say what they mean.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use countersign_attestors::{AttributeValue, WorkloadFacts};
use smallvec::{SmallVec, smallvec};

use super::engine::{LoadedResource, PolicyEngine, weekday_name};
use super::pattern::Pattern;
use super::principal::{LABELS, Principal, WORKLOAD};
use super::question::Question;
use crate::request::EgressRequest;

/// A policy's condition on the principal and its `when` and `unless`: what must hold, in order.
#[derive(Debug)]
pub(super) struct CompiledPolicy(pub(super) Vec<Condition>);

/// The policy could not be evaluated; Cedar says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fails;

impl CompiledPolicy {
    /// Whether the policy is satisfied, where its scope covers the action and the resource.
    pub(super) fn is_satisfied(&self, world: &World<'_>) -> Result<bool, Fails> {
        all_hold(&self.0, world)
    }
}

/// What a tree reads: the same that Cedar is given as entities and context.
pub(super) struct World<'a> {
    engine: &'a PolicyEngine,
    facts: &'a WorkloadFacts,
    principal: &'a Principal,
    question: &'a Question<'a>,
    resource: &'a LoadedResource,
    /// By place in [`PolicyEngine::attributes`].
    looked_up: SmallVec<[LookedUp<'a>; 16]>,
    /// Weekday and hour on the node's clock, once they are asked for.
    local: OnceCell<(i8, i8)>,
}

/// An attribute and its group, looked up when first asked for: most policies ask for the same.
#[derive(Clone, Default)]
struct LookedUp<'a> {
    group: OnceCell<bool>,
    value: OnceCell<Option<&'a AttributeValue>>,
}

impl<'a> World<'a> {
    /// `resource` is the question's.
    pub(super) fn new(
        engine: &'a PolicyEngine,
        facts: &'a WorkloadFacts,
        principal: &'a Principal,
        question: &'a Question<'a>,
        resource: &'a LoadedResource,
    ) -> Self {
        Self {
            engine,
            facts,
            principal,
            question,
            resource,
            looked_up: smallvec![LookedUp::default(); engine.attributes.len()],
            local: OnceCell::new(),
        }
    }

    /// The value of the attribute at a place.
    fn attribute(&self, place: usize) -> Option<&'a AttributeValue> {
        *self.looked_up.get(place)?.value.get_or_init(|| {
            let (group, name) = self.engine.attributes.get(place)?;
            self.facts.attribute(group, name)
        })
    }

    /// Whether the group of the attribute at a place is there.
    fn has_group(&self, place: usize) -> bool {
        let Some(looked_up) = self.looked_up.get(place) else {
            return false;
        };
        *looked_up.group.get_or_init(|| {
            let attribute = self.engine.attributes.get(place);
            attribute.is_some_and(|(group, _)| self.facts.groups.contains_key(group))
        })
    }

    /// The configuration's own reading of `context.destination`.
    fn destination(&self) -> Option<&LoadedResource> {
        self.engine
            .destinations
            .get(&*self.question.destination?.name)
    }

    fn request(&self) -> Result<&'a EgressRequest, Fails> {
        self.question.request.map(|request| &**request).ok_or(Fails)
    }

    fn local(&self) -> (i8, i8) {
        *self
            .local
            .get_or_init(|| self.engine.local_time(self.question.wall))
    }

    /// Whether an entity is `target` or has it for a parent.
    fn is_in(&self, entity: (&str, &str), target: &Entity) -> bool {
        let (resource_type, name) = self.question.resource.identity();
        entity == target.uid()
            || (entity == WORKLOAD
                && self
                    .principal
                    .parents
                    .iter()
                    .any(|(entity_type, id)| (*entity_type, id.as_str()) == target.uid()))
            || (entity == (resource_type.as_str(), name)
                && target.entity_type == "CredentialGroup"
                && self.resource.groups.contains(&target.id))
    }
}

/// What is true or false.
#[derive(Debug)]
pub(super) enum Condition {
    Term(Term),
    /// `BASE has ASKED`: fails where there is no `base`.
    Has {
        base: Presence,
        asked: Presence,
    },
    All(Vec<Self>),
    Any(Vec<Self>),
    Not(Box<Self>),
    If(Box<[Self; 3]>),
    Equal(Box<[Term; 2]>),
    Less(Box<[Term; 2]>),
    LessOrEqual(Box<[Term; 2]>),
    Contains(Box<[Term; 2]>),
    ContainsAll(Box<[Term; 2]>),
    ContainsAny(Box<[Term; 2]>),
    IsEmpty(Term),
    Like(Term, Pattern),
    Is(Term, String),
    In(Term, Entity),
    /// `principal.hasTag(...)`
    HasTag(Term),
}

/// What has a value.
#[derive(Debug)]
pub(super) enum Term {
    Literal(Literal),
    Attribute(Attribute),
    Condition(Box<Condition>),
    If(Box<(Condition, [Self; 2])>),
    Negative(Box<Self>),
    Add(Box<[Self; 2]>),
    Subtract(Box<[Self; 2]>),
    Multiply(Box<[Self; 2]>),
    /// `principal.getTag(...)`
    GetTag(Box<Self>),
}

fn all_hold(conditions: &[Condition], world: &World<'_>) -> Result<bool, Fails> {
    for condition in conditions {
        if !condition.holds(world)? {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Condition {
    fn holds(&self, world: &World<'_>) -> Result<bool, Fails> {
        Ok(match self {
            Self::Term(Term::Attribute(Attribute::Safe)) => world.request()?.is_safe(),
            Self::Term(term) => match term.value(world)? {
                Value::Boolean(holds) => holds,
                _ => return Err(Fails),
            },
            Self::Has { base, asked } => match base.holds(world) {
                true => asked.holds(world),
                false => return Err(Fails),
            },
            Self::All(conditions) => all_hold(conditions, world)?,
            Self::Any(conditions) => {
                for condition in conditions {
                    if condition.holds(world)? {
                        return Ok(true);
                    }
                }
                false
            }
            Self::Not(condition) => !condition.holds(world)?,
            Self::If(parts) => {
                let [condition, consequent, alternative] = &**parts;
                match condition.holds(world)? {
                    true => consequent.holds(world)?,
                    false => alternative.holds(world)?,
                }
            }
            Self::Equal(sides) => match &**sides {
                [
                    Term::Attribute(Attribute::OfPrincipal(place)),
                    Term::Literal(Literal::Text(text)),
                ] => match world.attribute(*place).ok_or(Fails)? {
                    AttributeValue::String(known) => known == text,
                    _ => false,
                },
                [left, right] => left.value(world)? == right.value(world)?,
            },
            Self::Less(sides) => {
                let [left, right] = Term::longs(sides, world)?;
                left < right
            }
            Self::LessOrEqual(sides) => {
                let [left, right] = Term::longs(sides, world)?;
                left <= right
            }
            Self::Contains(sides) => {
                let [set, wanted] = &**sides;
                set.set(world)?.contains(wanted.value(world)?)
            }
            Self::ContainsAll(sides) => {
                let [set, others] = &**sides;
                set.set(world)?.contains_all(others.set(world)?)
            }
            Self::ContainsAny(sides) => {
                let [set, others] = &**sides;
                let (set, others) = (set.set(world)?, others.set(world)?);
                !set.all(|value| !others.contains(value))
            }
            Self::IsEmpty(set) => set.set(world)?.all(|_| false),
            Self::Like(text, pattern) => pattern.matches(text.text(world)?),
            Self::Is(entity, expected) => {
                let (entity_type, _) = entity.entity(world)?;
                entity_type == expected
            }
            Self::In(entity, target) => world.is_in(entity.entity(world)?, target),
            Self::HasTag(name) => world.facts.attribute(LABELS, name.text(world)?).is_some(),
        })
    }
}

impl Term {
    fn value<'a>(&'a self, world: &'a World<'_>) -> Result<Value<'a>, Fails> {
        let long = |result: Option<i64>| result.map(Value::Long).ok_or(Fails);
        match self {
            Self::Literal(literal) => Ok(literal.value()),
            Self::Attribute(attribute) => attribute.value(world).ok_or(Fails),
            Self::Condition(condition) => condition.holds(world).map(Value::Boolean),
            Self::If(parts) => {
                let (condition, [consequent, alternative]) = &**parts;
                match condition.holds(world)? {
                    true => consequent.value(world),
                    false => alternative.value(world),
                }
            }
            Self::Negative(term) => long(term.long(world)?.checked_neg()),
            Self::Add(sides) => {
                let [left, right] = Self::longs(sides, world)?;
                long(left.checked_add(right))
            }
            Self::Subtract(sides) => {
                let [left, right] = Self::longs(sides, world)?;
                long(left.checked_sub(right))
            }
            Self::Multiply(sides) => {
                let [left, right] = Self::longs(sides, world)?;
                long(left.checked_mul(right))
            }
            Self::GetTag(name) => match world.facts.attribute(LABELS, name.text(world)?) {
                Some(AttributeValue::String(text)) => Ok(Value::Text(text)),
                _ => Err(Fails),
            },
        }
    }

    // What most policies compare has no value made of it.

    fn long(&self, world: &World<'_>) -> Result<i64, Fails> {
        match self {
            Self::Literal(Literal::Long(number)) => Ok(*number),
            Self::Attribute(Attribute::OfPrincipal(place)) => match world.attribute(*place) {
                Some(AttributeValue::Long(number)) => Ok(*number),
                _ => Err(Fails),
            },
            _ => match self.value(world)? {
                Value::Long(number) => Ok(number),
                _ => Err(Fails),
            },
        }
    }

    fn longs(sides: &[Self; 2], world: &World<'_>) -> Result<[i64; 2], Fails> {
        let [left, right] = sides;
        Ok([left.long(world)?, right.long(world)?])
    }

    fn text<'a>(&'a self, world: &'a World<'_>) -> Result<&'a str, Fails> {
        match self {
            Self::Attribute(Attribute::Path) => Ok(world.request()?.path.as_str()),
            _ => match self.value(world)? {
                Value::Text(text) => Ok(text),
                _ => Err(Fails),
            },
        }
    }

    fn set<'a>(&'a self, world: &'a World<'_>) -> Result<Set<'a>, Fails> {
        match self.value(world)? {
            Value::Set(set) => Ok(set),
            _ => Err(Fails),
        }
    }

    /// By type and id.
    fn entity<'a>(&'a self, world: &'a World<'_>) -> Result<(&'a str, &'a str), Fails> {
        match self.value(world)? {
            Value::Entity(entity_type, id) => Ok((entity_type, id)),
            _ => Err(Fails),
        }
    }
}

/// What stands in a policy as it is.
#[derive(Debug)]
pub(super) enum Literal {
    Boolean(bool),
    Long(i64),
    Text(String),
    Entity(Entity),
    Set(Vec<Self>),
}

impl Literal {
    fn value(&self) -> Value<'_> {
        match self {
            Self::Boolean(value) => Value::Boolean(*value),
            Self::Long(value) => Value::Long(*value),
            Self::Text(value) => Value::Text(value),
            Self::Entity(entity) => Value::Entity(&entity.entity_type, &entity.id),
            Self::Set(values) => Value::Set(Set::Literals(values)),
        }
    }
}

#[derive(Debug)]
pub(super) struct Entity {
    pub(super) entity_type: String,
    pub(super) id: String,
}

impl Entity {
    fn uid(&self) -> (&str, &str) {
        (&self.entity_type, &self.id)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Value<'a> {
    Boolean(bool),
    Long(i64),
    Text(&'a str),
    /// By type and id.
    Entity(&'a str, &'a str),
    Set(Set<'a>),
}

#[derive(Debug, Clone, Copy)]
enum Set<'a> {
    Literals(&'a [Literal]),
    Listed(&'a [String]),
    Sorted(&'a BTreeSet<String>),
}

impl<'a> Set<'a> {
    fn all(self, mut holds: impl FnMut(Value<'a>) -> bool) -> bool {
        match self {
            Self::Literals(values) => values.iter().all(|value| holds(value.value())),
            Self::Listed(texts) => texts.iter().all(|text| holds(Value::Text(text))),
            Self::Sorted(texts) => texts.iter().all(|text| holds(Value::Text(text))),
        }
    }

    fn contains(self, wanted: Value<'_>) -> bool {
        match (self, wanted) {
            (Self::Sorted(texts), Value::Text(text)) => texts.contains(text),
            _ => !self.all(|value| value != wanted),
        }
    }

    fn contains_all(self, others: Set<'_>) -> bool {
        others.all(|value| self.contains(value))
    }
}

impl PartialEq for Set<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.contains_all(*other) && other.contains_all(*self)
    }
}

/// A variable or a chain of attributes that has a value which is no record.
#[derive(Debug)]
pub(super) enum Attribute {
    Principal,
    /// `principal.environment`
    Environment,
    /// `principal.GROUP.NAME`, by its place.
    OfPrincipal(usize),
    Action,
    Resource,
    ResourceName,
    ResourceEnvironment,
    Destination,
    DestinationName,
    DestinationEnvironment,
    Scopes,
    Audience,
    Evidence,
    Method,
    Path,
    Safe,
    Weekday,
    Hour,
    /// Declared by the schema, and not set by this version.
    Unset,
}

impl Attribute {
    /// `None` where it is not there.
    fn value<'a>(&'a self, world: &'a World<'_>) -> Option<Value<'a>> {
        let question = world.question;
        Some(match self {
            Self::Principal => Value::Entity(WORKLOAD.0, WORKLOAD.1),
            Self::Environment => Value::Text(&world.principal.environment),
            Self::OfPrincipal(place) => match world.attribute(*place)? {
                AttributeValue::Boolean(value) => Value::Boolean(*value),
                AttributeValue::Long(value) => Value::Long(*value),
                AttributeValue::String(value) => Value::Text(value),
                AttributeValue::StringSet(values) => Value::Set(Set::Sorted(values)),
            },
            Self::Action => Value::Entity("Action", question.action.as_str()),
            Self::Resource => {
                let (resource_type, name) = question.resource.identity();
                Value::Entity(resource_type.as_str(), name)
            }
            Self::ResourceName => Value::Text(question.resource.identity().1),
            Self::ResourceEnvironment => Value::Text(&world.resource.environment),
            Self::Destination => Value::Entity("Destination", &question.destination?.name),
            Self::DestinationName => {
                world.destination()?;
                Value::Text(&question.destination?.name)
            }
            Self::DestinationEnvironment => Value::Text(&world.destination()?.environment),
            Self::Scopes => Value::Set(Set::Listed(question.resource.asked().0)),
            Self::Audience => Value::Text(question.resource.asked().1.unwrap_or_default()),
            Self::Evidence => Value::Set(Set::Listed(&world.facts.evidence)),
            Self::Method => Value::Text(question.request?.method.as_str()),
            Self::Path => Value::Text(question.request?.path.as_str()),
            Self::Safe => Value::Boolean(question.request?.is_safe()),
            Self::Weekday => Value::Text(weekday_name(world.local().0)),
            Self::Hour => Value::Long(i64::from(world.local().1)),
            Self::Unset => return None,
        })
    }
}

/// What `has` asks: whether a record, or something of it, is there.
#[derive(Debug)]
pub(super) enum Presence {
    Always,
    Never,
    /// By the place of its first attribute.
    Group(usize),
    /// By its place.
    OfPrincipal(usize),
    Destination,
    Request,
}

impl Presence {
    fn holds(&self, world: &World<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Group(place) => world.has_group(*place),
            Self::OfPrincipal(place) => world.attribute(*place).is_some(),
            Self::Destination => world.question.destination.is_some(),
            Self::Request => world.question.request.is_some(),
        }
    }
}
