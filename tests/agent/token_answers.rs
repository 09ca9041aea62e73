//! Whatever a token endpoint answers, an API sees a good token or nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use countersign::admin::{AdminActions, RevocationRequest};
use countersign::dev::ServerCertificate;
use countersign::policy::Revoked;
use futures_util::future::join_all;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::support::counts::reached;
use crate::support::curl::curl;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, read_head};
use crate::support::world::{COMMON, World};

const CORPUS: &str = include_str!("../corpora/token-responses.yaml");
/// Below this a busy machine may find a token expired when it is to be used.
const SHORT_SECONDS: u64 = 10;

const POLICIES: &str = r#"
@id("any-credential")
permit (principal, action == Action::"inject", resource)
when { principal has unix };
"#;

/// A case of the corpus.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    status: u16,
    retry_after: Option<String>,
    body: String,
    expect: String,
}

impl Case {
    /// The answer's bytes.
    fn answer(&self) -> Vec<u8> {
        let retry_after = self.retry_after.as_ref();
        let retry_after = retry_after.map(|value| format!("retry-after: {value}\r\n"));
        let head = format!(
            "HTTP/1.1 {} Answer\r\ncontent-type: application/json\r\n{}",
            self.status,
            retry_after.unwrap_or_default()
        );
        // These have no content (RFC 9112 section 6.3).
        match self.status {
            204 | 304 => format!("{head}\r\n").into_bytes(),
            _ => format!(
                "{head}content-length: {}\r\n\r\n{}",
                self.body.len(),
                self.body
            )
            .into_bytes(),
        }
    }

    /// The token that the API is to see.
    fn token(&self) -> Option<String> {
        self.expect.starts_with("token ").then(|| {
            let body: serde_json::Value = serde_json::from_str(&self.body).unwrap();
            body["access_token"].as_str().unwrap().to_owned()
        })
    }

    fn is_short(&self) -> bool {
        let seconds = self.expect.split(' ').nth(1);
        let seconds = seconds.and_then(|seconds| seconds.parse::<u64>().ok());
        seconds.is_some_and(|seconds| seconds < SHORT_SECONDS)
    }
}

/// A token endpoint whose answer at `/N` is the Nth.
async fn start_endpoint(certificate: ServerCertificate, answers: Vec<Vec<u8>>) -> SocketAddr {
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answers = Arc::new(answers);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, answers) = (acceptor.clone(), Arc::clone(&answers));
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let head = read_head(&mut stream).await.to_ascii_lowercase();
                let Some(index) = head
                    .strip_prefix("post /")
                    .and_then(|rest| rest.split_once(' '))
                    .and_then(|(index, _)| index.parse::<usize>().ok())
                else {
                    return;
                };
                let length = head
                    .split_once("\r\ncontent-length: ")
                    .and_then(|(_, rest)| rest.split_once("\r\n"))
                    .map_or(0, |(length, _)| length.parse().unwrap());
                let mut body = vec![0; length];
                let _ = stream.read_exact(&mut body).await;
                let _ = stream.write_all(&answers[index]).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    address
}

/// A credential and a destination for each case.
fn configuration(cases: &[Case]) -> String {
    let (common, after) = COMMON.split_once("interception:").unwrap();
    let mut credentials = String::new();
    let mut destinations = "destinations:\n".to_owned();
    for index in 0..cases.len() {
        credentials.push_str(&format!(
            r#"  - {{name: c{index}, type: oauth_client_credentials, token_endpoint: "https://auth.example.test/{index}", client_id: agent, client_authentication: {{method: client_secret_basic, secret_file: secret}}, ca_file: servers.pem, connect_to: "{{endpoint}}"}}
"#
        ));
        destinations.push_str(&format!(
            r#"  - {{name: d{index}, hosts: [d{index}.example.test], scheme: http, credentials: [{{name: c{index}}}], connect_to: "{{origin}}"}}
"#
        ));
    }
    destinations.push_str(
        r#"  - {name: orders, hosts: [orders.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{api}"}
"#,
    );
    format!("{common}{credentials}interception:{after}{destinations}")
}

/// What is wrong with what came of a case, if anything is.
async fn ask(puppet: &Puppet, origin: &Origin, index: usize, case: &Case) -> Option<String> {
    let host = format!("d{index}.example.test");
    let mut io = puppet.connect().await;
    let request = format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let answer = exchange(&mut io, &request).await;
    let seen: Vec<String> = origin
        .heads()
        .into_iter()
        .filter(|head| head.contains(&format!("\r\nhost: {host}\r\n")))
        .collect();
    let found = format!("{} {}", answer.status, answer.code());
    let token = case.token();
    let is_as_expected = match &token {
        Some(_) if case.is_short() && answer.code() == "credential_expired" => seen.is_empty(),
        Some(token) => {
            let header = format!("\r\nauthorization: Bearer {token}\r\n");
            answer.status == 200 && seen.len() == 1 && seen[0].contains(&header)
        }
        None => {
            let code = case.expect.split(' ').next();
            Some(answer.code().as_str()) == code && seen.is_empty()
        }
    };
    (!is_as_expected).then(|| format!("{} `{}`: {found}, {seen:?}", case.expect, case.body))
}

/// An agent with that configuration, and the API of its destinations.
async fn start(cases: &[Case], configuration: &str) -> (World, Origin) {
    let mut world = World::servers().await;
    let certificate = world.authority.issue(&["auth.example.test"]).unwrap();
    let answers = cases.iter().map(Case::answer).collect();
    let origin = Origin::start(None, |_| {
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()]
    })
    .await;
    let endpoint = start_endpoint(certificate, answers).await;
    world.origins.push(("endpoint".to_owned(), endpoint));
    world.origins.push(("origin".to_owned(), origin.address));
    world.write("secret", "a secret of the agent");
    let secret = world.path("secret");
    std::fs::set_permissions(secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    world.start_agent(configuration, POLICIES).await;
    world.good().await;
    (world, origin)
}

/// A server may answer with a token that it gave before, also to an agent that has not seen it.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_that_is_minted_again_is_not_handed_out() {
    let case = Case {
        status: 200,
        retry_after: None,
        body: r#"{"access_token": "again", "token_type": "Bearer", "expires_in": 300}"#.to_owned(),
        expect: String::new(),
    };
    let configuration = configuration(std::slice::from_ref(&case)).replace(
        "listeners:\n",
        "listeners:\n  - {name: api, type: workload_api, bind: \"127.0.0.1:0\"}\n",
    );
    let (world, _origin) = start(&[case], &configuration).await;
    world.write_policies(&POLICIES.replace(r#"action == Action::"inject""#, "action"));
    world.app().reload().await.unwrap();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, b"again");
    let revoked = RevocationRequest {
        what: Revoked::TokenSha256(countersign_attestors::hexadecimal(digest.as_ref())),
        for_seconds: None,
    };
    let api = format!("http://{}/v1/token", world.address("api"));
    let issue = async || curl(&["-X", "POST", "-d", r#"{"credential": "c0"}"#, &api]).await;
    let told = world.app().revoke(revoked).await.unwrap();
    let answer = issue().await;
    assert_eq!((answer.status, answer.code()), (403, "revoked".to_owned()));
    world
        .app()
        .lift(told["id"].as_str().unwrap())
        .await
        .unwrap();
    assert_eq!(issue().await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn t23_an_api_sees_good_tokens_or_nothing_whatever_a_token_endpoint_answers() {
    const AT_ONCE: usize = 16;
    let cases: Vec<Case> = serde_saphyr::from_str(CORPUS).unwrap();
    let (world, origin) = start(&cases, &configuration(&cases)).await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    let mut wrong = Vec::new();
    let all: Vec<_> = cases.iter().enumerate().collect();
    for some in all.chunks(AT_ONCE) {
        let asked = some
            .iter()
            .map(|(index, case)| ask(&puppet, &origin, *index, case));
        wrong.extend(join_all(asked).await.into_iter().flatten());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    world.good().await;
    reached("token_answers", cases.len());
    reached("token_answers_classes", CORPUS.matches("\n## ").count());
    let tokens = cases.iter().filter(|case| case.token().is_some()).count();
    reached("token_answers_with_a_token", tokens);
}
