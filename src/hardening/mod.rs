//! What the agent takes from itself before it serves, so that a mistake in it costs less: who may read
//! its memory, which system calls it may make, which files it may use, and which privileges it has.
//!
//! Each of these is a matter of threads, not of the process, and is handed on to the threads that a
//! thread makes. There are three kinds, made in this order:
//!
//! | Threads | System calls | Files | Capabilities |
//! |---|---|---|---|
//! | observers: look at callers | no process, no program, and so on | read, by seccomp: Landlock would not let them look at other processes | those to look at other users' processes |
//! | data workers: requests | the same, and no thread | none is opened, by seccomp | the one to compare an executable |
//! | all others: configuration, keys, tokens, audit | the same | what the configuration names, by Landlock | those that a listener or a file needs; usually none |
//!
//! Threads of one process share their memory: this holds back a mistake, and a caller that makes the
//! agent open what it should not. It does not hold back one who runs code of his own in the agent,
//! who can have another thread act.
//!
//! What the kernel lacks is left out and said in `status`: the agent runs all the same. Without a thread that
//! it needs it does not start.

mod files;
mod privileges;
mod system_calls;

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{OnceLock, mpsc};

use countersign_attestors::observers;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::CapabilitySet;
use serde_json::{Value, json};

use self::files::Files;
pub(crate) use self::files::directory_of;
#[cfg(test)]
pub(crate) use self::system_calls::refuse_files_and_threads;
use crate::config::{AuditSink, Bind, CaSource, Checked, Config};
use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::files::make_private_directory;

static IN_FORCE: OnceLock<InForce> = OnceLock::new();

/// What came of confining; an error says what the kernel lacks.
struct InForce {
    memory: Result<(), String>,
    system_calls: Result<(), String>,
    observers: Result<(), String>,
    files: Result<Files, String>,
    privileges: Result<Privileges, String>,
}

/// Capabilities, those that are kept by name.
struct Privileges {
    observers: Vec<String>,
    data_workers: Vec<String>,
    others: Vec<String>,
    given_up: CapabilitySet,
}

/// What an agent uses after its start.
#[derive(Debug, Default)]
pub struct Needs {
    /// Files and directories that are read.
    reads: BTreeSet<PathBuf>,
    /// Directories in which files and sockets are made, and devices that are written.
    writes: BTreeSet<PathBuf>,
    /// Audit files that are there already: they are read, and written on.
    audit_files: BTreeSet<PathBuf>,
    /// A directory of `writes` that the agent makes where there is none.
    state_directory: Option<PathBuf>,
    /// The lowest port that is bound, but for 0.
    lowest_port: Option<u16>,
    /// Whether sockets are given to a group.
    gives_sockets_to_groups: bool,
}

impl Needs {
    /// What a configuration needs.
    pub fn of(config: &Config) -> Self {
        let mut needs = Self {
            reads: config
                .watched_files
                .iter()
                .cloned()
                .chain(policy_files(&config.policy_directory))
                .collect(),
            audit_files: audit_files(config)
                .filter(|path| path.is_file())
                .map(Path::to_owned)
                .collect(),
            ..Self::default()
        };
        for path in written(config) {
            if Some(path) == state_directory(config) {
                needs.state_directory = Some(path.to_owned());
                needs.writes.insert(path.to_owned());
                continue;
            }
            // A device or a pipe in the place of an audit file is all that is written there.
            let is_special = path.metadata().is_ok_and(|metadata| {
                !metadata.is_file() && !metadata.is_dir() && !metadata.file_type().is_socket()
            });
            needs.writes.insert(match is_special {
                true => path.to_owned(),
                false => directory_of(path),
            });
        }
        for listener in &config.listeners {
            needs.gives_sockets_to_groups |= listener.access.group.is_some();
            if let Bind::Tcp(address) = listener.bind {
                needs.add_port(address.port());
            }
        }
        if let Some(address) = config.admin.metrics_bind {
            needs.add_port(address.port());
        }
        needs
    }

    /// As well, a directory in which files are read and written.
    #[must_use]
    pub fn and_directory(mut self, directory: &Path) -> Self {
        self.writes.insert(directory.to_owned());
        self
    }

    fn add_port(&mut self, port: u16) {
        if port != 0 && self.lowest_port.is_none_or(|lowest| port < lowest) {
            self.lowest_port = Some(port);
        }
    }
}

/// The files, sockets and directories that an agent makes.
pub(crate) fn written(config: &Config) -> impl Iterator<Item = &Path> {
    let sockets = config
        .listeners
        .iter()
        .filter_map(|listener| match &listener.bind {
            Bind::Unix(path) => Some(path.as_path()),
            Bind::Tcp(_) => None,
        });
    let interception = config.interception.iter().flat_map(|interception| {
        let certificate = interception.ca_certificate_file.as_deref();
        let bundle = interception.trust_bundle_file.as_deref();
        [certificate, bundle].into_iter().flatten()
    });
    audit_files(config)
        .chain(sockets)
        .chain(interception)
        .chain(state_directory(config))
        .chain(config.admin.socket.as_deref())
}

fn policy_files(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|suffix| suffix == "cedar"))
}

fn audit_files(config: &Config) -> impl Iterator<Item = &Path> {
    config.audit.sinks.iter().filter_map(|sink| match sink {
        AuditSink::File { path, .. } => Some(path.as_path()),
        AuditSink::Stdout => None,
    })
}

/// The directory that the agent makes where there is none.
pub(crate) fn state_directory(config: &Config) -> Option<&Path> {
    match &config.interception.as_ref()?.source {
        CaSource::Generated { state_directory } => Some(state_directory),
        CaSource::Files { .. } | CaSource::Memory => None,
    }
}

/// Keeps this process's memory, environment and descriptors from other processes of the same user,
/// and out of core files. Does not hold for programs that it runs.
///
/// # Errors
/// The kernel's words.
pub fn protect_memory() -> Result<(), String> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|error| error.to_string())
}

/// Confines this thread, and all that are made from now on. To be called once, while there is no other,
/// by an agent that serves until its process ends and runs no programs. What the kernel lacks is logged.
///
/// # Errors
/// The threads that look at callers cannot be made: no other thread may once it is confined.
pub fn confine(needs: &Needs) -> io::Result<()> {
    let nothing = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let memory = protect_memory()
        .and_then(|()| setrlimit(Resource::Core, nothing).map_err(|error| error.to_string()));
    // What is missing cannot be in a rule. Why it cannot be made is said by whoever uses it.
    if let Some(directory) = &needs.state_directory {
        let _ = make_private_directory(directory);
    }
    let kept = privileges::needed(needs);
    let held = privileges::held();
    let limited = privileges::keep_only(kept | privileges::OBSERVER);
    let system_calls = privileges::gain_none().and_then(|()| system_calls::refuse_to_all());
    let (prepared, outcome) = mpsc::channel();
    observers::start(move || {
        let limited = privileges::keep_only(privileges::OBSERVER);
        let _ = prepared.send(limited.and(system_calls::refuse_writing()));
    })?;
    let observers = outcome
        .recv()
        .unwrap_or_else(|error| Err(error.to_string()));
    let privileges = limited
        .and_then(|()| privileges::keep_only(kept))
        .map(|()| Privileges {
            observers: privileges::names(held & privileges::OBSERVER),
            data_workers: privileges::names(held & privileges::DATA_WORKER),
            others: privileges::names(kept),
            given_up: held.difference(kept),
        });
    let files = files::confine(needs);
    let in_force = InForce {
        memory,
        system_calls,
        observers,
        files,
        privileges,
    };
    for (name, missing) in in_force.missing() {
        tracing::warn!(missing, "the agent runs without the protection of {name}");
    }
    let _ = IN_FORCE.set(in_force);
    Ok(())
}

/// The capabilities, by name, with which the threads that look at callers were left, or in a process that is not
/// confined would be.
pub fn observer_capabilities() -> Vec<String> {
    match IN_FORCE.get().map(|in_force| &in_force.privileges) {
        Some(Ok(kept)) => kept.observers.clone(),
        Some(Err(_)) | None => privileges::names(privileges::held() & privileges::OBSERVER),
    }
}

/// What an agent whose observers have kept the capabilities `kept` does not see of callers of other users;
/// `None` where it sees all, or does not look at callers.
pub fn hidden_callers(config: &Config, kept: &[String]) -> Option<String> {
    if !(config.attestors.unix || config.attestors.systemd) {
        return None;
    }
    let (needed, otherwise) = match config
        .listeners
        .iter()
        .any(|listener| matches!(listener.bind, Bind::Tcp(_)))
    {
        true => (privileges::OBSERVER, "refused on TCP"),
        false => (privileges::DATA_WORKER, "attested without their executable"),
    };
    let mut missing = privileges::names(needed);
    missing.retain(|name| !kept.contains(name));
    (!missing.is_empty()).then(|| {
        format!(
            "the agent lacks {}: callers of other users are {otherwise}",
            missing.join(" and ")
        )
    })
}

/// Confines a data worker further: it opens no file and makes no thread.
pub fn confine_data_worker() {
    if IN_FORCE.get().is_none() {
        return;
    }
    let confined = privileges::keep_only(privileges::DATA_WORKER)
        .and(system_calls::refuse_files_and_threads());
    if let Err(missing) = confined {
        tracing::warn!(missing, "a data worker runs without a protection");
    }
}

/// Looks for what the configuration at `path`, read again, names and a confined agent may not use, and for what
/// it takes that the agent has given up.
///
/// # Errors
/// An error for each: Landlock cannot be widened, and no capability gained.
pub fn permit(path: &Path, checked: &Checked) -> Result<(), Diagnostics> {
    let Some(in_force) = IN_FORCE.get() else {
        return Ok(());
    };
    let mut refused = Diagnostics::new();
    let mut refuse = |detail: String| {
        refused.push(
            Diagnostic::error("restart_needed", path, detail)
                .next("restart the agent: a running one cannot be given more"),
        );
    };
    if let Ok(files) = &in_force.files {
        let named = checked.files.paths().map(PathBuf::as_path);
        let read = named.filter(|named| !files.may_read(named));
        let written = checked.config.iter().flat_map(written);
        let written = written.filter(|named| !files.may_write(named));
        let read = read.map(|named| (named, "read"));
        for (named, what) in read.chain(written.map(|named| (named, "write"))) {
            refuse(format!(
                "`{}` lies outside of the directories that this agent may {what} since its start",
                named.display()
            ));
        }
    }
    if let (Ok(privileges), Some(config)) = (&in_force.privileges, &checked.config) {
        let missing = privileges::needed_for_sockets(&Needs::of(config)) & privileges.given_up;
        for (capability, user) in [
            (CapabilitySet::CHOWN, "a listener's `access.group`"),
            (CapabilitySet::NET_BIND_SERVICE, "a port below 1024"),
        ] {
            for name in privileges::names(missing & capability) {
                refuse(format!(
                    "{user} needs {name}, which this agent gave up at its start"
                ));
            }
        }
    }
    match refused.has_errors() {
        true => Err(refused),
        false => Ok(()),
    }
}

/// What is in force, what it denies, and what the kernel lacks: for `status`.
pub fn report() -> Value {
    IN_FORCE.get().map_or_else(|| json!([]), InForce::report)
}

impl InForce {
    fn missing(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let partly = self
            .files
            .as_ref()
            .ok()
            .and_then(|files| files.partly.as_ref());
        [
            ("memory", self.memory.as_ref().err()),
            ("system_calls", self.system_calls.as_ref().err()),
            ("observers", self.observers.as_ref().err()),
            ("files", self.files.as_ref().err().or(partly)),
            ("privileges", self.privileges.as_ref().err()),
        ]
        .into_iter()
        .filter_map(|(name, missing)| missing.map(|missing| (name, missing.as_str())))
    }

    fn report(&self) -> Value {
        let missing = |name: &str| {
            self.missing()
                .find_map(|(of, missing)| (of == name).then_some(missing))
        };
        let state = |name: &str, in_force: bool, threads: &str, denies: &str| {
            json!({
                "name": name,
                "in_force": in_force,
                "threads": threads,
                "denies": denies,
                "missing": missing(name),
            })
        };
        let mut files = state(
            "files",
            self.files.is_ok(),
            "all but observers and data workers",
            "reading outside of `reads` and `writes`, writing outside of `writes`, and running any file (Landlock)",
        );
        if let (Ok(known), Some(members)) = (&self.files, files.as_object_mut()) {
            members.insert("reads".to_owned(), json!(known.reads));
            members.insert("writes".to_owned(), json!(known.writes));
        }
        let mut privileges = state(
            "privileges",
            self.privileges.is_ok(),
            "all",
            "every capability but `kept`, and gaining any (no_new_privs)",
        );
        if let (Ok(known), Some(members)) = (&self.privileges, privileges.as_object_mut()) {
            let kept = json!({
                "observers": known.observers,
                "data_workers": known.data_workers,
                "others": known.others,
            });
            members.insert("kept".to_owned(), kept);
        }
        json!([
            state(
                "memory",
                self.memory.is_ok(),
                "all",
                "core files, and the agent's memory, environment and descriptors to other processes of its user (PR_SET_DUMPABLE, RLIMIT_CORE)",
            ),
            state(
                "system_calls",
                self.system_calls.is_ok(),
                "all",
                "other programs and processes, ptrace, namespaces, mounts, bpf, kernel modules, keys, clocks, other users, io_uring (seccomp)",
            ),
            files,
            state(
                "observers",
                self.observers.is_ok(),
                "observers",
                "opening a file but for reading, and changing the file system (seccomp)",
            ),
            state(
                "data_workers",
                self.system_calls.is_ok(),
                "data workers",
                "opening a file, changing the file system, and making a thread (seccomp)",
            ),
            privileges,
        ])
    }
}
