//! From a caller's TCP socket to the processes that hold it.
//!
//! Which process holds a socket is written nowhere: the descriptors of every process that may be it are
//! read. Callers who come at once share that. One of them reads for all who waited when it began, each
//! place (a cgroup, or the whole machine) for itself, so that many descriptors in one hold up no other, nor a
//! process whose exec does not end. Who waits keeps no observer. Who reads waits for nobody's turn: as there is
//! one for each place, a process that many look at holds up nobody else there.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::cgroup_directory;
use super::process::{self, Process};
use super::socket_diagnostics::TcpSocket;
use crate::evidence::EvidenceError;
use crate::observers::{self, MOST_WAITING, Turn};

/// Between one look at several holders and the next: doubled each time, 15 ms in all.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(8);

/// The most processes that may hold a socket: the agent holds descriptors of each.
const MOST_HOLDERS: usize = 64;

/// The cgroup whose processes are looked at; `None` for all that there are.
type Place = Option<u64>;

/// A process that held a socket when its descriptors were read.
struct Holder {
    pid: u32,
    /// `/proc/PID`.
    directory: Arc<OwnedFd>,
    descriptor: u32,
}

impl Holder {
    /// The process, if it holds the socket still: what is read of it now would not be the caller's else.
    async fn process(self, socket: &TcpSocket) -> io::Result<Option<Process>> {
        let _turn = Turn::at(self.pid).await?;
        let Some(process) = Process::of_directory(self.pid, self.directory)? else {
            return Ok(None);
        };
        let holds = match process.has_socket_at(self.descriptor, socket.inode) {
            true => Ok(true),
            false => process.holds_socket(socket.inode),
        };
        match holds {
            Ok(holds) => Ok(holds.then_some(process)),
            Err(error) if process::gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Sockets that are looked for, by place. There is an entry while somebody reads there.
static SEARCHES: LazyLock<Mutex<HashMap<Place, Vec<Wanted>>>> = LazyLock::new(Mutex::default);

/// A socket that somebody waits to hear of.
struct Wanted {
    inode: u32,
    waiting: UnboundedSender<Told>,
}

/// What who waits is told.
enum Told {
    Found(io::Result<Vec<Holder>>),
    /// To read next, for all who wait now.
    Read,
}

/// Every process that holds the socket, where all attest alike. A child that is being started holds what its
/// parent does until it executes: of several it is seen whether they stay.
pub(super) async fn of_socket(socket: &TcpSocket) -> Result<Vec<Process>, EvidenceError> {
    let mut pause = SHORTEST_PAUSE;
    let mut processes = look_for(socket).await?;
    while processes.len() > 1 && pause <= LONGEST_PAUSE {
        std::thread::sleep(pause);
        pause *= 2;
        processes = look_for(socket).await?;
    }
    one_workload(processes, socket).await
}

/// The processes that hold the socket: first looked for where it was made, then everywhere.
async fn look_for(socket: &TcpSocket) -> Result<Vec<Process>, EvidenceError> {
    let mut holders = Vec::new();
    if socket.cgroup_id.is_some() {
        holders = match find(socket.cgroup_id, socket.inode).await {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(error.into()),
            // What could not be read there is met again.
            found => found.unwrap_or_default(),
        };
    }
    if holders.is_empty() {
        holders = find(None, socket.inode).await?;
    }
    if holders.len() > MOST_HOLDERS {
        return Err(EvidenceError::AmbiguousCaller);
    }
    let mut processes = Vec::with_capacity(holders.len());
    for holder in holders {
        processes.extend(holder.process(socket).await?);
    }
    Ok(processes)
}

/// Refuses processes that are not all the same workload as the socket's maker.
async fn one_workload(
    processes: Vec<Process>,
    socket: &TcpSocket,
) -> Result<Vec<Process>, EvidenceError> {
    let (first, others) = processes.split_first().ok_or(EvidenceError::CallerGone)?;
    if processes.iter().any(|process| process.uid() != socket.uid) {
        return Err(EvidenceError::AmbiguousCaller);
    }
    if others.is_empty() {
        return Ok(processes);
    }
    let likeness = likeness_of(first).await?;
    for other in others {
        if likeness_of(other).await? != likeness {
            // One that is ending has lost its arguments before it loses its descriptors.
            let ends = ends(first).await? || ends(other).await?;
            return Err(match ends {
                true => EvidenceError::CallerGone,
                false => EvidenceError::AmbiguousCaller,
            });
        }
    }
    Ok(processes)
}

async fn likeness_of(process: &Process) -> Result<impl PartialEq + use<>, EvidenceError> {
    let _turn = Turn::at(process.pid()).await?;
    process
        .likeness()
        .map_err(|error| match process::gone(&error) {
            true => EvidenceError::CallerGone,
            false => error.into(),
        })
}

async fn ends(process: &Process) -> io::Result<bool> {
    let _turn = Turn::at(process.pid()).await?;
    Ok(process.check_liveness().is_err())
}

/// The processes of a place that hold a socket.
///
/// # Errors
/// Where none is found, and the descriptors of one could not be read; and where too many wait.
async fn find(place: Place, inode: u32) -> io::Result<Vec<Holder>> {
    let (reads, mut told) = wait(place, inode)?;
    if !reads && let Some(Told::Found(found)) = told.recv().await {
        return found;
    }
    let reading = Reading(place);
    let batch = searches().get_mut(&place).map(std::mem::take);
    read(place, batch.unwrap_or_default());
    drop(reading);
    match told.recv().await {
        Some(Told::Found(found)) => found,
        Some(Told::Read) | None => Err(io::Error::other("the search was given up")),
    }
}

/// Joins those who wait at a place. Also says whether nobody reads there yet.
fn wait(place: Place, inode: u32) -> io::Result<(bool, UnboundedReceiver<Told>)> {
    let (waiting, told) = unbounded_channel();
    let mut searches = searches();
    let reads = !searches.contains_key(&place);
    let wanted = searches.entry(place).or_default();
    if wanted.len() >= MOST_WAITING {
        return Err(observers::too_many_wait());
    }
    wanted.push(Wanted { inode, waiting });
    Ok((reads, told))
}

/// The right to read at a place. Dropped, it is handed to one who waits there.
struct Reading(Place);

impl Drop for Reading {
    fn drop(&mut self) {
        let mut searches = searches();
        let next = searches.get(&self.0).and_then(|waiting| waiting.first());
        let handed_on = next.is_some_and(|next| next.waiting.send(Told::Read).is_ok());
        if !handed_on {
            searches.remove(&self.0);
        }
    }
}

fn searches() -> MutexGuard<'static, HashMap<Place, Vec<Wanted>>> {
    SEARCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the descriptors of every process of a place, and tells each who waits what it waits for.
fn read(place: Place, batch: Vec<Wanted>) {
    let mut holders: HashMap<u32, Vec<Holder>> = batch
        .iter()
        .map(|wanted| (wanted.inode, Vec::new()))
        .collect();
    let unread = read_all(place, &mut holders).err();
    for Wanted { inode, waiting } in batch {
        let found = holders.remove(&inode).unwrap_or_default();
        let outcome = match &unread {
            // Another user's descriptors may be hidden from an agent without privileges.
            Some(error) if error.kind() != io::ErrorKind::PermissionDenied || found.is_empty() => {
                Err(copy_of(error))
            }
            _ => Ok(found),
        };
        // Who waits does not give up.
        let _ = waiting.send(Told::Found(outcome));
    }
}

/// Adds to each socket the processes of a place that hold it. Of what could not be read the worst error
/// is returned, after everything else was.
fn read_all(place: Place, holders: &mut HashMap<u32, Vec<Holder>>) -> io::Result<()> {
    let mut outcome = Ok(());
    for pid in pids_in(place)? {
        match read_one(pid, holders) {
            Ok(()) => {}
            Err(error) if process::gone(&error) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                outcome = outcome.and(Err(error));
            }
            Err(error) => return Err(error),
        }
    }
    outcome
}

fn read_one(pid: u32, holders: &mut HashMap<u32, Vec<Holder>>) -> io::Result<()> {
    if let Some((directory, first)) = process::known_directory(pid) {
        match read_descriptors(pid, &directory, Some(first), holders) {
            // Another process may have the number of one that was found before.
            Err(error) if process::gone(&error) => {}
            read => return read,
        }
    }
    match process::open_directory(pid)? {
        Some(directory) => read_descriptors(pid, &directory, None, holders),
        None => Ok(()),
    }
}

fn read_descriptors(
    pid: u32,
    directory: &Arc<OwnedFd>,
    first: Option<u32>,
    holders: &mut HashMap<u32, Vec<Holder>>,
) -> io::Result<()> {
    let is_only_one = holders.len() == 1;
    process::find_socket(directory, first, |descriptor, inode| {
        let Some(holders) = holders.get_mut(&inode) else {
            return false;
        };
        if holders.len() <= MOST_HOLDERS
            && holders
                .last()
                .is_none_or(|last| !Arc::ptr_eq(&last.directory, directory))
        {
            holders.push(Holder {
                pid,
                directory: Arc::clone(directory),
                descriptor,
            });
        }
        is_only_one
    })?;
    Ok(())
}

fn pids_in(place: Place) -> io::Result<Vec<u32>> {
    if let Some(cgroup_id) = place {
        return cgroup_directory::processes(cgroup_id);
    }
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(pids)
}

fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error.kind().into(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};
    use std::sync::mpsc;

    use super::super::kernel;
    use super::*;
    use crate::observers::look_here;

    #[test]
    fn a_process_that_many_look_at_holds_up_no_search() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let inode = kernel::identify_open(stream.as_fd()).unwrap().inode;
        let mut command = Command::new("/bin/sleep");
        command.arg("20").stdin(Stdio::from(OwnedFd::from(stream)));
        let mut child = command.spawn().unwrap();
        drop(command);
        let _turn = look_here(Turn::at(child.id())).unwrap();
        let (found, holders) = mpsc::channel();
        std::thread::spawn(move || {
            let holders = look_here(find(None, u32::try_from(inode).unwrap()));
            found.send(holders.unwrap()).unwrap();
        });
        let holders = holders.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(holders.iter().any(|holder| holder.pid == child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_cgroup_where_too_many_wait_is_not_looked_for_everywhere() {
        let place = Some(u64::MAX);
        let waiting: Vec<_> = (0..MOST_WAITING).map(|_| wait(place, 0).unwrap()).collect();
        let socket = TcpSocket {
            inode: 0,
            cookie: [0; 8],
            uid: 0,
            cgroup_id: place,
        };
        let refused = look_here(of_socket(&socket)).unwrap_err();
        let EvidenceError::Unavailable(error) = refused else {
            panic!("{refused}");
        };
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        drop(waiting);
        searches().remove(&place);
    }
}
