#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use countersign_attestors::{AttributeValue, IsolationKey, WorkloadFacts};
use http::{Method, StatusCode, Version};

use super::verify::{ExpectedHead, VerifyError, Whole, verify};
use super::*;
use crate::clock::SystemClock;
use crate::hardening::refuse_files_and_threads;
use crate::request::EgressRequest;
use crate::request_id::{RequestId, SessionId, TraceContext};

/// Long enough for a machine under load; nothing waits that long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);

fn facts() -> WorkloadFacts {
    let unix = BTreeMap::from([
        ("uid".to_owned(), AttributeValue::Long(1000)),
        (
            "executable".to_owned(),
            AttributeValue::String("/usr/bin/curl".to_owned()),
        ),
    ]);
    WorkloadFacts {
        groups: BTreeMap::from([("unix".to_owned(), unix)]),
        failed_attestors: Vec::new(),
        evidence: vec!["sock_diag".to_owned(), "pidfd".to_owned()],
    }
}

fn asked(text: &str) -> Option<Arc<EgressRequest>> {
    Some(Arc::new(crate::policy::described::request(text).unwrap()))
}

fn request() -> RequestRecord {
    let now = SystemTime::now();
    let scopes: Arc<[String]> = vec!["orders.read".to_owned()].into();
    RequestRecord {
        time: now,
        request_id: RequestId::new(now),
        trace_id: TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
            .map(|context| context.trace_id()),
        session: Some(SessionId::new(now)),
        workload: Some(workload_summary(&facts())),
        listener: "workloads".into(),
        destination: Some("orders".into()),
        asked: asked("GET https://orders.countersign.test/v1/orders?key=never-recorded"),
        method: Some(Method::GET),
        protocol: Version::HTTP_2,
        status: StatusCode::OK,
        decision: Some(DecisionReference {
            decided: Decided::Allow,
            policies: vec!["orders-read".into()].into(),
            nearest: None,
            policy_version: "9c1e2f0a77b1".into(),
            attributes: vec!["unix.uid=1000".to_owned()].into(),
        }),
        credential: Some("orders-api".into()),
        asked_and_granted: AskedAndGranted {
            scopes_asked: Arc::clone(&scopes),
            scopes_granted: scopes,
            audience_asked: None,
            audience_granted: None,
        },
        token: Some(TokenReference {
            sha256: Hash::of(b"a token").to_string().into(),
            expires_at: now + Duration::from_secs(60),
            obtained: Obtained::Minted,
        }),
        outcome: "ok",
        internal: None,
        latency: Latency {
            total: Duration::from_micros(4200),
            ours: Duration::from_micros(300),
            upstream: Duration::from_micros(1000),
            token_endpoint: Duration::from_micros(2900),
        },
        attempts: 1,
    }
}

fn denied() -> RequestRecord {
    RequestRecord {
        method: Some(Method::DELETE),
        asked: asked("DELETE https://orders.countersign.test/v1/orders/7"),
        status: StatusCode::FORBIDDEN,
        decision: Some(DecisionReference {
            decided: Decided::Deny,
            policies: Vec::new().into(),
            nearest: Some("orders-read".into()),
            policy_version: "9c1e2f0a77b1".into(),
            attributes: Vec::new().into(),
        }),
        token: None,
        outcome: "policy_denied",
        ..request()
    }
}

fn attested() -> AttestedRecord {
    let now = SystemTime::now();
    AttestedRecord {
        time: now,
        session: SessionId::new(now),
        listener: "workloads".into(),
        identity: IsolationKey("uid:1000".into()),
        facts: Arc::new(facts()),
        valid_until: None,
    }
}

fn file_config(path: &Path, rotate_size: u64, keep: usize) -> AuditConfig {
    AuditConfig {
        on_failure: OnAuditFailure::Block,
        sinks: vec![AuditSink::File {
            path: path.to_owned(),
            rotate_size,
            keep,
        }],
    }
}

fn start(config: &AuditConfig) -> (Audit, AuditWriter) {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let metrics = Metrics::new(Arc::clone(&clock));
    let began = Instant::now();
    loop {
        let others = OtherAgents::AreMistakes;
        match Audit::start(config, others, Arc::clone(&clock), &metrics) {
            // A child that another test is starting has the file open, too, until it executes.
            Err(refused) if refused.code == "audit_file_in_use" && began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            started => return started.unwrap(),
        }
    }
}

/// Starts, records `count` requests, one batch each `batch`, and stops.
fn record_requests(config: &AuditConfig, count: usize) -> (u64, String) {
    let (audit, writer) = start(config);
    for _ in 0..count {
        audit.record(Record::Request(&request())).unwrap();
    }
    assert!(writer.stop(PATIENCE));
    audit.head()
}

fn whole(path: &Path) -> Whole {
    verify(path, None).unwrap()
}

/// Where the chain breaks: file name and line.
fn broken(path: &Path, expected: Option<&ExpectedHead>) -> (String, u64) {
    match verify(path, expected).unwrap_err() {
        VerifyError::Broken(broken) => (
            broken
                .file
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned(),
            broken.line,
        ),
        VerifyError::Unreadable { path, error } => panic!("{}: {error}", path.display()),
    }
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(
            started.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn records_are_chained_lines_and_hold_what_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let (audit, writer) = start(&file_config(&path, 1 << 20, 3));
    audit
        .lifecycle(LifecycleEvent::Start {
            version: "0.1.0",
            configuration_sha256: "c0".to_owned(),
            policy_version: "9c1e2f".to_owned(),
        })
        .unwrap();
    audit.record(Record::Attested(&attested())).unwrap();
    audit.record(Record::Request(&request())).unwrap();
    audit.record(Record::Request(&denied())).unwrap();
    assert!(writer.stop(PATIENCE));

    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0]["sequence"], 1);
    assert_eq!(lines[0]["previous"], "0".repeat(64));
    assert_eq!(lines[0]["event"], "start");
    assert_eq!(lines[1]["kind"], "attested");
    assert_eq!(lines[1]["attributes"]["unix"]["uid"], 1000);
    assert_eq!(lines[1]["evidence"][1], "pidfd");
    let record = &lines[2];
    assert_eq!(record["kind"], "request");
    assert_eq!(record["path"], "/v1/orders");
    assert_eq!(record["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(record["policies"][0], "orders-read");
    assert_eq!(record["latency_us"]["ours"], 300);
    assert_eq!(record["attributes_read"][0], "unix.uid=1000");
    assert!(
        record["time"]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .is_ok()
    );
    assert_eq!(lines[3]["outcome"], "policy_denied");
    assert!(!text.contains("never-recorded"));

    // The head is what `tail -n 1 FILE | sha256sum` prints.
    let last = format!("{}\n", text.lines().last().unwrap());
    assert_eq!(audit.head(), (4, Hash::of(last.as_bytes()).to_string()));
    assert_eq!(whole(&path).records, 4);

    let sizes: Vec<usize> = text.lines().map(str::len).collect();
    println!(
        "bytes per record: request {}, denied {}, attested {}",
        sizes[2], sizes[3], sizes[1]
    );
    assert!(sizes[2] < 1024);
}

#[test]
fn the_chain_goes_on_across_rotation_and_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let config = file_config(&path, 8 * 1024, 100);
    let mut head = (0, String::new());
    for _ in 0..5 {
        head = record_requests(&config, 40);
    }
    let all = whole(&path);
    assert!(all.files.len() > 10, "{} files", all.files.len());
    assert_eq!(all.first_sequence, 1);
    assert_eq!((all.head_sequence, all.head_hash.clone()), head);
    let requests: usize = all
        .files
        .iter()
        .map(|file| {
            fs::read_to_string(file)
                .unwrap()
                .matches(r#""kind":"request""#)
                .count()
        })
        .sum();
    assert_eq!(requests, 200);
    for file in &all.files[1..] {
        let text = fs::read_to_string(file).unwrap();
        assert!(text.len() <= 8 * 1024, "{}", text.len());
        assert!(
            text.lines()
                .next()
                .unwrap()
                .contains(r#""event":"file_continued""#)
        );
    }
    let expected: ExpectedHead = format!("{}:{}", head.0, head.1).parse().unwrap();
    assert!(verify(&path, Some(&expected)).is_ok());

    // With fewer kept, the chain is whole from where it begins.
    record_requests(&file_config(&path, 8 * 1024, 3), 40);
    let kept = whole(&path);
    assert_eq!(kept.files.len(), 4);
    assert!(kept.first_sequence > 1);
    assert!(broken(&path, Some(&"1:000000000000".parse().unwrap())).1 > 0);

    // A crash between moving a file away and beginning the next.
    fs::rename(&path, directory.path().join("audit.jsonl.0-moved")).unwrap();
    for number in (1..=3).rev() {
        let name = |number| directory.path().join(format!("audit.jsonl.{number}"));
        fs::rename(name(number), name(number + 1)).unwrap();
    }
    fs::rename(
        directory.path().join("audit.jsonl.0-moved"),
        directory.path().join("audit.jsonl.1"),
    )
    .unwrap();
    let before = kept.head_sequence;
    let (sequence, _) = record_requests(&file_config(&path, 1 << 20, 10), 1);
    assert_eq!(sequence, before + 2);
    assert_eq!(whole(&path).head_sequence, before + 2);
}

#[test]
fn every_kind_of_tampering_is_found_at_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let (sequence, hash) = record_requests(&file_config(&path, 1 << 20, 3), 30);
    let expected: ExpectedHead = format!("{sequence}:{hash}").parse().unwrap();
    let original = fs::read(&path).unwrap();
    let lines: Vec<&[u8]> = original.split_inclusive(|byte| *byte == b'\n').collect();
    let mut found = [0; 4];
    let restore = |bytes: &[u8]| fs::write(&path, bytes).unwrap();

    assert!(verify(&path, Some(&expected)).is_ok());
    // Flip one bit of every 23rd byte.
    for index in (0..original.len()).step_by(23) {
        let mut flipped = original.clone();
        flipped[index] ^= 1;
        restore(&flipped);
        let line = original[..index]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count() as u64
            + 1;
        let (_, at) = broken(&path, Some(&expected));
        assert!(
            at == line || original[index] == b'\n',
            "byte {index} of line {line} found at {at}"
        );
        found[0] += 1;
    }
    // Delete each line.
    for index in 0..lines.len() {
        let mut left = lines.clone();
        left.remove(index);
        restore(&left.concat());
        broken(&path, Some(&expected));
        found[1] += 1;
    }
    // Swap each line with the next.
    for index in 0..lines.len() - 1 {
        let mut swapped = lines.clone();
        swapped.swap(index, index + 1);
        restore(&swapped.concat());
        assert_eq!(broken(&path, None).1, index as u64 + 1);
        found[2] += 1;
    }
    // Cut the end off, at line ends (found by the expected head) and within lines.
    for count in 0..lines.len() {
        let cut = lines[..count].concat();
        restore(&cut);
        assert_eq!(broken(&path, Some(&expected)).1, count as u64);
        restore(&original[..cut.len() + 9]);
        assert_eq!(broken(&path, None).1, count as u64 + 1);
        found[3] += 2;
    }
    println!(
        "found: {} flips, {} deletions, {} swaps, {} truncations",
        found[0], found[1], found[2], found[3]
    );
    assert_eq!(found[1..], [30, 29, 60]);
    assert!(found[0] > 1000);
    restore(&original);
    assert!(verify(&path, Some(&expected)).is_ok());
}

#[test]
fn a_removed_file_and_a_removed_beginning_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    record_requests(&file_config(&path, 4 * 1024, 100), 60);
    assert!(whole(&path).files.len() > 5);
    let third = directory.path().join("audit.jsonl.3");
    let text = fs::read(&third).unwrap();
    fs::remove_file(&third).unwrap();
    assert_eq!(broken(&path, None), ("audit.jsonl.2".to_owned(), 1));
    fs::write(&third, text).unwrap();
    assert!(verify(&path, None).is_ok());

    let oldest = whole(&path).files[0].clone();
    let text = fs::read_to_string(&oldest).unwrap();
    let (_, rest) = text.split_once('\n').unwrap();
    fs::write(&oldest, rest).unwrap();
    assert_eq!(
        broken(&path, None),
        (oldest.file_name().unwrap().to_str().unwrap().to_owned(), 1)
    );
}

#[test]
fn a_torn_tail_is_cut_and_the_repair_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let config = file_config(&path, 1 << 20, 3);
    record_requests(&config, 3);
    let torn: &[u8] = br#"{"sequence":4,"previous":"00"#;
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(torn)
        .unwrap();
    assert_eq!(broken(&path, None).1, 4);
    let (sequence, _) = record_requests(&config, 1);
    assert_eq!(sequence, 5);
    let text = fs::read_to_string(&path).unwrap();
    let repair: serde_json::Value = serde_json::from_str(text.lines().nth(3).unwrap()).unwrap();
    assert_eq!(repair["event"], "audit_repaired");
    assert_eq!(repair["bytes_cut"], torn.len());
    assert_eq!(whole(&path).records, 5);

    // A file that holds nothing but a torn line.
    let other = directory.path().join("other.jsonl");
    fs::write(&other, torn).unwrap();
    record_requests(&file_config(&other, 1 << 20, 3), 1);
    assert_eq!(whole(&other).records, 2);
}

#[test]
fn files_that_cannot_be_continued_are_refused_at_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let metrics = Metrics::new(Arc::clone(&clock));
    let refused = |path: &Path| {
        let config = file_config(path, 1 << 20, 3);
        let others = OtherAgents::AreMistakes;
        Audit::start(&config, others, Arc::clone(&clock), &metrics)
            .map(|_| ())
            .unwrap_err()
    };
    let (_audit, writer) = start(&file_config(&path, 1 << 20, 3));
    assert_eq!(refused(&path).code, "audit_file_in_use");
    assert!(writer.stop(PATIENCE));

    let foreign = directory.path().join("notes.txt");
    fs::write(&foreign, "not an audit record\n").unwrap();
    let diagnostic = refused(&foreign);
    assert_eq!(diagnostic.code, "audit_file_unusable");
    assert_eq!(
        fs::read_to_string(&foreign).unwrap(),
        "not an audit record\n"
    );
    assert!(
        refused(&directory.path().join("absent/audit.jsonl"))
            .message
            .contains("no such file")
    );
    assert!(refused(directory.path()).message.contains("is a directory"));
}

#[test]
fn a_file_that_was_moved_away_is_begun_anew() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let (audit, writer) = start(&file_config(&path, 1 << 20, 3));
    audit.record(Record::Request(&request())).unwrap();
    wait_until("the first record", || audit.head().0 == 1);
    fs::rename(&path, directory.path().join("audit.jsonl.1")).unwrap();
    wait_until("a new file", || path.exists());
    audit.record(Record::Request(&request())).unwrap();
    assert!(writer.stop(PATIENCE));
    assert_eq!(whole(&path).records, 3);
}

/// A pipe that takes nothing, as a hanging sink does: refused within the limit, and served again.
#[test]
fn a_sink_that_hangs_stops_requests_and_takes_the_records_later() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let (audit, writer) = start(&file_config(&path, 1 << 20, 3));
    assert!(audit.is_accepting());
    let mut recorded = 0;
    wait_until("requests are refused", || {
        if audit.is_accepting() {
            audit.record(Record::Request(&request())).unwrap();
            recorded += 1;
        }
        !audit.is_accepting()
    });
    // The pipe holds 64 KiB; nothing is given up meanwhile.
    let (sender, received) = mpsc::channel();
    let mut file = fs::File::open(path).unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(count) = file.read(&mut chunk) {
            text.extend_from_slice(&chunk[..count]);
            let lines = text.iter().filter(|byte| **byte == b'\n').count();
            let _ = sender.send((lines, text.clone()));
            if count == 0 {
                break;
            }
        }
    });
    wait_until("requests are served again", || audit.is_accepting());
    audit.record(Record::Request(&request())).unwrap();
    recorded += 1;
    assert!(writer.stop(PATIENCE));
    let mut last = (0, Vec::new());
    wait_until("all records", || {
        if let Ok(next) = received.recv_timeout(Duration::from_millis(100)) {
            last = next;
        }
        last.0 == recorded
    });
    drop(audit);
    reader.join().unwrap();
    let copy = directory.path().join("copy.jsonl");
    fs::write(&copy, &last.1).unwrap();
    assert_eq!(whole(&copy).records, recorded as u64);
}

/// A write that does not return: the writer's thread hangs in the system call.
#[test]
fn a_write_that_does_not_return_stops_requests() {
    let (reading, writing) = nix::unistd::pipe().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let metrics = Metrics::new(Arc::clone(&clock));
    let sink = sink::Sink::unrotated(fs::File::from(writing));
    let (audit, writer) = Audit::start_with(
        vec![sink],
        Vec::new(),
        Vec::new(),
        OnAuditFailure::Block,
        clock,
        &metrics,
    )
    .unwrap();
    // More than the pipe holds.
    for _ in 0..200 {
        audit.record(Record::Request(&request())).unwrap();
    }
    let shows = |metric| metrics.encode().contains(metric);
    wait_until("requests are refused", || {
        !audit.is_accepting() && shows("countersign_audit_accepting 0")
    });
    let mut reading = fs::File::from(reading);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut reading, &mut std::io::sink());
    });
    wait_until("requests are served again", || {
        audit.is_accepting() && shows("countersign_audit_accepting 1")
    });
    assert!(writer.stop(PATIENCE));
}

#[test]
fn nothing_is_taken_that_nobody_will_write() {
    let directory = tempfile::tempdir().unwrap();
    let (audit, _writer) = start(&file_config(
        &directory.path().join("audit.jsonl"),
        1 << 20,
        3,
    ));
    audit.record(Record::Request(&request())).unwrap();
    // As where its thread has ended.
    drop(writer::Writer::new(Vec::new(), Arc::clone(&audit.shared)));
    assert!(!audit.is_accepting());
    audit.record(Record::Request(&request())).unwrap_err();
}

#[test]
fn without_its_thread_there_is_no_audit() {
    let started = std::thread::spawn(|| {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let metrics = Metrics::new(Arc::clone(&clock));
        let sinks = vec![sink::Sink::stdout().unwrap()];
        let on_failure = OnAuditFailure::Degrade;
        refuse_files_and_threads().unwrap();
        Audit::start_with(sinks, Vec::new(), Vec::new(), on_failure, clock, &metrics).is_ok()
    });
    assert!(!started.join().unwrap());
}

#[test]
fn degrade_drops_counts_and_records_the_loss() {
    let (reading, writing) = nix::unistd::pipe().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let metrics = Metrics::new(Arc::clone(&clock));
    let sink = sink::Sink::unrotated(fs::File::from(
        writing.as_fd().try_clone_to_owned().unwrap(),
    ));
    drop(writing);
    let (audit, writer) = Audit::start_with(
        vec![sink],
        Vec::new(),
        Vec::new(),
        OnAuditFailure::Degrade,
        clock,
        &metrics,
    )
    .unwrap();
    let mut recorded = 0;
    wait_until("records are dropped", || {
        for _ in 0..1000 {
            audit.record(Record::Request(&request())).unwrap();
            assert!(audit.is_accepting());
        }
        recorded += 1000;
        audit.state().dropped > 0
    });
    let dropped = audit.state().dropped;
    assert!(metrics.encode().contains(&format!(
        "countersign_audit_records_dropped_total {dropped}"
    )));
    let collected = std::thread::spawn(move || {
        let mut text = String::new();
        fs::File::from(reading).read_to_string(&mut text).unwrap();
        text
    });
    assert!(writer.stop(PATIENCE));
    drop(audit);
    let text = collected.join().unwrap();
    let lost: u64 = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|record| record["event"] == "records_dropped")
        .map(|record| record["count"].as_u64().unwrap())
        .sum();
    let written = text.matches(r#""kind":"request""#).count() as u64;
    assert_eq!(lost, dropped);
    assert_eq!(written + lost, recorded);
}

/// A device that has no space: what a full disk answers, without being root.
#[test]
fn a_full_device_stops_requests_or_not_as_configured() {
    for (on_failure, accepting) in [
        (OnAuditFailure::Block, false),
        (OnAuditFailure::Degrade, true),
    ] {
        let (audit, writer) = start(&AuditConfig {
            on_failure,
            ..file_config(Path::new("/dev/full"), 1 << 20, 3)
        });
        audit.record(Record::Request(&request())).unwrap();
        match accepting {
            true => std::thread::sleep(STALL_LIMIT * 3),
            false => wait_until("requests are refused", || !audit.is_accepting()),
        }
        assert_eq!(audit.is_accepting(), accepting);
        assert!(!writer.stop(Duration::from_millis(20)));
    }
}

/// A file system that fills up and is emptied again.
#[test]
fn a_full_disk_stops_requests_until_there_is_space() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().to_owned();
    // The mount is seen by this thread, and by the writer's, which it starts.
    let thread = std::thread::spawn(move || {
        let none: Option<&str> = None;
        let mounted = unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
            .and_then(|()| {
                mount(
                    Some("tmpfs"),
                    &target,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    Some("size=256k"),
                )
            });
        if mounted.is_err() {
            assert_ne!(
                std::env::var("COUNTERSIGN_REQUIRE_ROOT").as_deref(),
                Ok("1"),
                "needs root"
            );
            println!("a_full_disk_stops_requests_until_there_is_space: needs root");
            return;
        }
        let path = target.join("audit.jsonl");
        fs::write(target.join("ballast"), vec![0; 128 * 1024]).unwrap();
        let (audit, writer) = start(&file_config(&path, 1 << 20, 3));
        let mut recorded = 0;
        wait_until("requests are refused", || {
            if audit.is_accepting() {
                audit.record(Record::Request(&request())).unwrap();
                recorded += 1;
            }
            !audit.is_accepting()
        });
        fs::remove_file(target.join("ballast")).unwrap();
        wait_until("requests are served again", || audit.is_accepting());
        let all_fit = recorded * 900 < 200 * 1024;
        if all_fit {
            assert!(writer.stop(PATIENCE));
            assert_eq!(whole(&path).records, recorded);
        }
    });
    thread.join().unwrap();
}

const CHILD: &str = "COUNTERSIGN_TEST_AUDIT_CHILD";

/// What the killed process does: records as fast as it is told to, and says after each when it was.
#[test]
fn child_that_is_killed() {
    let Some(path) = std::env::var_os(CHILD) else {
        return;
    };
    let (audit, _writer) = start(&file_config(Path::new(&path), 256 * 1024, 50));
    let started = Instant::now();
    let mut said = std::io::stdout().lock();
    loop {
        let record = request();
        let id = record.request_id;
        audit.record(Record::Request(&record)).unwrap();
        writeln!(said, "recorded {id} {}", started.elapsed().as_micros()).unwrap();
        std::thread::sleep(Duration::from_micros(300));
    }
}

#[test]
fn a_sigkill_in_the_middle_of_writing_loses_little_and_leaves_a_whole_chain() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let mut losses = Vec::new();
    for round in 0..20u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "audit::tests::child_that_is_killed",
                "--nocapture",
            ])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.contains("\nrecorded ") {
            assert_ne!(output.read_line(&mut text).unwrap(), 0);
        }
        let reader = std::thread::spawn(move || {
            output.read_to_string(&mut text).unwrap();
            text
        });
        std::thread::sleep(Duration::from_millis(40 + 7 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let said = reader.join().unwrap();
        let said: Vec<(&str, u64)> = said
            .lines()
            .filter_map(|line| line.strip_prefix("recorded "))
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(id, time)| Some((id, time.parse().ok()?)))
            .collect();
        // Starting again repairs what is torn.
        record_requests(&file_config(&path, 256 * 1024, 50), 1);
        let all = whole(&path);
        let text: String = all
            .files
            .iter()
            .map(|file| fs::read_to_string(file).unwrap())
            .collect();
        let last = said.last().unwrap().1;
        let lost = said
            .iter()
            .find(|(id, _)| !text.contains(*id))
            .map_or(0, |(_, time)| last - time);
        losses.push(lost);
    }
    losses.sort_unstable();
    println!("microseconds of records lost by SIGKILL: {losses:?}");
    // The median: one round in which this noisy machine did not run the writer says nothing.
    assert!(losses[losses.len() / 2] <= 50_000, "{losses:?}");
}

const STDOUT_CHILD: &str = "COUNTERSIGN_TEST_AUDIT_STDOUT_CHILD";

#[test]
fn child_that_writes_to_standard_output() {
    if std::env::var_os(STDOUT_CHILD).is_none() {
        return;
    }
    let (audit, writer) = start(&AuditConfig {
        on_failure: OnAuditFailure::Block,
        sinks: vec![AuditSink::Stdout],
    });
    for _ in 0..100 {
        audit.record(Record::Request(&request())).unwrap();
    }
    assert!(writer.stop(PATIENCE));
}

#[test]
fn standard_output_is_a_chain_too() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "audit::tests::child_that_writes_to_standard_output",
            "--nocapture",
        ])
        .env(STDOUT_CHILD, "1")
        .output()
        .unwrap();
    // The test harness writes lines of its own, and one of them without an end.
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: String = text
        .lines()
        .filter_map(|line| line.find(r#"{"sequence""#).map(|start| &line[start..]))
        .map(|line| format!("{line}\n"))
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stdout.jsonl");
    fs::write(&path, lines).unwrap();
    assert_eq!(whole(&path).records, 100);
}

#[test]
fn the_last_records_are_readable_lines() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let (audit, writer) = start(&file_config(&path, 1500, 10));
    audit.lifecycle(LifecycleEvent::Stop).unwrap();
    let allowed = request();
    let refused = denied();
    for record in [
        Record::Attested(&attested()),
        Record::Request(&allowed),
        Record::Attested(&attested()),
        Record::Request(&refused),
    ] {
        audit.record(record).unwrap();
    }
    assert!(writer.stop(PATIENCE));
    assert!(
        whole(&path).files.len() > 1,
        "the lines must lie in several files"
    );
    let rendered: Vec<String> = tail::last(&path, 100)
        .unwrap()
        .iter()
        .filter_map(|line| tail::render(line))
        .filter(|line| !line.contains("continues"))
        .map(|line| line[9..].to_owned())
        .collect();
    assert_eq!(
        rendered,
        [
            "agent stopped".to_owned(),
            format!(
                "allow {} curl uid 1000 GET orders/v1/orders 200, orders-read, token minted 2.9 ms, ours 0.3 ms",
                allowed.request_id
            ),
            format!(
                "deny  {} curl uid 1000 DELETE orders/v1/orders/7 403 policy_denied, nearest orders-read",
                refused.request_id
            ),
        ]
    );
    let last = tail::last(&path, 1).unwrap();
    assert_eq!(last.len(), 1);
    assert!(last[0].contains("policy_denied"));
}

#[test]
fn control_characters_do_not_reach_a_terminal() {
    let record = RequestRecord {
        workload: Some("evil\u{1b}]0;title\u{7}".into()),
        ..request()
    };
    let mut text = vec![b'{'];
    line::append_members(Record::Request(&record), &mut text);
    let line = String::from_utf8(text).unwrap();
    assert!(!tail::render(&line).unwrap().contains(char::is_control));
}

#[test]
fn following_goes_on_through_rotation() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let (audit, writer) = start(&file_config(&path, 4096, 100));
    audit.record(Record::Request(&request())).unwrap();
    wait_until("the first record", || audit.head().0 == 1);
    let (sender, received) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = tail::follow(&path, |line| {
            if line.contains(r#""kind":"request""#) && sender.send(line.to_owned()).is_err() {
                return std::ops::ControlFlow::Break(());
            }
            std::ops::ControlFlow::Continue(())
        });
    });
    let is_followed = |patience| {
        let record = request();
        let id = record.request_id.to_string();
        audit.record(Record::Request(&record)).unwrap();
        std::iter::from_fn(|| received.recv_timeout(patience).ok()).any(|line| line.contains(&id))
    };
    // From the end of the file that it finds.
    wait_until("it follows", || is_followed(Duration::from_millis(100)));
    for number in 0..20 {
        assert!(is_followed(PATIENCE), "record {number} was not followed");
    }
    assert!(writer.stop(PATIENCE));
}

#[test]
fn an_agent_beside_another_has_a_chain_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let config = file_config(&path, 1 << 20, 3);
    let start_beside = || {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let metrics = Metrics::new(Arc::clone(&clock));
        Audit::start(&config, OtherAgents::MayBeDraining, clock, &metrics).unwrap()
    };
    let beside = directory.path().join("audit.jsonl.beside1");
    let write = |audit: &Audit| {
        audit.record(Record::Request(&request())).unwrap();
    };

    let (first, first_writer) = start_beside();
    assert_eq!(first.files(), std::slice::from_ref(&path));
    let (second, second_writer) = start_beside();
    assert_eq!(second.files(), std::slice::from_ref(&beside));
    write(&first);
    write(&second);
    write(&first);
    assert!(first_writer.stop(PATIENCE));
    // The file is free, as soon as no child that another test is starting has it open: its chain goes on, and
    // that of the second agent too.
    let freed = Instant::now();
    let (third, third_writer) = loop {
        let (third, writer) = start_beside();
        if third.files() == std::slice::from_ref(&path) {
            break (third, writer);
        }
        assert!(writer.stop(PATIENCE));
        assert!(freed.elapsed() < PATIENCE, "{:?}", third.files());
    };
    write(&third);
    write(&second);
    assert!(second_writer.stop(PATIENCE));
    assert!(third_writer.stop(PATIENCE));

    for (file, records) in [(&path, 3), (&beside, 3)] {
        let verified = verify(file, None).unwrap();
        assert_eq!(verified.records, records, "{}", file.display());
    }
    let text = fs::read_to_string(&beside).unwrap();
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(first["event"], "audit_beside");
    assert_eq!(first["in_use"], path.to_str().unwrap());
}
