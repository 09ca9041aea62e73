//! `countersign run` as a process of its own, with a world around it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::curl::{Answer, curl, curl_as};
use super::world::{COMMON, World, assert_issued};
use super::{eventually, puppet};

const ORDERS: &str = "https://orders.example.test/v1/orders";
const ADMIN: &str = "admin: {socket: admin.sock}\n";

/// `countersign run` in a world of its own.
pub struct Agent {
    pub world: World,
    uid: Option<u32>,
    /// Where the proxy listens.
    pub address: String,
    process: Child,
    pub working_directory: TempDir,
}

impl Agent {
    /// Starts it as `uid`, with `extra` configuration beside the usual.
    pub async fn start(uid: Option<u32>, extra: &str, policies: &str) -> Self {
        Self::start_in(World::servers().await, uid, extra, policies).await
    }

    /// As [`Agent::start`], in a world of the test's making.
    pub async fn start_in(world: World, uid: Option<u32>, extra: &str, policies: &str) -> Self {
        world.write(
            "countersign.yaml",
            &world.fill(&format!("{COMMON}{ADMIN}{extra}")),
        );
        world.write_policies(policies);
        let working_directory = tempfile::tempdir().unwrap();
        if let Some(uid) = uid {
            give(world.directory.path(), uid);
            give(working_directory.path(), uid);
        }
        let process = launch(
            &world.path("countersign.yaml"),
            uid,
            "",
            working_directory.path(),
        );
        let mut agent = Self {
            world,
            uid,
            address: String::new(),
            process,
            working_directory,
        };
        agent.until_it_listens().await;
        agent
    }

    async fn until_it_listens(&mut self) {
        let log = self.working_directory.path().join("log");
        self.address = eventually(Duration::from_secs(30), || async {
            let logged = std::fs::read_to_string(&log).unwrap_or_default();
            assert!(!logged.starts_with("error"), "{logged}");
            self.proxy().await
        })
        .await;
        assert_eq!(self.process.try_wait().unwrap(), None, "the agent ended");
    }

    /// Where the proxy listens, once the agent says so.
    async fn proxy(&self) -> Option<String> {
        let answer = self.admin("GET", "/v1/status").await;
        let status: Value = serde_json::from_str(&answer.body).ok()?;
        let listeners = status["listeners"].as_array()?;
        let proxy = listeners.iter().find(|known| known["name"] == "proxy")?;
        Some(proxy["bind"].as_str()?.to_owned())
    }

    pub async fn restart(&mut self) {
        self.end(Signal::SIGTERM).await;
        self.launch_again("");
        self.until_it_listens().await;
    }

    /// Starts it, once it has ended, by a program that takes something from it. How it ended, where it does not come
    /// to listen.
    pub async fn start_by(&mut self, program: &str) -> Option<ExitStatus> {
        self.launch_again(program);
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(ended) = self.process.try_wait().unwrap() {
                return Some(ended);
            }
            if let Some(address) = self.proxy().await {
                self.address = address;
                return None;
            }
            assert!(
                Instant::now() < deadline,
                "by {program} it neither ends nor listens"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn launch_again(&mut self, by: &str) {
        let configuration = self.world.path("countersign.yaml");
        let directory = self.working_directory.path();
        self.process = launch(&configuration, self.uid, by, directory);
    }

    /// What it has logged, since its first start.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.working_directory.path().join("log")).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().unwrap()), signal).unwrap();
    }

    /// Ends it by a signal.
    pub async fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.ended().await
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        let ended = tokio::time::timeout(Duration::from_secs(30), self.process.wait()).await;
        ended.expect("the agent ends").unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.process.id().unwrap()
    }

    /// curl through the proxy, as a user.
    pub async fn curl(&self, uid: Option<u32>, url: &str) -> Answer {
        let (proxy, root) = (
            format!("http://{}", self.address),
            self.world.path("ca.pem"),
        );
        curl_as(
            uid,
            &["--proxy", &proxy, "--cacert", root.to_str().unwrap(), url],
        )
        .await
    }

    /// A request that succeeds, and the token that the origin got.
    pub async fn good(&self, uid: Option<u32>) -> String {
        let before = self.world.api.seen().len();
        self.curl(uid, ORDERS).await.expect(200);
        let seen = self.world.api.seen();
        assert_eq!(seen.len(), before + 1);
        let seen = seen.last().unwrap();
        assert_issued(&self.world, seen);
        let header = seen.headers["authorization"].to_str().unwrap();
        header.strip_prefix("Bearer ").unwrap().to_owned()
    }

    /// Asks the admin socket.
    pub async fn admin(&self, method: &str, path: &str) -> Answer {
        let (socket, url) = (self.world.path("admin.sock"), format!("http://agent{path}"));
        curl(&[
            "--unix-socket",
            socket.to_str().unwrap(),
            "-X",
            method,
            &url,
        ])
        .await
    }
}

fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| puppet::reachable(env!("CARGO_BIN_EXE_countersign").into(), "agent"))
}

/// Runs the program where a core file could be written, with the right to write one.
fn launch(configuration: &Path, uid: Option<u32>, by: &str, working_directory: &Path) -> Child {
    let script = format!("ulimit -c unlimited; exec {by} \"$0\" run --config \"$1\"");
    let mut command = Command::new("sh");
    command
        .args(["-c", &script])
        .arg(program())
        .arg(configuration)
        .current_dir(working_directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log(working_directory))
        .kill_on_drop(true);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    command.spawn().unwrap()
}

fn log(working_directory: &Path) -> File {
    let path = working_directory.join("log");
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}

/// Gives a file, or a directory and all in it, to a user.
pub fn give(path: &Path, uid: u32) {
    chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).unwrap();
    for entry in std::fs::read_dir(path).into_iter().flatten() {
        give(&entry.unwrap().path(), uid);
    }
}
