//! What is recorded.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{IsolationKey, WorkloadFacts};
use http::{Method, StatusCode, Version};

use crate::policy::{Denial, Grant};
use crate::request::EgressRequest;
use crate::request_id::{RequestId, SessionId, TraceId};

/// A record.
#[derive(Debug, Clone, Copy)]
pub enum Record<'a> {
    /// A workload was attested: everything that request records of the session refer to.
    Attested(&'a AttestedRecord),
    /// A request was answered.
    Request(&'a RequestRecord),
    /// A token was handed out, or refused, by the workload API.
    TokenIssue(&'a TokenIssueRecord),
    /// Something happened to the agent itself.
    Lifecycle(&'a LifecycleRecord),
}

/// One attestation of one connection, or of one presented token.
#[derive(Debug, Clone)]
pub struct AttestedRecord {
    /// When.
    pub time: SystemTime,
    /// What request records refer to.
    pub session: SessionId,
    /// The listener's name.
    pub listener: Arc<str>,
    /// What upstream connections are keyed by.
    pub identity: IsolationKey,
    /// Attributes, evidence and failed attestors.
    pub facts: Arc<WorkloadFacts>,
    /// When presented evidence expires.
    pub valid_until: Option<SystemTime>,
}

/// What came of the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decided {
    /// Permitted.
    Allow,
    /// Refused by policy, revocation, or for want of evidence.
    Deny,
    /// A would-be denial that was forwarded without a credential.
    ReportOnly,
    /// No decision was made: the request was malformed, or something failed before.
    Error,
}

impl Decided {
    /// The word in records and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::ReportOnly => "report_only",
            Self::Error => "error",
        }
    }
}

/// Where a token came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obtained {
    /// The cache.
    CacheHit,
    /// A token request made for this request.
    Minted,
    /// A token request that another request had begun.
    Joined,
}

impl Obtained {
    /// The word in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CacheHit => "cache",
            Self::Minted => "minted",
            Self::Joined => "joined",
        }
    }
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// From the request's head to the response's head.
    pub total: Duration,
    /// The agent's own share.
    pub ours: Duration,
    /// The destination's share.
    pub upstream: Duration,
    /// The token endpoint's share.
    pub token_endpoint: Duration,
}

/// The token that a request carried, without the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenReference {
    /// SHA-256 of the token, hexadecimal.
    pub sha256: Arc<str>,
    /// When it expires.
    pub expires_at: SystemTime,
    /// Where it came from.
    pub obtained: Obtained,
}

/// What was asked for and what was granted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AskedAndGranted {
    /// Scopes that the destination's configuration, or the caller of `issue`, asks for.
    pub scopes_asked: Arc<[String]>,
    /// Scopes that the authorization server says it granted, else those after the policies' caps.
    pub scopes_granted: Arc<[String]>,
    /// The audience asked for.
    pub audience_asked: Option<Arc<str>>,
    /// The audience granted.
    pub audience_granted: Option<Arc<str>>,
}

/// The policies' part of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecisionReference {
    /// What came of it.
    pub decided: Decided,
    /// The policies that decided, by id.
    pub policies: Arc<[Arc<str>]>,
    /// The permit that came nearest, of a denial for want of one.
    pub nearest: Option<Arc<str>>,
    /// The version of the policies.
    pub policy_version: Arc<str>,
    /// The attributes that the deciding policies read, each `group.name=value`.
    pub attributes: Arc<[String]>,
}

impl DecisionReference {
    /// Of a yes.
    pub fn of_grant(grant: &Grant) -> Self {
        Self {
            decided: Decided::Allow,
            policies: Arc::clone(grant.deciding_policies()),
            nearest: None,
            policy_version: Arc::clone(grant.policy_version()),
            attributes: Arc::clone(grant.attributes_read()),
        }
    }

    /// Of a no.
    pub fn of_denial(denial: &Denial) -> Self {
        Self {
            decided: Decided::Deny,
            policies: Arc::clone(&denial.policies),
            nearest: denial
                .nearest
                .as_ref()
                .map(|nearest| Arc::clone(&nearest.policy)),
            policy_version: Arc::clone(&denial.policy_version),
            attributes: Arc::clone(&denial.attributes_read),
        }
    }
}

/// One request, answered.
#[derive(Debug, Clone)]
pub struct RequestRecord {
    /// When its head was read.
    pub time: SystemTime,
    /// Its name.
    pub request_id: RequestId,
    /// The trace that it is in: the caller's, or where requests are traced one of its own.
    pub trace_id: Option<TraceId>,
    /// The attestation that it rests on; `None` when it was refused before attestation.
    pub session: Option<SessionId>,
    /// The workload in few words ([`workload_summary`]), for people who read the record.
    pub workload: Option<Arc<str>>,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The destination's name; `None` when it matches none.
    pub destination: Option<Arc<str>>,
    /// What was asked; `None` when the head could not be read. The query is not recorded, for it may
    /// hold secrets.
    pub asked: Option<Arc<EgressRequest>>,
    /// The method; `None` when the head could not be read.
    pub method: Option<Method>,
    /// The protocol spoken with the caller.
    pub protocol: Version,
    /// The status answered.
    pub status: StatusCode,
    /// The policies' part; `None` when the request was refused before a decision.
    pub decision: Option<DecisionReference>,
    /// The credential's name.
    pub credential: Option<Arc<str>>,
    /// Scopes and audience.
    pub asked_and_granted: AskedAndGranted,
    /// The token that was injected.
    pub token: Option<TokenReference>,
    /// `ok`, `upstream_error` (5xx of the destination), or the code of the refusal.
    pub outcome: &'static str,
    /// More about a refusal than the caller was told; never a secret.
    pub internal: Option<Arc<str>>,
    /// Where the time went.
    pub latency: Latency,
    /// How many times it was sent to the destination.
    pub attempts: u8,
}

impl RequestRecord {
    /// The record of a request of which no more is known yet; as it stands it says that the caller left.
    pub fn begun(
        time: SystemTime,
        request_id: RequestId,
        listener: Arc<str>,
        method: Option<Method>,
        protocol: Version,
    ) -> Self {
        Self {
            time,
            request_id,
            trace_id: None,
            session: None,
            workload: None,
            listener,
            destination: None,
            asked: None,
            method,
            protocol,
            status: StatusCode::OK,
            decision: None,
            credential: None,
            asked_and_granted: AskedAndGranted::default(),
            token: None,
            outcome: CALLER_LEFT,
            internal: None,
            latency: Latency::default(),
            attempts: 0,
        }
    }
}

/// The outcome of a request that was answered as it should be.
pub const OK: &str = "ok";

/// The outcome of a request that the destination answered with 5xx.
pub const UPSTREAM_ERROR: &str = "upstream_error";

/// The outcome of a request whose caller went away before the response head.
pub const CALLER_LEFT: &str = "caller_left";

/// A token handed out by the workload API, or refused.
#[derive(Debug, Clone)]
pub struct TokenIssueRecord {
    /// When.
    pub time: SystemTime,
    /// The request's name.
    pub request_id: RequestId,
    /// The caller's trace.
    pub trace_id: Option<TraceId>,
    /// The attestation that it rests on.
    pub session: Option<SessionId>,
    /// The workload in few words.
    pub workload: Option<Arc<str>>,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The status answered.
    pub status: StatusCode,
    /// The policies' part.
    pub decision: Option<DecisionReference>,
    /// The credential's name.
    pub credential: Arc<str>,
    /// Scopes and audience.
    pub asked_and_granted: AskedAndGranted,
    /// The token that was handed out.
    pub token: Option<TokenReference>,
    /// `ok` or the code of the refusal.
    pub outcome: &'static str,
    /// More about a refusal than the caller was told; never a secret.
    pub internal: Option<Arc<str>>,
    /// Where the time went.
    pub latency: Latency,
}

/// An event of the agent's own life.
#[derive(Debug, Clone)]
pub struct LifecycleRecord {
    /// When.
    pub time: SystemTime,
    /// What happened.
    pub event: LifecycleEvent,
}

/// What happened to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LifecycleEvent {
    /// The agent started.
    Start {
        /// Its version.
        version: &'static str,
        /// SHA-256 over the configuration, hexadecimal.
        configuration_sha256: String,
        /// The version of the policies.
        policy_version: String,
    },
    /// The agent stopped in good order.
    Stop,
    /// Configuration and policies were replaced.
    Reload {
        /// SHA-256 over the configuration, hexadecimal.
        configuration_sha256: String,
        /// The version of the policies.
        policy_version: String,
    },
    /// A reload failed; the last good configuration is kept.
    ReloadFailed {
        /// How many problems were found.
        problems: usize,
        /// The first of them.
        first: String,
    },
    /// A revocation was set.
    Revoked {
        /// Its id.
        id: String,
        /// What is revoked, in words.
        what: String,
        /// When it ends by itself.
        until: Option<SystemTime>,
    },
    /// A revocation was lifted.
    RevocationLifted {
        /// Its id.
        id: String,
    },
    /// A client key was found to be another than before.
    ClientKeyReplaced {
        /// The credential that signs with it.
        credential: String,
        /// The new key's id.
        key_id: String,
    },
    /// Clients' connections are intercepted under these certificates from now on.
    InterceptionAuthority {
        /// SHA-256 of the root certificate, hexadecimal.
        root_sha256: String,
        /// SHA-256 of the certificate that leaves are signed under, hexadecimal.
        intermediate_sha256: String,
    },
    /// A torn tail was cut from an audit file.
    AuditRepaired {
        /// The file.
        path: PathBuf,
        /// How many bytes were cut.
        bytes_cut: u64,
    },
    /// Another agent, which is draining, writes to the configured file.
    AuditBeside {
        /// The configured file.
        in_use: PathBuf,
        /// The file that this agent writes to.
        file: PathBuf,
    },
    /// Records were lost under `on_failure: degrade`.
    RecordsDropped {
        /// How many since the last such record.
        count: u64,
    },
}

/// A workload in few words, for people: program and uid, or the issuers whose token it presented.
pub fn workload_summary(facts: &WorkloadFacts) -> Arc<str> {
    let text = |group: &str, name: &str| facts.attribute(group, name).map(ToString::to_string);
    let mut words: Vec<String> = Vec::new();
    let program = text("unix", "executable")
        .map(|path| path.rsplit('/').next().unwrap_or(&path).to_owned())
        .or_else(|| text("systemd", "system_unit"))
        .or_else(|| text("systemd", "user_unit"))
        .or_else(|| text("container", "id").map(|id| id.chars().take(12).collect()));
    words.extend(program);
    words.extend(text("unix", "uid").map(|uid| format!("uid {uid}")));
    for (group, attributes) in &facts.groups {
        if !matches!(group.as_str(), "unix" | "systemd" | "container") {
            let subject = attributes
                .get("sub")
                .map_or_else(String::new, |subject| format!(" {subject}"));
            words.push(format!("{group}{subject}"));
        }
    }
    if words.is_empty() {
        words.push("unknown".to_owned());
    }
    words.join(" ").into()
}
