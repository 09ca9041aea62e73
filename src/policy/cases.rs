//! `policy test`: cases beside the policies, decided as the agent would decide them, routing included.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{AttributeDeclaration, AttributeValue, WorkloadFacts};
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_saphyr::{Location, Spanned};

use super::conditions;
use super::decision::{Decision, Denial, Permission};
use super::described::{self, Vocabulary};
use super::engine::PolicyEngine;
use super::explain::{self, Explanation};
use super::principal::Principal;
use super::question::{Action, OwnedQuestion, Question, Resource};
use super::selection::{first_permitted, questions, route, unmatched};
use super::source::{PolicyFile, duration, duration_text, files_with_suffix};
use crate::config::{Config, Unmatched};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};
use crate::request::EgressRequest;
use crate::routing::{Route, Routes};

/// `by` of a request that no destination covers; the refusal's code.
const NOT_CONFIGURED: &str = "destination_not_configured";

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseFile {
    workloads: BTreeMap<String, Spanned<BTreeMap<String, Part>>>,
    tests: Vec<Spanned<Case>>,
}

/// A part of a workload: a group of attributes, or its environment.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Part {
    Group(BTreeMap<String, AttributeValue>),
    Text(String),
    Other(serde::de::IgnoredAny),
}

/// One case.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// One of the file's workloads.
    #[serde(rename = "as")]
    workload: String,
    /// Attributes that differ, by `GROUP.NAME`; `null` takes one away.
    #[serde(default)]
    with: BTreeMap<String, Option<AttributeValue>>,
    /// `METHOD URL`.
    request: Option<String>,
    /// A credential of which a token is asked for, instead of a request.
    issue: Option<String>,
    /// The scopes asked for by `issue`; the credential's where not written.
    scopes: Option<Vec<String>>,
    /// When, in RFC 3339; now where not written. `context.local` is in UTC.
    at: Option<String>,
    /// Attestors that could not run.
    #[serde(default)]
    failed_attestors: Vec<String>,
    expect: Expectation,
    /// A deciding policy, or the kind of no.
    by: Option<String>,
    max_lifetime: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Expectation {
    Allow,
    Deny,
}

/// What came of all cases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Each case, in the order of the files.
    pub cases: Vec<CaseResult>,
    /// How many passed.
    pub passed: usize,
    /// How many did not.
    pub failed: usize,
    /// What no case exercised.
    pub uncovered: Vec<Uncovered>,
}

/// What came of one case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaseResult {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The workload's name.
    #[serde(rename = "as")]
    pub workload: String,
    /// What was asked.
    pub request: String,
    /// Whether it is as expected.
    pub passed: bool,
    /// What was expected.
    pub expected: String,
    /// What was decided.
    pub actual: String,
    /// Why, where it is not as expected.
    pub explanation: Option<Explanation>,
}

/// A policy that decided no case, or a condition that was never seen one way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Uncovered {
    /// The policy's id.
    pub policy: String,
    /// Where it stands.
    pub location: String,
    /// The condition; `None` where the policy as a whole decided nothing.
    pub condition: Option<String>,
    /// What did not happen.
    pub missing: String,
}

/// Runs the cases of `files`, or of every `*.test.yaml` beside the policies if there are none named.
///
/// # Errors
/// Everything wrong with the files: a case that cannot be read is not a case that failed.
pub fn run(
    config: &Config,
    declarations: &[AttributeDeclaration],
    engine: PolicyEngine,
    files: &[PathBuf],
) -> Result<Report, Diagnostics> {
    let named = files;
    let files = read(config, named)?;
    let mut tester = Tester {
        config,
        vocabulary: Vocabulary(declarations),
        engine: engine.in_time_zone(TimeZone::UTC),
        routes: Routes::new(config),
        diagnostics: Diagnostics::new(),
        coverage: Coverage::default(),
    };
    let mut cases = Vec::new();
    for file in &files {
        tester.diagnostics.add_source(&file.path, &file.text);
        tester.run_file(file, &mut cases);
    }
    if tester.diagnostics.has_errors() {
        return Err(tester.diagnostics);
    }
    // What tests nothing would pass for ever.
    if cases.is_empty() {
        let place = named.first().unwrap_or(&config.policy_directory);
        let detail = match named {
            [] => "no `*.test.yaml` in the policy directory has a case",
            _ => "the files that are named have no case",
        };
        return Err(Diagnostic::error("no_policy_test", place, detail)
            .next("write cases beside the policies, or name the files that have them")
            .into());
    }
    let passed = cases.iter().filter(|case| case.passed).count();
    Ok(Report {
        passed,
        failed: cases.len() - passed,
        uncovered: tester.coverage.uncovered(&tester.engine),
        cases,
    })
}

fn read(config: &Config, paths: &[PathBuf]) -> Result<Vec<PolicyFile>, Diagnostics> {
    let unreadable = |path: &Path, error: std::io::Error| {
        let mut diagnostics = Diagnostics::new();
        diagnostics.push(Diagnostic::error(
            "policy_test_unreadable",
            path,
            format!("tests cannot be read: {error}"),
        ));
        diagnostics
    };
    if paths.is_empty() {
        return files_with_suffix(&config.policy_directory, ".test.yaml")
            .map_err(|error| unreadable(&config.policy_directory, error));
    }
    paths
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
            Ok(PolicyFile {
                path: path.clone(),
                text,
            })
        })
        .collect()
}

struct Tester<'a> {
    config: &'a Config,
    vocabulary: Vocabulary<'a>,
    engine: PolicyEngine,
    routes: Routes,
    diagnostics: Diagnostics,
    coverage: Coverage,
}

/// A workload of a file.
#[derive(Clone)]
struct Described {
    facts: WorkloadFacts,
    environment: Option<String>,
}

/// What a case asks.
enum Asked {
    Request(Arc<EgressRequest>),
    Issue {
        credential: Arc<crate::config::CredentialConfig>,
        scopes: Arc<[String]>,
    },
}

/// What was decided, and the question that decided it; none where no destination covers the request.
enum Answer {
    Allow(Arc<Permission>, OwnedQuestion),
    Deny(Arc<Denial>, OwnedQuestion),
    NotConfigured,
}

impl Tester<'_> {
    fn run_file(&mut self, file: &PolicyFile, results: &mut Vec<CaseResult>) {
        let options = serde_saphyr::options! {
            strict_booleans: true,
            with_snippet: false
        };
        let parsed: CaseFile = match serde_saphyr::from_str_with_options(&file.text, options) {
            Ok(parsed) => parsed,
            Err(error) => {
                let rendered = error.to_string();
                let message = rendered
                    .rfind(" at line ")
                    .and_then(|end| rendered.get(..end))
                    .unwrap_or(&rendered);
                let mut diagnostic = Diagnostic::error("policy_test_syntax", &file.path, message)
                    .next("`docs/policies.md` shows the form of a test");
                diagnostic.span = error.location().map(|location| span(location, &file.text));
                self.diagnostics.push(diagnostic);
                return;
            }
        };
        let mut workloads = BTreeMap::new();
        for (name, parts) in parsed.workloads {
            let place = span(parts.referenced, &file.text);
            match self.workload(parts.value) {
                Ok(workload) => {
                    workloads.insert(name, workload);
                }
                Err(message) => self.problem(file, place, format!("workload `{name}`: {message}")),
            }
        }
        for case in parsed.tests {
            let place = span(case.referenced, &file.text);
            match self.run_case(&workloads, &case.value) {
                Ok(result) => {
                    let line = crate::diagnostics::position(&file.text, place.start).line;
                    results.push(CaseResult {
                        file: file.path.clone(),
                        line,
                        ..result
                    });
                }
                Err(message) => self.problem(file, place, message),
            }
        }
    }

    fn problem(&mut self, file: &PolicyFile, place: Range<usize>, message: String) {
        self.diagnostics
            .push(Diagnostic::error("policy_test_invalid", &file.path, message).at(place));
    }

    fn workload(&self, parts: BTreeMap<String, Part>) -> Result<Described, String> {
        let mut described = Described {
            facts: WorkloadFacts::default(),
            environment: None,
        };
        for (group, part) in parts {
            match part {
                Part::Text(environment) if group == "environment" => {
                    described.environment = Some(environment);
                }
                Part::Text(_) | Part::Other(_) => {
                    return Err(format!(
                        "`{group}` is not a group of attributes, each a string, a whole number, true, false or a list of strings"
                    ));
                }
                Part::Group(attributes) => {
                    // A group may be attested with nothing in it.
                    described.facts.groups.entry(group.clone()).or_default();
                    for (name, value) in attributes {
                        self.vocabulary
                            .set(&mut described.facts, &group, &name, value)?;
                    }
                }
            }
        }
        Ok(described)
    }

    fn run_case(
        &mut self,
        workloads: &BTreeMap<String, Described>,
        case: &Case,
    ) -> Result<CaseResult, String> {
        let mut workload = workloads.get(&case.workload).cloned().ok_or_else(|| {
            let mut message = format!("no workload is named `{}`", case.workload);
            if let Some(suggestion) =
                did_you_mean(&case.workload, workloads.keys().map(String::as_str))
            {
                message.push_str(&format!(" ({suggestion})"));
            }
            message
        })?;
        self.change(&mut workload, &case.with)?;
        for attestor in &case.failed_attestors {
            described::fail_attestor(&mut workload.facts, attestor);
        }
        let wall = match &case.at {
            Some(text) => text
                .parse::<jiff::Timestamp>()
                .map(SystemTime::from)
                .map_err(|_| format!("`{text}` is not a time, as in `2026-12-31T00:00:00Z`"))?,
            None => SystemTime::now(),
        };
        let expected_lifetime = match &case.max_lifetime {
            Some(text) => Some(
                duration(text).ok_or_else(|| format!("`{text}` is not a duration, as in `10m`"))?,
            ),
            None => None,
        };
        let asked = self.asked(case)?;
        let principal = Principal::described(
            &workload.facts,
            workload.environment.as_deref(),
            &self.engine,
        );
        let answer = self.ask(&asked, &workload.facts, &principal, wall)?;

        let passed = matches(case, expected_lifetime, &answer);
        let explanation = match (&answer, passed) {
            (_, true) | (Answer::NotConfigured, _) => None,
            (Answer::Allow(_, question) | Answer::Deny(_, question), false) => {
                Some(explain::explanation_for(
                    &self.engine,
                    &workload.facts,
                    &principal,
                    &question.as_question(),
                ))
            }
        };
        Ok(CaseResult {
            file: PathBuf::new(),
            line: 0,
            workload: case.workload.clone(),
            request: match (&case.request, &case.issue) {
                (Some(request), _) => request.clone(),
                (None, Some(credential)) => format!("issue {credential}"),
                (None, None) => String::new(),
            },
            passed,
            expected: expected(case),
            actual: actual(&answer),
            explanation,
        })
    }

    fn change(
        &self,
        workload: &mut Described,
        with: &BTreeMap<String, Option<AttributeValue>>,
    ) -> Result<(), String> {
        for (attribute, value) in with {
            match (attribute.split_once('.'), value) {
                (Some((group, name)), Some(value)) => {
                    self.vocabulary
                        .set(&mut workload.facts, group, name, value.clone())?;
                }
                (Some((group, name)), None) => {
                    if let Some(attributes) = workload.facts.groups.get_mut(group) {
                        attributes.remove(name);
                    }
                }
                (None, Some(value)) if attribute == "environment" => {
                    workload.environment = Some(value.to_string());
                }
                (None, None) if attribute == "environment" => workload.environment = None,
                (None, None) => {
                    workload.facts.groups.remove(attribute);
                }
                (None, Some(_)) => return Err(format!("`{attribute}` is not `GROUP.NAME`")),
            }
        }
        Ok(())
    }

    fn asked(&self, case: &Case) -> Result<Asked, String> {
        match (&case.request, &case.issue) {
            (Some(request), None) => match case.scopes {
                Some(_) => {
                    Err("`scopes` belongs to `issue`; a request's are its destination's".to_owned())
                }
                None => Ok(Asked::Request(Arc::new(described::request(request)?))),
            },
            (None, Some(name)) => {
                let credential = self
                    .config
                    .credentials
                    .iter()
                    .find(|credential| *credential.name == **name)
                    .ok_or_else(|| {
                        let names = self.config.credentials.iter().map(|known| &*known.name);
                        let mut message =
                            format!("credential `{name}` is not in the configuration");
                        if let Some(suggestion) = did_you_mean(name, names) {
                            message.push_str(&format!(" ({suggestion})"));
                        }
                        message
                    })?;
                let crate::config::TokenSource::OauthClientCredentials(settings) =
                    &credential.source;
                Ok(Asked::Issue {
                    scopes: case
                        .scopes
                        .clone()
                        .map_or_else(|| Arc::clone(&settings.scopes), Arc::from),
                    credential: Arc::clone(credential),
                })
            }
            (Some(_), Some(_)) | (None, None) => {
                Err("a test has either `request` or `issue`".to_owned())
            }
        }
    }

    /// Routes and decides, as the proxy does.
    fn ask(
        &mut self,
        asked: &Asked,
        facts: &WorkloadFacts,
        principal: &Principal,
        wall: SystemTime,
    ) -> Result<Answer, String> {
        let engine = &self.engine;
        let coverage = &mut self.coverage;
        let mut decide = |question: &Question<'_>| {
            coverage.observe(engine, facts, principal, question);
            match engine.evaluate_for(facts, principal, question) {
                Decision::Allow(permission) => Ok(permission),
                Decision::Deny(denial) => Err(denial),
            }
        };
        let mut decide_one = |question: Question<'_>| match decide(&question) {
            Ok(permission) => Answer::Allow(permission, question.to_owned()),
            Err(denial) => Answer::Deny(denial, question.to_owned()),
        };
        match asked {
            Asked::Issue { credential, scopes } => Ok(decide_one(Question {
                action: Action::Issue,
                resource: Resource::Credential {
                    credential,
                    scopes,
                    audience: None,
                },
                destination: None,
                request: None,
                wall,
            })),
            Asked::Request(request) => match route(&self.routes, request) {
                Route::Destination(destination) => {
                    let asking = questions(destination, Some(request), wall);
                    match first_permitted(asking, decide) {
                        Ok((permission, question, _)) => {
                            Ok(Answer::Allow(permission, question.to_owned()))
                        }
                        Err(Some(refused)) => {
                            Ok(Answer::Deny(refused.denial, refused.question.to_owned()))
                        }
                        Err(None) => Ok(Answer::NotConfigured),
                    }
                }
                Route::Unmatched(Unmatched::Tunnel) => {
                    Ok(decide_one(unmatched(Some(request), wall)))
                }
                Route::NotCovered(_) | Route::Unmatched(Unmatched::Refuse) => {
                    Ok(Answer::NotConfigured)
                }
            },
        }
    }
}

fn matches(case: &Case, expected_lifetime: Option<Duration>, answer: &Answer) -> bool {
    let by = |policies: &[Arc<str>], kind: Option<&str>| {
        case.by
            .as_deref()
            .is_none_or(|by| kind == Some(by) || policies.iter().any(|policy| **policy == *by))
    };
    match answer {
        Answer::Allow(permission, _) => {
            case.expect == Expectation::Allow
                && by(&permission.policies, None)
                && expected_lifetime
                    .is_none_or(|expected| permission.max_lifetime == Some(expected))
        }
        Answer::Deny(denial, _) => {
            case.expect == Expectation::Deny && by(&denial.policies, Some(denial.kind.as_str()))
        }
        Answer::NotConfigured => case.expect == Expectation::Deny && by(&[], Some(NOT_CONFIGURED)),
    }
}

fn expected(case: &Case) -> String {
    let mut text = match case.expect {
        Expectation::Allow => "allow".to_owned(),
        Expectation::Deny => "deny".to_owned(),
    };
    if let Some(by) = &case.by {
        text.push_str(&format!(" by {by}"));
    }
    if let Some(lifetime) = &case.max_lifetime {
        text.push_str(&format!(", max_lifetime {lifetime}"));
    }
    text
}

fn actual(answer: &Answer) -> String {
    let names = |policies: &[Arc<str>]| policies.join(", ");
    match answer {
        Answer::Allow(permission, _) => {
            let mut text = format!("allow by {}", names(&permission.policies));
            if let Some(lifetime) = permission.max_lifetime {
                text.push_str(&format!(", max_lifetime {}", duration_text(lifetime)));
            }
            text
        }
        Answer::Deny(denial, _) if denial.policies.is_empty() => {
            format!("deny by {}", denial.kind.as_str())
        }
        Answer::Deny(denial, _) => {
            format!(
                "deny by {} ({})",
                names(&denial.policies),
                denial.kind.as_str()
            )
        }
        Answer::NotConfigured => format!("deny by {NOT_CONFIGURED}"),
    }
}

/// Which policies decided, and which conditions were seen to hold and to fail.
#[derive(Debug, Default)]
struct Coverage {
    deciding: BTreeSet<Arc<str>>,
    conditions: BTreeMap<(Arc<str>, String), Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    held: bool,
    failed: bool,
}

impl Coverage {
    fn observe(
        &mut self,
        engine: &PolicyEngine,
        facts: &WorkloadFacts,
        principal: &Principal,
        question: &Question<'_>,
    ) {
        let Some(slice) = engine.slice(question) else {
            return;
        };
        match engine.evaluate_for(facts, principal, question) {
            Decision::Allow(permission) => {
                self.deciding.extend(permission.policies.iter().cloned())
            }
            Decision::Deny(denial) => self.deciding.extend(denial.policies.iter().cloned()),
        }
        let Ok(prepared) = engine.prepare(facts, principal, question, &slice.reads) else {
            return;
        };
        for policy in slice.in_force(question.wall) {
            for condition in conditions::evaluate(policy, &prepared, question) {
                let seen = self
                    .conditions
                    .entry((Arc::clone(&policy.id), condition.text))
                    .or_default();
                seen.held |= condition.holds;
                seen.failed |= !condition.holds;
            }
        }
    }

    fn uncovered(&self, engine: &PolicyEngine) -> Vec<Uncovered> {
        let mut uncovered = Vec::new();
        for (id, location) in engine.policies() {
            let missing = |condition: Option<&String>, missing: &str| Uncovered {
                policy: id.to_owned(),
                location: location.to_owned(),
                condition: condition.cloned(),
                missing: missing.to_owned(),
            };
            if !self.deciding.contains(id) {
                uncovered.push(missing(None, "no case is decided by it"));
                continue;
            }
            let of_policy = self
                .conditions
                .iter()
                .filter(|((policy, _), _)| **policy == *id);
            for ((_, condition), seen) in of_policy {
                if !seen.held {
                    uncovered.push(missing(Some(condition), "it holds in no case"));
                } else if !seen.failed {
                    uncovered.push(missing(Some(condition), "it fails in no case"));
                }
            }
        }
        uncovered
    }
}

impl Report {
    /// For a terminal.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            let place = format!("{}:{}", case.file.display(), case.line);
            let result = if case.passed { "ok    " } else { "FAILED" };
            text.push_str(&format!(
                "{result}  {place}  {} {}  {}\n",
                case.workload, case.request, case.actual
            ));
            if !case.passed {
                text.push_str(&format!("        expected {}\n", case.expected));
                if let Some(explanation) = &case.explanation {
                    for line in explanation.to_text().lines() {
                        text.push_str(&format!("        {line}\n"));
                    }
                }
            }
        }
        text.push_str(&format!("{} passed, {} failed\n", self.passed, self.failed));
        if !self.uncovered.is_empty() {
            text.push_str("not exercised:\n");
        }
        for uncovered in &self.uncovered {
            let what = match &uncovered.condition {
                Some(condition) => format!("`{condition}` of {}", uncovered.policy),
                None => uncovered.policy.clone(),
            };
            text.push_str(&format!(
                "  {what}  {}: {}\n",
                uncovered.location, uncovered.missing
            ));
        }
        text
    }
}

/// The byte range of a YAML value.
fn span(location: Location, text: &str) -> Range<usize> {
    let span = location.span();
    let start = match span.byte_offset() {
        Some(offset) => usize::try_from(offset).unwrap_or(usize::MAX),
        None => {
            let characters = usize::try_from(span.offset()).unwrap_or(usize::MAX);
            text.char_indices()
                .nth(characters)
                .map_or(text.len(), |(index, _)| index)
        }
    };
    let length = usize::try_from(span.byte_len().unwrap_or(0)).unwrap_or(0);
    start..start.saturating_add(length)
}
