//! What all workers, listeners and verbs of one agent share.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::attestor_states::AttestorStates;
use crate::audit::Audit;
use crate::clock::Clock;
use crate::config::Bind;
use crate::credentials::Credentials;
use crate::limits::IdentityLimits;
use crate::policy::{DecisionRing, Denial, Question};
use crate::refusal::Refusal;
use crate::snapshot::Snapshot;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Tracer;

/// One running agent.
pub struct Agent {
    /// What requests are served under; replaced whole.
    pub snapshot: ArcSwap<Snapshot>,
    /// The broker of tokens.
    pub credentials: Arc<Credentials>,
    /// Where records go.
    pub audit: Audit,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What makes spans; `None`: no request is traced.
    pub tracer: Option<Tracer>,
    /// Which attestors run.
    pub attestors: AttestorStates,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The runtime of everything that is not the data path: names, token endpoints, procfs.
    pub control: tokio::runtime::Handle,
    /// What each identity holds of the agent.
    pub limits: IdentityLimits,
    /// Where listeners are bound, by name.
    pub bound_listeners: ArcSwap<HashMap<String, Bind>>,
    /// Whether a refusal tells its caller which policy came nearest: in `dev` only.
    pub tells_nearest: bool,
    /// The last decisions, for `policy explain`.
    pub recent_decisions: DecisionRing,
    /// How far the agent is on its way to its end.
    pub phase: watch::Sender<Phase>,
}

/// How far an agent is on its way to its end. Each phase includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Phase {
    /// It serves.
    #[default]
    Serving,
    /// It takes no new connection. On those that there are the next answer says `connection: close`
    /// (RFC 9112 section 9.6), and HTTP/2 ones get GOAWAY (RFC 9113 section 6.8): what is on its way
    /// already is served, which closing an idle connection at once would not do.
    LastAnswers,
    /// Connections that are idle still are closed; requests and tunnels under way go on.
    Closing,
    /// The drain window is over: what is still open is cut.
    Over,
}

/// Waits until an agent has come to `phase`. Returns too when it is gone.
pub async fn until(phase: Phase, phases: &mut watch::Receiver<Phase>) {
    let _ = phases.wait_for(|current| *current >= phase).await;
}

impl Agent {
    /// Whether the agent has come to `phase`.
    pub fn has_come_to(&self, phase: Phase) -> bool {
        *self.phase.borrow() >= phase
    }

    /// Why new requests would not be served; empty when they would.
    pub fn not_ready(&self) -> Vec<&'static str> {
        let mut reasons = Vec::new();
        if self.has_come_to(Phase::LastAnswers) {
            reasons.push("the agent is shutting down");
        }
        if !self.audit.is_accepting() {
            reasons.push("audit records cannot be written");
        }
        reasons
    }

    /// What a denied caller is told: the nearest miss too, in `dev`.
    pub fn denied(&self, denial: &Denial, question: &Question<'_>) -> Refusal {
        let mut refusal = denial.to_refusal(question);
        if self.tells_nearest {
            refusal.nearest = denial.nearest.as_ref().map(ToString::to_string);
        }
        refusal
    }
}
