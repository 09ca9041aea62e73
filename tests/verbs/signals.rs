//! `countersign run` and the signals that it obeys.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::net::UnixStream;

use crate::program::{User, send};
use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::raw::{Response, exchange};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World, audit_lines};

const SOON: Duration = Duration::from_secs(30);

/// How many events of this name are in the audit.
fn events(audit: &Path, name: &str) -> usize {
    let text = std::fs::read_to_string(audit).unwrap_or_default();
    // The last line may not be whole yet.
    let member = format!("\"event\":\"{name}\"");
    text.lines().filter(|line| line.contains(&member)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_logs_the_warnings_of_its_configuration() {
    let world = World::servers().await;
    let user = User::new();
    let common = COMMON.replace(
        "{source: generated, state_directory: ca}",
        "{source: files, certificate_file: own.pem, key_file: own.key}",
    );
    world.write(
        "countersign.yaml",
        &world.fill(&format!("{common}{DESTINATIONS}")),
    );
    world.write_policies(POLICIES);
    std::fs::set_permissions(world.path("client.key"), PermissionsExt::from_mode(0o640)).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut expired = rcgen::CertificateParams::default();
    expired.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    expired.not_before = time::OffsetDateTime::from_unix_timestamp(1_000_000_000).unwrap();
    expired.not_after = time::OffsetDateTime::from_unix_timestamp(1_100_000_000).unwrap();
    world.write("own.pem", &expired.self_signed(&key).unwrap().pem());
    world.write("own.key", &key.serialize_pem());
    let configuration = world.path("countersign.yaml").display().to_string();
    let agent = user
        .countersign(&["run", "--config", &configuration])
        .spawn()
        .unwrap();
    eventually(SOON, || async {
        UnixStream::connect(world.path("proxy.sock")).await.ok()
    })
    .await;
    send(agent.id().unwrap(), Signal::SIGTERM);
    let output = tokio::time::timeout(SOON, agent.wait_with_output()).await;
    let output = output.expect("the agent ends").unwrap();
    assert_eq!(output.status.code(), Some(0));
    let log = String::from_utf8_lossy(&output.stderr);
    for code in ["secret_file_open_to_others", "certificate_expired"] {
        assert!(log.contains(code), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_reloads_and_what_is_broken_changes_nothing() {
    let world = World::servers().await;
    let user = User::new();
    let path = |name: &str| world.path(name).display().to_string();
    world.write(
        "countersign.yaml",
        &world.fill(&format!("{COMMON}{DESTINATIONS}")),
    );
    world.write_policies(POLICIES);
    let mut agent = user
        .countersign(&["run", "--config", &path("countersign.yaml")])
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .unwrap();
    let pid = agent.id().unwrap();
    let audit = world.path("audit.jsonl");
    let ask = || async {
        let mut io = eventually(SOON, || async {
            UnixStream::connect(world.path("proxy.sock")).await.ok()
        })
        .await;
        let request =
            "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
        let answer: Response = exchange(&mut io, request).await;
        (answer.status, answer.code())
    };
    let served = || async {
        let before = world.plain_api.seen().len();
        assert_eq!(ask().await.0, 200);
        assert_eq!(world.plain_api.seen().len(), before + 1);
    };
    let has_more_than = |name: &'static str, before: usize| {
        let audit = audit.clone();
        eventually(SOON, move || {
            let more = events(&audit, name) > before;
            async move { more.then_some(()) }
        })
    };
    served().await;
    let mut hangups = 0;

    // Nothing has changed: only the signal makes it load again.
    assert_eq!(events(&audit, "reload"), 0);
    send(pid, Signal::SIGHUP);
    has_more_than("reload", 0).await;
    hangups += 1;
    served().await;

    // What is broken is noticed by itself; the signal says no more, and the last good one is in force.
    world.write_policies("permit (principal");
    has_more_than("reload_failed", 0).await;
    let failed = events(&audit, "reload_failed");
    send(pid, Signal::SIGHUP);
    has_more_than("reload_failed", failed).await;
    hangups += 1;
    served().await;

    world.write_policies("@id(\"none\")\nforbid (principal, action, resource);");
    send(pid, Signal::SIGHUP);
    eventually(SOON, || async {
        (ask().await == (403, "policy_denied".to_owned())).then_some(())
    })
    .await;
    hangups += 1;
    world.write_policies(POLICIES);
    send(pid, Signal::SIGHUP);
    eventually(SOON, || async { (ask().await.0 == 200).then_some(()) }).await;
    served().await;

    send(pid, Signal::SIGTERM);
    let status = tokio::time::timeout(SOON, agent.wait()).await;
    assert_eq!(status.expect("the agent ends").unwrap().code(), Some(0));
    assert_eq!(audit_lines(&audit).pop().unwrap()["event"], "stop");
    user.run(&["audit", "verify", &path("audit.jsonl")])
        .await
        .expect(0);
    reached("hangups", hangups);
}
