//! An agent that has many connections, and one whose descriptors have run out.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::PLAIN;
use crate::support::agent::Agent;
use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::raw::{Response, exchange, read_response};
use crate::support::repetitions::repetitions;
use crate::support::world::{DESTINATIONS, POLICIES, World};
use crate::support::{a_second, eventually};

const SOON: Duration = Duration::from_secs(20);
/// How long a manager waits for a probe, at most.
const PROBED: Duration = Duration::from_secs(5);

/// How many descriptors are open.
pub(super) fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// Lets an agent open so many more descriptors than it has; how many that are in all.
fn leave_descriptors(agent: &Agent, more: u64) -> u64 {
    let limit = descriptors(agent.pid()) as u64 + more;
    let pid = Pid::from_raw(agent.pid().try_into().unwrap());
    let limits = Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    prlimit(pid, Resource::Nofile, limits).unwrap();
    limit
}

/// The processor time that a process has used (proc_pid_stat(5): utime and stime).
fn processor_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks: u32 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u32>().unwrap())
        .sum();
    let a_second = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap();
    Duration::from_secs(1) * ticks / u32::try_from(a_second).unwrap()
}

/// Asks the admin socket what a manager of agents would; how many answers came.
async fn probe(agent: &Agent) -> usize {
    const PATHS: [&str; 3] = ["/livez", "/readyz", "/metrics"];
    let socket = agent.world.path("admin.sock");
    let mut admin = BufReader::new(UnixStream::connect(socket).await.unwrap());
    for path in PATHS {
        let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n");
        let answer = tokio::time::timeout(PROBED, exchange(&mut admin, &request));
        answer.await.expect("a probe is answered").expect(200);
    }
    PATHS.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_descriptors_rests_answers_probes_and_recovers() {
    const CALLERS: usize = 500;
    const PROBES: usize = 20;
    let agent = Agent::start(None, DESTINATIONS, POLICIES).await;
    agent.good(None).await;
    let proxy = agent.world.path("proxy.sock");
    let mut served = UnixStream::connect(&proxy).await.unwrap();
    exchange(&mut served, PLAIN).await.expect(200);

    let limit = leave_descriptors(&agent, 150);
    // They stay open, or are closed by the agent; who finds no place waits.
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        callers.push(UnixStream::connect(&proxy).await.unwrap());
    }
    tokio::time::sleep(Duration::from_secs(1)).await;

    let (before, period) = (processor_time(agent.pid()), Duration::from_secs(2));
    let mut probes = 0;
    for _ in 0..PROBES {
        probes += probe(&agent).await;
        tokio::time::sleep(period / PROBES as u32).await;
    }
    let used = processor_time(agent.pid()) - before;
    assert!(used < period / 2, "{used:?} in {period:?}");
    // Who has a connection goes on, to a destination to which none is open yet too.
    exchange(&mut served, PLAIN).await.expect(200);
    let open = descriptors(agent.pid());
    println!(
        "{open} of {limit} descriptors are open, {probes} probes answered, {used:?} of the processor in {period:?}"
    );
    assert!(open * 10 > limit as usize * 6, "{open} of {limit}");

    drop(callers);
    eventually(SOON, || async {
        let mut io = UnixStream::connect(&proxy).await.ok()?;
        io.write_all(PLAIN.as_bytes()).await.ok()?;
        let answer = read_response(&mut io).await;
        (answer.status == 200).then_some(())
    })
    .await;
    agent.good(None).await;
    reached("probes_without_descriptors", probes);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_descriptors_ends_in_time() {
    /// More than an agent without descriptors lets in in half a minute.
    const WAITING: usize = 900;
    let mut agent = Agent::start(None, DESTINATIONS, POLICIES).await;
    agent.good(None).await;
    leave_descriptors(&agent, 20);
    let mut callers = Vec::new();
    for _ in 0..WAITING {
        let proxy = agent.world.path("proxy.sock");
        callers.push(UnixStream::connect(proxy).await.unwrap());
    }
    let began = Instant::now();
    let status = agent.end(Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

/// A request that the origin takes so long to answer.
fn slow(period: Duration) -> String {
    let period = period.as_millis();
    PLAIN.replace("/v1/orders", &format!("/v1/{period}"))
}

/// Answers as slowly as the path says: it writes every 20 ms.
fn slowly(head: &str) -> Vec<String> {
    let (_, path) = head.split_once("/v1/").unwrap();
    let (period, _) = path.split_once(' ').unwrap();
    let pauses = period.parse::<usize>().unwrap_or(0) / 20;
    let mut parts = vec!["HTTP/1.1 200 OK\r\nslow: ".to_owned()];
    parts.extend(std::iter::repeat_n("-".to_owned(), pauses));
    parts.push("\r\ncontent-length: 2\r\n\r\nok".to_owned());
    parts
}

/// All ask at once for what takes so long.
async fn ask(callers: &mut [BufReader<UnixStream>], period: Duration) -> Vec<Response> {
    let request = slow(period);
    let asked = callers.iter_mut().map(|io| exchange(io, &request));
    futures_util::future::join_all(asked).await
}

/// The same, until all are answered: a busy machine may hold some up for longer than descriptors are waited
/// for. How many answers that took.
async fn until_served(callers: &mut [BufReader<UnixStream>], period: Duration) -> usize {
    let mut answered = 0;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        let answers = ask(callers, period).await;
        let served = answers.iter().filter(|answer| answer.status == 200).count();
        answered += served;
        if served == callers.len() {
            return answered;
        }
    }
    panic!("not all of {} at once", callers.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_the_descriptors_of_others() {
    const CALLERS: usize = 60;
    let mut world = World::servers().await;
    let origin = Origin::start(None, slowly).await;
    world.origins.push(("slow".to_owned(), origin.address));
    let destinations = DESTINATIONS.replace("{plain}", "{slow}");
    let agent = Agent::start_in(world, None, &destinations, POLICIES).await;
    agent.good(None).await;
    let proxy = agent.world.path("proxy.sock");
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let mut io = BufReader::new(UnixStream::connect(&proxy).await.unwrap());
        exchange(&mut io, PLAIN).await.expect(200);
        callers.push(io);
    }
    // Too few for every caller to have a connection to the destination.
    let limit = leave_descriptors(&agent, CALLERS as u64 / 4);

    let begun = Instant::now();
    let answered = until_served(&mut callers, Duration::from_millis(60)).await;
    let all_in = begun.elapsed();
    let answers = ask(&mut callers, Duration::from_secs(6)).await;
    let (served, refused): (Vec<_>, Vec<_>) =
        answers.into_iter().partition(|answer| answer.status == 200);
    for answer in &refused {
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (503, "out_of_descriptors")
        );
        assert_eq!(answer.headers("retry-after"), ["2"]);
    }
    println!(
        "{CALLERS} answered in {all_in:?} with {limit} descriptors; of as many that hold theirs {} answered, {} refused",
        served.len(),
        refused.len()
    );
    assert!(served.len() >= CALLERS / 5 && !refused.is_empty());
    // What was refused was not sent.
    assert_eq!(origin.heads().len(), CALLERS + answered + served.len());
    until_served(&mut callers, Duration::ZERO).await;
    reached("waited_for_descriptors", CALLERS);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_beside_idle_connections() {
    const AT_ONCE: usize = 10;
    const PROBES: usize = 50;
    let idle = repetitions(10_000);
    countersign::descriptors::allow_many().unwrap();
    let limits = "limits: {per_identity: {connections: 20000}}\n";
    let agent = Agent::start(None, &format!("{limits}{DESTINATIONS}"), POLICIES).await;
    agent.good(None).await;
    let mut callers = Vec::new();
    for _ in 0..AT_ONCE {
        let proxy = agent.world.path("proxy.sock");
        callers.push(tokio::spawn(async move {
            let mut kept = Vec::new();
            for _ in 0..idle / AT_ONCE {
                let mut io = BufReader::new(UnixStream::connect(&proxy).await.unwrap());
                exchange(&mut io, PLAIN).await.expect(200);
                kept.push(io);
            }
            kept
        }));
    }
    let mut kept = Vec::new();
    for caller in callers {
        kept.extend(caller.await.unwrap());
    }
    let mut longest = Duration::ZERO;
    for _ in 0..PROBES {
        let asked = Instant::now();
        probe(&agent).await;
        longest = longest.max(asked.elapsed());
    }
    let open = descriptors(agent.pid());
    println!(
        "{idle} idle connections, {open} descriptors, {PROBES} probes answered, the slowest after {longest:?}"
    );
    assert!(open > idle);
    assert!(longest < a_second(), "{longest:?}");
    // The last that came are as good as the first.
    let mut last = kept.pop().unwrap();
    exchange(&mut last, PLAIN).await.expect(200);
    reached("idle_connections", kept.len() + 1);
}
