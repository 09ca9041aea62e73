//! The `unix` attestor: what the kernel says of the calling process. Its page is `docs/unix.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use async_trait::async_trait;

use crate::attestor::{Attestation, Attestor, AttributeDeclaration, Evidence, EvidenceKind};
use crate::attribute::{
    AttributeSelection, AttributeType, AttributeValue, Attributes, hexadecimal,
};
use crate::names;
use crate::platform::Process;
use crate::workload::FailureKind;

/// Attributes of `unix` that are stated whether they are needed or not.
const ALWAYS_STATED: [&str; 4] = ["uid", "gid", "pid", "cgroup"];

/// States the groups `unix` and `container`.
#[derive(Debug)]
pub struct UnixAttestor {
    needed: AttributeSelection,
    user: fn(u32) -> io::Result<Option<String>>,
}

impl UnixAttestor {
    /// An attestor that collects the attributes in `needed`, and of the others those that cost
    /// nothing (uid, gid, pid, container). The user's name is stated for records where it can be had;
    /// only where it is in `needed` it is declared, and the attestor fails without the name service.
    pub fn new(needed: AttributeSelection) -> Self {
        Self {
            needed,
            user: names::user,
        }
    }

    fn describe(&self, process: &Process) -> Result<BTreeMap<String, Attributes>, Failure> {
        let needs = |name: &str| self.needed.contains("unix", name);
        let mut unix = Attributes::new();
        let mut state = |name: &str, value: AttributeValue| {
            unix.insert(name.to_owned(), value);
        };

        state("uid", AttributeValue::Long(process.uid().into()));
        state("gid", AttributeValue::Long(process.gid().into()));
        state("pid", AttributeValue::Long(process.pid().into()));
        match (self.user)(process.uid()) {
            Ok(Some(user)) => state("user", AttributeValue::String(user)),
            Err(error) if needs("user") => return Err(error.into()),
            Ok(None) | Err(_) => {}
        }
        if needs("groups") {
            state("groups", AttributeValue::StringSet(group_names(process)?));
        }
        if needs("executable")
            && let Some(path) = unless_forbidden(process.executable())?.flatten()
            && let Some(path) = path.to_str()
        {
            state("executable", AttributeValue::String(path.to_owned()));
        }
        if needs("executable_sha256")
            && let Some(hash) = unless_forbidden(process.executable_sha256())?.flatten()
        {
            state(
                "executable_sha256",
                AttributeValue::String(hexadecimal(&hash)),
            );
        }
        if needs("command_line_sha256") {
            let digest =
                aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &process.command_line()?);
            state(
                "command_line_sha256",
                AttributeValue::String(hexadecimal(digest.as_ref())),
            );
        }
        if needs("network_namespace")
            && let Some(namespace) = unless_forbidden(process.network_namespace())?
            && let Ok(namespace) = i64::try_from(namespace)
        {
            state("network_namespace", AttributeValue::Long(namespace));
        }

        let cgroups = process.cgroups()?;
        if let Some(path) = &cgroups.path {
            state("cgroup", AttributeValue::String(path.clone()));
        }
        let mut groups = BTreeMap::from([("unix".to_owned(), unix)]);
        let container = cgroups
            .container
            .as_ref()
            .map_err(|contradiction| Failure::Invalid(contradiction.to_string()))?;
        if let Some(container) = container {
            let id = AttributeValue::String(container.id.clone());
            let mut attributes = Attributes::from([("id".to_owned(), id)]);
            if let Some(runtime) = container.runtime {
                attributes.insert(
                    "runtime".to_owned(),
                    AttributeValue::String(runtime.to_string()),
                );
            }
            groups.insert("container".to_owned(), attributes);
        }
        Ok(groups)
    }
}

#[async_trait]
impl Attestor for UnixAttestor {
    fn name(&self) -> &str {
        "unix"
    }

    fn evidence_kind(&self) -> EvidenceKind {
        EvidenceKind::Kernel
    }

    fn declarations(&self) -> Vec<AttributeDeclaration> {
        use AttributeType::{Long, String, StringSet};
        let unix = [
            ("uid", Long, true, "the effective user id of the process"),
            ("gid", Long, true, "the effective group id of the process"),
            (
                "pid",
                Long,
                true,
                "the process number, for records: it names nothing for long",
            ),
            (
                "user",
                String,
                false,
                "the user's name, where the host has one for the uid",
            ),
            (
                "groups",
                StringSet,
                false,
                "the names of the effective and supplementary groups; a number where a group has no name",
            ),
            (
                "executable",
                String,
                false,
                "the path by which the host knows the file that runs; absent outside the host's mount namespace",
            ),
            (
                "executable_sha256",
                String,
                false,
                "the SHA-256 of the file that runs, in hexadecimal; absent on FUSE and network file systems",
            ),
            (
                "command_line_sha256",
                String,
                false,
                "the SHA-256 of `/proc/PID/cmdline`, which the process can rewrite",
            ),
            ("cgroup", String, false, "the path in the cgroup hierarchy"),
            (
                "network_namespace",
                Long,
                false,
                "the inode number of the network namespace",
            ),
        ];
        let container = [
            (
                "id",
                String,
                true,
                "the container's full id, as its runtime numbers it",
            ),
            (
                "runtime",
                String,
                false,
                "docker, containerd, cri-o or podman, where the cgroup path tells",
            ),
        ];
        let declare = |group: &'static str| {
            move |(name, attribute_type, required, description): (&str, _, _, &str)| {
                AttributeDeclaration {
                    group: group.to_owned(),
                    name: name.to_owned(),
                    attribute_type,
                    required,
                    description: description.to_owned(),
                }
            }
        };
        unix.into_iter()
            .filter(|(name, ..)| ALWAYS_STATED.contains(name) || self.needed.contains("unix", name))
            .map(declare("unix"))
            .chain(container.into_iter().map(declare("container")))
            .collect()
    }

    async fn attest(&self, evidence: Evidence<'_>) -> Attestation {
        let Evidence::Kernel(peer) = evidence else {
            return Attestation::NotApplicable;
        };
        let Some(process) = peer.process() else {
            return Attestation::NotApplicable;
        };
        match self.describe(process) {
            Ok(groups) => Attestation::Attested {
                groups,
                valid_until: None,
            },
            Err(Failure::Unreadable(error)) => Attestation::Failed {
                kind: FailureKind::CouldNotRun,
                detail: format!("the process could not be read: {error}"),
            },
            Err(Failure::Invalid(detail)) => Attestation::Failed {
                kind: FailureKind::InvalidEvidence,
                detail,
            },
        }
    }
}

enum Failure {
    Unreadable(io::Error),
    Invalid(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(error)
    }
}

/// What an agent without privileges may not see of another user's process is absent, not a failure.
fn unless_forbidden<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
        Err(error) => Err(error),
    }
}

fn group_names(process: &Process) -> io::Result<BTreeSet<String>> {
    std::iter::once(process.gid())
        .chain(process.groups()?)
        .map(|gid| Ok(names::group(gid)?.unwrap_or_else(|| gid.to_string())))
        .collect()
}

#[cfg(all(test, target_os = "linux"))]
#[allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed expectation is a failed test"
)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::evidence::PeerEvidence;
    use crate::observers::look_here;

    fn of_unix(name: &str) -> (String, String) {
        ("unix".to_owned(), name.to_owned())
    }

    #[test]
    fn a_name_service_that_is_away_matters_where_a_policy_reads_the_name() {
        let (_client, server) = UnixStream::pair().unwrap();
        let peer = look_here(PeerEvidence::of_unix_stream(server.as_fd())).unwrap();
        let attest = |read: &str, user| {
            let needed = AttributeSelection::of([of_unix(read)]);
            let attestor = UnixAttestor {
                user,
                ..UnixAttestor::new(needed)
            };
            let declares_user = attestor
                .declarations()
                .iter()
                .any(|declared| declared.name == "user");
            assert_eq!(declares_user, read == "user");
            look_here(attestor.attest(Evidence::Kernel(&peer)))
        };
        let away = |_| Err(io::Error::other("the directory is away"));
        let there = |_| Ok(Some("orders".to_owned()));

        for (read, user, has_user) in [
            ("uid", there as fn(u32) -> _, true),
            ("user", there, true),
            ("uid", away, false),
        ] {
            let Attestation::Attested { groups, .. } = attest(read, user) else {
                panic!("it could not run without what only records name");
            };
            assert!(groups["unix"].contains_key("uid"));
            assert_eq!(groups["unix"].contains_key("user"), has_user, "{read}");
        }
        let Attestation::Failed { kind, detail } = attest("user", away) else {
            panic!("a policy would be decided without the name that it reads");
        };
        assert_eq!(kind, FailureKind::CouldNotRun);
        assert!(detail.contains("the directory is away"), "{detail}");
    }
}
