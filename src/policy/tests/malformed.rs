//! Policies that must not load, and those that load with a warning: each with its code, place and words.

use std::collections::BTreeSet;

use super::*;
use crate::counts::reached_in;
use crate::diagnostics::{Position, Severity};

/// One of `tests/corpora/policies/*.txt`: `### name`, `>>> code line:column words`, and the policy.
struct Case {
    name: String,
    policy: String,
    code: String,
    position: Position,
    words: String,
}

fn cases(corpus: &str) -> Vec<Case> {
    let cases: Vec<Case> = corpus
        .split("### ")
        .skip(1)
        .map(|case| {
            let (name, rest) = case.split_once('\n').unwrap();
            let (expected, policy) = rest.split_once('\n').unwrap();
            let mut fields = expected.strip_prefix(">>> ").unwrap().splitn(3, ' ');
            let code = fields.next().unwrap().to_owned();
            let (line, column) = fields.next().unwrap().split_once(':').unwrap();
            Case {
                name: name.to_owned(),
                policy: policy.trim_end().to_owned(),
                code,
                position: Position {
                    line: line.parse().unwrap(),
                    column: column.parse().unwrap(),
                },
                words: fields.next().unwrap().to_owned(),
            }
        })
        .collect();
    cases
}

#[derive(Debug, PartialEq, Eq)]
struct Problem {
    code: &'static str,
    severity: Severity,
    position: Option<Position>,
    /// `message (next)`.
    words: String,
}

fn problems(text: &str) -> Vec<Problem> {
    let fixture = Fixture::new();
    let diagnostics = match fixture.load(text) {
        Ok((_, warnings)) => warnings,
        Err(diagnostics) => diagnostics,
    };
    diagnostics
        .iter()
        .map(|diagnostic| Problem {
            code: diagnostic.code,
            severity: diagnostic.severity,
            position: diagnostics.position(diagnostic),
            words: format!(
                "{} ({})",
                diagnostic.message,
                diagnostic.next.as_deref().unwrap_or_default()
            ),
        })
        .collect()
}

/// Checks every case, and compares how many there are, and of how many codes, with the figures that are held.
fn check(corpus: &str, severity: Severity, name: &str) {
    assert_eq!(problems(READS_ORDERS), [], "the good policy has no problem");
    let cases = cases(corpus);
    let mut wrong = Vec::new();
    for case in &cases {
        let found = problems(&case.policy);
        let expected = found.iter().any(|problem| {
            problem.code == case.code
                && problem.severity == severity
                && problem.position == Some(case.position)
                && problem.words.contains(&case.words)
        });
        if !expected {
            wrong.push(format!(
                "{}: expected {} {:?} `{}`\n   found {found:?}",
                case.name, case.code, case.position, case.words
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
    assert_eq!(problems(READS_ORDERS), [], "the good policy has no problem");
    let codes: BTreeSet<&str> = cases.iter().map(|case| case.code.as_str()).collect();
    reached_in("corpora", name, cases.len());
    reached_in("corpora", &format!("{name}_codes"), codes.len());
}

#[test]
fn malformed_policies_are_refused_in_their_place() {
    let corpus = include_str!("../../../tests/corpora/policies/errors.txt");
    check(corpus, Severity::Error, "malformed_policies");
}

#[test]
fn policies_that_mean_something_else_are_warned_of() {
    let corpus = include_str!("../../../tests/corpora/policies/warnings.txt");
    check(corpus, Severity::Warning, "policies_warned_of");
}

#[test]
fn policies_that_mean_what_they_say_load_without_a_word() {
    let corpus = include_str!("../../../tests/corpora/policies/good.txt");
    let policies: Vec<&str> = corpus.split("###\n").collect();
    reached_in("corpora", "good_policies", policies.len());
    for policy in policies {
        assert_eq!(problems(policy), [], "{policy}");
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let found = problems(
        "permit (principal, action, resource) when { principal has unix };\n\
         this is no policy;\n\
         @id(\"b\") permit (principal, action, resource == Credential::\"x\") when { principal has unix };\n\
         @id(\"c\") forbid (principal, action, resource) unless { principal has unxi };\n",
    );
    let told: Vec<(&str, usize)> = found
        .iter()
        .map(|problem| (problem.code, problem.position.unwrap().line))
        .collect();
    assert_eq!(
        told,
        [
            ("policy_id_missing", 1),
            ("policy_syntax", 2),
            ("policy_name_unknown", 3),
            ("policy_attribute_unknown", 4)
        ]
    );
}

#[test]
fn a_missing_directory_is_an_error_and_an_empty_one_a_warning() {
    let fixture = Fixture::new();
    let (_, warnings) = PolicyEngine::load(&fixture.config, &fixture.declarations).unwrap();
    assert!(warnings.to_string().contains("everything is denied"));
    std::fs::remove_dir(fixture.directory.path().join("policies")).unwrap();
    let diagnostics = PolicyEngine::load(&fixture.config, &fixture.declarations).unwrap_err();
    assert!(diagnostics.to_string().contains("cannot be read"));
}

#[test]
fn what_is_asked_of_cedar_fits_the_schema() {
    let fixture = Fixture::new();
    let cedar_schema = crate::policy::schema::parse(&fixture.declarations).unwrap();
    let engine = fixture.engine(
        "@id(\"a\") permit (principal, action, resource) when { principal has unix && context.time > datetime(\"2026-01-01\") && context.local.hour > 0 };",
    );
    let mut all = orders();
    for (group, name, value) in [
        ("ci", "iss", "https://ci.example.com"),
        ("ci", "sub", "job"),
        ("ci", "repository_id", "7"),
        ("labels", "app", "orders"),
    ] {
        all.groups
            .entry(group.to_owned())
            .or_default()
            .insert(name.to_owned(), text(value));
    }
    let request = request("GET https://orders.example.com/v1/orders");
    let question = fixture.inject("orders-api", &[], &request);
    let principal = crate::policy::principal::Principal::new(&all, &engine);
    let everything = engine
        .slice(&question)
        .unwrap()
        .reads
        .with_the_whole_context();
    let prepared = engine
        .prepare(&all, &principal, &question, &everything)
        .unwrap();
    cedar_policy::Entities::from_entities(prepared.entities.iter().cloned(), Some(&cedar_schema))
        .unwrap();
    cedar_policy::Request::new(
        prepared.request.principal().unwrap().clone(),
        prepared.request.action().unwrap().clone(),
        prepared.request.resource().unwrap().clone(),
        prepared.request.context().unwrap().clone(),
        Some(&cedar_schema),
    )
    .unwrap();
}

#[test]
fn a_comment_ends_where_it_does_for_cedar() {
    let fixture = Fixture::new();
    let permit = "@id(\"some\") permit (principal, action, resource) when { principal has unix };";
    let text = format!("// a note\r@id(\"none\") forbid (principal, action, resource);\n{permit}");
    let (engine, _) = fixture.load(&text).unwrap();
    let ids: Vec<&str> = engine.policies().map(|(id, _)| id).collect();
    assert_eq!(ids, ["none", "some"]);
}

/// Deep nesting must end in a diagnostic, never in a stack overflow: a reload reads what anybody wrote.
#[test]
fn nesting_is_bounded() {
    let permit = |condition: String| {
        format!(
            "@id(\"a\") permit (principal, action, resource) when {{ principal has unix && {condition} }};"
        )
    };
    let mut passed = 0;
    for depth in [10, 50, 100, 160, 180, 240, 330, 490, 900, 990, 20_000] {
        for (name, text) in [
            (
                "parentheses",
                permit(format!("{}true{}", "(".repeat(depth), ")".repeat(depth))),
            ),
            (
                "and",
                permit(vec!["principal.unix.uid != 7"; depth].join(" && ")),
            ),
            (
                "or",
                permit(vec!["principal.unix.uid == 7"; depth].join(" || ")),
            ),
            ("not", permit(format!("{}true", "!".repeat(depth)))),
            (
                "if",
                permit(format!("{}true", "if true then true else ".repeat(depth))),
            ),
            (
                "sets",
                permit(format!("{}1{} == 1", "[".repeat(depth), "]".repeat(depth))),
            ),
            (
                "attributes",
                permit(format!("context{} == 1", ".a".repeat(depth))),
            ),
        ] {
            let fixture = Fixture::new();
            let loaded = fixture.load(&text);
            if depth == 20_000 {
                let diagnostics = loaded.as_ref().unwrap_err().to_string();
                assert!(diagnostics.contains("is the most"), "{name}: {diagnostics}");
            }
            if let Ok((engine, _)) = loaded {
                passed += 1;
                let request = request("GET https://orders.example.com/v1/orders");
                let question = fixture.inject("orders-api", &[], &request);
                engine.evaluate(&stranger(), &question);
                engine.evaluate(&WorkloadFacts::default(), &question);
            }
        }
    }
    assert!(passed >= 4, "{passed} policies of bounded size load");
}
