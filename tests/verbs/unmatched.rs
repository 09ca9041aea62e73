//! Traffic to no destination, in a network namespace where a global address is one's own.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use countersign::dev::CertificateAuthority;
use tokio::net::TcpStream;

use crate::program::User;
use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::raw::exchange;
use crate::support::{eventually, has_program, is_root};

/// An address that the guard takes for one of the internet.
const GLOBAL: &str = "11.22.33.44";
const PROXY: &str = "127.0.0.1:7523";

const CONFIGURATION: &str = r#"
version: 1
listeners: [{name: proxy, type: forward_proxy, bind: "127.0.0.1:7523"}]
attestors: {unix: {}}
credentials:
  - {name: unused, type: oauth_client_credentials, issuer: "https://auth.example.test", client_id: agent, client_authentication: {method: client_secret_basic, secret_file: secret}}
destinations:
  - {name: unused, hosts: [unused.example.test], credentials: [{name: unused}], ca_file: own.pem}
unmatched: tunnel
interception: {ca: {source: memory}}
policies: {directory: policies}
audit: {sinks: [{type: file, path: audit.jsonl}]}
"#;

const POLICIES: &str = r#"
@id("out")
permit (principal, action == Action::"connect", resource == Destination::"unmatched")
when { principal has unix };
"#;

#[test]
fn the_systems_roots_verify_what_no_destination_covers() {
    let test = "the_systems_roots_verify_what_no_destination_covers";
    if !is_root(test) || !has_program(test, "ip") {
        return;
    }
    // A namespace is its thread's, and of the threads and processes that the thread starts.
    let told = std::thread::spawn(|| {
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
    reached("verified_by_the_system", told);
}

async fn answers() -> usize {
    let ours = CertificateAuthority::new("of the system").unwrap();
    let other = CertificateAuthority::new("of nobody").unwrap();
    let address: IpAddr = GLOBAL.parse().unwrap();
    let ok = |_: &str| vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()];
    let at = SocketAddr::new(address, 0);
    let trusted = Origin::start_at(at, Some(&ours.issue(&[GLOBAL]).unwrap()), ok).await;
    let untrusted = Origin::start_at(at, Some(&other.issue(&[GLOBAL]).unwrap()), ok).await;

    let user = User::new();
    user.write("agent.yaml", CONFIGURATION);
    user.write("policies/all.cedar", POLICIES);
    user.write("own.pem", other.pem());
    user.write("secret", "secret");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(user.path("secret"), mode).unwrap();
    let system = user.write("system.pem", ours.pem());
    let mut command = user.countersign(&["run", "--config", "agent.yaml"]);
    let _agent = command
        .env("SSL_CERT_FILE", system)
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .unwrap();
    let mut io = eventually(Duration::from_secs(20), || async {
        TcpStream::connect(PROXY).await.ok()
    })
    .await;
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
