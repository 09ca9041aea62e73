//! An audit that cannot be written: nothing is done that leaves no record.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use countersign::audit::LifecycleEvent;
use nix::sys::stat::Mode;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;

use crate::support::counts::reached;
use crate::support::curl::{Answer, curl};
use crate::support::eventually;
use crate::support::puppet::Puppet;
use crate::support::raw::{read_head, read_response};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

/// How many records may wait.
const CAPACITY: u64 = 16_384;
const SOON: Duration = Duration::from_secs(20);
const BLIND: &str =
    "  - {name: blind, hosts: [blind.example.test], ports: [7], connect_to: \"{plain}\"}\n";
const ORDERS: &str = "https://orders.example.test/v1/orders";

/// An agent whose audit goes into a pipe, and the pipe's other end.
struct Setting {
    world: World,
    pipe: File,
    /// What was read of it so far.
    read: Vec<u8>,
}

impl Setting {
    async fn start(mut world: World, destinations: &str, on_failure: &str) -> Self {
        let path = world.path("audit.fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let pipe = File::options()
            .read(true)
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(&path)
            .unwrap();
        let common = COMMON
            .replace("audit.jsonl", "audit.fifo")
            .replace("on_failure: degrade", &format!("on_failure: {on_failure}"));
        world
            .start_agent(&format!("{common}{DESTINATIONS}{destinations}"), POLICIES)
            .await;
        Self {
            world,
            pipe,
            read: Vec::new(),
        }
    }

    fn is_accepting(&self) -> bool {
        self.world.app().agent().audit.is_accepting()
    }

    async fn send(&self) -> Answer {
        self.world.curl(&[ORDERS]).await
    }

    /// Fills the pipe, so that it takes nothing more, and waits until the agent has noticed.
    async fn stall(&mut self) {
        self.world.app().agent().audit.flush().await;
        self.drain();
        while self.pipe.write(b" ").is_ok() {}
        // What has to be written is what finds the pipe full.
        self.world
            .app()
            .agent()
            .audit
            .lifecycle(marker("stalled"))
            .unwrap();
    }

    fn drain(&mut self) {
        let mut buffer = vec![0; 65536];
        while let Ok(length @ 1..) = self.pipe.read(&mut buffer) {
            self.read.extend_from_slice(&buffer[..length]);
        }
    }

    /// Reads until everything that was queued is written; returns every record there ever was.
    async fn resume(&mut self) -> Vec<Value> {
        let audit = self.world.app().agent().audit.clone();
        let flushed = tokio::spawn(async move { audit.flush().await });
        while !flushed.is_finished() {
            self.drain();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.drain();
        let text = String::from_utf8(self.read.clone()).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line.trim_start()).unwrap())
            .collect()
    }
}

fn marker(id: &str) -> LifecycleEvent {
    LifecycleEvent::RevocationLifted { id: id.to_owned() }
}

fn of_request<'a>(records: &'a [Value], answer: &Answer) -> &'a Value {
    let request_id = answer.header("countersign-request-id").unwrap();
    records
        .iter()
        .find(|record| record["request_id"] == request_id)
        .unwrap_or_else(|| panic!("no record of {answer:#?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_refused_while_records_cannot_be_written() {
    let mut setting = Setting::start(World::servers().await, BLIND, "block").await;
    setting.world.good().await;
    setting.stall().await;
    eventually(SOON, || async { (!setting.is_accepting()).then_some(()) }).await;
    let mut refused = Vec::new();
    let gateway = format!("http://{}/v1/orders", setting.world.address("gateway"));
    for answer in [
        setting
            .world
            .curl(&["http://plain.example.test/v1/orders"])
            .await,
        curl(&["--http2-prior-knowledge", &gateway]).await,
    ] {
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (503, "audit_unavailable"),
            "{answer:#?}"
        );
        assert_eq!(
            answer.header("retry-after").as_deref(),
            Some("1"),
            "{answer:#?}"
        );
        refused.push(answer);
    }
    // No tunnel is opened, whether it would be looked into or not.
    for url in [ORDERS, "https://blind.example.test:7/"] {
        let answer = setting.world.curl(&[url]).await;
        assert_eq!(answer.connect_status, 503, "{answer:#?}");
        assert!(
            answer.heads.contains("503 audit_unavailable: "),
            "{answer:#?}"
        );
        refused.push(answer);
    }
    assert_eq!(setting.world.api.seen().len(), 1);
    assert!(setting.world.plain_api.seen().is_empty());

    // It resumes by itself, and nothing that was queued is lost: the refusals have their records too.
    let records = setting.resume().await;
    for answer in &refused {
        assert_eq!(of_request(&records, answer)["outcome"], "audit_unavailable");
    }
    eventually(SOON, || async { setting.is_accepting().then_some(()) }).await;
    setting.world.good().await;
    let sequences: Vec<_> = records
        .iter()
        .map(|record| record["sequence"].as_u64().unwrap())
        .collect();
    assert!(
        sequences.iter().copied().eq(1..=records.len() as u64),
        "{sequences:?}"
    );
    reached("refused_unrecorded", refused.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_a_place_for_its_record_is_not_released() {
    let mut world = World::servers().await;
    let (asked, may_answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let origin = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world
        .origins
        .push(("slow".to_owned(), origin.local_addr().unwrap()));
    {
        let (asked, may_answer) = (Arc::clone(&asked), Arc::clone(&may_answer));
        tokio::spawn(async move {
            let (mut io, _) = origin.accept().await.unwrap();
            read_head(&mut io).await;
            asked.notify_one();
            may_answer.notified().await;
            io.write_all(b"HTTP/1.1 200 OK\r\nx-secret: canary\r\ncontent-length: 6\r\n\r\ncanary")
                .await
                .unwrap();
        });
    }
    let slow = "  - {name: slow, hosts: [slow.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{slow}\"}\n";
    let mut setting = Setting::start(world, slow, "block").await;
    setting.world.good().await;
    let caller = Puppet::start(&setting.world.target("proxy"), None).await;
    let mut io = caller.connect().await;
    io.write_all(b"GET http://slow.example.test/ HTTP/1.1\r\nHost: slow.example.test\r\n\r\n")
        .await
        .unwrap();
    asked.notified().await;

    // While the destination thinks, the sink hangs and the queue fills.
    setting.stall().await;
    eventually(SOON, || async { (!setting.is_accepting()).then_some(()) }).await;
    let mut waiting = 0;
    while setting
        .world
        .app()
        .agent()
        .audit
        .lifecycle(marker("filler"))
        .is_ok()
    {
        waiting += 1;
    }
    may_answer.notify_one();
    let answer = read_response(&mut io).await.expect(503);
    assert_eq!(answer.code(), "audit_unavailable");
    assert!(!format!("{answer:?}").contains("canary"), "{answer:#?}");

    let records = setting.resume().await;
    let fillers = records
        .iter()
        .filter(|record| record["id"] == "filler")
        .count();
    assert_eq!(fillers, waiting);
    eventually(SOON, || async { setting.is_accepting().then_some(()) }).await;
    setting.world.good().await;
    reached("withheld", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_on_without_records_only_where_that_is_configured() {
    let mut setting = Setting::start(World::servers().await, "", "degrade").await;
    setting.world.good().await;
    setting.stall().await;
    let audit = setting.world.app().agent().audit.clone();
    let mut queued = 0;
    let mut fill = || {
        audit.lifecycle(marker("filler")).unwrap();
        queued += 1;
    };
    // Until the agent has taken what it can't write, and the queue is full again.
    while audit.state().queue_depth <= CAPACITY {
        fill();
    }
    let dropped = audit.state().dropped;
    while audit.state().dropped == dropped {
        fill();
    }
    // For longer than `block` would wait.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let kept = queued - audit.state().dropped;
    let answer = setting.send().await.expect(200);
    assert_eq!(setting.world.api.seen().len(), 2);
    let dropped = audit.state().dropped;
    let records = setting.resume().await;
    let request_id = answer.header("countersign-request-id").unwrap();
    assert!(
        records
            .iter()
            .all(|record| record["request_id"] != request_id)
    );
    let fillers = records
        .iter()
        .filter(|record| record["id"] == "filler")
        .count();
    assert_eq!(fillers as u64, kept);
    // How many are missing is itself recorded.
    setting.world.good().await;
    let records = setting.resume().await;
    let told: u64 = records
        .iter()
        .filter(|record| record["event"] == "records_dropped")
        .map(|record| record["count"].as_u64().unwrap())
        .sum();
    assert_eq!(told, dropped);
    reached("served_unrecorded", 1);
}
