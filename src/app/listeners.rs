//! The listeners in force: what a reload binds, keeps and closes.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::bind_problem;
use crate::agent::Agent;
use crate::config::{Bind, Config, Listener, ListenerKind};
use crate::diagnostics::Diagnostics;
use crate::listener::patience::Patience;
use crate::listener::{BoundListener, Workers, accept};

/// A listener is known by what its configuration calls it: several may ask for any free port.
type Key = (Bind, String);

/// What is listened on.
#[derive(Default)]
pub(super) struct Listeners {
    acceptors: HashMap<Key, Acceptor>,
}

struct Acceptor {
    listener: Listener,
    bound: Arc<BoundListener>,
    task: JoinHandle<()>,
}

/// All that a configuration wants listened on, bound, and not served yet.
pub(super) struct PreparedListeners(Vec<PreparedListener>);

struct PreparedListener {
    listener: Listener,
    bound: Arc<BoundListener>,
    address: Bind,
}

impl PreparedListeners {
    /// Where each listens, by name.
    pub(super) fn addresses(&self) -> HashMap<String, Bind> {
        self.0
            .iter()
            .map(|prepared| (prepared.listener.name.clone(), prepared.address.clone()))
            .collect()
    }

    /// The addresses that no destination may have.
    pub(super) fn own(&self, metrics: Option<SocketAddr>) -> Arc<[SocketAddr]> {
        self.0
            .iter()
            .filter_map(|prepared| match prepared.address {
                Bind::Tcp(address) => Some(address),
                Bind::Unix(_) => None,
            })
            .chain(metrics)
            .collect()
    }
}

impl Listeners {
    /// Binds what a configuration adds. What is served stays as it is, also where this fails.
    pub(super) async fn prepare(&self, config: &Config) -> Result<PreparedListeners, Diagnostics> {
        let mut prepared = Vec::new();
        for listener in &config.listeners {
            let bound = match self.bound_at(listener) {
                Some(bound) => bound,
                None => BoundListener::bind(&listener.bind, &listener.access)
                    .await
                    .map(Arc::new)
                    .map_err(|error| bind_problem(config, listener, &error))?,
            };
            let address = bound
                .address()
                .map_err(|error| bind_problem(config, listener, &error))?;
            prepared.push(PreparedListener {
                listener: listener.clone(),
                bound,
                address,
            });
        }
        Ok(PreparedListeners(prepared))
    }

    /// The socket that a listener has already, or takes over from one that was renamed.
    fn bound_at(&self, listener: &Listener) -> Option<Arc<BoundListener>> {
        let asks_for_any = matches!(&listener.bind, Bind::Tcp(address) if address.port() == 0);
        let acceptor = match asks_for_any {
            true => self
                .acceptors
                .get(&(listener.bind.clone(), listener.name.clone())),
            false => self
                .acceptors
                .values()
                .find(|acceptor| acceptor.listener.bind == listener.bind),
        };
        acceptor.map(|acceptor| Arc::clone(&acceptor.bound))
    }

    /// Serves what was prepared, and closes everything else.
    pub(super) fn replace(
        &mut self,
        prepared: PreparedListeners,
        agent: &Arc<Agent>,
        workers: &Workers,
    ) {
        let mut wanted = HashSet::new();
        for PreparedListener {
            listener, bound, ..
        } in prepared.0
        {
            let key = (listener.bind.clone(), listener.name.clone());
            wanted.insert(key.clone());
            if let Some(acceptor) = self.acceptors.get_mut(&key) {
                if acceptor.listener.access != listener.access
                    && let Err(error) = bound.restrict(&listener.access)
                {
                    tracing::error!(%error, listener = listener.name, "access to the socket could not be changed");
                }
                if serves_alike(&acceptor.listener.kind, &listener.kind) {
                    acceptor.listener = listener;
                    continue;
                }
                acceptor.task.abort();
            }
            let task = tokio::spawn(accept(
                Arc::clone(agent),
                workers.clone(),
                Arc::clone(&bound),
                listener.clone(),
                Patience::default(),
            ));
            let acceptor = Acceptor {
                listener,
                bound,
                task,
            };
            self.acceptors.insert(key, acceptor);
        }
        self.acceptors.retain(|key, acceptor| {
            let keep = wanted.contains(key);
            if !keep {
                acceptor.task.abort();
            }
            keep
        });
    }

    /// Takes no more connections.
    pub(super) fn close(&mut self) {
        for (_, acceptor) in self.acceptors.drain() {
            acceptor.task.abort();
        }
    }
}

/// Whether a listener serves as another does. A gateway looks its destination up by name.
fn serves_alike(one: &ListenerKind, other: &ListenerKind) -> bool {
    match (one, other) {
        (
            ListenerKind::Gateway { destination: one },
            ListenerKind::Gateway { destination: other },
        ) => one.name == other.name,
        _ => one == other,
    }
}
