//! A workload as policies see it: `Workload::"caller"` with one record per group of attributes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, LazyLock};

use cedar_policy::{
    Entity, EntityAttrEvaluationError, EntityId, EntityTypeName, EntityUid, RestrictedExpression,
};
use countersign_attestors::{AttributeValue, Attributes, WorkloadFacts};

use super::engine::PolicyEngine;
use super::revocations::value_is;
use crate::config::EnvironmentRule;

/// `principal.environment` where no rule matches.
pub const UNKNOWN_ENVIRONMENT: &str = "unknown";

/// The group whose attributes are tags (`principal.getTag("app")`) and not a record.
pub(super) const LABELS: &str = "labels";

/// A workload's entity. Built once for each attestation and set of policies: it is the costly part of a request.
#[derive(Debug)]
pub(super) struct Principal {
    /// `None` if a value could not be made an entity; nothing is permitted to such a workload.
    pub(super) entity: Result<Entity, String>,
    pub(super) environment: Arc<str>,
}

impl Principal {
    pub(super) fn new(facts: &WorkloadFacts, engine: &PolicyEngine) -> Self {
        Self::described(facts, None, engine)
    }

    /// A workload whose environment may be given instead of looked up.
    pub(super) fn described(
        facts: &WorkloadFacts,
        environment: Option<&str>,
        engine: &PolicyEngine,
    ) -> Self {
        let environment = match environment {
            Some(environment) => Arc::from(environment),
            None => environment_of(facts, engine.environments()),
        };
        let entity = entity_of(facts, &environment, engine.repository_hosts())
            .map_err(|error| error.to_string());
        Self {
            entity,
            environment,
        }
    }
}

/// The first environment whose attributes all equal, else `unknown`.
pub(super) fn environment_of(facts: &WorkloadFacts, rules: &[EnvironmentRule]) -> Arc<str> {
    rules
        .iter()
        .find(|rule| {
            rule.when.iter().all(|(attribute, expected)| {
                attribute
                    .split_once('.')
                    .and_then(|(group, name)| facts.attribute(group, name))
                    .is_some_and(|actual| value_is(actual, expected))
            })
        })
        .map_or_else(
            || Arc::from(UNKNOWN_ENVIRONMENT),
            |rule| Arc::from(rule.name.as_str()),
        )
}

/// The uid of every workload: policies must not name one, since it says nothing about who it is.
pub(super) fn workload_uid() -> EntityUid {
    uid("Workload", "caller")
}

/// Read once: every decision names several.
static ENTITY_TYPES: LazyLock<HashMap<&str, EntityTypeName>> = LazyLock::new(|| {
    [
        "Action",
        "Credential",
        "CredentialGroup",
        "Destination",
        "Namespace",
        "Repository",
        "ServiceAccount",
        "TrustDomain",
        "Workload",
    ]
    .into_iter()
    .filter_map(|name| Some((name, name.parse().ok()?)))
    .collect()
});

/// An entity's uid; `entity_type` is one of the schema's.
pub(super) fn uid(entity_type: &'static str, name: &str) -> EntityUid {
    match ENTITY_TYPES.get(entity_type) {
        Some(known) => EntityUid::from_type_name_and_id(known.clone(), EntityId::new(name)),
        None => unreachable!("`{entity_type}` is a type of the schema"),
    }
}

fn entity_of(
    facts: &WorkloadFacts,
    environment: &str,
    repository_hosts: &BTreeMap<String, String>,
) -> Result<Entity, EntityAttrEvaluationError> {
    let mut attributes: HashMap<String, RestrictedExpression> = facts
        .groups
        .iter()
        .filter(|(group, _)| *group != LABELS)
        .filter_map(|(group, attributes)| Some((group.clone(), record(attributes)?)))
        .collect();
    attributes.insert(
        "environment".to_owned(),
        RestrictedExpression::new_string(environment.to_owned()),
    );
    let tags = facts.groups.get(LABELS).into_iter().flatten();
    Entity::new_with_tags(
        workload_uid(),
        attributes,
        parents(facts, repository_hosts),
        tags.map(|(name, value)| {
            (
                name.clone(),
                RestrictedExpression::new_string(value.to_string()),
            )
        }),
    )
}

fn record(attributes: &Attributes) -> Option<RestrictedExpression> {
    RestrictedExpression::new_record(
        attributes
            .iter()
            .map(|(name, value)| (name.clone(), expression(value))),
    )
    .ok()
}

fn expression(value: &AttributeValue) -> RestrictedExpression {
    match value {
        AttributeValue::Boolean(value) => RestrictedExpression::new_bool(*value),
        AttributeValue::Long(value) => RestrictedExpression::new_long(*value),
        AttributeValue::String(value) => RestrictedExpression::new_string(value.clone()),
        AttributeValue::StringSet(values) => RestrictedExpression::new_set(
            values
                .iter()
                .map(|value| RestrictedExpression::new_string(value.clone())),
        ),
    }
}

/// The attributes that a parent of each type is made of; [`parents`] and what a policy with `in` reads agree by it.
/// No attestor states those of Kubernetes and SPIFFE: the schema keeps their names for the ones that will.
pub(super) const PARENT_ATTRIBUTES: [(&str, &str, &[&str]); 3] = [
    ("Namespace", "kubernetes", &["cluster", "namespace"]),
    (
        "ServiceAccount",
        "kubernetes",
        &["cluster", "namespace", "service_account"],
    ),
    ("TrustDomain", "spiffe", &["trust_domain"]),
];

/// The claim by which a `Repository` parent is made, with the issuer's host.
pub(super) const REPOSITORY_ATTRIBUTE: &str = "repository_id";

fn parents(
    facts: &WorkloadFacts,
    repository_hosts: &BTreeMap<String, String>,
) -> HashSet<EntityUid> {
    let made_of = |group: &str, names: &[&str]| {
        names
            .iter()
            .map(|name| match facts.attribute(group, name)? {
                AttributeValue::String(text) => Some(text.clone()),
                AttributeValue::Long(number) => Some(number.to_string()),
                AttributeValue::Boolean(_) | AttributeValue::StringSet(_) => None,
            })
            .collect::<Option<Vec<String>>>()
            .map(|parts| parts.join("/"))
    };
    PARENT_ATTRIBUTES
        .iter()
        .filter_map(|(entity_type, group, names)| Some(uid(entity_type, &made_of(group, names)?)))
        .chain(repository_hosts.iter().filter_map(|(group, host)| {
            let id = made_of(group, &[REPOSITORY_ATTRIBUTE])?;
            Some(uid("Repository", &format!("{host}/{id}")))
        }))
        .collect()
}
