//! Whom the agent trusts: the system's roots, or a destination's own; and the public certificates
//! that clients of the proxy load.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

/// Why roots cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TrustError {
    /// A file of roots cannot be read.
    #[error("`{path}`: {detail}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The system has no roots.
    #[error("the system's trust store holds no certificate: {0}")]
    NoSystemRoots(String),
}

/// The system's roots, read once and only when first needed: reading them takes most of a start.
pub fn system_roots() -> Result<&'static [CertificateDer<'static>], TrustError> {
    static ROOTS: OnceLock<Result<Vec<CertificateDer<'static>>, TrustError>> = OnceLock::new();
    ROOTS
        .get_or_init(|| {
            let loaded = rustls_native_certs::load_native_certs();
            match loaded.certs.is_empty() {
                true => Err(TrustError::NoSystemRoots(
                    loaded
                        .errors
                        .iter()
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                        .join("; "),
                )),
                false => Ok(loaded.certs),
            }
        })
        .as_deref()
        .map_err(Clone::clone)
}

/// The roots in a PEM file.
pub fn roots_in(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let error = |detail: String| TrustError::File {
        path: path.to_owned(),
        detail,
    };
    let pem = fs::read(path).map_err(|problem| error(problem.to_string()))?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|problem| error(problem.to_string()))?;
    match certificates.is_empty() {
        true => Err(error("holds no certificate".to_owned())),
        false => Ok(certificates),
    }
}

/// When a certificate's validity ends (RFC 5280 section 4.1.2.5); `None` where it cannot be read.
pub fn expiry(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    // One that ended before 1970 has ended.
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// A TLS client that trusts the roots in `ca_file`, or the system's where there is none, and
/// offers `protocols` by ALPN.
pub fn client_config(
    ca_file: Option<&Path>,
    protocols: &[&[u8]],
) -> Result<Arc<ClientConfig>, TrustError> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => roots.add_parsable_certificates(roots_in(path)?),
        None => roots.add_parsable_certificates(system_roots()?.iter().cloned()),
    };
    let mut client_config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client_config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(client_config))
}

/// Certificates in PEM (RFC 7468 section 5).
pub fn pem_of<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    let mut pem = String::new();
    for certificate in certificates {
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = base64::engine::general_purpose::STANDARD.encode(certificate);
        let mut rest = encoded.as_str();
        while !rest.is_empty() {
            let (line, after) = rest.split_at(rest.len().min(64));
            pem.push_str(line);
            pem.push('\n');
            rest = after;
        }
        pem.push_str("-----END CERTIFICATE-----\n");
    }
    pem
}

/// The system's roots and ours in one PEM text: `SSL_CERT_FILE` and its like *replace* the
/// system's roots.
pub fn bundle(root_pem: &str) -> Result<String, TrustError> {
    Ok(format!("{root_pem}{}", pem_of(system_roots()?)))
}
