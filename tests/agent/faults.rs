//! The authorization server in trouble: what callers get, and that no expired token leaves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use countersign::dev::{CertificateAuthority, ServerCertificate};
use rustls::pki_types::PrivateKeyDer;
use serde_json::Value;

use crate::support::agent::Agent;
use crate::support::client::Client;
use crate::support::counts::reached;
use crate::support::curl::curl;
use crate::support::faults::fault_table;
use crate::support::faulty_authorization_server::{Fault, FaultyAuthorizationServer};
use crate::support::puppet::Puppet;
use crate::support::world::{COMMON, DESTINATIONS, World};
use crate::support::{Stalls, a_second};

const BILLING: &str = r#"
  - {name: billing, hosts: [billing.example.test], scheme: http, credentials: [{name: billing-api}], connect_to: "{plain}"}
"#;

const ALL: &str = r#"
@id("all")
permit (principal, action == Action::"inject", resource) when { principal has unix };
"#;

const CACHED: &str = "https://orders.example.test/v1/orders";
const NOT_CACHED: &str = "http://billing.example.test/v1/orders";

/// Servers of which the authorization server can be made to fail.
async fn servers() -> (World, FaultyAuthorizationServer) {
    let mut world = World::servers().await;
    let certificate = world.authority.issue(&["auth.example.test"]).unwrap();
    let state = Arc::clone(world.authorization_server.state());
    let faulty = FaultyAuthorizationServer::start(state, certificate).await;
    world.origins.push(("auth".to_owned(), faulty.address()));
    (world, faulty)
}

/// An agent among them, whose credentials have this `timeout`.
async fn start(timeout: &str) -> (World, FaultyAuthorizationServer) {
    let (mut world, faulty) = servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}{BILLING}")
        .replace("timeout: 20s", &format!("timeout: {timeout}"));
    world.start_agent(&configuration, ALL).await;
    (world, faulty)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_is_told_as_documented() {
    let mut rows = 0;
    for row in fault_table() {
        // Some last for ever.
        let timeout = match row.fault {
            Fault::Hang | Fault::Drip => "timeout: 2s",
            _ => "timeout: 20s",
        };
        let (mut world, faulty) = servers().await;
        let (others, billing) = COMMON.split_once("  - name: billing-api").unwrap();
        let billing = billing.replace("timeout: 20s", timeout);
        let configuration =
            format!("{others}  - name: billing-api{billing}{DESTINATIONS}{BILLING}");
        world.start_agent(&configuration, ALL).await;
        world.good().await;
        let calls = world.authorization_server.state().token_requests();
        faulty.set(row.fault.clone()).await;

        let answer = world.curl(&[CACHED]).await;
        assert_eq!(
            answer.status, row.cached_status,
            "{}: {answer:#?}",
            row.name
        );
        assert_eq!(
            world.authorization_server.state().token_requests(),
            calls,
            "{}: asked although a token was cached",
            row.name
        );

        let began = Instant::now();
        let answer = world.curl(&[NOT_CACHED]).await;
        let took = began.elapsed();
        assert_eq!(
            (answer.status, answer.code()),
            (row.status, row.code.clone()),
            "{}: {answer:#?}",
            row.name
        );
        assert!(took < Duration::from_secs(15), "{}: {took:?}", row.name);
        assert_eq!(
            world.authorization_server.state().token_requests() - calls,
            row.token_requests,
            "{}",
            row.name
        );
        assert!(world.plain_api.seen().is_empty(), "{}", row.name);
        assert_eq!(
            answer.header("retry-after").is_some(),
            row.status == 503,
            "{}: {answer:#?}",
            row.name
        );
        let metrics = world.app().agent().metrics.encode();
        let failure = format!(
            "countersign_token_request_failures_total{{credential=\"billing-api\",cause=\"{}\"}}",
            row.cause
        );
        assert!(
            metrics.contains(&failure),
            "{}: {failure}\n{metrics}",
            row.name
        );
        let requests = world.audited_requests().await;
        assert_eq!(
            requests.last().unwrap()["outcome"],
            row.code,
            "{}",
            row.name
        );

        // Again: told the same, or that the next attempt is not due yet. Nothing is sent.
        let again = world.curl(&[NOT_CACHED]).await;
        let told = (again.status, again.code());
        assert!(
            told == (row.status, row.code.clone()) || told == (503, "token_backoff".to_owned()),
            "{}: {again:#?}",
            row.name
        );
        assert!(world.plain_api.seen().is_empty(), "{}", row.name);
        rows += 1;
        faulty.set(Fault::None).await;
        world.good().await;
        world.app().shutdown().await;
    }
    reached("faults", rows);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_expired_token_leaves() {
    const LIFETIME: Duration = Duration::from_secs(2);
    const LIFETIMES: u32 = 20;
    const REQUESTS: usize = 5000;
    const CALLERS: usize = 5;
    let (world, faulty) = start("2s").await;
    let state = Arc::clone(world.authorization_server.state());
    state.set_token_lifetime(LIFETIME);
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    let stalls = Stalls::watch();
    let until = Instant::now() + LIFETIME * LIFETIMES;
    let served = Arc::new(AtomicUsize::new(0));
    let sent = Arc::new(AtomicUsize::new(0));
    let told = Arc::new(Mutex::new(BTreeMap::new()));
    let ended = Arc::new(AtomicBool::new(false));
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let mut client = Client::http1(&puppet).await;
        let (served, sent, ended) = (Arc::clone(&served), Arc::clone(&sent), Arc::clone(&ended));
        let told = Arc::clone(&told);
        callers.push(tokio::spawn(async move {
            while !ended.load(Ordering::Relaxed) {
                let (status, body) = client
                    .get("http://plain.example.test/v1/orders", "plain.example.test")
                    .await
                    .unwrap();
                sent.fetch_add(1, Ordering::Relaxed);
                if status == 200 {
                    served.fetch_add(1, Ordering::Relaxed);
                } else {
                    let refusal: Value = serde_json::from_slice(&body).unwrap();
                    // What the origin refuses is judged by what held it up.
                    let code = match status {
                        401 => refusal["error"].as_str().unwrap(),
                        502..=504 => refusal["code"].as_str().unwrap(),
                        _ => panic!("{status}: {refusal}"),
                    };
                    assert_eq!(status == 401, code == "invalid_token", "{refusal}");
                    let code = code.to_owned();
                    *told.lock().unwrap().entry(code).or_insert(0_usize) += 1;
                }
                // At most some 400 in a second of all callers, however fast the machine.
                tokio::time::sleep(Duration::from_millis(12)).await;
            }
        }));
    }
    // Up and down, never in step with the lifetime; some outages are longer than a token lives.
    let outages = [
        (Fault::Refused, 1300),
        (Fault::Status(500, None), 2700),
        (Fault::Reset, 1900),
        (Fault::Hang, 2900),
        (Fault::Truncated, 2300),
    ];
    let mut outage = outages.iter().cycle();
    // A slow machine needs more lifetimes for as many requests.
    while (Instant::now() < until || sent.load(Ordering::Relaxed) < REQUESTS)
        && !callers.iter().any(|caller| caller.is_finished())
    {
        faulty.set(Fault::None).await;
        tokio::time::sleep(Duration::from_millis(1700)).await;
        let (fault, milliseconds) = outage.next().unwrap();
        faulty.set(fault.clone()).await;
        tokio::time::sleep(Duration::from_millis(*milliseconds)).await;
    }
    faulty.set(Fault::None).await;
    ended.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    let (served, sent) = (served.load(Ordering::Relaxed), sent.load(Ordering::Relaxed));
    let told = told.lock().unwrap().clone();
    println!("served {served} of {sent}; told otherwise: {told:?}");
    assert!(served * 100 >= sent * 40, "{served} of {sent}");
    // The outages did outlive tokens.
    assert!(served < sent, "{served} of {sent}");
    let seen = world.plain_api.seen();
    let (accepted, refused): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.token.is_ok());
    // Each request whose token the origin accepted was served.
    assert_eq!(accepted.len(), served);
    for seen in accepted {
        let expires = seen.token.as_ref().unwrap()["exp"].as_u64().unwrap();
        assert!(seen.at < UNIX_EPOCH + Duration::from_secs(expires));
    }
    // It refused none, but for what the machine itself held up on the way for longer than the tenth
    // of a lifetime for which no token is sent any more.
    println!("refused by the origin: {}", refused.len());
    for seen in refused {
        let held_up = stalls.between(seen.at - LIFETIME, seen.at + LIFETIME);
        assert!(held_up > LIFETIME / 10, "{held_up:?}: {seen:#?}");
    }
    crate::support::eventually(Duration::from_secs(30), || async {
        (world.curl(&[CACHED]).await.status == 200).then_some(())
    })
    .await;
    world.good().await;
    reached("through_lifetimes", sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_request_serves_all_who_wait() {
    /// A connection's share of the callers; a server allows 250 at once.
    const STREAMS: usize = 200;
    const CALLERS: usize = 2000;
    let (world, faulty) = start("20s").await;
    // So late that all wait for it.
    faulty.set(Fault::Late(Duration::from_secs(1))).await;
    let gateway = Puppet::start(&world.address("gateway").to_string(), None).await;
    let ready = Arc::new(tokio::sync::Barrier::new(CALLERS));
    let mut callers = Vec::new();
    for _ in 0..CALLERS / STREAMS {
        let Client::Http2(sender) = Client::http2(&gateway).await else {
            unreachable!();
        };
        for _ in 0..STREAMS {
            let mut client = Client::Http2(sender.clone());
            let ready = Arc::clone(&ready);
            callers.push(tokio::spawn(async move {
                ready.wait().await;
                client
                    .get("http://gateway/v1/orders", "gateway")
                    .await
                    .unwrap()
                    .0
            }));
        }
    }
    let mut answered = 0;
    for caller in callers {
        assert_eq!(caller.await.unwrap(), 200);
        answered += 1;
    }
    assert_eq!(world.authorization_server.state().token_requests(), 1);
    assert_eq!(world.api.seen().len(), answered);
    world.good().await;
    reached("cold_callers", answered);
}

/// A certificate for the authorization server that expired yesterday, and its authority in PEM.
fn expired() -> (ServerCertificate, String) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let pem = parameters.self_signed(&key).unwrap().pem();
    let authority = Issuer::new(parameters, key);
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(["auth.example.test".to_owned()]).unwrap();
    let now = time::OffsetDateTime::now_utc();
    parameters.not_before = now - time::Duration::days(2);
    parameters.not_after = now - time::Duration::days(1);
    let certificate = parameters.signed_by(&key, &authority).unwrap();
    let certificate = ServerCertificate {
        chain: vec![certificate.der().clone()],
        key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
    };
    (certificate, pem)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_expired_is_named_and_a_new_authority_counts_within_a_second() {
    let (world, faulty) = servers().await;
    let (expired, its_authority) = expired();
    let successor = CertificateAuthority::new("successor").unwrap();
    let known = format!("{}{its_authority}", world.authority.pem());
    world.write("servers.pem", &known);
    let extra = format!("{DESTINATIONS}{BILLING}");
    let agent = Agent::start_in(world, None, &extra, ALL).await;
    agent.good(None).await;

    faulty.present(expired).await;
    let answer = agent.curl(None, NOT_CACHED).await;
    assert_eq!(
        (answer.status, answer.code()),
        (502, "token_server_tls".to_owned()),
        "{answer:#?}"
    );
    let log = std::fs::read_to_string(agent.working_directory.path().join("log")).unwrap();
    assert!(log.contains("certificate expired"), "{log}");
    agent.good(None).await;

    let certificate = successor.issue(&["auth.example.test"]).unwrap();
    faulty.present(certificate).await;
    // Once the wait after the failure before is over.
    crate::support::eventually(Duration::from_secs(30), || async {
        (agent.curl(None, NOT_CACHED).await.status == 502).then_some(())
    })
    .await;
    assert!(agent.world.plain_api.seen().is_empty());
    let stalls = Stalls::watch();
    agent
        .world
        .write("servers.pem", &format!("{known}{}", successor.pem()));
    let began = Instant::now();
    while agent.curl(None, NOT_CACHED).await.status != 200 {
        assert!(began.elapsed() < Duration::from_secs(30));
    }
    let took = began.elapsed();
    println!("the new authority counted after {took:?}");
    assert!(took < stalls.allow(a_second()), "{took:?}");
    agent.good(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_authorization_server_delays_nobody_else() {
    const WAITING: usize = 50;
    const REQUESTS: usize = 200;
    const TIMEOUT: Duration = Duration::from_secs(12);
    let (world, faulty) = start("12s").await;
    world.good().await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    let mut served = Client::http1(&puppet).await;
    let mut quiet = Vec::new();
    for _ in 0..REQUESTS {
        quiet.push(time_of_request(&mut served).await);
    }
    // For longer than the credential's `timeout`.
    faulty.set(Fault::Late(Duration::from_secs(30))).await;
    let stalls = Stalls::watch();
    let began = Instant::now();
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        let mut client = Client::http1(&puppet).await;
        waiting.push(tokio::spawn(async move {
            let (status, _) = client
                .get(NOT_CACHED, "billing.example.test")
                .await
                .unwrap();
            status
        }));
    }
    let mut beside = Vec::new();
    while beside.len() < REQUESTS && began.elapsed() < TIMEOUT / 2 {
        beside.push(time_of_request(&mut served).await);
    }
    assert!(waiting.iter().all(|caller| !caller.is_finished()));
    let mut timed_out = 0;
    for caller in waiting {
        assert_eq!(caller.await.unwrap(), 504);
        timed_out += 1;
    }
    let took = began.elapsed();
    assert!(
        took < stalls.allow(TIMEOUT + Duration::from_secs(5)),
        "{took:?}"
    );
    let metrics = world.app().agent().metrics.encode();
    let asked = "countersign_token_requests_total{credential=\"billing-api\",result=\"token_server_timeout\"} 1\n";
    assert!(metrics.contains(asked), "{metrics}");
    let requests = beside.len();
    let (quiet, beside) = (percentile_99(&mut quiet), percentile_99(&mut beside));
    println!("p99 {quiet:?}, and of {requests} {beside:?} beside {timed_out} callers that wait");
    assert!(requests >= REQUESTS / 4, "{requests}");
    // None waited for the slow server; what the machine does beside is not the agent's.
    assert!(beside < stalls.allow(TIMEOUT / 4), "{beside:?}");
    faulty.set(Fault::None).await;
    world.good().await;
    reached("waited_beside", timed_out);
}

/// An agent among servers that issues and injects as `policies` say, and the URL of its `/v1/token`.
async fn start_issuing(policies: &str) -> (World, FaultyAuthorizationServer, String) {
    let (mut world, faulty) = servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}{BILLING}").replace(
        "listeners:\n",
        "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n",
    );
    world.start_agent(&configuration, policies).await;
    let api = format!("http://{}/v1/token", world.address("api"));
    (world, faulty, api)
}

const ASK: &str = r#"{"credential": "billing-api"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_token_is_attested_again_when_other_attributes_are_collected() {
    const BY_USER: &str = r#"
@id("by-user")
permit (principal, action, resource) when { principal has unix && principal.unix.uid == {uid} };
"#;
    const FORBID: &str = r#"
@id("by-digest")
forbid (principal, action, resource == Credential::"billing-api")
when { principal has unix && principal.unix has executable_sha256 };
"#;
    let (world, faulty, api) = start_issuing(BY_USER).await;
    world.good().await;
    let mut refused = 0;
    for issues in [false, true] {
        faulty.change(Fault::Late(Duration::from_secs(5)));
        let asked = async {
            match issues {
                true => curl(&["-d", ASK, &api]).await,
                false => world.curl(&[NOT_CACHED]).await,
            }
        };
        let reloaded = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            world.write_policies(&format!("{BY_USER}{FORBID}"));
            world.app().reload().await.unwrap();
        };
        let (answer, ()) = tokio::join!(asked, reloaded);
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (403, "policy_denied"),
            "{answer:#?}"
        );
        assert_eq!(world.plain_api.seen().len(), 0);
        refused += 1;
        faulty.change(Fault::None);
        world.write_policies(BY_USER);
        world.app().reload().await.unwrap();
    }
    world.good().await;
    reached("attested_again", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_took_longer_than_its_decision_held_is_handed_out() {
    const SINCE: &str = r#"
@id("since")
permit (principal, action, resource)
when { principal has unix && context.time > datetime("2020-01-01T00:00:00Z") };
"#;
    let (world, faulty, api) = start_issuing(SINCE).await;
    world.good().await;
    let minted = world.authorization_server.state().issued().len();
    faulty.change(Fault::Late(Duration::from_millis(1200)));
    let mut handed_out = 0;
    for _ in 0..2 {
        let answer = curl(&["-d", ASK, &api]).await;
        assert_eq!(answer.status, 200, "{answer:#?}");
        handed_out += 1;
    }
    let issued = world.authorization_server.state().issued().len();
    assert_eq!(issued, minted + handed_out);
    faulty.change(Fault::None);
    world.good().await;
    reached("handed_out_late", handed_out);
}

/// How long a request took whose token is cached.
async fn time_of_request(client: &mut Client) -> Duration {
    let began = Instant::now();
    let uri = "http://plain.example.test/v1/orders";
    let (status, _) = client.get(uri, "plain.example.test").await.unwrap();
    assert_eq!(status, 200);
    began.elapsed()
}

fn percentile_99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}
