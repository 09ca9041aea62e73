//! One live process: a pidfd, its open `/proc` directory, and what was read through it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use rustix::fs::{FileType, RawDir};

use super::executable;
use super::kernel::{self, FileIdentity};
use crate::workload::AttestationEnded;

/// A liveness check this young is not repeated.
const CHECK_AGAIN_AFTER: Duration = Duration::from_millis(1);

/// No file of procfs that is read here comes near this; a longer one is not believed.
const LARGEST_PROC_FILE: u64 = 4 * 1024 * 1024;

/// Most files of procfs that are read here are smaller.
const USUAL_PROC_FILE: usize = 4096;

/// Processes found before, by number: a caller's connections share its descriptors and its checks.
static KNOWN: LazyLock<Mutex<HashMap<u32, Weak<Process>>>> = LazyLock::new(Mutex::default);

/// Above this many, numbers whose process is no longer held are forgotten.
const FORGET_ABOVE: usize = 1024;

/// A process that held a caller's socket.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    credentials: Credentials,
    pidfd: OwnedFd,
    /// `/proc/PID`. It names this process for ever: after its end every read fails, also when
    /// another process has got the number.
    directory: Arc<OwnedFd>,
    /// The executable when the process was found; `None` where this agent may not see it.
    executable: Option<FileIdentity>,
    last_check: AtomicU64,
}

/// Effective credentials, as in `/proc/PID/status` (proc_pid_status(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

impl Process {
    /// The process behind a pidfd; `None` when it is gone.
    pub(super) fn of_pidfd(pidfd: OwnedFd) -> io::Result<Option<Self>> {
        let Some(pid) = pid_of(&pidfd)? else {
            return Ok(None);
        };
        let Some(directory) = open_directory(pid)? else {
            return Ok(None);
        };
        // The number was read from the pidfd and the directory opened by number. A process that
        // lives now has kept its number in between, so that both are of the same process.
        if exited(&pidfd)? {
            return Ok(None);
        }
        Self::read(pid, pidfd, directory)
    }

    /// The process that has `pid` while `directory` (its `/proc` directory) still answers.
    pub(super) fn of_directory(pid: u32, directory: Arc<OwnedFd>) -> io::Result<Option<Self>> {
        // If the directory's process exists after the pidfd was made, it had the number all along: its
        // status is read from there.
        match kernel::pidfd_open(pid) {
            Ok(pidfd) => Self::read(pid, pidfd, directory),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(pid: u32, pidfd: OwnedFd, directory: Arc<OwnedFd>) -> io::Result<Option<Self>> {
        let read = || -> io::Result<(Credentials, Option<FileIdentity>)> {
            let status = read_file(&directory, c"status")?;
            let credentials = parse_status(&status).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "malformed process status")
            })?;
            match kernel::identify(directory.as_fd(), c"exe") {
                Ok(identity) => Ok((credentials, Some(identity))),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    Ok((credentials, None))
                }
                Err(error) => Err(error),
            }
        };
        match read() {
            Ok(_) if exited(&pidfd)? => Ok(None),
            Ok((credentials, executable)) => Ok(Some(Self {
                pid,
                credentials,
                pidfd,
                directory,
                executable,
                last_check: AtomicU64::new(0),
            })),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// This process as it was found before, if nothing about it has changed since.
    pub(super) fn shared(self) -> Arc<Self> {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = known.get(&self.pid).and_then(Weak::upgrade)
            // One that lives still has its number, so that both are the same process.
            && matches!(exited(&before.pidfd), Ok(false))
            && before.credentials == self.credentials
            && before.executable == self.executable
        {
            return before;
        }
        if known.len() > FORGET_ABOVE {
            known.retain(|_, process| process.strong_count() > 0);
        }
        let process = Arc::new(self);
        known.insert(process.pid, Arc::downgrade(&process));
        process
    }

    /// The process number. It names the process only while the process lives.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The effective user id, as this agent's user namespace numbers it.
    pub fn uid(&self) -> u32 {
        self.credentials.uid
    }

    /// The effective group id.
    pub fn gid(&self) -> u32 {
        self.credentials.gid
    }

    /// The supplementary group ids.
    pub fn groups(&self) -> &[u32] {
        &self.credentials.groups
    }

    /// True where an exec can be seen, that is, where the agent may see the process's executable.
    pub fn exec_is_seen(&self) -> bool {
        self.executable.is_some()
    }

    /// `/proc/PID/cgroup`, byte for byte (cgroups(7)).
    pub fn cgroup_file(&self) -> io::Result<Vec<u8>> {
        read_file(&self.directory, c"cgroup")
    }

    /// The arguments, each ended by a zero byte. The process may write here what it likes.
    pub fn command_line(&self) -> io::Result<Vec<u8>> {
        read_file(&self.directory, c"cmdline")
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
        let path = PathBuf::from(readlinkat(&self.directory, c"exe")?);
        let running = kernel::identify(self.directory.as_fd(), c"exe")?;
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
        let file = File::from(openat(&self.directory, c"exe", flags, Mode::empty())?);
        executable::sha256(file)
    }

    /// Checks that the process lives and runs the executable that it ran when it was found. A check
    /// less than a millisecond old is not repeated.
    pub fn check_liveness(&self) -> Result<(), AttestationEnded> {
        let now = since_start();
        let last = Duration::from_nanos(self.last_check.load(Ordering::Relaxed));
        if !last.is_zero() && now.saturating_sub(last) < CHECK_AGAIN_AFTER {
            return Ok(());
        }
        if exited(&self.pidfd).unwrap_or(true) {
            return Err(AttestationEnded::Exited);
        }
        match (
            &self.executable,
            kernel::identify(self.directory.as_fd(), c"exe"),
        ) {
            (Some(before), Ok(now)) if before.same_file(&now) => {}
            (None, Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {}
            (_, Err(error)) if gone(&error) => return Err(AttestationEnded::Exited),
            _ => return Err(AttestationEnded::Executed),
        }
        let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(0);
        self.last_check.store(nanoseconds, Ordering::Relaxed);
        Ok(())
    }

    /// True when the two processes are alike in everything that an attestor may state, except the pid.
    pub(super) fn attests_like(&self, other: &Self) -> io::Result<bool> {
        Ok(self.credentials == other.credentials
            && self.executable == other.executable
            && self.cgroup_file()? == other.cgroup_file()?
            && self.command_line()? == other.command_line()?
            && self.namespace(c"ns/net").ok() == other.namespace(c"ns/net").ok()
            && self.namespace(c"ns/mnt").ok() == other.namespace(c"ns/mnt").ok())
    }

    /// True when one of the process's descriptors is the socket with `inode`.
    pub(super) fn holds_socket(&self, inode: u32) -> io::Result<bool> {
        find_socket(&self.directory, |_, held| held == inode)
    }

    /// True when this descriptor of the process is the socket with `inode`.
    pub(super) fn has_socket_at(&self, descriptor: &OsStr, inode: u32) -> bool {
        readlinkat(&self.directory, &Path::new("fd").join(descriptor))
            .is_ok_and(|target| socket_inode(&target) == Some(inode))
    }

    fn namespace(&self, link: &std::ffi::CStr) -> io::Result<u64> {
        Ok(kernel::identify(self.directory.as_fd(), link)?.inode)
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

/// Goes through the descriptors in the `/proc` directory of a process that are sockets, by name and inode,
/// until `is_wanted` says that one is the last that is looked for; whether it did.
pub(super) fn find_socket(
    directory: &OwnedFd,
    mut is_wanted: impl FnMut(&OsStr, u32) -> bool,
) -> io::Result<bool> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let descriptors = openat(directory, c"fd", flags, Mode::empty())?;
    let mut entries = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&descriptors, &mut entries);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if entry.file_type() == FileType::Directory {
            continue;
        }
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        // A descriptor may be closed while we look.
        let inode = readlinkat(&descriptors, name)
            .ok()
            .and_then(|target| socket_inode(&target));
        if inode.is_some_and(|inode| is_wanted(name, inode)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The inode in what a socket's descriptor links to: `socket:[INODE]` (proc_pid_fd(5)).
fn socket_inode(target: &OsStr) -> Option<u32> {
    let inode = target
        .to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?;
    inode.parse().ok()
}

/// True when the error says that the process is no more.
pub(super) fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
}

fn exited(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut descriptors = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    match poll(&mut descriptors, PollTimeout::ZERO) {
        Ok(ready) => Ok(ready > 0),
        Err(errno) => Err(errno.into()),
    }
}

/// The number behind a pidfd, in this agent's pid namespace; `None` when the process was reaped.
fn pid_of(pidfd: &OwnedFd) -> io::Result<Option<u32>> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let information = read_whole(File::open(path)?)?;
    let pid = information
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Pid:"))
        .and_then(|pid| str::from_utf8(pid).ok()?.trim().parse::<i64>().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a pidfd without a pid"))?;
    // -1: reaped. 0: of another pid namespace, where no number of ours names it.
    Ok(u32::try_from(pid).ok().filter(|pid| *pid != 0))
}

fn read_file(directory: &OwnedFd, name: &std::ffi::CStr) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    read_whole(File::from(openat(directory, name, flags, Mode::empty())?))
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
pub(crate) fn parse_status(status: &[u8]) -> Option<Credentials> {
    // The second line is `Umask:`; the first holds the process's name, in which the kernel escapes
    // line feeds, so that no name can pretend to be another line.
    let status = String::from_utf8_lossy(status);
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
    let effective = |key: &str| line(key)?.split_whitespace().nth(1)?.parse::<u32>().ok();
    Some(Credentials {
        uid: effective("Uid:")?,
        gid: effective("Gid:")?,
        groups: line("Groups:")?
            .split_whitespace()
            .map(|group| group.parse().ok())
            .collect::<Option<_>>()?,
    })
}

fn since_start() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    // One more nanosecond than nothing: zero means "never checked".
    START.elapsed() + Duration::from_nanos(1)
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
            let credentials = parse_status(status(name, "27 100 ").as_bytes()).unwrap();
            assert_eq!((credentials.uid, credentials.gid), (1000, 100), "{name}");
            assert_eq!(credentials.groups, [27, 100]);
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

    proptest! {
        #[test]
        fn no_status_makes_it_panic(status in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_status(&status);
        }
    }
}
