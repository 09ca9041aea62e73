//! What operators are shown of attestors and key sets.

use countersign::admin::AdminActions;
use serde_json::json;
use tokio::net::TcpStream;

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
    let mut io = TcpStream::connect(world.address("proxy")).await.unwrap();
    exchange(&mut io, &request(&presented)).await.expect(200);

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
    let mut io = TcpStream::connect(world.address("proxy")).await.unwrap();
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
