//! Evidence: what the kernel says of a caller, and what the caller presented.

use std::fmt;
use std::io;
use std::net::TcpStream;
#[cfg(unix)]
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};

use crate::platform::{Peer, Process};
use crate::workload::AttestationEnded;

/// What the kernel says of the process at the other end of a connection. Collected once, at accept; not `Clone`.
#[derive(Debug)]
pub struct PeerEvidence {
    peer: Option<Peer>,
}

impl PeerEvidence {
    /// Evidence of a connection about whose caller this kernel knows nothing.
    pub fn none() -> Self {
        Self { peer: None }
    }

    /// Evidence of the peer of a connected Unix stream socket, by SO_PEERPIDFD (unix(7)), or by
    /// SO_PEERCRED and sock_diag(7) where the kernel lacks it. Blocks on procfs: to be looked for on an
    /// [observer](crate::observers). Systems other than Linux have none.
    #[cfg(unix)]
    pub async fn of_unix_stream(stream: BorrowedFd<'_>) -> Result<Self, EvidenceError> {
        let peer = Peer::of_unix_stream(stream).await?;
        Ok(Self { peer })
    }

    /// As [`PeerEvidence::of_unix_stream`] on a kernel without SO_PEERPIDFD.
    #[cfg(all(target_os = "linux", any(test, feature = "test-support")))]
    pub async fn of_unix_stream_by_credentials(
        stream: BorrowedFd<'_>,
    ) -> Result<Self, EvidenceError> {
        let peer = Some(Peer::of_unix_stream_by_credentials(stream).await?);
        Ok(Self { peer })
    }

    /// Evidence of the process that connected over loopback TCP, by sock_diag(7) in the network namespace
    /// of the calling thread. Blocks on procfs, as [`PeerEvidence::of_unix_stream`] does. Systems other
    /// than Linux have none.
    pub async fn of_loopback_tcp(stream: &TcpStream) -> Result<Self, EvidenceError> {
        let peer = Peer::of_loopback_tcp(stream).await?;
        Ok(Self { peer })
    }

    /// The calling process; `None` without kernel evidence.
    pub fn process(&self) -> Option<&Process> {
        self.peer.as_ref().and_then(Peer::process)
    }

    /// How the process was found: `pidfd`, `sock_diag`; what begins with `weaker:` proves less.
    pub fn words(&self) -> &[&'static str] {
        self.peer.as_ref().map_or(&[], Peer::words)
    }

    /// Checks that the caller lives and has executed nothing since. A system call or two; a
    /// check less than a millisecond old is not repeated.
    pub fn check_liveness(&self) -> Result<(), AttestationEnded> {
        self.peer.as_ref().map_or(Ok(()), Peer::check_liveness)
    }
}

/// Why there is no kernel evidence of a caller that should have some.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// The process that connected has exited, or closed or passed on its socket.
    #[error(
        "the calling process is gone: it must keep the connection open until it has its answer"
    )]
    CallerGone,
    /// The socket is held by processes that attest differently, by more than 64, or by another user than made it.
    #[error(
        "the connection is shared by processes that attest differently, or by many: each must open its own"
    )]
    AmbiguousCaller,
    /// Who made the connection is a user whose processes the agent may not look at.
    #[error(
        "the calling process could not be looked at: the agent may not look at processes of user {uid}"
    )]
    CallerHidden {
        /// The user's number, as this agent's user namespace numbers it.
        uid: u32,
    },
    /// The kernel could not be asked.
    #[error("the calling process could not be looked at: {0}")]
    Unavailable(#[from] io::Error),
}

impl EvidenceError {
    /// The same of a caller whose user is known. One's own processes are hidden only while they end, or where
    /// they are not dumpable.
    #[cfg(target_os = "linux")]
    pub(crate) fn of_user(self, uid: u32) -> Self {
        match self {
            Self::Unavailable(error)
                if error.kind() == io::ErrorKind::PermissionDenied
                    && uid != nix::unistd::geteuid().as_raw() =>
            {
                Self::CallerHidden { uid }
            }
            other => other,
        }
    }

    /// The stable code of the refusal.
    pub fn code(&self) -> &'static str {
        match self {
            Self::CallerGone => "caller_gone",
            Self::AmbiguousCaller => "caller_ambiguous",
            Self::CallerHidden { .. } => "caller_hidden",
            Self::Unavailable(_) => "attestation_unavailable",
        }
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
