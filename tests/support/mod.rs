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
use std::time::{Duration, Instant};

/// Another user than the one that runs the tests, and not the one that owns anything: `nobody`.
pub const NOBODY: u32 = 65534;

/// Whether the tests run as root. Without root they pass over with a word; with
/// `COUNTERSIGN_REQUIRE_ROOT=1` that is a failure.
pub fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        assert_ne!(
            std::env::var("COUNTERSIGN_REQUIRE_ROOT").as_deref(),
            Ok("1"),
            "{test}: needs root"
        );
        println!("{test}: needs root");
    }
    root
}

/// Whether a toolchain is on this machine. As with root, its absence may be a failure.
pub fn has_program(test: &str, program: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
    });
    if !found {
        assert_ne!(
            std::env::var("COUNTERSIGN_REQUIRE_ROOT").as_deref(),
            Ok("1"),
            "{test}: needs `{program}`"
        );
        println!("{test}: needs `{program}`, which is not installed: passed over");
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
