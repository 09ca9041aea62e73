//! Agents killed while they write the audit.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::support::counts::reached;
use crate::support::manager::Service;
use crate::support::repetitions::{are_full, repetitions};
use crate::support::{Stalls, come_first, eventually};

/// What a SIGKILL may lose.
const LIMIT: Duration = Duration::from_millis(50);

/// How long an agent may say nothing to its client.
const PATIENCE: Duration = Duration::from_secs(10);

/// Requests that are sent at once, so that their records are written at once.
const BURST: usize = 256;
/// Answers after which there is time between bursts.
const QUICK: usize = 1500;
/// Paths of which all is recorded, and long enough for writes that can be interrupted.
const PATH_BYTES: usize = 2000;

const CONFIGURATION: &str = r#"
version: 1
listeners:
  - {name: proxy, type: forward_proxy, bind: "unix:{directory}/proxy.sock"}
attestors: {unix: {}}
limits: {per_identity: {requests_per_second: 1000000}}
credentials: []
destinations: []
policies: {directory: policies}
audit:
  sinks: [{type: file, path: audit.jsonl, rotate_size: 2MiB, keep: 5}]
"#;

/// What a line tells, as far as it matters here.
#[derive(Deserialize)]
struct Line {
    request_id: Option<String>,
    /// Of `audit_repaired`.
    bytes_cut: Option<u64>,
}

/// An audit file, and what was rotated out of it.
struct Records {
    /// The identifiers of requests.
    requests: HashSet<String>,
    /// How many bytes were cut from each torn tail.
    cut: Vec<u64>,
    /// How many bytes of an unfinished line stand at the end.
    torn: u64,
    /// How many lines the newest file has, the unfinished one included.
    lines: usize,
}

impl Records {
    fn read(audit: &Path) -> Self {
        let mut records = Self {
            requests: HashSet::new(),
            cut: Vec::new(),
            torn: 0,
            lines: 0,
        };
        let rotated = (1..=6)
            .rev()
            .map(|number| format!("{}.{number}", audit.display()));
        for file in rotated.map(PathBuf::from).chain([audit.to_owned()]) {
            let Ok(text) = std::fs::read_to_string(&file) else {
                continue;
            };
            records.lines = 0;
            for line in text.split_inclusive('\n') {
                records.lines += 1;
                if !line.ends_with('\n') {
                    assert_eq!(file, audit, "an unfinished line stands in a rotated file");
                    records.torn = line.len() as u64;
                    continue;
                }
                let line: Line = serde_json::from_str(line).unwrap();
                records.requests.extend(line.request_id);
                records.cut.extend(line.bytes_cut);
            }
        }
        records
    }
}

/// Sends bursts until the agent is gone; the identifiers of the requests that were answered, and when
/// that was.
fn ask(socket: PathBuf) -> JoinHandle<Vec<(String, SystemTime)>> {
    let path = "x".repeat(PATH_BYTES);
    let request = format!(
        "GET http://orders.example.test/{path} HTTP/1.1\r\nHost: orders.example.test\r\n\r\n"
    );
    let burst = request.repeat(BURST);
    std::thread::spawn(move || {
        let io = UnixStream::connect(socket).unwrap();
        // Where the agent was killed before it accepted, the kept socket has the connection, and nobody reads.
        io.set_read_timeout(Some(PATIENCE)).unwrap();
        io.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut io = BufReader::new(io);
        let mut answered = Vec::new();
        let mut line = String::new();
        while io.get_mut().write_all(burst.as_bytes()).is_ok() {
            let all = answered.len() + BURST;
            while answered.len() < all && io.read_line(&mut line).is_ok_and(|read| read > 0) {
                let identifier = line.strip_prefix("countersign-request-id: ");
                if let Some(identifier) = identifier.and_then(|rest| rest.strip_suffix("\r\n")) {
                    answered.push((identifier.to_owned(), SystemTime::now()));
                }
                line.clear();
            }
            // Everything else is quiet while the records are written. Where the kill is late, the first of them
            // are not to be rotated out.
            let pause = match answered.len() < QUICK {
                true => 8,
                false => 200,
            };
            std::thread::sleep(Duration::from_millis(pause));
        }
        answered
    })
}

/// Kills the agent as soon as the audit file changes.
fn kill_while_it_writes(agent: &Service, audit: &Path) {
    let size = || std::fs::metadata(audit).map_or(0, |metadata| metadata.len());
    let before = size();
    let began = Instant::now();
    while size() == before {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "nothing is written"
        );
    }
    agent.signal(Signal::SIGKILL);
}

/// What `countersign audit verify` ends with and says.
fn verify(audit: &Path) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_countersign"))
        .args(["audit", "verify"])
        .arg(audit)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_is_whole_or_repaired_after_a_sigkill_in_the_middle_of_writing() {
    let least = repetitions(1000);
    let stalls = Stalls::watch();
    come_first();
    // In memory, where there is such a place: a file system on a disk copies up to some megabytes at
    // once, and is not interrupted meanwhile.
    let memory = Path::new("/dev/shm");
    let directory = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    let directory = directory.path();
    let audit = directory.join("audit.jsonl");
    let configuration = CONFIGURATION.replace("{directory}", directory.to_str().unwrap());
    std::fs::write(directory.join("countersign.yaml"), configuration).unwrap();
    std::fs::create_dir(directory.join("policies")).unwrap();
    std::fs::write(directory.join("policies/none.cedar"), "").unwrap();

    let (mut torn_tails, mut repaired, mut answers) = (0, 0, 0);
    let (mut losses, mut late) = (Vec::new(), 0);
    let mut torn_before = 0;
    let mut kept = Vec::new();
    let mut rounds = 0;
    // Which rounds tear a line is chance, and on a busy machine fewer do: there are more until enough did.
    while rounds < least || torn_tails * 20 < least && rounds < 4 * least {
        let round = rounds;
        rounds += 1;
        let handed_over = kept
            .iter()
            .map(|(name, socket): &(String, OwnedFd)| (name.as_str(), socket.try_clone().unwrap()));
        let mut agent = Service::start(directory, handed_over.collect());
        agent.says("READY=1").await;
        let repairs = agent.log().matches("cut a torn tail").count();
        assert_eq!(repairs, usize::from(torn_before > 0), "{}", agent.log());
        if torn_before > 0 {
            // Its record, too, may be lost to a SIGKILL at once.
            eventually(Duration::from_secs(20), || async {
                (Records::read(&audit).cut.last() == Some(&torn_before)).then_some(())
            })
            .await;
            repaired += 1;
        }
        let asking = ask(directory.join("proxy.sock"));
        std::thread::sleep(Duration::from_millis(10 + (7 * round as u64) % 20));
        kill_while_it_writes(&agent, &audit);
        let killed = SystemTime::now();
        agent.ended().await;
        let answered = asking.join().unwrap();

        let records = Records::read(&audit);
        let (code, said) = verify(&audit);
        match records.torn {
            0 => assert_eq!(code, Some(0), "round {round}: {said}"),
            _ => {
                assert_eq!(code, Some(1), "round {round}: {said}");
                let place = format!("{}:{}: the line is cut off", audit.display(), records.lines);
                assert!(said.contains(&place), "{place}: {said}");
                torn_tails += 1;
            }
        }
        // All is recorded up to a moment, and that is not long before the end.
        let lost: Vec<_> = answered
            .iter()
            .skip_while(|(request, _)| records.requests.contains(request))
            .collect();
        assert!(
            lost.iter()
                .all(|(request, _)| !records.requests.contains(request)),
            "round {round}: of {} answers {} are recorded; the first {} are, the next is not",
            answered.len(),
            answered
                .iter()
                .filter(|(request, _)| records.requests.contains(request))
                .count(),
            answered.len() - lost.len(),
        );
        if let Some((_, first)) = lost.first() {
            // What was answered is read a moment later, and may be after the kill.
            let loss = killed.duration_since(*first).unwrap_or_default();
            let held_up = stalls.between(*first, killed);
            if loss > LIMIT + held_up {
                println!("round {round}: lost {loss:?}, of which the machine held up {held_up:?}");
                late += 1;
            }
            losses.push(loss);
        }
        answers += answered.len();
        torn_before = records.torn;
        // As a service manager does, from the first that binds them.
        if kept.is_empty() {
            kept = agent.kept();
        }
    }
    losses.sort_unstable();
    println!(
        "{rounds} SIGKILL after {answers} answers: {torn_tails} torn tails, {repaired} repaired and logged; \
         records were lost {} times, of {:?} at most",
        losses.len(),
        losses.last().copied().unwrap_or_default(),
    );
    // A tenth is also run where other tests take their share of the machine.
    assert!(
        late == 0 || !are_full() && late * 10 <= rounds,
        "{late} times more was lost"
    );
    assert_eq!(repaired, torn_tails - usize::from(torn_before > 0));
    assert!(torn_tails * 20 >= least, "{torn_tails} torn tails");
    reached("killed_while_writing", rounds);
    reached("torn_tails", torn_tails);
}
