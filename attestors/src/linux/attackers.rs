//! Attackers on the node, each under an unprivileged uid: real processes, real sockets.
//!
//! The attacker is this test binary, started again with [`HELPER`] in its environment. Each test
//! begins and ends with an honest caller who is attested.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed expectation is a failed test"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::Uid;

use super::kernel;
use crate::counts;
use crate::observers::look_here;
use crate::{
    AttestationEnded, AttestedWorkload, Attestor, AttributeSelection, Catalog,
    ConnectionAttestation, EvidenceError, PeerEvidence, SystemClock, SystemdAttestor, UnixAttestor,
    hexadecimal,
};

/// What the helper is to do: `ROLE ADDRESS`.
const HELPER: &str = "COUNTERSIGN_TEST_HELPER";
const SLEEPING_HELPER: &str = "COUNTERSIGN_TEST_SLEEPING_HELPER";
/// How many callers connect, send and exit.
const REPEATS: usize = 10_000;
/// The user that the attackers are when the tests run as root: `nobody`.
const NOBODY: u32 = 65_534;
/// A path that a policy may permit, on every Debian.
const PERMITTED: &str = "/usr/bin/true";

/// The helper's side. Does nothing in an ordinary test run.
#[test]
#[expect(
    clippy::zombie_processes,
    reason = "the child is meant to outlive the helper"
)]
fn helper() {
    // The child with which `share-with-the-same` shares: the same program and arguments.
    if std::env::var(SLEEPING_HELPER).is_ok() {
        std::thread::sleep(Duration::from_secs(20));
    }
    let Ok(role) = std::env::var(HELPER) else {
        return;
    };
    let (role, address) = role.split_once(' ').unwrap();
    let mut connection = Connection::to(address);
    match role {
        "hold" => {}
        "exec" => connection.keep_over_exec(),
        "share-with-another" | "share-with-the-same" | "share-with-nobody" | "hand-over" => {
            connection.keep_over_exec();
            let mut command = match role {
                "share-with-the-same" => again(),
                _ => sleep(),
            };
            if role == "share-with-nobody" || role == "hand-over" {
                command.uid(NOBODY).gid(NOBODY);
            }
            command.env_remove(HELPER).env(SLEEPING_HELPER, "1");
            let child = command.spawn().unwrap();
            wait_until("the child runs its own program", || {
                fs::read_to_string(format!("/proc/{}/environ", child.id()))
                    .is_ok_and(|environment| environment.contains(SLEEPING_HELPER))
            });
            if role == "hand-over" {
                return;
            }
        }
        "drop-user" => {
            nix::unistd::setgid(NOBODY.into()).unwrap();
            nix::unistd::setuid(NOBODY.into()).unwrap();
        }
        role => panic!("unknown role {role}"),
    }
    connection.send();
    let mut byte = [0];
    let received = connection.stream().read(&mut byte).unwrap_or(0);
    if role == "exec" && received == 1 {
        panic!("{}", sleep().exec());
    }
}

fn sleep() -> Command {
    let mut command = Command::new("/bin/sleep");
    command.arg("20").stdout(Stdio::null());
    command
}

/// This very command line once more.
fn again() -> Command {
    let mut arguments = std::env::args_os();
    let mut command = Command::new(arguments.next().unwrap());
    command.args(arguments).stdout(Stdio::null());
    command
}

enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Connection {
    fn to(address: &str) -> Self {
        match address.split_once(':').unwrap() {
            ("tcp", address) => Self::Tcp(TcpStream::connect(address).unwrap()),
            ("unix", path) => Self::Unix(UnixStream::connect(path).unwrap()),
            (kind, _) => panic!("unknown address {kind}"),
        }
    }

    fn stream(&mut self) -> &mut dyn Stream {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    fn send(&mut self) {
        self.stream().write_all(b"x").unwrap();
    }

    fn receive(&mut self) {
        self.stream().read_exact(&mut [0]).unwrap();
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }

    fn keep_over_exec(&self) {
        fcntl(self.descriptor(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    }

    fn evidence(&self) -> Result<PeerEvidence, EvidenceError> {
        match self {
            Self::Tcp(stream) => look_here(PeerEvidence::of_loopback_tcp(stream)),
            Self::Unix(stream) => look_here(PeerEvidence::of_unix_stream(stream.as_fd())),
        }
    }

    /// As on a kernel without SO_PEERPIDFD.
    fn weaker_evidence(&self) -> Result<PeerEvidence, EvidenceError> {
        look_here(PeerEvidence::of_unix_stream_by_credentials(
            self.descriptor(),
        ))
    }
}

/// Where callers come in, by either kind of socket, and a copy of this binary that everybody may run.
struct Node {
    directory: tempfile::TempDir,
    tcp: TcpListener,
    unix: UnixListener,
}

/// A started helper; ended with the test.
struct Caller {
    child: Child,
    connection: Connection,
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

static PROGRAM: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("caller");
    copy_program(&std::env::current_exe().unwrap(), &program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    (directory, program)
});

/// Copies a program that is executed next, by another process: what this one has open for writing is open, too,
/// in every child that another test is starting, and can't be executed meanwhile (ETXTBSY, execve(2)).
fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").args([from, to]).status().unwrap();
    assert!(copied.success());
}

fn program() -> &'static Path {
    &PROGRAM.1
}

fn is_root() -> bool {
    Uid::effective().is_root()
}

/// The uid that attackers have.
fn attacker_uid() -> u32 {
    match is_root() {
        true => NOBODY,
        false => Uid::effective().as_raw(),
    }
}

/// True when the test is to pass over. Under continuous integration, lacking root is a failure.
pub(super) fn needs_root() -> bool {
    passes_over("needs root", is_root())
}

fn passes_over(need: &str, met: bool) -> bool {
    if met {
        return false;
    }
    assert!(
        std::env::var("COUNTERSIGN_REQUIRE_ROOT").as_deref() != Ok("1"),
        "{need}"
    );
    println!("{need}");
    true
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let socket = directory.path().join("socket");
        let unix = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
        Self {
            directory,
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            unix,
        }
    }

    fn tcp_address(&self) -> String {
        format!("tcp:{}", self.tcp.local_addr().unwrap())
    }

    fn unix_address(&self) -> String {
        format!("unix:{}", self.directory.path().join("socket").display())
    }

    fn addresses(&self) -> [String; 2] {
        [self.tcp_address(), self.unix_address()]
    }

    fn accept(&self, address: &str) -> Connection {
        match address.starts_with("tcp:") {
            true => Connection::Tcp(self.tcp.accept().unwrap().0),
            false => Connection::Unix(self.unix.accept().unwrap().0),
        }
    }

    /// Starts the helper by `command`, as the attackers' user, and waits for its first byte.
    fn call(&self, role: &str, address: &str, command: &mut Command) -> Caller {
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        self.call_as_we_are(role, address, command)
    }

    fn call_as_we_are(&self, role: &str, address: &str, command: &mut Command) -> Caller {
        command
            .env(HELPER, format!("{role} {address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let mut caller = Caller {
            child,
            connection: self.accept(address),
        };
        caller.connection.receive();
        caller
    }

    /// An honest caller is attested by each kind of socket.
    fn serves_the_honest(&self) {
        for address in self.addresses() {
            let caller = self.call("hold", &address, &mut helper_by(program()));
            let evidence = caller.connection.evidence().unwrap();
            let process = evidence.process().unwrap();
            assert_eq!(
                (process.pid(), process.uid()),
                (caller.child.id(), attacker_uid())
            );
            evidence.check_liveness().unwrap();
            assert_eq!(process.executable().unwrap().unwrap(), program());
        }
    }
}

/// The helper, executed by this path.
fn helper_by(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(HELPER_ARGUMENTS);
    command
}

const HELPER_ARGUMENTS: [&str; 3] = [
    "platform::attackers::helper",
    "--nocapture",
    "--test-threads=1",
];

fn bash(script: &str) -> Command {
    let mut command = Command::new("/bin/bash");
    command.args(["-c", script]);
    command
}

fn attest(evidence: PeerEvidence) -> (ConnectionAttestation, Arc<AttestedWorkload>) {
    runtime().block_on(async {
        let attestors: Vec<Arc<dyn Attestor>> = vec![
            Arc::new(UnixAttestor::new(AttributeSelection::all())),
            Arc::new(SystemdAttestor::new()),
        ];
        let catalog = Arc::new(Catalog::new(attestors, Arc::new(SystemClock::new())));
        let connection = ConnectionAttestation::new(catalog, evidence).await;
        let workload = connection.attest(None).await.unwrap();
        (connection, workload)
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn stated(workload: &AttestedWorkload, attribute: &str) -> Option<String> {
    let (group, name) = attribute.split_once('.').unwrap();
    workload
        .facts()
        .attribute(group, name)
        .map(ToString::to_string)
}

fn sha256_of(path: &Path) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &fs::read(path).unwrap());
    hexadecimal(digest.as_ref())
}

pub(super) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "waited too long until {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What is found once only the caller has its socket open: a child that another test is starting has it, too,
/// until it executes.
pub(super) fn settled(
    look: impl Fn() -> Result<PeerEvidence, EvidenceError>,
) -> Result<PeerEvidence, EvidenceError> {
    let mut found = None;
    wait_until("nobody else holds the socket", || {
        !matches!(found.insert(look()), Err(EvidenceError::AmbiguousCaller))
    });
    found.unwrap()
}

#[test]
fn who_connects_sends_and_exits_is_never_taken_for_root() {
    let node = Node::new();
    node.serves_the_honest();
    let port = node.tcp.local_addr().unwrap().port();
    // Every twentieth lingers until it is hung up on, so that the living and the dying alternate.
    let script = format!(
        "for ((i = 0; i < {REPEATS}; i++)); do \
         (exec 3<>/dev/tcp/127.0.0.1/{port} && printf x >&3 && ((i % 20)) || read -t 0.5 -u 3); done"
    );
    let mut command = bash(&script);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut children = command.stderr(Stdio::null()).spawn().unwrap();

    let (mut attested, mut gone) = (0, 0);
    for number in 0..REPEATS {
        let (mut stream, _) = node.tcp.accept().unwrap();
        // Every second one is asked about when it has surely gone, the others while it may live.
        let waited = number % 2 == 1;
        if waited {
            let mut sent = Vec::new();
            stream.read_to_end(&mut sent).unwrap();
            assert_eq!(sent, b"x");
        }
        match Connection::Tcp(stream).evidence() {
            Ok(evidence) => {
                assert!(!waited, "{:?}", evidence.process());
                assert_eq!(evidence.process().unwrap().uid(), attacker_uid());
                attested += 1;
            }
            Err(EvidenceError::CallerGone) => gone += 1,
            // Without privileges a process cannot be read while it ends.
            Err(EvidenceError::Unavailable(_)) if !is_root() => gone += 1,
            Err(error) => panic!("{error}"),
        }
    }
    children.wait().unwrap();
    println!("{attested} attested, {gone} gone, none taken for another");
    counts::expect("callers-that-exit", attested + gone);
    assert!(gone >= REPEATS / 2);
    node.serves_the_honest();
}

#[test]
fn a_unix_peer_that_exited_is_gone_by_both_ways() {
    let node = Node::new();
    node.serves_the_honest();
    let address = node.unix_address();
    let mut caller = node.call("hold", &address, &mut helper_by(program()));
    let before = caller.connection.evidence().unwrap();
    before.check_liveness().unwrap();
    caller.child.kill().unwrap();
    caller.child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(before.check_liveness(), Err(AttestationEnded::Exited));
    assert!(matches!(
        caller.connection.evidence(),
        Err(EvidenceError::CallerGone)
    ));
    let weaker = caller.connection.weaker_evidence();
    assert!(matches!(weaker, Err(EvidenceError::CallerGone)));
    node.serves_the_honest();
}

#[test]
fn an_older_kernel_is_attacked_in_vain_too() {
    // Before 6.13 it does not tell whose pidfd it is, and `/proc` is asked.
    kernel::older::pretended(|| {
        a_unix_peer_that_exited_is_gone_by_both_ways();
        exec_and_exit_end_the_attestation();
        another_process_with_the_same_number_is_another_process();
        who_has_the_number_of_one_that_was_found_before_is_told_from_it();
        a_socket_shared_by_unlike_processes_is_refused();
        a_socket_that_another_user_made_is_refused();
    });
}

#[test]
fn a_bind_mount_over_a_permitted_path_states_no_path() {
    let node = Node::new();
    node.serves_the_honest();
    let can = bash("exec unshare -Urm true").uid(attacker_uid()).status();
    if passes_over(
        "needs unprivileged user namespaces",
        can.is_ok_and(|status| status.success()),
    ) {
        return;
    }
    let evil = program().display();
    let arguments = HELPER_ARGUMENTS.join(" ");
    // As itself in the user namespace, and as a process of the host's namespace that executes the
    // file through the other's root: both show the permitted path.
    let inside = format!(
        "exec unshare -Urm bash -c 'mount --bind {evil} {PERMITTED} && exec {PERMITTED} {arguments}'"
    );
    let through = format!(
        "unshare -Urm bash -c 'mount --bind {evil} {PERMITTED} && echo && exec sleep 20' > {fifo} & \
         read < {fifo}; exec /proc/$!/root{PERMITTED} {arguments}",
        fifo = make_fifo(&node).display(),
    );
    for address in node.addresses() {
        for script in [&inside, &through] {
            let caller = node.call("hold", &address, &mut bash(script));
            let evidence = caller.connection.evidence().unwrap();
            let pid = evidence.process().unwrap().pid();
            let shown = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
            assert_eq!(shown, Path::new(PERMITTED), "the attack itself must work");

            let (_, workload) = attest(evidence);
            assert_eq!(stated(&workload, "unix.executable"), None, "{script}");
            assert_eq!(
                stated(&workload, "unix.uid"),
                Some(attacker_uid().to_string())
            );
            assert_eq!(
                stated(&workload, "unix.executable_sha256"),
                Some(sha256_of(program()))
            );
            assert_eq!(workload.facts().failed_attestors, []);
        }
    }
    node.serves_the_honest();
}

fn make_fifo(node: &Node) -> PathBuf {
    let path = node.directory.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    path
}

#[test]
fn a_deleted_or_replaced_executable_has_a_hash_and_no_path() {
    let node = Node::new();
    let copy = node.directory.path().join("copy");
    copy_program(program(), &copy);
    let caller = node.call("hold", &node.unix_address(), &mut helper_by(&copy));
    let (_, workload) = attest(caller.connection.evidence().unwrap());
    assert_eq!(
        stated(&workload, "unix.executable").map(PathBuf::from),
        Some(copy.clone())
    );

    fs::remove_file(&copy).unwrap();
    let (_, workload) = attest(caller.connection.evidence().unwrap());
    assert_eq!(stated(&workload, "unix.executable"), None);
    assert_eq!(
        stated(&workload, "unix.executable_sha256"),
        Some(sha256_of(program()))
    );

    // Another file, by the name that the kernel shows for the deleted one.
    fs::copy("/bin/sleep", node.directory.path().join("copy (deleted)")).unwrap();
    fs::copy("/bin/sleep", &copy).unwrap();
    let (_, workload) = attest(caller.connection.evidence().unwrap());
    assert_eq!(stated(&workload, "unix.executable"), None);
    assert_eq!(
        stated(&workload, "unix.executable_sha256"),
        Some(sha256_of(program()))
    );
}

#[test]
fn exec_and_exit_end_the_attestation() {
    let node = Node::new();
    node.serves_the_honest();
    for address in node.addresses() {
        let mut caller = node.call("exec", &address, &mut helper_by(program()));
        let evidence = caller.connection.evidence().unwrap();
        let pid = evidence.process().unwrap().pid();
        let (connection, workload) = attest(evidence);
        let now = std::time::SystemTime::now();
        workload.check_liveness(now).unwrap();

        caller.connection.send();
        let exe = format!("/proc/{pid}/exe");
        wait_until("the helper executes another program", || {
            // For a moment in the middle of an exec there is no executable at all.
            fs::read_link(&exe).is_ok_and(|executable| executable != program())
        });
        std::thread::sleep(Duration::from_millis(2));
        // The pidfd still says that it lives; its program is another.
        assert_eq!(
            workload.check_liveness(now),
            Err(AttestationEnded::Executed)
        );
        let next = runtime().block_on(connection.attest(None));
        assert_eq!(next.unwrap_err(), AttestationEnded::Executed);
        // Found anew it is what it runs now.
        let evidence = caller.connection.evidence().unwrap();
        let executable = evidence.process().unwrap().executable().unwrap().unwrap();
        assert!(executable.ends_with("sleep"), "{}", executable.display());
        evidence.check_liveness().unwrap();

        caller.child.kill().unwrap();
        caller.child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(workload.check_liveness(now), Err(AttestationEnded::Exited));
    }
    node.serves_the_honest();
}

#[test]
fn another_process_with_the_same_number_is_another_process() {
    if needs_root() {
        return;
    }
    let node = Node::new();
    node.serves_the_honest();
    let address = node.unix_address();
    let mut caller = node.call("share-with-another", &address, &mut helper_by(program()));
    let pid = caller.child.id();
    let weaker = caller.connection.weaker_evidence().unwrap();
    let evidence = caller.connection.evidence().unwrap();
    assert_eq!(evidence.process().unwrap().pid(), pid);

    // Its child keeps the socket open, so that the connection does not end with its maker.
    caller.child.kill().unwrap();
    caller.child.wait().unwrap();
    let successor = take_number(pid);

    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(evidence.check_liveness(), Err(AttestationEnded::Exited));
    assert_eq!(weaker.check_liveness(), Err(AttestationEnded::Exited));
    assert!(
        evidence.process().unwrap().cgroups().is_err(),
        "the directory is of the dead one"
    );
    assert!(matches!(
        caller.connection.evidence(),
        Err(EvidenceError::CallerGone)
    ));
    let by_number = caller.connection.weaker_evidence();
    assert!(matches!(by_number, Err(EvidenceError::CallerGone)));

    drop(successor);
    node.serves_the_honest();
}

#[test]
fn who_has_the_number_of_one_that_was_found_before_is_told_from_it() {
    if needs_root() {
        return;
    }
    let node = Node::new();
    node.serves_the_honest();
    for address in node.addresses() {
        let find = |caller: &Caller, uid: u32| {
            let evidence = caller.connection.evidence().unwrap();
            let process = evidence.process().unwrap();
            assert_eq!((process.pid(), process.uid()), (caller.child.id(), uid));
            evidence.check_liveness().unwrap();
        };
        // Root's, and after its end the attacker's with the same number, where nobody else has got that.
        let mut found = None;
        wait_until("a number is given out again", || {
            let first = node.call_as_we_are("hold", &address, &mut helper_by(program()));
            let pid = first.child.id();
            find(&first, 0);
            drop(first);
            fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
            let successor = node.call("hold", &address, &mut helper_by(program()));
            found = (successor.child.id() == pid).then_some(successor);
            found.is_some()
        });
        find(&found.unwrap(), NOBODY);
    }
    node.serves_the_honest();
}

/// A started process that is ended with the test.
struct Successor(Child);

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts processes until one has this number, be it one of ours.
fn take_number(pid: u32) -> Option<Successor> {
    let start = Instant::now();
    loop {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let process = Successor(sleep().spawn().unwrap());
        if process.0.id() == pid {
            return Some(process);
        }
        if Path::new(&format!("/proc/{pid}")).exists() {
            return None;
        }
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the number {pid} is not to be had"
        );
    }
}

#[test]
fn a_socket_shared_by_unlike_processes_is_refused() {
    let node = Node::new();
    node.serves_the_honest();
    let address = node.tcp_address();
    let shared = node.call("share-with-another", &address, &mut helper_by(program()));
    assert!(matches!(
        shared.connection.evidence(),
        Err(EvidenceError::AmbiguousCaller)
    ));
    node.serves_the_honest();
}

#[test]
fn a_socket_shared_by_processes_that_attest_alike_is_served() {
    let node = Node::new();
    let address = node.tcp_address();
    let mut shared = node.call("share-with-the-same", &address, &mut helper_by(program()));
    let evidence = shared.connection.evidence().unwrap();
    let first = evidence.process().unwrap().uid();
    assert_eq!(first, attacker_uid());
    evidence.check_liveness().unwrap();

    // The exit of one of them ends nothing: the other is the same workload.
    shared.child.kill().unwrap();
    shared.child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(2));
    evidence.check_liveness().unwrap();
}

#[test]
fn a_socket_that_another_user_made_is_refused() {
    if needs_root() {
        return;
    }
    let node = Node::new();
    node.serves_the_honest();
    for role in ["share-with-nobody", "hand-over", "drop-user"] {
        let address = node.tcp_address();
        let caller = start_without_waiting(&node, role, &address);
        wait_until("the socket has changed hands", || {
            matches!(
                caller.connection.evidence(),
                Err(EvidenceError::AmbiguousCaller)
            )
        });
    }
    // Over a Unix socket the credentials are those of the moment of connecting.
    let caller = node.call_as_we_are("drop-user", &node.unix_address(), &mut helper_by(program()));
    assert!(matches!(
        caller.connection.evidence(),
        Err(EvidenceError::AmbiguousCaller)
    ));
    let weaker = caller.connection.weaker_evidence();
    assert!(matches!(weaker, Err(EvidenceError::AmbiguousCaller)));
    node.serves_the_honest();
}

/// A helper that runs as root, and may have ended before it has sent anything.
fn start_without_waiting(node: &Node, role: &str, address: &str) -> Caller {
    let child = helper_by(program())
        .env(HELPER, format!("{role} {address}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Caller {
        child,
        connection: node.accept(address),
    }
}

/// Names below a user's own cgroup, one to a line, each meant to be taken for something of the host's, or
/// for nothing.
const HOSTILE_CGROUPS: &[u8] = include_bytes!("hostile-cgroups.txt");

/// Directories made below the cgroup-v2 file system; removed with the test.
struct CgroupTree {
    mount: PathBuf,
    made: Vec<PathBuf>,
    /// Tests share what is above their own directories.
    _alone: MutexGuard<'static, ()>,
}

impl CgroupTree {
    fn find() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = table.lines().find(|line| line.contains(" - cgroup2 "))?;
        let mount = PathBuf::from(mount.split(' ').nth(4)?);
        Some(Self {
            mount,
            made: Vec::new(),
            _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner),
        })
    }

    fn make(&mut self, path: &str) -> PathBuf {
        let mut directory = self.mount.clone();
        for component in Path::new(path) {
            directory.push(component);
            if !directory.exists() {
                fs::create_dir(&directory).unwrap();
                self.made.push(directory.clone());
            }
        }
        directory
    }

    fn give_to_the_attacker(&self, directory: &Path) {
        for file in [
            "",
            "cgroup.procs",
            "cgroup.subtree_control",
            "cgroup.threads",
        ] {
            let path = if file.is_empty() {
                directory.to_owned()
            } else {
                directory.join(file)
            };
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        // A directory can go once the last process in it is reaped.
        for directory in self.made.iter().rev() {
            let start = Instant::now();
            while fs::remove_dir(directory).is_err() && start.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A helper that is in this cgroup before it connects.
fn call_from(node: &Node, address: &str, cgroup: &Path) -> Caller {
    let script = format!(
        "exec {} {}",
        program().display(),
        HELPER_ARGUMENTS.join(" ")
    );
    // Root puts the shell into the cgroup; only then does it become the attacker.
    let script = format!(
        "echo $$ > \"$1/cgroup.procs\" && exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups bash -c '{script}'",
    );
    node.call_as_we_are("hold", address, bash(&script).arg("bash").arg(cgroup))
}

#[test]
fn no_name_of_a_cgroup_makes_a_user_something_else() {
    if needs_root() {
        return;
    }
    let Some(mut tree) = CgroupTree::find() else {
        passes_over("needs a cgroup-v2 file system", false);
        return;
    };
    let node = Node::new();
    let unit = format!("countersign-test-{}.service", std::process::id());
    let user = "user.slice/user-65534.slice/user@65534.service";

    // What root makes counts: the real unit, a container, and what is delegated below them.
    let container = "ab".repeat(32);
    let docker = format!("system.slice/docker-{container}.scope");
    for (path, system_unit, id) in [
        (format!("system.slice/{unit}"), unit.clone(), None),
        (format!("system.slice/{unit}/worker"), unit.clone(), None),
        (
            format!("system.slice/{unit}/x (deleted)"),
            unit.clone(),
            None,
        ),
        (
            docker.clone(),
            format!("docker-{container}.scope"),
            Some(container.clone()),
        ),
        (
            format!("{docker}/system.slice/orders.service"),
            format!("docker-{container}.scope"),
            Some(container.clone()),
        ),
        (
            format!("{docker}/x (deleted)"),
            format!("docker-{container}.scope"),
            Some(container.clone()),
        ),
    ] {
        let cgroup = tree.make(&path);
        for address in node.addresses() {
            let caller = call_from(&node, &address, &cgroup);
            let (_, workload) = attest(caller.connection.evidence().unwrap());
            assert_eq!(
                stated(&workload, "systemd.system_unit"),
                Some(system_unit.clone()),
                "{path}"
            );
            assert_eq!(stated(&workload, "container.id"), id, "{path}");
            assert_eq!(stated(&workload, "unix.cgroup"), Some(format!("/{path}")));
        }
    }

    let own = tree.make(user);
    tree.give_to_the_attacker(&own);
    let mut stayed = 0;
    for name in HOSTILE_CGROUPS
        .trim_ascii_end()
        .split(|byte| *byte == b'\n')
    {
        let cgroup = make_as_attacker(&mut tree, &own, OsStr::from_bytes(name));
        let name = String::from_utf8_lossy(name);
        for address in node.addresses() {
            let caller = call_from(&node, &address, &cgroup);
            let (_, workload) = attest(caller.connection.evidence().unwrap());
            let unit = stated(&workload, "systemd.system_unit");
            assert_eq!(unit.as_deref(), Some("user@65534.service"), "{name}");
            let owner = stated(&workload, "systemd.user_unit_uid");
            assert!(
                owner.is_none() || owner.as_deref() == Some("65534"),
                "{name}: {owner:?}"
            );
            assert_eq!(stated(&workload, "container.id"), None, "{name}");
            assert_eq!(stated(&workload, "unix.uid").as_deref(), Some("65534"));
            let path = stated(&workload, "unix.cgroup");
            assert_eq!(path, Some(format!("/{user}/{name}")));
            let key = &workload.isolation_key().0;
            assert_eq!(&**key, "unit user@65534.service uid 65534", "{name}");
        }
        stayed += 1;
    }
    counts::expect("cgroups-hostile-real", stayed);
}

#[test]
fn who_is_moved_to_another_cgroup_is_found_there() {
    if needs_root() {
        return;
    }
    let Some(mut tree) = CgroupTree::find() else {
        passes_over("needs a cgroup-v2 file system", false);
        return;
    };
    let node = Node::new();
    let places = ["before", "after"].map(|name| {
        let unit = format!("countersign-test-{name}-{}.service", std::process::id());
        (tree.make(&format!("system.slice/{unit}")), unit)
    });
    for address in node.addresses() {
        let [(before, _), _] = &places;
        let caller = call_from(&node, &address, before);
        // Moved to and fro: what was read of it in the other place a moment ago does not count.
        for (cgroup, unit) in places.iter().cycle().take(20) {
            fs::write(cgroup.join("cgroup.procs"), caller.child.id().to_string()).unwrap();
            let (_, workload) = attest(caller.connection.evidence().unwrap());
            let stated = stated(&workload, "systemd.system_unit");
            assert_eq!(stated.as_ref(), Some(unit));
        }
    }
}

/// The attacker makes the directories, as anybody may below what is delegated.
fn make_as_attacker(tree: &mut CgroupTree, own: &Path, name: &OsStr) -> PathBuf {
    let mut directory = own.to_owned();
    for component in Path::new(name) {
        directory.push(component);
        if !directory.exists() {
            let made = Command::new("mkdir")
                .arg(&directory)
                .uid(NOBODY)
                .gid(NOBODY)
                .status()
                .unwrap();
            assert!(made.success(), "{}", directory.display());
            tree.made.push(directory.clone());
        }
    }
    directory
}

/// A shell that has a connection, and a child that holds it too and runs a script.
fn call_with_child(node: &Node, script: &str) -> (Caller, u32) {
    let port = node.tcp.local_addr().unwrap().port();
    let script =
        format!("exec 3<>/dev/tcp/127.0.0.1/{port}; ({script}) & printf x >&3; wait; read -r -u3");
    let caller = node.call("", &node.tcp_address(), &mut bash(&script));
    let pid = caller.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    (caller, children.trim().parse().unwrap())
}

fn wait_until_it_sleeps(pid: u32) {
    wait_until("the child runs another program", || {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sleep\0"))
    });
}

#[test]
fn who_shares_its_socket_for_a_moment_only_is_served() {
    let node = Node::new();
    // Another program, and one that is alike until it executes.
    for (script, is_alike) in [
        ("exec sleep 20", false),
        ("read -r -n1 -u3; exec sleep 20 3>&-", true),
    ] {
        // A pause of this machine can be longer than what is waited for.
        let served = (0..30).filter(|_| {
            let (caller, child) = call_with_child(&node, script);
            if !is_alike {
                wait_until_it_sleeps(child);
                let shared = caller.connection.evidence().unwrap_err();
                assert_eq!(shared.code(), "caller_ambiguous");
            }
            let Connection::Tcp(stream) = &caller.connection else {
                panic!("it is on TCP");
            };
            let begins = std::sync::Barrier::new(2);
            let looked = std::thread::scope(|scope| {
                let looked = scope.spawn(|| {
                    begins.wait();
                    caller.connection.evidence()
                });
                begins.wait();
                std::thread::sleep(Duration::from_millis(3));
                match is_alike {
                    true => (&*stream).write_all(b"x").unwrap(),
                    false => kill(child),
                }
                looked.join().unwrap()
            });
            if is_alike {
                wait_until_it_sleeps(child);
                kill(child);
            }
            std::thread::sleep(Duration::from_millis(2));
            looked.is_ok_and(|evidence| evidence.check_liveness().is_ok())
        });
        assert_eq!(served.take(3).count(), 3, "{script}");
    }
}

#[test]
fn of_several_holders_one_that_lives_is_attested() {
    let node = Node::new();
    let (mut caller, child) = call_with_child(&node, "read -r -u3");
    let evidence = caller.connection.evidence().unwrap();
    caller.child.kill().unwrap();
    caller.child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(evidence.check_liveness(), Ok(()));
    assert_eq!(evidence.process().unwrap().pid(), child);
    kill(child);
}

#[test]
fn a_socket_that_many_hold_is_nobodys() {
    let node = Node::new();
    let port = node.tcp.local_addr().unwrap().port();
    for (children, is_served) in [(20, true), (70, false)] {
        let script = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port}; for ((i = 0; i < {children}; i++)); do (read -r -u3) & done; \
             printf x >&3; wait"
        );
        let caller = node.call("", &node.tcp_address(), &mut bash(&script));
        match caller.connection.evidence() {
            Ok(_) => assert!(is_served, "{children}"),
            Err(error) => assert_eq!((error.code(), is_served), ("caller_ambiguous", false)),
        }
    }
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_descriptor_that_was_passed_on_leaves_its_maker_nothing_to_be_taken_for() {
    // The maker closes its end and lives on; another process of the same user holds the socket. The
    // holder is what is attested: who passes a socket on lends nothing of its own.
    let node = Node::new();
    let stream = TcpStream::connect(node.tcp.local_addr().unwrap()).unwrap();
    let (accepted, _) = node.tcp.accept().unwrap();
    let accepted = Connection::Tcp(accepted);
    let evidence = settled(|| accepted.evidence()).unwrap();
    assert_eq!(evidence.process().unwrap().pid(), std::process::id());

    let holder = sleep()
        .stdin(Stdio::from(OwnedFd::from(stream)))
        .spawn()
        .unwrap();
    let holder = Caller {
        child: holder,
        connection: accepted,
    };
    wait_until("the holder runs its own program", || {
        fs::read_link(format!("/proc/{}/exe", holder.child.id()))
            .is_ok_and(|exe| !exe.starts_with("/proc") && exe.ends_with("sleep"))
    });
    let evidence = settled(|| holder.connection.evidence()).unwrap();
    assert_eq!(evidence.process().unwrap().pid(), holder.child.id());
}
