//! The writer's thread: takes records from the queue, and writes them in batches to every sink.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::audit::sink::{Batch, Sink};
use crate::audit::{LifecycleEvent, LifecycleRecord, Message, Record, Shared};
use crate::diagnostics::system_words;

/// How long records gather before they are written: one system call for all of them, and one
/// wake-up of this thread. What a SIGKILL can lose is this and the time of one write.
pub(super) const BATCH_INTERVAL: Duration = Duration::from_millis(5);

/// How long a sink that failed is left alone.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// How often it is looked whether the file is still where it was.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The most that is written at once.
const BATCH_BYTES: u64 = 256 * 1024;

pub(super) struct Writer {
    sinks: Vec<Sink>,
    receiver: Receiver<Message>,
    shared: Arc<Shared>,
    batch: Batch,
    batch_limit: usize,
    /// Who waits for the batch under way.
    waiting: Vec<oneshot::Sender<()>>,
    /// How many dropped records are already recorded.
    dropped_recorded: u64,
    stopping: bool,
}

/// Tells the handles when the thread ends, however it ends.
struct Lives(Arc<Shared>);

impl Drop for Lives {
    fn drop(&mut self) {
        self.0.writer_lives.store(false, Ordering::Relaxed);
    }
}

impl Writer {
    pub(super) fn new(sinks: Vec<Sink>, receiver: Receiver<Message>, shared: Arc<Shared>) -> Self {
        let batch_limit = sinks
            .iter()
            .map(Sink::batch_limit)
            .fold(BATCH_BYTES, u64::min);
        Self {
            sinks,
            receiver,
            shared,
            batch: Batch::default(),
            batch_limit: usize::try_from(batch_limit).unwrap_or(usize::MAX),
            waiting: Vec::new(),
            dropped_recorded: 0,
            stopping: false,
        }
    }

    pub(super) fn run(mut self) {
        let _lives = Lives(Arc::clone(&self.shared));
        let mut looked = self.shared.clock.monotonic();
        while !self.stopping {
            match self.receiver.recv_timeout(LOOK_INTERVAL) {
                Ok(message) => {
                    // While this sleeps, nobody pays for waking it.
                    if matches!(message, Message::Record(_)) {
                        std::thread::sleep(BATCH_INTERVAL);
                    }
                    self.take(message);
                    self.drain();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.stopping = true,
            }
            let now = self.shared.clock.monotonic();
            if now.saturating_sub(looked) >= LOOK_INTERVAL {
                looked = now;
                let wall = self.shared.clock.wall();
                for sink in &mut self.sinks {
                    sink.reopen_if_gone(wall);
                }
            }
        }
    }

    /// Writes everything that is queued.
    fn drain(&mut self) {
        loop {
            while self.batch.bytes() < self.batch_limit {
                match self.receiver.try_recv() {
                    Ok(message) => self.take(message),
                    Err(_) => {
                        self.write();
                        return;
                    }
                }
            }
            self.write();
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Record(record) => {
                self.shared.queued.fetch_sub(1, Ordering::Relaxed);
                // A batch ends before the record that would exceed its limit, and at least holds one.
                self.batch.push(&record);
            }
            Message::Flush(sender) => self.waiting.push(sender),
            Message::Stop => self.stopping = true,
        }
    }

    /// Writes the batch to every sink; where one fails, tries again until it takes it.
    fn write(&mut self) {
        self.record_dropped();
        if self.batch.len() > 0 {
            let wall = self.shared.clock.wall();
            self.shared
                .writing_since
                .store(self.shared.now() + 1, Ordering::Relaxed);
            let mut behind: Vec<&mut Sink> = self.sinks.iter_mut().collect();
            let mut failed = false;
            loop {
                behind.retain_mut(|sink| match sink.write(&self.batch, wall) {
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
                .fetch_add(self.batch.len() as u64, Ordering::Relaxed);
            if let Some(sink) = self.sinks.first() {
                *self
                    .shared
                    .head
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner) = sink.head();
            }
            self.shared.writing_since.store(0, Ordering::Relaxed);
            self.batch.clear();
        }
        for sender in self.waiting.drain(..) {
            let _ = sender.send(());
        }
    }

    /// Records how many records were lost since the last time.
    fn record_dropped(&mut self) {
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        let count = dropped - self.dropped_recorded;
        if count > 0 {
            self.dropped_recorded = dropped;
            self.batch
                .push(&Record::Lifecycle(Box::new(LifecycleRecord {
                    time: self.shared.clock.wall(),
                    event: LifecycleEvent::RecordsDropped { count },
                })));
        }
    }
}
