//! The embedded authorization server: metadata (RFC 8414), a key set, a token endpoint for the client
//! credentials grant, and revocation (RFC 7009). It is strict where strict servers are: an assertion's
//! audience is the issuer as a plain string, and its `jti` is used once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use url::form_urlencoded;

use super::certificates::ServerCertificate;
use super::server::{Listening, full, json_answer, listen, read_body};
use crate::config::SigningAlgorithm;
use crate::jwt::{SigningKey, VerifyingKey, check_times, numeric_date, unique_id, verify};

const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// How many requests and tokens are remembered for [`AuthorizationServer::received`] and
/// [`AuthorizationServer::issued`].
const REMEMBERED: usize = 20_000;

/// What an authorization server is made of.
#[derive(Debug)]
pub struct AuthorizationServerOptions {
    /// The issuer's URL, without a trailing slash.
    pub issuer: String,
    /// Where to listen; port 0 is any free one.
    pub address: SocketAddr,
    /// The server's certificate.
    pub certificate: ServerCertificate,
    /// The clients.
    pub clients: Vec<Client>,
    /// How long access tokens live, in whole seconds.
    pub token_lifetime: Duration,
    /// The audience of tokens asked for without `resource` and `audience`.
    pub default_audience: String,
}

/// A registered client.
#[derive(Debug, Clone)]
pub struct Client {
    /// Its id; for federated clients, that of all workloads that the issuer vouches for.
    pub client_id: String,
    /// How it authenticates.
    pub credential: ClientCredential,
    /// The scopes that it may ask for, and gets where it asks for none.
    pub scopes: Vec<String>,
}

/// How a client authenticates.
#[derive(Debug, Clone)]
pub enum ClientCredential {
    /// `private_key_jwt` by one of these keys.
    Keys(Vec<VerifyingKey>),
    /// `client_secret_basic`.
    Secret(String),
    /// Assertions of another issuer, of any subject; access tokens bear the assertion's `sub`.
    Federated {
        /// The trusted issuer.
        issuer: String,
        /// Its keys.
        keys: Vec<VerifyingKey>,
    },
}

/// An access token that was issued. Says nothing of its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The token's `jti`.
    pub jti: String,
    /// The client.
    pub client_id: String,
    /// The token's `sub`.
    pub subject: String,
    /// The token's scope.
    pub scope: String,
    /// The token's audiences.
    pub audiences: Vec<String>,
}

/// A request that reached the token endpoint.
#[derive(Debug, Clone)]
pub struct Received {
    /// The form's parameters, in order.
    pub form: Vec<(String, String)>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// The answer's status.
    pub status: StatusCode,
}

impl Received {
    /// The values of a parameter.
    pub fn values(&self, name: &str) -> Vec<&str> {
        self.form
            .iter()
            .filter(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
            .collect()
    }
}

/// A running authorization server. Ends when dropped.
#[derive(Debug)]
pub struct AuthorizationServer {
    state: Arc<AuthorizationServerState>,
    listening: Listening,
}

/// What the server knows; [`Self::respond`] is the whole server without its sockets.
#[derive(Debug)]
pub struct AuthorizationServerState {
    issuer: String,
    clients: Mutex<HashMap<String, Client>>,
    token_lifetime_seconds: AtomicU64,
    default_audience: String,
    key: SigningKey,
    public_jwk: Value,
    token_requests: AtomicUsize,
    issued: Mutex<VecDeque<Issued>>,
    received: Mutex<VecDeque<Received>>,
    used_assertions: Mutex<HashMap<(String, String), u64>>,
    revoked: Mutex<HashSet<String>>,
}

/// An OAuth error (RFC 6749 section 5.2).
struct OauthError {
    status: StatusCode,
    error: &'static str,
    description: &'static str,
}

impl OauthError {
    fn invalid_client(description: &'static str) -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            error: "invalid_client",
            description,
        }
    }

    fn bad_request(error: &'static str, description: &'static str) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            error,
            description,
        }
    }
}

impl AuthorizationServer {
    /// Binds and serves on the current runtime.
    pub async fn start(options: AuthorizationServerOptions) -> io::Result<Self> {
        let address = options.address;
        let certificate = options.certificate.clone();
        let state = Arc::new(AuthorizationServerState::new(options)?);
        let serving = Arc::clone(&state);
        let listening = listen(
            address,
            Some(&certificate),
            Arc::new(move |request| {
                let serving = Arc::clone(&serving);
                Box::pin(async move {
                    let (head, body) = request.into_parts();
                    let answer = match read_body(body).await {
                        Some(body) => serving.respond(&Request::from_parts(head, body)),
                        None => json_answer(
                            StatusCode::PAYLOAD_TOO_LARGE,
                            &json!({"error": "invalid_request"}),
                        ),
                    };
                    answer.map(full)
                })
            }),
        )
        .await?;
        Ok(Self { state, listening })
    }

    /// The address bound.
    pub fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    /// What the server knows.
    pub fn state(&self) -> &Arc<AuthorizationServerState> {
        &self.state
    }

    /// Ends the listener and its connections.
    pub fn stop(&self) {
        self.listening.stop();
    }
}

impl AuthorizationServerState {
    /// A server without sockets.
    pub fn new(options: AuthorizationServerOptions) -> io::Result<Self> {
        let (key, _) = SigningKey::generate(SigningAlgorithm::Es256).map_err(io::Error::other)?;
        let public_jwk = key.public_jwk().map_err(io::Error::other)?;
        Ok(Self {
            issuer: options.issuer,
            clients: Mutex::new(
                options
                    .clients
                    .into_iter()
                    .map(|client| (client.client_id.clone(), client))
                    .collect(),
            ),
            token_lifetime_seconds: AtomicU64::new(options.token_lifetime.as_secs()),
            default_audience: options.default_audience,
            key,
            public_jwk,
            token_requests: AtomicUsize::new(0),
            issued: Mutex::default(),
            received: Mutex::default(),
            used_assertions: Mutex::default(),
            revoked: Mutex::default(),
        })
    }

    /// The issuer's URL.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The URL of the token endpoint.
    pub fn token_endpoint(&self) -> String {
        format!("{}/token", self.issuer)
    }

    /// The keys that verify access tokens.
    pub fn verifying_keys(&self) -> Vec<VerifyingKey> {
        VerifyingKey::from_jwk(&self.public_jwk)
            .into_iter()
            .collect()
    }

    /// The key that signs access tokens: to make tokens with a claim that is wrong.
    pub fn signing_key(&self) -> &SigningKey {
        &self.key
    }

    /// How many requests reached the token endpoint.
    pub fn token_requests(&self) -> usize {
        self.token_requests.load(Ordering::SeqCst)
    }

    /// Counts a request that something in front of this server swallowed.
    pub fn count_token_request(&self) {
        self.token_requests.fetch_add(1, Ordering::SeqCst);
    }

    /// The access tokens issued, oldest first.
    pub fn issued(&self) -> Vec<Issued> {
        lock(&self.issued).iter().cloned().collect()
    }

    /// The requests that reached the token endpoint, oldest first.
    pub fn received(&self) -> Vec<Received> {
        lock(&self.received).iter().cloned().collect()
    }

    /// Whether the access token with this `jti` was revoked.
    pub fn is_revoked(&self, jti: &str) -> bool {
        lock(&self.revoked).contains(jti)
    }

    /// Adds a client, or replaces the one with its id.
    pub fn register(&self, client: Client) {
        lock(&self.clients).insert(client.client_id.clone(), client);
    }

    /// Changes how long new access tokens live, in whole seconds.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.token_lifetime_seconds
            .store(lifetime.as_secs(), Ordering::SeqCst);
    }

    /// Answers one request.
    pub fn respond(&self, request: &Request<Bytes>) -> Response<Bytes> {
        match (request.method(), request.uri().path()) {
            (
                &Method::GET,
                "/.well-known/oauth-authorization-server" | "/.well-known/openid-configuration",
            ) => json_answer(StatusCode::OK, &self.metadata()),
            (&Method::GET, "/jwks") => {
                json_answer(StatusCode::OK, &json!({"keys": [self.public_jwk]}))
            }
            (&Method::POST, "/token") => self.answer_token(request),
            (&Method::POST, "/revoke") => match self.revoke(request) {
                Ok(()) => json_answer(StatusCode::OK, &json!({})),
                Err(error) => error_answer(&error),
            },
            (_, "/token" | "/revoke") => {
                let mut answer = json_answer(
                    StatusCode::METHOD_NOT_ALLOWED,
                    &json!({"error": "invalid_request"}),
                );
                answer
                    .headers_mut()
                    .insert(ALLOW, HeaderValue::from_static("POST"));
                answer
            }
            _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not_found"})),
        }
    }

    fn metadata(&self) -> Value {
        let issuer = &self.issuer;
        json!({
            "issuer": issuer,
            "token_endpoint": self.token_endpoint(),
            "jwks_uri": format!("{issuer}/jwks"),
            "revocation_endpoint": format!("{issuer}/revoke"),
            "grant_types_supported": ["client_credentials"],
            "response_types_supported": [],
            "token_endpoint_auth_methods_supported": ["private_key_jwt", "client_secret_basic"],
            "token_endpoint_auth_signing_alg_values_supported": ["ES256", "EdDSA", "PS256", "RS256"],
        })
    }

    fn answer_token(&self, request: &Request<Bytes>) -> Response<Bytes> {
        self.count_token_request();
        let form = parse_form(request.body());
        let mut answer = match self.issue(request.headers(), &form) {
            Ok(body) => json_answer(StatusCode::OK, &body),
            Err(error) => error_answer(&error),
        };
        answer
            .headers_mut()
            .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        remember(
            &self.received,
            Received {
                form,
                authorization: request
                    .headers()
                    .get(AUTHORIZATION)
                    .and_then(|value| value.to_str().ok())
                    .map(str::to_owned),
                status: answer.status(),
            },
        );
        answer
    }

    fn issue(&self, headers: &HeaderMap, form: &[(String, String)]) -> Result<Value, OauthError> {
        let (client, subject) = self.authenticate(headers, form)?;
        match only(form, "grant_type")? {
            Some("client_credentials") => {}
            Some(_) => {
                return Err(OauthError::bad_request(
                    "unsupported_grant_type",
                    "only client_credentials is supported",
                ));
            }
            None => {
                return Err(OauthError::bad_request(
                    "invalid_request",
                    "grant_type is missing",
                ));
            }
        }
        let scope = match only(form, "scope")? {
            None => client.scopes.join(" "),
            Some(asked) => {
                let is_granted = asked
                    .split(' ')
                    .all(|scope| client.scopes.iter().any(|known| known == scope));
                match is_granted {
                    true => asked.to_owned(),
                    false => {
                        return Err(OauthError::bad_request(
                            "invalid_scope",
                            "the client may not have this scope",
                        ));
                    }
                }
            }
        };
        let audiences = self.audiences(form)?;
        let lifetime = self.token_lifetime_seconds.load(Ordering::SeqCst);
        let jti = unique_id();
        // Rounded up: a token lives at least as long as `expires_in` says.
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis().div_ceil(1000));
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let claims = json!({
            "iss": self.issuer,
            "sub": subject,
            "client_id": client.client_id,
            "scope": scope,
            "aud": match audiences.as_slice() {
                [only] => json!(only),
                several => json!(several),
            },
            "jti": jti,
            "iat": now,
            "exp": now.saturating_add(lifetime),
        });
        let token = self.key.sign("at+jwt", &claims).map_err(|_| OauthError {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            error: "server_error",
            description: "the token could not be signed",
        })?;
        tracing::info!(client = client.client_id, %subject, %jti, %scope, "token issued");
        remember(
            &self.issued,
            Issued {
                jti,
                client_id: client.client_id,
                subject,
                scope: scope.clone(),
                audiences,
            },
        );
        Ok(json!({
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": lifetime,
            "scope": scope,
        }))
    }

    /// RFC 8707 section 2: `resource` is absolute and has no fragment.
    fn audiences(&self, form: &[(String, String)]) -> Result<Vec<String>, OauthError> {
        let mut audiences: Vec<String> = Vec::new();
        for (name, value) in form {
            if name == "resource" {
                let is_valid = url::Url::parse(value).is_ok_and(|url| url.fragment().is_none());
                if !is_valid {
                    return Err(OauthError::bad_request(
                        "invalid_target",
                        "the resource is not an absolute URL without a fragment",
                    ));
                }
                audiences.push(value.clone());
            } else if name == "audience" {
                audiences.push(value.clone());
            }
        }
        if audiences.is_empty() {
            audiences.push(self.default_audience.clone());
        }
        Ok(audiences)
    }

    /// The client, and the subject for whom it acts.
    fn authenticate(
        &self,
        headers: &HeaderMap,
        form: &[(String, String)],
    ) -> Result<(Client, String), OauthError> {
        let assertion = only(form, "client_assertion")?;
        match (headers.get(AUTHORIZATION), assertion) {
            (Some(_), Some(_)) => Err(OauthError::bad_request(
                "invalid_request",
                "the client authenticates in two ways",
            )),
            (Some(header), None) => self.authenticate_by_secret(header),
            (None, Some(assertion)) => {
                if only(form, "client_assertion_type")? != Some(ASSERTION_TYPE) {
                    return Err(OauthError::bad_request(
                        "invalid_request",
                        "client_assertion_type is not jwt-bearer",
                    ));
                }
                let (client, subject) = self.authenticate_by_assertion(assertion)?;
                match only(form, "client_id")? {
                    Some(named) if named != client.client_id => {
                        Err(OauthError::invalid_client("client_id does not match"))
                    }
                    _ => Ok((client, subject)),
                }
            }
            (None, None) => Err(OauthError::invalid_client(
                "the client does not authenticate",
            )),
        }
    }

    fn authenticate_by_secret(&self, header: &HeaderValue) -> Result<(Client, String), OauthError> {
        let refused = || OauthError::invalid_client("the client or its secret is wrong");
        let joined = header
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("Basic "))
            .and_then(|text| STANDARD.decode(text).ok())
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(refused)?;
        let (client_id, secret) = joined.split_once(':').ok_or_else(refused)?;
        let client = self.client(&form_decode(client_id)).ok_or_else(refused)?;
        let ClientCredential::Secret(known) = &client.credential else {
            return Err(refused());
        };
        aws_lc_rs::constant_time::verify_slices_are_equal(
            form_decode(secret).as_bytes(),
            known.as_bytes(),
        )
        .map_err(|_| refused())?;
        let subject = client.client_id.clone();
        Ok((client, subject))
    }

    fn authenticate_by_assertion(&self, assertion: &str) -> Result<(Client, String), OauthError> {
        let issuer = claimed_issuer(assertion)
            .ok_or_else(|| OauthError::invalid_client("the assertion is not a JWT"))?;
        let (client, keys, is_federated) = self
            .client_of_assertion(&issuer)
            .ok_or_else(|| OauthError::invalid_client("the client is unknown"))?;
        let verified =
            verify(assertion, &keys).map_err(|error| OauthError::invalid_client(error.0))?;
        let typ = verified.header.get("typ").and_then(Value::as_str);
        if !is_federated && !matches!(typ, None | Some("JWT" | "client-authentication+jwt")) {
            return Err(OauthError::invalid_client("the assertion has another typ"));
        }
        check_times(&verified, SystemTime::now())
            .map_err(|error| OauthError::invalid_client(error.0))?;
        // RFC 10070: the issuer alone, and a plain string.
        if verified.text("aud") != Some(&self.issuer) {
            return Err(OauthError::invalid_client(
                "the assertion's audience is not this issuer as a plain string",
            ));
        }
        let subject = verified
            .text("sub")
            .filter(|subject| !subject.is_empty())
            .ok_or_else(|| OauthError::invalid_client("the assertion has no subject"))?;
        if !is_federated && subject != client.client_id {
            return Err(OauthError::invalid_client(
                "the assertion's subject is not the client",
            ));
        }
        // A CI job presents its one token for as long as it lives: only our own clients' assertions
        // are used once.
        if !is_federated {
            let jti = verified
                .text("jti")
                .ok_or_else(|| OauthError::invalid_client("the assertion has no jti"))?;
            let expires = verified.seconds("exp").unwrap_or_default();
            self.use_once(&client.client_id, jti, expires)?;
        }
        Ok((client, subject.to_owned()))
    }

    fn client_of_assertion(&self, issuer: &str) -> Option<(Client, Vec<VerifyingKey>, bool)> {
        let clients = lock(&self.clients);
        if let Some(client) = clients.get(issuer)
            && let ClientCredential::Keys(keys) = &client.credential
        {
            return Some((client.clone(), keys.clone(), false));
        }
        clients
            .values()
            .find_map(|client| match &client.credential {
                ClientCredential::Federated {
                    issuer: trusted,
                    keys,
                } if trusted == issuer => Some((client.clone(), keys.clone(), true)),
                _ => None,
            })
    }

    fn use_once(&self, client_id: &str, jti: &str, expires: u64) -> Result<(), OauthError> {
        let mut used = lock(&self.used_assertions);
        let now = numeric_date(SystemTime::now());
        if used.len() >= REMEMBERED {
            used.retain(|_, expires| *expires > now);
        }
        match used.insert((client_id.to_owned(), jti.to_owned()), expires) {
            None => Ok(()),
            Some(_) => Err(OauthError::invalid_client("the assertion was used before")),
        }
    }

    fn client(&self, client_id: &str) -> Option<Client> {
        lock(&self.clients).get(client_id).cloned()
    }

    fn revoke(&self, request: &Request<Bytes>) -> Result<(), OauthError> {
        let form = parse_form(request.body());
        self.authenticate(request.headers(), &form)?;
        let token = only(&form, "token")?
            .ok_or_else(|| OauthError::bad_request("invalid_request", "token is missing"))?;
        // RFC 7009 section 2.2: an unknown token is no error.
        if let Ok(verified) = verify(token, &self.verifying_keys())
            && let Some(jti) = verified.text("jti")
        {
            lock(&self.revoked).insert(jti.to_owned());
        }
        Ok(())
    }
}

fn error_answer(error: &OauthError) -> Response<Bytes> {
    tracing::info!(
        error = error.error,
        description = error.description,
        "token request refused"
    );
    let mut answer = json_answer(
        error.status,
        &json!({"error": error.error, "error_description": error.description}),
    );
    if error.status == StatusCode::UNAUTHORIZED {
        answer
            .headers_mut()
            .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic"));
    }
    answer
}

/// The `iss` of a JWT that is not verified yet: it says only whose keys to try.
fn claimed_issuer(token: &str) -> Option<String> {
    let claims = token.split('.').nth(1)?;
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(claims)
        .ok()?;
    let claims: Value = serde_json::from_slice(&claims).ok()?;
    claims.get("iss")?.as_str().map(str::to_owned)
}

fn parse_form(body: &[u8]) -> Vec<(String, String)> {
    form_urlencoded::parse(body).into_owned().collect()
}

fn form_decode(text: &str) -> String {
    form_urlencoded::parse(format!("v={text}").as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

/// RFC 6749 section 3.2: a parameter stands at most once.
fn only<'a>(form: &'a [(String, String)], name: &str) -> Result<Option<&'a str>, OauthError> {
    let mut values = form.iter().filter(|(known, _)| known == name);
    let first = values.next().map(|(_, value)| value.as_str());
    match values.next() {
        None => Ok(first),
        Some(_) => Err(OauthError::bad_request(
            "invalid_request",
            "a parameter is repeated",
        )),
    }
}

fn remember<T>(list: &Mutex<VecDeque<T>>, item: T) {
    let mut list = lock(list);
    if list.len() >= REMEMBERED {
        list.pop_front();
    }
    list.push_back(item);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
