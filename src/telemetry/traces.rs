//! Traces: a span for each proxied request and for each token request that it led, sent to an
//! OpenTelemetry collector (OTLP over HTTP, in protobuf).
//!
//! A request's span is made of its audit record once that is whole, so that both say the same, and
//! holds no secret as that does not. The [`Tracer`] puts spans into a bounded queue and never waits:
//! one that finds no place there, or that the collector does not take, is dropped and counted.
//!
//! The library's batch processor does not say how many spans it dropped, nor its exporter why it
//! failed, so that both are written here; ids, sampling, spans and their encoding are the library's.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, USER_AGENT};
use http::{HeaderMap, Method, Request, Version};
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, ShouldSample, SpanData,
};
use prost::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use crate::audit::RequestRecord;
use crate::audit::record::{CALLER_LEFT, OK, UPSTREAM_ERROR};
use crate::config::{CredentialConfig, TokenSource, TracesConfig};
use crate::fetch::{self, FetchClient};
use crate::refusal::RefusalCode;
use crate::request::beginning;
use crate::request_id::{self, TRACEPARENT, TraceContext};
use crate::telemetry::metrics::Metrics;

/// The most spans that wait to be sent.
pub const QUEUED_SPANS: usize = 2048;

/// The most spans that are sent at once.
const BATCH_SPANS: usize = 512;

/// How long a span waits for others to be sent with.
const GATHERING: Duration = Duration::from_secs(5);

/// How long the collector may take to answer, connection included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is logged that spans are not taken.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Begins and ends spans.
pub struct Tracer {
    spans: mpsc::Sender<SpanData>,
    /// Decides where no caller has.
    sampler: Sampler,
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
    metrics: Arc<Metrics>,
}

/// A request's place in its trace.
pub struct RequestSpan {
    context: TraceContext,
    parent: Option<TraceContext>,
    token_requests: Vec<TokenRequest>,
}

/// A token request that a request led.
struct TokenRequest {
    credential: Arc<CredentialConfig>,
    began_at: SystemTime,
    ended_at: SystemTime,
    refused: Option<RefusalCode>,
}

impl Tracer {
    /// Begins the span of a request whose caller is in the trace `parent`, else in a trace of its own.
    pub fn begin(&self, parent: Option<TraceContext>) -> Box<RequestSpan> {
        let span_id = u64::from_be_bytes(self.ids.new_span_id().to_bytes());
        let context = match parent {
            Some(parent) => parent.child(span_id),
            None => {
                let trace_id = self.ids.new_trace_id();
                let id = request_id::TraceId::from(u128::from_be_bytes(trace_id.to_bytes()));
                TraceContext::new(id, span_id, self.samples(trace_id))
            }
        };
        Box::new(RequestSpan {
            context,
            parent,
            token_requests: Vec::new(),
        })
    }

    fn samples(&self, trace_id: TraceId) -> bool {
        let sampling = self
            .sampler
            .should_sample(None, trace_id, "", &SpanKind::Server, &[], &[]);
        sampling.decision == SamplingDecision::RecordAndSample
    }

    /// Ends the span of a request whose record is whole. Never waits.
    pub fn end(&self, span: RequestSpan, record: &RequestRecord) {
        if !span.context.is_sampled() {
            return;
        }
        let context = span_context(&span.context, span.context.parent_id());
        for token_request in &span.token_requests {
            self.queue(self.token_request_span(&context, token_request));
        }
        self.queue(self.request_span(context, span.parent, record));
    }

    fn queue(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.metrics.trace_spans_dropped(1);
        }
    }

    fn request_span(
        &self,
        context: SpanContext,
        parent: Option<TraceContext>,
        record: &RequestRecord,
    ) -> SpanData {
        let status = match record.outcome {
            CALLER_LEFT => None,
            _ => Some(record.status),
        };
        let is_server_error = status.is_some_and(|status| status.is_server_error());
        SpanData {
            span_context: context,
            parent_span_id: parent.map_or(SpanId::INVALID, |parent| parent.parent_id().into()),
            parent_span_is_remote: parent.is_some(),
            span_kind: SpanKind::Server,
            name: known_method(record.method.as_ref())
                .unwrap_or("HTTP")
                .to_owned()
                .into(),
            start_time: record.time,
            end_time: record.time + record.latency.total,
            attributes: request_attributes(record),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: match is_server_error {
                true => Status::error(record.outcome),
                false => Status::Unset,
            },
            instrumentation_scope: self.scope.clone(),
        }
    }

    fn token_request_span(&self, parent: &SpanContext, request: &TokenRequest) -> SpanData {
        let TokenSource::OauthClientCredentials(source) = &request.credential.source;
        let server = source.server.url();
        let mut attributes = vec![KeyValue::new(
            "countersign.credential",
            Arc::clone(&request.credential.name),
        )];
        if let Some(host) = server.host_str() {
            attributes.push(KeyValue::new("server.address", host.to_owned()));
        }
        if let Some(port) = server.port_or_known_default() {
            attributes.push(KeyValue::new("server.port", i64::from(port)));
        }
        if let Some(refused) = request.refused {
            attributes.push(KeyValue::new("error.type", refused.as_str()));
        }
        SpanData {
            span_context: SpanContext::new(
                parent.trace_id(),
                self.ids.new_span_id(),
                parent.trace_flags(),
                false,
                Default::default(),
            ),
            parent_span_id: parent.span_id(),
            parent_span_is_remote: false,
            span_kind: SpanKind::Client,
            name: "token_request".into(),
            start_time: request.began_at,
            end_time: request.ended_at,
            attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: match request.refused {
                Some(refused) => Status::error(refused.as_str()),
                None => Status::Unset,
            },
            instrumentation_scope: self.scope.clone(),
        }
    }
}

impl RequestSpan {
    /// The trace that the request is in.
    pub fn trace_id(&self) -> request_id::TraceId {
        self.context.trace_id()
    }

    /// Makes the request's span the parent of what the destination does: `traceparent` names it. Where
    /// the caller named no trace its `tracestate` is of none (W3C Trace Context, section 3.3).
    pub fn propagate(&self, headers: &mut HeaderMap) {
        headers.insert(&TRACEPARENT, self.context.to_header_value());
        if self.parent.is_none() {
            headers.remove(&TRACESTATE);
        }
    }

    /// Notes a token request that the request led and that ended at `ended_at`, with a token or refused.
    pub fn token_requested(
        &mut self,
        credential: &Arc<CredentialConfig>,
        ended_at: SystemTime,
        took: Duration,
        refused: Option<RefusalCode>,
    ) {
        if self.context.is_sampled() {
            self.token_requests.push(TokenRequest {
                credential: Arc::clone(credential),
                began_at: ended_at.checked_sub(took).unwrap_or(ended_at),
                ended_at,
                refused,
            });
        }
    }
}

fn span_context(context: &TraceContext, span_id: u64) -> SpanContext {
    let flags = match context.is_sampled() {
        true => TraceFlags::SAMPLED,
        false => TraceFlags::default(),
    };
    SpanContext::new(
        TraceId::from(u128::from(context.trace_id())),
        span_id.into(),
        flags,
        false,
        Default::default(),
    )
}

/// The attributes of a server span (OpenTelemetry semantic conventions, "HTTP server"), and ours.
fn request_attributes(record: &RequestRecord) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("countersign.request_id", record.request_id.to_string()),
        KeyValue::new("countersign.listener", Arc::clone(&record.listener)),
        KeyValue::new("network.protocol.name", "http"),
    ];
    let mut add = |name: &'static str, value: Option<opentelemetry::Value>| {
        attributes.extend(value.map(|value| KeyValue::new(name, value)));
    };
    match (&record.method, known_method(record.method.as_ref())) {
        (Some(_), Some(known)) => add("http.request.method", Some(known.into())),
        (Some(method), None) => {
            add("http.request.method", Some("_OTHER".into()));
            let original = method.as_str().to_owned();
            add("http.request.method_original", Some(original.into()));
        }
        (None, _) => {}
    }
    add(
        "network.protocol.version",
        protocol_version(record.protocol).map(Into::into),
    );
    if let Some(asked) = &record.asked {
        let host = asked.target.host().to_owned();
        add("url.scheme", Some(asked.scheme.as_str().into()));
        add("server.address", Some(host.into()));
        add("server.port", Some(i64::from(asked.target.port()).into()));
        let path = beginning(asked.path.as_sent()).to_owned();
        add("url.path", Some(path.into()));
    }
    if record.outcome != CALLER_LEFT {
        let status = i64::from(record.status.as_u16());
        add("http.response.status_code", Some(status.into()));
    }
    add("error.type", error_type(record));
    add(
        "countersign.destination",
        record.destination.clone().map(Into::into),
    );
    add(
        "countersign.credential",
        record.credential.clone().map(Into::into),
    );
    let decided = record.decision.as_ref().map(|decision| decision.decided);
    add(
        "countersign.decision",
        decided.map(|decided| decided.as_str().into()),
    );
    add(
        "countersign.workload",
        record.workload.clone().map(Into::into),
    );
    add(
        "countersign.session",
        record.session.map(|session| session.to_string().into()),
    );
    attributes
}

/// Our code of what was refused or whose caller left; the status of a destination's own error.
fn error_type(record: &RequestRecord) -> Option<opentelemetry::Value> {
    match record.outcome {
        OK => None,
        UPSTREAM_ERROR => Some(record.status.as_u16().to_string().into()),
        code => Some(code.into()),
    }
}

/// The methods that the semantic conventions know; anybody may make up others.
fn known_method(method: Option<&Method>) -> Option<&'static str> {
    const KNOWN: [&str; 10] = [
        "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE",
    ];
    let method = method?.as_str();
    KNOWN.into_iter().find(|known| *known == method)
}

fn protocol_version(version: Version) -> Option<&'static str> {
    match version {
        Version::HTTP_10 => Some("1.0"),
        Version::HTTP_11 => Some("1.1"),
        Version::HTTP_2 => Some("2"),
        _ => None,
    }
}

/// Sends spans to the collector, until it is told to stop.
pub struct TraceExport {
    task: JoinHandle<()>,
    ending: CancellationToken,
}

impl TraceExport {
    /// Begins to send what `Tracer` queues, by `client`, on `runtime`.
    pub fn start(
        config: &TracesConfig,
        client: FetchClient,
        runtime: &tokio::runtime::Handle,
        metrics: &Arc<Metrics>,
    ) -> (Tracer, Self) {
        let (sender, spans) = mpsc::channel(QUEUED_SPANS);
        let ending = CancellationToken::new();
        let exporter = Exporter {
            spans,
            client,
            url: config.url.clone(),
            resource: ResourceAttributesWithSchema::from(&resource()),
            metrics: Arc::clone(metrics),
            ending: ending.clone(),
            complained_at: None,
        };
        let tracer = Tracer {
            spans: sender,
            sampler: Sampler::TraceIdRatioBased(config.sample_ratio),
            ids: RandomIdGenerator::default(),
            scope: InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            metrics: Arc::clone(metrics),
        };
        let task = runtime.spawn(exporter.run());
        (tracer, Self { task, ending })
    }

    /// Sends what is queued, in at most `limit`. Returns whether all of it was offered to the collector.
    pub async fn stop(self, limit: Duration) -> bool {
        self.ending.cancel();
        let abort = self.task.abort_handle();
        let ended = tokio::time::timeout(limit, self.task).await;
        abort.abort();
        matches!(ended, Ok(Ok(())))
    }
}

/// What the spans are of (OpenTelemetry semantic conventions, "Service" and "Host").
fn resource() -> Resource {
    let mut attributes = vec![
        KeyValue::new("service.name", env!("CARGO_PKG_NAME")),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", Uuid::now_v7().to_string()),
    ];
    if let Ok(name) = std::fs::read_to_string("/proc/sys/kernel/hostname") {
        attributes.push(KeyValue::new("host.name", name.trim_end().to_owned()));
    }
    Resource::builder_empty()
        .with_attributes(attributes)
        .build()
}

struct Exporter {
    spans: mpsc::Receiver<SpanData>,
    client: FetchClient,
    url: Url,
    resource: ResourceAttributesWithSchema,
    metrics: Arc<Metrics>,
    ending: CancellationToken,
    complained_at: Option<tokio::time::Instant>,
}

impl Exporter {
    async fn run(mut self) {
        loop {
            let batch = self.gather().await;
            if batch.is_empty() {
                return;
            }
            self.export(batch).await;
        }
    }

    /// What is sent next: as many spans as come within [`GATHERING`] of the first. Nothing at the end.
    async fn gather(&mut self) -> Vec<SpanData> {
        let mut batch = Vec::new();
        let due = tokio::time::sleep(GATHERING);
        tokio::pin!(due);
        while batch.len() < BATCH_SPANS {
            let is_first = batch.is_empty();
            let room = BATCH_SPANS - batch.len();
            tokio::select! {
                biased;
                received = self.spans.recv_many(&mut batch, room) => match received {
                    0 => break,
                    _ if is_first => due.as_mut().reset(tokio::time::Instant::now() + GATHERING),
                    _ => {}
                },
                () = self.ending.cancelled(), if !self.spans.is_closed() => self.spans.close(),
                () = &mut due, if !is_first => break,
            }
        }
        batch
    }

    /// Offers a batch to the collector once: spans that come late are worth less than those that come.
    async fn export(&mut self, batch: Vec<SpanData>) {
        let count = batch.len();
        let (taken, trouble) = match self.send(batch).await {
            Ok(response) => {
                let partial = response.partial_success.unwrap_or_default();
                let rejected = usize::try_from(partial.rejected_spans).unwrap_or(0);
                let trouble = (rejected > 0).then_some(partial.error_message);
                (count.saturating_sub(rejected), trouble)
            }
            Err(trouble) => (0, Some(trouble)),
        };
        self.metrics.trace_spans_exported(taken);
        self.metrics.trace_spans_dropped(count - taken);
        if let Some(trouble) = trouble {
            self.complain(&trouble, count - taken);
        }
    }

    async fn send(&self, batch: Vec<SpanData>) -> Result<ExportTraceServiceResponse, String> {
        let resource_spans = group_spans_by_resource_and_scope(batch, &self.resource);
        let body = ExportTraceServiceRequest { resource_spans }.encode_to_vec();
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.url.as_str())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .header(USER_AGENT, fetch::USER_AGENT)
            .body(Bytes::from(body))
            .map_err(|error| error.to_string())?;
        let answer = self
            .client
            .send_repeatable(request, EXPORT_TIMEOUT)
            .await
            .map_err(|failure| failure.to_string())?;
        if !answer.status.is_success() {
            return Err(format!("it answered {}", answer.status.as_u16()));
        }
        // What else it may say is of no use to anybody.
        Ok(ExportTraceServiceResponse::decode(answer.body.as_slice()).unwrap_or_default())
    }

    fn complain(&mut self, trouble: &str, dropped: usize) {
        let now = tokio::time::Instant::now();
        let is_due = self
            .complained_at
            .is_none_or(|last| now >= last + COMPLAINT_INTERVAL);
        if is_due {
            self.complained_at = Some(now);
            tracing::warn!(
                code = "traces_not_exported",
                url = %self.url,
                trouble,
                dropped,
                next = "see that a collector takes OTLP over HTTP there, or remove `telemetry.traces`",
                "the collector did not take spans, which are lost; requests are served all the same"
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::fetch::FetchSettings;
    use crate::request_id::RequestId;

    fn config(url: &str, sample_ratio: f64) -> TracesConfig {
        TracesConfig {
            url: Url::parse(url).unwrap(),
            ca_file: None,
            sample_ratio,
        }
    }

    fn start(config: &TracesConfig) -> (Tracer, TraceExport, Arc<Metrics>) {
        let runtime = tokio::runtime::Handle::current();
        let metrics = Arc::new(Metrics::new(Arc::new(SystemClock::new())));
        let settings = FetchSettings::of_collector(config);
        let client = FetchClient::new(settings, Arc::default(), runtime.clone());
        let (tracer, export) = TraceExport::start(config, client, &runtime, &metrics);
        (tracer, export, metrics)
    }

    fn dropped(metrics: &Metrics) -> usize {
        let text = metrics.encode();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix("countersign_trace_spans_dropped_total "));
        value.unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn spans_that_find_no_place_are_dropped_and_counted_at_once() {
        // It takes connections and never answers.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        let (tracer, export, metrics) = start(&config(&url, 1.0));
        let now = SystemTime::now();
        let method = Some(Method::GET);
        let record = RequestRecord::begun(
            now,
            RequestId::new(now),
            "proxy".into(),
            method,
            Version::HTTP_2,
        );
        let end = |count: usize| {
            for _ in 0..count {
                tracer.end(*tracer.begin(None), &record);
            }
        };
        end(BATCH_SPANS);
        let _sending = listener.accept().await.unwrap();
        end(QUEUED_SPANS);
        assert_eq!(dropped(&metrics), 0);
        end(7);
        assert_eq!(dropped(&metrics), 7);
        assert!(!export.stop(Duration::from_millis(50)).await);
        end(1);
        assert_eq!(dropped(&metrics), 8);
    }

    #[tokio::test]
    async fn a_share_of_the_traces_that_begin_here_is_sampled() {
        let share = |ratio| {
            let (tracer, _, _) = start(&config("http://127.0.0.1:1/v1/traces", ratio));
            let sampled = |_: &usize| tracer.begin(None).context.is_sampled();
            (0..10_000).filter(sampled).count()
        };
        assert_eq!(share(0.0), 0);
        assert_eq!(share(1.0), 10_000);
        // Ten standard deviations on either side.
        assert!((2_050..2_950).contains(&share(0.25)));
    }

    #[tokio::test]
    async fn an_unsampled_caller_has_no_span_whatever_the_ratio() {
        let url = "http://127.0.0.1:1/v1/traces";
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0";
        for (ratio, flag) in [(1.0, 0), (0.0, 1)] {
            let (tracer, _, _) = start(&config(url, ratio));
            let parent = TraceContext::parse(&format!("{parent}{flag}")).unwrap();
            let span = tracer.begin(Some(parent));
            assert_eq!(span.context.is_sampled(), flag == 1);
            assert_eq!(span.trace_id(), parent.trace_id());
            assert_ne!(span.context.parent_id(), parent.parent_id());
        }
    }
}
