//! Which files the agent may use: Landlock (Documentation/userspace-api/landlock.rst).
//!
//! A rule holds for what a path led to when it was made, and for all that is beneath. Files are
//! replaced by renaming (an editor, a renewed certificate, a ConfigMap), so rules are made for the
//! directories of the files that the configuration names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, LandlockStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, path_beneath_rules,
};

use super::Needs;

/// The rights that this agent knows of; those that the kernel does not know are not asked for.
const RIGHTS: ABI = ABI::V5;

/// What the C library, the trust store and the runtime read, whenever they like: names (`/etc`, whose
/// files are replaced by renaming too), modules for looking up names, roots, time zones, the agent's
/// own state in `/proc`, and its share of the processors.
const SYSTEM: &[&str] = &[
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/run/systemd/userdb",
    "/run/nscd",
    "/var/lib/sss",
    "/var/lib/ca-certificates",
    "/proc",
    "/sys/fs/cgroup",
    "/dev/urandom",
];

/// Files of `/etc` that may be links to elsewhere: what names are looked up by, and the time zone.
const LINKS: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/localtime",
];

/// Written by whoever wants nothing written.
const NULL: &str = "/dev/null";

/// What is in force.
#[derive(Debug)]
pub(super) struct Files {
    /// What may be read, and all beneath; every link followed.
    pub(super) reads: BTreeSet<PathBuf>,
    /// What may be written, and all beneath.
    pub(super) writes: BTreeSet<PathBuf>,
    /// The version of Landlock that the kernel has, where it knows fewer rights than this agent.
    pub(super) partly: Option<String>,
}

/// Confines this thread, and all that it makes later.
pub(super) fn confine(needs: &Needs) -> Result<Files, String> {
    let reads: BTreeSet<PathBuf> = needs
        .reads
        .iter()
        .flat_map(|path| places(path))
        .chain(SYSTEM.iter().map(PathBuf::from))
        .chain(LINKS.iter().flat_map(|path| places(Path::new(path))))
        .chain(trust_from_environment())
        .filter_map(|path| path.canonicalize().ok())
        .collect();
    for link in LINKS {
        if std::fs::symlink_metadata(link).is_ok() && !Path::new(link).exists() {
            tracing::warn!(
                link,
                "leads to no file yet; where it will lead is not read before the agent is started again"
            );
        }
    }
    let mut writes: BTreeSet<PathBuf> = needs
        .writes
        .iter()
        .filter_map(|path| path.canonicalize().ok())
        .collect();
    writes.insert(PathBuf::from(NULL));

    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let writing: BitFlags<AccessFs> = reading
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::RemoveFile
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::MakeDir;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.add_rules(path_beneath_rules(&reads, reading)))
        .and_then(|ruleset| ruleset.add_rules(path_beneath_rules(&writes, writing)))
        .and_then(|ruleset| ruleset.restrict_self())
        .map_err(|error| error.to_string())?;
    let partly = match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => None,
        (RulesetStatus::PartiallyEnforced, landlock) => {
            Some(format!("the kernel's Landlock is older: {landlock:?}"))
        }
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            return Err("the kernel has Landlock, and it is not enabled (`lsm=`)".to_owned());
        }
        (RulesetStatus::NotEnforced, _) => return Err("the kernel has no Landlock".to_owned()),
    };
    Ok(Files {
        reads,
        writes,
        partly,
    })
}

impl Files {
    /// Whether what a path leads to now, or would be made there, may be read.
    pub(super) fn may_read(&self, path: &Path) -> bool {
        let path = resolved(path);
        self.reads
            .iter()
            .chain(&self.writes)
            .any(|permitted| path.starts_with(permitted))
    }

    /// Whether it may be written.
    pub(super) fn may_write(&self, path: &Path) -> bool {
        let path = resolved(path);
        self.writes
            .iter()
            .any(|permitted| path.starts_with(permitted))
    }
}

/// Where a named file, its replacements, and what it links to are.
fn places(path: &Path) -> Vec<PathBuf> {
    let mut places = vec![directory_of(path)];
    places.extend(path.canonicalize().ok().map(|path| directory_of(&path)));
    // A directory of links, as a ConfigMap's or that of a package.
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_symlink())
            && let Ok(file) = entry.path().canonicalize()
        {
            places.push(directory_of(&file));
        }
    }
    places
}

/// A directory itself, and a file's directory; of a file in the root directory only the file.
pub(crate) fn directory_of(path: &Path) -> PathBuf {
    if path.is_dir() {
        return path.to_owned();
    }
    match path.parent() {
        Some(parent) if parent == Path::new("") => PathBuf::from("."),
        Some(parent) if parent != Path::new("/") => parent.to_owned(),
        _ => path.to_owned(),
    }
}

/// OpenSSL's variables, which the trust store obeys.
fn trust_from_environment() -> impl Iterator<Item = PathBuf> {
    let file = std::env::var_os("SSL_CERT_FILE").map(|file| places(Path::new(&file)));
    let directories = std::env::var_os("SSL_CERT_DIR");
    let directories: Vec<PathBuf> = directories
        .iter()
        .flat_map(|value| std::env::split_paths(value).collect::<Vec<_>>())
        .collect();
    file.into_iter().flatten().chain(directories)
}

/// The path without links, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent == Path::new("") => {
            resolved(Path::new(".")).join(name)
        }
        (Some(parent), Some(name)) => resolved(parent).join(name),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_judged_by_what_it_leads_to() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        for name in ["in", "out", "state"] {
            std::fs::create_dir(root.join(name)).unwrap();
            std::fs::write(root.join(name).join("file"), "").unwrap();
        }
        std::os::unix::fs::symlink("../out/file", root.join("in/link")).unwrap();
        std::os::unix::fs::symlink("../in", root.join("out/back")).unwrap();
        let files = Files {
            reads: BTreeSet::from([root.join("in")]),
            writes: BTreeSet::from([root.join("state")]),
            partly: None,
        };
        for (path, reads, writes) in [
            ("in/file", true, false),
            ("in/not-there-yet", true, false),
            ("in/not/there/yet", true, false),
            ("in/link", false, false),
            ("in/../out/file", false, false),
            ("out/back/file", true, false),
            ("out/new", false, false),
            ("inside", false, false),
            ("state/new", true, true),
        ] {
            let path = root.join(path);
            assert_eq!(files.may_read(&path), reads, "{}", path.display());
            assert_eq!(files.may_write(&path), writes, "{}", path.display());
        }
    }

    #[test]
    fn a_named_file_may_be_replaced_and_a_directory_may_be_of_links() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        for name in ["..2026_01", "policies", "elsewhere"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        std::fs::write(root.join("..2026_01/agent.yaml"), "").unwrap();
        std::fs::write(root.join("elsewhere/a.cedar"), "").unwrap();
        std::os::unix::fs::symlink("..2026_01/agent.yaml", root.join("agent.yaml")).unwrap();
        std::os::unix::fs::symlink("../elsewhere/a.cedar", root.join("policies/a.cedar")).unwrap();
        assert_eq!(
            places(&root.join("agent.yaml")),
            [root.clone(), root.join("..2026_01")]
        );
        let policies = root.join("policies");
        assert_eq!(
            places(&policies),
            [policies.clone(), policies.clone(), root.join("elsewhere")]
        );
        assert_eq!(directory_of(Path::new("/key.pem")), Path::new("/key.pem"));
        assert_eq!(directory_of(Path::new("key.pem")), Path::new("."));
    }
}
