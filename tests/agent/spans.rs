//! The spans that a collector is sent (OpenTelemetry protocol), and what becomes of requests while it
//! does not take them.

use std::time::{Duration, Instant};

use countersign::admin::AdminActions;
use countersign::dev::api::Seen;
use countersign_attestors::hexadecimal;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;

use crate::support::collector::{Collector, Manner, attribute};
use crate::support::counts::reached;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{eventually, hold_port};

const PLAIN: &str = "http://plain.example.test/v1/orders";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const STATE: &str = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7";

/// The settings of a collector, as YAML.
fn traces(settings: &str) -> String {
    format!("telemetry: {{traces: {{otlp: {{{settings}}}}}}}\n")
}

/// A world whose agent sends spans to a collector, under further `settings`.
async fn traced(collector: &Collector, settings: &str) -> World {
    let mut world = World::servers().await;
    let endpoint = format!("endpoint: \"http://{}\"{settings}", collector.address);
    let configuration = format!("{COMMON}{}{DESTINATIONS}", traces(&endpoint));
    world.start_agent(&configuration, POLICIES).await;
    world
}

fn says(span: &Span, name: &str) -> Option<String> {
    attribute(&span.attributes, name)
}

/// What spans of a kind there are.
fn of_kind(spans: &[Span], kind: SpanKind) -> Vec<Span> {
    let is_meant = |span: &&Span| span.kind() == kind;
    spans.iter().filter(is_meant).cloned().collect()
}

fn header(seen: &Seen, name: &str) -> Vec<String> {
    let values = seen.headers.get_all(name).iter();
    values
        .map(|value| value.to_str().unwrap().to_owned())
        .collect()
}

/// The value of a counter of the agent.
fn counted(world: &World, name: &str) -> usize {
    let metrics = world.app().metrics();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name}: {metrics}"))
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_and_the_token_request_that_it_led_are_spans() {
    let collector = Collector::start(None, Manner::Takes).await;
    let world = traced(&collector, "").await;
    let queried = format!("{PLAIN}?page=2");
    world.curl(&[&queried]).await.expect(200);
    world.curl(&[&queried]).await.expect(200);
    // Sends them before their time.
    world.app().shutdown().await;

    let spans = collector.spans();
    let [first, second] = &of_kind(&spans, SpanKind::Server)[..] else {
        panic!("{spans:#?}");
    };
    let [token] = &of_kind(&spans, SpanKind::Client)[..] else {
        panic!("{spans:#?}");
    };
    assert_ne!(first.trace_id, second.trace_id);
    assert_eq!(first.name, "GET");
    assert!(first.parent_span_id.is_empty());
    assert_eq!(
        first.status.clone().unwrap_or_default().code(),
        StatusCode::Unset
    );
    let records = world.audited_requests().await;
    let text = |name: &str| records[0][name].as_str().map(str::to_owned);
    let expected = [
        ("http.request.method", Some("GET".to_owned())),
        ("http.response.status_code", Some("200".to_owned())),
        ("url.scheme", Some("http".to_owned())),
        ("server.address", Some("plain.example.test".to_owned())),
        ("server.port", Some("80".to_owned())),
        ("url.path", Some("/v1/orders".to_owned())),
        ("url.query", None),
        ("network.protocol.version", Some("1.1".to_owned())),
        ("error.type", None),
        ("countersign.request_id", text("request_id")),
        ("countersign.session", text("session")),
        ("countersign.workload", text("workload")),
        ("countersign.destination", Some("plain".to_owned())),
        ("countersign.credential", Some("orders-api".to_owned())),
        ("countersign.decision", Some("allow".to_owned())),
    ];
    for (name, value) in &expected {
        assert_eq!(says(first, name), *value, "{name}: {first:#?}");
    }
    assert!(text("workload").is_some(), "{records:#?}");

    assert_eq!(token.trace_id, first.trace_id);
    assert_eq!(token.parent_span_id, first.span_id);
    assert_eq!(
        says(token, "server.address").as_deref(),
        Some("auth.example.test")
    );
    assert_eq!(says(token, "server.port").as_deref(), Some("443"));
    assert_eq!(
        says(token, "countersign.credential").as_deref(),
        Some("orders-api")
    );
    assert_eq!(says(token, "error.type"), None);
    let times = [
        first.start_time_unix_nano,
        token.start_time_unix_nano,
        token.end_time_unix_nano,
        first.end_time_unix_nano,
    ];
    assert!(times.is_sorted(), "{times:?}");
    assert!(token.start_time_unix_nano < token.end_time_unix_nano);

    let seen = world.plain_api.seen();
    for (index, span) in [first, second].into_iter().enumerate() {
        let (trace, id) = (hexadecimal(&span.trace_id), hexadecimal(&span.span_id));
        let parent = format!("00-{trace}-{id}-01");
        assert_eq!(header(&seen[index], "traceparent"), [parent]);
        assert_eq!(records[index]["trace_id"], trace);
    }
    let resource = &collector.resources()[0];
    for (name, value) in [
        ("service.name", "countersign"),
        ("service.version", env!("CARGO_PKG_VERSION")),
    ] {
        assert_eq!(attribute(resource, name).as_deref(), Some(value));
    }
    for name in ["service.instance.id", "host.name"] {
        assert!(!attribute(resource, name).unwrap().is_empty());
    }
    for (path, content_type) in collector.look(|received| {
        let content_type = received.headers["content-type"].clone();
        (received.path.clone(), content_type)
    }) {
        assert_eq!(path, "/v1/traces");
        assert_eq!(content_type, "application/x-protobuf");
    }
    assert_eq!(counted(&world, "countersign_trace_spans_exported_total"), 3);
    assert_eq!(counted(&world, "countersign_trace_spans_dropped_total"), 0);
    reached("span_attributes", expected.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_is_below_the_callers_who_decides_on_sampling() {
    let collector = Collector::start(None, Manner::Takes).await;
    // Where callers say nothing, nothing is traced.
    let world = traced(&collector, ", sample_ratio: 0").await;
    let sampled = format!("00-{TRACE}-{CALLER}-01");
    let unsampled = format!("00-{TRACE}-{CALLER}-00");
    let mut requests = 0;
    for (parents, is_of_caller, flags) in [
        (vec![sampled.as_str()], true, "01"),
        (vec![&unsampled], true, "00"),
        (vec![], false, "00"),
        // What is not valid is no trace.
        (vec!["00-nonsense"], false, "00"),
        (vec![&sampled, &sampled], false, "00"),
    ] {
        world.plain_api.forget();
        let state_field = format!("tracestate: {STATE}");
        let fields: Vec<String> = parents
            .iter()
            .map(|value| format!("traceparent: {value}"))
            .collect();
        let mut arguments = vec!["-H", &state_field, PLAIN];
        for field in &fields {
            arguments.extend(["-H", field]);
        }
        world.curl(&arguments).await.expect(200);
        let seen = world.plain_api.seen();
        let sent = header(&seen[0], "traceparent");
        let [sent] = &sent[..] else {
            panic!("{sent:?}");
        };
        let fields: Vec<&str> = sent.split('-').collect();
        assert_eq!((fields[0], fields[3]), ("00", flags), "{parents:?}: {sent}");
        assert_eq!(fields[1] == TRACE, is_of_caller, "{parents:?}: {sent}");
        assert_ne!(fields[2], CALLER, "{parents:?}: {sent}");
        let states: &[&str] = match is_of_caller {
            true => &[STATE],
            false => &[],
        };
        assert_eq!(header(&seen[0], "tracestate"), states, "{parents:?}");
        let record = world.audited_requests().await.pop().unwrap();
        assert_eq!(record["trace_id"], fields[1]);
        if flags == "01" {
            // The time sends it, while the agent goes on.
            let spans = eventually(Duration::from_secs(20), || async {
                Some(collector.spans()).filter(|spans| !spans.is_empty())
            })
            .await;
            let [span] = &of_kind(&spans, SpanKind::Server)[..] else {
                panic!("{spans:#?}");
            };
            assert_eq!(hexadecimal(&span.trace_id), TRACE);
            assert_eq!(hexadecimal(&span.parent_span_id), CALLER);
            assert_eq!(hexadecimal(&span.span_id), fields[2]);
        }
        requests += 1;
    }
    let before = collector.spans().len();
    world.app().shutdown().await;
    assert_eq!(collector.spans().len(), before);
    reached("callers_of_spans", requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_has_its_code() {
    let collector = Collector::start(None, Manner::Takes).await;
    let world = traced(&collector, "").await;
    world.curl(&["-X", "DELETE", PLAIN]).await.expect(403);
    world
        .curl(&["http://elsewhere.example.test/"])
        .await
        .expect(403);
    world.curl(&["-X", "PURGE", PLAIN]).await.expect(403);
    world.app().shutdown().await;
    let spans = of_kind(&collector.spans(), SpanKind::Server);
    let records = world.audited_requests().await;
    assert_eq!(spans.len(), records.len());
    for (span, record) in spans.iter().zip(&records) {
        assert_eq!(
            says(span, "error.type").as_deref(),
            record["outcome"].as_str()
        );
        assert_eq!(
            says(span, "http.response.status_code").as_deref(),
            Some("403")
        );
        assert_eq!(
            says(span, "countersign.request_id").as_deref(),
            record["request_id"].as_str()
        );
    }
    assert_eq!(
        says(&spans[0], "error.type").as_deref(),
        Some("policy_denied")
    );
    assert_eq!(
        says(&spans[0], "countersign.decision").as_deref(),
        Some("deny")
    );
    assert_eq!(
        says(&spans[1], "error.type").as_deref(),
        Some("destination_not_configured")
    );
    assert_eq!(says(&spans[1], "countersign.destination"), None);
    assert_eq!(spans[2].name, "HTTP");
    assert_eq!(
        says(&spans[2], "http.request.method").as_deref(),
        Some("_OTHER")
    );
    assert_eq!(
        says(&spans[2], "http.request.method_original").as_deref(),
        Some("PURGE")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_request_that_failed_is_a_span_of_the_request_that_led_it() {
    let collector = Collector::start(None, Manner::Takes).await;
    let mut world = World::servers().await;
    let (_held, refusing) = hold_port(0).unwrap();
    world.origins.push(("auth".to_owned(), refusing));
    let endpoint = format!("endpoint: \"http://{}/\"", collector.address);
    let configuration = format!("{COMMON}{}{DESTINATIONS}", traces(&endpoint));
    world.start_agent(&configuration, POLICIES).await;
    let refused = world.curl(&[PLAIN]).await.expect(503);
    let record = world.audited_requests().await.pop().unwrap();
    assert!(record["latency_us"]["token_endpoint"].is_u64(), "{record}");
    world.app().shutdown().await;
    let spans = collector.spans();
    let [token] = &of_kind(&spans, SpanKind::Client)[..] else {
        panic!("{spans:#?}");
    };
    let [request] = &of_kind(&spans, SpanKind::Server)[..] else {
        panic!("{spans:#?}");
    };
    assert_eq!(token.parent_span_id, request.span_id);
    for span in [token, request] {
        assert_eq!(says(span, "error.type"), Some(refused.code()));
        assert_eq!(span.status.clone().unwrap().code(), StatusCode::Error);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_anothers_token_request_has_no_span_of_it() {
    let collector = Collector::start(None, Manner::Takes).await;
    let world = traced(&collector, "").await;
    let requests = (0..8).map(|_| world.curl(&[PLAIN]));
    for answer in futures_util::future::join_all(requests).await {
        answer.expect(200);
    }
    world.app().shutdown().await;
    let spans = collector.spans();
    assert_eq!(of_kind(&spans, SpanKind::Server).len(), 8);
    assert_eq!(of_kind(&spans, SpanKind::Client).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_served_while_no_collector_takes_spans() {
    let mut served = 0;
    for (manner, dropped) in [
        (Manner::Answers(503), 2),
        (Manner::RejectsOne, 1),
        (Manner::Hangs, 0),
    ] {
        let collector = Collector::start(None, manner).await;
        let world = traced(&collector, "").await;
        world.curl(&[PLAIN]).await.expect(200);
        served += 1;
        let began = Instant::now();
        world.app().shutdown().await;
        assert!(began.elapsed() < Duration::from_secs(10), "{manner:?}");
        assert_eq!(collector.requests(), 1, "{manner:?}");
        let counter = "countersign_trace_spans_dropped_total";
        assert_eq!(counted(&world, counter), dropped, "{manner:?}");
    }
    let mut world = World::servers().await;
    let (_held, refusing) = hold_port(0).unwrap();
    let endpoint = format!("endpoint: \"http://{refusing}\"");
    let configuration = format!("{COMMON}{}{DESTINATIONS}", traces(&endpoint));
    world.start_agent(&configuration, POLICIES).await;
    world.curl(&[PLAIN]).await.expect(200);
    world.app().shutdown().await;
    assert_eq!(counted(&world, "countersign_trace_spans_dropped_total"), 2);
    reached("served_without_collector", served + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_behind_tls_is_verified() {
    let mut world = World::servers().await;
    let certificate = world.authority.issue(&["localhost"]).unwrap();
    let collector = Collector::start(Some(certificate), Manner::Takes).await;
    let port = collector.address.port();
    let settings = format!("endpoint: \"https://localhost:{port}/otlp\", ca_file: servers.pem");
    let configuration = format!("{COMMON}{}{DESTINATIONS}", traces(&settings));
    world.start_agent(&configuration, POLICIES).await;
    world.curl(&[PLAIN]).await.expect(200);
    world.app().shutdown().await;
    assert_eq!(of_kind(&collector.spans(), SpanKind::Server).len(), 1);
    let paths = collector.look(|received| received.path.clone());
    assert_eq!(paths, ["/otlp/v1/traces"]);
}
