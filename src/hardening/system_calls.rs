//! What no thread of the agent asks the kernel for, refused with EPERM by seccomp(2).
//!
//! A list of what is refused, not of what is allowed: which calls a C library, an allocator and a
//! runtime make changes with their versions and with the kernel, and a list that is short of one ends
//! the agent in the middle of the night. What is refused here is what a stolen agent would need, and
//! what none of these has a reason to call.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Refused to every thread: other programs and processes, other processes' memory, namespaces and
/// mounts, code for the kernel, keys, clocks, users, and the ways around a filter (io_uring).
const NEVER: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_personality,
    libc::SYS_fanotify_init,
];

#[cfg(target_arch = "x86_64")]
const NEVER_HERE: &[c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const NEVER_HERE: &[c_long] = &[];

/// What changes the file system, by path.
const CHANGES: &[c_long] = &[
    libc::SYS_openat2,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_truncate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
];

#[cfg(target_arch = "x86_64")]
const CHANGES_HERE: &[c_long] = &[
    libc::SYS_creat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_unlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_mknod,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
];
#[cfg(not(target_arch = "x86_64"))]
const CHANGES_HERE: &[c_long] = &[libc::SYS_renameat];

/// What opens a file, and which argument says how.
const OPENS: &[(c_long, u8)] = &[(libc::SYS_openat, 2), (libc::SYS_open_by_handle_at, 2)];

#[cfg(target_arch = "x86_64")]
const OPENS_HERE: &[(c_long, u8)] = &[(libc::SYS_open, 1)];
#[cfg(not(target_arch = "x86_64"))]
const OPENS_HERE: &[(c_long, u8)] = &[];

/// No condition: always refused.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Refuses to this thread, and to all that it makes, what none of them needs. Threads can be made,
/// processes cannot.
pub(super) fn refuse_to_all() -> Result<(), String> {
    let mut rules = always(NEVER.iter().chain(NEVER_HERE));
    // What the agent has taken from itself it must not give itself back.
    rules.insert(
        libc::SYS_prctl,
        vec![rule(0, SeccompCmpOp::Eq, libc::PR_SET_DUMPABLE as u64)?],
    );
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(
        libc::SYS_clone,
        vec![rule(0, SeccompCmpOp::MaskedEq(thread), 0)?],
    );
    install(rules, libc::EPERM)?;
    // Its flags are in memory, where a filter cannot look. The C library then takes `clone`.
    install(always([&libc::SYS_clone3]), libc::ENOSYS)
}

/// Refuses to this thread to open a file, to change the file system, and to make a thread: that would be
/// refused the same, whatever it were made for.
pub(crate) fn refuse_files_and_threads() -> Result<(), String> {
    let opens = OPENS.iter().chain(OPENS_HERE).map(|(number, _)| number);
    let files = CHANGES.iter().chain(CHANGES_HERE).chain(opens);
    let threads = [&libc::SYS_clone, &libc::SYS_clone3];
    install(always(files.chain(threads)), libc::EPERM)
}

/// Refuses to this thread, and to all that it makes, to open a file but for reading, or to change the
/// file system.
pub(super) fn refuse_writing() -> Result<(), String> {
    let mut rules = always(CHANGES.iter().chain(CHANGES_HERE));
    for (number, argument) in OPENS.iter().chain(OPENS_HERE) {
        let changing = [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC]
            .into_iter()
            .map(|flag| {
                let flag = flag as u64;
                rule(*argument, SeccompCmpOp::MaskedEq(flag), flag)
            })
            .collect::<Result<_, _>>()?;
        rules.insert(*number, changing);
    }
    install(rules, libc::EPERM)
}

fn always<'a>(numbers: impl IntoIterator<Item = &'a c_long>) -> Rules {
    numbers
        .into_iter()
        .map(|number| (*number, Vec::new()))
        .collect()
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|error| error.to_string())
}

fn install(mut rules: Rules, errno: libc::c_int) -> Result<(), String> {
    refuse_other_numbers(&mut rules);
    let architecture =
        TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
        architecture,
    )
    .map_err(|error| error.to_string())?;
    let program: seccompiler::BpfProgram = filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())?;
    apply_filter(&program).map_err(|error| error.to_string())
}

/// On x86-64 the same calls have a second set of numbers, that of the x32 ABI, with a bit of its own
/// and some calls at places of their own (512 to 547).
#[cfg(target_arch = "x86_64")]
fn refuse_other_numbers(rules: &mut Rules) {
    const X32: i64 = 0x4000_0000;
    let others: Rules = rules
        .iter()
        .map(|(number, conditions)| (number | X32, conditions.clone()))
        .collect();
    rules.extend(others);
    rules.extend((512..=547).map(|number| (number | X32, Vec::new())));
}

#[cfg(not(target_arch = "x86_64"))]
fn refuse_other_numbers(_rules: &mut Rules) {}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    /// A filter cannot be taken away, so each is tried on a thread of its own.
    fn on_a_thread(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_filtered_thread_runs_no_program_and_makes_threads() {
        on_a_thread(|| {
            refuse_to_all().unwrap();
            for error in [
                Command::new("/bin/true").status().map(drop).unwrap_err(),
                // In this very process: no fork comes first.
                Command::new("/bin/true").exec(),
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)
                    .unwrap_err()
                    .into(),
                nix::sys::signal::kill(nix::unistd::getpid(), None)
                    .unwrap_err()
                    .into(),
            ] {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
            }
            let dumpable = rustix::process::DumpableBehavior::Dumpable;
            assert_eq!(
                rustix::process::set_dumpable_behavior(dumpable),
                Err(rustix::io::Errno::PERM)
            );
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
        });
    }

    #[test]
    fn a_data_worker_opens_nothing_and_an_observer_writes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let refused = |error: std::io::Error| {
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
        };
        let (there, new) = (path.clone(), directory.path().join("new"));
        on_a_thread(move || {
            refuse_writing().unwrap();
            assert_eq!(std::fs::read(&there).unwrap(), b"x");
            refused(OpenOptions::new().append(true).open(&there).unwrap_err());
            refused(
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&there)
                    .unwrap_err(),
            );
            refused(File::create(&new).unwrap_err());
            refused(std::fs::remove_file(&there).unwrap_err());
            refused(std::fs::rename(&there, &new).unwrap_err());
            refused(std::os::unix::fs::symlink(&there, &new).unwrap_err());
        });
        on_a_thread(move || {
            refuse_files_and_threads().unwrap();
            refused(File::open(&path).unwrap_err());
            refused(std::thread::Builder::new().spawn(|| ()).unwrap_err());
            assert!(std::fs::metadata(&path).is_ok());
        });
    }
}
