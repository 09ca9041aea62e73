//! A policy that would allow exactly what was denied, and the test that shows it.

use std::collections::BTreeMap;

use countersign_attestors::{AttributeValue, WorkloadFacts};
use serde::{Deserialize, Serialize};

use super::question::{Action, Question};
use super::reads::Chain;
use super::schema::quoted;

/// A policy and its test, ready to be put into the policy directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suggestion {
    /// The policy's id; `ID.cedar` and `ID.test.yaml` are fitting names.
    pub id: String,
    /// The policy, as Cedar text.
    pub policy: String,
    /// Its test, as YAML.
    pub test: String,
}

impl Suggestion {
    /// Both, each under the name of its file.
    pub fn to_text(&self) -> String {
        format!(
            "// {id}.cedar\n{policy}\n# {id}.test.yaml\n{test}",
            id = self.id,
            policy = self.policy,
            test = self.test
        )
    }
}

/// The narrowest policy that allows this workload this.
pub fn suggestion(facts: &WorkloadFacts, question: &Question<'_>) -> Suggestion {
    let identity = identity(facts);
    let (resource_type, resource) = question.resource.identity();
    let request = question
        .request
        .filter(|_| question.action != Action::Issue);

    let mut conditions = Vec::new();
    for (group, attributes) in &identity {
        conditions.push(format!("principal has {}", has(group, attributes)));
        for (name, value) in attributes {
            let path = principal_path(group, name);
            conditions.push(match value {
                AttributeValue::String(text) => format!("{path} == {}", quoted(text)),
                AttributeValue::StringSet(texts) => {
                    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
                    format!("{path} == [{}]", texts.join(", "))
                }
                other => format!("{path} == {other}"),
            });
        }
    }
    if let Some(request) = request {
        conditions.push("context has request".to_owned());
        conditions.push(format!(
            "context.request.method == {}",
            quoted(request.method.as_str())
        ));
        conditions.push(format!(
            "context.request.path == {}",
            quoted(request.path.as_str())
        ));
    }

    let id = id_of(&identity, question, resource);
    let policy = format!(
        "@id({id})\npermit (principal, action == Action::\"{action}\", resource == {resource_type}::{resource})\nwhen {{\n  {conditions}\n}};\n",
        id = quoted(&id),
        action = question.action.as_str(),
        resource_type = resource_type.as_str(),
        resource = quoted(resource),
        conditions = match conditions.is_empty() {
            true => "true".to_owned(),
            false => conditions.join(" &&\n  "),
        },
    );
    Suggestion {
        test: test_of(&id, &identity, question, resource),
        id,
        policy,
    }
}

type Identity<'a> = BTreeMap<&'a str, BTreeMap<&'a str, &'a AttributeValue>>;

/// What names a workload for longer than its process: the claims of its token, its unit, its user and executable.
fn identity(facts: &WorkloadFacts) -> Identity<'_> {
    let mut identity: Identity<'_> = BTreeMap::new();
    let mut take = |group: &str, name: &str| {
        if let Some((group, attributes)) = facts.groups.get_key_value(group)
            && let Some((name, value)) = attributes.get_key_value(name)
        {
            identity.entry(group).or_default().insert(name, value);
        }
    };
    let issuers: Vec<&String> = facts
        .groups
        .iter()
        .filter(|(_, attributes)| attributes.contains_key("sub"))
        .map(|(group, _)| group)
        .collect();
    for issuer in &issuers {
        take(issuer, "sub");
    }
    if issuers.is_empty() {
        take("systemd", "system_unit");
        take("unix", "uid");
        take("unix", "executable");
    }
    identity
}

fn principal_path(group: &str, name: &str) -> String {
    Chain::of_principal(&[group, name]).text()
}

/// `unix`, or `unix.executable` where an attribute need not be there.
fn has(group: &str, attributes: &BTreeMap<&str, &AttributeValue>) -> String {
    let group_text = match super::schema::is_identifier(group) {
        true => group.to_owned(),
        false => return quoted(group),
    };
    match attributes
        .keys()
        .find(|name| **name == "executable")
        .or_else(|| attributes.keys().next())
    {
        Some(name) if *name == "executable" && super::schema::is_identifier(name) => {
            format!("{group_text}.{name}")
        }
        _ => group_text,
    }
}

fn id_of(identity: &Identity<'_>, question: &Question<'_>, resource: &str) -> String {
    let who = identity
        .values()
        .flat_map(BTreeMap::iter)
        .find(|(name, _)| matches!(**name, "system_unit" | "sub"))
        .or_else(|| identity.values().flat_map(BTreeMap::iter).next_back())
        .map(|(name, value)| match *name {
            "uid" => format!("uid-{value}"),
            _ => value.to_string(),
        })
        .unwrap_or_else(|| "anyone".to_owned());
    let what = match question.request {
        Some(request) => request.method.as_str().to_ascii_lowercase(),
        None => question.action.as_str().to_owned(),
    };
    let mut id = String::new();
    for character in format!("{who}-{what}-{resource}").chars().take(96) {
        match character {
            letter if letter.is_ascii_alphanumeric() => id.push(letter.to_ascii_lowercase()),
            _ if id.ends_with('-') || id.is_empty() => {}
            _ => id.push('-'),
        }
    }
    id.trim_end_matches('-').to_owned()
}

fn test_of(id: &str, identity: &Identity<'_>, question: &Question<'_>, resource: &str) -> String {
    let workload = yaml(identity);
    let asked = match question.request {
        Some(request) if question.action != Action::Issue => format!(
            "request: {}",
            yaml(&format!(
                "{} {}://{}{}",
                request.method,
                request.scheme.as_str(),
                request.target.to_authority(request.scheme),
                request.path.as_sent()
            ))
        ),
        _ => format!("issue: {}", yaml(resource)),
    };
    format!(
        "workloads:\n  caller: {workload}\ntests:\n  - {{as: caller, {asked}, expect: allow, by: {}}}\n",
        yaml(id)
    )
}

/// A value in YAML's flow form: JSON is that, but for the control characters that JSON leaves as they are.
fn yaml(value: &(impl Serialize + ?Sized)) -> String {
    let json = serde_json::to_string(value).unwrap_or_default();
    let mut yaml = String::with_capacity(json.len());
    for character in json.chars() {
        match character.is_control() || matches!(character, '\u{fffe}' | '\u{ffff}') {
            true => yaml.push_str(&format!("\\u{:04x}", u32::from(character))),
            false => yaml.push(character),
        }
    }
    yaml
}
