//! The issuer rotates its keys, goes away, lies, and is flooded.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rstest::rstest;
use serde_json::{Value, json};
use url::Url;

use super::support::*;
use crate::attribute::AttributeType;
use crate::oidc::{InvalidIssuerSettings, OidcAttestor, OidcIssuerSettings, PRESETS, preset};
use crate::{Attestation, Attestor, FailureKind, Fetch, FetchError};

fn kind(attestation: &Attestation) -> Option<FailureKind> {
    match attestation {
        Attestation::Failed { kind, .. } => Some(*kind),
        _ => None,
    }
}

fn attested(attestation: &Attestation) -> bool {
    matches!(attestation, Attestation::Attested { .. })
}

fn key_named(id: &str) -> Value {
    elliptic_curve_key(&KEYS.p256, "P-256", id)
}

fn token_by(id: &str) -> String {
    token(with(header(), json!({"kid": id})), claims(), Signer::Es256)
}

#[tokio::test]
async fn nothing_is_asked_before_the_first_token_and_once_for_many() {
    let issuer = TestIssuer::start().await;
    let attestor = attestor(&issuer, &Arc::default());
    assert_eq!(issuer.requests(), 0);
    let tokens: Vec<_> = (0..50).map(|_| good_token()).collect();
    let mut tasks = tokio::task::JoinSet::new();
    let attestor = Arc::new(attestor);
    for token in tokens {
        let attestor = Arc::clone(&attestor);
        tasks.spawn(async move { attested(&attest(&attestor, &token).await) });
    }
    assert!(tasks.join_all().await.into_iter().all(|attested| attested));
    assert_eq!(issuer.requests(), 2, "metadata once, keys once");
    let status = attestor.key_set_status();
    assert_eq!((status.fetches, status.failures, status.keys), (1, 0, 6));
}

#[tokio::test]
async fn a_new_key_counts_at_once_and_the_old_one_through_the_overlap() {
    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let attestor = attestor(&issuer, &clock);
    issuer.publish(&json!({"keys": [key_named("old")]}));
    assert!(attested(&attest(&attestor, &token_by("old")).await));

    issuer.publish(&json!({"keys": [key_named("old"), key_named("new")]}));
    assert!(attested(&attest(&attestor, &token_by("new")).await));
    assert!(attested(&attest(&attestor, &token_by("old")).await));
    assert_eq!(issuer.key_requests(), 2);

    // The issuer ends the overlap. The first request that comes late finds out.
    issuer.publish(&json!({"keys": [key_named("new")]}));
    clock.advance(Duration::from_secs(299));
    let fresh = |id| {
        token(
            with(header(), json!({"kid": id})),
            with(claims(), json!({"exp": NOW + 9_999})),
            Signer::Es256,
        )
    };
    assert!(attested(&attest(&attestor, &fresh("old")).await));
    assert_eq!(issuer.key_requests(), 2);
    clock.advance(Duration::from_secs(1));
    assert_eq!(
        kind(&attest(&attestor, &fresh("old")).await),
        Some(FailureKind::InvalidEvidence)
    );
    assert_eq!(issuer.key_requests(), 3);
    assert!(attested(&attest(&attestor, &fresh("new")).await));
}

#[tokio::test]
async fn a_flood_of_unknown_keys_causes_one_fetch_in_ten_seconds() {
    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let attestor = attestor(&issuer, &clock);
    assert!(attested(&attest(&attestor, &good_token()).await));
    let flood = async |from: usize| {
        for number in from..from + 5_000 {
            let id = format!("fake-{number}");
            // What is signed does not matter: the key is looked for first.
            let fake = token_by("ec").replacen(
                &encode(with(header(), json!({"kid": "ec"})).to_string()),
                &encode(with(header(), json!({"kid": id})).to_string()),
                1,
            );
            assert_eq!(
                kind(&attest(&attestor, &fake).await),
                Some(FailureKind::InvalidEvidence)
            );
        }
    };
    flood(0).await;
    assert_eq!(issuer.key_requests(), 2);
    clock.advance(Duration::from_millis(9_999));
    assert_eq!(
        kind(&attest(&attestor, &token_by("late")).await),
        Some(FailureKind::InvalidEvidence)
    );
    assert_eq!(issuer.key_requests(), 2);
    clock.advance(Duration::from_millis(1));
    flood(5_000).await;
    assert_eq!(issuer.key_requests(), 3);
    assert!(attested(&attest(&attestor, &good_token()).await));
}

#[tokio::test]
async fn an_issuer_that_is_away_is_not_invalid_evidence() {
    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let attestor = attestor(&issuer, &clock);
    issuer.answer_with(503);
    for _ in 0..20 {
        assert_eq!(
            kind(&attest(&attestor, &good_token()).await),
            Some(FailureKind::CouldNotRun)
        );
    }
    assert_eq!(issuer.requests(), 1, "a failure is not repeated at once");
    issuer.answer_with(200);
    clock.advance(Duration::from_secs(2));
    assert!(attested(&attest(&attestor, &good_token()).await));

    // Away again: the keys that are known serve on, and an unknown one cannot be judged.
    issuer.answer_with(500);
    clock.advance(Duration::from_secs(200));
    assert!(attested(&attest(&attestor, &good_token()).await));
    assert_eq!(
        kind(&attest(&attestor, &token_by("new")).await),
        Some(FailureKind::CouldNotRun)
    );
    assert_eq!(
        kind(&attest(&attestor, &token_by("new")).await),
        Some(FailureKind::CouldNotRun)
    );
    assert_eq!(attestor.key_set_status().failures, 2);

    // After a day nobody knows whether a key was withdrawn.
    clock.advance(Duration::from_secs(24 * 60 * 60));
    let late = token(
        header(),
        with(claims(), json!({"exp": NOW + 999_999})),
        Signer::Es256,
    );
    assert_eq!(
        kind(&attest(&attestor, &late).await),
        Some(FailureKind::CouldNotRun)
    );
}

#[tokio::test]
async fn an_issuer_that_does_not_answer_holds_nobody_up_for_long() {
    #[derive(Debug)]
    struct OnceOnly(LoopbackFetch, AtomicUsize);

    #[async_trait]
    impl Fetch for OnceOnly {
        async fn get(&self, url: &Url) -> Result<Vec<u8>, FetchError> {
            if self.1.fetch_add(1, Ordering::SeqCst) >= 2 {
                std::future::pending::<()>().await;
            }
            self.0.get(url).await
        }
    }

    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let fetch = LoopbackFetch {
        address: issuer.address,
    };
    let fetch = Arc::new(OnceOnly(fetch, AtomicUsize::new(0)));
    let attestor =
        OidcAttestor::new(settings(), Arc::clone(&fetch) as _, Arc::clone(&clock) as _).unwrap();
    assert!(attested(&attest(&attestor, &good_token()).await));
    clock.advance(Duration::from_secs(299));
    assert!(attested(&attest(&attestor, &good_token()).await));
    clock.advance(Duration::from_secs(1));
    let late = token(
        header(),
        with(claims(), json!({"exp": NOW + 9_999})),
        Signer::Es256,
    );
    let both = async { tokio::join!(attest(&attestor, &late), attest(&attestor, &late)) };
    let both = tokio::time::timeout(Duration::from_secs(30), both).await;
    let (one, other) = both.expect("they end");
    assert!(attested(&one) && attested(&other));
    assert_eq!(fetch.1.load(Ordering::SeqCst), 3, "one asks");
}

#[tokio::test]
async fn a_server_that_is_not_there_could_not_run() {
    // It is bound, and does not listen.
    let nobody = tokio::net::TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = nobody.local_addr().unwrap();
    let fetch = Arc::new(LoopbackFetch { address });
    let attestor = OidcAttestor::new(settings(), fetch, Arc::new(TestClock::default())).unwrap();
    assert_eq!(
        kind(&attest(&attestor, &good_token()).await),
        Some(FailureKind::CouldNotRun)
    );
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_take_the_fetch_with_it() {
    let issuer = TestIssuer::start().await;
    let attestor = attestor(&issuer, &Arc::default());
    assert!(attested(&attest(&attestor, &good_token()).await));
    issuer.publish(&json!({"keys": [key_named("new")]}));
    {
        let token = token_by("new");
        let mut call = Box::pin(attest(&attestor, &token));
        // Polled until the fetch is under way, then dropped.
        while issuer.key_requests() < 2 {
            tokio::select! {
                biased;
                _ = &mut call => break,
                () = tokio::task::yield_now() => {}
            }
        }
    }
    assert!(attested(&attest(&attestor, &token_by("new")).await));
    assert_eq!(issuer.key_requests(), 2);
}

#[rstest]
#[case::another_issuer(json!({"issuer": "https://attacker.example", "jwks_uri": "https://ci.example.com/keys"}))]
#[case::a_slash_more(json!({"issuer": "https://ci.example.com/", "jwks_uri": "https://ci.example.com/keys"}))]
#[case::no_issuer(json!({"jwks_uri": "https://ci.example.com/keys"}))]
#[case::keys_in_clear(json!({"issuer": ISSUER, "jwks_uri": "http://ci.example.com/keys"}))]
#[case::keys_elsewhere(json!({"issuer": ISSUER, "jwks_uri": "https://attacker.example/keys"}))]
#[case::keys_at_metadata(json!({"issuer": ISSUER, "jwks_uri": "https://169.254.169.254/keys"}))]
#[case::keys_with_a_user(json!({"issuer": ISSUER, "jwks_uri": "https://ci.example.com@attacker.example/keys"}))]
#[case::keys_in_a_file(json!({"issuer": ISSUER, "jwks_uri": "file:///keys"}))]
#[case::no_keys(json!({"issuer": ISSUER}))]
#[case::keys_as_array(json!({"issuer": ISSUER, "jwks_uri": ["https://ci.example.com/keys"]}))]
#[case::not_an_object(json!([]))]
#[tokio::test]
async fn metadata_that_is_not_the_issuers_own_is_not_used(#[case] metadata: Value) {
    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let attestor = attestor(&issuer, &clock);
    let proper = issuer.documents.lock().unwrap().metadata.clone();
    issuer.documents.lock().unwrap().metadata = metadata.to_string();
    assert_eq!(
        kind(&attest(&attestor, &good_token()).await),
        Some(FailureKind::CouldNotRun)
    );
    assert_eq!(issuer.key_requests(), 0);
    issuer.documents.lock().unwrap().metadata = proper;
    clock.advance(Duration::from_secs(2));
    assert!(attested(&attest(&attestor, &good_token()).await));
}

#[rstest]
#[case::html("<html>")]
#[case::empty("")]
#[case::no_keys(r#"{"keys":[]}"#)]
#[case::keys_as_object(r#"{"keys":{}}"#)]
#[case::keys_twice(r#"{"keys":[],"keys":[]}"#)]
#[case::none_usable(r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#)]
#[case::a_point_cut_short(
    r#"{"keys":[{"kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA","kid":"ec"}]}"#
)]
#[tokio::test]
async fn a_key_set_that_cannot_be_read_leaves_the_last_one(#[case] keys: &str) {
    let issuer = TestIssuer::start().await;
    let attestor = attestor(&issuer, &Arc::default());
    assert!(attested(&attest(&attestor, &good_token()).await));
    issuer.documents.lock().unwrap().keys = keys.to_owned();
    assert_eq!(
        kind(&attest(&attestor, &token_by("new")).await),
        Some(FailureKind::CouldNotRun)
    );
    assert!(attested(&attest(&attestor, &good_token()).await));
}

#[tokio::test]
async fn a_token_without_a_key_id_is_of_the_only_key() {
    let issuer = TestIssuer::start().await;
    let attestor = attestor(&issuer, &Arc::default());
    issuer.publish(&json!({"keys": [key_named("only")]}));
    let unnamed = token(without(header(), "kid"), claims(), Signer::Es256);
    assert!(attested(&attest(&attestor, &unnamed).await));
    let forged = token(without(header(), "kid"), claims(), Signer::Attacker);
    assert_eq!(
        kind(&attest(&attestor, &forged).await),
        Some(FailureKind::InvalidEvidence)
    );
}

#[rstest]
#[case::name_of_an_attestor(|settings: &mut OidcIssuerSettings| settings.name = "unix".into())]
#[case::name_in_capitals(|settings: &mut OidcIssuerSettings| settings.name = "CI".into())]
#[case::empty_name(|settings: &mut OidcIssuerSettings| settings.name = String::new())]
#[case::issuer_in_clear(|settings: &mut OidcIssuerSettings| settings.issuer = "http://ci.example.com".into())]
#[case::issuer_with_a_query(|settings: &mut OidcIssuerSettings| settings.issuer = "https://ci.example.com?a".into())]
#[case::issuer_with_a_user(|settings: &mut OidcIssuerSettings| settings.issuer = "https://a@ci.example.com".into())]
#[case::not_a_url(|settings: &mut OidcIssuerSettings| settings.issuer = "ci.example.com".into())]
#[case::no_audience(|settings: &mut OidcIssuerSettings| settings.audiences.clear())]
#[case::subject_as_number(|settings: &mut OidcIssuerSettings| { settings.claims.insert("sub".into(), AttributeType::Long); })]
fn settings_that_prove_nothing_are_refused(#[case] change: fn(&mut OidcIssuerSettings)) {
    let build = |settings: OidcIssuerSettings| -> Result<OidcAttestor, InvalidIssuerSettings> {
        let fetch = Arc::new(LoopbackFetch {
            address: ([127, 0, 0, 1], 1).into(),
        });
        OidcAttestor::new(settings, fetch, Arc::new(TestClock::default()))
    };
    assert!(build(settings()).is_ok());
    let mut changed = settings();
    change(&mut changed);
    assert!(build(changed).is_err());
}

#[test]
fn presets_name_what_cannot_be_taken_over() {
    for name in PRESETS {
        assert!(preset(name).is_some());
    }
    assert!(preset("unknown").is_none());
    let github = preset("github").unwrap();
    for claim in [
        "repository_id",
        "repository_owner_id",
        "job_workflow_ref",
        "runner_environment",
        "event_name",
    ] {
        assert_eq!(github.get(claim), Some(&AttributeType::String), "{claim}");
    }
    let gitlab = preset("gitlab").unwrap();
    for claim in [
        "project_id",
        "namespace_id",
        "ref_protected",
        "pipeline_source",
    ] {
        assert_eq!(gitlab.get(claim), Some(&AttributeType::String), "{claim}");
    }
}

#[tokio::test]
async fn declarations_and_attributes_agree() {
    let issuer = TestIssuer::start().await;
    let attestor = attestor(&issuer, &Arc::default());
    let Attestation::Attested { groups, .. } = attest(&attestor, &good_token()).await else {
        panic!("a good token");
    };
    let stated = &groups["ci"];
    let declared = attestor.declarations();
    assert_eq!(declared.len(), stated.len());
    for declaration in declared {
        assert_eq!(declaration.group, "ci");
        assert_eq!(
            declaration.attribute_type,
            stated[&declaration.name].attribute_type()
        );
    }
}
