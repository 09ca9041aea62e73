//! A caller that is a process of its own: this very test binary started again, which relays bytes
//! between a TCP port and the agent. What the test sends through it the agent sees as the puppet's.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, BufReader};
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
pub fn program() -> &'static Path {
    static PROGRAM: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    PROGRAM.get_or_init(|| reachable(std::env::current_exe().unwrap(), "puppet"))
}

/// A program where another user may run it; `name` is that of the copy.
pub fn reachable(built: PathBuf, name: &str) -> PathBuf {
    if is_reachable_by_others(&built) {
        return built;
    }
    let copy = std::env::temp_dir().join(format!("countersign-{name}-{}", std::process::id()));
    copy_program(&built, &copy, "");
    copy
}

/// Copies a program that is executed next, with `end` behind it, by another process: what this one has open
/// for writing is open, too, in every child that another test is starting, and can't be executed
/// meanwhile (ETXTBSY, execve(2)).
pub fn copy_program(from: &Path, to: &Path, end: &str) {
    const COPY: &str = r#"install -m 755 "$1" "$2" && printf %s "$3" >> "$2""#;
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", COPY, "sh"]).args([from, to]).arg(end);
    assert!(shell.status().unwrap().success());
}

/// The arguments that make the test binary a puppet.
pub const ARGUMENTS: [&str; 4] = ["--exact", "puppet_main", "--ignored", "--nocapture"];

fn command(role: &str) -> Command {
    let mut command = Command::new(program());
    command.args(ARGUMENTS);
    prepare(&mut command, role);
    command
}

fn prepare(command: &mut Command, role: &str) {
    command
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
}

impl Puppet {
    /// A relay to `target` (`ADDRESS:PORT` or a path) that runs as `uid`.
    pub async fn start(target: &str, uid: Option<u32>) -> Self {
        Self::start_by(command("relay"), target, uid).await
    }

    /// As [`Puppet::start`], by a command of the test's that ends in running the test binary.
    pub async fn start_by(mut command: Command, target: &str, uid: Option<u32>) -> Self {
        prepare(&mut command, "relay");
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

/// How a workload stops being what was attested, while its connection lives on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// It becomes another program.
    Exec,
    /// It exits, and its child has the connection.
    Exit,
}

/// What a departed workload's connection had to say.
#[derive(Debug)]
pub struct Departed {
    /// What came before.
    pub before: String,
    /// What came after.
    pub after: String,
    /// When the last byte came, and when the connection was closed if it was: since the departure.
    pub last_byte: Duration,
    pub closed: Option<Duration>,
}

/// Runs a process as `uid` that connects and takes `steps`: what it sends, and the end of what it then
/// waits for, nothing being the end of a whole response. It departs; whoever has the connection then
/// sends `second` and listens until the connection closes, or nothing came for as long as `silence`.
pub async fn depart(
    departure: Departure,
    target: &str,
    uid: Option<u32>,
    steps: &[(&str, &str)],
    second: &str,
    silence: Duration,
) -> Departed {
    let script = serde_json::json!({
        "steps": steps,
        "second": second,
        "exits": departure == Departure::Exit,
    });
    let mut command = command("depart");
    command
        .env(TARGET, target)
        .env(SCRIPT, script.to_string())
        .stdin(Stdio::null());
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut output, mut buffer) = (Vec::new(), vec![0; 4096]);
    let mut last_byte = monotonic();
    let closed = loop {
        let has_departed = output.windows(DEPARTS.len()).any(|part| part == DEPARTS);
        let patience = match has_departed {
            true => silence,
            false => Duration::from_secs(30),
        };
        match tokio::time::timeout(patience, stdout.read(&mut buffer)).await {
            Ok(Ok(0)) => break Some(monotonic()),
            Ok(read) => {
                last_byte = monotonic();
                output.extend_from_slice(&buffer[..read.unwrap()]);
            }
            Err(_) if has_departed => break None,
            Err(_) => panic!("it waits: {}", String::from_utf8_lossy(&output)),
        }
    };
    let output = String::from_utf8_lossy(&output).into_owned();
    let marker = std::str::from_utf8(DEPARTS).unwrap();
    let (before, after) = output
        .split_once(marker)
        .unwrap_or_else(|| panic!("it did not depart: {output}"));
    let (departed, after) = after.split_once('\n').unwrap();
    let departed = Duration::from_nanos(departed.parse().unwrap());
    Departed {
        before: before.to_owned(),
        after: after.to_owned(),
        last_byte: last_byte.saturating_sub(departed),
        closed: closed.map(|closed| closed.saturating_sub(departed)),
    }
}

/// What a process prints when it departs, before the time.
const DEPARTS: &[u8] = b"\n>>>departs ";

/// The clock that all processes of the machine share.
fn monotonic() -> Duration {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    nix::time::clock_gettime(clock).unwrap().into()
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

/// Runs a process that makes a socket, starts another program that holds it too, connects and sends
/// `request`; what it was answered. `target` is `ADDRESS:PORT`.
pub async fn share_and_send(target: &str, request: &str) -> String {
    let mut command = command("share");
    command.env(TARGET, target).env(SCRIPT, request);
    let output = command.output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What the started-again binary does. Called by the test of that name, which does nothing otherwise.
pub fn puppet_main() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let target = std::env::var(TARGET).unwrap();
    match role.as_str() {
        "relay" => relay(&target),
        "depart" => depart_as_told(&target),
        "rush" => rush(&target),
        "share" => share(&target),
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

/// A connection to `ADDRESS:PORT` or a path, as a file.
fn dial(target: &str) -> std::fs::File {
    let descriptor: OwnedFd = match target.starts_with('/') {
        true => std::os::unix::net::UnixStream::connect(target)
            .unwrap()
            .into(),
        false => std::net::TcpStream::connect(target).unwrap().into(),
    };
    descriptor.into()
}

fn depart_as_told(target: &str) {
    let script: serde_json::Value = serde_json::from_str(&std::env::var(SCRIPT).unwrap()).unwrap();
    let mut stream = dial(target);
    for step in script["steps"].as_array().unwrap() {
        let (send, end) = (step[0].as_str().unwrap(), step[1].as_str().unwrap());
        stream.write_all(send.as_bytes()).unwrap();
        let received = match end {
            "" => super::raw::read_response_blocking(&mut stream),
            end => read_until(&mut stream, end.as_bytes()),
        };
        println!("{received}");
    }
    let exits = script["exits"].as_bool().unwrap();
    // The heir of one that exits waits until it has another parent.
    const HEIR: &str = r#"
while [ "$(cut -d ' ' -f 4 /proc/$$/stat)" = "$PARENT" ]; do sleep 0.1; done
printf %s "$SECOND" >&0
exec cat
"#;
    let parent = if exits { std::process::id() } else { 0 };
    let mut heir = std::process::Command::new("/bin/sh");
    heir.args(["-c", HEIR])
        .env("PARENT", parent.to_string())
        .env("SECOND", script["second"].as_str().unwrap())
        .stdin(OwnedFd::from(stream));
    let mut stdout = std::io::stdout();
    stdout.write_all(DEPARTS).unwrap();
    writeln!(stdout, "{}", monotonic().as_nanos()).unwrap();
    stdout.flush().unwrap();
    if exits {
        heir.spawn().unwrap();
        std::process::exit(0);
    }
    panic!("sh did not start: {}", heir.exec());
}

fn read_until(stream: &mut std::fs::File, end: &[u8]) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(end) && stream.read(&mut byte).unwrap_or(0) == 1 {
        bytes.push(byte[0]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
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

fn share(target: &str) {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        // Whatever is started holds it.
        fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let mut holder = std::process::Command::new("/bin/sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let mut stream = socket.connect(target.parse().unwrap()).await.unwrap();
        let answer = super::raw::exchange(&mut stream, &std::env::var(SCRIPT).unwrap()).await;
        println!("{}{}", answer.head, answer.body);
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}

/// Whether a path may be run by another user.
pub fn is_reachable_by_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.ancestors().all(|ancestor| {
        std::fs::metadata(ancestor).is_ok_and(|metadata| metadata.permissions().mode() & 0o005 != 0)
    })
}
