//! The client credentials grant (RFC 6749 section 4.4) with `private_key_jwt`, the workload's own
//! token as client assertion, or `client_secret_basic`.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use countersign_attestors::Clock;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, USER_AGENT};
use http::{Method, Request, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use url::{Url, form_urlencoded};
use zeroize::Zeroizing;

use super::client_authentication::{
    ASSERTION_TYPE, Assertions, SecretFile, basic_header, claim_value,
};
use super::metadata::{Fetched, IssuerMetadata, Metadata};
use super::shared_parts::SharedParts;
use super::token_response::{TokenResponse, parse_date, parse_retry_after, parse_token_response};
use super::{
    Deadline, MintFailure, MintedToken, PresentedFrom, Provider, Recovery, Subject, SubjectParts,
    TokenRequest, attributes_of,
};
use crate::config::{
    AuthorizationServer, ClientAuthentication, OauthClientCredentials, SigningAlgorithm,
};
use crate::fetch::{Answer, FetchClient, FetchFailureKind, FetchSettings};
use crate::refusal::RefusalCode;

/// Clocks that differ by no more are taken to agree; a `Date` header is exact to the second only.
const SKEW_NOTICED_SECONDS: u64 = 3;

/// Clocks that differ by more are an error, not something to make up for.
const SKEW_LIMIT_SECONDS: u64 = 60;

/// The provider of `oauth_client_credentials`.
#[derive(Debug)]
pub struct OauthClientCredentialsProvider {
    settings: OauthClientCredentials,
    subject_parts: SubjectParts,
    server: Server,
    authentication: Authentication,
    client: FetchClient,
    clock: Arc<dyn Clock>,
    /// The greatest number of metadata that led to an answer that hints at an endpoint that moved.
    distrusted: AtomicU64,
    /// The server's wall clock less ours, in seconds, as its last answer told.
    server_ahead_seconds: AtomicI64,
}

#[derive(Debug)]
enum Server {
    Issuer(Arc<IssuerMetadata>),
    TokenEndpoint(Url),
}

#[derive(Debug)]
enum Authentication {
    PrivateKeyJwt(Assertions),
    WorkloadAssertion,
    ClientSecretBasic(Arc<SecretFile>),
}

/// Where requests go.
struct Endpoint {
    url: Url,
    metadata: Option<Arc<Fetched>>,
}

/// What proves who the client is, in one request only.
struct Proof {
    form: Vec<(&'static str, Zeroizing<String>)>,
    header: Option<http::HeaderValue>,
}

/// An `application/x-www-form-urlencoded` body, wiped when dropped.
#[derive(Clone, Default)]
struct Form(Zeroizing<Vec<u8>>);

impl Form {
    /// A vector that grows by itself leaves what it held where it was.
    fn make_room(&mut self, bytes: usize) {
        if self.0.capacity() - self.0.len() < bytes {
            let mut larger = Zeroizing::new(Vec::with_capacity(2 * self.0.len() + bytes));
            larger.extend_from_slice(&self.0);
            self.0 = larger;
        }
    }

    fn append(&mut self, name: &str, value: &str) {
        self.make_room(2 + 3 * (name.len() + value.len()));
        if !self.0.is_empty() {
            self.0.push(b'&');
        }
        for part in form_urlencoded::byte_serialize(name.as_bytes()) {
            self.0.extend_from_slice(part.as_bytes());
        }
        self.0.push(b'=');
        for part in form_urlencoded::byte_serialize(value.as_bytes()) {
            self.0.extend_from_slice(part.as_bytes());
        }
    }
}

impl OauthClientCredentialsProvider {
    /// A provider that shares what it can.
    pub fn new(
        settings: &OauthClientCredentials,
        clock: Arc<dyn Clock>,
        shared: &mut SharedParts,
    ) -> Self {
        let configured = match &settings.server {
            AuthorizationServer::Issuer(issuer) => issuer.url(),
            AuthorizationServer::TokenEndpoint(token_endpoint) => token_endpoint,
        };
        let reached_by = FetchSettings {
            configured: [configured.clone()].into(),
            ca_file: settings.ca_file.clone(),
            connect_to: settings.connect_to,
            outbound_proxy: settings.outbound_proxy.clone(),
            allow_addresses: settings.allow_addresses.clone(),
        };
        let client = shared.client(&reached_by);
        let server = match &settings.server {
            AuthorizationServer::Issuer(issuer) => {
                Server::Issuer(shared.metadata(issuer, reached_by))
            }
            AuthorizationServer::TokenEndpoint(token_endpoint) => {
                Server::TokenEndpoint(token_endpoint.clone())
            }
        };
        let mut attributes: Vec<_> = attributes_of(&settings.client_id)
            .chain(settings.assertion_claims.values().flat_map(attributes_of))
            .collect();
        attributes.sort();
        attributes.dedup();
        let (authentication, presented) = match &settings.client_authentication {
            ClientAuthentication::PrivateKeyJwt {
                key_file,
                algorithm,
                key_id,
                assertion_type_header,
                audience,
            } => (
                Authentication::PrivateKeyJwt(Assertions::new(
                    shared.key(key_file, *algorithm, key_id.as_deref()),
                    assertion_type_header.as_deref(),
                    audience,
                )),
                None,
            ),
            ClientAuthentication::WorkloadAssertion { issuer } => (
                Authentication::WorkloadAssertion,
                Some(match issuer {
                    Some(name) => PresentedFrom::Issuer(name.clone()),
                    None => PresentedFrom::AnyIssuer,
                }),
            ),
            ClientAuthentication::ClientSecretBasic { secret_file } => (
                Authentication::ClientSecretBasic(shared.file(secret_file)),
                None,
            ),
        };
        Self {
            settings: settings.clone(),
            subject_parts: SubjectParts {
                attributes,
                presented,
            },
            server,
            authentication,
            client,
            clock,
            distrusted: AtomicU64::new(0),
            server_ahead_seconds: AtomicI64::new(0),
        }
    }

    async fn endpoint(&self, deadline: Deadline) -> Result<Endpoint, MintFailure> {
        match &self.server {
            Server::Issuer(issuer) => {
                let distrusted = self.distrusted.load(Ordering::Relaxed);
                let fetched = issuer.current(distrusted, deadline, &*self.clock).await?;
                self.check_algorithm(&fetched.metadata)?;
                Ok(Endpoint {
                    url: fetched.metadata.token_endpoint.clone(),
                    metadata: Some(fetched),
                })
            }
            Server::TokenEndpoint(token_endpoint) => Ok(Endpoint {
                url: token_endpoint.clone(),
                metadata: None,
            }),
        }
    }

    /// A server that lists its algorithms and not ours would refuse the assertion (RFC 8414 section 2).
    fn check_algorithm(&self, metadata: &Metadata) -> Result<(), MintFailure> {
        let (ClientAuthentication::PrivateKeyJwt { algorithm, .. }, Some(listed)) = (
            &self.settings.client_authentication,
            &metadata.signing_algorithms,
        ) else {
            return Ok(());
        };
        // RFC 9864 names EdDSA on this curve `Ed25519`.
        let is_listed = listed.iter().any(|name| {
            name == algorithm.as_str()
                || (*algorithm == SigningAlgorithm::EdDsa && name == "Ed25519")
        });
        match is_listed {
            true => Ok(()),
            false => Err(MintFailure::new(
                RefusalCode::InvalidClient,
                format!(
                    "the authorization server accepts no assertion signed with `{}`",
                    algorithm.as_str()
                ),
                Recovery::Hold,
            )
            .with_internal(format!("the metadata lists {listed:?}"))),
        }
    }

    async fn proof(&self, client_id: &str, subject: &Subject) -> Result<Proof, MintFailure> {
        let assertion = |assertion: Zeroizing<String>| Proof {
            form: vec![
                (
                    "client_assertion_type",
                    Zeroizing::new(ASSERTION_TYPE.to_owned()),
                ),
                ("client_assertion", assertion),
            ],
            header: None,
        };
        let mut proof = match &self.authentication {
            Authentication::PrivateKeyJwt(assertions) => {
                let claims: Vec<(String, Value)> = self
                    .settings
                    .assertion_claims
                    .iter()
                    .map(|(name, template)| Ok((name.clone(), claim_value(subject, template)?)))
                    .collect::<Result<_, MintFailure>>()?;
                assertion(
                    assertions
                        .assertion(client_id, &claims, self.server_time())
                        .await?,
                )
            }
            Authentication::WorkloadAssertion => {
                let presented = subject.presented.as_ref().ok_or_else(|| {
                    MintFailure::new(
                        RefusalCode::AttributeMissing,
                        "the workload presented no token",
                        Recovery::Permanent,
                    )
                })?;
                // Byte-identical: the server verifies the issuer's own signature.
                assertion(Zeroizing::new(presented.expose().to_owned()))
            }
            Authentication::ClientSecretBasic(secret_file) => Proof {
                form: Vec::new(),
                header: Some(basic_header(client_id, secret_file).await?),
            },
        };
        if proof.header.is_none() && self.settings.send_client_id {
            proof
                .form
                .push(("client_id", Zeroizing::new(client_id.to_owned())));
        }
        Ok(proof)
    }

    async fn request_token(
        &self,
        endpoint: &Endpoint,
        request: &TokenRequest,
        deadline: Deadline,
    ) -> Result<MintedToken, MintFailure> {
        let mut form = Form::default();
        form.append("grant_type", "client_credentials");
        if !request.scopes.is_empty() {
            form.append("scope", &request.scopes.join(" "));
        }
        for resource in &self.settings.resources {
            form.append("resource", resource.as_str());
        }
        if let Some(audience) = request
            .audience
            .as_ref()
            .or(self.settings.audience.as_ref())
        {
            form.append("audience", audience);
        }
        for (name, value) in &self.settings.parameters {
            form.append(name, value);
        }
        let (sent_at, sent_at_wall) = (self.clock.monotonic(), self.clock.wall());
        let answer = self
            .post(&endpoint.url, &form, &request.subject, deadline)
            .await?;
        self.learn_skew(&answer.headers);
        let response = parse_token_response(
            answer.status,
            &answer.headers,
            &answer.body,
            self.clock.wall(),
        )?;
        let TokenResponse {
            access_token,
            expires_in,
            scope,
        } = response;
        Ok(MintedToken {
            access_token,
            expires_in,
            scope,
            sent_at,
            sent_at_wall,
        })
    }

    /// Posts a form and the proof of who the client is. Once more, with another proof, where a kept
    /// connection broke: whether the server has taken the first is not known.
    async fn post(
        &self,
        url: &Url,
        form: &Form,
        subject: &Subject,
        deadline: Deadline,
    ) -> Result<Answer, MintFailure> {
        let request = self.signed(url, form, subject, deadline).await?;
        let mut outcome = self.client.send(request, deadline.remaining()).await;
        if let Err(failure) = &outcome
            && failure.kind == FetchFailureKind::KeptConnectionBroke
        {
            let request = self.signed(url, form, subject, deadline).await?;
            outcome = self.client.send(request, deadline.remaining()).await;
        }
        outcome.map_err(|failure| MintFailure::of_fetch("the token endpoint", &failure))
    }

    async fn signed(
        &self,
        url: &Url,
        form: &Form,
        subject: &Subject,
        deadline: Deadline,
    ) -> Result<Request<Bytes>, MintFailure> {
        let client_id = subject.render(&self.settings.client_id)?;
        let proof = in_time(deadline, self.proof(&client_id, subject)).await?;
        let mut form = form.clone();
        for (name, value) in &proof.form {
            form.append(name, value);
        }
        let mut builder = Request::builder()
            .method(Method::POST)
            .uri(url.as_str())
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(USER_AGENT, crate::fetch::USER_AGENT);
        if let Some(header) = proof.header {
            builder = builder.header(AUTHORIZATION, header);
        }
        builder.body(Bytes::from_owner(form.0)).map_err(|error| {
            MintFailure::new(
                RefusalCode::MetadataInvalid,
                "the token endpoint's URL cannot be used",
                Recovery::Backoff { retry_after: None },
            )
            .with_internal(error.to_string())
        })
    }

    /// Our wall clock, corrected by what the server's answers told of its own.
    fn server_time(&self) -> SystemTime {
        let now = self.clock.wall();
        let ahead = self.server_ahead_seconds.load(Ordering::Relaxed);
        let difference = ahead.unsigned_abs();
        if !(SKEW_NOTICED_SECONDS..=SKEW_LIMIT_SECONDS).contains(&difference) {
            return now;
        }
        let difference = Duration::from_secs(difference);
        let corrected = match ahead > 0 {
            true => now.checked_add(difference),
            false => now.checked_sub(difference),
        };
        corrected.unwrap_or(now)
    }

    fn learn_skew(&self, headers: &HeaderMap) {
        if let Some(ahead) = self.seconds_ahead(headers) {
            self.server_ahead_seconds.store(ahead, Ordering::Relaxed);
        }
    }

    /// The server's wall clock less ours, by the `Date` of an answer.
    fn seconds_ahead(&self, headers: &HeaderMap) -> Option<i64> {
        Some(
            match parse_date(headers)?.duration_since(self.clock.wall()) {
                Ok(ahead) => i64::try_from(ahead.as_secs()).unwrap_or(i64::MAX),
                Err(behind) => i64::try_from(behind.duration().as_secs())
                    .unwrap_or(i64::MAX)
                    .saturating_neg(),
            },
        )
    }

    /// Whether the client can prove who it is; a workload's own token is the workload's matter.
    async fn check_key(&self) -> Result<(), MintFailure> {
        match &self.authentication {
            Authentication::PrivateKeyJwt(assertions) => assertions.check().await,
            Authentication::ClientSecretBasic(secret_file) => {
                basic_header("", secret_file).await.map(drop)
            }
            Authentication::WorkloadAssertion => Ok(()),
        }
    }

    /// The headers of an answer of the server's to a request for nothing but its documents.
    async fn ask_nothing(&self, deadline: Deadline) -> Result<HeaderMap, MintFailure> {
        match &self.server {
            Server::Issuer(issuer) => {
                let (metadata, headers) = issuer.discover(deadline, self.clock.wall()).await?;
                self.check_algorithm(&metadata)?;
                Ok(headers)
            }
            // Whatever it answers to a GET (RFC 6749 section 3.2), it is there.
            Server::TokenEndpoint(token_endpoint) => self
                .client
                .get(token_endpoint, deadline.remaining())
                .await
                .map(|answer| answer.headers)
                .map_err(|failure| MintFailure::of_fetch("the token endpoint", &failure)),
        }
    }

    /// A refused client whose clock is far off is told of the clock: that is what to mend.
    fn name_skew(&self, failure: MintFailure) -> MintFailure {
        let ahead = self.server_ahead_seconds.load(Ordering::Relaxed);
        let is_signed = matches!(self.authentication, Authentication::PrivateKeyJwt(_));
        if failure.code != RefusalCode::InvalidClient
            || !is_signed
            || ahead.unsigned_abs() <= SKEW_LIMIT_SECONDS
        {
            return failure;
        }
        skewed(ahead)
    }
}

/// What comes of `reading` the client's key or secret before `deadline`: a file system may hang.
async fn in_time<T>(
    deadline: Deadline,
    reading: impl Future<Output = Result<T, MintFailure>>,
) -> Result<T, MintFailure> {
    match tokio::time::timeout(deadline.remaining(), reading).await {
        Ok(outcome) => outcome,
        Err(_) => Err(MintFailure::new(
            RefusalCode::ClientKeyUnavailable,
            "the client's key or secret could not be read in time",
            Recovery::Backoff { retry_after: None },
        )),
    }
}

fn skewed(ahead: i64) -> MintFailure {
    let direction = if ahead > 0 { "behind" } else { "ahead of" };
    MintFailure::new(
        RefusalCode::ClockSkew,
        format!(
            "this node's clock is {} s {direction} the authorization server's",
            ahead.unsigned_abs()
        ),
        Recovery::Hold,
    )
}

#[async_trait]
impl Provider for OauthClientCredentialsProvider {
    fn subject_parts(&self) -> &SubjectParts {
        &self.subject_parts
    }

    fn take_replaced_key(&self) -> Option<String> {
        match &self.authentication {
            Authentication::PrivateKeyJwt(assertions) => assertions.take_replaced(),
            Authentication::WorkloadAssertion | Authentication::ClientSecretBasic(_) => None,
        }
    }

    fn forget_failures(&self) {
        if let Server::Issuer(metadata) = &self.server {
            metadata.forget_failure();
        }
    }

    fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    async fn mint(
        &self,
        request: &TokenRequest,
        again_if_refused: bool,
        deadline: Deadline,
    ) -> Result<MintedToken, MintFailure> {
        let endpoint = self.endpoint(deadline).await?;
        let first = match self.request_token(&endpoint, request, deadline).await {
            Ok(token) => return Ok(token),
            Err(failure) => failure,
        };
        // Only our own assertion can be made anew: with another `jti`, by the key as it is now, and
        // at the time that the server has just told.
        let is_refused = again_if_refused && first.recovery == Recovery::Hold;
        let outcome = match (&self.authentication, is_refused) {
            (Authentication::PrivateKeyJwt(_), true) => {
                self.request_token(&endpoint, request, deadline).await
            }
            _ => Err(first),
        };
        if let (Err(failure), Some(fetched)) = (&outcome, &endpoint.metadata)
            && matches!(
                failure.code,
                RefusalCode::TokenServerRedirected | RefusalCode::TokenResponseInvalid
            )
        {
            // The next attempt asks for metadata again.
            self.distrusted.fetch_max(fetched.number, Ordering::Relaxed);
        }
        outcome.map_err(|failure| self.name_skew(failure))
    }

    async fn probe(&self, deadline: Deadline) -> Vec<MintFailure> {
        let reading = in_time(deadline, self.check_key());
        let (key, answer) = tokio::join!(reading, self.ask_nothing(deadline));
        let mut failures: Vec<MintFailure> = key.err().into_iter().collect();
        match answer {
            Ok(headers) => failures.extend(
                self.seconds_ahead(&headers)
                    .filter(|ahead| ahead.unsigned_abs() > SKEW_LIMIT_SECONDS)
                    .map(skewed),
            ),
            Err(failure) => failures.push(failure),
        }
        failures
    }

    async fn revoke(
        &self,
        token: &SecretString,
        subject: &Subject,
        deadline: Deadline,
    ) -> Result<bool, MintFailure> {
        let endpoint = self.endpoint(deadline).await?;
        let Some(url) = endpoint
            .metadata
            .as_ref()
            .and_then(|fetched| fetched.metadata.revocation_endpoint.clone())
        else {
            return Ok(false);
        };
        let mut form = Form::default();
        form.append("token", token.expose_secret());
        form.append("token_type_hint", "access_token");
        let answer = self.post(&url, &form, subject, deadline).await?;
        match answer.status {
            // RFC 7009 section 2.2: also for a token that the server no longer knows.
            StatusCode::OK => Ok(true),
            status => Err(MintFailure::new(
                RefusalCode::TokenServerError,
                format!(
                    "the revocation endpoint answered status {}",
                    status.as_u16()
                ),
                match status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                    // Section 2.2.1: the token still exists, and may be tried again.
                    true => Recovery::Backoff {
                        retry_after: parse_retry_after(&answer.headers, self.clock.wall()),
                    },
                    false => Recovery::Permanent,
                },
            )),
        }
    }
}
