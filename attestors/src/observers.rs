//! Threads that may look at other processes.
//!
//! To ask `/proc` for another process's executable, namespaces and descriptors is ptrace(2) access, and
//! a thread under Landlock has none outside of its own domain, whatever its capabilities
//! (Documentation/userspace-api/landlock.rst, "Ptrace restrictions"). An agent that confines itself
//! therefore calls [`start`] first: what looks at processes then runs on threads that are kept aside,
//! and every other thread can be confined. Without [`start`] nothing is kept aside: each thread looks
//! for itself, and what blocks runs in tokio's blocking pool.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

/// As many as tokio has in its blocking pool: a process can make the thread that looks at it wait.
const MOST_OBSERVERS: usize = 512;

/// How long an observer waits for more to do.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

static POOL: OnceLock<Arc<Pool>> = OnceLock::new();

thread_local! {
    static LOOKS_ITSELF: Cell<bool> = const { Cell::new(false) };
}

struct Pool {
    state: Mutex<State>,
    arrived: Condvar,
    /// To the one thread that makes threads: a thread has the confinement of the one that made it.
    maker: mpsc::Sender<NewThread>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    waiting: usize,
    threads: usize,
}

enum NewThread {
    Observer,
    Named(String, Job, mpsc::Sender<io::Result<()>>),
}

/// Keeps threads aside that may look at other processes. To be called once, by a thread that may,
/// before it is confined. `prepare` runs in the thread from which all others are made: what it gives
/// up they do not have.
///
/// # Errors
/// The thread cannot be made.
pub fn start(prepare: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let pool = Pool::start(prepare)?;
    POOL.set(pool)
        .map_err(|_| io::Error::other("observers were started before"))
}

/// True where this thread may look at a process itself, without asking another to.
#[cfg(target_os = "linux")]
pub(crate) fn looks_itself() -> bool {
    LOOKS_ITSELF.get() || POOL.get().is_none()
}

/// Runs a task of a few system calls on an observer, and waits for it. `None` where it panicked.
#[cfg(target_os = "linux")]
pub(crate) fn look<T: Send + 'static>(task: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    look_within(Duration::MAX, task)
}

/// As [`look`], and waits no longer than `limit`; `None` where no answer came.
#[cfg(target_os = "linux")]
pub(crate) fn look_within<T: Send + 'static>(
    limit: Duration,
    task: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let Some(pool) = POOL.get() else {
        return Some(task());
    };
    let (done, outcome) = mpsc::sync_channel(1);
    pool.run(Box::new(move || {
        let _ = done.send(task());
    }));
    outcome.recv_timeout(limit).ok()
}

/// Has a task run that looks at other processes and may block, and does not wait for it.
#[cfg(target_os = "linux")]
pub(crate) fn look_without_waiting(task: impl FnOnce() + Send + 'static) {
    match (POOL.get(), tokio::runtime::Handle::try_current()) {
        (Some(pool), _) => pool.run(Box::new(task)),
        (None, Ok(runtime)) => drop(runtime.spawn_blocking(task)),
        (None, Err(_)) => task(),
    }
}

/// Runs a task that looks at other processes and may block. Needs a tokio runtime.
///
/// # Errors
/// The task panicked, or the runtime is shutting down.
pub fn look_and_wait<T: Send + 'static>(
    task: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = io::Result<T>> + Send {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let task = Box::new(move || {
        let _ = done.send(task());
    });
    match POOL.get() {
        Some(pool) => pool.run(task),
        None => drop(tokio::task::spawn_blocking(task)),
    }
    async { outcome.await.map_err(io::Error::other) }
}

/// Starts a thread that may look at other processes itself.
///
/// # Errors
/// The thread cannot be made.
pub fn spawn(name: String, task: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let Some(pool) = POOL.get() else {
        return std::thread::Builder::new().name(name).spawn(task).map(drop);
    };
    let (made, outcome) = mpsc::channel();
    pool.maker
        .send(NewThread::Named(name, Box::new(task), made))
        .map_err(|_| io::Error::other("the thread that makes threads is gone"))?;
    outcome.recv().map_err(io::Error::other)?
}

impl Pool {
    fn start(prepare: impl FnOnce() + Send + 'static) -> io::Result<Arc<Self>> {
        let (maker, wanted) = mpsc::channel();
        let pool = Arc::new(Self {
            state: Mutex::default(),
            arrived: Condvar::new(),
            maker,
        });
        let own = Arc::clone(&pool);
        let (ready, is_ready) = mpsc::channel();
        std::thread::Builder::new()
            .name("maker".to_owned())
            .spawn(move || {
                prepare();
                let _ = ready.send(());
                for thread in wanted {
                    own.make(thread);
                }
            })?;
        is_ready.recv().map_err(io::Error::other)?;
        Ok(pool)
    }

    fn run(&self, job: Job) {
        let mut state = self.state();
        state.jobs.push_back(job);
        if state.waiting >= state.jobs.len() {
            self.arrived.notify_one();
        } else if state.threads < MOST_OBSERVERS {
            state.threads += 1;
            // It lives as long as the process.
            let _ = self.maker.send(NewThread::Observer);
        }
    }

    fn make(self: &Arc<Self>, thread: NewThread) {
        let looks_itself = |task: Job| {
            move || {
                LOOKS_ITSELF.set(true);
                task();
            }
        };
        match thread {
            NewThread::Observer => {
                let pool = Arc::clone(self);
                let made = std::thread::Builder::new()
                    .name("observer".to_owned())
                    .spawn(looks_itself(Box::new(move || pool.observe())));
                if made.is_err() {
                    self.state().threads -= 1;
                }
            }
            NewThread::Named(name, task, outcome) => {
                let made = std::thread::Builder::new()
                    .name(name)
                    .spawn(looks_itself(task));
                let _ = outcome.send(made.map(drop));
            }
        }
    }

    /// Does what there is to do, until there is nothing for a while.
    fn observe(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // Whoever waits for it sees that no answer comes.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.state();
                continue;
            }
            state.waiting += 1;
            let (woken, timeout) = self
                .arrived
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.waiting -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask<T: Send + 'static>(
        pool: &Pool,
        task: impl FnOnce() -> T + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (done, outcome) = mpsc::channel();
        pool.run(Box::new(move || {
            let _ = done.send(task());
        }));
        outcome
    }

    #[test]
    fn who_makes_an_observer_wait_makes_nobody_else_wait() {
        let pool = Pool::start(|| ()).unwrap();
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let stuck: Vec<_> = (0..20)
            .map(|_| {
                let held = Arc::clone(&held);
                ask(&pool, move || held.lock().unwrap().recv().is_err())
            })
            .collect();
        let outcomes: Vec<_> = (0..1000).map(|number| ask(&pool, move || number)).collect();
        for (number, outcome) in outcomes.into_iter().enumerate() {
            assert_eq!(outcome.recv().unwrap(), number);
        }
        drop(release);
        assert!(stuck.into_iter().all(|outcome| outcome.recv().unwrap()));
    }

    #[test]
    fn what_panics_gives_no_answer_and_others_are_answered() {
        let pool = Pool::start(|| ()).unwrap();
        let panicked: mpsc::Receiver<()> = ask(&pool, || std::panic::resume_unwind(Box::new(())));
        assert!(panicked.recv().is_err());
        assert!(ask(&pool, || LOOKS_ITSELF.get()).recv().unwrap());
    }
}
