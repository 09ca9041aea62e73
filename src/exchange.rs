//! One request's record: filled in as the request walks its path, written exactly once, and also
//! when the caller goes away in the middle. What the request becomes on its way is made here too, so
//! that it is recorded: its attestation, and the request that may leave.

use std::sync::Arc;
use std::time::Duration;

use countersign_attestors::{AttestedWorkload, PresentedToken};
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode};

use crate::agent::Agent;
use crate::audit::record::{CALLER_LEFT, DecisionReference, OK, TokenReference, UPSTREAM_ERROR};
use crate::audit::{Decided, Obtained, Record, RequestRecord};
use crate::config::{CredentialConfig, Destination};
use crate::connection::Connection;
use crate::credentials::{self, Credential, NotObtained};
use crate::inject::{NotInjected, UpstreamRequest, inject, pass, report};
use crate::limits::{Held, Holding};
use crate::policy::{Denial, Grant, Lease, Question, Resource};
use crate::problem::{self, Surface};
use crate::proxy::{Verdict, Worker};
use crate::refusal::{Refusal, RefusalCode};
use crate::request::EgressRequest;
use crate::request_id::{RequestId, TraceContext};
use crate::snapshot::Snapshot;
use crate::streams::{RequestBody, ResponseBody};
use crate::telemetry::metrics::DestinationMetrics;
use crate::telemetry::traces::RequestSpan;

/// What is known of a request so far.
pub struct Exchange {
    agent: Arc<Agent>,
    request_id: RequestId,
    began_at: Duration,
    /// Since when a destination is waited for, while it is.
    waits_since: Option<Duration>,
    /// Gone once it is written.
    record: Option<Box<RequestRecord>>,
    /// The identity's place among its requests in flight.
    pub held: Option<Held>,
    /// The lease that the response stream will be held under.
    pub lease: Option<Lease>,
    metrics: Option<DestinationMetrics>,
    /// Where requests are traced.
    span: Option<Box<RequestSpan>>,
}

/// What a record says of the end.
pub struct Outcome {
    code: &'static str,
    internal: Option<Arc<str>>,
}

impl Exchange {
    /// Begins the record of a request whose head was read.
    pub fn begin(connection: &Connection, head: &Parts) -> Self {
        let agent = Arc::clone(&connection.worker.agent);
        let time = agent.clock.wall();
        let request_id = RequestId::new(time);
        let mut record = RequestRecord::begun(
            time,
            request_id,
            Arc::clone(&connection.entry.listener),
            Some(head.method.clone()),
            head.version,
        );
        let caller = TraceContext::from_headers(&head.headers);
        let span = agent.tracer.as_ref().map(|tracer| tracer.begin(caller));
        record.trace_id = match &span {
            Some(span) => Some(span.trace_id()),
            None => caller.map(|caller| caller.trace_id()),
        };
        Self {
            request_id,
            began_at: agent.clock.monotonic(),
            waits_since: None,
            record: Some(Box::new(record)),
            held: None,
            lease: None,
            metrics: None,
            span,
            agent,
        }
    }

    fn note(&mut self, write: impl FnOnce(&mut RequestRecord)) {
        if let Some(record) = &mut self.record {
            write(record);
        }
    }

    /// Notes what the request is for.
    pub fn asked(&mut self, asked: &Arc<EgressRequest>) {
        self.note(|record| record.asked = Some(Arc::clone(asked)));
    }

    /// Names the request's span, where it has one, as the parent of what the destination does.
    pub fn propagate(&self, headers: &mut HeaderMap) {
        if let Some(span) = &self.span {
            span.propagate(headers);
        }
    }

    /// Notes that the destination is waited for: the request is sent, or a connection opened for it.
    pub fn waits(&mut self) {
        self.waits_since = Some(self.agent.clock.monotonic());
    }

    /// Notes that the wait is over, if there is one.
    pub fn waited(&mut self) {
        if let Some(since) = self.waits_since.take() {
            let waited = self.agent.clock.monotonic().saturating_sub(since);
            self.note(|record| record.latency.upstream += waited);
        }
    }

    /// Counts an attempt to send the request.
    pub fn attempt(&mut self) {
        self.note(|record| record.attempts = record.attempts.saturating_add(1));
    }

    /// Attests the caller, and begins a session in the audit when its facts are new.
    pub async fn attest(
        &mut self,
        connection: &Connection,
        snapshot: &Snapshot,
        presented: Option<&PresentedToken>,
    ) -> Result<Arc<AttestedWorkload>, Refusal> {
        let (workload, holding) = self.establish(connection, snapshot, presented).await?;
        let limits = &snapshot.config.limits;
        // Now: how long it took to know who asks is not the identity's.
        let now = self.agent.clock.monotonic();
        self.held = Some(holding.request(limits, now).await?);
        Ok(workload)
    }

    /// As [`Self::attest`], after a reload that changed the attestors: the request keeps its place among
    /// those in flight.
    pub async fn attest_again(
        &mut self,
        connection: &Connection,
        snapshot: &Snapshot,
        presented: Option<&PresentedToken>,
    ) -> Result<Arc<AttestedWorkload>, Refusal> {
        let (workload, _) = self.establish(connection, snapshot, presented).await?;
        Ok(workload)
    }

    /// Who the caller is, in its session, and what its identity holds of the agent.
    async fn establish(
        &mut self,
        connection: &Connection,
        snapshot: &Snapshot,
        presented: Option<&PresentedToken>,
    ) -> Result<(Arc<AttestedWorkload>, Arc<Holding>), Refusal> {
        let workload = connection
            .caller
            .attest(&snapshot.catalog, presented)
            .await?;
        if let Some(tunnel) = &connection.tunnel {
            tunnel.valid_until.set(workload.valid_until());
        }
        let limits = &snapshot.config.limits;
        let listener = &connection.entry.listener;
        let session = connection
            .caller
            .session(&self.agent, limits, listener, &workload)?;
        if let Some(tunnel) = &connection.tunnel {
            tunnel.count(&session.holding, limits)?;
        }
        self.note(|record| {
            record.session = Some(session.id);
            record.workload = Some(session.summary);
        });
        Ok((workload, session.holding))
    }

    /// Notes the destination that the request matched.
    pub fn destination(&mut self, snapshot: &Snapshot, destination: Option<&Arc<Destination>>) {
        let prepared = destination.and_then(|found| snapshot.prepared.get(&found.name));
        self.note(|record| record.destination = destination.map(|found| Arc::clone(&found.name)));
        self.metrics = prepared.map(|prepared| prepared.metrics.clone());
    }

    /// Notes a positive decision.
    pub fn granted(&mut self, snapshot: &Snapshot, grant: &Grant, question: &Question<'_>) {
        self.lease = Some(grant.lease().clone());
        self.note(|record| {
            note_question(record, question);
            record.asked_and_granted.scopes_granted = Arc::clone(grant.scopes());
            record.asked_and_granted.audience_granted = grant.audience().cloned();
            record.decision = Some(DecisionReference::of_grant(grant));
        });
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
        let decided = match reported {
            true => Decided::ReportOnly,
            false => Decided::Deny,
        };
        self.note(|record| {
            note_question(record, question);
            record.decision = Some(DecisionReference {
                decided,
                ..DecisionReference::of_denial(denial)
            });
        });
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

    /// Obtains what the verdict permits and makes the request that may leave.
    pub async fn make_upstream_request(
        &mut self,
        worker: &Worker,
        verdict: Verdict,
        asked: &EgressRequest,
        request: Box<Request<RequestBody>>,
    ) -> Result<(UpstreamRequest, Option<Credential>), NotInjected> {
        let agent = &worker.agent;
        match verdict {
            Verdict::Inject(grant) => {
                let traced = self.span.as_ref().and(grant.credential()).map(Arc::clone);
                let obtained = agent.credentials.obtain(grant).await;
                self.token_requested(traced.as_ref(), &obtained);
                let current = agent.snapshot.load();
                let credential = match obtained {
                    Ok(credential) => credential,
                    Err(failed) => return Err(self.not_obtained(failed, request, &current)),
                };
                self.obtained(&credential);
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

    /// Gives the request back where a reload may have replaced what there was no token for.
    fn not_obtained(
        &self,
        failed: NotObtained,
        request: Box<Request<RequestBody>>,
        current: &Snapshot,
    ) -> NotInjected {
        match &self.lease {
            Some(lease) if lease.is_superseded(&current.policy) => {
                NotInjected::DecideAgain(request)
            }
            _ => NotInjected::Refused(failed.refusal),
        }
    }

    /// Notes the token request that this request led, if it did: its time, and of which credential it is
    /// where it is traced.
    fn token_requested(
        &mut self,
        traced: Option<&Arc<CredentialConfig>>,
        obtained: &Result<Credential, NotObtained>,
    ) {
        let (led, refused) = match obtained {
            Ok(credential) => (credential.obtained().led(), None),
            Err(failed) => (failed.led, Some(failed.refusal.code)),
        };
        let Some(took) = led else { return };
        self.note(|record| record.latency.token_endpoint += took);
        if let (Some(span), Some(credential)) = (&mut self.span, traced) {
            span.token_requested(credential, self.agent.clock.wall(), took, refused);
        }
    }

    fn obtained(&mut self, credential: &Credential) {
        self.note(|record| {
            let obtained = match credential.obtained() {
                credentials::Obtained::CacheHit => Obtained::CacheHit,
                credentials::Obtained::Joined => Obtained::Joined,
                credentials::Obtained::Minted { .. } => Obtained::Minted,
            };
            if let Some(scopes) = credential.scopes_granted() {
                record.asked_and_granted.scopes_granted = Arc::clone(scopes);
            }
            record.token = Some(TokenReference {
                sha256: credential.token_sha256_shared(),
                expires_at: credential.expires_at(),
                obtained,
            });
        });
    }

    /// The refusal as a response. Where nothing was decided it is kept, to be explained.
    pub fn refuse(&self, refusal: &Refusal, surface: Surface) -> Response<ResponseBody> {
        self.agent.metrics.refusal(refusal.code);
        let record = self.record.as_ref();
        if record.is_some_and(|record| record.decision.is_none()) {
            let decisions = &self.agent.recent_decisions;
            decisions.record_undecided(self.request_id, refusal.clone());
        }
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
                    true => UPSTREAM_ERROR,
                    false => OK,
                },
                internal: None,
            },
        }
    }

    /// Drops the record: the requests inside a tunnel are recorded one by one.
    pub fn forget(&mut self) {
        self.record = None;
    }

    /// Writes the record. `Err` when it cannot be queued; then the response must not be released.
    pub fn finish(&mut self, status: StatusCode, outcome: Outcome) -> Result<RequestId, RequestId> {
        self.waited();
        let Some(mut record) = self.record.take() else {
            return Ok(self.request_id);
        };
        record.status = status;
        record.outcome = outcome.code;
        record.internal = outcome.internal;
        if record.decision.is_none() {
            self.agent.metrics.decision(Decided::Error.as_str());
        }
        let latency = &mut record.latency;
        latency.total = self.agent.clock.monotonic().saturating_sub(self.began_at);
        latency.ours = latency
            .total
            .saturating_sub(latency.upstream)
            .saturating_sub(latency.token_endpoint);
        if let Some(metrics) = &self.metrics {
            metrics.request(latency.total, latency.ours, latency.upstream);
        }
        let recorded = self.agent.audit.record(Record::Request(&record));
        if let (Some(tracer), Some(span)) = (&self.agent.tracer, self.span.take()) {
            if recorded.is_err() {
                let code = RefusalCode::AuditUnavailable;
                record.status = code.properties().status;
                record.outcome = code.as_str();
            }
            tracer.end(*span, &record);
        }
        recorded
            .map(|()| self.request_id)
            .map_err(|_| self.request_id)
    }
}

/// Notes the credential that a question is about, and what is asked of it.
fn note_question(record: &mut RequestRecord, question: &Question<'_>) {
    if let Resource::Credential {
        credential,
        scopes,
        audience,
    } = question.resource
    {
        record.credential = Some(Arc::clone(&credential.name));
        record.asked_and_granted.scopes_asked = Arc::clone(scopes);
        record.asked_and_granted.audience_asked = audience.cloned();
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let outcome = Outcome {
            code: CALLER_LEFT,
            internal: None,
        };
        // Nobody waits for an answer any more; a full queue is counted by the audit itself.
        let _ = self.finish(StatusCode::BAD_REQUEST, outcome);
    }
}
