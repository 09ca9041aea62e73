//! What names a request: our own [`RequestId`], and the caller's [`TraceContext`].

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

/// The response header that carries the request id.
pub const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("countersign-request-id");

/// A UUID version 7 (RFC 9562 section 5.7): sorts by time, names one request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(Uuid);

/// A UUID version 7 that names one attestation of one connection; request records refer to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Uuid);

impl RequestId {
    /// A new id at the wall-clock time `now`.
    pub fn new(now: SystemTime) -> Self {
        Self(unique(now))
    }

    /// Writes the 36 characters of the id into `buffer`.
    pub fn encode(self, buffer: &mut [u8; 36]) -> &str {
        self.0.hyphenated().encode_lower(buffer)
    }

    /// The id as a header's value.
    pub fn to_header_value(self) -> HeaderValue {
        let mut buffer = [0; 36];
        let text = self.encode(&mut buffer);
        // Hexadecimal digits and hyphens are always a valid header value.
        HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
    }
}

impl SessionId {
    /// A new id at the wall-clock time `now`.
    pub fn new(now: SystemTime) -> Self {
        Self(unique(now))
    }

    /// Writes the 36 characters of the id into `buffer`.
    pub fn encode(self, buffer: &mut [u8; 36]) -> &str {
        self.0.hyphenated().encode_lower(buffer)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(formatter)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for RequestId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map(Self)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(formatter)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The random part of this thread's ids: drawn once, then counted up (RFC 9562 section 6.2,
/// method 2), so that an id costs neither a system call nor a lock.
#[derive(Clone, Copy)]
struct Sequence {
    /// Distinguishes threads and processes: 48 random bits.
    thread: [u8; 6],
    /// Starts at random; 2^32 ids within one millisecond do not happen.
    counter: u32,
}

impl Sequence {
    fn seeded() -> Self {
        // The low ten bytes of the library's own version 7 UUID are random.
        let [.., a, b, c, d, e, f, g, h, i, j] = Uuid::now_v7().into_bytes();
        Self {
            thread: [a, b, c, d, e, f],
            counter: u32::from_be_bytes([g, h, i, j]),
        }
    }
}

fn unique(now: SystemTime) -> Uuid {
    thread_local! {
        static SEQUENCE: RefCell<Option<Sequence>> = const { RefCell::new(None) };
    }
    let milliseconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    });
    SEQUENCE.with_borrow_mut(|sequence| {
        let sequence = sequence.get_or_insert_with(Sequence::seeded);
        sequence.counter = sequence.counter.wrapping_add(1);
        let [a, b, c, d, e, f] = sequence.thread;
        let [g, h, i, j] = sequence.counter.to_be_bytes();
        uuid::Builder::from_unix_timestamp_millis(milliseconds, &[a, b, c, d, e, f, g, h, i, j])
            .into_uuid()
    })
}

/// The header that names a trace and the caller's span in it (W3C Trace Context, section 3.2).
pub static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A trace context (W3C Trace Context, section 3.2: `traceparent`). Where the agent traces, it reads the
/// caller's and sends its own span's; else it passes the header on as it came, being no participant of
/// the trace. In either case it records the trace id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: u128,
    parent_id: u64,
    flags: u8,
}

/// The flags that version 00 knows and a participant passes on: sampled, and random trace id.
const KNOWN_FLAGS: u8 = 0b11;

impl TraceContext {
    /// The context that the span `span_id`, the first of a trace, gives to what it causes.
    pub fn new(trace_id: TraceId, span_id: u64, is_sampled: bool) -> Self {
        Self {
            trace_id: trace_id.0,
            parent_id: span_id,
            flags: u8::from(is_sampled),
        }
    }

    /// The context that the span `span_id`, whose parent is in this one, gives to what it causes.
    pub fn child(&self, span_id: u64) -> Self {
        Self {
            parent_id: span_id,
            flags: self.flags & KNOWN_FLAGS,
            ..*self
        }
    }

    /// Reads `traceparent`. `None` when it is absent, repeated, or not valid; such a header means
    /// that there is no trace (section 3.2.2).
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(&TRACEPARENT).iter();
        let value = values.next()?;
        if values.next().is_some() {
            return None;
        }
        Self::parse(value.to_str().ok()?)
    }

    /// Reads the value of `traceparent`: `VERSION-TRACE-PARENT-FLAGS`, lower-case hexadecimal.
    pub fn parse(value: &str) -> Option<Self> {
        let mut fields = value.split('-');
        let version = u8::try_from(hexadecimal(fields.next()?, 2)?).ok()?;
        let trace_id = hexadecimal(fields.next()?, 32)?;
        let parent_id = u64::try_from(hexadecimal(fields.next()?, 16)?).ok()?;
        let flags = u8::try_from(hexadecimal(fields.next()?, 2)?).ok()?;
        let more = fields.next().is_some();
        // Version ff is forbidden; version 00 has four fields; a later one may have more.
        let version_is_valid = version != 0xff && !(version == 0 && more);
        (version_is_valid && trace_id != 0 && parent_id != 0).then_some(Self {
            trace_id,
            parent_id,
            flags,
        })
    }

    /// The trace id: 32 lower-case hexadecimal digits.
    pub fn trace_id(&self) -> TraceId {
        TraceId(self.trace_id)
    }

    /// The id of the span that whatever comes next is a child of.
    pub fn parent_id(&self) -> u64 {
        self.parent_id
    }

    /// Whether the caller records this trace (the `sampled` flag).
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }

    /// The value of `traceparent`, in version 00.
    pub fn to_header_value(&self) -> HeaderValue {
        let text = format!(
            "00-{:032x}-{:016x}-{:02x}",
            self.trace_id, self.parent_id, self.flags
        );
        // Hexadecimal digits and hyphens are always a valid header value.
        HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""))
    }
}

/// A W3C trace id; never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(u128);

impl From<u128> for TraceId {
    fn from(id: u128) -> Self {
        Self(id)
    }
}

impl From<TraceId> for u128 {
    fn from(id: TraceId) -> Self {
        id.0
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:032x}", self.0)
    }
}

fn hexadecimal(field: &str, digits: usize) -> Option<u128> {
    let is_valid = field.len() == digits
        && field
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_valid
        .then(|| u128::from_str_radix(field, 16).ok())
        .flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::time::Duration;

    #[test]
    fn ids_are_version_7_unique_across_threads_and_sort_by_time() {
        let now = SystemTime::now();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                std::thread::spawn(move || {
                    (0..5_000).map(|_| RequestId::new(now)).collect::<Vec<_>>()
                })
            })
            .collect();
        let ids: HashSet<RequestId> = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        assert_eq!(ids.len(), 40_000);
        assert!(ids.iter().all(|id| id.0.get_version_num() == 7));
        let later = RequestId::new(now + Duration::from_millis(1));
        assert!(ids.iter().all(|id| *id < later));
    }

    #[test]
    fn an_id_reads_back_and_is_a_header() {
        let id = RequestId::new(SystemTime::now());
        assert_eq!(id.to_string().parse::<RequestId>().unwrap(), id);
        assert_eq!(id.to_header_value(), id.to_string().as_str());
    }

    #[test]
    fn traceparent_is_read_as_the_recommendation_says() {
        let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = TraceContext::parse(valid).unwrap();
        assert_eq!(
            context.trace_id().to_string(),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!(context.parent_id(), 0x00f0_67aa_0ba9_02b7);
        assert!(context.is_sampled());
        assert_eq!(context.to_header_value(), valid);
        let child = TraceContext::parse("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-fe");
        assert_eq!(
            child.unwrap().child(7).to_header_value(),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000007-02"
        );
        assert!(TraceContext::parse(&valid.replace("00-4b", "cc-4b")).is_some());
        assert!(TraceContext::parse(&format!("cc{}-more", valid.get(2..).unwrap())).is_some());
        for invalid in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceContext::parse(invalid), None, "{invalid}");
        }
        let mut headers = HeaderMap::new();
        headers.append(
            "traceparent",
            HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        );
        assert!(TraceContext::from_headers(&headers).is_some());
        headers.append(
            "traceparent",
            HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        );
        assert_eq!(TraceContext::from_headers(&headers), None);
    }
}
