//! The system calls that the standard library and `nix` do not offer. The only `unsafe` of the crate.
#![expect(
    unsafe_code,
    reason = "four system calls without a safe wrapper; each block states why it is sound"
)]

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What names one file as long as the kernel runs: where it is mounted, which inode, and which content.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct FileIdentity {
    /// The unique mount id (kernel 6.8), on older kernels the reusable one.
    mount: u64,
    device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl FileIdentity {
    /// Whether a change at about `now` would show, as the last one was at least `apart` from that.
    pub(crate) fn shows_changes(&self, apart: Duration, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(seconds)
            .is_ok_and(|seconds| since_epoch.abs_diff(Duration::new(seconds, nanoseconds)) >= apart)
    }

    /// True when both are the same file at the same mount, whatever its content has become.
    pub(crate) fn same_file(&self, other: &Self) -> bool {
        (self.mount, self.device, self.inode) == (other.mount, other.device, other.inode)
    }
}

/// Identifies the file at `path` below `directory`, following links (statx(2)). Asks no server of a
/// network file system, which would have whoever asks wait for it.
pub(crate) fn identify(directory: BorrowedFd<'_>, path: &CStr) -> io::Result<FileIdentity> {
    statx(directory, path, libc::AT_STATX_DONT_SYNC)
}

/// Identifies an open file (statx(2) with AT_EMPTY_PATH).
pub(crate) fn identify_open(file: BorrowedFd<'_>) -> io::Result<FileIdentity> {
    statx(file, c"", libc::AT_EMPTY_PATH)
}

fn statx(directory: BorrowedFd<'_>, path: &CStr, flags: libc::c_int) -> io::Result<FileIdentity> {
    // Kernels before 6.8 ignore the unique id and fill in the other one.
    let mask = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID | libc::STATX_MNT_ID_UNIQUE;
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor and the C string live through the call, and the kernel writes at most
    // one `statx` into memory that is one `statx` large.
    let result = unsafe {
        libc::statx(
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            mask,
            status.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `statx` is made of integers only, so zeroed memory is a valid value even where the
    // kernel wrote nothing.
    let status = unsafe { status.assume_init() };
    Ok(FileIdentity {
        mount: status.stx_mnt_id,
        device: (status.stx_dev_major, status.stx_dev_minor),
        inode: status.stx_ino,
        size: status.stx_size,
        modified: (status.stx_mtime.tv_sec, status.stx_mtime.tv_nsec),
        changed: (status.stx_ctime.tv_sec, status.stx_ctime.tv_nsec),
    })
}

/// Opens a pidfd of the process that now has `pid` (pidfd_open(2)).
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let no_flags: libc::c_uint = 0;
    // SAFETY: takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, no_flags) };
    let descriptor = i32::try_from(result).map_err(|_| io::ErrorKind::InvalidData)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Effective ids, as this agent's user namespace numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The credentials of the process behind a pidfd (PIDFD_GET_INFO, kernel 6.13); `None` where the kernel
/// does not tell them. Fails with ESRCH once the process was reaped, and where it is of a pid namespace
/// that this agent does not see.
pub(crate) fn credentials(pidfd: BorrowedFd<'_>) -> io::Result<Option<Credentials>> {
    #[cfg(test)]
    if older::is_pretended() {
        return Ok(None);
    }
    // SAFETY: `pidfd_info` is made of integers only, so zeroed memory is a valid value.
    let mut information: libc::pidfd_info = unsafe { MaybeUninit::zeroed().assume_init() };
    information.mask = u64::from(libc::PIDFD_INFO_CREDS);
    // SAFETY: the descriptor and the structure live through the call, and the size of the structure,
    // which is all that the kernel may write, is part of the request's number.
    let result = unsafe {
        libc::ioctl(
            pidfd.as_raw_fd(),
            libc::PIDFD_GET_INFO,
            &raw mut information,
        )
    };
    if result != 0 {
        return match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Err(error),
            _ => Ok(None),
        };
    }
    let is_told = information.mask & u64::from(libc::PIDFD_INFO_CREDS) != 0;
    Ok(is_told.then_some(Credentials {
        uid: information.euid,
        gid: information.egid,
    }))
}

/// Opens the cgroup-v2 directory with this id below `mount`, an open directory of the cgroup-v2
/// file system (open_by_handle_at(2)). Fails with ESTALE when it is gone.
pub(crate) fn open_cgroup(mount: BorrowedFd<'_>, cgroup_id: u64) -> io::Result<OwnedFd> {
    /// `struct file_handle` with the eight bytes of a kernfs handle (FILEID_KERNFS).
    #[repr(C)]
    struct KernfsHandle {
        handle_bytes: libc::c_uint,
        handle_type: libc::c_int,
        identifier: [u8; 8],
    }
    const FILEID_KERNFS: libc::c_int = 0xfe;

    let mut handle = KernfsHandle {
        handle_bytes: 8,
        handle_type: FILEID_KERNFS,
        identifier: cgroup_id.to_ne_bytes(),
    };
    // SAFETY: `KernfsHandle` has the layout of `struct file_handle` followed by `handle_bytes`
    // bytes, and lives through the call.
    let descriptor = unsafe {
        libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut handle).cast::<libc::file_handle>(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Kernels before 6.13, for the tests of this thread.
#[cfg(test)]
pub(crate) mod older {
    use std::cell::Cell;

    thread_local! {
        static IS_PRETENDED: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn is_pretended() -> bool {
        IS_PRETENDED.get()
    }

    /// Runs `test` as on a kernel without PIDFD_GET_INFO.
    pub(crate) fn pretended(test: impl FnOnce()) {
        IS_PRETENDED.set(true);
        test();
        IS_PRETENDED.set(false);
    }
}
