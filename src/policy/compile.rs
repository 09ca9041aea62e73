//! Makes trees of policies, as `compiled.rs` has them, of their JSON form
//! (<https://docs.cedarpolicy.com/policies/json-format.html>). [`Compiler`] lists what has one.

use serde_json::Value as Json;

use super::compiled::{Attribute, CompiledPolicy, Condition, Entity, Literal, Presence, Term};
use super::pattern::Pattern;
use super::principal::WORKLOAD;
use super::reads::{self, chain, names_of};
use super::schema::RESERVED_GROUPS;

impl CompiledPolicy {
    /// Reads a policy's JSON form; `None` where something in it has no tree. `attributes` are
    /// `PolicyEngine::attributes`, of the engine that will evaluate it.
    pub(super) fn of(policy: &Json, attributes: &[(String, String)]) -> Option<Self> {
        let compiler = Compiler { attributes };
        let mut conditions = compiler.scope(policy.get("principal")?)?;
        for condition in reads::conditions(policy) {
            let body = condition.get("body")?;
            match condition.get("kind")?.as_str()? {
                "when" => conditions.extend(compiler.operands("&&", body)?),
                "unless" => conditions.push(Condition::Not(Box::new(compiler.condition(body)?))),
                _ => return None,
            }
        }
        Some(Self(conditions))
    }
}

/// Makes trees; each part is `None` where something in it has none.
struct Compiler<'a> {
    /// Those of which the places are known.
    attributes: &'a [(String, String)],
}

impl Compiler<'_> {
    /// What the scope asks of the principal: `principal`, `principal is Workload`, `principal in PARENT`.
    fn scope(&self, principal: &Json) -> Option<Vec<Condition>> {
        let is_in = |within: &Json| {
            let parent = entity(within.get("entity")?)?;
            Some(Condition::In(Term::Attribute(Attribute::Principal), parent))
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

    /// What stands between an operator, `&&` or `||`, in an expression.
    fn operands(&self, operator: &str, json: &Json) -> Option<Vec<Condition>> {
        let Some(operands) = json.get(operator) else {
            return Some(vec![self.condition(json)?]);
        };
        let mut conditions = self.operands(operator, operands.get("left")?)?;
        conditions.extend(self.operands(operator, operands.get("right")?)?);
        Some(conditions)
    }

    fn condition(&self, json: &Json) -> Option<Condition> {
        if let Some((variable, names)) = chain(json) {
            let attribute = self.attribute(&variable, &names)?;
            return Some(Condition::Term(Term::Attribute(attribute)));
        }
        let (operator, operands) = json.as_object()?.iter().next()?;
        let term = |name: &str| self.term(operands.get(name)?);
        let sides = || Some(Box::new([term("left")?, term("right")?]));
        let not = |condition| Condition::Not(Box::new(condition));
        let is_in = |target: &Json| {
            let target = entity(target.pointer("/Value/__entity")?)?;
            Some(Condition::In(term("left")?, target))
        };
        Some(match operator.as_str() {
            "&&" => Condition::All(self.operands(operator, json)?),
            "||" => Condition::Any(self.operands(operator, json)?),
            "!" => not(self.condition(operands.get("arg")?)?),
            "if-then-else" => Condition::If(Box::new([
                self.condition(operands.get("if")?)?,
                self.condition(operands.get("then")?)?,
                self.condition(operands.get("else")?)?,
            ])),
            "==" => Condition::Equal(sides()?),
            "!=" => not(Condition::Equal(sides()?)),
            "<" => Condition::Less(sides()?),
            "<=" => Condition::LessOrEqual(sides()?),
            ">" => not(Condition::LessOrEqual(sides()?)),
            ">=" => not(Condition::Less(sides()?)),
            "contains" => Condition::Contains(sides()?),
            "containsAll" => Condition::ContainsAll(sides()?),
            "containsAny" => Condition::ContainsAny(sides()?),
            "isEmpty" => Condition::IsEmpty(term("arg")?),
            "like" => Condition::Like(term("left")?, Pattern::of_json(operands.get("pattern")?)?),
            "has" => {
                let (variable, mut names) = chain(operands.get("left")?)?;
                let base = self.presence(&variable, &names)?;
                names.extend(names_of(operands.get("attr"))?);
                let asked = self.presence(&variable, &names)?;
                Condition::Has { base, asked }
            }
            "is" => {
                let expected = operands.get("entity_type")?.as_str()?.to_owned();
                let is = Condition::Is(term("left")?, expected);
                match operands.get("in") {
                    Some(target) => Condition::All(vec![is, is_in(target)?]),
                    None => is,
                }
            }
            "in" => is_in(operands.get("right")?)?,
            "hasTag" => Condition::HasTag(self.tag(operands)?),
            "Value" => Condition::Term(Term::Literal(literal(json)?)),
            _ => return None,
        })
    }

    fn term(&self, json: &Json) -> Option<Term> {
        if let Some((variable, names)) = chain(json) {
            return self.attribute(&variable, &names).map(Term::Attribute);
        }
        let (operator, operands) = json.as_object()?.iter().next()?;
        let term = |name: &str| self.term(operands.get(name)?);
        let sides = || Some(Box::new([term("left")?, term("right")?]));
        Some(match operator.as_str() {
            "Value" | "Set" => Term::Literal(literal(json)?),
            "if-then-else" => Term::If(Box::new((
                self.condition(operands.get("if")?)?,
                [term("then")?, term("else")?],
            ))),
            "neg" => Term::Negative(Box::new(term("arg")?)),
            "+" => Term::Add(sides()?),
            "-" => Term::Subtract(sides()?),
            "*" => Term::Multiply(sides()?),
            "getTag" => Term::GetTag(Box::new(self.tag(operands)?)),
            _ => Term::Condition(Box::new(self.condition(json)?)),
        })
    }

    /// The name that `hasTag` or `getTag` asks the principal for.
    fn tag(&self, operands: &Json) -> Option<Term> {
        let (variable, names) = chain(operands.get("left")?)?;
        match (variable.as_str(), names.as_slice()) {
            ("principal", []) => self.term(operands.get("right")?),
            _ => None,
        }
    }

    fn attribute(&self, variable: &str, names: &[String]) -> Option<Attribute> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Some(match (variable, names.as_slice()) {
            ("principal", []) => Attribute::Principal,
            ("principal", ["environment"]) => Attribute::Environment,
            ("principal", [group, name]) => Attribute::OfPrincipal(self.place(group, name)?),
            ("action", []) => Attribute::Action,
            ("resource", []) => Attribute::Resource,
            ("resource", ["name"]) => Attribute::ResourceName,
            ("resource", ["environment"]) => Attribute::ResourceEnvironment,
            ("context", ["destination"]) => Attribute::Destination,
            ("context", ["destination", "name"]) => Attribute::DestinationName,
            ("context", ["destination", "environment"]) => Attribute::DestinationEnvironment,
            ("context", ["scopes"]) => Attribute::Scopes,
            ("context", ["audience"]) => Attribute::Audience,
            ("context", ["evidence"]) => Attribute::Evidence,
            ("context", ["request", "method"]) => Attribute::Method,
            ("context", ["request", "path"]) => Attribute::Path,
            ("context", ["request", "safe"]) => Attribute::Safe,
            ("context", ["local", "weekday"]) => Attribute::Weekday,
            ("context", ["local", "hour"]) => Attribute::Hour,
            ("context", ["node" | "posture" | "break_glass", _]) => Attribute::Unset,
            _ => return None,
        })
    }

    fn presence(&self, variable: &str, names: &[String]) -> Option<Presence> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Some(match (variable, names.as_slice()) {
            ("principal" | "resource" | "context", [])
            | ("principal", ["environment"])
            | ("resource", ["name" | "environment"])
            | ("context", ["scopes" | "audience" | "evidence" | "local"]) => Presence::Always,
            ("principal", [group]) => Presence::Group(self.first_place(group)?),
            ("principal", [group, name]) => Presence::OfPrincipal(self.place(group, name)?),
            ("context", ["destination"]) => Presence::Destination,
            ("context", ["request"]) | ("context", ["request", "method" | "path" | "safe"]) => {
                Presence::Request
            }
            ("context", ["node" | "posture" | "break_glass"]) => Presence::Never,
            _ => return None,
        })
    }

    /// The place of an attribute.
    fn place(&self, group: &str, name: &str) -> Option<usize> {
        if RESERVED_GROUPS.contains(&group) {
            return None;
        }
        let by_name = |(known, other): &(String, String)| (&**known, &**other).cmp(&(group, name));
        self.attributes.binary_search_by(by_name).ok()
    }

    /// The place of the first attribute of a group.
    fn first_place(&self, group: &str) -> Option<usize> {
        if RESERVED_GROUPS.contains(&group) {
            return None;
        }
        let place = self
            .attributes
            .partition_point(|(known, _)| **known < *group);
        let (known, _) = self.attributes.get(place)?;
        (*known == group).then_some(place)
    }
}

fn literal(json: &Json) -> Option<Literal> {
    if let Some(elements) = json.get("Set") {
        let elements = elements.as_array()?.iter().map(literal);
        return elements.collect::<Option<_>>().map(Literal::Set);
    }
    match json.get("Value")? {
        Json::Bool(value) => Some(Literal::Boolean(*value)),
        Json::Number(value) => value.as_i64().map(Literal::Long),
        Json::String(value) => Some(Literal::Text(value.clone())),
        value => entity(value.get("__entity")?).map(Literal::Entity),
    }
}

/// Reads `{"type": ..., "id": ...}`.
fn entity(json: &Json) -> Option<Entity> {
    Some(Entity {
        entity_type: json.get("type")?.as_str()?.to_owned(),
        id: json.get("id")?.as_str()?.to_owned(),
    })
}
