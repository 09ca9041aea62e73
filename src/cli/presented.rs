//! The token that a verb presents for its workload: from a file, or from the token service of a CI
//! system, renewed before it expires.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;
use url::Url;
use zeroize::Zeroizing;

use crate::fetch::{Answer, FetchClient, FetchSettings, USER_AGENT};

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
    /// Whose turn it is to ask the service.
    turn: Arc<tokio::sync::Mutex<()>>,
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
    pub fn new(token_file: Option<&Path>, issuers: &[Issuer]) -> Result<Arc<Self>, String> {
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
        Ok(Self::of(source))
    }

    fn of(source: Source) -> Arc<Self> {
        Arc::new(Self {
            source,
            held: Mutex::new(None),
            turn: Arc::default(),
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
    pub async fn header(self: &Arc<Self>) -> Result<Option<HeaderValue>, String> {
        match &self.source {
            Source::Nothing => Ok(None),
            Source::File(path) => self.of_file(path).map(Some),
            Source::Service(service) => self.of_service(service).await.map(Some),
        }
    }

    fn of_file(&self, path: &Path) -> Result<HeaderValue, String> {
        let mut held = self.held();
        let now = SystemTime::now();
        match mark(path) {
            Ok(mark) if held.as_ref().and_then(|held| held.mark) == Some(mark) => {}
            changed => match changed.and_then(|mark| read(path, mark)) {
                Ok(fresh) => *held = Some(fresh),
                // The file may be half written: what was in it is good for a while.
                Err(_) if held.as_ref().is_some_and(|held| held.is_good(now)) => {}
                Err(problem) => return Err(problem),
            },
        }
        match held.as_ref() {
            Some(held) => Ok(held.header.clone()),
            None => Err(empty(path)),
        }
    }

    async fn of_service(self: &Arc<Self>, service: &TokenService) -> Result<HeaderValue, String> {
        if let Some((header, is_due)) = self.good() {
            // Renewed beside: no request waits for the service while its token is good.
            if is_due && let Ok(turn) = Arc::clone(&self.turn).try_lock_owned() {
                let presenter = Arc::clone(self);
                tokio::spawn(async move {
                    if let Source::Service(service) = &presenter.source
                        && let Err(problem) = presenter.renew(service).await
                    {
                        tracing::warn!(problem, "the token is not renewed yet");
                    }
                    drop(turn);
                });
            }
            return Ok(header);
        }
        let _turn = self.turn.lock().await;
        // Who had its turn before may have renewed it.
        match self.good() {
            Some((header, _)) => Ok(header),
            None => self.renew(service).await,
        }
    }

    async fn renew(&self, service: &TokenService) -> Result<HeaderValue, String> {
        let fetched = service.fetch().await;
        let mut held = self.held();
        match fetched {
            Ok(fresh) => {
                let header = fresh.header.clone();
                *held = Some(fresh);
                Ok(header)
            }
            Err(problem) => {
                if let Some(held) = held.as_mut() {
                    held.renew_at = Some(SystemTime::now() + RETRY_AFTER);
                }
                Err(problem)
            }
        }
    }

    /// The token that is held and good, and whether it is to be renewed.
    fn good(&self) -> Option<(HeaderValue, bool)> {
        let now = SystemTime::now();
        let held = self.held();
        let held = held.as_ref().filter(|held| held.is_good(now))?;
        let is_due = held.renew_at.is_some_and(|renew_at| now >= renew_at);
        Some((held.header.clone(), is_due))
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
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

fn read(path: &Path, mark: Mark) -> Result<Held, String> {
    let text = fs::read_to_string(path)
        .map(Zeroizing::new)
        .map_err(|error| unreadable(path, &error))?;
    let held = Held::new(text.trim()).ok_or_else(|| empty(path))?;
    Ok(Held {
        mark: Some(mark),
        ..held
    })
}

fn empty(path: &Path) -> String {
    format!("the token file `{}` holds no token", path.display())
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    format!(
        "the token file `{}` cannot be read: {error}",
        path.display()
    )
}

impl Held {
    /// Whether it has not expired, as far as it says.
    fn is_good(&self, now: SystemTime) -> bool {
        self.expires_at.is_none_or(|end| now < end)
    }

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

fn answers(status: StatusCode) -> String {
    format!("the CI's token service answers {status}")
}

impl TokenService {
    /// A token for the first of the agent's issuers that this service is. It may refuse an audience:
    /// the agent's other issuers, and other audiences of this one, have others.
    async fn fetch(&self) -> Result<Held, String> {
        let mut whose = None;
        let mut refused = None;
        for issuer in &self.issuers {
            for audience in &issuer.audiences {
                let token = match self.token_for(audience).await? {
                    Ok(token) => token,
                    Err(status) => {
                        refused.get_or_insert(status);
                        continue;
                    }
                };
                let known =
                    claims(&token).and_then(|claims| Some(claims.get("iss")?.as_str()?.to_owned()));
                if known.as_deref() == Some(issuer.issuer.as_str()) {
                    return Held::new(&token).ok_or_else(|| {
                        "the CI's token service answers with something that is no token".to_owned()
                    });
                }
                whose = Some(known.unwrap_or_default());
                // Whatever the audience, the service's tokens are of one issuer.
                break;
            }
        }
        Err(match (whose, refused) {
            (None, Some(status)) => answers(status),
            (whose, _) => format!(
                "the CI's tokens are of issuer `{}`, which the agent is not configured for",
                crate::request::printable(&whose.unwrap_or_default())
            ),
        })
    }

    /// A token for `audience`, or the status with which the service refuses it.
    ///
    /// # Errors
    /// The service does not answer, or not with a token: nor would it for another audience.
    async fn token_for(
        &self,
        audience: &str,
    ) -> Result<Result<Zeroizing<String>, StatusCode>, String> {
        #[derive(Deserialize)]
        struct Issued {
            value: String,
        }
        let mut url = self.url.clone();
        url.query_pairs_mut().append_pair("audience", audience);
        let answer = self.get(&url).await?;
        match answer.status {
            StatusCode::OK => {
                let issued: Issued = serde_json::from_slice(&answer.body)
                    .map_err(|_| "the CI's token service answers without a token".to_owned())?;
                Ok(Ok(Zeroizing::new(issued.value)))
            }
            StatusCode::BAD_REQUEST
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND
            | StatusCode::UNPROCESSABLE_ENTITY => Ok(Err(answer.status)),
            status => Err(answers(status)),
        }
    }

    async fn get(&self, url: &Url) -> Result<Answer, String> {
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
        client
            .send(request, REQUEST_TIMEOUT)
            .await
            .map_err(|failure| {
                format!("the CI's token service does not answer: {}", failure.detail)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token that lives from `issued` to `expires`, in seconds from now. Nobody verifies it here.
    fn token(issued: i64, expires: i64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let at = |offset: i64| now.as_secs().saturating_add_signed(offset);
        let claims = serde_json::json!({"iat": at(issued), "exp": at(expires)});
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
    }

    fn value(header: Result<Option<HeaderValue>, String>) -> String {
        header.unwrap().unwrap().to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_file_is_read_again_and_kept_while_it_is_half_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let presenter = Presenter::of(Source::File(path.clone()));
        assert!(
            presenter
                .header()
                .await
                .unwrap_err()
                .contains("cannot be read")
        );
        fs::write(&path, "").unwrap();
        assert!(
            presenter
                .header()
                .await
                .unwrap_err()
                .contains("holds no token")
        );
        let (first, second) = (token(-10, 10), token(-5, 100));
        fs::write(&path, format!("{first}\n")).unwrap();
        assert_eq!(value(presenter.header().await), format!("Bearer {first}"));
        fs::write(&path, "").unwrap();
        assert_eq!(value(presenter.header().await), format!("Bearer {first}"));
        fs::write(&path, &second).unwrap();
        assert_eq!(value(presenter.header().await), format!("Bearer {second}"));
        // One that has expired is not kept in place of nothing.
        fs::write(&path, token(-20, -10)).unwrap();
        presenter.header().await.unwrap();
        fs::remove_file(&path).unwrap();
        assert!(
            presenter
                .header()
                .await
                .unwrap_err()
                .contains("cannot be read")
        );
    }

    #[tokio::test]
    async fn no_request_waits_for_a_service_that_hangs_while_the_token_is_good() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let presenter = Presenter::of(Source::Service(TokenService {
            url: Url::parse(&url).unwrap(),
            bearer: SecretString::from("bearer"),
            issuers: vec![Issuer {
                issuer: "https://ci.example.test".to_owned(),
                audiences: vec!["countersign".to_owned()],
            }],
        }));
        // Two thirds of its life are over, so it is due.
        let due = token(-90, 30);
        *presenter.held() = Held::new(&due);
        let limit = REQUEST_TIMEOUT / 2;
        for _ in 0..3 {
            let header = tokio::time::timeout(limit, presenter.header()).await;
            assert_eq!(value(header.unwrap()), format!("Bearer {due}"));
        }
        // The service was asked all the same, once; it never answers.
        let _asked = listener.accept().await.unwrap();
        assert!(presenter.turn.try_lock().is_err());
    }

    /// A token service that answers each audience as `answer` says: the issuer of a token, or a status.
    async fn service(
        audiences: &[(&str, &[&str])],
        answer: impl Fn(&str) -> Result<&'static str, u16> + Send + 'static,
    ) -> (TokenService, Arc<Mutex<Vec<String>>>) {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/token?v=2", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        tokio::spawn(async move {
            loop {
                let (mut io, _) = listener.accept().await.unwrap();
                let mut lines = tokio::io::BufReader::new(&mut io).lines();
                let line = lines.next_line().await.unwrap().unwrap();
                while !lines.next_line().await.unwrap().unwrap().is_empty() {}
                let target = line.split(' ').nth(1).unwrap();
                let audience = target.split_once("audience=").unwrap().1.to_owned();
                let (status, body) = match answer(&audience) {
                    Ok(issuer) => {
                        let claims = serde_json::json!({"iss": issuer}).to_string();
                        let token = format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
                        (200, serde_json::json!({"value": token}).to_string())
                    }
                    Err(status) => (status, String::new()),
                };
                seen.lock().unwrap().push(audience);
                let answer = format!(
                    "HTTP/1.1 {status} Said\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                io.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let issuers = audiences
            .iter()
            .map(|(issuer, audiences)| Issuer {
                issuer: (*issuer).to_owned(),
                audiences: audiences.iter().map(ToString::to_string).collect(),
            })
            .collect();
        let service = TokenService {
            url: Url::parse(&url).unwrap(),
            bearer: SecretString::from("bearer"),
            issuers,
        };
        (service, asked)
    }

    #[tokio::test]
    async fn a_refused_audience_is_not_the_end() {
        const ISSUERS: &[(&str, &[&str])] = &[("ours", &["a", "b"]), ("theirs", &["c", "d"])];
        type Row = (
            fn(&str) -> Result<&'static str, u16>,
            &'static str,
            &'static [&'static str],
        );
        let rows: &[Row] = &[
            (|_| Ok("ours"), "", &["a"]),
            (|_| Ok("theirs"), "", &["a", "c"]),
            (
                |audience| {
                    if audience == "d" {
                        Ok("theirs")
                    } else {
                        Err(400)
                    }
                },
                "",
                &["a", "b", "c", "d"],
            ),
            (
                |audience| {
                    if audience == "a" {
                        Err(403)
                    } else {
                        Ok("ours")
                    }
                },
                "",
                &["a", "b"],
            ),
            (|_| Err(422), "answers 422", &["a", "b", "c", "d"]),
            (
                |audience| {
                    if audience == "a" {
                        Err(404)
                    } else {
                        Ok("another")
                    }
                },
                "issuer `another`",
                &["a", "b", "c"],
            ),
            // What is wrong with one audience only may be tried with another; these are not that.
            (|_| Err(401), "answers 401", &["a"]),
            (|_| Err(503), "answers 503", &["a"]),
        ];
        for (answer, problem, expected) in rows {
            let (service, asked) = service(ISSUERS, answer).await;
            match service.fetch().await {
                Ok(_) => assert!(problem.is_empty(), "{expected:?}"),
                Err(said) => assert!(!problem.is_empty() && said.contains(problem), "{said}"),
            }
            assert_eq!(*asked.lock().unwrap(), *expected);
        }
    }
}
