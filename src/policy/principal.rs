//! A workload as policies see it: `Workload::"caller"` with one record per group of attributes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, LazyLock, OnceLock};

use cedar_policy::{
    Entity, EntityAttrEvaluationError, EntityId, EntityTypeName, EntityUid, RestrictedExpression,
};
use countersign_attestors::{AttributeDeclaration, AttributeValue, Attributes, WorkloadFacts};

use super::engine::PolicyEngine;
use super::reads::Reads;
use super::revocations::value_is;
use super::schema;
use crate::config::{Config, EnvironmentRule};

/// `principal.environment` where no rule matches.
pub const UNKNOWN_ENVIRONMENT: &str = "unknown";

/// The group whose attributes are tags (`principal.getTag("app")`) and not a record.
pub(super) const LABELS: &str = "labels";

/// What a workload is to policies beside its attributes, found once for each attestation and set of policies.
#[derive(Debug)]
pub(super) struct Principal {
    pub(super) environment: Arc<str>,
    /// Entity types and ids.
    pub(super) parents: Vec<(&'static str, String)>,
    /// Made when Cedar first needs it.
    entity: OnceLock<Result<Entity, String>>,
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
        let model = engine.principals();
        Self {
            environment: match environment {
                Some(environment) => Arc::from(environment),
                None => model.environment_of(facts),
            },
            parents: model.parents_of(facts),
            entity: OnceLock::new(),
        }
    }

    /// The entity of this workload, whose facts are `facts`; why there is none, if a value could not be made
    /// one: Cedar evaluates nothing for such a workload.
    pub(super) fn entity(&self, facts: &WorkloadFacts) -> &Result<Entity, String> {
        self.entity.get_or_init(|| {
            entity_of(facts, &self.environment, &self.parents).map_err(|error| error.to_string())
        })
    }
}

/// What makes a workload's environment and its parents, and which attributes it may have.
#[derive(Debug)]
pub(super) struct PrincipalModel {
    environments: Vec<EnvironmentRule>,
    /// By issuer's name.
    repository_hosts: BTreeMap<String, String>,
    /// Attributes by group.
    declared: BTreeMap<String, BTreeSet<String>>,
}

impl PrincipalModel {
    pub(super) fn new(config: &Config, declarations: &[AttributeDeclaration]) -> Self {
        let issuers = config.attestors.oidc_issuers.iter();
        Self {
            environments: config.environments.clone(),
            repository_hosts: issuers
                .filter(|issuer| issuer.claims.contains_key(REPOSITORY_ATTRIBUTE))
                .filter_map(|issuer| {
                    let host = issuer.issuer.url().host_str()?;
                    Some((issuer.name.clone(), host.to_owned()))
                })
                .collect(),
            declared: schema::by_group(declarations)
                .into_iter()
                .map(|(group, attributes)| {
                    (
                        group.to_owned(),
                        attributes.into_keys().map(str::to_owned).collect(),
                    )
                })
                .collect(),
        }
    }

    /// The first environment whose attributes all equal, else `unknown`.
    pub(super) fn environment_of(&self, facts: &WorkloadFacts) -> Arc<str> {
        self.environments
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

    /// `(group, attribute)` of the rules that give an environment.
    pub(super) fn attributes_of_environments(&self) -> impl Iterator<Item = (&str, &str)> {
        self.environments
            .iter()
            .flat_map(|rule| rule.when.keys())
            .filter_map(|attribute| attribute.split_once('.'))
    }

    fn parents_of(&self, facts: &WorkloadFacts) -> Vec<(&'static str, String)> {
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
            .filter_map(|(entity_type, group, names)| Some((*entity_type, made_of(group, names)?)))
            .chain(self.repository_hosts.iter().filter_map(|(group, host)| {
                let id = made_of(group, &[REPOSITORY_ATTRIBUTE])?;
                Some(("Repository", format!("{host}/{id}")))
            }))
            .collect()
    }

    /// Whether a group is read, also by way of the environment or of a parent.
    pub(super) fn reads_group(&self, reads: &Reads, group: &str) -> bool {
        reads.reads_group(group)
            || (reads.labels && group == LABELS)
            || (reads.environment
                && self
                    .attributes_of_environments()
                    .any(|(known, _)| known == group))
            || (reads.parents
                && (PARENT_ATTRIBUTES
                    .iter()
                    .any(|(_, known, _)| *known == group)
                    || self.repository_hosts.contains_key(group)))
    }

    /// `(group, attribute)` that are read, also by way of the environment, a parent, or a group as a whole.
    pub(super) fn attributes_of<'a>(&'a self, reads: &'a Reads) -> BTreeSet<(&'a str, &'a str)> {
        let mut attributes: BTreeSet<(&str, &str)> = reads
            .attributes
            .iter()
            .map(|(group, name)| (&**group, &**name))
            .collect();
        // `principal has unix && principal.unix.uid == 0` needs the uid only.
        let asked_for = reads.groups.iter();
        let asked_for =
            asked_for.filter(|group| !reads.attributes.iter().any(|(known, _)| known == *group));
        let every = self.declared.keys().filter(|_| reads.principal);
        for group in asked_for.chain(&reads.whole_groups).chain(every) {
            let declared = self.declared.get_key_value(group);
            attributes.extend(
                declared
                    .into_iter()
                    .flat_map(|(group, names)| names.iter().map(|name| (&**group, &**name))),
            );
        }
        if reads.environment {
            attributes.extend(self.attributes_of_environments());
        }
        if reads.parents {
            for (_, group, names) in PARENT_ATTRIBUTES {
                let declared = self.declared.get(group);
                attributes.extend(
                    names
                        .iter()
                        .filter(|name| declared.is_some_and(|declared| declared.contains(**name)))
                        .map(|name| (group, *name)),
                );
            }
            attributes.extend(
                self.repository_hosts
                    .keys()
                    .map(|group| (&**group, REPOSITORY_ATTRIBUTE)),
            );
        }
        attributes
    }
}

/// The uid of every workload: policies must not name one, since it says nothing about who it is.
pub(super) fn workload_uid() -> EntityUid {
    uid(WORKLOAD.0, WORKLOAD.1)
}

/// The entity type and the id of [`workload_uid`].
pub(super) const WORKLOAD: (&str, &str) = ("Workload", "caller");

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
    parents: &[(&'static str, String)],
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
        parents.iter().map(|(entity_type, id)| uid(entity_type, id)),
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

/// The attributes that a parent of each type is made of; [`PrincipalModel::parents_of`] and what a policy with `in` reads agree by it.
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
