//! A caller that is a process of its own: this very test binary started again, which relays bytes
//! between a TCP port and the agent. What the test sends through it the agent sees as the puppet's.

use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::process::{Child, ChildStdin, Command};

const ROLE: &str = "COUNTERSIGN_TEST_PUPPET";
const TARGET: &str = "COUNTERSIGN_TEST_PUPPET_TARGET";
const SCRIPT: &str = "COUNTERSIGN_TEST_PUPPET_SCRIPT";

/// A running puppet.
pub struct Puppet {
    child: Child,
    stdin: Mutex<Option<ChildStdin>>,
    /// Where the test connects to speak as the puppet.
    pub address: SocketAddr,
}

/// The program of the test binary where another user may run it: a copy, where it stands under a
/// directory that others may not enter.
fn program() -> &'static Path {
    static PROGRAM: std::sync::OnceLock<std::path::PathBuf> = std::sync::OnceLock::new();
    PROGRAM.get_or_init(|| {
        let built = std::env::current_exe().unwrap();
        if is_reachable_by_others(&built) {
            return built;
        }
        let copy = std::env::temp_dir().join(format!("countersign-puppet-{}", std::process::id()));
        std::fs::copy(built, &copy).unwrap();
        copy
    })
}

fn command(role: &str) -> Command {
    let mut command = Command::new(program());
    command
        .args(["--exact", "puppet_main", "--ignored", "--nocapture"])
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    command
}

impl Puppet {
    /// A relay to `target` (`ADDRESS:PORT` or a path) that runs as `uid`.
    pub async fn start(target: &str, uid: Option<u32>) -> Self {
        let mut command = command("relay");
        command.env(TARGET, target);
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().expect("the test binary starts again");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = loop {
            let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line())
                .await
                .expect("the puppet says where it listens")
                .unwrap()
                .expect("the puppet lives");
            // The test runner writes before us, on the same line.
            if let Some((_, address)) = line.split_once("puppet-listens ") {
                break address.trim().parse().unwrap();
            }
        };
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let stdin = child.stdin.take();
        Self {
            child,
            stdin: Mutex::new(stdin),
            address,
        }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Ends the process at once.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Connects as the puppet.
    pub async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }
}

/// Runs a process that sends `first`, waits for the answer's end, becomes `sh`, and sends `second` on
/// the same connection. Returns all that came back.
pub async fn exec_between(target: &str, first: &str, second: &str) -> String {
    let script = serde_json::json!({"first": first, "second": second}).to_string();
    let mut command = command("exec");
    command.env(TARGET, target).env(SCRIPT, script);
    let output = tokio::time::timeout(Duration::from_secs(30), command.output())
        .await
        .expect("the puppet ends")
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a process as `uid` that opens `times` connections, sends `request` on each and exits without
/// waiting for an answer.
pub async fn connect_send_exit(target: &str, request: &str, times: usize, uid: Option<u32>) {
    let mut command = command("rush");
    command
        .env(TARGET, target)
        .env(SCRIPT, request)
        .env("TIMES", times.to_string());
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What the started-again binary does. Called by the test of that name, which does nothing otherwise.
pub fn puppet_main() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let target = std::env::var(TARGET).unwrap();
    match role.as_str() {
        "relay" => relay(&target),
        "exec" => exec(&target),
        "rush" => rush(&target),
        "leave" => leave(&target),
        other => panic!("no role `{other}`"),
    }
    std::process::exit(0);
}

fn relay(target: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("\npuppet-listens {}", listener.local_addr().unwrap());
        std::io::stdout().flush().unwrap();
        // Its parent's end is its own.
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
        loop {
            let (near, _) = listener.accept().await.unwrap();
            near.set_nodelay(true).unwrap();
            let target = target.to_owned();
            tokio::spawn(async move {
                if target.starts_with('/') {
                    join(near, UnixStream::connect(&target).await.unwrap()).await;
                } else {
                    let far = TcpStream::connect(&target).await.unwrap();
                    far.set_nodelay(true).unwrap();
                    join(near, far).await;
                }
            });
        }
    });
}

async fn join(mut near: TcpStream, mut far: impl AsyncRead + AsyncWrite + Unpin) {
    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
}

fn exec(target: &str) {
    let script: serde_json::Value = serde_json::from_str(&std::env::var(SCRIPT).unwrap()).unwrap();
    let mut stream = std::net::TcpStream::connect(target).unwrap();
    stream
        .write_all(script["first"].as_str().unwrap().as_bytes())
        .unwrap();
    let first = super::raw::read_response_blocking(&mut stream);
    println!("\n<<<first\n{first}\n>>>");
    std::io::stdout().flush().unwrap();
    nix::fcntl::fcntl(
        stream.as_fd(),
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let descriptor = stream.as_raw_fd();
    let error = std::process::Command::new("/bin/sh")
        .arg("-c")
        .arg(format!(
            "printf '%s' \"$SECOND\" >&{descriptor}; exec /bin/cat <&{descriptor}"
        ))
        .env("SECOND", script["second"].as_str().unwrap())
        .exec();
    panic!("sh did not start: {error}");
}

/// Runs a process that sends `request`, reads the answer's head, leaves the connection to a child that
/// prints what comes, and exits. Returns when the child is done.
pub async fn leave_stream(target: &str, request: &str) -> String {
    let mut command = command("leave");
    command.env(TARGET, target).env(SCRIPT, request);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output())
        .await
        .expect("the stream ends")
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn leave(target: &str) {
    let request = std::env::var(SCRIPT).unwrap();
    let mut stream = std::net::TcpStream::connect(target).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    println!("\n{}", super::raw::read_response_blocking(&mut stream));
    std::io::stdout().flush().unwrap();
    std::process::Command::new("/bin/cat")
        .stdin(std::os::fd::OwnedFd::from(stream))
        .spawn()
        .unwrap();
    std::process::exit(0);
}

fn rush(target: &str) {
    let times: usize = std::env::var("TIMES").unwrap().parse().unwrap();
    let request = std::env::var(SCRIPT).unwrap();
    let connections: Vec<_> = (0..times)
        .map(|_| {
            let mut stream = std::net::TcpStream::connect(target).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            stream
        })
        .collect();
    // The exit closes them all.
    std::mem::forget(connections);
    std::process::exit(0);
}

/// Whether a path may be run by another user.
pub fn is_reachable_by_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.ancestors().all(|ancestor| {
        std::fs::metadata(ancestor).is_ok_and(|metadata| metadata.permissions().mode() & 0o005 != 0)
    })
}
