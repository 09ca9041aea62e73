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

pub mod client;
pub mod counts;
pub mod curl;
pub mod faults;
pub mod faulty_authorization_server;
pub mod origin;
pub mod puppet;
pub mod raw;
pub mod world;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

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

/// How long this machine kept us from running since the start of the watch, so that a limit in
/// seconds holds on a busy one too.
pub struct Stalls {
    milliseconds: Arc<AtomicU64>,
}

impl Stalls {
    /// Watches until dropped.
    pub fn watch() -> Self {
        const NAP: Duration = Duration::from_millis(5);
        let milliseconds = Arc::new(AtomicU64::new(0));
        let lost = Arc::downgrade(&milliseconds);
        std::thread::spawn(move || {
            while let Some(lost) = lost.upgrade() {
                let began = Instant::now();
                std::thread::sleep(NAP);
                let late = began.elapsed().saturating_sub(NAP).as_millis();
                lost.fetch_add(u64::try_from(late).unwrap(), Ordering::Relaxed);
            }
        });
        Self { milliseconds }
    }

    /// `limit`, and the time in which nothing ran.
    pub fn allow(&self, limit: Duration) -> Duration {
        limit + Duration::from_millis(self.milliseconds.load(Ordering::Relaxed))
    }
}
