//! The workload API: what a caller may ask about itself, what it may not ask about another, and what is
//! recorded of it.

use std::time::Duration;

use countersign::admin::AdminActions;
use serde_json::{Value, json};

use crate::exec::Running;
use crate::support::counts::reached;
use crate::support::curl::{Answer, curl_as};
use crate::support::{NOBODY, is_root};

/// Who may have a token: the one that runs the tests, with any scope; jobs of one repository.
const ISSUES: &str = r#"
@id("scripts-hold-tokens")
permit (principal, action == Action::"issue", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };

@id("jobs-hold-tokens")
permit (principal, action == Action::"issue", resource == Credential::"billing-api")
when { principal has ci && principal.ci has repository && principal.ci.repository == "acme/billing" };
"#;

async fn ask_as(running: &Running, uid: Option<u32>, path: &str, arguments: &[&str]) -> Answer {
    let socket = running.world.path("api.sock").display().to_string();
    let url = format!("http://agent{path}");
    let all = [&["--unix-socket", &socket], arguments, &[&url]].concat();
    curl_as(uid, &all).await
}

async fn token(running: &Running, body: &str, arguments: &[&str]) -> Answer {
    let all = [&["--data", body], arguments].concat();
    ask_as(running, None, "/v1/token", &all).await
}

async fn issues(running: &Running) -> Vec<Value> {
    let lines = running.world.audit().await;
    lines
        .into_iter()
        .filter(|line| line["kind"] == "token_issue")
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_handed_out_where_policy_permits_and_recorded() {
    let running = Running::with(ISSUES).await;
    let good = || async {
        let answer = token(&running, r#"{"credential": "orders-api"}"#, &[])
            .await
            .expect(200);
        assert_eq!(answer.header("cache-control").as_deref(), Some("no-store"));
        let answer = answer.json();
        assert_eq!(answer["token_type"], "Bearer");
        assert_eq!(answer["scope"], "orders.read");
        answer["access_token"].as_str().unwrap().to_owned()
    };
    let first = good().await;
    let rows: &[(&str, &[&str], u16, &str)] = &[
        (
            r#"{"credential": "no-such"}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        (
            r#"{"credential": "orders-api", "scopes": ["orders.write"]}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        (
            r#"{"credential": "orders-api", "scopes": []}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        (
            r#"{"credential": "orders-api", "scopes": ["orders.read", "orders.read"]}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        (
            r#"{"credential": "orders-api", "audience": "https://other.test"}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        (
            r#"{"credential": "orders-api", "audience": "https://orders.example.test"}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        (
            r#"{"credential": "orders-api", "lifetime": 9}"#,
            &[],
            400,
            "token_request_invalid",
        ),
        ("credential=orders-api", &[], 400, "token_request_invalid"),
        ("", &[], 400, "token_request_invalid"),
        (
            r#"{"credential": "billing-api"}"#,
            &[],
            401,
            "token_required",
        ),
        (
            r#"{"credential": "billing-api"}"#,
            &["--header", "authorization: Bearer x.y.z"],
            401,
            "",
        ),
        (
            r#"{"credential": "orders-api"}"#,
            &[
                "--header",
                "authorization: Bearer a",
                "--header",
                "authorization: Bearer b",
            ],
            400,
            "malformed_request",
        ),
    ];
    for (body, arguments, status, code) in rows {
        let answer = token(&running, body, arguments).await;
        assert_eq!(answer.status, *status, "{body}: {answer:#?}");
        assert!(
            code.is_empty() || answer.code() == *code,
            "{body}: {answer:#?}"
        );
        assert_eq!(answer.header("www-authenticate").is_some(), *status == 401);
        if *code == "token_request_invalid" {
            let next = answer.json()["next"].as_str().unwrap().to_owned();
            assert!(next.starts_with("name a credential"), "{body}: {next}");
        }
    }
    let issuer = &running.world.issuer;
    let hour = Duration::from_secs(3600);
    for (repository, status) in [("acme/billing", 200), ("acme/orders", 403)] {
        let claims = json!({"repository": repository});
        let job = issuer.mint("job-1", "countersign", hour, &claims).unwrap();
        let header = format!("authorization: Bearer {job}");
        let answer = token(
            &running,
            r#"{"credential": "billing-api"}"#,
            &["--header", &header],
        )
        .await
        .expect(status);
        assert_eq!(answer.code() == "policy_denied", status == 403);
    }
    let second = good().await;
    assert_ne!(first, second, "each is minted apart");

    let records = issues(&running).await;
    assert_eq!(records.len(), rows.len() + 4);
    let allowed: Vec<&Value> = records
        .iter()
        .filter(|record| record["outcome"] == "ok")
        .collect();
    assert_eq!(allowed.len(), 3);
    for record in &allowed {
        assert!(record["token"]["sha256"].is_string(), "{record}");
    }
    let text = std::fs::read_to_string(running.world.path("audit.jsonl")).unwrap();
    assert!(!text.contains(&first) && !text.contains(&second));
    assert_eq!(running.world.authorization_server.state().issued().len(), 3);
    reached("token_refusals", rows.len() + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_paths_and_methods_are_refused() {
    let running = Running::with("").await;
    let rows: &[(&str, &[&str], u16, &str)] = &[
        ("/", &[], 404, "not_found"),
        ("/v1/status", &[], 404, "not_found"),
        ("/v1/reload", &["-X", "POST"], 404, "not_found"),
        ("/metrics", &[], 404, "not_found"),
        ("/v1/token", &[], 405, "method_not_allowed"),
        ("/v1/whoami", &["-X", "POST"], 405, "method_not_allowed"),
        ("/v1/explain/x", &[], 404, "not_found"),
        (
            "/v1/explain/01890a5d-ac96-774b-bcce-b302099a8057",
            &[],
            404,
            "not_found",
        ),
    ];
    ask_as(&running, None, "/v1/whoami", &[]).await.expect(200);
    for (path, arguments, status, code) in rows {
        let answer = ask_as(&running, None, path, arguments).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (*status, *code),
            "{path}"
        );
    }
    ask_as(&running, None, "/v1/whoami", &[]).await.expect(200);
    reached("paths_refused", rows.len());

    let proxy = ask_as(&running, None, "/v1/proxy", &[])
        .await
        .expect(200)
        .json();
    assert_eq!(proxy["proxy"], running.world.proxy());
    let root = std::fs::read_to_string(running.world.path("ca.pem")).unwrap();
    assert_eq!(proxy["ca_certificate"], root);
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_are_explained_to_those_that_they_are_about() {
    let running = Running::with("").await;
    let denied = running
        .world
        .curl(&["-X", "DELETE", "https://orders.example.test/v1/orders/7"])
        .await
        .expect(403);
    let id = denied.header("countersign-request-id").unwrap();
    let explained = running
        .user
        .run(&["policy", "explain", &id, "--agent", &running.agent])
        .await
        .expect(0);
    assert!(
        explained.out.starts_with("denied  policy_denied"),
        "{explained:#?}"
    );
    assert!(explained.out.contains("reads-orders"), "{explained:#?}");
    // On what is refused before any decision there is none to be explained.
    let refused = running
        .world
        .curl(&["http://elsewhere.example.test/"])
        .await
        .expect(403);
    let undecided = refused.header("countersign-request-id").unwrap();
    let unexplained = running.world.app().explain(undecided.parse().unwrap());
    let unexplained = unexplained.await.unwrap_err();
    assert_eq!(
        unexplained.detail,
        format!(
            "no decision was made on request `{undecided}`: it was refused as destination_not_configured: no destination is configured for `elsewhere.example.test:80`"
        )
    );
    let destination = "add a destination that covers this scheme, host, port and path";
    assert_eq!(unexplained.next, destination);
    // The admin's socket would explain everybody's.
    let path = format!("/v1/explain/{id}");
    ask_as(&running, None, &path, &[]).await.expect(200);
    if is_root("decisions_are_explained_to_those_that_they_are_about") {
        let mine = ask_as(&running, Some(NOBODY), "/v1/whoami", &[])
            .await
            .expect(200);
        assert_eq!(mine.json()["attributes"]["unix"]["uid"], NOBODY);
        let answer = ask_as(&running, Some(NOBODY), &path, &[]).await.expect(404);
        let unknown = path.replace(&id[..4], "0000");
        let unknown = ask_as(&running, Some(NOBODY), &unknown, &[])
            .await
            .expect(404);
        // Nothing says that there is such a request.
        assert_eq!(answer.code(), unknown.code());
        assert_eq!(answer.json()["next"], unknown.json()["next"]);
    }
}
