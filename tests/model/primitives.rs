//! What a flight is built of, made of loom's: each operation is one step that others come before or after.

use std::ops::Deref;
use std::sync::Arc;

pub(crate) use loom::sync::{Mutex, MutexGuard};

/// As `arc_swap::ArcSwapOption`.
#[derive(Debug)]
pub(crate) struct ArcSwapOption<T>(Mutex<Option<Arc<T>>>);

pub(crate) struct Loaded<T>(Option<Arc<T>>);

impl<T> Deref for Loaded<T> {
    type Target = Option<Arc<T>>;

    fn deref(&self) -> &Option<Arc<T>> {
        &self.0
    }
}

impl<T> ArcSwapOption<T> {
    pub(crate) fn empty() -> Self {
        Self(Mutex::new(None))
    }

    pub(crate) fn load(&self) -> Loaded<T> {
        Loaded(self.load_full())
    }

    pub(crate) fn load_full(&self) -> Option<Arc<T>> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn store(&self, value: Option<Arc<T>>) {
        *self.0.lock().unwrap() = value;
    }

    pub(crate) fn compare_and_swap(&self, current: &Option<Arc<T>>, new: Option<Arc<T>>) {
        let mut held = self.0.lock().unwrap();
        if held.as_ref().map(Arc::as_ptr) == current.as_ref().map(Arc::as_ptr) {
            *held = new;
        }
    }
}

/// As `tokio::sync::watch`, for a value that is sent once.
pub(crate) mod watch {
    use std::fmt;
    use std::future::poll_fn;
    use std::ops::Deref;
    use std::sync::Arc;
    use std::task::{Poll, Waker};

    use loom::sync::{Mutex, MutexGuard};

    struct Channel<V> {
        value: V,
        is_closed: bool,
        waiting: Vec<Waker>,
    }

    pub(crate) struct Sender<V>(Arc<Mutex<Channel<V>>>);

    pub(crate) struct Receiver<V>(Arc<Mutex<Channel<V>>>);

    pub(crate) struct Held<'a, V>(MutexGuard<'a, Channel<V>>);

    #[derive(Debug)]
    pub(crate) struct Closed;

    pub(crate) fn channel<V>(value: V) -> (Sender<V>, Receiver<V>) {
        let channel = Arc::new(Mutex::new(Channel {
            value,
            is_closed: false,
            waiting: Vec::new(),
        }));
        (Sender(Arc::clone(&channel)), Receiver(channel))
    }

    impl<V> Sender<V> {
        pub(crate) fn send(&self, value: V) -> Result<(), Closed> {
            self.change(|channel| channel.value = value);
            Ok(())
        }

        fn change(&self, change: impl FnOnce(&mut Channel<V>)) {
            let mut channel = self.0.lock().unwrap();
            change(&mut channel);
            let waiting = std::mem::take(&mut channel.waiting);
            drop(channel);
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    impl<V> Drop for Sender<V> {
        fn drop(&mut self) {
            self.change(|channel| channel.is_closed = true);
        }
    }

    impl<V> Receiver<V> {
        pub(crate) fn has_changed(&self) -> Result<bool, Closed> {
            match self.0.lock().unwrap().is_closed {
                true => Err(Closed),
                false => Ok(false),
            }
        }

        pub(crate) fn borrow(&self) -> Held<'_, V> {
            Held(self.0.lock().unwrap())
        }

        pub(crate) async fn wait_for(
            &mut self,
            mut is_awaited: impl FnMut(&V) -> bool,
        ) -> Result<Held<'_, V>, Closed> {
            poll_fn(|context| {
                let mut channel = self.0.lock().unwrap();
                if is_awaited(&channel.value) {
                    return Poll::Ready(Ok(()));
                }
                if channel.is_closed {
                    return Poll::Ready(Err(Closed));
                }
                channel.waiting.push(context.waker().clone());
                Poll::Pending
            })
            .await?;
            Ok(self.borrow())
        }
    }

    impl<V> Clone for Receiver<V> {
        fn clone(&self) -> Self {
            Self(Arc::clone(&self.0))
        }
    }

    impl<V> Deref for Held<'_, V> {
        type Target = V;

        fn deref(&self) -> &V {
            &self.0.value
        }
    }

    impl<V> fmt::Debug for Receiver<V> {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.debug_struct("Receiver").finish_non_exhaustive()
        }
    }
}
