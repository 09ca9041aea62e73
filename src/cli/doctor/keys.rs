//! Keys and certificates that are past their end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::finding::{Finding, FindingCode};
use crate::config::{CaSource, ClientAuthentication, Config, TokenSource};
use crate::tls::trust::{expiry, roots_in};

/// What a file of certificates is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// One that is in force is enough.
    Trusted,
    /// All are sent, and all must be in force.
    Chain,
}

/// Looks at every key and certificate that a configuration names.
pub(super) fn check(config: &Config) -> Vec<Finding> {
    let now = SystemTime::now();
    let mut findings: Vec<Finding> = certificate_files(config)
        .into_iter()
        .filter_map(|(path, used)| certificates(&path, used, now))
        .collect();
    for credential in &config.credentials {
        let TokenSource::OauthClientCredentials(settings) = &credential.source;
        if let ClientAuthentication::PrivateKeyJwt { key_file, .. } =
            &settings.client_authentication
            && let Some(expired) = key_expiry(key_file).filter(|expires| *expires <= now)
        {
            findings.push(Finding::new(
                FindingCode::ClientKeyExpired,
                format!(
                    "the key of credential `{}` in `{}` expired at {}",
                    credential.name,
                    key_file.display(),
                    text_of(expired)
                ),
            ));
        }
    }
    findings
}

/// Files of certificates, each once. What the agent has yet to write is left out.
fn certificate_files(config: &Config) -> BTreeMap<PathBuf, Use> {
    let of_credentials = config.credentials.iter().filter_map(|credential| {
        let TokenSource::OauthClientCredentials(settings) = &credential.source;
        settings.ca_file.clone()
    });
    let of_destinations = config
        .destinations
        .iter()
        .filter_map(|destination| destination.ca_file.clone());
    let of_issuers = config
        .attestors
        .oidc_issuers
        .iter()
        .filter_map(|issuer| issuer.ca_file.clone());
    let mut files: BTreeMap<PathBuf, Use> = of_credentials
        .chain(of_destinations)
        .chain(of_issuers)
        .map(|path| (path, Use::Trusted))
        .collect();
    match config
        .interception
        .as_ref()
        .map(|settings| &settings.source)
    {
        Some(CaSource::Files {
            certificate_file, ..
        }) => {
            files.insert(certificate_file.clone(), Use::Chain);
        }
        Some(CaSource::Generated { state_directory }) => {
            let root = state_directory.join("root.pem");
            if root.exists() {
                files.insert(root, Use::Chain);
            }
        }
        Some(CaSource::Memory) | None => {}
    }
    files
}

fn certificates(path: &Path, used: Use, now: SystemTime) -> Option<Finding> {
    // One that cannot be read is the configuration's matter.
    let ends: Vec<SystemTime> = roots_in(path).ok()?.iter().filter_map(expiry).collect();
    let (is_expired, end) = match used {
        Use::Trusted => {
            let last = ends.iter().max()?;
            (*last <= now, *last)
        }
        Use::Chain => {
            let first = ends.iter().min()?;
            (*first <= now, *first)
        }
    };
    is_expired.then(|| {
        let which = match used {
            Use::Trusted => "the last certificate",
            Use::Chain => "a certificate",
        };
        Finding::new(
            FindingCode::CertificateExpired,
            format!(
                "{which} in `{}` expired at {}",
                path.display(),
                text_of(end)
            ),
        )
    })
}

/// What is read of a JWK: its other members may be secret, and are not copied.
#[derive(Deserialize)]
struct Jwk {
    exp: Option<u64>,
}

/// When a key ends: by the certificate that stands in the file beside it, or by the JWK's `exp`
/// (NumericDate, as OpenID Federation 1.0 section 8.7 writes it). Most keys have neither.
fn key_expiry(path: &Path) -> Option<SystemTime> {
    let content = Zeroizing::new(std::fs::read(path).ok()?);
    if let Ok(Jwk { exp }) = serde_json::from_slice(&content) {
        return UNIX_EPOCH.checked_add(Duration::from_secs(exp?));
    }
    CertificateDer::pem_slice_iter(&content)
        .filter_map(Result::ok)
        .filter_map(|certificate| expiry(&certificate))
        .min()
}

fn text_of(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(
        |_| "a time that cannot be written".to_owned(),
        |time| format!("{time:.0}"),
    )
}
