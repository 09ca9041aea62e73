//! From real sockets to the processes that hold them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed expectation is a failed test"
)]

use std::fs::File;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Barrier;
use std::time::{Duration, SystemTime};

use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use super::attackers::{settled, wait_until};
use super::{executable, kernel};
use crate::evidence::{EvidenceError, PeerEvidence};
use crate::observers::look_here;

fn of_loopback_tcp(accepted: &TcpStream) -> Result<PeerEvidence, EvidenceError> {
    settled(|| look_here(PeerEvidence::of_loopback_tcp(accepted)))
}

/// Why there is no caller after its socket was closed: a child that another test is starting has it open, too,
/// until it executes.
fn ends(look: impl Fn() -> Result<PeerEvidence, EvidenceError>) -> EvidenceError {
    wait_until("the socket is closed", || look().is_err());
    look().unwrap_err()
}

/// A client and the server's view of it: (client, accepted).
fn connection(address: &str, target: Option<&str>) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect((target.unwrap_or(address), port)).unwrap();
    (client, listener.accept().unwrap().0)
}

#[test]
fn a_caller_over_loopback_is_found_by_every_spelling_of_its_address() {
    for (address, target) in [
        ("127.0.0.1", None),
        ("127.8.8.8", None),
        ("::1", None),
        ("::", Some("127.0.0.1")),
        ("::", Some("::ffff:127.0.0.1")),
        ("0.0.0.0", Some("::ffff:127.0.0.1")),
    ] {
        let (_client, accepted) = connection(address, target);
        let evidence = of_loopback_tcp(&accepted).unwrap();
        assert_eq!(
            evidence.process().unwrap().pid(),
            std::process::id(),
            "{address} {target:?}"
        );
        assert_eq!(evidence.words(), ["sock_diag", "pidfd"]);
        evidence.check_liveness().unwrap();
    }
}

#[test]
fn both_ways_of_a_unix_socket_find_the_same_process() {
    let (client, server) = UnixStream::pair().unwrap();
    let evidence = look_here(PeerEvidence::of_unix_stream(server.as_fd())).unwrap();
    assert_eq!(evidence.process().unwrap().pid(), std::process::id());
    assert_eq!(evidence.words(), ["pidfd"]);

    let weaker =
        || settled(|| look_here(PeerEvidence::of_unix_stream_by_credentials(server.as_fd())));
    let found = weaker().unwrap();
    assert_eq!(found.process().unwrap().pid(), std::process::id());
    assert_eq!(found.words(), ["pidfd", "weaker:peercred"]);

    // Nobody holds the other end any more: there is nothing to prove the number by.
    drop(client);
    assert_eq!(ends(weaker).code(), "caller_gone");
}

#[test]
fn a_closed_connection_has_no_caller() {
    let (client, accepted) = connection("127.0.0.1", None);
    drop(client);
    let gone = ends(|| of_loopback_tcp(&accepted));
    assert_eq!(gone.code(), "caller_gone");
}

#[tokio::test]
async fn a_connection_that_was_reset_is_not_of_who_connects_from_its_address_next() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // An address of its own: a port of 127.0.0.1 can be one of many others' connections.
    let first = TcpSocket::new_v4().unwrap();
    first.bind("127.9.9.9:0".parse().unwrap()).unwrap();
    let port = first.local_addr().unwrap();
    let mut first = first.connect(address).await.unwrap();
    first.write_all(b"a whole request").await.unwrap();
    let at_once = linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&first, sockopt::Linger, &at_once).unwrap();
    drop(first);

    let next = TcpSocket::new_v4().unwrap();
    next.set_reuseaddr(true).unwrap();
    wait_until("the first is closed", || next.bind(port).is_ok());
    let _next = next.connect(address).await.unwrap();

    // Both are there, from one address, and what the first has sent can be read.
    let [(mut reset, from), (lives, too)] = [(); 2].map(|()| listener.accept().unwrap());
    assert_eq!([from, too], [port; 2]);
    let refused = of_loopback_tcp(&reset).unwrap_err();
    assert_eq!(refused.code(), "caller_gone");
    let mut request = [0; 15];
    reset.read_exact(&mut request).unwrap();
    of_loopback_tcp(&lives).unwrap().check_liveness().unwrap();
}

#[test]
fn callers_who_come_at_once_each_learn_of_their_own_socket() {
    const CALLERS: usize = 64;
    let connections: Vec<_> = (0..CALLERS)
        .map(|_| connection("127.0.0.1", None))
        .collect();
    let together = Barrier::new(CALLERS);
    std::thread::scope(|scope| {
        for (number, (client, accepted)) in connections.into_iter().enumerate() {
            let together = &together;
            scope.spawn(move || {
                let client = (number % 4 != 0).then_some(client);
                if client.is_none() {
                    ends(|| of_loopback_tcp(&accepted));
                }
                together.wait();
                for _ in 0..10 {
                    match (&client, of_loopback_tcp(&accepted)) {
                        (Some(_), Ok(evidence)) => {
                            assert_eq!(evidence.process().unwrap().pid(), std::process::id());
                        }
                        (None, Err(error)) => assert_eq!(error.code(), "caller_gone"),
                        (open, other) => panic!("{open:?}: {other:?}"),
                    }
                }
            });
        }
    });
}

#[test]
fn a_program_of_which_many_ask_at_once_is_hashed_by_one_of_them() {
    const ASKED: usize = 8;
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("program");
    std::fs::write(&program, vec![7; 32 << 20]).unwrap();
    // One that was changed just now is hashed for each.
    let written = kernel::identify_open(File::open(&program).unwrap().as_fd()).unwrap();
    let apart = Duration::from_secs(2);
    assert!(!written.shows_changes(apart, SystemTime::now()));
    // By a clock that was set back.
    assert!(written.shows_changes(apart, SystemTime::UNIX_EPOCH));
    while !written.shows_changes(apart, SystemTime::now()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let processor_time = || -> Duration {
        let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
        nix::time::clock_gettime(clock).unwrap().into()
    };
    let ready = Barrier::new(ASKED);
    let ask = || {
        let file = File::open(&program).unwrap();
        ready.wait();
        let before = processor_time();
        let hash = executable::sha256(file).unwrap().unwrap();
        (hash, processor_time() - before)
    };
    let answers: Vec<([u8; 32], Duration)> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..ASKED).map(|_| scope.spawn(ask)).collect();
        asked
            .into_iter()
            .map(|asked| asked.join().unwrap())
            .collect()
    });
    assert!(answers.iter().all(|(hash, _)| *hash == answers[0].0));
    let all: Duration = answers.iter().map(|(_, took)| *took).sum();
    let most = answers.iter().map(|(_, took)| *took).max().unwrap();
    println!("{ASKED} asked: {all:?} of the processor, {most:?} of them one");
    assert!(all < most * 2, "{all:?}, {most:?}");
}
