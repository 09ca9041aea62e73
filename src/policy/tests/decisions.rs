//! What is decided: every kind of yes and no, grants, leases and revocations.

use std::collections::BTreeSet;

use countersign_attestors::PresentedToken;

use super::*;
use crate::policy::{
    DenialKind, LeaseEnded, Revocation, Revoked, first_permitted, questions, unmatched,
};
use crate::refusal::RefusalCode;

const GET: &str = "GET https://orders.example.com/v1/orders";

#[test]
fn nothing_is_permitted_without_a_policy() {
    let fixture = Fixture::new();
    let engine = fixture.engine("");
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let decision = engine.evaluate(&orders(), &question);
    assert_eq!(outcome(&decision), "no_permit");
}

#[test]
fn the_design_s_example_decides_as_it_says() {
    let fixture = Fixture::new();
    let engine = fixture.engine(&format!("{READS_ORDERS}{NONPROD_NEVER_PROD}"));
    let get = request(GET);
    let delete = request("DELETE https://orders.example.com/v1/orders/7");
    let scopes = ["orders.read".to_owned()];
    let allowed = engine.evaluate(&orders(), &fixture.inject("orders-api", &scopes, &get));
    let Decision::Allow(permission) = &allowed else {
        panic!("{allowed:?}")
    };
    assert_eq!(deciding(&allowed), ["orders-service-reads-orders"]);
    assert_eq!(permission.max_lifetime, Some(Duration::from_secs(600)));
    assert_eq!(*permission.scopes, scopes);
    assert_eq!(&*permission.environment, "prod");
    assert_eq!(
        *permission.attributes_read,
        ["systemd.system_unit=orders.service".to_owned()]
    );

    let denied = engine.evaluate(&orders(), &fixture.inject("orders-api", &scopes, &delete));
    assert_eq!(outcome(&denied), "no_permit");
    let Decision::Deny(denial) = denied else {
        panic!()
    };
    let nearest = denial.nearest.clone().unwrap();
    assert_eq!(&*nearest.policy, "orders-service-reads-orders");
    assert_eq!(nearest.location, "policies/test.cedar:3:1");
    let failing: Vec<_> = nearest
        .conditions
        .iter()
        .filter(|condition| !condition.holds)
        .collect();
    assert_eq!(failing.len(), 1);
    assert_eq!(failing[0].text, "context.request.safe");
    assert_eq!(failing[0].actual.as_deref(), Some("was false (DELETE)"));
}

#[test]
fn a_forbid_wins() {
    let fixture = Fixture::new();
    let engine = fixture.engine(&format!(
        r#"{NONPROD_NEVER_PROD} @id("all") permit (principal, action, resource) when {{ principal has unix }};"#
    ));
    let request = request(GET);
    let decision = engine.evaluate(&stranger(), &fixture.inject("orders-api", &[], &request));
    // A forbid by the environment, which a token of `ci` could change: the caller is asked for one.
    assert_eq!(outcome(&decision), "presented_evidence_required");
    let token = facts(&[
        ("ci.sub", text("job")),
        ("ci.ref", text("refs/heads/other")),
    ]);
    let decision = engine.evaluate(&token, &fixture.inject("orders-api", &[], &request));
    assert_eq!(outcome(&decision), "forbidden");
    assert_eq!(deciding(&decision), ["nonprod-never-prod"]);
    let decision = engine.evaluate(&orders(), &fixture.inject("orders-api", &[], &request));
    assert_eq!(outcome(&decision), "allow");
}

#[test]
fn a_policy_that_fails_to_evaluate_denies_and_is_named() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("all") permit (principal, action, resource) when { principal has unix };
@id("too-many") forbid (principal, action, resource)
when { principal has unix && principal.unix.uid + 9223372036854775807 == 0 };
"#,
    );
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let decision = engine.evaluate(&orders(), &question);
    assert_eq!(outcome(&decision), "evaluation_error");
    assert_eq!(deciding(&decision), ["too-many"]);
    let Decision::Deny(denial) = decision else {
        panic!()
    };
    let refusal = denial.to_refusal(&question);
    assert_eq!(refusal.code, RefusalCode::PolicyDenied);
    assert!(refusal.detail.contains("`too-many`"), "{}", refusal.detail);
    assert!(refusal.internal.unwrap().contains("overflow"));
}

#[test]
fn evidence_that_could_not_be_checked_is_503_and_not_a_skipped_forbid() {
    let fixture = Fixture::new();
    let policies = r#"
@id("all") permit (principal, action, resource) when { principal has unix };
@id("no-batch") forbid (principal, action, resource == Credential::"orders-api")
unless { principal has systemd && principal.systemd.system_unit != "batch.service" };
"#;
    let engine = fixture.engine(policies);
    let request = request(GET);
    let away = with_failure(stranger(), "systemd", FailureKind::CouldNotRun);
    let decision = engine.evaluate(&away, &fixture.inject("orders-api", &[], &request));
    assert_eq!(outcome(&decision), "attestation_unavailable");
    // The other credential's policies read nothing of systemd's.
    let decision = engine.evaluate(&away, &fixture.inject("orders-admin", &[], &request));
    assert_eq!(outcome(&decision), "allow");
    // Evidence that is wrong is not evidence that could not be checked.
    let wrong = with_failure(stranger(), "systemd", FailureKind::InvalidEvidence);
    let decision = engine.evaluate(&wrong, &fixture.inject("orders-api", &[], &request));
    assert_eq!(outcome(&decision), "forbidden");
}

#[test]
fn who_asks_is_read_whole_where_it_is_chosen() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("all") permit (principal, action, resource) when { principal has unix };
@id("no-unit") forbid (principal, action, resource)
when { (if context has request then principal else principal) has systemd };
"#,
    );
    let request = request(GET);
    let away = with_failure(stranger(), "systemd", FailureKind::CouldNotRun);
    let decision = engine.evaluate(&away, &fixture.inject("orders-api", &[], &request));
    assert_eq!(outcome(&decision), "attestation_unavailable");
}

#[test]
fn the_environment_counts_as_reading_what_it_is_made_of() {
    let fixture = Fixture::new();
    let engine = fixture.engine(NONPROD_NEVER_PROD);
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let away = with_failure(stranger(), "systemd", FailureKind::CouldNotRun);
    assert_eq!(
        outcome(&engine.evaluate(&away, &question)),
        "attestation_unavailable"
    );
    let read: Vec<String> = engine
        .attributes_read()
        .iter()
        .map(|(group, name)| format!("{group}.{name}"))
        .collect();
    assert_eq!(read, ["ci.ref", "systemd.system_unit"]);
}

#[test]
fn the_attestor_of_processes_states_the_container_too() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"@id("a") permit (principal, action, resource) when { principal has container && principal.container.id == "x" };"#,
    );
    let request = request(GET);
    let away = with_failure(WorkloadFacts::default(), "unix", FailureKind::CouldNotRun);
    let decision = engine.evaluate(&away, &fixture.inject("orders-api", &[], &request));
    assert_eq!(outcome(&decision), "attestation_unavailable");
}

#[test]
fn a_permit_that_reads_a_token_asks_for_one() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"@id("ci") permit (principal, action, resource == Credential::"orders-api") when { principal has ci && principal.ci.sub == "job" };"#,
    );
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let decision = engine.evaluate(&stranger(), &question);
    let Decision::Deny(denial) = &decision else {
        panic!()
    };
    assert_eq!(
        denial.kind,
        DenialKind::PresentedEvidenceRequired {
            issuers: vec!["ci".to_owned()],
            invalid: None
        }
    );
    assert_eq!(
        denial.to_refusal(&question).code,
        RefusalCode::ProxyTokenRequired
    );
    for name in ["ci", "oidc"] {
        let wrong = with_failure(stranger(), name, FailureKind::InvalidEvidence);
        let Decision::Deny(denial) = engine.evaluate(&wrong, &question) else {
            panic!()
        };
        let refusal = denial.to_refusal(&question);
        assert!(
            refusal.detail.contains("as described"),
            "{}",
            refusal.detail
        );
    }
    // The right kind of token with the wrong content is a denial, not a question for another.
    let other = facts(&[("ci.sub", text("other"))]);
    assert_eq!(outcome(&engine.evaluate(&other, &question)), "no_permit");
    let right = facts(&[("ci.sub", text("job"))]);
    assert_eq!(outcome(&engine.evaluate(&right, &question)), "allow");
    // No policy of the other credential reads a token.
    let question = fixture.inject("orders-admin", &[], &request);
    assert_eq!(
        outcome(&engine.evaluate(&stranger(), &question)),
        "no_permit"
    );
}

#[test]
fn an_ambiguous_path_is_refused_only_where_a_policy_reads_the_path() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("path") permit (principal, action, resource == Credential::"orders-api")
when { principal has unix && context has request && context.request.path like "/v1/*" };
@id("any") permit (principal, action, resource == Credential::"orders-admin") when { principal has unix };
"#,
    );
    let ambiguous = request("GET https://orders.example.com/v1/%2e%2e/admin");
    let decision = engine.evaluate(&orders(), &fixture.inject("orders-api", &[], &ambiguous));
    assert_eq!(outcome(&decision), "ambiguous_path");
    let decision = engine.evaluate(&orders(), &fixture.inject("orders-admin", &[], &ambiguous));
    assert_eq!(outcome(&decision), "allow");
    let plain = request(GET);
    let decision = engine.evaluate(&orders(), &fixture.inject("orders-api", &[], &plain));
    assert_eq!(outcome(&decision), "allow");
}

#[test]
fn the_smallest_lifetime_of_all_satisfied_permits_counts() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("a") @max_lifetime("10m") permit (principal, action, resource) when { principal has unix };
@id("b") @max_lifetime("2m") permit (principal, action, resource) when { principal has unix && principal.unix.uid == 990 };
@id("c") permit (principal, action, resource) when { principal has unix };
"#,
    );
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let lifetime = |facts: &WorkloadFacts| match engine.evaluate(facts, &question) {
        Decision::Allow(permission) => permission.max_lifetime.map(|lifetime| lifetime.as_secs()),
        Decision::Deny(denial) => panic!("{denial:?}"),
    };
    assert_eq!(lifetime(&orders()), Some(120));
    assert_eq!(lifetime(&stranger()), Some(600));
}

#[test]
fn scopes_are_capped() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("read") @scopes("orders.read") permit (principal, action, resource) when { principal has unix };
@id("write") @scopes("orders.write") permit (principal, action, resource) when { principal has unix && principal.unix.uid == 990 };
@id("all") permit (principal, action == Action::"issue", resource) when { principal has unix };
"#,
    );
    let request = request(GET);
    let both = ["orders.read".to_owned(), "orders.write".to_owned()];
    let other = ["orders.admin".to_owned()];
    let granted =
        |facts: &WorkloadFacts, question: &Question<'_>| match engine.evaluate(facts, question) {
            Decision::Allow(permission) => permission.scopes.join(" "),
            Decision::Deny(denial) => denial.kind.as_str().to_owned(),
        };
    let asking_both = fixture.inject("orders-api", &both, &request);
    assert_eq!(granted(&stranger(), &asking_both), "orders.read");
    assert_eq!(granted(&orders(), &asking_both), "orders.read orders.write");
    // None asked for would be the server's default: the cap is asked for by name.
    assert_eq!(
        granted(&stranger(), &fixture.inject("orders-api", &[], &request)),
        "orders.read"
    );
    assert_eq!(
        granted(&stranger(), &fixture.inject("orders-api", &other, &request)),
        "no_permit"
    );
    let issue = Question {
        action: Action::Issue,
        destination: None,
        request: None,
        ..fixture.inject("orders-api", &other, &request)
    };
    assert_eq!(granted(&stranger(), &issue), "orders.admin");
}

#[test]
fn a_policy_that_expired_does_nothing() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("late") @expires("2026-11-18T12:00:00Z") permit (principal, action, resource) when { principal has unix };
@id("stop") @expires("2026-11-18T11:00:00Z") forbid (principal, action, resource) unless { principal has container };
"#,
    );
    let request = request(GET);
    let at = |seconds: i64| {
        let wall = match seconds {
            before if before < 0 => noon() - Duration::from_secs(before.unsigned_abs()),
            after => noon() + Duration::from_secs(after.unsigned_abs()),
        };
        let question = Question {
            wall,
            ..fixture.inject("orders-api", &[], &request)
        };
        outcome(&engine.evaluate(&orders(), &question))
    };
    assert_eq!(at(-3_601), "forbidden");
    assert_eq!(at(-3_600), "allow");
    assert_eq!(at(-1), "allow");
    assert_eq!(at(0), "no_permit");
}

#[test]
fn the_context_is_what_the_schema_says() {
    let fixture = Fixture::new();
    let engine = fixture
        .engine(
            r#"
@id("a") permit (principal, action, resource)
when {
  context has destination && context.destination == Destination::"orders" && context.destination.environment == "prod" &&
  context has request && context.request.method == "GET" && context.request.path == "/v1/orders" &&
  context.scopes == ["orders.read"] && context.audience == "" &&
  context.time == datetime("2026-11-18T12:00:00Z") &&
  context.local.weekday == "wednesday" && context.local.hour == 12 &&
  context.evidence.contains("pidfd") && resource.name == "orders-api" && principal has unix
};
"#,
        )
        .in_time_zone(jiff::tz::TimeZone::UTC);
    let request = request("GET https://orders.example.com/v1/orders?secret=1");
    let scopes = ["orders.read".to_owned()];
    let decision = engine.evaluate(&orders(), &fixture.inject("orders-api", &scopes, &request));
    assert_eq!(outcome(&decision), "allow", "{decision:?}");
}

#[test]
fn repositories_and_labels_are_parents_and_tags() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"
@id("repository") permit (principal in Repository::"ci.example.com/77", action, resource == Credential::"orders-api");
@id("label") permit (principal, action, resource == Credential::"orders-admin") when { principal.hasTag("app") && principal.getTag("app") == "orders" };
"#,
    );
    let request = request(GET);
    let mut job = facts(&[("ci.sub", text("job")), ("ci.repository_id", text("77"))]);
    job.groups
        .entry("labels".to_owned())
        .or_default()
        .insert("app".to_owned(), text("orders"));
    let api = fixture.inject("orders-api", &[], &request);
    let admin = fixture.inject("orders-admin", &[], &request);
    assert_eq!(outcome(&engine.evaluate(&job, &api)), "allow");
    assert_eq!(outcome(&engine.evaluate(&job, &admin)), "allow");
    let other = facts(&[("ci.sub", text("job")), ("ci.repository_id", text("78"))]);
    assert_eq!(outcome(&engine.evaluate(&other, &api)), "no_permit");
    assert_eq!(outcome(&engine.evaluate(&other, &admin)), "no_permit");
}

#[test]
fn traffic_to_no_destination_is_a_question_too() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"@id("out") permit (principal, action == Action::"connect", resource == Destination::"unmatched") when { principal has unix && principal.unix.uid == 990 };"#,
    );
    let request = request("GET https://elsewhere.example.net/");
    let question = unmatched(Some(&request), noon());
    assert_eq!(outcome(&engine.evaluate(&orders(), &question)), "allow");
    assert_eq!(
        outcome(&engine.evaluate(&stranger(), &question)),
        "no_permit"
    );
    let public = Question {
        resource: Resource::Destination(fixture.destination("public")),
        ..question
    };
    assert_eq!(outcome(&engine.evaluate(&orders(), &public)), "no_permit");
}

#[test]
fn traffic_to_no_destination_is_for_attested_workloads() {
    let fixture = Fixture::new();
    let engine = fixture.engine(
        r#"@id("out") permit (principal, action == Action::"connect", resource == Destination::"unmatched");"#,
    );
    let request = request("GET https://elsewhere.example.net/");
    let question = unmatched(Some(&request), noon());
    assert_eq!(outcome(&engine.evaluate(&stranger(), &question)), "allow");
    let nobody = WorkloadFacts::default();
    let told = |facts: &WorkloadFacts| match engine.evaluate(facts, &question) {
        Decision::Deny(denial) => denial.to_refusal(&question),
        Decision::Allow(_) => panic!("allowed"),
    };
    assert_eq!(told(&nobody).code, RefusalCode::ProxyTokenRequired);
    assert!(told(&nobody).detail.contains("`ci`"));
    let wrong = with_failure(nobody.clone(), "ci", FailureKind::InvalidEvidence);
    assert!(told(&wrong).detail.contains("as described"));
    let away = with_failure(nobody.clone(), "unix", FailureKind::CouldNotRun);
    assert_eq!(told(&away).code, RefusalCode::AttestationUnavailable);
    assert!(told(&away).detail.contains("`unix`"));
    // A configured destination is what its policies say.
    let public = Question {
        resource: Resource::Destination(fixture.destination("public")),
        ..question
    };
    let engine = fixture.engine(r#"@id("all") permit (principal, action, resource);"#);
    assert_eq!(outcome(&engine.evaluate(&nobody, &public)), "allow");
    assert_ne!(outcome(&engine.evaluate(&nobody, &question)), "allow");
}

#[test]
fn the_first_credential_that_is_permitted_is_used() {
    let fixture = Fixture::new();
    let request = request(GET);
    let choose = |policies: &str, facts: &WorkloadFacts| {
        let engine = fixture.engine(policies);
        let asking = questions(fixture.destination("orders"), Some(&request), noon());
        match first_permitted(asking, |question| match engine.evaluate(facts, question) {
            Decision::Allow(permission) => Ok(permission),
            Decision::Deny(denial) => Err(denial),
        }) {
            Ok((_, _, credential_use)) => credential_use.unwrap().credential.name.to_string(),
            Err(refused) => refused.unwrap().denial.kind.as_str().to_owned(),
        }
    };
    let admin = r#"@id("admin") permit (principal, action, resource == Credential::"orders-admin") when { principal has unix };"#;
    assert_eq!(choose(admin, &orders()), "orders-admin");
    assert_eq!(
        choose(&format!("{admin}{READS_ORDERS}"), &orders()),
        "orders-api"
    );
    assert_eq!(choose("", &orders()), "no_permit");
    // An attestor that is away must not lead to another credential.
    let away = with_failure(stranger(), "systemd", FailureKind::CouldNotRun);
    assert_eq!(
        choose(&format!("{admin}{READS_ORDERS}"), &away),
        "attestation_unavailable"
    );
    // The answer that asks for a token is the more useful one.
    let token = r#"@id("ci") permit (principal, action, resource == Credential::"orders-admin") when { principal has ci };"#;
    assert_eq!(choose(token, &orders()), "presented_evidence_required");
}

#[test]
fn a_grant_says_what_was_decided() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(READS_ORDERS);
    let request = request(GET);
    let scopes = ["orders.read".to_owned()];
    let workload = attested(orders());
    let grant = snapshot
        .decide(&workload, &fixture.inject("orders-api", &scopes, &request))
        .unwrap();
    assert_eq!(grant.action(), Action::Inject);
    assert_eq!(&*grant.credential().unwrap().name, "orders-api");
    assert_eq!(&*grant.destination().unwrap().name, "orders");
    assert_eq!(**grant.scopes(), scopes);
    assert_eq!(grant.audience(), None);
    assert_eq!(grant.max_lifetime(), Some(Duration::from_secs(600)));
    assert_eq!(
        &*grant.deciding_policies()[0],
        "orders-service-reads-orders"
    );
    assert_eq!(grant.policy_version().len(), 16);
    assert_eq!(grant.environment(), "prod");
}

#[test]
fn a_lease_ends_with_the_snapshot_the_workload_and_the_permit() {
    let fixture = Fixture::new();
    let policies = r#"@id("late") @expires("2026-11-18T12:00:10Z") permit (principal, action, resource) when { principal has unix };"#;
    let snapshot = fixture.snapshot(policies);
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let workload = attested(orders());
    let lease = snapshot
        .decide(&workload, &question)
        .unwrap()
        .lease()
        .clone();
    assert_eq!(lease.check(&snapshot, noon()), Ok(()));
    let same_again = PolicySnapshot::new(
        Arc::clone(snapshot.engine()),
        Arc::clone(snapshot.revocations()),
    );
    assert_eq!(
        lease.check(&same_again, noon()),
        Err(LeaseEnded::SnapshotReplaced)
    );
    assert_eq!(
        lease.check(&snapshot, noon() + Duration::from_secs(10)),
        Err(LeaseEnded::PolicyExpired)
    );

    let presented = PresentedToken::new("token".to_owned());
    let until = noon() + Duration::from_secs(5);
    let workload = Arc::new(AttestedWorkload::described_with_token(
        orders(),
        presented,
        until,
    ));
    let lease = snapshot
        .decide(&workload, &question)
        .unwrap()
        .lease()
        .clone();
    assert_eq!(lease.check(&snapshot, noon()), Ok(()));
    assert!(matches!(
        lease.check(&snapshot, until),
        Err(LeaseEnded::Attestation(_))
    ));
    let late = Question {
        wall: until,
        ..question
    };
    let denial = snapshot.decide(&workload, &late).unwrap_err();
    assert_eq!(denial.kind.as_str(), "attestation_ended");
}

fn revocation(id: &str, what: Revoked) -> Revocation {
    Revocation {
        id: id.to_owned(),
        what,
        until: None,
    }
}

#[test]
fn what_is_revoked_is_refused_until_it_is_lifted() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(READS_ORDERS);
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let workload = attested(orders());
    let decide = |revocations: Revocations| {
        let snapshot = PolicySnapshot::new(Arc::clone(snapshot.engine()), Arc::new(revocations));
        match snapshot.decide(&workload, &question) {
            Ok(_) => "allow".to_owned(),
            Err(denial) => match &denial.kind {
                DenialKind::Revoked { id } => {
                    assert_eq!(denial.to_refusal(&question).code, RefusalCode::Revoked);
                    id.clone()
                }
                other => other.as_str().to_owned(),
            },
        }
    };
    let none = Revocations::default();
    assert_eq!(decide(none.clone()), "allow");
    for what in [
        Revoked::Workload("unix.uid=990".parse().unwrap()),
        Revoked::Workload("systemd.system_unit=orders.service".parse().unwrap()),
        Revoked::Credential("orders-api".to_owned()),
    ] {
        let revoked = none.with(revocation("r1", what));
        assert_eq!(decide(revoked.clone()), "r1");
        assert_eq!(decide(revoked.without("r1").unwrap()), "allow");
        assert_eq!(revoked.without("r2"), None);
    }
    for what in [
        Revoked::Workload("unix.uid=991".parse().unwrap()),
        Revoked::Credential("orders-admin".to_owned()),
        Revoked::TokenSha256("ab".repeat(32)),
    ] {
        assert_eq!(decide(none.with(revocation("r1", what))), "allow");
    }
    let tokens = none.with(revocation("t", Revoked::TokenSha256("AB".repeat(32))));
    assert_eq!(tokens.token_is_revoked(&"ab".repeat(32)).unwrap().id, "t");
    assert!(tokens.token_is_revoked(&"ac".repeat(32)).is_none());
}

#[test]
fn a_revocation_with_an_end_is_pruned_after_it() {
    let timed = Revocations::default()
        .with(Revocation {
            until: Some(Duration::from_secs(10)),
            ..revocation("timed", Revoked::Credential("a".to_owned()))
        })
        .with(revocation("for-ever", Revoked::Credential("b".to_owned())));
    assert_eq!(timed.prune(Duration::from_secs(9)), None);
    let pruned = timed.prune(Duration::from_secs(10)).unwrap();
    let left: Vec<&str> = pruned.iter().map(|entry| entry.id.as_str()).collect();
    assert_eq!(left, ["for-ever"]);
}

#[test]
fn a_selector_is_group_name_and_value() {
    for wrong in [
        "",
        "unix",
        "unix.uid",
        "uid=1",
        ".uid=1",
        "unix.=1",
        "unix.uid=",
    ] {
        assert!(wrong.parse::<crate::policy::Selector>().is_err(), "{wrong}");
    }
    let selector: crate::policy::Selector = "ci.sub=repo:a/b=c".parse().unwrap();
    assert_eq!(selector.value, "repo:a/b=c");
    assert_eq!(selector.to_string(), "ci.sub=repo:a/b=c");
    let groups = AttributeValue::StringSet(BTreeSet::from(["wheel".to_owned()]));
    let selector: crate::policy::Selector = "unix.groups=wheel".parse().unwrap();
    assert!(selector.matches(&facts(&[("unix.groups", groups)])));
}

#[test]
fn the_version_is_that_of_the_files() {
    let fixture = Fixture::new();
    let one = fixture.engine(READS_ORDERS);
    let same = fixture.engine(READS_ORDERS);
    let other = fixture.engine(&format!("{READS_ORDERS}// comment"));
    assert_eq!(one.version(), same.version());
    assert_ne!(one.version(), other.version());
    assert_eq!(one.version().len(), 16);
}

#[test]
fn a_lease_under_policies_that_read_the_time_ends_with_what_they_read() {
    let fixture = Fixture::new();
    let request = request(GET);
    let mut question = fixture.inject("orders-api", &[], &request);
    question.wall = noon() + Duration::from_millis(20 * 60 * 1000 + 300);
    let workload = attested(orders());
    let rows = [
        ("context has request", None),
        (
            r#"context.time < datetime("2027-01-01")"#,
            Some((20 * 60, 20 * 60 + 1)),
        ),
        ("context.local.hour < 18", Some((0, 3600))),
    ];
    for (condition, period) in rows {
        let policies = format!(
            r#"@id("timed") permit (principal, action, resource) when {{ principal has unix && {condition} }};"#
        );
        let engine = fixture
            .engine(&policies)
            .in_time_zone(jiff::tz::TimeZone::UTC);
        let snapshot = PolicySnapshot::new(Arc::new(engine), Arc::default());
        let lease = snapshot
            .decide(&workload, &question)
            .unwrap()
            .lease()
            .clone();
        let day = noon() + Duration::from_secs(24 * 3600);
        let Some((from, until)) = period else {
            assert_eq!(lease.check(&snapshot, day), Ok(()), "{condition}");
            continue;
        };
        let [from, until] = [from, until].map(|seconds| noon() + Duration::from_secs(seconds));
        let moment = Duration::from_millis(1);
        for (at, outcome) in [
            // The clock was set back.
            (from - moment, Err(LeaseEnded::PolicyExpired)),
            (from, Ok(())),
            (until - moment, Ok(())),
            (until, Err(LeaseEnded::PolicyExpired)),
        ] {
            assert_eq!(lease.check(&snapshot, at), outcome, "{condition}");
        }
    }
}

#[test]
fn a_lease_does_not_outlast_a_clock_that_is_set_back_to_before_a_forbid_expired() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(
        r#"@id("a") permit (principal, action, resource) when { principal has unix };
           @id("b") @expires("2026-11-18T11:00:00Z") forbid (principal, action, resource);
           @id("c") @expires("2026-11-18T13:00:00Z") permit (principal, action, resource) when { principal has unix };"#,
    );
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let grant = snapshot.decide(&attested(orders()), &question).unwrap();
    let an_hour_ago = noon() - Duration::from_secs(3600);
    let at = |time| grant.lease().check(&snapshot, time);
    assert_eq!(at(an_hour_ago), Ok(()));
    assert_eq!(
        at(an_hour_ago - Duration::from_millis(1)),
        Err(LeaseEnded::PolicyExpired)
    );
}

#[test]
fn a_client_id_that_serves_several_identities_is_named() {
    let fixture = Fixture::new();
    let policy = |id: &str, unit: &str, credential: &str| {
        format!(
            r#"@id("{id}") permit (principal, action == Action::"inject", resource == Credential::"{credential}")
when {{ principal has systemd.system_unit && principal.systemd.system_unit == "{unit}" }};
"#
        )
    };
    let said = |policies: &[String]| {
        let (_, warnings) = fixture.load(&policies.concat()).unwrap();
        warnings
            .iter()
            .map(|warning| (warning.code, warning.message.clone()))
            .collect::<Vec<_>>()
    };
    let one = policy("one", "one.service", "orders-api");
    let same = policy("same", "one.service", "orders-api");
    let elsewhere = policy("elsewhere", "two.service", "orders-admin");
    assert_eq!(said(&[one.clone(), same, elsewhere]), []);
    let two = policy("two", "two.service", "orders-api");
    let warnings = said(&[one, two]);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].0, "lint_client_id_shared");
    for name in ["`orders-api`", "`one`", "`two`"] {
        assert!(warnings[0].1.contains(name), "{warnings:?}");
    }
}
