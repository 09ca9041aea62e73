//! What a process's place in the cgroup hierarchies says, and what it does not.
//!
//! Only root makes directories at the root of a hierarchy, but a user may own a subtree (a delegated
//! unit, `user@UID.service`) and give the directories in it any name. A path is therefore read from
//! the root downwards, one component after the other, and never searched for something that looks
//! like a container or a unit. Reading stops at the first container, or at the first unit: what is
//! below was named by whoever owns that, and belongs to it, also where the name is not UTF-8 or ends in
//! ` (deleted)`, as the kernel writes of a directory that was removed, in which no process lives.

#[cfg(test)]
mod tests;

use std::fmt;

/// What a `/proc/PID/cgroup` says (cgroups(7)).
#[derive(Debug)]
pub(crate) struct Cgroups {
    /// The file, byte for byte.
    pub(crate) text: Box<[u8]>,
    /// The path that stands for the process. U+FFFD stands for bytes that are not UTF-8: whoever named a
    /// directory so could have named it with U+FFFD as well.
    pub(crate) path: Option<String>,
    pub(crate) container: Result<Option<Container>, Contradiction>,
    pub(crate) units: Units,
}

impl Cgroups {
    pub(crate) fn read(text: &[u8]) -> Self {
        // No name of a unit, a slice or a container has a character beyond ASCII.
        let file = String::from_utf8_lossy(text);
        let memberships = memberships(&file);
        Self {
            text: text.into(),
            path: path(&memberships).map(str::to_owned),
            container: container(&memberships),
            units: units(&memberships),
        }
    }
}

/// One line of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Membership<'a> {
    hierarchy: Hierarchy,
    path: &'a str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hierarchy {
    /// `0::`
    Unified,
    /// `N:name=systemd:`, the hierarchy in which systemd keeps units on version 1.
    Systemd,
    /// `N:CONTROLLERS:`
    Controllers,
}

/// A container that a runtime of the host started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// `None` where the path does not tell it (kubepods by the cgroupfs driver).
    pub(crate) runtime: Option<Runtime>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Runtime {
    Docker,
    Containerd,
    CriO,
    Podman,
}

impl fmt::Display for Runtime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Docker => "docker",
            Self::Containerd => "containerd",
            Self::CriO => "cri-o",
            Self::Podman => "podman",
        })
    }
}

/// The units of a process, as systemd would name them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Units {
    /// The unit of the system's manager. Only root can make a process belong to one.
    pub(crate) system: Option<String>,
    /// The unit of a user's manager. That user can name it at will.
    pub(crate) user: Option<String>,
    /// The user whose manager it is.
    pub(crate) user_id: Option<u32>,
}

/// The hierarchies disagree, so that none is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the cgroup hierarchies name different containers")]
pub(crate) struct Contradiction;

/// The lines that can be believed. Skipped: what lies outside this agent's cgroup namespace (`/../`).
fn memberships(file: &str) -> Vec<Membership<'_>> {
    file.split('\n')
        .filter_map(|line| {
            // The path may hold colons; what is before it may not.
            let mut fields = line.splitn(3, ':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let hierarchy = match (number, controllers) {
                ("0", "") => Hierarchy::Unified,
                (_, "name=systemd") => Hierarchy::Systemd,
                _ => Hierarchy::Controllers,
            };
            let believable =
                path.starts_with('/') && !path.split('/').any(|component| component == "..");
            believable.then_some(Membership { hierarchy, path })
        })
        .collect()
}

/// The path that stands for the process: of the unified hierarchy where that is in use, else of
/// systemd's.
fn path<'a>(memberships: &[Membership<'a>]) -> Option<&'a str> {
    let in_hierarchy = |hierarchy| {
        memberships
            .iter()
            .find(|membership| membership.hierarchy == hierarchy)
            .map(|membership| membership.path)
    };
    let unified = in_hierarchy(Hierarchy::Unified);
    match (unified, in_hierarchy(Hierarchy::Systemd)) {
        // In hybrid mode everything may lie in the unified root.
        (Some("/") | None, Some(systemd)) => Some(systemd),
        (unified, _) => unified,
    }
}

/// The container of the process, by all hierarchies that name one.
fn container(memberships: &[Membership<'_>]) -> Result<Option<Container>, Contradiction> {
    let mut found: Option<Container> = None;
    for container in memberships
        .iter()
        .filter_map(|membership| container_of_path(membership.path))
    {
        match &found {
            Some(other) if *other != container => return Err(Contradiction),
            _ => found = Some(container),
        }
    }
    Ok(found)
}

/// The units of the process: by systemd's own hierarchy on version 1, by the unified one where
/// systemd has put the process into none there.
fn units(memberships: &[Membership<'_>]) -> Units {
    [Hierarchy::Systemd, Hierarchy::Unified]
        .into_iter()
        .filter_map(|hierarchy| {
            memberships
                .iter()
                .find(|membership| membership.hierarchy == hierarchy)
        })
        .find(|membership| membership.path != "/")
        .map_or_else(Units::default, |membership| units_of_path(membership.path))
}

fn container_of_path(path: &str) -> Option<Container> {
    let components = components(path)?;
    match components.as_slice() {
        // The cgroupfs driver: directories that the runtime makes at the root of the hierarchy.
        ["docker", id, ..] => plain(id, Some(Runtime::Docker)),
        ["libpod_parent", scope, ..] => {
            plain(scope.strip_prefix("libpod-")?, Some(Runtime::Podman))
        }
        ["kubepods", "burstable" | "besteffort", pod, id, ..] if is_pod(pod) => in_pod(id),
        ["kubepods", pod, id, ..] if is_pod(pod) => in_pod(id),
        // The systemd driver: a scope in a slice that the system's manager made.
        [slice, ..] if is_slice(slice) => {
            let (parent, rest) = below_slices(&components)?;
            let scope = rest.first()?.strip_suffix(".scope")?;
            match parent {
                "system.slice" | "machine.slice" => in_scope(scope),
                parent if is_pod_slice(parent) => in_scope(scope),
                _ => None,
            }
        }
        _ => None,
    }
}

/// A scope's name without `.scope`: `docker-ID`, `cri-containerd-ID`, `crio-ID`, `libpod-ID`. The
/// monitor of a container (`crio-conmon-ID`) is not the container.
fn in_scope(scope: &str) -> Option<Container> {
    let prefixes = [
        ("docker-", Runtime::Docker),
        ("cri-containerd-", Runtime::Containerd),
        ("nerdctl-", Runtime::Containerd),
        ("crio-", Runtime::CriO),
        ("libpod-", Runtime::Podman),
    ];
    prefixes
        .iter()
        .find_map(|(prefix, runtime)| plain(scope.strip_prefix(prefix)?, Some(*runtime)))
}

/// A directory in a pod's directory (cgroupfs driver).
fn in_pod(component: &str) -> Option<Container> {
    match component.strip_prefix("crio-") {
        Some(id) => plain(id, Some(Runtime::CriO)),
        None => plain(component, None),
    }
}

fn plain(id: &str, runtime: Option<Runtime>) -> Option<Container> {
    let is_id = id.len() == 64
        && id
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_id.then(|| Container {
        id: id.to_owned(),
        runtime,
    })
}

fn is_pod(component: &str) -> bool {
    component.strip_prefix("pod").is_some_and(is_uid)
}

/// `kubepods-burstable-podUID.slice`, where systemd wants `_` for `-`.
fn is_pod_slice(slice: &str) -> bool {
    let uid = slice.strip_suffix(".slice").and_then(|name| {
        [
            "kubepods-burstable-pod",
            "kubepods-besteffort-pod",
            "kubepods-pod",
        ]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
    });
    uid.is_some_and(is_uid)
}

/// A pod's uid: a UUID, or for static pods a hash.
fn is_uid(text: &str) -> bool {
    matches!(text.len(), 32 | 36)
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-' | b'_'))
}

fn units_of_path(path: &str) -> Units {
    let Some(components) = components(path) else {
        return Units::default();
    };
    let rest = below_slices(&components).map_or(components.as_slice(), |(_, rest)| rest);
    let Some((system, below)) = rest.split_first().filter(|(first, _)| is_unit(first)) else {
        return Units::default();
    };
    let user_id = user_of_manager(&components, system);
    Units {
        system: Some((*system).to_owned()),
        user: user_id.and_then(|_| {
            let in_manager = below_slices(below).map_or(below, |(_, rest)| rest);
            in_manager
                .first()
                .filter(|unit| is_unit(unit))
                .map(|unit| (*unit).to_owned())
        }),
        user_id,
    }
}

/// The user whose manager runs in `/user.slice/user-UID.slice/user@UID.service`.
fn user_of_manager(components: &[&str], unit: &str) -> Option<u32> {
    let user_id: u32 = unit
        .strip_prefix("user@")?
        .strip_suffix(".service")?
        .parse()
        .ok()?;
    let place = [
        "user.slice".to_owned(),
        format!("user-{user_id}.slice"),
        format!("user@{user_id}.service"),
    ];
    let there = components
        .iter()
        .zip(&place)
        .all(|(component, place)| component == place);
    (there && components.len() >= place.len()).then_some(user_id)
}

/// The components of an absolute path; `None` if one is empty or leads elsewhere.
fn components(path: &str) -> Option<Vec<&str>> {
    let components: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let proper = components
        .iter()
        .all(|component| !matches!(*component, "" | "." | ".."));
    proper.then_some(components)
}

/// Walks down the slices at the beginning. Each must be the child of the one before, as systemd
/// nests them (`a.slice/a-b.slice`). The innermost, and what is below it.
fn below_slices<'a, 'b>(components: &'b [&'a str]) -> Option<(&'a str, &'b [&'a str])> {
    let mut innermost: Option<&'a str> = None;
    let mut rest = components;
    while let Some((slice, below)) = rest.split_first().filter(|(first, _)| is_slice(first)) {
        if let Some(parent) = innermost {
            let nested = parent
                .strip_suffix(".slice")
                .and_then(|parent| slice.strip_prefix(parent))
                .is_some_and(|child| child.starts_with('-'));
            if !nested {
                return None;
            }
        }
        innermost = Some(slice);
        rest = below;
    }
    innermost.map(|innermost| (innermost, rest))
}

fn is_slice(component: &str) -> bool {
    component.strip_suffix(".slice").is_some_and(is_unit_name)
}

/// A unit that holds processes: a service, a scope, and the few other kinds that start helpers.
fn is_unit(component: &str) -> bool {
    [".service", ".scope", ".socket", ".mount", ".swap"]
        .iter()
        .any(|suffix| component.strip_suffix(suffix).is_some_and(is_unit_name))
}

/// The characters that systemd allows in a unit's name (systemd.unit(5)).
fn is_unit_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name.bytes().all(|byte| {
            byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'-' | b'_' | b'.' | b'\\' | b'@')
        })
}
