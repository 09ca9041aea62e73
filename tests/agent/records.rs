//! What the audit says of a request beyond that it was answered.

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
