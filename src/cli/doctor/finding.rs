//! What `doctor` can find. `docs/doctor.md` has one entry per code.

use serde_json::{Value, json};

use crate::diagnostics::Severity;

/// Something that is wrong, or that proves or protects less than it could.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) code: FindingCode,
    /// What was seen, and where: lower case, no final period, input in backticks.
    pub(super) detail: String,
}

impl Finding {
    pub(super) fn new(code: FindingCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let properties = self.code.properties();
        json!({
            "code": properties.code,
            "severity": properties.severity,
            "detail": self.detail,
            "next": properties.next,
        })
    }
}

/// What a code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Properties {
    /// Stable, for programs.
    pub(super) code: &'static str,
    /// Whether it makes the system unhealthy.
    pub(super) severity: Severity,
    /// The next step.
    pub(super) next: &'static str,
}

macro_rules! finding_codes {
    ($($(#[$documentation:meta])* $name:ident = $severity:ident, $code:literal, $next:literal;)*) => {
        /// Every finding.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum FindingCode {
            $($(#[$documentation])* $name,)*
        }

        impl FindingCode {
            /// Every code, in the order of `docs/doctor.md`.
            #[cfg(test)]
            const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// What the code means.
            pub(super) const fn properties(self) -> Properties {
                match self {
                    $(Self::$name => Properties {
                        code: $code,
                        severity: Severity::$severity,
                        next: $next,
                    },)*
                }
            }
        }
    };
}

finding_codes! {
    /// The configuration does not load.
    ConfigurationInvalid = Error, "configuration_invalid",
        "mend the file; `countersign validate --config FILE` shows the place";
    /// The configuration loads with a warning.
    ConfigurationDoubtful = Warning, "configuration_doubtful",
        "mend the file; `countersign validate --config FILE` shows the place";
    /// The policies do not load.
    PolicyInvalid = Error, "policy_invalid",
        "mend the policy; `countersign policy check --config FILE` shows the place";
    /// The policies load with a warning.
    PolicyDoubtful = Warning, "policy_doubtful",
        "mend the policy; `countersign policy check --config FILE` shows the place";
    /// A `permit` permits nothing, whoever asks for whatever.
    PolicyNeverMatches = Error, "policy_never_matches",
        "mend its condition, or remove the policy";
    /// A `forbid` forbids nothing yet.
    ForbidNeverMatches = Warning, "forbid_never_matches",
        "leave it where it guards what is still to be configured; else mend its condition, for it protects nothing";
    /// A destination takes a credential that no policy permits to anybody.
    CredentialNeverPermitted = Error, "credential_never_permitted",
        "write a `permit` for `inject` on the credential, or take it from the destination";
    /// A secret may be read by others than its owner.
    SecretOpenToOthers = Error, "secret_open_to_others",
        "run `chmod 0600` on the file, as its owner, and replace the secret if others are on this machine";
    /// The agent's key or secret cannot be used.
    ClientKeyUnusable = Error, "client_key_unusable",
        "name a key that this user may read, in the algorithm that is configured and that the server takes; `countersign keys generate` makes one";
    /// The agent's key is past its end.
    ClientKeyExpired = Error, "client_key_expired",
        "make another with `countersign keys generate`, register what `countersign keys jwks` prints, and replace the file";
    /// A certificate that the agent trusts or serves under is past its end.
    CertificateExpired = Error, "certificate_expired",
        "replace the file by one whose certificates are in force";
    /// The agent could not make a file where the configuration wants one.
    DirectoryUnusable = Error, "directory_unusable",
        "create the directory and give it to the agent's user; run `doctor` as that user";
    /// Everybody may replace a file of the agent's.
    DirectoryOpenToOthers = Error, "directory_open_to_others",
        "run `chmod o-w` on the directory, or name another";
    /// Others do not reach what is for them.
    DirectoryClosedToOthers = Warning, "directory_closed_to_others",
        "run `chmod o+x` on the directory, or name another; where all workloads are the agent's own user's, nothing is missing";
    /// A Unix socket cannot be made.
    SocketUnusable = Error, "socket_unusable",
        "name a path where nothing but a socket is, and a group that exists";
    /// A TCP address cannot be bound.
    AddressUnusable = Error, "address_unusable",
        "bind an address of this machine that nobody listens on; a port below 1024 needs CAP_NET_BIND_SERVICE";
    /// The interception root's key may be read or replaced by others.
    StateDirectoryOpen = Error, "state_directory_open",
        "set the directory's mode to 0700 and the key's to 0600; where others are on this machine, remove both files, and let clients load the new root";
    /// Audit records cannot be written.
    AuditUnwritable = Error, "audit_unwritable",
        "give the file to the agent's user, or name another";
    /// There will soon be no room for audit records.
    AuditDiskFull = Error, "audit_disk_full",
        "free space, or set a smaller `rotate_size` or `keep`";
    /// Packets from outside may reach a listener on loopback.
    RouteLocalnet = Error, "route_localnet",
        "set the sysctl to 0, or let workloads use a Unix socket instead";
    /// The kernel does not say who calls.
    KernelEvidenceMissing = Error, "kernel_evidence_missing",
        "load the module (`unix_diag`, `inet_diag`, `tcp_diag`) or permit the call in the agent's sandbox; until then callers are refused";
    /// The kernel says who calls by weaker means.
    KernelEvidenceWeaker = Warning, "kernel_evidence_weaker",
        "run a kernel of 6.5 or later, which has SO_PEERPIDFD";
    /// Callers on TCP cannot be looked for in their cgroup.
    KernelWithoutCgroup2 = Warning, "kernel_without_cgroup2",
        "mount cgroup-v2 where the agent sees it";
    /// The agent may not look at other users' processes.
    CallersHidden = Warning, "callers_hidden",
        "run the agent as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; where all workloads are the agent's own user's, nothing is missing";
    /// The authorization server does not answer.
    IssuerUnreachable = Error, "issuer_unreachable",
        "check that the server is up and reachable from this node, by name and port; `connect_to` and `outbound_proxy` say another way";
    /// The authorization server's certificate does not verify.
    IssuerCertificateInvalid = Error, "issuer_certificate_invalid",
        "name the roots of its certificate by `ca_file`, and see that the certificate is in force and names the host";
    /// The authorization server's metadata cannot be used.
    IssuerMetadataInvalid = Error, "issuer_metadata_invalid",
        "write `issuer` exactly as the server's metadata does, or `token_endpoint` for a server without";
    /// The keys of an issuer whose tokens workloads present cannot be had.
    TokenIssuerUnusable = Error, "token_issuer_unusable",
        "check the issuer's URL, its `ca_file`, and that it is reachable from this node";
    /// The clocks of node and server differ by more than is made up for.
    ClockSkew = Error, "clock_skew",
        "synchronise this node's clock (NTP)";
    /// An agent that should be there does not answer.
    AgentUnreachable = Error, "agent_unreachable",
        "start the agent, name its socket by `--agent`, or give this user access to the socket";
    /// The agent would refuse requests.
    AgentNotReady = Error, "agent_not_ready",
        "mend what is named, or see the agent's log";
    /// The running agent did not take its last configuration.
    ReloadFailed = Error, "reload_failed",
        "mend the files; until then the last good configuration is in force";
    /// Clients of this environment do not trust the interception root.
    RootNotTrusted = Error, "root_not_trusted",
        "run clients under `countersign exec`, or name the file that `countersign ca --format bundle` writes by the variable";
    /// Clients of this environment go around the proxy.
    NoProxyExcludesDestination = Error, "no_proxy_excludes_destination",
        "take the entry out of `NO_PROXY` and `no_proxy`: requests to the host get no credential";
    /// The proxy of this environment does not answer.
    ProxyUnreachable = Error, "proxy_unreachable",
        "set the variable to the address of the agent's `forward_proxy`, and start the agent";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_documentation_lists_the_same_codes() {
        let text = include_str!("../../../docs/doctor.md");
        let (_, section) = text.split_once("\n## Findings\n").unwrap();
        let mut documented = Vec::new();
        for entry in section.split("\n### ").skip(1) {
            let (heading, body) = entry.split_once('\n').unwrap();
            let code = FindingCode::ALL
                .iter()
                .find(|code| code.properties().code == heading)
                .unwrap_or_else(|| panic!("docs/doctor.md has `{heading}`, which is no code"));
            documented.push(heading);
            for member in ["**Cause.**", "**Next step.**"] {
                assert!(body.contains(member), "`{heading}` lacks {member}");
            }
            let is_warning = code.properties().severity == Severity::Warning;
            assert_eq!(
                body.trim_start().starts_with("A warning."),
                is_warning,
                "`{heading}`"
            );
        }
        let codes: Vec<&str> = FindingCode::ALL
            .iter()
            .map(|code| code.properties().code)
            .collect();
        assert_eq!(documented, codes);
        assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len());
    }
}
