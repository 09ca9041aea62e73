//! What a policy reads, found in its JSON form. Where an expression is not understood, it counts as
//! reading everything: reading too much costs a cache entry, too little would be a wrong decision.

use std::collections::BTreeSet;

use serde_json::Value;

use super::pattern::Pattern;

/// The attributes that an expression, a policy or a slice reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reads {
    /// `(group, attribute)` of `principal.GROUP.ATTRIBUTE`.
    pub(super) attributes: BTreeSet<(String, String)>,
    /// Groups of which it asks only whether they are there.
    pub(super) groups: BTreeSet<String>,
    /// Groups that it reads as a whole.
    pub(super) whole_groups: BTreeSet<String>,
    /// Every group, as a whole: `principal` itself as a value.
    pub(super) principal: bool,
    /// `principal.environment`.
    pub(super) environment: bool,
    /// `principal.getTag`, `principal.hasTag`.
    pub(super) labels: bool,
    /// `principal in ...`.
    pub(super) parents: bool,
    /// `context.scopes`.
    pub(super) scopes: bool,
    /// `context.audience`.
    pub(super) audience: bool,
    /// `context.evidence`.
    pub(super) evidence: bool,
    /// `context.destination`.
    pub(super) destination: bool,
    /// Whether there is a `context.request`, or something of it.
    pub(super) request: bool,
    /// `context.request.method`.
    pub(super) method: bool,
    /// `context.request.path`.
    pub(super) path: PathRead,
    /// `context.request.safe`.
    pub(super) safe: bool,
    /// `context.time`.
    pub(super) time: bool,
    /// `context.local`.
    pub(super) local: bool,
}

/// How the path of a request is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum PathRead {
    /// Not at all.
    #[default]
    Unread,
    /// It is compared with these, in order, and with nothing else: two paths with the same outcomes are
    /// the same to the policies.
    Matched(Vec<Pattern>),
    /// In ways that are not understood.
    Whole,
}

impl PathRead {
    /// Whether it is read.
    pub(super) fn is_read(&self) -> bool {
        !matches!(self, Self::Unread)
    }

    fn add(&mut self, other: &Self) {
        match (&mut *self, other) {
            (_, Self::Unread) | (Self::Whole, _) => {}
            (Self::Matched(patterns), Self::Matched(others)) => {
                patterns.extend(others.iter().cloned());
                patterns.sort();
                patterns.dedup();
            }
            _ => *self = other.clone(),
        }
    }
}

impl Reads {
    /// What the conditions and the principal's scope of a policy's JSON form read.
    pub(super) fn of_policy(policy: &Value) -> Self {
        let mut reads = Self::default();
        let scope = policy.get("principal");
        if scope.is_some_and(|scope| scope.get("entity").is_some() || scope.get("in").is_some()) {
            reads.parents = true;
        }
        for condition in conditions(policy) {
            if let Some(body) = condition.get("body") {
                reads.visit(body);
            }
        }
        reads
    }

    /// Adds what another reads.
    pub(super) fn add(&mut self, other: &Self) {
        self.attributes.extend(other.attributes.iter().cloned());
        self.groups.extend(other.groups.iter().cloned());
        self.whole_groups.extend(other.whole_groups.iter().cloned());
        self.principal |= other.principal;
        self.environment |= other.environment;
        self.labels |= other.labels;
        self.parents |= other.parents;
        self.scopes |= other.scopes;
        self.audience |= other.audience;
        self.evidence |= other.evidence;
        self.destination |= other.destination;
        self.request |= other.request;
        self.method |= other.method;
        self.path.add(&other.path);
        self.safe |= other.safe;
        self.time |= other.time;
        self.local |= other.local;
    }

    /// Whether it reads anything about who the workload is.
    pub(super) fn reads_principal(&self) -> bool {
        !self.attributes.is_empty()
            || !self.groups.is_empty()
            || !self.whole_groups.is_empty()
            || self.principal
            || self.environment
            || self.labels
            || self.parents
    }

    /// Whether it reads a group, wholly or in part.
    pub(super) fn reads_group(&self, group: &str) -> bool {
        self.principal
            || self.groups.contains(group)
            || self.whole_groups.contains(group)
            || self.attributes.iter().any(|(known, _)| known == group)
    }

    fn visit(&mut self, expression: &Value) {
        for chain in paths(expression) {
            self.record(&chain);
        }
    }

    fn record(&mut self, chain: &Chain) {
        let names: Vec<&str> = chain.names.iter().map(String::as_str).collect();
        match (chain.variable.as_str(), names.as_slice()) {
            ("principal", []) => match chain.usage {
                Usage::Tags => self.labels = true,
                Usage::In => self.parents = true,
                Usage::Matched(_) | Usage::Value => {
                    self.principal = true;
                    self.environment = true;
                    self.labels = true;
                    self.parents = true;
                }
            },
            ("principal", ["environment", ..]) => self.environment = true,
            ("principal", [group]) => {
                let groups = match chain.existence {
                    true => &mut self.groups,
                    false => &mut self.whole_groups,
                };
                groups.insert((*group).to_owned());
            }
            ("principal", [group, name, ..]) => {
                self.attributes
                    .insert(((*group).to_owned(), (*name).to_owned()));
            }
            ("context", []) => *self = self.with_the_whole_context(),
            ("context", ["request", part @ ..]) => {
                self.request = true;
                match part {
                    [] if chain.existence => {}
                    ["method", ..] => self.method = true,
                    ["path"] if let Usage::Matched(pattern) = &chain.usage => {
                        self.path.add(&PathRead::Matched(vec![pattern.clone()]));
                    }
                    ["path", ..] => self.path = PathRead::Whole,
                    ["safe", ..] => self.safe = true,
                    _ => {
                        self.method = true;
                        self.path = PathRead::Whole;
                        self.safe = true;
                    }
                }
            }
            ("context", ["scopes", ..]) => self.scopes = true,
            ("context", ["audience", ..]) => self.audience = true,
            ("context", ["evidence", ..]) => self.evidence = true,
            ("context", ["destination", ..]) => self.destination = true,
            ("context", ["time", ..]) => self.time = true,
            ("context", ["local", ..]) => self.local = true,
            _ => {}
        }
    }

    /// With everything of the context.
    pub(super) fn with_the_whole_context(&self) -> Self {
        Self {
            scopes: true,
            audience: true,
            evidence: true,
            destination: true,
            request: true,
            method: true,
            path: PathRead::Whole,
            safe: true,
            time: true,
            local: true,
            attributes: self.attributes.clone(),
            groups: self.groups.clone(),
            whole_groups: self.whole_groups.clone(),
            ..*self
        }
    }
}

/// The conditions of a policy's JSON form.
pub(super) fn conditions(policy: &Value) -> impl Iterator<Item = &Value> {
    policy
        .get("conditions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// What is done with what is read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Usage {
    Value,
    In,
    Tags,
    /// It is compared with this text.
    Matched(Pattern),
}

/// One longest chain of attributes from a variable: `principal.unix.uid`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Chain {
    pub(super) variable: String,
    pub(super) names: Vec<String>,
    /// Only asked whether it is there.
    pub(super) existence: bool,
    pub(super) usage: Usage,
}

impl Chain {
    /// `principal.NAME.NAME`.
    pub(super) fn of_principal(names: &[&str]) -> Self {
        Self {
            variable: "principal".to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            existence: false,
            usage: Usage::Value,
        }
    }

    /// As written in a policy.
    pub(super) fn text(&self) -> String {
        let mut text = self.variable.clone();
        for name in &self.names {
            match super::schema::is_identifier(name) {
                true => {
                    text.push('.');
                    text.push_str(name);
                }
                false => {
                    text.push('[');
                    text.push_str(&super::schema::quoted(name));
                    text.push(']');
                }
            }
        }
        text
    }
}

/// Every longest chain of attributes in an expression, in the order of the text.
pub(super) fn paths(expression: &Value) -> Vec<Chain> {
    let mut found = Vec::new();
    collect(expression, &Usage::Value, &mut found);
    found
}

fn collect(expression: &Value, usage: &Usage, found: &mut Vec<Chain>) {
    if let Some((variable, names)) = chain(expression) {
        found.push(Chain {
            variable,
            names,
            existence: false,
            usage: usage.clone(),
        });
        return;
    }
    let Some(object) = expression.as_object() else {
        if let Some(items) = expression.as_array() {
            for item in items {
                collect(item, &Usage::Value, found);
            }
        }
        return;
    };
    for (operator, operands) in object {
        match operator.as_str() {
            "Value" => {}
            "has" => {
                let left = operands.get("left").and_then(chain);
                let attributes = names_of(operands.get("attr"));
                match (left, attributes) {
                    (Some((variable, mut names)), Some(more)) => {
                        names.extend(more);
                        found.push(Chain {
                            variable,
                            names,
                            existence: true,
                            usage: usage.clone(),
                        });
                    }
                    _ => {
                        if let Some(left) = operands.get("left") {
                            collect(left, &Usage::Value, found);
                        }
                    }
                }
            }
            "hasTag" | "getTag" | "in" | "is" => {
                let usage = match operator.as_str() {
                    "in" => Usage::In,
                    "is" if operands.get("in").is_some() => Usage::In,
                    // The type of a variable is known without reading it.
                    "is" if operands.pointer("/left/Var").is_some() => continue,
                    "is" => Usage::Value,
                    _ => Usage::Tags,
                };
                for (name, operand) in operands.as_object().into_iter().flatten() {
                    match name.as_str() {
                        "left" => collect(operand, &usage, found),
                        _ => collect(operand, &Usage::Value, found),
                    }
                }
            }
            "like" | "==" if let Some((left, pattern)) = comparison(operands) => {
                collect(left, &Usage::Matched(pattern), found);
            }
            _ => match operands {
                Value::Object(named) => {
                    for operand in named.values() {
                        collect(operand, &Usage::Value, found);
                    }
                }
                other => collect(other, &Usage::Value, found),
            },
        }
    }
}

/// What a chain is compared with, where that is a text.
fn comparison(operands: &Value) -> Option<(&Value, Pattern)> {
    let left = operands.get("left").filter(|left| chain(left).is_some())?;
    let pattern = match operands.get("pattern") {
        Some(elements) => Pattern::of_json(elements)?,
        None => Pattern::exactly(operands.pointer("/right/Value")?.as_str()?),
    };
    Some((left, pattern))
}

/// The names that `has` asks for.
pub(super) fn names_of(attribute: Option<&Value>) -> Option<Vec<String>> {
    match attribute? {
        Value::String(name) => Some(vec![name.clone()]),
        Value::Array(names) => names
            .iter()
            .map(|name| name.as_str().map(str::to_owned))
            .collect(),
        _ => None,
    }
}

/// `principal.unix.uid` as `(principal, [unix, uid])`; `None` for anything else.
pub(super) fn chain(expression: &Value) -> Option<(String, Vec<String>)> {
    let object = expression.as_object()?;
    if let Some(variable) = object.get("Var") {
        return Some((variable.as_str()?.to_owned(), Vec::new()));
    }
    let access = object.get(".")?;
    let (variable, mut names) = chain(access.get("left")?)?;
    names.push(access.get("attr")?.as_str()?.to_owned());
    Some((variable, names))
}
