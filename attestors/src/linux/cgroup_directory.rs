//! From the id of a cgroup-v2 directory to the processes in it.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use quick_cache::sync::Cache;

use super::{kernel, process};

/// The lists of processes (`cgroup.procs`) that were read last, kept open. An id names one cgroup for
/// ever, and the list of one that was removed cannot be read (ENODEV).
static LISTS: LazyLock<Cache<u64, Arc<Mutex<File>>>> = LazyLock::new(|| Cache::new(64));

/// The processes in the cgroup with this id, at the moment.
pub(super) fn processes(cgroup_id: u64) -> io::Result<Vec<u32>> {
    if let Some(list) = LISTS.get(&cgroup_id) {
        let processes = read(&mut list.lock().unwrap_or_else(PoisonError::into_inner));
        if processes.is_err() {
            LISTS.remove(&cgroup_id);
        }
        return processes;
    }
    let directory = kernel::open_cgroup(mount_point()?.as_fd(), cgroup_id)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let mut list = File::from(openat(&directory, c"cgroup.procs", flags, Mode::empty())?);
    let processes = read(&mut list)?;
    LISTS.insert(cgroup_id, Arc::new(Mutex::new(list)));
    Ok(processes)
}

fn read(list: &mut File) -> io::Result<Vec<u32>> {
    list.rewind()?;
    let text = process::read_whole(list)?;
    // 0 stands for a process of another pid namespace.
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| str::from_utf8(line).ok()?.parse().ok())
        .filter(|pid| *pid != 0)
        .collect())
}

/// Whether callers on TCP can be looked for in the cgroup in which their socket was made.
pub fn is_mounted() -> bool {
    mount_point().is_ok()
}

/// The cgroup-v2 file system, opened once. It is not always at `/sys/fs/cgroup`.
fn mount_point() -> io::Result<&'static File> {
    static MOUNT: OnceLock<File> = OnceLock::new();
    if let Some(mount) = MOUNT.get() {
        return Ok(mount);
    }
    let table = std::fs::read("/proc/self/mountinfo")?;
    let path = find_mount(&table).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup-v2 file system is mounted",
        )
    })?;
    let mount = File::open(path)?;
    Ok(MOUNT.get_or_init(|| mount))
}

/// Finds the mount point in the text of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).
fn find_mount(table: &[u8]) -> Option<PathBuf> {
    table.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let separator = fields.iter().position(|field| *field == b"-")?;
        if *fields.get(separator + 1)? != b"cgroup2" {
            return None;
        }
        let path = unescape(fields.get(4)?);
        Some(PathBuf::from(std::ffi::OsString::from_vec(path)))
    })
}

/// Undoes the kernel's `\ooo` for space, tab, line feed and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail
            .first_chunk::<3>()
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) => {
                text.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                text.push(*first);
                rest = tail;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_wherever_it_is() {
        let unified = "25 1 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let escaped = "41 31 0:38 / /mnt/a\\040b\\134c rw - cgroup2 cgroup2 rw\n";
        // A directory may be called what a file system is.
        let pretended = "41 31 0:38 / /mnt/cgroup2 rw - tmpfs cgroup2 rw\n";
        for (table, expected) in [
            (unified, Some("/sys/fs/cgroup")),
            (hybrid, Some("/sys/fs/cgroup/unified")),
            (escaped, Some("/mnt/a b\\c")),
            (pretended, None),
            ("", None),
        ] {
            assert_eq!(
                find_mount(table.as_bytes()),
                expected.map(PathBuf::from),
                "{table}"
            );
        }
    }
}
