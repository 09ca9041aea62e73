//! What attesting a connection takes, in this process: the kernel's evidence, and what the attestors make
//! of it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use countersign_attestors::observers::look_here;
use countersign_attestors::{
    Attestation, Attestor, AttributeSelection, Evidence, PeerEvidence, SystemdAttestor,
    UnixAttestor, readers,
};

use crate::bench::Bench;
use crate::caller::{Command, Form, Route};
use crate::measure::median;
use crate::report::Must;
use crate::{Fallible, HOST, LOAD_CORE, PROXY_CORE, pin};

const TIMES: usize = 2000;

/// A caller's connection to this process, which the caller keeps open. The caller has a user and a
/// cgroup of its own.
pub struct Called {
    pub stream: TcpStream,
}

impl Called {
    pub fn by_a_caller(bench: &mut Bench) -> Fallible<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let route = Route {
            proxy: listener.local_addr()?,
            form: Form::Origin,
            host: HOST.to_owned(),
            prefix: "/v1/orders".to_owned(),
            roots: String::new(),
        };
        let answering = std::thread::spawn(move || -> std::io::Result<TcpStream> {
            let (mut stream, _) = listener.accept()?;
            for line in BufReader::new(&stream).lines() {
                if line?.is_empty() {
                    break;
                }
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
            Ok(stream)
        });
        let command = Command::Open {
            route,
            connections: 1,
        };
        bench.load.tell_one(0, &command)?;
        // Not a request to a proxy.
        bench.load.take_served();
        let stream = answering.join().map_err(|_| "nobody answered")??;
        Ok(Self { stream })
    }

    pub fn evidence(&self) -> Fallible<PeerEvidence> {
        Ok(look_here(PeerEvidence::of_loopback_tcp(&self.stream))?)
    }
}

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let called = Called::by_a_caller(bench)?;
    let (local, peer) = (called.stream.local_addr()?, called.stream.peer_addr()?);
    let (_client, server) = UnixStream::pair()?;
    pin(PROXY_CORE)?;
    let on_unix_socket =
        microseconds(|| attest(&look_here(PeerEvidence::of_unix_stream(server.as_fd()))?))?;
    let to_container = microseconds(|| {
        let socket = readers::tcp_socket(peer, local)?.ok_or("no such socket")?;
        socket.cgroup_id.ok_or("no cgroup id")?;
        Ok(())
    })?;
    let to_process = microseconds(|| attest(&called.evidence()?))?;
    pin(LOAD_CORE)?;
    bench.load.close()?;
    for (name, figure, must) in [
        ("Unix socket", on_unix_socket, 25.0),
        ("TCP, to the container (its cgroup id)", to_container, 5.0),
        ("TCP, to a process of the container", to_process, 60.0),
    ] {
        let name = format!("attestation: {name}");
        bench
            .report
            .must(Must::at_most(name, figure, "µs", must, None));
    }
    Ok(())
}

/// What the configured attestors make of the evidence, for a policy that reads the user.
fn attest(peer: &PeerEvidence) -> Fallible<()> {
    let uid = ("unix".to_owned(), "uid".to_owned());
    let attestors: [&dyn Attestor; 2] = [
        &UnixAttestor::new(AttributeSelection::of([uid])),
        &SystemdAttestor::new(),
    ];
    for attestor in attestors {
        let attestation =
            futures_util::FutureExt::now_or_never(attestor.attest(Evidence::Kernel(peer)));
        if let None | Some(Attestation::Failed { .. }) = attestation {
            return Err(format!("{}: {attestation:?}", attestor.name()).into());
        }
    }
    Ok(())
}

/// The median of many times.
fn microseconds(work: impl Fn() -> Fallible<()>) -> Fallible<f64> {
    let mut took = Vec::new();
    for _ in 0..TIMES {
        let began = Instant::now();
        work()?;
        took.push(began.elapsed().as_secs_f64() * 1e6);
    }
    median(took)
}
