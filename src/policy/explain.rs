//! Why a decision is what it is: the deciding policies, or the nearest miss with each of its conditions.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use countersign_attestors::{FailureKind, WorkloadFacts};
use serde::{Deserialize, Serialize};

use super::conditions;
use super::decision::{Condition, Decision, Denial, DenialKind};
use super::engine::{LoadedPolicy, PolicyEngine};
use super::principal::Principal;
use super::question::{Action, Question, Resource, UNMATCHED};
use super::ring::RecordedDecision;
use super::source::duration_text;
use super::suggest::{self, Suggestion};

/// A decision, explained. Serialises as `policy explain --output json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The request; `None` for a described one.
    pub request_id: Option<String>,
    /// Whether it was allowed.
    pub allowed: bool,
    /// The refusal's stable code, or `allowed`.
    pub code: String,
    /// Which kind of no.
    pub reason: Option<String>,
    /// What the caller was told; `None` for a yes.
    pub detail: Option<String>,
    /// The version of the policies.
    pub policy_version: String,
    /// The action.
    pub action: Action,
    /// `credential NAME` or `destination NAME`.
    pub resource: String,
    /// The destination.
    pub destination: Option<String>,
    /// `METHOD URL`, without the query.
    pub request: Option<String>,
    /// Who asked.
    pub workload: ExplainedWorkload,
    /// The satisfied permits; where none is, the one that came nearest.
    pub permits: Vec<ExplainedPolicy>,
    /// The satisfied forbids, and those that failed to evaluate.
    pub forbids: Vec<ExplainedPolicy>,
    /// How long a token may be used.
    pub max_lifetime: Option<String>,
    /// The scopes granted.
    pub scopes: Vec<String>,
    /// A policy that would allow exactly this, and its test; where no permit is satisfied.
    pub suggestion: Option<Suggestion>,
}

/// The workload, as far as the policies that apply read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedWorkload {
    /// Attributes by group.
    pub attributes: BTreeMap<String, BTreeMap<String, String>>,
    /// `principal.environment`.
    pub environment: String,
    /// What the attributes rest on.
    pub evidence: Vec<String>,
    /// Issuers of which the policies that apply read a token that was not presented.
    pub not_presented: Vec<String>,
    /// Attestors that failed.
    pub failed_attestors: Vec<ExplainedFailure>,
}

/// An attestor that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedFailure {
    /// Its name.
    pub name: String,
    /// Whether it could not run; else the evidence is wrong.
    pub could_not_run: bool,
    /// Why.
    pub detail: String,
}

/// A policy and its conditions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedPolicy {
    /// Its id.
    pub id: String,
    /// `FILE:LINE:COLUMN`.
    pub location: String,
    /// Each condition, and whether it held.
    pub conditions: Vec<Condition>,
}

/// Explains what the engine decides on a question about a workload with these facts.
pub fn explanation(
    engine: &PolicyEngine,
    facts: &WorkloadFacts,
    question: &Question<'_>,
) -> Explanation {
    explanation_in(engine, facts, None, question)
}

/// As [`explanation`], of a workload whose environment may be given instead of looked up.
pub fn explanation_in(
    engine: &PolicyEngine,
    facts: &WorkloadFacts,
    environment: Option<&str>,
    question: &Question<'_>,
) -> Explanation {
    let principal = Principal::described(facts, environment, engine);
    explanation_for(engine, facts, &principal, question)
}

pub(super) fn explanation_for(
    engine: &PolicyEngine,
    facts: &WorkloadFacts,
    principal: &Principal,
    question: &Question<'_>,
) -> Explanation {
    let decision = engine.evaluate_for(facts, principal, question);
    explain(engine, facts, principal, question, &decision)
}

/// Explains a decision that was made, as it was made: a revocation or an attestation that had ended counts.
pub fn recorded(decision: &RecordedDecision) -> Explanation {
    let engine = &decision.engine;
    let question = decision.question.as_question();
    let principal = Principal::new(&decision.facts, engine);
    let made = match &decision.decision {
        Some(decision) => decision.clone(),
        None => engine.evaluate_for(&decision.facts, &principal, &question),
    };
    let mut explanation = explain(engine, &decision.facts, &principal, &question, &made);
    explanation.request_id = Some(decision.request_id.to_string());
    explanation
}

fn explain(
    engine: &PolicyEngine,
    facts: &WorkloadFacts,
    principal: &Principal,
    question: &Question<'_>,
    decision: &Decision,
) -> Explanation {
    let slice = engine.slice(question);
    let is_whole = question
        .request
        .is_none_or(|request| request.path.whole().is_none());
    // Of a path of which only the beginning is kept conditions would read something else.
    let prepared = slice.filter(|_| is_whole).and_then(|slice| {
        engine
            .prepare(facts, principal, question, &slice.reads)
            .ok()
    });
    let explained = |id: &Arc<str>| -> Option<ExplainedPolicy> {
        let policy: &LoadedPolicy = slice?.policies.iter().find(|policy| policy.id == *id)?;
        Some(ExplainedPolicy {
            id: policy.id.to_string(),
            location: policy.location.clone(),
            conditions: match is_whole {
                true => conditions::evaluate(policy, prepared.as_ref()?, question),
                false => Vec::new(),
            },
        })
    };
    let mut explanation = Explanation {
        request_id: None,
        allowed: false,
        code: "allowed".to_owned(),
        reason: None,
        detail: None,
        policy_version: engine.version().to_string(),
        action: question.action,
        resource: match question.resource {
            Resource::Credential { credential, .. } => format!("credential {}", credential.name),
            Resource::Destination(destination) => format!("destination {}", destination.name),
            Resource::Unmatched => format!("destination {UNMATCHED}"),
        },
        destination: question
            .destination
            .map(|destination| destination.name.to_string()),
        request: question.request.map(|request| {
            format!(
                "{} {}://{}{}",
                request.method,
                request.scheme.as_str(),
                request.target.to_authority(request.scheme),
                crate::request::printable(request.path.as_str())
            )
        }),
        workload: describe(engine, facts, principal, question),
        permits: Vec::new(),
        forbids: Vec::new(),
        max_lifetime: None,
        scopes: Vec::new(),
        suggestion: None,
    };
    match decision {
        Decision::Allow(permission) => {
            explanation.allowed = true;
            explanation.permits = permission.policies.iter().filter_map(explained).collect();
            explanation.max_lifetime = permission.max_lifetime.map(duration_text);
            explanation.scopes = permission.scopes.to_vec();
        }
        Decision::Deny(denial) => {
            let refusal = denial.to_refusal(question);
            explanation.code = refusal.code.as_str().to_owned();
            explanation.reason = Some(denial.kind.as_str().to_owned());
            explanation.detail = Some(match refusal.internal {
                Some(internal) => format!("{}: {internal}", refusal.detail),
                None => refusal.detail,
            });
            if denial.kind == DenialKind::NoPermit && is_whole {
                explanation.suggestion = Some(suggest::suggestion(facts, question));
            }
            explanation.forbids = denial.policies.iter().filter_map(explained).collect();
            explanation.permits = match &denial.nearest {
                Some(nearest) => vec![ExplainedPolicy {
                    id: nearest.policy.to_string(),
                    location: nearest.location.clone(),
                    conditions: nearest.conditions.clone(),
                }],
                None => nearest_of(engine, denial, question, prepared.as_ref()),
            };
        }
    }
    explanation
}

/// The nearest permit where the denial did not look for one: evidence was missing.
fn nearest_of(
    engine: &PolicyEngine,
    denial: &Denial,
    question: &Question<'_>,
    prepared: Option<&super::engine::Prepared>,
) -> Vec<ExplainedPolicy> {
    if !matches!(denial.kind, DenialKind::PresentedEvidenceRequired { .. }) {
        return Vec::new();
    }
    let nearest = engine
        .slice(question)
        .zip(prepared)
        .and_then(|(slice, prepared)| conditions::nearest_miss(slice, prepared, question));
    nearest
        .map(|nearest| ExplainedPolicy {
            id: nearest.policy.to_string(),
            location: nearest.location,
            conditions: nearest.conditions,
        })
        .into_iter()
        .collect()
}

fn describe(
    engine: &PolicyEngine,
    facts: &WorkloadFacts,
    principal: &Principal,
    question: &Question<'_>,
) -> ExplainedWorkload {
    let read = engine.attributes_read_for(question);
    let mut attributes: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (group, values) in &facts.groups {
        for (name, value) in values {
            let names_the_workload = matches!(
                (group.as_str(), name.as_str()),
                ("unix", "uid" | "executable") | ("systemd", "system_unit") | (_, "sub")
            );
            if names_the_workload || read.contains(&(group.clone(), name.clone())) {
                attributes
                    .entry(group.clone())
                    .or_default()
                    .insert(name.clone(), value.to_string());
            }
        }
    }
    ExplainedWorkload {
        attributes,
        environment: principal.environment.to_string(),
        evidence: facts.evidence.clone(),
        not_presented: engine
            .issuer_groups()
            .iter()
            .filter(|issuer| !facts.groups.contains_key(*issuer))
            .cloned()
            .collect(),
        failed_attestors: facts
            .failed_attestors
            .iter()
            .map(|failed| ExplainedFailure {
                name: failed.name.clone(),
                could_not_run: failed.kind == FailureKind::CouldNotRun,
                detail: failed.detail.clone(),
            })
            .collect(),
    }
}

impl Explanation {
    /// The name of what decided or came nearest, for a log line.
    pub fn nearest(&self) -> Option<&str> {
        self.permits.first().map(|policy| policy.id.as_str())
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let _infallible = self.write_text(&mut text);
        text
    }

    fn write_text(&self, text: &mut String) -> std::fmt::Result {
        let outcome = if self.allowed { "allowed" } else { "denied" };
        write!(text, "{outcome}")?;
        if !self.allowed {
            write!(text, "  {}", self.code)?;
        }
        writeln!(
            text,
            "  policy version {}  {}",
            self.policy_version, self.resource
        )?;
        if let Some(request) = &self.request {
            writeln!(text, "  request    {request}")?;
        }
        writeln!(text, "  workload   {}", self.workload.line())?;
        for failed in &self.workload.failed_attestors {
            let how = match failed.could_not_run {
                true => "could not run",
                false => "invalid evidence",
            };
            writeln!(
                text,
                "  attestor   {} {how}: {}",
                failed.name, failed.detail
            )?;
        }
        match self.permits.as_slice() {
            [] => writeln!(text, "  permit     {}", self.no_permit())?,
            permits => {
                for permit in permits {
                    write_policy(text, "permit", permit)?;
                }
            }
        }
        match self.forbids.as_slice() {
            [] => writeln!(text, "  forbid     none matched")?,
            forbids => {
                for forbid in forbids {
                    write_policy(text, "forbid", forbid)?;
                }
            }
        }
        if let Some(lifetime) = &self.max_lifetime {
            writeln!(text, "  lifetime   at most {lifetime}")?;
        }
        if !self.scopes.is_empty() {
            writeln!(text, "  scopes     {}", self.scopes.join(" "))?;
        }
        if self
            .reason
            .as_deref()
            .is_some_and(|reason| reason != "no_permit")
            && let Some(detail) = &self.detail
        {
            writeln!(text, "  cause      {detail}")?;
        }
        if self.suggestion.is_some()
            && let Some(id) = &self.request_id
        {
            writeln!(
                text,
                "  to allow exactly this, with its test: countersign policy explain {id} --suggest"
            )?;
        }
        Ok(())
    }

    fn no_permit(&self) -> &'static str {
        match self.reason.as_deref() {
            Some("no_permit") => "none is for this resource",
            _ => "not evaluated",
        }
    }
}

impl ExplainedWorkload {
    fn line(&self) -> String {
        let mut parts: Vec<String> = self
            .attributes
            .iter()
            .map(|(group, attributes)| {
                let mut part = group.clone();
                for (name, value) in attributes {
                    part.push_str(&format!(" {name}={value}"));
                }
                part
            })
            .collect();
        if parts.is_empty() {
            parts.push("nothing attested".to_owned());
        }
        parts.push(format!("environment: {}", self.environment));
        if !self.evidence.is_empty() {
            parts.push(format!("evidence: {}", self.evidence.join(", ")));
        }
        if !self.not_presented.is_empty() {
            parts.push(format!("not presented: {}", self.not_presented.join(", ")));
        }
        parts.join("   ")
    }
}

fn write_policy(text: &mut String, effect: &str, policy: &ExplainedPolicy) -> std::fmt::Result {
    writeln!(text, "  {effect:<9}  {}  {}", policy.id, policy.location)?;
    let width = policy
        .conditions
        .iter()
        .map(|condition| condition.text.chars().count())
        .filter(|width| *width <= 60)
        .max()
        .unwrap_or(0);
    for condition in &policy.conditions {
        let holds = if condition.holds { "yes" } else { "no " };
        match &condition.actual {
            Some(actual) => writeln!(text, "     {holds}  {:<width$}  {actual}", condition.text)?,
            None => writeln!(text, "     {holds}  {}", condition.text)?,
        }
    }
    Ok(())
}
