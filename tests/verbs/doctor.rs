//! `countersign doctor`: nothing is found where nothing is wrong, and each fault by its own code.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use countersign::dev::CertificateAuthority;
use rcgen::{CertificateParams, KeyPair};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use serde_json::Value;
use time::OffsetDateTime;

use crate::dev::Dev;
use crate::program::{Finished, User, finish};
use crate::support::counts::reached;
use crate::support::faulty_authorization_server::{Fault, FaultyAuthorizationServer};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{eventually, hold_port, is_root, unprivileged};

/// What each test induces; together every code that is documented.
const IN_FILES: &[&str] = &[
    "configuration_invalid",
    "configuration_doubtful",
    "policy_invalid",
    "policy_doubtful",
    "policy_never_matches",
    "forbid_never_matches",
    "credential_never_permitted",
    "secret_open_to_others",
    "client_key_unusable",
    "client_key_expired",
    "certificate_expired",
    "directory_unusable",
    "directory_open_to_others",
    "directory_closed_to_others",
    "socket_unusable",
    "address_unusable",
    "state_directory_open",
    "audit_unwritable",
];
const AT_SERVERS: &[&str] = &[
    "issuer_unreachable",
    "issuer_certificate_invalid",
    "issuer_metadata_invalid",
    "token_issuer_unusable",
    "clock_skew",
];
const IN_THE_KERNEL: &[&str] = &["kernel_evidence_missing", "kernel_evidence_weaker"];
const BY_ROOT: &[&str] = &[
    "audit_disk_full",
    "route_localnet",
    "kernel_without_cgroup2",
    CALLERS_HIDDEN,
];
/// Found of everybody but root.
const CALLERS_HIDDEN: &str = "callers_hidden";
const AT_THE_AGENT: &[&str] = &["agent_unreachable", "agent_not_ready", "reload_failed"];
const IN_THE_ENVIRONMENT: &[&str] = &[
    "root_not_trusted",
    "no_proxy_excludes_destination",
    "proxy_unreachable",
];

/// Names and values of an environment.
type Variables<'a> = &'a [(&'a str, &'a str)];

/// An agent that runs, whose configuration is looked at, and a user who looks.
struct Patient {
    world: World,
    user: User,
    seen: BTreeSet<String>,
}

impl Patient {
    async fn start() -> Self {
        Self::of(World::servers().await, "audit.jsonl").await
    }

    async fn of(mut world: World, audit: &str) -> Self {
        world.start_agent(&configuration(audit), POLICIES).await;
        Self {
            world,
            user: User::new(),
            seen: BTreeSet::new(),
        }
    }

    /// `countersign doctor --config CONFIG --output json MORE`, not yet started.
    fn command(&self, config: &Path, more: &[&str]) -> tokio::process::Command {
        let config = config.display().to_string();
        let line = ["doctor", "--config", &config, "--output", "json"];
        self.user.countersign(&[&line, more].concat())
    }

    fn config(&self) -> PathBuf {
        self.world.path("countersign.yaml")
    }

    /// Nothing is wrong, and a request is served.
    #[track_caller]
    fn healthy(&self) -> impl Future<Output = ()> + '_ {
        let good = self.world.good();
        async move {
            let report = finish(self.command(&self.config(), &[])).await.expect(0);
            let report = report.json();
            assert!(findings(&report).is_empty(), "{report:#}");
            assert_eq!(report["healthy"], true);
            good.await;
        }
    }

    /// A command finds this code and no other, with what is to be said, and ends as it should.
    #[track_caller]
    fn found(&mut self, finished: &Finished, code: &str, says: &str) {
        let report = finished.json();
        let findings = findings(&report);
        assert!(!findings.is_empty(), "{code}: {report:#}");
        let text = |finding: &Value, member: &str| finding[member].as_str().unwrap().to_owned();
        for finding in &findings {
            assert_eq!(text(finding, "code"), code, "{report:#}");
            assert!(!text(finding, "next").is_empty());
        }
        assert!(
            findings
                .iter()
                .any(|finding| text(finding, "detail").contains(says)),
            "{code}: no finding says `{says}`: {report:#}"
        );
        let is_error = findings
            .iter()
            .any(|finding| finding["severity"] == "error");
        assert_eq!(report["healthy"], !is_error);
        assert_eq!(finished.code, i32::from(is_error), "{finished:#?}");
        self.seen.insert(code.to_owned());
    }

    /// The usual configuration, with `old` replaced by `new`, as a file beside it.
    fn variant(&self, old: &str, new: &str) -> PathBuf {
        let usual = configuration("audit.jsonl");
        assert!(usual.contains(old), "{old}");
        self.world.write(
            "variant.yaml",
            &self.world.fill(&usual.replacen(old, new, 1)),
        );
        self.world.path("variant.yaml")
    }

    /// Finds this code in a variant of the configuration.
    async fn finds_in(&mut self, old: &str, new: &str, code: &str, says: &str) {
        let config = self.variant(old, new);
        let finished = finish(self.command(&config, &[])).await;
        self.found(&finished, code, says);
    }

    /// Finds this code with other policies.
    async fn finds_under(&mut self, policies: &str, code: &str, says: &str) {
        let directory = self.world.path("other-policies");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("all.cedar"), policies).unwrap();
        let (usual, other) = ("directory: policies}", "directory: other-policies}");
        self.finds_in(usual, other, code, says).await;
    }

    /// Finds this code while a file or directory has another mode.
    async fn finds_with_mode(&mut self, name: &str, mode: u32, code: &str) {
        let path = self.world.path(name);
        let before = std::fs::metadata(&path).unwrap().permissions();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        let finished = finish(self.command(&self.config(), &[])).await;
        std::fs::set_permissions(&path, before).unwrap();
        self.found(&finished, code, &format!("mode {mode:04o}"));
    }

    /// All that was to be induced was found.
    fn found_all(self, name: &str, codes: &[&str]) {
        let codes: BTreeSet<String> = codes.iter().map(ToString::to_string).collect();
        assert_eq!(self.seen, codes);
        reached(name, codes.len());
    }
}

/// What is found, but for what is found of everybody who is not root.
fn findings(report: &Value) -> Vec<Value> {
    let mut findings = report["findings"].as_array().unwrap().clone();
    if unprivileged().is_none() {
        findings.retain(|finding| finding["code"] != CALLERS_HIDDEN);
    }
    findings
}

/// The usual configuration, with sockets to ask at.
pub fn configuration(audit: &str) -> String {
    let api = "listeners:\n  - {name: api, type: workload_api, bind: \"unix:{directory}/api.sock\", access: {mode: \"0666\"}}\n";
    let usual = format!("{COMMON}{DESTINATIONS}");
    let usual = usual.replacen("listeners:\n", api, 1);
    let usual = usual.replacen("path: audit.jsonl", &format!("path: {audit}"), 1);
    // Where nothing fits, requests are refused.
    let usual = match audit {
        "/dev/full" => usual.replace("on_failure: degrade", "on_failure: block"),
        _ => usual,
    };
    // A busy machine is no fault.
    let usual = usual.replace("timeout: 20s", "timeout: 60s");
    format!("{usual}admin: {{socket: admin.sock}}\n")
}

/// A certificate that expired, in PEM.
fn expired() -> String {
    let mut parameters = CertificateParams::default();
    parameters.not_before = OffsetDateTime::from_unix_timestamp(1_000_000_000).unwrap();
    parameters.not_after = OffsetDateTime::from_unix_timestamp(1_100_000_000).unwrap();
    let key = KeyPair::generate().unwrap();
    parameters.self_signed(&key).unwrap().pem()
}

#[test]
fn every_documented_finding_is_induced_by_a_test() {
    let document = include_str!("../../docs/doctor.md");
    let (_, section) = document.split_once("\n## Findings\n").unwrap();
    let documented: Vec<&str> = section
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let induced: BTreeSet<&str> = [
        IN_FILES,
        AT_SERVERS,
        IN_THE_KERNEL,
        BY_ROOT,
        AT_THE_AGENT,
        IN_THE_ENVIRONMENT,
    ]
    .concat()
    .into_iter()
    .collect();
    assert_eq!(induced, documented.iter().copied().collect());
    reached("doctor_codes", documented.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_in_files_are_named() {
    let mut patient = Patient::start().await;
    patient.healthy().await;
    let none = "version: 1";
    patient
        .finds_in(
            none,
            "version: 1\nlistenerz: []",
            "configuration_invalid",
            "variant.yaml:3:1: ",
        )
        .await;
    patient
        .finds_in(
            none,
            "version: 1\ninclude: [conf.d/*.yaml]",
            "configuration_doubtful",
            "conf.d",
        )
        .await;

    patient
        .finds_under("permit (principal", "policy_invalid", "all.cedar:1:")
        .await;
    let node = format!(
        "{POLICIES}\n@id(\"node\") permit (principal, action == Action::\"issue\", resource == Credential::\"orders-api\");"
    );
    patient
        .finds_under(&node, "policy_doubtful", "the node alone")
        .await;
    let never = [
        (
            "@expires(\"2020-01-01T00:00:00Z\")",
            "true",
            "`@expires` has passed",
        ),
        (
            "",
            "principal.environment == \"prod\"",
            "`principal.environment` is never `prod`",
        ),
        (
            "",
            "resource.name == \"orders-ap\"",
            "`resource.name` is never `orders-ap`",
        ),
        (
            "",
            "resource.environment == \"prod\"",
            "`resource.environment` is never `prod`",
        ),
        (
            "",
            "context has destination && context.destination.name == \"billing\"",
            "`context.destination.name` is never `billing`",
        ),
        (
            "",
            "context has request && context.request.method == \"get\"",
            "method `get` is in lower case",
        ),
        (
            "",
            "principal.unix has user && \"no-such-user\" == principal.unix.user",
            "no user `no-such-user`",
        ),
    ];
    for (annotation, condition, says) in never {
        let policies = format!(
            "{POLICIES}\n@id(\"never\") {annotation} permit (principal, action == Action::\"inject\", resource)\nwhen {{ principal has unix && principal.unix.uid == 7 && {condition} }};"
        );
        patient
            .finds_under(&policies, "policy_never_matches", says)
            .await;
    }
    reached("never_matching_policies", never.len());
    // A guard that is there before what it guards.
    let guarded = format!(
        "{POLICIES}\n{}",
        include_str!("../../policies/default.cedar")
    );
    let says = "`resource.environment` is never `prod`";
    patient
        .finds_under(&guarded, "forbid_never_matches", says)
        .await;
    let other = POLICIES.replace("orders-api", "billing-api");
    patient
        .finds_under(
            &other,
            "credential_never_permitted",
            "destination `plain` takes credential `orders-api`",
        )
        .await;

    patient
        .finds_with_mode("client.key", 0o644, "secret_open_to_others")
        .await;
    patient
        .finds_with_mode("ca", 0o755, "state_directory_open")
        .await;
    patient
        .finds_with_mode("ca/root.key", 0o640, "state_directory_open")
        .await;
    keys_and_certificates(&mut patient).await;
    places(&mut patient).await;
    patient.healthy().await;
    patient.found_all("doctor_faults_in_files", IN_FILES);
}

async fn keys_and_certificates(patient: &mut Patient) {
    // RFC 7517 appendix A.2, with an end.
    let jwk = r#"{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","d":"870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE","exp":1100000000}"#;
    let pem = std::fs::read_to_string(patient.world.path("client.key")).unwrap();
    let rows = [
        (
            "nonsense",
            "client_key_unusable",
            "other.key` cannot be used",
        ),
        ("", "client_key_unusable", "other.key` cannot be used"),
        (
            &format!("{pem}{}", expired()),
            "client_key_expired",
            "2004-11-09",
        ),
        (jwk, "client_key_expired", "expired at 2004-11-09T11:33:20Z"),
    ];
    for (content, code, says) in rows {
        patient.world.write("other.key", content);
        let path = patient.world.path("other.key");
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
        patient
            .finds_in("key_file: client.key", "key_file: other.key", code, says)
            .await;
    }
    let served = "    hosts: [orders.example.test]\n    paths: [\"/v1/**\"]\n    credentials: [{name: orders-api}]\n    ca_file: servers.pem";
    let past = served.replace("servers.pem", "expired.pem");
    patient.world.write("expired.pem", &expired());
    patient
        .finds_in(served, &past, "certificate_expired", "expired.pem")
        .await;
    // One that is in force is enough.
    let both = format!("{}{}", expired(), patient.world.authority.pem());
    patient.world.write("expired.pem", &both);
    let config = patient.variant(served, &past);
    finish(patient.command(&config, &[])).await.expect(0);
}

async fn places(patient: &mut Patient) {
    let audit = "path: audit.jsonl";
    patient
        .finds_in(
            audit,
            "path: absent/audit.jsonl",
            "directory_unusable",
            "not there",
        )
        .await;
    let open = patient.world.path("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
    patient
        .finds_in(
            audit,
            "path: open/audit.jsonl",
            "directory_open_to_others",
            "mode 0777",
        )
        .await;
    // With the sticky bit nobody replaces what is not theirs.
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o1777)).unwrap();
    let config = patient.variant(audit, "path: open/audit.jsonl");
    finish(patient.command(&config, &[])).await.expect(0);
    let certificate = "ca_certificate_file: ca.pem";
    let closed = patient.world.path("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o700)).unwrap();
    for (old, new) in [
        (certificate, "ca_certificate_file: closed/ca.pem"),
        (
            "trust_bundle_file: bundle.pem",
            "trust_bundle_file: closed/bundle.pem",
        ),
        (
            "unix:{directory}/gateway.sock",
            "unix:{directory}/closed/gateway.sock",
        ),
    ] {
        let code = "directory_closed_to_others";
        patient.finds_in(old, new, code, "mode 0700").await;
    }
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o711)).unwrap();
    let config = patient.variant(certificate, "ca_certificate_file: closed/ca.pem");
    finish(patient.command(&config, &[])).await.expect(0);
    patient
        .finds_in(audit, "path: policies", "audit_unwritable", "policies")
        .await;

    let access = "access: {mode: \"0666\"}}\n  - {name: proxy";
    let no_group = access.replace("}}", ", group: no-such-group}}");
    patient
        .finds_in(
            access,
            &no_group,
            "socket_unusable",
            "no group `no-such-group`",
        )
        .await;
    let socket = "unix:{directory}/gateway.sock";
    patient
        .finds_in(
            socket,
            "unix:{directory}/servers.pem",
            "socket_unusable",
            "something else",
        )
        .await;

    // An address in use is no fault of an agent that runs.
    let (_held, address) = hold_port(0).unwrap();
    let taken = TcpListener::bind(address).unwrap();
    let (free, used) = ("127.0.0.1:0", address.to_string());
    let config = patient.variant(free, &used);
    finish(patient.command(&config, &[])).await.expect(0);
    let text = std::fs::read_to_string(&config).unwrap();
    let elsewhere = text
        .replace("/api.sock", "/other-api.sock")
        .replace("socket: admin.sock", "socket: other-admin.sock");
    std::fs::write(&config, elsewhere).unwrap();
    let finished = finish(patient.command(&config, &[])).await;
    patient.found(&finished, "address_unusable", &used);
    drop(taken);
    // What another test starts may listen for us, until it executes.
    let finished = eventually(Duration::from_secs(60), || async {
        let finished = finish(patient.command(&config, &[])).await;
        (finished.code == 0).then_some(finished)
    })
    .await;
    let left_out = finished.json()["not_checked"][0]["what"].clone();
    assert_eq!(left_out, "the running agent", "{finished:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_at_servers_are_named() {
    let mut world = World::servers().await;
    let certificate = world.authority.issue(&["auth.example.test"]).unwrap();
    let state = std::sync::Arc::clone(world.authorization_server.state());
    let server = FaultyAuthorizationServer::start(state, certificate).await;
    world.origins.push(("auth".to_owned(), server.address()));
    let other = CertificateAuthority::new("another").unwrap();
    world.write("other.pem", other.pem());
    let mut patient = Patient::of(world, "audit.jsonl").await;
    patient.healthy().await;

    let config = patient.config();
    for (seconds, direction) in [(120, "behind"), (-86_400, "ahead of")] {
        server.set_date_offset(seconds);
        let finished = finish(patient.command(&config, &[])).await;
        patient.found(&finished, "clock_skew", direction);
    }
    // What the agent makes up for is no fault.
    server.set_date_offset(45);
    finish(patient.command(&config, &[])).await.expect(0);
    server.set_date_offset(0);

    let roots = "    ca_file: servers.pem\n    connect_to: \"{auth}\"";
    let others = roots.replace("servers.pem", "other.pem");
    patient
        .finds_in(
            roots,
            &others,
            "issuer_certificate_invalid",
            "does not verify",
        )
        .await;
    let connect_to = "connect_to: \"{issuer}\"";
    patient
        .finds_in(
            connect_to,
            "connect_to: \"127.0.0.1:1\"",
            "token_issuer_unusable",
            "issuer `ci`",
        )
        .await;

    server.set(Fault::Refused).await;
    let finished = finish(patient.command(&config, &[])).await;
    patient.found(&finished, "issuer_unreachable", "credential `orders-api`");
    server.set(Fault::None).await;
    patient.healthy().await;

    let document = r#"{"issuer": "https://auth.example.test/", "token_endpoint": "https://auth.example.test/token"}"#;
    server.set_metadata(document.to_owned());
    let finished = finish(patient.command(&config, &[])).await;
    patient.found(&finished, "issuer_metadata_invalid", "another issuer");
    let right = document.replace("test/\"", "test\"");
    server.set_metadata(right);
    patient.healthy().await;
    // Nothing was asked for but documents: the tokens are those of the good requests.
    let issued = patient.world.authorization_server.state().issued().len();
    assert_eq!(issued, 1);
    patient.found_all("doctor_faults_at_servers", AT_SERVERS);
}

/// Ends with the output of a command whose system calls are answered with an error where all
/// conditions hold, each on one argument.
async fn without(
    mut command: tokio::process::Command,
    call: i64,
    arguments: &[(u8, u64)],
    errno: i32,
) -> Finished {
    let conditions = arguments
        .iter()
        .map(|(index, value)| {
            SeccompCondition::new(*index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)
                .unwrap()
        })
        .collect();
    let rules = [(call, vec![SeccompRule::new(conditions).unwrap()])];
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(u32::try_from(errno).unwrap()),
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    let runtime = tokio::runtime::Handle::current();
    // A filter is the thread's, and of what it starts.
    std::thread::spawn(move || {
        apply_filter(&program).unwrap();
        let _in_runtime = runtime.enter();
        let child = command.spawn().unwrap();
        runtime.block_on(child.wait_with_output()).unwrap()
    })
    .join()
    .map(Finished::from)
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_lacks_is_named() {
    let mut patient = Patient::start().await;
    patient.healthy().await;
    let command = patient.command(&patient.config(), &[]);
    let sock_diag = [
        (0, u64::try_from(libc::AF_NETLINK).unwrap()),
        (2, u64::try_from(libc::NETLINK_INET_DIAG).unwrap()),
    ];
    let finished = without(command, libc::SYS_socket, &sock_diag, libc::EPROTONOSUPPORT).await;
    patient.found(&finished, "kernel_evidence_missing", "loopback TCP");

    // As kernels before 6.5 answer.
    let peer_pidfd = [(2, u64::try_from(libc::SO_PEERPIDFD).unwrap())];
    let command = patient.command(&patient.config(), &[]);
    let finished = without(
        command,
        libc::SYS_getsockopt,
        &peer_pidfd,
        libc::ENOPROTOOPT,
    )
    .await;
    patient.found(&finished, "kernel_evidence_weaker", "a Unix socket");
    patient.healthy().await;
    patient.found_all("doctor_faults_in_the_kernel", IN_THE_KERNEL);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_root_can_break_is_named() {
    if !is_root("what_only_root_can_break_is_named") {
        return;
    }
    let mut patient = Patient::start().await;
    patient.healthy().await;
    let room = patient.world.path("room");
    std::fs::create_dir(&room).unwrap();
    let audit = patient.variant("path: audit.jsonl", "path: room/audit.jsonl");
    // A line of shell in namespaces of its own, then `doctor`.
    let after = |user: &User, namespaces: &str, line: &str, config: &Path| {
        let mut command = user.command("unshare");
        let line = format!(
            "set -e; {line}\nexec countersign doctor --output json --config {}",
            config.display()
        );
        command.args([namespaces, "sh", "-c", &line]);
        command
    };
    let mount = format!("mount -t tmpfs -o size=1m none {}", room.display());
    let empty = after(&patient.user, "-m", &mount, &audit);
    finish(empty).await.expect(0);
    let fill = format!(
        "{mount}; head -c 1020000 /dev/zero > {}/fill",
        room.display()
    );
    let finished = finish(after(&patient.user, "-m", &fill, &audit)).await;
    patient.found(&finished, "audit_disk_full", "room/audit.jsonl");

    let unmount = "for at in $(awk '$0 ~ / - cgroup2 /{print $5}' /proc/self/mountinfo); do umount -l $at; done";
    let finished = finish(after(&patient.user, "-m", unmount, &patient.config())).await;
    patient.found(&finished, "kernel_without_cgroup2", "cgroup-v2");

    let mut lacking = patient.user.command("setpriv");
    lacking.args(["--bounding-set=-sys_ptrace", "countersign", "doctor"]);
    lacking.args(["--output", "json", "--config"]);
    lacking.arg(patient.config());
    let finished = finish(lacking).await;
    patient.found(
        &finished,
        "callers_hidden",
        "the agent lacks CAP_SYS_PTRACE:",
    );

    // In a network of its own there is no server, so none is configured.
    let lonely = "{version: 1, listeners: [{name: workloads, type: forward_proxy, bind: \"127.0.0.1:7523\"}], credentials: [], destinations: [], attestors: {unix: {}}, unmatched: tunnel, policies: {directory: lonely}, audit: {sinks: [{type: file, path: audit.jsonl}]}}";
    let tunnels = "@id(\"tunnels\") permit (principal, action == Action::\"connect\", resource == Destination::\"unmatched\") when { principal has unix && principal.unix.uid == 7 };";
    patient.world.write("lonely.yaml", lonely);
    std::fs::create_dir(patient.world.path("lonely")).unwrap();
    patient.world.write("lonely/all.cedar", tunnels);
    let config = patient.world.path("lonely.yaml");
    let set = |value: u8| {
        format!("ip link set lo up; echo {value} > /proc/sys/net/ipv4/conf/all/route_localnet")
    };
    finish(after(&patient.user, "-n", &set(0), &config))
        .await
        .expect(0);
    let finished = finish(after(&patient.user, "-n", &set(1), &config)).await;
    patient.found(
        &finished,
        "route_localnet",
        "`workloads` listens on loopback",
    );
    patient.healthy().await;
    patient.found_all("doctor_faults_by_root", BY_ROOT);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_running_agent_are_named() {
    let mut patient = Patient::start().await;
    patient.healthy().await;
    let config = patient.config();
    let finished = finish(patient.command(&config, &["--agent", "unix:/nonexistent"])).await;
    patient.found(&finished, "agent_unreachable", "no such socket");
    // A socket that an agent left when it was killed.
    let left = patient.world.path("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    let api = "unix:{directory}/api.sock";
    patient
        .finds_in(
            api,
            "unix:{directory}/left.sock",
            "agent_unreachable",
            "nobody listens",
        )
        .await;

    let good = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{good}nonsense: 1\n")).unwrap();
    patient.world.app().reload().await.unwrap_err();
    std::fs::write(&config, &good).unwrap();
    let finished = finish(patient.command(&config, &[])).await;
    patient.found(&finished, "reload_failed", "nonsense");
    patient.world.app().reload().await.unwrap();
    patient.healthy().await;

    // Nothing fits on this device.
    let mut broken = Patient::of(World::servers().await, "/dev/full").await;
    let at = |patient: &Patient| patient.command(&patient.config(), &[]);
    eventually(Duration::from_secs(60), || {
        let not_ready = broken.world.app().agent().not_ready();
        async move { (!not_ready.is_empty()).then_some(()) }
    })
    .await;
    let finished = finish(at(&broken)).await;
    broken.found(
        &finished,
        "agent_not_ready",
        "audit records cannot be written",
    );
    patient.seen.extend(broken.seen);
    patient.found_all("doctor_faults_of_the_agent", AT_THE_AGENT);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_environment_are_named() {
    let mut patient = Patient::start().await;
    patient.healthy().await;
    let config = patient.config();
    let proxy = patient.world.proxy();
    let bundle = patient.world.path("bundle.pem").display().to_string();
    let servers = patient.world.path("servers.pem").display().to_string();
    let closed = SocketAddr::from(([127, 0, 0, 1], 1));
    let right = [("HTTPS_PROXY", proxy.as_str()), ("SSL_CERT_FILE", &bundle)];
    let under = |patient: &Patient, variables: Variables<'_>| {
        let mut command = patient.command(&config, &[]);
        command.envs(variables.iter().copied());
        finish(command)
    };
    let report = under(&patient, &right).await.expect(0).json();
    let checked = report["checked"].as_array().unwrap();
    assert!(
        checked.contains(&"this environment's clients".into()),
        "{report:#}"
    );

    let elsewhere = format!("http://{closed}");
    let rows: &[(Variables<'_>, &str, &str)] = &[
        (
            &[("SSL_CERT_FILE", &servers)],
            "root_not_trusted",
            "`SSL_CERT_FILE`",
        ),
        (
            &[("SSL_CERT_FILE", "")],
            "root_not_trusted",
            "no variable names",
        ),
        (
            &[("NODE_EXTRA_CA_CERTS", "/nonexistent.pem")],
            "root_not_trusted",
            "/nonexistent.pem",
        ),
        (
            &[("NO_PROXY", "localhost,.example.test")],
            "no_proxy_excludes_destination",
            "`.example.test` in `NO_PROXY`",
        ),
        (
            &[("no_proxy", "*")],
            "no_proxy_excludes_destination",
            "`no_proxy`",
        ),
        (
            &[("NO_PROXY", "plain.example.test")],
            "no_proxy_excludes_destination",
            "`plain.example.test`",
        ),
        (
            &[("HTTPS_PROXY", &elsewhere)],
            "proxy_unreachable",
            "`HTTPS_PROXY`",
        ),
        (
            &[("http_proxy", "no url")],
            "proxy_unreachable",
            "`http_proxy`",
        ),
    ];
    for (variables, code, says) in rows {
        let variables = [&right[..], variables].concat();
        let finished = under(&patient, &variables).await;
        patient.found(&finished, code, says);
    }
    reached("doctor_environments", rows.len());

    // As `exec` sets it, it is right.
    let agent = format!("unix:{}", patient.world.path("api.sock").display());
    let config = config.display().to_string();
    let line = [
        "exec",
        "--agent",
        &agent,
        "--",
        "countersign",
        "doctor",
        "--config",
        &config,
    ];
    let finished = finish(patient.user.countersign(&line)).await.expect(0);
    assert!(
        finished.out.contains("this environment's clients\n"),
        "{finished:#?}"
    );
    assert!(
        finished.out.ends_with("nothing is wrong\n"),
        "{finished:#?}"
    );
    patient.healthy().await;
    patient.found_all("doctor_faults_of_the_environment", IN_THE_ENVIRONMENT);
}

#[tokio::test]
async fn the_agent_that_runs_is_found_and_examined() {
    let user = User::new();
    // There is nothing to look at.
    let alone = user.run(&["doctor"]).await.expect(1);
    assert!(
        alone.out.contains("error: agent_unreachable\n"),
        "{alone:#?}"
    );
    assert!(
        alone
            .out
            .contains("not checked  configuration and policies: "),
        "{alone:#?}"
    );

    let dev = Dev::in_text(&user).await;
    let well = user.run(&["doctor"]).await.expect(0);
    assert!(well.out.ends_with("nothing is wrong\n"), "{well:#?}");
    assert!(
        well.out
            .contains("checked      configuration and policies, "),
        "{well:#?}"
    );

    let policies = user.path("countersign-dev/policies/orders.cedar");
    let good = std::fs::read_to_string(&policies).unwrap();
    std::fs::write(
        &policies,
        good.replace("context.request.safe", "context.request.method == \"get\""),
    )
    .unwrap();
    let finished = user.run(&["doctor"]).await.expect(1);
    for said in [
        "error: policy_never_matches\n",
        "policy `orders-read` at `",
        "error: credential_never_permitted\n",
        "  next: ",
        "errors: 2, warnings: 0\n",
    ] {
        assert!(finished.out.contains(said), "{said}: {finished:#?}");
    }
    dev.interrupt().await;
}
