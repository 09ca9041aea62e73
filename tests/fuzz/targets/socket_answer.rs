//! The kernel's answer about a TCP socket (sock_diag(7)), written as hexadecimal with `#` before remarks:
//! what counts is an open socket of that caller to us, with an inode.

use std::net::SocketAddr;

use countersign_attestors::readers::socket_answer;

const CALLER: &str = "127.0.0.1:40000";
const LISTENER: &str = "127.0.0.1:7523";

/// What the kernel says of such a socket.
const GOOD: &[u8] = include_bytes!("../seeds/socket_answer/established");

/// After `struct nlmsghdr`.
const MESSAGE: usize = 16;

pub fn run(input: &[u8]) {
    let Some(answer) = bytes(input) else {
        return;
    };
    let [caller, listener]: [SocketAddr; 2] =
        [CALLER, LISTENER].map(|address| address.parse().expect("an address"));
    let read = socket_answer(&answer, caller, listener);
    assert_eq!(
        read.as_ref().ok(),
        socket_answer(&answer, caller, listener).as_ref().ok()
    );
    let Ok(Some(socket)) = read else {
        assert_ne!(input, GOOD, "{read:?}");
        return;
    };
    let length = u32::from_ne_bytes(field(&answer, 0)) as usize;
    assert!(length <= answer.len(), "more was read than came");
    assert_eq!(
        u16::from_ne_bytes(field(&answer, 4)),
        20,
        "not SOCK_DIAG_BY_FAMILY"
    );
    let [_, state] = field(&answer, MESSAGE);
    assert!(
        state == 1 || state == 8,
        "neither ESTABLISHED nor CLOSE_WAIT: {state}"
    );
    assert_eq!(
        u16::from_be_bytes(field(&answer, MESSAGE + 4)),
        caller.port()
    );
    assert_eq!(
        u16::from_be_bytes(field(&answer, MESSAGE + 6)),
        listener.port()
    );
    assert_eq!(socket.uid, u32::from_ne_bytes(field(&answer, MESSAGE + 64)));
    assert_eq!(
        socket.inode,
        u32::from_ne_bytes(field(&answer, MESSAGE + 68))
    );
    assert_ne!(socket.inode, 0, "a socket without an inode says nothing");
    if let Some(cgroup) = socket.cgroup_id {
        let attributes = &answer[MESSAGE + 72..length];
        let stands_there = attributes
            .windows(8)
            .any(|window| window == cgroup.to_ne_bytes());
        assert!(stands_there, "a cgroup that nobody wrote");
    }
    // From the other end it is another socket: ours.
    assert!(!matches!(
        socket_answer(&answer, listener, caller),
        Ok(Some(_))
    ));
}

fn field<const N: usize>(answer: &[u8], position: usize) -> [u8; N] {
    answer[position..]
        .first_chunk()
        .copied()
        .expect("what was read is there")
}

fn bytes(input: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(input).ok()?;
    let digits: Vec<u8> = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .flat_map(str::bytes)
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}
