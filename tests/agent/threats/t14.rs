//! T14: the interception authority's key in somebody else's hands, and the agent asked to use it for a name
//! that is not intercepted.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DistinguishedName,
    DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio_rustls::TlsAcceptor;
use x509_parser::oid_registry::OID_X509_EXT_NAME_CONSTRAINTS;
use x509_parser::parse_x509_certificate;

use crate::support::counts::reached;
use crate::support::has_program;
use crate::support::puppet::Puppet;
use crate::support::world::World;
use crate::tunnels::tls_for;

const INTERCEPTED: &str = "orders.example.test";
/// No destination of the agent's has one of these.
const OTHERS: [&str; 4] = [
    "elsewhere.example.test",
    "example.test",
    "not-orders.example.test",
    "login.example.com",
];

const DAY: i64 = 24 * 3600;

/// An intermediate of the agent's root with the constraints of the agent's own, to the letter, and a key that
/// the test has: what a thief of the agent's intermediate could sign with.
fn twin(world: &World, intermediate: &[u8]) -> CertifiedIssuer<'static, KeyPair> {
    let read = |name: &str| std::fs::read_to_string(world.path(name)).unwrap();
    let root_key = KeyPair::from_pem(&read("ca/root.key")).unwrap();
    let root = Issuer::from_ca_cert_pem(&read("ca/root.pem"), root_key).unwrap();
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    parameters.distinguished_name = named("intermediate");
    let (_, own) = parse_x509_certificate(intermediate).unwrap();
    let constraints = own
        .get_extension_unique(&OID_X509_EXT_NAME_CONSTRAINTS)
        .unwrap();
    if let Some(constraints) = constraints {
        assert!(constraints.critical);
        let oid = [2, 5, 29, 30];
        let mut copy = CustomExtension::from_oid_content(&oid, constraints.value.to_vec());
        copy.set_criticality(true);
        parameters.custom_extensions.push(copy);
    }
    CertifiedIssuer::signed_by(parameters, KeyPair::generate().unwrap(), &root).unwrap()
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::OrganizationName, name);
    distinguished_name
}

/// A server with a leaf for `name`; its port.
async fn serve(issuer: &CertifiedIssuer<'static, KeyPair>, name: &str) -> u16 {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new([name.to_owned()]).unwrap();
    parameters.distinguished_name = named("leaf");
    let leaf = parameters.signed_by(&key, issuer).unwrap();
    let chain = vec![leaf.der().clone(), issuer.der().clone()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let _ = stream.shutdown().await;
                }
            });
        }
    });
    port
}

/// What a verifier says of each `NAME=PORT`, a line for each.
async fn said(command: &mut Command, root: &Path, pairs: &[String]) -> Vec<String> {
    command.arg(root).args(pairs).stdin(Stdio::null());
    let output = command.output().await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        said.lines().count(),
        pairs.len(),
        "{said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    said.lines().map(str::to_owned).collect()
}

/// The same of OpenSSL's own client, which connects once.
async fn openssl_said(root: &Path, pairs: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for pair in pairs {
        let (name, port) = pair.split_once('=').unwrap();
        let output = Command::new("openssl")
            .args(["s_client", "-brief", "-verify_return_error"])
            .args(["-connect", &format!("127.0.0.1:{port}")])
            .args(["-servername", name, "-verify_hostname", name, "-CAfile"])
            .arg(root)
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
        all.push(match output.status.success() {
            true => format!("{name} ok"),
            false => format!("{name} {errors}"),
        });
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn t14_a_stolen_intermediate_is_good_for_the_intercepted_hosts_only() {
    let test = "t14_a_stolen_intermediate_is_good_for_the_intercepted_hosts_only";
    let needed = ["openssl", "python3", "node", "go"];
    if !needed.iter().all(|program| has_program(test, program)) {
        return;
    }
    let world = World::start().await;
    world.good().await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    for name in OTHERS {
        tls_for(&world, &caller, name).await.unwrap_err();
    }
    let mode = |name: &str| {
        let metadata = std::fs::metadata(world.path(name)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!((mode("ca"), mode("ca/root.key")), (0o700, 0o600));
    let shown = tls_for(&world, &caller, INTERCEPTED).await.unwrap();
    let chain: Vec<CertificateDer<'_>> = shown.get_ref().1.peer_certificates().unwrap().to_vec();
    let (_, leaf) = parse_x509_certificate(&chain[0]).unwrap();
    let lifetime = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert!(lifetime <= DAY, "{lifetime} s");

    let issuer = twin(&world, &chain[1]);
    let mut pairs = Vec::new();
    for name in [&[INTERCEPTED], &OTHERS[..], &[INTERCEPTED]].concat() {
        pairs.push(format!("{name}={}", serve(&issuer, name).await));
    }
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agent/threats/verifiers");
    let root = world.path("ca.pem");
    let mut verified = vec![("openssl", openssl_said(&root, &pairs).await)];
    for (name, arguments, file) in [
        ("python3", &[][..], "verify.py"),
        ("node", &[], "verify.mjs"),
        ("go", &["run"], "verify.go"),
        ("java", &[], "Verify.java"),
    ] {
        // Java comes with the tier of real servers.
        if name == "java" && Command::new(name).arg("-version").output().await.is_err() {
            continue;
        }
        let mut command = Command::new(name);
        command.args(arguments).arg(programs.join(file));
        verified.push((name, said(&mut command, &root, &pairs).await));
    }
    for (verifier, said) in &verified {
        for (line, pair) in said.iter().zip(&pairs) {
            let name = pair.split('=').next().unwrap();
            let is_taken = *line == format!("{name} ok");
            assert_eq!(is_taken, name == INTERCEPTED, "{verifier}: {line}");
            let says = line.to_lowercase();
            let names_the_cause = ["subtree", "constraint"]
                .iter()
                .any(|word| says.contains(word));
            assert!(is_taken || names_the_cause, "{verifier}: {line}");
        }
    }
    world.good().await;
    reached("verifiers", verified.len());
}
