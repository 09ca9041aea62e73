//! An audit file that somebody had in hand: what verifies is a chain, and what verifies against a head
//! that is known from elsewhere is byte for byte what was written.

use aws_lc_rs::digest::{SHA256, digest};
use countersign::audit::verify::{ExpectedHead, VerifyError, verify};
use tempfile::TempDir;

/// What the agent wrote.
const WRITTEN: &[u8] = include_bytes!("../seeds/audit_file/written.jsonl");

thread_local! {
    static DIRECTORY: TempDir = tempfile::tempdir().expect("a directory");
}

pub fn run(input: &[u8]) {
    DIRECTORY.with(|directory| {
        let path = directory.path().join("audit.jsonl");
        std::fs::write(&path, input).expect("a file");
        let lines: Vec<&[u8]> = input.split_inclusive(|byte| *byte == b'\n').collect();
        match verify(&path, None) {
            Ok(whole) => {
                assert_eq!(whole.files, std::slice::from_ref(&path));
                assert_eq!(whole.records, lines.len() as u64);
                follows(&lines, whole.first_sequence);
                let head = lines
                    .last()
                    .map_or_else(|| "0".repeat(64), |line| sha256(line));
                assert_eq!(whole.head_hash, head);
            }
            Err(VerifyError::Broken(broken)) => {
                assert!((1..=lines.len() as u64).contains(&broken.line));
                assert!(!broken.problem.is_empty());
            }
            Err(VerifyError::Unreadable { path, error }) => panic!("{}: {error}", path.display()),
        }
        let known = verify(&path, Some(&written_head()));
        assert_eq!(known.is_ok(), input == WRITTEN, "{known:?}");
    });
}

/// What chains a record.
#[derive(serde::Deserialize)]
struct Link {
    sequence: u64,
    previous: String,
}

/// Each line names the one before it by hash and number.
fn follows(lines: &[&[u8]], first_sequence: u64) {
    let mut previous: Option<(u64, String)> = None;
    for line in lines {
        let Link {
            sequence,
            previous: named,
        } = serde_json::from_slice(line).expect("what verifies is a chain");
        match &previous {
            Some((before, hash)) => {
                assert_eq!(sequence, before + 1);
                assert_eq!(named, *hash);
            }
            None => assert_eq!(sequence, first_sequence),
        }
        previous = Some((sequence, sha256(line)));
    }
}

fn written_head() -> ExpectedHead {
    let lines: Vec<&[u8]> = WRITTEN.split_inclusive(|byte| *byte == b'\n').collect();
    let hash = sha256(lines.last().expect("records"));
    format!("{}:{hash}", lines.len()).parse().expect("a head")
}

fn sha256(bytes: &[u8]) -> String {
    let hash = digest(&SHA256, bytes);
    hash.as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
