//! The token that a verb presents for its workload: from a file, or from the token service of a CI
//! system, renewed before it expires.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Mutex;
use url::Url;
use zeroize::Zeroizing;

use crate::fetch::{FetchClient, FetchSettings, USER_AGENT};

/// Where GitHub Actions' token service is.
pub const REQUEST_URL_VARIABLE: &str = "ACTIONS_ID_TOKEN_REQUEST_URL";
/// What it takes.
pub const REQUEST_TOKEN_VARIABLE: &str = "ACTIONS_ID_TOKEN_REQUEST_TOKEN";

/// How long the token service may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long before its expiry a token is renewed at the latest.
const RENEW_BEFORE: Duration = Duration::from_secs(60);
/// How long a failed renewal is not repeated while the token is good.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// An issuer whose tokens the agent takes.
#[derive(Debug, Clone, Deserialize)]
pub struct Issuer {
    /// The exact `iss`.
    pub issuer: String,
    /// Audiences, one of which a token must carry.
    pub audiences: Vec<String>,
}

/// Holds the token that is presented, and keeps it good.
#[derive(Debug)]
pub struct Presenter {
    source: Source,
    held: Mutex<Option<Held>>,
}

#[derive(Debug)]
enum Source {
    Nothing,
    File(PathBuf),
    Service(TokenService),
}

#[derive(Debug)]
struct TokenService {
    url: Url,
    bearer: SecretString,
    issuers: Vec<Issuer>,
}

#[derive(Debug)]
struct Held {
    header: HeaderValue,
    /// Which file content it is.
    mark: Option<Mark>,
    renew_at: Option<SystemTime>,
    expires_at: Option<SystemTime>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Presenter {
    /// Whether [`Self::new`] needs to know the agent's issuers.
    pub fn asks_for_issuers(token_file: Option<&Path>) -> bool {
        token_file.is_none() && service_of_environment().is_some()
    }

    /// A presenter of the token in `token_file`; without one, of tokens of the token service that the
    /// environment names, for one of `issuers`; without either, of nothing.
    ///
    /// # Errors
    /// The environment names a token service by something that is no URL.
    pub fn new(token_file: Option<&Path>, issuers: &[Issuer]) -> Result<Self, String> {
        let source = match (token_file, service_of_environment()) {
            (Some(path), _) => Source::File(path.to_owned()),
            (None, Some((url, bearer))) if !issuers.is_empty() => Source::Service(TokenService {
                url: Url::parse(&url)
                    .map_err(|error| format!("`{REQUEST_URL_VARIABLE}` is no URL: {error}"))?,
                bearer: SecretString::from(bearer),
                issuers: issuers.to_vec(),
            }),
            (None, _) => Source::Nothing,
        };
        Ok(Self {
            source,
            held: Mutex::new(None),
        })
    }

    /// Whether there is a token to present.
    pub fn presents(&self) -> bool {
        !matches!(self.source, Source::Nothing)
    }

    /// Where its tokens come from, in words.
    pub fn origin(&self) -> Option<String> {
        match &self.source {
            Source::Nothing => None,
            Source::File(path) => Some(format!("`{}`", path.display())),
            Source::Service(_) => Some("the CI's token service".to_owned()),
        }
    }

    /// `Bearer TOKEN` with the token that is good now; `None` where nothing is presented.
    ///
    /// # Errors
    /// There is no token that is good.
    pub async fn header(&self) -> Result<Option<HeaderValue>, String> {
        let mut held = self.held.lock().await;
        match &self.source {
            Source::Nothing => return Ok(None),
            Source::File(path) => {
                let mark = mark(path)?;
                if held.as_ref().and_then(|held| held.mark) != Some(mark) {
                    *held = Some(Held {
                        mark: Some(mark),
                        ..read(path)?
                    });
                }
            }
            Source::Service(service) => {
                let now = SystemTime::now();
                let is_due = held
                    .as_ref()
                    .is_none_or(|held| held.renew_at.is_some_and(|renew_at| now >= renew_at));
                if is_due {
                    match service.fetch().await {
                        Ok(fresh) => *held = Some(fresh),
                        Err(problem) => match held.as_mut() {
                            Some(held) if held.expires_at.is_some_and(|end| now < end) => {
                                held.renew_at = Some(now + RETRY_AFTER);
                            }
                            _ => return Err(problem),
                        },
                    }
                }
            }
        }
        Ok(held.as_ref().map(|held| held.header.clone()))
    }
}

fn service_of_environment() -> Option<(String, String)> {
    let variable = |name| {
        std::env::var(name)
            .ok()
            .filter(|value: &String| !value.is_empty())
    };
    Some((
        variable(REQUEST_URL_VARIABLE)?,
        variable(REQUEST_TOKEN_VARIABLE)?,
    ))
}

fn mark(path: &Path) -> Result<Mark, String> {
    let metadata = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
    Ok(Mark {
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

fn read(path: &Path) -> Result<Held, String> {
    let text = fs::read_to_string(path)
        .map(Zeroizing::new)
        .map_err(|error| unreadable(path, &error))?;
    Held::new(text.trim())
        .ok_or_else(|| format!("the token file `{}` holds no token", path.display()))
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    format!(
        "the token file `{}` cannot be read: {error}",
        path.display()
    )
}

impl Held {
    fn new(token: &str) -> Option<Self> {
        if token.is_empty() {
            return None;
        }
        let mut header =
            HeaderValue::try_from(Zeroizing::new(format!("Bearer {token}")).as_str()).ok()?;
        header.set_sensitive(true);
        let time = |claim: &str| {
            let seconds = claims(token)?.get(claim)?.as_u64()?;
            UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
        };
        let expires_at = time("exp");
        let renew_at = expires_at.map(|expires_at| {
            let lifetime = time("iat")
                .and_then(|issued_at| expires_at.duration_since(issued_at).ok())
                .unwrap_or(RENEW_BEFORE * 3);
            expires_at - RENEW_BEFORE.min(lifetime / 3)
        });
        Some(Self {
            header,
            mark: None,
            renew_at,
            expires_at,
        })
    }
}

/// A JWT's claims, unverified: only to know when it ends, and whose it is. The agent verifies.
fn claims(token: &str) -> Option<Value> {
    let payload = token.split('.').nth(1)?;
    let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice(&payload).ok()
}

impl TokenService {
    /// A token for the first of the agent's issuers that this service is.
    async fn fetch(&self) -> Result<Held, String> {
        #[derive(Deserialize)]
        struct Answer {
            value: String,
        }
        let mut whose = None;
        for issuer in &self.issuers {
            for audience in issuer.audiences.iter().take(1) {
                let mut url = self.url.clone();
                url.query_pairs_mut().append_pair("audience", audience);
                let answer = self.get(&url).await?;
                let answer: Answer = serde_json::from_slice(&answer)
                    .map_err(|_| "the CI's token service answers without a token".to_owned())?;
                let token = Zeroizing::new(answer.value);
                let known =
                    claims(&token).and_then(|claims| Some(claims.get("iss")?.as_str()?.to_owned()));
                if known.as_deref() == Some(issuer.issuer.as_str()) {
                    return Held::new(&token).ok_or_else(|| {
                        "the CI's token service answers with something that is no token".to_owned()
                    });
                }
                whose = known;
            }
        }
        Err(format!(
            "the CI's tokens are of issuer `{}`, which the agent is not configured for",
            crate::request::printable(&whose.unwrap_or_default())
        ))
    }

    async fn get(&self, url: &Url) -> Result<Zeroizing<Vec<u8>>, String> {
        let client = FetchClient::new(
            FetchSettings {
                configured: BTreeSet::from([url.clone()]),
                ca_file: None,
                connect_to: None,
                outbound_proxy: None,
                allow_addresses: Vec::new(),
            },
            Arc::from([]),
            tokio::runtime::Handle::current(),
        );
        let mut authorization = HeaderValue::try_from(
            Zeroizing::new(format!("Bearer {}", self.bearer.expose_secret())).as_str(),
        )
        .map_err(|_| format!("`{REQUEST_TOKEN_VARIABLE}` is no token"))?;
        authorization.set_sensitive(true);
        let request = Request::builder()
            .method(Method::GET)
            .uri(url.as_str())
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::USER_AGENT, USER_AGENT)
            .header(http::header::AUTHORIZATION, authorization)
            .body(Bytes::new())
            .map_err(|error| error.to_string())?;
        let answer = client
            .send(request, REQUEST_TIMEOUT)
            .await
            .map_err(|failure| {
                format!("the CI's token service does not answer: {}", failure.detail)
            })?;
        match answer.status {
            StatusCode::OK => Ok(answer.body),
            status => Err(format!("the CI's token service answers {status}")),
        }
    }
}
