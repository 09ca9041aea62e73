//! The single conditions of a policy, each evaluated for itself: the nearest miss and `explain`.

use std::sync::Arc;

use cedar_policy::{Authorizer, Decision, Expression, Policy, PolicySet, eval_expression};
use serde_json::{Value, json};

use super::decision::{Condition, NearestMiss};
use super::engine::{LoadedPolicy, Prepared, Slice};
use super::question::Question;
use super::reads::{Chain, conditions, paths};
use crate::request::beginning;

/// How many permits are compared for the nearest miss of a request: a bound on what a denied caller may cost.
const CANDIDATES: usize = 64;

/// One condition that must hold.
#[derive(Debug)]
pub(super) struct Conjunct {
    /// As Cedar text.
    pub(super) text: String,
    /// A permit with this condition only.
    set: PolicySet,
    paths: Vec<Chain>,
}

impl Conjunct {
    /// Whether it only asks for something to be there.
    fn is_guard_of(&self, other: &Self) -> bool {
        self.paths.len() == 1
            && self.paths.iter().all(|guard| {
                guard.existence
                    && other.paths.iter().any(|path| {
                        path.variable == guard.variable
                            && path.names.starts_with(&guard.names)
                            && (!path.existence || path.names.len() > guard.names.len())
                    })
            })
    }

    pub(super) fn holds(&self, prepared: &Prepared) -> bool {
        Authorizer::new()
            .is_authorized(&prepared.request, &self.set, &prepared.entities)
            .decision()
            == Decision::Allow
    }
}

/// The conditions of a policy, in the order of its text; made once.
pub(super) fn of(policy: &LoadedPolicy) -> &[Conjunct] {
    policy.conditions.get_or_init(|| {
        let mut conjuncts = Vec::new();
        if let Some(scope) = policy.json.get("principal")
            && scope.get("op").and_then(Value::as_str) != Some("All")
        {
            conjuncts.extend(conjunct(scope, None));
        }
        for condition in conditions(&policy.json) {
            let Some(body) = condition.get("body") else {
                continue;
            };
            let is_when = condition.get("kind").and_then(Value::as_str) == Some("when");
            let mut parts = Vec::new();
            split(body, if is_when { "&&" } else { "||" }, &mut parts);
            for part in parts {
                let negated;
                let must_hold = match is_when {
                    true => part,
                    false => {
                        negated = json!({"!": {"arg": part}});
                        &negated
                    }
                };
                conjuncts.extend(conjunct(
                    &json!({"op": "All"}),
                    Some((must_hold, part, is_when)),
                ));
            }
        }
        conjuncts
    })
}

/// What stands between an operator, `&&` or `||`, in an expression, in the order of the text.
fn split<'a>(expression: &'a Value, operator: &str, parts: &mut Vec<&'a Value>) {
    match expression.get(operator) {
        Some(operands) => {
            for side in ["left", "right"] {
                if let Some(operand) = operands.get(side) {
                    split(operand, operator, parts);
                }
            }
        }
        None => parts.push(expression),
    }
}

fn permit_json(principal: &Value, body: Option<&Value>) -> Value {
    json!({
        "effect": "permit",
        "principal": principal,
        "action": {"op": "All"},
        "resource": {"op": "All"},
        "conditions": body.map(|body| json!({"kind": "when", "body": body})).into_iter().collect::<Vec<_>>(),
    })
}

/// A conjunct of a scope, or of `(what must hold, what was written, by when)`.
fn conjunct(principal: &Value, body: Option<(&Value, &Value, bool)>) -> Option<Conjunct> {
    let policy =
        Policy::from_json(None, permit_json(principal, body.map(|(holds, ..)| holds))).ok()?;
    let written = Policy::from_json(
        None,
        permit_json(principal, body.map(|(_, written, _)| written)),
    )
    .ok()?
    .to_cedar()?;
    let text = match body {
        Some((_, _, is_when)) => {
            let text = condition_text(&written)?;
            match is_when {
                true => text,
                false => format!("unless {text}"),
            }
        }
        None => written
            .split_once('(')?
            .1
            .split_once(',')?
            .0
            .trim()
            .to_owned(),
    };
    let paths = body
        .map(|(_, written, _)| paths(written))
        .unwrap_or_default();
    Some(Conjunct {
        text,
        set: PolicySet::from_policies([policy]).ok()?,
        paths,
    })
}

/// The text between the braces of a policy's only condition, on one line.
fn condition_text(policy: &str) -> Option<String> {
    let (_, body) = policy.split_once("when {")?;
    let (body, _) = body.rsplit_once('}')?;
    Some(strip_parentheses(body.trim()).to_owned())
}

/// Without one pair of parentheses around the whole.
fn strip_parentheses(text: &str) -> &str {
    let Some(inner) = text
        .strip_prefix('(')
        .and_then(|rest| rest.strip_suffix(')'))
    else {
        return text;
    };
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut escaped = false;
    for character in inner.chars() {
        match character {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            '(' if !in_string => depth += 1,
            ')' if !in_string => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return text,
            },
            _ => {}
        }
    }
    inner
}

/// Evaluates every condition of a policy, leaving out those that only guard another.
pub(super) fn evaluate(
    policy: &LoadedPolicy,
    prepared: &Prepared,
    question: &Question<'_>,
) -> Vec<Condition> {
    let conjuncts = of(policy);
    let mut conditions: Vec<Condition> = conjuncts
        .iter()
        .enumerate()
        .filter(|(index, conjunct)| {
            !conjuncts
                .iter()
                .enumerate()
                .any(|(other, later)| other > *index && conjunct.is_guard_of(later))
        })
        .map(|(_, conjunct)| {
            let holds = conjunct.holds(prepared);
            Condition {
                text: conjunct.text.clone(),
                holds,
                actual: (!holds)
                    .then(|| actual(conjunct, prepared, question))
                    .flatten(),
            }
        })
        .collect();
    if let Some(expires) = policy.expires
        && expires <= question.wall
    {
        conditions.push(Condition {
            text: "@expires".to_owned(),
            holds: false,
            actual: jiff::Timestamp::try_from(expires)
                .ok()
                .map(|expires| format!("expired at {expires}")),
        });
    }
    conditions
}

/// What the paths of a condition were: `was false (DELETE)`, `not attested`.
fn actual(conjunct: &Conjunct, prepared: &Prepared, question: &Question<'_>) -> Option<String> {
    let mut values = Vec::new();
    for path in &conjunct.paths {
        if path.names.is_empty() {
            continue;
        }
        let text = path.text();
        let value = text
            .parse::<Expression>()
            .ok()
            .and_then(|expression| {
                eval_expression(&prepared.request, &prepared.entities, &expression).ok()
            })
            .map(|value| value.to_string());
        let mut words = match (&value, path.variable.as_str()) {
            (Some(_), _) if path.existence => "was there".to_owned(),
            (Some(value), _) => format!("was {}", beginning(value)),
            (None, "principal") => "not attested".to_owned(),
            (None, _) => "not there".to_owned(),
        };
        if path
            .names
            .iter()
            .map(String::as_str)
            .eq(["request", "safe"])
            && let Some(request) = question.request
        {
            words.push_str(&format!(" ({})", request.method));
        }
        values.push((text, words));
    }
    match values.as_slice() {
        [] => None,
        [(_, words)] => Some(words.clone()),
        several => Some(
            several
                .iter()
                .map(|(text, words)| format!("{text} {words}"))
                .collect::<Vec<_>>()
                .join(", "),
        ),
    }
}

/// The permit of the slice that has the fewest conditions that fail, and of those the most that hold.
pub(super) fn nearest_miss(
    slice: &Slice,
    prepared: &Prepared,
    question: &Question<'_>,
) -> Option<NearestMiss> {
    slice
        .policies
        .iter()
        .filter(|policy| policy.is_permit)
        .take(CANDIDATES)
        .map(|policy| (policy, evaluate(policy, prepared, question)))
        .min_by_key(|(policy, conditions)| {
            let failing = conditions
                .iter()
                .filter(|condition| !condition.holds)
                .count();
            (
                failing,
                std::cmp::Reverse(conditions.len() - failing),
                Arc::clone(&policy.id),
            )
        })
        .map(|(policy, conditions)| NearestMiss {
            policy: Arc::clone(&policy.id),
            location: policy.location.clone(),
            conditions,
        })
}
