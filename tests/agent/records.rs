//! What the audit says of a request beyond that it was answered.

use countersign::audit::verify::verify;
use countersign::policy::explain;
use serde_json::{Value, json};

use crate::support::curl::curl;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

#[tokio::test(flavor = "multi_thread")]
async fn scopes_that_the_server_chose_are_recorded() {
    let mut world = World::servers().await;
    // Nothing is asked for, and the server grants what it has registered for the client.
    let configuration = format!("{COMMON}{DESTINATIONS}")
        .replace("    scopes: [orders.read]\n", "")
        .replace(
            "listeners:\n",
            "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n",
        );
    let issue = r#"
@id("issues-orders")
permit (principal, action == Action::"issue", resource == Credential::"orders-api")
when { principal has unix };
"#;
    world
        .start_agent(&configuration, &format!("{POLICIES}{issue}"))
        .await;
    world.good().await;
    world.good().await;
    let api = format!("http://{}/v1/token", world.address("api"));
    let ask = json!({"credential": "orders-api"}).to_string();
    let answer = curl(&["-X", "POST", "-d", &ask, &api]).await;
    assert_eq!(answer.status, 200, "{answer:#?}");

    let records: Vec<Value> = world
        .audit()
        .await
        .into_iter()
        .filter(|line| line["kind"] == "request" || line["kind"] == "token_issue")
        .collect();
    let obtained: Vec<_> = records
        .iter()
        .map(|record| record["token"]["obtained"].as_str().unwrap())
        .collect();
    assert_eq!(obtained, ["minted", "cache", "minted"], "{records:#?}");
    for record in &records {
        assert!(record["scopes_asked"].is_null(), "{record:#?}");
        assert_eq!(record["scopes_granted"], json!(["orders.read"]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scopes_are_asked_for_in_the_order_of_the_configuration() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}")
        .replacen("scopes: [orders.read]", "scopes: [a, b, c]", 1)
        .replace(
            "listeners:\n",
            "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n",
        );
    world.start_agent(&configuration, POLICIES).await;
    let api = format!("http://{}/v1/token", world.address("api"));
    for (asked, recorded) in [
        (json!(["c", "a"]), json!(["a", "c"])),
        (json!(["a", "c"]), json!(["a", "c"])),
        (json!(["b", "c", "a"]), json!(["a", "b", "c"])),
    ] {
        let ask = json!({"credential": "orders-api", "scopes": asked}).to_string();
        curl(&["-X", "POST", "-d", &ask, &api]).await;
        let record = world.audit().await.pop().unwrap();
        assert_eq!(record["kind"], "token_issue", "{record}");
        assert_eq!(record["scopes_asked"], recorded, "{record}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_long_path_the_beginning_is_recorded_and_kept() {
    const ENDS: &str = r#"
@id("ends")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && context has request && context.request.path like "*/end" };
"#;
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}");
    let policies = format!("{POLICIES}{ENDS}");
    world.start_agent(&configuration, &policies).await;
    world.good().await;
    // Of two bytes each, of which one would be cut in the middle.
    let long = format!("/v1/{}", "%C3%A4a".repeat(1000));
    for (path, decided) in [(format!("{long}/end"), "allow"), (long, "deny")] {
        let url = format!("http://plain.example.test{path}");
        let answer = world.curl(&["-X", "DELETE", &url]).await;
        let record = world.audited_requests().await.pop().unwrap();
        assert_eq!(record["decision"], decided);
        assert_eq!(record["path"], path[..2048]);
        assert_eq!(record["path_bytes"], path.len());
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, path.as_bytes());
        let digest = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
        assert_eq!(record["path_sha256"], digest.collect::<String>());

        let id = answer.header("countersign-request-id").unwrap();
        let decisions = &world.app().agent().recent_decisions;
        let kept = decisions.find(id.parse().unwrap()).unwrap();
        let path = &kept.question.request.as_ref().unwrap().path;
        assert_eq!((path.as_sent().len(), path.as_str().len()), (2048, 2047));
        // As it was decided, though the end is not there any more.
        let explained = explain::recorded(&kept);
        assert_eq!(explained.allowed, decided == "allow", "{explained:#?}");
        assert_eq!(explained.permits.len(), 1);
        assert_eq!(explained.suggestion, None);
        assert!(json!(explained).to_string().len() < 4096);
    }
    // A short one is whole.
    let url = "http://plain.example.test/v1/orders";
    world.curl(&["-X", "DELETE", url]).await.expect(403);
    let record = world.audited_requests().await.pop().unwrap();
    assert_eq!(record["path"], "/v1/orders");
    assert!(record["path_bytes"].is_null() && record["path_sha256"].is_null());
    let path = world.path("audit.jsonl");
    assert!(verify(&path, None).is_ok());
}
