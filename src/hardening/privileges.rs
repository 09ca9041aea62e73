//! Capabilities (capabilities(7)): each thread keeps what it needs, and none can gain one.

use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::Needs;

/// To see the executable and the descriptors of other users' processes, and to find a cgroup by its id.
pub(super) const OBSERVER: CapabilitySet =
    CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH);

/// To compare the executable of another user's process.
pub(super) const DATA_WORKER: CapabilitySet = CapabilitySet::SYS_PTRACE;

/// Ports from which on anybody may bind, where the kernel does not say.
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// What this thread has.
pub(super) fn held() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted)
}

/// What of that the threads need which neither look at processes nor serve requests.
pub(super) fn needed(needs: &Needs) -> CapabilitySet {
    (needed_for_sockets(needs) | needed_for_files(needs)) & held()
}

/// What binding a configuration's sockets, and giving them away, takes.
pub(super) fn needed_for_sockets(needs: &Needs) -> CapabilitySet {
    let mut needed = CapabilitySet::empty();
    if needs
        .lowest_port
        .is_some_and(|port| port < first_unprivileged_port())
    {
        needed |= CapabilitySet::NET_BIND_SERVICE;
    }
    if needs.gives_sockets_to_groups {
        needed |= CapabilitySet::CHOWN;
    }
    needed
}

/// Root without capabilities is a user like others: what it may use by its capabilities alone is
/// found by trying without them. What they overcome is EACCES, be it on the way to a file, and EPERM.
fn needed_for_files(needs: &Needs) -> CapabilitySet {
    let mut needed = CapabilitySet::empty();
    let Ok(sets) = capabilities(None) else {
        return needed;
    };
    let without = CapabilitySets {
        effective: CapabilitySet::empty(),
        ..sets
    };
    if set_capabilities(None, without).is_err() {
        return needed;
    }
    let may = |path: &Path, how: AccessFlags| {
        let tried = faccessat(AT_FDCWD, path, how, AtFlags::AT_EACCESS);
        !matches!(tried, Err(Errno::EACCES | Errno::EPERM))
    };
    let search = |path: &Path| match path.is_dir() {
        true => AccessFlags::X_OK,
        false => AccessFlags::empty(),
    };
    let reads = needs.reads.iter();
    if !reads
        .map(|path| (path, AccessFlags::R_OK | search(path)))
        .all(|(path, how)| may(path, how))
    {
        // The other does as well, where a container runtime gives only that.
        needed |= match sets.permitted.contains(CapabilitySet::DAC_READ_SEARCH) {
            true => CapabilitySet::DAC_READ_SEARCH,
            false => CapabilitySet::DAC_OVERRIDE,
        };
    }
    let (writes, audit_files) = (needs.writes.iter(), needs.audit_files.iter());
    if !writes
        .map(|path| (path, AccessFlags::W_OK | search(path)))
        .chain(audit_files.map(|path| (path, AccessFlags::R_OK | AccessFlags::W_OK)))
        .all(|(path, how)| may(path, how))
    {
        needed |= CapabilitySet::DAC_OVERRIDE;
    }
    let _ = set_capabilities(None, sets);
    needed
}

fn first_unprivileged_port() -> u16 {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|port| port.trim().parse().ok())
        .unwrap_or(FIRST_UNPRIVILEGED_PORT)
}

/// Takes from this thread, and from all that it makes later, every capability that is not in `kept`,
/// also as one to be gained by running a program.
pub(super) fn keep_only(kept: CapabilitySet) -> Result<(), String> {
    let text = |error: rustix::io::Errno| error.to_string();
    let sets = capabilities(None).map_err(text)?;
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        // EINVAL: one that this kernel does not know.
        for number in 0..u64::BITS {
            let _ =
                remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number));
        }
    }
    // Kernels before 4.3 know none.
    let _ = clear_ambient_capability_set();
    let kept = sets.permitted & kept;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
    .map_err(text)
}

/// No program that this thread, or one that it makes, runs gets more than the thread has
/// (PR_SET_NO_NEW_PRIVS of prctl(2)); Landlock and seccomp ask for it.
pub(super) fn gain_none() -> Result<(), String> {
    set_no_new_privs(true).map_err(|error| error.to_string())
}

/// `CAP_SYS_PTRACE` and so on.
pub(super) fn names(set: CapabilitySet) -> Vec<String> {
    set.iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect()
}
