//! The writer's thread: takes what has gathered in the queue, and writes it to every sink.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::audit::sink::{Batch, Sink};
use crate::audit::{LifecycleEvent, LifecycleRecord, Record, Shared, line};
use crate::diagnostics::system_words;

/// How long records gather before they are written: one system call for all of them, and one
/// wake-up of this thread. What a SIGKILL can lose is this and the time of one write.
const BATCH_INTERVAL: Duration = Duration::from_millis(5);

/// How long a sink that failed is left alone.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// How often it is looked whether the file is still where it was.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    sinks: Vec<Sink>,
    shared: Arc<Shared>,
    /// How many dropped records are already recorded.
    dropped_recorded: u64,
}

/// However its thread ends, or where none can be started: nothing is taken that nobody writes.
impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.queue.close();
    }
}

impl Writer {
    pub(super) fn new(sinks: Vec<Sink>, shared: Arc<Shared>) -> Self {
        Self {
            sinks,
            shared,
            dropped_recorded: 0,
        }
    }

    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut looked = shared.clock.monotonic();
        loop {
            let taken = shared.queue.take(LOOK_INTERVAL, BATCH_INTERVAL);
            for batch in taken.batches {
                self.write(&batch);
                let records = batch.len() as u64;
                shared.queued.fetch_sub(records, Ordering::Relaxed);
                shared.queue.give_back(batch);
            }
            self.record_dropped();
            for written in taken.flushes {
                let _ = written.send(());
            }
            if taken.is_last {
                return;
            }
            let now = shared.clock.monotonic();
            if now.saturating_sub(looked) >= LOOK_INTERVAL {
                looked = now;
                let wall = shared.clock.wall();
                for sink in &mut self.sinks {
                    sink.reopen_if_gone(wall);
                }
            }
        }
    }

    /// Writes a batch to every sink; where one fails, tries again until it takes it.
    fn write(&mut self, batch: &Batch) {
        let wall = self.shared.clock.wall();
        self.shared
            .writing_since
            .store(self.shared.now() + 1, Ordering::Relaxed);
        let mut behind: Vec<&mut Sink> = self.sinks.iter_mut().collect();
        let mut failed = false;
        loop {
            behind.retain_mut(|sink| match sink.write(batch, wall) {
                Ok(()) => false,
                Err(error) => {
                    if !failed {
                        failed = true;
                        tracing::error!(error = %system_words(&error), "audit records cannot be written");
                    }
                    true
                }
            });
            if behind.is_empty() {
                break;
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
        if failed {
            tracing::info!("audit records are written again");
        }
        self.shared
            .written
            .fetch_add(batch.len() as u64, Ordering::Relaxed);
        if let Some(sink) = self.sinks.first() {
            *self
                .shared
                .head
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = sink.head();
        }
        self.shared.writing_since.store(0, Ordering::Relaxed);
    }

    /// Records how many records were lost since the last time.
    fn record_dropped(&mut self) {
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        let count = dropped - self.dropped_recorded;
        if count > 0 {
            self.dropped_recorded = dropped;
            let mut members = Vec::new();
            line::append_members(
                Record::Lifecycle(&LifecycleRecord {
                    time: self.shared.clock.wall(),
                    event: LifecycleEvent::RecordsDropped { count },
                }),
                &mut members,
            );
            let mut batch = Batch::default();
            batch.push(&members);
            self.write(&batch);
        }
    }
}
