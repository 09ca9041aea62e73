//! A connection from a workload: what it was accepted on, who is at the other end, and the tunnel
//! that it may be inside of.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use countersign_attestors::evidence::EvidenceError;
use countersign_attestors::{
    AttestedWorkload, Catalog, ConnectionAttestation, Generation, PresentedToken,
};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, Shared};
use http::{Request, Version};

use crate::agent::Agent;
use crate::audit::record::workload_summary;
use crate::audit::{AttestedRecord, Record};
use crate::config::{Limits, Scheme};
use crate::limits::{Held, Holding};
use crate::listener::Open;
use crate::listener::interim::Interim;
use crate::listener::patience::{Place, Places};
use crate::proxy::{Worker, audit_refusal};
use crate::refusal::{Refusal, RefusalCode};
use crate::request::Target;
use crate::request_id::SessionId;
use crate::streams::{RequestBody, Stream};

/// What a connection was accepted on.
#[derive(Debug)]
pub struct Entry {
    /// The listener's name.
    pub listener: Arc<str>,
    /// The destination, where the listener is a gateway.
    pub gateway: Option<Arc<str>>,
    /// Places for those whose caller is not attested yet.
    pub places: Places,
}

/// The tunnel that requests come through.
pub struct Tunnel {
    /// CONNECT's authority.
    pub target: Target,
    /// What is spoken inside.
    pub scheme: Scheme,
    /// The token that the tunnel was opened with.
    pub presented: Option<PresentedToken>,
    /// When that token expires, once it was verified: the tunnel ends then.
    pub valid_until: Cell<Option<SystemTime>>,
    /// Whether it has taken over its connection, and is counted as that.
    pub is_alone: bool,
    /// What it counts as.
    pub counted: RefCell<Counted>,
}

/// What a tunnel counts as.
#[derive(Debug)]
pub enum Counted {
    /// One of those of whom nothing is known: until a request in it is attested.
    Unattested(Place),
    /// A connection of the identity that asks in it, where other tunnels share that which it is inside of.
    Connection(Held),
    /// The connection that it has taken over.
    Alone,
}

impl Tunnel {
    /// Has it count as a connection of the identity that asks in it, and no more among those of whom nothing is
    /// known.
    ///
    /// # Errors
    /// When the identity holds too many connections.
    pub fn count(&self, holding: &Arc<Holding>, limits: &Limits) -> Result<(), Refusal> {
        let mut counted = self.counted.borrow_mut();
        if matches!(*counted, Counted::Unattested(_)) {
            *counted = match self.is_alone {
                true => Counted::Alone,
                false => Counted::Connection(holding.connection(limits)?),
            };
        }
        Ok(())
    }
}

/// A connection from a workload, or a tunnel inside one.
pub struct Connection {
    /// The worker that serves it.
    pub worker: Rc<Worker>,
    /// What it was accepted on.
    pub entry: Arc<Entry>,
    /// Who is at the other end; shared by a connection and the tunnels inside it.
    pub caller: Rc<Caller>,
    /// The tunnel, for what came through one.
    pub tunnel: Option<Box<Tunnel>>,
    /// Takes interim responses, where the connection is HTTP/1.
    pub interim: Option<Arc<Interim>>,
    /// What cuts it, when it is idle or may not go on.
    pub stream: Rc<Stream>,
    /// Whether a request came.
    pub is_used: Cell<bool>,
}

impl Connection {
    /// A stream on this connection that may be idle for `idle`.
    pub fn open(&self, idle: Duration) -> Rc<Stream> {
        Stream::new(idle, Rc::downgrade(&self.stream))
    }

    /// Whether no request of it was attested: then it keeps a place among those of whom nothing is known.
    pub fn is_unattested(&self) -> bool {
        match &self.tunnel {
            Some(tunnel) => matches!(*tunnel.counted.borrow(), Counted::Unattested(_)),
            None => self.caller.place.borrow().is_some(),
        }
    }

    /// Has the destination's interim responses passed on. HTTP/1.0 knows none.
    pub fn pass_interim(&self, request: &mut Request<RequestBody>) {
        if let Some(interim) = &self.interim
            && request.version() == Version::HTTP_11
        {
            let interim = Arc::clone(interim);
            hyper::ext::on_informational(request, move |response| {
                interim.push(response.status(), response.headers());
            });
        }
    }

    /// Whether the caller is still what was attested, and what a tunnel was opened with still holds.
    pub fn is_permitted(&self) -> bool {
        let expired = self
            .tunnel
            .as_ref()
            .and_then(|tunnel| tunnel.valid_until.get())
            .is_some_and(|valid_until| self.worker.agent.clock.wall() >= valid_until);
        !expired && self.caller.is_still_attested()
    }
}

/// Who is at the other end of a connection.
pub struct Caller {
    attestation: Renewed,
    session: RefCell<Option<Session>>,
    known: Arc<Mutex<Option<Known>>>,
    /// Held until the first session, which counts for its identity.
    place: RefCell<Option<Place>>,
    /// Set when the attestation ended: the connection closes.
    ended: Cell<bool>,
    /// Counts the connection while it, or a tunnel inside it, is open.
    _open: Open,
}

/// What a connection's requests have in common while its workload is the same.
#[derive(Debug, Clone)]
pub struct Session {
    generation: Generation,
    /// What request records refer to.
    pub id: SessionId,
    /// The workload in few words.
    pub summary: Arc<str>,
    /// What the workload's identity holds of the agent.
    pub holding: Arc<Holding>,
    connection: Rc<Held>,
}

/// The last session of a connection, for what refuses its unreadable heads.
#[derive(Debug)]
pub struct Known {
    /// What request records refer to.
    pub session: SessionId,
    /// The workload in few words.
    pub summary: Arc<str>,
}

impl Caller {
    /// A caller whose kernel evidence was attested, and who has `place` until more is known.
    pub fn new(attestation: CallerAttestation, place: Place, open: Open) -> Rc<Self> {
        Rc::new(Self {
            attestation: Renewed::new(attestation),
            session: RefCell::new(None),
            known: Arc::default(),
            place: RefCell::new(Some(place)),
            ended: Cell::new(false),
            _open: open,
        })
    }

    /// The session of the last request, if there was one.
    pub fn known(&self) -> Arc<Mutex<Option<Known>>> {
        Arc::clone(&self.known)
    }

    /// Takes a place for a tunnel inside the connection, if the caller may have one more: that of the connection
    /// where the tunnel has taken it over.
    pub fn take_place(&self, is_alone: bool, places: &Places, agent: &Agent) -> Option<Place> {
        if is_alone && let Some(place) = self.place.take() {
            return Some(place);
        }
        places.attribute(places.take()?, &self.attestation.last(), agent)
    }

    /// Whether the process at the other end still is what was attested: a system call for each process that holds
    /// the connection, at most once in a millisecond.
    pub fn is_still_attested(&self) -> bool {
        !self.ended.get()
            && match self.attestation.last().as_ref() {
                Ok(attestation) => attestation.check_liveness().is_ok(),
                Err(_) => true,
            }
    }

    /// The workload behind the connection with what this head presents. The kernel's evidence is attested anew
    /// after a reload that changed the attestors, and where one of them could not run.
    pub async fn attest(
        &self,
        catalog: &Arc<Catalog>,
        presented: Option<&PresentedToken>,
    ) -> Result<Arc<AttestedWorkload>, Refusal> {
        let attestation = self.attestation.under(catalog).await;
        match attestation.as_ref() {
            Ok(attestation) => attestation.attest(presented).await.map_err(|ended| {
                self.ended.set(true);
                Refusal::new(RefusalCode::AttestationEnded, ended.to_string())
            }),
            Err(error) => {
                self.ended.set(true);
                Err(evidence_refusal(error))
            }
        }
    }

    /// The session of a workload on this connection; a new one is recorded when the facts are new.
    ///
    /// # Errors
    /// When the record cannot be written, or the identity holds too many connections.
    pub fn session(
        &self,
        agent: &Agent,
        limits: &Limits,
        listener: &Arc<str>,
        workload: &AttestedWorkload,
    ) -> Result<Session, Refusal> {
        let generation = workload.generation();
        if let Some(session) = self.session.borrow().as_ref()
            && session.generation == generation
        {
            return Ok(session.clone());
        }
        let facts = workload.facts();
        let time = agent.clock.wall();
        agent.attestors.note(facts, time);
        let holding = agent
            .limits
            .of(workload.isolation_key(), agent.clock.monotonic());
        let connection = match self.session.borrow().as_ref() {
            Some(before) if Arc::ptr_eq(&before.holding, &holding) => Rc::clone(&before.connection),
            _ => Rc::new(holding.connection(limits)?),
        };
        let session = Session {
            generation,
            id: SessionId::new(time),
            summary: workload_summary(facts),
            holding,
            connection,
        };
        agent
            .audit
            .record(Record::Attested(&AttestedRecord {
                time,
                session: session.id,
                listener: Arc::clone(listener),
                identity: workload.isolation_key().clone(),
                facts: Arc::clone(facts),
                valid_until: workload.valid_until(),
            }))
            .map_err(|_| audit_refusal())?;
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(Known {
            session: session.id,
            summary: Arc::clone(&session.summary),
        });
        *self.session.borrow_mut() = Some(session.clone());
        self.place.take();
        Ok(session)
    }
}

/// What was made of a connection's kernel evidence, or why there is none.
pub type CallerAttestation = Result<ConnectionAttestation, EvidenceError>;

/// An attestation that is made anew where that is due.
struct Renewed {
    last: RefCell<Rc<CallerAttestation>>,
    /// The one that is being made. Whoever needs it goes on with it, also where who began it went away.
    next: RefCell<Option<Renewal>>,
}

type Renewal = Shared<LocalBoxFuture<'static, Rc<CallerAttestation>>>;

impl Renewed {
    fn new(attestation: CallerAttestation) -> Self {
        Self {
            last: RefCell::new(Rc::new(attestation)),
            next: RefCell::default(),
        }
    }

    fn last(&self) -> Rc<CallerAttestation> {
        Rc::clone(&self.last.borrow())
    }

    /// The attestation by `catalog`. Whoever asks while one is made waits for that one.
    async fn under(&self, catalog: &Arc<Catalog>) -> Rc<CallerAttestation> {
        while let Some(renewal) = self.renewal(catalog) {
            let next = self.next.borrow_mut().get_or_insert(renewal).clone();
            let renewed = next.clone().await;
            // Not where another waiter has done so.
            let is_next = |known: &mut Renewal| known.ptr_eq(&next);
            if self.next.borrow_mut().take_if(is_next).is_some() {
                *self.last.borrow_mut() = renewed;
            }
        }
        self.last()
    }

    /// Makes one by `catalog`, where the last one is not current.
    fn renewal(&self, catalog: &Arc<Catalog>) -> Option<Renewal> {
        match self.last().as_ref() {
            Ok(last) if !last.is_current(catalog) => {
                let renewed = last.under(Arc::clone(catalog));
                Some(
                    renewed
                        .map(|renewed| Rc::new(Ok(renewed)))
                        .boxed_local()
                        .shared(),
                )
            }
            _ => None,
        }
    }
}

/// What the caller is told when the kernel's evidence could not be had.
pub fn evidence_refusal(error: &EvidenceError) -> Refusal {
    let refusal = |code| Refusal::new(code, error.to_string());
    let of_the_agent = |code| refusal(code).with_internal(error.to_string());
    match error {
        EvidenceError::CallerGone => refusal(RefusalCode::CallerGone),
        EvidenceError::AmbiguousCaller => refusal(RefusalCode::CallerAmbiguous),
        EvidenceError::CallerHidden { .. } => of_the_agent(RefusalCode::CallerHidden),
        EvidenceError::Unavailable(_) => of_the_agent(RefusalCode::AttestationUnavailable),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
