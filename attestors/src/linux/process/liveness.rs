//! Whether a process lives, and runs what it ran when it was found.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, clock_gettime};

use super::{Held, Process, gone, kernel, open_file, read_whole};
use crate::observers;
use crate::workload::AttestationEnded;

/// A liveness check this young is not repeated.
const CHECK_AGAIN_AFTER: Duration = Duration::from_millis(1);

/// How long the executable of a process that keeps its memory is not looked at again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// How long to wait for an observer's word on whether a process exits. It reads what waits for no exec.
const TOLD_WITHIN: Duration = Duration::from_millis(5);

/// Nanoseconds of `CLOCK_MONOTONIC` (clock_gettime(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(pub(super) u64);

impl Moment {
    const NEVER: Self = Self(0);

    /// [`NEVER`](Self::NEVER) where the clock cannot be read: nothing is recent then.
    pub(super) fn now() -> Self {
        let nanoseconds = |time: TimeSpec| u64::try_from(time.num_nanoseconds()).ok();
        let time = clock_gettime(ClockId::CLOCK_MONOTONIC).ok();
        time.and_then(nanoseconds).map_or(Self::NEVER, Self)
    }

    /// Whether less than `duration` has passed since `then`. Not where that is to come.
    pub(super) fn is_within(self, duration: Duration, then: Self) -> bool {
        u128::from(self.0.wrapping_sub(then.0)) < duration.as_nanos()
    }
}

impl Process {
    /// Checks that the process lives and has executed nothing since it was found. A check less than a
    /// millisecond old is not repeated. Waits for nothing that the process does, where its memory is known.
    pub fn check_liveness(&self) -> Result<(), AttestationEnded> {
        let held = &self.held;
        let now = Moment::now();
        if self.is_recent(Moment(held.last_check.load(Ordering::Relaxed)), now) {
            return Ok(());
        }
        if held.memory.is_some() {
            held.check_memory(now)?;
        } else if observers::looks_itself() {
            held.check_executable()?;
        } else {
            let held = Arc::clone(held);
            // Without an answer nothing is known of the process.
            observers::ask(move || held.check_executable())
                .unwrap_or(Err(AttestationEnded::Exited))?;
        }
        held.last_check.store(now.0, Ordering::Relaxed);
        Ok(())
    }

    /// Whether what was seen at `then` is of this caller, and `now` less than a millisecond old.
    pub(super) fn is_recent(&self, then: Moment, now: Moment) -> bool {
        then != Moment::NEVER && then >= self.found && now.is_within(CHECK_AGAIN_AFTER, then)
    }
}

impl Held {
    /// Whether it may be held for a connection that it is found by now.
    pub(super) fn is_as_it_was(&self) -> bool {
        self.ended.get().is_none() && !self.has_lost_its_memory()
    }

    /// True after an exec or the exit, unless another process keeps the memory that it had.
    fn has_lost_its_memory(&self) -> bool {
        self.memory
            .as_ref()
            .is_some_and(|memory| !is_in_use(memory))
    }

    /// Checks that the process has the memory that it had, which it loses by an exec and by its exit. Another
    /// process may keep it: now and then an observer looks at the executable, and nobody waits for that, since
    /// an exec makes who looks wait for its end, and may be made to take for ever.
    fn check_memory(self: &Arc<Self>, now: Moment) -> Result<(), AttestationEnded> {
        if !self.is_as_it_was() {
            return Err(self.why_it_ended());
        }
        let looked = Moment(self.last_look.load(Ordering::Relaxed));
        if !now.is_within(LOOK_AGAIN_AFTER, looked)
            && !self.is_looked_at.swap(true, Ordering::Relaxed)
        {
            let looked_at = LookedAt(Arc::clone(self));
            observers::run_without_waiting(move || looked_at.0.look(now));
        }
        Ok(())
    }

    /// Looks at the executable, at the time `now`.
    fn look(&self, now: Moment) {
        match self.check_executable() {
            Ok(()) => self.last_look.store(now.0, Ordering::Relaxed),
            Err(ended) => drop(self.ended.set(ended)),
        }
    }

    /// Why it has ended. A process that exits loses its memory some time before its pidfd says so.
    fn why_it_ended(&self) -> AttestationEnded {
        if exited(&self.pidfd).unwrap_or(true) {
            return AttestationEnded::Exited;
        }
        *self.ended.get_or_init(|| {
            let directory = Arc::clone(&self.directory);
            match observers::ask_within(TOLD_WITHIN, move || is_exiting(&directory)) {
                Some(true) => AttestationEnded::Exited,
                Some(false) | None => AttestationEnded::Executed,
            }
        })
    }

    /// Checks that the process lives and runs the executable that it ran when it was found. Waits for an exec
    /// that is under way.
    fn check_executable(&self) -> Result<(), AttestationEnded> {
        match (
            &self.executable,
            kernel::identify(self.directory.as_fd(), c"exe"),
        ) {
            // Only a process that lives has an executable.
            (Some(before), Ok(now)) if before.same_file(&now) => Ok(()),
            _ if exited(&self.pidfd).unwrap_or(true) => Err(AttestationEnded::Exited),
            (None, Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            (_, Err(error)) if gone(&error) => Err(AttestationEnded::Exited),
            _ => Err(AttestationEnded::Executed),
        }
    }
}

/// A process while an observer looks at it.
struct LookedAt(Arc<Held>);

impl Drop for LookedAt {
    fn drop(&mut self) {
        self.0.is_looked_at.store(false, Ordering::Relaxed);
    }
}

/// Whether any process still has the memory of this `/proc/PID/pagemap`. Without one the kernel says that the
/// file ends here, else that entries have eight bytes (Documentation/admin-guide/mm/pagemap.rst); for neither
/// does it wait for a lock of the process.
fn is_in_use(pagemap: &File) -> bool {
    pagemap
        .read_at(&mut [0], 0)
        .is_err_and(|error| error.raw_os_error() == Some(Errno::EINVAL as i32))
}

pub(super) fn exited(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut descriptors = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    match poll(&mut descriptors, PollTimeout::ZERO) {
        Ok(ready) => Ok(ready > 0),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the process is exiting, or gone: it has no memory then (proc_pid_status(5)), as it has in and after
/// an exec. What `/proc/PID/stat` says of that waits for an exec that is under way.
fn is_exiting(directory: &OwnedFd) -> bool {
    open_file(directory, c"status")
        .and_then(read_whole)
        .map_or(true, |status| !has_memory(&status))
}

/// The process may call itself anything, but for line feeds, which the kernel escapes.
fn has_memory(status: &[u8]) -> bool {
    status
        .split(|byte| *byte == b'\n')
        .any(|line| line.starts_with(b"VmSize:"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
    use std::sync::{Mutex, OnceLock};
    use std::time::Instant;

    use super::super::open_directory;
    use super::super::tests::{sleeping, started};
    use super::*;

    /// A shell that executes `program` once its input ends.
    fn shell_that_executes(program: &str) -> std::process::Child {
        let mut command = std::process::Command::new("/bin/sh");
        let command = command.args(["-c", &format!("read line; exec {program}")]);
        started(command.stdin(std::process::Stdio::piped()))
    }

    /// Has the shell do so, and waits until it has.
    fn execute(shell: &mut std::process::Child, process: &Process) {
        drop(shell.stdin.take());
        let began = Instant::now();
        while !process.held.has_lost_its_memory() {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_exits_is_told_from_who_executes() {
        let status = |name: &str| format!("Name:\t{name}\nUmask:\t0022\nState:\tZ (zombie)\n");
        for name in ["orders", "VmSize:", "x\\nVmSize:\t1 kB", ""] {
            assert!(!has_memory(status(name).as_bytes()), "{name}");
            let lives = status(name) + "VmPeak:\t  2 kB\nVmSize:\t  1 kB\n";
            assert!(has_memory(lives.as_bytes()), "{name}");
        }
        let mut child = sleeping();
        let directory = open_directory(child.id()).unwrap().unwrap();
        assert!(!is_exiting(&directory));
        child.kill().unwrap();
        // A zombie, and then nothing.
        while !exited(&kernel::pidfd_open(child.id()).unwrap()).unwrap() {
            std::thread::yield_now();
        }
        assert!(is_exiting(&directory));
        child.wait().unwrap();
        assert!(is_exiting(&directory));
    }

    #[test]
    fn what_was_taken_for_another_program_once_is_held_anew() {
        let mut child = sleeping();
        let first = Process::of_pid(child.id()).unwrap().unwrap();
        first.held.ended.set(AttestationEnded::Executed).unwrap();
        let again = Process::of_pid(child.id()).unwrap().unwrap();
        again.check_liveness().unwrap();
        assert_eq!(first.check_liveness(), Err(AttestationEnded::Executed));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// As `process` is held, but for these.
    fn held_as(process: &Process, executable: &Process, memory: &str) -> Process {
        let held = &process.held;
        let held = Held {
            pid: held.pid,
            pidfd: kernel::pidfd_open(held.pid).unwrap(),
            directory: Arc::clone(&held.directory),
            cgroup: Mutex::default(),
            executable: executable.held.executable.clone(),
            memory: Some(File::open(memory).unwrap()),
            last_check: AtomicU64::new(0),
            last_look: AtomicU64::new(Moment::now().0),
            is_looked_at: AtomicBool::new(false),
            ended: OnceLock::new(),
            last_descriptor: AtomicU32::new(0),
        };
        Process::new(Arc::new(held), process.credentials)
    }

    #[test]
    fn nothing_is_recent_that_is_to_come_or_by_a_clock_that_cannot_be_read() {
        let process = Process::of_pid(std::process::id()).unwrap().unwrap();
        let Moment(found) = process.found;
        let is_recent = |then, now| process.is_recent(Moment(then), Moment(now));
        assert!(is_recent(found, found));
        assert!(is_recent(found, found + 999_999));
        assert!(!is_recent(found, found + 1_000_000));
        assert!(!is_recent(found - 1, found));
        assert!(!is_recent(found + 1, found));
        let unread = Process {
            found: Moment::NEVER,
            ..process
        };
        assert!(!unread.is_recent(Moment::NEVER, Moment::NEVER));
    }

    #[test]
    fn every_exec_ends_it_that_of_the_same_file_too() {
        for program in ["/bin/sleep 20", "/bin/sh -c 'kill -STOP $$'"] {
            let mut shell = shell_that_executes(program);
            let first = Process::of_pid(shell.id()).unwrap().unwrap();
            first.check_liveness().unwrap();
            execute(&mut shell, &first);
            std::thread::sleep(2 * CHECK_AGAIN_AFTER);
            assert_eq!(first.check_liveness(), Err(AttestationEnded::Executed));
            // What runs now is found anew.
            let again = Process::of_pid(shell.id()).unwrap().unwrap();
            assert!(!Arc::ptr_eq(&first.held, &again.held));
            again.check_liveness().unwrap();
            shell.kill().unwrap();
            shell.wait().unwrap();
            std::thread::sleep(2 * CHECK_AGAIN_AFTER);
            for ended in [first, again] {
                assert_eq!(ended.check_liveness(), Err(AttestationEnded::Exited));
            }
        }
    }

    #[test]
    fn an_exec_is_seen_though_another_process_keeps_the_memory() {
        let mut child = sleeping();
        let (ours, child_found) = (
            Process::of_pid(std::process::id()).unwrap().unwrap(),
            Process::of_pid(child.id()).unwrap().unwrap(),
        );
        // Whose memory goes on, and who runs another program than before.
        let executed = held_as(&child_found, &ours, "/proc/self/pagemap");
        executed.check_liveness().unwrap();
        // A check has it looked at, and one after it knows.
        let began = Instant::now();
        while executed.check_liveness().is_ok() {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::sleep(2 * CHECK_AGAIN_AFTER);
        }
        assert_eq!(executed.check_liveness(), Err(AttestationEnded::Executed));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
