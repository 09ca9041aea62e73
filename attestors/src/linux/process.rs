//! One live process: a pidfd, its open `/proc` directory, and what was read through it.

mod liveness;

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;
use rustix::fs::{RawDir, readlinkat_raw};
use rustix::path::DecInt;

use self::liveness::{Moment, exited};
use super::executable;
use super::kernel::{self, Credentials, FileIdentity};
use crate::cgroup::Cgroups;
use crate::workload::AttestationEnded;

/// No file of procfs that is read here comes near this; a longer one is not believed.
const LARGEST_PROC_FILE: u64 = 4 * 1024 * 1024;

/// Most files of procfs that are read here are smaller.
const USUAL_PROC_FILE: usize = 4096;

/// How long an exec may take from the new program's memory to its arguments.
const EXEC_ENDS_WITHIN: Duration = Duration::from_millis(50);

/// Processes found before.
static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);

/// Above this many, numbers whose process is no longer held are forgotten.
const FORGET_ABOVE: usize = 1024;

/// How many processes, those that were found for the first time last, are held although no connection of
/// theirs may be open, with four descriptors each. What they are is read anew whenever they are found.
const HELD_LAST: usize = 64;

/// A process that held a caller's socket.
#[derive(Debug, Clone)]
pub struct Process {
    held: Arc<Held>,
    credentials: Credentials,
    /// When it was found to be the caller.
    found: Moment,
}

/// What is held of a process, for all connections of it.
#[derive(Debug)]
struct Held {
    pid: u32,
    pidfd: OwnedFd,
    /// `/proc/PID`. It names this process for ever: after its end every read fails, also when
    /// another process has got the number.
    directory: Arc<OwnedFd>,
    cgroup: Mutex<CgroupFile>,
    /// The executable when the process was found; `None` where this agent may not see it.
    executable: Option<FileIdentity>,
    /// `/proc/PID/pagemap`, opened before the executable was looked at; `None` where that is not
    /// allowed, or the kernel has none.
    memory: Option<File>,
    /// The [`Moment`] of the last check, and the one at which the executable was last seen to be the same.
    last_check: AtomicU64,
    last_look: AtomicU64,
    is_looked_at: AtomicBool,
    /// Why it is served no longer, once that was found.
    ended: OnceLock<AttestationEnded>,
    /// Which descriptor the last socket was by which it was found: the next is often the same.
    last_descriptor: AtomicU32,
}

/// `/proc/PID/cgroup`, once it was read.
#[derive(Debug, Default)]
struct CgroupFile {
    /// It is of this process for ever too.
    file: Option<File>,
    /// When it was last read, and what it said.
    last: Option<(Moment, Arc<Cgroups>)>,
}

#[derive(Default)]
struct Known {
    by_number: HashMap<u32, Weak<Held>>,
    last: VecDeque<Arc<Held>>,
}

/// What `/proc/PID/status` says of credentials (proc_pid_status(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Status {
    /// The effective ones.
    pub(crate) credentials: Credentials,
    pub(crate) groups: Vec<u32>,
}

impl Process {
    /// The process behind a pidfd, whose number is or was `pid`; `None` when it is gone.
    pub(super) fn of_pidfd(pid: u32, pidfd: OwnedFd) -> io::Result<Option<Self>> {
        if let Some(held) = known(pid)
            && let Some((credentials, executable)) = look(&pidfd, &held.directory)?
            && executable == held.executable
            && held.is_as_it_was()
        {
            return Ok(Some(Self::new(held, credentials)));
        }
        match open_directory(pid)? {
            Some(directory) => Self::hold(pid, pidfd, directory),
            None => Ok(None),
        }
    }

    /// The process that has `pid` now; `None` when there is none.
    pub(super) fn of_pid(pid: u32) -> io::Result<Option<Self>> {
        match kernel::pidfd_open(pid) {
            Ok(pidfd) => Self::of_pidfd(pid, pidfd),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The process that had `pid` when `directory` (its `/proc` directory) was opened; `None` when it is
    /// gone.
    pub(super) fn of_directory(pid: u32, directory: Arc<OwnedFd>) -> io::Result<Option<Self>> {
        if let Some(held) = known(pid).filter(|held| Arc::ptr_eq(&held.directory, &directory))
            && let Some((credentials, executable)) = look(&held.pidfd, &directory)?
            && executable == held.executable
            && held.is_as_it_was()
        {
            return Ok(Some(Self::new(held, credentials)));
        }
        match kernel::pidfd_open(pid) {
            Ok(pidfd) => Self::hold(pid, pidfd, directory),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn hold(pid: u32, pidfd: OwnedFd, directory: Arc<OwnedFd>) -> io::Result<Option<Self>> {
        let memory = match open_file(&directory, c"pagemap") {
            Ok(memory) => Some(memory),
            Err(error) if gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => return Err(error),
        };
        let looked = Moment::now();
        let Some((credentials, executable)) = look(&pidfd, &directory)? else {
            return Ok(None);
        };
        let held = Arc::new(Held {
            pid,
            pidfd,
            directory,
            cgroup: Mutex::default(),
            executable,
            memory,
            last_check: AtomicU64::new(0),
            last_look: AtomicU64::new(looked.0),
            is_looked_at: AtomicBool::new(false),
            ended: OnceLock::new(),
            last_descriptor: AtomicU32::new(0),
        });
        remember(&held);
        Ok(Some(Self::new(held, credentials)))
    }

    fn new(held: Arc<Held>, credentials: Credentials) -> Self {
        Self {
            held,
            credentials,
            found: Moment::now(),
        }
    }

    /// The process number. It names the process only while the process lives.
    pub fn pid(&self) -> u32 {
        self.held.pid
    }

    /// The effective user id, as this agent's user namespace numbers it.
    pub fn uid(&self) -> u32 {
        self.credentials.uid
    }

    /// The effective group id.
    pub fn gid(&self) -> u32 {
        self.credentials.gid
    }

    /// The supplementary group ids, of a process that is still who it was when it was found.
    pub fn groups(&self) -> io::Result<Vec<u32>> {
        let status = read_status(&self.held.directory)?;
        if status.credentials != self.credentials {
            return Err(io::Error::other("it has changed its user or group"));
        }
        Ok(status.groups)
    }

    /// True where an exec can be seen, that is, where the agent may see the process's executable.
    pub fn exec_is_seen(&self) -> bool {
        self.held.executable.is_some()
    }

    /// What `/proc/PID/cgroup` (cgroups(7)) says since the process was found. What is less than a
    /// millisecond old is not read again.
    pub(crate) fn cgroups(&self) -> io::Result<Arc<Cgroups>> {
        let held = &self.held;
        let mut cgroup = held.cgroup.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Moment::now();
        if let Some((read, cgroups)) = &cgroup.last
            && self.is_recent(*read, now)
        {
            return Ok(Arc::clone(cgroups));
        }
        let CgroupFile { file, last } = std::mem::take(&mut *cgroup);
        let file = match file {
            Some(file) => file,
            None => open_file(&held.directory, c"cgroup")?,
        };
        let text = read_from_its_beginning(&file)?;
        let cgroups = match last {
            Some((_, cgroups)) if *cgroups.text == *text => cgroups,
            _ => Arc::new(Cgroups::read(&text)),
        };
        *cgroup = CgroupFile {
            file: Some(file),
            last: Some((now, Arc::clone(&cgroups))),
        };
        Ok(cgroups)
    }

    /// The arguments, each ended by a zero byte. The process may write here what it likes. They are the last
    /// that an exec changes: of a process that lives and has none they are waited for, for [`EXEC_ENDS_WITHIN`].
    pub fn command_line(&self) -> io::Result<Vec<u8>> {
        let began = Moment::now();
        loop {
            let arguments = read_whole(open_file(&self.held.directory, c"cmdline")?)?;
            let is_waited_for = arguments.is_empty()
                && Moment::now().is_within(EXEC_ENDS_WITHIN, began)
                && self.check_liveness().is_ok();
            if !is_waited_for {
                return Ok(arguments);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The inode number of the network namespace (namespaces(7)).
    pub fn network_namespace(&self) -> io::Result<u64> {
        self.namespace(c"ns/net")
    }

    /// The path of the executable, if this is the path by which the *host* knows the file that runs:
    /// `None` for a process in another mount namespace, for a file that was deleted or replaced, and
    /// for one that was executed through a descriptor from elsewhere.
    pub fn executable(&self) -> io::Result<Option<PathBuf>> {
        if self.namespace(c"ns/mnt")? != executable::host_mount_namespace()? {
            return Ok(None);
        }
        let path = PathBuf::from(readlinkat(&self.held.directory, c"exe")?);
        let running = kernel::identify(self.held.directory.as_fd(), c"exe")?;
        self.check_still_runs(&running)?;
        // `exe` shows a path in whatever mount tree the file was opened. A process of the host's
        // namespace can run a descriptor that it was handed from another one (fexecve), where a
        // user may have mounted anything anywhere: the host must find the same file there.
        let is_what_the_host_finds =
            executable::identify_on_host(&path).is_some_and(|found| found.same_file(&running));
        Ok(is_what_the_host_finds.then_some(path))
    }

    /// The SHA-256 of the executable that runs; `None` where its bytes are not the local kernel's to
    /// vouch for (FUSE, network file systems).
    pub fn executable_sha256(&self) -> io::Result<Option<[u8; 32]>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = File::from(openat(&self.held.directory, c"exe", flags, Mode::empty())?);
        self.check_still_runs(&kernel::identify_open(file.as_fd())?)?;
        executable::sha256(file)
    }

    /// What is stated of a process is of one program, also where it executes another meanwhile.
    fn check_still_runs(&self, running: &FileIdentity) -> io::Result<()> {
        match &self.held.executable {
            Some(before) if !before.same_file(running) => {
                Err(io::Error::other("it has executed another program"))
            }
            _ => Ok(()),
        }
    }

    /// Everything that an attestor may state of the process, except the pid: what is equal attests alike.
    pub(super) fn likeness(&self) -> io::Result<impl PartialEq + use<>> {
        Ok((
            (self.credentials, self.held.executable.clone()),
            self.groups()?,
            self.cgroups()?.text.clone(),
            self.command_line()?,
            self.namespace(c"ns/net").ok(),
            self.namespace(c"ns/mnt").ok(),
        ))
    }

    /// True when one of the process's descriptors is the socket with `inode`.
    pub(super) fn holds_socket(&self, inode: u32) -> io::Result<bool> {
        find_socket(&self.held.directory, None, |_, held| held == inode)
    }

    /// True when this descriptor of the process is the socket with `inode`. Then it is the first that is
    /// looked at for the next one.
    pub(super) fn has_socket_at(&self, descriptor: u32, inode: u32) -> bool {
        let held = &self.held;
        let has = socket_at(&held.directory, descriptor) == Some(inode);
        if has {
            held.last_descriptor.store(descriptor, Ordering::Relaxed);
        }
        has
    }

    fn namespace(&self, link: &CStr) -> io::Result<u64> {
        Ok(kernel::identify(self.held.directory.as_fd(), link)?.inode)
    }
}

/// The process with this number that was found before, if it is still held. It may be gone.
fn known(pid: u32) -> Option<Arc<Held>> {
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.by_number.get(&pid).and_then(Weak::upgrade)
}

/// The `/proc` directory of [`known`], and the descriptor to look at first.
pub(super) fn known_directory(pid: u32) -> Option<(Arc<OwnedFd>, u32)> {
    let held = known(pid)?;
    let descriptor = held.last_descriptor.load(Ordering::Relaxed);
    Some((Arc::clone(&held.directory), descriptor))
}

fn remember(held: &Arc<Held>) {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.by_number.len() > FORGET_ABOVE {
        known
            .by_number
            .retain(|_, process| process.strong_count() > 0);
    }
    known.by_number.insert(held.pid, Arc::downgrade(held));
    known.last.push_back(Arc::clone(held));
    if known.last.len() > HELD_LAST {
        known.last.pop_front();
    }
}

/// Who the process is that both the pidfd and the `/proc` directory are of, and what it runs, where this
/// agent may see that. Both are of processes that have or had one number, and were open before. `None`
/// when one of the two is gone: of two that are both seen to live after that, each has had the number since,
/// so that they are the same.
fn look(
    pidfd: &OwnedFd,
    directory: &OwnedFd,
) -> io::Result<Option<(Credentials, Option<FileIdentity>)>> {
    let look = || -> io::Result<Option<(Credentials, Option<FileIdentity>)>> {
        // Credentials before the executable, for an exec changes the executable first: new credentials are
        // never those of the old program. The pidfd's process was not reaped, and the directory's has an
        // executable, which a process loses before it has exited.
        if let Some(credentials) = kernel::credentials(pidfd.as_fd())?
            && let Ok(executable) = kernel::identify(directory.as_fd(), c"exe")
        {
            return Ok(Some((credentials, Some(executable))));
        }
        // That permission is denied says of no process that it is there. Its status does, and that the
        // pidfd's process has not exited.
        let credentials = read_status(directory)?.credentials;
        let executable = match kernel::identify(directory.as_fd(), c"exe") {
            Ok(executable) => Some(executable),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => return Err(error),
        };
        Ok((!exited(pidfd)?).then_some((credentials, executable)))
    };
    match look() {
        Err(error) if gone(&error) => Ok(None),
        seen => seen,
    }
}

/// Opens `/proc/PID`; `None` when there is no such process.
pub(super) fn open_directory(pid: u32) -> io::Result<Option<Arc<OwnedFd>>> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    match nix::fcntl::open(format!("/proc/{pid}").as_str(), flags, Mode::empty()) {
        Ok(directory) => Ok(Some(Arc::new(directory))),
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Goes through the descriptors in the `/proc` directory of a process that are sockets, by number and inode,
/// until `is_wanted` says that one is the last that is looked for; whether it did. After `first` the
/// highest comes first: the socket of a caller who has just come is often the one that it opened last.
pub(super) fn find_socket(
    directory: &OwnedFd,
    first: Option<u32>,
    mut is_wanted: impl FnMut(u32, u32) -> bool,
) -> io::Result<bool> {
    if let Some(first) = first
        && socket_at(directory, first).is_some_and(|inode| is_wanted(first, inode))
    {
        return Ok(true);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = openat(directory, c"fd", flags, Mode::empty())?;
    let mut entries = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&directory, &mut entries);
    let mut descriptors: Vec<u32> = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_str().ok();
        descriptors.extend(name.and_then(|name| name.parse::<u32>().ok()));
    }
    // A descriptor may be closed while we look.
    Ok(descriptors.into_iter().rev().any(|descriptor| {
        socket_inode(&directory, DecInt::new(descriptor))
            .is_some_and(|inode| is_wanted(descriptor, inode))
    }))
}

/// The inode of the socket that this descriptor in the `/proc` directory of a process is.
fn socket_at(directory: &OwnedFd, descriptor: u32) -> Option<u32> {
    socket_inode(directory, format!("fd/{descriptor}"))
}

/// The inode of the socket that a descriptor's link leads to: `socket:[INODE]` (proc_pid_fd(5)).
fn socket_inode(directory: &OwnedFd, link: impl rustix::path::Arg) -> Option<u32> {
    let mut target = [MaybeUninit::uninit(); 32];
    let (target, _) = readlinkat_raw(directory, link, &mut target).ok()?;
    let inode = str::from_utf8(target)
        .ok()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?;
    inode.parse().ok()
}

/// True when the error says that the process is no more.
pub(super) fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
}

fn open_file(directory: &OwnedFd, name: &CStr) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    Ok(File::from(openat(directory, name, flags, Mode::empty())?))
}

fn read_status(directory: &OwnedFd) -> io::Result<Status> {
    let status = read_whole(open_file(directory, c"status")?)?;
    parse_status(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed process status"))
}

/// Reads a file of procfs that the kernel writes anew for every read from its beginning, at once: what
/// others read of the same open file, and what changes meanwhile, makes no mixture of two texts.
fn read_from_its_beginning(file: &File) -> io::Result<Vec<u8>> {
    let mut content = vec![0; USUAL_PROC_FILE];
    loop {
        let length = file.read_at(&mut content, 0)?;
        if length < content.len() {
            content.truncate(length);
            return Ok(content);
        }
        if content.len() as u64 >= LARGEST_PROC_FILE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        content.resize(content.len() * 2, 0);
    }
}

/// Reads a file of procfs or of a cgroup. These say nothing of their size: most are read at once.
pub(super) fn read_whole(file: impl Read) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(USUAL_PROC_FILE);
    match file.take(LARGEST_PROC_FILE).read_to_end(&mut content)? as u64 {
        LARGEST_PROC_FILE => Err(io::ErrorKind::FileTooLarge.into()),
        _ => Ok(content),
    }
}

/// Reads the effective ids and the groups out of `/proc/PID/status`.
pub(crate) fn parse_status(status: &[u8]) -> Option<Status> {
    // The second line is `Umask:`; the first holds the process's name, in which the kernel escapes
    // line feeds, so that no name can pretend to be another line.
    let status = String::from_utf8_lossy(status);
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
    let effective = |key: &str| line(key)?.split_whitespace().nth(1)?.parse::<u32>().ok();
    Some(Status {
        credentials: Credentials {
            uid: effective("Uid:")?,
            gid: effective("Gid:")?,
        },
        groups: line("Groups:")?
            .split_whitespace()
            .map(|group| group.parse().ok())
            .collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_status_is_read_whatever_the_process_calls_itself() {
        // The name is the process's own; the kernel writes its line feeds as `\\n`.
        let status = |name: &str, groups: &str| {
            format!(
                "Name:\t{name}\nUmask:\t0022\nState:\tS (sleeping)\nUid:\t1\t1000\t3\t4\nGid:\t5\t100\t7\t8\nGroups:\t{groups}\n"
            )
        };
        for name in [
            "orders",
            "Uid:",
            "x\\nUid:\\t0\\t0\\t0\\t0",
            "Groups: 0",
            "",
        ] {
            let status = parse_status(status(name, "27 100 ").as_bytes()).unwrap();
            let credentials = status.credentials;
            assert_eq!((credentials.uid, credentials.gid), (1000, 100), "{name}");
            assert_eq!(status.groups, [27, 100]);
        }
        let alone = parse_status(status("x", " ").as_bytes()).unwrap();
        assert!(alone.groups.is_empty());
        for broken in [
            "",
            "Uid:\t1",
            "Uid:\tx\tx\n",
            "Uid:\t1\t2\nGid:\t1\t2\n",
            &status("x", "wheel"),
        ] {
            assert_eq!(parse_status(broken.as_bytes()), None, "{broken}");
        }
    }

    /// A process that lives until it is told to end.
    pub(super) fn sleeping() -> std::process::Child {
        started(std::process::Command::new("/bin/sleep").arg("20"))
    }

    /// Starts a process, and waits until it runs its own program: `spawn` may return a moment before.
    pub(super) fn started(command: &mut std::process::Command) -> std::process::Child {
        let child = command.spawn().unwrap();
        let exe = PathBuf::from(format!("/proc/{}/exe", child.id()));
        let own = std::env::current_exe().unwrap();
        while exe.read_link().unwrap() == own {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn both_ways_say_the_same_of_a_process() {
        let mut child = sleeping();
        for pid in [std::process::id(), child.id()] {
            let pidfd = kernel::pidfd_open(pid).unwrap();
            let directory = open_directory(pid).unwrap().unwrap();
            let told = kernel::credentials(pidfd.as_fd()).unwrap();
            let status = read_status(&directory).unwrap();
            assert!(told.is_none_or(|told| told == status.credentials));
            let by_ioctl = look(&pidfd, &directory).unwrap().unwrap();
            kernel::older::pretended(|| {
                let by_status = look(&pidfd, &directory).unwrap().unwrap();
                assert_eq!(by_ioctl, by_status);
            });
            assert_eq!(by_ioctl.0, status.credentials);
        }

        // As soon as it has exited, before and after it is reaped.
        let pidfd = kernel::pidfd_open(child.id()).unwrap();
        let directory = open_directory(child.id()).unwrap().unwrap();
        let is_gone = || {
            assert_eq!(look(&pidfd, &directory).unwrap(), None);
            kernel::older::pretended(|| assert_eq!(look(&pidfd, &directory).unwrap(), None));
        };
        child.kill().unwrap();
        while !exited(&pidfd).unwrap() {
            std::thread::yield_now();
        }
        is_gone();
        child.wait().unwrap();
        is_gone();
    }

    #[test]
    fn two_processes_are_not_taken_for_one() {
        // What a number that is given out again would lead to: a pidfd of the one, and the directory of
        // the other.
        let mut child = sleeping();
        let dead = kernel::pidfd_open(child.id()).unwrap();
        let its_directory = open_directory(child.id()).unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let ours = kernel::pidfd_open(std::process::id()).unwrap();
        let our_directory = open_directory(std::process::id()).unwrap().unwrap();
        let apart = || {
            assert_eq!(look(&dead, &our_directory).unwrap(), None);
            assert_eq!(look(&ours, &its_directory).unwrap(), None);
        };
        apart();
        kernel::older::pretended(apart);
    }

    #[test]
    fn the_arguments_of_a_process_whose_exec_is_ending_are_waited_for() {
        let mut seen = 0;
        for _ in 0..1000 {
            if seen == 100 {
                break;
            }
            let mut command = std::process::Command::new("/bin/sleep");
            let mut child = command.arg("20").spawn().unwrap();
            let process = Process::of_pid(child.id()).unwrap().unwrap();
            // Where it was not found before its exec had begun.
            if let Ok(Some(path)) = process.executable()
                && path.ends_with("sleep")
            {
                let began = std::time::Instant::now();
                let mut arguments = process.command_line().unwrap();
                // A busy machine may hold up the exec for longer than it is waited for.
                assert!(!arguments.is_empty() || began.elapsed() >= EXEC_ENDS_WITHIN);
                while arguments.is_empty() && began.elapsed() < Duration::from_secs(20) {
                    arguments = process.command_line().unwrap();
                }
                assert_eq!(arguments, b"/bin/sleep\x0020\0");
                seen += 1;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(process.command_line().ok().unwrap_or_default(), b"");
        }
        assert_eq!(seen, 100);
    }

    #[test]
    fn a_process_that_is_found_again_is_held_once() {
        let mut child = sleeping();
        let pid = child.id();
        let find = || Process::of_pid(pid).unwrap().unwrap();
        let (first, again) = (find(), find());
        assert!(Arc::ptr_eq(&first.held, &again.held));
        let directory = Arc::clone(&first.held.directory);
        let by_directory = Process::of_directory(pid, directory).unwrap().unwrap();
        assert!(Arc::ptr_eq(&first.held, &by_directory.held));
        let text = first.cgroups().unwrap().text.to_vec();
        assert_eq!(text, std::fs::read(format!("/proc/{pid}/cgroup")).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    proptest! {
        #[test]
        fn no_status_makes_it_panic(status in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_status(&status);
        }
    }
}
