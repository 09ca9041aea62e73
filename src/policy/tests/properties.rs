//! Properties: a slice decides as the whole set does, the cache as the policies do, and a forbid only takes away.

use cedar_policy::Authorizer;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;
use crate::policy::principal::Principal;
use crate::policy::reads::Reads;
use crate::policy::{DecisionCache, unmatched};

const CONDITIONS: [&str; 17] = [
    "principal has unix && principal.unix.uid == 990",
    "principal has unix && principal.unix.uid < 1000",
    "principal has unix.executable && principal.unix.gid > 5 && principal.unix.executable like \"/usr/*\"",
    "principal has systemd && principal.systemd.system_unit == \"orders.service\"",
    "principal has ci && principal.ci.sub == \"job\"",
    "principal.environment == \"prod\"",
    "principal in Repository::\"ci.example.com/77\"",
    "context has request && context.request.safe",
    "context has request && context.request.method == \"POST\"",
    "context has request && context.request.path == \"/v1/orders\"",
    "context has request && context.request.path like \"/v1/*/7\"",
    "context has request && context.request.path like \"*orders*\"",
    "context has request && context.request.path != \"/v1/orders/7\"",
    "context has destination && context.destination == Destination::\"orders\"",
    "context.scopes.contains(\"orders.read\")",
    "context.time < datetime(\"2026-11-18T12:00:01Z\")",
    // Fails to evaluate for uid 990.
    "principal has unix && (principal.unix.uid + 9223372036854774900) > 0",
];

/// `(action, resource)` of a scope; the schema permits each.
const SCOPES: [(&str, &str); 16] = [
    ("action", "resource"),
    ("action", "resource is Credential"),
    ("action", "resource is Destination"),
    ("action", "resource == Credential::\"orders-api\""),
    ("action", "resource == Credential::\"orders-admin\""),
    ("action", "resource in CredentialGroup::\"orders\""),
    ("action", "resource in CredentialGroup::\"admin\""),
    ("action", "resource in Credential::\"orders-api\""),
    ("action == Action::\"inject\"", "resource"),
    (
        "action == Action::\"inject\"",
        "resource is Credential in CredentialGroup::\"admin\"",
    ),
    (
        "action == Action::\"issue\"",
        "resource == Credential::\"orders-api\"",
    ),
    (
        "action in [Action::\"inject\", Action::\"issue\"]",
        "resource in CredentialGroup::\"orders\"",
    ),
    ("action == Action::\"connect\"", "resource"),
    (
        "action == Action::\"connect\"",
        "resource == Destination::\"public\"",
    ),
    (
        "action in [Action::\"inject\", Action::\"connect\"]",
        "resource",
    ),
    ("action", "resource == Destination::\"unmatched\""),
];

fn policies() -> impl Strategy<Value = String> {
    let policy = (
        any::<bool>(),
        select(&SCOPES[..]),
        subsequence(&CONDITIONS[..], 0..3),
        subsequence(&CONDITIONS[..], 0..2),
    );
    proptest::collection::vec(policy, 0..12).prop_map(|policies| {
        let mut text = String::new();
        for (index, (is_permit, (action, resource), when, unless)) in policies.iter().enumerate() {
            let effect = if *is_permit { "permit" } else { "forbid" };
            text.push_str(&format!(
                "@id(\"p{index}\") {effect} (principal, {action}, {resource})"
            ));
            if !when.is_empty() {
                text.push_str(&format!(" when {{ {} }}", when.join(" && ")));
            }
            if !unless.is_empty() {
                text.push_str(&format!(" unless {{ {} }}", unless.join(" && ")));
            }
            text.push_str(";\n");
        }
        text
    })
}

fn workloads() -> [WorkloadFacts; 4] {
    [
        orders(),
        stranger(),
        facts(&[
            ("ci.iss", text("https://ci.example.com")),
            ("ci.sub", text("job")),
            ("ci.repository_id", text("77")),
        ]),
        WorkloadFacts::default(),
    ]
}

/// Calls `check` with every question of a small world.
fn every_question(fixture: &Fixture, mut check: impl FnMut(&Question<'_>)) {
    let scopes = ["orders.read".to_owned()];
    let requests = [
        "GET https://orders.example.com/v1/orders",
        "GET https://orders.example.com/v1/orders/8",
        "POST https://orders.example.com/v1/orders/7",
    ]
    .map(request);
    for request in &requests {
        for credential in ["orders-api", "orders-admin"] {
            let inject = fixture.inject(credential, &scopes, request);
            check(&inject);
            check(&Question {
                action: Action::Issue,
                destination: None,
                request: None,
                ..inject
            });
        }
        for destination in ["orders", "public"] {
            check(&Question {
                resource: Resource::Destination(fixture.destination(destination)),
                destination: Some(fixture.destination(destination)),
                ..unmatched(Some(request), noon())
            });
        }
        check(&unmatched(Some(request), noon()));
    }
}

/// What Cedar says of a question by every policy there is.
fn by_the_whole_set(
    engine: &PolicyEngine,
    facts: &WorkloadFacts,
    question: &Question<'_>,
) -> (bool, bool, Vec<String>) {
    let everything = Reads::default().with_the_whole_context();
    let principal = Principal::new(facts, engine);
    let prepared = engine
        .prepare(facts, &principal, question, &everything)
        .unwrap();
    let response =
        Authorizer::new().is_authorized(&prepared.request, &engine.whole(), &prepared.entities);
    let failed: Vec<String> = response
        .diagnostics()
        .errors()
        .map(
            |cedar_policy::AuthorizationError::PolicyEvaluationError(error)| {
                error.policy_id().to_string()
            },
        )
        .collect();
    let mut reasons: Vec<String> = match failed.is_empty() {
        true => response
            .diagnostics()
            .reason()
            .map(ToString::to_string)
            .collect(),
        false => failed.clone(),
    };
    reasons.sort();
    (
        response.decision() == cedar_policy::Decision::Allow,
        !failed.is_empty(),
        reasons,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_slice_decides_as_the_whole_set(text in policies()) {
        let fixture = Fixture::new();
        let engine = fixture.engine(&text);
        for facts in workloads() {
            every_question(&fixture, |question| {
                let (allowed, failed, reasons) = by_the_whole_set(&engine, &facts, question);
                let sliced = engine.evaluate(&facts, question);
                if facts.groups.is_empty() && matches!(question.resource, Resource::Unmatched) {
                    // Refused before any policy is asked.
                    assert_ne!(outcome(&sliced), "allow", "{text}\n{question:?}");
                    return;
                }
                match outcome(&sliced) {
                    "allow" => assert!(allowed && !failed, "{text}\n{question:?}"),
                    "evaluation_error" => assert!(failed, "{text}\n{question:?}"),
                    _ => assert!(!allowed && !failed, "{text}\n{question:?}"),
                }
                assert_eq!(deciding(&sliced), reasons, "{text}\n{question:?}");
            });
        }
    }

    #[test]
    fn the_cache_decides_as_the_policies(text in policies()) {
        let fixture = Fixture::new();
        let snapshot = fixture.snapshot(&text);
        let workloads = workloads().map(attested);
        let mut cache = DecisionCache::new();
        for _ in 0..2 {
            for workload in &workloads {
                every_question(&fixture, |question| {
                    let cached = cache.decide(&snapshot, workload, question);
                    assert_same(&snapshot.decide(workload, question), &cached);
                });
            }
        }
        prop_assert!(cache.hits() >= cache.misses());
    }

    #[test]
    fn a_forbid_only_takes_away(text in policies(), scope in select(&SCOPES[..]), condition in select(&CONDITIONS[..])) {
        let fixture = Fixture::new();
        let without = fixture.engine(&text);
        let (action, resource) = scope;
        let with = fixture.engine(&format!(
            "{text}@id(\"more\") forbid (principal, {action}, {resource}) when {{ {condition} }};"
        ));
        for facts in workloads() {
            every_question(&fixture, |question| {
                let before = outcome(&without.evaluate(&facts, question));
                let after = with.evaluate(&facts, question);
                assert!(before == "allow" || outcome(&after) != "allow", "{text}\n{scope:?} {condition}");
                if deciding(&after).contains(&"more".to_owned()) {
                    assert_ne!(outcome(&after), "allow");
                }
            });
        }
    }

    #[test]
    fn text_between_policies_does_not_move_them(blanks in proptest::collection::vec(select(&["", " ", "\n", "// permit; \" '\n", "\t\n\n", "// ;\n"][..]), 3)) {
        let fixture = Fixture::new();
        let policy = |id: &str| format!("@id(\"{id}\") permit (principal, action, resource) when {{ principal has unix && context.audience == \";\" }};");
        let text = format!("{}{}{}{}{}", blanks[0], policy("a"), blanks[1], policy("b"), blanks[2]);
        let engine = fixture.engine(&text);
        for (id, location) in engine.policies() {
            let offset = text.find(&format!("@id(\"{id}\")")).unwrap();
            let place = crate::diagnostics::position(&text, offset);
            prop_assert_eq!(location, format!("policies/test.cedar:{}:{}", place.line, place.column + 9));
        }
    }
}
