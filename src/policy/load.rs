//! Strict loading: everything that could make a policy mean something else than it says is an error.

use std::collections::{BTreeMap, BTreeSet};

use cedar_policy::{PolicyId, PolicySet, ValidationMode, Validator};
use countersign_attestors::AttributeDeclaration;

use super::question::{Action, UNMATCHED};
use super::reads::{conditions, paths};
use super::source::{self, ParsedPolicy, PolicyFile, first_label, sentence};
use super::{lint, schema};
use crate::config::Config;
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};

/// Parses and checks every policy. The policies are to be used only if no diagnostic is an error.
pub(super) fn check(
    config: &Config,
    declarations: &[AttributeDeclaration],
    files: &[PolicyFile],
) -> (Vec<ParsedPolicy>, Diagnostics) {
    let mut diagnostics = Diagnostics::new();
    let policies = parse(files, &mut diagnostics);
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
    check_names(config, &policies, &mut diagnostics);
    check_groups(config, declarations, &mut diagnostics);
    check_existence(declarations, &policies, &mut diagnostics);
    validate(config, declarations, &policies, &mut diagnostics);
    for policy in &policies {
        lint::check(config, policy, &mut diagnostics);
    }
    lint::shared_clients(config, &policies, &mut diagnostics);
    diagnostics.sort();
    (policies, diagnostics)
}

/// Parses every policy, and reports what is wrong with it whatever is configured: syntax, annotations and ids.
pub(super) fn parse(files: &[PolicyFile], diagnostics: &mut Diagnostics) -> Vec<ParsedPolicy> {
    let mut policies = Vec::new();
    for file in files {
        diagnostics.add_source(&file.path, &file.text);
        policies.extend(source::parse(file, diagnostics));
    }
    check_ids(&policies, diagnostics);
    policies
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
        .map(|credential| &*credential.name)
        .collect();
    let groups: BTreeSet<&str> = config
        .credentials
        .iter()
        .flat_map(|credential| credential.groups.iter().map(String::as_str))
        .collect();
    let destinations: BTreeSet<&str> = config
        .destinations
        .iter()
        .map(|destination| &*destination.name)
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

/// A group must not be named like something else in `principal`.
fn check_groups(
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
}

/// Cedar's own validation in strict mode. Its warnings are errors here: a `forbid` on `principal has unxi`
/// only warns that it is impossible, and would never forbid anything.
fn validate(
    config: &Config,
    declarations: &[AttributeDeclaration],
    policies: &[ParsedPolicy],
    diagnostics: &mut Diagnostics,
) {
    let schema = match schema::parse(declarations) {
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
    let mut problems: Vec<_> = errors.chain(warnings).collect();
    // Cedar's order is that of a hash map.
    problems.sort_by_key(|(_, problem)| problem.to_string());
    let mut told: BTreeSet<(usize, usize)> = BTreeSet::new();
    for (id, problem) in problems {
        let number = AsRef::<str>::as_ref(id);
        let Some((index, policy)) = number
            .parse::<usize>()
            .ok()
            .and_then(|index| Some((index, policies.get(index)?)))
        else {
            continue;
        };
        let label = first_label(problem, policy.parsed_from);
        let place = label
            .filter(|label| *label != policy.span)
            .unwrap_or_else(|| policy.effect_place());
        // The same is told for each action and resource type, and what is wrong makes the whole impossible.
        let is_about_the_whole = place == policy.effect_place();
        let is_told = told.contains(&(index, place.start))
            || (is_about_the_whole && told.iter().any(|(known, _)| *known == index))
            || (is_about_the_whole
                && diagnostics.iter().any(|known| {
                    known.code == "policy_attribute_unknown"
                        && known.path == policy.path
                        && known
                            .span
                            .as_ref()
                            .is_some_and(|span| policy.span.contains(&span.start))
                }));
        if is_told {
            continue;
        }
        told.insert((index, place.start));
        let prefix = format!("for policy `{number}`, ");
        let words = |text: String| {
            let text = text.strip_prefix(&prefix).unwrap_or(&text);
            let mut text = sentence(text);
            for action in Action::ALL {
                text = text.replace(&format!(" for Action::\"{}\"", action.as_str()), "");
            }
            text
        };
        let next = match problem.help() {
            Some(help) => words(help.to_string()),
            None => "`countersign policy schema` prints every name and type".to_owned(),
        };
        diagnostics.push(
            Diagnostic::error(
                "policy_validation",
                &policy.path,
                words(problem.to_string()),
            )
            .at(place)
            .next(next),
        );
    }
}

/// `has` on a name that does not exist is never true: Cedar warns only where the whole policy becomes
/// impossible by it, not where one branch does, and that branch may be what forbids.
fn check_existence(
    declarations: &[AttributeDeclaration],
    policies: &[ParsedPolicy],
    diagnostics: &mut Diagnostics,
) {
    const CONTEXT: [&str; 13] = [
        "destination",
        "request",
        "request.method",
        "request.path",
        "request.safe",
        "scopes",
        "audience",
        "time",
        "local",
        "evidence",
        "node",
        "posture",
        "break_glass",
    ];
    let groups = schema::by_group(declarations);
    let principal: BTreeSet<String> = groups
        .iter()
        .flat_map(|(group, attributes)| {
            attributes
                .keys()
                .map(move |name| format!("{group}.{name}"))
                .chain([(*group).to_owned()])
        })
        .chain(["environment".to_owned()])
        .collect();
    let context: BTreeSet<String> = CONTEXT.map(str::to_owned).into();
    for policy in policies {
        let bodies = conditions(&policy.json).filter_map(|condition| condition.get("body"));
        for path in bodies.flat_map(paths).filter(|path| path.existence) {
            let known = match path.variable.as_str() {
                "principal" => &principal,
                "context" => &context,
                _ => continue,
            };
            let written = path.names.join(".");
            if known.contains(&written) {
                continue;
            }
            let last = path.names.last().map(String::as_str).unwrap_or_default();
            let next = match did_you_mean(&written, known.iter().map(String::as_str)) {
                Some(suggestion) => suggestion,
                None if path.variable == "principal" => {
                    "configure the attestor that states it; `countersign policy schema` prints what there is".to_owned()
                }
                None => "`countersign policy schema` prints what there is".to_owned(),
            };
            diagnostics.push(
                Diagnostic::error(
                    "policy_attribute_unknown",
                    &policy.path,
                    format!("`{} has {written}` is never true", path.variable),
                )
                .at(policy.place_of(last))
                .next(next),
            );
        }
    }
}
