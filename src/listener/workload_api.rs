//! The workload API: what a workload may ask the agent about itself, and nothing about another.
//!
//! `POST /v1/token` hands out a token where policy permits `issue`; `GET /v1/whoami` says how the caller
//! is seen; `GET /v1/explain/ID` why a request of the caller's was decided as it was; `GET /v1/proxy`
//! what a client of the proxy needs to know; `GET /readyz` whether requests would be served. It is not the data path: it runs on the control runtime.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use countersign_attestors::{AttestedWorkload, PresentedToken};
use http::header::{AUTHORIZATION, CACHE_CONTROL};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;

use super::Socket;
use super::patience::Place;
use super::serve::say_last;
use crate::admin::{ActionRefused, readiness};
use crate::agent::{Agent, Phase, until};
use crate::audit::record::{AskedAndGranted, DecisionReference, TokenReference, workload_summary};
use crate::audit::{AttestedRecord, Decided, Latency, Obtained, Record, TokenIssueRecord};
use crate::config::{Bind, Config, CredentialConfig, Limits, ListenerKind, TokenSource};
use crate::connection::{CallerAttestation, evidence_refusal};
use crate::credentials::IssuedToken;
use crate::inject::token_revoked;
use crate::limits::{Held, Holding};
use crate::policy::{Action, LeaseEnded, Question, Resource, explain};
use crate::problem::{self, Surface, json_response};
use crate::providers::wipe;
use crate::proxy::audit_refusal;
use crate::refusal::{Refusal, RefusalCode};
use crate::request_id::{REQUEST_ID_HEADER, RequestId, SessionId, TraceContext};
use crate::snapshot::Snapshot;
use crate::telemetry::metrics::OpenConnection;

/// The largest request body; a request for a token is a few dozen bytes.
const BODY_LIMIT_BYTES: usize = 64 * 1024;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request's head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often policies may be replaced under one request before it gives up.
const DECISIONS_PER_REQUEST: usize = 4;
/// Hosts that clients reach without the proxy, unless a destination is one of them.
const OWN_HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Serves one connection.
pub(super) async fn serve(
    agent: Arc<Agent>,
    listener: Arc<str>,
    attestation: CallerAttestation,
    socket: Socket,
    place: Place,
    _open: OpenConnection,
) {
    let caller = Arc::new(Caller {
        agent,
        listener,
        attestation: Mutex::new(attestation),
        counted: std::sync::Mutex::new(Counted::Unattested(place)),
    });
    match socket {
        Socket::Tcp(stream) => {
            if let Ok(stream) = TcpStream::from_std(stream) {
                converse(caller, stream).await;
            }
        }
        Socket::Unix(stream) => {
            if let Ok(stream) = UnixStream::from_std(stream) {
                converse(caller, stream).await;
            }
        }
    }
}

async fn converse<Io>(caller: Arc<Caller>, io: Io)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut phases = caller.agent.phase.subscribe();
    let service = service_fn(move |request| {
        let caller = Arc::clone(&caller);
        async move {
            let agent = Arc::clone(&caller.agent);
            let mut response = Arc::clone(&caller).answer(request).await;
            // What has a record or is refused has its id already.
            response
                .headers_mut()
                .entry(REQUEST_ID_HEADER)
                .or_insert_with(|| RequestId::new(agent.clock.wall()).to_header_value());
            if agent.has_come_to(Phase::LastAnswers) || caller.is_unattested() {
                say_last(&mut response);
            }
            Ok::<_, Infallible>(response.map(Full::new))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = until(Phase::Closing, &mut phases) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the workload API ended");
    }
}

/// Who is at the other end of a connection.
struct Caller {
    agent: Arc<Agent>,
    listener: Arc<str>,
    attestation: Mutex<CallerAttestation>,
    counted: std::sync::Mutex<Counted>,
}

/// What a connection is counted as.
enum Counted {
    /// One of those of whom nothing is known.
    Unattested(#[expect(dead_code, reason = "held")] Place),
    /// One of its caller's identity.
    Attested(#[expect(dead_code, reason = "held")] Held),
}

impl Caller {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Bytes> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let wanted = match path {
            "/v1/token" => Method::POST,
            _ => Method::GET,
        };
        let is_known = matches!(path, "/v1/token" | "/v1/whoami" | "/v1/proxy" | "/readyz")
            || path.starts_with("/v1/explain/");
        if !is_known {
            return ActionRefused::not_found(
                "the workload API does not serve this path",
                "use /v1/token, /v1/whoami, /v1/proxy, /v1/explain/ID or /readyz",
            )
            .to_response();
        }
        if head.method != wanted {
            return ActionRefused::method_not_allowed(&head.method, wanted.as_str()).to_response();
        }
        match path {
            "/v1/token" => {
                // A task of its own: a token that was minted is recorded, whoever waits.
                match tokio::spawn(self.token(head, body)).await {
                    Ok(response) => response,
                    Err(_) => self_refusal(&Refusal::new(
                        RefusalCode::ShuttingDown,
                        "the agent is shutting down",
                    )),
                }
            }
            "/v1/whoami" => self.whoami(&head.headers).await,
            "/v1/proxy" => json_response(StatusCode::OK, &self.proxy()),
            "/readyz" => readiness(&self.agent.not_ready()),
            _ => {
                let id = path.strip_prefix("/v1/explain/").unwrap_or_default();
                self.explain(&head.headers, id).await
            }
        }
    }

    /// The workload behind the connection, with what this head presents.
    async fn attest(
        &self,
        snapshot: &Snapshot,
        headers: &HeaderMap,
    ) -> Result<Arc<AttestedWorkload>, Refusal> {
        let presented = presented_token(headers)?;
        let mut held = self.attestation.lock().await;
        if let Ok(attestation) = &mut *held
            && !attestation.is_current(&snapshot.catalog)
        {
            *attestation = attestation.under(Arc::clone(&snapshot.catalog)).await;
        }
        match &*held {
            Ok(attestation) => attestation
                .attest(presented.as_ref())
                .await
                .map_err(|ended| Refusal::new(RefusalCode::AttestationEnded, ended.to_string())),
            Err(error) => Err(evidence_refusal(error)),
        }
    }

    /// As [`Self::attest`], once it is its identity's turn; what is held of the agent meanwhile.
    async fn admit(
        &self,
        snapshot: &Snapshot,
        headers: &HeaderMap,
    ) -> Result<(Arc<AttestedWorkload>, Held), Refusal> {
        let workload = self.attest(snapshot, headers).await?;
        let limits = &snapshot.config.limits;
        let now = self.agent.clock.monotonic();
        let holding = self.agent.limits.of(workload.isolation_key(), now);
        self.count_for(&holding, limits)?;
        let held = holding.request(limits, now).await?;
        Ok((workload, held))
    }

    /// Has the connection count for an identity, if it does for none.
    fn count_for(&self, holding: &Arc<Holding>, limits: &Limits) -> Result<(), Refusal> {
        let mut counted = self.counted();
        if matches!(*counted, Counted::Unattested(_)) {
            *counted = Counted::Attested(holding.connection(limits)?);
        }
        Ok(())
    }

    /// Whether the connection keeps a place among those of whom nothing is known.
    fn is_unattested(&self) -> bool {
        matches!(*self.counted(), Counted::Unattested(_))
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn whoami(&self, headers: &HeaderMap) -> Response<Bytes> {
        let snapshot = self.agent.snapshot.load_full();
        let (workload, _held) = match self.admit(&snapshot, headers).await {
            Ok(admitted) => admitted,
            Err(refusal) => return self_refusal(&refusal),
        };
        let facts = workload.facts();
        let valid_until = workload
            .valid_until()
            .and_then(|time| jiff::Timestamp::try_from(time).ok())
            .map(|time| format!("{time:.0}"));
        json_response(
            StatusCode::OK,
            &json!({
                "workload": facts.subject(),
                "environment": &*snapshot.policy.engine().environment(facts),
                "attributes": facts.groups,
                "evidence": facts.evidence,
                "failed_attestors": facts.failed_attestors,
                "identity": &*workload.isolation_key().0,
                "valid_until": valid_until,
            }),
        )
    }

    /// Only the caller's own requests are explained; of others' it is not said that they exist.
    async fn explain(&self, headers: &HeaderMap, id: &str) -> Response<Bytes> {
        let snapshot = self.agent.snapshot.load_full();
        let (workload, _held) = match self.admit(&snapshot, headers).await {
            Ok(admitted) => admitted,
            Err(refusal) => return self_refusal(&refusal),
        };
        let decision = id
            .parse::<RequestId>()
            .ok()
            .and_then(|id| self.agent.recent_decisions.find(id))
            .filter(|decision| decision.isolation_key == *workload.isolation_key());
        match decision {
            Some(decision) => json_response(StatusCode::OK, &explain::recorded(&decision)),
            None => ActionRefused::not_found(
                format!(
                    "no decision on a request `{}` of yours is remembered",
                    crate::request::printable(id)
                ),
                "ask as the workload that sent it, or over the admin socket; the last 1,000 decisions are kept",
            )
            .to_response(),
        }
    }

    fn proxy(&self) -> Value {
        let snapshot = self.agent.snapshot.load_full();
        let config = &snapshot.config;
        let issuers: Vec<Value> = config
            .attestors
            .oidc_issuers
            .iter()
            .map(|issuer| {
                json!({
                    "name": issuer.name,
                    "issuer": issuer.issuer.as_str(),
                    "audiences": issuer.audiences,
                })
            })
            .collect();
        json!({
            "proxy": self.proxy_address(config).map(|address| format!("http://{address}")),
            "ca_certificate": snapshot
                .interception
                .as_ref()
                .map(|authority| authority.root_certificate_pem()),
            "no_proxy": hosts_without_proxy(config),
            "issuers": issuers,
        })
    }

    fn proxy_address(&self, config: &Config) -> Option<SocketAddr> {
        config
            .listeners
            .iter()
            .filter(|listener| listener.kind == ListenerKind::ForwardProxy)
            .find_map(|listener| {
                let bound = self.agent.bound_listeners.load();
                match bound.get(&listener.name).unwrap_or(&listener.bind) {
                    Bind::Tcp(address) => Some(reachable(*address)),
                    Bind::Unix(_) => None,
                }
            })
    }

    async fn token(self: Arc<Self>, head: Parts, body: Incoming) -> Response<Bytes> {
        let agent = &self.agent;
        let began_at = agent.clock.monotonic();
        let time = agent.clock.wall();
        let request_id = RequestId::new(time);
        let mut record = TokenIssueRecord {
            time,
            request_id,
            trace_id: TraceContext::from_headers(&head.headers).map(|trace| trace.trace_id()),
            session: None,
            workload: None,
            listener: Arc::clone(&self.listener),
            status: StatusCode::OK,
            decision: None,
            credential: Arc::from(""),
            asked_and_granted: AskedAndGranted::default(),
            token: None,
            outcome: "ok",
            internal: None,
            latency: Latency::default(),
        };
        let issued = match agent.audit.is_accepting() {
            true => self.issue(&head.headers, body, &mut record).await,
            false => Err(audit_refusal()),
        };
        let response = match issued {
            Ok(issued) => {
                record.latency.token_endpoint = issued.upstream;
                if let Some(scopes) = issued.scopes_granted() {
                    record.asked_and_granted.scopes_granted = scopes;
                }
                record.token = Some(TokenReference {
                    sha256: Arc::clone(&issued.token_sha256),
                    expires_at: issued.expires_at,
                    obtained: Obtained::Minted,
                });
                token_response(&issued, agent.clock.wall(), request_id)
            }
            Err(refusal) => {
                let refusal = refusal.to_origin();
                agent.metrics.refusal(refusal.code);
                record.outcome = refusal.code.as_str();
                record.status = refusal.code.properties().status;
                record.internal = refusal.internal.as_deref().map(Arc::from);
                problem::response(&refusal, request_id, Surface::Gateway)
            }
        };
        if record.decision.is_none() {
            agent.metrics.decision(Decided::Error.as_str());
        }
        record.latency.total = agent.clock.monotonic().saturating_sub(began_at);
        record.latency.ours = record
            .latency
            .total
            .saturating_sub(record.latency.token_endpoint);
        // Nothing is answered that is not recorded.
        match agent.audit.record(Record::TokenIssue(&record)) {
            Ok(()) => response,
            Err(_) => problem::response(&audit_refusal(), request_id, Surface::Gateway),
        }
    }

    /// Attests, decides, mints; decides and mints again where policies were replaced meanwhile, also where
    /// nothing was minted, and attests again where attestors were. Where the decision expired meanwhile,
    /// another lets the token out if it grants the same.
    async fn issue(
        &self,
        headers: &HeaderMap,
        body: Incoming,
        record: &mut TokenIssueRecord,
    ) -> Result<IssuedToken, Refusal> {
        let agent = &self.agent;
        let asked = read_ask(body).await?;
        record.credential = Arc::from(crate::request::printable(&asked.credential));
        let mut snapshot = agent.snapshot.load_full();
        let (mut workload, _held) = self.admit(&snapshot, headers).await?;
        self.begin_session(&workload, record)?;
        let mut minted: Option<IssuedToken> = None;
        for _ in 0..DECISIONS_PER_REQUEST {
            if !workload.is_attested_by(&snapshot.catalog) {
                workload = self.attest(&snapshot, headers).await?;
                self.begin_session(&workload, record)?;
            }
            let (credential, scopes) = resolve(&snapshot.config, &asked)?;
            let wall = agent.clock.wall();
            let question = Question {
                action: Action::Issue,
                resource: Resource::Credential {
                    credential,
                    scopes: &scopes,
                    audience: asked.audience.as_ref(),
                },
                destination: None,
                request: None,
                wall,
            };
            record.asked_and_granted.scopes_asked = Arc::clone(&scopes);
            record.asked_and_granted.audience_asked = asked.audience.clone();
            let decided = snapshot.policy.decide(&workload, &question);
            agent.recent_decisions.record(
                record.request_id,
                &snapshot.policy,
                &workload,
                &question,
                decided.as_ref(),
            );
            let reference = match &decided {
                Ok(grant) => DecisionReference::of_grant(grant),
                Err(denial) => DecisionReference::of_denial(denial),
            };
            agent.metrics.decision(reference.decided.as_str());
            record.decision = Some(reference);
            let grant = decided.map_err(|denial| agent.denied(&denial, &question))?;
            record.asked_and_granted.scopes_granted = Arc::clone(grant.scopes());
            record.asked_and_granted.audience_granted = grant.audience().cloned();
            let lease = grant.lease().clone();
            let issued = match minted.take() {
                Some(issued) if issued.grant.grants_as(&grant) => IssuedToken { grant, ..issued },
                _ => match agent.credentials.issue(grant).await {
                    Ok(issued) => issued,
                    Err(refusal) => {
                        let current = agent.snapshot.load_full();
                        if !lease.is_superseded(&current.policy) {
                            return Err(refusal);
                        }
                        snapshot = current;
                        continue;
                    }
                },
            };
            let current = agent.snapshot.load_full();
            match lease.check(&current.policy, agent.clock.wall()) {
                Ok(()) => {
                    return match current
                        .policy
                        .revocations()
                        .token_is_revoked(&issued.token_sha256)
                    {
                        Some(revocation) => Err(token_revoked(revocation)),
                        None => Ok(issued),
                    };
                }
                Err(LeaseEnded::Attestation(ended)) => return Err(ended.into()),
                Err(LeaseEnded::PolicyExpired) => minted = Some(issued),
                Err(LeaseEnded::SnapshotReplaced) => snapshot = current,
            }
        }
        Err(Refusal::new(
            RefusalCode::AttestationUnavailable,
            "policies were replaced faster than the request could be decided",
        )
        .with_retry_after(Duration::from_secs(1)))
    }

    /// Records what the token's record will refer to.
    fn begin_session(
        &self,
        workload: &AttestedWorkload,
        record: &mut TokenIssueRecord,
    ) -> Result<(), Refusal> {
        let time = self.agent.clock.wall();
        let session = SessionId::new(time);
        self.agent.attestors.note(workload.facts(), time);
        self.agent
            .audit
            .record(Record::Attested(&AttestedRecord {
                time,
                session,
                listener: Arc::clone(&self.listener),
                identity: workload.isolation_key().clone(),
                facts: Arc::clone(workload.facts()),
                valid_until: workload.valid_until(),
            }))
            .map_err(|_| audit_refusal())?;
        record.session = Some(session);
        record.workload = Some(workload_summary(workload.facts()));
        Ok(())
    }
}

/// The body of `POST /v1/token`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    /// A configured credential.
    credential: String,
    /// Scopes, each one of the credential's, none twice, one at least where it has any; all of them where
    /// absent.
    scopes: Option<Vec<String>>,
    /// The audience that the credential is configured for. One of several `resources` cannot be asked
    /// for alone: the token would be good for all of them.
    audience: Option<Arc<str>>,
}

async fn read_ask(body: Incoming) -> Result<Ask, Refusal> {
    let invalid = |detail: String| Refusal::new(RefusalCode::TokenRequestInvalid, detail);
    let unreadable = || invalid("the body cannot be read, or is too large".to_owned());
    let body = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_LIMIT_BYTES).collect())
        .await
        .map_err(|_| unreadable())?
        .map_err(|_| unreadable())?
        .to_bytes();
    serde_json::from_slice(&body).map_err(|error| {
        invalid(format!(
            "the body is not `{{\"credential\": NAME}}`, with `scopes` and `audience` at most: line {}, column {}",
            error.line(),
            error.column()
        ))
    })
}

/// The credential that is asked for, and the scopes. Nothing beyond its configuration is asked for:
/// policies need not repeat it.
fn resolve<'a>(
    config: &'a Config,
    asked: &Ask,
) -> Result<(&'a Arc<CredentialConfig>, Arc<[String]>), Refusal> {
    let invalid = |detail: String| Refusal::new(RefusalCode::TokenRequestInvalid, detail);
    let name = crate::request::printable(&asked.credential);
    let credential = config
        .credentials
        .iter()
        .find(|credential| *credential.name == asked.credential)
        .ok_or_else(|| invalid(format!("credential `{name}` is not configured")))?;
    let TokenSource::OauthClientCredentials(settings) = &credential.source;
    let scopes = match &asked.scopes {
        None => Arc::clone(&settings.scopes),
        Some(scopes) => {
            if scopes.is_empty() && !settings.scopes.is_empty() {
                // The server would grant its default (RFC 6749 section 3.3), which may be more.
                return Err(invalid(format!(
                    "`scopes` is empty: leave it out for all scopes of credential `{name}`, or name at least one"
                )));
            }
            if let Some(scope) = scopes.iter().find(|scope| !settings.scopes.contains(scope)) {
                let scope = crate::request::printable(scope);
                return Err(invalid(format!(
                    "scope `{scope}` is not one of credential `{name}`"
                )));
            }
            // In one order and each once: the same token would be asked for under several names.
            let asked: BTreeSet<&String> = scopes.iter().collect();
            if asked.len() < scopes.len() {
                return Err(invalid("a scope is asked for twice".to_owned()));
            }
            let configured = settings.scopes.iter();
            configured
                .filter(|scope| asked.contains(scope))
                .cloned()
                .collect()
        }
    };
    if let Some(audience) = &asked.audience
        && settings.audience.as_deref() != Some(&**audience)
    {
        let audience = crate::request::printable(audience);
        return Err(invalid(format!(
            "audience `{audience}` is not the one of credential `{name}`"
        )));
    }
    Ok((credential, scopes))
}

/// RFC 6750 section 2.1.
fn presented_token(headers: &HeaderMap) -> Result<Option<PresentedToken>, Refusal> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return match headers.contains_key(AUTHORIZATION) {
            true => Err(Refusal::new(
                RefusalCode::MalformedRequest,
                "the request has more than one `authorization` header",
            )),
            false => Ok(None),
        };
    };
    Ok(value
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| PresentedToken::new(token.trim().to_owned())))
}

/// RFC 6749 section 5.1, of a token that the agent asked for on the caller's behalf.
fn token_response(
    issued: &IssuedToken,
    wall: std::time::SystemTime,
    request_id: RequestId,
) -> Response<Bytes> {
    let expires_in = issued
        .expires_at
        .duration_since(wall)
        .unwrap_or_default()
        .as_secs();
    let mut answer = json!({
        "access_token": issued.access_token.expose_secret(),
        "token_type": "Bearer",
        "expires_in": expires_in,
        "scope": issued.scope,
    });
    let mut response = json_response(StatusCode::OK, &answer);
    wipe(&mut answer);
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REQUEST_ID_HEADER, request_id.to_header_value());
    response
}

/// A refusal that no record refers to: nothing was decided.
fn self_refusal(refusal: &Refusal) -> Response<Bytes> {
    let request_id = RequestId::new(std::time::SystemTime::now());
    problem::response(&refusal.clone().to_origin(), request_id, Surface::Gateway)
}

/// An address that a client on this node can connect to.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    address
}

/// `NO_PROXY` for clients of the proxy.
pub fn hosts_without_proxy(config: &Config) -> String {
    OWN_HOSTS
        .into_iter()
        .filter(|host| {
            !config
                .destinations
                .iter()
                .any(|destination| destination.hosts.iter().any(|known| known == host))
        })
        .collect::<Vec<_>>()
        .join(",")
}
