//! What a policy most likely does not mean. Warnings, but for a permit whose evidence anyone on the node
//! can forge, and for a principal that is nobody: those are errors.

use std::ops::Range;

use cedar_policy::ResourceConstraint;
use serde_json::Value;

use super::engine::covers_action;
use super::question::Action;
use super::reads::{chain, conditions};
use super::source::ParsedPolicy;
use crate::config::{ClientAuthentication, Config, CredentialConfig, TokenSource};
use crate::diagnostics::{Diagnostic, Diagnostics, Severity};
use crate::providers::attributes_of;

/// Attributes that say which file a process was started from, and not what code it runs.
const OF_THE_EXECUTABLE: [&str; 3] = ["executable", "executable_sha256", "command_line_sha256"];

/// Attributes of `unix` that say whose process it is.
const OF_THE_USER: [&str; 4] = ["uid", "user", "gid", "groups"];

/// Checks one policy.
pub(super) fn check(config: &Config, policy: &ParsedPolicy, diagnostics: &mut Diagnostics) {
    let mut findings = Findings {
        policy,
        diagnostics,
    };
    findings.principal();
    findings.evidence();
    findings.scopes_offered(config);
    findings.expiry();
    for condition in conditions(&policy.json) {
        let is_when = condition.get("kind").and_then(Value::as_str) == Some("when");
        if let Some(body) = condition.get("body") {
            // What makes the policy's effect permissive: the `when` of a permit, the `unless` of a forbid.
            let widens = is_when == policy.is_permit();
            findings.absent_evidence(body, is_when);
            findings.expression(body, widens);
        }
    }
}

/// A `client_id` by which the authorization server takes several workloads for one: two permits name
/// workloads that cannot be the same, and nothing that is sent tells them apart.
pub(super) fn shared_clients(
    config: &Config,
    policies: &[ParsedPolicy],
    diagnostics: &mut Diagnostics,
) {
    for credential in &config.credentials {
        let TokenSource::OauthClientCredentials(settings) = &credential.source;
        let told_apart = std::iter::once(&settings.client_id)
            .chain(settings.assertion_claims.values())
            .any(|template| attributes_of(template).next().is_some())
            || matches!(
                settings.client_authentication,
                ClientAuthentication::WorkloadAssertion { .. }
            );
        if told_apart {
            continue;
        }
        let permits: Vec<(&str, Vec<Pinned>)> = policies
            .iter()
            .filter(|policy| policy.is_permit() && may_grant(policy, credential))
            .map(|policy| (policy.id(), pinned(policy)))
            .collect();
        let differing = permits.iter().enumerate().find_map(|(index, (one, pins))| {
            permits
                .iter()
                .skip(index + 1)
                .find(|(_, others)| exclude(pins, others))
                .map(|(other, _)| (*one, *other))
        });
        if let Some((one, other)) = differing {
            diagnostics.push(
                Diagnostic::warning(
                    "lint_client_id_shared",
                    &config.path,
                    format!(
                        "the client id of credential `{}` serves several identities: those of permits `{one}` and `{other}`",
                        credential.name
                    ),
                )
                .next("make it a template, as in `client_id: \"svc-${systemd.system_unit}\"`, or say who asks in `assertion_claims`: the authorization server sees one client only"),
            );
        }
    }
}

/// An attribute, by its path, and the one value that a policy wants of it.
type Pinned = (Vec<String>, String);

/// The attributes that each `when` of a policy compares with one value.
fn pinned(policy: &ParsedPolicy) -> Vec<Pinned> {
    let mut parts = Vec::new();
    for condition in conditions(&policy.json) {
        if condition.get("kind").and_then(Value::as_str) == Some("when")
            && let Some(body) = condition.get("body")
        {
            split_and(body, &mut parts);
        }
    }
    parts
        .into_iter()
        .filter_map(|part| {
            let operands = part.get("==")?;
            let (left, right) = (operands.get("left")?, operands.get("right")?);
            let of = |path: &Value, value: &Value| {
                let (variable, names) = chain(path)?;
                let value = value.get("Value")?.to_string();
                (variable == "principal").then_some((names, value))
            };
            of(left, right).or_else(|| of(right, left))
        })
        .collect()
}

/// Whether no workload can have both.
fn exclude(one: &[Pinned], other: &[Pinned]) -> bool {
    one.iter().any(|(path, value)| {
        other
            .iter()
            .any(|(same, another)| path == same && value != another)
    })
}

/// Whether a policy may permit the use of this credential.
fn may_grant(policy: &ParsedPolicy, credential: &CredentialConfig) -> bool {
    let is_it = |uid: &cedar_policy::EntityUid| match uid.type_name().basename() {
        "Credential" => uid.id().unescaped() == &*credential.name,
        "CredentialGroup" => credential
            .groups
            .iter()
            .any(|group| uid.id().unescaped() == group),
        _ => false,
    };
    let action = policy.policy.action_constraint();
    let uses = [Action::Inject, Action::Issue];
    if !uses.iter().any(|used| covers_action(&action, *used)) {
        return false;
    }
    match policy.policy.resource_constraint() {
        ResourceConstraint::Any => true,
        ResourceConstraint::Is(type_name) => type_name.basename() == "Credential",
        ResourceConstraint::Eq(uid)
        | ResourceConstraint::In(uid)
        | ResourceConstraint::IsIn(_, uid) => is_it(&uid),
    }
}

struct Findings<'a> {
    policy: &'a ParsedPolicy,
    diagnostics: &'a mut Diagnostics,
}

impl Findings<'_> {
    fn push(
        &mut self,
        severity: Severity,
        code: &'static str,
        place: Range<usize>,
        message: impl Into<String>,
        next: impl Into<String>,
    ) {
        let diagnostic = match severity {
            Severity::Error => Diagnostic::error(code, &self.policy.path, message),
            Severity::Warning => Diagnostic::warning(code, &self.policy.path, message),
        };
        self.diagnostics.push(diagnostic.at(place).next(next));
    }

    /// `principal == Workload::"..."`: workloads have no name of their own.
    fn principal(&mut self) {
        let names_a_workload = self
            .policy
            .policy
            .entity_literals()
            .iter()
            .any(|uid| uid.type_name().basename() == "Workload");
        if names_a_workload {
            self.push(
                Severity::Error,
                "lint_workload_named",
                self.policy.place_of("Workload::"),
                "a workload is named by `Workload::\"...\"`, and none has a name",
                "say which it is by what is attested, as in `principal has unix && principal.unix.uid == 990`",
            );
        }
    }

    /// On what a permit rests.
    fn evidence(&mut self) {
        if !self.policy.is_permit() {
            return;
        }
        let reads = &self.policy.reads;
        if !reads.reads_principal() {
            self.push(
                Severity::Warning,
                "lint_permit_for_node",
                self.policy.effect_place(),
                "this permit rests on the node alone: it reads nothing about the workload",
                "read an attribute of `principal`, or every process on the node is permitted",
            );
        }
        let of_executable = reads
            .attributes
            .iter()
            .any(|(group, name)| group == "unix" && OF_THE_EXECUTABLE.contains(&name.as_str()));
        let of_more = reads.parents
            || reads.environment
            || reads
                .attributes
                .iter()
                .any(|(group, name)| group != "unix" || OF_THE_USER.contains(&name.as_str()));
        if of_executable && !of_more {
            self.push(
                Severity::Error,
                "lint_executable_alone",
                self.policy.place_of("executable"),
                "this permit rests on the executable alone, which does not say what code runs (`LD_PRELOAD`, an interpreter's script)",
                "read the uid, the unit, the container or the pod as well, as in `principal.unix.uid == 990`",
            );
        }
    }

    /// `@scopes` that the credential never asks for.
    fn scopes_offered(&mut self, config: &Config) {
        let (Some(cap), cedar_policy::ResourceConstraint::Eq(resource)) = (
            &self.policy.scopes,
            self.policy.policy.resource_constraint(),
        ) else {
            return;
        };
        let Some(credential) = config.credentials.iter().find(|credential| {
            resource.type_name().basename() == "Credential"
                && &*credential.name == resource.id().unescaped()
        }) else {
            return;
        };
        let TokenSource::OauthClientCredentials(settings) = &credential.source;
        if settings.scopes.is_empty() {
            return;
        }
        for scope in cap {
            if !settings.scopes.contains(scope) {
                self.push(
                    Severity::Warning,
                    "lint_scope_not_offered",
                    self.policy.annotation_place("scopes"),
                    format!(
                        "scope `{scope}` is not among those of credential `{}`",
                        credential.name
                    ),
                    format!("its scopes are `{}`", settings.scopes.join(" ")),
                );
            }
        }
    }

    /// `@expires` that has passed.
    fn expiry(&mut self) {
        if self
            .policy
            .expires
            .is_some_and(|expires| expires <= std::time::SystemTime::now())
        {
            self.push(
                Severity::Warning,
                "lint_expired",
                self.policy.annotation_place("expires"),
                "this policy has expired and does nothing",
                "remove it, or set a later `@expires`",
            );
        }
    }

    /// `forbid ... when { principal has X && ... }` forbids nothing to a workload without X.
    fn absent_evidence(&mut self, body: &Value, is_when: bool) {
        if self.policy.is_permit() || !is_when {
            return;
        }
        let mut conjuncts = Vec::new();
        split_and(body, &mut conjuncts);
        for conjunct in conjuncts {
            let Some(operands) = conjunct.get("has") else {
                continue;
            };
            let Some((variable, mut names)) = operands.get("left").and_then(chain) else {
                continue;
            };
            if variable != "principal" {
                continue;
            }
            match operands.get("attr") {
                Some(Value::String(name)) => names.push(name.clone()),
                Some(Value::Array(more)) => {
                    names.extend(more.iter().filter_map(Value::as_str).map(str::to_owned));
                }
                _ => continue,
            }
            self.push(
                Severity::Warning,
                "lint_forbid_needs_evidence",
                self.policy.place_of(" has "),
                format!(
                    "this `forbid` does not apply to a workload without `{}`",
                    names.join(".")
                ),
                "turn it round: `unless { principal has ... }` forbids where evidence is missing too",
            );
        }
    }

    fn expression(&mut self, expression: &Value, widens: bool) {
        match expression {
            Value::Array(items) => {
                for item in items {
                    self.expression(item, widens);
                }
            }
            Value::Object(object) => {
                for (operator, operands) in object {
                    match operator.as_str() {
                        "Value" | "Var" => {}
                        "==" | "!=" | "contains" | "containsAny" | "in" => {
                            self.method(operands);
                            self.expression(operands, widens);
                        }
                        "containsAll" => {
                            self.contains_all(operands, widens);
                            self.expression(operands, widens);
                        }
                        "like" => self.pattern(operands),
                        "!" => self.expression(operands, !widens),
                        _ => self.expression(operands, widens),
                    }
                }
            }
            _ => {}
        }
    }

    /// Methods are upper case: `get` never equals `GET` (RFC 9110 section 9.1).
    fn method(&mut self, operands: &Value) {
        let reads_method = ["left", "right"].iter().any(|side| {
            operands
                .get(side)
                .and_then(chain)
                .is_some_and(|(variable, names)| {
                    variable == "context" && names == ["request", "method"]
                })
        });
        if !reads_method {
            return;
        }
        let mut literals = Vec::new();
        strings(operands, &mut literals);
        for literal in literals {
            if literal.bytes().any(|byte| byte.is_ascii_lowercase()) {
                self.push(
                    Severity::Warning,
                    "lint_method_case",
                    self.policy.place_of(&super::schema::quoted(literal)),
                    format!("method `{literal}` is in lower case, and methods are not"),
                    format!("write `{}`", literal.to_ascii_uppercase()),
                );
            }
        }
    }

    /// `context.scopes.containsAll(["a"])` holds for `a b` as well.
    fn contains_all(&mut self, operands: &Value, widens: bool) {
        let of_scopes = operands
            .get("left")
            .and_then(chain)
            .is_some_and(|(variable, names)| variable == "context" && names == ["scopes"]);
        if of_scopes && widens {
            self.push(
                Severity::Warning,
                "lint_scopes_contains_all",
                self.policy.place_of("containsAll"),
                "`context.scopes.containsAll(...)` permits more scopes than it lists",
                "turn it round: `[...].containsAll(context.scopes)`, or cap them by `@scopes`",
            );
        }
    }

    /// `*` matches `/` as well.
    fn pattern(&mut self, operands: &Value) {
        let Some(elements) = operands.get("pattern").and_then(Value::as_array) else {
            return;
        };
        let literal = |element: &Value| {
            element
                .get("Literal")
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let mut text = String::new();
        let mut crosses = false;
        for (index, element) in elements.iter().enumerate() {
            match literal(element) {
                Some(part) => text.push_str(&part),
                None => {
                    let is_tree = index + 1 == elements.len() && text.ends_with('/');
                    crosses |= !is_tree;
                    text.push('*');
                }
            }
        }
        let left = operands.get("left").and_then(chain);
        let is_path = left.as_ref().is_some_and(|(variable, names)| {
            variable == "context" && *names == ["request", "path"]
        });
        let is_claim =
            left.is_some_and(|(variable, names)| variable == "principal" && names.len() == 2);
        let has_wildcard = text.contains('*');
        let is_loose = match is_path {
            true => crosses,
            // `repo:acme/*` is every repository and every ref of it.
            false => has_wildcard && text.contains('/') && (crosses || is_claim),
        };
        if is_loose {
            self.push(
                Severity::Warning,
                "lint_wildcard_crosses",
                self.policy.place_of(" like "),
                format!("`*` in `{text}` matches `/` as well"),
                match is_path {
                    true => "end the pattern in `/*` to mean a whole tree, compare the path by `==`, or use the destination's `paths`, where `*` stays within a segment",
                    false => "compare by `==`, or by an id that cannot be renamed",
                },
            );
        }
    }
}

/// The expressions that `&&` joins.
pub(super) fn split_and<'a>(expression: &'a Value, parts: &mut Vec<&'a Value>) {
    match expression.get("&&") {
        Some(operands) => {
            for side in ["left", "right"] {
                if let Some(operand) = operands.get(side) {
                    split_and(operand, parts);
                }
            }
        }
        None => parts.push(expression),
    }
}

/// The string literals of an expression.
fn strings<'a>(expression: &'a Value, found: &mut Vec<&'a str>) {
    match expression {
        Value::Object(object) => {
            for (operator, operand) in object {
                match (operator.as_str(), operand) {
                    ("Value", Value::String(text)) => found.push(text),
                    ("attr", _) => {}
                    _ => strings(operand, found),
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                strings(item, found);
            }
        }
        _ => {}
    }
}
