//! What the agent and its service manager say to each other: sockets that it hands over when it starts
//! the agent (sd_listen_fds(3)), and what it is told of the agent's state (sd_notify(3)).
//!
//! Sockets that the service manager holds outlive the agent: whoever connects while no agent accepts
//! waits in the socket's backlog for the next one (`docs/restart.md`).

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use countersign_attestors::hexadecimal;
use listenfd::ListenFd;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::fstat;
use sd_notify::NotifyState;

use crate::config::{Bind, Listener};
use crate::diagnostics::{Diagnostic, Diagnostics};

/// What names the sockets in messages.
const SOURCE: &str = "LISTEN_FDS";

/// What the names of sockets that the agent has kept begin with.
const KEPT: &str = "kept-";

/// How long the service manager may take to read what it is told.
const READ_WITHIN_MILLISECONDS: u16 = 5_000;

/// How much longer than its drain window the agent may take to end.
const AFTER_THE_DRAIN: Duration = Duration::from_secs(10);

/// A service manager that started this process, or none.
#[derive(Debug, Default)]
pub struct ServiceManager {
    /// Whether it is told anything: of an agent in a process with other ends it is not.
    is_told: bool,
    /// Whether it keeps sockets that it is given (`FileDescriptorStoreMax=`).
    keeps_sockets: bool,
    /// Whether it handed sockets over at the start: another agent may be using them still.
    has_handed_over: bool,
    /// What it handed over and nobody has taken.
    sockets: Vec<HandedOver>,
}

/// A socket that was handed over, listening.
#[derive(Debug)]
pub struct HandedOver {
    name: String,
    /// The socket.
    pub socket: ListeningSocket,
}

/// A listening socket of the standard library's.
#[derive(Debug)]
pub enum ListeningSocket {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, and where its file is.
    Unix(UnixListener, PathBuf),
}

impl ServiceManager {
    /// The service manager that this process was started by, and the sockets that it handed over: the
    /// descriptors from 3 on that `LISTEN_FDS` counts and `LISTEN_FDNAMES` names, where `LISTEN_PID` is
    /// this process. To be called once, while there is no other thread.
    ///
    /// # Errors
    /// `handed_over_socket_unusable` for variables that contradict each other, and for each descriptor
    /// that is not a listening stream socket of TCP or Unix.
    pub fn from_environment() -> Result<Self, Diagnostics> {
        let unusable = |message: String| {
            Diagnostic::error("handed_over_socket_unusable", SOURCE, message).next(
                "hand over listening stream sockets only (`ListenStream=`), and a name for each",
            )
        };
        let names: Vec<String> = sd_notify::listen_fds_with_names()
            .map_err(|error| unusable(format!("the sockets handed over cannot be used: {error}")))?
            .map(|(_, name)| name)
            .collect();
        let mut sockets = Vec::with_capacity(names.len());
        let mut problems = Diagnostics::new();
        // The variables are read by both: this one looks at fewer of them, and owns the descriptors.
        let mut descriptors = match names.is_empty() {
            true => ListenFd::empty(),
            false => ListenFd::from_env(),
        };
        for (index, name) in names.into_iter().enumerate() {
            match listening_socket(&mut descriptors, index) {
                Ok(socket) => sockets.push(HandedOver { name, socket }),
                Err(error) => problems.push(unusable(format!(
                    "descriptor {} (`{name}`) cannot be listened on: {error}",
                    index + 3
                ))),
            }
        }
        match problems.has_errors() {
            true => Err(problems),
            false => Ok(Self {
                is_told: true,
                keeps_sockets: has_descriptor_store(),
                has_handed_over: !sockets.is_empty(),
                sockets,
            }),
        }
    }

    /// Whether it handed sockets over when it started this process, so that an agent that was started
    /// before may be using them still.
    pub fn has_handed_over(&self) -> bool {
        self.has_handed_over
    }

    /// Gives up what an agent before this one had kept and no listener of `listeners` is bound to any more, so
    /// that it is in nobody's way.
    pub fn give_up_all_but(&mut self, listeners: &[Listener]) {
        let is_wanted = |known: &HandedOver| {
            !known.is_kept()
                || listeners
                    .iter()
                    .any(|listener| kept_name(&listener.name, &listener.bind) == known.name)
        };
        let (wanted, unwanted): (Vec<_>, Vec<_>) = std::mem::take(&mut self.sockets)
            .into_iter()
            .partition(is_wanted);
        self.sockets = wanted;
        if unwanted.is_empty() {
            return;
        }
        for HandedOver { name, socket } in unwanted {
            tracing::info!(
                address = socket.address(),
                "a socket that was kept is given up: no listener is bound to it"
            );
            self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)]);
        }
        if let Err(error) = wait_until_read() {
            tracing::warn!(%error, "the service manager may have sockets still that nobody listens on");
        }
    }

    /// Takes the socket for the listener `name`, which is to be bound to `bind`: one that an agent had kept for
    /// it, else one that is bound there, else one of that name, wherever it is bound. Copies of it are dropped:
    /// one that the agent had stored comes beside that of the socket unit.
    ///
    /// # Errors
    /// `handed_over_socket_unusable` where that socket is of the other kind (TCP, Unix), or its file is gone.
    pub fn take(&mut self, name: &str, bind: &Bind) -> Result<Option<HandedOver>, Diagnostic> {
        let position = |is_it: &dyn Fn(&HandedOver) -> bool| self.sockets.iter().position(is_it);
        let kept = kept_name(name, bind);
        let Some(index) = position(&|known| known.name == kept)
            .or_else(|| position(&|known| known.is_bound_to(bind)))
            .or_else(|| position(&|known| known.name == name))
        else {
            return Ok(None);
        };
        let HandedOver {
            name: mut handed_over_as,
            socket,
        } = self.sockets.swap_remove(index);
        // One of a socket unit is the unit's, whoever had it kept as well.
        for copy in self
            .sockets
            .extract_if(.., |known| known.socket.is(&socket))
        {
            if !copy.is_kept() {
                handed_over_as = copy.name;
            }
        }
        let unusable = |message: String, next: &str| {
            Err(Diagnostic::error("handed_over_socket_unusable", SOURCE, message).next(next))
        };
        let socket = match (socket, bind) {
            (ListeningSocket::Unix(socket, known), Bind::Unix(configured)) => {
                // The agent moves the file of a socket that it binds; the kernel knows the name before.
                match [&known, configured]
                    .into_iter()
                    .find(|path| is_socket(path))
                {
                    Some(path) => ListeningSocket::Unix(socket, path.clone()),
                    None => {
                        return unusable(
                            format!(
                                "the file of the socket handed over for `{name}` is gone, so that nobody can connect"
                            ),
                            "stop the service and start it again, which forgets the socket; keep its directory over restarts (`RuntimeDirectoryPreserve=yes`)",
                        );
                    }
                }
            }
            (socket @ ListeningSocket::Tcp(_), Bind::Tcp(_)) => socket,
            (ListeningSocket::Tcp(_), Bind::Unix(_)) => {
                return unusable(
                    format!(
                        "the socket handed over for `{name}` is TCP, and `{name}` is to be at `{bind}`"
                    ),
                    "change `bind`, or the name that the service manager gives the socket",
                );
            }
            (ListeningSocket::Unix(..), Bind::Tcp(_)) => {
                return unusable(
                    format!(
                        "the socket handed over for `{name}` is a Unix socket, and `{name}` is to be at `{bind}`"
                    ),
                    "change `bind`, or the name that the service manager gives the socket",
                );
            }
        };
        Ok(Some(HandedOver {
            name: handed_over_as,
            socket,
        }))
    }

    /// Refuses what nobody took: callers would wait there for ever.
    ///
    /// # Errors
    /// `handed_over_socket_unused` for each such socket.
    pub fn refuse_the_rest(&self) -> Result<(), Diagnostics> {
        let mut unused = Diagnostics::new();
        for HandedOver { name, socket } in &self.sockets {
            unused.push(
                Diagnostic::error(
                    "handed_over_socket_unused",
                    SOURCE,
                    format!("no listener is named `{name}` or bound to `{}`, and the service manager hands over a socket of that name and address", socket.address()),
                )
                .next("add a listener of that name or `bind`, or take the socket out of the socket unit; one that the agent itself had stored is forgotten when the service is stopped"),
            );
        }
        match unused.has_errors() {
            true => Err(unused),
            false => Ok(()),
        }
    }

    /// Has it keep the socket of the listener `name`, which is bound to `bind`, for the next agent. Returns
    /// whether it was given the socket: never where it keeps none.
    pub fn keep(&self, name: &str, bind: &Bind, socket: BorrowedFd<'_>) -> bool {
        if !self.keeps_sockets {
            return false;
        }
        // It is not to be dropped because of what happens on it.
        let state = [
            NotifyState::FdStore,
            NotifyState::FdName(&kept_name(name, bind)),
            NotifyState::Custom("FDPOLL=0"),
        ];
        let kept = sd_notify::notify_with_fds(&state, &[socket]);
        if let Err(error) = &kept {
            tracing::warn!(%error, listener = name, "the service manager could not be given a socket to keep");
        }
        kept.is_ok()
    }

    /// Has it forget what it keeps for the listener `name`, which was bound to `bind`. Returns whether it keeps
    /// any sockets.
    pub fn forget(&self, name: &str, bind: &Bind) -> bool {
        if self.keeps_sockets {
            let kept = kept_name(name, bind);
            self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&kept)]);
        }
        self.keeps_sockets
    }

    /// Says that the agent serves, and how.
    pub fn ready(&self, status: &str) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// Says that a reload begins; [`ServiceManager::ready`] says that it has ended.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(error) => tracing::warn!(%error, "the service manager was not told of a reload"),
        }
    }

    /// Says that the agent ends, after what is under way or `drain`.
    pub fn stopping(&self, drain: Duration) {
        let longest = (drain + AFTER_THE_DRAIN).as_micros();
        self.tell(&[
            NotifyState::Stopping,
            NotifyState::Status(&format!("draining, for {drain:?} at most")),
            NotifyState::ExtendTimeoutUsec(u32::try_from(longest).unwrap_or(u32::MAX)),
        ]);
    }

    fn tell(&self, state: &[NotifyState<'_>]) {
        if self.is_told
            && let Err(error) = sd_notify::notify(state)
        {
            tracing::warn!(%error, "the service manager could not be told of the agent's state");
        }
    }
}

impl HandedOver {
    /// Whether an agent before this one bound it, and had it kept: a Unix socket's file is the agent's then.
    pub fn is_kept(&self) -> bool {
        self.name.starts_with(KEPT)
    }

    fn is_bound_to(&self, bind: &Bind) -> bool {
        match (&self.socket, bind) {
            (ListeningSocket::Tcp(socket), Bind::Tcp(address)) => {
                socket.local_addr().is_ok_and(|there| there == *address)
            }
            (ListeningSocket::Unix(_, there), Bind::Unix(path)) => {
                there == path
                    || matches!((there.canonicalize(), path.canonicalize()), (Ok(one), Ok(other)) if one == other)
            }
            _ => false,
        }
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket, _) => socket.as_fd(),
        }
    }
}

impl ListeningSocket {
    /// Whether both are descriptors of one socket.
    fn is(&self, other: &Self) -> bool {
        let inode = |socket: &Self| fstat(socket).map(|found| (found.st_dev, found.st_ino));
        matches!((inode(self), inode(other)), (Ok(one), Ok(other)) if one == other)
    }

    fn address(&self) -> String {
        match self {
            Self::Tcp(socket) => socket
                .local_addr()
                .map_or_else(|error| error.to_string(), |address| address.to_string()),
            Self::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }
}

/// The name of a socket that the agent has kept: that of its address, so that a listener of another name finds
/// it, and one that is to be elsewhere does not. Those that ask for any port are told apart by their names.
fn kept_name(name: &str, bind: &Bind) -> String {
    let place = match bind {
        Bind::Tcp(address) if address.port() == 0 => format!("{bind} {name}"),
        Bind::Tcp(_) | Bind::Unix(_) => bind.to_string(),
    };
    let digest = digest(&SHA256, place.as_bytes());
    let digits = hexadecimal(digest.as_ref());
    format!("{KEPT}{}", digits.get(..16).unwrap_or_default())
}

/// Waits until the service manager has read everything that it was told (sd_notify_barrier(3)).
fn wait_until_read() -> io::Result<()> {
    let (ours, its) = io::pipe()?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[its.as_fd()])?;
    drop(its);
    let mut closed = [PollFd::new(ours.as_fd(), PollFlags::empty())];
    match poll(&mut closed, READ_WITHIN_MILLISECONDS)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Whether the service manager says that it stores descriptors: `FDSTORE` is how many at most
/// (systemd.exec(5)). Without it they are sent in vain, and nobody is told.
fn has_descriptor_store() -> bool {
    let stored = std::env::var("FDSTORE").ok();
    let most: Option<u32> = stored.and_then(|stored| stored.parse().ok());
    most.is_some_and(|most| most > 0) && std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Takes a descriptor for what it is.
fn listening_socket(descriptors: &mut ListenFd, index: usize) -> io::Result<ListeningSocket> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    // Each attempt leaves the descriptor where it is when it is of another kind.
    let socket = match descriptors.take_unix_listener(index) {
        Ok(socket) => {
            let socket = socket.ok_or_else(missing)?;
            let path = socket.local_addr()?.as_pathname().map(Path::to_owned);
            let path = path.ok_or_else(|| io::Error::other("it has no file"))?;
            ListeningSocket::Unix(socket, path)
        }
        Err(_) => {
            let socket = descriptors.take_tcp_listener(index)?.ok_or_else(missing)?;
            ListeningSocket::Tcp(socket)
        }
    };
    if !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err(io::Error::other("it does not listen"));
    }
    match &socket {
        ListeningSocket::Tcp(socket) => socket.set_nonblocking(true)?,
        ListeningSocket::Unix(socket, _) => socket.set_nonblocking(true)?,
    }
    Ok(socket)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}
