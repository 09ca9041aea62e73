//! One look at a process at a time.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// How many may wait for one that makes them wait: as many as one identity may have connections by default.
pub(crate) const MOST_WAITING: usize = 4096;

type Turns = HashMap<u32, Arc<tokio::sync::Mutex<()>>>;

/// By process number. There is an entry while somebody looks at that process.
static TURNS: LazyLock<Mutex<Turns>> = LazyLock::new(Mutex::default);

/// The right to look at a process, until it is dropped. Nobody who has it may wait for it again.
#[derive(Debug)]
pub(crate) struct Turn {
    pid: u32,
    right: Option<OwnedMutexGuard<()>>,
}

impl Turn {
    /// Waits, in the order of arrival, until nobody else looks at the process that has this number.
    ///
    /// # Errors
    /// [`MOST_WAITING`] wait already.
    pub(crate) async fn at(pid: u32) -> io::Result<Self> {
        // Of those who count, one is the map, and one looks.
        let is_full = |turn: &Arc<_>| Arc::strong_count(turn) > MOST_WAITING + 1;
        if turns().get(&pid).is_some_and(is_full) {
            return Err(too_many_wait());
        }
        Ok(Self::again_at(pid).await)
    }

    /// As [`Turn::at`], however many wait: for one who has had a turn.
    pub(crate) async fn again_at(pid: u32) -> Self {
        let turn = Arc::clone(turns().entry(pid).or_default());
        let right = Some(turn.lock_owned().await);
        Self { pid, right }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.right = None;
        let mut turns = turns();
        if turns
            .get(&self.pid)
            .is_some_and(|turn| Arc::strong_count(turn) == 1)
        {
            turns.remove(&self.pid);
        }
    }
}

/// What somebody is told who would have to wait with [`MOST_WAITING`] others.
pub(crate) fn too_many_wait() -> io::Error {
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        "too many wait already for a look at it",
    )
}

fn turns() -> MutexGuard<'static, Turns> {
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::pin::Pin;
    use std::task::{Context, Waker};

    use super::*;
    use crate::observers::look_here;

    /// No process has it.
    const PID: u32 = u32::MAX - 2;

    pub(crate) type Waiting = Pin<Box<dyn Future<Output = io::Result<Turn>>>>;

    /// A turn, and as many who wait for theirs as may.
    pub(crate) fn full(pid: u32) -> (Turn, Vec<Waiting>) {
        let first = look_here(Turn::at(pid)).unwrap();
        let mut waiting: Vec<Waiting> = Vec::new();
        for _ in 0..MOST_WAITING {
            let mut turn: Waiting = Box::pin(Turn::at(pid));
            let polled = turn.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_pending());
            waiting.push(turn);
        }
        (first, waiting)
    }

    #[test]
    fn who_comes_when_too_many_wait_is_told_so() {
        let (first, waiting) = full(PID);
        let refused = look_here(Turn::at(PID)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);

        drop(first);
        for turn in waiting {
            drop(look_here(turn).unwrap());
        }
        assert!(!turns().contains_key(&PID));
        drop(look_here(Turn::at(PID)).unwrap());
    }
}
