//! Builds an agent from a configuration, binds it, and keeps it up to date: reloads, revocations,
//! shutdown. Everything binds where it is told, port 0 included, and says where ([`Bound`]).

mod build;
mod listeners;
mod operations;

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use self::build::{SnapshotBuilder, build_off_thread};
use self::listeners::Listeners;
use crate::admin::{AdminActions, AdminServer};
use crate::agent::{Agent, Phase};
use crate::attestor_states::AttestorStates;
use crate::audit::{Audit, AuditWriter, LifecycleEvent, OtherAgents};
use crate::clock::Clock;
use crate::config::{self, Bind, Config, Listener, ListenerKind};
use crate::credentials::{Credentials, TokenEvent, TokenEvents};
use crate::diagnostics::{Diagnostic, Diagnostics, is_transient, system_words};
use crate::fetch::{FetchClient, FetchSettings};
use crate::hardening;
use crate::limits::IdentityLimits;
use crate::listener::Workers;
use crate::policy::{DecisionRing, Revocations};
use crate::service_manager::ServiceManager;
use crate::snapshot::Snapshot;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::TraceExport;

/// How long, of the drain window, connections that are idle are left open for what is on its way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How long what is cut may take to be gone.
const CUT: Duration = Duration::from_secs(1);
/// How often it is looked whether anything is open still.
const LOOK: Duration = Duration::from_millis(20);
/// How long a reload may take.
const RELOAD: Duration = Duration::from_secs(60);
/// How many reloads may read at one time: one that was given up reads until its files answer.
const MOST_READING: usize = 4;
/// How long the audit may take to write what is queued at the end.
const AUDIT_FLUSH: Duration = Duration::from_secs(5);
/// How long the collector may take to take what spans are queued at the end.
const TRACES_FLUSH: Duration = Duration::from_secs(3);

/// Where an agent listens.
#[derive(Debug, Clone, Default)]
pub struct Bound {
    /// Listeners by name.
    pub listeners: HashMap<String, Bind>,
    /// The admin socket.
    pub admin_socket: Option<PathBuf>,
    /// Metrics on TCP.
    pub metrics: Option<SocketAddr>,
}

/// What an agent is started with beside its configuration.
#[derive(Debug)]
pub struct StartOptions {
    /// Refusals tell their callers which policy came nearest: for `dev`.
    pub tells_nearest: bool,
    /// The port of the first forward proxy on TCP, instead of the one configured; 0 is any free one.
    pub proxy_port: Option<u16>,
    /// Who started the agent: hands sockets over, and is told of the agent's state.
    pub service_manager: ServiceManager,
    /// How long a reload may take before it fails: files may be on what never answers.
    pub reload_limit: Duration,
}

impl Default for StartOptions {
    fn default() -> Self {
        Self {
            tells_nearest: false,
            proxy_port: None,
            service_manager: ServiceManager::default(),
            reload_limit: RELOAD,
        }
    }
}

impl StartOptions {
    fn apply(&self, config: &mut Config) {
        let Some(port) = self.proxy_port else { return };
        let proxy = config.listeners.iter_mut().find_map(|listener| {
            match (&listener.kind, &mut listener.bind) {
                (ListenerKind::ForwardProxy, Bind::Tcp(address)) => Some(address),
                _ => None,
            }
        });
        if let Some(address) = proxy {
            address.set_port(port);
        }
    }
}

/// A running agent.
pub struct App {
    agent: Arc<Agent>,
    bound: Bound,
    listeners: Mutex<Listeners>,
    workers: Workers,
    audit_writer: Mutex<Option<AuditWriter>>,
    trace_export: Mutex<Option<TraceExport>>,
    /// One reload at a time.
    reloading: Arc<Mutex<()>>,
    /// Held by reloads until nothing reads for them any more, also where they were given up.
    reading: Arc<Semaphore>,
    /// Held while a snapshot comes into force, which collects what workloads were revoked by when it was built,
    /// and while one more is revoked, by what the snapshot in force collects.
    revoking: Mutex<()>,
    options: StartOptions,
    last_reload: std::sync::Mutex<LastReload>,
    /// Ends what the next agent has too.
    ending: CancellationToken,
    /// Ends the admin socket, last of all.
    admin_stop: CancellationToken,
}

/// What came of the last load.
#[derive(Debug, Clone, Serialize)]
pub struct LastReload {
    at: String,
    succeeded: bool,
    problem: Option<String>,
}

impl App {
    /// Builds, binds and starts an agent on the current tokio runtime. Nothing is served before
    /// everything is valid and bound.
    ///
    /// # Errors
    /// Every problem found in the configuration, the policies, the sinks or the addresses.
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> Result<Arc<Self>, Diagnostics> {
        Self::start_with(config, clock, StartOptions::default()).await
    }

    /// As [`App::start`], with what the configuration does not say.
    ///
    /// # Errors
    /// As [`App::start`].
    pub async fn start_with(
        mut config: Config,
        clock: Arc<dyn Clock>,
        mut options: StartOptions,
    ) -> Result<Arc<Self>, Diagnostics> {
        options.apply(&mut config);
        let metrics = Arc::new(Metrics::new(Arc::clone(&clock)));
        let control = tokio::runtime::Handle::current();
        let config = Arc::new(config);
        let manager = &mut options.service_manager;
        let mut listeners = Listeners::default();
        manager.give_up_all_but(&config.listeners);
        let prepared = listeners.prepare(&config, manager)?;
        let mut admin = AdminServer::bind(&config.admin, manager).await?;
        manager.refuse_the_rest()?;
        let own_listeners = prepared.own(admin.metrics_address());

        let snapshot = {
            let builder = SnapshotBuilder {
                config: Arc::clone(&config),
                own_listeners: Arc::clone(&own_listeners),
                clock: Arc::clone(&clock),
                metrics: Arc::clone(&metrics),
                control: control.clone(),
                previous: None,
                _reading: None,
            };
            build_off_thread(builder).await?
        };
        let (audit, audit_writer) = Audit::start(
            &config.audit,
            other_agents(manager),
            Arc::clone(&clock),
            &metrics,
        )
        .map_err(Diagnostics::from)?;
        let credentials = Credentials::new(
            control.clone(),
            Arc::clone(&clock),
            Arc::clone(&metrics),
            token_events(audit.clone()),
        );
        credentials.configure(&config, &snapshot.roots, &own_listeners);
        let _ = audit.lifecycle(LifecycleEvent::Start {
            version: env!("CARGO_PKG_VERSION"),
            configuration_sha256: snapshot.configuration_sha256.clone(),
            policy_version: snapshot.policy.engine().version().to_string(),
        });
        record_interception(&audit, None, &snapshot);
        metrics.reload(true, clock.wall());

        let (tracer, trace_export) = config
            .traces
            .as_ref()
            .map(|traces| {
                let client = FetchClient::new(
                    FetchSettings::of_collector(traces),
                    Arc::clone(&own_listeners),
                    control.clone(),
                );
                TraceExport::start(traces, client, &control, &metrics)
            })
            .unzip();
        let agent = Arc::new(Agent {
            snapshot: ArcSwap::from_pointee(snapshot),
            credentials,
            audit,
            attestors: AttestorStates::new(Arc::clone(&metrics)),
            metrics,
            tracer,
            clock,
            control,
            limits: IdentityLimits::default(),
            bound_listeners: ArcSwap::from_pointee(prepared.addresses()),
            tells_nearest: options.tells_nearest,
            recent_decisions: DecisionRing::new(),
            phase: watch::Sender::default(),
        });
        let workers = Workers::start(&agent, worker_count(&config)).map_err(|error| {
            Diagnostic::no_thread("workers_not_started", &config.path, "a data worker", &error)
        })?;
        let bound = Bound {
            listeners: prepared.addresses(),
            admin_socket: config.admin.socket.clone(),
            metrics: admin.metrics_address(),
        };
        prepared.change_access(&config)?;
        // Nothing that may fail comes after this: it is what an agent that hands over loses.
        admin.take_place()?;
        listeners.replace(prepared, &agent, &workers, manager);
        let started_at = agent.clock.wall();
        let app = Arc::new(Self {
            agent,
            bound,
            listeners: Mutex::new(listeners),
            workers,
            audit_writer: Mutex::new(Some(audit_writer)),
            trace_export: Mutex::new(trace_export),
            reloading: Arc::default(),
            reading: Arc::new(Semaphore::new(MOST_READING)),
            revoking: Mutex::new(()),
            options,
            last_reload: std::sync::Mutex::new(LastReload::new(started_at, None)),
            ending: CancellationToken::new(),
            admin_stop: CancellationToken::new(),
        });
        tokio::spawn(admin.run(
            Arc::clone(&app) as Arc<dyn AdminActions>,
            app.ending.clone(),
            app.admin_stop.clone(),
        ));
        tokio::spawn(Arc::clone(&app).prune_revocations());
        tokio::spawn(Arc::clone(&app).renew_interception());
        app.say_ready("serving");
        Ok(app)
    }

    /// What all parts share.
    pub fn agent(&self) -> &Arc<Agent> {
        &self.agent
    }

    /// Where the agent listens.
    pub fn bound(&self) -> &Bound {
        &self.bound
    }

    /// Reads the configuration's file again and serves under it, whole or not at all. Once it has begun it goes on
    /// whether or not it is waited for, until the agent ends or its time is over.
    ///
    /// # Errors
    /// Every problem found, or that its time is over; the last good configuration stays in force.
    pub async fn reload(self: &Arc<Self>) -> Result<(), Diagnostics> {
        let one_at_a_time = Arc::clone(&self.reloading).lock_owned().await;
        let app = Arc::clone(self);
        let reload = tokio::spawn(async move {
            let _one_at_a_time = one_at_a_time;
            app.ending.run_until_cancelled(app.reload_now()).await
        });
        match reload.await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(self.reload_interrupted("the agent ends")),
            Err(error) => Err(self.reload_interrupted(error)),
        }
    }

    fn reload_interrupted(&self, reason: impl ToString) -> Diagnostics {
        let path = &self.agent.snapshot.load().config.path;
        Diagnostic::error("reload_interrupted", path, reason.to_string()).into()
    }

    fn reload_timed_out(&self) -> Diagnostics {
        let limit = self.options.reload_limit;
        self.reload_hangs(format!(
            "reading what the configuration names took longer than {limit:?}"
        ))
    }

    fn reload_hangs(&self, detail: String) -> Diagnostics {
        let path = &self.agent.snapshot.load().config.path;
        let next = "look for a file that does not answer: a pipe, or one on a network file system; then reload again";
        Diagnostic::error("reload_timeout", path, detail)
            .next(next)
            .into()
    }

    async fn reload_now(&self) -> Result<(), Diagnostics> {
        let path = self.agent.snapshot.load().config.path.clone();
        self.options.service_manager.reloading();
        let reload = tokio::time::timeout(self.options.reload_limit, self.try_reload(path)).await;
        let outcome = reload.unwrap_or_else(|_| Err(self.reload_timed_out()));
        self.agent
            .metrics
            .reload(outcome.is_ok(), self.agent.clock.wall());
        let problem = outcome.as_ref().err().map(ToString::to_string);
        *self
            .last_reload
            .lock()
            .unwrap_or_else(PoisonError::into_inner) =
            LastReload::new(self.agent.clock.wall(), problem);
        if let Err(diagnostics) = &outcome {
            let first = diagnostics
                .iter()
                .next()
                .map(|diagnostic| diagnostics.line(diagnostic))
                .unwrap_or_default();
            tracing::error!(
                problems = diagnostics.iter().count(),
                first,
                "reload failed; the last good configuration stays in force"
            );
            let _ = self.agent.audit.lifecycle(LifecycleEvent::ReloadFailed {
                problems: diagnostics.iter().count(),
                first,
            });
        }
        self.say_ready(match &outcome {
            Ok(()) => "serving",
            Err(_) => "serving by the last good configuration: a reload failed",
        });
        outcome
    }

    /// Waits for nothing once anything has changed, so that it can be given up.
    async fn try_reload(&self, path: PathBuf) -> Result<(), Diagnostics> {
        let reading = Arc::clone(&self.reading).try_acquire_owned().map_err(|_| {
            self.reload_hangs(format!("{MOST_READING} reloads before are reading still"))
        })?;
        let reading = Arc::new(reading);
        let held = Arc::clone(&reading);
        let load = move || {
            let _held = held;
            let checked = config::check(&path);
            hardening::permit(&path, &checked)?;
            checked.into_config()
        };
        let mut config = tokio::task::spawn_blocking(load)
            .await
            .map_err(|error| self.reload_interrupted(error))??;
        self.options.apply(&mut config);
        let config = Arc::new(config);
        let mut listeners = self.listeners.lock().await;
        // What it handed over was taken, or refused, at the start.
        let prepared = listeners.prepare(&config, &mut ServiceManager::default())?;
        let own_listeners = prepared.own(self.bound.metrics);
        // Built anew where somebody was revoked meanwhile, for revoking waits for nothing that may hang.
        let (previous, snapshot, revoking) = loop {
            let previous = self.agent.snapshot.load_full();
            let snapshot = build_off_thread(SnapshotBuilder {
                config: Arc::clone(&config),
                own_listeners: Arc::clone(&own_listeners),
                clock: Arc::clone(&self.agent.clock),
                metrics: Arc::clone(&self.agent.metrics),
                control: self.agent.control.clone(),
                previous: Some(Arc::clone(&previous)),
                _reading: Some(Arc::clone(&reading)),
            })
            .await?;
            let revoking = self.revoking.lock().await;
            let now = self.agent.snapshot.load();
            if Arc::ptr_eq(now.policy.revocations(), previous.policy.revocations()) {
                break (previous, snapshot, revoking);
            }
        };
        prepared.change_access(&config)?;
        let config = Arc::clone(&snapshot.config);
        let policy_version = snapshot.policy.engine().version().to_string();
        self.agent
            .credentials
            .configure(&config, &snapshot.roots, &own_listeners);
        self.agent
            .snapshot
            .rcu(|current| snapshot.with_revocations(Arc::clone(current.policy.revocations())));
        self.agent.credentials.retire(&config);
        drop(revoking);
        self.agent
            .bound_listeners
            .store(Arc::new(prepared.addresses()));
        let manager = &self.options.service_manager;
        listeners.replace(prepared, &self.agent, &self.workers, manager);
        let _ = self.agent.audit.lifecycle(LifecycleEvent::Reload {
            configuration_sha256: snapshot.configuration_sha256.clone(),
            policy_version: policy_version.clone(),
        });
        record_interception(&self.agent.audit, Some(&previous), &snapshot);
        tracing::info!(policy_version, "reloaded");
        Ok(())
    }

    /// What came of the last load.
    fn last_reload(&self) -> LastReload {
        self.last_reload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Replaces the revocations; the next request and every open stream are decided under them.
    pub fn replace_revocations(
        &self,
        change: impl Fn(&Revocations) -> Option<Revocations>,
    ) -> bool {
        let mut changed = false;
        self.agent
            .snapshot
            .rcu(|snapshot| match change(snapshot.policy.revocations()) {
                Some(revocations) => {
                    changed = true;
                    snapshot.with_revocations(Arc::new(revocations))
                }
                None => {
                    changed = false;
                    Arc::clone(snapshot)
                }
            });
        changed
    }

    /// Tells the service manager that the agent serves.
    fn say_ready(&self, how: &str) {
        // An agent that reloads while it ends does not serve again.
        if !self.agent.has_come_to(Phase::LastAnswers) {
            let snapshot = self.agent.snapshot.load();
            let policies = snapshot.policy.engine().version();
            let status = format!("{how}; policies {policies}");
            self.options.service_manager.ready(&status);
        }
    }

    /// Drains and stops.
    pub async fn shutdown(&self) {
        self.drain().await;
        self.stop().await;
    }

    /// Takes no more connections, and lets requests and tunnels under way live on until they end, or
    /// the drain window (`runtime.drain`) does.
    pub async fn drain(&self) {
        let window = self.agent.snapshot.load().config.drain;
        let began = Instant::now();
        self.agent.phase.send_replace(Phase::LastAnswers);
        self.options.service_manager.stopping(window);
        self.ending.cancel();
        tracing::info!(?window, open = self.workers.open_connections(), "draining");
        let closing = began + LAST_ANSWERS.min(window / 2);
        // Neither who goes on connecting nor a reload that hangs holds the rest up.
        let close = async { self.listeners.lock().await.close().await };
        let _ = timeout_at(closing, close).await;
        self.until_closed(closing).await;
        self.agent.phase.send_replace(Phase::Closing);
        if let Ok(mut listeners) = self.listeners.try_lock() {
            listeners.release();
        }
        self.until_closed(began + window).await;
    }

    /// Cuts what is still open, and closes the audit and the traces.
    pub async fn stop(&self) {
        let cut = self.workers.open_connections();
        self.agent.phase.send_replace(Phase::Over);
        if cut > 0 {
            tracing::warn!(
                cut,
                "connections are cut that were open when the drain window ended"
            );
            // Each request among them is recorded when it is cut.
            self.until_closed(Instant::now() + CUT).await;
        }
        let _ = self.agent.audit.lifecycle(LifecycleEvent::Stop);
        self.admin_stop.cancel();
        tokio::join!(self.end_audit(), self.end_traces());
    }

    async fn end_audit(&self) {
        if let Some(writer) = self.audit_writer.lock().await.take() {
            let written = tokio::task::spawn_blocking(move || writer.stop(AUDIT_FLUSH)).await;
            if !written.unwrap_or(false) {
                tracing::error!("the audit could not be written to its end");
            }
        }
    }

    async fn end_traces(&self) {
        if let Some(export) = self.trace_export.lock().await.take()
            && !export.stop(TRACES_FLUSH).await
        {
            tracing::warn!(
                code = "traces_not_exported",
                "the collector did not take the last spans in time; they are lost"
            );
        }
    }

    /// Waits until no connection is open, at most until `deadline`.
    async fn until_closed(&self, deadline: Instant) {
        while self.workers.open_connections() > 0 && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl LastReload {
    fn new(at: SystemTime, problem: Option<String>) -> Self {
        Self {
            at: jiff::Timestamp::try_from(at)
                .map(|at| format!("{at:.0}"))
                .unwrap_or_default(),
            succeeded: problem.is_none(),
            problem,
        }
    }
}

/// Logs what happens to tokens; request records say which request used which. Keys are of the agent's own
/// life.
fn token_events(audit: Audit) -> TokenEvents {
    Arc::new(move |event| match event {
        TokenEvent::Minted {
            credential,
            identity,
            token_sha256,
            upstream,
            ..
        } => tracing::info!(
            credential,
            identity,
            token_sha256,
            ?upstream,
            "token minted"
        ),
        TokenEvent::Failed {
            credential,
            identity,
            code,
            detail,
            internal,
        } => tracing::warn!(
            credential,
            identity,
            code = code.as_str(),
            detail,
            internal,
            "token not minted"
        ),
        TokenEvent::KeyReplaced { credential, key_id } => {
            let _ = audit.lifecycle(LifecycleEvent::ClientKeyReplaced {
                credential: credential.to_owned(),
                key_id: key_id.to_owned(),
            });
        }
        TokenEvent::Rejected {
            credential,
            token_sha256,
        } => tracing::warn!(
            credential,
            token_sha256,
            "token rejected by its destination"
        ),
    })
}

/// Records under which certificates connections are intercepted, where they are others than before.
fn record_interception(audit: &Audit, previous: Option<&Snapshot>, now: &Snapshot) {
    let Some(authority) = &now.interception else {
        return;
    };
    let before = previous.and_then(|previous| previous.interception.as_ref());
    if before.is_some_and(|before| before.has_same_certificates(authority)) {
        return;
    }
    let (root_sha256, intermediate_sha256) = authority.certificate_sha256();
    let _ = audit.lifecycle(LifecycleEvent::InterceptionAuthority {
        root_sha256,
        intermediate_sha256,
    });
}

/// An agent that was started before, and whose sockets were handed over, may be draining still.
fn other_agents(manager: &ServiceManager) -> OtherAgents {
    match manager.has_handed_over() {
        true => OtherAgents::MayBeDraining,
        false => OtherAgents::AreMistakes,
    }
}

fn worker_count(config: &Config) -> usize {
    config.workers.unwrap_or_else(|| {
        // `available_parallelism` reads the cgroup's quota.
        std::thread::available_parallelism().map_or(1, |count| count.get().min(4))
    })
}

fn bind_problem(config: &Config, listener: &Listener, error: &io::Error) -> Diagnostics {
    let name = &listener.name;
    let remedy = match (error.kind(), &listener.bind) {
        (ErrorKind::AddrInUse, _) => "end what listens there, or write another `bind`",
        (ErrorKind::AddrNotAvailable, _) => {
            "write an address of this machine as its `bind`, or give it the address"
        }
        (ErrorKind::PermissionDenied, Bind::Tcp(_)) => {
            "a port below 1024 needs CAP_NET_BIND_SERVICE: grant it, or write another port in its `bind`"
        }
        (_, Bind::Tcp(_)) => "write another `bind`",
        (_, Bind::Unix(_)) => {
            "write as its `bind` a path in a directory that exists and that the agent may write to, and as its `access.group` a group that exists and that the agent may give files to"
        }
    };
    Diagnostic::error(
        "listener_not_bound",
        &config.path,
        format!(
            "listener `{name}` cannot be bound to `{}`: {}",
            listener.bind,
            system_words(error)
        ),
    )
    .next(format!("under `name: {name}` in `listeners`: {remedy}"))
    .is_transient(is_transient(error))
    .into()
}

fn access_problem(config: &Config, listener: &Listener, error: &io::Error) -> Diagnostics {
    let name = &listener.name;
    Diagnostic::error(
        "socket_access_unusable",
        &config.path,
        format!(
            "listener `{name}` cannot give `{}` its `access`: {}",
            listener.bind,
            system_words(error)
        ),
    )
    .next(format!(
        "under `name: {name}` in `listeners`: write as its `access.group` a group that exists and that the agent may give files to; the access to a socket unit's socket is changed in the unit, and a socket that the service manager has kept for another user is made anew by a stop and a start"
    ))
    .is_transient(is_transient(error))
    .into()
}
