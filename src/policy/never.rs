//! Policies that do nothing, whoever asks for whatever, and credentials that nobody may use: what
//! validation by types cannot see, for it knows no values.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use nix::unistd::User;
use serde_json::Value;

use super::engine::{LoadedPolicy, PolicyEngine, UNKNOWN_RESOURCE_ENVIRONMENT};
use super::lint::split_and;
use super::principal::UNKNOWN_ENVIRONMENT;
use super::question::{Action, UNMATCHED};
use super::reads::{chain, conditions};
use crate::config::Config;

/// A policy that never applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeverMatching {
    /// Its `@id`.
    pub id: Arc<str>,
    /// Whether it is a `permit`; else a `forbid`.
    pub is_permit: bool,
    /// `FILE:LINE:COLUMN` of its effect.
    pub location: String,
    /// Why: lower case, no final period.
    pub reason: String,
}

/// A destination and a credential that it takes, by name.
pub type DestinationAndCredential = (Arc<str>, Arc<str>);

impl PolicyEngine {
    /// The policies that never apply under `config` from `now` on, in the order of the files: those that
    /// expired, that cover nothing, or that ask for a value which nothing has. That none is found is no
    /// proof that there is none.
    pub fn never_matching(&self, config: &Config, now: SystemTime) -> Vec<NeverMatching> {
        let values = Values::of(config);
        let covering = self.covering_something();
        self.policies
            .iter()
            .filter_map(|policy| {
                Some(NeverMatching {
                    id: Arc::clone(&policy.id),
                    is_permit: policy.is_permit,
                    location: policy.location.clone(),
                    reason: why_never(policy, &values, &covering, now)?,
                })
            })
            .collect()
    }

    /// Credentials of destinations that no policy permits to anybody, because no permit for `inject`
    /// covers them, or each that does [never applies](Self::never_matching).
    pub fn never_permitted(
        &self,
        config: &Config,
        now: SystemTime,
    ) -> Vec<DestinationAndCredential> {
        let never: BTreeSet<Arc<str>> = self
            .never_matching(config, now)
            .into_iter()
            .map(|never| never.id)
            .collect();
        let is_permitted = |name: &str| {
            let slice = self
                .credentials
                .get(name)
                .and_then(|credential| credential.slices.get(&Action::Inject));
            slice.is_some_and(|slice| {
                slice
                    .policies
                    .iter()
                    .any(|policy| policy.is_permit && !never.contains(&policy.id))
            })
        };
        config
            .destinations
            .iter()
            .flat_map(|destination| {
                destination
                    .credentials
                    .iter()
                    .map(|used| (&destination.name, &used.credential.name))
            })
            .filter(|(_, credential)| !is_permitted(credential))
            .map(|(destination, credential)| (Arc::clone(destination), Arc::clone(credential)))
            .collect()
    }

    /// The ids of policies that cover some action on some resource of the configuration.
    fn covering_something(&self) -> BTreeSet<Arc<str>> {
        self.credentials
            .values()
            .chain(self.destinations.values())
            .flat_map(|resource| resource.slices.values())
            .flat_map(|slice| slice.policies.iter())
            .map(|policy| Arc::clone(&policy.id))
            .collect()
    }
}

fn why_never(
    policy: &LoadedPolicy,
    values: &Values,
    covering: &BTreeSet<Arc<str>>,
    now: SystemTime,
) -> Option<String> {
    if policy.expires.is_some_and(|expires| expires <= now) {
        return Some("its `@expires` has passed".to_owned());
    }
    if !covering.contains(&policy.id) {
        return Some("it covers no credential and no destination of the configuration".to_owned());
    }
    conditions(&policy.json)
        .filter(|condition| condition.get("kind").and_then(Value::as_str) == Some("when"))
        .filter_map(|condition| condition.get("body"))
        .find_map(|body| {
            let mut conjuncts = Vec::new();
            split_and(body, &mut conjuncts);
            conjuncts
                .into_iter()
                .find_map(|conjunct| values.why_false(conjunct))
        })
}

/// The values that an expression can have, of those that have no others.
struct Values(BTreeMap<&'static str, BTreeSet<String>>);

impl Values {
    fn of(config: &Config) -> Self {
        let environments = config.environments.iter().map(|rule| rule.name.clone());
        let credentials = config.credentials.iter();
        let destinations = config.destinations.iter();
        let destination_names: BTreeSet<String> = destinations
            .clone()
            .map(|destination| destination.name.to_string())
            .chain([UNMATCHED.to_owned()])
            .collect();
        let resource_environments = credentials
            .clone()
            .filter_map(|credential| credential.environment.clone())
            .chain(destinations.filter_map(|destination| destination.environment.clone()))
            .chain([UNKNOWN_RESOURCE_ENVIRONMENT.to_owned()])
            .collect();
        let resource_names = credentials
            .map(|credential| credential.name.to_string())
            .chain(destination_names.iter().cloned())
            .collect();
        Self(BTreeMap::from([
            (
                "principal.environment",
                environments
                    .chain([UNKNOWN_ENVIRONMENT.to_owned()])
                    .collect(),
            ),
            ("resource.name", resource_names),
            ("resource.environment", resource_environments),
            ("context.destination.name", destination_names),
        ]))
    }

    /// Why an equation with a literal never holds; `None` where it may, and for other expressions.
    fn why_false(&self, expression: &Value) -> Option<String> {
        let operands = expression.get("==")?;
        let (left, right) = (operands.get("left")?, operands.get("right")?);
        let (path, literal) = match (text_literal(left), text_literal(right)) {
            (None, Some(literal)) => (left, literal),
            (Some(literal), None) => (right, literal),
            _ => return None,
        };
        let (variable, names) = chain(path)?;
        let path = format!("{variable}.{}", names.join("."));
        if let Some(values) = self.0.get(path.as_str())
            && !values.contains(literal)
        {
            let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
            return Some(format!(
                "`{path}` is never `{literal}`, but one of {}",
                values.join(", ")
            ));
        }
        match path.as_str() {
            // RFC 9110 section 9.1: methods are case-sensitive.
            "context.request.method" if literal.bytes().any(|byte| byte.is_ascii_lowercase()) => {
                Some(format!(
                    "method `{literal}` is in lower case, and methods are not"
                ))
            }
            "principal.unix.user" if matches!(User::from_name(literal), Ok(None)) => {
                Some(format!("there is no user `{literal}` on this machine"))
            }
            _ => None,
        }
    }
}

fn text_literal(expression: &Value) -> Option<&str> {
    expression.get("Value")?.as_str()
}
