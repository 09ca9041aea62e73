#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use countersign_attestors::{
    Attestation, AttestationEnded, Attestor, AttributeDeclaration, AttributeValue, Evidence,
    EvidenceKind, FailureKind, PeerEvidence, WorkloadFacts, observers,
};
use futures_util::FutureExt;
use futures_util::future::join_all;

use super::*;
use crate::clock::Clock;

/// States a uid, or could not run; counts how often it was asked.
#[derive(Debug, Default)]
struct Unix {
    is_away: AtomicBool,
    asked: AtomicUsize,
}

#[async_trait::async_trait]
impl Attestor for Unix {
    fn name(&self) -> &str {
        "unix"
    }

    fn evidence_kind(&self) -> EvidenceKind {
        EvidenceKind::Kernel
    }

    fn declarations(&self) -> Vec<AttributeDeclaration> {
        Vec::new()
    }

    async fn attest(&self, _: Evidence<'_>) -> Attestation {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.is_away.load(Ordering::SeqCst) {
            return Attestation::Failed {
                kind: FailureKind::CouldNotRun,
                detail: "too many open files".to_owned(),
            };
        }
        let uid = ("uid".to_owned(), AttributeValue::Long(7));
        Attestation::Attested {
            groups: BTreeMap::from([("unix".to_owned(), [uid].into())]),
            valid_until: None,
        }
    }
}

#[derive(Debug, Default)]
struct TestClock(Mutex<Duration>);

impl Clock for TestClock {
    fn monotonic(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.monotonic()
    }
}

/// A connection whose caller was attested while the attestor was away.
struct Setting {
    unix: Arc<Unix>,
    clock: Arc<TestClock>,
    catalog: Arc<Catalog>,
    renewed: Renewed,
}

impl Setting {
    async fn of(peer: PeerEvidence) -> Self {
        let unix = Arc::new(Unix::default());
        unix.is_away.store(true, Ordering::SeqCst);
        let clock = Arc::new(TestClock::default());
        let attestors: Vec<Arc<dyn Attestor>> = vec![Arc::clone(&unix) as _];
        let catalog = Arc::new(Catalog::new(attestors, Arc::clone(&clock) as _));
        let attestation = ConnectionAttestation::new(Arc::clone(&catalog), peer).await;
        Self {
            unix,
            clock,
            catalog,
            renewed: Renewed::new(Ok(attestation)),
        }
    }

    fn advance(&self, by: Duration) {
        *self.clock.0.lock().unwrap() += by;
    }

    async fn attest(&self) -> Result<Arc<WorkloadFacts>, AttestationEnded> {
        let attestation = self.renewed.under(&self.catalog).await;
        let workload = attestation.as_ref().as_ref().unwrap().attest(None).await?;
        Ok(Arc::clone(workload.facts()))
    }

    /// Whether its uid is known, and how often the attestor was asked so far.
    async fn found(&self) -> (bool, usize) {
        let facts = self.attest().await.unwrap();
        let is_known = facts.attribute("unix", "uid").is_some();
        (is_known, self.unix.asked.load(Ordering::SeqCst))
    }
}

fn of_peer(server: &UnixStream) -> PeerEvidence {
    observers::look_here(PeerEvidence::of_unix_stream(server.as_fd())).unwrap()
}

#[tokio::test]
async fn an_attestor_that_could_not_run_is_asked_again_once_in_a_second() {
    let (_client, server) = UnixStream::pair().unwrap();
    let setting = Setting::of(of_peer(&server)).await;
    assert_eq!(setting.found().await, (false, 1));
    setting.advance(Duration::from_millis(999));
    assert_eq!(setting.found().await, (false, 1));
    setting.advance(Duration::from_millis(1));
    assert_eq!(setting.found().await, (false, 2));
    assert_eq!(setting.found().await, (false, 2));

    setting.unix.is_away.store(false, Ordering::SeqCst);
    setting.advance(Duration::from_secs(1));
    let found = join_all((0..10).map(|_| setting.found())).await;
    assert_eq!(found, [(true, 3); 10]);
    setting.advance(Duration::from_secs(60));
    assert_eq!(setting.found().await, (true, 3));
}

#[tokio::test]
async fn who_goes_away_does_not_have_the_caller_looked_at_again() {
    let (_client, server) = UnixStream::pair().unwrap();
    let setting = Setting::of(of_peer(&server)).await;
    setting.unix.is_away.store(false, Ordering::SeqCst);
    setting.advance(Duration::from_secs(1));
    // Each goes away where it would have to wait.
    for _ in 0..10 {
        setting.attest().now_or_never();
    }
    assert_eq!(setting.found().await, (true, 2));
}

#[tokio::test]
async fn an_attestation_that_ended_stays_so() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "read line; exec sleep 60"]);
    command.stdin(Stdio::from(OwnedFd::from(stream)));
    let mut child = command.spawn().unwrap();
    drop(command);
    let look = || observers::look_here(PeerEvidence::of_loopback_tcp(&server));
    // What another test was starting meanwhile has the socket as well, until it executes.
    while matches!(look(), Err(EvidenceError::AmbiguousCaller)) {
        std::thread::yield_now();
    }
    let setting = Setting::of(look().unwrap()).await;
    assert_eq!(setting.found().await, (false, 1));

    setting.unix.is_away.store(false, Ordering::SeqCst);
    server.write_all(b"\n").unwrap();
    while setting.attest().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for _ in 0..2 {
        setting.advance(Duration::from_secs(1));
        let ended = setting.attest().await;
        assert_eq!(ended.unwrap_err(), AttestationEnded::Executed);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
