//! The one thing an attestor asks of the network: a small document.

use async_trait::async_trait;
use url::Url;

/// Fetches discovery documents and key sets. The agent implements it (TLS roots, address guard,
/// timeout, size cap); an attestor never opens a socket itself.
#[async_trait]
pub trait Fetch: Send + Sync {
    /// Returns the body of a 200 answer to `GET url`, at most 64 KiB; follows no redirect.
    async fn get(&self, url: &Url) -> Result<Vec<u8>, FetchError>;
}

/// Why a document could not be fetched.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// The server could not be reached, or did not answer in time.
    #[error("`{url}` could not be reached: {detail}")]
    Unreachable {
        /// The URL asked for.
        url: String,
        /// What failed, without secrets.
        detail: String,
    },
    /// The server answered something other than a document of at most 64 KiB with status 200.
    #[error("`{url}` answered {detail}")]
    Refused {
        /// The URL asked for.
        url: String,
        /// The status, or what was wrong with the body.
        detail: String,
    },
    /// The URL is not one the agent may fetch.
    #[error("`{url}` may not be fetched: {detail}")]
    NotAllowed {
        /// The URL asked for.
        url: String,
        /// The rule that forbids it.
        detail: String,
    },
}
