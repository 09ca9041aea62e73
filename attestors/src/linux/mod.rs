//! Kernel evidence on Linux: from a connection to the process that made it.

#[cfg(test)]
mod attackers;
mod cgroup_directory;
#[cfg(test)]
mod endless_exec;
mod executable;
mod holders;
mod kernel;
mod process;
mod socket_diagnostics;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};

pub use cgroup_directory::is_mounted as has_cgroup2;
pub use process::Process;
#[cfg(feature = "test-support")]
pub(crate) use process::parse_status;
#[cfg(feature = "test-support")]
pub(crate) use socket_diagnostics::{TcpSocket, find_tcp, read_answer};

use crate::evidence::EvidenceError;
use crate::observers::Turn;
use crate::workload::AttestationEnded;

/// The process or processes at the other end of a connection, and how they were found.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Never empty. More than one only where all attest the same.
    processes: Vec<Process>,
    /// In the words of [`crate::workload::WorkloadFacts::evidence`].
    words: Vec<&'static str>,
}

impl Peer {
    /// The peer of a connected Unix stream socket.
    pub(crate) async fn of_unix_stream(
        stream: BorrowedFd<'_>,
    ) -> Result<Option<Self>, EvidenceError> {
        let peer = match getsockopt(&stream, sockopt::PeerPidfd) {
            Ok(pidfd) => {
                let connected = Connected::of(stream)?;
                let _turn = Turn::at(connected.pid).await?;
                let process =
                    Process::of_pidfd(connected.pid, pidfd)?.ok_or(EvidenceError::CallerGone)?;
                connected.by(process, vec!["pidfd"])
            }
            // Kernels before 6.5 do not know the option.
            Err(Errno::ENOPROTOOPT | Errno::EINVAL) => {
                Self::of_unix_stream_by_credentials(stream).await
            }
            // The kernel has no process for this peer, or it was reaped before it could be asked.
            Err(Errno::ENODATA | Errno::ESRCH) => Err(EvidenceError::CallerGone),
            Err(errno) => Err(io::Error::from(errno).into()),
        };
        peer.map(Some)
    }

    /// The other path, for kernels that cannot give a pidfd of the peer: the number that connected,
    /// and the proof that the process which has this number now holds the peer's socket. Weaker: a
    /// process that was given the socket and the number of the one that connected would pass.
    pub(crate) async fn of_unix_stream_by_credentials(
        stream: BorrowedFd<'_>,
    ) -> Result<Self, EvidenceError> {
        let connected = Connected::of(stream)?;
        let _turn = Turn::at(connected.pid).await?;
        let process = Process::of_pid(connected.pid)?.ok_or(EvidenceError::CallerGone)?;

        let ours = kernel::identify_open(stream.as_fd())?.inode;
        let ours = u32::try_from(ours).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, "a socket inode above 32 bits")
        })?;
        let theirs = socket_diagnostics::find_unix_peer(ours)?.ok_or(EvidenceError::CallerGone)?;
        match process.holds_socket(theirs) {
            Ok(true) => {}
            Ok(false) => return Err(EvidenceError::CallerGone),
            Err(error) if process::gone(&error) => return Err(EvidenceError::CallerGone),
            Err(error) => return Err(EvidenceError::from(error).of_user(connected.uid)),
        }
        process
            .check_liveness()
            .map_err(|_| EvidenceError::CallerGone)?;
        connected.by(process, vec!["pidfd", "weaker:peercred"])
    }

    /// The process at the other end of a connection over loopback.
    pub(crate) async fn of_loopback_tcp(stream: &TcpStream) -> Result<Option<Self>, EvidenceError> {
        let local = stream.local_addr()?;
        let peer = peer_of(stream)?;
        if !peer.ip().to_canonical().is_loopback() || !local.ip().to_canonical().is_loopback() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the caller did not connect over loopback",
            )
            .into());
        }
        let socket = socket_diagnostics::find_tcp(peer, local)?.ok_or(EvidenceError::CallerGone)?;
        let processes = holders::of_socket(&socket).await;
        // Asked again: between the two answers the socket was this one, so that what was read of
        // `/proc` in between belongs to it. Before an error counts, too: of a caller that has just
        // gone there may be something left that cannot be read.
        match socket_diagnostics::find_tcp(peer, local)? {
            Some(again) if (again.cookie, again.inode) == (socket.cookie, socket.inode) => {}
            _ => return Err(EvidenceError::CallerGone),
        }
        // And it was the other end of this connection: of one that was reset the address is free, and
        // may be somebody else's by now. While this connection lives nobody else connects from there.
        peer_of(stream)?;
        let processes = processes.map_err(|error| error.of_user(socket.uid))?;
        Ok(Some(Self::new(processes, vec!["sock_diag", "pidfd"])))
    }

    fn new(processes: Vec<Process>, mut words: Vec<&'static str>) -> Self {
        if !processes.iter().all(Process::exec_is_seen) {
            words.push("weaker:exec_unseen");
        }
        Self { processes, words }
    }

    /// One that lives, where any does.
    pub(crate) fn process(&self) -> Option<&Process> {
        match &*self.processes {
            [only] => Some(only),
            several => several
                .iter()
                .find(|process| process.check_liveness().is_ok())
                .or(several.first()),
        }
    }

    pub(crate) fn words(&self) -> &[&'static str] {
        &self.words
    }

    /// An exec of any holder ends the attestation: the new program holds the socket too. The exit of
    /// one of several does not.
    pub(crate) fn check_liveness(&self) -> Result<(), AttestationEnded> {
        let mut outcome = Err(AttestationEnded::Exited);
        for process in &self.processes {
            match process.check_liveness() {
                Ok(()) => outcome = Ok(()),
                Err(AttestationEnded::Exited) => {}
                Err(ended) => return Err(ended),
            }
        }
        outcome
    }
}

/// The address at the other end of a connection that was not reset (getpeername(2)).
fn peer_of(stream: &TcpStream) -> Result<SocketAddr, EvidenceError> {
    stream.peer_addr().map_err(|error| match error.kind() {
        io::ErrorKind::NotConnected => EvidenceError::CallerGone,
        _ => error.into(),
    })
}

/// Who connected a Unix socket, by SO_PEERCRED (unix(7)): of the moment of connect(2), and of the very
/// process that SO_PEERPIDFD gives a pidfd of.
struct Connected {
    pid: u32,
    uid: u32,
}

impl Connected {
    fn of(stream: BorrowedFd<'_>) -> Result<Self, EvidenceError> {
        let credentials = getsockopt(&stream, sockopt::PeerCredentials).map_err(io::Error::from)?;
        // 0: of another pid namespace, where no number of ours names it.
        let pid = u32::try_from(credentials.pid())
            .ok()
            .filter(|pid| *pid != 0)
            .ok_or(EvidenceError::CallerGone)?;
        Ok(Self {
            pid,
            uid: credentials.uid(),
        })
    }

    fn by(&self, process: Process, words: Vec<&'static str>) -> Result<Peer, EvidenceError> {
        // A process that has changed its user since, or a program that was set-user-id then, is not
        // the one that the socket speaks for.
        if self.uid != process.uid() {
            return Err(EvidenceError::AmbiguousCaller);
        }
        Ok(Peer::new(vec![process], words))
    }
}
