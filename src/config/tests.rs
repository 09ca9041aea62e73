//! Whole configurations: those that load, and a table of those that must not.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::diagnostics::Diagnostics;

const WHOLE: &str = include_str!("../../tests/corpora/config/whole.yaml");

/// A directory with every file that the whole example names.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let certificate = rcgen::generate_simple_self_signed(["ca.example.com".to_owned()]).unwrap();
    for name in ["ci-ca.pem", "auth-ca.pem", "api-ca.pem"] {
        fs::write(path.join(name), certificate.cert.pem()).unwrap();
    }
    for name in ["client.pem", "secret"] {
        fs::write(path.join(name), "a secret").unwrap();
        fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    for name in ["policies", "conf.d"] {
        fs::create_dir(path.join(name)).unwrap();
    }
    fs::write(path.join("empty.pem"), "").unwrap();
    fs::write(path.join("conf.d/a.yaml"), "{}").unwrap();
    directory
}

fn load(directory: &Path, text: &str) -> Result<Config, Diagnostics> {
    let path = directory.join("agent.yaml");
    fs::write(&path, text).unwrap();
    Config::load(&path)
}

#[test]
fn the_whole_example_loads() {
    let directory = directory();
    let config = load(directory.path(), WHOLE)
        .unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    assert_eq!(config.workers, Some(4));
    assert_eq!(config.listeners.len(), 4);
    println!("{config:#?}");
}
