//! File descriptors: every connection is one, at both of its ends. How many there may be, and how few are
//! too few.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// One of so many descriptors is not for callers that come anew: requests under way need destinations,
/// and probes are to be answered.
const RESERVED_PART: u64 = 8;

/// Lets this process have as many descriptors as it may: what distributions start services with is for
/// programs that use `select`.
///
/// # Errors
/// The kernel's words.
pub fn allow_many() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// Whether what was opened just now leaves no more descriptors than are reserved: the kernel gives the
/// lowest number that is free.
pub(crate) fn leaves_few(opened: BorrowedFd<'_>) -> bool {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    u64::try_from(opened.as_raw_fd()).is_ok_and(|number| number >= limit - limit / RESERVED_PART)
}

/// Whether no more are left now than are reserved.
pub(crate) fn few_are_left() -> bool {
    match UnixDatagram::unbound() {
        Ok(opened) => leaves_few(opened.as_fd()),
        Err(error) => is_out_of_descriptors(&error),
    }
}

/// Whether this process, or the machine, has as many files open as it may.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}
