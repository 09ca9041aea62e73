//! `countersign exec` against an agent that runs: what the command is given, and how it ends.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::program::{User, finish, send};
use crate::support::counts::reached;
use crate::support::has_program;
use crate::support::puppet::copy_program;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World, assert_issued};

const API: &str = "https://orders.example.test/v1/orders";

/// An agent that runs, with a workload API, and a user of it.
pub struct Running {
    pub world: World,
    pub user: User,
    /// What stands behind `--agent`.
    pub agent: String,
}

impl Running {
    /// With the usual policies and `more`.
    pub async fn with(more: &str) -> Self {
        let mut world = World::servers().await;
        let listener = "listeners:\n  - {name: api, type: workload_api, bind: \"unix:{directory}/api.sock\", access: {mode: \"0666\"}}\n";
        let configuration = format!("{COMMON}{DESTINATIONS}").replacen("listeners:\n", listener, 1);
        world
            .start_agent(&configuration, &format!("{POLICIES}{more}"))
            .await;
        let agent = format!("unix:{}", world.path("api.sock").display());
        Self {
            world,
            user: User::new(),
            agent,
        }
    }

    /// `countersign exec --agent AGENT -- COMMAND`.
    fn exec(&self, command: &[&str]) -> tokio::process::Command {
        let line = [&["exec", "--agent", &self.agent, "--"], command].concat();
        let mut command = self.user.countersign(&line);
        // A group of its own: what a terminal sends to ours is not meant.
        command.process_group(0);
        command
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_go_through_the_agent_unmodified() {
    let running = Running::with("").await;
    let curl = ["curl", "-sS", "--fail", API];
    let answer = finish(running.exec(&curl)).await.expect(0);
    assert_eq!(answer.json()["verified"]["scope"], "orders.read");
    // In clear, by the lower-case variable that curl reads.
    let curl = [
        "curl",
        "-sS",
        "--fail",
        "http://plain.example.test/v1/orders",
    ];
    finish(running.exec(&curl)).await.expect(0);
    let mut through = 2;
    if has_program("clients_go_through_the_agent_unmodified", "python3") {
        let program = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())";
        let python = ["python3", "-c", program, API];
        let answer = finish(running.exec(&python)).await.expect(0);
        assert_eq!(answer.json()["verified"]["scope"], "orders.read");
        through += 1;
    }
    // The caller that policy sees is the command, not `countersign`.
    let requests = running.world.audited_requests().await;
    assert_eq!(requests.len(), through);
    let caller = requests[0]["workload"].to_string();
    assert!(!caller.contains("countersign"), "{caller}");
    for seen in running.world.api.seen() {
        assert_issued(&running.world, &seen);
    }
    reached("exec_clients", through);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_is_the_commands() {
    let running = Running::with("").await;
    let not_executable = running.user.write("not-executable", "#!/bin/sh\n");
    let not_executable = not_executable.display().to_string();
    let rows: &[(&[&str], i32)] = &[
        (&["true"], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "exit 77"], 77),
        (&["sh", "-c", "exit 255"], 255),
        (&["sh", "-c", "kill -KILL $$"], 128 + 9),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        // A child that it leaves behind does not change it.
        (&["sh", "-c", "(sleep 0.2; exit 3) & exit 5"], 5),
        (&["no-such-program-anywhere"], 127),
        (&[&not_executable], 126),
    ];
    for (command, code) in rows {
        let finished = finish(running.exec(command)).await;
        assert_eq!(finished.code, *code, "{command:?}: {finished:#?}");
    }
    reached("exit_codes", rows.len());

    // Arguments arrive as they are, and the streams are the command's.
    let mut command = running.exec(&[
        "sh",
        "-c",
        "cat; printf '%s|' \"$@\"",
        "sh",
        "a b",
        "--config",
        "",
    ]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"in|")
        .await
        .unwrap();
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "in|a b|--config||");
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_the_command() {
    let running = Running::with("").await;
    let rows = [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
    ];
    for (signal, name) in rows {
        let script = format!("trap 'exit 41' {name}; echo ready; while :; do sleep 0.05; done");
        // A shell that starts the tests in the background has them ignore two of these.
        let mut command = running.user.command("env");
        command.args(["--default-signal", "countersign", "exec", "--agent"]);
        command.args([&running.agent, "--", "sh", "-c", &script]);
        let mut child = command.process_group(0).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));
        send(child.id().unwrap(), signal);
        let status = tokio::time::timeout(Duration::from_secs(30), child.wait())
            .await
            .unwrap_or_else(|_| panic!("SIG{name} did not reach the command"))
            .unwrap();
        assert_eq!(status.code(), Some(41), "SIG{name}");
    }
    reached("signals", rows.len());

    // What it was started to ignore does not reach it.
    let script = "echo ready; read _; exit 42";
    let mut command = running.user.command("nohup");
    command.args(["countersign", "exec", "--agent", &running.agent, "--"]);
    command.args(["sh", "-c", script]).stdin(Stdio::piped());
    let mut child = command.process_group(0).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));
    send(child.id().unwrap(), Signal::SIGHUP);
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(child.stdin.take());
    assert_eq!(child.wait().await.unwrap().code(), Some(42));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_would_go_direct_is_not_started() {
    let running = Running::with("").await;
    // A runtime that says its version, and otherwise leaves a mark of having run.
    let node = |version: &str| {
        let content = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && echo {version} && exit 0\ntouch {}\n",
            running.user.path("ran").display()
        );
        let written = running.user.write("bin/written", &content);
        for name in ["bin/node", "bin/nodejs"] {
            copy_program(&written, &running.user.path(name), "");
        }
    };
    let written = running.user.write("written", "#!/usr/bin/env node\n");
    let tool = running.user.path("tool");
    copy_program(&written, &tool, "");
    let ran = || std::fs::remove_file(running.user.path("ran")).is_ok();
    let path = format!(
        "{}:{}",
        running.user.path("bin").display(),
        std::env::var("PATH").unwrap()
    );
    let (by_path, tool) = (
        running.user.path("bin/node").display().to_string(),
        tool.display().to_string(),
    );
    let commands: [&[&str]; 4] = [
        &[&by_path, "x.js"],
        &["node", "x.js"],
        &["nodejs", "x.js"],
        &[&tool],
    ];
    let exec = |command: &[&str]| {
        let mut command = running.exec(command);
        command.env("PATH", &path);
        finish(command)
    };
    let mut refused = 0;
    for version in ["v18.20.4", "v20.20.2", "v22.20.0", "v23.11.1"] {
        node(version);
        for command in commands {
            let finished = exec(command).await.expect(69);
            assert!(
                finished.errors.contains("runtime_ignores_proxy"),
                "{finished:#?}"
            );
            assert!(finished.errors.contains(version), "{finished:#?}");
            assert!(!ran(), "{command:?} of {version}");
            refused += 1;
        }
    }
    for version in ["v22.21.0", "v24.1.0"] {
        node(version);
        for command in commands {
            exec(command).await.expect(0);
            assert!(ran(), "{command:?} of {version}");
        }
    }
    reached("runtimes_refused", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why() {
    let running = Running::with("").await;
    let user = &running.user;
    finish(running.exec(&["true"])).await.expect(0);
    let nowhere = ["exec", "--agent", "unix:/nowhere/api.sock", "--", "true"];
    let finished = user.run(&nowhere).await.expect(69);
    assert!(
        finished.errors.contains("no agent is reached"),
        "{finished:#?}"
    );
    let names = |text: &str| finished.errors.contains(text);
    assert!(
        names("workload_api") && names("--agent") && !names("--admin-socket"),
        "{finished:#?}"
    );
    user.run(&["exec", "--agent", "x", "--", "true"])
        .await
        .expect(64);
    user.run(&["exec", "--agent", &running.agent])
        .await
        .expect(64);
    user.run(&["exec", "--agent", &running.agent, "true"])
        .await
        .expect(64);
    user.write(
        "wrong.yaml",
        "version: 1\nlisteners: []\ndestinatoins: []\n",
    );
    let wrong = user
        .run(&["exec", "--config", "wrong.yaml", "--", "true"])
        .await
        .expect(78);
    assert!(wrong.errors.contains("wrong.yaml:3"), "{wrong:#?}");
    // The audit may not be mixed into the command's output.
    let config = std::fs::read_to_string(running.world.path("countersign.yaml")).unwrap();
    let to_stdout = config.replace("{type: file, path: audit.jsonl}", "{type: stdout}");
    let path = running.world.path("to-stdout.yaml");
    std::fs::write(&path, to_stdout).unwrap();
    let path = path.display().to_string();
    let finished = user
        .run(&["exec", "--config", &path, "--", "true"])
        .await
        .expect(78);
    assert!(finished.errors.contains("audit.sinks"), "{finished:#?}");
    finish(running.exec(&["true"])).await.expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoami_says_how_the_agent_sees_the_caller_and_by_which_evidence() {
    let running = Running::with("").await;
    let uid = nix::unistd::getuid();
    let text = running
        .user
        .run(&["whoami", "--agent", &running.agent])
        .await
        .expect(0)
        .out;
    assert!(text.starts_with(&format!("uid {uid}")), "{text}");
    assert!(text.contains("\n  seen by      "), "{text}");
    assert!(text.contains(&format!("\n  unix.uid = {uid}\n")), "{text}");
    assert!(text.contains("/countersign\n"), "the executable: {text}");
    // By the variable, and for programs.
    let mut command = running.user.countersign(&["whoami", "--output", "json"]);
    command.env("COUNTERSIGN_AGENT", &running.agent);
    let who: Value = finish(command).await.expect(0).json();
    assert_eq!(who["attributes"]["unix"]["uid"], uid.as_raw());
    assert!(!who["evidence"].as_array().unwrap().is_empty(), "{who}");
    assert_eq!(who["failed_attestors"], serde_json::json!([]));
    assert_eq!(who["attributes"].as_object().unwrap().len(), 1, "{who}");

    // With a token, what it proves stands beside that.
    let claims = serde_json::json!({"repository": "acme/orders"});
    let hour = Duration::from_secs(3600);
    let token = running
        .world
        .issuer
        .mint("job-1", "countersign", hour, &claims)
        .unwrap();
    let file = running.user.write("token", &token).display().to_string();
    let line = ["whoami", "--agent", &running.agent, "--token-file", &file];
    let text = running.user.run(&line).await.expect(0).out;
    assert!(text.contains("\n  ci.repository = acme/orders\n"), "{text}");
    assert!(text.contains("\n  until        "), "{text}");
    // A token that proves nothing is named as such, and never echoed.
    let expired = running
        .world
        .issuer
        .mint("job-1", "elsewhere", hour, &claims)
        .unwrap();
    running.user.write("token", &expired);
    let text = running.user.run(&line).await.expect(0).out;
    assert!(text.contains("\n  failed       "), "{text}");
    assert!(
        !text.contains("ci.repository") && !text.contains(&expired),
        "{text}"
    );
}
