//! What waits for the writer: records as text, in batches that it writes one by one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::sink::Batch;

/// How many records may wait. At 64 connections a worker cannot have more than a few waiting; this
/// many cover a burst of some 100 ms.
pub(super) const CAPACITY: usize = 16_384;

/// The most that is written at once.
const BATCH_BYTES: u64 = 256 * 1024;

/// How many batches are kept to be filled again.
const SPARE: usize = 2;

/// Shared by all workers and the writer.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    /// The writer takes no more; set while `waiting` is locked.
    is_closed: AtomicBool,
    batch_limit: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Each with at least one record.
    batches: VecDeque<Batch>,
    records: usize,
    flushes: Vec<oneshot::Sender<()>>,
    stops: bool,
    spare: Vec<Batch>,
}

impl Waiting {
    /// Whether somebody waits for what is queued to be written.
    fn is_awaited(&self) -> bool {
        self.stops || !self.flushes.is_empty()
    }
}

/// What the writer takes at once.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) batches: VecDeque<Batch>,
    /// Who waits until they are written.
    pub(super) flushes: Vec<oneshot::Sender<()>>,
    /// Nothing comes after it.
    pub(super) is_last: bool,
}

impl Queue {
    /// An empty queue. A batch ends before the record that would exceed `batch_limit` bytes, and at least holds one.
    pub(super) fn new(batch_limit: u64) -> Self {
        let batch_limit = batch_limit.min(BATCH_BYTES);
        Self {
            waiting: Mutex::default(),
            arrived: Condvar::new(),
            is_closed: AtomicBool::new(false),
            batch_limit: usize::try_from(batch_limit).unwrap_or(usize::MAX),
        }
    }

    /// Queues the members of a record. False where it is full, or closed.
    pub(super) fn push(&self, members: &[u8]) -> bool {
        let mut waiting = self.lock();
        if !self.is_open() || waiting.records >= CAPACITY {
            return false;
        }
        let has_room = |batch: &&mut Batch| batch.bytes_with(members) <= self.batch_limit;
        match waiting.batches.back_mut().filter(has_room) {
            Some(batch) => batch.push(members),
            None => {
                let mut batch = waiting.spare.pop().unwrap_or_default();
                batch.push(members);
                waiting.batches.push_back(batch);
            }
        }
        waiting.records += 1;
        let is_first = waiting.records == 1;
        drop(waiting);
        if is_first {
            self.arrived.notify_one();
        }
        true
    }

    /// Has `written` told when everything queued before is written; it is dropped where nothing is
    /// written any more.
    pub(super) fn flush(&self, written: oneshot::Sender<()>) {
        let mut waiting = self.lock();
        if self.is_open() {
            waiting.flushes.push(written);
            self.arrived.notify_one();
        }
    }

    /// Has the writer end when everything queued before is written.
    pub(super) fn stop(&self) {
        self.lock().stops = true;
        self.arrived.notify_one();
    }

    /// Takes no more records.
    pub(super) fn close(&self) {
        let mut waiting = self.lock();
        self.is_closed.store(true, Ordering::Relaxed);
        waiting.flushes.clear();
    }

    /// Whether records are taken.
    pub(super) fn is_open(&self) -> bool {
        !self.is_closed.load(Ordering::Relaxed)
    }

    /// Waits until there is something to take, for `limit` at most; then, where nobody waits for it, lets
    /// more gather for `gathering`. While the writer sleeps, nobody pays for waking it.
    pub(super) fn take(&self, limit: Duration, gathering: Duration) -> Taken {
        let is_empty = |waiting: &mut Waiting| waiting.batches.is_empty() && !waiting.is_awaited();
        let (mut waiting, _) = self
            .arrived
            .wait_timeout_while(self.lock(), limit, is_empty)
            .unwrap_or_else(PoisonError::into_inner);
        if !waiting.batches.is_empty() && !waiting.is_awaited() {
            drop(waiting);
            std::thread::sleep(gathering);
            waiting = self.lock();
        }
        waiting.records = 0;
        if waiting.stops {
            self.is_closed.store(true, Ordering::Relaxed);
        }
        Taken {
            batches: std::mem::take(&mut waiting.batches),
            flushes: std::mem::take(&mut waiting.flushes),
            is_last: waiting.stops,
        }
    }

    /// Keeps a batch that was written, to be filled again.
    pub(super) fn give_back(&self, mut batch: Batch) {
        batch.clear();
        let mut waiting = self.lock();
        if waiting.spare.len() < SPARE {
            waiting.spare.push(batch);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
