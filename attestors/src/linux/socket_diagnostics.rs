//! Asks the kernel about one socket over netlink (sock_diag(7)).

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    socket,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const HEADER_LENGTH: usize = 16;
/// Where a message says which question it is, or answers.
const SEQUENCE: usize = 8;
/// Answers about one socket of which nothing more is asked are shorter. What is cut off is malformed.
const LONGEST_ANSWER: usize = 1024;
const INET_MESSAGE_LENGTH: usize = 72;
const INET_DIAG_CGROUP_ID: u16 = 21;
const UNIX_MESSAGE_LENGTH: usize = 16;
const UNIX_DIAG_PEER: u16 = 2;
const UDIAG_SHOW_PEER: u32 = 4;
const ANY_COOKIE: [u8; 8] = [0xff; 8];

/// The TCP states in which a socket still has its maker's credentials. In every later one the
/// kernel may answer uid 0 and inode 0 for a process that is gone.
const TCP_ESTABLISHED: u8 = 1;
const TCP_CLOSE_WAIT: u8 = 8;

/// What the kernel says of a caller's TCP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TcpSocket {
    pub(crate) inode: u32,
    pub(crate) uid: u32,
    pub(crate) cookie: [u8; 8],
    /// The cgroup-v2 directory in which the socket was made.
    pub(crate) cgroup_id: Option<u64>,
}

/// The socket at `caller`, connected to `listener`, in the network namespace of this thread.
/// `None` when there is none, or when what is left of it says nothing about who made it.
pub(crate) fn find_tcp(caller: SocketAddr, listener: SocketAddr) -> io::Result<Option<TcpSocket>> {
    let caller = canonical(caller);
    let listener = canonical(listener);
    let family = if caller.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };

    // struct inet_diag_req_v2: family, protocol, extensions, padding, states, then the socket.
    let request = [
        &[family as u8, libc::IPPROTO_TCP as u8, 0, 0][..],
        &u32::MAX.to_ne_bytes(),
        &caller.port().to_be_bytes(),
        &listener.port().to_be_bytes(),
        &address_bytes(caller.ip()),
        &address_bytes(listener.ip()),
        &0_u32.to_ne_bytes(),
        &ANY_COOKIE,
    ];

    read_answer(&ask(&request)?, caller, listener)
}

/// Reads the message that answers the question about a TCP socket.
pub(crate) fn read_answer(
    message: &[u8],
    caller: SocketAddr,
    listener: SocketAddr,
) -> io::Result<Option<TcpSocket>> {
    let answer = read_header(message)?;
    Ok(answer.and_then(|answer| read_tcp_answer(answer, caller, listener)))
}

/// The inode of the socket that is connected to the Unix socket with `inode`.
pub(super) fn find_unix_peer(inode: u32) -> io::Result<Option<u32>> {
    // struct unix_diag_req: family, protocol, padding, states, inode, what to show, cookie.
    let request = [
        &[libc::AF_UNIX as u8, 0, 0, 0][..],
        &u32::MAX.to_ne_bytes(),
        &inode.to_ne_bytes(),
        &UDIAG_SHOW_PEER.to_ne_bytes(),
        &ANY_COOKIE,
    ];

    let message = ask(&request)?;
    let Some(answer) = read_header(&message)? else {
        return Ok(None);
    };
    if bytes::<4>(answer, 4).map(u32::from_ne_bytes) != Some(inode) {
        return Ok(None);
    }
    let peer = attribute(answer, UNIX_MESSAGE_LENGTH, UNIX_DIAG_PEER)
        .and_then(|value| bytes::<4>(value, 0))
        .map(u32::from_ne_bytes);
    Ok(peer.filter(|peer| *peer != 0))
}

/// A netlink socket, and how many questions were asked over it.
struct Netlink {
    socket: OwnedFd,
    questions: u32,
}

thread_local! {
    /// Kept while every question gets its answer. A thread stays in its network namespace.
    static NETLINK: Cell<Option<Netlink>> = const { Cell::new(None) };
}

/// Sends one sock_diag request, given in parts; the message that answers it.
fn ask(request: &[&[u8]]) -> io::Result<Vec<u8>> {
    let mut netlink = match NETLINK.take() {
        Some(netlink) => netlink,
        None => Netlink::open()?,
    };
    let answer = netlink.ask(request)?;
    NETLINK.set(Some(netlink));
    Ok(answer)
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let socket = Self::open_unconnected()?;
        // To the kernel, and so from nobody else: who may send over netlink could answer in its place.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket,
            questions: 0,
        })
    }

    fn open_unconnected() -> io::Result<OwnedFd> {
        Ok(socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?)
    }

    fn ask(&mut self, request: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.questions = self.questions.wrapping_add(1);
        let length = HEADER_LENGTH + request.iter().map(|part| part.len()).sum::<usize>();
        let mut message = Vec::with_capacity(length);
        message.extend((length as u32).to_ne_bytes());
        message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.extend(NLM_F_REQUEST.to_ne_bytes());
        message.extend(self.questions.to_ne_bytes());
        message.extend([0; 4]); // port: the kernel's to choose
        for part in request {
            message.extend_from_slice(part);
        }
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;

        let mut buffer = vec![0_u8; LONGEST_ANSWER];
        let received = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(received);
        match bytes::<4>(&buffer, SEQUENCE).map(u32::from_ne_bytes) {
            Some(answered) if answered == self.questions => Ok(buffer),
            _ => Err(malformed()),
        }
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed netlink answer")
}

/// The payload of an answer, or `None` when there is no such socket.
fn read_header(message: &[u8]) -> io::Result<Option<&[u8]>> {
    let length = bytes::<4>(message, 0)
        .map(u32::from_ne_bytes)
        .ok_or_else(malformed)? as usize;
    let kind = bytes::<2>(message, 4)
        .map(u16::from_ne_bytes)
        .ok_or_else(malformed)?;
    let payload = message.get(HEADER_LENGTH..length).ok_or_else(malformed)?;
    match kind {
        SOCK_DIAG_BY_FAMILY => Ok(Some(payload)),
        NLMSG_ERROR => {
            let code = bytes::<4>(payload, 0)
                .map(i32::from_ne_bytes)
                .ok_or_else(malformed)?;
            match code.saturating_neg() {
                libc::ENOENT => Ok(None),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
        _ => Err(malformed()),
    }
}

/// Reads a `struct inet_diag_msg`. It counts only if it is the caller's socket (not ours, not a
/// listener on the caller's port), is still open, and has an inode.
fn read_tcp_answer(answer: &[u8], caller: SocketAddr, listener: SocketAddr) -> Option<TcpSocket> {
    let [family, state] = bytes::<2>(answer, 0)?;
    if state != TCP_ESTABLISHED && state != TCP_CLOSE_WAIT {
        return None;
    }
    let source_port = u16::from_be_bytes(bytes::<2>(answer, 4)?);
    let destination_port = u16::from_be_bytes(bytes::<2>(answer, 6)?);
    let source = read_address(family, bytes::<16>(answer, 8)?)?;
    let destination = read_address(family, bytes::<16>(answer, 24)?)?;
    if SocketAddr::new(source, source_port) != caller
        || SocketAddr::new(destination, destination_port) != listener
    {
        return None;
    }
    let inode = u32::from_ne_bytes(bytes::<4>(answer, 68)?);
    if inode == 0 {
        return None;
    }
    Some(TcpSocket {
        inode,
        uid: u32::from_ne_bytes(bytes::<4>(answer, 64)?),
        cookie: bytes::<8>(answer, 44)?,
        cgroup_id: attribute(answer, INET_MESSAGE_LENGTH, INET_DIAG_CGROUP_ID)
            .and_then(|value| bytes::<8>(value, 0))
            .map(u64::from_ne_bytes),
    })
}

/// The value of a netlink attribute (`struct rtattr`: length, type, value, padding to four bytes).
fn attribute(message: &[u8], start: usize, wanted: u16) -> Option<&[u8]> {
    let mut position = start;
    loop {
        let length = usize::from(u16::from_ne_bytes(bytes::<2>(message, position)?));
        let kind = u16::from_ne_bytes(bytes::<2>(message, position + 2)?);
        if length < 4 {
            return None;
        }
        let value = message.get(position + 4..position + length)?;
        if kind == wanted {
            return Some(value);
        }
        position += length.next_multiple_of(4);
    }
}

fn bytes<const N: usize>(data: &[u8], position: usize) -> Option<[u8; N]> {
    data.get(position..)?.first_chunk::<N>().copied()
}

/// An IPv4 address that is mapped into IPv6 (RFC 4291 section 2.5.5.2) is the IPv4 address; scope
/// and flow say nothing about who called.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(address) => address.octets(),
    }
}

fn read_address(family: u8, octets: [u8; 16]) -> Option<IpAddr> {
    match libc::c_int::from(family) {
        libc::AF_INET => {
            let [a, b, c, d, ..] = octets;
            Some(IpAddr::from([a, b, c, d]))
        }
        libc::AF_INET6 => Some(IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use nix::sys::socket::{getsockname, sendto};
    use proptest::prelude::*;

    use super::*;

    const CALLER: &str = "127.0.0.1:40000";
    const LISTENER: &str = "127.0.0.1:7523";

    /// The kernel's answer about a socket of uid 1000, with the cgroup attribute behind another one.
    fn answer(family: i32, state: u8, from: &str, to: &str, inode: u32) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut message = vec![family as u8, state, 0, 0];
        message.extend(from.port().to_be_bytes());
        message.extend(to.port().to_be_bytes());
        message.extend(address_bytes(from.ip()));
        message.extend(address_bytes(to.ip()));
        message.extend([0; 4]);
        message.extend([7; 8]);
        message.extend([0; 12]);
        message.extend(1000_u32.to_ne_bytes());
        message.extend(inode.to_ne_bytes());
        message.extend([5, 0, 8, 0, 1, 0, 0, 0]); // INET_DIAG_SHUTDOWN, one byte, padded
        message.extend([12, 0, 21, 0]);
        message.extend(4242_u64.to_ne_bytes());
        message
    }

    fn read(answer: &[u8]) -> Option<TcpSocket> {
        read_tcp_answer(answer, CALLER.parse().unwrap(), LISTENER.parse().unwrap())
    }

    #[test]
    fn only_an_open_socket_of_the_caller_counts() {
        let good = answer(libc::AF_INET, TCP_ESTABLISHED, CALLER, LISTENER, 99);
        let socket = read(&good).unwrap();
        assert_eq!((socket.uid, socket.inode), (1000, 99));
        assert_eq!((socket.cookie, socket.cgroup_id), ([7; 8], Some(4242)));
        assert!(read(&answer(libc::AF_INET, TCP_CLOSE_WAIT, CALLER, LISTENER, 99)).is_some());

        // Every other state, FIN_WAIT2 (5) with uid 0 and inode 0 and LISTEN (10) among them.
        for state in (0..=13).filter(|state| ![TCP_ESTABLISHED, TCP_CLOSE_WAIT].contains(state)) {
            for inode in [0, 99] {
                let mut left_over = answer(libc::AF_INET, state, CALLER, LISTENER, inode);
                left_over[64..68].fill(0);
                assert_eq!(read(&left_over), None, "state {state}");
            }
        }
        for (what, answer) in [
            (
                "no inode",
                answer(libc::AF_INET, TCP_ESTABLISHED, CALLER, LISTENER, 0),
            ),
            (
                "our own side",
                answer(libc::AF_INET, TCP_ESTABLISHED, LISTENER, CALLER, 99),
            ),
            (
                "another port",
                answer(
                    libc::AF_INET,
                    TCP_ESTABLISHED,
                    "127.0.0.1:40001",
                    LISTENER,
                    99,
                ),
            ),
            (
                "another address",
                answer(
                    libc::AF_INET,
                    TCP_ESTABLISHED,
                    "127.0.0.2:40000",
                    LISTENER,
                    99,
                ),
            ),
            (
                "another peer",
                answer(libc::AF_INET, TCP_ESTABLISHED, CALLER, "127.0.0.1:7524", 99),
            ),
            (
                "another family",
                answer(libc::AF_UNIX, TCP_ESTABLISHED, CALLER, LISTENER, 99),
            ),
        ] {
            assert_eq!(read(&answer), None, "{what}");
        }
        assert_eq!(read(&good), Some(socket));
    }

    #[test]
    fn nobody_answers_in_the_place_of_the_kernel() {
        let netlink = Netlink::open().unwrap();
        let address: NetlinkAddr = getsockname(netlink.socket.as_raw_fd()).unwrap();
        let forger = Netlink::open_unconnected().unwrap();
        let sent = sendto(
            forger.as_raw_fd(),
            &answer(libc::AF_INET, TCP_ESTABLISHED, CALLER, LISTENER, 99),
            &NetlinkAddr::new(address.pid(), 0),
            MsgFlags::empty(),
        );
        // Whoever may administer the network could send; nobody else may.
        let expected = match nix::unistd::geteuid().is_root() {
            true => Errno::ECONNREFUSED,
            false => Errno::EPERM,
        };
        assert_eq!(sent, Err(expected));
    }

    #[test]
    fn a_mapped_address_is_the_address() {
        let mapped = answer(
            libc::AF_INET6,
            TCP_ESTABLISHED,
            "[::ffff:127.0.0.1]:40000",
            "[::ffff:127.0.0.1]:7523",
            99,
        );
        assert!(read(&mapped).is_some());
    }

    #[test]
    fn an_error_of_the_kernel_is_told_from_no_such_socket() {
        let error = |errno: i32| {
            let mut message = 36_u32.to_ne_bytes().to_vec();
            message.extend(NLMSG_ERROR.to_ne_bytes());
            message.extend([0; 10]);
            message.extend((-errno).to_ne_bytes());
            message.extend([0; 16]);
            message
        };
        assert_eq!(read_header(&error(libc::ENOENT)).unwrap(), None);
        let denied = read_header(&error(libc::EPERM)).unwrap_err();
        assert_eq!(denied.raw_os_error(), Some(libc::EPERM));
        assert!(read_header(&[0; 15]).is_err());
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(answer in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (read(&answer), read_header(&answer), attribute(&answer, 0, 1));
        }
    }
}
