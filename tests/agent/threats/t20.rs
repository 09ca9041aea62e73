//! T20: an audit file that somebody who may write it has edited.

use std::path::Path;
use std::process::Output;

use aws_lc_rs::digest::{SHA256, digest};
use countersign_attestors::hexadecimal;
use tokio::process::Command;

use crate::support::counts::reached;
use crate::support::curl::curl;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const REQUESTS: usize = 4;

/// `countersign audit verify`, beside the head that `status` showed.
async fn verify(file: &Path, head: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_countersign"))
        .args(["audit", "verify", "--expect-head", head])
        .arg(file)
        .output()
        .await
        .unwrap()
}

/// The lines after one that was edited, with the hashes that they then must have: what only a head that is
/// kept elsewhere tells.
fn rewritten(edited: &[u8], after: &[&[u8]]) -> Vec<u8> {
    let mut all = edited.to_vec();
    let mut before = edited.to_vec();
    for line in after {
        let hash = hexadecimal(digest(&SHA256, &before).as_ref());
        let line = String::from_utf8(line.to_vec()).unwrap();
        let (start, rest) = line.split_once("\"previous\":\"").unwrap();
        before = format!("{start}\"previous\":\"{hash}{}", &rest[64..]).into_bytes();
        all.extend(&before);
    }
    all
}

/// Every way of editing the lines, and what it is.
fn edits(lines: &[&[u8]]) -> Vec<(String, Vec<u8>)> {
    let mut edits = Vec::new();
    let mut add = |what: String, lines: Vec<&[u8]>| edits.push((what, lines.concat()));
    for (at, line) in lines.iter().copied().enumerate() {
        let with = |line: &[u8]| [&lines[..at], &[line], &lines[at + 1..]].concat().concat();
        for byte in [
            0,
            1,
            line.len() / 3,
            line.len() / 2,
            line.len() - 3,
            line.len() - 1,
        ] {
            let mut flipped = line.to_vec();
            flipped[byte] ^= 1;
            add(
                format!("flips byte {byte} of line {at}"),
                vec![&with(&flipped)],
            );
        }
        let denied = String::from_utf8(line.to_vec()).unwrap();
        let allowed = denied.replace("\"deny\"", "\"allow\"").into_bytes();
        if allowed != line {
            add(
                format!("turns the decision of line {at}"),
                vec![&with(&allowed)],
            );
            let rewritten = rewritten(&allowed, &lines[at + 1..]);
            add(
                format!("rewrites from line {at} on"),
                [&lines[..at], &[&rewritten]].concat(),
            );
        }
        add(
            format!("deletes line {at}"),
            [&lines[..at], &lines[at + 1..]].concat(),
        );
        add(
            format!("repeats line {at}"),
            [&lines[..=at], &lines[at..]].concat(),
        );
        add(format!("truncates at line {at}"), lines[..at].to_vec());
        add(
            format!("truncates in line {at}"),
            [&lines[..at], &[&line[..line.len() / 2]]].concat(),
        );
        if at > 0 {
            let mut swapped = lines.to_vec();
            swapped.swap(at - 1, at);
            add(format!("swaps lines {} and {at}", at - 1), swapped);
        }
    }
    let reversed: Vec<&[u8]> = lines.iter().rev().copied().collect();
    add("reverses".to_owned(), reversed);
    edits
}

#[tokio::test(flavor = "multi_thread")]
async fn t20_every_edit_of_the_audit_is_found() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}admin: {{socket: admin.sock}}\n{DESTINATIONS}");
    world.start_agent(&configuration, POLICIES).await;
    world.good().await;
    for _ in 0..REQUESTS {
        let url = "https://orders.example.test/v1/orders";
        world.curl(&["-X", "DELETE", url]).await.expect(403);
    }
    world.good().await;
    world.audit().await;
    let socket = world.path("admin.sock");
    let status = [
        "--unix-socket",
        socket.to_str().unwrap(),
        "http://agent/v1/status",
    ];
    let status = curl(&status).await.expect(200).json();
    let head = status["audit"]["head"].as_str().unwrap();
    let (sequence, _) = head.split_once(':').unwrap();
    let metrics = world.app().agent().metrics.encode();
    let exported = format!("countersign_audit_head_sequence {sequence}\n");
    assert!(metrics.contains(&exported), "{metrics}");

    let written = std::fs::read(world.path("audit.jsonl")).unwrap();
    let lines: Vec<&[u8]> = written.split_inclusive(|byte| *byte == b'\n').collect();
    assert!(lines.len() > REQUESTS + 2);
    let edited = world.path("edited.jsonl");
    std::fs::write(&edited, &written).unwrap();
    let whole = verify(&edited, head).await;
    assert!(whole.status.success(), "{whole:?}");
    let edits = edits(&lines);
    for (what, content) in &edits {
        std::fs::write(&edited, content).unwrap();
        let found = verify(&edited, head).await;
        assert_eq!(found.status.code(), Some(1), "{what}: {found:?}");
        assert!(!found.stderr.is_empty(), "{what}");
    }
    std::fs::write(&edited, &written).unwrap();
    assert!(verify(&edited, head).await.status.success());
    world.good().await;
    let kinds = [
        "flips",
        "turns",
        "rewrites",
        "deletes",
        "repeats",
        "truncates",
        "swaps",
        "reverses",
    ];
    let made = |kind: &&str| edits.iter().any(|(what, _)| what.starts_with(kind));
    reached(
        "kinds_of_edits",
        kinds.iter().filter(|kind| made(kind)).count(),
    );
}
