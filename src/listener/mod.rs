//! Where workloads connect. One acceptor per listener on the control runtime captures the kernel's
//! evidence of the caller and hands the connection to the least-loaded data worker.

pub mod interim;
pub mod linger;
pub mod patience;
pub mod serve;
pub mod sniff;
mod socket_access;
pub mod unreadable;
pub mod workload_api;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use countersign_attestors::evidence::EvidenceError;
use countersign_attestors::{ConnectionAttestation, PeerEvidence, observers};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::runtime::LocalOptions;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

use crate::agent::{Agent, Phase, until};
use crate::config::{Bind, Listener, ListenerKind, SocketAccess};
use crate::connection::{Caller, CallerAttestation, Entry};
use crate::descriptors::leaves_few;
use crate::hardening;
use crate::listener::patience::{Place, Places};
use crate::listener::socket_access::restrict;
use crate::proxy::Worker;
use crate::service_manager::{HandedOver, ListeningSocket};
use crate::short_writes::ShortWrites;
use crate::socket_file::SocketFile;
use crate::streams::CutReason;
use crate::telemetry::metrics::OpenConnection;

pub use self::socket_access::AccessChange;

/// How often open streams and idle connections are looked over; a permission that ends is noticed
/// within this and a second.
const SWEEP: Duration = Duration::from_millis(250);
/// How many callers wait at a TCP listener to be accepted: as many as at a Unix socket, or at those of
/// `deploy/systemd`, where the kernel lets them (`net.core.somaxconn`). Others try again after a second.
const BACKLOG: u32 = 4096;
/// How long accepting pauses when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A bound listener, not yet accepting.
pub struct BoundListener {
    socket: BoundSocket,
    /// Whether somebody else has the socket too, so that it outlives this agent.
    outlives_us: AtomicBool,
}

enum BoundSocket {
    Tcp(TcpListener),
    /// A Unix socket that was bound here; its file goes with it.
    Unix(UnixListener, SocketFile),
    /// One that was handed over; its file is the service manager's.
    HandedOverUnix(UnixListener, PathBuf),
}

impl BoundListener {
    /// Binds a listener. A socket file that nobody listens on is replaced.
    pub fn bind(bind: &Bind, access: &SocketAccess) -> io::Result<Self> {
        let socket = match bind {
            Bind::Tcp(address) => BoundSocket::Tcp(bind_tcp(*address)?),
            Bind::Unix(path) => bind_unix(path, access)?,
        };
        Ok(Self {
            socket,
            outlives_us: AtomicBool::new(false),
        })
    }

    /// Takes over a socket that the service manager handed over. Who may connect is as it was.
    pub fn take_over(handed_over: HandedOver) -> io::Result<Self> {
        let socket = match handed_over.socket {
            ListeningSocket::Tcp(socket) => BoundSocket::Tcp(TcpListener::from_std(socket)?),
            ListeningSocket::Unix(socket, path) => {
                BoundSocket::HandedOverUnix(UnixListener::from_std(socket)?, path)
            }
        };
        Ok(Self {
            socket,
            outlives_us: AtomicBool::new(true),
        })
    }

    /// Whether the socket outlives this agent: who waits in its backlog is the next one's.
    pub fn outlives_us(&self) -> bool {
        self.outlives_us.load(Ordering::Relaxed)
    }

    /// Says whether the service manager keeps the socket for the next agent.
    pub fn kept(&self, kept: bool) {
        self.outlives_us.store(kept, Ordering::Relaxed);
        if let BoundSocket::Unix(_, file) = &self.socket {
            file.stay(kept);
        }
    }

    /// What gives the socket what `access` says, where it has what `former` said, if that is known. `None` where
    /// it has that already, and of a TCP listener.
    ///
    /// # Errors
    /// There is no such group, or the socket's file is gone.
    pub fn access_change(
        &self,
        former: Option<&SocketAccess>,
        access: &SocketAccess,
    ) -> io::Result<Option<AccessChange>> {
        let path = match &self.socket {
            BoundSocket::Tcp(_) => return Ok(None),
            BoundSocket::Unix(_, file) => file.path(),
            BoundSocket::HandedOverUnix(_, path) => path,
        };
        AccessChange::new(path, former, access)
    }

    /// The address in force, with the port that the kernel chose.
    pub fn address(&self) -> io::Result<Bind> {
        match &self.socket {
            BoundSocket::Tcp(listener) => Ok(Bind::Tcp(listener.local_addr()?)),
            BoundSocket::Unix(_, file) => Ok(Bind::Unix(file.path().to_owned())),
            BoundSocket::HandedOverUnix(_, path) => Ok(Bind::Unix(path.clone())),
        }
    }

    async fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        match &self.socket {
            BoundSocket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Ok((Socket::Tcp(stream.into_std()?), Some(peer)))
            }
            BoundSocket::Unix(listener, _) | BoundSocket::HandedOverUnix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Socket::Unix(stream.into_std()?), None))
            }
        }
    }
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            BoundSocket::Tcp(listener) => listener.as_fd(),
            BoundSocket::Unix(listener, _) | BoundSocket::HandedOverUnix(listener, _) => {
                listener.as_fd()
            }
        }
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // Connections of a former agent that have yet to time out are in nobody's way.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn bind_unix(path: &Path, access: &SocketAccess) -> io::Result<BoundSocket> {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let detail = "a file that is no socket stands in its place";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, detail));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        }
        std::fs::remove_file(path)?;
    }
    // Bound under a private name and renamed, so that nobody connects before its mode is set.
    let private = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private)?;
    let mut file = SocketFile::at(&private)?;
    restrict(&private, access)?;
    file.move_to(path)?;
    Ok(BoundSocket::Unix(listener, file))
}

/// A connection on its way to a data worker.
pub struct Accepted {
    socket: Socket,
    entry: Arc<Entry>,
    attestation: CallerAttestation,
    place: Place,
    open: Open,
}

enum Socket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Counts a connection, and the tunnels inside it, while any of them is open.
pub struct Open {
    _connection: OpenConnection,
    _load: Load,
}

/// Counts one up for as long as it lives.
struct Load(Arc<AtomicUsize>);

impl Load {
    fn on(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The data workers.
#[derive(Clone)]
pub struct Workers {
    workers: Arc<[WorkerHandle]>,
    /// Connections that no worker has: accepted just now, or to the workload API.
    elsewhere: Arc<AtomicUsize>,
}

struct WorkerHandle {
    connections: mpsc::UnboundedSender<Accepted>,
    load: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `count` data workers, each a thread with a runtime of its own.
    pub fn start(agent: &Arc<Agent>, count: usize) -> io::Result<Self> {
        let workers = (0..count)
            .map(|index| {
                let (connections, accepted) = mpsc::unbounded_channel();
                let agent = Arc::clone(agent);
                let (started, starts) = std::sync::mpsc::channel();
                observers::spawn(format!("data-{index}"), move || {
                    // A runtime whose tasks stay on its thread is built there.
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build_local(LocalOptions::default());
                    match runtime {
                        Ok(runtime) => {
                            hardening::confine_data_worker();
                            let _ = started.send(Ok(()));
                            runtime.block_on(work(agent, accepted));
                        }
                        Err(error) => {
                            let _ = started.send(Err(error));
                        }
                    }
                })?;
                starts.recv().map_err(io::Error::other)??;
                Ok(WorkerHandle {
                    connections,
                    load: Arc::default(),
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            workers: workers.into(),
            elsewhere: Arc::default(),
        })
    }

    fn least_loaded(&self) -> Option<&WorkerHandle> {
        self.workers
            .iter()
            .min_by_key(|worker| worker.load.load(Ordering::Relaxed))
    }

    /// How many connections are open, those with nothing but a tunnel left included.
    pub fn open_connections(&self) -> usize {
        self.workers
            .iter()
            .map(|worker| &worker.load)
            .chain([&self.elsewhere])
            .map(|load| load.load(Ordering::Relaxed))
            .sum()
    }
}

/// A data worker: serves the connections that it is handed, until the agent is gone.
async fn work(agent: Arc<Agent>, mut accepted: mpsc::UnboundedReceiver<Accepted>) {
    let worker = Worker::new(agent);
    let sweeper = Rc::clone(&worker);
    spawn_local(async move {
        let mut ticks = tokio::time::interval(SWEEP);
        loop {
            ticks.tick().await;
            sweeper.sweep();
            if sweeper.agent.has_come_to(Phase::Over) {
                sweeper.open_streams.cut_all(CutReason::ShuttingDown);
            }
        }
    });
    while let Some(connection) = accepted.recv().await {
        begin(&worker, connection);
    }
    worker.open_streams.cut_all(CutReason::ShuttingDown);
}

/// Has a connection served, in a task of its own.
fn begin(worker: &Rc<Worker>, connection: Accepted) {
    let Accepted {
        socket,
        entry,
        attestation,
        place,
        open,
    } = connection;
    let worker = Rc::clone(worker);
    let caller = Caller::new(attestation, place, open);
    match socket {
        Socket::Tcp(stream) => {
            if let Ok(stream) = TcpStream::from_std(stream) {
                let stream = ShortWrites(stream);
                spawn_local(serve::serve_connection(worker, entry, caller, stream));
            }
        }
        Socket::Unix(stream) => {
            if let Ok(stream) = UnixStream::from_std(stream) {
                spawn_local(serve::serve_connection(worker, entry, caller, stream));
            }
        }
    }
}

/// Accepts on a listener until the agent ends. At most `unattested` callers wait to be attested.
pub async fn accept(
    agent: Arc<Agent>,
    workers: Workers,
    bound: Arc<BoundListener>,
    listener: Listener,
    unattested: usize,
) {
    let name: Arc<str> = Arc::from(listener.name.as_str());
    let metrics = agent.metrics.listener(&name);
    let entry = Arc::new(Entry {
        listener: Arc::clone(&name),
        gateway: match &listener.kind {
            ListenerKind::Gateway { destination } => Some(Arc::clone(&destination.name)),
            ListenerKind::ForwardProxy | ListenerKind::WorkloadApi => None,
        },
        places: Places::new(unattested, metrics.clone()),
    });
    let mut phases = agent.phase.subscribe();
    loop {
        // Who waits for a socket that nobody else has is let in before it closes, while there is time; who
        // waits for one that outlives this agent is the next one's.
        let ends_in = match bound.outlives_us() {
            true => Phase::LastAnswers,
            false => Phase::Closing,
        };
        if agent.has_come_to(ends_in) {
            return;
        }
        let arrived = tokio::select! {
            biased;
            arrived = bound.accept() => arrived,
            () = until(Phase::LastAnswers, &mut phases) => return,
        };
        let (socket, peer) = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                // Out of descriptors, or the caller left already: neither may end the listener, and
                // the first must not spin.
                tracing::debug!(%error, listener = %name, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if leaves_few(socket.as_fd()) {
            tracing::debug!(listener = %name, "few descriptors are left");
            metrics.connection_refused();
            drop(socket);
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        }
        let Some(place) = entry.places.take() else {
            tracing::debug!(listener = %name, "too many connections wait to be attested");
            continue;
        };
        let open = metrics.connection();
        let arriving = Load::on(&workers.elsewhere);
        let agent = Arc::clone(&agent);
        let workers = workers.clone();
        let entry = Arc::clone(&entry);
        let is_workload_api = listener.kind == ListenerKind::WorkloadApi;
        tokio::spawn(async move {
            let catalog = Arc::clone(&agent.snapshot.load().catalog);
            let (socket, evidence) = evidence_of(socket, peer).await;
            let attestation = match evidence {
                Ok(evidence) => Ok(ConnectionAttestation::new(catalog, evidence).await),
                Err(error) => Err(error),
            };
            let Some(place) = entry.places.attribute(place, &attestation, &agent) else {
                tracing::debug!(listener = %entry.listener, "too many connections of one identity wait to be attested");
                return;
            };
            if is_workload_api {
                if let Some(stream) = socket {
                    let name = Arc::clone(&entry.listener);
                    workload_api::serve(agent, name, attestation, stream, place, open).await;
                }
                drop(arriving);
                return;
            }
            if let (Some(socket), Some(worker)) = (socket, workers.least_loaded()) {
                let _ = worker.connections.send(Accepted {
                    socket,
                    entry,
                    attestation,
                    place,
                    open: Open {
                        _connection: open,
                        _load: Load::on(&worker.load),
                    },
                });
            }
            drop(arriving);
        });
    }
}

/// A socket while an observer looks at who is at its other end. It comes back however that ends.
struct Lent(Option<(Socket, oneshot::Sender<Socket>)>);

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some((socket, lender)) = self.0.take() {
            let _ = lender.send(socket);
        }
    }
}

/// Asks the kernel who is at the other end; procfs blocks.
async fn evidence_of(
    socket: Socket,
    peer: Option<SocketAddr>,
) -> (Option<Socket>, Result<PeerEvidence, EvidenceError>) {
    let (lender, returned) = oneshot::channel();
    let lent = Lent(Some((socket, lender)));
    let asked = observers::look_and_wait(async move {
        match (lent.0.as_ref().map(|(socket, _)| socket), peer) {
            (Some(Socket::Unix(stream)), _) => PeerEvidence::of_unix_stream(stream.as_fd()).await,
            (Some(Socket::Tcp(stream)), Some(peer)) if peer.ip().to_canonical().is_loopback() => {
                PeerEvidence::of_loopback_tcp(stream).await
            }
            (Some(Socket::Tcp(_)) | None, _) => Ok(PeerEvidence::none()),
        }
    })
    .await;
    let evidence = asked.unwrap_or_else(|error| Err(EvidenceError::Unavailable(error)));
    (returned.await.ok(), evidence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_comes_back_where_nobody_looks_at_who_is_at_its_other_end() {
        let (socket, _caller) = std::os::unix::net::UnixStream::pair().unwrap();
        let (lender, returned) = oneshot::channel();
        drop(Lent(Some((Socket::Unix(socket), lender))));
        assert!(matches!(returned.await, Ok(Socket::Unix(_))));
    }

    #[tokio::test]
    async fn a_burst_of_callers_waits_to_be_accepted() {
        let directory = tempfile::tempdir().unwrap();
        for bind in [
            Bind::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))),
            Bind::Unix(directory.path().join("proxy.sock")),
        ] {
            let bound = BoundListener::bind(&bind, &SocketAccess::default()).unwrap();
            let callers = async {
                let (mut tcp, mut unix) = (Vec::new(), Vec::new());
                for _ in 0..300 {
                    match bound.address().unwrap() {
                        Bind::Tcp(address) => tcp.push(TcpStream::connect(address).await.unwrap()),
                        Bind::Unix(path) => unix.push(UnixStream::connect(path).await.unwrap()),
                    }
                }
            };
            let connected = tokio::time::timeout(Duration::from_secs(20), callers).await;
            assert!(connected.is_ok(), "{bind:?}");
        }
    }
}
