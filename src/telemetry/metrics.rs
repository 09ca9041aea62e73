//! Prometheus metrics, named after what happened, with base units, under `countersign_`.
//!
//! Labels are bounded: names written in the configuration, and fixed words. What is counted on every
//! request is reached through a handle that is resolved once ([`DestinationMetrics`],
//! [`CredentialMetrics`], [`ListenerMetrics`]) and is updated without a lock or an allocation.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use foldhash::fast::RandomState;
use http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::clock::Clock;
use crate::refusal::RefusalCode;

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels<const N: usize> = [(&'static str, Arc<str>); N];

/// Upper bounds in seconds: what the agent itself takes is tens of microseconds, what servers take is up to a minute.
const BUCKETS: [f64; 20] = [
    0.000_05,
    0.000_1,
    0.000_25,
    0.000_5,
    0.001,
    0.002_5,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    f64::INFINITY,
];

/// A histogram of durations that is updated by two atomic additions; the library's own takes a lock,
/// which all data workers would share.
#[derive(Debug, Clone, Default)]
pub struct DurationHistogram(Arc<DurationHistogramState>);

#[derive(Debug, Default)]
struct DurationHistogramState {
    buckets: [AtomicU64; BUCKETS.len()],
    sum_nanoseconds: AtomicU64,
}

impl DurationHistogram {
    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let index = BUCKETS.partition_point(|upper_bound| *upper_bound < seconds);
        if let Some(bucket) = self.0.buckets.get(index) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.0
            .sum_nanoseconds
            .fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.0
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .sum()
    }
}

impl TypedMetric for DurationHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for DurationHistogram {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), fmt::Error> {
        let buckets: Vec<(f64, u64)> = BUCKETS
            .iter()
            .zip(&self.0.buckets)
            .map(|(upper_bound, count)| (*upper_bound, count.load(Ordering::Relaxed)))
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_nanos(self.0.sum_nanoseconds.load(Ordering::Relaxed));
        encoder.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// Seconds since something last happened, computed when it is read.
#[derive(Debug, Clone)]
struct Age {
    clock: Arc<dyn Clock>,
    /// Monotonic milliseconds of the last time.
    last: Arc<AtomicU64>,
}

impl Age {
    fn set(&self, age: Duration) {
        let age = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let last = milliseconds(&*self.clock).saturating_sub(age);
        self.last.store(last, Ordering::Relaxed);
    }
}

fn milliseconds(clock: &dyn Clock) -> u64 {
    u64::try_from(clock.monotonic().as_millis()).unwrap_or(u64::MAX)
}

impl TypedMetric for Age {
    const TYPE: MetricType = MetricType::Gauge;
}

impl EncodeMetric for Age {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), fmt::Error> {
        let age = milliseconds(&*self.clock).saturating_sub(self.last.load(Ordering::Relaxed));
        encoder.encode_gauge(&Duration::from_millis(age).as_secs_f64())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[derive(Debug, Clone)]
struct NewAge(Arc<dyn Clock>);

impl MetricConstructor<Age> for NewAge {
    fn new_metric(&self) -> Age {
        let age = Age {
            clock: Arc::clone(&self.0),
            last: Arc::default(),
        };
        age.set(Duration::ZERO);
        age
    }
}

/// The state of the audit writer at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditState {
    /// Sequence number of the last record written.
    pub head_sequence: u64,
    /// The first 48 bits of its hash: as many as a gauge holds exactly.
    pub head_hash_prefix: u64,
    /// Records waiting.
    pub queue_depth: u64,
    /// Records written by this process.
    pub written: u64,
    /// Records lost under `on_failure: degrade`.
    pub dropped: u64,
    /// Whether new requests are served.
    pub accepting: bool,
}

/// Where the metrics read the audit writer's state from.
pub trait AuditStateSource: Send + Sync + fmt::Debug + 'static {
    /// The state now.
    fn audit_state(&self) -> AuditState;
}

#[derive(Debug)]
struct AuditCollector(Arc<dyn AuditStateSource>);

impl Collector for AuditCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let state = self.0.audit_state();
        let gauges: [(&str, &str, u64); 4] = [
            (
                "audit_head_sequence",
                "Sequence number of the last audit record written",
                state.head_sequence,
            ),
            (
                "audit_head_hash_prefix",
                "First 48 bits of the hash of the last audit record written",
                state.head_hash_prefix,
            ),
            (
                "audit_queue_depth",
                "Audit records waiting to be written",
                state.queue_depth,
            ),
            (
                "audit_accepting",
                "1 while audit records can be written or may be lost, 0 while requests are refused for it",
                u64::from(state.accepting),
            ),
        ];
        for (name, help, value) in gauges {
            ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
                .encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let counters: [(&str, &str, u64); 2] = [
            (
                "audit_records_written",
                "Audit records written",
                state.written,
            ),
            (
                "audit_records_dropped",
                "Audit records lost because no sink could take them",
                state.dropped,
            ),
        ];
        for (name, help, value) in counters {
            ConstCounter::new(value).encode(encoder.encode_descriptor(
                name,
                help,
                None,
                MetricType::Counter,
            )?)?;
        }
        Ok(())
    }
}

/// What is counted for one destination.
#[derive(Debug, Clone)]
pub struct DestinationMetrics {
    total: DurationHistogram,
    ours: DurationHistogram,
    upstream: DurationHistogram,
}

impl DestinationMetrics {
    /// A request ended: whole time, the agent's own share, and the upstream's.
    pub fn request(&self, total: Duration, ours: Duration, upstream: Duration) {
        self.total.observe(total);
        self.ours.observe(ours);
        self.upstream.observe(upstream);
    }
}

/// What is counted for one credential.
#[derive(Debug, Clone)]
pub struct CredentialMetrics {
    cache_hits: Counter,
    cache_misses: Counter,
    minted: Counter,
    duration: DurationHistogram,
    unauthorized: Counter,
    forbidden: Counter,
}

impl CredentialMetrics {
    /// A request was served from the cache.
    pub fn cache_hit(&self) {
        self.cache_hits.inc();
    }

    /// A request had to wait for a token.
    pub fn cache_miss(&self) {
        self.cache_misses.inc();
    }
}

/// What is counted for one listener.
#[derive(Debug, Clone)]
pub struct ListenerMetrics {
    open_connections: Gauge,
    refused_connections: Counter,
}

impl ListenerMetrics {
    /// Counts a connection as open until the guard is dropped.
    pub fn connection(&self) -> OpenConnection {
        self.open_connections.inc();
        OpenConnection(self.open_connections.clone())
    }

    /// A connection or tunnel was closed because too many waited to be attested, or few descriptors were left.
    pub fn connection_refused(&self) {
        self.refused_connections.inc();
    }
}

/// One open connection, for as long as it lives.
#[derive(Debug)]
pub struct OpenConnection(Gauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Handles by name, found without an allocation.
#[derive(Debug)]
struct Handles<T>(RwLock<HashMap<Arc<str>, T>>);

impl<T: Clone> Handles<T> {
    fn new() -> Self {
        Self(RwLock::new(HashMap::new()))
    }

    fn resolve(&self, name: &str, create: impl FnOnce(&Arc<str>) -> T) -> T {
        if let Some(found) = self
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
        {
            return found.clone();
        }
        let name: Arc<str> = name.into();
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(Arc::clone(&name))
            .or_insert_with(|| create(&name))
            .clone()
    }
}

/// Every metric of the agent.
pub struct Metrics {
    registry: Mutex<Registry>,
    token_requests: Family<Labels<2>, Counter>,
    token_request_failures: Family<Labels<2>, Counter>,
    token_request_duration: Family<Labels<1>, DurationHistogram>,
    tokens_minted: Family<Labels<1>, Counter>,
    token_refreshes: Family<Labels<2>, Counter>,
    cache_hits: Family<Labels<1>, Counter>,
    cache_misses: Family<Labels<1>, Counter>,
    upstream_rejections: Family<Labels<2>, Counter>,
    revoked_token_uses: Counter,
    decisions: HashMap<&'static str, Counter, RandomState>,
    decision_cache_hits: Counter,
    decision_cache_misses: Counter,
    attestations: Family<Labels<2>, Counter>,
    refusals: HashMap<RefusalCode, Counter>,
    jwks_age: Family<Labels<1>, Age, NewAge>,
    open_connections: Family<Labels<1>, Gauge>,
    refused_connections: Family<Labels<1>, Counter>,
    request_duration: Family<Labels<1>, DurationHistogram>,
    own_duration: Family<Labels<1>, DurationHistogram>,
    upstream_duration: Family<Labels<1>, DurationHistogram>,
    active_identities: Gauge,
    trace_spans_exported: Counter,
    trace_spans_dropped: Counter,
    reloads: Family<Labels<1>, Counter>,
    reload_success: Gauge,
    reload_time: Gauge,
    by_credential: Handles<CredentialMetrics>,
    by_destination: Handles<DestinationMetrics>,
    by_listener: Handles<ListenerMetrics>,
}

/// The effects that a decision may have, as labels.
pub const EFFECTS: [&str; 4] = ["allow", "deny", "report_only", "error"];

/// A metric at zero, known to the registry by this name.
fn counted<Counted: Metric + Clone + Default>(
    registry: &mut Registry,
    name: &'static str,
    help: &'static str,
) -> Counted {
    let metric = Counted::default();
    registry.register(name, help, metric.clone());
    metric
}

/// A metric in seconds, known to the registry by this name, which the unit is added to.
fn in_seconds<Measured: Metric + Clone>(
    registry: &mut Registry,
    name: &'static str,
    help: &'static str,
    metric: Measured,
) -> Measured {
    registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
    metric
}

/// A counter for each of the values that a label may have.
fn by_label<Value: Copy + Eq + Hash, Hasher: BuildHasher + Default>(
    family: &Family<Labels<1>, Counter>,
    label: &'static str,
    values: impl IntoIterator<Item = Value>,
    text: impl Fn(Value) -> &'static str,
) -> HashMap<Value, Counter, Hasher> {
    let counter = |value| family.get_or_create_owned(&[(label, text(value).into())]);
    values
        .into_iter()
        .map(|value| (value, counter(value)))
        .collect()
}

impl Metrics {
    /// All metrics, at zero. `clock` tells the age of key sets.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let mut registry = Registry::with_prefix("countersign");
        registry.register(
            "build",
            "The version of the agent",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        let to = &mut registry;
        let metrics = Self {
            token_requests: counted(
                to,
                "token_requests",
                "Requests to token endpoints, by result: `success` or the code of the refusal",
            ),
            token_request_failures: counted(
                to,
                "token_request_failures",
                "Failed requests to token endpoints, assertions that were not accepted included, by cause",
            ),
            token_request_duration: in_seconds(
                to,
                "token_request_duration",
                "Time that token endpoints took to answer",
                Default::default(),
            ),
            tokens_minted: counted(
                to,
                "tokens_minted",
                "Tokens obtained from authorization servers",
            ),
            token_refreshes: counted(
                to,
                "token_refreshes",
                "Refreshes ahead of expiry, by result: `success` or `failure`",
            ),
            cache_hits: counted(
                to,
                "token_cache_hits",
                "Requests served with a cached token",
            ),
            cache_misses: counted(to, "token_cache_misses", "Requests that waited for a token"),
            upstream_rejections: counted(
                to,
                "upstream_rejections",
                "Answers 401 and 403 of destinations to requests that carried a token, by status",
            ),
            revoked_token_uses: counted(
                to,
                "revoked_token_uses",
                "Requests refused because what they rest on is revoked",
            ),
            decisions: by_label(
                &counted(to, "decisions", "Policy decisions, by effect"),
                "effect",
                EFFECTS,
                |effect| effect,
            ),
            decision_cache_hits: counted(
                to,
                "decision_cache_hits",
                "Decisions that were remembered",
            ),
            decision_cache_misses: counted(
                to,
                "decision_cache_misses",
                "Decisions that were evaluated",
            ),
            attestations: counted(to, "attestations", "Attestations, by attestor and result"),
            refusals: by_label(
                &counted(to, "refusals", "Requests refused by the agent, by code"),
                "code",
                RefusalCode::ALL.iter().copied(),
                RefusalCode::as_str,
            ),
            jwks_age: in_seconds(
                to,
                "jwks_age",
                "Age of the issuer's key set in use",
                Family::new_with_constructor(NewAge(clock)),
            ),
            open_connections: counted(
                to,
                "open_connections",
                "Connections of callers that are open",
            ),
            refused_connections: counted(
                to,
                "refused_connections",
                "Connections and tunnels of callers that were closed because too many waited to be attested, or few descriptors were left",
            ),
            request_duration: in_seconds(
                to,
                "request_duration",
                "Time from a request's head to its response's head",
                Default::default(),
            ),
            own_duration: in_seconds(
                to,
                "request_own_duration",
                "The agent's own share of the time from a request's head to its response's head",
                Default::default(),
            ),
            upstream_duration: in_seconds(
                to,
                "request_upstream_duration",
                "The destination's share of the time from a request's head to its response's head",
                Default::default(),
            ),
            active_identities: counted(
                to,
                "active_identities",
                "Identities with an open connection",
            ),
            trace_spans_exported: counted(
                to,
                "trace_spans_exported",
                "Spans that the collector took",
            ),
            trace_spans_dropped: counted(
                to,
                "trace_spans_dropped",
                "Spans that were lost because the collector did not take them, or not in time",
            ),
            reloads: counted(
                to,
                "reloads",
                "Reloads of configuration and policies, by result: `success` or `failure`",
            ),
            reload_success: counted(
                to,
                "last_reload_success",
                "1 when the last load of configuration and policies succeeded, 0 while the last good one is kept",
            ),
            reload_time: in_seconds(
                to,
                "last_reload_success_timestamp",
                "When configuration and policies were last loaded, in Unix time",
                Default::default(),
            ),
            by_credential: Handles::new(),
            by_destination: Handles::new(),
            by_listener: Handles::new(),
            registry: Mutex::new(registry),
        };
        metrics.reload_success.set(1);
        metrics
    }

    /// The handle of a configured credential.
    pub fn credential(&self, credential: &str) -> CredentialMetrics {
        self.by_credential.resolve(credential, |name| {
            let label = |status: &'static str| {
                [("credential", Arc::clone(name)), ("status", status.into())]
            };
            let name = [("credential", Arc::clone(name))];
            CredentialMetrics {
                cache_hits: self.cache_hits.get_or_create_owned(&name),
                cache_misses: self.cache_misses.get_or_create_owned(&name),
                minted: self.tokens_minted.get_or_create_owned(&name),
                duration: self.token_request_duration.get_or_create_owned(&name),
                unauthorized: self.upstream_rejections.get_or_create_owned(&label("401")),
                forbidden: self.upstream_rejections.get_or_create_owned(&label("403")),
            }
        })
    }

    /// The handle of a configured destination, or of `unmatched`.
    pub fn destination(&self, destination: &str) -> DestinationMetrics {
        self.by_destination.resolve(destination, |name| {
            let name = [("destination", Arc::clone(name))];
            DestinationMetrics {
                total: self.request_duration.get_or_create_owned(&name),
                ours: self.own_duration.get_or_create_owned(&name),
                upstream: self.upstream_duration.get_or_create_owned(&name),
            }
        })
    }

    /// The handle of a configured listener.
    pub fn listener(&self, listener: &str) -> ListenerMetrics {
        self.by_listener.resolve(listener, |name| {
            let name = [("listener", Arc::clone(name))];
            ListenerMetrics {
                open_connections: self.open_connections.get_or_create_owned(&name),
                refused_connections: self.refused_connections.get_or_create_owned(&name),
            }
        })
    }

    /// A request was served with a cached token.
    pub fn cache_hit(&self, credential: &str) {
        self.credential(credential).cache_hit();
    }

    /// A request had to wait for a token.
    pub fn cache_miss(&self, credential: &str) {
        self.credential(credential).cache_miss();
    }

    /// A token endpoint was asked: the refusal that came of it, or `None` for a token; and how long
    /// it took.
    pub fn token_request(
        &self,
        credential: &str,
        failure: Option<RefusalCode>,
        duration: Duration,
    ) {
        let handle = self.credential(credential);
        handle.duration.observe(duration);
        let result = failure.map_or("success", RefusalCode::as_str);
        let credential: Arc<str> = credential.into();
        self.token_requests
            .get_or_create_owned(&[
                ("credential", Arc::clone(&credential)),
                ("result", result.into()),
            ])
            .inc();
        match failure {
            None => {
                handle.minted.inc();
            }
            Some(code) => {
                if let Some(cause) = code.properties().cause {
                    self.token_request_failures
                        .get_or_create_owned(&[
                            ("credential", credential),
                            ("cause", cause.as_str().into()),
                        ])
                        .inc();
                }
            }
        }
    }

    /// A refresh ahead of expiry ended.
    pub fn token_refresh(&self, credential: &str, success: bool) {
        let result = if success { "success" } else { "failure" };
        self.token_refreshes
            .get_or_create_owned(&[("credential", credential.into()), ("result", result.into())])
            .inc();
    }

    /// A destination answered `status` to a request that carried a token of `credential`; only 401
    /// and 403 are counted.
    pub fn upstream_status(&self, credential: &str, status: StatusCode) {
        match status {
            StatusCode::UNAUTHORIZED => self.credential(credential).unauthorized.inc(),
            StatusCode::FORBIDDEN => self.credential(credential).forbidden.inc(),
            _ => 0,
        };
    }

    /// A decision was made; `effect` is one of [`EFFECTS`].
    pub fn decision(&self, effect: &str) {
        if let Some(counter) = self.decisions.get(effect) {
            counter.inc();
        }
    }

    /// How many decisions of a batch were remembered and how many evaluated.
    pub fn decision_cache(&self, hits: u64, misses: u64) {
        self.decision_cache_hits.inc_by(hits);
        self.decision_cache_misses.inc_by(misses);
    }

    /// An attestor ran: `attested`, `could_not_run` or `invalid_evidence`.
    pub fn attestation(&self, attestor: &str, result: &str) {
        self.attestations
            .get_or_create_owned(&[("attestor", attestor.into()), ("result", result.into())])
            .inc();
    }

    /// A request was refused.
    pub fn refusal(&self, code: RefusalCode) {
        if code == RefusalCode::Revoked {
            self.revoked_token_uses.inc();
        }
        if let Some(counter) = self.refusals.get(&code) {
            counter.inc();
        }
    }

    /// How old the issuers' key sets are; those of others are forgotten.
    pub fn jwks_ages<'a>(&self, ages: impl IntoIterator<Item = (&'a str, Duration)>) {
        self.jwks_age.clear();
        for (issuer, age) in ages {
            self.jwks_age
                .get_or_create_owned(&[("issuer", issuer.into())])
                .set(age);
        }
    }

    /// How many identities have an open connection.
    pub fn active_identities(&self, count: usize) {
        self.active_identities
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// The collector took spans.
    pub fn trace_spans_exported(&self, count: usize) {
        self.trace_spans_exported
            .inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// Spans were lost.
    pub fn trace_spans_dropped(&self, count: usize) {
        self.trace_spans_dropped
            .inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// A load of configuration and policies ended at `wall`.
    pub fn reload(&self, success: bool, wall: SystemTime) {
        let result = if success { "success" } else { "failure" };
        self.reloads
            .get_or_create_owned(&[("result", result.into())])
            .inc();
        self.reload_success.set(i64::from(success));
        if success {
            let seconds = wall
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs());
            self.reload_time
                .set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
    }

    /// Adds the state of the audit writer.
    pub fn observe_audit(&self, source: Arc<dyn AuditStateSource>) {
        self.registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .register_collector(Box::new(AuditCollector(source)));
    }

    /// Everything, in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        // Writing to a `String` does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metrics").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    use crate::clock::SystemClock;

    #[derive(Debug)]
    struct Fixed(AuditState);

    impl AuditStateSource for Fixed {
        fn audit_state(&self) -> AuditState {
            self.0
        }
    }

    /// Metrics in which everything has happened once.
    fn eventful() -> Metrics {
        let metrics = Metrics::new(Arc::new(SystemClock::new()));
        metrics.observe_audit(Arc::new(Fixed(AuditState {
            head_sequence: 7,
            head_hash_prefix: 0xffff_ffff_ffff,
            queue_depth: 2,
            written: 6,
            dropped: 1,
            accepting: true,
        })));
        let duration = Duration::from_millis(3);
        metrics.token_request("orders-api", None, duration);
        metrics.token_request("orders-api", Some(RefusalCode::InvalidClient), duration);
        metrics.token_refresh("orders-api", true);
        metrics.cache_hit("orders-api");
        metrics.credential("orders-api").cache_hit();
        metrics.cache_miss("orders-api");
        metrics.upstream_status("orders-api", StatusCode::UNAUTHORIZED);
        metrics.upstream_status("orders-api", StatusCode::FORBIDDEN);
        metrics.upstream_status("orders-api", StatusCode::OK);
        metrics.refusal(RefusalCode::Revoked);
        metrics.decision("allow");
        metrics.decision_cache(3, 1);
        metrics.attestation("unix", "attested");
        metrics.refusal(RefusalCode::PolicyDenied);
        metrics.jwks_ages([("ci", Duration::ZERO)]);
        metrics.trace_spans_exported(512);
        metrics.trace_spans_dropped(3);
        metrics.active_identities(4);
        metrics.reload(true, UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        metrics.reload(false, UNIX_EPOCH + Duration::from_secs(1_900_000_000));
        metrics.destination("orders").request(
            Duration::from_millis(5),
            Duration::from_micros(80),
            Duration::from_millis(4),
        );
        metrics
    }

    #[test]
    fn what_happened_is_counted_under_its_name() {
        let metrics = eventful();
        let open = metrics.listener("workloads").connection();
        metrics.listener("workloads").connection_refused();
        let text = metrics.encode();
        for line in [
            r#"countersign_token_requests_total{credential="orders-api",result="success"} 1"#,
            r#"countersign_token_requests_total{credential="orders-api",result="invalid_client"} 1"#,
            r#"countersign_token_request_failures_total{credential="orders-api",cause="client_misconfiguration"} 1"#,
            r#"countersign_token_request_duration_seconds_count{credential="orders-api"} 2"#,
            r#"countersign_token_request_duration_seconds_bucket{le="0.005",credential="orders-api"} 2"#,
            r#"countersign_token_request_duration_seconds_bucket{le="0.0025",credential="orders-api"} 0"#,
            r#"countersign_tokens_minted_total{credential="orders-api"} 1"#,
            r#"countersign_token_refreshes_total{credential="orders-api",result="success"} 1"#,
            r#"countersign_token_cache_hits_total{credential="orders-api"} 2"#,
            r#"countersign_token_cache_misses_total{credential="orders-api"} 1"#,
            r#"countersign_upstream_rejections_total{credential="orders-api",status="401"} 1"#,
            r#"countersign_upstream_rejections_total{credential="orders-api",status="403"} 1"#,
            "countersign_revoked_token_uses_total 1",
            r#"countersign_decisions_total{effect="allow"} 1"#,
            r#"countersign_decisions_total{effect="deny"} 0"#,
            "countersign_decision_cache_hits_total 3",
            r#"countersign_attestations_total{attestor="unix",result="attested"} 1"#,
            r#"countersign_refusals_total{code="policy_denied"} 1"#,
            r#"countersign_open_connections{listener="workloads"} 1"#,
            r#"countersign_refused_connections_total{listener="workloads"} 1"#,
            r#"countersign_request_duration_seconds_count{destination="orders"} 1"#,
            r#"countersign_request_own_duration_seconds_bucket{le="0.0001",destination="orders"} 1"#,
            "countersign_trace_spans_exported_total 512",
            "countersign_trace_spans_dropped_total 3",
            "countersign_active_identities 4",
            "countersign_last_reload_success 0",
            "countersign_last_reload_success_timestamp_seconds 1800000000",
            "countersign_audit_head_sequence 7",
            "countersign_audit_head_hash_prefix 281474976710655",
            "countersign_audit_records_dropped_total 1",
            "countersign_audit_accepting 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        drop(open);
        assert!(
            metrics
                .encode()
                .contains(r#"countersign_open_connections{listener="workloads"} 0"#)
        );
        let refusals = text.matches("countersign_refusals_total{").count();
        assert_eq!(refusals, RefusalCode::ALL.len());
    }

    #[test]
    fn the_documentation_lists_the_same_metrics() {
        let metrics = eventful();
        let _open = metrics.listener("workloads").connection();
        let encoded = metrics.encode();
        let served: BTreeMap<&str, &str> = encoded
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
            .collect();
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md"))
            .unwrap();
        let documented: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `countersign_"))
            .map(|row| {
                let mut cells = row.split('|').map(|cell| cell.trim().trim_matches('`'));
                let name = cells.next().unwrap().split('{').next().unwrap();
                (name.trim_end_matches("_total"), cells.next().unwrap())
            })
            .collect();
        let served: BTreeMap<&str, &str> = served
            .into_iter()
            .map(|(name, kind)| (name.strip_prefix("countersign_").unwrap(), kind))
            .collect();
        let names = |metrics: &BTreeMap<&str, &str>| -> BTreeSet<String> {
            metrics.keys().map(|name| (*name).to_owned()).collect()
        };
        assert_eq!(names(&documented), names(&served));
        assert_eq!(documented, served);
    }

    #[test]
    fn ages_grow_and_begin_anew() {
        let metrics = Metrics::new(Arc::new(SystemClock::new()));
        let hour = Duration::from_secs(3600);
        metrics.jwks_ages([("ci", hour), ("gone", hour)]);
        let age = || -> f64 {
            let text = metrics.encode();
            let line = text
                .lines()
                .find(|line| line.starts_with("countersign_jwks_age_seconds{issuer=\"ci\"}"))
                .unwrap();
            line.split(' ').next_back().unwrap().parse().unwrap()
        };
        std::thread::sleep(Duration::from_millis(60));
        let before = age();
        assert!(before >= 3600.05, "{before}");
        metrics.jwks_ages([("ci", Duration::ZERO)]);
        assert!(age() < before);
        assert!(!metrics.encode().contains("issuer=\"gone\""));
    }
}
