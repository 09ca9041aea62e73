//! What a policy reads, found in its JSON form. Where an expression is not understood, it counts as
//! reading everything: reading too much costs a cache entry, too little would be a wrong decision.

use std::collections::BTreeSet;

use serde_json::Value;

/// The attributes that an expression, a policy or a slice reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reads {
    /// `(group, attribute)` of `principal.GROUP.ATTRIBUTE`.
    pub(super) attributes: BTreeSet<(String, String)>,
    /// Groups of which it asks only whether they are there, or that it reads as a whole.
    pub(super) groups: BTreeSet<String>,
    /// `principal.environment`.
    pub(super) environment: bool,
    /// `principal.getTag`, `principal.hasTag`.
    pub(super) labels: bool,
    /// `principal in ...`.
    pub(super) parents: bool,
    /// `context.request.method`.
    pub(super) method: bool,
    /// `context.request.path`.
    pub(super) path: bool,
    /// `context.request.safe`.
    pub(super) safe: bool,
    /// `context.time`.
    pub(super) time: bool,
    /// `context.local`.
    pub(super) local: bool,
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
        self.environment |= other.environment;
        self.labels |= other.labels;
        self.parents |= other.parents;
        self.method |= other.method;
        self.path |= other.path;
        self.safe |= other.safe;
        self.time |= other.time;
        self.local |= other.local;
    }

    /// Whether it reads anything about who the workload is.
    pub(super) fn reads_principal(&self) -> bool {
        !self.attributes.is_empty()
            || !self.groups.is_empty()
            || self.environment
            || self.labels
            || self.parents
    }

    /// Whether it reads a group, wholly or in part.
    pub(super) fn reads_group(&self, group: &str) -> bool {
        self.groups.contains(group) || self.attributes.iter().any(|(known, _)| known == group)
    }

    fn visit(&mut self, expression: &Value) {
        for path in paths(expression) {
            self.record(&path);
        }
    }

    fn record(&mut self, path: &PathRead) {
        let names: Vec<&str> = path.names.iter().map(String::as_str).collect();
        match (path.variable.as_str(), names.as_slice()) {
            ("principal", []) => match path.usage {
                Usage::Tags => self.labels = true,
                Usage::In | Usage::Value => self.parents = true,
            },
            ("principal", ["environment", ..]) => self.environment = true,
            ("principal", [group]) => {
                self.groups.insert((*group).to_owned());
            }
            ("principal", [group, name, ..]) => {
                self.attributes
                    .insert(((*group).to_owned(), (*name).to_owned()));
            }
            ("context", ["request"]) if path.existence => {}
            ("context", []) | ("context", ["request"]) => {
                self.method = true;
                self.path = true;
                self.safe = true;
                if names.is_empty() {
                    self.time = true;
                    self.local = true;
                }
            }
            ("context", ["request", "method", ..]) => self.method = true,
            ("context", ["request", "path", ..]) => self.path = true,
            ("context", ["request", "safe", ..]) => self.safe = true,
            ("context", ["time", ..]) => self.time = true,
            ("context", ["local", ..]) => self.local = true,
            _ => {}
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

/// How a bare variable is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Usage {
    Value,
    In,
    Tags,
}

/// One longest chain of attributes from a variable: `principal.unix.uid`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PathRead {
    pub(super) variable: String,
    pub(super) names: Vec<String>,
    /// Only asked whether it is there.
    pub(super) existence: bool,
    pub(super) usage: Usage,
}

impl PathRead {
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
pub(super) fn paths(expression: &Value) -> Vec<PathRead> {
    let mut found = Vec::new();
    collect(expression, Usage::Value, &mut found);
    found
}

fn collect(expression: &Value, usage: Usage, found: &mut Vec<PathRead>) {
    if let Some((variable, names)) = chain(expression) {
        found.push(PathRead {
            variable,
            names,
            existence: false,
            usage,
        });
        return;
    }
    let Some(object) = expression.as_object() else {
        if let Some(items) = expression.as_array() {
            for item in items {
                collect(item, Usage::Value, found);
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
                        found.push(PathRead {
                            variable,
                            names,
                            existence: true,
                            usage,
                        });
                    }
                    _ => collect(operands, Usage::Value, found),
                }
            }
            "hasTag" | "getTag" | "in" | "is" => {
                let usage = match operator.as_str() {
                    "in" => Usage::In,
                    "is" if operands.get("in").is_none() => continue,
                    "is" => Usage::In,
                    _ => Usage::Tags,
                };
                for (name, operand) in operands.as_object().into_iter().flatten() {
                    match name.as_str() {
                        "left" => collect(operand, usage, found),
                        _ => collect(operand, Usage::Value, found),
                    }
                }
            }
            _ => match operands {
                Value::Object(named) => {
                    for operand in named.values() {
                        collect(operand, Usage::Value, found);
                    }
                }
                other => collect(other, Usage::Value, found),
            },
        }
    }
}

fn names_of(attribute: Option<&Value>) -> Option<Vec<String>> {
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
