//! The files, sockets and addresses that an agent makes, and the room for its audit.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, Group, faccessat};

use super::agent::Running;
use super::finding::{Finding, FindingCode};
use crate::client::dev_directory;
use crate::config::{AuditSink, Bind, Config};
use crate::hardening::{self, directory_of, written};

/// Below this share of a file system's room, its end is near.
const LOW_SHARE: u64 = 20;

/// Looks at every file and address that a configuration has the agent make.
pub(super) fn check(config: &Config, running: &Running) -> Vec<Finding> {
    let mut findings = Vec::new();
    directories(config, &mut findings);
    entrances(config, &mut findings);
    sockets(config, &mut findings);
    state_directory(config, &mut findings);
    for sink in &config.audit.sinks {
        if let AuditSink::File {
            path, rotate_size, ..
        } = sink
        {
            audit(path, *rotate_size, &mut findings);
        }
    }
    // An agent that nothing is asked by may hold the addresses itself.
    if running.is_absent() && running.would_answer() {
        addresses(config, &mut findings);
    }
    findings
}

fn directories(config: &Config, findings: &mut Vec<Finding>) {
    let mut seen = BTreeSet::new();
    let state_directory = hardening::state_directory(config);
    for path in written(config) {
        // The agent makes this one where there is none.
        let directory = match Some(path) == state_directory {
            true => nearest_that_exists(path),
            false => directory_of(path),
        };
        if !seen.insert(directory.clone()) || is_special(path) {
            continue;
        }
        let Ok(metadata) = directory.metadata() else {
            findings.push(Finding::new(
                FindingCode::DirectoryUnusable,
                format!(
                    "`{}` is to be made in `{}`, which is not there",
                    path.display(),
                    directory.display()
                ),
            ));
            continue;
        };
        if !may(&directory, AccessFlags::W_OK | AccessFlags::X_OK) {
            findings.push(Finding::new(
                FindingCode::DirectoryUnusable,
                format!(
                    "`{}` is to be made in `{}`, where this user may not write",
                    path.display(),
                    directory.display()
                ),
            ));
        }
        // The sticky bit keeps others from replacing what is not theirs (unlink(2)).
        if metadata.mode() & 0o002 != 0 && metadata.mode() & 0o1000 == 0 {
            findings.push(Finding::new(
                FindingCode::DirectoryOpenToOthers,
                format!(
                    "`{}` has mode {:04o}: everybody may replace `{}`",
                    directory.display(),
                    metadata.mode() & 0o7777,
                    path.display()
                ),
            ));
        }
    }
}

/// What is for other users, behind a directory that they may not pass.
fn entrances(config: &Config, findings: &mut Vec<Finding>) {
    let sockets = config
        .listeners
        .iter()
        .filter_map(|listener| match &listener.bind {
            Bind::Unix(path) if listener.access.mode.unwrap_or(0) & 0o002 != 0 => Some(path),
            Bind::Unix(_) | Bind::Tcp(_) => None,
        });
    let certificates = config
        .interception
        .iter()
        .flat_map(|known| [&known.ca_certificate_file, &known.trust_bundle_file])
        .flatten();
    let mut closed = BTreeSet::new();
    for path in sockets.chain(certificates) {
        let Ok(whole) = std::path::absolute(path) else {
            continue;
        };
        if whole.starts_with(dev_directory()) {
            continue;
        }
        for directory in whole.ancestors().skip(1) {
            let mode = directory.metadata().map_or(0o001, |found| found.mode());
            if mode & 0o001 == 0 && closed.insert(directory.to_owned()) {
                findings.push(Finding::new(
                    FindingCode::DirectoryClosedToOthers,
                    format!(
                        "`{}` has mode {:04o}: other users do not reach `{}`",
                        directory.display(),
                        mode & 0o7777,
                        path.display()
                    ),
                ));
            }
        }
    }
}

fn sockets(config: &Config, findings: &mut Vec<Finding>) {
    let mut problem = |path: &Path, reason: String| {
        findings.push(Finding::new(
            FindingCode::SocketUnusable,
            format!("the socket `{}` cannot be made: {reason}", path.display()),
        ));
    };
    let of_listeners = config.listeners.iter().filter_map(|listener| {
        let group = listener.access.group.as_deref();
        match &listener.bind {
            Bind::Unix(path) => Some((path.as_path(), group)),
            Bind::Tcp(_) => None,
        }
    });
    let of_admin = config.admin.socket.as_deref().map(|path| (path, None));
    for (path, group) in of_listeners.chain(of_admin) {
        if path
            .symlink_metadata()
            .is_ok_and(|there| !there.file_type().is_socket())
        {
            problem(path, "something else stands in its place".to_owned());
        }
        if let Some(group) = group
            && !matches!(Group::from_name(group), Ok(Some(_)))
        {
            problem(path, format!("there is no group `{group}`"));
        }
    }
}

fn state_directory(config: &Config, findings: &mut Vec<Finding>) {
    let Some(directory) = hardening::state_directory(config) else {
        return;
    };
    for path in [directory.to_owned(), directory.join("root.key")] {
        let mode = path.metadata().map_or(0, |metadata| metadata.mode());
        if mode & 0o077 != 0 {
            findings.push(Finding::new(
                FindingCode::StateDirectoryOpen,
                format!("`{}` has mode {:04o}", path.display(), mode & 0o7777),
            ));
        }
    }
}

fn audit(path: &Path, rotate_size: u64, findings: &mut Vec<Finding>) {
    if path.exists() && !may(path, AccessFlags::W_OK) || path.is_dir() {
        findings.push(Finding::new(
            FindingCode::AuditUnwritable,
            format!("`{}` cannot be written by this user", path.display()),
        ));
    }
    if is_special(path) {
        return;
    }
    let Ok(room) = statvfs(&directory_of(path)) else {
        return;
    };
    let free = room.blocks_available().saturating_mul(room.fragment_size());
    let whole = room.blocks().saturating_mul(room.fragment_size());
    // What is left of a large disk may be a small share of it, and enough.
    if free < rotate_size && free.saturating_mul(LOW_SHARE) < whole {
        findings.push(Finding::new(
            FindingCode::AuditDiskFull,
            format!(
                "{} KiB of {} KiB are free where `{}` is written, which may grow to {} KiB before it is rotated",
                free / 1024,
                whole / 1024,
                path.display(),
                rotate_size / 1024
            ),
        ));
    }
}

fn addresses(config: &Config, findings: &mut Vec<Finding>) {
    let of_listeners = config
        .listeners
        .iter()
        .filter_map(|listener| match listener.bind {
            Bind::Tcp(address) => Some((listener.name.as_str(), address)),
            Bind::Unix(_) => None,
        });
    let of_metrics = config
        .admin
        .metrics_bind
        .map(|address| ("metrics", address));
    for (name, address) in of_listeners.chain(of_metrics) {
        if let Err(error) = std::net::TcpListener::bind(address) {
            findings.push(Finding::new(
                FindingCode::AddressUnusable,
                format!("`{name}` cannot be bound to `{address}`: {error}"),
            ));
        }
    }
}

/// A pipe or a device in the place of a file: nothing is made there.
fn is_special(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_fifo() || kind.is_char_device() || kind.is_block_device()
    })
}

fn nearest_that_exists(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

fn may(path: &Path, how: AccessFlags) -> bool {
    faccessat(AT_FDCWD, path, how, AtFlags::AT_EACCESS).is_ok()
}
