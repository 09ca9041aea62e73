//! T1: a caller that is gone when it is looked at, and whose number another process has got.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;

use crate::support::agent::Agent;
use crate::support::counts::reached;
use crate::support::puppet::{ARGUMENTS, Puppet, copy_program, program};
use crate::support::raw::exchange;
use crate::support::world::DESTINATIONS;
use crate::support::{NOBODY, has_program, is_root};

/// How many callers go, by each kind of socket.
const GONE: usize = 10;

/// Root, and one program of `nobody`'s.
const POLICIES: &str = r#"
@id("root")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };
@id("permitted")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == 65534 && principal.unix has executable && principal.unix.executable == "{permitted}" };
"#;

const REQUEST: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

/// Connects and exits; its child sends the request, and prints the answer.
const CALLER: &str = r#"
import os, socket, sys
target, request = sys.argv[1:]
if target.startswith("/"):
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(target)
else:
    host, port = target.split(":")
    caller = socket.create_connection((host, int(port)))
if os.fork():
    os._exit(0)
caller.settimeout(60)
caller.sendall(request.encode())
sys.stdout.write(caller.recv(65536).decode())
"#;

/// A caller that has connected and is gone, but for its child.
fn gone(target: &str) -> Child {
    let mut caller = Command::new("python3")
        .args(["-c", CALLER, target, REQUEST])
        .uid(NOBODY)
        .gid(NOBODY)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(caller.wait().unwrap().success());
    caller
}

/// The permitted program as the process that has `pid`; `None` where others keep getting the number.
async fn as_process(pid: u32, permitted: &str, target: &str) -> Option<Puppet> {
    for _ in 0..20 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let mut command = tokio::process::Command::new(permitted);
        command.args(ARGUMENTS);
        let puppet = Puppet::start_by(command, target, Some(NOBODY)).await;
        if puppet.pid() == pid {
            return Some(puppet);
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn t01_a_process_that_got_the_number_of_one_that_is_gone_is_not_taken_for_it() {
    let test = "t01_a_process_that_got_the_number_of_one_that_is_gone_is_not_taken_for_it";
    if !is_root(test) || !has_program(test, "python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), mode).unwrap();
    let permitted = directory.path().join("permitted");
    copy_program(program(), &permitted, "");
    let permitted = permitted.to_str().unwrap();
    let policies = POLICIES.replace("{permitted}", permitted);
    let agent = Agent::start(None, DESTINATIONS, &policies).await;
    agent.good(None).await;

    // Nobody is looked at before all of them are gone and their numbers are others'.
    let socket = agent.world.path("proxy.sock");
    let socket = socket.to_str().unwrap();
    agent.signal(Signal::SIGSTOP);
    let callers: Vec<Child> = [socket, &agent.address]
        .into_iter()
        .flat_map(|target| std::iter::repeat_n(target, GONE))
        .map(gone)
        .collect();
    let mut successors = Vec::new();
    // From the last: a process takes the numbers behind its own for its threads.
    for caller in callers.iter().rev() {
        successors.extend(as_process(caller.id(), permitted, &agent.address).await);
    }
    agent.signal(Signal::SIGCONT);
    for caller in callers {
        let mut answer = String::new();
        let mut stdout = caller.stdout.unwrap();
        stdout.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    }
    assert!(agent.world.plain_api.seen().is_empty());
    // Those who live are served as themselves.
    for successor in &successors {
        let mut io = successor.connect().await;
        exchange(&mut io, REQUEST).await.expect(200);
    }
    assert_eq!(agent.world.plain_api.seen().len(), successors.len());
    agent.good(None).await;
    reached("reused_numbers", successors.len());
}
