//! A service manager, as far as an agent sees one: it starts the agent with sockets that it holds
//! (sd_listen_fds(3)), and reads what the agent tells it (sd_notify(3)).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::process::{Child, Command};

/// Gives the program its sockets at the descriptors where it expects them, as the process that it is.
const LAUNCHER: &str = r#"
export LISTEN_PID=$$
exec 3<&0 4<&1 < /dev/null > /dev/null
exec "$@"
"#;

/// A started agent, and what it told of itself.
pub struct Service {
    pub process: Child,
    told: Arc<Mutex<Told>>,
    log: PathBuf,
}

/// What was told.
#[derive(Default)]
struct Told {
    messages: Vec<String>,
    kept: Vec<(String, OwnedFd)>,
}

impl Service {
    /// Starts `countersign run` with up to two sockets, in a directory where it finds its configuration. It
    /// may have sockets kept (`FileDescriptorStoreMax=64`).
    pub fn start(directory: &Path, sockets: Vec<(&str, OwnedFd)>) -> Self {
        Self::start_by(
            directory,
            sockets,
            Command::new("bash").env("FDSTORE", "64"),
        )
    }

    /// As [`Service::start`], where nothing is kept (`FileDescriptorStoreMax=0`, the default).
    pub fn start_without_store(directory: &Path, sockets: Vec<(&str, OwnedFd)>) -> Self {
        Self::start_by(directory, sockets, &mut Command::new("bash"))
    }

    fn start_by(directory: &Path, sockets: Vec<(&str, OwnedFd)>, command: &mut Command) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let notify = directory.join(format!("notify-{number}.sock"));
        let told = Arc::<Mutex<Told>>::default();
        listen(UnixDatagram::bind(&notify).unwrap(), &told);
        let log = directory.join(format!("agent-{number}.log"));
        let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
        command
            .args([
                "-c",
                LAUNCHER,
                "launcher",
                env!("CARGO_BIN_EXE_countersign"),
            ])
            .args(["run", "--config"])
            .arg(directory.join("countersign.yaml"))
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .kill_on_drop(true);
        if !names.is_empty() {
            command
                .env("LISTEN_FDS", names.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        }
        let mut sockets = sockets.into_iter().map(|(_, socket)| socket);
        if let Some(first) = sockets.next() {
            command.stdin(first);
        }
        if let Some(second) = sockets.next() {
            command.stdout(second);
        }
        assert!(
            sockets.next().is_none(),
            "the launcher passes two sockets on"
        );
        Self {
            process: command.spawn().unwrap(),
            told,
            log,
        }
    }

    /// Waits until the agent has said something: a line of a message, which is returned.
    pub async fn says(&mut self, what: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut said = self.said().into_iter();
            let is_it = |message: &String| message.lines().any(|line| line == what);
            if let Some(message) = said.find(is_it) {
                return message;
            }
            let ended = self.process.try_wait().unwrap();
            let log = self.log();
            assert!(ended.is_none(), "{ended:?} without `{what}`: {log}");
            assert!(Instant::now() < deadline, "`{what}` was not said: {log}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Everything that the agent said, in order.
    pub fn said(&self) -> Vec<String> {
        self.told.lock().unwrap().messages.clone()
    }

    /// The sockets that it had kept, which it gets when it starts again.
    pub fn kept(&self) -> Vec<(String, OwnedFd)> {
        let told = self.told.lock().unwrap();
        let copy = |(name, socket): &(String, OwnedFd)| (name.clone(), socket.try_clone().unwrap());
        told.kept.iter().map(copy).collect()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.process.id().expect("it was not waited for");
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let ended = tokio::time::timeout(Duration::from_secs(120), self.process.wait()).await;
        ended.expect("the agent ends").unwrap()
    }

    /// What it logged, and complained of.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

/// Takes down what is told, until the test ends.
fn listen(socket: UnixDatagram, told: &Arc<Mutex<Told>>) {
    let told = Arc::downgrade(told);
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    std::thread::spawn(move || {
        while let Some(told) = told.upgrade() {
            let mut text = [0; 4096];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &socket,
                &mut [std::io::IoSliceMut::new(&mut text)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            let Ok(received) = received else { continue };
            let message = String::from_utf8(text[..received.bytes].to_vec()).unwrap();
            let mut told = told.lock().unwrap();
            let name = message
                .lines()
                .find_map(|line| line.strip_prefix("FDNAME="))
                .unwrap_or_default();
            if message.lines().any(|line| line == "FDSTOREREMOVE=1") {
                told.kept.retain(|(known, _)| known != name);
            }
            for part in ancillary.drain() {
                // What comes with `BARRIER=1` (sd_notify_barrier(3)) is closed once everything before it was read.
                if let RecvAncillaryMessage::ScmRights(sockets) = part
                    && message != "BARRIER=1\n"
                {
                    assert!(message.lines().any(|line| line == "FDSTORE=1"), "{message}");
                    told.kept
                        .extend(sockets.map(|socket| (name.to_owned(), socket)));
                }
            }
            told.messages.push(message);
        }
    });
}
