//! The text of a record: one JSON object, without the two members that chain it.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{Attributes, FailedAttestor};
use http::Version;
use serde::{Serialize, Serializer};

use crate::audit::Head;
use crate::audit::record::{
    AskedAndGranted, AttestedRecord, DecisionReference, Latency, LifecycleEvent, LifecycleRecord,
    Record, RequestRecord, TokenIssueRecord, TokenReference,
};
use crate::request::Target;

/// Appends the record's members, from the first quotation mark to the closing brace.
pub(super) fn append_members(record: &Record, text: &mut Vec<u8>) {
    let start = text.len();
    let result = match record {
        Record::Attested(record) => serde_json::to_writer(&mut *text, &AttestedLine::of(record)),
        Record::Request(record) => serde_json::to_writer(&mut *text, &RequestLine::of(record)),
        Record::TokenIssue(record) => {
            serde_json::to_writer(&mut *text, &TokenIssueLine::of(record))
        }
        Record::Lifecycle(record) => serde_json::to_writer(&mut *text, &LifecycleLine::of(record)),
    };
    // Maps with text keys and writing to a vector do not fail; a record must not vanish if they do.
    if result.is_err() {
        text.truncate(start);
        text.extend_from_slice(br#"{"kind":"unserializable"}"#);
    }
    text.remove(start);
}

/// Appends a whole line that follows `head`, and returns its bytes' place in `text`.
pub(super) fn append_chained(head: &Head, members: &[u8], text: &mut Vec<u8>) -> usize {
    use std::io::Write as _;
    let start = text.len();
    // Writing to a vector does not fail.
    let _ = write!(
        text,
        r#"{{"sequence":{},"previous":"{}","#,
        head.sequence + 1,
        head.hash
    );
    text.extend_from_slice(members);
    text.push(b'\n');
    start
}

/// The most that [`append_chained`] adds to the members.
pub(super) const CHAIN_BYTES: usize = 120;

struct Displayed<T>(T);

impl<T: fmt::Display> Serialize for Displayed<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// RFC 3339 in UTC, to the millisecond.
struct Timestamp(SystemTime);

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match jiff::Timestamp::try_from(self.0) {
            Ok(timestamp) => serializer.collect_str(&format_args!("{timestamp:.3}")),
            Err(_) => serializer.serialize_none(),
        }
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[derive(Serialize)]
struct AttestedLine<'a> {
    time: Timestamp,
    kind: &'static str,
    session: Displayed<crate::request_id::SessionId>,
    listener: &'a str,
    identity: &'a str,
    attributes: &'a std::collections::BTreeMap<String, Attributes>,
    evidence: &'a [String],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    failed_attestors: &'a [FailedAttestor],
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_until: Option<Timestamp>,
}

impl<'a> AttestedLine<'a> {
    fn of(record: &'a AttestedRecord) -> Self {
        Self {
            time: Timestamp(record.time),
            kind: "attested",
            session: Displayed(record.session),
            listener: &record.listener,
            identity: &record.identity.0,
            attributes: &record.facts.groups,
            evidence: &record.facts.evidence,
            failed_attestors: &record.facts.failed_attestors,
            valid_until: record.valid_until.map(Timestamp),
        }
    }
}

/// What request and token-issue records have in common.
#[derive(Serialize)]
struct Common<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    credential: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    scopes_asked: &'a [String],
    /// Left out where it is what was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    scopes_granted: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audience_asked: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audience_granted: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<TokenLine<'a>>,
    #[serde(flatten)]
    decision: DecisionLine<'a>,
    status: u16,
    outcome: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    internal: Option<&'a str>,
    latency_us: LatencyLine,
}

impl<'a> Common<'a> {
    #[expect(
        clippy::too_many_arguments,
        reason = "the shared fields of two records"
    )]
    fn of(
        credential: Option<&'a Arc<str>>,
        asked_and_granted: &'a AskedAndGranted,
        token: Option<&'a TokenReference>,
        decision: Option<&'a DecisionReference>,
        status: http::StatusCode,
        outcome: &'a str,
        internal: Option<&'a Arc<str>>,
        latency: &Latency,
    ) -> Self {
        let AskedAndGranted {
            scopes_asked,
            scopes_granted,
            audience_asked,
            audience_granted,
        } = asked_and_granted;
        let permitted = token.is_some();
        Self {
            credential: credential.map(|name| &**name),
            scopes_asked,
            scopes_granted: (permitted && scopes_granted != scopes_asked).then_some(scopes_granted),
            audience_asked: audience_asked.as_deref(),
            audience_granted: (audience_granted != audience_asked)
                .then_some(audience_granted.as_deref())
                .flatten(),
            token: token.map(|token| TokenLine {
                sha256: &token.sha256,
                expires_at: Timestamp(token.expires_at),
                obtained: token.obtained.as_str(),
            }),
            decision: DecisionLine::of(decision),
            status: status.as_u16(),
            outcome,
            internal: internal.map(|text| &**text),
            latency_us: LatencyLine {
                total: microseconds(latency.total),
                ours: microseconds(latency.ours),
                upstream: microseconds(latency.upstream),
                token_endpoint: microseconds(latency.token_endpoint),
            },
        }
    }
}

#[derive(Serialize)]
struct TokenLine<'a> {
    sha256: &'a str,
    expires_at: Timestamp,
    obtained: &'static str,
}

#[derive(Serialize)]
struct DecisionLine<'a> {
    decision: &'static str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    policies: &'a [Arc<str>],
    #[serde(skip_serializing_if = "Option::is_none")]
    nearest: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_version: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    attributes_read: &'a [String],
}

impl<'a> DecisionLine<'a> {
    fn of(decision: Option<&'a DecisionReference>) -> Self {
        match decision {
            Some(decision) => Self {
                decision: decision.decided.as_str(),
                policies: &decision.policies,
                nearest: decision.nearest.as_deref(),
                policy_version: Some(&decision.policy_version),
                attributes_read: &decision.attributes,
            },
            None => Self {
                decision: "error",
                policies: &[],
                nearest: None,
                policy_version: None,
                attributes_read: &[],
            },
        }
    }
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[derive(Serialize)]
struct LatencyLine {
    total: u64,
    ours: u64,
    #[serde(skip_serializing_if = "is_zero")]
    upstream: u64,
    #[serde(skip_serializing_if = "is_zero")]
    token_endpoint: u64,
}

#[derive(Serialize)]
struct RequestLine<'a> {
    time: Timestamp,
    kind: &'static str,
    request_id: Displayed<crate::request_id::RequestId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<Displayed<crate::request_id::TraceId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<Displayed<crate::request_id::SessionId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<&'a str>,
    listener: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scheme: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    authority: Option<Displayed<&'a Target>>,
    method: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    protocol: &'static str,
    #[serde(flatten)]
    common: Common<'a>,
    #[serde(skip_serializing_if = "is_one")]
    attempts: u8,
}

fn is_one(attempts: &u8) -> bool {
    *attempts == 1
}

impl<'a> RequestLine<'a> {
    fn of(record: &'a RequestRecord) -> Self {
        let asked = record.asked.as_deref();
        Self {
            time: Timestamp(record.time),
            kind: "request",
            request_id: Displayed(record.request_id),
            trace_id: record.trace_id.map(Displayed),
            session: record.session.map(Displayed),
            workload: record.workload.as_deref(),
            listener: &record.listener,
            destination: record.destination.as_deref(),
            scheme: asked.map(|asked| asked.scheme.as_str()),
            authority: asked.map(|asked| Displayed(&asked.target)),
            method: record.method.as_str(),
            path: asked.map(|asked| asked.path_and_query.path()),
            protocol: protocol_name(record.protocol),
            common: Common::of(
                record.credential.as_ref(),
                &record.asked_and_granted,
                record.token.as_ref(),
                record.decision.as_ref(),
                record.status,
                record.outcome,
                record.internal.as_ref(),
                &record.latency,
            ),
            attempts: record.attempts,
        }
    }
}

/// As OpenTelemetry's `network.protocol.version` says it, with the name.
fn protocol_name(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "http/2",
        Version::HTTP_10 => "http/1.0",
        _ => "http/1.1",
    }
}

#[derive(Serialize)]
struct TokenIssueLine<'a> {
    time: Timestamp,
    kind: &'static str,
    request_id: Displayed<crate::request_id::RequestId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<Displayed<crate::request_id::TraceId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<Displayed<crate::request_id::SessionId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<&'a str>,
    listener: &'a str,
    #[serde(flatten)]
    common: Common<'a>,
}

impl<'a> TokenIssueLine<'a> {
    fn of(record: &'a TokenIssueRecord) -> Self {
        Self {
            time: Timestamp(record.time),
            kind: "token_issue",
            request_id: Displayed(record.request_id),
            trace_id: record.trace_id.map(Displayed),
            session: record.session.map(Displayed),
            workload: record.workload.as_deref(),
            listener: &record.listener,
            common: Common::of(
                Some(&record.credential),
                &record.asked_and_granted,
                record.token.as_ref(),
                record.decision.as_ref(),
                record.status,
                record.outcome,
                record.internal.as_ref(),
                &record.latency,
            ),
        }
    }
}

#[derive(Serialize)]
struct LifecycleLine<'a> {
    time: Timestamp,
    kind: &'static str,
    #[serde(flatten)]
    event: EventLine<'a>,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum EventLine<'a> {
    Start {
        version: &'a str,
        configuration_sha256: &'a str,
        policy_version: &'a str,
    },
    Stop,
    Reload {
        configuration_sha256: &'a str,
        policy_version: &'a str,
    },
    ReloadFailed {
        problems: usize,
        first: &'a str,
    },
    Revoked {
        id: &'a str,
        what: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        until: Option<Timestamp>,
    },
    RevocationLifted {
        id: &'a str,
    },
    AuditRepaired {
        file: Displayed<std::path::Display<'a>>,
        bytes_cut: u64,
    },
    RecordsDropped {
        count: u64,
    },
    FileContinued {
        previous_file: Displayed<std::path::Display<'a>>,
    },
}

impl<'a> LifecycleLine<'a> {
    fn of(record: &'a LifecycleRecord) -> Self {
        let event = match &record.event {
            LifecycleEvent::Start {
                version,
                configuration_sha256,
                policy_version,
            } => EventLine::Start {
                version,
                configuration_sha256,
                policy_version,
            },
            LifecycleEvent::Stop => EventLine::Stop,
            LifecycleEvent::Reload {
                configuration_sha256,
                policy_version,
            } => EventLine::Reload {
                configuration_sha256,
                policy_version,
            },
            LifecycleEvent::ReloadFailed { problems, first } => EventLine::ReloadFailed {
                problems: *problems,
                first,
            },
            LifecycleEvent::Revoked { id, what, until } => EventLine::Revoked {
                id,
                what,
                until: until.map(Timestamp),
            },
            LifecycleEvent::RevocationLifted { id } => EventLine::RevocationLifted { id },
            LifecycleEvent::AuditRepaired { path, bytes_cut } => EventLine::AuditRepaired {
                file: Displayed(path.display()),
                bytes_cut: *bytes_cut,
            },
            LifecycleEvent::RecordsDropped { count } => EventLine::RecordsDropped { count: *count },
        };
        Self {
            time: Timestamp(record.time),
            kind: "lifecycle",
            event,
        }
    }
}

/// Appends the members of the first record of a file that continues the chain of `previous`.
pub(super) fn append_file_continued(time: SystemTime, previous: &Path, text: &mut Vec<u8>) {
    let line = LifecycleLine {
        time: Timestamp(time),
        kind: "lifecycle",
        event: EventLine::FileContinued {
            previous_file: Displayed(previous.display()),
        },
    };
    let start = text.len();
    // Maps with text keys and writing to a vector do not fail.
    let _ = serde_json::to_writer(&mut *text, &line);
    text.remove(start);
}
