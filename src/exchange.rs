//! One request's record: filled in as the request walks its path, written exactly once, and also
//! when the caller goes away in the middle.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{AttestedWorkload, PresentedToken};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;

use crate::agent::Agent;
use crate::audit::record::{AskedAndGranted, DecisionReference, TokenReference};
use crate::audit::{Decided, Latency, Obtained, Record, RequestRecord};
use crate::config::Destination;
use crate::connection::Connection;
use crate::credentials::{self, Credential};
use crate::inject::{NotInjected, UpstreamRequest, inject, pass, report};
use crate::limits::Held;
use crate::policy::{Denial, DenialKind, Grant, Lease, Question, Resource};
use crate::problem::{self, Surface};
use crate::proxy::{Verdict, Worker};
use crate::refusal::Refusal;
use crate::request::EgressRequest;
use crate::request_id::{RequestId, SessionId, TraceContext};
use crate::snapshot::Snapshot;
use crate::streams::{RequestBody, ResponseBody};

/// A caller that went away before the response head.
const CALLER_LEFT: &str = "caller_left";

/// What is known of a request so far.
pub struct Exchange {
    agent: Arc<Agent>,
    listener: Arc<str>,
    request_id: RequestId,
    trace: Option<TraceContext>,
    time: SystemTime,
    began_at: Duration,
    method: Method,
    protocol: Version,
    asked: Option<Arc<EgressRequest>>,
    session: Option<(SessionId, Arc<str>)>,
    destination: Option<Arc<str>>,
    decision: Option<DecisionReference>,
    credential: Option<Arc<str>>,
    asked_and_granted: AskedAndGranted,
    token: Option<TokenReference>,
    recorded: bool,
    /// Time spent waiting for the destination.
    pub upstream: Duration,
    token_endpoint: Duration,
    /// How often the request was sent.
    pub attempts: u8,
    /// The identity's place among its requests in flight.
    pub held: Option<Held>,
    /// The lease that the response stream will be held under.
    pub lease: Option<Lease>,
    metrics: Option<crate::telemetry::metrics::DestinationMetrics>,
}

/// What a record says of the end.
pub struct Outcome {
    code: &'static str,
    internal: Option<Arc<str>>,
}

impl Exchange {
    /// Begins the record of a request whose head was read.
    pub fn begin(connection: &Connection, request: &Request<Incoming>) -> Self {
        let agent = Arc::clone(&connection.worker.agent);
        let time = agent.clock.wall();
        Self {
            request_id: RequestId::new(time),
            trace: TraceContext::from_headers(request.headers()),
            began_at: agent.clock.monotonic(),
            time,
            listener: Arc::clone(&connection.entry.listener),
            method: request.method().clone(),
            protocol: request.version(),
            asked: None,
            session: None,
            destination: None,
            decision: None,
            credential: None,
            asked_and_granted: AskedAndGranted::default(),
            token: None,
            recorded: false,
            upstream: Duration::ZERO,
            token_endpoint: Duration::ZERO,
            attempts: 0,
            held: None,
            lease: None,
            metrics: None,
            agent,
        }
    }

    /// Notes what the request is for.
    pub fn asked(&mut self, asked: &Arc<EgressRequest>) {
        self.asked = Some(Arc::clone(asked));
    }

    /// Attests the caller, and begins a session in the audit when its facts are new.
    pub async fn attest(
        &mut self,
        connection: &Connection,
        snapshot: &Snapshot,
        presented: Option<&PresentedToken>,
    ) -> Result<Arc<AttestedWorkload>, Refusal> {
        let workload = connection
            .caller
            .attest(&snapshot.catalog, presented)
            .await?;
        if let Some(tunnel) = &connection.tunnel {
            tunnel.valid_until.set(workload.valid_until());
        }
        let limits = &snapshot.config.limits;
        let session = connection
            .caller
            .session(&self.agent, limits, &self.listener, &workload)?;
        self.held = Some(session.holding.request(limits)?);
        self.session = Some((session.id, session.summary));
        Ok(workload)
    }

    /// Notes the destination that the request matched.
    pub fn destination(&mut self, snapshot: &Snapshot, destination: Option<&Arc<Destination>>) {
        let prepared = destination.and_then(|found| snapshot.prepared.get(&found.name));
        self.destination = prepared.map(|prepared| Arc::clone(&prepared.name));
        self.metrics = prepared.map(|prepared| prepared.metrics.clone());
    }

    /// Notes a positive decision.
    pub fn granted(&mut self, snapshot: &Snapshot, grant: &Grant, question: &Question<'_>) {
        self.lease = Some(grant.lease().clone());
        self.question(question, grant.scopes());
        self.asked_and_granted.scopes_granted = Arc::clone(grant.scopes());
        self.asked_and_granted.audience_granted = grant.audience().cloned();
        self.decision = Some(DecisionReference::of_grant(grant));
        self.agent.metrics.decision(Decided::Allow.as_str());
        self.remember(snapshot, grant.workload(), question, Ok(grant));
    }

    /// Notes a negative decision.
    pub fn denied(
        &mut self,
        snapshot: &Snapshot,
        workload: &Arc<AttestedWorkload>,
        denial: &Arc<Denial>,
        question: &Question<'_>,
        reported: bool,
    ) {
        self.lease = None;
        self.question(question, &Arc::default());
        let decided = match reported {
            true => Decided::ReportOnly,
            false => Decided::Deny,
        };
        self.decision = Some(DecisionReference {
            decided,
            ..DecisionReference::of_denial(denial)
        });
        if let DenialKind::Revoked { .. } = denial.kind {
            self.agent.metrics.revoked_token_use();
        }
        self.agent.metrics.decision(decided.as_str());
        self.remember(snapshot, workload, question, Err(denial));
    }

    /// Keeps the question for `policy explain ID`.
    fn remember(
        &self,
        snapshot: &Snapshot,
        workload: &AttestedWorkload,
        question: &Question<'_>,
        outcome: Result<&Grant, &Arc<Denial>>,
    ) {
        self.agent.recent_decisions.record(
            self.request_id,
            &snapshot.policy,
            workload,
            question,
            outcome,
        );
    }

    fn question(&mut self, question: &Question<'_>, granted: &Arc<[String]>) {
        if let Resource::Credential {
            credential,
            scopes,
            audience,
        } = question.resource
        {
            self.credential = Some(Arc::from(credential.name.as_str()));
            self.asked_and_granted.scopes_asked = match **granted == *scopes {
                true => Arc::clone(granted),
                false => scopes.into(),
            };
            self.asked_and_granted.audience_asked = audience.map(Arc::from);
        }
    }

    /// Obtains what the verdict permits and makes the request that may leave.
    pub async fn make_upstream_request(
        &mut self,
        worker: &Worker,
        verdict: Verdict,
        asked: &EgressRequest,
        request: Request<RequestBody>,
    ) -> Result<(UpstreamRequest, Option<Credential>), NotInjected> {
        let agent = &worker.agent;
        match verdict {
            Verdict::Inject(grant) => {
                let credential = agent
                    .credentials
                    .obtain(grant)
                    .await
                    .map_err(NotInjected::Refused)?;
                self.obtained(&credential);
                let current = agent.snapshot.load();
                let upstream = inject(
                    &credential,
                    asked,
                    request,
                    &current.policy,
                    agent.clock.monotonic(),
                    agent.clock.wall(),
                )?;
                Ok((upstream, Some(credential)))
            }
            Verdict::Connect(grant) => {
                let current = agent.snapshot.load();
                let upstream = pass(&grant, request, &current.policy, agent.clock.wall())?;
                Ok((upstream, None))
            }
            Verdict::Reported(denial, destination) => {
                Ok((report(&denial, &destination, request)?, None))
            }
        }
    }

    fn obtained(&mut self, credential: &Credential) {
        let obtained = match credential.obtained() {
            credentials::Obtained::CacheHit => Obtained::CacheHit,
            credentials::Obtained::Joined => Obtained::Joined,
            credentials::Obtained::Minted { upstream } => {
                self.token_endpoint += upstream;
                Obtained::Minted
            }
        };
        self.token = Some(TokenReference {
            sha256: credential.token_sha256_shared(),
            expires_at: credential.expires_at(),
            obtained,
        });
    }

    /// The refusal as a response.
    pub fn refuse(&self, refusal: &Refusal, surface: Surface) -> Response<ResponseBody> {
        self.agent.metrics.refusal(refusal.code);
        problem::response(refusal, self.request_id, surface).map(ResponseBody::whole)
    }

    /// What the record says of the end.
    pub fn outcome(&self, status: StatusCode, refusal: Option<&Refusal>) -> Outcome {
        match refusal {
            Some(refusal) => Outcome {
                code: refusal.code.as_str(),
                internal: refusal.internal.as_deref().map(Arc::from),
            },
            None => Outcome {
                code: match status.is_server_error() {
                    true => "upstream_error",
                    false => "ok",
                },
                internal: None,
            },
        }
    }

    /// Drops the record: the requests inside a tunnel are recorded one by one.
    pub fn forget(&mut self) -> RequestId {
        self.recorded = true;
        self.request_id
    }

    /// Writes the record. `Err` when it cannot be queued; then the response must not be released.
    pub fn finish(&mut self, status: StatusCode, outcome: Outcome) -> Result<RequestId, RequestId> {
        self.recorded = true;
        let total = self.agent.clock.monotonic().saturating_sub(self.began_at);
        let ours = total
            .saturating_sub(self.upstream)
            .saturating_sub(self.token_endpoint);
        if let Some(metrics) = &self.metrics {
            metrics.request(total, ours, self.upstream);
        }
        let (session, workload) = self.session.take().unzip();
        let record = RequestRecord {
            time: self.time,
            request_id: self.request_id,
            trace_id: self.trace.as_ref().map(TraceContext::trace_id),
            session,
            workload,
            listener: Arc::clone(&self.listener),
            destination: self.destination.take(),
            asked: self.asked.take(),
            method: self.method.clone(),
            protocol: self.protocol,
            status,
            decision: self.decision.take(),
            credential: self.credential.take(),
            asked_and_granted: std::mem::take(&mut self.asked_and_granted),
            token: self.token.take(),
            outcome: outcome.code,
            internal: outcome.internal,
            latency: Latency {
                total,
                ours,
                upstream: self.upstream,
                token_endpoint: self.token_endpoint,
            },
            attempts: self.attempts,
        };
        self.agent
            .audit
            .record(Record::Request(Box::new(record)))
            .map(|()| self.request_id)
            .map_err(|_| self.request_id)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.recorded {
            let outcome = Outcome {
                code: CALLER_LEFT,
                internal: None,
            };
            // Nobody waits for an answer any more; a full queue is counted by the audit itself.
            let _ = self.finish(StatusCode::BAD_REQUEST, outcome);
        }
    }
}
