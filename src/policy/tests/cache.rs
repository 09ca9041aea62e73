//! What the cache remembers, by what, and until when.

use super::*;
use crate::policy::{DecisionCache, Revocation, Revoked, unmatched};

const GET: &str = "GET https://orders.example.com/v1/orders";

#[test]
fn the_cache_answers_as_the_policies_do() {
    let fixture = Fixture::new();
    let policies = r#"
@id("path") permit (principal, action, resource == Credential::"orders-api")
when { principal has unix && context has request && context.request.path == "/v1/orders" };
@id("method") permit (principal, action, resource == Credential::"orders-admin")
when { principal has unix && context has request && context.request.method == "GET" };
"#;
    let snapshot = fixture.snapshot(policies);
    let mut cache = DecisionCache::new();
    let workloads = [attested(orders()), attested(WorkloadFacts::default())];
    let requests = [
        GET,
        "GET https://orders.example.com/v1/orders/7",
        "POST https://orders.example.com/v1/orders",
        "POST https://orders.example.com/v1/%2e%2e/orders",
    ]
    .map(request);
    for _ in 0..2 {
        for workload in &workloads {
            for request in &requests {
                for credential in ["orders-api", "orders-admin"] {
                    let question = fixture.inject(credential, &[], request);
                    let cached = cache.decide(&snapshot, workload, &question);
                    assert_same(&snapshot.decide(workload, &question), &cached);
                }
            }
        }
    }
    // orders-api is keyed by what the path is (yes: 1, no: 2 distinct paths, one ambiguous), orders-admin by the method (2).
    assert_eq!(cache.hits() + cache.misses(), 32);
    assert_eq!(cache.misses(), 2 * (3 + 2));
    assert_eq!(cache.len(), 10);
}

#[test]
fn a_yes_is_remembered_by_what_its_path_matches_and_a_no_by_the_path() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(
        r#"@id("read") permit (principal, action, resource == Credential::"orders-api")
           when { principal has unix && context has request && context.request.path like "/v1/orders/*" };
           @id("not") forbid (principal, action, resource == Credential::"orders-api")
           when { context has request && context.request.path == "/v1/orders/secret" };"#,
    );
    let mut cache = DecisionCache::new();
    let workload = attested(orders());
    for number in 0..10 {
        let request = request(&format!(
            "GET https://orders.example.com/v1/orders/{number}"
        ));
        let question = fixture.inject("orders-api", &[], &request);
        cache.decide(&snapshot, &workload, &question).unwrap();
    }
    assert_eq!((cache.hits(), cache.misses()), (9, 1));
    for path in ["orders/secret", "other/1", "other/2"] {
        let request = request(&format!("GET https://orders.example.com/v1/{path}"));
        let question = fixture.inject("orders-api", &[], &request);
        for _ in 0..2 {
            let denial = cache.decide(&snapshot, &workload, &question).unwrap_err();
            let nearest = denial.nearest.as_ref().map(ToString::to_string);
            assert!(
                nearest.is_none_or(|nearest| nearest.contains(path)),
                "{denial:?} is not of {path}"
            );
        }
    }
    assert_eq!((cache.hits(), cache.misses()), (9 + 3, 1 + 3));
}

#[test]
fn another_snapshot_empties_the_cache() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(READS_ORDERS);
    let request = request(GET);
    let question = fixture.inject("orders-api", &[], &request);
    let workload = attested(orders());
    let mut cache = DecisionCache::new();
    cache.decide(&snapshot, &workload, &question).unwrap();
    cache.decide(&snapshot, &workload, &question).unwrap();
    assert_eq!((cache.hits(), cache.misses()), (1, 1));
    let revoked = PolicySnapshot::new(
        Arc::clone(snapshot.engine()),
        Arc::new(snapshot.revocations().with(Revocation {
            id: "r".to_owned(),
            what: Revoked::Credential("orders-api".to_owned()),
            until: None,
        })),
    );
    let denial = cache.decide(&revoked, &workload, &question).unwrap_err();
    assert_eq!(denial.kind.as_str(), "revoked");
    cache.decide(&snapshot, &workload, &question).unwrap();
    assert_eq!((cache.hits(), cache.misses()), (1, 3));
}

#[test]
fn a_decision_is_remembered_for_what_it_was_made_of_only() {
    /// Reads nothing of the request, so that nothing else tells one question from another.
    const ALL: &str =
        "@id(\"all\") permit (principal, action, resource) when { principal has unix };";

    let (fixture, reread) = (Fixture::new(), Fixture::new());
    let snapshot = fixture.snapshot(ALL);
    let request = request(GET);
    let audience: Arc<str> = Arc::from("orders");
    let [read, read_again, write]: [Arc<[String]>; 3] =
        ["read", "read", "write"].map(|scope| Arc::from([scope.to_owned()]));
    let of = |credential, scopes, audience| Question {
        resource: Resource::Credential {
            credential,
            scopes,
            audience,
        },
        ..fixture.inject("orders-admin", &[], &request)
    };
    let known = fixture.credential("orders-api");
    let asked = of(known, &read, None);
    let to = |destination| Question {
        destination,
        ..asked
    };
    let public = fixture.destination("public");
    let rows = [
        (asked, false),
        (asked, true),
        (of(known, &read_again, None), true),
        (of(known, &write, None), false),
        (of(known, &read, Some(&audience)), false),
        // The same names in another reading of the configuration.
        (of(reread.credential("orders-api"), &read, None), false),
        (to(Some(reread.destination("orders"))), false),
        (to(Some(public)), false),
        (to(None), false),
        (
            fixture.inject("orders-admin", &["read".to_owned()], &request),
            false,
        ),
        (
            Question {
                request: None,
                ..asked
            },
            false,
        ),
        (
            Question {
                action: Action::Issue,
                ..asked
            },
            false,
        ),
        (
            Question {
                action: Action::Connect,
                resource: Resource::Destination(public),
                ..to(Some(public))
            },
            false,
        ),
        (unmatched(Some(&request), noon()), false),
        (asked, true),
    ];
    let mut cache = DecisionCache::new();
    let workload = attested(orders());
    for (question, is_remembered) in rows {
        let hits = cache.hits();
        let cached = cache.decide(&snapshot, &workload, &question);
        assert_eq!(cache.hits() > hits, is_remembered, "{question:?}");
        assert_same(&snapshot.decide(&workload, &question), &cached);
    }
    let (another, misses) = (attested(orders()), cache.misses());
    let cached = cache.decide(&snapshot, &another, &asked).unwrap();
    assert_eq!(cache.misses(), misses + 1);
    assert!(Arc::ptr_eq(cached.workload(), &another));
}

#[test]
fn the_time_is_in_the_key_by_the_second_only_where_it_is_read() {
    let fixture = Fixture::new();
    let count = |policies: &str| {
        let snapshot = fixture.snapshot(policies);
        let mut cache = DecisionCache::new();
        let workload = attested(orders());
        let request = request(GET);
        for millisecond in (0..3_000).step_by(100) {
            let question = Question {
                wall: noon() + Duration::from_millis(millisecond),
                ..fixture.inject("orders-api", &[], &request)
            };
            cache.decide(&snapshot, &workload, &question).unwrap();
        }
        cache.misses()
    };
    assert_eq!(count(READS_ORDERS), 1);
    assert_eq!(
        count(
            r#"@id("a") permit (principal, action, resource) when { principal has unix && context.time > datetime("2026-01-01") };"#
        ),
        3
    );
    assert_eq!(
        count(
            r#"@id("a") permit (principal, action, resource) when { principal has unix && context.local.hour >= 0 };"#
        ),
        1
    );
    assert_eq!(
        count(
            r#"@id("a") permit (principal, action, resource) when { principal has unix };
               @id("b") @expires("2026-11-18T12:00:01Z") permit (principal, action, resource) when { principal has unix };"#
        ),
        2
    );
}

#[test]
fn the_cache_is_bounded() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(
        r#"@id("a") permit (principal, action, resource == Credential::"orders-admin") when { principal has unix && context has request && context.request.path == "/" };"#,
    );
    let mut cache = DecisionCache::new();
    let workload = attested(stranger());
    // A denial that is cheap to make: the path is ambiguous, so that no policy is evaluated.
    for number in 0..crate::policy::CAPACITY + 1_000 {
        let request = request(&format!("GET https://orders.example.com/v1/%2e/{number}"));
        let question = fixture.inject("orders-admin", &[], &request);
        cache.decide(&snapshot, &workload, &question).unwrap_err();
    }
    assert!(cache.len() <= crate::policy::CAPACITY);
    assert!(cache.len() > crate::policy::CAPACITY / 2);
}

#[test]
fn a_permission_is_remembered_until_it_ends() {
    let fixture = Fixture::new();
    let engine = fixture
        .engine(
            r#"@id("hours") permit (principal, action, resource)
               when { principal has unix && context.local.weekday == "sunday" && context.local.hour == 2 };"#,
        )
        // That of Berlin.
        .in_time_zone(jiff::tz::TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap());
    let snapshot = PolicySnapshot::new(Arc::new(engine), Arc::default());
    let request = request(GET);
    let workload = attested(orders());
    let mut cache = DecisionCache::new();
    // The same hour a week later, and once more in the night in which summer time ends.
    for (at, is_remembered) in [
        ("2026-10-18T00:10:00Z", false),
        ("2026-10-18T00:50:00Z", true),
        ("2026-10-25T00:30:00Z", false),
        ("2026-10-25T01:30:00Z", false),
        ("2026-10-25T01:59:59Z", true),
    ] {
        let question = Question {
            wall: at.parse::<jiff::Timestamp>().unwrap().into(),
            ..fixture.inject("orders-api", &[], &request)
        };
        let hits = cache.hits();
        let cached = cache.decide(&snapshot, &workload, &question);
        assert_eq!(cache.hits() > hits, is_remembered, "{at}");
        assert_same(&snapshot.decide(&workload, &question), &cached);
        let grant = cached.unwrap();
        assert_eq!(
            grant.lease().check(&snapshot, question.wall),
            Ok(()),
            "{at}"
        );
    }
}

#[test]
fn a_remembered_denial_is_of_the_method_that_was_asked_for() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(READS_ORDERS);
    let workload = attested(orders());
    let mut cache = DecisionCache::new();
    for method in ["DELETE", "PUT", "PUT"] {
        let request = request(&format!("{method} https://orders.example.com/v1/orders"));
        let question = fixture.inject("orders-api", &[], &request);
        let denial = cache.decide(&snapshot, &workload, &question).unwrap_err();
        let nearest = denial.nearest.as_ref().unwrap().to_string();
        assert!(nearest.contains(method), "{nearest}");
    }
    assert_eq!((cache.hits(), cache.misses()), (1, 2));
}

#[test]
fn what_a_caller_makes_long_is_not_remembered() {
    let fixture = Fixture::new();
    let snapshot = fixture.snapshot(
        r#"@id("path") permit (principal, action, resource == Credential::"orders-api")
           when { principal has unix && context has request && context.request.path like "/v1/*" };
           @id("whole") permit (principal, action, resource == Credential::"orders-admin")
           when { principal has unix && context has request && context.request.path == context.request.method };"#,
    );
    let workload = attested(orders());
    let mut cache = DecisionCache::new();
    let mut is_remembered = |credential, method: &str, path: &str| {
        let request = request(&format!("{method} https://orders.example.com{path}"));
        let question = fixture.inject(credential, &[], &request);
        let hits = cache.hits();
        for _ in 0..2 {
            let cached = cache.decide(&snapshot, &workload, &question);
            assert_same(&snapshot.decide(&workload, &question), &cached);
        }
        cache.hits() > hits
    };
    let [short, long] = [1_000, 1_024].map(|length| "a".repeat(length));
    for (credential, method, path, expected) in [
        ("orders-api", "GET", format!("/other/{short}"), true),
        ("orders-api", "GET", format!("/other/{long}"), false),
        // Remembered by what it matches.
        ("orders-api", "GET", format!("/v1/{long}"), true),
        ("orders-admin", "GET", format!("/{short}"), true),
        ("orders-admin", "GET", format!("/{long}"), false),
        ("orders-admin", &long, "/".to_owned(), false),
    ] {
        assert_eq!(
            is_remembered(credential, method, &path),
            expected,
            "{credential} {} {}",
            method.len(),
            path.len()
        );
    }
}
