//! An agent whose user may have no more threads (`RLIMIT_NPROC`; `pids.max` refuses in the same way).

use std::collections::BTreeSet;
use std::process::Stdio;

use futures_util::future::join_all;
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::agent::Agent;
use crate::support::counts::reached;
use crate::support::world::{DESTINATIONS, POLICIES};
use crate::support::{has_program, is_root};

const ORDERS: &str = "https://orders.example.test/v1/orders";

/// Users that have no other process: the kernel counts the threads of all that a user has.
const STARTED_IN_VAIN: u32 = 64_201;
const RUNNING: u32 = 64_202;

/// What keeps an agent from its start where it may have too few threads for it. Those of its runtime that start last
/// may leave too few for the audit.
const NOT_STARTED: [&str; 4] = [
    "observers_not_started",
    "runtime_not_started",
    "audit_not_started",
    "workers_not_started",
];

/// Stops threads, until it is ended.
const HOLD: &str = r#"
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
for thread in map(int, sys.argv[1:]):
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, thread, None, None) < 0:
            sys.exit(os.strerror(ctypes.get_errno()))
    os.waitpid(thread, WALL)
print("held", flush=True)
time.sleep(600)
"#;

async fn limit_threads(agent: &Agent, most: usize) {
    let limited = Command::new("prlimit")
        .arg(format!("--pid={}", agent.pid()))
        .arg(format!("--nproc={most}:"))
        .uid(RUNNING)
        .gid(RUNNING)
        .status();
    assert!(limited.await.unwrap().success());
}

fn observers(agent: &Agent) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap();
    let observers = tasks.filter_map(|task| {
        let task = task.unwrap();
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        (name == "observer\n").then(|| task.file_name().into_string().unwrap())
    });
    observers.collect()
}

async fn hold(threads: Vec<String>) -> Child {
    let mut holding = Command::new("python3")
        .args(["-c", HOLD])
        .args(threads)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let said = BufReader::new(holding.stdout.take().unwrap())
        .lines()
        .next_line()
        .await;
    assert_eq!(said.unwrap().as_deref(), Some("held"));
    holding
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_may_not_have_its_threads_ends_so_that_it_is_started_again() {
    let test = "an_agent_that_may_not_have_its_threads_ends_so_that_it_is_started_again";
    if !is_root(test) || !has_program(test, "prlimit") {
        return;
    }
    let mut agent = Agent::start(Some(STARTED_IN_VAIN), DESTINATIONS, POLICIES).await;
    agent.end(Signal::SIGTERM).await;
    let mut said = BTreeSet::new();
    for threads in 1.. {
        let before = agent.log().len();
        let ended = agent.start_by(&format!("prlimit --nproc={threads}")).await;
        let logged = agent.log().split_off(before);
        let Some(ended) = ended else { break };
        assert_eq!(ended.code(), Some(69), "{threads} threads: {logged}");
        let code = NOT_STARTED.iter().find(|code| logged.contains(*code));
        said.insert(*code.unwrap_or_else(|| panic!("{threads} threads: {logged}")));
    }
    said.remove("audit_not_started");
    reached("threads_not_started", said.len());
    // One that starts serves, with not a thread more.
    agent.good(Some(STARTED_IN_VAIN)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_agent_that_may_have_no_more_threads_serves_or_says_that_it_cannot() {
    let test = "a_running_agent_that_may_have_no_more_threads_serves_or_says_that_it_cannot";
    if !is_root(test) || !has_program(test, "prlimit") || !has_program(test, "python3") {
        return;
    }
    let agent = Agent::start(Some(RUNNING), DESTINATIONS, POLICIES).await;
    limit_threads(&agent, 1).await;
    agent.good(Some(RUNNING)).await;

    // One caller more than observers that wait for one, of whom none goes on.
    let observers = observers(&agent);
    let callers = observers.len() + 1;
    let all = || join_all((0..callers).map(|_| agent.curl(Some(RUNNING), ORDERS)));
    let mut holding = hold(observers).await;
    for _ in 0..2 {
        for refused in all().await {
            assert_eq!(refused.expect(503).code(), "attestation_unavailable");
        }
    }
    let log = agent.log();
    let said = log.matches("no more threads can be made").count();
    assert_eq!(said, 1, "{log}");

    limit_threads(&agent, 1000).await;
    for served in all().await {
        served.expect(200);
    }
    holding.kill().await.unwrap();
}
