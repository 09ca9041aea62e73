//! `countersign wait`: ready, not ready in time, and ready while it waits.

use std::time::Duration;

use crate::dev::Dev;
use crate::doctor::configuration;
use crate::exec::Running;
use crate::program::{User, finish};
use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::world::{POLICIES, World};

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_when_the_agent_is_ready_and_says_why_it_is_not() {
    let running = Running::with("").await;
    let ask = |timeout: &'static str| {
        let line = [
            "wait",
            "--agent",
            &running.agent,
            "--timeout",
            timeout,
            "--output",
            "json",
        ];
        let command = running.user.countersign(&line);
        async move { finish(command).await }
    };
    let ready = ask("30s").await.expect(0).json();
    assert_eq!(ready["ready"], true);
    assert_eq!(ready["agent"], running.agent);
    running.world.good().await;

    // Nobody is there, in two ways; an address that is none is a matter of the command line.
    let mut refused = 0;
    for address in ["unix:/nonexistent/api.sock", "127.0.0.1:1"] {
        let finished = running
            .user
            .run(&["wait", "--agent", address, "--timeout", "1s"])
            .await
            .expect(69);
        assert!(
            finished.errors.contains("no agent is reached"),
            "{finished:#?}"
        );
        assert!(finished.errors.contains("next: "), "{finished:#?}");
        refused += 1;
    }
    running
        .user
        .run(&["wait", "--agent", "nowhere"])
        .await
        .expect(64);
    running
        .user
        .run(&["wait", "--timeout", "1"])
        .await
        .expect(64);

    // An agent that refuses requests says why, and the caller is told. Nothing fits on this device.
    let mut broken = World::servers().await;
    broken
        .start_agent(&configuration("/dev/full"), POLICIES)
        .await;
    let not_ready = || {
        let reasons = broken.app().agent().not_ready();
        async move { (!reasons.is_empty()).then_some(()) }
    };
    eventually(Duration::from_secs(60), not_ready).await;
    let address = format!("unix:{}", broken.path("api.sock").display());
    let finished = running
        .user
        .run(&["wait", "--agent", &address, "--timeout", "10s"])
        .await
        .expect(69);
    assert!(
        finished.errors.contains("audit records cannot be written"),
        "{finished:#?}"
    );
    refused += 1;
    ask("30s").await.expect(0);
    running.world.good().await;
    reached("waits_in_vain", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_an_agent_that_is_not_there_yet() {
    let user = User::new();
    let mut waiting = user
        .countersign(&["wait", "--timeout", "2m"])
        .spawn()
        .unwrap();
    // It is still there after a while: nothing ended it.
    let early = tokio::time::timeout(Duration::from_millis(300), waiting.wait()).await;
    assert!(early.is_err(), "{early:?}");
    let dev = Dev::in_text(&user).await;
    let output = waiting.wait_with_output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let socket = user.path("countersign-dev/api.sock");
    assert_eq!(said, format!("ready: unix:{}\n", socket.display()));
    dev.interrupt().await;
    user.run(&["wait", "--timeout", "1s"]).await.expect(69);
}
