//! The parts of the request path, each run once under callgrind: what its instructions are counted to be
//! does not depend on what else the machine does. `tests/instructions/run` compares the counts.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a part that cannot be set up is not counted; gungraun's macros make public modules"
)]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign::audit::record::{DecisionReference, TokenReference};
use countersign::audit::{
    Audit, AuditWriter, Obtained, OtherAgents, Record, RequestRecord, workload_summary,
};
use countersign::clock::{Clock, SystemClock};
use countersign::config::Config;
use countersign::inject::strip_hop_by_hop;
use countersign::policy::{
    DecisionCache, Grant, PolicyEngine, PolicySnapshot, Question, Revocations, described,
    questions, route,
};
use countersign::providers::parse_token_response;
use countersign::request::{EgressRequest, Reception, RequestPath, Target};
use countersign::request_id::{RequestId, SessionId, TraceContext};
use countersign::routing::{Route, Routes};
use countersign::telemetry::metrics::Metrics;
use countersign_attestors::{
    Attestation, AttestedWorkload, Attestor, AttributeDeclaration, AttributeType, AttributeValue,
    Attributes, Catalog, ConnectionAttestation, Evidence, EvidenceKind, PeerEvidence,
    PresentedToken,
};
use gungraun::{library_benchmark, library_benchmark_group, main};
use http::{HeaderMap, Request, StatusCode, Version};

/// As a request to a destination among a hundred, under twenty policies that can apply.
const DESTINATIONS: usize = 100;
const POLICIES: usize = 20;

const HEAD: &[(&str, &str)] = &[
    ("host", "orders.countersign.test"),
    ("user-agent", "python-requests/2.32.3"),
    ("accept", "application/json"),
    ("accept-encoding", "gzip, deflate"),
    ("connection", "keep-alive"),
    ("te", "trailers"),
    ("content-type", "application/json"),
    (
        "traceparent",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ),
];

/// What an agent holds that decides under a configuration.
struct World {
    directory: PathBuf,
    config: Config,
    routes: Routes,
    snapshot: Arc<PolicySnapshot>,
    runtime: tokio::runtime::Runtime,
    connection: ConnectionAttestation,
    token: PresentedToken,
    request: Arc<EgressRequest>,
}

/// States the same of every token.
#[derive(Debug)]
struct Stating;

#[async_trait::async_trait]
impl Attestor for Stating {
    fn name(&self) -> &str {
        "unix"
    }

    fn evidence_kind(&self) -> EvidenceKind {
        EvidenceKind::Presented
    }

    fn declarations(&self) -> Vec<AttributeDeclaration> {
        let declaration = |name: &str, attribute_type| AttributeDeclaration {
            group: "unix".to_owned(),
            name: name.to_owned(),
            attribute_type,
            required: true,
            description: String::new(),
        };
        vec![
            declaration("uid", AttributeType::Long),
            declaration("executable", AttributeType::String),
        ]
    }

    async fn attest(&self, _: Evidence<'_>) -> Attestation {
        let attributes = Attributes::from([
            ("uid".to_owned(), AttributeValue::Long(1001)),
            (
                "executable".to_owned(),
                AttributeValue::String("/usr/bin/python3".to_owned()),
            ),
        ]);
        Attestation::Attested {
            groups: [("unix".to_owned(), attributes)].into(),
            valid_until: None,
        }
    }
}

fn write_configuration(directory: &Path) {
    let destinations: String = (0..DESTINATIONS)
        .map(|number| {
            format!(
                r#"  - {{name: orders-{number}, hosts: [orders-{number}.countersign.test], scheme: http, paths: ["/v1/**"], credentials: [{{name: orders-api}}]}}
"#
            )
        })
        .collect();
    let policies: String = (0..POLICIES)
        .map(|number| {
            format!(
                r#"@id("orders-{number}") @max_lifetime("10m")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{
  principal has unix && principal.unix.uid >= 1000 && principal.unix.uid < 1050
  && context has request && context.request.safe
  && (context.request.path like "/v1/*" || context.request.path like "/v{number}/*")
}};
"#
            )
        })
        .collect();
    let configuration = format!(
        r#"version: 1
listeners: [{{name: workloads, type: forward_proxy, bind: "127.0.0.1:0"}}]
attestors: {{unix: {{}}}}
interception: {{ca: {{source: memory}}}}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    issuer: https://auth.countersign.test
    client_id: agent
    client_authentication: {{method: client_secret_basic, secret_file: secret}}
    scopes: [orders.read]
destinations:
{destinations}policies: {{directory: policies}}
audit: {{sinks: [{{type: file, path: audit.jsonl}}]}}
"#
    );
    std::fs::create_dir_all(directory.join("policies")).unwrap();
    std::fs::write(directory.join("policies/orders.cedar"), policies).unwrap();
    std::fs::write(directory.join("secret"), "a secret").unwrap();
    std::fs::write(directory.join("countersign.yaml"), configuration).unwrap();
}

fn configuration() -> PathBuf {
    countersign::tls::install_cryptography_provider();
    let name = std::process::id().to_string();
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    write_configuration(&directory);
    directory
}

fn load(directory: &Path) -> Config {
    Config::load(&directory.join("countersign.yaml"))
        .unwrap_or_else(|found| panic!("{}", found.render(false)))
}

fn engine(config: &Config) -> PolicyEngine {
    let (engine, _) = PolicyEngine::load(config, &Stating.declarations())
        .unwrap_or_else(|found| panic!("{}", found.render(false)));
    engine
}

impl World {
    fn new() -> Self {
        let directory = configuration();
        let config = load(&directory);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let catalog = Catalog::new(
            vec![Arc::new(Stating)],
            Arc::new(countersign_attestors::SystemClock::new()),
        );
        let connection = runtime.block_on(ConnectionAttestation::new(
            Arc::new(catalog),
            PeerEvidence::none(),
        ));
        let last = DESTINATIONS - 1;
        let request = format!("GET http://orders-{last}.countersign.test/v1/orders/7");
        let world = Self {
            routes: Routes::new(&config),
            snapshot: PolicySnapshot::new(Arc::new(engine(&config)), Revocations::none()),
            token: PresentedToken::new("a token".to_owned()),
            request: Arc::new(described::request(&request).unwrap()),
            directory,
            config,
            runtime,
            connection,
        };
        world.workload();
        world
    }

    fn workload(&self) -> Arc<AttestedWorkload> {
        self.runtime
            .block_on(self.connection.attest(Some(&self.token)))
            .unwrap()
    }

    fn question(&self) -> Question<'_> {
        let Route::Destination(destination) = route(&self.routes, &self.request) else {
            panic!("no destination covers the request");
        };
        let (question, _) = questions(destination, Some(&self.request), SystemTime::UNIX_EPOCH)
            .next()
            .unwrap();
        question
    }
}

/// A cache, and a workload that it knows an answer for, or not yet.
fn deciding(is_known: bool) -> (World, DecisionCache, Arc<AttestedWorkload>) {
    let world = World::new();
    let workload = world.workload();
    let mut cache = DecisionCache::new();
    if is_known {
        cache
            .decide(&world.snapshot, &workload, &world.question())
            .unwrap();
    }
    (world, cache, workload)
}

/// An audit, and a record as that of an injected request.
fn recording() -> (PathBuf, Audit, AuditWriter, RequestRecord) {
    let (world, mut cache, workload) = deciding(true);
    let grant = cache
        .decide(&world.snapshot, &workload, &world.question())
        .unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let metrics = Metrics::new(Arc::clone(&clock));
    let (audit, writer) = Audit::start(
        &world.config.audit,
        OtherAgents::AreMistakes,
        clock,
        &metrics,
    )
    .unwrap();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let mut record = RequestRecord::begun(
        now,
        RequestId::new(now),
        Arc::from("workloads"),
        Some(http::Method::GET),
        Version::HTTP_11,
    );
    record.session = Some(SessionId::new(now));
    record.workload = Some(workload_summary(workload.facts()));
    record.destination = Some(Arc::from("orders"));
    record.asked = Some(Arc::clone(&world.request));
    record.decision = Some(DecisionReference::of_grant(&grant));
    record.credential = Some(Arc::from("orders-api"));
    record.asked_and_granted.scopes_asked = Arc::clone(grant.scopes());
    record.asked_and_granted.scopes_granted = Arc::clone(grant.scopes());
    record.token = Some(TokenReference {
        sha256: Arc::from("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"),
        expires_at: now + Duration::from_secs(600),
        obtained: Obtained::CacheHit,
    });
    record.outcome = "ok";
    record.latency.total = Duration::from_micros(900);
    record.latency.upstream = Duration::from_micros(800);
    record.latency.ours = Duration::from_micros(100);
    record.attempts = 1;
    audit.record(Record::Request(&record)).unwrap();
    // An allocation of this size has the allocator put together what was freed here, before it is counted.
    drop(std::hint::black_box(Vec::<u8>::with_capacity(64 * 1024)));
    (world.directory, audit, writer, record)
}

fn head() -> http::request::Parts {
    let mut request = Request::get("http://orders.countersign.test/v1/orders/7?page=2");
    for (name, value) in HEAD {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn token_response() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(
        http::header::CONTENT_TYPE,
        "application/json".parse().unwrap(),
    );
    headers.insert(http::header::CACHE_CONTROL, "no-store".parse().unwrap());
    headers
}

#[library_benchmark]
fn authority() -> Target {
    Target::parse(black_box("Orders.Countersign.test:8443"), None).unwrap()
}

#[library_benchmark]
#[bench::plain("/v1/orders/7")]
#[bench::encoded("/v1/caf%C3%A9/a%2fb;v=1/orders")]
fn path(path: &str) -> RequestPath {
    black_box(RequestPath::parse(black_box(path)))
}

#[library_benchmark]
#[bench::proxied(setup = head)]
fn request_head(head: http::request::Parts) -> (http::request::Parts, EgressRequest) {
    let (asked, _) = EgressRequest::parse(black_box(&head), Reception::Proxy).unwrap();
    (head, black_box(asked))
}

#[library_benchmark]
#[bench::proxied(setup = head)]
fn hop_by_hop_fields(mut head: http::request::Parts) -> http::request::Parts {
    black_box(strip_hop_by_hop(&mut head.headers));
    head
}

#[library_benchmark]
#[bench::of_the_caller(setup = head)]
fn trace_context(head: http::request::Parts) -> (http::request::Parts, Option<TraceContext>) {
    let context = black_box(TraceContext::from_headers(black_box(&head.headers)));
    (head, context)
}

#[library_benchmark]
#[bench::a_known_token(setup = World::new)]
fn attestation(world: World) -> (World, Arc<AttestedWorkload>) {
    let workload = black_box(world.workload());
    (world, workload)
}

#[library_benchmark]
#[bench::the_last_of_a_hundred(setup = World::new)]
fn destination(world: World) -> World {
    black_box(world.question());
    world
}

#[library_benchmark]
#[bench::cached(args = (true), setup = deciding)]
#[bench::evaluated(args = (false), setup = deciding)]
fn decision(
    (world, mut cache, workload): (World, DecisionCache, Arc<AttestedWorkload>),
) -> (World, DecisionCache, Grant) {
    let question = world.question();
    let grant = cache.decide(&world.snapshot, &workload, &question).unwrap();
    (world, cache, black_box(grant))
}

#[library_benchmark]
#[bench::of_a_request(setup = recording)]
fn audit_record(
    (directory, audit, writer, record): (PathBuf, Audit, AuditWriter, RequestRecord),
) -> (PathBuf, AuditWriter, RequestRecord) {
    audit.record(black_box(Record::Request(&record))).unwrap();
    (directory, writer, record)
}

#[library_benchmark]
#[bench::bearer(setup = token_response)]
fn token_answer(headers: HeaderMap) -> HeaderMap {
    let body = br#"{"access_token":"2YotnFZFEjr1zCsicMWpAA","token_type":"Bearer","expires_in":600,"scope":"orders.read"}"#;
    black_box(
        parse_token_response(
            StatusCode::OK,
            &headers,
            black_box(body),
            SystemTime::UNIX_EPOCH,
        )
        .unwrap(),
    );
    headers
}

#[library_benchmark]
#[bench::of_a_hundred_destinations(setup = configuration)]
fn configuration_load(directory: PathBuf) -> (PathBuf, Config) {
    let config = black_box(load(&directory));
    (directory, config)
}

#[library_benchmark]
#[bench::of_twenty(setup = World::new)]
fn policy_load(world: World) -> (World, PolicyEngine) {
    let engine = black_box(engine(&world.config));
    (world, engine)
}

library_benchmark_group!(
    name = parts,
    benchmarks = [
        authority,
        path,
        request_head,
        hop_by_hop_fields,
        trace_context,
        attestation,
        destination,
        decision,
        audit_record,
        token_answer,
        configuration_load,
        policy_load
    ]
);

main!(library_benchmark_groups = parts);
