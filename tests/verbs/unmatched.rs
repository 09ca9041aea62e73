//! Traffic to no destination, in a network namespace where a global address is one's own.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use countersign::dev::CertificateAuthority;
use tokio::net::TcpStream;
use tokio::process::Child;

use crate::program::User;
use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::raw::exchange;
use crate::support::{eventually, has_program, is_root};

/// An address that the guard takes for one of the internet.
const GLOBAL: &str = "11.22.33.44";
const PROXY: &str = "127.0.0.1:7523";
/// Whoever connects here has an address of the internet, and the kernel says nothing of him.
const REMOTE: &str = "11.22.33.44:7523";

const CONFIGURATION: &str = r#"
version: 1
listeners:
  - {name: proxy, type: forward_proxy, bind: "127.0.0.1:7523"}
  - {name: remote, type: forward_proxy, bind: "11.22.33.44:7523"}
attestors: {unix: {}}
credentials:
  - {name: unused, type: oauth_client_credentials, issuer: "https://auth.example.test", client_id: agent, client_authentication: {method: client_secret_basic, secret_file: secret}}
destinations:
  - {name: unused, hosts: [unused.example.test], credentials: [{name: unused}], ca_file: own.pem}
unmatched: tunnel
interception: {ca: {source: memory}}
policies: {directory: policies}
audit: {on_failure: degrade, sinks: [{type: file, path: audit.jsonl}]}
"#;

const POLICIES: &str = r#"
@id("out")
permit (principal, action == Action::"connect", resource == Destination::"unmatched");
"#;

#[test]
fn the_systems_roots_verify_what_no_destination_covers() {
    let test = "the_systems_roots_verify_what_no_destination_covers";
    if let Some(told) = with_a_global_address(test, verified) {
        reached("verified_by_the_system", told);
    }
}

#[test]
fn nobody_gets_out_of_whom_nothing_is_known() {
    let test = "nobody_gets_out_of_whom_nothing_is_known";
    if let Some(told) = with_a_global_address(test, unattested) {
        reached("unattested_refused", told);
    }
}

/// Runs `answers` where [`GLOBAL`] is an address of our own.
fn with_a_global_address<Told>(test: &str, answers: fn() -> Told) -> Option<usize>
where
    Told: Future<Output = usize> + 'static,
{
    if !is_root(test) || !has_program(test, "ip") {
        return None;
    }
    // A namespace is its thread's, and of the threads and processes that the thread starts.
    let told = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        for line in ["link set lo up", &format!("address add {GLOBAL}/32 dev lo")] {
            let status = Command::new("ip").args(line.split(' ')).status();
            assert!(status.unwrap().success(), "ip {line}");
        }
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(answers())
    })
    .join()
    .unwrap();
    Some(told)
}

/// An agent as a process of its own, once it accepts connections.
async fn agent(user: &User, system: &Path, configuration: &str) -> Child {
    user.write("agent.yaml", configuration);
    user.write("policies/all.cedar", POLICIES);
    user.write("secret", "secret");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(user.path("secret"), mode).unwrap();
    let mut command = user.countersign(&["run", "--config", "agent.yaml"]);
    let agent = command
        .env("SSL_CERT_FILE", system)
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .unwrap();
    connect(PROXY).await;
    agent
}

async fn connect(address: &str) -> TcpStream {
    eventually(Duration::from_secs(20), || async {
        TcpStream::connect(address).await.ok()
    })
    .await
}

async fn unattested() -> usize {
    let address: IpAddr = GLOBAL.parse().unwrap();
    let ok = |_: &str| vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()];
    let origin = Origin::start_at(SocketAddr::new(address, 0), None, ok).await;
    let authority = format!("{GLOBAL}:{}", origin.address.port());
    let in_clear = format!("GET http://{authority}/a HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    let tunnel = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    let issuer = CONFIGURATION.replace(
        "attestors: {unix: {}}",
        "attestors: {unix: {}, oidc: {issuers: [{name: ci, issuer: \"https://ci.example.test\", audiences: [a]}]}}",
    );
    let authorities = CertificateAuthority::new("of nobody").unwrap();
    let mut refused = 0;
    for (configuration, status, code) in [
        (CONFIGURATION, 403, "policy_denied"),
        (&issuer, 407, "proxy_token_required"),
    ] {
        let user = User::new();
        let roots = user.write("own.pem", authorities.pem());
        let mut agent = agent(&user, &roots, configuration).await;
        let good = async || {
            let before = origin.heads().len();
            let mut io = connect(PROXY).await;
            exchange(&mut io, &in_clear).await.expect(200);
            assert_eq!(origin.heads().len(), before + 1);
        };
        good().await;
        let before = origin.heads().len();
        for request in [&in_clear, &tunnel] {
            let mut io = connect(REMOTE).await;
            let answer = exchange(&mut io, request).await.expect(status);
            assert_eq!(answer.code(), code, "{answer:#?}");
            refused += 1;
        }
        assert_eq!(origin.heads().len(), before, "something reached the origin");
        good().await;
        // The next agent is at the same address.
        agent.kill().await.unwrap();
    }
    refused
}

async fn verified() -> usize {
    let ours = CertificateAuthority::new("of the system").unwrap();
    let other = CertificateAuthority::new("of nobody").unwrap();
    let address: IpAddr = GLOBAL.parse().unwrap();
    let ok = |_: &str| vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()];
    let at = SocketAddr::new(address, 0);
    let trusted = Origin::start_at(at, Some(&ours.issue(&[GLOBAL]).unwrap()), ok).await;
    let untrusted = Origin::start_at(at, Some(&other.issue(&[GLOBAL]).unwrap()), ok).await;

    let user = User::new();
    user.write("own.pem", other.pem());
    let system = user.write("system.pem", ours.pem());
    let _agent = agent(&user, &system, CONFIGURATION).await;
    let mut io = connect(PROXY).await;
    let mut told = 0;
    for (origin, status, code) in [
        (&trusted, 200, ""),
        (&untrusted, 502, "upstream_tls"),
        (&trusted, 200, ""),
    ] {
        let authority = format!("{GLOBAL}:{}", origin.address.port());
        let request = format!("GET https://{authority}/a HTTP/1.1\r\nHost: {authority}\r\n\r\n");
        let answer = exchange(&mut io, &request).await.expect(status);
        assert_eq!(answer.code(), code, "{answer:#?}");
        if status == 502 {
            assert!(answer.body.contains("UnknownIssuer"), "{answer:#?}");
        }
        told += 1;
    }
    assert_eq!(trusted.heads().len(), 2);
    assert!(untrusted.heads().is_empty());
    told
}
