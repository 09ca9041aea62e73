//! The audit: one record per request, per token issued and per event of the agent's own life, one
//! JSON object per line, chained by SHA-256 (`docs/audit.md`).
//!
//! A data worker puts the text of a [`Record`] into a bounded queue and goes on; the writer's thread
//! chains what has gathered and writes it in batches. [`verify`] and [`tail`] read what was written.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;

use self::queue::Queue;

use crate::clock::Clock;
use crate::config::{AuditConfig, AuditSink, OnAuditFailure};
use crate::diagnostics::Diagnostic;
use crate::telemetry::metrics::{AuditState, AuditStateSource, Metrics};

mod line;
mod object;
mod queue;
pub mod record;
mod sink;
pub mod tail;
pub mod verify;
mod writer;

pub use record::{
    AskedAndGranted, AttestedRecord, Decided, DecisionReference, Latency, LifecycleEvent,
    LifecycleRecord, Obtained, Record, RequestRecord, TokenIssueRecord, TokenReference,
    workload_summary,
};

/// With `on_failure: block`, requests are refused when a write has taken this long.
const STALL_LIMIT: Duration = Duration::from_millis(100);

/// The last record of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Head {
    /// Its number; 0 before the first record.
    pub(crate) sequence: u64,
    /// Its hash; zero before the first record.
    pub(crate) hash: Hash,
}

/// SHA-256 of a line's bytes, its line end included.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Hash(pub(crate) [u8; 32]);

impl Hash {
    pub(crate) fn of(line: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, line);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }

    /// Reads 64 lower-case hexadecimal digits.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let [high, low] = pair else { return None };
            *byte = hexadecimal_digit(*high)? << 4 | hexadecimal_digit(*low)?;
        }
        Some(Self(bytes))
    }

    /// 64 lower-case hexadecimal digits.
    fn digits(&self) -> [u8; 64] {
        let mut digits = [0; 64];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.0) {
            if let [high, low] = pair {
                (*high, *low) = (digit(byte >> 4), digit(byte & 15));
            }
        }
        digits
    }

    /// The first 48 bits.
    fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, ..] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

fn hexadecimal_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// The hexadecimal digit of a value below 16.
fn digit(value: u8) -> u8 {
    match value {
        0..=9 => b'0' + value,
        _ => b'a' - 10 + value,
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(std::str::from_utf8(&self.digits()).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Audit records cannot be queued: the sinks do not take them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("audit records cannot be written")]
pub struct AuditUnavailable;

/// What it means that another agent writes to a file of the audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherAgents {
    /// Somebody started a second agent: it is refused.
    AreMistakes,
    /// It may hand over to this one and record what it drains. Two writers would fork the chain, and
    /// waiting would keep callers waiting: this one takes the first file beside it that is free.
    MayBeDraining,
}

/// What the writer and the handles share.
#[derive(Debug)]
struct Shared {
    clock: Arc<dyn Clock>,
    on_failure: OnAuditFailure,
    /// The files that are written.
    files: Vec<PathBuf>,
    head: Mutex<Head>,
    queue: Queue,
    /// How many records are queued, or are being written.
    queued: AtomicU64,
    written: AtomicU64,
    dropped: AtomicU64,
    /// Monotonic milliseconds, plus one, at which the write under way began; 0 when there is none.
    writing_since: AtomicU64,
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_accepting(&self) -> bool {
        if self.on_failure == OnAuditFailure::Degrade {
            return true;
        }
        let writing_since = self.writing_since.load(Ordering::Relaxed);
        let stalled = writing_since != 0
            && u128::from((self.now() + 1).saturating_sub(writing_since))
                >= STALL_LIMIT.as_millis();
        !stalled && self.queue.is_open()
    }

    fn head(&self) -> Head {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AuditStateSource for Shared {
    fn audit_state(&self) -> AuditState {
        let head = self.head();
        AuditState {
            head_sequence: head.sequence,
            head_hash_prefix: head.hash.prefix(),
            queue_depth: self.queued.load(Ordering::Relaxed),
            written: self.written.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            accepting: self.is_accepting(),
        }
    }
}

/// Takes records. Cheap to clone; every data worker has one.
#[derive(Clone)]
pub struct Audit {
    shared: Arc<Shared>,
}

impl Audit {
    /// Opens the sinks, repairs a torn tail, and starts the writer's thread. A file continues the
    /// chain that it holds. Fails when a sink cannot be opened, when another process writes to it that is
    /// not draining, when its last line is not an audit record, or when the thread cannot be made.
    pub fn start(
        config: &AuditConfig,
        others: OtherAgents,
        clock: Arc<dyn Clock>,
        metrics: &Metrics,
    ) -> Result<(Self, AuditWriter), Diagnostic> {
        let mut sinks = Vec::with_capacity(config.sinks.len());
        let mut files = Vec::new();
        let mut events = Vec::new();
        for sink in &config.sinks {
            sinks.push(match sink {
                AuditSink::File {
                    path,
                    rotate_size,
                    keep,
                } => {
                    let opened = match others {
                        OtherAgents::AreMistakes => sink::Sink::file(path, *rotate_size, *keep)?,
                        OtherAgents::MayBeDraining => sink::Sink::beside(path, *rotate_size, *keep)?,
                    };
                    if opened.path != *path {
                        tracing::warn!(in_use = %path.display(), file = %opened.path.display(), "another agent writes to the audit file; this one has a file and a chain of its own");
                        events.push(LifecycleEvent::AuditBeside {
                            in_use: path.clone(),
                            file: opened.path.clone(),
                        });
                    }
                    if let Some(bytes_cut) = opened.bytes_cut {
                        tracing::warn!(path = %opened.path.display(), bytes_cut, "cut a torn tail from the audit file");
                        events.push(LifecycleEvent::AuditRepaired {
                            path: opened.path.clone(),
                            bytes_cut,
                        });
                    }
                    files.push(opened.path);
                    opened.sink
                }
                AuditSink::Stdout => sink::Sink::stdout()?,
            });
        }
        let first = files.first().cloned();
        Self::start_with(sinks, files, events, config.on_failure, clock, metrics).map_err(|error| {
            let path = first.unwrap_or_else(|| PathBuf::from("stdout"));
            Diagnostic::no_thread("audit_not_started", path, "the audit's writer", &error)
        })
    }

    fn start_with(
        sinks: Vec<sink::Sink>,
        files: Vec<PathBuf>,
        events: Vec<LifecycleEvent>,
        on_failure: OnAuditFailure,
        clock: Arc<dyn Clock>,
        metrics: &Metrics,
    ) -> io::Result<(Self, AuditWriter)> {
        let (ended_sender, ended) = mpsc::sync_channel(1);
        let batch_limit = sinks.iter().map(sink::Sink::batch_limit).min();
        let shared = Arc::new(Shared {
            clock,
            on_failure,
            files,
            head: Mutex::new(sinks.first().map(sink::Sink::head).unwrap_or_default()),
            queue: Queue::new(batch_limit.unwrap_or(u64::MAX)),
            queued: AtomicU64::new(0),
            written: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            writing_since: AtomicU64::new(0),
        });
        metrics.observe_audit(Arc::clone(&shared) as Arc<dyn AuditStateSource>);
        let writer = writer::Writer::new(sinks, Arc::clone(&shared));
        let audit = Self { shared };
        for event in events {
            let _ = audit.lifecycle(event);
        }
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || {
                writer.run();
                let _ = ended_sender.send(());
            })?;
        let writer = AuditWriter {
            audit: audit.clone(),
            ended,
        };
        Ok((audit, writer))
    }

    /// Queues a record, without waiting. With `on_failure: degrade` a record that finds the queue full
    /// is dropped and counted; otherwise that is an error, and the response must not be released.
    pub fn record(&self, record: Record<'_>) -> Result<(), AuditUnavailable> {
        thread_local! {
            static MEMBERS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let shared = &*self.shared;
        let is_queued = MEMBERS.with_borrow_mut(|members| {
            members.clear();
            line::append_members(record, members);
            // Counted before it is queued, so that the writer never counts below zero.
            shared.queued.fetch_add(1, Ordering::Relaxed);
            shared.queue.push(members)
        });
        if is_queued {
            return Ok(());
        }
        shared.queued.fetch_sub(1, Ordering::Relaxed);
        shared.dropped.fetch_add(1, Ordering::Relaxed);
        match shared.on_failure {
            OnAuditFailure::Degrade => Ok(()),
            OnAuditFailure::Block => Err(AuditUnavailable),
        }
    }

    /// Queues a record of the agent's own life.
    pub fn lifecycle(&self, event: LifecycleEvent) -> Result<(), AuditUnavailable> {
        self.record(Record::Lifecycle(&LifecycleRecord {
            time: self.shared.clock.wall(),
            event,
        }))
    }

    /// Whether requests may be served: false when nothing could be written for 100 ms and
    /// `on_failure` is `block`.
    pub fn is_accepting(&self) -> bool {
        self.shared.is_accepting()
    }

    /// Sequence number and hash (hexadecimal) of the last record written; of the first sink, where
    /// there are several.
    pub fn head(&self) -> (u64, String) {
        let head = self.shared.head();
        (head.sequence, head.hash.to_string())
    }

    /// The files that are written, in the order of the sinks.
    pub fn files(&self) -> &[PathBuf] {
        &self.shared.files
    }

    /// The writer's state, for `status`.
    pub fn state(&self) -> AuditState {
        self.shared.audit_state()
    }

    /// Waits until everything queued before is written. Does not return while the sinks hang.
    pub async fn flush(&self) {
        let (sender, receiver) = oneshot::channel();
        self.shared.queue.flush(sender);
        let _ = receiver.await;
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Audit")
            .field("head", &self.shared.head())
            .finish_non_exhaustive()
    }
}

/// Ends the writer's thread in good order. Dropping it leaves the thread to the process's end.
#[derive(Debug)]
pub struct AuditWriter {
    audit: Audit,
    ended: mpsc::Receiver<()>,
}

impl AuditWriter {
    /// Writes what is queued and ends the thread; waits for `limit` at most. Returns whether
    /// everything was written.
    pub fn stop(self, limit: Duration) -> bool {
        self.audit.shared.queue.stop();
        self.ended.recv_timeout(limit).is_ok()
    }
}

#[cfg(test)]
mod tests;
