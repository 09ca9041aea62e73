//! The broker against a real authorization server on a real socket, well and failing.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "the support modules serve other tests too"
)]

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use countersign_attestors::{AttributeValue, PresentedToken, SystemClock, WorkloadFacts};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use url::Url;

use self::faults::fault_table;
use self::faulty_authorization_server::{Fault, FaultyAuthorizationServer};
use super::*;
use crate::config::{
    AuthorizationServer as ServerSetting, ClientAuthentication, ExactUrl, InjectionFormat,
    OauthClientCredentials, SigningAlgorithm, Template, TemplatePart, TokenSource,
};
use crate::dev::authorization_server::{AuthorizationServerState, Received};
use crate::dev::{
    AuthorizationServerOptions, CertificateAuthority, Client, ClientCredential, OidcIssuer,
};
use crate::jwt::{SigningKey, VerifyingKey, check_times, verify};
use crate::snapshot::read_roots;

#[path = "../../tests/support/faults.rs"]
mod faults;
#[path = "../../tests/support/faulty_authorization_server.rs"]
mod faulty_authorization_server;

const ISSUER: &str = "https://auth.countersign.test";
const LONG: Duration = Duration::from_secs(600);

/// A clock whose monotonic time stands still unless it is moved, while the wall clock runs on.
#[derive(Debug, Default)]
struct MovedClock {
    milliseconds: AtomicU64,
    /// How often its monotonic time was read.
    reads: AtomicUsize,
}

impl MovedClock {
    fn advance(&self, by: Duration) {
        self.milliseconds
            .fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::SeqCst);
    }
}

impl Clock for MovedClock {
    fn monotonic(&self) -> Duration {
        self.reads.fetch_add(1, Ordering::SeqCst);
        Duration::from_millis(self.milliseconds.load(Ordering::SeqCst))
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// An authorization server, its clients' keys, and a broker that uses it.
struct Bench {
    directory: tempfile::TempDir,
    authority: CertificateAuthority,
    server: FaultyAuthorizationServer,
    state: Arc<AuthorizationServerState>,
    clock: Arc<MovedClock>,
    credentials: Arc<Credentials>,
}

impl Bench {
    async fn start() -> Self {
        Self::with_lifetime(LONG).await
    }

    /// With a short `timeout` where only that ends the fault.
    async fn start_for(fault: &Fault) -> Self {
        let bench = Self::start().await;
        if matches!(fault, Fault::Hang | Fault::Drip) {
            bench.configure_hasty();
        }
        bench
    }

    fn configure_hasty(&self) {
        let settings = OauthClientCredentials {
            timeout: seconds(3),
            ..self.settings()
        };
        self.configure(&[self.credential("orders", settings)]);
    }

    async fn with_lifetime(lifetime: Duration) -> Self {
        let clock = Arc::new(MovedClock::default());
        // Away from zero, where too early and never look alike.
        clock.advance(Duration::from_secs(1000));
        Self::with_clock(lifetime, Arc::clone(&clock) as Arc<dyn Clock>, clock).await
    }

    async fn with_clock(lifetime: Duration, clock: Arc<dyn Clock>, moved: Arc<MovedClock>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = CertificateAuthority::new("authorization server").unwrap();
        std::fs::write(directory.path().join("ca.pem"), authority.pem()).unwrap();
        let (key, pem) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
        std::fs::write(directory.path().join("client.pem"), pem.as_bytes()).unwrap();
        let (state, server) = authorization_server(&authority, ISSUER, lifetime).await;
        state.register(client("node-agent", &key));
        let credentials = broker(clock);
        let bench = Self {
            directory,
            authority,
            server,
            state,
            clock: moved,
            credentials,
        };
        bench.configure(&[bench.credential("orders", bench.settings())]);
        bench
    }

    fn configure(&self, credentials: &[Arc<CredentialConfig>]) {
        self.credentials
            .configure_credentials(credentials, &self.roots(), &Arc::default());
        self.credentials.retire_others(credentials);
    }

    fn roots(&self) -> Roots {
        read_roots([&self.path("ca.pem")])
    }

    fn credential(&self, name: &str, settings: OauthClientCredentials) -> Arc<CredentialConfig> {
        Arc::new(CredentialConfig {
            name: name.into(),
            groups: Vec::new(),
            environment: None,
            source: TokenSource::OauthClientCredentials(Box::new(settings)),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Settings of a client that CI jobs are, each by its own token.
    fn settings_of_jobs(&self) -> OauthClientCredentials {
        OauthClientCredentials {
            client_id: literal("ci-jobs"),
            client_authentication: ClientAuthentication::WorkloadAssertion {
                issuer: Some("ci".to_owned()),
            },
            ..self.settings()
        }
    }

    fn settings(&self) -> OauthClientCredentials {
        OauthClientCredentials {
            server: ServerSetting::Issuer(ExactUrl::parse(ISSUER).unwrap()),
            client_id: literal("node-agent"),
            client_authentication: ClientAuthentication::PrivateKeyJwt {
                key_file: self.path("client.pem"),
                algorithm: SigningAlgorithm::Es256,
                key_id: None,
                assertion_type_header: None,
                audience: ISSUER.to_owned(),
            },
            scopes: ["orders.read".to_owned()].into(),
            resources: Vec::new(),
            audience: None,
            parameters: BTreeMap::new(),
            send_client_id: false,
            assertion_claims: BTreeMap::new(),
            ca_file: Some(self.path("ca.pem")),
            timeout: seconds(20),
            connect_to: Some(self.server.address()),
            outbound_proxy: None,
            allow_addresses: Vec::new(),
        }
    }

    fn now(&self) -> Duration {
        self.clock.monotonic()
    }

    async fn token(&self) -> Result<Arc<Token>, Refusal> {
        self.token_for(&WorkloadFacts::default(), None).await
    }

    async fn token_of(&self, credential: &str) -> Result<Arc<Token>, Refusal> {
        let scopes = ["orders.read".to_owned()];
        let nobody = WorkloadFacts::default();
        let ask = Ask {
            credential,
            ..orders(&scopes, &nobody)
        };
        let obtained = self.credentials.obtain_token(&ask).await;
        Ok(obtained.map_err(|failed| failed.refusal)?.0)
    }

    /// With an audience, by which it differs from others; `None` where it was handed out.
    async fn token_with(
        &self,
        audience: &str,
        purpose: Purpose,
    ) -> Result<Option<Arc<Token>>, Refusal> {
        let scopes = ["orders.read".to_owned()];
        let nobody = WorkloadFacts::default();
        let ask = Ask {
            purpose,
            audience: Some(audience),
            ..orders(&scopes, &nobody)
        };
        match purpose {
            Purpose::Issue => self.issue(&ask).await.map(|_| None),
            Purpose::Inject => match self.credentials.obtain_token(&ask).await {
                Ok((token, _)) => Ok(Some(token)),
                Err(failed) => Err(failed.refusal),
            },
        }
    }

    async fn token_for(
        &self,
        facts: &WorkloadFacts,
        presented: Option<&PresentedToken>,
    ) -> Result<Arc<Token>, Refusal> {
        let scopes = ["orders.read".to_owned()];
        let ask = Ask {
            presented,
            ..orders(&scopes, facts)
        };
        let obtained = self.credentials.obtain_token(&ask).await;
        let (token, _) = obtained.map_err(|failed| failed.refusal)?;
        Ok(token)
    }

    async fn issue(&self, ask: &Ask<'_>) -> Result<MintedToken, Refusal> {
        self.credentials.issue_token(ask, &identity("one")).await
    }

    async fn revoke(&self, revoked: &RevokedTokens) -> Vec<RevokedToken> {
        self.credentials.revoke_upstream(revoked, seconds(30)).await
    }

    fn requests(&self) -> usize {
        self.state.token_requests()
    }

    fn last_received(&self) -> Received {
        self.state.received().pop().unwrap()
    }

    /// Waits until `requests` token requests were made, in real time.
    async fn until_requests(&self, requests: usize) {
        self.until(|| self.requests() >= requests && self.is_idle())
            .await;
    }

    /// Waits in real time.
    async fn until(&self, holds: impl Fn() -> bool) {
        for _ in 0..4000 {
            if holds() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} token requests were made", self.requests());
    }

    fn is_idle(&self) -> bool {
        self.credentials
            .all_slots()
            .iter()
            .all(|slot| !slot.flight.is_in_the_air())
    }
}

fn identity(name: &str) -> IsolationKey {
    IsolationKey(name.into())
}

fn broker(clock: Arc<dyn Clock>) -> Arc<Credentials> {
    Credentials::new(
        tokio::runtime::Handle::current(),
        Arc::clone(&clock),
        Arc::new(Metrics::new(clock)),
        Arc::new(|_| {}),
    )
}

async fn authorization_server(
    authority: &CertificateAuthority,
    issuer: &str,
    lifetime: Duration,
) -> (Arc<AuthorizationServerState>, FaultyAuthorizationServer) {
    let host = Url::parse(issuer).unwrap().host_str().unwrap().to_owned();
    let certificate = authority.issue(&[&host]).unwrap();
    let options = AuthorizationServerOptions {
        issuer: issuer.to_owned(),
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        certificate: certificate.clone(),
        clients: Vec::new(),
        token_lifetime: lifetime,
        default_audience: "https://orders.countersign.test".to_owned(),
    };
    let state = Arc::new(AuthorizationServerState::new(options).unwrap());
    let server = FaultyAuthorizationServer::start(Arc::clone(&state), certificate).await;
    (state, server)
}

fn for_audience(mut settings: OauthClientCredentials, whom: &str) -> OauthClientCredentials {
    if let ClientAuthentication::PrivateKeyJwt { audience, .. } =
        &mut settings.client_authentication
    {
        whom.clone_into(audience);
    }
    settings
}

fn client(client_id: &str, key: &SigningKey) -> Client {
    let key = VerifyingKey::from_jwk(&key.public_jwk().unwrap()).unwrap();
    Client {
        client_id: client_id.to_owned(),
        credential: ClientCredential::Keys(vec![key]),
        scopes: ["orders.read".to_owned()].into(),
    }
}

fn literal(text: &str) -> Template {
    Template {
        parts: vec![TemplatePart::Literal(text.to_owned())],
    }
}

fn attribute(group: &str, name: &str) -> TemplatePart {
    TemplatePart::Attribute {
        group: group.to_owned(),
        name: name.to_owned(),
    }
}

fn facts(values: &[(&str, &str, AttributeValue)]) -> WorkloadFacts {
    let mut facts = WorkloadFacts::default();
    for (group, name, value) in values {
        facts
            .groups
            .entry((*group).to_owned())
            .or_default()
            .insert((*name).to_owned(), value.clone());
    }
    facts
}

fn orders<'a>(scopes: &'a [String], facts: &'a WorkloadFacts) -> Ask<'a> {
    Ask {
        purpose: Purpose::Inject,
        credential: "orders",
        scopes,
        audience: None,
        max_lifetime: None,
        facts,
        presented: None,
        presented_until: None,
    }
}

/// The header and claims of a JWT, unverified.
fn opened(token: &str) -> (Value, Value) {
    let part = |index: usize| {
        let text = token.split('.').nth(index).unwrap();
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap()
    };
    (part(0), part(1))
}

fn jti_of(token: &Token) -> String {
    let (_, claims) = opened(token.secret().expose_secret());
    claims["jti"].as_str().unwrap().to_owned()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assertion_is_for_the_issuer_alone_and_once() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    assert_eq!(
        token.header(InjectionFormat::Bearer).to_str().unwrap(),
        format!(
            "Bearer {}",
            token.header(InjectionFormat::Raw).to_str().unwrap()
        )
    );
    assert!(token.header(InjectionFormat::Bearer).is_sensitive());
    assert!(token.header(InjectionFormat::Raw).is_sensitive());
    assert_eq!(bench.state.issued()[0].jti, jti_of(&token));
    assert_eq!(bench.state.issued()[0].subject, "node-agent");
    assert_eq!(**token.scopes().unwrap(), ["orders.read".to_owned()]);

    let received = bench.last_received();
    assert_eq!(received.values("grant_type"), ["client_credentials"]);
    assert_eq!(received.values("scope"), ["orders.read"]);
    assert_eq!(
        received.values("client_assertion_type"),
        ["urn:ietf:params:oauth:client-assertion-type:jwt-bearer"]
    );
    assert!(received.values("client_id").is_empty());
    assert!(received.values("resource").is_empty());
    assert_eq!(received.authorization, None);
    let assertions = received.values("client_assertion");
    assert_eq!(assertions.len(), 1);
    let (header, claims) = opened(assertions[0]);
    assert_eq!(header["typ"], "client-authentication+jwt");
    assert_eq!(header["alg"], "ES256");
    assert!(header["kid"].is_string());
    assert_eq!(claims["aud"], ISSUER);
    assert_eq!(claims["iss"], "node-agent");
    assert_eq!(claims["sub"], "node-agent");
    let life = claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap();
    assert!((1..=60).contains(&life));

    // From the cache: nothing is asked.
    for _ in 0..10 {
        assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &token));
    }
    assert_eq!(bench.requests(), 1);
    assert_eq!(bench.server.metadata_requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_algorithm_and_every_parameter() {
    let bench = Bench::start().await;
    for algorithm in [
        SigningAlgorithm::Es256,
        SigningAlgorithm::EdDsa,
        SigningAlgorithm::Ps256,
        SigningAlgorithm::Rs256,
    ] {
        let (key, pem) = SigningKey::generate(algorithm).unwrap();
        let key = key.with_key_id("chosen");
        bench.state.register(client("other-agent", &key));
        let path = bench.path(algorithm.as_str());
        std::fs::write(&path, pem.as_bytes()).unwrap();
        let settings = OauthClientCredentials {
            client_id: literal("other-agent"),
            client_authentication: ClientAuthentication::PrivateKeyJwt {
                key_file: path,
                algorithm,
                key_id: Some("chosen".to_owned()),
                assertion_type_header: Some("JWT".to_owned()),
                audience: ISSUER.to_owned(),
            },
            resources: vec![
                ExactUrl::parse("https://a.test").unwrap(),
                ExactUrl::parse("https://b.test/x").unwrap(),
            ],
            audience: Some("urn:c".to_owned()),
            parameters: [("tenant".to_owned(), "a&b=c d".to_owned())].into(),
            send_client_id: true,
            assertion_claims: [
                (
                    "uid".to_owned(),
                    Template {
                        parts: vec![attribute("unix", "uid")],
                    },
                ),
                ("iss".to_owned(), literal("forged")),
            ]
            .into(),
            ..bench.settings()
        };
        bench.configure(&[bench.credential("orders", settings)]);
        let caller = facts(&[("unix", "uid", AttributeValue::Long(990))]);
        bench.token_for(&caller, None).await.unwrap();
        let received = bench.last_received();
        assert_eq!(
            received.values("resource"),
            ["https://a.test", "https://b.test/x"]
        );
        assert_eq!(received.values("audience"), ["urn:c"]);
        assert_eq!(received.values("tenant"), ["a&b=c d"]);
        assert_eq!(received.values("client_id"), ["other-agent"]);
        let (header, claims) = opened(received.values("client_assertion")[0]);
        assert_eq!(header["alg"], algorithm.as_str());
        assert_eq!(header["kid"], "chosen");
        assert_eq!(header["typ"], "JWT");
        assert_eq!(claims["uid"], 990);
        assert_eq!(claims["iss"], "other-agent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_form_encoded_before_it_is_joined() {
    let bench = Bench::start().await;
    let (client_id, secret) = ("a:b c+d%é", "p:w +%/=é&\"\\");
    bench.state.register(Client {
        client_id: client_id.to_owned(),
        credential: ClientCredential::Secret(secret.to_owned()),
        scopes: ["orders.read".to_owned()].into(),
    });
    std::fs::write(bench.path("secret"), format!("{secret}\n")).unwrap();
    let settings = OauthClientCredentials {
        client_id: literal(client_id),
        client_authentication: ClientAuthentication::ClientSecretBasic {
            secret_file: bench.path("secret"),
        },
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    bench.token().await.unwrap();
    let received = bench.last_received();
    assert!(received.authorization.unwrap().starts_with("Basic "));
    assert!(
        received
            .form
            .iter()
            .all(|(name, _)| !name.starts_with("client"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workloads_own_token_is_forwarded_as_it_is_and_never_shared() {
    let bench = Bench::start().await;
    let certificate = bench.authority.issue(&["ci.countersign.test"]).unwrap();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let ci = OidcIssuer::start("https://ci.countersign.test", any_port, &certificate)
        .await
        .unwrap();
    bench.state.register(Client {
        client_id: "ci-jobs".to_owned(),
        credential: ClientCredential::Federated {
            issuer: ci.issuer().to_owned(),
            keys: ci.verifying_keys(),
        },
        scopes: ["orders.read".to_owned()].into(),
    });
    let settings = bench.settings_of_jobs();
    bench.configure(&[bench.credential("orders", settings)]);
    let mint = || {
        let token = ci.mint("repo:o/r:ref:refs/heads/main", ISSUER, LONG, &json!({}));
        PresentedToken::new(token.unwrap())
    };
    let caller = facts(&[("ci", "sub", AttributeValue::String("repo:o/r".to_owned()))]);

    // Two jobs with one `sub`: two tokens.
    let (first, second) = (mint(), mint());
    let token = bench.token_for(&caller, Some(&first)).await.unwrap();
    assert_eq!(
        bench.last_received().values("client_assertion"),
        [first.expose()]
    );
    let other = bench.token_for(&caller, Some(&second)).await.unwrap();
    assert_eq!(
        bench.last_received().values("client_assertion"),
        [second.expose()]
    );
    assert_ne!(jti_of(&token), jti_of(&other));
    let again = bench.token_for(&caller, Some(&first)).await.unwrap();
    assert!(Arc::ptr_eq(&again, &token));
    assert_eq!(bench.requests(), 2);
    // The server names the workload.
    assert_eq!(
        bench.state.issued()[0].subject,
        "repo:o/r:ref:refs/heads/main"
    );

    // Without a token, or with one of another issuer, nothing is asked.
    let refusal = bench.token_for(&caller, None).await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::AttributeMissing);
    let other_issuer = facts(&[("staging", "sub", AttributeValue::String("x".to_owned()))]);
    let refusal = bench
        .token_for(&other_issuer, Some(&first))
        .await
        .unwrap_err();
    assert_eq!(refusal.code, RefusalCode::AttributeMissing);
    assert_eq!(bench.requests(), 2);

    // A token that the server refuses cannot be made anew here: one request.
    let forged = PresentedToken::new(format!("{}x", first.expose()));
    let refusal = bench.token_for(&caller, Some(&forged)).await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::InvalidClient);
    assert_eq!(bench.requests(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_do_not_share_tokens_where_the_client_differs() {
    let bench = Bench::start().await;
    for uid in [1, 2] {
        let (key, pem) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
        // One key file; both clients trust it.
        if uid == 1 {
            std::fs::write(bench.path("shared.pem"), pem.as_bytes()).unwrap();
        }
        drop(key);
    }
    let pem = std::fs::read(bench.path("shared.pem")).unwrap();
    let key = SigningKey::parse(&pem, SigningAlgorithm::Es256).unwrap();
    bench.state.register(client("uid-1", &key));
    bench.state.register(client("uid-2", &key));
    let settings = OauthClientCredentials {
        client_id: Template {
            parts: vec![
                TemplatePart::Literal("uid-".to_owned()),
                attribute("unix", "uid"),
            ],
        },
        client_authentication: ClientAuthentication::PrivateKeyJwt {
            key_file: bench.path("shared.pem"),
            algorithm: SigningAlgorithm::Es256,
            key_id: None,
            assertion_type_header: None,
            audience: ISSUER.to_owned(),
        },
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    let of = |uid| facts(&[("unix", "uid", AttributeValue::Long(uid))]);
    let mut tokens = HashSet::new();
    for _ in 0..3 {
        for uid in [1, 2] {
            let token = bench.token_for(&of(uid), None).await.unwrap();
            let (_, claims) = opened(token.secret().expose_secret());
            assert_eq!(claims["client_id"], format!("uid-{uid}"));
            tokens.insert(jti_of(&token));
        }
    }
    assert_eq!(tokens.len(), 2);
    assert_eq!(bench.requests(), 2);
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::AttributeMissing);
    assert_eq!(
        bench
            .credentials
            .list()
            .iter()
            .map(|status| status.identity.as_str())
            .collect::<Vec<_>>(),
        ["unix.uid=1", "unix.uid=2"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_cold_callers_make_one_request() {
    let bench = Bench::start().await;
    let all = || async {
        let callers = (0..10_000).map(|_| bench.token());
        futures_util::future::join_all(callers).await
    };
    // A failed flight is shared by those who waited.
    bench.server.set(Fault::Status(500, None)).await;
    let refused = all().await;
    assert_eq!(bench.requests(), 1);
    for outcome in refused {
        let code = outcome.unwrap_err().code;
        assert!(matches!(
            code,
            RefusalCode::TokenServerError | RefusalCode::TokenBackoff
        ));
    }
    bench.server.set(Fault::None).await;
    bench.clock.advance(seconds(6));
    let tokens = all().await;
    assert_eq!(bench.requests(), 2);
    let first = tokens[0].as_ref().unwrap();
    for token in &tokens {
        assert!(Arc::ptr_eq(token.as_ref().unwrap(), first));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_on_other_runtimes_share_a_flight() {
    let bench = Bench::start().await;
    let credentials = &bench.credentials;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let worker = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    let scopes = ["orders.read".to_owned()];
                    let facts = WorkloadFacts::default();
                    let ask = orders(&scopes, &facts);
                    worker.block_on(credentials.obtain_token(&ask)).map(|_| ())
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap().unwrap();
        }
    });
    assert_eq!(bench.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_in_use_is_renewed_between_50_and_55_percent_of_its_life() {
    let bench = Bench::start().await;
    let first = bench.token().await.unwrap();
    let started = bench.now();
    let mut renewed_at = None;
    for _ in 0..120 {
        bench.clock.advance(seconds(3));
        let token = bench.token().await.unwrap();
        bench.until_requests(1).await;
        if bench.requests() > 1 && renewed_at.is_none() {
            renewed_at = Some(bench.now() - started);
        }
        if !Arc::ptr_eq(&token, &first) {
            break;
        }
    }
    let renewed_at = renewed_at.unwrap();
    assert!(renewed_at >= LONG.mul_f64(0.50), "{renewed_at:?}");
    assert!(
        renewed_at <= LONG.mul_f64(0.55) + seconds(3),
        "{renewed_at:?}"
    );
    assert_eq!(bench.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_used_lately_is_renewed_by_itself() {
    // On the real clock: renewal is due at 4.0 to 4.4 s of 8 s, of which the token is used for 7.2 s.
    let with_a_token = async || {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let bench = Bench::with_clock(seconds(8), clock, Arc::default()).await;
        bench.token().await.unwrap();
        bench
    };
    let idle = async {
        let bench = with_a_token().await;
        tokio::time::sleep(seconds(5)).await;
        assert_eq!(bench.requests(), 1, "an idle token was renewed");
    };
    let used = async {
        let bench = with_a_token().await;
        let slot = bench.credentials.all_slots().remove(0);
        let obtained_at = slot.last_used();
        tokio::time::sleep(Duration::from_millis(100)).await;
        bench.token().await.unwrap();
        assert!(slot.last_used() > obtained_at);
        bench
            .until(|| {
                // As if it were used all the time, but by nobody who would renew it.
                slot.touch(bench.credentials.clock.monotonic());
                bench.requests() >= 2
            })
            .await;
    };
    tokio::join!(idle, used);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_used_until_ten_seconds_before_its_expiry_and_no_longer() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    bench.server.set(Fault::Refused).await;
    bench.clock.advance(Duration::from_millis(589_999));
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &token));
    bench.until_requests(1).await;
    bench.clock.advance(Duration::from_millis(1));
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::CredentialExpired);
    assert!(refusal.retry_after >= Some(seconds(1)));
    assert!(refusal.retry_after <= Some(seconds(5)));
    // The margin of short lives is a tenth.
    let short = Bench::with_lifetime(seconds(2)).await;
    short.token().await.unwrap();
    short.server.set(Fault::Refused).await;
    short.clock.advance(Duration::from_millis(1799));
    assert!(short.token().await.is_ok());
    short.clock.advance(Duration::from_millis(1));
    assert!(short.token().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_renewal_is_tried_again_within_five_seconds_and_serves_meanwhile() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    bench.server.set(Fault::Status(500, None)).await;
    bench.clock.advance(seconds(340));
    for attempt in 2..6 {
        assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &token));
        bench.until_requests(attempt).await;
        // Within the wait, nothing is asked.
        assert!(bench.token().await.is_ok());
        bench.until_requests(attempt).await;
        assert_eq!(bench.requests(), attempt);
        if attempt == 5 {
            // Before the wait is over: then the renewal may begin by itself.
            bench.server.set(Fault::None).await;
        }
        bench.clock.advance(seconds(5));
    }
    bench.token().await.unwrap();
    bench.until_requests(6).await;
    assert!(!Arc::ptr_eq(&bench.token().await.unwrap(), &token));
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_obeyed_in_both_forms() {
    const HOUR: i64 = 3600;
    // In seconds, and as a date of a server whose clock is so far ahead of ours.
    for ahead in [None, Some(0), Some(-30), Some(-HOUR), Some(HOUR)] {
        let bench = Bench::start().await;
        let retry_after = match ahead {
            None => "40".to_owned(),
            Some(ahead) => {
                bench.server.set_date_offset(ahead);
                // Some more: the date is cut to whole seconds, and time passes until it is read.
                let its_time = SystemTime::now() + seconds(63 + 2 * 3600);
                let to_its_time = u64::try_from(2 * HOUR - ahead).unwrap();
                httpdate::fmt_http_date(its_time - seconds(to_its_time))
            }
        };
        bench
            .server
            .set(Fault::Status(429, Some(retry_after)))
            .await;
        let refusal = bench.token().await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TokenServerThrottled);
        assert!(refusal.retry_after >= Some(seconds(39)), "{refusal:?}");
        assert!(refusal.retry_after <= Some(seconds(68)), "{refusal:?}");
        bench.server.set(Fault::None).await;
        bench.clock.advance(Duration::from_millis(38_900));
        let refusal = bench.token().await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TokenBackoff);
        assert_eq!(bench.requests(), 1);
        bench.clock.advance(seconds(30));
        bench.token().await.unwrap();
        assert_eq!(bench.requests(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_something_else_of_the_credential_waits_as_long() {
    let bench = Bench::start().await;
    let held = bench.token_with("held", Purpose::Inject).await.unwrap();
    let again = Some("60".to_owned());
    bench.server.set(Fault::Status(429, again)).await;
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenServerThrottled);
    bench.server.set(Fault::None).await;
    for at in [0, 59] {
        bench.clock.advance(seconds(at));
        for purpose in [Purpose::Inject, Purpose::Issue] {
            let refusal = bench.token_with("other", purpose).await.unwrap_err();
            assert_eq!(refusal.code, RefusalCode::TokenBackoff);
            let wait = seconds(60 - at)..=seconds(62 - at);
            assert!(wait.contains(&refusal.retry_after.unwrap()), "{refusal:?}");
        }
    }
    let same = bench.token_with("held", Purpose::Inject).await.unwrap();
    assert!(Arc::ptr_eq(&same.unwrap(), &held.unwrap()));
    assert_eq!(bench.requests(), 2);
    bench.clock.advance(seconds(2));
    for purpose in [Purpose::Inject, Purpose::Issue] {
        bench.token_with("other", purpose).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_denies_one_job_holds_for_no_other_and_its_own_trouble_for_all() {
    let bench = Bench::start().await;
    let settings = bench.settings_of_jobs();
    bench.configure(&[bench.credential("orders", settings)]);
    let caller = facts(&[("ci", "sub", AttributeValue::String("repo:o/r".to_owned()))]);
    let job = async |number: usize| {
        let presented = PresentedToken::new(format!("job.{number}.token"));
        let refused = bench.token_for(&caller, Some(&presented)).await;
        refused.unwrap_err().code
    };
    bench.server.set(Fault::Error(401, "invalid_client")).await;
    for number in 0..10 {
        assert_eq!(job(number).await, RefusalCode::InvalidClient);
        assert_eq!(bench.requests(), number + 1);
    }
    let again = Some("60".to_owned());
    bench.server.set(Fault::Status(429, again.clone())).await;
    for number in 10..20 {
        assert_eq!(job(number).await, RefusalCode::TokenServerThrottled);
        assert_eq!(job(number).await, RefusalCode::TokenBackoff);
        assert_eq!(bench.requests(), number + 1);
    }
    bench.server.set(Fault::Status(503, again)).await;
    assert_eq!(job(20).await, RefusalCode::TokenServerError);
    for number in 21..200 {
        assert_eq!(job(number).await, RefusalCode::TokenBackoff);
    }
    assert_eq!(bench.requests(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_asks_of_one_workloads_client_keeps_no_other_from_its_token() {
    let bench = Bench::start().await;
    let settings = OauthClientCredentials {
        client_id: Template {
            parts: vec![attribute("unix", "uid")],
        },
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    let pem = std::fs::read(bench.path("client.pem")).unwrap();
    let key = SigningKey::parse(&pem, SigningAlgorithm::Es256).unwrap();
    bench.state.register(client("2", &key));
    let workload = |uid| facts(&[("unix", "uid", AttributeValue::Long(uid))]);
    let again = Some("300".to_owned());
    bench.server.set(Fault::Status(429, again)).await;
    let refusal = bench.token_for(&workload(1), None).await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenServerThrottled);
    bench.server.set(Fault::None).await;
    bench.token_for(&workload(2), None).await.unwrap();
    let refusal = bench.token_for(&workload(1), None).await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenBackoff);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_client_is_refused_for_all_who_share_it() {
    let bench = Bench::start().await;
    bench.server.set(Fault::Error(401, "invalid_client")).await;
    for held in [0, 29] {
        bench.clock.advance(seconds(held));
        for audience in ["one", "other"] {
            for purpose in [Purpose::Inject, Purpose::Issue] {
                let refusal = bench.token_with(audience, purpose).await.unwrap_err();
                assert_eq!(refusal.code, RefusalCode::InvalidClient);
            }
        }
        assert_eq!(bench.requests(), 2);
    }
    bench.server.set(Fault::None).await;
    bench.clock.advance(seconds(1));
    bench.token_with("other", Purpose::Inject).await.unwrap();

    // A client of each workload's own.
    let settings = OauthClientCredentials {
        client_id: Template {
            parts: vec![attribute("unix", "uid")],
        },
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    bench.server.set(Fault::Error(401, "invalid_client")).await;
    let before = bench.requests();
    for uid in 1..=2 {
        let caller = facts(&[("unix", "uid", AttributeValue::Long(uid))]);
        let refusal = bench.token_for(&caller, None).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::InvalidClient);
        assert_eq!(bench.requests(), before + 2 * usize::try_from(uid).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_asked_for_no_earlier_than_its_server_says() {
    let bench = Bench::start().await;
    bench.configure(&[]);
    bench.configure(&[
        bench.credential("orders", bench.settings()),
        bench.credential("other", bench.settings()),
    ]);
    bench.server.let_metadata_fail();
    let again = Some("60".to_owned());
    bench.server.set(Fault::Status(503, again)).await;
    bench.token().await.unwrap_err();
    bench.server.set(Fault::None).await;
    for waited in [0, 59] {
        bench.clock.advance(seconds(waited));
        let refusal = bench.token_of("other").await.unwrap_err();
        assert!(refusal.retry_after >= Some(seconds(60 - waited)));
        assert!(refusal.retry_after <= Some(seconds(62)));
    }
    assert_eq!(bench.server.metadata_requests(), 1);
    bench.clock.advance(seconds(3));
    bench.token().await.unwrap();
    bench.token_of("other").await.unwrap();
    assert_eq!(bench.server.metadata_requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_lets_metadata_that_failed_be_asked_for_again() {
    let bench = Bench::start().await;
    bench.server.let_metadata_fail();
    let again = Some("60".to_owned());
    bench.server.set(Fault::Status(503, again)).await;
    bench.token().await.unwrap_err();
    bench.server.set(Fault::None).await;
    bench.configure(&[bench.credential("orders", bench.settings())]);
    bench.token().await.unwrap();
    assert_eq!(bench.server.metadata_requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_renewed_by_itself_once_the_server_may_be_asked_again() {
    // Long enough to be usable still, and short enough not to wait for long.
    let bench = Bench::with_lifetime(seconds(40)).await;
    bench.token().await.unwrap();
    bench.clock.advance(seconds(23));
    let again = Some("1".to_owned());
    bench.server.set(Fault::Status(429, again)).await;
    let refused = bench.token_with("other", Purpose::Inject).await;
    refused.unwrap_err();
    bench.server.set(Fault::None).await;
    bench.token().await.unwrap();
    let slots = bench.credentials.all_slots();
    let holds_one = |slot: &&Arc<Slot>| slot.flight.token().is_some();
    let slot = slots.iter().find(holds_one).unwrap();
    bench.credentials.refresh_later(slot, bench.now());
    // Long enough for a renewal that does not wait.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(bench.requests(), 2);
    bench.clock.advance(seconds(3));
    bench.until_requests(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_whose_renewal_was_held_up_are_not_renewed_all_at_once() {
    const TOKENS: usize = 64;
    let bench = Bench::start().await;
    for number in 0..TOKENS {
        let audience = number.to_string();
        let obtained = bench.token_with(&audience, Purpose::Inject).await;
        obtained.unwrap();
    }
    let slots = bench.credentials.all_slots();
    bench.clock.advance(LONG.mul_f64(0.56));
    let again = Some("1".to_owned());
    bench.server.set(Fault::Status(429, again)).await;
    bench.token().await.unwrap_err();
    bench.server.set(Fault::None).await;
    let now = bench.now();
    let reads = || bench.clock.reads.load(Ordering::SeqCst);
    let before = reads();
    for slot in &slots {
        slot.touch(now);
        bench.credentials.refresh_later(slot, now);
    }
    // Each has been told to look, has looked, and was told to look again.
    bench.until(|| reads() >= before + 3 * TOKENS).await;
    bench.clock.advance(seconds(3));
    bench.until(|| bench.requests() >= TOKENS + 2).await;
    let first = Instant::now();
    bench.until(|| bench.requests() > 2 * TOKENS).await;
    let took = first.elapsed();
    assert!(took >= seconds(1), "all within {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_stands_until_the_configuration_changes() {
    let bench = Bench::start().await;
    bench.server.set(Fault::Error(400, "invalid_scope")).await;
    for _ in 0..3 {
        let refusal = bench.token().await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TokenRequestDenied);
        bench.clock.advance(seconds(100_000));
    }
    assert_eq!(bench.requests(), 1);
    bench.server.set(Fault::None).await;
    bench.configure(&[bench.credential("orders", bench.settings())]);
    bench.token().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_client_is_tried_once_more_and_then_once_in_30_seconds() {
    let bench = Bench::start().await;
    bench.state.register(Client {
        client_id: "node-agent".to_owned(),
        credential: ClientCredential::Keys(Vec::new()),
        scopes: Vec::new(),
    });
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::InvalidClient
    );
    assert_eq!(bench.requests(), 2);
    let assertions: HashSet<String> = bench
        .state
        .received()
        .iter()
        .map(|received| opened(received.values("client_assertion")[0]).1["jti"].to_string())
        .collect();
    assert_eq!(assertions.len(), 2, "an assertion was sent twice");
    bench.clock.advance(Duration::from_millis(29_999));
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::InvalidClient
    );
    assert_eq!(bench.requests(), 2);
    for attempts in 3..5 {
        bench.clock.advance(seconds(30));
        assert_eq!(
            bench.token().await.unwrap_err().code,
            RefusalCode::InvalidClient
        );
        assert_eq!(bench.requests(), attempts);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_is_read_anew() {
    let bench = Bench::start().await;
    let good = std::fs::read(bench.path("client.pem")).unwrap();
    let (_, other) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
    let credential = |timeout| {
        let settings = OauthClientCredentials {
            timeout,
            ..bench.settings()
        };
        bench.credential("orders", settings)
    };
    bench.token().await.unwrap();
    for (content, expected) in [
        (other.as_bytes(), RefusalCode::InvalidClient),
        (b"half a key".as_slice(), RefusalCode::ClientKeyUnavailable),
        (b"".as_slice(), RefusalCode::ClientKeyUnavailable),
    ] {
        std::fs::write(bench.path("client.pem"), content).unwrap();
        bench.clock.advance(seconds(1000));
        assert_eq!(bench.token().await.unwrap_err().code, expected);
    }
    std::fs::remove_file(bench.path("client.pem")).unwrap();
    bench.clock.advance(seconds(1000));
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::ClientKeyUnavailable
    );
    std::fs::write(bench.path("client.pem"), good).unwrap();
    bench.clock.advance(seconds(1000));
    bench.token().await.unwrap();
    bench.configure(&[credential(seconds(3))]);
    bench.token().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_credential_tells_of_a_key_that_was_replaced() {
    let mut bench = Bench::start().await;
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let tell = Arc::clone(&told);
    bench.credentials = Credentials::new(
        tokio::runtime::Handle::current(),
        Arc::clone(&bench.clock) as Arc<dyn Clock>,
        Arc::new(Metrics::new(Arc::clone(&bench.clock) as Arc<dyn Clock>)),
        Arc::new(move |event| {
            if let TokenEvent::KeyReplaced { credential, key_id } = event {
                tell.lock().unwrap().push(format!("{credential} {key_id}"));
            }
        }),
    );
    bench.configure(&[
        bench.credential("orders", bench.settings()),
        bench.credential("other", bench.settings()),
    ]);
    bench.token().await.unwrap();
    bench.token_of("other").await.unwrap();
    let (key, pem) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
    bench.state.register(client("node-agent", &key));
    std::fs::write(bench.path("client.pem"), pem.as_bytes()).unwrap();
    for _ in 0..2 {
        bench.clock.advance(seconds(1000));
        bench.token().await.unwrap();
        bench.token_of("other").await.unwrap();
    }
    let expected = ["orders", "other"].map(|name| format!("{name} {}", key.key_id()));
    assert_eq!(*told.lock().unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_that_is_gone_can_be_had_until_it_is_retired() {
    let bench = Bench::start().await;
    bench.token().await.unwrap();
    let renamed = [bench.credential("other", bench.settings())];
    bench
        .credentials
        .configure_credentials(&renamed, &bench.roots(), &Arc::default());
    bench.token().await.unwrap();
    bench.token_of("other").await.unwrap();
    assert_eq!(bench.credentials.list().len(), 2);
    bench.credentials.retire_others(&renamed);
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::PolicyDenied);
    bench.token_of("other").await.unwrap();
    assert_eq!(bench.credentials.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_one_issuer_share_its_metadata() {
    let bench = Bench::start().await;
    bench.configure(&[]);
    bench.configure(&[
        bench.credential("orders", bench.settings()),
        bench.credential("other", bench.settings()),
    ]);
    let metadata_requests = || bench.server.metadata_requests();
    bench.token().await.unwrap();
    bench.token_of("other").await.unwrap();
    assert_eq!(metadata_requests(), 1);
    bench.clock.advance(seconds(3600));
    bench.token_of("other").await.unwrap();
    bench.token().await.unwrap();
    assert_eq!(metadata_requests(), 2);

    // What one has reason to distrust stays good for the other.
    bench.clock.advance(seconds(1000));
    bench.server.set(Fault::Html).await;
    let refusal = bench.token_of("other").await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenResponseInvalid);
    bench.server.set(Fault::None).await;
    bench.token().await.unwrap();
    assert_eq!(metadata_requests(), 2);
    bench.clock.advance(seconds(1000));
    bench.token_of("other").await.unwrap();
    bench.token().await.unwrap();
    assert_eq!(metadata_requests(), 3);

    // Those that find it old at the same time ask once.
    bench.clock.advance(seconds(3600));
    let (one, other) = tokio::join!(bench.token(), bench.token_of("other"));
    one.unwrap();
    other.unwrap();
    assert_eq!(metadata_requests(), 4);

    // One that reaches the issuer in another way asks for itself.
    let settings = OauthClientCredentials {
        allow_addresses: vec!["127.0.0.0/8".parse().unwrap()],
        ..bench.settings()
    };
    bench.configure(&[]);
    bench.configure(&[
        bench.credential("orders", bench.settings()),
        bench.credential("other", settings),
    ]);
    bench.token().await.unwrap();
    bench.token_of("other").await.unwrap();
    assert_eq!(metadata_requests(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_distrusted_stays_so_whoever_comes_late() {
    let bench = Bench::start().await;
    let ask = async |audience: &str| {
        let scopes = ["orders.read".to_owned()];
        let nobody = WorkloadFacts::default();
        let ask = Ask {
            audience: Some(audience),
            ..orders(&scopes, &nobody)
        };
        let obtained = bench.credentials.obtain_token(&ask).await;
        obtained.map(drop).map_err(|failed| failed.refusal.code)
    };
    let invalid = Err(RefusalCode::TokenResponseInvalid);
    bench.server.change(Fault::HeldHtml);
    let late = ask("late");
    let meanwhile = async {
        while bench.requests() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        bench.server.change(Fault::Html);
        assert_eq!(ask("first").await, invalid);
        assert_eq!(ask("second").await, invalid);
        assert_eq!(bench.server.metadata_requests(), 2);
        bench.server.let_go();
    };
    assert_eq!(tokio::join!(late, meanwhile).0, invalid);
    bench.server.change(Fault::None);
    assert_eq!(ask("third").await, Ok(()));
    assert_eq!(bench.server.metadata_requests(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_token_is_evicted_once_in_30_seconds() {
    let bench = Bench::start().await;
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = orders(&scopes, &nobody);
    let first = bench.token().await.unwrap();
    assert!(bench.credentials.reject_token(&ask, &first));
    // A late caller with the same old token evicts nothing, and may retry.
    let second = bench.token().await.unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(bench.credentials.reject_token(&ask, &first));
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &second));
    // The API refuses the new one too: no loop.
    assert!(!bench.credentials.reject_token(&ask, &second));
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &second));
    assert_eq!(bench.requests(), 2);
    bench.clock.advance(seconds(30));
    assert!(bench.credentials.reject_token(&ask, &second));
    bench.token().await.unwrap();
    assert_eq!(bench.requests(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_issued_is_never_what_is_injected() {
    let bench = Bench::start().await;
    let injected = bench.token().await.unwrap();
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = Ask {
        purpose: Purpose::Issue,
        ..orders(&scopes, &nobody)
    };
    let mut digests: HashSet<String> = [injected.sha256().to_string()].into();
    for _ in 0..3 {
        digests.insert(token_sha256(&bench.issue(&ask).await.unwrap()));
    }
    assert_eq!(digests.len(), 4);
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &injected));
    // A refused client is left alone here too.
    bench.server.set(Fault::Error(401, "invalid_client")).await;
    let before = bench.requests();
    for _ in 0..5 {
        assert_eq!(
            bench.issue(&ask).await.unwrap_err().code,
            RefusalCode::InvalidClient
        );
    }
    assert_eq!(bench.requests(), before + 2);
    assert!(bench.token().await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_ever_for_a_token_that_is_handed_out() {
    let bench = Bench::start().await;
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = Ask {
        purpose: Purpose::Issue,
        ..orders(&scopes, &nobody)
    };
    let take_turn = async || {
        let entry = Arc::clone(&bench.credentials.entries.load()["orders"]);
        let slot = bench.credentials.slot(&ask, &entry, bench.now()).unwrap();
        slot.turns.of(&identity("one")).lock_owned().await
    };
    let _turn = take_turn().await;
    // A neighbour has a turn of its own.
    let other = identity("other");
    bench.credentials.issue_token(&ask, &other).await.unwrap();

    bench.configure_hasty();
    let _turn = take_turn().await;
    let waiting = tokio::time::timeout(seconds(30), bench.issue(&ask));
    let refusal = waiting.await.expect("it ends").unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenServerTimeout);
    assert_eq!(bench.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_that_nobody_writes_to_holds_nobody_up() {
    let bench = Bench::start().await;
    let pipe = bench.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let by_key = ClientAuthentication::PrivateKeyJwt {
        key_file: pipe.clone(),
        algorithm: SigningAlgorithm::Es256,
        key_id: None,
        assertion_type_header: None,
        audience: ISSUER.to_owned(),
    };
    let by_secret = ClientAuthentication::ClientSecretBasic { secret_file: pipe };
    for client_authentication in [by_key, by_secret] {
        let settings = OauthClientCredentials {
            client_authentication,
            ..bench.settings()
        };
        bench.configure(&[bench.credential("orders", settings)]);
        let waiting = tokio::time::timeout(seconds(30), bench.token());
        let refusal = waiting.await.expect("it ends").unwrap_err();
        assert_eq!(refusal.code, RefusalCode::ClientKeyUnavailable);
        assert!(refusal.internal.unwrap().contains("no regular file"));
    }
}

#[test]
fn a_key_file_that_cannot_be_read_in_time_holds_nobody_up() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .max_blocking_threads(1)
        .build()
        .unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    runtime.block_on(async {
        let bench = Bench::start().await;
        bench.token().await.unwrap();
        // Files are read where nothing else is for now.
        tokio::task::spawn_blocking(move || held.recv());
        bench.clock.advance(LONG);
        let waiting = tokio::time::timeout(seconds(30), bench.token());
        let refusal = waiting.await.expect("it ends").unwrap_err();
        assert_eq!(refusal.code, RefusalCode::ClientKeyUnavailable);
        drop(release);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_ends_a_tokens_use_before_its_expiry() {
    let bench = Bench::start().await;
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = Ask {
        max_lifetime: Some(seconds(30)),
        ..orders(&scopes, &nobody)
    };
    let obtain = || async { bench.credentials.obtain_token(&ask).await.unwrap().0 };
    let capped = obtain().await;
    bench.server.set(Fault::Refused).await;
    bench.clock.advance(Duration::from_millis(29_999));
    assert!(Arc::ptr_eq(&obtain().await, &capped));
    bench.until_requests(1).await;
    bench.clock.advance(Duration::from_millis(1));
    assert!(bench.credentials.obtain_token(&ask).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assertion_never_bears_another_servers_issuer() {
    // RFC 10070: hostile metadata lists the honest server's token endpoint, and the other way round.
    let bench = Bench::start().await;
    let hostile_issuer = "https://hostile.countersign.test";
    let (hostile_state, hostile) =
        authorization_server(&bench.authority, hostile_issuer, LONG).await;
    let metadata = json!({
        "issuer": hostile_issuer,
        "token_endpoint": bench.state.token_endpoint(),
    });
    hostile.set_metadata(metadata.to_string());
    let settings = OauthClientCredentials {
        server: ServerSetting::Issuer(ExactUrl::parse(hostile_issuer).unwrap()),
        connect_to: Some(hostile.address()),
        ..for_audience(bench.settings(), hostile_issuer)
    };
    bench.configure(&[
        bench.credential("orders", bench.settings()),
        bench.credential("hostile", settings.clone()),
    ]);
    bench.token().await.unwrap();
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = Ask {
        credential: "hostile",
        ..orders(&scopes, &nobody)
    };
    // The name of the honest server does not resolve here; what matters is that nothing was sent.
    assert!(bench.credentials.obtain_token(&ask).await.is_err());
    assert_eq!(bench.requests(), 1);

    // The hostile server at its own endpoint sees its own issuer, and no other.
    let own = json!({
        "issuer": hostile_issuer,
        "token_endpoint": hostile_state.token_endpoint(),
    });
    hostile.set_metadata(own.to_string());
    bench.clock.advance(seconds(4000));
    bench.configure(&[bench.credential("hostile", settings.clone())]);
    assert!(bench.credentials.obtain_token(&ask).await.is_err());
    for received in hostile_state.received() {
        for assertion in received.values("client_assertion") {
            assert_eq!(opened(assertion).1["aud"], hostile_issuer);
        }
    }
    assert_eq!(hostile_state.received().len(), 2);

    // Metadata that names another issuer is not used at all.
    for issuer in [ISSUER, "https://hostile.countersign.test/", ""] {
        let forged = json!({"issuer": issuer, "token_endpoint": hostile_state.token_endpoint()});
        hostile.set_metadata(forged.to_string());
        let changed = OauthClientCredentials {
            parameters: [("try".to_owned(), issuer.to_owned())].into(),
            ..settings.clone()
        };
        bench.configure(&[bench.credential("hostile", changed)]);
        let refusal = bench
            .credentials
            .obtain_token(&ask)
            .await
            .unwrap_err()
            .refusal;
        assert_eq!(refusal.code, RefusalCode::MetadataInvalid);
    }
    assert_eq!(hostile_state.received().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_metadata_names_pass_the_address_guard() {
    let bench = Bench::start().await;
    let endpoints = [
        "https://127.0.0.1:1/token",
        "https://[::1]:1/token",
        "https://169.254.169.254/token",
        "https://[::ffff:169.254.169.254]/token",
        "https://10.0.0.1/token",
        "https://2130706433:1/token",
        "https://0x7f.1:1/token",
        "https://0.0.0.0:1/token",
        "http://auth.countersign.test/token",
        "http://8.8.8.8/token",
        "ftp://auth.countersign.test/token",
    ];
    for endpoint in endpoints {
        let metadata = json!({"issuer": ISSUER, "token_endpoint": endpoint});
        bench.server.set_metadata(metadata.to_string());
        let settings = OauthClientCredentials {
            parameters: [("try".to_owned(), endpoint.to_owned())].into(),
            ..bench.settings()
        };
        bench.configure(&[bench.credential("orders", settings)]);
        let refusal = bench.token().await.unwrap_err();
        assert_eq!(
            refusal.code,
            RefusalCode::TokenServerNotAllowed,
            "{endpoint}"
        );
    }
    assert_eq!(bench.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_own_listeners_are_no_authorization_servers() {
    let bench = Bench::start().await;
    let own: Arc<[SocketAddr]> = Arc::new([bench.server.address()]);
    let metadata = json!({
        "issuer": ISSUER,
        "token_endpoint": format!("https://{}/token", bench.server.address()),
    });
    bench.server.set_metadata(metadata.to_string());
    let settings = OauthClientCredentials {
        allow_addresses: vec!["127.0.0.0/8".parse().unwrap()],
        ..bench.settings()
    };
    bench.credentials.configure_credentials(
        &[bench.credential("orders", settings)],
        &bench.roots(),
        &own,
    );
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenServerNotAllowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_metadata_is_asked_at_its_token_endpoint() {
    let bench = Bench::start().await;
    let settings = OauthClientCredentials {
        server: ServerSetting::TokenEndpoint(Url::parse(&bench.state.token_endpoint()).unwrap()),
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    bench.token().await.unwrap();
    assert_eq!(bench.server.metadata_requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_audience_is_only_what_the_configuration_says() {
    let bench = Bench::start().await;
    let audience_of = |received: &Received| {
        let (_, claims) = opened(received.values("client_assertion")[0]);
        claims["aud"].clone()
    };
    bench.token().await.unwrap();
    assert_eq!(audience_of(&bench.last_received()), ISSUER);
    // A server that demands its own endpoint's URL, as some did before RFC 10070.
    let endpoint = bench.state.token_endpoint();
    let settings = for_audience(bench.settings(), &endpoint);
    bench.configure(&[bench.credential("orders", settings)]);
    // The embedded server is one of those that take their issuer only.
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::InvalidClient);
    assert_eq!(audience_of(&bench.last_received()), endpoint);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbound_proxy_tunnels() {
    let bench = Bench::start().await;
    let (proxy, heads) = outbound_proxy(bench.server.address()).await;
    let settings = OauthClientCredentials {
        outbound_proxy: Some(proxy),
        connect_to: None,
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    bench.token().await.unwrap();
    let heads = heads.lock().unwrap();
    assert!(heads[0].starts_with("CONNECT auth.countersign.test:443 HTTP/1.1\r\n"));
    assert!(heads.iter().all(|head| !head.contains("assertion")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbound_proxy_leads_around_no_address_guard() {
    let bench = Bench::start().await;
    let (proxy, heads) = outbound_proxy(bench.server.address()).await;
    let settings = |attempt: &str, allow: &[&str]| OauthClientCredentials {
        outbound_proxy: Some(proxy.clone()),
        connect_to: None,
        parameters: [("try".to_owned(), attempt.to_owned())].into(),
        allow_addresses: allow.iter().map(|range| range.parse().unwrap()).collect(),
        ..bench.settings()
    };
    let metadata = |endpoint: &str| json!({"issuer": ISSUER, "token_endpoint": endpoint});
    let learnt = [
        "https://127.0.0.1:1/token",
        "https://[::1]:1/token",
        "https://169.254.169.254/token",
        "https://[::ffff:169.254.169.254]/token",
        "https://10.0.0.1/token",
        "https://localhost:1/token",
        // Nobody can say where it is: no label is so long.
        "https://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.test/token",
        "http://8.8.8.8/token",
    ];
    for endpoint in learnt {
        bench.server.set_metadata(metadata(endpoint).to_string());
        bench.configure(&[bench.credential("orders", settings(endpoint, &[]))]);
        let refusal = bench.token().await.unwrap_err();
        assert_eq!(
            refusal.code,
            RefusalCode::TokenServerNotAllowed,
            "{endpoint}"
        );
    }
    assert_eq!(bench.requests(), 0);
    let asked = |heads: &Mutex<Vec<String>>| heads.lock().unwrap().clone();
    assert!(
        asked(&heads)
            .iter()
            .all(|head| head.starts_with("CONNECT auth.countersign.test:443 ")),
        "{:?}",
        asked(&heads)
    );
    // A range that is allowed by name is reached; its certificate is another matter.
    bench.server.set_metadata(metadata(learnt[0]).to_string());
    bench.configure(&[bench.credential("orders", settings("allowed", &["127.0.0.0/8"]))]);
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenServerTls);
    assert!(
        asked(&heads)
            .iter()
            .any(|head| head.starts_with("CONNECT 127.0.0.1:1 "))
    );
    let good = metadata(&bench.state.token_endpoint());
    bench.server.set_metadata(good.to_string());
    bench.configure(&[bench.credential("orders", settings("good", &[]))]);
    bench.token().await.unwrap();
}

/// An HTTP proxy that takes every tunnel to `target`, and the heads that it was asked by.
async fn outbound_proxy(target: SocketAddr) -> (Url, Arc<Mutex<Vec<String>>>) {
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy_url = Url::parse(&format!("http://{}", proxy.local_addr().unwrap())).unwrap();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut client, _)) = proxy.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                seen.lock().unwrap().push(String::from_utf8(head).unwrap());
                let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (proxy_url, heads)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_does_not_verify_gets_nothing() {
    let bench = Bench::start().await;
    let stranger = CertificateAuthority::new("stranger").unwrap();
    std::fs::write(bench.path("ca.pem"), stranger.pem()).unwrap();
    bench.configure(&[bench.credential("orders", bench.settings())]);
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::TokenServerTls
    );
    std::fs::write(bench.path("ca.pem"), "nothing").unwrap();
    bench.configure(&[bench.credential("orders", bench.settings())]);
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::TokenServerTls
    );
    assert_eq!(bench.server.metadata_requests(), 0);
    // The file's content is what counts: a reload with the same configuration takes the new one.
    std::fs::write(bench.path("ca.pem"), bench.authority.pem()).unwrap();
    bench.configure(&[bench.credential("orders", bench.settings())]);
    bench.token().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_differ_are_made_up_for_and_then_named() {
    let bench = Bench::start().await;
    // Half a minute: the second assertion bears the server's time.
    bench.server.set_date_offset(30);
    bench.server.set(Fault::Error(401, "invalid_client")).await;
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::InvalidClient
    );
    bench.server.set(Fault::None).await;
    bench.clock.advance(seconds(31));
    // The embedded server's clock is ours, and a time so far ahead is not yet valid to it.
    assert_eq!(
        bench.token().await.unwrap_err().code,
        RefusalCode::InvalidClient
    );
    let (_, claims) = opened(bench.last_received().values("client_assertion")[0]);
    let ahead = claims["iat"].as_u64().unwrap() - crate::jwt::numeric_date(SystemTime::now());
    assert!((10..=31).contains(&ahead), "{ahead}");
    // An hour is not made up for.
    bench.server.set_date_offset(3600);
    bench.server.set(Fault::Error(401, "invalid_client")).await;
    bench.clock.advance(seconds(31));
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::ClockSkew);
    assert!(refusal.detail.contains("behind"), "{}", refusal.detail);
    bench.server.set_date_offset(0);
    bench.server.set(Fault::None).await;
    bench.clock.advance(seconds(31));
    let _ = bench.token().await;
    bench.clock.advance(seconds(31));
    bench.token().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_tokens_are_evicted_and_revoked_upstream() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    let by_digest = RevokedTokens::TokenSha256(token.sha256().to_uppercase());
    let revoked = bench.revoke(&by_digest).await;
    assert_eq!(revoked.len(), 1);
    assert_eq!(revoked[0].upstream, UpstreamRevocation::Revoked);
    assert!(bench.state.is_revoked(&jti_of(&token)));
    let next = bench.token().await.unwrap();
    assert!(!Arc::ptr_eq(&next, &token));
    let by_name = RevokedTokens::Credential("orders".to_owned());
    bench.server.set(Fault::Refused).await;
    let revoked = bench.revoke(&by_name).await;
    assert!(matches!(
        revoked[0].upstream,
        UpstreamRevocation::Pending(_)
    ));
    assert!(bench.credentials.list()[0].token_sha256.is_none());
    assert!(bench.revoke(&by_name).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_handed_out_or_replaced_is_revoked_upstream_too() {
    let bench = Bench::start().await;
    let replaced = bench.token().await.unwrap();
    bench.clock.advance(LONG.mul_f64(0.56));
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &replaced));
    bench.until_requests(2).await;
    let current = bench.token().await.unwrap();
    assert!(!Arc::ptr_eq(&current, &replaced));
    let scopes = ["orders.read".to_owned()];
    let caller = facts(&[("unix", "uid", AttributeValue::Long(7))]);
    let ask = Ask {
        purpose: Purpose::Issue,
        ..orders(&scopes, &caller)
    };
    let issued = bench.issue(&ask).await.unwrap();
    let issued_sha256 = token_sha256(&issued);
    // One that was handed out is known by who has it, one that all share by its credential alone.
    let holder = bench.credentials.holder(&issued_sha256).unwrap();
    assert_eq!(holder.credential, "orders");
    assert_eq!(holder.workload, ["unix.uid=7".parse().unwrap()]);
    let holder = bench.credentials.holder(current.sha256()).unwrap();
    assert!(holder.workload.is_empty());
    assert!(bench.credentials.holder(&"0".repeat(64)).is_none());

    let by_name = RevokedTokens::Credential("orders".to_owned());
    let revoked = bench.revoke(&by_name).await;
    assert_eq!(revoked.len(), 3, "{revoked:?}");
    assert!(
        revoked
            .iter()
            .all(|token| token.upstream == UpstreamRevocation::Revoked),
        "{revoked:?}"
    );
    let (_, claims) = opened(issued.access_token.expose_secret());
    let issued_jti = claims["jti"].as_str().unwrap().to_owned();
    for jti in [jti_of(&replaced), jti_of(&current), issued_jti] {
        assert!(bench.state.is_revoked(&jti), "{jti}");
    }
    assert!(bench.credentials.holder(&issued_sha256).is_none());
    // What has expired needs no revocation.
    bench.token().await.unwrap();
    bench.clock.advance(LONG);
    assert!(bench.revoke(&by_name).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_revoked_where_it_was_minted() {
    const OTHER: &str = "https://other.countersign.test";

    let bench = Bench::start().await;
    let (other, server) = authorization_server(&bench.authority, OTHER, LONG).await;
    let pem = std::fs::read(bench.path("client.pem")).unwrap();
    other.register(client(
        "node-agent",
        &SigningKey::parse(&pem, SigningAlgorithm::Es256).unwrap(),
    ));
    let elsewhere = OauthClientCredentials {
        server: ServerSetting::Issuer(ExactUrl::parse(OTHER).unwrap()),
        connect_to: Some(server.address()),
        ..for_audience(bench.settings(), OTHER)
    };
    let of_elsewhere = [bench.credential("orders", elsewhere)];
    for afterwards in [&of_elsewhere[..], &[]] {
        bench.configure(&[bench.credential("orders", bench.settings())]);
        let token = bench.token().await.unwrap();
        bench.configure(afterwards);
        let by_name = RevokedTokens::Credential("orders".to_owned());
        let revoked = bench.revoke(&by_name).await;
        assert_eq!(revoked[0].upstream, UpstreamRevocation::Revoked);
        assert!(bench.state.is_revoked(&jti_of(&token)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_handed_to_a_workload_is_revoked_with_it() {
    let bench = Bench::start().await;
    let injected = bench.token().await.unwrap();
    let scopes = ["orders.read".to_owned()];
    let mut digests = Vec::new();
    for uid in [7, 8] {
        let caller = facts(&[("unix", "uid", AttributeValue::Long(uid))]);
        let ask = Ask {
            purpose: Purpose::Issue,
            ..orders(&scopes, &caller)
        };
        let issued = bench.issue(&ask).await.unwrap();
        digests.push(token_sha256(&issued));
    }
    let workload = RevokedTokens::Workload("unix.uid=8".parse().unwrap());
    let revoked = bench.revoke(&workload).await;
    assert_eq!(revoked.len(), 1, "{revoked:?}");
    assert_eq!(revoked[0].token_sha256, digests[1]);
    assert_eq!(revoked[0].upstream, UpstreamRevocation::Revoked);
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &injected));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_makes_the_tokens_of_others_impossible_to_revoke() {
    let bench = Bench::start().await;
    let scopes = ["orders.read".to_owned()];
    let [modest, greedy] = [7, 8].map(|uid| facts(&[("unix", "uid", AttributeValue::Long(uid))]));
    let asks = [&modest, &greedy].map(|caller| Ask {
        purpose: Purpose::Issue,
        ..orders(&scopes, caller)
    });
    let cached = bench.token().await.unwrap();
    let handed_out = token_sha256(&bench.issue(&asks[0]).await.unwrap());
    // What comes later lives longer.
    bench.clock.advance(seconds(1));
    bench.issue(&asks[1]).await.unwrap();
    let known = |sha256: &str| bench.credentials.holder(sha256).is_some();
    let live = || bench.credentials.live.lock().unwrap();
    let of_greedy = live().last().unwrap().clone();
    live().resize(LIVE_TOKENS, of_greedy);
    bench.issue(&asks[1]).await.unwrap();
    assert!(live().len() <= LIVE_TOKENS / 2 + 3);
    assert!(known(&handed_out) && known(cached.sha256()));
    let workload = RevokedTokens::Workload("unix.uid=7".parse().unwrap());
    let revoked = bench.revoke(&workload).await;
    assert_eq!(revoked.len(), 1, "{revoked:?}");
    assert_eq!(revoked[0].token_sha256, handed_out);
    assert_eq!(revoked[0].upstream, UpstreamRevocation::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_cache_is_revoked_whatever_had_to_be_forgotten() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    bench.credentials.live.lock().unwrap().clear();
    assert!(bench.credentials.holder(token.sha256()).is_some());
    let by_name = RevokedTokens::Credential("orders".to_owned());
    let revoked = bench.revoke(&by_name).await;
    assert_eq!(revoked.len(), 1, "{revoked:?}");
    assert_eq!(revoked[0].upstream, UpstreamRevocation::Revoked);
    assert!(bench.state.is_revoked(&jti_of(&token)));
    assert!(bench.credentials.list()[0].token_sha256.is_none());
    assert!(bench.revoke(&by_name).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_in_trouble_is_asked_again_to_revoke() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    let again = Some("1".to_owned());
    bench.server.let_metadata_fail();
    bench.server.set(Fault::Status(503, again)).await;
    let by_name = RevokedTokens::Credential("orders".to_owned());
    let revoked = bench.revoke(&by_name).await;
    assert!(
        matches!(&revoked[0].upstream, UpstreamRevocation::Pending(detail) if detail.contains("503")),
        "{revoked:?}"
    );
    assert!(!bench.state.is_revoked(&jti_of(&token)));
    bench.server.set(Fault::None).await;
    let deadline = Instant::now() + seconds(60);
    while !bench.state.is_revoked(&jti_of(&token)) {
        assert!(Instant::now() < deadline, "it was not asked again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Who refuses the client is not asked again.
    bench.token().await.unwrap();
    bench.server.set(Fault::Error(400, "invalid_request")).await;
    let revoked = bench.revoke(&by_name).await;
    assert!(matches!(revoked[0].upstream, UpstreamRevocation::Failed(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_what_did_not_change() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    bench.configure(&[
        bench.credential("orders", bench.settings()),
        bench.credential("other", bench.settings()),
    ]);
    assert!(Arc::ptr_eq(&bench.token().await.unwrap(), &token));
    assert_eq!(bench.server.metadata_requests(), 1);
    let changed = OauthClientCredentials {
        timeout: seconds(3),
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", changed)]);
    assert!(!Arc::ptr_eq(&bench.token().await.unwrap(), &token));
    bench.configure(&[]);
    assert!(bench.token().await.is_err());
    assert!(bench.credentials.all_slots().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_before_a_reload_is_no_answer_after_it() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    let entry = || Arc::clone(&bench.credentials.entries.load()["orders"]);
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = orders(&scopes, &nobody);
    let before = entry();
    let changed = OauthClientCredentials {
        timeout: seconds(3),
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", changed)]);
    // Whoever looked the credential up before makes its slot only now.
    let late = bench.credentials.slot(&ask, &before, bench.now()).unwrap();
    late.flight.succeed(&token);
    assert!(!Arc::ptr_eq(&bench.token().await.unwrap(), &token));
    // Nor is it renewed.
    bench.clock.advance(LONG.mul_f64(0.56));
    late.touch(bench.now());
    bench.credentials.refresh(&late);
    assert!(!late.flight.is_in_the_air());
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_that_are_idle_are_dropped() {
    let bench = Bench::with_lifetime(seconds(3600)).await;
    bench.token().await.unwrap();
    bench.clock.advance(seconds(599));
    bench.credentials.sweep();
    assert_eq!(bench.credentials.list().len(), 1);
    bench.clock.advance(seconds(1));
    bench.credentials.sweep();
    assert!(bench.credentials.list().is_empty());
    bench.token().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_another_configuration_mends_is_remembered_until_then() {
    let bench = Bench::start().await;
    bench.server.set(Fault::Error(400, "invalid_scope")).await;
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenRequestDenied);
    assert_eq!(bench.requests(), 1);
    bench.server.set(Fault::None).await;
    bench.clock.advance(seconds(3600));
    bench.credentials.sweep();
    let refusal = bench.token().await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TokenRequestDenied);
    assert_eq!(bench.requests(), 1);
    bench.configure(&[bench.credential("orders", bench.settings())]);
    bench.token().await.unwrap();
    // What a job's own token is needed for is forgotten once nobody can present it any more.
    bench.server.set(Fault::Error(400, "invalid_scope")).await;
    let token = PresentedToken::new("x.y.z".to_owned());
    let settings = OauthClientCredentials {
        client_authentication: ClientAuthentication::WorkloadAssertion { issuer: None },
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = Ask {
        presented: Some(&token),
        presented_until: Some(bench.clock.wall()),
        ..orders(&scopes, &nobody)
    };
    bench.credentials.obtain_token(&ask).await.unwrap_err();
    bench.clock.advance(seconds(3600));
    bench.credentials.sweep();
    assert!(bench.credentials.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_shows_a_token() {
    let bench = Bench::start().await;
    let token = bench.token().await.unwrap();
    let secret = token.secret();
    let shown = format!(
        "{token:?} {:?} {:?}",
        bench.credentials.all_slots(),
        bench.credentials.list()
    );
    assert!(!shown.contains(secret.expose_secret()));
    let (_, signature) = secret.expose_secret().rsplit_once('.').unwrap();
    assert!(!shown.contains(signature));
    assert!(shown.contains(&**token.sha256()));
}

/// Rows of `docs/errors.md` at the broker: what a caller is told, and how often the server is asked.
#[tokio::test(flavor = "multi_thread")]
async fn faults_are_told_as_the_table_says() {
    let rows = fault_table();
    for row in &rows {
        // While a token is cached, nothing is asked and everyone is served.
        let bench = Bench::start_for(&row.fault).await;
        let token = bench.token().await.unwrap();
        bench.server.set(row.fault.clone()).await;
        assert!(
            Arc::ptr_eq(&bench.token().await.unwrap(), &token),
            "{}",
            row.name
        );
        assert_eq!(row.cached_status, 200);
        assert_eq!(bench.requests(), 1, "{}", row.name);

        // While none is: metadata is known, the token is gone.
        assert!(matches!(
            bench
                .credentials
                .revoke_upstream(&RevokedTokens::Credential("orders".to_owned()), seconds(10))
                .await
                .as_slice(),
            [_]
        ));
        // The connection over which it was revoked is not kept.
        bench.server.set(row.fault.clone()).await;
        let started = Instant::now();
        let refusal = bench.token().await.unwrap_err();
        let took = started.elapsed();
        let properties = refusal.code.properties();
        assert_eq!(properties.status.as_u16(), row.status, "{}", row.name);
        assert_eq!(properties.code, row.code, "{}", row.name);
        assert_eq!(
            properties.cause.unwrap().as_str(),
            row.cause,
            "{}",
            row.name
        );
        assert_eq!(bench.requests() - 1, row.token_requests, "{}", row.name);
        assert_eq!(
            refusal.retry_after.is_some(),
            row.status == 503,
            "{}",
            row.name
        );
        assert!(took < seconds(8), "{} took {took:?}", row.name);
        // The next caller is told at once, and nothing is asked.
        let again = bench.token().await.unwrap_err();
        let status = again.code.properties().status.as_u16();
        assert!(status == 503 || again.code == refusal.code, "{}", row.name);
        assert_eq!(bench.requests() - 1, row.token_requests, "{}", row.name);

        // And when the server is well again, so is the caller.
        bench.server.set(Fault::None).await;
        bench.configure(&[bench.credential("orders", bench.settings())]);
        if let Err(refusal) = bench.token().await {
            panic!("{}: {refusal:?}", row.name);
        }
    }
    println!("{} faults", rows.len());
    assert!(rows.len() >= 17, "rows are missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_connection_that_breaks_is_made_good_once() {
    let mut requests = 0;
    for _ in 0..20 {
        let bench = Bench::start().await;
        bench.token().await.unwrap();
        bench.server.set(Fault::Reset).await;
        // Answered, and the connection is kept: over it goes the next token request.
        let revoked = RevokedTokens::Credential("orders".to_owned());
        assert!(matches!(bench.revoke(&revoked).await.as_slice(), [_]));
        let refusal = bench.token().await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TokenServerUnreachable);
        requests = bench.requests() - 1;
        // After a pause of the machine it is not kept any more.
        if requests != 1 {
            break;
        }
    }
    assert_eq!(
        requests, 2,
        "once over the kept connection, once over a new one"
    );
}

/// The same where the server was never reached before, and its metadata fails too.
#[tokio::test(flavor = "multi_thread")]
async fn faults_of_metadata_have_the_same_status() {
    for row in fault_table() {
        let bench = Bench::start_for(&row.fault).await;
        bench.server.let_metadata_fail();
        bench.server.set(row.fault.clone()).await;
        let started = Instant::now();
        let refusal = bench.token().await.unwrap_err();
        let took = started.elapsed();
        let status = refusal.code.properties().status.as_u16();
        assert_eq!(status, row.status, "{}: {refusal:?}", row.name);
        assert_eq!(refusal.retry_after.is_some(), status == 503, "{}", row.name);
        assert!(took < seconds(8), "{} took {took:?}", row.name);
        assert_eq!(bench.requests(), 0, "{}", row.name);
        bench.server.set(Fault::None).await;
        bench.clock.advance(seconds(70));
        if let Err(refusal) = bench.token().await {
            panic!("{}: {refusal:?}", row.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_http2_is_asked_in_http2() {
    let bench = Bench::start().await;
    let key = std::fs::read(bench.path("client.pem")).unwrap();
    let key = SigningKey::parse(&key, SigningAlgorithm::Es256).unwrap();
    let server = crate::dev::AuthorizationServer::start(AuthorizationServerOptions {
        issuer: ISSUER.to_owned(),
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        certificate: bench.authority.issue(&["auth.countersign.test"]).unwrap(),
        clients: vec![client("node-agent", &key)],
        token_lifetime: LONG,
        default_audience: "https://orders.countersign.test".to_owned(),
    })
    .await
    .unwrap();
    let settings = OauthClientCredentials {
        connect_to: Some(server.address()),
        ..bench.settings()
    };
    bench.configure(&[bench.credential("orders", settings)]);
    let token = bench.token().await.unwrap();
    assert_eq!(server.state().issued()[0].jti, jti_of(&token));
    assert_eq!(bench.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_are_told_when_the_control_runtime_ends() {
    let control = tokio::runtime::Runtime::new().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let bench = Bench::start().await;
    let credentials = Credentials::new(
        control.handle().clone(),
        Arc::clone(&clock),
        Arc::new(Metrics::new(clock)),
        Arc::new(|_| {}),
    );
    let settings = OauthClientCredentials {
        timeout: seconds(600),
        ..bench.settings()
    };
    credentials.configure_credentials(
        &[bench.credential("orders", settings)],
        &bench.roots(),
        &Arc::default(),
    );
    bench.server.set(Fault::Hang).await;
    let scopes = ["orders.read".to_owned()];
    let nobody = WorkloadFacts::default();
    let ask = orders(&scopes, &nobody);
    let end = async {
        bench.until_requests(1).await;
        control.shutdown_background();
    };
    let (waiting, ()) = tokio::join!(credentials.obtain_token(&ask), end);
    assert_eq!(waiting.unwrap_err().refusal.code, RefusalCode::ShuttingDown);
    let late = credentials.obtain_token(&ask).await;
    assert_eq!(late.unwrap_err().refusal.code, RefusalCode::ShuttingDown);
}

/// The server comes and goes; no token leaves after its expiry, by another clock than the broker's.
#[tokio::test(flavor = "multi_thread")]
async fn no_expired_token_leaves_while_the_server_flaps() {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let bench = Bench::with_clock(seconds(2), clock, Arc::default()).await;
    let keys = bench.state.verifying_keys();
    let started = Instant::now();
    let (mut served, mut refused, mut is_up) = (0_u32, 0_u32, true);
    let mut next_change = Duration::from_millis(700);
    let mut issued_before = 0;
    while started.elapsed() < seconds(8) {
        let issued = bench.state.issued().len();
        // It is up until it has issued a token, however long this machine pauses.
        if started.elapsed() > next_change && (!is_up || issued > issued_before) {
            is_up = !is_up;
            issued_before = issued;
            next_change = started.elapsed()
                + match is_up {
                    true => Duration::from_millis(700),
                    false => Duration::from_millis(1900),
                };
            bench
                .server
                .set(if is_up {
                    Fault::None
                } else {
                    Fault::Status(500, None)
                })
                .await;
        }
        let asked = SystemTime::now();
        match bench.token().await {
            Ok(token) => {
                let verified = verify(token.secret().expose_secret(), &keys).unwrap();
                check_times(&verified, asked).unwrap();
                served += 1;
            }
            Err(refusal) => {
                assert_eq!(refusal.code.properties().status.as_u16(), 503);
                refused += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("{served} served, {refused} refused");
    assert!(refused > 0, "the server never flapped");
    assert!(
        served * 10 >= (served + refused) * 4,
        "{served} of {}",
        served + refused
    );
}
