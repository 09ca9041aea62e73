//! The listeners in force: what a reload binds, keeps and closes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{access_problem, bind_problem};
use crate::agent::Agent;
use crate::config::{Bind, Config, Listener, ListenerKind};
use crate::diagnostics::Diagnostics;
use crate::listener::patience::UNATTESTED;
use crate::listener::{AccessChange, BoundListener, Workers, accept};
use crate::service_manager::ServiceManager;

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
    access_change: Option<AccessChange>,
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

    /// Changes who may connect to the sockets that were there before, to all or to none.
    pub(super) fn change_access(&self, config: &Config) -> Result<(), Diagnostics> {
        for (index, prepared) in self.0.iter().enumerate() {
            let made = prepared.access_change.as_ref().map(AccessChange::make);
            if let Some(Err(error)) = made {
                let begun = self.0.iter().take(index + 1);
                for change in begun.filter_map(|prepared| prepared.access_change.as_ref()) {
                    change.undo();
                }
                return Err(access_problem(config, &prepared.listener, &error));
            }
        }
        Ok(())
    }
}

impl Listeners {
    /// Binds what a configuration adds. What is served stays as it is, also where this fails.
    /// At the start, what the service manager handed over is taken instead.
    pub(super) fn prepare(
        &self,
        config: &Config,
        manager: &mut ServiceManager,
    ) -> Result<PreparedListeners, Diagnostics> {
        let mut prepared = Vec::new();
        for listener in &config.listeners {
            // A socket unit's socket is taken to have what is configured.
            let mut former = Some(&listener.access);
            let bound = match self.serving_at(listener) {
                Some(acceptor) => {
                    former = Some(&acceptor.listener.access);
                    Ok(Arc::clone(&acceptor.bound))
                }
                None => match manager.take(&listener.name, &listener.bind)? {
                    Some(handed_over) => {
                        former = former.filter(|_| !handed_over.is_kept());
                        BoundListener::take_over(handed_over).map(Arc::new)
                    }
                    None => BoundListener::bind(&listener.bind, &listener.access).map(Arc::new),
                },
            }
            .map_err(|error| bind_problem(config, listener, &error))?;
            let access_change = match former == Some(&listener.access) {
                true => None,
                false => bound
                    .access_change(former, &listener.access)
                    .map_err(|error| access_problem(config, listener, &error))?,
            };
            let address = bound
                .address()
                .map_err(|error| bind_problem(config, listener, &error))?;
            prepared.push(PreparedListener {
                listener: listener.clone(),
                bound,
                address,
                access_change,
            });
        }
        Ok(PreparedListeners(prepared))
    }

    /// What serves at a listener's socket already, also under another name.
    fn serving_at(&self, listener: &Listener) -> Option<&Acceptor> {
        let asks_for_any = matches!(&listener.bind, Bind::Tcp(address) if address.port() == 0);
        match asks_for_any {
            true => self
                .acceptors
                .get(&(listener.bind.clone(), listener.name.clone())),
            false => self
                .acceptors
                .values()
                .find(|acceptor| acceptor.listener.bind == listener.bind),
        }
    }

    /// Serves what was prepared, and closes everything else. The service manager keeps what is served.
    pub(super) fn replace(
        &mut self,
        prepared: PreparedListeners,
        agent: &Arc<Agent>,
        workers: &Workers,
        manager: &ServiceManager,
    ) {
        self.close_all_but(&prepared, manager);
        for PreparedListener {
            listener, bound, ..
        } in prepared.0
        {
            let key = (listener.bind.clone(), listener.name.clone());
            if let Some(acceptor) = self.acceptors.get_mut(&key) {
                if serves_alike(&acceptor.listener.kind, &listener.kind) {
                    acceptor.listener = listener;
                    continue;
                }
                acceptor.task.abort();
            }
            if !bound.outlives_us() && manager.keep(&listener.name, &listener.bind, bound.as_fd()) {
                bound.kept(true);
            }
            let task = tokio::spawn(accept(
                Arc::clone(agent),
                workers.clone(),
                Arc::clone(&bound),
                listener.clone(),
                UNATTESTED,
            ));
            let acceptor = Acceptor {
                listener,
                bound,
                task,
            };
            self.acceptors.insert(key, acceptor);
        }
    }

    /// Closes what is not among what was prepared.
    fn close_all_but(&mut self, prepared: &PreparedListeners, manager: &ServiceManager) {
        self.acceptors.retain(|(bind, name), acceptor| {
            let is_wanted = |known: &PreparedListener| {
                known.listener.bind == *bind && known.listener.name == *name
            };
            let keep = prepared.0.iter().any(is_wanted);
            if !keep {
                acceptor.task.abort();
                // One that is renamed is kept again.
                if acceptor.bound.outlives_us() && manager.forget(name, bind) {
                    acceptor.bound.kept(false);
                }
            }
            keep
        });
    }

    /// Takes no more connections. Sockets that outlive this agent stay open: who waits there is the
    /// next agent's. Who waits at others is let in, and then they are closed.
    pub(super) async fn close(&mut self) {
        for acceptor in self.acceptors.values_mut() {
            let _ = (&mut acceptor.task).await;
        }
        self.release();
    }

    /// Closes the sockets that do not outlive this agent, once nobody is let in there.
    pub(super) fn release(&mut self) {
        self.acceptors
            .retain(|_, acceptor| acceptor.bound.outlives_us());
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
