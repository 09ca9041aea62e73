//! What an agent takes from itself when it starts, looked at from outside: what the kernel says of its
//! threads, what another process of its user gets of it, and what it can no longer open.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use countersign_attestors::hexadecimal;
use futures_util::future::join_all;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::support::agent::{Agent, give};
use crate::support::collector::{Collector, Manner};
use crate::support::counts::reached;
use crate::support::curl::{curl, curl_as};
use crate::support::name_server::{Addresses, with_name_server};
use crate::support::world::{DESTINATIONS, POLICIES, World};
use crate::support::{NOBODY, eventually, has_program, is_root, unprivileged};

const ORDERS: &str = "https://orders.example.test/v1/orders";
const BILLING: &str = "http://plain.example.test/v1/orders";

/// capabilities(7), by their numbers.
const SYS_PTRACE: u64 = 1 << 19;
const DAC_READ_SEARCH: u64 = 1 << 2;

/// Looks at a process with all that its user has for that, and at what it finds for a text.
const PROBE: &str = r#"
import ctypes, json, os, sys
pid, wanted = int(sys.argv[1]), sys.stdin.buffer.read()
libc = ctypes.CDLL(None, use_errno=True)
refused, found, read = {}, [], 0

def attempt(name, result):
    if result < 0:
        refused[name] = os.strerror(ctypes.get_errno())
    return result >= 0

PTRACE_ATTACH, PTRACE_DETACH = 16, 17
if attempt("ptrace", libc.ptrace(PTRACE_ATTACH, pid, None, None)):
    os.waitpid(pid, 0x40000000)
    libc.ptrace(PTRACE_DETACH, pid, None, None)

class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
own = ctypes.create_string_buffer(8)
local = IoVec(ctypes.cast(own, ctypes.c_void_p).value, 8)
attempt("process_vm_readv", libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(local), 1, 0))
pidfd = libc.syscall(434, pid, 0)
attempt("pidfd_getfd", libc.syscall(438, pidfd, 0, 0))

def look(path, data):
    global read
    read += len(data)
    if wanted in data:
        found.append(path)

for name in os.listdir("/proc/%d" % pid):
    path = "/proc/%d/%s" % (pid, name)
    try:
        if name == "mem":
            ranges = [line.split() for line in open("/proc/%d/maps" % pid)]
            with open(path, "rb", buffering=0) as memory:
                for range in ranges:
                    if not range[1].startswith("rw"):
                        continue
                    start, end = (int(part, 16) for part in range[0].split("-"))
                    try:
                        memory.seek(start)
                        look(path, memory.read(end - start))
                    except (OSError, OverflowError, ValueError):
                        pass
        elif name in ("fd", "map_files", "fdinfo"):
            for entry in os.listdir(path):
                os.readlink(path + "/" + entry) if name != "fdinfo" else open(path + "/" + entry).read()
        elif os.path.isfile(path) and name not in ("clear_refs",):
            with open(path, "rb", buffering=0) as file:
                look(path, file.read(1 << 20) or b"")
    except OSError as error:
        refused[name] = error.strerror
print(json.dumps({"refused": refused, "found": found, "read": read}))
"#;

/// A process that holds a text, and keeps nothing from anybody.
const HOLDER: &str =
    "import sys, time\nheld = sys.stdin.readline()\nprint(flush=True)\ntime.sleep(600)";

/// A configuration that names what the agent may not use since its start: the one that is in force
/// stays in force.
async fn refuses(agent: &Agent, named: &str) {
    let answer = agent.admin("POST", "/v1/reload").await.expect(422);
    let first = &answer.json()["diagnostics"][0];
    assert_eq!(first["code"], "restart_needed", "{answer:#?}");
    assert!(
        first["message"].as_str().unwrap().contains(named),
        "{first}"
    );
    assert!(
        first["next"].as_str().unwrap().contains("restart"),
        "{first}"
    );
    agent.good(None).await;
}

/// What a user's process gets of another process.
async fn probe(uid: Option<u32>, pid: u32, wanted: &str) -> Value {
    let mut command = python(PROBE, uid);
    let mut child = command.arg(pid.to_string()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(wanted.as_bytes()).await.unwrap();
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

fn python(program: &str, uid: Option<u32>) -> Command {
    let mut command = Command::new("python3");
    command
        .args(["-c", program])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    command
}

#[tokio::test]
async fn t13_another_process_of_the_user_gets_nothing_of_the_agents_memory() {
    let name = "t13_another_process_of_the_user_gets_nothing_of_the_agents_memory";
    if !has_program(name, "python3") {
        return;
    }
    let uid = unprivileged();
    let mut agent = Agent::start(uid, DESTINATIONS, POLICIES).await;
    let token = agent.good(uid).await;
    // The last part alone, so that no other text is taken for it.
    let canary = token.rsplit('.').next().unwrap();

    // The probe finds what is there to be found.
    let mut holder = python(HOLDER, uid).spawn().unwrap();
    let mut stdin = holder.stdin.take().unwrap();
    stdin
        .write_all(format!("{canary}\n").as_bytes())
        .await
        .unwrap();
    let holding = eventually(Duration::from_secs(30), || async {
        let seen = probe(uid, holder.id().unwrap(), canary).await;
        seen["found"]
            .as_array()
            .is_some_and(|found| !found.is_empty())
            .then_some(seen)
    })
    .await;
    assert_eq!(holding["refused"].get("ptrace"), None, "{holding}");

    let seen = probe(uid, agent.pid(), canary).await;
    assert_eq!(seen["found"], Value::Array(Vec::new()), "{seen}");
    for attempt in [
        "ptrace",
        "process_vm_readv",
        "pidfd_getfd",
        "mem",
        "environ",
        "maps",
        "fd",
    ] {
        assert!(seen["refused"][attempt].is_string(), "{attempt}: {seen}");
    }
    assert!(seen["read"].as_u64().unwrap() > 0, "{seen}");
    let owner = std::fs::metadata(format!("/proc/{}/environ", agent.pid()))
        .unwrap()
        .uid();
    assert_eq!(owner, 0, "what is not dumpable belongs to root");

    // Nor is it in a core file: not even where one may be written.
    let mut aborted = Command::new("sh");
    aborted
        .args(["-c", "ulimit -c unlimited; kill -ABRT $$"])
        .current_dir(agent.working_directory.path());
    if let Some(uid) = uid {
        aborted.uid(uid).gid(uid);
    }
    assert!(
        aborted.status().await.unwrap().core_dumped(),
        "cores are written here"
    );
    let before = files_in(agent.working_directory.path());
    let status = agent.end(Signal::SIGABRT).await;
    assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "{status}");
    assert!(!status.core_dumped(), "{status}");
    assert_eq!(files_in(agent.working_directory.path()), before);
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

/// The lines of a thread's `status` that say what it may do.
fn threads(pid: u32) -> Vec<(String, BTreeMap<String, u64>)> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let Ok(text) = std::fs::read_to_string(entry.unwrap().path().join("status")) else {
            // It ended meanwhile.
            continue;
        };
        let lines: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once(":\t"))
            .collect();
        let numbers = [
            "NoNewPrivs",
            "Seccomp",
            "CapInh",
            "CapPrm",
            "CapEff",
            "CapBnd",
            "CapAmb",
        ];
        let numbers = numbers.map(|name| {
            (
                name.to_owned(),
                u64::from_str_radix(lines[name].trim(), 16).unwrap(),
            )
        });
        threads.push((lines["Name"].to_owned(), BTreeMap::from(numbers)));
    }
    threads
}

/// Callers of two users, by what the kernel says of them alone.
const ATTESTED: &str = r#"
@id("by-executable")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && [0, 65534].contains(principal.unix.uid)
    && principal.unix has executable && principal.unix.executable == "{curl}"
    && principal.unix has executable_sha256 && principal.unix.executable_sha256 == "{sha256}" };
"#;

#[tokio::test]
async fn no_thread_keeps_what_it_does_not_need_and_callers_are_attested_all_the_same() {
    if !is_root("no_thread_keeps_what_it_does_not_need_and_callers_are_attested_all_the_same") {
        return;
    }
    let curl = std::env::split_paths("/usr/local/bin:/usr/bin:/bin")
        .map(|directory| directory.join("curl"))
        .find(|path| path.is_file())
        .unwrap();
    let digest =
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &std::fs::read(&curl).unwrap());
    let policies = ATTESTED
        .replace("{sha256}", &hexadecimal(digest.as_ref()))
        .replace("{curl}", curl.to_str().unwrap());
    let agent = Agent::start(None, DESTINATIONS, &policies).await;
    for uid in [None, Some(NOBODY)] {
        agent.good(uid).await;
    }
    // The same over the Unix socket, as a gateway of it.
    let socket = agent.world.path("gateway.sock");
    for uid in [None, Some(NOBODY)] {
        let socket = socket.to_str().unwrap();
        curl_as(uid, &["--unix-socket", socket, "http://gateway/v1/orders"])
            .await
            .expect(200);
    }

    let threads = threads(agent.pid());
    let mut kinds = BTreeMap::new();
    for (name, numbers) in &threads {
        let kind = name.split('-').next().unwrap().to_owned();
        let (observes, serves) = (kind == "observer" || kind == "maker", kind == "data");
        let kept = match (observes, serves) {
            (true, _) => SYS_PTRACE | DAC_READ_SEARCH,
            (_, true) => SYS_PTRACE,
            _ => 0,
        };
        *kinds.entry(kind).or_insert(0_usize) += 1;
        let expected = BTreeMap::from(
            [
                ("NoNewPrivs", 1),
                ("Seccomp", 2),
                ("CapInh", 0),
                ("CapPrm", kept),
                ("CapEff", kept),
                ("CapBnd", 0),
                ("CapAmb", 0),
            ]
            .map(|(name, number)| (name.to_owned(), number)),
        );
        assert_eq!(*numbers, expected, "{name}");
    }
    for kind in [
        "data",
        "maker",
        "observer",
        "control",
        "audit",
        "countersign",
    ] {
        assert!(kinds.contains_key(kind), "{kinds:?}");
    }
    reached("kinds_of_threads", kinds.len());

    // `status` says what the kernel says.
    let status = agent.admin("GET", "/v1/status").await.expect(200).json();
    let parts = status["hardening"].as_array().unwrap();
    for part in parts {
        assert_eq!(part["in_force"], true, "{part}");
        assert_eq!(part["missing"], Value::Null, "{part}");
        assert!(
            part["denies"]
                .as_str()
                .is_some_and(|denies| !denies.is_empty()),
            "{part}"
        );
    }
    reached("parts_of_status", parts.len());
}

#[test]
fn names_are_looked_up_by_threads_that_no_data_worker_made() {
    let name = "names_are_looked_up_by_threads_that_no_data_worker_made";
    with_name_server(name, names_beside_dead_ones);
}

/// What a thread gave away, those that it makes do not have either.
async fn names_beside_dead_ones(addresses: Addresses) {
    let world = World::servers().await;
    let api = world.plain_api.address();
    addresses.lock().unwrap().push(api.ip());
    let hosts: Vec<String> = ["dead", "live"]
        .iter()
        .flat_map(|kind| (0..8).map(move |number| format!("{kind}{number}.named.test")))
        .collect();
    let (dead, live) = hosts.split_at(8);
    let named = format!(
        r#"{DESTINATIONS}
  - name: named
    hosts: {hosts:?}
    ports: [{}]
    scheme: http
    credentials: [{{name: orders-api}}]
    allow_addresses: [127.0.0.0/8]
"#,
        api.port()
    );
    let agent = Agent::start_in(world, None, &named, POLICIES).await;
    let ask = async |host: &String| {
        let url = format!("http://{host}:{}/v1/orders", api.port());
        agent.curl(None, &url).await
    };
    // Each has a thread to itself.
    let dead = join_all(dead.iter().map(ask));
    let asked_beside_them = async {
        for host in live {
            ask(host).await.expect(200);
        }
        // The threads that look names up read the configuration, too.
        agent.admin("POST", "/v1/reload").await.expect(200);
        for (thread, may) in threads(agent.pid()) {
            let serves = thread.starts_with("control");
            assert!(!serves || may["CapEff"] == 0, "{thread}: {may:?}");
        }
    };
    let (dead, ()) = tokio::join!(dead, asked_beside_them);
    for answer in dead {
        assert_eq!(answer.code(), "upstream_timeout");
    }
}

#[tokio::test]
async fn an_agent_that_may_not_look_at_a_callers_processes_says_so() {
    if !is_root("an_agent_that_may_not_look_at_a_callers_processes_says_so") {
        return;
    }
    let agent = Agent::start(Some(NOBODY), DESTINATIONS, POLICIES).await;
    agent.good(Some(NOBODY)).await;
    let log = std::fs::read_to_string(agent.working_directory.path().join("log")).unwrap();
    let warned = "the agent lacks CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE: callers of other users are refused on TCP";
    assert_eq!(log.matches(warned).count(), 1, "{log}");

    let gateway = address_of(&agent, "gateway").await;
    let answer = curl_as(Some(1), &[&format!("http://{gateway}/v1/orders")])
        .await
        .expect(503);
    assert_eq!(answer.code(), "caller_hidden", "{answer:#?}");
    let problem = answer.json();
    let says = |member: &str, text: &str| problem[member].as_str().unwrap().contains(text);
    assert!(says("detail", "processes of user 1"), "{problem}");
    assert!(
        says("next", "CAP_SYS_PTRACE") && says("next", "Unix socket"),
        "{problem}"
    );
    let record: Value = eventually(Duration::from_secs(30), || async {
        let audit = std::fs::read_to_string(agent.world.path("audit.jsonl")).ok()?;
        let refused = audit.lines().find(|line| line.contains("caller_hidden"))?;
        serde_json::from_str(refused).ok()
    })
    .await;
    let internal = record["internal"].as_str().unwrap();
    assert!(internal.contains("processes of user 1"), "{record}");

    // What it says to do instead.
    let socket = agent.world.path("gateway.sock");
    let socket = socket.to_str().unwrap();
    curl_as(
        Some(1),
        &["--unix-socket", socket, "http://gateway/v1/orders"],
    )
    .await
    .expect(200);

    // `doctor` may look at all, and the agent may not.
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_countersign"));
    doctor
        .args(["doctor", "--output", "json", "--config"])
        .arg(agent.world.path("countersign.yaml"));
    let report: Value = serde_json::from_slice(&doctor.output().await.unwrap().stdout).unwrap();
    let found = report["findings"].as_array().unwrap();
    assert!(
        found
            .iter()
            .any(|finding| finding["code"] == "callers_hidden" && finding["detail"] == warned),
        "{report:#}"
    );
}

/// Where a listener of the agent's is.
async fn address_of(agent: &Agent, listener: &str) -> String {
    let status = agent.admin("GET", "/v1/status").await.expect(200).json();
    let listeners = status["listeners"].as_array().unwrap();
    let known = listeners.iter().find(|known| known["name"] == listener);
    known.unwrap()["bind"].as_str().unwrap().to_owned()
}

/// Beside the usual ones, a credential that is used by nobody yet.
const BILLED: &str = r#"
destinations:
  - name: orders
    hosts: [orders.example.test]
    paths: ["/v1/**"]
    credentials: [{name: orders-api}]
    ca_file: servers.pem
    connect_to: "{api}"
  - name: plain
    hosts: [plain.example.test]
    scheme: http
    paths: ["/v1/**"]
    credentials: [{name: billing-api}]
    connect_to: "{plain}"
"#;

const EVERYBODY: &str = r#"
@id("everybody")
permit (principal, action == Action::"inject", resource) when { principal has unix };
"#;

#[tokio::test]
async fn a_confined_agent_opens_and_writes_nothing_that_its_start_did_not_name() {
    let mut agent = Agent::start(None, BILLED, EVERYBODY).await;
    agent.good(None).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let (key, outside) = (
        agent.world.path("client.key"),
        elsewhere.path().join("client.key"),
    );
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::copy(&key, &outside).unwrap();
    std::fs::set_permissions(&outside, mode).unwrap();

    // The very same key, by a link that leads away: no open of it succeeds.
    let aside = agent.world.path("client.key.aside");
    std::fs::rename(&key, &aside).unwrap();
    symlink(&outside, &key).unwrap();
    let answer = agent.curl(None, BILLING).await;
    assert_eq!(answer.code(), "client_key_unavailable", "{answer:#?}");
    assert!(agent.world.plain_api.seen().is_empty());
    refuses(&agent, key.to_str().unwrap()).await;
    // The file itself is the agent's to read again.
    std::fs::remove_file(&key).unwrap();
    std::fs::rename(&aside, &key).unwrap();
    eventually(Duration::from_secs(30), || async {
        (agent.curl(None, BILLING).await.status == 200).then_some(())
    })
    .await;

    // A file that is read, one that is written, and a policy that is a link.
    let path = agent.world.path("countersign.yaml");
    let good = std::fs::read_to_string(&path).unwrap();
    let servers = elsewhere.path().join("servers.pem");
    std::fs::copy(agent.world.path("servers.pem"), &servers).unwrap();
    let audit = elsewhere.path().join("audit.jsonl");
    for (from, to, named) in [
        (
            "ca_file: servers.pem",
            format!("ca_file: {}", servers.display()),
            &servers,
        ),
        (
            "path: audit.jsonl",
            format!("path: {}", audit.display()),
            &audit,
        ),
    ] {
        std::fs::write(&path, good.replace(from, &to)).unwrap();
        refuses(&agent, named.to_str().unwrap()).await;
    }
    assert!(!audit.exists());
    std::fs::write(&path, &good).unwrap();
    let policy = elsewhere.path().join("more.cedar");
    std::fs::write(&policy, EVERYBODY.replace("everybody", "more")).unwrap();
    let link = agent.world.path("policies/more.cedar");
    symlink(&policy, &link).unwrap();
    agent.admin("POST", "/v1/reload").await.expect(422);
    agent.good(None).await;
    std::fs::remove_file(&link).unwrap();
    agent.admin("POST", "/v1/reload").await.expect(200);
    agent.good(None).await;

    // Each of them is nothing that another start would refuse.
    symlink(&policy, &link).unwrap();
    let named = good
        .replace(
            "ca_file: servers.pem",
            &format!("ca_file: {}", servers.display()),
        )
        .replace("path: audit.jsonl", &format!("path: {}", audit.display()));
    std::fs::write(&path, named).unwrap();
    agent.restart().await;
    agent.good(None).await;
    assert!(audit.exists());
}

/// Group and mode of a listener's socket.
fn group_and_mode(agent: &Agent, socket: &str) -> (u32, u32) {
    let file = std::fs::metadata(agent.world.path(socket)).unwrap();
    (file.gid(), file.mode() & 0o777)
}

/// Writes other access for sockets that are everybody's in `good`.
fn write_access(agent: &Agent, good: &str, sockets: &[(&str, &str)]) {
    let mut text = good.to_owned();
    for (socket, access) in sockets {
        let bind = format!("{socket}\"");
        let (before, after) = text.split_once(&bind).unwrap();
        let after = after.replacen("{mode: \"0666\"}", access, 1);
        text = format!("{before}{bind}{after}");
    }
    agent.world.write("countersign.yaml", &text);
}

#[tokio::test]
async fn a_reload_that_takes_a_capability_which_was_given_up_is_refused() {
    if !is_root("a_reload_that_takes_a_capability_which_was_given_up_is_refused") {
        return;
    }
    let group = nix::unistd::Group::from_gid(1.into()).unwrap().unwrap();
    let mut agent = Agent::start(None, DESTINATIONS, POLICIES).await;
    let good = std::fs::read_to_string(agent.world.path("countersign.yaml")).unwrap();
    let narrower = format!("{{mode: \"0660\", group: {}}}", group.name);

    write_access(&agent, &good, &[("proxy.sock", &narrower)]);
    refuses(&agent, "CAP_CHOWN").await;
    assert_eq!(group_and_mode(&agent, "proxy.sock"), (0, 0o666));
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if first.trim().parse::<u16>().unwrap() > 1 {
        let gateway = "{name: gateway, type: gateway, bind: \"127.0.0.1:";
        let low = good.replace(&format!("{gateway}0"), &format!("{gateway}1"));
        agent.world.write("countersign.yaml", &low);
        refuses(&agent, "CAP_NET_BIND_SERVICE").await;
    }

    // Another start keeps the capability: the group is given, and taken back.
    write_access(&agent, &good, &[("proxy.sock", &narrower)]);
    agent.restart().await;
    assert_eq!(group_and_mode(&agent, "proxy.sock"), (1, 0o660));
    write_access(&agent, &good, &[("gateway.sock", &narrower)]);
    agent.admin("POST", "/v1/reload").await.expect(200);
    assert_eq!(group_and_mode(&agent, "proxy.sock"), (0, 0o666));
    assert_eq!(group_and_mode(&agent, "gateway.sock"), (1, 0o660));
    agent.good(None).await;
}

#[tokio::test]
async fn a_reload_that_cannot_narrow_a_socket_fails_and_changes_none() {
    if !is_root("a_reload_that_cannot_narrow_a_socket_fails_and_changes_none") {
        return;
    }
    let group = nix::unistd::Group::from_gid(1.into()).unwrap().unwrap();
    let agent = Agent::start(Some(NOBODY), DESTINATIONS, POLICIES).await;
    let good = std::fs::read_to_string(agent.world.path("countersign.yaml")).unwrap();
    let sockets = ["proxy.sock", "gateway.sock"];
    // One to which the agent may not give files, and one that does not exist.
    for group in [&group.name, "no-such-group"] {
        let given = format!("{{mode: \"0660\", group: {group}}}");
        let access = [("proxy.sock", "{mode: \"0600\"}"), ("gateway.sock", &given)];
        write_access(&agent, &good, &access);
        let answer = agent.admin("POST", "/v1/reload").await.expect(422);
        let first = &answer.json()["diagnostics"][0];
        assert_eq!(first["code"], "socket_access_unusable", "{first}");
        let next = first["next"].as_str().unwrap();
        assert!(
            next.contains("name: local-gateway") && next.contains("access.group"),
            "{first}"
        );
        let status = agent.admin("GET", "/v1/status").await.expect(200).json();
        assert_eq!(status["last_reload"]["succeeded"], false, "{status}");
        for socket in sockets {
            assert_eq!(group_and_mode(&agent, socket), (NOBODY, 0o666), "{socket}");
        }
        agent.good(Some(NOBODY)).await;
    }
    let access = sockets.map(|socket| (socket, "{mode: \"0600\"}"));
    write_access(&agent, &good, &access);
    agent.admin("POST", "/v1/reload").await.expect(200);
    for socket in sockets {
        assert_eq!(group_and_mode(&agent, socket), (NOBODY, 0o600), "{socket}");
    }
}

#[tokio::test]
async fn root_keeps_what_it_takes_to_use_another_users_files() {
    if !is_root("root_keeps_what_it_takes_to_use_another_users_files") {
        return;
    }
    let mut agent = Agent::start(None, DESTINATIONS, POLICIES).await;
    let (read, write) = ("CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE");
    let give_only = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        give(path, NOBODY);
    };
    give_only(&agent.world.path("policies/all.cedar"), 0o600);
    agent.restart().await;
    keeps(&agent, &[read]).await;
    // As in a container, which has only the other one.
    agent.end(Signal::SIGTERM).await;
    let ended = agent
        .start_by("setpriv --bounding-set=-dac_read_search")
        .await;
    assert_eq!(ended, None);
    keeps(&agent, &[write]).await;
    // A file in a directory of root's, as logrotate makes one, and the whole directory.
    give_only(&agent.world.path("audit.jsonl"), 0o640);
    agent.restart().await;
    keeps(&agent, &[write, read]).await;
    give_only(agent.world.directory.path(), 0o700);
    agent.restart().await;
    keeps(&agent, &[write, read]).await;
}

/// What the threads that use files have kept. They serve with it, and reload.
async fn keeps(agent: &Agent, capabilities: &[&str]) {
    let status = agent.admin("GET", "/v1/status").await.expect(200).json();
    let parts = status["hardening"].as_array().unwrap();
    let privileges = parts.iter().find(|part| part["name"] == "privileges");
    let kept = &privileges.unwrap()["kept"]["others"];
    assert_eq!(*kept, json!(capabilities), "{status}");
    agent.admin("POST", "/v1/reload").await.expect(200);
    agent.good(None).await;
}

#[tokio::test]
async fn t12_no_secret_is_logged_recorded_counted_shown_or_answered() {
    let collector = Collector::start(None, Manner::Takes).await;
    let telemetry = format!(
        "telemetry: {{log: {{level: trace}}, traces: {{otlp: {{endpoint: \"http://{}\"}}}}}}\n",
        collector.address
    );
    let agent = Agent::start(None, &format!("{telemetry}{DESTINATIONS}"), POLICIES).await;
    let (proxy, root) = (
        format!("http://{}", agent.address),
        agent.world.path("ca.pem"),
    );
    let mint = |lifetime| {
        let claims = json!({"repository": "acme/orders"});
        agent
            .world
            .issuer
            .mint("job", "countersign", lifetime, &claims)
            .unwrap()
    };
    let valid = mint(Duration::from_secs(600));
    let forged = valid.replacen('.', ".x", 1);
    let (own, query) = ("own-token-4f1d", "query-4f1d");
    let bearer = |token: &str| format!("Proxy-Authorization: Bearer {token}");
    let password = format!("http://token:{valid}@{}", agent.address);
    let queried = format!("{ORDERS}?secret={query}");
    let elsewhere = format!("https://elsewhere.example.test/?secret={query}");
    let own_header = format!("Authorization: Bearer {own}");
    let requests: [(u16, &[&str]); 6] = [
        (200, &["--proxy", &proxy, ORDERS]),
        (
            200,
            &[
                "--proxy",
                &proxy,
                "--proxy-header",
                &bearer(&valid),
                &queried,
            ],
        ),
        (200, &["--proxy", &password, "-H", &own_header, ORDERS]),
        (
            200,
            &[
                "--proxy",
                &proxy,
                "--proxy-header",
                &bearer(&forged),
                &queried,
            ],
        ),
        (
            403,
            &[
                "--proxy",
                &proxy,
                "-X",
                "DELETE",
                "-H",
                &own_header,
                &queried,
            ],
        ),
        (0, &["--proxy", &proxy, "-H", &own_header, &elsewhere]),
    ];
    let mut shown = String::new();
    for (status, arguments) in requests {
        let mut all = vec!["--cacert", root.to_str().unwrap()];
        all.extend(arguments);
        let answer = curl(&all).await;
        assert_eq!(answer.status, status, "{arguments:?}: {answer:#?}");
        shown += &format!("{}\n{}\n{}\n", answer.heads, answer.body, answer.errors);
        if let Some(id) = answer.header("countersign-request-id") {
            shown += &agent.admin("GET", &format!("/v1/explain/{id}")).await.body;
        }
    }
    for path in ["/metrics", "/v1/status", "/v1/credentials"] {
        shown += &agent.admin("GET", path).await.expect(200).body;
    }
    let audited = eventually(Duration::from_secs(30), || async {
        let audited = std::fs::read_to_string(agent.world.path("audit.jsonl")).unwrap();
        (audited.matches("\"kind\":\"request\"").count() >= 5).then_some(audited)
    })
    .await;
    let logged = std::fs::read_to_string(agent.working_directory.path().join("log")).unwrap();
    let spans = eventually(Duration::from_secs(20), || async {
        // Text stands in protobuf as it is.
        let bodies =
            collector.look(|received| String::from_utf8_lossy(&received.body).into_owned());
        (collector.spans().len() > audited.matches("\"kind\":\"request\"").count())
            .then(|| bodies.concat())
    })
    .await;

    let signature = |token: &str| token.rsplit('.').next().unwrap().to_owned();
    let mut secrets = vec![signature(&valid), own.to_owned(), query.to_owned()];
    for seen in agent.world.api.seen() {
        secrets.push(signature(seen.headers["authorization"].to_str().unwrap()));
    }
    for received in agent.world.authorization_server.state().received() {
        secrets.extend(
            received
                .values("client_assertion")
                .iter()
                .map(|text| signature(text)),
        );
    }
    for key in ["client.key", "ca/root.key"] {
        let pem = std::fs::read_to_string(agent.world.path(key)).unwrap();
        secrets.push(pem.lines().nth(1).unwrap().to_owned());
    }
    // Each place says what it is there to say.
    for (place, text, says) in [
        ("the log", &logged, "token minted"),
        ("the audit", &audited, "\"token\":{\"sha256\""),
        ("spans", &spans, "countersign.credential"),
        ("answers", &shown, "countersign_token_requests_total"),
    ] {
        assert!(text.contains(says), "{place} does not say `{says}`: {text}");
        for secret in &secrets {
            assert!(
                secret.len() >= 10 && !text.contains(secret),
                "{place} says `{secret}`"
            );
        }
    }
    reached("secrets_not_said", secrets.len());
}
