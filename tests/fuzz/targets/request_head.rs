//! A request's head, on the forward proxy, in an intercepted tunnel or on a gateway (the first line says
//! which), through routing, policy, the broker and injection: what leaves has our credential, once, and
//! none of the caller's.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use countersign::clock::{Clock, SystemClock};
use countersign::config::{Config, Destination, Scheme, SigningAlgorithm};
use countersign::credentials::Credentials;
use countersign::dev::{
    AuthorizationServer, AuthorizationServerOptions, CertificateAuthority, Client, ClientCredential,
};
use countersign::inject::{NotInjected, UpstreamRequest, inject, pass};
use countersign::jwt::{SigningKey, VerifyingKey};
use countersign::policy::{
    Action, PolicyEngine, PolicyFile, PolicySnapshot, Revocations, first_permitted, questions,
    route,
};
use countersign::request::{EgressRequest, Reception, Target};
use countersign::routing::{Route, Routes};
use countersign::streams::RequestBody;
use countersign::telemetry::metrics::Metrics;
use countersign_attestors::{AttestedWorkload, AttributeValue, WorkloadFacts};
use http::header::{AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Uri};

const HOST_NAME: &str = "orders.example.com";
const MOST_HEADERS: usize = 100;

/// One that leaves with our credential.
const GOOD: &[u8] = include_bytes!("../seeds/request_head/tunnel");

const CONFIGURATION: &str = r#"
version: 1
listeners:
  - {name: workloads, type: forward_proxy, bind: "127.0.0.1:0"}
attestors: {unix: {}}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    issuer: https://auth.example.com
    client_id: agent
    client_authentication: {method: private_key_jwt, key_file: client.pem, algorithm: ES256}
    scopes: [orders.read]
    ca_file: auth-ca.pem
    connect_to: "{authorization_server}"
destinations:
  - {name: orders, hosts: [orders.example.com], paths: ["/v1/**"], credentials: [{name: orders-api}]}
  - {name: keyed, hosts: [keyed.example.com], scheme: http, credentials: [{name: orders-api, inject: {header: x-api-key, format: raw}}]}
  - {name: public, hosts: [public.example.com], scheme: http}
policies: {directory: policies}
audit: {sinks: [{type: stdout}]}
"#;

const POLICIES: &str = r#"
@id("injects") permit (principal, action == Action::"inject", resource == Credential::"orders-api") when { principal has unix && principal.unix.uid == 990 };
@id("connects") permit (principal, action == Action::"connect", resource == Destination::"public") when { principal has unix && principal.unix.uid == 990 };
"#;

/// The agent's parts between a head and what leaves, with an authorization server that answers them.
struct Agent {
    runtime: tokio::runtime::Runtime,
    _authorization_server: AuthorizationServer,
    credentials: Arc<Credentials>,
    clock: Arc<dyn Clock>,
    config: Config,
    routes: Routes,
    snapshot: Arc<PolicySnapshot>,
    workload: Arc<AttestedWorkload>,
    tunnel: Target,
}

static AGENT: LazyLock<Agent> = LazyLock::new(Agent::start);

impl Agent {
    fn start() -> Self {
        countersign::tls::install_cryptography_provider();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let directory = tempfile::tempdir().expect("a directory");
        let authority = CertificateAuthority::new("servers").expect("an authority");
        let (key, pem) = SigningKey::generate(SigningAlgorithm::Es256).expect("a key");
        let jwk = key.public_jwk().expect("a public key");
        let authorization_server = runtime
            .block_on(AuthorizationServer::start(AuthorizationServerOptions {
                issuer: "https://auth.example.com".to_owned(),
                address: SocketAddr::from(([127, 0, 0, 1], 0)),
                certificate: authority
                    .issue(&["auth.example.com"])
                    .expect("a certificate"),
                clients: vec![Client {
                    client_id: "agent".to_owned(),
                    credential: ClientCredential::Keys(vec![
                        VerifyingKey::from_jwk(&jwk).expect("a public key"),
                    ]),
                    scopes: vec!["orders.read".to_owned()],
                }],
                token_lifetime: Duration::from_secs(24 * 3600),
                default_audience: format!("https://{HOST_NAME}"),
            }))
            .expect("an authorization server");
        let address = authorization_server.address().to_string();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).expect("a file");
            path
        };
        write("auth-ca.pem", authority.pem());
        write("client.pem", &pem);
        std::fs::create_dir(directory.path().join("policies")).expect("a directory");
        let text = CONFIGURATION.replace("{authorization_server}", &address);
        let config = Config::load(&write("agent.yaml", &text)).expect("a good configuration");
        let policies = PolicyFile {
            path: "policies/all.cedar".into(),
            text: POLICIES.to_owned(),
        };
        let declarations = config.attestors.declarations();
        let (engine, _) =
            PolicyEngine::from_files(&config, &declarations, &[policies]).expect("good policies");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let credentials = Credentials::new(
            runtime.handle().clone(),
            Arc::clone(&clock),
            Arc::new(Metrics::new(Arc::clone(&clock))),
            Arc::new(|_| {}),
        );
        credentials.configure(&config, &HashMap::new(), &Arc::default());
        let mut facts = WorkloadFacts::default();
        let unix = [("uid", 990), ("gid", 990), ("pid", 4242)]
            .map(|(name, id)| (name.to_owned(), AttributeValue::Long(id)));
        facts.groups.insert("unix".to_owned(), unix.into());
        let agent = Self {
            runtime,
            _authorization_server: authorization_server,
            credentials,
            clock,
            routes: Routes::new(&config),
            snapshot: PolicySnapshot::new(Arc::new(engine), Revocations::none()),
            workload: Arc::new(AttestedWorkload::described(facts)),
            tunnel: Target::parse(HOST_NAME, Some(443)).expect("a host"),
            config,
        };
        // The key's file is read when the first token is asked for.
        let first = agent.send("GET /v1/orders", &[("host", HOST_NAME)]);
        assert!(
            first.is_some_and(|(_, token)| token.is_some()),
            "no token was obtained"
        );
        agent
    }

    /// A plain request inside the tunnel.
    fn send(&self, line: &str, headers: &[(&'static str, &str)]) -> Option<Sent> {
        let (method, path) = line.split_once(' ')?;
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(RequestBody::Empty).ok()?;
        let reception = Reception::Tunnel {
            scheme: Scheme::Https,
            target: &self.tunnel,
        };
        self.walk(request, reception).ok().flatten()
    }

    /// What becomes of a request: `None` where policy or configuration do not let it leave.
    fn walk(
        &self,
        request: Request<RequestBody>,
        reception: Reception<'_>,
    ) -> Result<Option<Sent>, NotInjected> {
        let (head, body) = request.into_parts();
        let Ok((asked, _)) = EgressRequest::parse(&head, reception) else {
            return Ok(None);
        };
        let asked = Arc::new(asked);
        let Route::Destination(destination) = route(&self.routes, &asked) else {
            return Ok(None);
        };
        is_covered(destination, &asked, &head.uri);
        let wall = SystemTime::now();
        let decide = |question: &_| self.snapshot.decide(&self.workload, question);
        let questions = questions(destination, Some(&asked), wall);
        let Ok((grant, _, _)) = first_permitted(questions, decide) else {
            return Ok(None);
        };
        let request = Box::new(Request::from_parts(head, body));
        if grant.action() == Action::Connect {
            let sent = pass(&grant, request, &self.snapshot, wall)?;
            return Ok(Some((sent, None)));
        }
        let obtained = self.runtime.block_on(self.credentials.obtain(grant));
        let credential = obtained.expect("the authorization server answers");
        let token = credential.header_value().clone();
        let monotonic = self.clock.monotonic();
        let sent = inject(
            &credential,
            &asked,
            request,
            &self.snapshot,
            monotonic,
            wall,
        )?;
        let used = &destination.credentials[0].inject.header;
        Ok(Some((sent, Some((used.clone(), token)))))
    }
}

/// A request that may leave, and the header in which our credential must stand.
type Sent = (UpstreamRequest, Option<(HeaderName, HeaderValue)>);

pub fn run(input: &[u8]) {
    let agent = &*AGENT;
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        return;
    };
    let reception = match &input[..end] {
        b"proxy" => Reception::Proxy,
        b"tunnel" => Reception::Tunnel {
            scheme: Scheme::Https,
            target: &agent.tunnel,
        },
        b"gateway" => Reception::Gateway(&agent.config.destinations[0]),
        _ => return,
    };
    let Some(request) = parse(&input[end + 1..]) else {
        return;
    };
    let before = request.headers().clone();
    match agent.walk(request, reception) {
        Ok(None) => assert_ne!(input, GOOD),
        Ok(Some((sent, injected))) => check(&before, &sent, injected.as_ref()),
        Err(problem) => panic!("granted, and not sent: {problem:?}"),
    }
}

/// As hyper reads a head.
fn parse(input: &[u8]) -> Option<Request<RequestBody>> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    if !head.parse(input).ok()?.is_complete() {
        return None;
    }
    let mut request = Request::new(RequestBody::Empty);
    *request.method_mut() = Method::from_bytes(head.method?.as_bytes()).ok()?;
    *request.uri_mut() = Uri::try_from(head.path?).ok()?;
    for header in head.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes()).ok()?;
        request
            .headers_mut()
            .append(name, HeaderValue::from_bytes(header.value).ok()?);
    }
    Some(request)
}

/// A destination is one of scheme, host, port and path, all of them.
fn is_covered(destination: &Destination, asked: &EgressRequest, uri: &Uri) {
    assert_eq!(asked.scheme, destination.scheme);
    assert!(
        destination
            .hosts
            .iter()
            .any(|host| host == asked.target.host())
    );
    assert!(destination.ports.contains(&asked.target.port()));
    if &*destination.name == "orders" && asked.method != Method::CONNECT {
        assert!(
            uri.path().starts_with("/v1/") || uri.path().contains('%'),
            "{uri}"
        );
        assert!(!uri.path().ends_with("/../.."), "{uri}");
    }
}

/// RFC 9110 sections 7.6.1 and 11.7: nothing for this hop alone, no credential but ours.
fn check(before: &HeaderMap, sent: &UpstreamRequest, injected: Option<&(HeaderName, HeaderValue)>) {
    let after = sent.headers();
    for name in [
        "proxy-authorization",
        "proxy-connection",
        "proxy-authenticate",
        "keep-alive",
        "transfer-encoding",
        "http2-settings",
    ] {
        assert!(!after.contains_key(name), "`{name}` leaves");
    }
    for option in before.get_all(CONNECTION) {
        for option in option.as_bytes().split(|byte| *byte == b',') {
            let Ok(name) = HeaderName::from_bytes(option.trim_ascii()) else {
                continue;
            };
            let is_ours = injected.is_some_and(|(header, _)| *header == name);
            let stays = [&HOST, &HeaderName::from_static("upgrade"), &CONNECTION].contains(&&name)
                || name == "te";
            assert!(
                is_ours || stays || !after.contains_key(&name),
                "`{name}` leaves"
            );
        }
    }
    assert!(after.get_all(HOST).iter().eq(before.get_all(HOST).iter()));
    assert!(
        !sent.is_upgrade()
            || after
                .get(CONNECTION)
                .is_some_and(|value| value == "upgrade")
    );
    match injected {
        Some((header, token)) => {
            let values: Vec<&HeaderValue> = after.get_all(header).iter().collect();
            assert_eq!(values, [token], "two credentials, or none of ours");
            assert!(*header == AUTHORIZATION || !after.contains_key(AUTHORIZATION));
        }
        // The caller's own may pass where none of ours does.
        None => assert!(
            after
                .get_all(AUTHORIZATION)
                .iter()
                .all(|value| { before.get_all(AUTHORIZATION).iter().any(|own| own == value) })
        ),
    }
}
