//! Policies as trees that are evaluated in place, without the entities and the context that Cedar evaluates
//! them on. What a tree says, Cedar says of the same policy; what has no tree, and whatever fails, is left
//! to Cedar. `src/policy/tests/compiled.rs` compares the two.
//!
//! A tree is made of a policy's JSON form (<https://docs.cedarpolicy.com/policies/json-format.html>) when it
//! is loaded. [`Expression::of`] lists what has one, [`Expression::evaluate`] what it means.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use countersign_attestors::{AttributeValue, WorkloadFacts};
use serde_json::Value as Json;

use super::engine::{LoadedResource, PolicyEngine, weekday_name};
use super::pattern::Pattern;
use super::principal::{LABELS, Principal, WORKLOAD};
use super::question::Question;
use super::reads::{chain, conditions, names_of};
use super::schema::RESERVED_GROUPS;

/// A policy's condition on the principal and its `when` and `unless`.
#[derive(Debug)]
pub(super) struct CompiledPolicy(Vec<Expression>);

/// The policy could not be evaluated; Cedar says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fails;

impl CompiledPolicy {
    /// Reads a policy's JSON form; `None` where something in it has no tree.
    pub(super) fn of(policy: &Json) -> Option<Self> {
        let mut conjuncts = scope(policy.get("principal")?)?;
        for condition in conditions(policy) {
            let body = Expression::of(condition.get("body")?)?;
            conjuncts.push(match condition.get("kind")?.as_str()? {
                "when" => body,
                "unless" => Expression::Not(Box::new(body)),
                _ => return None,
            });
        }
        Some(Self(conjuncts))
    }

    /// Whether the policy is satisfied, where its scope covers the action and the resource.
    pub(super) fn is_satisfied(&self, world: &World<'_>) -> Result<bool, Fails> {
        for conjunct in &self.0 {
            if !conjunct.holds(world)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What the scope asks of the principal: `principal`, `principal is Workload`, `principal in PARENT`.
fn scope(principal: &Json) -> Option<Vec<Expression>> {
    let is_in = |within: &Json| {
        Some(Expression::In(
            Box::new(Expression::Attribute(Attribute::Principal)),
            Entity::of(within.get("entity")?)?,
        ))
    };
    match principal.get("op")?.as_str()? {
        "All" => Some(Vec::new()),
        "in" => Some(vec![is_in(principal)?]),
        "is" if principal.get("entity_type")?.as_str()? == WORKLOAD.0 => {
            match principal.get("in") {
                Some(within) => Some(vec![is_in(within)?]),
                None => Some(Vec::new()),
            }
        }
        _ => None,
    }
}

/// What a tree reads: the same that Cedar is given as entities and context.
pub(super) struct World<'a> {
    engine: &'a PolicyEngine,
    facts: &'a WorkloadFacts,
    principal: &'a Principal,
    question: &'a Question<'a>,
    resource: &'a LoadedResource,
    /// Weekday and hour on the node's clock, once they are asked for.
    local: OnceCell<(i8, i8)>,
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
            local: OnceCell::new(),
        }
    }

    /// The configuration's own reading of `context.destination`.
    fn destination(&self) -> Option<&LoadedResource> {
        self.engine
            .destinations
            .get(&*self.question.destination?.name)
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

#[derive(Debug)]
enum Expression {
    Literal(Literal),
    Attribute(Attribute),
    /// `BASE has ASKED`: fails where there is no `base`.
    Has {
        base: Presence,
        asked: Presence,
    },
    And(Box<Self>, Box<Self>),
    Or(Box<Self>, Box<Self>),
    Not(Box<Self>),
    If(Box<[Self; 3]>),
    Negative(Box<Self>),
    IsEmpty(Box<Self>),
    Binary(Operator, Box<[Self; 2]>),
    Like(Box<Self>, Pattern),
    Is(Box<Self>, String),
    In(Box<Self>, Entity),
    /// `principal.hasTag(...)`
    HasTag(Box<Self>),
    /// `principal.getTag(...)`
    GetTag(Box<Self>),
}

/// Both sides are evaluated, the left one first.
#[derive(Debug, Clone, Copy)]
enum Operator {
    Equal,
    Less,
    LessOrEqual,
    Add,
    Subtract,
    Multiply,
    Contains,
    ContainsAll,
    ContainsAny,
}

impl Expression {
    /// Reads an expression's JSON form; `None` where something in it has no tree.
    fn of(json: &Json) -> Option<Self> {
        if let Some((variable, names)) = chain(json) {
            return Attribute::of(&variable, &names).map(Self::Attribute);
        }
        let (operator, operands) = json.as_object()?.iter().next()?;
        let operand = |name: &str| Self::of(operands.get(name)?);
        let boxed = |name: &str| operand(name).map(Box::new);
        let not = |expression| Self::Not(Box::new(expression));
        let binary = |operator| {
            let sides = Box::new([operand("left")?, operand("right")?]);
            Some(Self::Binary(operator, sides))
        };
        let is_in = |target: &Json| {
            let target = Entity::of(target.pointer("/Value/__entity")?)?;
            Some(Self::In(boxed("left")?, target))
        };
        let of_principal =
            || Some(chain(operands.get("left")?)? == ("principal".to_owned(), vec![]));
        Some(match operator.as_str() {
            "Value" | "Set" => Self::Literal(Literal::of(json)?),
            "&&" => Self::And(boxed("left")?, boxed("right")?),
            "||" => Self::Or(boxed("left")?, boxed("right")?),
            "!" => Self::Not(boxed("arg")?),
            "neg" => Self::Negative(boxed("arg")?),
            "isEmpty" => Self::IsEmpty(boxed("arg")?),
            "if-then-else" => Self::If(Box::new([
                operand("if")?,
                operand("then")?,
                operand("else")?,
            ])),
            "==" => binary(Operator::Equal)?,
            "!=" => not(binary(Operator::Equal)?),
            "<" => binary(Operator::Less)?,
            "<=" => binary(Operator::LessOrEqual)?,
            ">" => not(binary(Operator::LessOrEqual)?),
            ">=" => not(binary(Operator::Less)?),
            "+" => binary(Operator::Add)?,
            "-" => binary(Operator::Subtract)?,
            "*" => binary(Operator::Multiply)?,
            "contains" => binary(Operator::Contains)?,
            "containsAll" => binary(Operator::ContainsAll)?,
            "containsAny" => binary(Operator::ContainsAny)?,
            "like" => Self::Like(boxed("left")?, Pattern::of_json(operands.get("pattern")?)?),
            "has" => {
                let (variable, mut names) = chain(operands.get("left")?)?;
                let base = Presence::of(&variable, &names)?;
                names.extend(names_of(operands.get("attr"))?);
                Self::Has {
                    base,
                    asked: Presence::of(&variable, &names)?,
                }
            }
            "is" => {
                let expected = operands.get("entity_type")?.as_str()?.to_owned();
                let is = Self::Is(boxed("left")?, expected);
                match operands.get("in") {
                    Some(target) => Self::And(Box::new(is), Box::new(is_in(target)?)),
                    None => is,
                }
            }
            "in" => is_in(operands.get("right")?)?,
            "hasTag" if of_principal()? => Self::HasTag(boxed("right")?),
            "getTag" if of_principal()? => Self::GetTag(boxed("right")?),
            _ => return None,
        })
    }

    fn evaluate<'a>(&'a self, world: &'a World<'_>) -> Result<Value<'a>, Fails> {
        Ok(match self {
            Self::Literal(literal) => literal.value(),
            Self::Attribute(attribute) => attribute.value(world).ok_or(Fails)?,
            Self::Has { base, asked } => match base.holds(world) {
                true => Value::Boolean(asked.holds(world)),
                false => return Err(Fails),
            },
            Self::And(left, right) => Value::Boolean(left.holds(world)? && right.holds(world)?),
            Self::Or(left, right) => Value::Boolean(left.holds(world)? || right.holds(world)?),
            Self::Not(expression) => Value::Boolean(!expression.holds(world)?),
            Self::If(parts) => {
                let [condition, consequent, alternative] = &**parts;
                return match condition.holds(world)? {
                    true => consequent.evaluate(world),
                    false => alternative.evaluate(world),
                };
            }
            Self::Negative(expression) => match expression.evaluate(world)? {
                Value::Long(number) => Value::Long(number.checked_neg().ok_or(Fails)?),
                _ => return Err(Fails),
            },
            Self::IsEmpty(expression) => match expression.evaluate(world)? {
                Value::Set(set) => Value::Boolean(set.all(|_| false)),
                _ => return Err(Fails),
            },
            Self::Binary(operator, sides) => {
                let [left, right] = &**sides;
                operator.apply(left.evaluate(world)?, right.evaluate(world)?)?
            }
            Self::Like(expression, pattern) => {
                Value::Boolean(pattern.matches(expression.text(world)?))
            }
            Self::Is(expression, expected) => match expression.evaluate(world)? {
                Value::Entity(entity_type, _) => Value::Boolean(entity_type == expected),
                _ => return Err(Fails),
            },
            Self::In(expression, target) => match expression.evaluate(world)? {
                Value::Entity(entity_type, id) => {
                    Value::Boolean(world.is_in((entity_type, id), target))
                }
                _ => return Err(Fails),
            },
            Self::HasTag(name) => {
                Value::Boolean(world.facts.attribute(LABELS, name.text(world)?).is_some())
            }
            Self::GetTag(name) => match world.facts.attribute(LABELS, name.text(world)?) {
                Some(AttributeValue::String(text)) => Value::Text(text),
                _ => return Err(Fails),
            },
        })
    }

    fn holds(&self, world: &World<'_>) -> Result<bool, Fails> {
        match self.evaluate(world)? {
            Value::Boolean(holds) => Ok(holds),
            _ => Err(Fails),
        }
    }

    fn text<'a>(&'a self, world: &'a World<'_>) -> Result<&'a str, Fails> {
        match self.evaluate(world)? {
            Value::Text(text) => Ok(text),
            _ => Err(Fails),
        }
    }
}

impl Operator {
    fn apply<'a>(self, left: Value<'a>, right: Value<'a>) -> Result<Value<'a>, Fails> {
        let long = |result: Option<i64>| result.map(Value::Long).ok_or(Fails);
        match (self, left, right) {
            (Self::Equal, left, right) => Ok(Value::Boolean(left == right)),
            (Self::Less, Value::Long(left), Value::Long(right)) => Ok(Value::Boolean(left < right)),
            (Self::LessOrEqual, Value::Long(left), Value::Long(right)) => {
                Ok(Value::Boolean(left <= right))
            }
            (Self::Add, Value::Long(left), Value::Long(right)) => long(left.checked_add(right)),
            (Self::Subtract, Value::Long(left), Value::Long(right)) => {
                long(left.checked_sub(right))
            }
            (Self::Multiply, Value::Long(left), Value::Long(right)) => {
                long(left.checked_mul(right))
            }
            (Self::Contains, Value::Set(set), value) => Ok(Value::Boolean(set.contains(value))),
            (Self::ContainsAll, Value::Set(set), Value::Set(others)) => {
                Ok(Value::Boolean(set.contains_all(others)))
            }
            (Self::ContainsAny, Value::Set(set), Value::Set(others)) => {
                Ok(Value::Boolean(!set.all(|value| !others.contains(value))))
            }
            _ => Err(Fails),
        }
    }
}

/// What stands in a policy as it is.
#[derive(Debug)]
enum Literal {
    Boolean(bool),
    Long(i64),
    Text(String),
    Entity(Entity),
    Set(Vec<Self>),
}

impl Literal {
    fn of(json: &Json) -> Option<Self> {
        if let Some(elements) = json.get("Set") {
            let elements = elements.as_array()?.iter().map(Self::of);
            return elements.collect::<Option<_>>().map(Self::Set);
        }
        match json.get("Value")? {
            Json::Bool(value) => Some(Self::Boolean(*value)),
            Json::Number(value) => value.as_i64().map(Self::Long),
            Json::String(value) => Some(Self::Text(value.clone())),
            value => Entity::of(value.get("__entity")?).map(Self::Entity),
        }
    }

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
struct Entity {
    entity_type: String,
    id: String,
}

impl Entity {
    /// Reads `{"type": ..., "id": ...}`.
    fn of(json: &Json) -> Option<Self> {
        Some(Self {
            entity_type: json.get("type")?.as_str()?.to_owned(),
            id: json.get("id")?.as_str()?.to_owned(),
        })
    }

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
enum Attribute {
    Principal,
    /// `principal.environment`
    Environment,
    /// `principal.GROUP.NAME`
    OfPrincipal {
        group: String,
        name: String,
    },
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
    fn of(variable: &str, names: &[String]) -> Option<Self> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Some(match (variable, names.as_slice()) {
            ("principal", []) => Self::Principal,
            ("principal", ["environment"]) => Self::Environment,
            ("principal", [group, name]) if !RESERVED_GROUPS.contains(group) => Self::OfPrincipal {
                group: (*group).to_owned(),
                name: (*name).to_owned(),
            },
            ("action", []) => Self::Action,
            ("resource", []) => Self::Resource,
            ("resource", ["name"]) => Self::ResourceName,
            ("resource", ["environment"]) => Self::ResourceEnvironment,
            ("context", ["destination"]) => Self::Destination,
            ("context", ["destination", "name"]) => Self::DestinationName,
            ("context", ["destination", "environment"]) => Self::DestinationEnvironment,
            ("context", ["scopes"]) => Self::Scopes,
            ("context", ["audience"]) => Self::Audience,
            ("context", ["evidence"]) => Self::Evidence,
            ("context", ["request", "method"]) => Self::Method,
            ("context", ["request", "path"]) => Self::Path,
            ("context", ["request", "safe"]) => Self::Safe,
            ("context", ["local", "weekday"]) => Self::Weekday,
            ("context", ["local", "hour"]) => Self::Hour,
            ("context", ["node" | "posture" | "break_glass", _]) => Self::Unset,
            _ => return None,
        })
    }

    /// `None` where it is not there.
    fn value<'a>(&'a self, world: &'a World<'_>) -> Option<Value<'a>> {
        let question = world.question;
        Some(match self {
            Self::Principal => Value::Entity(WORKLOAD.0, WORKLOAD.1),
            Self::Environment => Value::Text(&world.principal.environment),
            Self::OfPrincipal { group, name } => match world.facts.attribute(group, name)? {
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
enum Presence {
    Always,
    Never,
    Group(String),
    OfPrincipal { group: String, name: String },
    Destination,
    Request,
}

impl Presence {
    fn of(variable: &str, names: &[String]) -> Option<Self> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Some(match (variable, names.as_slice()) {
            ("principal" | "resource" | "context", [])
            | ("principal", ["environment"])
            | ("resource", ["name" | "environment"])
            | ("context", ["scopes" | "audience" | "evidence" | "local"]) => Self::Always,
            ("principal", [group]) if !RESERVED_GROUPS.contains(group) => {
                Self::Group((*group).to_owned())
            }
            ("principal", [group, name]) if !RESERVED_GROUPS.contains(group) => Self::OfPrincipal {
                group: (*group).to_owned(),
                name: (*name).to_owned(),
            },
            ("context", ["destination"]) => Self::Destination,
            ("context", ["request"]) | ("context", ["request", "method" | "path" | "safe"]) => {
                Self::Request
            }
            ("context", ["node" | "posture" | "break_glass"]) => Self::Never,
            _ => return None,
        })
    }

    fn holds(&self, world: &World<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Group(group) => world.facts.groups.contains_key(group),
            Self::OfPrincipal { group, name } => world.facts.attribute(group, name).is_some(),
            Self::Destination => world.question.destination.is_some(),
            Self::Request => world.question.request.is_some(),
        }
    }
}
