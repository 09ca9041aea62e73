//! Heads that the HTTP/1 parser refuses. The server answers them by itself, with a bare status: what the
//! caller gets instead is a refusal like every other, and there is a record of it.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use http::{Response, StatusCode, Version};

use crate::agent::Agent;
use crate::audit::{Record, RequestRecord};
use crate::connection::{Connection, Entry, Known};
use crate::problem::{self, Surface};
use crate::proxy::audit_refusal;
use crate::refusal::{Refusal, RefusalCode};
use crate::request_id::RequestId;

/// Refuses what cannot be read on one connection.
pub struct Unreadable {
    agent: Arc<Agent>,
    entry: Arc<Entry>,
    known: Arc<Mutex<Option<Known>>>,
}

impl Unreadable {
    /// For the heads of a connection, or of a tunnel inside one.
    pub fn of(connection: &Connection) -> Self {
        Self {
            agent: Arc::clone(&connection.worker.agent),
            entry: Arc::clone(&connection.entry),
            known: connection.caller.known(),
        }
    }

    /// The bytes of the answer that stands for the server's `bare` one, after which it closes the
    /// connection (RFC 9112 section 9.6).
    pub fn answer(&self, bare: &[u8]) -> Vec<u8> {
        let mut refusal = refusal_of(bare);
        let time = self.agent.clock.wall();
        let request_id = RequestId::new(time);
        let mut record = RequestRecord::begun(
            time,
            request_id,
            Arc::clone(&self.entry.listener),
            None,
            Version::HTTP_11,
        );
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.as_ref() {
            record.session = Some(known.session);
            record.workload = Some(Arc::clone(&known.summary));
        }
        record.status = refusal.code.properties().status;
        record.outcome = refusal.code.as_str();
        if self.agent.audit.record(Record::Request(&record)).is_err() {
            refusal = audit_refusal();
        }
        self.agent.metrics.refusal(refusal.code);
        let surface = match self.entry.gateway {
            Some(_) => Surface::Gateway,
            None => Surface::Proxy,
        };
        as_http1(&problem::response(&refusal, request_id, surface), time)
    }
}

/// Why the parser refused, by the status that it chose (RFC 9110 section 15.5).
fn refusal_of(bare: &[u8]) -> Refusal {
    let status = bare
        .get(b"HTTP/1.1 ".len()..)
        .and_then(|rest| rest.get(..3))
        .and_then(|digits| StatusCode::from_bytes(digits).ok());
    match status {
        Some(StatusCode::URI_TOO_LONG) => {
            Refusal::new(RefusalCode::UriTooLong, "the request's target is too long")
        }
        Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => Refusal::new(
            RefusalCode::HeadTooLarge,
            "the request's head has too many lines, or too many bytes",
        ),
        _ => Refusal::new(
            RefusalCode::MalformedRequest,
            "the request's head is not HTTP/1.1",
        ),
    }
}

/// Status line, fields and content (RFC 9112 section 2.1) of the last response of a connection.
fn as_http1(response: &Response<Bytes>, date: SystemTime) -> Vec<u8> {
    let status = response.status();
    let reason = status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16());
    for (name, value) in response.headers() {
        let value = value.to_str().unwrap_or_default();
        // Writing to text does not fail.
        let _ = write!(head, "{name}: {value}\r\n");
    }
    let length = response.body().len();
    let date = httpdate::fmt_http_date(date);
    let _ = write!(
        head,
        "content-length: {length}\r\nconnection: close\r\ndate: {date}\r\n\r\n"
    );
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(response.body());
    bytes
}
