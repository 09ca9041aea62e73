//! Hosts in every spelling that leads to an address which is nobody's business: none gets there.

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use crate::support::counts::reached;
use crate::support::puppet::Puppet;
use crate::support::raw::read_response;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const CORPUS: &str = include_str!("../corpora/host-spellings.txt");

const TUNNELS: &str = r#"
@id("tunnels")
permit (principal, action == Action::"connect", resource == Destination::"unmatched")
when { principal has unix };
"#;

/// What an escaped host is on the wire.
fn bytes(host: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = host;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        bytes.extend(before.as_bytes());
        let (value, length) = match escape.as_bytes()[1] {
            b't' => (vec![b'\t'], 2),
            b'0' => (vec![0], 2),
            b'\\' => (vec![b'\\'], 2),
            b'x' => (vec![u8::from_str_radix(&escape[2..4], 16).unwrap()], 4),
            b'u' => {
                let code = u32::from_str_radix(&escape[2..6], 16).unwrap();
                let character = char::from_u32(code).unwrap();
                (character.to_string().into_bytes(), 6)
            }
            other => panic!("no escape `\\{}`", char::from(other)),
        };
        bytes.extend(value);
        rest = &escape[length..];
    }
    bytes.extend(rest.as_bytes());
    bytes
}

/// The code of the answer to a head; the status where it has none.
async fn ask(puppet: &Puppet, head: &[&[u8]]) -> String {
    let mut stream = puppet.connect().await;
    stream.write_all(&head.concat()).await.unwrap();
    let answer = read_response(&mut stream).await;
    match answer.code() {
        code if code.is_empty() => answer.status.to_string(),
        code => code,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_host_leads_past_the_guard() {
    // On every address of the machine, IPv4's too.
    let canary = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).await.unwrap();
    let port = canary.local_addr().unwrap().port();
    let arrived = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&arrived);
    tokio::spawn(async move {
        while canary.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    // It stands where they would lead.
    for address in ["127.0.0.1", "::1"] {
        drop(TcpStream::connect((address, port)).await.unwrap());
    }
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}unmatched: tunnel\n");
    let policies = format!("{POLICIES}{TUNNELS}");
    world.start_agent(&configuration, &policies).await;
    let puppet = Puppet::start(&world.address("proxy").to_string(), None).await;
    world.good().await;
    let (mut wrong, mut count) = (Vec::new(), 0);
    let is_case = |text: &&str| !text.is_empty() && !text.starts_with('#');
    for case in CORPUS.lines().filter(is_case) {
        let fields: Vec<&str> = case.splitn(3, " | ").collect();
        let [connected, absolute, spelling] = fields[..] else {
            panic!("`{case}` is no case");
        };
        let host = bytes(spelling);
        let port = format!(":{port}");
        let port = port.as_bytes();
        let end = b"\r\n\r\n";
        let by_connect: [&[u8]; 7] = [
            b"CONNECT ",
            &host,
            port,
            b" HTTP/1.1\r\nHost: ",
            &host,
            port,
            end,
        ];
        let by_url: [&[u8]; 7] = [
            b"GET http://",
            &host,
            port,
            b"/ HTTP/1.1\r\nHost: ",
            &host,
            port,
            end,
        ];
        let found = (ask(&puppet, &by_connect).await, ask(&puppet, &by_url).await);
        if (found.0.as_str(), found.1.as_str()) != (connected, absolute) {
            wrong.push(format!("{} | {} | {spelling}", found.0, found.1));
        }
        count += 1;
    }
    assert!(wrong.is_empty(), "found instead:\n{}", wrong.join("\n"));
    assert_eq!(
        arrived.load(Ordering::SeqCst),
        2,
        "something else got to the canary"
    );
    world.good().await;
    reached("host_spellings", count);
    reached("host_spellings_classes", CORPUS.matches("\n## ").count());
}
