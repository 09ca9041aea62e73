//! A configuration file: it loads or says why not, the same each time, and what loads is sound.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use countersign::config::{Config, ListenerKind, Scheme, SigningAlgorithm, check};
use countersign::jwt::SigningKey;
use countersign::request::Target;
use tempfile::TempDir;

use super::diagnostics;

/// One that loads.
const GOOD: &[u8] = include_bytes!("../seeds/configuration/whole.yaml");

/// Longer files are more of the same.
const LONGEST: usize = 16 * 1024;

thread_local! {
    /// A directory with the files that the seeds name.
    static DIRECTORY: TempDir = directory();
}

fn directory() -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let certificate = rcgen::generate_simple_self_signed(["ca.example.com".to_owned()])
        .expect("a certificate")
        .cert
        .pem();
    for name in ["ci-ca.pem", "auth-ca.pem", "api-ca.pem"] {
        std::fs::write(path.join(name), &certificate).expect("a certificate");
    }
    let (_, key) = SigningKey::generate(SigningAlgorithm::Es256).expect("a key");
    for (name, content) in [("client.pem", key.as_str()), ("secret", "a secret")] {
        std::fs::write(path.join(name), content).expect("a secret");
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path.join(name), mode).expect("a mode");
    }
    for name in ["policies", "conf.d"] {
        std::fs::create_dir(path.join(name)).expect("a directory");
    }
    directory
}

pub fn run(input: &[u8]) {
    // A path may lead anywhere on the machine that fuzzes, also to files that have no end.
    let leads_to = |place: &[u8]| input.windows(place.len()).any(|part| part == place);
    if input.len() > LONGEST || leads_to(b"/dev") || leads_to(b"/proc") || leads_to(b"/sys") {
        return;
    }
    DIRECTORY.with(|directory| {
        let path = directory.path().join("agent.yaml");
        std::fs::write(&path, input).expect("a configuration");
        let checked = check(&path);
        assert!(
            input != GOOD || checked.config.is_some(),
            "{}",
            checked.diagnostics
        );
        assert_eq!(checked.config.is_none(), checked.diagnostics.has_errors());
        if let Ok(text) = std::str::from_utf8(input) {
            diagnostics::check(&checked.diagnostics, &path, text);
        } else {
            assert!(checked.config.is_none(), "it is not text");
        }
        assert!(checked.files.paths().any(|read| *read == path));
        assert!(checked == check(&path), "two readings of one file differ");
        if let Some(config) = &checked.config {
            is_sound(config);
        }
    });
}

fn is_sound(config: &Config) {
    let names = |names: Vec<&str>| {
        let distinct: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(
            distinct.len(),
            names.len(),
            "a name stands twice: {names:?}"
        );
    };
    names(config.listeners.iter().map(|one| &*one.name).collect());
    names(config.credentials.iter().map(|one| &*one.name).collect());
    names(config.destinations.iter().map(|one| &*one.name).collect());
    for listener in &config.listeners {
        if let ListenerKind::Gateway { destination } = &listener.kind {
            assert!(
                config
                    .destinations
                    .iter()
                    .any(|one| one.name == destination.name)
            );
        }
    }
    for destination in &config.destinations {
        assert!(!destination.hosts.is_empty() && !destination.ports.is_empty());
        assert!(!destination.ports.contains(&0));
        for host in &destination.hosts {
            let read =
                Target::parse(&bracketed(host), Some(443)).expect("a host that can be asked for");
            assert_eq!(read.host(), host, "routed by another spelling than written");
        }
        for used in &destination.credentials {
            assert!(
                config
                    .credentials
                    .iter()
                    .any(|one| one.name == used.credential.name)
            );
        }
        // Written out, or else https.
        if destination.scheme == Scheme::Http {
            assert!(config_text_says_http(config));
        }
    }
    for issuer in &config.attestors.oidc_issuers {
        assert!(!issuer.audiences.is_empty(), "a token for anybody");
        assert_eq!(issuer.issuer.url().scheme(), "https");
    }
}

fn bracketed(host: &str) -> String {
    match host.contains(':') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    }
}

fn config_text_says_http(config: &Config) -> bool {
    let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    text(&config.path).contains("http")
}
