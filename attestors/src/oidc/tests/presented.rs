//! What one head presents: through the catalog, on a connection.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::support::*;
use crate::{
    AttestationEnded, Attestor, Catalog, Clock, ConnectionAttestation, FailureKind, PeerEvidence,
    PresentedToken,
};

struct Setting {
    issuer: TestIssuer,
    clock: Arc<TestClock>,
    catalog: Arc<Catalog>,
}

async fn setting() -> Setting {
    let issuer = TestIssuer::start().await;
    let clock = Arc::new(TestClock::default());
    let attestors: Vec<Arc<dyn Attestor>> = vec![Arc::new(attestor(&issuer, &clock))];
    let catalog = Arc::new(Catalog::new(
        attestors,
        Arc::clone(&clock) as Arc<dyn Clock>,
    ));
    Setting {
        issuer,
        clock,
        catalog,
    }
}

async fn connection(setting: &Setting) -> ConnectionAttestation {
    ConnectionAttestation::new(Arc::clone(&setting.catalog), PeerEvidence::none()).await
}

fn presented(token: &str) -> PresentedToken {
    PresentedToken::new(token.to_owned())
}

#[tokio::test]
async fn a_token_is_evidence_of_the_head_that_presents_it_and_of_no_other() {
    let setting = setting().await;
    let connection = connection(&setting).await;
    let token = presented(&good_token());

    let with_token = connection.attest(Some(&token)).await.unwrap();
    assert_eq!(with_token.facts().subject(), "ci sub job");
    assert_eq!(with_token.facts().evidence, ["oidc:ci"]);
    assert_eq!(with_token.presented().unwrap().sha256(), token.sha256());
    assert_eq!(
        with_token.valid_until(),
        Some(UNIX_EPOCH + Duration::from_secs(NOW + 300))
    );

    let without = connection.attest(None).await.unwrap();
    assert_eq!(without.facts().subject(), "unknown");
    assert!(without.presented().is_none());
    assert_ne!(without.generation(), with_token.generation());
    assert_ne!(without.isolation_key(), with_token.isolation_key());

    let again = connection.attest(Some(&token)).await.unwrap();
    assert!(
        Arc::ptr_eq(&with_token, &again),
        "the same head costs a clone"
    );

    let forged = presented(&token_of(
        &header().to_string(),
        &claims().to_string(),
        Signer::Attacker,
    ));
    let refused = connection.attest(Some(&forged)).await.unwrap();
    assert!(refused.presented().is_none());
    assert_eq!(refused.facts().failed_attestors[0].name, "ci");
    assert_eq!(
        refused.facts().failed_attestors[0].kind,
        FailureKind::InvalidEvidence
    );
    assert!(refused.facts().groups.is_empty());
}

#[tokio::test]
async fn a_verified_token_is_remembered_until_it_expires_and_keeps_its_generation() {
    let setting = setting().await;
    let token = presented(&good_token());
    let first = connection(&setting)
        .await
        .attest(Some(&token))
        .await
        .unwrap();

    // The issuer replaces its keys: what was verified stands, on other connections too.
    setting.issuer.publish(&json!({"keys": []}));
    let second = connection(&setting)
        .await
        .attest(Some(&token))
        .await
        .unwrap();
    assert_eq!(first.generation(), second.generation());

    let other = presented(&token_of(
        &header().to_string(),
        &with(claims(), json!({"jti": "2"})).to_string(),
        Signer::Es256,
    ));
    let other = connection(&setting)
        .await
        .attest(Some(&other))
        .await
        .unwrap();
    assert_eq!(first.isolation_key(), other.isolation_key(), "one subject");
    assert_ne!(first.generation(), other.generation(), "two tokens");

    let wall = setting.clock.wall();
    first.check_liveness(wall).unwrap();
    setting.clock.advance(Duration::from_secs(300));
    let wall = setting.clock.wall();
    assert_eq!(
        first.check_liveness(wall),
        Err(AttestationEnded::EvidenceExpired)
    );
    let late = connection(&setting)
        .await
        .attest(Some(&token))
        .await
        .unwrap();
    assert_eq!(
        late.facts().failed_attestors[0].detail,
        "the presented token expired"
    );
}

#[tokio::test]
async fn a_token_is_verified_again_after_an_hour() {
    let setting = setting().await;
    let connection = connection(&setting).await;
    let token = presented(&token(
        header(),
        with(claims(), json!({"exp": NOW + 9_999})),
        Signer::Es256,
    ));
    let first = connection.attest(Some(&token)).await.unwrap();
    setting.issuer.publish(&json!({"keys": [rsa_key("other")]}));
    setting.clock.advance(Duration::from_secs(3_599));
    let again = connection.attest(Some(&token)).await.unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert_eq!(first.valid_until(), again.valid_until());
    setting.clock.advance(Duration::from_secs(1));
    let late = connection.attest(Some(&token)).await.unwrap();
    assert!(late.presented().is_none(), "its key was withdrawn");
}

#[tokio::test]
async fn an_expired_token_is_not_served_from_its_connection() {
    let setting = setting().await;
    let connection = connection(&setting).await;
    let token = presented(&good_token());
    assert!(
        connection
            .attest(Some(&token))
            .await
            .unwrap()
            .presented()
            .is_some()
    );
    setting.clock.advance(Duration::from_secs(300));
    assert!(
        connection
            .attest(Some(&token))
            .await
            .unwrap()
            .presented()
            .is_none()
    );
}

#[tokio::test]
async fn an_issuer_that_is_away_is_told_apart_and_asked_again() {
    let setting = setting().await;
    let connection = connection(&setting).await;
    let token = presented(&good_token());
    setting.issuer.answer_with(503);
    let away = connection.attest(Some(&token)).await.unwrap();
    assert_eq!(
        away.facts().failed_attestors[0].kind,
        FailureKind::CouldNotRun
    );
    assert!(away.presented().is_none());
    setting.issuer.answer_with(200);
    setting.clock.advance(Duration::from_secs(2));
    assert!(
        connection
            .attest(Some(&token))
            .await
            .unwrap()
            .presented()
            .is_some()
    );
}

#[tokio::test]
async fn a_token_of_an_unknown_issuer_fails_and_fetches_nothing() {
    let setting = setting().await;
    let connection = connection(&setting).await;
    for (token, detail) in [
        (
            token(
                header(),
                with(claims(), json!({"iss": "https://169.254.169.254"})),
                Signer::Es256,
            ),
            "the presented token's issuer `https://169.254.169.254` is not configured",
        ),
        (
            "nonsense".to_owned(),
            "the presented token is not three parts of base64url with dots between (JWS compact serialisation)",
        ),
    ] {
        let workload = connection.attest(Some(&presented(&token))).await.unwrap();
        let failed = &workload.facts().failed_attestors[0];
        assert_eq!(
            (failed.name.as_str(), failed.kind),
            ("oidc", FailureKind::InvalidEvidence)
        );
        assert_eq!(failed.detail, detail);
    }
    assert_eq!(setting.issuer.requests(), 0);
}

#[tokio::test]
async fn a_refused_token_is_known_as_its_issuers() {
    let setting = setting().await;
    let connection = connection(&setting).await;
    let headed = |fields| with(header(), fields);
    let foreign = || with(claims(), json!({"iss": "https://other.example.com"}));
    let long = json!({"long": "x".repeat(16 * 1024)});
    let twice = claims().to_string().replacen('{', r#"{"sub":"other","#, 1);
    let refused = |claims: Value| {
        [
            token(
                headed(json!({"typ": "at+jwt"})),
                claims.clone(),
                Signer::Es256,
            ),
            token(
                headed(json!({"alg": "ES512"})),
                claims.clone(),
                Signer::Es256,
            ),
            token(
                headed(json!({"crit": ["exp"]})),
                claims.clone(),
                Signer::Es256,
            ),
            token(headed(long.clone()), claims.clone(), Signer::Es256),
            token(header(), with(claims.clone(), long.clone()), Signer::Es256),
            format!("{}=", token(header(), claims.clone(), Signer::Es256)),
            format!(".{}=.", encode(claims.to_string())),
        ]
    };
    let of_this = refused(claims());
    let of_this =
        of_this
            .into_iter()
            .chain([token_of(&header().to_string(), &twice, Signer::Es256)]);
    let of_another = refused(foreign());
    for (token, name) in of_this
        .map(|token| (token, "ci"))
        .chain(of_another.map(|token| (token, "oidc")))
    {
        let workload = connection.attest(Some(&presented(&token))).await.unwrap();
        let failed = &workload.facts().failed_attestors;
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(
            (failed[0].name.as_str(), failed[0].kind),
            (name, FailureKind::InvalidEvidence),
            "{failed:?}"
        );
    }
    assert_eq!(setting.issuer.requests(), 0);
}

#[tokio::test]
async fn a_token_that_no_attestor_is_there_for_is_ignored() {
    let catalog = Arc::new(Catalog::new(Vec::new(), Arc::new(TestClock::default())));
    let connection = ConnectionAttestation::new(catalog, PeerEvidence::none()).await;
    let workload = connection
        .attest(Some(&presented(&good_token())))
        .await
        .unwrap();
    assert!(workload.presented().is_none());
    assert!(workload.facts().failed_attestors.is_empty());
    assert_eq!(workload.facts().subject(), "unknown");
}
