//! HTTP/2 frame by frame, as no client should send it: what the agent answers, and what the origin saw.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;

use crate::support::counts::reached;
use crate::support::http2_frames as http2;
use crate::support::http2_frames::{Came, Frames, Io};
use crate::support::puppet::Puppet;
use crate::support::raw::{open_tunnel, read_response};
use crate::support::strict_origin::StrictOrigin;
use crate::support::unprivileged;
use crate::support::world::{COMMON, DESTINATIONS, World};

const CORPUS: &str = include_str!("../corpora/http2-attacks.txt");
const LIMIT: Duration = Duration::from_secs(60);
/// How often a neighbour must be answered while a flood goes on.
const NEIGHBOURS_ANSWERS: usize = 20;
const NEIGHBOURS: &str =
    "GET http://raw.example.test/neighbour HTTP/1.1\r\nHost: raw.example.test\r\n\r\n";

const ORIGINS: &str = r#"
  - {name: raw, hosts: [raw.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{raw}"}
  - {name: origin, hosts: [origin.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{origin}"}
"#;

const POLICIES: &str = r#"
@id("any-method")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix };
"#;

/// Where the frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The proxy's own listener, which is spoken to in clear; the origin speaks HTTP/1.1.
    Proxy,
    /// TLS inside of a tunnel; the origin speaks HTTP/2.
    Tunnel,
}

impl Place {
    fn authority(self) -> &'static str {
        match self {
            Self::Proxy => "raw.example.test",
            Self::Tunnel => "origin.example.test",
        }
    }

    fn scheme(self) -> &'static str {
        match self {
            Self::Proxy => "http",
            Self::Tunnel => "https",
        }
    }
}

/// A case of the corpus.
#[derive(Default)]
struct Case {
    name: String,
    places: Vec<Place>,
    is_flood: bool,
    /// The good request that comes after it has a connection of its own.
    good_elsewhere: bool,
    sends: Vec<String>,
    expected: Expected,
    /// Where it is another in the tunnel.
    expected_in_tunnel: Expected,
}

#[derive(Default)]
struct Expected {
    answers: String,
    seen: String,
}

impl Case {
    fn answers(&self, place: Place) -> &str {
        match place {
            Place::Tunnel if !self.expected_in_tunnel.answers.is_empty() => {
                &self.expected_in_tunnel.answers
            }
            _ => &self.expected.answers,
        }
    }

    fn seen(&self, place: Place) -> &str {
        match place {
            Place::Tunnel if !self.expected_in_tunnel.seen.is_empty() => {
                &self.expected_in_tunnel.seen
            }
            _ => &self.expected.seen,
        }
    }
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in CORPUS.lines() {
        if let Some(name) = line.strip_prefix("### ") {
            cases.push(Case {
                name: name.to_owned(),
                places: vec![Place::Proxy, Place::Tunnel],
                ..Case::default()
            });
            continue;
        }
        let (Some((key, value)), false) = (line.split_once(": "), line.starts_with('#')) else {
            assert!(line.is_empty() || line.starts_with('#'), "{line}");
            continue;
        };
        let case = cases.last_mut().expect("a case begins with its name");
        match (key, value) {
            ("on", "proxy") => case.places = vec![Place::Proxy],
            ("on", "tunnel") => case.places = vec![Place::Tunnel],
            ("flood", "yes") => case.is_flood = true,
            ("good", "over another connection") => case.good_elsewhere = true,
            ("sends", value) => case.sends.push(value.to_owned()),
            ("answers", value) => case.expected.answers = value.to_owned(),
            ("seen", value) => case.expected.seen = value.to_owned(),
            ("tunnel answers", value) => case.expected_in_tunnel.answers = value.to_owned(),
            ("tunnel seen", value) => case.expected_in_tunnel.seen = value.to_owned(),
            _ => panic!("`{line}` says nothing of a case"),
        }
    }
    cases
}

/// What a text stands for: `\xNN` is a byte, `{x*N}` N times `x`.
fn bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some((repeated, after)) = rest.strip_prefix('{').and_then(|it| it.split_once('}')) {
            let (text, times) = repeated.rsplit_once('*').expect("`{x*N}`");
            bytes.extend(self::bytes(text).repeat(times.parse().unwrap()));
            rest = after;
        } else if let Some(escape) = rest.strip_prefix("\\x") {
            bytes.push(u8::from_str_radix(&escape[..2], 16).unwrap());
            rest = &escape[2..];
        } else {
            let length = first.len_utf8();
            bytes.extend(&rest.as_bytes()[..length]);
            rest = &rest[length..];
        }
    }
    bytes
}

fn hexadecimal(digits: &[u8]) -> Vec<u8> {
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// What is sent: frames as the corpus writes them, on one connection.
struct Script {
    place: Place,
    /// The last stream that was opened.
    last: u32,
}

impl Script {
    fn new(place: Place) -> Self {
        Self { place, last: 1 }
    }

    fn stream(&mut self, word: &str) -> u32 {
        match word {
            "next" => {
                self.last += 2;
                self.last
            }
            "last" => self.last,
            number => {
                let number = number.parse().expect("a stream");
                // Even ones are a server's.
                if number % 2 == 1 && number <= 0x7fff_ffff {
                    self.last = self.last.max(number);
                }
                number
            }
        }
    }

    /// A block of fields: `name=value`, `+name=value` for the table to keep, `#N` for the Nth of the
    /// table, `~HEX` for bytes.
    fn block(&self, words: &[&str]) -> Vec<u8> {
        let mut block = Vec::new();
        for word in words {
            let (indexed, field) = match word.strip_prefix('+') {
                Some(field) => (true, field),
                None => (false, *word),
            };
            if let Some(index) = word.strip_prefix('#') {
                block.extend(http2::integer(index.parse().unwrap(), 7, 0x80));
            } else if let Some(digits) = word.strip_prefix('~') {
                block.extend(hexadecimal(&bytes(digits)));
            } else {
                let (name, value) = match field.strip_prefix(':') {
                    Some(rest) => {
                        let (name, value) = rest.split_once('=').unwrap();
                        (format!(":{name}"), value)
                    }
                    None => {
                        let (name, value) = field.split_once('=').unwrap();
                        (name.to_owned(), value)
                    }
                };
                block.extend(http2::field(&bytes(&name), &bytes(value), indexed));
            }
        }
        block
    }

    /// Replaces `{get}`, `{post}`, `{scheme}` and `{authority}`.
    fn fill(&self, text: &str) -> String {
        let (scheme, authority) = (self.place.scheme(), self.place.authority());
        let common = format!(":scheme={scheme} :authority={authority}");
        let path = match text.contains(":path=") {
            true => "",
            false => " :path=/1",
        };
        text.replace("{get}", &format!(":method=GET {common}{path}"))
            .replace("{post}", &format!(":method=POST {common}{path}"))
            .replace("{scheme}", scheme)
            .replace("{authority}", authority)
    }

    /// `TYPE STREAM [FLAG...] [PAYLOAD]`.
    fn frame(&mut self, text: &str) -> Vec<u8> {
        let text = self.fill(text);
        let mut words: Vec<&str> = text.split(' ').collect();
        let (name, stream) = (words.remove(0), words.remove(0));
        let stream = self.stream(stream);
        let mut flags = 0;
        while let Some(flag) = words.first().and_then(|word| match *word {
            "END_STREAM" => Some(http2::END_STREAM),
            "ACK" => Some(http2::ACK),
            "END_HEADERS" => Some(http2::END_HEADERS),
            "PADDED" => Some(8),
            "PRIORITY" => Some(0x20),
            _ => None,
        }) {
            flags |= flag;
            words.remove(0);
        }
        let numbers = |words: &[&str]| -> Vec<u32> {
            let error = |word: &&str| http2::ERRORS.iter().position(|known| known == word);
            words
                .iter()
                .map(|word| match error(word) {
                    Some(error) => u32::try_from(error).unwrap(),
                    None => word.parse().unwrap(),
                })
                .collect()
        };
        let payload = match name {
            "DATA" | "PING" | "UNKNOWN" => bytes(&words.join(" ")),
            "HEADERS" | "CONTINUATION" => self.block(&words),
            "PUSH_PROMISE" => {
                let promised = numbers(&words[..1])[0].to_be_bytes().to_vec();
                [promised, self.block(&words[1..])].concat()
            }
            "SETTINGS" => numbers(&words)
                .chunks(2)
                .flat_map(|pair| {
                    let setting = u16::try_from(pair[0]).unwrap().to_be_bytes();
                    setting.into_iter().chain(pair[1].to_be_bytes())
                })
                .collect(),
            // The weight of a dependency is of no consequence.
            "PRIORITY" => [&numbers(&words)[0].to_be_bytes()[..], &[0]].concat(),
            "RST_STREAM" | "WINDOW_UPDATE" | "GOAWAY" => numbers(&words)
                .iter()
                .flat_map(|number| number.to_be_bytes())
                .collect(),
            other => panic!("no frame `{other}`"),
        };
        let kind = http2::TYPES.iter().position(|known| *known == name);
        let kind = kind.map_or(0x7f, |kind| u8::try_from(kind).unwrap());
        http2::frame(kind, flags, stream, &payload)
    }

    /// A line of the corpus: frames between `;`, or `N times` them.
    fn line(&mut self, line: &str) -> Vec<u8> {
        let (times, frames) = match line.split_once(" times ") {
            Some((times, frames)) => (times.parse().unwrap(), frames),
            None => (1, line),
        };
        let mut once = || -> Vec<u8> {
            let frame = |frame: &str| match frame.strip_prefix("RAW ") {
                Some(digits) => hexadecimal(digits.as_bytes()),
                None => self.frame(frame),
            };
            frames.split("; ").flat_map(frame).collect()
        };
        match frames.contains(" next ") {
            true => (0..times).flat_map(|_| once()).collect(),
            false => once().repeat(times),
        }
    }
}

/// `N times` what stands often.
fn counted(items: Vec<String>) -> Vec<String> {
    let mut counts = BTreeMap::<&str, usize>::new();
    for item in &items {
        *counts.entry(item).or_default() += 1;
    }
    match items.len() > 4 {
        true => counts
            .into_iter()
            .map(|(item, count)| match count {
                1 => item.to_owned(),
                _ => format!("{count} times {item}"),
            })
            .collect(),
        false => items,
    }
}

/// What the agent answered, but to the good requests that stand before and after.
fn describe(came: &Came, stalled: bool, last_good: Option<u32>) -> String {
    let mut answers = Vec::new();
    if stalled {
        answers.push("stalls".to_owned());
    }
    let streams = || {
        let others = |(stream, _): &(&u32, _)| **stream != 1 && Some(**stream) != last_good;
        came.streams.iter().filter(others)
    };
    if streams().count() > 4 {
        answers.extend(counted(streams().map(|(_, it)| it.describe()).collect()));
    } else {
        answers.extend(streams().map(|(stream, it)| format!("{stream} {}", it.describe())));
    }
    if came.pongs > 0 {
        answers.extend(counted(vec!["PING".to_owned(); came.pongs]));
    }
    // The first acknowledges the settings that every client begins with.
    if came.settings_acknowledged > 1 {
        let count = came.settings_acknowledged - 1;
        answers.extend(counted(vec!["SETTINGS".to_owned(); count]));
    }
    match (came.goaway, came.closed) {
        (Some(error), true) => answers.push(format!("GOAWAY {}", http2::error_name(error))),
        (Some(error), false) => {
            answers.push(format!("GOAWAY {} without end", http2::error_name(error)));
        }
        (None, true) => answers.push("closed".to_owned()),
        (None, false) => {}
    }
    match answers.is_empty() {
        true => "-".to_owned(),
        false => answers.join("; "),
    }
}

/// Whether answers are those of the corpus, where `...` stands for any others.
fn answers_match(expected: &str, found: &str) -> bool {
    match expected.strip_prefix("...; ") {
        Some(expected) => found == expected || found.ends_with(&format!("; {expected}")),
        None => found == expected,
    }
}

/// Whether the origin saw what the corpus says; `at most N times X` is X and nothing else.
fn seen_matches(expected: &str, seen: &[String]) -> bool {
    match expected
        .strip_prefix("at most ")
        .and_then(|rest| rest.split_once(" times "))
    {
        Some((most, what)) => {
            seen.len() <= most.parse().unwrap() && seen.iter().all(|seen| seen == what)
        }
        None => describe_seen(seen) == expected,
    }
}

fn describe_seen(seen: &[String]) -> String {
    match seen.is_empty() {
        true => "-".to_owned(),
        false => counted(seen.to_vec()).join(", "),
    }
}

/// What the cases have in common.
struct Attacks {
    /// A Unix socket holds little, so that who does not read is soon felt.
    proxy: PathBuf,
    root: PathBuf,
    http1: StrictOrigin,
    http2: StrictOrigin,
}

impl Attacks {
    async fn connect(&self, place: Place) -> Box<dyn Io> {
        let mut io = UnixStream::connect(&self.proxy).await.unwrap();
        if place == Place::Proxy {
            return Box::new(io);
        }
        let host = place.authority();
        open_tunnel(&mut io, &format!("{host}:443"))
            .await
            .expect(200);
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(&self.root).unwrap())
            .unwrap();
        let mut config = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from(host).unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        Box::new(connector.connect(name, io).await.unwrap())
    }

    /// Attacks over a connection of its own, between two good requests: what is answered, and seen.
    async fn attack(&self, case: &Case, place: Place) -> (String, Vec<String>) {
        let mut script = Script::new(place);
        // The table of fields is switched off, so that answers can be read without one.
        let settings = script.frame("SETTINGS 0 1 0");
        let frames = Frames::begin(self.connect(place).await, &settings).await;
        assert!(
            self.good(&frames, 1, place).await,
            "{}: {:?}",
            case.name,
            *frames.came()
        );
        let mut seen = self.take_seen(place, case);
        // In a flood, of the time before.
        seen.retain(|seen| !seen.contains(" /wait/"));
        assert_eq!(seen, ["GET /good"], "before {}", case.name);
        let mut stalled = false;
        for line in &case.sends {
            match line.as_str() {
                "nothing more is read" => frames.read_on(false),
                "all is read again" => frames.read_on(true),
                _ => match line.strip_prefix("waits for ") {
                    Some(stream) => {
                        let stream = script.stream(stream);
                        let has_come = |came: &Came| came.streams.contains_key(&stream);
                        assert!(frames.until(LIMIT, has_come).await, "{}", case.name);
                    }
                    None => stalled |= !frames.write(&script.line(line)).await,
                },
            }
        }
        let is_expected =
            |came: &Came| answers_match(case.answers(place), &describe(came, stalled, None));
        let limit = match case.answers(place) {
            "?" => Duration::from_millis(500),
            _ => LIMIT,
        };
        frames.until(limit, is_expected).await;
        let mut seen = Vec::new();
        let has_seen = self.see(place, case, &mut seen);
        let _ = tokio::time::timeout(limit, has_seen).await;
        let is_over = frames.came().closed || frames.came().goaway.is_some();
        let last_good = (!is_over && !case.good_elsewhere).then(|| script.stream("next"));
        let is_good = match (last_good, case.good_elsewhere) {
            (Some(stream), _) => self.good(&frames, stream, place).await,
            (None, true) => {
                let other = Frames::begin(self.connect(place).await, &settings).await;
                self.good(&other, 1, place).await
            }
            (None, false) => true,
        };
        let mut found = describe(&frames.came(), stalled, last_good);
        if !is_good {
            found.push_str("; the good request fails");
        }
        seen.extend(self.take_seen(place, case));
        if let Some(good) = seen.iter().rposition(|seen| seen == "GET /good") {
            seen.remove(good);
        }
        (found, seen)
    }

    /// Waits until the origin saw what it is to see.
    async fn see(&self, place: Place, case: &Case, seen: &mut Vec<String>) {
        loop {
            seen.extend(self.take_seen(place, case));
            if seen_matches(case.seen(place), seen) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether a good request is answered.
    async fn good(&self, frames: &Frames, stream: u32, place: Place) -> bool {
        // With a window of its own, since the case may have left none.
        let request = Script::new(place).line(&format!(
            "HEADERS {stream} END_STREAM END_HEADERS {{get}} :path=/good; WINDOW_UPDATE {stream} 100"
        ));
        frames.write(&request).await;
        let is_answered = |came: &Came| {
            let answer = came.streams.get(&stream);
            came.closed || answer.is_some_and(|answer| answer.ended || answer.reset.is_some())
        };
        frames.until(LIMIT, is_answered).await;
        let came = frames.came();
        let answer = came.streams.get(&stream).map(http2::Answer::describe);
        answer.as_deref() == Some("200")
    }

    /// What the origin saw, but of the neighbour, and of other cases: what they cancelled it may see late.
    fn take_seen(&self, place: Place, case: &Case) -> Vec<String> {
        let mut seen = match place {
            Place::Proxy => self.http1.take(),
            Place::Tunnel => self.http2.take(),
        };
        let is_the_cases = |path: &str| case.sends.iter().any(|line| line.contains(path));
        seen.retain(|seen| match seen.split_once(' ') {
            Some((_, "/neighbour")) => false,
            Some((_, path)) if path.starts_with("/wait/") => is_the_cases(path),
            _ => true,
        });
        seen
    }
}

/// Somebody else, who asks and asks.
struct Neighbour {
    answered: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Neighbour {
    fn start(puppet: Puppet) -> Self {
        let answered = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&answered);
        let task = tokio::spawn(async move {
            let mut io = puppet.connect().await;
            loop {
                io.write_all(NEIGHBOURS.as_bytes()).await.unwrap();
                read_response(&mut io).await.expect(200);
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { answered, task }
    }

    fn answered(&self) -> usize {
        assert!(!self.task.is_finished(), "the neighbour is answered");
        self.answered.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_attacks_are_answered_and_seen_as_the_corpus_says() {
    let mut world = World::servers().await;
    let (http1, http2) = (StrictOrigin::default(), StrictOrigin::default());
    let certificate = world.authority.issue(&["origin.example.test"]).unwrap();
    for (name, address) in [
        ("raw", http1.start_http1().await),
        ("origin", http2.start_http2(certificate, 1000).await),
    ] {
        world.origins.push((name.to_owned(), address));
    }
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{ORIGINS}"), POLICIES)
        .await;
    world.good().await;
    let proxy = world.address("proxy").to_string();
    let attacks = Attacks {
        proxy: world.path("proxy.sock"),
        root: world.path("ca.pem"),
        http1,
        http2,
    };
    let neighbour = Neighbour::start(Puppet::start(&proxy, unprivileged()).await);
    let cases = cases();
    let (mut scripts, mut floods, mut wrong) = (0, 0, Vec::new());
    for case in &cases {
        for place in &case.places {
            let before = neighbour.answered();
            loop {
                let (found, seen) = attacks.attack(case, *place).await;
                let is_answered = answers_match(case.answers(*place), &found);
                if !is_answered || !seen_matches(case.seen(*place), &seen) {
                    let seen = describe_seen(&seen);
                    let name = &case.name;
                    wrong.push(format!("{name}, {place:?}\nanswers: {found}\nseen: {seen}"));
                    break;
                }
                if !case.is_flood || neighbour.answered() - before >= NEIGHBOURS_ANSWERS {
                    break;
                }
            }
            scripts += 1;
            floods += usize::from(case.is_flood);
        }
    }
    assert!(wrong.is_empty(), "found instead:\n{}", wrong.join("\n"));
    world.good().await;
    reached("http2_attacks", cases.len());
    reached("http2_attacks_classes", CORPUS.matches("\n## ").count());
    reached("http2_scripts", scripts);
    reached("http2_floods", floods);
}
