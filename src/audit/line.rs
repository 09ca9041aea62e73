//! The text of a record: one JSON object, without the two members that chain it.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use countersign_attestors::{Attributes, FailedAttestor};
use http::{StatusCode, Version};
use serde::{Serialize, Serializer};

use crate::audit::Head;
use crate::audit::object::{Object, name};
use crate::audit::record::{
    AskedAndGranted, AttestedRecord, Decided, DecisionReference, Latency, LifecycleEvent,
    LifecycleRecord, Record, RequestRecord, TokenIssueRecord, TokenReference,
};
use crate::refusal::{Cause, RefusalCode};
use crate::request::RequestPath;
use crate::request_id::{SessionId, TraceId};

/// Appends the record's members, from the first quotation mark to the closing brace.
pub(super) fn append_members(record: Record<'_>, text: &mut Vec<u8>) {
    match record {
        Record::Request(record) => {
            let mut line = Object::begun(text);
            append_request(record, &mut line);
            line.end();
        }
        Record::TokenIssue(record) => {
            let mut line = Object::begun(text);
            append_token_issue(record, &mut line);
            line.end();
        }
        Record::Attested(record) => append_serialized(&AttestedLine::of(record), text),
        Record::Lifecycle(record) => append_serialized(&LifecycleLine::of(record), text),
    }
}

fn append_serialized(line: &impl Serialize, text: &mut Vec<u8>) {
    let start = text.len();
    // Maps with text keys and writing to a vector do not fail; a record must not vanish if they do.
    if serde_json::to_writer(&mut *text, line).is_err() {
        text.truncate(start);
        text.extend_from_slice(br#"{"kind":"unserializable"}"#);
    }
    text.remove(start);
}

/// Appends a whole line that follows `head`, and returns its bytes' place in `text`.
pub(super) fn append_chained(head: &Head, members: &[u8], text: &mut Vec<u8>) -> usize {
    let start = text.len();
    text.push(b'{');
    let mut line = Object::begun(text);
    line.number(name!("sequence"), head.sequence + 1);
    line.pushed(name!("previous"), |text| {
        text.extend_from_slice(&head.hash.digits());
    });
    text.push(b',');
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

/// RFC 3339 in UTC, to the millisecond; empty where no calendar has the time.
struct Timestamp(SystemTime);

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = Vec::new();
        push_time(&mut text, self.0);
        serializer.serialize_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

/// As [`Timestamp`]. Written digit by digit: two of them are in every record.
fn push_time(text: &mut Vec<u8>, time: SystemTime) {
    let Ok(timestamp) = jiff::Timestamp::try_from(time) else {
        return;
    };
    let time = jiff::tz::Offset::UTC.to_datetime(timestamp);
    let digit = |number: i16| b'0' + u8::try_from(number % 10).unwrap_or_default();
    let two = |number: i8| [digit(i16::from(number) / 10), digit(number.into())];
    let (year, millisecond) = (time.year(), time.millisecond());
    let [month, day] = [time.month(), time.day()].map(two);
    let [hour, minute, second] = [time.hour(), time.minute(), time.second()].map(two);
    text.extend_from_slice(&[
        digit(year / 1000),
        digit(year / 100),
        digit(year / 10),
        digit(year),
        b'-',
        month[0],
        month[1],
        b'-',
        day[0],
        day[1],
        b'T',
        hour[0],
        hour[1],
        b':',
        minute[0],
        minute[1],
        b':',
        second[0],
        second[1],
        b'.',
        digit(millisecond / 100),
        digit(millisecond / 10),
        digit(millisecond),
        b'Z',
    ]);
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

fn append_request(record: &RequestRecord, line: &mut Object<'_>) {
    line.pushed(name!("time"), |text| push_time(text, record.time));
    line.plain(name!("kind"), "request");
    line.plain(name!("request_id"), record.request_id.encode(&mut [0; 36]));
    append_caller(
        line,
        record.trace_id,
        record.session,
        record.workload.as_deref(),
        &record.listener,
    );
    line.text_if_any(name!("destination"), record.destination.as_deref());
    if let Some(asked) = &record.asked {
        line.plain(name!("scheme"), asked.scheme.as_str());
        line.plain(name!("authority"), &asked.target.to_string());
    }
    line.text_if_any(
        name!("method"),
        record.method.as_ref().map(http::Method::as_str),
    );
    if let Some(asked) = &record.asked {
        append_path(line, &asked.path);
    }
    line.plain(name!("protocol"), protocol_name(record.protocol));
    line.text_if_any(name!("credential"), record.credential.as_deref());
    append_asked_and_granted(line, &record.asked_and_granted, record.token.as_ref());
    append_decision(line, record.decision.as_ref());
    append_outcome(
        line,
        record.status,
        record.outcome,
        record.internal.as_deref(),
        &record.latency,
    );
    if record.attempts != 1 {
        line.number(name!("attempts"), record.attempts.into());
    }
}

fn append_token_issue(record: &TokenIssueRecord, line: &mut Object<'_>) {
    line.pushed(name!("time"), |text| push_time(text, record.time));
    line.plain(name!("kind"), "token_issue");
    line.plain(name!("request_id"), record.request_id.encode(&mut [0; 36]));
    append_caller(
        line,
        record.trace_id,
        record.session,
        record.workload.as_deref(),
        &record.listener,
    );
    line.text(name!("credential"), &record.credential);
    append_asked_and_granted(line, &record.asked_and_granted, record.token.as_ref());
    append_decision(line, record.decision.as_ref());
    append_outcome(
        line,
        record.status,
        record.outcome,
        record.internal.as_deref(),
        &record.latency,
    );
}

/// Of a long one the beginning, and which path it is.
fn append_path(line: &mut Object<'_>, path: &RequestPath) {
    let shortened = path.shortened();
    let path = shortened.as_ref().unwrap_or(path);
    line.text(name!("path"), path.as_sent());
    if let Some(whole) = path.whole() {
        line.number(name!("path_bytes"), whole.bytes as u64);
        line.plain(name!("path_sha256"), &whole.sha256);
    }
}

fn append_caller(
    line: &mut Object<'_>,
    trace_id: Option<TraceId>,
    session: Option<SessionId>,
    workload: Option<&str>,
    listener: &str,
) {
    if let Some(trace_id) = trace_id {
        line.plain(name!("trace_id"), &trace_id.to_string());
    }
    if let Some(session) = session {
        line.plain(name!("session"), session.encode(&mut [0; 36]));
    }
    line.text_if_any(name!("workload"), workload);
    line.text(name!("listener"), listener);
}

fn append_asked_and_granted(
    line: &mut Object<'_>,
    asked_and_granted: &AskedAndGranted,
    token: Option<&TokenReference>,
) {
    let AskedAndGranted {
        scopes_asked,
        scopes_granted,
        audience_asked,
        audience_granted,
    } = asked_and_granted;
    line.texts_if_any(name!("scopes_asked"), &**scopes_asked);
    // Left out where it is what was asked for.
    if token.is_some() && scopes_granted != scopes_asked {
        line.texts_if_any(name!("scopes_granted"), &**scopes_granted);
    }
    line.text_if_any(name!("audience_asked"), audience_asked.as_deref());
    if audience_granted != audience_asked {
        line.text_if_any(name!("audience_granted"), audience_granted.as_deref());
    }
    if let Some(token) = token {
        line.object(name!("token"), |line| {
            line.plain(name!("sha256"), &token.sha256);
            line.pushed(name!("expires_at"), |text| {
                push_time(text, token.expires_at)
            });
            line.plain(name!("obtained"), token.obtained.as_str());
        });
    }
}

fn append_decision(line: &mut Object<'_>, decision: Option<&DecisionReference>) {
    let Some(decision) = decision else {
        line.plain(name!("decision"), Decided::Error.as_str());
        return;
    };
    line.plain(name!("decision"), decision.decided.as_str());
    line.texts_if_any(name!("policies"), &*decision.policies);
    line.text_if_any(name!("nearest"), decision.nearest.as_deref());
    line.plain(name!("policy_version"), &decision.policy_version);
    line.texts_if_any(name!("attributes_read"), &*decision.attributes);
}

fn append_outcome(
    line: &mut Object<'_>,
    status: StatusCode,
    outcome: &str,
    internal: Option<&str>,
    latency: &Latency,
) {
    line.number(name!("status"), status.as_u16().into());
    line.plain(name!("outcome"), outcome);
    // Most are; the rest can be looked up.
    let refused = (outcome != "ok").then(|| RefusalCode::named(outcome));
    let cause = refused.flatten().and_then(|code| code.properties().cause);
    line.text_if_any(name!("cause"), cause.map(Cause::as_str));
    line.text_if_any(name!("internal"), internal);
    line.object(name!("latency_us"), |line| {
        line.number(name!("total"), microseconds(latency.total));
        line.number(name!("ours"), microseconds(latency.ours));
        for (name, share) in [
            (name!("upstream"), latency.upstream),
            (name!("token_endpoint"), latency.token_endpoint),
        ] {
            if !share.is_zero() {
                line.number(name, microseconds(share));
            }
        }
    });
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
    ClientKeyReplaced {
        credential: &'a str,
        key_id: &'a str,
    },
    InterceptionAuthority {
        root_sha256: &'a str,
        intermediate_sha256: &'a str,
    },
    AuditRepaired {
        file: Displayed<std::path::Display<'a>>,
        bytes_cut: u64,
    },
    AuditBeside {
        in_use: Displayed<std::path::Display<'a>>,
        file: Displayed<std::path::Display<'a>>,
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
            LifecycleEvent::ClientKeyReplaced { credential, key_id } => {
                EventLine::ClientKeyReplaced { credential, key_id }
            }
            LifecycleEvent::InterceptionAuthority {
                root_sha256,
                intermediate_sha256,
            } => EventLine::InterceptionAuthority {
                root_sha256,
                intermediate_sha256,
            },
            LifecycleEvent::AuditRepaired { path, bytes_cut } => EventLine::AuditRepaired {
                file: Displayed(path.display()),
                bytes_cut: *bytes_cut,
            },
            LifecycleEvent::AuditBeside { in_use, file } => EventLine::AuditBeside {
                in_use: Displayed(in_use.display()),
                file: Displayed(file.display()),
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
    append_serialized(&line, text);
}
