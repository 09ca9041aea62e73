//! HTTP/1 byte by byte, as no client should send it: what the agent answers, and what the origin saw.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, read_response};
use crate::support::strict_origin::StrictOrigin;
use crate::support::world::{COMMON, DESTINATIONS, World};

const CORPUS: &str = include_str!("../corpora/raw-http1.txt");

const REQUEST: &str = "http://raw.example.test/1 HTTP/1.1\r\nHost: raw.example.test\r\n";
const GOOD: &str = "GET http://raw.example.test/good HTTP/1.1\r\nHost: raw.example.test\r\n\r\n";

const ORIGINS: &str = r#"
  - {name: raw, hosts: [raw.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{raw}"}
  - {name: narrow, hosts: [narrow.example.test], scheme: http, paths: ["/v1/**"], credentials: [{name: orders-api}], connect_to: "{raw}"}
  - {name: apart, hosts: [apart.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{apart}"}
"#;

const POLICIES: &str = r#"
@id("any-method")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix };
"#;

/// A line of the corpus.
struct Case<'a> {
    line: usize,
    statuses: &'a str,
    seen: &'a str,
    input: &'a str,
}

fn cases() -> Vec<Case<'static>> {
    let is_case = |(_, text): &(usize, &str)| !text.is_empty() && !text.starts_with('#');
    let lines = CORPUS.lines().enumerate().filter(is_case);
    lines
        .map(|(index, text)| {
            let mut fields = text.splitn(3, " | ");
            let mut field = || {
                fields
                    .next()
                    .unwrap_or_else(|| panic!("line {}", index + 1))
            };
            Case {
                line: index + 1,
                statuses: field(),
                seen: field(),
                input: field(),
            }
        })
        .collect()
}

/// The bytes that an input stands for.
fn bytes(input: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = input;
    while let Some(first) = rest.chars().next() {
        if let Some((name, after)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            match (name, name.rsplit_once('*')) {
                ("get", _) => bytes.extend(format!("GET {REQUEST}").into_bytes()),
                ("post", _) => bytes.extend(format!("POST {REQUEST}").into_bytes()),
                ("good", _) => bytes.extend(GOOD.as_bytes()),
                (_, Some((text, times))) => {
                    bytes.extend(self::bytes(text).repeat(times.parse().unwrap()));
                }
                _ => panic!("`{{{name}}}` stands for nothing"),
            }
            rest = after;
        } else if let Some(escape) = rest.strip_prefix('\\') {
            let (byte, length) = match escape.as_bytes()[0] {
                b'r' => (b'\r', 1),
                b'n' => (b'\n', 1),
                b't' => (b'\t', 1),
                b'0' => (0, 1),
                b'\\' => (b'\\', 1),
                b'x' => (u8::from_str_radix(&escape[1..3], 16).unwrap(), 3),
                other => panic!("no escape `\\{}`", char::from(other)),
            };
            bytes.push(byte);
            rest = &escape[length..];
        } else {
            let length = first.len_utf8();
            bytes.extend(&rest.as_bytes()[..length]);
            rest = &rest[length..];
        }
    }
    bytes
}

/// Sends a good request and, on the same connection, an input; then ends this side and reads the statuses
/// of the answers to the input. What begins a connection comes without the good request, and this side
/// ends once an answer has come.
async fn statuses(puppet: &Puppet, text: &str) -> String {
    let (mut reading, mut writing) = puppet.connect().await.into_split();
    let (begins, input) = match text.strip_prefix("{first}") {
        Some(input) => (true, bytes(input)),
        None => (false, bytes(text)),
    };
    if !begins {
        writing.write_all(GOOD.as_bytes()).await.unwrap();
        assert_eq!(read_response(&mut reading).await.status, 200);
    }
    let (answered, is_answered) = tokio::sync::oneshot::channel::<()>();
    let write = tokio::spawn(async move {
        // The agent need not hear all of it.
        let _ = writing.write_all(&input).await;
        if begins {
            // Of a caller that has ended its side the kernel says nothing: not before it is known.
            let _ = is_answered.await;
        }
        let _ = writing.shutdown().await;
    });
    let mut answered = Some(answered);
    let mut answers = Vec::new();
    let read = async {
        let mut part = [0; 4096];
        while let Ok(length @ 1..) = reading.read(&mut part).await {
            answers.extend_from_slice(&part[..length]);
            drop(answered.take());
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), read).await;
    write.abort();
    if ended.is_err() {
        return "waits".to_owned();
    }
    let answers = String::from_utf8_lossy(&answers).into_owned();
    let statuses: Vec<&str> = answers
        .match_indices("HTTP/1.")
        .filter_map(|(at, _)| answers.get(at + 9..at + 12))
        .filter(|status| status.bytes().all(|digit| digit.is_ascii_digit()))
        .collect();
    // Also what the parser refuses is answered by us; a tunnel that is opened has no id, and its requests have.
    let ours = answers.matches("\r\ncountersign-request-id: ").count();
    let finals = statuses.iter().filter(|status| !status.starts_with('1'));
    let opened = text.starts_with("CONNECT ") && statuses.first() == Some(&"200");
    assert_eq!(
        ours + usize::from(opened),
        finals.count(),
        "{text}: {answers}"
    );
    match statuses.is_empty() {
        true => "-".to_owned(),
        false => statuses.join(" "),
    }
}

/// What the origin saw of an input; the good request that came before it is not the input's.
fn seen_of(input: &str, origin: &StrictOrigin) -> String {
    let mut seen = origin.take();
    if !input.starts_with("{first}") {
        assert_eq!(seen.remove(0), "GET /good", "the good request comes first");
    }
    match seen.is_empty() {
        true => "-".to_owned(),
        false => seen.join(", "),
    }
}

async fn answering() -> Origin {
    Origin::start(None, |_| {
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()]
    })
    .await
}

/// Were one of the destinations to read a request differently all the same, what is behind it would be its
/// sender's own: as many connections as identities, each used again.
async fn identities_share_no_connection(world: &World, apart: &Origin) {
    const APART: &str = "GET http://apart.example.test/ HTTP/1.1\r\nHost: apart.example.test\r\n";
    let puppet = Puppet::start(&world.target("proxy"), None).await;
    let jobs = ["orders", "bills"].map(|subject| {
        let lifetime = Duration::from_secs(300);
        let claims = serde_json::json!({});
        let token = world.issuer.mint(subject, "countersign", lifetime, &claims);
        format!("Proxy-Authorization: Bearer {}\r\n", token.unwrap())
    });
    let mut io = puppet.connect().await;
    for presented in ["", &jobs[0], &jobs[1], "", &jobs[0], &jobs[1]] {
        let request = format!("{APART}{presented}\r\n");
        exchange(&mut io, &request).await.expect(200);
    }
    assert_eq!(apart.heads().len(), 6);
    assert_eq!(apart.connections(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn t10_raw_requests_are_answered_and_seen_as_the_corpus_says() {
    let mut world = World::servers().await;
    let origin = StrictOrigin::default();
    let address = origin.start_http1().await;
    world.origins.push(("raw".to_owned(), address));
    let apart = answering().await;
    world.origins.push(("apart".to_owned(), apart.address));
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{ORIGINS}"), POLICIES)
        .await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    world.good().await;
    let cases = cases();
    let mut wrong = Vec::new();
    for case in &cases {
        let found = statuses(&puppet, case.input).await;
        let seen = seen_of(case.input, &origin);
        if (found.as_str(), seen.as_str()) != (case.statuses, case.seen) {
            wrong.push(format!("{}: {found} | {seen} | {}", case.line, case.input));
        }
    }
    assert_eq!(statuses(&puppet, "{good}").await, "200");
    identities_share_no_connection(&world, &apart).await;
    assert!(wrong.is_empty(), "found instead:\n{}", wrong.join("\n"));
    world.good().await;
    reached("raw_http1", cases.len());
    reached("raw_http1_classes", CORPUS.matches("\n## ").count());
}
