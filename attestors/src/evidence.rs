//! Evidence: what the kernel says of a caller, and what the caller presented.

use std::fmt;
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};

/// What the kernel says of the process at the other end of a connection. Collected once, at accept; not `Clone`.
#[derive(Debug)]
pub struct PeerEvidence {
    // filled in by the kernel-facing module
}

impl PeerEvidence {
    /// Evidence of a connection about whose caller this kernel knows nothing.
    pub fn none() -> Self {
        Self {}
    }
}

/// A token that a workload presented in one request head or for one tunnel. Redacts itself.
#[derive(Clone)]
pub struct PresentedToken {
    text: Arc<SecretString>,
    sha256: [u8; 32],
}

impl PresentedToken {
    /// Takes the token's exact bytes.
    pub fn new(text: String) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(digest.as_ref());
        Self {
            text: Arc::new(SecretString::from(text)),
            sha256,
        }
    }

    /// The exact token, to be verified or forwarded byte-identical (RFC 7523 section 2.2).
    pub fn expose(&self) -> &str {
        self.text.expose_secret()
    }

    /// The SHA-256 of the token's bytes: its name in caches and records.
    pub fn sha256(&self) -> &[u8; 32] {
        &self.sha256
    }
}

impl fmt::Debug for PresentedToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PresentedToken([redacted])")
    }
}
