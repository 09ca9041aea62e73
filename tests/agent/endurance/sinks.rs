//! A disk that is full, and a sink that hangs: what is asked meanwhile is refused at once, and nothing
//! that was answered is lost.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use countersign::audit::verify::verify;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use serde_json::Value;
use tokio::io::BufReader;
use tokio::net::UnixStream;

use super::PLAIN;
use crate::support::counts::reached;
use crate::support::manager::Service;
use crate::support::raw::exchange;
use crate::support::repetitions::are_full;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{Stalls, a_second, come_first, is_root};

/// Within what it is decided that records cannot be written: 100 ms from the first write that fails. Before
/// it a batch gathers, and one or another still fits.
const DECIDED: Duration = Duration::from_millis(120);
/// For how long records cannot be written: longer than a request may wait.
const OUTAGE: Duration = Duration::from_millis(1500);

/// What came of a request.
struct Answered {
    at: Instant,
    took: Duration,
    status: u16,
    code: String,
    request: String,
}

/// Asks every ten milliseconds until it is over.
async fn ask(socket: PathBuf, over: Arc<AtomicBool>) -> Vec<Answered> {
    let mut io = BufReader::new(UnixStream::connect(socket).await.unwrap());
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let mut all = Vec::new();
    while !over.load(Ordering::Relaxed) {
        ticks.tick().await;
        let asked = Instant::now();
        let answer = exchange(&mut io, PLAIN).await;
        all.push(Answered {
            at: Instant::now(),
            took: asked.elapsed(),
            status: answer.status,
            code: answer.code(),
            request: answer.headers("countersign-request-id")[0].to_owned(),
        });
    }
    all
}

/// Asks until it is served.
async fn until_served(io: &mut UnixStream) {
    let began = Instant::now();
    while exchange(io, PLAIN).await.status != 200 {
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}

/// An agent under load, whose audit cannot be written for longer than a request may wait: between
/// what `stop` and `go_on` do. Returns who was answered 200.
async fn through(
    world: &World,
    sink: &str,
    mut stop: impl FnMut(),
    mut go_on: impl FnMut(),
) -> Vec<String> {
    const CLIENTS: usize = 5;
    let stalls = Stalls::watch();
    come_first();
    let common = COMMON
        .replace("path: audit.jsonl", &format!("path: {sink}"))
        .replace("on_failure: degrade", "on_failure: block");
    let configuration = format!("{common}{DESTINATIONS}");
    world.write("countersign.yaml", &world.fill(&configuration));
    world.write_policies(POLICIES);
    let mut agent = Service::start(world.directory.path(), Vec::new());
    agent.says("READY=1").await;
    let mut io = UnixStream::connect(world.path("proxy.sock")).await.unwrap();
    until_served(&mut io).await;
    let over = Arc::<AtomicBool>::default();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| tokio::spawn(ask(world.path("proxy.sock"), Arc::clone(&over))))
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop();
    let stopped = Instant::now();
    tokio::time::sleep(OUTAGE).await;
    let resumed = Instant::now();
    go_on();
    until_served(&mut io).await;
    let again = resumed.elapsed();
    tokio::time::sleep(Duration::from_millis(500)).await;
    over.store(true, Ordering::Relaxed);
    let mut answered = Vec::new();
    for client in clients {
        answered.extend(client.await.unwrap());
    }
    agent.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(agent.ended().await.success(), "{}", agent.log());

    let longest = answered.iter().map(|answer| answer.took).max().unwrap();
    assert!(longest < stalls.allow(a_second()), "{longest:?}");
    for answer in answered.iter().filter(|answer| answer.status != 200) {
        assert_eq!(
            (answer.status, answer.code.as_str()),
            (503, "audit_unavailable")
        );
        assert!(answer.at > stopped || !are_full(), "refused before");
    }
    let served: Vec<_> = answered
        .iter()
        .filter(|answer| answer.status == 200)
        .collect();
    assert!(served.len() < answered.len(), "none was refused");
    let last = served
        .iter()
        .filter(|answer| answer.at < resumed)
        .map(|answer| answer.at - answer.took)
        .max()
        .unwrap();
    let decided = last.saturating_duration_since(stopped);
    assert!(
        !are_full() || decided <= stalls.allow(DECIDED),
        "{decided:?}"
    );
    println!(
        "{sink}: the last of {} that were served asked {decided:?} after it stopped, {} were refused, the slowest \
         was answered after {longest:?}, and the next was served {again:?} after it went on",
        served.len(),
        answered.len() - served.len()
    );
    assert!(again < stalls.allow(a_second()), "{again:?}");
    served
        .into_iter()
        .map(|answer| answer.request.clone())
        .collect()
}

/// Every one of them is recorded.
fn are_recorded(served: &[String], text: &str) {
    let recorded: HashSet<String> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line.trim_start()).unwrap())
        .filter_map(|record| Some(record["request_id"].as_str()?.to_owned()))
        .collect();
    let lost = served.iter().filter(|request| !recorded.contains(*request));
    assert_eq!(lost.count(), 0);
}

/// A disk of four mebibytes, which only this thread sees, and what it starts.
fn disk_of_our_own(at: &Path) {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(
        Some("tmpfs"),
        at,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=4m"),
    )
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_within_a_tenth_of_a_second_and_loses_nothing() {
    if !is_root("a_full_disk_refuses_within_a_tenth_of_a_second_and_loses_nothing") {
        return;
    }
    let world = World::servers().await;
    let disk = world.path("disk");
    std::fs::create_dir(&disk).unwrap();
    disk_of_our_own(&disk);
    let ballast = disk.join("ballast");
    let fill = || {
        let mut file = File::create(&ballast).unwrap();
        while file.write(&[0; 1024]).is_ok() {}
    };
    let served = through(&world, "disk/audit.jsonl", fill, || {
        std::fs::remove_file(&ballast).unwrap();
    })
    .await;
    verify(&disk.join("audit.jsonl"), None).unwrap();
    are_recorded(
        &served,
        &std::fs::read_to_string(disk.join("audit.jsonl")).unwrap(),
    );
    reached("served_around_a_full_disk", served.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_hangs_refuses_within_a_tenth_of_a_second_and_loses_nothing() {
    let world = World::servers().await;
    let path = world.path("audit.fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let mut pipe = File::options()
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(&path)
        .unwrap();
    // Whoever reads from it, until told to hang.
    let (hangs, over) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let mut reading = pipe.try_clone().unwrap();
    let (reads, ends) = (Arc::clone(&hangs), Arc::clone(&over));
    let reader = std::thread::spawn(move || {
        let (mut text, mut buffer) = (Vec::new(), vec![0; 65536]);
        loop {
            let read = match reads.load(Ordering::SeqCst) {
                true => 0,
                false => reading.read(&mut buffer).unwrap_or(0),
            };
            text.extend_from_slice(&buffer[..read]);
            if read == 0 {
                if ends.load(Ordering::SeqCst) {
                    return text;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let fill = || {
        hangs.store(true, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        while pipe.write(b" ").is_ok() {}
    };
    let served = through(&world, "audit.fifo", fill, || {
        hangs.store(false, Ordering::SeqCst)
    })
    .await;
    over.store(true, Ordering::SeqCst);
    are_recorded(
        &served,
        std::str::from_utf8(&reader.join().unwrap()).unwrap(),
    );
    reached("served_around_a_hanging_sink", served.len());
}
