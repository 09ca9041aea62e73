//! What a data worker's single thread needs of a runtime.

use std::future::Future;

/// Runs hyper's tasks on the current thread: nothing on a data worker is `Send`.
#[derive(Debug, Clone, Copy)]
pub struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
