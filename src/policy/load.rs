//! Strict loading: everything that could make a policy mean something else than it says is an error.

use std::collections::{BTreeMap, BTreeSet};

use cedar_policy::{PolicyId, PolicySet, ValidationMode, Validator};
use countersign_attestors::AttributeDeclaration;

use super::question::UNMATCHED;
use super::source::{self, ParsedPolicy, PolicyFile, first_label, sentence};
use super::{lint, schema};
use crate::config::{Config, TemplatePart, TokenSource};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};

/// Parses and checks every policy. The policies are to be used only if no diagnostic is an error.
pub(super) fn check(
    config: &Config,
    declarations: &[AttributeDeclaration],
    files: &[PolicyFile],
) -> (Vec<ParsedPolicy>, Diagnostics) {
    let mut diagnostics = Diagnostics::new();
    let mut policies = Vec::new();
    for file in files {
        diagnostics.add_source(&file.path, &file.text);
        policies.extend(source::parse(file, &mut diagnostics));
    }
    if files.is_empty() {
        diagnostics.push(
            Diagnostic::warning(
                "no_policies",
                &config.path,
                format!(
                    "`{}` contains no `*.cedar` file: everything is denied",
                    config.policy_directory.display()
                ),
            )
            .next("write a policy; `policies/README.md` shows how"),
        );
    }
    check_ids(&policies, &mut diagnostics);
    check_names(config, &policies, &mut diagnostics);
    check_attributes(config, declarations, &mut diagnostics);
    validate(config, declarations, &policies, &mut diagnostics);
    for policy in &policies {
        lint::check(config, policy, &mut diagnostics);
    }
    diagnostics.sort();
    (policies, diagnostics)
}

fn check_ids(policies: &[ParsedPolicy], diagnostics: &mut Diagnostics) {
    let mut first: BTreeMap<&str, &ParsedPolicy> = BTreeMap::new();
    for policy in policies.iter().filter(|policy| policy.is_named) {
        match first.get(policy.id()) {
            Some(earlier) => diagnostics.push(
                Diagnostic::error(
                    "policy_id_duplicate",
                    &policy.path,
                    format!("a second policy with `@id(\"{}\")`", policy.id()),
                )
                .at(policy.annotation_place("id"))
                .next(format!(
                    "rename one of them; the other is in `{}`",
                    earlier.path.display()
                )),
            ),
            None => {
                first.insert(policy.id(), policy);
            }
        }
    }
}

/// Every credential, group and destination that a policy names must be in the configuration.
fn check_names(config: &Config, policies: &[ParsedPolicy], diagnostics: &mut Diagnostics) {
    let credentials: BTreeSet<&str> = config
        .credentials
        .iter()
        .map(|credential| credential.name.as_str())
        .collect();
    let groups: BTreeSet<&str> = config
        .credentials
        .iter()
        .flat_map(|credential| credential.groups.iter().map(String::as_str))
        .collect();
    let destinations: BTreeSet<&str> = config
        .destinations
        .iter()
        .map(|destination| destination.name.as_str())
        .chain([UNMATCHED])
        .collect();
    for policy in policies {
        let mut named: Vec<(String, String)> = policy
            .policy
            .entity_literals()
            .into_iter()
            .map(|uid| (uid.type_name().to_string(), uid.id().unescaped().to_owned()))
            .collect();
        named.sort();
        named.dedup();
        for (entity_type, name) in named {
            let (what, known) = match entity_type.as_str() {
                "Credential" => ("credential", &credentials),
                "CredentialGroup" => ("credential group", &groups),
                "Destination" => ("destination", &destinations),
                _ => continue,
            };
            if known.contains(name.as_str()) {
                continue;
            }
            let mut next = match known.is_empty() {
                true => format!("the configuration has no {what}"),
                false => format!(
                    "configured are {}",
                    known
                        .iter()
                        .map(|name| format!("`{name}`"))
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            };
            if let Some(suggestion) = did_you_mean(&name, known.iter().copied()) {
                next = format!("{suggestion} {next}");
            }
            let literal = format!("{entity_type}::{}", schema::quoted(&name));
            diagnostics.push(
                Diagnostic::error(
                    "policy_name_unknown",
                    &policy.path,
                    format!("{what} `{name}` is not in the configuration"),
                )
                .at(policy.place_of(&literal))
                .next(next),
            );
        }
    }
}

/// Environment rules and templates must read what an attestor may state, and groups must not be
/// named like something else in `principal`.
fn check_attributes(
    config: &Config,
    declarations: &[AttributeDeclaration],
    diagnostics: &mut Diagnostics,
) {
    let groups = schema::by_group(declarations);
    for group in schema::RESERVED_GROUPS {
        if groups.contains_key(group) {
            diagnostics.push(
                Diagnostic::error(
                    "issuer_name_reserved",
                    &config.path,
                    format!(
                        "an issuer is named `{group}`, which stands for something else in policies"
                    ),
                )
                .next("give it another name"),
            );
        }
    }
    let known: BTreeSet<String> = groups
        .iter()
        .flat_map(|(group, attributes)| {
            attributes.keys().map(move |name| format!("{group}.{name}"))
        })
        .collect();
    let mut require = |reader: String, attribute: &str| {
        if known.contains(attribute) {
            return;
        }
        diagnostics.push(
            Diagnostic::error(
                "attribute_unknown",
                &config.path,
                format!("{reader} reads `{attribute}`, which no configured attestor states"),
            )
            .next(
                did_you_mean(attribute, known.iter().map(String::as_str)).unwrap_or_else(|| {
                    "configure the attestor; `countersign policy schema` prints what there is"
                        .to_owned()
                }),
            ),
        );
    };
    for rule in &config.environments {
        for attribute in rule.when.keys() {
            require(format!("environment rule `{}`", rule.name), attribute);
        }
    }
    for credential in &config.credentials {
        let TokenSource::OauthClientCredentials(settings) = &credential.source;
        let templates = std::iter::once(("client_id", &settings.client_id)).chain(
            settings
                .assertion_claims
                .iter()
                .map(|(claim, template)| (claim.as_str(), template)),
        );
        for (setting, template) in templates {
            for part in &template.parts {
                if let TemplatePart::Attribute { group, name } = part {
                    require(
                        format!("`{setting}` of credential `{}`", credential.name),
                        &format!("{group}.{name}"),
                    );
                }
            }
        }
    }
}

/// Cedar's own validation in strict mode. Its warnings are errors here: a `forbid` on `principal has unxi`
/// only warns that it is impossible, and would never forbid anything.
fn validate(
    config: &Config,
    declarations: &[AttributeDeclaration],
    policies: &[ParsedPolicy],
    diagnostics: &mut Diagnostics,
) {
    let schema = match schema::parse(&schema::text(declarations)) {
        Ok(schema) => schema,
        Err(error) => {
            diagnostics.push(Diagnostic::error(
                "policy_schema",
                &config.path,
                format!(
                    "the attestors' attributes make no schema: {}",
                    sentence(&error)
                ),
            ));
            return;
        }
    };
    // Ids may be missing or double here: each policy gets its index for one.
    let numbered = policies
        .iter()
        .enumerate()
        .map(|(index, policy)| policy.policy.new_id(PolicyId::new(index.to_string())));
    let Ok(set) = PolicySet::from_policies(numbered) else {
        return;
    };
    let result = Validator::new(schema).validate(&set, ValidationMode::Strict);
    let errors = result
        .validation_errors()
        .map(|error| (error.policy_id(), error as &dyn miette::Diagnostic));
    let warnings = result
        .validation_warnings()
        .map(|warning| (warning.policy_id(), warning as &dyn miette::Diagnostic));
    for (id, problem) in errors.chain(warnings) {
        let index: Option<usize> = AsRef::<str>::as_ref(id).parse().ok();
        let Some(policy) = index.and_then(|index| policies.get(index)) else {
            continue;
        };
        let message = problem.to_string();
        let prefix = format!("for policy `{}`, ", AsRef::<str>::as_ref(id));
        let message = message.strip_prefix(&prefix).unwrap_or(&message);
        let mut diagnostic =
            Diagnostic::error("policy_validation", &policy.path, sentence(message))
                .at(first_label(problem, policy.span.start)
                    .unwrap_or_else(|| policy.effect_place()));
        diagnostic.next = problem.help().map(|help| sentence(&help.to_string()));
        diagnostics.push(diagnostic);
    }
}
