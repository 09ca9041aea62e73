//! `explain`, suggestions, cases and the files of `policies/`.

use std::path::Path;

use super::*;
use crate::policy::cases::{self, Report};
use crate::policy::explain::{self, Explanation};
use crate::policy::{DecisionRing, RING_CAPACITY};
use crate::request_id::RequestId;

#[test]
fn a_denial_is_explained_by_its_nearest_permit() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        "@id(\"orders-read\")\npermit (principal, action == Action::\"inject\", resource == Credential::\"orders-api\")\nwhen {\n  principal has unix && principal.unix.uid == 1000 &&\n  context has request && context.request.safe\n};\n@id(\"far\") permit (principal, action, resource)\nwhen { principal has unix && principal.unix.uid == 7 && context has request && context.request.path == \"/x\" };",
    );
    let request = request("DELETE https://orders.example.com/v1/orders/7");
    let explanation = explain::explanation(
        &engine,
        &stranger(),
        &fixture.inject("orders-api", &[], &request),
    );
    let version = engine.version();
    assert_eq!(
        explanation.to_text(),
        format!(
            "denied  policy_denied  policy version {version}  credential orders-api
  request    DELETE https://orders.example.com/v1/orders/7
  workload   unix executable=/usr/bin/curl uid=1000   environment: unknown   not presented: ci
  permit     orders-read  policies/test.cedar:2:1
     yes  principal.unix.uid == 1000
     no   context.request.safe        was false (DELETE)
  forbid     none matched
"
        )
    );
    assert_eq!(explanation.nearest(), Some("orders-read"));
    let json = serde_json::to_string(&explanation).unwrap();
    let read: Explanation = serde_json::from_str(&json).unwrap();
    assert_eq!(read, explanation);
}

#[test]
fn evidence_that_is_not_there_is_called_so() {
    let fixture = Fixture::new();
    let engine = fixture.engine(READS_ORDERS);
    let request = request("GET https://orders.example.com/v1/orders");
    let text = explain::explanation(
        &engine,
        &stranger(),
        &fixture.inject("orders-api", &[], &request),
    )
    .to_text();
    assert!(
        text.contains("no   principal.systemd.system_unit == \"orders.service\"  not attested"),
        "{text}"
    );
    let text = explain::explanation(
        &engine,
        &orders(),
        &fixture.inject("orders-api", &[], &request),
    )
    .to_text();
    assert!(text.starts_with("allowed  policy version"), "{text}");
    assert!(text.contains("lifetime   at most 10m"), "{text}");
}

#[test]
fn a_forbid_is_explained_with_its_conditions() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        "@id(\"stop\") forbid (principal, action, resource) when { resource.environment == \"prod\" } unless { principal.environment == \"prod\" || principal has container };",
    );
    let request = request("GET https://orders.example.com/v1/orders");
    let token = facts(&[("ci.sub", text("job"))]);
    let explanation = explain::explanation(
        &engine,
        &token,
        &fixture.inject("orders-api", &[], &request),
    );
    let text = explanation.to_text();
    assert!(
        text.contains("  forbid     stop  policies/test.cedar:1:13"),
        "{text}"
    );
    assert!(
        text.contains("yes  resource.environment == \"prod\""),
        "{text}"
    );
    assert!(
        text.contains("yes  unless principal.environment == \"prod\""),
        "{text}"
    );
    assert!(
        text.contains("cause      policy `stop` forbids this workload"),
        "{text}"
    );
    assert_eq!(explanation.suggestion, None);
}

#[test]
fn a_suggestion_allows_exactly_what_was_denied_and_its_test_passes() {
    let fixture = Fixture::new();
    let request = request("DELETE https://orders.example.com/v1/orders/7?force=1");
    let odd = facts(&[
        ("ci.iss", text("https://ci.example.com")),
        ("ci.sub", text("repo:\"acme\"/app\\x: \u{7f}#")),
    ]);
    for facts in [orders(), stranger(), odd] {
        let inject = fixture.inject("orders-api", &[], &request);
        let issue = Question {
            action: Action::Issue,
            destination: None,
            request: None,
            ..inject
        };
        for question in [inject, issue] {
            let none = fixture.engine("");
            let suggestion = explain::explanation(&none, &facts, &question)
                .suggestion
                .unwrap();
            let (engine, warnings) = fixture.load(&suggestion.policy).unwrap();
            assert!(warnings.is_empty(), "{}", warnings.render(false));
            assert_eq!(outcome(&engine.evaluate(&facts, &question)), "allow");
            assert_ne!(
                outcome(&engine.evaluate(&WorkloadFacts::default(), &question)),
                "allow"
            );
            let report = run_cases(&fixture, &suggestion.policy, &suggestion.test).unwrap();
            assert_eq!(
                (report.passed, report.failed),
                (1, 0),
                "{}",
                report.to_text()
            );
        }
    }
}

fn run_cases(fixture: &Fixture, policies: &str, tests: &str) -> Result<Report, Diagnostics> {
    let file = fixture.directory.path().join("cases.test.yaml");
    std::fs::write(&file, tests).unwrap();
    cases::run(
        &fixture.config,
        &fixture.declarations,
        fixture.engine(policies),
        &[file],
    )
}

const WORKLOADS: &str =
    "workloads:\n  orders: {unix: {uid: 990}, systemd: {system_unit: orders.service}}\ntests:\n";

#[test]
fn the_design_s_cases_pass() {
    let fixture = Fixture::new();
    let tests = r#"
workloads:
  orders: {unix: {uid: 990}, systemd: {system_unit: orders.service}, environment: prod}
tests:
  - {as: orders, request: GET https://orders.example.com/v1/orders, expect: allow, by: orders-service-reads-orders, max_lifetime: 10m}
  - {as: orders, request: DELETE https://orders.example.com/v1/orders/7, expect: deny, by: no_permit}
  - {as: orders, with: {systemd.system_unit: other.service}, request: GET https://orders.example.com/v1/orders, expect: deny}
  - {as: orders, failed_attestors: [systemd], request: GET https://orders.example.com/v1/orders, expect: deny}
"#;
    let report = run_cases(
        &fixture,
        &format!("{READS_ORDERS}{NONPROD_NEVER_PROD}"),
        tests,
    )
    .unwrap();
    assert_eq!(
        (report.passed, report.failed),
        (4, 0),
        "{}",
        report.to_text()
    );
    let uncovered: Vec<(&str, Option<&str>)> = report
        .uncovered
        .iter()
        .map(|uncovered| (uncovered.policy.as_str(), uncovered.condition.as_deref()))
        .collect();
    assert_eq!(uncovered, [("nonprod-never-prod", None)]);
}

#[test]
fn a_case_that_is_not_as_expected_fails_and_says_why() {
    let fixture = Fixture::new();
    for (case, actual) in [
        (
            "request: GET https://orders.example.com/v1/orders, expect: deny",
            "allow by orders-service-reads-orders",
        ),
        (
            "request: GET https://orders.example.com/v1/orders, expect: allow, by: other",
            "allow by orders",
        ),
        (
            "request: GET https://orders.example.com/v1/orders, expect: allow, max_lifetime: 5m",
            "max_lifetime 10m",
        ),
        (
            "request: PUT https://orders.example.com/v1/orders, expect: allow",
            "deny by no_permit",
        ),
        (
            "request: PUT https://orders.example.com/v1/orders, expect: deny, by: forbidden",
            "deny by no_permit",
        ),
        (
            "request: GET https://orders.example.com/v2/orders, expect: allow",
            "destination_not_configured",
        ),
        (
            "request: GET http://orders.example.com/v1/orders, expect: allow",
            "no_permit",
        ),
        (
            "request: GET https://orders.example.com:8443/v1/orders, expect: allow",
            "no_permit",
        ),
        (
            "request: GET https://public.example.com/, expect: allow",
            "deny by no_permit",
        ),
        ("issue: orders-api, expect: allow", "deny by no_permit"),
    ] {
        let report = run_cases(
            &fixture,
            READS_ORDERS,
            &format!("{WORKLOADS}  - {{as: orders, {case}}}\n"),
        )
        .unwrap();
        assert_eq!((report.passed, report.failed), (0, 1), "{case}");
        assert!(
            report.cases[0].actual.contains(actual),
            "{case}: {}",
            report.cases[0].actual
        );
        assert_eq!(report.cases[0].line, 4);
        assert!(report.to_text().contains("FAILED"), "{case}");
    }
}

#[test]
fn a_case_that_cannot_be_read_is_no_case_that_failed() {
    let fixture = Fixture::new();
    for (case, words) in [
        (
            "  - {as: order, request: GET https://a.example/, expect: deny}",
            "no workload is named `order` (did you mean `orders`?)",
        ),
        (
            "  - {as: orders, request: https://a.example/, expect: deny}",
            "is not a method and a URL",
        ),
        (
            "  - {as: orders, request: GET ftp://a.example/, expect: deny}",
            "is not an http or https URL",
        ),
        (
            "  - {as: orders, request: GET https://a@b.example/, expect: deny}",
            "user information",
        ),
        (
            "  - {as: orders, expect: deny}",
            "either `request` or `issue`",
        ),
        (
            "  - {as: orders, request: GET https://a.example/, issue: orders-api, expect: deny}",
            "either `request` or `issue`",
        ),
        (
            "  - {as: orders, issue: order-api, expect: deny}",
            "did you mean `orders-api`?",
        ),
        (
            "  - {as: orders, request: GET https://a.example/, scopes: [a], expect: deny}",
            "`scopes` belongs to `issue`",
        ),
        (
            "  - {as: orders, with: {unix.uidd: 1}, request: GET https://a.example/, expect: deny}",
            "did you mean `unix.uid`?",
        ),
        (
            "  - {as: orders, with: {unix.uid: \"1\"}, request: GET https://a.example/, expect: deny}",
            "is not a whole number",
        ),
        (
            "  - {as: orders, with: {uid: 1}, request: GET https://a.example/, expect: deny}",
            "is not `GROUP.NAME`",
        ),
        (
            "  - {as: orders, at: noon, request: GET https://a.example/, expect: deny}",
            "is not a time",
        ),
        (
            "  - {as: orders, max_lifetime: long, request: GET https://a.example/, expect: allow}",
            "is not a duration",
        ),
        (
            "  - {as: orders, request: GET https://a.example/, expect: maybe}",
            "maybe",
        ),
        (
            "  - {as: orders, request: GET https://a.example/, expect: deny, because: x}",
            "because",
        ),
        (
            "  - {as: orders, request: GET https://a.example/}",
            "expect",
        ),
    ] {
        let diagnostics =
            run_cases(&fixture, READS_ORDERS, &format!("{WORKLOADS}{case}\n")).unwrap_err();
        assert!(
            diagnostics.to_string().contains(words),
            "{case}: {diagnostics}"
        );
        assert!(
            diagnostics
                .iter()
                .all(|diagnostic| diagnostics.position(diagnostic).unwrap().line == 4),
            "{case}: {diagnostics}"
        );
    }
    for (workload, words) in [
        ("{unix: {uidd: 1}}", "did you mean `unix.uid`?"),
        ("{unix: 7}", "unix"),
        (
            "{kubernetes: {namespace: a}}",
            "no configured attestor states",
        ),
    ] {
        let tests = format!("workloads:\n  a: {workload}\ntests: []\n");
        let diagnostics = run_cases(&fixture, READS_ORDERS, &tests).unwrap_err();
        assert!(
            diagnostics.to_string().contains(words),
            "{workload}: {diagnostics}"
        );
    }
}

#[test]
fn the_ring_keeps_the_last_decisions() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(READS_ORDERS);
    let ring = DecisionRing::new();
    let workload = attested(stranger());
    let get = request("GET https://orders.example.com/v1/orders");
    let question = fixture.inject("orders-api", &[], &get);
    let denial = snapshot.decide(&workload, &question).unwrap_err();
    let ids: Vec<RequestId> = (0..=RING_CAPACITY)
        .map(|_| RequestId::new(noon()))
        .collect();
    for id in &ids {
        ring.record(*id, &snapshot, &workload, &question, Err(&denial));
    }
    assert_eq!(ring.len(), RING_CAPACITY);
    assert!(ring.find(ids[0]).is_none());
    let found = ring.find(ids[RING_CAPACITY]).unwrap();
    assert_eq!(found.isolation_key, *workload.isolation_key());
    assert!(Arc::ptr_eq(&found.facts, &ring.find(ids[1]).unwrap().facts));
    let explanation = explain::recorded(&found);
    assert_eq!(explanation.request_id, Some(ids[RING_CAPACITY].to_string()));
    assert_eq!(explanation.code, "policy_denied");
    assert!(explanation.to_text().contains(&format!(
        "countersign policy explain {} --suggest",
        ids[RING_CAPACITY]
    )));
}

#[test]
fn a_recorded_revocation_is_explained_as_one() {
    let fixture = Fixture::new();
    let snapshot = PolicySnapshot::new(
        Arc::new(fixture.engine(READS_ORDERS)),
        Arc::new(Revocations::default().with(crate::policy::Revocation {
            id: "r-1".to_owned(),
            what: crate::policy::Revoked::Credential("orders-api".to_owned()),
            until: None,
        })),
    );
    let ring = DecisionRing::new();
    let workload = attested(orders());
    let get = request("GET https://orders.example.com/v1/orders");
    let question = fixture.inject("orders-api", &[], &get);
    let denial = snapshot.decide(&workload, &question).unwrap_err();
    let id = RequestId::new(noon());
    ring.record(id, &snapshot, &workload, &question, Err(&denial));
    let explanation = explain::recorded(&ring.find(id).unwrap());
    assert_eq!(explanation.code, "revoked");
    assert!(
        explanation
            .to_text()
            .contains("revocation `r-1` is in force")
    );
}

#[test]
fn every_example_loads_without_a_word_passes_its_tests_and_leaves_nothing_out() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/examples");
    let deployed = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/examples/ci.yaml");
    let mut count = 0;
    let examples = std::fs::read_dir(&examples)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|directory| directory.join("agent.yaml"));
    for path in examples.chain([deployed]) {
        let config = match Config::load(&path) {
            Ok(config) => config,
            Err(diagnostics) => panic!("{}", diagnostics.render(false)),
        };
        let declarations = config.attestors.declarations();
        let (engine, warnings) = match PolicyEngine::load(&config, &declarations) {
            Ok(loaded) => loaded,
            Err(diagnostics) => panic!("{}", diagnostics.render(false)),
        };
        assert!(warnings.is_empty(), "{}", warnings.render(false));
        let report = cases::run(&config, &declarations, engine, &[]).unwrap();
        assert_eq!(report.failed, 0, "{}", report.to_text());
        assert!(report.passed >= 4, "{}", report.to_text());
        assert!(report.uncovered.is_empty(), "{}", report.to_text());
        count += 1;
    }
    assert_eq!(count, 6);
}

#[test]
fn the_default_policy_is_the_one_that_an_example_tests() {
    let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    let read = |path: &str| std::fs::read_to_string(policies.join(path)).unwrap();
    assert_eq!(
        read("default.cedar"),
        read("examples/system-service/default.cedar")
    );
}

#[test]
fn the_base_schema_is_the_printed_one() {
    let attestors = crate::config::Attestors {
        unix: true,
        systemd: true,
        oidc_issuers: Vec::new(),
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/base.cedarschema");
    let printed = crate::policy::schema::text(&attestors.declarations());
    assert_eq!(
        std::fs::read_to_string(path).unwrap(),
        printed,
        "write `countersign policy schema` to policies/base.cedarschema"
    );
    assert_eq!(
        of_text(&printed),
        crate::policy::schema::json(&attestors.declarations()),
        "what is printed and what policies are checked against differ"
    );
}

/// A schema's JSON form as Cedar makes it of the text, with the types' own names: the text could mean
/// a type of its own by `String`, and Cedar's form leaves that open.
fn of_text(schema: &str) -> serde_json::Value {
    fn named(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(members) => {
                if members
                    .get("type")
                    .is_some_and(|kind| kind == "EntityOrCommon")
                    && let Some(name) = members.remove("name")
                {
                    match name.as_str() {
                        Some("String" | "Long" | "Context") => {
                            members.insert("type".to_owned(), name);
                        }
                        Some("Bool") => {
                            members.insert("type".to_owned(), "Boolean".into());
                        }
                        Some("datetime") => {
                            members.insert("type".to_owned(), "Extension".into());
                            members.insert("name".to_owned(), name);
                        }
                        _ => {
                            members.insert("type".to_owned(), "Entity".into());
                            members.insert("name".to_owned(), name);
                        }
                    }
                }
                members.values_mut().for_each(named);
            }
            serde_json::Value::Array(elements) => elements.iter_mut().for_each(named),
            _ => {}
        }
    }
    let (fragment, _) = cedar_policy::SchemaFragment::from_cedarschema_str(schema).unwrap();
    let mut json = fragment.to_json_value().unwrap();
    named(&mut json);
    json
}

#[test]
fn names_that_are_no_identifiers_are_quoted_in_the_schema() {
    let declaration = |group: &str, name: &str| AttributeDeclaration {
        group: group.to_owned(),
        name: name.to_owned(),
        attribute_type: countersign_attestors::AttributeType::StringSet,
        required: false,
        description: "a claim\nof two lines".to_owned(),
    };
    let declarations = [
        declaration("ci", "https://example.com/roles"),
        declaration("in", "a\"b\\c"),
    ];
    let schema = crate::policy::schema::text(&declarations);
    crate::policy::schema::parse(&declarations).unwrap();
    assert_eq!(of_text(&schema), crate::policy::schema::json(&declarations));
    assert!(
        schema.contains("\"https://example.com/roles\"?: Set<String>"),
        "{schema}"
    );
}
