//! HTTP/2 frame by frame, for what no client would send.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc, watch};

/// What a client begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames (RFC 9113 section 6), by their numbers.
pub const TYPES: [&str; 10] = [
    "DATA",
    "HEADERS",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "PUSH_PROMISE",
    "PING",
    "GOAWAY",
    "WINDOW_UPDATE",
    "CONTINUATION",
];

/// Error codes (RFC 9113 section 7), by their numbers.
pub const ERRORS: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;

/// END_STREAM of DATA and HEADERS, ACK of SETTINGS and PING.
pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// How long nothing may be taken of what is written before that counts as a stall, while nothing is read.
const STALL: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(60);

/// A frame as it is on the wire.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A field as a literal that no table keeps or, `indexed`, that the table does, without Huffman
/// (RFC 7541 section 6.2).
pub fn field(name: &[u8], value: &[u8], indexed: bool) -> Vec<u8> {
    let mut bytes = vec![if indexed { 0x40 } else { 0 }];
    for text in [name, value] {
        bytes.extend(integer(text.len(), 7, 0));
        bytes.extend(text);
    }
    bytes
}

/// An integer after the bits of `first` (RFC 7541 section 5.1).
pub fn integer(value: usize, prefix: u32, first: u8) -> Vec<u8> {
    let most = (1_usize << prefix) - 1;
    if value < most {
        return vec![first | u8::try_from(value).unwrap()];
    }
    let mut bytes = vec![first | u8::try_from(most).unwrap()];
    let mut rest = value - most;
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
    bytes
}

/// The `:status` that a block of fields begins with, from an encoder that may keep no table.
fn status(block: &[u8]) -> u16 {
    let block = match block {
        // The table's size (RFC 7541 section 6.3).
        [first, rest @ ..] if first & 0xe0 == 0x20 => rest,
        block => block,
    };
    let literal = match block {
        [first @ 0x88..=0x8e, ..] => {
            return [200, 204, 206, 304, 400, 404, 500][usize::from(first - 0x88)];
        }
        [0x08..=0x0e | 0x18..=0x1e | 0x48..=0x4e, literal @ ..] => literal,
        _ => panic!("a block does not begin with `:status`: {block:x?}"),
    };
    let length = usize::from(literal[0] & 0x7f);
    let text = &literal[1..=length];
    let digits = match literal[0] & 0x80 {
        0 => String::from_utf8(text.to_vec()).unwrap(),
        _ => huffman_digits(text),
    };
    digits.parse().unwrap()
}

/// Digits in the code of RFC 7541 appendix B: 0 to 2 have five bits, the others six.
fn huffman_digits(bytes: &[u8]) -> String {
    let mut bits = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| u32::from(byte >> bit & 1)));
    let mut digits = String::new();
    while digits.len() < 3 {
        let mut code = 0;
        for _ in 0..5 {
            code = code * 2 + bits.next().unwrap();
        }
        if code > 2 {
            code = code * 2 + bits.next().unwrap() - 0b01_1001 + 3;
        }
        digits.push(char::from_digit(code, 10).unwrap());
    }
    digits
}

/// What came of one stream.
#[derive(Debug, Default, Clone)]
pub struct Answer {
    pub status: Option<u16>,
    pub body: Vec<u8>,
    pub ended: bool,
    pub reset: Option<u32>,
}

impl Answer {
    /// In words: status, the code of a refusal, how it ended.
    pub fn describe(&self) -> String {
        let mut words = Vec::new();
        words.extend(self.status.map(|status| status.to_string()));
        let problem = serde_json::from_slice::<serde_json::Value>(&self.body);
        if let Some(code) = problem.as_ref().ok().and_then(|body| body["code"].as_str()) {
            words.push(code.to_owned());
        }
        match (self.reset, self.ended) {
            (Some(error), _) => words.push(format!("RST_STREAM {}", error_name(error))),
            (None, false) => words.push("without end".to_owned()),
            (None, true) => {}
        }
        words.join(" ")
    }
}

pub fn error_name(error: u32) -> String {
    let known = usize::try_from(error).ok().and_then(|at| ERRORS.get(at));
    known.map_or_else(|| error.to_string(), ToString::to_string)
}

/// What came of a connection.
#[derive(Debug, Default)]
pub struct Came {
    pub streams: BTreeMap<u32, Answer>,
    pub goaway: Option<u32>,
    pub pongs: usize,
    pub settings_acknowledged: usize,
    pub closed: bool,
}

/// One connection: what is written is the test's; what comes is read, and acknowledged, unless that is
/// put off.
pub struct Frames {
    writing: Arc<tokio::sync::Mutex<WriteHalf<Box<dyn Io>>>>,
    came: Arc<Mutex<Came>>,
    changed: Arc<Notify>,
    reads: watch::Sender<bool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl Drop for Frames {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Frames {
    /// Begins a connection by the preface and `settings`, a frame.
    pub async fn begin(mut io: Box<dyn Io>, settings: &[u8]) -> Self {
        // Before anything is acknowledged.
        let begins = [PREFACE, settings].concat();
        io.write_all(&begins).await.unwrap();
        io.flush().await.unwrap();
        let (reading, writing) = tokio::io::split(io);
        let writing = Arc::new(tokio::sync::Mutex::new(writing));
        let came = Arc::<Mutex<Came>>::default();
        let changed = Arc::<Notify>::default();
        let (reads, may_read) = watch::channel(true);
        let (acknowledge, mut acknowledgements) = mpsc::unbounded_channel::<Vec<u8>>();
        let read = read_frames(
            reading,
            may_read,
            Arc::clone(&came),
            Arc::clone(&changed),
            acknowledge,
        );
        // Apart from the reading, which must go on when nothing can be written.
        let writer = Arc::clone(&writing);
        let write = async move {
            while let Some(frame) = acknowledgements.recv().await {
                let mut writer = writer.lock().await;
                let _ = writer.write_all(&frame).await;
                let _ = writer.flush().await;
            }
        };
        Self {
            writing,
            came,
            changed,
            reads,
            tasks: vec![tokio::spawn(read), tokio::spawn(write)],
        }
    }

    /// Writes; whether all of it was taken in time. What was not is written when reading goes on.
    pub async fn write(&self, bytes: &[u8]) -> bool {
        let mut writing = self.writing.lock().await;
        let mut rest = bytes;
        let mut stalled = false;
        while !rest.is_empty() {
            let patience = match *self.reads.borrow() {
                true => LIMIT,
                false => STALL,
            };
            match tokio::time::timeout(patience, writing.write(rest)).await {
                Ok(Ok(written)) => rest = &rest[written..],
                // The agent need not hear all of it.
                Ok(Err(_)) => return true,
                Err(_) => {
                    assert!(!stalled, "the agent takes nothing more");
                    stalled = true;
                    self.read_on(true);
                }
            }
        }
        let _ = writing.flush().await;
        !stalled
    }

    /// Whether what comes is read.
    pub fn read_on(&self, reads: bool) {
        let _ = self.reads.send(reads);
    }

    pub fn came(&self) -> MutexGuard<'_, Came> {
        self.came.lock().unwrap()
    }

    /// Waits until what came satisfies `is_enough`, at most `limit`; whether it did.
    pub async fn until(&self, limit: Duration, is_enough: impl Fn(&Came) -> bool) -> bool {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if is_enough(&self.came()) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }
}

async fn read_frames(
    mut reading: ReadHalf<Box<dyn Io>>,
    mut may_read: watch::Receiver<bool>,
    came: Arc<Mutex<Came>>,
    changed: Arc<Notify>,
    acknowledge: mpsc::UnboundedSender<Vec<u8>>,
) {
    loop {
        let _ = may_read.wait_for(|may| *may).await;
        let mut head = [0; 9];
        let mut payload = Vec::new();
        let is_whole = reading.read_exact(&mut head).await.is_ok() && {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            payload.resize(usize::try_from(length).unwrap(), 0);
            reading.read_exact(&mut payload).await.is_ok()
        };
        {
            let mut came = came.lock().unwrap();
            match is_whole {
                true => note(&mut came, &head, &payload, &acknowledge),
                false => came.closed = true,
            }
        }
        changed.notify_waiters();
        if !is_whole {
            return;
        }
    }
}

fn note(
    came: &mut Came,
    head: &[u8; 9],
    payload: &[u8],
    acknowledge: &mpsc::UnboundedSender<Vec<u8>>,
) {
    let (kind, flags) = (head[3], head[4]);
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
    assert_eq!(flags & PADDED & (u8::from(kind <= HEADERS) * PADDED), 0);
    match (kind, flags & ACK) {
        (SETTINGS, ACK) => came.settings_acknowledged += 1,
        (PING, ACK) => came.pongs += 1,
        (SETTINGS, _) => drop(acknowledge.send(frame(SETTINGS, ACK, 0, &[]))),
        (PING, _) => drop(acknowledge.send(frame(PING, ACK, 0, payload))),
        (GOAWAY, _) => came.goaway = Some(number(4)),
        (RST_STREAM, _) => came.streams.entry(stream).or_default().reset = Some(number(0)),
        (HEADERS, end) => {
            let answer = came.streams.entry(stream).or_default();
            if answer.status.is_none() {
                answer.status = Some(status(payload));
            }
            answer.ended |= end == END_STREAM;
        }
        (DATA, end) => {
            let answer = came.streams.entry(stream).or_default();
            answer.body.extend(payload);
            answer.ended |= end == END_STREAM;
        }
        _ => {}
    }
}
