//! What an operator revokes through the admin actions of a running agent.

use std::os::unix::fs::MetadataExt;

use countersign::admin::{AdminActions, RevocationRequest};
use countersign::policy::Revoked;
use serde_json::{Value, json};

use crate::support::counts::reached;
use crate::support::curl::curl;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const ORDERS: &str = "https://orders.example.test/v1/orders";

const ISSUE: &str = r#"
@id("issues")
permit (principal, action == Action::"issue", resource)
when { principal has unix };
"#;

/// Revokes a token for as long as it takes to lift it, and returns the answer.
async fn revoke(world: &World, sha256: &str) -> Value {
    let request = RevocationRequest {
        what: Revoked::TokenSha256(sha256.to_owned()),
        for_seconds: None,
    };
    world.app().revoke(request).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_a_revoked_token_was_for_gets_no_other() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}").replace(
        "listeners:\n",
        "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n",
    );
    world
        .start_agent(&configuration, &format!("{POLICIES}{ISSUE}"))
        .await;
    world.good().await;
    let api = format!("http://{}/v1/token", world.address("api"));
    let issue = async |credential: &str| {
        let ask = json!({"credential": credential}).to_string();
        curl(&["-X", "POST", "-d", &ask, &api]).await
    };
    assert_eq!(issue("orders-api").await.status, 200);
    let lines = world.audit().await;
    let token_of = |kind: &str| {
        let line = lines.iter().find(|line| line["kind"] == kind).unwrap();
        line["token"]["sha256"].as_str().unwrap().to_owned()
    };
    let mut refused = 0;
    for kind in ["request", "token_issue"] {
        let token = token_of(kind);
        let seen = world.api.seen().len();
        let answer = revoke(&world, &token).await;
        assert_eq!(answer["tokens"][0]["token_sha256"], *token, "{answer}");
        assert_eq!(answer["tokens"][0]["upstream"], "revoked", "{answer}");
        assert_eq!(answer["holder"]["credential"], "orders-api", "{answer}");
        // The next request is refused, and neither is another token minted for it.
        let minted = world.authorization_server.state().issued().len();
        let answer = world.curl(&[ORDERS]).await;
        assert_eq!((answer.status, answer.code()), (403, "revoked".to_owned()));
        let answer = issue("orders-api").await;
        assert_eq!((answer.status, answer.code()), (403, "revoked".to_owned()));
        // It outlives a reload.
        world.app().reload().await.unwrap();
        assert_eq!(world.curl(&[ORDERS]).await.code(), "revoked");
        refused += 3;
        assert_eq!(world.authorization_server.state().issued().len(), minted);
        assert_eq!(world.api.seen().len(), seen, "the origin saw a request");
        // Another credential is another matter.
        assert_eq!(issue("billing-api").await.status, 200);
        world
            .app()
            .lift(answer_id(&world).await.as_str())
            .await
            .unwrap();
        world.good().await;
        assert_eq!(issue("orders-api").await.status, 200);
    }
    reached("revoked_by_token", refused);
}

/// That read nothing of the process but its uid.
fn policies_of_uids() -> String {
    let by_uid = "principal has unix && principal.unix.uid >= 0";
    POLICIES.replace("principal has unix", by_uid)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_have_is_not_revoked() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}");
    world.start_agent(&configuration, &policies_of_uids()).await;
    let revoke = async |selector: &str| {
        let request = RevocationRequest {
            what: Revoked::Workload(selector.parse().unwrap()),
            for_seconds: None,
        };
        world.app().revoke(request).await
    };
    for selector in [
        "unix.uidd=0",
        "unxi.uid=0",
        "unix.uid=root",
        // No policy reads them.
        "unix.network_namespace=1",
        "unix.user=root",
    ] {
        let refused = revoke(selector).await.unwrap_err();
        assert_eq!(refused.status, 400, "{selector}");
        assert_eq!(refused.code, "attribute_not_attested", "{selector}");
        assert!(refused.detail.contains(selector), "{}", refused.detail);
    }
    assert_eq!(world.app().revocations().await, json!([]));
    world.good().await;
    revoke("unix.uid=4294967295").await.unwrap();
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_ends_after_the_end_of_time_is_told_without_an_end() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}");
    world.start_agent(&configuration, POLICIES).await;
    let request = RevocationRequest {
        what: Revoked::Workload("unix.uid=4294967295".parse().unwrap()),
        for_seconds: Some(10_000_000_000_000_000_000),
    };
    let told = world.app().revoke(request).await.unwrap();
    assert_eq!(told["until"], Value::Null);
    assert_eq!(world.app().revocations().await[0]["id"], told["id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_revoked_by_what_no_policy_reads_any_more_stays_so() {
    const READS: &str = r#"
@id("reads")
permit (principal, action, resource)
when { principal has unix.network_namespace && principal.unix.network_namespace == 1 };
"#;

    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}");
    let namespace = std::fs::metadata("/proc/self/ns/net").unwrap().ino();
    world
        .start_agent(&configuration, &format!("{}{READS}", policies_of_uids()))
        .await;
    world.good().await;
    let selector = format!("unix.network_namespace={namespace}");
    let request = RevocationRequest {
        what: Revoked::Workload(selector.parse().unwrap()),
        for_seconds: None,
    };
    world.app().revoke(request).await.unwrap();
    assert_eq!(world.curl(&[ORDERS]).await.code(), "revoked");
    world.write_policies(&policies_of_uids());
    world.app().reload().await.unwrap();
    assert_eq!(world.curl(&[ORDERS]).await.code(), "revoked");
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_a_token_was_for_is_told_by_what_is_still_collected() {
    const CLAIMS: &str = "    assertion_claims: {namespace: \"${unix.network_namespace}\"}\n";
    let mut world = World::servers().await;
    let client = "    client_id: orders-agent\n";
    let configuration =
        format!("{COMMON}{DESTINATIONS}").replace(client, &format!("{client}{CLAIMS}"));
    world.start_agent(&configuration, &policies_of_uids()).await;
    world.good().await;
    let lines = world.audit().await;
    let request = lines.iter().find(|line| line["kind"] == "request").unwrap();
    let token = request["token"]["sha256"].as_str().unwrap();
    let path = world.path("countersign.yaml");
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written.contains(CLAIMS));
    std::fs::write(&path, written.replace(CLAIMS, "")).unwrap();
    world.app().reload().await.unwrap();
    revoke(&world, token).await;
    assert_eq!(world.curl(&[ORDERS]).await.code(), "revoked");
}

/// The id of the one revocation in force.
async fn answer_id(world: &World) -> String {
    let revocations = world.app().revocations().await;
    revocations[0]["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_that_there_is_not_is_not_revoked() {
    let mut world = World::servers().await;
    let api = "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n";
    let both = format!("{COMMON}{DESTINATIONS}").replace("listeners:\n", api);
    let (before, rest) = both.split_once("  - name: billing-api\n").unwrap();
    let (_, after) = rest.split_once("interception:\n").unwrap();
    let one = format!("{before}interception:\n{after}");
    world
        .start_agent(&both, &format!("{POLICIES}{ISSUE}"))
        .await;
    let revoke = async |credential: &str| {
        let request = RevocationRequest {
            what: Revoked::Credential(credential.to_owned()),
            for_seconds: None,
        };
        world.app().revoke(request).await
    };
    let reload = async |configuration: &str| {
        world.write("countersign.yaml", &world.fill(configuration));
        world.app().reload().await.unwrap();
    };
    let bill = async || {
        let api = format!("http://{}/v1/token", world.address("api"));
        curl(&["-X", "POST", "-d", r#"{"credential": "billing-api"}"#, &api]).await
    };
    for (credential, next) in [
        ("order-api", "did you mean `orders-api`?"),
        ("nope", "there are `billing-api`, `orders-api`"),
    ] {
        let refused = revoke(credential).await.unwrap_err();
        assert_eq!(refused.status, 400, "{credential}");
        assert_eq!(refused.code, "credential_not_configured", "{credential}");
        assert_eq!(refused.next, next, "{credential}");
    }
    assert_eq!(world.app().revocations().await, json!([]));

    // One that a reload took away is there while a token of it lives.
    bill().await.expect(200);
    reload(&one).await;
    let answer = revoke("billing-api").await.unwrap();
    assert_eq!(answer["tokens"][0]["upstream"], "revoked", "{answer}");
    assert!(revoke("billing-api").await.is_err());
    // And stays revoked where another brings it back.
    reload(&both).await;
    assert_eq!(bill().await.code(), "revoked");
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_held_is_revoked_and_said_not_to_be() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}");
    world.start_agent(&configuration, POLICIES).await;
    let answer = revoke(&world, &"0".repeat(64)).await;
    let detail = answer["detail"].as_str().unwrap();
    assert!(detail.contains("no such token is held here"), "{answer}");
    world.good().await;
    let token = world.audited_requests().await.pop().unwrap()["token"]["sha256"].clone();
    let answer = revoke(&world, token.as_str().unwrap()).await;
    assert_eq!(answer["detail"], Value::Null, "{answer}");
}
