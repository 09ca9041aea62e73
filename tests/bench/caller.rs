//! One caller: a process with a user of its own that obeys the commands on its standard input, one line
//! each, and answers each with a [`Report`].
//!
//! It waits with poll(2) on plain sockets, so that the core which it shares with the origin is not what
//! bounds the proxies.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde::{Deserialize, Serialize};

use crate::Fallible;

/// How many paths a caller goes through.
const PATHS: usize = 1000;

/// A proxy that was just started listens by then.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

/// How requests get to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// `GET http://HOST/PATH`, as to a forward proxy.
    Absolute,
    /// `GET /PATH`, as to a gateway.
    Origin,
    /// CONNECT, then TLS, then `GET /PATH`.
    Tunnel,
}

/// Where requests go.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Route {
    pub proxy: SocketAddr,
    pub form: Form,
    pub host: String,
    /// What every path begins with.
    pub prefix: String,
    /// The roots by which a [`Form::Tunnel`] is verified (PEM).
    pub roots: String,
}

/// What a caller is told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    /// Opens connections, one after the other, with one request on each.
    Open { route: Route, connections: usize },
    /// Opens one connection, as soon as somebody listens, with one request on it.
    OpenFirst { route: Route },
    /// Opens connections, without a request.
    Connect { route: Route, connections: usize },
    /// Requests on every open connection, each when the one before it was answered; one at least.
    Repeat { length: Duration },
    /// Requests at a fixed schedule; the latency counts from when a request was due.
    Schedule {
        length: Duration,
        first: Duration,
        interval: Duration,
    },
    /// One request on each new connection, one after the other.
    Reconnect { route: Route, length: Duration },
    /// Closes every connection.
    Close,
}

/// What came of a command.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Requests answered with 200, and their body complete.
    pub served: u64,
    /// All others.
    pub failed: u64,
    /// Why the first of them failed.
    pub failure: Option<String>,
    /// How many requests took so many microseconds.
    pub latencies: BTreeMap<u64, u64>,
}

impl Report {
    pub fn add(&mut self, other: &Self) {
        self.served += other.served;
        self.failed += other.failed;
        self.failure = self.failure.take().or_else(|| other.failure.clone());
        for (microseconds, count) in &other.latencies {
            *self.latencies.entry(*microseconds).or_default() += count;
        }
    }

    /// The latency that this share of the requests did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        let rank = (self.served as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (microseconds, count) in &self.latencies {
            seen += count;
            if seen >= rank {
                return Duration::from_micros(*microseconds);
            }
        }
        Duration::ZERO
    }

    fn count(&mut self, outcome: &io::Result<()>, latency: Duration) {
        match outcome {
            Ok(()) => {
                self.served += 1;
                let microseconds = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                *self.latencies.entry(microseconds).or_default() += 1;
            }
            Err(error) => {
                self.failed += 1;
                self.failure.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

/// Obeys until its input ends.
pub fn obey() -> Fallible<()> {
    // Sleeps until the schedule says, not 50 microseconds longer.
    nix::sys::prctl::set_timerslack(1)?;
    let mut caller = Caller {
        connections: Vec::new(),
        requests: Vec::new(),
        next: usize::try_from(std::process::id())?,
        buffer: vec![0; 64 * 1024],
    };
    for line in io::stdin().lines() {
        let report = caller.perform(serde_json::from_str(&line?)?)?;
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

struct Caller {
    connections: Vec<Connection>,
    /// What is sent, by path.
    requests: Vec<Vec<u8>>,
    next: usize,
    buffer: Vec<u8>,
}

struct Connection {
    stream: Stream,
    /// When the request that is under way was sent, or was due.
    since: Option<Instant>,
}

impl Caller {
    fn perform(&mut self, command: Command) -> Fallible<Report> {
        match command {
            Command::Open { route, connections } => self.open(&route, connections),
            Command::OpenFirst { route } => self.open_first(&route),
            Command::Connect { route, connections } => self.connect(&route, connections),
            Command::Repeat { length } => self.repeat(length),
            Command::Schedule {
                length,
                first,
                interval,
            } => self.schedule(length, first, interval),
            Command::Reconnect { route, length } => self.reconnect(&route, length),
            Command::Close => {
                self.connections.clear();
                Ok(Report::default())
            }
        }
    }

    fn open(&mut self, route: &Route, connections: usize) -> Fallible<Report> {
        let connector = Connector::new(route)?;
        self.requests = requests(route);
        let mut report = Report::default();
        for _ in 0..connections {
            let began = Instant::now();
            let outcome = connector
                .connect()
                .and_then(|stream| self.ask(stream, began));
            report.count(&outcome, began.elapsed());
        }
        Ok(report)
    }

    fn open_first(&mut self, route: &Route) -> Fallible<Report> {
        let connector = Connector::new(route)?;
        self.requests = requests(route);
        let began = Instant::now();
        let stream = loop {
            match connector.connect() {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > LISTENS_WITHIN => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_micros(100)),
            }
        };
        let mut report = Report::default();
        let outcome = self.ask(stream, began);
        report.count(&outcome, began.elapsed());
        Ok(report)
    }

    /// One request on a new connection, which stays open.
    fn ask(&mut self, stream: Stream, began: Instant) -> io::Result<()> {
        let mut connection = Connection::new(stream);
        connection.send(next(&self.requests, &mut self.next), began)?;
        connection.receive(&mut self.buffer)?;
        self.connections.push(connection);
        Ok(())
    }

    fn connect(&mut self, route: &Route, connections: usize) -> Fallible<Report> {
        let connector = Connector::new(route)?;
        self.requests = requests(route);
        for _ in 0..connections {
            let connection = Connection::new(connector.connect()?);
            self.connections.push(connection);
        }
        Ok(Report::default())
    }

    fn repeat(&mut self, length: Duration) -> Fallible<Report> {
        let mut report = Report::default();
        let deadline = Instant::now() + length;
        for index in 0..self.connections.len() {
            self.send(index, Instant::now(), &mut report);
        }
        while self.is_waiting() {
            for index in self.readable(None)? {
                let Some(answered) = self.receive(index, &mut report) else {
                    continue;
                };
                if answered < deadline {
                    self.send(index, answered, &mut report);
                }
            }
        }
        Ok(report)
    }

    fn schedule(
        &mut self,
        length: Duration,
        first: Duration,
        interval: Duration,
    ) -> Fallible<Report> {
        let mut report = Report::default();
        let began = Instant::now();
        let (mut due, end) = (began + first, began + length);
        let mut late = VecDeque::new();
        loop {
            let now = Instant::now();
            while due <= now && due < end {
                late.push_back(due);
                due += interval;
            }
            for index in 0..self.connections.len() {
                let is_idle = |connection: &Connection| connection.since.is_none();
                if self.connections.get(index).is_some_and(is_idle)
                    && let Some(due) = late.pop_front()
                {
                    self.send(index, due, &mut report);
                }
            }
            if due >= end && late.is_empty() && !self.is_waiting() {
                return Ok(report);
            }
            let until_due = (due < end).then(|| due.saturating_duration_since(now));
            for index in self.readable(until_due)? {
                self.receive(index, &mut report);
            }
        }
    }

    fn reconnect(&mut self, route: &Route, length: Duration) -> Fallible<Report> {
        let connector = Connector::new(route)?;
        self.requests = requests(route);
        let mut report = Report::default();
        let deadline = Instant::now() + length;
        while Instant::now() < deadline {
            let began = Instant::now();
            let outcome = connector
                .connect()
                .and_then(|stream| self.ask(stream, began));
            report.count(&outcome, began.elapsed());
            self.connections.clear();
        }
        Ok(report)
    }

    fn is_waiting(&self) -> bool {
        self.connections
            .iter()
            .any(|connection| connection.since.is_some())
    }

    /// The connections on which an answer arrives, at most `timeout` from now.
    fn readable(&self, timeout: Option<Duration>) -> Fallible<Vec<usize>> {
        let waiting: Vec<(usize, &Connection)> = self
            .connections
            .iter()
            .enumerate()
            .filter(|(_, connection)| connection.since.is_some())
            .collect();
        // With one there is nothing to choose from: the read waits.
        if let (&[(only, _)], None) = (waiting.as_slice(), timeout) {
            return Ok(vec![only]);
        }
        let mut polled: Vec<PollFd<'_>> = waiting
            .iter()
            .map(|(_, connection)| {
                PollFd::new(connection.stream.socket().as_fd(), PollFlags::POLLIN)
            })
            .collect();
        ppoll(&mut polled, timeout.map(TimeSpec::from), None)?;
        Ok(waiting
            .iter()
            .zip(&polled)
            .filter(|(_, polled)| polled.any().unwrap_or(false))
            .map(|((index, _), _)| *index)
            .collect())
    }

    fn send(&mut self, index: usize, since: Instant, report: &mut Report) {
        let request = next(&self.requests, &mut self.next);
        if let Some(connection) = self.connections.get_mut(index)
            && let Err(error) = connection.send(request, since)
        {
            report.count(&Err(error), Duration::ZERO);
        }
    }

    /// Takes the answer and says when it was complete; `None` where it is no answer to go on after.
    fn receive(&mut self, index: usize, report: &mut Report) -> Option<Instant> {
        let connection = self.connections.get_mut(index)?;
        let since = connection.since?;
        let outcome = connection.receive(&mut self.buffer);
        let now = Instant::now();
        report.count(&outcome, now.saturating_duration_since(since));
        outcome.ok().map(|()| now)
    }
}

fn next<'a>(requests: &'a [Vec<u8>], next: &mut usize) -> &'a [u8] {
    *next = next.wrapping_add(1);
    requests.get(*next % PATHS).map_or(&[], Vec::as_slice)
}

fn requests(route: &Route) -> Vec<Vec<u8>> {
    let Route {
        host, prefix, form, ..
    } = route;
    let authority = match form {
        Form::Absolute => format!("http://{host}"),
        Form::Origin | Form::Tunnel => String::new(),
    };
    (0..PATHS)
        .map(|path| {
            format!(
                "GET {authority}{prefix}/{path} HTTP/1.1\r\nhost: {host}\r\naccept: */*\r\n\r\n"
            )
            .into_bytes()
        })
        .collect()
}

/// Makes connections to a proxy.
struct Connector<'a> {
    route: &'a Route,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

impl<'a> Connector<'a> {
    fn new(route: &'a Route) -> Fallible<Self> {
        if route.form != Form::Tunnel {
            return Ok(Self { route, tls: None });
        }
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(route.roots.as_bytes()) {
            roots.add(certificate?)?;
        }
        let mut configuration = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every connection is a new one.
        configuration.resumption = rustls::client::Resumption::disabled();
        let name = ServerName::try_from(route.host.clone())?;
        Ok(Self {
            route,
            tls: Some((Arc::new(configuration), name)),
        })
    }

    fn connect(&self) -> io::Result<Stream> {
        // Made first: the first of a process takes long, and a proxy waits for its bytes.
        let session = match &self.tls {
            None => None,
            Some((configuration, name)) => {
                let session = ClientConnection::new(Arc::clone(configuration), name.clone());
                Some(session.map_err(io::Error::other)?)
            }
        };
        let mut socket = TcpStream::connect(self.route.proxy)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        let Some(session) = session else {
            return Ok(Stream::Plain(socket));
        };
        let host = &self.route.host;
        let connect = format!("CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n\r\n");
        socket.write_all(connect.as_bytes())?;
        // Nothing follows the answer: in TLS it is the client who begins (RFC 8446 section 2).
        let mut answer = Vec::new();
        let mut part = [0; 1024];
        while !answer.ends_with(b"\r\n\r\n") {
            let length = some(socket.read(&mut part)?)?;
            answer.extend_from_slice(part.get(..length).unwrap_or_default());
        }
        if !is_ok(&answer) {
            return Err(refused(&answer));
        }
        Ok(Stream::Tls(Box::new(StreamOwned::new(session, socket))))
    }
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.get_ref(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Connection {
    fn new(stream: Stream) -> Self {
        Self {
            stream,
            since: None,
        }
    }

    fn send(&mut self, request: &[u8], since: Instant) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(socket) => socket.write_all(request)?,
            Stream::Tls(stream) => stream.write_all(request).and_then(|()| stream.flush())?,
        }
        self.since = Some(since);
        Ok(())
    }

    /// Waits for the whole answer, which must be 200.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.since = None;
        let mut filled = 0;
        let mut left = loop {
            let rest = buffer.get_mut(filled..).unwrap_or_default();
            filled += some(self.stream.read(rest)?)?;
            let seen = buffer.get(..filled).unwrap_or_default();
            if let Some(length) = length_of_answer(seen)? {
                break length.saturating_sub(filled);
            }
        };
        while left > 0 {
            let most = left.min(buffer.len());
            let rest = buffer.get_mut(..most).unwrap_or_default();
            left -= some(self.stream.read(rest)?)?;
        }
        Ok(())
    }
}

fn some(read: usize) -> io::Result<usize> {
    match read {
        0 => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the proxy closed the connection",
        )),
        read => Ok(read),
    }
}

/// How long the answer that begins so is, head and body; `None` while its head is not complete.
fn length_of_answer(seen: &[u8]) -> io::Result<Option<usize>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(head)) = response.parse(seen) else {
        return match seen.starts_with(b"HTTP/1.1 ") {
            true => Ok(None),
            false => Err(refused(seen)),
        };
    };
    if response.code != Some(200) {
        return Err(refused(seen));
    }
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| {
            std::str::from_utf8(header.value)
                .ok()?
                .parse::<usize>()
                .ok()
        })
        .ok_or_else(|| io::Error::other("an answer without content-length"))?;
    Ok(Some(head + length))
}

fn is_ok(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 200")
}

fn refused(answer: &[u8]) -> io::Error {
    io::Error::other(String::from_utf8_lossy(answer).into_owned())
}
