//! The embedded servers keep the rules that the agent is tested against.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::form_urlencoded;

use super::authorization_server::AuthorizationServerState;
use super::*;
use crate::config::SigningAlgorithm;
use crate::jwt::{SigningKey, VerifyingKey, numeric_date, unique_id};

const ISSUER: &str = "https://auth.countersign.test";
const AUDIENCE: &str = "https://orders.countersign.test";

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn new_key() -> SigningKey {
    SigningKey::generate(SigningAlgorithm::Es256).unwrap().0
}

fn public(key: &SigningKey) -> VerifyingKey {
    VerifyingKey::from_jwk(&key.public_jwk().unwrap()).unwrap()
}

fn options(authority: &CertificateAuthority, clients: Vec<Client>) -> AuthorizationServerOptions {
    AuthorizationServerOptions {
        issuer: ISSUER.to_owned(),
        address: any_port(),
        certificate: authority.issue(&["auth.countersign.test"]).unwrap(),
        clients,
        token_lifetime: Duration::from_secs(60),
        default_audience: AUDIENCE.to_owned(),
    }
}

fn client(client_id: &str, credential: ClientCredential) -> Client {
    Client {
        client_id: client_id.to_owned(),
        credential,
        scopes: vec!["orders.read".to_owned(), "orders.write".to_owned()],
    }
}

/// Asks the token endpoint: the status, and the error or the token's content.
fn ask(state: &AuthorizationServerState, form: &[(&str, &str)]) -> (u16, Value) {
    let body = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(form)
        .finish();
    let request = Request::post("/token").body(Bytes::from(body)).unwrap();
    let answer = state.respond(&request);
    (
        answer.status().as_u16(),
        serde_json::from_slice(answer.body()).unwrap(),
    )
}

fn claims(change: &Value) -> Value {
    let now = numeric_date(SystemTime::now());
    let mut claims = json!({
        "iss": "agent", "sub": "agent", "aud": ISSUER,
        "iat": now, "exp": now + 60, "jti": unique_id(),
    });
    for (name, value) in change.as_object().unwrap() {
        match value {
            Value::Null => claims.as_object_mut().unwrap().remove(name),
            value => claims
                .as_object_mut()
                .unwrap()
                .insert(name.clone(), value.clone()),
        };
    }
    claims
}

const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

#[test]
fn assertions_are_judged_strictly() {
    let authority = CertificateAuthority::new("test").unwrap();
    let (key, stranger) = (new_key(), new_key());
    let agent = client("agent", ClientCredential::Keys(vec![public(&key)]));
    let state = AuthorizationServerState::new(options(&authority, vec![agent])).unwrap();
    let present = |assertion: &str| {
        ask(
            &state,
            &[
                ("grant_type", "client_credentials"),
                ("client_assertion_type", ASSERTION_TYPE),
                ("client_assertion", assertion),
            ],
        )
    };
    let good = || {
        let assertion = key
            .sign("client-authentication+jwt", &claims(&json!({})))
            .unwrap();
        assert_eq!(present(&assertion).0, 200);
        assertion
    };
    let once = good();
    let now = numeric_date(SystemTime::now());
    let refused: Vec<(&str, String)> = vec![
        ("used before", once),
        (
            "audience in an array",
            key.sign("JWT", &claims(&json!({"aud": [ISSUER]}))).unwrap(),
        ),
        (
            "token endpoint as audience",
            key.sign("JWT", &claims(&json!({"aud": state.token_endpoint()})))
                .unwrap(),
        ),
        (
            "another audience",
            key.sign("JWT", &claims(&json!({"aud": "https://b.test"})))
                .unwrap(),
        ),
        (
            "no audience",
            key.sign("JWT", &claims(&json!({"aud": null}))).unwrap(),
        ),
        (
            "issuer with a slash",
            key.sign("JWT", &claims(&json!({"aud": format!("{ISSUER}/")})))
                .unwrap(),
        ),
        (
            "expired",
            key.sign("JWT", &claims(&json!({"exp": now - 1}))).unwrap(),
        ),
        (
            "no expiry",
            key.sign("JWT", &claims(&json!({"exp": null}))).unwrap(),
        ),
        (
            "expiry as text",
            key.sign("JWT", &claims(&json!({"exp": "soon"}))).unwrap(),
        ),
        (
            "not yet valid",
            key.sign("JWT", &claims(&json!({"nbf": now + 60}))).unwrap(),
        ),
        (
            "no jti",
            key.sign("JWT", &claims(&json!({"jti": null}))).unwrap(),
        ),
        (
            "another subject",
            key.sign("JWT", &claims(&json!({"sub": "other"}))).unwrap(),
        ),
        (
            "no subject",
            key.sign("JWT", &claims(&json!({"sub": null}))).unwrap(),
        ),
        (
            "unknown client",
            key.sign("JWT", &claims(&json!({"iss": "b", "sub": "b"})))
                .unwrap(),
        ),
        (
            "another typ",
            key.sign("at+jwt", &claims(&json!({}))).unwrap(),
        ),
        (
            "another key",
            stranger.sign("JWT", &claims(&json!({}))).unwrap(),
        ),
        (
            "another key under the same kid",
            new_key()
                .with_key_id(key.key_id())
                .sign("JWT", &claims(&json!({})))
                .unwrap(),
        ),
        ("no JWT", "abc".to_owned()),
        ("empty", String::new()),
    ];
    for (name, assertion) in &refused {
        let (status, body) = present(assertion);
        assert_eq!(
            (status, &body["error"]),
            (401, &json!("invalid_client")),
            "{name}"
        );
    }
    good();
    println!("{} refused assertions", refused.len());
}

#[test]
fn requests_are_judged_strictly() {
    let authority = CertificateAuthority::new("test").unwrap();
    let key = new_key();
    let agent = client("agent", ClientCredential::Keys(vec![public(&key)]));
    let state = AuthorizationServerState::new(options(&authority, vec![agent])).unwrap();
    let with = |changes: &[(&str, &str)]| {
        let assertion = key.sign("JWT", &claims(&json!({}))).unwrap();
        let mut form = vec![
            ("client_assertion_type", ASSERTION_TYPE),
            ("client_assertion", assertion.as_str()),
        ];
        form.extend(changes);
        ask(&state, &form)
    };
    let grant = ("grant_type", "client_credentials");
    let error = |changes: &[(&str, &str)]| with(changes).1["error"].clone();
    assert_eq!(error(&[]), "invalid_request");
    assert_eq!(
        error(&[("grant_type", "password")]),
        "unsupported_grant_type"
    );
    assert_eq!(error(&[grant, ("scope", "admin")]), "invalid_scope");
    assert_eq!(
        error(&[grant, ("scope", "orders.read admin")]),
        "invalid_scope"
    );
    assert_eq!(
        error(&[grant, ("scope", "a"), ("scope", "b")]),
        "invalid_request"
    );
    assert_eq!(error(&[grant, ("resource", "orders")]), "invalid_target");
    assert_eq!(
        error(&[grant, ("resource", "https://a.test/#x")]),
        "invalid_target"
    );
    assert_eq!(error(&[grant, ("client_id", "other")]), "invalid_client");
    assert_eq!(
        error(&[grant, ("client_assertion", "x")]),
        "invalid_request"
    );
    let (status, body) = with(&[
        grant,
        ("scope", "orders.read"),
        ("client_id", "agent"),
        ("resource", "https://a.test"),
        ("resource", "https://b.test"),
    ]);
    assert_eq!(status, 200);
    assert_eq!(body["scope"], "orders.read");
    assert_eq!(body["expires_in"], 60);
    assert_eq!(
        state.issued()[0].audiences,
        ["https://a.test", "https://b.test"]
    );
    let get = state.respond(&Request::get("/token").body(Bytes::new()).unwrap());
    assert_eq!(get.status(), StatusCode::METHOD_NOT_ALLOWED);
}

/// An API, and tokens for it.
struct Bench {
    authority: CertificateAuthority,
    state: AuthorizationServerState,
    api: Api,
}

impl Bench {
    async fn start() -> Self {
        let authority = CertificateAuthority::new("test").unwrap();
        let state = AuthorizationServerState::new(options(&authority, Vec::new())).unwrap();
        let api = Api::start(ApiOptions {
            address: any_port(),
            certificate: Some(authority.issue(&["orders.countersign.test"]).unwrap()),
            issuer: ISSUER.to_owned(),
            audience: AUDIENCE.to_owned(),
            keys: state.verifying_keys(),
        })
        .await
        .unwrap();
        Self {
            authority,
            state,
            api,
        }
    }

    fn token(&self, change: &Value) -> String {
        let now = numeric_date(SystemTime::now());
        let mut all = json!({
            "iss": ISSUER, "aud": AUDIENCE, "sub": "agent", "scope": "orders.read",
            "jti": "one", "iat": now, "exp": now + 60,
        });
        for (name, value) in change.as_object().unwrap() {
            all[name] = value.clone();
        }
        self.state.signing_key().sign("at+jwt", &all).unwrap()
    }

    async fn connect(&self, protocol: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        let authority = self.authority.pem().as_bytes();
        roots
            .add(rustls::pki_types::CertificateDer::from_pem_slice(authority).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![protocol.to_vec()];
        let stream = TcpStream::connect(self.api.address()).await.unwrap();
        TlsConnector::from(Arc::new(tls))
            .connect(
                ServerName::try_from("orders.countersign.test").unwrap(),
                stream,
            )
            .await
            .unwrap()
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        if request.version() == Version::HTTP_2 {
            let stream = TokioIo::new(self.connect(b"h2").await);
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
                    .await
                    .unwrap();
            tokio::spawn(connection);
            sender.send_request(request).await.unwrap()
        } else {
            let stream = TokioIo::new(self.connect(b"http/1.1").await);
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(stream).await.unwrap();
            tokio::spawn(connection.with_upgrades());
            sender.send_request(request).await.unwrap()
        }
    }

    async fn get(&self, path: &str, authorization: &[&str]) -> (u16, Value) {
        let mut request = Request::get(path).header("host", "orders.countersign.test");
        for value in authorization {
            request = request.header("authorization", *value);
        }
        let answer = self.send(request.body(Full::default()).unwrap()).await;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }
}

#[tokio::test]
async fn the_api_serves_nothing_without_a_valid_token() {
    let bench = Bench::start().await;
    let bearer = |token: &str| format!("Bearer {token}");
    let good = bearer(&bench.token(&json!({})));
    let now = numeric_date(SystemTime::now());
    let claims = json!({"iss": ISSUER, "aud": AUDIENCE, "exp": now + 60});
    let refused: Vec<Vec<String>> = vec![
        vec![],
        vec![good.clone(), good.clone()],
        vec![good.replace("Bearer", "Basic")],
        vec![bearer("abc")],
        vec![bearer(&bench.token(&json!({"aud": "https://other.test"})))],
        vec![bearer(&bench.token(&json!({"iss": "https://other.test"})))],
        vec![bearer(&bench.token(&json!({"exp": now - 1})))],
        vec![bearer(&bench.token(&json!({"nbf": now + 60})))],
        vec![bearer(&new_key().sign("at+jwt", &claims).unwrap())],
        vec![bearer(
            &bench.state.signing_key().sign("JWT", &claims).unwrap(),
        )],
    ];
    let (status, body) = bench.get("/v1/orders", &[&good]).await;
    assert_eq!(status, 200);
    assert_eq!(body["verified"]["sub"], "agent");
    assert_eq!(body["verified"]["scope"], "orders.read");
    assert_eq!(body["verified"]["jti"], "one");
    assert!(body["verified"]["expires_in"].as_u64().unwrap() > 50);
    assert_eq!(body["caller_sent_authorization"], false);
    for values in &refused {
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        let (status, body) = bench.get("/v1/orders", &values).await;
        assert_eq!(
            (status, &body["error"]),
            (401, &json!("invalid_token")),
            "{values:?}"
        );
    }
    let several = bearer(&bench.token(&json!({"aud": ["https://other.test", AUDIENCE]})));
    assert_eq!(bench.get("/v1/orders", &[&several]).await.0, 200);
    let seen = bench.api.seen();
    assert_eq!(seen.len(), refused.len() + 2);
    assert_eq!(seen.iter().filter(|seen| seen.token.is_ok()).count(), 2);
    assert_eq!(
        seen[0].authority.as_deref(),
        Some("orders.countersign.test")
    );
}

#[tokio::test]
async fn the_api_speaks_what_apis_speak() {
    let bench = Bench::start().await;
    let bearer = format!("Bearer {}", bench.token(&json!({})));
    let request = |path: &str| {
        Request::builder()
            .uri(path)
            .header("authorization", &bearer)
    };

    // Server-sent events, over HTTP/2.
    let events = request("https://orders.countersign.test/v1/stream?events=3&interval_ms=1")
        .version(Version::HTTP_2)
        .body(Full::default())
        .unwrap();
    let answer = bench.send(events).await;
    assert_eq!(answer.version(), Version::HTTP_2);
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "data: 0\n\ndata: 1\n\ndata: 2\n\n");

    // gRPC: the message comes back, then trailers.
    let call = |authorization: Option<&str>| {
        let mut call = Request::post("https://orders.countersign.test/orders.Orders/Echo")
            .version(Version::HTTP_2)
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers");
        if let Some(value) = authorization {
            call = call.header("authorization", value);
        }
        call.body(Full::from("\0\0\0\0\u{3}abc")).unwrap()
    };
    let answer = bench.send(call(Some(&bearer))).await;
    let collected = answer.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(collected.to_bytes(), "\0\0\0\0\u{3}abc");
    let answer = bench.send(call(None)).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["grpc-status"], "16");

    // An upgrade.
    let upgrade = request("/v1/socket")
        .header("host", "orders.countersign.test")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .body(Full::default())
        .unwrap();
    let answer = bench.send(upgrade).await;
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(answer.headers()["upgrade"], "websocket");
    let mut upgraded = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    upgraded.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    upgraded.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");

    // A body, streamed back.
    let body = vec![b'x'; 1_000_000];
    let echo = request("/v1/echo")
        .method("POST")
        .header("host", "orders.countersign.test")
        .body(Full::from(body.clone()))
        .unwrap();
    let answer = bench.send(echo).await;
    let echoed = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(echoed == body);
}
