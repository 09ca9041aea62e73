//! What whole-agent tests stand on: embedded servers, an agent, callers that are processes of their
//! own, and origins that say what reached them.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, and no binary uses every part of the harness"
)]

pub mod agent;
pub mod client;
pub mod clock;
pub mod collector;
pub mod counts;
pub mod curl;
pub mod faults;
pub mod faulty_authorization_server;
pub mod gate;
pub mod http2_frames;
pub mod manager;
pub mod name_server;
pub mod origin;
pub mod puppet;
pub mod raw;
pub mod repetitions;
pub mod strict_origin;
pub mod world;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpSocket;

/// Another user than the one that runs the tests, and not the one that owns anything: `nobody`.
pub const NOBODY: u32 = 65534;

/// Whether the tests run as root. Without root they pass over with a word; with
/// `COUNTERSIGN_REQUIRE_ROOT=1` that is a failure.
pub fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        passed_over(test, "root");
    }
    root
}

/// The user of callers that are nothing special: `nobody`, or whoever runs the tests without root.
pub fn unprivileged() -> Option<u32> {
    nix::unistd::geteuid().is_root().then_some(NOBODY)
}

/// Whether a user may make namespaces of its own. As with root, the lack of them may be a failure.
pub fn has_user_namespaces(test: &str) -> bool {
    let mut command = std::process::Command::new("unshare");
    command.args(["-Urm", "true"]);
    if let Some(uid) = unprivileged() {
        std::os::unix::process::CommandExt::uid(&mut command, uid);
    }
    let has = command.status().is_ok_and(|status| status.success());
    if !has {
        passed_over(test, "unprivileged user namespaces");
    }
    has
}

/// Says that a test does not run here, or fails it where every test must run.
fn passed_over(test: &str, need: &str) {
    assert_ne!(
        std::env::var("COUNTERSIGN_REQUIRE_ROOT").as_deref(),
        Ok("1"),
        "{test}: needs {need}"
    );
    println!("{test}: needs {need}");
}

/// Whether a toolchain is on this machine. As with root, its absence may be a failure.
pub fn has_program(test: &str, program: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
    });
    if !found {
        passed_over(test, program);
    }
    found
}

/// Holds a port of 127.0.0.1, as [`hold`].
///
/// # Errors
/// Somebody listens on it.
pub fn hold_port(port: u16) -> std::io::Result<(TcpSocket, SocketAddr)> {
    hold(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Holds a port of an address, any that is free for 0, without listening: who connects is refused, who asks
/// for any port gets another, and who names this one may listen on it.
///
/// # Errors
/// Somebody listens on it.
pub fn hold(address: SocketAddr) -> std::io::Result<(TcpSocket, SocketAddr)> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

/// Asks until `probe` answers, at most `limit`.
pub async fn eventually<T, Answer>(limit: Duration, mut probe: impl FnMut() -> Answer) -> T
where
    Answer: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = probe().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "did not come true in {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Has this thread, and what it starts, run rather than what else the machine does, so that it measures
/// the agent. Only root may. Not by much: other tests run beside it.
pub fn come_first() {
    let _ = rustix::process::setpriority_process(None, -5);
}

/// The second within which what is no longer allowed ends; where the full counts are not asked for, five.
pub fn a_second() -> Duration {
    match repetitions::are_full() {
        true => Duration::from_secs(1),
        false => Duration::from_secs(5),
    }
}

/// When this machine kept us from running, so that a limit in seconds holds on a busy one too.
pub struct Stalls {
    began: SystemTime,
    /// When we ran again, and how late that was.
    late: Arc<Mutex<Vec<(SystemTime, Duration)>>>,
}

impl Stalls {
    /// Watches until dropped.
    pub fn watch() -> Self {
        const NAP: Duration = Duration::from_millis(5);
        let late = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::downgrade(&late);
        std::thread::spawn(move || {
            while let Some(late) = seen.upgrade() {
                let began = Instant::now();
                std::thread::sleep(NAP);
                let by = began.elapsed().saturating_sub(NAP);
                if by >= Duration::from_millis(1) {
                    late.lock().unwrap().push((SystemTime::now(), by));
                }
            }
        });
        Self {
            began: SystemTime::now(),
            late,
        }
    }

    /// How long nothing ran between two times.
    pub fn between(&self, from: SystemTime, to: SystemTime) -> Duration {
        let late = self.late.lock().unwrap();
        late.iter()
            .filter(|(at, _)| (from..=to).contains(at))
            .map(|(_, by)| *by)
            .sum()
    }

    /// `limit`, and the time since the start of the watch in which nothing ran.
    pub fn allow(&self, limit: Duration) -> Duration {
        limit + self.between(self.began, SystemTime::now())
    }
}
