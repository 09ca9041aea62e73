//! What operators are shown of attestors, key sets, listeners, keys and certificates.

use std::os::unix::fs::PermissionsExt;

use countersign::admin::AdminActions;
use countersign::config::SigningAlgorithm;
use countersign::jwt::SigningKey;
use serde_json::{Value, json};

use crate::support::curl::curl;
use crate::support::origin::Origin;
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

fn with_workload_api(configuration: &str) -> String {
    configuration.replace(
        "listeners:\n",
        "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n",
    )
}

/// The value of a metric; nothing where it is not there.
fn metric(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(' '))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

/// An issuer whose keys cannot be had, though it says where they are.
async fn issuer_without_keys(world: &World) -> Origin {
    let certificate = world.authority.issue(&["ci.example.test"]).unwrap();
    Origin::start(Some(&certificate), |head| {
        let metadata = json!({
            "issuer": "https://ci.example.test",
            "jwks_uri": "https://ci.example.test/keys",
        })
        .to_string();
        vec![match head.contains("/.well-known/openid-configuration") {
            true => format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{metadata}",
                metadata.len()
            ),
            false => "HTTP/1.1 503 Trouble\r\ncontent-length: 0\r\n\r\n".to_owned(),
        }]
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_whose_keys_are_away_is_named() {
    let mut world = World::servers().await;
    let issuer = issuer_without_keys(&world).await;
    world.origins.push(("issuer".to_owned(), issuer.address));
    let configuration = with_workload_api(&format!("{COMMON}{DESTINATIONS}"));
    world.start_agent(&configuration, POLICIES).await;
    world.good().await;
    let token = world
        .issuer
        .mint(
            "job",
            "countersign",
            std::time::Duration::from_secs(60),
            &json!({}),
        )
        .unwrap();
    let request = |token: &str| {
        format!(
            "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n{token}\r\n"
        )
    };
    let presented = format!("Proxy-Authorization: Bearer {token}\r\n");
    let mut io = world.connect().await;
    exchange(&mut io, &request(&presented)).await.expect(200);

    let status = world.app().status().await;
    let attestors = status["attestors"].as_array().unwrap();
    let state = |name: &str| {
        attestors
            .iter()
            .find(|attestor| attestor["name"] == name)
            .unwrap_or_else(|| panic!("{status:#}"))
    };
    assert_eq!(state("unix")["runs"], true);
    assert_eq!(state("ci")["runs"], false, "{status:#}");
    assert!(state("ci")["since"].is_string(), "{status:#}");
    assert!(!state("ci")["detail"].as_str().unwrap().is_empty());
    let metrics = world.app().metrics();
    let attested = |attestor: &str, result: &str| {
        let name = format!(
            "countersign_attestations_total{{attestor=\"{attestor}\",result=\"{result}\"}}"
        );
        metric(&metrics, &name)
    };
    assert_eq!(attested("ci", "could_not_run"), Some(1.0), "{metrics}");
    // The metadata came, and the keys have no age for it.
    let age = "countersign_jwks_age_seconds{issuer=\"ci\"}";
    assert_eq!(metric(&metrics, age), None, "{metrics}");

    // The workload API's callers are attested too; a container is of the attestor of processes.
    let unix = attested("unix", "attested").unwrap();
    let api = format!("http://{}", world.address("api"));
    let ask = json!({"credential": "orders-api"}).to_string();
    curl(&["-X", "POST", "-d", &ask, &format!("{api}/v1/token")])
        .await
        .expect(403);
    let metrics = world.app().metrics();
    let now = metric(
        &metrics,
        "countersign_attestations_total{attestor=\"unix\",result=\"attested\"}",
    );
    assert_eq!(now, Some(unix + 1.0), "{metrics}");
    assert!(!metrics.contains("attestor=\"container\""), "{metrics}");
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_age_of_keys_is_shown_and_what_was_not_decided_is_counted() {
    let world = World::start().await;
    world.good().await;
    let token = world
        .issuer
        .mint(
            "job",
            "countersign",
            std::time::Duration::from_secs(60),
            &json!({}),
        )
        .unwrap();
    let mut io = world.connect().await;
    let request = format!(
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\nProxy-Authorization: Bearer {token}\r\n\r\n"
    );
    exchange(&mut io, &request).await.expect(200);
    let metrics = world.app().metrics();
    let age = metric(&metrics, "countersign_jwks_age_seconds{issuer=\"ci\"}");
    assert!(age.is_some_and(|age| age < 60.0), "{metrics}");
    let error = "countersign_decisions_total{effect=\"error\"}";
    assert_eq!(metric(&metrics, error), Some(0.0));
    let nowhere = "GET http://nowhere.example.test/ HTTP/1.1\r\nHost: nowhere.example.test\r\n\r\n";
    exchange(&mut io, nowhere).await.expect(403);
    assert_eq!(metric(&world.app().metrics(), error), Some(1.0));
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_are_shown_where_they_are_now() {
    let world = World::start().await;
    world.good().await;
    let bound = async |name: &str| {
        let status = world.app().status().await;
        let listeners = status["listeners"].as_array().unwrap().clone();
        listeners
            .iter()
            .find(|listener| listener["name"] == name)
            .map(|listener| listener["bind"].as_str().unwrap().to_owned())
    };
    assert!(bound("gateway").await.is_some());
    let configuration = world.fill(&format!("{COMMON}{DESTINATIONS}"));
    let moved = configuration
        .replace("gateway.sock", "moved.sock")
        .replace("name: gateway,", "name: another-gateway,");
    world.write("countersign.yaml", &moved);
    world.app().reload().await.unwrap();
    assert!(
        bound("local-gateway")
            .await
            .unwrap()
            .ends_with("moved.sock")
    );
    assert_eq!(bound("gateway").await, None);
    let another = bound("another-gateway").await.unwrap();
    curl(&[&format!("http://{another}/v1/orders")])
        .await
        .expect(200);
}

/// The events with this name, in order.
async fn events(world: &World, name: &str) -> Vec<Value> {
    let lines = world.audit().await;
    lines
        .into_iter()
        .filter(|line| line["event"] == name)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_certificates_that_are_replaced_are_recorded() {
    let world = World::start().await;
    world.good().await;
    let certificates = events(&world, "interception_authority").await;
    assert_eq!(certificates.len(), 1, "{certificates:#?}");
    let digest = |event: &Value, name: &str| event[name].as_str().unwrap().to_owned();
    assert_eq!(digest(&certificates[0], "root_sha256").len(), 64);

    // A reload that changes nothing has replaced nothing; another host is another intermediate.
    world.app().reload().await.unwrap();
    assert_eq!(events(&world, "interception_authority").await.len(), 1);
    let more = DESTINATIONS.replace(
        "hosts: [orders.example.test]",
        "hosts: [orders.example.test, more.example.test]",
    );
    world.write("countersign.yaml", &world.fill(&format!("{COMMON}{more}")));
    world.app().reload().await.unwrap();
    let certificates = events(&world, "interception_authority").await;
    assert_eq!(certificates.len(), 2, "{certificates:#?}");
    let of = |name: &str| [&certificates[0], &certificates[1]].map(|event| digest(event, name));
    let [before, after] = of("root_sha256");
    assert_eq!(before, after);
    let [before, after] = of("intermediate_sha256");
    assert_ne!(before, after);
    world.good().await;

    // A key that the server does not know, and the first again.
    assert!(events(&world, "client_key_replaced").await.is_empty());
    let first = std::fs::read_to_string(world.path("client.key")).unwrap();
    let (other, pem) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
    let orders = "https://orders.example.test/v1/orders";
    for (content, status) in [(pem.as_str(), 502), (first.as_str(), 200)] {
        world.write("client.key", content);
        std::fs::set_permissions(world.path("client.key"), PermissionsExt::from_mode(0o600))
            .unwrap();
        // Another configuration of the credential forgets its tokens; another key alone does not.
        let timeout = format!("timeout: {}ms", 20_000 + u32::from(status == 502));
        let changed = format!("{COMMON}{more}").replace("timeout: 20s", &timeout);
        if status == 502 {
            let tokens =
                countersign::credentials::RevokedTokens::Credential("orders-api".to_owned());
            let agent = world.app().agent();
            let wait = std::time::Duration::from_secs(10);
            agent.credentials.revoke_upstream(&tokens, wait).await;
        } else {
            world.write("countersign.yaml", &world.fill(&changed));
            world.app().reload().await.unwrap();
        }
        world.curl(&[orders]).await.expect(status);
    }
    let replaced = events(&world, "client_key_replaced").await;
    assert_eq!(replaced[0]["credential"], "orders-api", "{replaced:#?}");
    assert_eq!(replaced[0]["key_id"], other.key_id(), "{replaced:#?}");
    world.good().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_of_the_workload_api_has_a_request_id() {
    let mut world = World::servers().await;
    let configuration = with_workload_api(&format!("{COMMON}{DESTINATIONS}"));
    world.start_agent(&configuration, POLICIES).await;
    let api = format!("http://{}", world.address("api"));
    let mut ids = std::collections::BTreeSet::new();
    let rows: [(&str, &str, u16); 7] = [
        ("GET", "/v1/whoami", 200),
        ("GET", "/v1/proxy", 200),
        ("GET", "/v1/explain/x", 404),
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/whoami", 405),
        ("POST", "/v1/token", 400),
        ("GET", "/v1/token", 405),
    ];
    for (method, path, status) in rows {
        let answer = curl(&["-X", method, &format!("{api}{path}")])
            .await
            .expect(status);
        let id = answer.header("countersign-request-id");
        ids.insert(id.unwrap_or_else(|| panic!("{answer:#?}")));
    }
    assert_eq!(ids.len(), rows.len(), "an id names one answer");
}
