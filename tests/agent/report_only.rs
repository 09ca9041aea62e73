//! A destination that only reports what policy would deny.

use std::time::{Duration, Instant};

use countersign::policy::{Revocation, Revoked};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{Response, exchange, open_tunnel, read_head};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{Stalls, a_second};

const WATCHED: &str = r#"
  - {name: watched, hosts: [watched.example.test], scheme: http, mode: report_only, credentials: [{name: billing-api}], connect_to: "{origin}"}
  - {name: enforced, hosts: [enforced.example.test], scheme: http, credentials: [{name: billing-api}], connect_to: "{origin}"}
  - {name: for-jobs, hosts: [for-jobs.example.test], scheme: http, mode: report_only, paths: ["/jobs/**"], credentials: [{name: jobs-api}], connect_to: "{origin}"}
  - {name: tunnelled, hosts: [tunnelled.example.test], scheme: http, mode: report_only, connect_to: "{origin}"}
  - {name: enforced-tunnel, hosts: [enforced-tunnel.example.test], scheme: http, connect_to: "{origin}"}
  - {name: guarded, hosts: ["127.0.0.2"], scheme: http, mode: report_only, credentials: [{name: billing-api}]}
"#;

const JOBS_CREDENTIAL: &str = r#"
  - name: jobs-api
    type: oauth_client_credentials
    issuer: https://auth.example.test
    client_id: orders-agent
    client_authentication: {method: private_key_jwt, key_file: client.key, algorithm: ES256}
    scopes: [orders.read]
    resources: [https://orders.example.test]
    ca_file: servers.pem
    connect_to: "{auth}"
interception:
"#;

const BILLS: &str = r#"
@id("reads-bills")
permit (principal, action == Action::"inject", resource == Credential::"billing-api")
when { principal has unix && context has request && context.request.method == "GET" };
@id("no-put")
forbid (principal, action == Action::"inject", resource == Credential::"billing-api")
when { context has request && context.request.method == "PUT" };
@id("jobs")
permit (principal, action == Action::"inject", resource == Credential::"jobs-api")
when { principal has ci.repository && context has request && context.request.path like "/jobs/*" };
"#;

const OWN: &str = "Bearer of-the-caller";

struct Setting {
    world: World,
    origin: Origin,
    caller: Puppet,
}

impl Setting {
    async fn start() -> Self {
        let mut world = World::servers().await;
        let origin = Origin::start(None, |head| {
            let length = if head.contains(" /unending ") { 9 } else { 2 };
            vec![format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\nok"
            )]
        })
        .await;
        world.origins.push(("origin".to_owned(), origin.address));
        let common = COMMON.replace("interception:\n", JOBS_CREDENTIAL.trim_start_matches('\n'));
        world
            .start_agent(
                &format!("{common}{DESTINATIONS}{WATCHED}"),
                &format!("{POLICIES}{BILLS}"),
            )
            .await;
        let caller = Puppet::start(&world.target("proxy"), None).await;
        Self {
            world,
            origin,
            caller,
        }
    }

    /// Sends a request; returns the answer, the value of `Authorization` that reached the origin if one
    /// did, and its record.
    async fn send(&self, head: &str) -> (Response, Option<String>, Value) {
        let before = self.origin.heads().len();
        let request = format!("{head}\r\nAuthorization: {OWN}\r\nX-Kept: 1\r\n\r\n");
        let answer = exchange(&mut self.caller.connect().await, &request).await;
        let heads = self.origin.heads();
        let arrived = match &heads[before..] {
            [] => None,
            [head] => {
                assert!(
                    head.to_ascii_lowercase().contains("\r\nx-kept: 1\r\n"),
                    "{head}"
                );
                let values: Vec<_> = head
                    .lines()
                    .filter_map(|line| line.split_once(": "))
                    .filter(|(name, _)| name.eq_ignore_ascii_case("authorization"))
                    .map(|(_, value)| value.to_owned())
                    .collect();
                assert_eq!(values.len(), 1, "{head}");
                values.into_iter().next()
            }
            more => panic!("{more:?}"),
        };
        let record = self.world.audited_requests().await.pop().unwrap();
        assert_eq!(
            answer.headers("countersign-request-id"),
            [record["request_id"].as_str().unwrap()]
        );
        (answer, arrived, record)
    }
}

fn head(method: &str, host: &str, path: &str) -> String {
    format!("{method} http://{host}{path} HTTP/1.1\r\nHost: {host}")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_denied_passes_with_the_callers_own_headers_and_is_recorded() {
    let setting = Setting::start().await;
    setting.world.good().await;
    let mut reported = 0;
    // No permit, and a `forbid`.
    for (method, policies) in [("DELETE", Value::Null), ("PUT", json!(["no-put"]))] {
        let (answer, arrived, record) = setting
            .send(&head(method, "watched.example.test", "/"))
            .await;
        let answer = answer.expect(200);
        assert_eq!(answer.headers("proxy-status"), Vec::<&str>::new());
        assert_eq!(arrived.as_deref(), Some(OWN));
        assert_eq!(record["decision"], "report_only", "{record}");
        assert_eq!(record["policies"], policies, "{record}");
        assert_eq!(
            (&record["status"], &record["outcome"]),
            (&json!(200), &json!("ok")),
            "{record}"
        );
        assert_eq!(record["token"], Value::Null, "{record}");
        // No token was asked for either, and the same is denied where denials are enforced.
        assert_eq!(
            setting.world.authorization_server.state().token_requests(),
            1
        );
        let (answer, arrived, record) = setting
            .send(&head(method, "enforced.example.test", "/"))
            .await;
        assert_eq!(answer.expect(403).code(), "policy_denied");
        assert_eq!(arrived, None);
        assert_eq!(record["decision"], "deny", "{record}");
        reported += 1;
    }
    // What is permitted is as everywhere.
    for host in ["watched.example.test", "enforced.example.test"] {
        let (answer, arrived, record) = setting.send(&head("GET", host, "/")).await;
        answer.expect(200);
        assert!(arrived.unwrap().starts_with("Bearer ey"));
        assert_eq!(record["decision"], "allow", "{record}");
        assert_eq!(record["policies"], json!(["reads-bills"]), "{record}");
    }
    let metrics = setting.world.app().agent().metrics.encode();
    let counted = format!("countersign_decisions_total{{effect=\"report_only\"}} {reported}");
    assert!(metrics.contains(&counted), "{metrics}");
    setting.world.good().await;
    reached("reported", reported);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_denial_of_policy_is_refused_all_the_same() {
    let setting = Setting::start().await;
    setting.world.good().await;
    let uid = nix::unistd::geteuid();
    let mut refused = 0;
    for (head, status, code) in [
        (
            head("GET", "for-jobs.example.test", "/jobs/1"),
            407,
            "proxy_token_required",
        ),
        (
            head("GET", "for-jobs.example.test", "/jobs/a%2fb"),
            400,
            "ambiguous_path",
        ),
        (head("GET", "127.0.0.2", "/"), 403, "address_not_allowed"),
        (
            head("TRACE", "watched.example.test", "/"),
            405,
            "method_not_allowed",
        ),
        (
            "GET http://watched.example.test/ HTTP/1.1\r\nHost: other.example.test".to_owned(),
            421,
            "authority_mismatch",
        ),
        (
            format!(
                "{}\r\nHost: watched.example.test",
                head("GET", "watched.example.test", "/")
            ),
            400,
            "malformed_request",
        ),
        (
            head("GET", "for-jobs.example.test", "/"),
            403,
            "destination_not_configured",
        ),
    ] {
        let (answer, arrived, record) = setting.send(&head).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{head}: {answer:#?}"
        );
        assert_eq!(arrived, None, "{head}");
        assert_ne!(record["decision"], "report_only", "{record}");
        refused += 1;
    }
    // An operator's word is no policy.
    let revocation = Revocation {
        id: "r1".to_owned(),
        what: Revoked::Workload(format!("unix.uid={uid}").parse().unwrap()),
        until: None,
    };
    setting
        .world
        .app()
        .replace_revocations(|revocations| Some(revocations.with(revocation.clone())));
    for method in ["GET", "DELETE"] {
        let (answer, arrived, _) = setting
            .send(&head(method, "watched.example.test", "/"))
            .await;
        assert_eq!(answer.expect(403).code(), "revoked");
        assert_eq!(arrived, None);
        refused += 1;
    }
    setting
        .world
        .app()
        .replace_revocations(|revocations| revocations.without("r1"));
    // With its token the job is served.
    let claims = json!({"repository": "acme/orders"});
    let token = setting
        .world
        .issuer
        .mint("job", "countersign", Duration::from_secs(300), &claims)
        .unwrap();
    let with_token = format!(
        "{}\r\nProxy-Authorization: Bearer {token}",
        head("GET", "for-jobs.example.test", "/jobs/1")
    );
    let (answer, arrived, _) = setting.send(&with_token).await;
    answer.expect(200);
    assert!(arrived.unwrap().starts_with("Bearer ey"));
    setting.world.good().await;
    reached("refused_though_reporting", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blind_tunnel_that_would_be_denied_passes_and_is_recorded() {
    let setting = Setting::start().await;
    let world = &setting.world;
    world.good().await;
    let last_decision = || async {
        let record = world.audited_requests().await.pop().unwrap();
        record["decision"].as_str().map(str::to_owned)
    };
    let mut refused = setting.caller.connect().await;
    let answer = open_tunnel(&mut refused, "enforced-tunnel.example.test:80").await;
    answer.expect(403);
    assert_eq!(last_decision().await.as_deref(), Some("deny"));

    let mut tunnel = setting.caller.connect().await;
    let answer = open_tunnel(&mut tunnel, "tunnelled.example.test:80").await;
    answer.expect(200);
    assert_eq!(last_decision().await.as_deref(), Some("report_only"));
    let request = "GET / HTTP/1.1\r\nHost: tunnelled.example.test\r\n\r\n";
    exchange(&mut tunnel, request).await.expect(200);

    // Permitted, and denied again: longer than what is open is looked at.
    let permit = r#"@id("tunnels") permit (principal, action == Action::"connect", resource == Destination::"tunnelled");"#;
    let mut permitted = None;
    for policies in [format!("{POLICIES}{permit}"), POLICIES.to_owned()] {
        world.write_policies(&policies);
        world.app().reload().await.unwrap();
        if permitted.is_none() {
            let mut tunnel = setting.caller.connect().await;
            let answer = open_tunnel(&mut tunnel, "tunnelled.example.test:80").await;
            answer.expect(200);
            assert_eq!(last_decision().await.as_deref(), Some("allow"));
            permitted = Some(tunnel);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        for tunnel in [&mut tunnel].into_iter().chain(&mut permitted) {
            exchange(tunnel, request).await.expect(200);
        }
    }

    // An operator's word is no policy.
    let revocation = of_this_user();
    world
        .app()
        .replace_revocations(|revocations| Some(revocations.with(revocation.clone())));
    for mut tunnel in [tunnel].into_iter().chain(permitted) {
        let ended = tokio::time::timeout(Duration::from_secs(30), tunnel.read(&mut [0])).await;
        assert_eq!(ended.expect("the tunnel ends").unwrap_or(0), 0);
    }
}

/// Revokes every workload of the user who runs the tests.
fn of_this_user() -> Revocation {
    let selector = format!("unix.uid={}", nix::unistd::geteuid());
    Revocation {
        id: "r1".to_owned(),
        what: Revoked::Workload(selector.parse().unwrap()),
        until: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_although_denied_ends_when_its_workload_is_revoked() {
    let setting = Setting::start().await;
    let world = &setting.world;
    world.good().await;
    let mut io = setting.caller.connect().await;
    let request = format!(
        "{}\r\n\r\n",
        head("PUT", "watched.example.test", "/unending")
    );
    io.write_all(request.as_bytes()).await.unwrap();
    assert!(read_head(&mut io).await.starts_with("HTTP/1.1 200"));
    let mut open = tokio::spawn(async move { io.read_to_end(&mut Vec::new()).await });

    // A denial, and another that is only reported as well.
    for policies in [POLICIES.to_owned(), format!("{POLICIES}{BILLS}")] {
        world.write_policies(&policies);
        world.app().reload().await.unwrap();
        let ended = tokio::time::timeout(Duration::from_millis(700), &mut open).await;
        assert!(ended.is_err(), "{ended:?}");
    }
    let revocation = of_this_user();
    let stalls = Stalls::watch();
    let revoked = Instant::now();
    world
        .app()
        .replace_revocations(|revocations| Some(revocations.with(revocation.clone())));
    tokio::time::timeout(Duration::from_secs(30), open)
        .await
        .expect("what is open ends")
        .unwrap()
        .ok();
    let took = revoked.elapsed();
    assert!(took < stalls.allow(a_second()), "{took:?}");
    reached("reported_then_revoked", 1);
}
