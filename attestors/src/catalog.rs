//! How evidence becomes a workload.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use quick_cache::sync::Cache;

use crate::attestor::{Attestation, Attestor, AttributeDeclaration, Evidence, EvidenceKind};
use crate::clock::Clock;
use crate::evidence::{PeerEvidence, PresentedToken};
use crate::observers::{self, Turn};
use crate::oidc;
use crate::workload::{
    AttestationEnded, AttestedWorkload, Established, FailedAttestor, FailureKind, IsolationKey,
    WorkloadFacts,
};

/// How many verified tokens are remembered, and how many sets of facts.
const REMEMBERED: usize = 8192;

/// How long a verified token is remembered at most: then its key may have been withdrawn.
const REMEMBERED_FOR: Duration = Duration::from_secs(60 * 60);

/// How long what the kernel attestors found is used where one of them could not run.
const RETRIED_AFTER: Duration = Duration::from_secs(1);

/// The configured attestors. Immutable but for its memory; a reload builds another.
#[derive(Debug)]
pub struct Catalog {
    attestors: Vec<Arc<dyn Attestor>>,
    clock: Arc<dyn Clock>,
    /// What verified tokens stated, by SHA-256.
    tokens: Cache<[u8; 32], Arc<Findings>>,
    /// Equal facts that rest on the same token are one set, whatever connection they are of.
    established: Cache<(Arc<WorkloadFacts>, Option<[u8; 32]>), Established>,
}

impl Catalog {
    /// A catalog of `attestors`, in the order in which failures are reported.
    pub fn new(attestors: Vec<Arc<dyn Attestor>>, clock: Arc<dyn Clock>) -> Self {
        Self {
            attestors,
            clock,
            tokens: Cache::new(REMEMBERED),
            established: Cache::new(REMEMBERED),
        }
    }

    /// Every attribute that this catalog may state to policies.
    pub fn declarations(&self) -> Vec<AttributeDeclaration> {
        self.attestors
            .iter()
            .flat_map(|attestor| attestor.declarations())
            .collect()
    }

    fn of_kind(&self, kind: EvidenceKind) -> impl Iterator<Item = &Arc<dyn Attestor>> {
        self.attestors
            .iter()
            .filter(move |attestor| attestor.evidence_kind() == kind)
    }

    fn reads_tokens(&self) -> bool {
        self.of_kind(EvidenceKind::Presented).next().is_some()
    }

    /// What the kernel attestors find. They block: this is for an observer.
    async fn attest_peer(&self, peer: &PeerEvidence) -> Findings {
        let mut findings = Findings::new(self.clock.wall());
        findings
            .facts
            .evidence
            .extend(peer.words().iter().map(|word| (*word).to_owned()));
        for attestor in self.of_kind(EvidenceKind::Kernel) {
            let attestation = attestor.attest(Evidence::Kernel(peer)).await;
            findings.add(attestor.name(), attestation);
        }
        findings
    }

    /// What the token states. Verified once; only what was verified is remembered.
    async fn attest_token(&self, token: &PresentedToken) -> Arc<Findings> {
        if let Some(remembered) = self.tokens.get(token.sha256()) {
            if self.clock.wall() < remembered.known_until {
                return remembered;
            }
            self.tokens.remove(token.sha256());
        }
        let mut findings = Findings::new(self.clock.wall());
        for attestor in self.of_kind(EvidenceKind::Presented) {
            let attestation = attestor.attest(Evidence::Presented(token)).await;
            if matches!(attestation, Attestation::Attested { .. }) {
                findings
                    .facts
                    .evidence
                    .push(format!("oidc:{}", attestor.name()));
            }
            findings.add(attestor.name(), attestation);
        }
        if findings.is_empty() {
            let detail = oidc::why_no_issuer(token);
            findings.fail("oidc", FailureKind::InvalidEvidence, detail);
        }
        let findings = Arc::new(findings);
        if findings.verified() {
            self.tokens.insert(*token.sha256(), Arc::clone(&findings));
        }
        findings
    }

    fn establish(&self, facts: WorkloadFacts, token: Option<&PresentedToken>) -> Established {
        let key = (Arc::new(facts), token.map(|token| *token.sha256()));
        match self.established.get(&key) {
            Some(established) => established,
            None => {
                let established = Established::new(Arc::clone(&key.0));
                self.established.insert(key, established.clone());
                established
            }
        }
    }
}

/// What attestors found in one piece of evidence.
#[derive(Debug, Clone)]
struct Findings {
    facts: WorkloadFacts,
    valid_until: Option<SystemTime>,
    /// When they are looked for again, if they are still valid then.
    known_until: SystemTime,
}

impl Findings {
    fn new(now: SystemTime) -> Self {
        Self {
            facts: WorkloadFacts::default(),
            valid_until: None,
            known_until: now + REMEMBERED_FOR,
        }
    }

    fn add(&mut self, attestor: &str, attestation: Attestation) {
        match attestation {
            Attestation::NotApplicable => {}
            Attestation::Attested {
                groups,
                valid_until,
            } => {
                for (group, attributes) in groups {
                    self.facts
                        .groups
                        .entry(group)
                        .or_default()
                        .extend(attributes);
                }
                self.valid_until = earlier(self.valid_until, valid_until);
                if let Some(until) = self.valid_until {
                    self.known_until = self.known_until.min(until);
                }
            }
            Attestation::Failed { kind, detail } => self.fail(attestor, kind, detail),
        }
    }

    fn fail(&mut self, name: &str, kind: FailureKind, detail: String) {
        self.facts.failed_attestors.push(FailedAttestor {
            name: name.to_owned(),
            kind,
            detail,
        });
    }

    fn is_empty(&self) -> bool {
        self.facts.groups.is_empty() && self.facts.failed_attestors.is_empty()
    }

    fn could_not_run(&self) -> bool {
        let failed = &self.facts.failed_attestors;
        failed
            .iter()
            .any(|failed| failed.kind == FailureKind::CouldNotRun)
    }

    /// True when something was established and nothing is left to be tried again.
    fn verified(&self) -> bool {
        !self.facts.groups.is_empty() && self.facts.failed_attestors.is_empty()
    }
}

fn earlier(one: Option<SystemTime>, other: Option<SystemTime>) -> Option<SystemTime> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// One connection's attestation: kernel evidence attested for all of it, presented evidence per head.
#[derive(Debug)]
pub struct ConnectionAttestation {
    catalog: Arc<Catalog>,
    peer: Arc<PeerEvidence>,
    /// The workload as the kernel shows it, without any token.
    kernel: Arc<AttestedWorkload>,
    /// The monotonic time at which that was found, where an attestor could not run.
    incomplete_since: Option<Duration>,
    /// The workload with the token that was presented last. It serves only heads that present the
    /// same token again, until the time beside it: what one head presents is never evidence of the next.
    last: ArcSwapOption<(Arc<AttestedWorkload>, SystemTime)>,
}

impl ConnectionAttestation {
    /// Attests the kernel evidence of a connection, on an [observer](crate::observers).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn new(catalog: Arc<Catalog>, peer: PeerEvidence) -> Self {
        Self::of(catalog, Arc::new(peer)).await
    }

    /// The same connection, by the same evidence, attested anew by a catalog: another one, as after a reload, or
    /// the same one again.
    pub fn under(&self, catalog: Arc<Catalog>) -> impl Future<Output = Self> + Send + use<> {
        Self::of(catalog, Arc::clone(&self.peer))
    }

    /// Whether this is what `catalog` makes of the evidence. Where an attestor could not run, that holds for a
    /// second: then the connection is to be attested [anew](Self::under).
    pub fn is_current(&self, catalog: &Arc<Catalog>) -> bool {
        let is_due = |since| catalog.clock.monotonic().saturating_sub(since) >= RETRIED_AFTER;
        Arc::ptr_eq(&self.catalog, catalog) && !self.incomplete_since.is_some_and(is_due)
    }

    async fn of(catalog: Arc<Catalog>, peer: Arc<PeerEvidence>) -> Self {
        let findings = if peer.process().is_some() {
            on_an_observer(Arc::clone(&catalog), Arc::clone(&peer)).await
        } else {
            catalog.attest_peer(&peer).await
        };
        let incomplete_since = findings.could_not_run().then(|| catalog.clock.monotonic());
        let kernel = AttestedWorkload::new(
            catalog.establish(findings.facts, None),
            findings.valid_until,
            None,
            Arc::clone(&peer),
            Arc::downgrade(&catalog),
        );
        Self {
            catalog,
            peer,
            kernel: Arc::new(kernel),
            incomplete_since,
            last: ArcSwapOption::empty(),
        }
    }

    /// Whom the kernel shows, without any token: the user, where no attestor states more. `None` where it knows
    /// nothing of the caller.
    pub fn kernel_identity(&self) -> Option<IsolationKey> {
        let process = self.peer.process()?;
        let stated = self.kernel.facts().kernel_identity();
        let identity = stated.unwrap_or_else(|| format!("uid {}", process.uid()));
        Some(IsolationKey(identity.into()))
    }

    /// Checks that the process at the other end lives and runs what was attested.
    pub fn check_liveness(&self) -> Result<(), AttestationEnded> {
        self.peer.check_liveness()
    }

    /// The workload behind the connection, with what this head presents; checks liveness first.
    /// Cheap when nothing changed: a clone of an `Arc`.
    pub async fn attest(
        &self,
        presented: Option<&PresentedToken>,
    ) -> Result<Arc<AttestedWorkload>, AttestationEnded> {
        self.peer.check_liveness()?;
        let Some(token) = presented.filter(|_| self.catalog.reads_tokens()) else {
            return Ok(Arc::clone(&self.kernel));
        };
        let last = self.last.load();
        if let Some((workload, until)) = last.as_deref()
            && workload.presented().map(PresentedToken::sha256) == Some(token.sha256())
            && self.catalog.clock.wall() < *until
        {
            return Ok(Arc::clone(workload));
        }
        drop(last);

        let findings = self.catalog.attest_token(token).await;
        let workload = Arc::new(self.with(&findings, token));
        if workload.presented().is_some() {
            let until = workload.valid_until().unwrap_or(findings.known_until);
            let last = (Arc::clone(&workload), until.min(findings.known_until));
            self.last.store(Some(Arc::new(last)));
        }
        // Verifying may have taken a while.
        self.peer.check_liveness()?;
        Ok(workload)
    }

    fn with(&self, findings: &Findings, token: &PresentedToken) -> AttestedWorkload {
        let mut facts = WorkloadFacts::clone(self.kernel.facts());
        facts.groups.extend(findings.facts.groups.clone());
        facts
            .failed_attestors
            .extend(findings.facts.failed_attestors.iter().cloned());
        facts
            .evidence
            .extend(findings.facts.evidence.iter().cloned());
        let verified = (!findings.facts.groups.is_empty()).then(|| token.clone());
        let established = self.catalog.establish(facts, verified.as_ref());
        let valid_until = earlier(self.kernel.valid_until(), findings.valid_until);
        AttestedWorkload::new(
            established,
            valid_until,
            verified,
            Arc::clone(&self.peer),
            Arc::downgrade(&self.catalog),
        )
    }
}

async fn on_an_observer(catalog: Arc<Catalog>, peer: Arc<PeerEvidence>) -> Findings {
    let runtime = tokio::runtime::Handle::current();
    let task = {
        let catalog = Arc::clone(&catalog);
        async move {
            let _turn = match peer.process() {
                Some(process) => Some(Turn::again_at(process.pid()).await),
                None => None,
            };
            runtime.block_on(catalog.attest_peer(&peer))
        }
    };
    match observers::look_and_wait(task).await {
        Ok(findings) => findings,
        // The runtime is shutting down, or an attestor broke an invariant: nothing is established, and
        // what was not looked at must not let a `forbid` be skipped.
        Err(error) => {
            let mut findings = Findings::new(catalog.clock.wall());
            for attestor in catalog.of_kind(EvidenceKind::Kernel) {
                let detail = format!("attestation did not finish: {error}");
                findings.fail(attestor.name(), FailureKind::CouldNotRun, detail);
            }
            findings
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::{AttributeSelection, EvidenceError, SystemClock, SystemdAttestor, UnixAttestor};

    #[tokio::test]
    async fn kernel_evidence_becomes_a_workload_whose_clone_is_cheap() {
        let (_client, server) = UnixStream::pair().unwrap();
        let attestors: Vec<Arc<dyn Attestor>> = vec![
            Arc::new(UnixAttestor::new(AttributeSelection::all())),
            Arc::new(SystemdAttestor::new()),
        ];
        let catalog = Arc::new(Catalog::new(attestors, Arc::new(SystemClock::new())));
        let peer = || observers::look_here(PeerEvidence::of_unix_stream(server.as_fd())).unwrap();
        let connection = ConnectionAttestation::new(Arc::clone(&catalog), peer()).await;

        let first = connection.attest(None).await.unwrap();
        let second = connection.attest(None).await.unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert!(
            first
                .facts()
                .attribute("unix", "executable_sha256")
                .is_some(),
            "{first:#?}"
        );
        let pid = first.facts().attribute("unix", "pid").unwrap().to_string();
        assert_eq!(pid, std::process::id().to_string());

        // Another connection of the same process: the same set of facts.
        let other = ConnectionAttestation::new(catalog, peer()).await;
        let other = other.attest(None).await.unwrap();
        assert_eq!(first.generation(), other.generation());
        assert!(Arc::ptr_eq(first.facts(), other.facts()));
    }

    #[tokio::test]
    async fn where_no_attestor_states_whose_a_process_is_it_is_its_users() {
        let (_client, server) = UnixStream::pair().unwrap();
        let catalog = Arc::new(Catalog::new(Vec::new(), Arc::new(SystemClock::new())));
        let peer = observers::look_here(PeerEvidence::of_unix_stream(server.as_fd())).unwrap();
        let connection = ConnectionAttestation::new(catalog, peer).await;
        let user = format!("uid {}", nix::unistd::Uid::effective());
        assert_eq!(&*connection.kernel_identity().unwrap().0, user);
    }

    #[tokio::test]
    async fn who_has_evidence_waits_however_many_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let mut command = Command::new("/bin/sleep");
        command.arg("20").stdin(Stdio::from(OwnedFd::from(stream)));
        let mut child = command.spawn().unwrap();
        drop(command);
        let look = || observers::look_here(PeerEvidence::of_loopback_tcp(&accepted));
        // What another test was starting meanwhile has the socket as well, until it executes.
        while matches!(look(), Err(EvidenceError::AmbiguousCaller)) {
            std::thread::yield_now();
        }
        let peer = look().unwrap();
        assert_eq!(peer.process().unwrap().pid(), child.id());

        let unix: Arc<dyn Attestor> = Arc::new(UnixAttestor::new(AttributeSelection::all()));
        let catalog = Arc::new(Catalog::new(vec![unix], Arc::new(SystemClock::new())));
        let (turn, waiting) = observers::full(child.id());
        let attested = ConnectionAttestation::new(catalog, peer);
        let mut attested = std::pin::pin!(attested);
        let soon = Duration::from_millis(200);
        let early = tokio::time::timeout(soon, attested.as_mut()).await;
        assert!(early.is_err());
        drop((turn, waiting));
        let workload = attested.await.attest(None).await.unwrap();
        assert!(workload.facts().attribute("unix", "pid").is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
