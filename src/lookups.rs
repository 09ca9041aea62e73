//! Name resolution. The system's resolver holds a thread for as long as a name server does not answer, and
//! those threads are also what reads files and builds snapshots: lookups are shared and bounded, so that
//! names without an answer hold up nothing but requests of their own kind.
//!
//! Who asks for a name that is being looked up waits for that answer; none is kept for the next.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use countersign_attestors::IsolationKey;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;

/// How many names are looked up at once for each of: the agent itself, destinations, all identities.
const MOST: usize = 64;
/// How long a lookup is joined that has begun. Of one that takes longer a packet may be lost, which another is
/// spared.
const JOINED_FOR: Duration = Duration::from_secs(2);
/// How many of one identity.
const MOST_OF_IDENTITY: usize = 8;

/// For whom a name is looked up; they share no lookups and wait for no turn of each other's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Asker {
    /// The agent itself: authorization servers, issuers, collectors.
    Agent,
    /// Whoever asks for a configured destination.
    Destinations,
    /// An identity that chose the name: unmatched traffic.
    Identity(IsolationKey),
}

impl Asker {
    /// How many of its lookups may be under way.
    fn most(&self) -> usize {
        match self {
            Self::Agent | Self::Destinations => MOST,
            Self::Identity(_) => MOST_OF_IDENTITY,
        }
    }
}

/// The addresses of a host, or the resolver's words.
pub type Addresses = Result<Arc<[SocketAddr]>, Arc<io::Error>>;

/// A host, and the port of its addresses.
type Name = (String, u16);

type Resolver = dyn Fn(&Name) -> io::Result<Arc<[SocketAddr]>> + Send + Sync;

/// The lookups that are under way.
pub struct Lookups(Arc<All>);

struct All {
    resolver: Box<Resolver>,
    joined_for: Duration,
    queues: Mutex<HashMap<Asker, Queue>>,
    /// Held by the lookups of identities.
    identities: Arc<Semaphore>,
}

/// An asker's lookups, for as long as there are any.
struct Queue {
    turns: Arc<Semaphore>,
    lookups: HashMap<Name, Weak<Lookup>>,
}

/// A lookup that waits for its turn or has begun. It ends with those who wait for it, or with its thread.
struct Lookup {
    all: Arc<All>,
    asker: Asker,
    name: Name,
    turns: Arc<Semaphore>,
    began: OnceLock<Instant>,
    answer: OnceCell<watch::Receiver<Option<Addresses>>>,
}

/// The lookups of this process.
pub fn lookups() -> &'static Lookups {
    static LOOKUPS: OnceLock<Lookups> = OnceLock::new();
    LOOKUPS.get_or_init(|| Lookups::new(JOINED_FOR, |name| Ok(name.to_socket_addrs()?.collect())))
}

impl Lookups {
    fn new(
        joined_for: Duration,
        resolver: impl Fn(&Name) -> io::Result<Arc<[SocketAddr]>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(All {
            resolver: Box::new(resolver),
            joined_for,
            queues: Mutex::default(),
            identities: Arc::new(Semaphore::new(MOST)),
        }))
    }

    /// The addresses of `host`, a name or an address, with `port`. Names are looked up on a blocking thread of
    /// `runtime`, which goes on when nobody waits any more; who leaves before its lookup has begun leaves
    /// nothing. `None` where the runtime is shutting down.
    pub async fn resolve(
        &self,
        asker: Asker,
        host: &str,
        port: u16,
        runtime: &Handle,
    ) -> Option<Addresses> {
        if let Ok(address) = host.parse() {
            return Some(Ok(Arc::new([SocketAddr::new(address, port)])));
        }
        let lookup = self.join(asker, (host.to_owned(), port));
        let answer = lookup.answer.get_or_init(|| lookup.begin(runtime)).await;
        let mut answer = answer.clone();
        let found = answer.wait_for(Option::is_some).await.ok()?;
        found.clone()
    }

    /// The lookup under way, or a new one.
    fn join(&self, asker: Asker, name: Name) -> Arc<Lookup> {
        // Dropped after the lock, which a lookup takes when it ends.
        let known;
        let mut queues = self.0.queues();
        let queue = queues.entry(asker.clone()).or_insert_with(|| Queue {
            turns: Arc::new(Semaphore::new(asker.most())),
            lookups: HashMap::new(),
        });
        known = queue.lookups.get(&name).and_then(Weak::upgrade);
        if let Some(lookup) = &known
            && lookup.is_joined()
        {
            return Arc::clone(lookup);
        }
        let lookup = Arc::new(Lookup {
            all: Arc::clone(&self.0),
            asker,
            name: name.clone(),
            turns: Arc::clone(&queue.turns),
            began: OnceLock::new(),
            answer: OnceCell::new(),
        });
        queue.lookups.insert(name, Arc::downgrade(&lookup));
        lookup
    }
}

impl All {
    fn queues(&self) -> MutexGuard<'_, HashMap<Asker, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lookup {
    /// Waits for a turn, and returns where the answer will come. The turn is over when the thread is.
    async fn begin(self: &Arc<Self>, runtime: &Handle) -> watch::Receiver<Option<Addresses>> {
        let turns = [
            turn(&self.turns).await,
            match self.asker {
                Asker::Agent | Asker::Destinations => None,
                Asker::Identity(_) => turn(&self.all.identities).await,
            },
        ];
        let _ = self.began.set(Instant::now());
        let (sender, answer) = watch::channel(None);
        let lookup = Arc::clone(self);
        let look_up = move || {
            let found = (lookup.all.resolver)(&lookup.name).map_err(Arc::new);
            drop(turns);
            lookup.forget();
            sender.send_replace(Some(found));
        };
        // By a thread of the runtime, which may make another: a data worker may not.
        runtime.spawn(async { spawn_blocking(look_up).await });
        answer
    }

    fn is_joined(&self) -> bool {
        let began = self.began.get();
        began.is_none_or(|began| began.elapsed() < self.all.joined_for)
    }

    /// Who comes now looks the name up anew.
    fn forget(&self) {
        let mut queues = self.all.queues();
        let Some(queue) = queues.get_mut(&self.asker) else {
            return;
        };
        let known = queue.lookups.get(&self.name);
        if known.is_some_and(|known| std::ptr::eq(known.as_ptr(), self)) {
            queue.lookups.remove(&self.name);
        }
        let is_idle = queue.turns.available_permits() == self.asker.most();
        if queue.lookups.is_empty() && is_idle {
            queues.remove(&self.asker);
        }
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.forget();
    }
}

async fn turn(turns: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    // It is never closed.
    Arc::clone(turns).acquire_owned().await.ok()
}

#[cfg(test)]
mod tests {
    use std::slice;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use futures_util::future::join_all;

    use super::*;

    const PORT: u16 = 443;
    const FOUND: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::BROADCAST), PORT);

    /// A resolver that has no answer for `dead` names until `release` is dropped.
    struct Fixture {
        lookups: Lookups,
        begun: Arc<AtomicUsize>,
        release: mpsc::Sender<()>,
    }

    impl Fixture {
        fn new(joined_for: Duration) -> Self {
            let (release, held) = mpsc::channel();
            let held = Mutex::new(held);
            let begun = Arc::<AtomicUsize>::default();
            let count = Arc::clone(&begun);
            let lookups = Lookups::new(joined_for, move |(host, _)| {
                count.fetch_add(1, Ordering::SeqCst);
                if host.starts_with("dead") {
                    let _ = held.lock().unwrap().recv();
                }
                Ok(Arc::new([FOUND]))
            });
            Self {
                lookups,
                begun,
                release,
            }
        }

        async fn resolve(&self, asker: &Asker, host: &str) -> Option<SocketAddr> {
            let runtime = Handle::current();
            let found = self.lookups.resolve(asker.clone(), host, PORT, &runtime);
            found.await.unwrap().unwrap().first().copied()
        }

        /// Asks for names that have no answer, and leaves once so many lookups have begun, and no more begin.
        async fn ask_in_vain(&self, askers: &[Asker], names: usize, begun: usize) {
            let names: Vec<_> = (0..names).map(|number| format!("dead{number}")).collect();
            let asked = askers
                .iter()
                .flat_map(|asker| names.iter().map(move |name| self.resolve(asker, name)));
            let have_begun = async {
                while self.begun() < begun {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            tokio::select! {
                _ = join_all(asked) => panic!("there is no answer"),
                () = have_begun => assert_eq!(self.begun(), begun),
            }
        }

        fn begun(&self) -> usize {
            self.begun.load(Ordering::SeqCst)
        }

        fn known(&self) -> usize {
            let queues = self.lookups.0.queues();
            queues.values().map(|queue| queue.lookups.len()).sum()
        }
    }

    fn identity(name: &str) -> Asker {
        Asker::Identity(IsolationKey(name.into()))
    }

    #[tokio::test]
    async fn a_lookup_under_way_is_shared_and_its_answer_is_not_kept() {
        let fixture = Fixture::new(Duration::MAX);
        let asker = Asker::Destinations;
        for _ in 0..3 {
            fixture.ask_in_vain(slice::from_ref(&asker), 1, 1).await;
        }
        assert_eq!(fixture.known(), 1);
        let waiting = fixture.resolve(&asker, "dead0");
        let (found, ()) = tokio::join!(waiting, async { fixture.release.send(()).unwrap() });
        assert_eq!(found, Some(FOUND));
        assert_eq!((fixture.begun(), fixture.known()), (1, 0));
        assert_eq!(fixture.resolve(&asker, "live").await, Some(FOUND));
        assert_eq!(fixture.resolve(&asker, "live").await, Some(FOUND));
        assert_eq!((fixture.begun(), fixture.known()), (3, 0));
    }

    #[tokio::test]
    async fn a_lookup_that_takes_long_is_not_joined() {
        let fixture = Fixture::new(Duration::ZERO);
        let asker = Asker::Destinations;
        fixture.ask_in_vain(slice::from_ref(&asker), 1, 1).await;
        fixture.ask_in_vain(slice::from_ref(&asker), 2, 3).await;
        assert_eq!(fixture.known(), 2);
    }

    #[tokio::test]
    async fn names_without_an_answer_hold_up_only_those_who_ask_alike() {
        let fixture = Fixture::new(Duration::MAX);
        let one = [identity("one")];
        fixture.ask_in_vain(&one, 1000, MOST_OF_IDENTITY).await;
        // Who waited for a turn has left nothing.
        assert_eq!(fixture.known(), MOST_OF_IDENTITY);
        assert_eq!(
            fixture.resolve(&identity("other"), "live").await,
            Some(FOUND)
        );
        let many: Vec<_> = (0..100)
            .map(|number| identity(&number.to_string()))
            .collect();
        fixture.ask_in_vain(&many, 10, MOST + 1).await;
        assert_eq!(
            fixture.resolve(&Asker::Destinations, "live").await,
            Some(FOUND)
        );
        let destinations = [Asker::Destinations];
        fixture.ask_in_vain(&destinations, 1000, 2 * MOST + 2).await;
        assert_eq!(fixture.resolve(&Asker::Agent, "live").await, Some(FOUND));
        fixture
            .ask_in_vain(&[Asker::Agent], 1000, 3 * MOST + 3)
            .await;
        assert_eq!(fixture.known(), 3 * MOST);
    }
}
