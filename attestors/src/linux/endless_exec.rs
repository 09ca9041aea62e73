//! A caller whose exec does not end: it waits for a FUSE server that never answers, and whoever looks at the
//! caller waits for the exec.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed expectation is a failed test"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::attackers::needs_root;
use crate::evidence::PeerEvidence;
use crate::observers::{MOST_OBSERVERS, Pool};

/// The port to which the helper connects.
const HELPER: &str = "COUNTERSIGN_TEST_ENDLESS_EXEC";
const LIMIT: Duration = Duration::from_secs(20);

/// The helper's side: connects, opens a file of the FUSE server that an exec closes, and executes.
#[test]
fn helper() {
    let Ok(port) = std::env::var(HELPER) else {
        return;
    };
    let _file = File::open("file").unwrap();
    let unix = UnixStream::connect("../socket").unwrap();
    let tcp = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
    for socket in [unix.as_fd(), tcp.as_fd()] {
        fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    }
    panic!("{}", Command::new("/bin/true").exec());
}

/// A FUSE server with one file, which answers everything but that the file is closed (fuse(4), and
/// include/uapi/linux/fuse.h).
struct Server {
    directory: PathBuf,
    closes: Receiver<()>,
    /// Dropped, it ends the server, and every wait for it.
    _serves: Sender<()>,
}

impl Server {
    fn mount(directory: &Path) -> Self {
        let mut device = File::options();
        let mut device = device.read(true).write(true).open("/dev/fuse").unwrap();
        fcntl(&device, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let mut mount = Command::new("mount");
        mount.args(["-i", "-t", "fuse", "-o", &options, "test"]);
        assert!(mount.arg(directory).status().unwrap().success());
        fcntl(&device, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        let (closing, closes) = channel();
        let (serves, ends) = channel::<()>();
        std::thread::spawn(move || {
            let mut request = vec![0; 1 << 17];
            while device.read(&mut request).is_ok() {
                match answer(&request) {
                    Some(answer) => device.write_all(&answer).unwrap(),
                    None => {
                        closing.send(()).unwrap();
                        let _ = ends.recv();
                        return;
                    }
                }
            }
        });
        Self {
            directory: directory.to_owned(),
            closes,
            _serves: serves,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        let _ = unmount.arg("-l").arg(&self.directory).status();
    }
}

/// What the server says to a request; `None` where it does not.
fn answer(request: &[u8]) -> Option<Vec<u8>> {
    const LOOKUP: u8 = 1;
    const GETATTR: u8 = 3;
    const OPEN: u8 = 14;
    const FLUSH: u8 = 25;
    const INIT: u8 = 26;
    const FILE: u64 = 2;
    let attributes = |node: u64| {
        let mode: u32 = if node == FILE { 0o100_644 } else { 0o040_755 };
        let mut attributes = [0_u8; 88];
        attributes[..8].copy_from_slice(&node.to_ne_bytes());
        attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
        attributes[64..68].copy_from_slice(&1_u32.to_ne_bytes());
        attributes
    };
    let node = u64::from_ne_bytes(request[16..24].try_into().unwrap());
    let mut error = 0_i32;
    let body = match request[4] {
        INIT => {
            let mut body = vec![0; 64];
            body[..4].copy_from_slice(&7_u32.to_ne_bytes());
            body[4..8].copy_from_slice(&31_u32.to_ne_bytes());
            body[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
            body
        }
        LOOKUP => {
            let mut body = vec![0; 40];
            body[..8].copy_from_slice(&FILE.to_ne_bytes());
            [body.as_slice(), &attributes(FILE)].concat()
        }
        GETATTR => [[0_u8; 16].as_slice(), &attributes(node)].concat(),
        OPEN => vec![0; 16],
        FLUSH => return None,
        _ => {
            error = -libc::ENOSYS;
            Vec::new()
        }
    };
    let length = u32::try_from(16 + body.len()).unwrap().to_ne_bytes();
    let unique = &request[8..16];
    Some([&length, &error.to_ne_bytes(), unique, &body].concat())
}

/// The helper. It ends once its server has.
struct Caller {
    child: Child,
    server: Option<Server>,
}

impl Caller {
    fn end(&mut self) {
        let _ = self.child.kill();
        self.server = None;
        let _ = self.child.wait();
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn a_caller_whose_exec_does_not_end_holds_up_no_other() {
    if needs_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mounted = directory.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let server = Server::mount(&mounted);
    let unix = UnixListener::bind(directory.path().join("socket")).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut caller = Command::new(std::env::current_exe().unwrap());
    caller
        .args(["--exact", "platform::endless_exec::helper", "--nocapture"])
        .env(HELPER, tcp.local_addr().unwrap().port().to_string())
        .current_dir(&mounted)
        .stdout(Stdio::null());
    let mut caller = Caller {
        child: caller.spawn().unwrap(),
        server: Some(server),
    };
    let streams = Arc::new((unix.accept().unwrap().0, tcp.accept().unwrap().0));
    let server = caller.server.as_ref().unwrap();
    server.closes.recv_timeout(LIMIT).unwrap();

    let pool = Pool::start(|| ()).unwrap();
    let (done, outcomes) = channel();
    for number in 0..2 * MOST_OBSERVERS {
        let (streams, done) = (Arc::clone(&streams), done.clone());
        pool.look(async move {
            let (unix, tcp) = &*streams;
            let evidence = match number % 2 {
                0 => PeerEvidence::of_unix_stream(unix.as_fd()).await,
                _ => PeerEvidence::of_loopback_tcp(tcp).await,
            };
            drop(done.send(evidence));
        });
    }
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (found, honest) = channel();
    pool.look(async move {
        let evidence = PeerEvidence::of_unix_stream(theirs.as_fd()).await;
        found.send(evidence.unwrap().check_liveness()).unwrap();
    });
    honest.recv_timeout(LIMIT).unwrap().unwrap();
    assert!(outcomes.try_recv().is_err());

    // Whoever waited is answered.
    caller.end();
    for _ in 0..2 * MOST_OBSERVERS {
        drop(outcomes.recv_timeout(LIMIT).unwrap());
    }
}
