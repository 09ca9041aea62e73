//! Threads that may look at other processes.
//!
//! To ask `/proc` for another process's executable, namespaces and descriptors is ptrace(2) access, and
//! a thread under Landlock has none outside of its own domain, whatever its capabilities
//! (Documentation/userspace-api/landlock.rst, "Ptrace restrictions"). An agent that confines itself
//! therefore calls [`start`] first: what looks at processes then runs on threads that are kept aside,
//! and every other thread can be confined. Without [`start`] nothing is kept aside: each thread looks
//! for itself, and what blocks runs in tokio's blocking pool.
//!
//! A process can have whoever looks at it wait for as long as it likes. So whoever looks for a connection has
//! the process's [`Turn`], and who waits for that keeps no observer. Who looks without is one of few.
//!
//! The kernel may refuse more threads (pthread_create(3), EAGAIN). One observer is there from the start and stays,
//! so that callers are looked at all the same.

#[cfg_attr(
    not(any(target_os = "linux", test)),
    expect(dead_code, reason = "other systems look for no caller")
)]
mod turn;

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

pub(crate) use turn::Turn;
#[cfg(all(test, target_os = "linux"))]
pub(crate) use turn::tests::full;
#[cfg(target_os = "linux")]
pub(crate) use turn::{MOST_WAITING, too_many_wait};

/// As many as tokio has in its blocking pool: a process can make the thread that looks at it wait.
pub(crate) const MOST_OBSERVERS: usize = 512;

/// How long an observer waits for more to do, where another one does too.
const IDLE: Duration = Duration::from_secs(10);

/// How long a job is queued at least before it is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// When it is tried again to make an observer.
const AGAIN: Duration = Duration::from_millis(100);

/// How often that fails before jobs are given up.
const TRIES: usize = 10;

type Job = Box<dyn FnOnce() + Send>;

type Look = Pin<Box<dyn Future<Output = ()> + Send>>;

static POOL: OnceLock<Arc<Pool>> = OnceLock::new();

thread_local! {
    static LOOKS_ITSELF: Cell<bool> = const { Cell::new(false) };
}

pub(crate) struct Pool {
    state: Mutex<State>,
    arrived: Condvar,
    /// To the one thread that makes threads: a thread has the confinement of the one that made it.
    maker: mpsc::Sender<NewThread>,
}

#[derive(Default)]
struct State {
    /// In the order of arrival, with when that was.
    jobs: VecDeque<(Instant, Job)>,
    waiting: usize,
    /// Those that are yet to be made are counted too.
    threads: usize,
    /// Whether the last one that was wanted could not be made.
    lacks_threads: bool,
}

impl State {
    /// Takes the jobs out that have been queued for [`PATIENCE`].
    fn take_given_up(&mut self) -> Vec<Job> {
        let is_over = |(arrived, _): &(Instant, Job)| arrived.elapsed() >= PATIENCE;
        let given_up = self.jobs.partition_point(is_over);
        self.jobs.drain(..given_up).map(|(_, job)| job).collect()
    }
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
/// That thread, or the first observer, cannot be made.
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

/// Runs a task on an observer, and waits for that, without a [`Turn`]. `None` where it panicked, or no observer
/// can be had.
#[cfg(target_os = "linux")]
pub(crate) fn ask<T: Send + 'static>(task: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    answer_to(task).recv().ok()
}

/// As [`ask`], but waits no longer than `limit`.
#[cfg(target_os = "linux")]
pub(crate) fn ask_within<T: Send + 'static>(
    limit: Duration,
    task: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    answer_to(task).recv_timeout(limit).ok()
}

#[cfg(target_os = "linux")]
fn answer_to<T: Send + 'static>(task: impl FnOnce() -> T + Send + 'static) -> mpsc::Receiver<T> {
    let (done, outcome) = mpsc::sync_channel(1);
    let task = move || drop(done.send(task()));
    match POOL.get() {
        Some(pool) => pool.run(Box::new(task)),
        None => task(),
    }
    outcome
}

/// Runs a task on an observer, and does not wait for it, nor the task for a [`Turn`].
#[cfg(target_os = "linux")]
pub(crate) fn run_without_waiting(task: impl FnOnce() + Send + 'static) {
    match (POOL.get(), tokio::runtime::Handle::try_current()) {
        (Some(pool), _) => pool.run(Box::new(task)),
        (None, Ok(runtime)) => drop(runtime.spawn_blocking(task)),
        (None, Err(_)) => task(),
    }
}

/// Runs a look at other processes, which may block, on an observer. Needs a tokio runtime.
///
/// # Errors
/// It panicked, no observer can be had, or the runtime is shutting down.
pub fn look_and_wait<T: Send + 'static>(
    look: impl Future<Output = T> + Send + 'static,
) -> impl Future<Output = io::Result<T>> + Send {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let look = async move {
        let _ = done.send(look.await);
    };
    match POOL.get() {
        Some(pool) => pool.look(look),
        None => drop(tokio::task::spawn_blocking(|| look_here(look))),
    }
    async {
        outcome
            .await
            .map_err(|_| io::Error::other("no observer answered"))
    }
}

/// Runs a look on the calling thread, which waits for whatever the look waits for.
pub fn look_here<T>(look: impl Future<Output = T>) -> T {
    struct Waiting(Thread);
    impl Wake for Waiting {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Waiting(std::thread::current())));
    let mut look = pin!(look);
    loop {
        match look.as_mut().poll(&mut Context::from_waker(&waker)) {
            std::task::Poll::Ready(outcome) => return outcome,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
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
    pub(crate) fn start(prepare: impl FnOnce() + Send + 'static) -> io::Result<Arc<Self>> {
        let (maker, wanted) = mpsc::channel();
        let pool = Self::of(maker);
        let own = Arc::clone(&pool);
        let (ready, is_ready) = mpsc::channel();
        std::thread::Builder::new()
            .name("maker".to_owned())
            .spawn(move || {
                prepare();
                own.state().threads += 1;
                let _ = ready.send(own.spawn_observer());
                for thread in wanted {
                    own.make(thread);
                }
            })?;
        is_ready.recv().map_err(io::Error::other)??;
        Ok(pool)
    }

    fn of(maker: mpsc::Sender<NewThread>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            arrived: Condvar::new(),
            maker,
        })
    }

    pub(crate) fn look(self: &Arc<Self>, look: impl Future<Output = ()> + Send + 'static) {
        Arc::new(Looking {
            look: Mutex::new(Box::pin(look)),
            wakes: AtomicUsize::new(0),
            pool: Arc::clone(self),
        })
        .wake();
    }

    fn run(&self, job: Job) {
        let mut state = self.state();
        state.jobs.push_back((Instant::now(), job));
        if state.waiting >= state.jobs.len() {
            self.arrived.notify_one();
        } else if state.threads < MOST_OBSERVERS {
            state.threads += 1;
            // It lives as long as the process.
            let _ = self.maker.send(NewThread::Observer);
        }
    }

    fn make(self: &Arc<Self>, thread: NewThread) {
        match thread {
            NewThread::Observer => self.make_observer(|| self.spawn_observer()),
            NewThread::Named(name, task, outcome) => {
                let _ = outcome.send(spawn_looking(name, task));
            }
        }
    }

    /// Makes an observer, where and as long as anything is queued. While that fails, jobs for which nobody had time
    /// are dropped, so that whoever waits for one sees that no answer comes.
    fn make_observer(&self, mut spawn: impl FnMut() -> io::Result<()>) {
        let mut failed = 0;
        while self.is_wanted() {
            let made = spawn();
            let lacks_threads = made.is_err();
            let lacked = std::mem::replace(&mut self.state().lacks_threads, lacks_threads);
            let Err(error) = made else { return };
            if !lacked {
                tracing::warn!(%error, "no more threads can be made to look at callers: some may wait, or be refused as `attestation_unavailable`");
            }
            failed += 1;
            if failed >= TRIES {
                // Dropped without the lock, for that may wake others, who are queued.
                let given_up = self.state().take_given_up();
                drop(given_up);
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Whether there is anything to do for an observer that is yet to be made; else it is counted no more.
    fn is_wanted(&self) -> bool {
        let mut state = self.state();
        let is_wanted = !state.jobs.is_empty();
        if !is_wanted {
            state.threads -= 1;
        }
        is_wanted
    }

    fn spawn_observer(self: &Arc<Self>) -> io::Result<()> {
        let pool = Arc::clone(self);
        spawn_looking("observer".to_owned(), Box::new(move || pool.observe(IDLE)))
    }

    /// Does what there is to do, until there is nothing for a while and another observer waits too.
    fn observe(&self, idle: Duration) {
        let mut state = self.state();
        loop {
            if let Some((_, job)) = state.jobs.pop_front() {
                drop(state);
                // Whoever waits for it sees that no answer comes.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.state();
                continue;
            }
            state.waiting += 1;
            let (woken, timeout) = self
                .arrived
                .wait_timeout(state, idle)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.waiting -= 1;
            if timeout.timed_out() && state.jobs.is_empty() && state.waiting > 0 {
                state.threads -= 1;
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a thread that may look at other processes itself.
fn spawn_looking(name: String, task: Job) -> io::Result<()> {
    let task = || {
        LOOKS_ITSELF.set(true);
        task();
    };
    std::thread::Builder::new().name(name).spawn(task).map(drop)
}

/// A look in the pool. It has an observer while it does something, and none while it waits.
struct Looking {
    look: Mutex<Look>,
    /// How often it was woken since it began to do what it does now.
    wakes: AtomicUsize,
    pool: Arc<Pool>,
}

impl Wake for Looking {
    fn wake(self: Arc<Self>) {
        if self.wakes.fetch_add(1, Ordering::AcqRel) == 0 {
            let pool = Arc::clone(&self.pool);
            pool.run(Box::new(move || self.go_on()));
        }
    }
}

impl Looking {
    /// Goes on until the look has ended or waits. Is run by one observer at a time.
    fn go_on(self: Arc<Self>) {
        let waker = Waker::from(Arc::clone(&self));
        let mut look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let wakes = self.wakes.load(Ordering::Acquire);
            let outcome = look.as_mut().poll(&mut Context::from_waker(&waker));
            let waits = || {
                self.wakes
                    .compare_exchange(wakes, 0, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
            };
            // Of a look that has ended, `wakes` stays above zero: it is run no more.
            if outcome.is_ready() || waits() {
                return;
            }
        }
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

    const SOON: Duration = Duration::from_secs(20);

    fn no_thread() -> io::Error {
        io::Error::from_raw_os_error(libc::EAGAIN)
    }

    #[test]
    fn who_cannot_be_looked_at_for_want_of_threads_is_told_and_others_are_looked_at_later() {
        let (maker, wanted) = mpsc::channel();
        let pool = Pool::of(maker);
        let is_wanted = || matches!(wanted.try_recv(), Ok(NewThread::Observer));
        let unanswered = ask(&pool, || ());
        assert!(is_wanted());
        pool.make_observer(|| Err(no_thread()));
        assert_eq!(
            unanswered.recv_timeout(SOON),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );

        // What is dropped may queue more.
        let (waked, wakes) = mpsc::channel();
        let other = Arc::clone(&pool);
        let woken = WhenDropped(Some(move || waked.send(ask(&other, || ())).unwrap()));
        pool.look(async move {
            let _woken = woken;
        });
        assert!(is_wanted());
        pool.make_observer(|| Err(no_thread()));
        let unanswered = wakes.recv_timeout(SOON).unwrap();
        assert!(unanswered.recv_timeout(SOON).is_err());

        let answered = ask(&pool, || ());
        while is_wanted() {}
        let mut tries = 0;
        pool.make_observer(|| {
            tries += 1;
            match tries {
                1 => Err(no_thread()),
                _ => pool.spawn_observer(),
            }
        });
        answered.recv_timeout(SOON).unwrap();
        // What is left of those that were wanted is made for nobody.
        pool.make_observer(|| panic!("nothing is queued"));
    }

    struct WhenDropped<F: FnOnce()>(Option<F>);

    impl<F: FnOnce()> Drop for WhenDropped<F> {
        fn drop(&mut self) {
            self.0.take().unwrap()();
        }
    }

    #[test]
    fn one_observer_stays() {
        let (maker, _wanted) = mpsc::channel();
        let pool = Pool::of(maker);
        pool.state().threads = 2;
        let (ended, ends) = mpsc::channel();
        for _ in 0..2 {
            let (pool, ended) = (Arc::clone(&pool), ended.clone());
            std::thread::spawn(move || {
                pool.observe(Duration::from_millis(1));
                ended.send(()).unwrap();
            });
        }
        ends.recv_timeout(SOON).unwrap();
        ends.recv_timeout(Duration::from_millis(200)).unwrap_err();
        assert!(ask(&pool, || true).recv_timeout(SOON).unwrap());
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

    /// No process has these numbers.
    #[cfg(target_os = "linux")]
    const STUCK: u32 = u32::MAX;
    #[cfg(target_os = "linux")]
    const ANOTHER: u32 = u32::MAX - 1;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_that_makes_who_looks_wait_has_one_observer() {
        let pool = Pool::start(|| ()).unwrap();
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let look_at = |pid, look: Box<dyn FnOnce() -> bool + Send>| {
            let (done, outcome) = mpsc::channel();
            pool.look(async move {
                let _turn = Turn::at(pid).await.unwrap();
                done.send(look()).unwrap();
            });
            outcome
        };
        let stuck: Vec<_> = (0..2 * MOST_OBSERVERS)
            .map(|_| {
                let held = Arc::clone(&held);
                look_at(
                    STUCK,
                    Box::new(move || held.lock().unwrap().recv().is_err()),
                )
            })
            .collect();
        let another = look_at(ANOTHER, Box::new(|| true));
        assert!(another.recv_timeout(Duration::from_secs(20)).unwrap());
        assert!(stuck.iter().all(|outcome| outcome.try_recv().is_err()));
        drop(release);
        assert!(stuck.into_iter().all(|outcome| outcome.recv().unwrap()));
    }

    #[test]
    fn a_look_that_is_woken_while_it_does_something_goes_on_after_that() {
        let pool = Pool::start(|| ()).unwrap();
        let (done, outcome) = mpsc::channel();
        let (mut left, is_run) = (1000, Mutex::new(()));
        let (wakers, woken) = mpsc::channel::<Waker>();
        std::thread::spawn(move || woken.into_iter().for_each(Waker::wake));
        pool.look(async move {
            std::future::poll_fn(|context| {
                let _alone = is_run.try_lock().unwrap();
                wakers.send(context.waker().clone()).unwrap();
                wakers.send(context.waker().clone()).unwrap();
                left -= 1;
                match left {
                    0 => std::task::Poll::Ready(()),
                    _ => std::task::Poll::Pending,
                }
            })
            .await;
            done.send(()).unwrap();
        });
        outcome.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn what_panics_gives_no_answer_and_others_are_answered() {
        let pool = Pool::start(|| ()).unwrap();
        let panicked: mpsc::Receiver<()> = ask(&pool, || std::panic::resume_unwind(Box::new(())));
        assert!(panicked.recv().is_err());
        assert!(ask(&pool, || LOOKS_ITSELF.get()).recv().unwrap());
    }
}
