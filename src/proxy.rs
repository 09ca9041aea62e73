//! The life of a request: parse, attest, decide, obtain, inject, send, record.
//!
//! [`answer`] is called for every request of every listener and tunnel; [`walk`] is the path of one.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{AttestedWorkload, PresentedToken};
use http::header::{ALT_SVC, AUTHORIZATION, HeaderName, USER_AGENT, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use tokio::task::spawn_local;

use crate::agent::Agent;
use crate::config::{CredentialConfig, Destination, Unmatched};
use crate::connection::{Caller, Connection};
use crate::credentials::Credential;
use crate::exchange::Exchange;
use crate::inject::{
    NotInjected, UpstreamRequest, is_grpc, is_reported, strip_response, token_revoked,
};
use crate::listener::linger::read_on;
use crate::listener::serve::serve_tunnel;
use crate::policy::{
    Action, DecisionCache, Denial, Grant, Lease, LeaseEnded, PolicySnapshot, Question, Refused,
    first_permitted, questions, route, unmatched,
};
use crate::problem::{self, Surface};
use crate::refusal::{Refusal, RefusalCode};
use crate::request::{EgressRequest, Reception, Target};
use crate::routing::Route;
use crate::snapshot::Snapshot;
use crate::streams::{
    CutReason, OpenStreams, Permission, RequestBody, ResponseBody, Stream, Touching,
};
use crate::upstream::{UpstreamResponse, Upstreams, Way};

const REQUEST_ID: HeaderName = HeaderName::from_static("countersign-request-id");
/// How often policies may be replaced under one request before it gives up.
const DECISIONS_PER_REQUEST: usize = 4;
const UNMATCHED_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const UNMATCHED_RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
const UNMATCHED_IDLE: Duration = Duration::from_secs(600);

/// What one data worker has to itself.
pub struct Worker {
    /// What all workers share.
    pub agent: Arc<Agent>,
    /// Connections to destinations.
    pub upstreams: Upstreams,
    /// Streams, upgrades and tunnels that are open.
    pub open_streams: OpenStreams,
    decisions: RefCell<DecisionCache>,
    /// What the metrics know of the decision cache.
    counted: Cell<(u64, u64)>,
}

impl Worker {
    /// A worker without connections.
    pub fn new(agent: Arc<Agent>) -> Rc<Self> {
        let upstreams = Upstreams::new(agent.control.clone(), Arc::clone(&agent.clock));
        Rc::new(Self {
            agent,
            upstreams,
            open_streams: OpenStreams::default(),
            decisions: RefCell::new(DecisionCache::new()),
            counted: Cell::default(),
        })
    }

    /// Ends what may no longer be open.
    pub fn sweep(&self) {
        self.open_streams.sweep();
        self.upstreams.sweep();
        let decisions = self.decisions.borrow();
        let (hits, misses) = (decisions.hits(), decisions.misses());
        let counted = self.counted.replace((hits, misses));
        self.agent
            .metrics
            .decision_cache(hits - counted.0, misses - counted.1);
    }
}

/// Answers one request, and records it. Its head stays where it is until it is sent: each request under way keeps
/// one.
pub async fn answer(
    connection: &Rc<Connection>,
    head: &mut Parts,
    body: Incoming,
) -> Response<ResponseBody> {
    let surface = surface_of(connection, head);
    let mut exchange = Exchange::begin(connection, head);
    let answered = match connection.worker.agent.audit.is_accepting() {
        true => walk(connection, &mut exchange, head, body).await,
        false => Err(audit_refusal()),
    };
    let (response, outcome) = match answered {
        // Without an id: nothing would be found by it.
        Ok(Answer::Unrecorded(response)) => {
            exchange.forget();
            return response;
        }
        Ok(Answer::Response(response)) => {
            let outcome = exchange.outcome(response.status(), None);
            (response, outcome)
        }
        Err(refusal) => {
            let refusal = match connection.entry.gateway {
                Some(_) => refusal.to_origin(),
                None => refusal,
            };
            let response = exchange.refuse(&refusal, surface);
            let outcome = exchange.outcome(response.status(), Some(&refusal));
            (response, outcome)
        }
    };
    match exchange.finish(response.status(), outcome) {
        Ok(request_id) => {
            let mut response = response;
            response
                .headers_mut()
                .insert(REQUEST_ID, request_id.to_header_value());
            response
        }
        // Nothing is answered that is not recorded.
        Err(request_id) => {
            problem::response(&audit_refusal(), request_id, surface).map(ResponseBody::whole)
        }
    }
}

/// Nothing happens that cannot be recorded.
pub fn audit_refusal() -> Refusal {
    Refusal::new(
        RefusalCode::AuditUnavailable,
        "audit records cannot be written",
    )
    .with_retry_after(Duration::from_secs(1))
}

fn surface_of(connection: &Connection, head: &Parts) -> Surface {
    match (&connection.entry.gateway, &head.method) {
        _ if is_grpc(&head.headers) => Surface::Grpc,
        (_, &Method::CONNECT) => Surface::Connect,
        _ if is_git(&head.headers) => Surface::Git,
        (Some(_), _) => Surface::Gateway,
        (None, _) => Surface::Proxy,
    }
}

/// Whether git sent it, by the name that it gives itself.
fn is_git(headers: &HeaderMap) -> bool {
    headers
        .get(USER_AGENT)
        .is_some_and(|agent| agent.as_bytes().starts_with(b"git/"))
}

/// What a request was answered with.
enum Answer {
    /// A response, to be recorded.
    Response(Response<ResponseBody>),
    /// A tunnel was opened whose requests are recorded one by one.
    Unrecorded(Response<ResponseBody>),
}

/// The path of one request.
async fn walk(
    connection: &Rc<Connection>,
    exchange: &mut Exchange,
    head: &mut Parts,
    body: Incoming,
) -> Result<Answer, Refusal> {
    let worker = &connection.worker;
    let snapshot = worker.agent.snapshot.load_full();
    let (asked, presented) = {
        let gateway = gateway_destination(connection, &snapshot)?;
        let (reception, tunnel_token) = match (&connection.tunnel, gateway) {
            (Some(tunnel), _) => (
                Reception::Tunnel {
                    scheme: tunnel.scheme,
                    target: &tunnel.target,
                },
                tunnel.presented.as_ref(),
            ),
            (None, Some(destination)) => (Reception::Gateway(destination), None),
            (None, None) => (Reception::Proxy, None),
        };
        let (asked, presented) = EgressRequest::parse(head, reception)?;
        let presented = presented.or_else(|| tunnel_token.cloned());
        (Arc::new(asked), presented)
    };
    exchange.asked(&asked);
    if asked.method == Method::CONNECT {
        let request = Request::from_parts(take(head), body);
        let opened = connect(connection, exchange, &snapshot, asked, presented, request);
        return Box::pin(opened).await;
    }
    let workload = exchange
        .attest(connection, &snapshot, presented.as_ref())
        .await?;
    exchange.propagate(&mut head.headers);
    let read = (head, body);
    let forwarded = forward(
        connection, exchange, snapshot, workload, presented, asked, read,
    );
    let response = forwarded.await?;
    Ok(Answer::Response(response))
}

fn gateway_destination<'a>(
    connection: &Connection,
    snapshot: &'a Snapshot,
) -> Result<Option<&'a Arc<Destination>>, Refusal> {
    let Some(name) = &connection.entry.gateway else {
        return Ok(None);
    };
    snapshot
        .config
        .destinations
        .iter()
        .find(|destination| destination.name == *name)
        .map(Some)
        .ok_or_else(|| {
            Refusal::new(
                RefusalCode::DestinationNotConfigured,
                format!("destination `{name}` is no longer configured"),
            )
        })
}

/// Decides, obtains, injects and sends; decides again when policies were replaced meanwhile, and once after the
/// destination rejected the token, or took no more requests on the connection. Where attestors were replaced as well, what they
/// establish is decided by.
async fn forward(
    connection: &Rc<Connection>,
    exchange: &mut Exchange,
    mut snapshot: Arc<Snapshot>,
    mut workload: Arc<AttestedWorkload>,
    presented: Option<PresentedToken>,
    asked: Arc<EgressRequest>,
    (head, body): (&mut Parts, Incoming),
) -> Result<Response<ResponseBody>, Refusal> {
    let worker = &connection.worker;
    let upgrade = head.extensions.get::<hyper::upgrade::OnUpgrade>().cloned();
    let stream = connection.open(UNMATCHED_IDLE);
    let replayable = body.is_end_stream();
    let body = match replayable {
        true => RequestBody::Empty,
        false => RequestBody::Streamed(body, Rc::clone(&stream)),
    };
    head.extensions.clear();
    let sent = match replayable {
        true => head.clone(),
        false => take(head),
    };
    let mut request = Box::new(Request::from_parts(sent, body));
    let mut is_replayed = false;
    connection.pass_interim(&mut request);
    let permission = Rc::new(OpenRequest {
        worker: Rc::downgrade(worker),
        asked: Arc::clone(&asked),
        under: RefCell::new(None),
    });

    for _ in 0..DECISIONS_PER_REQUEST {
        if !workload.is_attested_by(&snapshot.catalog) {
            workload = exchange
                .attest_again(connection, &snapshot, presented.as_ref())
                .await?;
        }
        if connection.entry.gateway.is_some() && presents_token(&workload, &snapshot) {
            // It is for the agent, and would serve whoever gets it as an assertion.
            request.headers_mut().remove(AUTHORIZATION);
        }
        stay_in_gateway(connection, &snapshot, &asked)?;
        let Permitted {
            verdict,
            destination,
        } = match worker.decide(&snapshot, &workload, &asked, exchange) {
            Ok(permitted) => permitted,
            Err(refusal) => {
                read_on(&worker.agent, *request);
                return Err(refusal);
            }
        };
        stream.may_idle(idle_of(destination.as_ref()));
        if !replayable {
            stream.leads_to(destination.as_ref());
        }
        let (upstream, credential) = match exchange
            .make_upstream_request(worker, verdict, &asked, request)
            .await
        {
            Ok(made) => made,
            Err(NotInjected::DecideAgain(returned)) => {
                request = returned;
                snapshot = worker.agent.snapshot.load_full();
                continue;
            }
            Err(NotInjected::Refused(refusal)) => return Err(refusal),
        };
        let is_upgrade = upstream.is_upgrade();
        let lease = exchange.lease.take();
        let under = Under::new(lease, &snapshot, &workload, credential.as_ref());
        permission.hold(worker, &stream, under);
        stream.hold(exchange.held.take());
        let sent = send(
            worker,
            exchange,
            &snapshot,
            destination.as_ref(),
            &workload,
            &asked,
            upstream,
            &stream,
        );
        let answered = tokio::select! {
            biased;
            answered = sent => answered,
            _ = stream.until_cut() => Err(Refusal::new(RefusalCode::UpstreamTimeout, "")),
        };
        let may_be_replayed = replayable && !is_replayed;
        let answered = match (answered, stream.cut_reason()) {
            (Ok(answered), None) => answered,
            (Err(refusal), None) => {
                // As after any number of requests, which is how servers end connections (RFC 9113 section 8.7).
                let was_refused = refusal.code == RefusalCode::UpstreamRefusedStream;
                if was_refused && may_be_replayed && asked.is_safe() {
                    is_replayed = true;
                    request = replay(connection, head);
                    snapshot = worker.agent.snapshot.load_full();
                    continue;
                }
                return Err(refusal);
            }
            (_, Some(reason)) => {
                let credential = credential.as_ref();
                return Err(worker.why_cut(reason, &workload, &asked, credential, exchange));
            }
        };
        let rejected = credential
            .as_ref()
            .is_some_and(|_| is_invalid_token(&answered.response));
        if let Some(name) = credential.as_ref().and_then(credential_name) {
            let status = answered.response.status();
            worker.agent.metrics.upstream_status(name, status);
        }
        if rejected && let Some(credential) = &credential {
            let retry = worker.agent.credentials.reject(credential);
            if retry && may_be_replayed {
                is_replayed = true;
                request = replay(connection, head);
                snapshot = worker.agent.snapshot.load_full();
                continue;
            }
        }
        return Ok(match answered.response.status() {
            StatusCode::SWITCHING_PROTOCOLS if is_upgrade => {
                switch_protocols(answered, upgrade, stream, &connection.caller)
            }
            _ => relay(answered, stream),
        });
    }
    Err(Refusal::new(
        RefusalCode::AttestationUnavailable,
        "policies were replaced faster than the request could be decided",
    )
    .with_retry_after(Duration::from_secs(1)))
}

/// Takes a head that is sent.
fn take(head: &mut Parts) -> Parts {
    let (nothing, ()) = Request::new(()).into_parts();
    std::mem::replace(head, nothing)
}

/// The request without a body that was sent from a copy of its head.
fn replay(connection: &Connection, head: &mut Parts) -> Box<Request<RequestBody>> {
    let mut request = Box::new(Request::from_parts(take(head), RequestBody::Empty));
    connection.pass_interim(&mut request);
    request
}

/// Whether a workload presented a token of a configured issuer, be it one that could not be verified.
fn presents_token(workload: &AttestedWorkload, snapshot: &Snapshot) -> bool {
    let is_issuer = |name: &str| {
        snapshot
            .issuers
            .iter()
            .any(|(issuer, _)| issuer.name == name)
    };
    let failed = &workload.facts().failed_attestors;
    workload.presented().is_some() || failed.iter().any(|failed| is_issuer(&failed.name))
}

/// Refuses on a gateway what another destination at the same host covers.
fn stay_in_gateway(
    connection: &Connection,
    snapshot: &Snapshot,
    asked: &EgressRequest,
) -> Result<(), Refusal> {
    let Some(gateway) = &connection.entry.gateway else {
        return Ok(());
    };
    match route(&snapshot.routes, asked) {
        Route::Destination(other) if other.name != *gateway => Err(Refusal::new(
            RefusalCode::DestinationNotConfigured,
            format!(
                "this gateway is for destination `{gateway}`, and `{}` is another's path",
                crate::request::printable(asked.path.as_str()),
            ),
        )),
        _ => Ok(()),
    }
}

fn credential_name(credential: &Credential) -> Option<&str> {
    Some(&credential.grant().credential()?.name)
}

/// A challenge that says that the token is no longer good (RFC 6750 section 3.1).
fn is_invalid_token(response: &Response<Incoming>) -> bool {
    response.status() == StatusCode::UNAUTHORIZED
        && response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .any(|challenge| {
                challenge
                    .to_str()
                    .is_ok_and(|challenge| challenge.contains("invalid_token"))
            })
}

fn idle_of(destination: Option<&Arc<Destination>>) -> Duration {
    destination.map_or(UNMATCHED_IDLE, |destination| destination.timeouts.idle)
}

/// How a request or a tunnel gets to its destination.
fn way_to<'a>(
    snapshot: &'a Snapshot,
    destination: Option<&'a Arc<Destination>>,
    workload: &'a AttestedWorkload,
    asked: &'a EgressRequest,
) -> Way<'a> {
    let prepared = destination.and_then(|destination| snapshot.prepared.get(&destination.name));
    Way {
        isolation: workload.isolation_key(),
        destination,
        scheme: asked.scheme,
        target: &asked.target,
        tls: prepared.map_or(snapshot.unmatched_tls.as_ref(), |prepared| {
            prepared.tls.as_ref()
        }),
        guard: prepared.map_or(&snapshot.unmatched_guard, |prepared| &prepared.guard),
        connect_timeout: destination.map_or(UNMATCHED_CONNECT_TIMEOUT, |destination| {
            destination.timeouts.connect
        }),
        connect_to: destination.and_then(|destination| destination.connect_to),
    }
}

/// A positive answer of [`Worker::decide`].
struct Permitted {
    verdict: Verdict,
    destination: Option<Arc<Destination>>,
}

/// What may happen to a request.
pub enum Verdict {
    /// A credential may be injected.
    Inject(Grant),
    /// Traffic without a credential of ours may pass.
    Connect(Grant),
    /// It would be denied, and the destination only reports that.
    Reported(Arc<Denial>, Arc<Destination>),
}

impl Worker {
    /// Decides what may happen to a request: of a destination's credentials the first that policy
    /// permits is injected.
    fn decide(
        &self,
        snapshot: &Arc<Snapshot>,
        workload: &Arc<AttestedWorkload>,
        asked: &Arc<EgressRequest>,
        exchange: &mut Exchange,
    ) -> Result<Permitted, Refusal> {
        let destination = match route(&snapshot.routes, asked) {
            Route::Destination(destination) => Some(destination),
            Route::NotCovered(_) | Route::Unmatched(_)
                if snapshot.config.unmatched == Unmatched::Tunnel =>
            {
                None
            }
            Route::NotCovered(destination) => {
                return Err(Refusal::new(
                    RefusalCode::DestinationNotConfigured,
                    format!(
                        "destination `{}` does not cover `{} {}://{}{}`",
                        destination.name,
                        asked.method,
                        asked.scheme.as_str(),
                        asked.target,
                        crate::request::printable(asked.path.as_str()),
                    ),
                ));
            }
            Route::Unmatched(_) => {
                return Err(Refusal::new(
                    RefusalCode::DestinationNotConfigured,
                    format!("no destination is configured for `{}`", asked.target),
                ));
            }
        };
        exchange.destination(snapshot, destination);
        let wall = self.agent.clock.wall();
        let answered = match destination {
            Some(destination) => {
                first_permitted(questions(destination, Some(asked), wall), |question| {
                    self.ask(snapshot, workload, question)
                })
            }
            None => first_permitted(
                std::iter::once((unmatched(Some(asked), wall), None)),
                |question| self.ask(snapshot, workload, question),
            ),
        };
        match answered {
            Ok((grant, question, _)) => {
                exchange.granted(snapshot, &grant, &question);
                let verdict = match grant.action() {
                    Action::Connect => Verdict::Connect(grant),
                    Action::Inject => Verdict::Inject(grant),
                    Action::Issue => {
                        return Err(Refusal::new(
                            RefusalCode::PolicyDenied,
                            "a token was granted to the workload, and none to its request",
                        ));
                    }
                };
                Ok(Permitted {
                    verdict,
                    destination: destination.cloned(),
                })
            }
            Err(Some(refused)) => self.denied(snapshot, workload, refused, destination, exchange),
            Err(None) => Err(Refusal::new(
                RefusalCode::PolicyDenied,
                "the destination raises no question",
            )),
        }
    }

    /// What a caller is told whose request was cut before it was answered.
    fn why_cut(
        &self,
        reason: CutReason,
        workload: &Arc<AttestedWorkload>,
        asked: &Arc<EgressRequest>,
        credential: Option<&Credential>,
        exchange: &mut Exchange,
    ) -> Refusal {
        match reason {
            CutReason::NoResponse | CutReason::Idle => {
                Refusal::new(RefusalCode::UpstreamTimeout, reason.to_string())
            }
            CutReason::ShuttingDown => Refusal::new(RefusalCode::ShuttingDown, reason.to_string()),
            CutReason::PermissionEnded => {
                let snapshot = self.agent.snapshot.load_full();
                if let Err(ended) = workload.check_liveness(self.agent.clock.wall()) {
                    return ended.into();
                }
                let revocations = snapshot.policy.revocations();
                if let Some(revocation) = credential
                    .and_then(|credential| revocations.token_is_revoked(credential.token_sha256()))
                {
                    return token_revoked(revocation);
                }
                if !workload.is_attested_by(&snapshot.catalog) {
                    let detail = "the attestors were replaced before the destination answered";
                    return Refusal::new(RefusalCode::AttestationEnded, detail);
                }
                match self.decide(&snapshot, workload, asked, exchange) {
                    Err(refusal) => refusal,
                    Ok(_) => Refusal::new(RefusalCode::AttestationEnded, reason.to_string()),
                }
            }
        }
    }

    fn ask(
        &self,
        snapshot: &Arc<Snapshot>,
        workload: &Arc<AttestedWorkload>,
        question: &Question<'_>,
    ) -> Result<Grant, Arc<Denial>> {
        self.decisions
            .borrow_mut()
            .decide(&snapshot.policy, workload, question)
    }

    fn denied(
        &self,
        snapshot: &Snapshot,
        workload: &Arc<AttestedWorkload>,
        refused: Refused<'_>,
        destination: Option<&Arc<Destination>>,
        exchange: &mut Exchange,
    ) -> Result<Permitted, Refusal> {
        let Refused { question, denial } = refused;
        let reported = destination.filter(|destination| is_reported(&denial, destination));
        exchange.denied(snapshot, workload, &denial, &question, reported.is_some());
        match reported {
            Some(destination) => Ok(Permitted {
                verdict: Verdict::Reported(denial, Arc::clone(destination)),
                destination: Some(Arc::clone(destination)),
            }),
            None => Err(self.agent.denied(&denial, &question)),
        }
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "a request with all that it was decided by"
)]
async fn send(
    worker: &Worker,
    exchange: &mut Exchange,
    snapshot: &Snapshot,
    destination: Option<&Arc<Destination>>,
    workload: &AttestedWorkload,
    asked: &EgressRequest,
    upstream: UpstreamRequest,
    stream: &Stream,
) -> Result<UpstreamResponse, Refusal> {
    let way = way_to(snapshot, destination, workload, asked);
    let response_timeout = destination.map_or(UNMATCHED_RESPONSE_TIMEOUT, |destination| {
        destination.timeouts.response_headers
    });
    exchange.attempt();
    exchange.waits();
    stream.await_answer(way.connect_timeout + response_timeout);
    let answered = worker.upstreams.send(upstream, &way).await;
    stream.answered();
    exchange.waited();
    answered
}

/// Hands a response on: what concerns the upstream connection is removed.
fn relay(answered: UpstreamResponse, stream: Rc<Stream>) -> Response<ResponseBody> {
    let UpstreamResponse {
        response,
        connection: lent,
        http2_stream,
    } = answered;
    stream.is_on(http2_stream);
    let (mut head, incoming) = response.into_parts();
    strip_response(&mut head.headers);
    head.extensions.clear();
    head.version = Version::HTTP_11;
    Response::from_parts(
        head,
        ResponseBody::Streamed {
            incoming,
            stream,
            connection: lent,
        },
    )
}

/// Joins the two sides of an upgrade after a 101 (RFC 9110 section 7.8).
fn switch_protocols(
    answered: UpstreamResponse,
    upgrade: Option<hyper::upgrade::OnUpgrade>,
    stream: Rc<Stream>,
    caller: &Rc<Caller>,
) -> Response<ResponseBody> {
    let mut response = answered.response;
    let upstream = hyper::upgrade::on(&mut response);
    let (mut head, _) = response.into_parts();
    // `Connection` and `Upgrade` stay: they are what the answer is about.
    head.headers.remove(ALT_SVC);
    if let Some(upgrade) = upgrade {
        let open = Rc::clone(caller);
        spawn_local(async move {
            if let (Ok(caller), Ok(upstream)) = (upgrade.await, upstream.await) {
                pump(TokioIo::new(caller), TokioIo::new(upstream), &stream).await;
            }
            drop(open);
        });
    }
    let mut response = Response::new(ResponseBody::whole(Vec::new()));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}

/// Copies both ways until both sides end or the stream is cut.
async fn pump<A, B>(caller: A, upstream: B, stream: &Stream)
where
    A: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut caller = Touching { io: caller, stream };
    let mut upstream = upstream;
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut caller, &mut upstream) => {}
        _ = stream.until_cut() => {}
    }
}

/// Answers CONNECT (RFC 9110 section 9.3.6).
async fn connect(
    connection: &Rc<Connection>,
    exchange: &mut Exchange,
    snapshot: &Arc<Snapshot>,
    asked: Arc<EgressRequest>,
    presented: Option<PresentedToken>,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let worker = &connection.worker;
    let destinations = snapshot.routes.at(asked.target.host(), asked.target.port());
    let intercepted = destinations
        .iter()
        .any(|destination| !destination.credentials.is_empty());
    if intercepted {
        // Clients hide the body of a refused CONNECT: every refusal is made inside.
        let upgrade = hyper::upgrade::on(request);
        let target = asked.target.clone();
        spawn_local(serve_tunnel(
            Rc::clone(connection),
            upgrade,
            target,
            presented,
        ));
        return Ok(Answer::Unrecorded(Response::new(ResponseBody::whole(
            Vec::new(),
        ))));
    }
    let workload = exchange
        .attest(connection, snapshot, presented.as_ref())
        .await?;
    let destination = destinations.first();
    exchange.destination(snapshot, destination);
    let under = permit_tunnel(worker, snapshot, &workload, &asked.target, Some(exchange))?;
    let way = way_to(snapshot, destination, &workload, &asked);
    exchange.waits();
    let dialled = tokio::time::timeout(way.connect_timeout, worker.upstreams.dial(&way)).await;
    exchange.waited();
    let upstream = dialled.map_err(|_| {
        Refusal::new(
            RefusalCode::UpstreamTimeout,
            format!(
                "`{}` accepted no connection in {:?}",
                asked.target, way.connect_timeout
            ),
        )
    })??;
    let stream = connection.open(idle_of(destination));
    stream.hold(exchange.held.take());
    worker.open_streams.watch(
        &stream,
        Rc::new(Tunnelled {
            worker: Rc::downgrade(worker),
            under: RefCell::new(under),
            target: asked.target.clone(),
        }),
    );
    let open = Rc::clone(&connection.caller);
    spawn_local(async move {
        if let Ok(caller) = hyper::upgrade::on(request).await {
            pump(TokioIo::new(caller), upstream, &stream).await;
        }
        drop(open);
    });
    Ok(Answer::Response(Response::new(ResponseBody::whole(
        Vec::new(),
    ))))
}

/// Decides on a blind tunnel: nobody sees which of the destinations at its host and port its requests
/// are for, so `connect` must be permitted for each that does not only report its denial.
fn permit_tunnel(
    worker: &Worker,
    snapshot: &Arc<Snapshot>,
    workload: &Arc<AttestedWorkload>,
    target: &Target,
    mut exchange: Option<&mut Exchange>,
) -> Result<Under, Refusal> {
    let destinations = snapshot.routes.at(target.host(), target.port());
    let wall = worker.agent.clock.wall();
    let not_covered = |detail: String| Refusal::new(RefusalCode::DestinationNotConfigured, detail);
    if let Some(partial) = destinations
        .iter()
        .find(|destination| !destination.paths.cover_everything())
    {
        return Err(not_covered(format!(
            "destination `{}` covers some paths only, and a tunnel shows none",
            partial.name
        )));
    }
    let mut all: Vec<(Question<'_>, Option<&Arc<Destination>>)> = destinations
        .iter()
        .flat_map(|destination| {
            questions(destination, None, wall)
                .map(move |(question, _)| (question, Some(destination)))
        })
        .collect();
    if all.is_empty() && snapshot.config.unmatched == Unmatched::Tunnel {
        all.push((unmatched(None, wall), None));
    }
    let (mut permitted, mut reported) = (None, None);
    for (question, destination) in &all {
        match worker.ask(snapshot, workload, question) {
            Ok(grant) => {
                if let Some(exchange) = exchange.as_deref_mut() {
                    exchange.granted(snapshot, &grant, question);
                }
                let ends_first = |before: &Grant| grant.lease().ends_before(before.lease());
                if permitted.as_ref().is_none_or(ends_first) {
                    permitted = Some(grant);
                }
            }
            Err(denial)
                if destination.is_some_and(|destination| is_reported(&denial, destination)) =>
            {
                reported = Some((denial, question));
            }
            Err(denial) => {
                if let Some(exchange) = exchange.as_deref_mut() {
                    exchange.denied(snapshot, workload, &denial, question, false);
                }
                return Err(worker.agent.denied(&denial, question));
            }
        }
    }
    if let (Some((denial, question)), Some(exchange)) = (&reported, exchange) {
        exchange.denied(snapshot, workload, denial, question, true);
    }
    match (permitted, reported) {
        (Some(grant), _) => Ok(Under::Lease(grant.lease().clone(), None)),
        (None, Some(_)) => Ok(Under::report_only(snapshot, workload)),
        (None, None) => Err(not_covered(format!(
            "no destination is configured for `{target}`"
        ))),
    }
}

/// The permission of an open request, response stream or upgrade: decided again under each new
/// snapshot.
struct OpenRequest {
    worker: Weak<Worker>,
    asked: Arc<EgressRequest>,
    under: RefCell<Option<Under>>,
}

/// What a stream is held under.
enum Under {
    /// A grant's lease, and what was injected; nothing where `connect` was granted.
    Lease(Lease, Option<Injected>),
    /// Nothing but the destination's word that denials are only reported, and the policies that denied.
    ReportOnly(Arc<AttestedWorkload>, Arc<PolicySnapshot>),
}

impl Under {
    /// What was decided about `workload`: a lease, or that a denial is only reported.
    fn new(
        lease: Option<Lease>,
        snapshot: &Snapshot,
        workload: &Arc<AttestedWorkload>,
        credential: Option<&Credential>,
    ) -> Self {
        let injected = |credential: &Credential| {
            Some(Injected {
                credential: Arc::clone(credential.grant().credential()?),
                token_sha256: credential.token_sha256_shared(),
            })
        };
        match lease {
            Some(lease) => Self::Lease(lease, credential.and_then(injected)),
            None => Self::report_only(snapshot, workload),
        }
    }

    fn report_only(snapshot: &Snapshot, workload: &Arc<AttestedWorkload>) -> Self {
        Self::ReportOnly(Arc::clone(workload), Arc::clone(&snapshot.policy))
    }

    fn workload(&self) -> &Arc<AttestedWorkload> {
        match self {
            Self::Lease(lease, _) => lease.workload(),
            Self::ReportOnly(workload, _) => workload,
        }
    }

    /// Whether it holds under the policies in force and at the wall-clock time `now`.
    fn check(&self, current: &Arc<PolicySnapshot>, now: SystemTime) -> Result<(), LeaseEnded> {
        match self {
            Self::Lease(lease, _) => lease.check(current, now),
            Self::ReportOnly(_, denied_by) if !Arc::ptr_eq(denied_by, current) => {
                Err(LeaseEnded::SnapshotReplaced)
            }
            Self::ReportOnly(workload, _) => workload
                .check_liveness(now)
                .map_err(LeaseEnded::Attestation),
        }
    }
}

/// A credential, and the SHA-256 of its token.
#[derive(Clone)]
struct Injected {
    credential: Arc<CredentialConfig>,
    token_sha256: Arc<str>,
}

impl OpenRequest {
    /// Holds `stream` under what was decided last.
    fn hold(self: &Rc<Self>, worker: &Worker, stream: &Rc<Stream>, under: Under) {
        if self.under.borrow_mut().replace(under).is_none() {
            worker
                .open_streams
                .watch(stream, Rc::clone(self) as Rc<dyn Permission>);
        }
    }
}

impl OpenRequest {
    /// Asks once more for what was granted.
    fn grant_again(
        &self,
        worker: &Worker,
        snapshot: &Arc<Snapshot>,
        workload: &Arc<AttestedWorkload>,
        injected: Option<&Injected>,
        wall: SystemTime,
    ) -> Option<Grant> {
        let question = match route(&snapshot.routes, &self.asked) {
            Route::Destination(destination) => {
                let credential = injected.map(|injected| &injected.credential.name);
                let mut questions = questions(destination, Some(&self.asked), wall);
                let (question, _) = questions.find(|(_, credential_use)| {
                    credential_use.map(|found| &found.credential.name) == credential
                })?;
                question
            }
            Route::NotCovered(_) | Route::Unmatched(_)
                if snapshot.config.unmatched == Unmatched::Tunnel =>
            {
                unmatched(Some(&self.asked), wall)
            }
            Route::NotCovered(_) | Route::Unmatched(_) => return None,
        };
        worker.ask(snapshot, workload, &question).ok()
    }

    /// Whether what was let through although it was denied is permitted, or is denied by what its
    /// destination only reports.
    fn still_passes(
        &self,
        worker: &Worker,
        snapshot: &Arc<Snapshot>,
        workload: &Arc<AttestedWorkload>,
        wall: SystemTime,
    ) -> bool {
        let Route::Destination(destination) = route(&snapshot.routes, &self.asked) else {
            return false;
        };
        let questions = questions(destination, Some(&self.asked), wall);
        let ask = |question: &Question<'_>| worker.ask(snapshot, workload, question);
        match first_permitted(questions, ask) {
            Ok(_) => true,
            Err(refused) => {
                refused.is_some_and(|refused| is_reported(&refused.denial, destination))
            }
        }
    }
}

impl Permission for OpenRequest {
    fn check(&self) -> Result<(), CutReason> {
        let worker = self.worker.upgrade().ok_or(CutReason::ShuttingDown)?;
        let snapshot = worker.agent.snapshot.load_full();
        let wall = worker.agent.clock.wall();
        let mut under = self.under.borrow_mut();
        let Some(under) = under.as_mut() else {
            return Ok(());
        };
        let revocations = snapshot.policy.revocations();
        if let Under::Lease(_, Some(injected)) = under
            && revocations
                .token_is_revoked(&injected.token_sha256)
                .is_some()
        {
            return Err(CutReason::PermissionEnded);
        }
        renew(under, &snapshot, wall, |before| match before {
            Under::Lease(lease, injected) => {
                let (workload, injected) = (lease.workload(), injected.as_ref());
                let grant = self.grant_again(&worker, &snapshot, workload, injected, wall)?;
                Some(Under::Lease(grant.lease().clone(), injected.cloned()))
            }
            Under::ReportOnly(workload, _) => self
                .still_passes(&worker, &snapshot, workload, wall)
                .then(|| Under::report_only(&snapshot, workload)),
        })
    }
}

/// The permission of a blind tunnel.
struct Tunnelled {
    worker: Weak<Worker>,
    under: RefCell<Under>,
    target: Target,
}

impl Permission for Tunnelled {
    fn check(&self) -> Result<(), CutReason> {
        let worker = self.worker.upgrade().ok_or(CutReason::ShuttingDown)?;
        let snapshot = worker.agent.snapshot.load_full();
        let wall = worker.agent.clock.wall();
        renew(&mut self.under.borrow_mut(), &snapshot, wall, |before| {
            permit_tunnel(&worker, &snapshot, before.workload(), &self.target, None).ok()
        })
    }
}

/// Checks what a stream is held under; decides again where policies were replaced since. Where attestors
/// were replaced as well, what they would establish is not known, and a `forbid` may read it: it ends.
fn renew(
    under: &mut Under,
    snapshot: &Arc<Snapshot>,
    wall: SystemTime,
    decide: impl FnOnce(&Under) -> Option<Under>,
) -> Result<(), CutReason> {
    let ended = match under.check(&snapshot.policy, wall) {
        Ok(()) => return Ok(()),
        Err(ended) => ended,
    };
    let may_go_on = match ended {
        LeaseEnded::Attestation(_) => false,
        LeaseEnded::SnapshotReplaced | LeaseEnded::PolicyExpired => {
            under.workload().is_attested_by(&snapshot.catalog)
        }
    };
    let decided = may_go_on.then(|| decide(under)).flatten();
    *under = decided.ok_or(CutReason::PermissionEnded)?;
    // A decision says nothing of whether the workload still is who it was.
    under
        .check(&snapshot.policy, wall)
        .map_err(|_| CutReason::PermissionEnded)
}
