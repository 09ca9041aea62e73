//! Public certificates in the forms that clients load.

use p12_keystore::{Certificate, KeyStore, KeyStoreEntry};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::trust::{TrustError, bundle};

/// The password of Java trust stores: there is nothing secret in them, and Java wants one.
pub const TRUST_STORE_PASSWORD: &str = "changeit";

/// A PKCS#12 trust store (RFC 7292) of every certificate in a PEM text, each an entry that Java trusts.
///
/// # Errors
/// A certificate cannot be read.
pub fn pkcs12(pem: &str) -> Result<Vec<u8>, String> {
    let mut store = KeyStore::new();
    for (index, certificate) in CertificateDer::pem_slice_iter(pem.as_bytes()).enumerate() {
        let certificate = certificate.map_err(|error| error.to_string())?;
        // A root that this crate cannot read is one fewer, not none.
        if let Ok(certificate) = Certificate::from_der(&certificate) {
            store.add_entry(
                &format!("root-{index}"),
                KeyStoreEntry::Certificate(certificate),
            );
        }
    }
    if store.entries_count() == 0 {
        return Err("there is no certificate to write".to_owned());
    }
    store
        .writer(TRUST_STORE_PASSWORD)
        .write()
        .map_err(|error| error.to_string())
}

/// The system's roots and ours; ours alone where the system has none.
///
/// # Errors
/// The system's roots cannot be read.
pub fn bundle_or_ours(root_pem: &str) -> Result<String, TrustError> {
    match bundle(root_pem) {
        Err(TrustError::NoSystemRoots(_)) => Ok(root_pem.to_owned()),
        bundled => bundled,
    }
}
