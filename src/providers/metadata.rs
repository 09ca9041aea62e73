//! Authorization-server metadata (RFC 8414) and OpenID configuration (OpenID Connect Discovery 1.0).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use countersign_attestors::Clock;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use url::Url;

use super::token_response::parse_retry_after;
use super::{Deadline, LONGEST_RETRY_AFTER, MintFailure, Recovery};
use crate::config::ExactUrl;
use crate::fetch::{FetchClient, FetchFailure, FetchFailureKind};
use crate::refusal::RefusalCode;

/// How long metadata is used before it is fetched again.
const METADATA_LIFETIME: Duration = Duration::from_secs(3600);

/// How long metadata that could not be renewed is used before that is tried again.
const RENEWAL_PAUSE: Duration = Duration::from_secs(30);

/// What the agent reads of the metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) token_endpoint: Url,
    pub(super) revocation_endpoint: Option<Url>,
    pub(super) signing_algorithms: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Document {
    issuer: String,
    token_endpoint: Option<Url>,
    revocation_endpoint: Option<Url>,
    token_endpoint_auth_signing_alg_values_supported: Option<Vec<String>>,
}

/// The metadata of one issuer, for all credentials that reach it alike.
#[derive(Debug)]
pub(super) struct IssuerMetadata {
    issuer: ExactUrl,
    client: FetchClient,
    last: Mutex<Option<Arc<Fetched>>>,
    /// One asks at a time.
    fetching: tokio::sync::Mutex<()>,
    /// Nobody asks while the server wants to be left alone.
    left_alone: Mutex<Option<LeftAlone>>,
}

/// An answer with `Retry-After`, and until when it stands, on the monotonic clock.
#[derive(Debug)]
struct LeftAlone {
    failure: MintFailure,
    until: Duration,
}

impl LeftAlone {
    /// `None` where the server did not say when to ask again.
    fn after(failure: &MintFailure, now: Duration) -> Option<Self> {
        let Recovery::Backoff {
            retry_after: Some(retry_after),
        } = failure.recovery
        else {
            return None;
        };
        Some(Self {
            failure: failure.clone(),
            until: now + retry_after.min(LONGEST_RETRY_AFTER),
        })
    }

    /// What whoever would ask at `now` is told instead.
    fn failure_at(&self, now: Duration) -> Option<MintFailure> {
        let remaining = self.until.saturating_sub(now);
        (!remaining.is_zero()).then(|| MintFailure {
            recovery: Recovery::Backoff {
                retry_after: Some(remaining),
            },
            ..self.failure.clone()
        })
    }
}

/// Metadata as an answer told it.
#[derive(Debug)]
pub(super) struct Fetched {
    pub(super) metadata: Metadata,
    /// Greater than that of what was fetched before; the first is 1.
    pub(super) number: u64,
    /// Until when, on the monotonic clock, it is not fetched again.
    fresh_until: Duration,
}

impl Fetched {
    fn is_fresh(&self, clock: &dyn Clock) -> bool {
        clock.monotonic() < self.fresh_until
    }
}

impl IssuerMetadata {
    pub(super) fn new(issuer: ExactUrl, client: FetchClient) -> Self {
        Self {
            issuer,
            client,
            last: Mutex::new(None),
            fetching: tokio::sync::Mutex::default(),
            left_alone: Mutex::default(),
        }
    }

    /// The metadata that was fetched last, fetched anew where it is old; as if there were none where its
    /// number is not above `distrusted`.
    pub(super) async fn current(
        &self,
        distrusted: u64,
        deadline: Deadline,
        clock: &dyn Clock,
    ) -> Result<Arc<Fetched>, MintFailure> {
        let Some(last) = self.trusted(distrusted) else {
            return self.fetch(distrusted, deadline, clock).await;
        };
        // What was fetched last is good enough while somebody asks again.
        if last.is_fresh(clock) || self.fetching.try_lock().is_err() {
            return Ok(last);
        }
        // The other half is for what it is needed for.
        let half = Deadline::after(deadline.remaining() / 2);
        match self.fetch(distrusted, half, clock).await {
            // Metadata that names another issuer takes the place of none.
            Err(failure) if failure.code != RefusalCode::MetadataInvalid => {
                tracing::warn!(issuer = %self.issuer, detail = failure.detail, "metadata could not be renewed; the last is used");
                self.keep(&last, clock);
                Ok(last)
            }
            outcome => outcome,
        }
    }

    /// Lets what could not be renewed be used for a while, unless another took its place.
    fn keep(&self, fetched: &Fetched, clock: &dyn Clock) {
        let mut last = self.last();
        if last
            .as_ref()
            .is_some_and(|last| last.number == fetched.number)
        {
            *last = Some(Arc::new(Fetched {
                metadata: fetched.metadata.clone(),
                number: fetched.number,
                fresh_until: clock.monotonic() + RENEWAL_PAUSE,
            }));
        }
    }

    /// Asks the issuer, unless another that asked meanwhile had an answer, or was told to ask later.
    async fn fetch(
        &self,
        distrusted: u64,
        deadline: Deadline,
        clock: &dyn Clock,
    ) -> Result<Arc<Fetched>, MintFailure> {
        let turn = tokio::time::timeout(deadline.remaining(), self.fetching.lock());
        let _turn = turn.await.map_err(|_| waited_in_vain())?;
        let last = self.trusted(distrusted);
        if let Some(fresh) = last.filter(|last| last.is_fresh(clock)) {
            return Ok(fresh);
        }
        let now = clock.monotonic();
        let told = self
            .left_alone()
            .as_ref()
            .and_then(|told| told.failure_at(now));
        if let Some(failure) = told {
            return Err(failure);
        }
        let fresh_until = now + METADATA_LIFETIME;
        let (metadata, _) = self
            .discover(deadline, clock.wall())
            .await
            .inspect_err(|failure| {
                *self.left_alone() = LeftAlone::after(failure, clock.monotonic());
            })?;
        let mut last = self.last();
        let number = last.as_ref().map_or(1, |last| last.number + 1);
        let fetched = Arc::new(Fetched {
            metadata,
            number,
            fresh_until,
        });
        *last = Some(Arc::clone(&fetched));
        Ok(fetched)
    }

    fn trusted(&self, distrusted: u64) -> Option<Arc<Fetched>> {
        let last = self.last().clone();
        last.filter(|last| last.number > distrusted)
    }

    /// Finds the metadata, and the headers with which it came.
    pub(super) async fn discover(
        &self,
        deadline: Deadline,
        now: SystemTime,
    ) -> Result<(Metadata, HeaderMap), MintFailure> {
        discover(&self.client, &self.issuer, deadline, now).await
    }

    /// Lets the server be asked again, whatever it asked for.
    pub(super) fn forget_failure(&self) {
        *self.left_alone() = None;
    }

    fn last(&self) -> MutexGuard<'_, Option<Arc<Fetched>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left_alone(&self) -> MutexGuard<'_, Option<LeftAlone>> {
        self.left_alone
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn waited_in_vain() -> MintFailure {
    let failure = FetchFailure {
        kind: FetchFailureKind::Timeout,
        detail: "another request for its metadata took all of the time".to_owned(),
    };
    MintFailure::of_fetch("the authorization server", &failure)
}

/// The URLs at which an issuer's metadata may be, in the order in which they are tried: RFC 8414
/// section 3.1, then its section 5 for OpenID, then the suffix form of OpenID Connect Discovery.
fn well_known_urls(issuer: &Url) -> Vec<Url> {
    let path = issuer.path().trim_end_matches('/');
    let at = |path: String| {
        let mut url = issuer.clone();
        url.set_path(&path);
        url.set_query(None);
        url.set_fragment(None);
        url
    };
    let mut urls = vec![
        at(format!("/.well-known/oauth-authorization-server{path}")),
        at(format!("/.well-known/openid-configuration{path}")),
    ];
    if !path.is_empty() {
        urls.push(at(format!("{path}/.well-known/openid-configuration")));
    }
    urls
}

/// Finds an issuer's metadata, and the headers with which it came. A document that names another issuer is never used.
async fn discover(
    client: &FetchClient,
    issuer: &ExactUrl,
    deadline: Deadline,
    now: SystemTime,
) -> Result<(Metadata, HeaderMap), MintFailure> {
    let mut last_answer = String::new();
    for url in well_known_urls(issuer.url()) {
        let answer = client
            .get(&url, deadline.remaining())
            .await
            .map_err(|failure| MintFailure::of_fetch("the authorization server", &failure))?;
        let status = answer.status;
        if status == StatusCode::OK {
            match serde_json::from_slice::<Document>(&answer.body) {
                Ok(document) => {
                    let metadata = accept(document, issuer)?;
                    return Ok((metadata, answer.headers));
                }
                // A server may answer every path with a page of its own.
                Err(_) => last_answer = format!("`{url}` answered no metadata"),
            }
            continue;
        }
        let retry_after = parse_retry_after(&answer.headers, now);
        if status.is_redirection() {
            return Err(MintFailure::new(
                RefusalCode::TokenServerRedirected,
                format!("the metadata's URL redirects (status {})", status.as_u16()),
                Recovery::Backoff { retry_after: None },
            )
            .with_internal(format!("`{url}`")));
        }
        if status == StatusCode::TOO_MANY_REQUESTS {
            return Err(MintFailure::new(
                RefusalCode::TokenServerThrottled,
                "the authorization server asks for fewer requests (status 429)",
                Recovery::Backoff { retry_after },
            ));
        }
        if status.is_server_error() {
            return Err(MintFailure::new(
                RefusalCode::TokenServerError,
                format!(
                    "the authorization server answered status {} for its metadata",
                    status.as_u16()
                ),
                Recovery::Backoff { retry_after },
            ));
        }
        last_answer = format!("`{url}` answered status {}", status.as_u16());
    }
    Err(MintFailure::new(
        RefusalCode::MetadataInvalid,
        "the authorization server serves no metadata",
        Recovery::Backoff { retry_after: None },
    )
    .with_internal(last_answer))
}

fn accept(document: Document, issuer: &ExactUrl) -> Result<Metadata, MintFailure> {
    let invalid = |detail: &str| {
        MintFailure::new(
            RefusalCode::MetadataInvalid,
            detail,
            Recovery::Backoff { retry_after: None },
        )
    };
    // RFC 8414 section 3.3, and RFC 10070: an assertion's audience is this issuer.
    if document.issuer != issuer.as_str() {
        return Err(
            invalid("the metadata names another issuer than the one configured").with_internal(
                format!(
                    "the metadata says `{}`, the configuration `{issuer}`",
                    crate::request::printable(&document.issuer)
                ),
            ),
        );
    }
    Ok(Metadata {
        token_endpoint: document
            .token_endpoint
            .ok_or_else(|| invalid("the metadata has no `token_endpoint`"))?,
        revocation_endpoint: document.revocation_endpoint,
        signing_algorithms: document.token_endpoint_auth_signing_alg_values_supported,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_known_forms() {
        let texts = |issuer: &str| -> Vec<String> {
            well_known_urls(&Url::parse(issuer).unwrap())
                .iter()
                .map(Url::to_string)
                .collect()
        };
        assert_eq!(
            texts("https://a.test"),
            [
                "https://a.test/.well-known/oauth-authorization-server",
                "https://a.test/.well-known/openid-configuration",
            ]
        );
        assert_eq!(texts("https://a.test/"), texts("https://a.test"));
        assert_eq!(
            texts("https://a.test:8443/realms/r1"),
            [
                "https://a.test:8443/.well-known/oauth-authorization-server/realms/r1",
                "https://a.test:8443/.well-known/openid-configuration/realms/r1",
                "https://a.test:8443/realms/r1/.well-known/openid-configuration",
            ]
        );
    }

    #[tokio::test]
    async fn nobody_waits_for_another_who_asks_while_there_is_something_to_use() {
        let metadata = old_metadata_of("https://127.0.0.1:1");
        let old = Later(crate::clock::SystemClock::new(), METADATA_LIFETIME);
        let _asks = metadata.fetching.lock().await;
        let deadline = Deadline::after(Duration::from_secs(20));
        let found = metadata.current(0, deadline, &old).await.unwrap();
        assert_eq!(found.number, 1);
        assert!(deadline.remaining() > Duration::from_secs(15));
        // What is distrusted is nothing to use.
        let deadline = Deadline::after(Duration::from_millis(500));
        metadata.current(1, deadline, &old).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_server_that_hangs_leaves_time_to_use_what_is_there() {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0))
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let metadata = old_metadata_of(&format!("https://{address}"));
        let clock = crate::clock::SystemClock::new();
        let old = Later(clock, METADATA_LIFETIME);
        let deadline = Deadline::after(Duration::from_secs(8));
        let found = metadata.current(0, deadline, &old).await.unwrap();
        assert_eq!(found.number, 1);
        assert!(deadline.remaining() > Duration::from_secs(1));
        // It is left alone for a while.
        let deadline = Deadline::after(Duration::from_secs(8));
        metadata.current(0, deadline, &old).await.unwrap();
        assert!(deadline.remaining() > Duration::from_secs(5));
        let later = Later(old.0, METADATA_LIFETIME + RENEWAL_PAUSE);
        let deadline = Deadline::after(Duration::from_secs(8));
        metadata.current(0, deadline, &later).await.unwrap();
        assert!(deadline.remaining() < Duration::from_secs(5));
    }

    /// What was fetched at the clock's start from an issuer that is not asked yet.
    fn old_metadata_of(issuer: &str) -> IssuerMetadata {
        let issuer = ExactUrl::parse(issuer).unwrap();
        let runtime = tokio::runtime::Handle::current();
        let client = FetchClient::new(
            crate::fetch::FetchSettings {
                configured: [issuer.url().clone()].into(),
                ..Default::default()
            },
            Arc::default(),
            runtime,
        );
        let metadata = IssuerMetadata::new(issuer.clone(), client);
        *metadata.last() = Some(Arc::new(Fetched {
            metadata: Metadata {
                token_endpoint: issuer.url().join("token").unwrap(),
                revocation_endpoint: None,
                signing_algorithms: None,
            },
            number: 1,
            fresh_until: METADATA_LIFETIME,
        }));
        metadata
    }

    #[derive(Debug)]
    struct Later(crate::clock::SystemClock, Duration);

    impl Clock for Later {
        fn wall(&self) -> SystemTime {
            self.0.wall()
        }

        fn monotonic(&self) -> Duration {
            self.0.monotonic() + self.1
        }
    }

    #[test]
    fn only_the_exact_issuer_is_accepted() {
        let configured = ExactUrl::parse("https://a.test").unwrap();
        let document = |issuer: &str| Document {
            issuer: issuer.to_owned(),
            token_endpoint: Some(Url::parse("https://a.test/token").unwrap()),
            revocation_endpoint: None,
            token_endpoint_auth_signing_alg_values_supported: None,
        };
        assert!(accept(document("https://a.test"), &configured).is_ok());
        for other in [
            "https://a.test/",
            "https://A.test",
            "http://a.test",
            "https://a.test:443",
            "https://b.test",
            "",
        ] {
            let failure = accept(document(other), &configured).unwrap_err();
            assert_eq!(failure.code, RefusalCode::MetadataInvalid, "{other}");
        }
    }
}
