//! The verbs of whoever runs the agent, over its admin socket: reload, status, credentials, revocation.

use std::time::Duration;

use serde_json::Value;

use crate::dev::Dev;
use crate::program::User;
use crate::support::eventually;

#[tokio::test]
async fn a_running_agent_is_reloaded_and_its_credentials_revoked() {
    let user = User::new();
    let dev = Dev::in_text(&user).await;
    let injected = dev.said("1 injected").to_owned();
    let code = || async { user.sh(&injected).await.expect(0).json()["code"].clone() };
    let socket = user.path("countersign-dev/admin.sock");
    let reload = format!(
        "curl -sS -w '\\n%{{http_code}}' --unix-socket {} -X POST http://agent/v1/reload",
        socket.display()
    );
    let reload = || async {
        let answer = user.sh(&reload).await.expect(0).out;
        let (body, status) = answer.rsplit_once('\n').unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        (status.to_owned(), body)
    };
    let verb = |line: &str| {
        let words: Vec<String> = format!("{line} --output json")
            .split(' ')
            .map(str::to_owned)
            .collect();
        let user = &user;
        async move {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            user.run(&words).await.expect(0).json()
        }
    };
    assert_eq!(code().await, Value::Null);
    let (status, answer) = reload().await;
    assert_eq!(status, "200", "{answer}");
    let version = answer["policy_version"].clone();
    assert_eq!(verb("status").await["policy_version"], version);

    // A wrong policy is said, and the last good ones stay in force.
    let policies = user.path("countersign-dev/policies/orders.cedar");
    let good = std::fs::read_to_string(&policies).unwrap();
    std::fs::write(&policies, "permit (principal, action, resource)").unwrap();
    let (status, answer) = reload().await;
    assert_eq!(status, "422", "{answer}");
    assert_eq!(answer["code"], "reload_failed");
    let file = answer["diagnostics"][0]["file"].as_str().unwrap();
    assert!(file.ends_with("orders.cedar"), "{answer}");
    assert_eq!(code().await, Value::Null);
    assert_eq!(verb("status").await["policy_version"], version);
    // A good one that permits less is in force at once.
    let never = good.replace("context.request.safe", "context.request.method == \"POST\"");
    std::fs::write(&policies, never).unwrap();
    let (status, answer) = reload().await;
    assert_eq!(status, "200", "{answer}");
    assert_ne!(answer["policy_version"], version);
    assert_eq!(code().await, "policy_denied");
    std::fs::write(&policies, &good).unwrap();
    let (status, answer) = reload().await;
    assert_eq!(
        (status.as_str(), &answer["policy_version"]),
        ("200", &version)
    );
    assert_eq!(code().await, Value::Null);

    let held = verb("credentials list").await;
    assert_eq!(held[0]["credential"], "orders-api", "{held}");
    assert!(held[0]["expires_at"].is_string(), "{held}");
    assert!(held[0]["last_used"].is_string(), "{held}");

    let revoked = verb("revoke --credential orders-api --for 1h").await;
    assert_eq!(code().await, "revoked");
    // It outlives a reload, and ends when it is lifted.
    assert_eq!(reload().await.0, "200");
    assert_eq!(code().await, "revoked");
    let id = revoked["id"].as_str().unwrap();
    verb(&format!("revoke --lift {id}")).await;
    assert_eq!(code().await, Value::Null);

    // What there is not is neither revoked nor lifted.
    for (line, says) in [
        (
            "revoke --credential order-api",
            "did you mean `orders-api`?",
        ),
        ("revoke --lift abc", "countersign revoke --list"),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let refused = user.run(&words).await.expect(64);
        assert!(refused.errors.contains(says), "{refused:#?}");
    }
    assert_eq!(code().await, Value::Null);

    // A revocation ends by itself, when its time is over.
    verb("revoke --credential orders-api --for 15s").await;
    assert_eq!(code().await, "revoked");
    eventually(Duration::from_secs(30), || async {
        (code().await == Value::Null).then_some(())
    })
    .await;

    // All of it is in the audit, which is whole.
    let audit = user
        .path("countersign-dev/audit.jsonl")
        .display()
        .to_string();
    eventually(Duration::from_secs(30), || async {
        let text = std::fs::read_to_string(&audit).unwrap();
        ["reload_failed", "revoked", "lifted"]
            .iter()
            .all(|event| text.contains(event))
            .then_some(())
    })
    .await;
    user.run(&["audit", "verify", &audit]).await.expect(0);
    dev.interrupt().await;
}
