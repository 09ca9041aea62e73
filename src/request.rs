//! What a workload asks for: one reading of method, scheme, authority and path, used alike by
//! routing, policy, TLS and the `Host` header.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine;
use countersign_attestors::{PresentedToken, hexadecimal};
use http::header::{AUTHORIZATION, HOST, PROXY_AUTHORIZATION, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, Method};
use percent_encoding::percent_decode_str;
use zeroize::Zeroizing;

use crate::config::{Destination, PathPatterns, Scheme};
use crate::refusal::{Refusal, RefusalCode};

/// How often a path may be encoded over: more would cost time that grows with the square of its length.
const DECODING_ROUNDS: usize = 4;

/// How much of a path is recorded.
const RECORDED_PATH_BYTES: usize = 2048;

/// A request as the agent understands it.
#[derive(Debug, Clone)]
pub struct EgressRequest {
    /// The method.
    pub method: Method,
    /// The scheme of the destination.
    pub scheme: Scheme,
    /// The destination's host and port.
    pub target: Target,
    /// The path, in both of its readings. A copy: records outlive the request, and must not keep its
    /// head, which may hold a caller's own credential.
    pub path: RequestPath,
}

impl EgressRequest {
    /// Safe methods (RFC 9110 section 9.2.1), less TRACE, which is never forwarded.
    pub fn is_safe(&self) -> bool {
        matches!(self.method, Method::GET | Method::HEAD | Method::OPTIONS)
    }

    /// The request as it is kept once it was answered: [`RequestPath::shortened`].
    pub fn shortened(&self) -> Option<Self> {
        Some(Self {
            path: self.path.shortened()?,
            method: self.method.clone(),
            scheme: self.scheme,
            target: self.target.clone(),
        })
    }
}

/// A host and port, normalised: lower case, no trailing dot, IPv6 without brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    host: Arc<str>,
    port: u16,
}

impl Target {
    /// Reads an authority (RFC 3986 section 3.2); `default_port` stands in for an absent port.
    /// Refuses userinfo, empty and non-ASCII hosts, and IP addresses in any but their usual spelling.
    pub fn parse(authority: &str, default_port: Option<u16>) -> Result<Self, Refusal> {
        let malformed = |reason: &str| {
            Refusal::new(
                RefusalCode::MalformedRequest,
                format!("authority `{}` {reason}", printable(authority)),
            )
        };
        if authority.contains('@') {
            // Not quoted: it may be a password.
            return Err(Refusal::new(
                RefusalCode::MalformedRequest,
                "the authority contains user information",
            ));
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (address, after) = rest
                    .split_once(']')
                    .ok_or_else(|| malformed("has no closing bracket"))?;
                let address: std::net::Ipv6Addr = address
                    .parse()
                    .map_err(|_| malformed("is not an IPv6 address"))?;
                let port = match after.strip_prefix(':') {
                    Some(port) => Some(port),
                    None if after.is_empty() => None,
                    None => return Err(malformed("has text after the bracket")),
                };
                (Arc::from(address.to_string()), port)
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (
                    normalised_name(host).ok_or_else(|| malformed("is not a host name"))?,
                    Some(port),
                ),
                None => (
                    normalised_name(authority).ok_or_else(|| malformed("is not a host name"))?,
                    None,
                ),
            },
        };
        let port = match port {
            // `u16::from_str` accepts a leading `+`.
            Some(digits)
                if digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.is_empty() =>
            {
                digits
                    .parse()
                    .map_err(|_| malformed("has a port out of range"))?
            }
            Some(_) => return Err(malformed("has a port that is not a number")),
            None => default_port.ok_or_else(|| malformed("has no port"))?,
        };
        if port == 0 {
            return Err(malformed("has port 0"));
        }
        Ok(Self { host, port })
    }

    /// The host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host as an IP address, if it is one.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// The `Host` header or `:authority`: without the port where it is the scheme's.
    pub fn to_authority(&self, scheme: Scheme) -> Cow<'_, str> {
        match (self.port == scheme.default_port(), self.host.contains(':')) {
            (true, false) => Cow::Borrowed(&self.host),
            (true, true) => Cow::Owned(format!("[{}]", self.host)),
            (false, _) => Cow::Owned(self.to_string()),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(formatter, "[{}]:{}", self.host, self.port),
            false => write!(formatter, "{}:{}", self.host, self.port),
        }
    }
}

/// A DNS name in lower case without its trailing dot, or a dotted-quad IPv4 address. Other spellings
/// of addresses (octal, hexadecimal, fewer parts) are refused: resolvers read them differently.
fn normalised_name(host: &str) -> Option<Arc<str>> {
    const LONGEST_LABEL: usize = 63;
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.len() > 253 {
        return None;
    }
    let mut label = 0;
    let mut has_upper_case = false;
    for byte in host.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => label += 1,
            b'A'..=b'Z' => {
                has_upper_case = true;
                label += 1;
            }
            b'.' if (1..=LONGEST_LABEL).contains(&label) => label = 0,
            _ => return None,
        }
    }
    if !(1..=LONGEST_LABEL).contains(&label) {
        return None;
    }
    let (_, last_label) = host.split_at_checked(host.len() - label)?;
    // WHATWG URL, "ends in a number": such a host is an IPv4 address to some resolvers.
    let ends_in_number = last_label.bytes().all(|byte| byte.is_ascii_digit())
        || last_label
            .strip_prefix("0x")
            .or_else(|| last_label.strip_prefix("0X"))
            .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if ends_in_number && host.parse::<std::net::Ipv4Addr>().is_err() {
        return None;
    }
    Some(match has_upper_case {
        true => Arc::from(host.to_ascii_lowercase()),
        false => Arc::from(host),
    })
}

/// Input as it may be quoted in a refusal: at most 128 characters, controls replaced.
pub fn printable(input: &str) -> String {
    input
        .chars()
        .take(128)
        .map(|character| match character.is_control() {
            true => '\u{fffd}',
            false => character,
        })
        .collect()
}

/// As much of a path as is recorded: its first 2 KiB, less the bytes of a character that does not fit.
pub fn beginning(path: &str) -> &str {
    path.get(..path.floor_char_boundary(RECORDED_PATH_BYTES))
        .unwrap_or(path)
}

/// What a path is of which only the beginning is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholePath {
    /// Its length as sent.
    pub bytes: usize,
    /// Its SHA-256 as sent, hexadecimal.
    pub sha256: String,
}

/// A path in its two readings: segment by segment as sent, where an encoded slash is part of its
/// segment, and with everything decoded and dot segments and empty segments removed. A server may read
/// it either way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestPath {
    sent: String,
    /// Where it is not as sent.
    by_segment: Option<String>,
    fully_decoded: Option<String>,
    /// Where only the beginning is kept.
    whole: Option<Box<WholePath>>,
}

impl RequestPath {
    /// Reads the path of a request target (without query).
    pub fn parse(path: &str) -> Self {
        let (by_segment, fully_decoded) = readings(path);
        Self {
            sent: path.to_owned(),
            by_segment,
            fully_decoded,
            whole: None,
        }
    }

    /// The [`beginning`] of each reading, for records; `None` where the path is no longer than that.
    pub fn shortened(&self) -> Option<Self> {
        if self.sent.len() <= RECORDED_PATH_BYTES {
            return None;
        }
        let shorten = |reading: &String| beginning(reading).to_owned();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.sent.as_bytes());
        Some(Self {
            sent: shorten(&self.sent),
            by_segment: self.by_segment.as_ref().map(shorten),
            fully_decoded: self.fully_decoded.as_ref().map(shorten),
            whole: Some(Box::new(WholePath {
                bytes: self.sent.len(),
                sha256: hexadecimal(digest.as_ref()),
            })),
        })
    }

    /// What the path is where only the beginning is kept.
    pub fn whole(&self) -> Option<&WholePath> {
        self.whole.as_deref()
    }

    /// The path as the caller sent it.
    pub fn as_sent(&self) -> &str {
        &self.sent
    }

    /// The path as policies read it.
    pub fn as_str(&self) -> &str {
        self.by_segment.as_deref().unwrap_or(&self.sent)
    }

    /// Whether the two readings differ.
    pub fn is_ambiguous(&self) -> bool {
        self.fully_decoded.is_some()
    }

    /// Whether every reading satisfies `matches`.
    pub fn all_readings(&self, matches: impl Fn(&str) -> bool) -> bool {
        matches(self.as_str()) && self.fully_decoded.as_deref().is_none_or(&matches)
    }

    /// Whether a destination's `paths` cover every reading; where they cover everything, also one that is
    /// not known.
    pub fn is_covered_by(&self, patterns: &PathPatterns) -> bool {
        match patterns.cover_everything() {
            true => patterns.is_match(self.as_str()),
            false => self.all_readings(|reading| patterns.is_match(reading)),
        }
    }
}

/// Decodes once, but for the slashes; `None` where that is not UTF-8.
fn decode_segments(path: &str) -> Option<String> {
    let mut decoded = String::with_capacity(path.len());
    let parts = path.split("%2F").flat_map(|part| part.split("%2f"));
    for (index, part) in parts.enumerate() {
        if index > 0 {
            decoded.push_str("%2F");
        }
        decoded.push_str(&percent_decode_str(part).decode_utf8().ok()?);
    }
    Some(decoded)
}

/// The reading segment by segment where it is not the path as sent, and the fully decoded one where
/// it differs from that; one that nothing matches where no server's reading is known.
fn readings(path: &str) -> (Option<String>, Option<String>) {
    let mut before = 0;
    let is_plain = path.bytes().all(|byte| {
        let follows_slash = std::mem::replace(&mut before, byte) == b'/';
        match byte {
            b'/' => !follows_slash,
            b'-' | b'_' | b'~' | b':' | b'@' | b',' => true,
            _ => byte.is_ascii_alphanumeric(),
        }
    });
    if is_plain {
        return (None, None);
    }
    let unknown = Some(String::new());
    let Some(by_segment) = decode_segments(path) else {
        return (None, unknown);
    };
    let differing = |reading: &str| (reading != path).then(|| reading.to_owned());
    let Some(decoded) = decode_repeatedly(path) else {
        return (differing(&by_segment), unknown);
    };
    if is_resolved_differently(path, &decoded) {
        return (differing(&by_segment), unknown);
    }
    let fully_decoded = normalise(&decoded);
    let same = fully_decoded == by_segment;
    (differing(&by_segment), (!same).then_some(fully_decoded))
}

/// Whether servers differ in what a dot segment takes away, or in which segment is the last one: some see
/// more separators, or more dot segments, than were sent, or count empty segments.
fn is_resolved_differently(sent: &str, decoded: &str) -> bool {
    let is_separator = ['/', '\\'];
    let dot_segments = decoded
        .split(is_separator)
        .filter(|segment| is_dot_segment(segment))
        .count();
    let has_hidden_separators = decoded.matches(is_separator).count() != sent.matches('/').count();
    if dot_segments == 0 {
        return has_hidden_separators
            && decoded
                .split(is_separator)
                .any(|segment| segment.starts_with(';'));
    }
    let dot_segments_sent = sent
        .split('/')
        .filter(|segment| matches!(*segment, "." | ".."))
        .count();
    let inner = decoded.strip_prefix(is_separator).unwrap_or(decoded);
    let inner = inner.strip_suffix(is_separator).unwrap_or(inner);
    has_hidden_separators
        || dot_segments_sent != dot_segments
        || inner
            .split(is_separator)
            .any(|segment| without_parameters(segment).is_empty())
}

/// Decodes until nothing changes; `None` for what no server would decode as often, and where a round leaves
/// no UTF-8, of which servers make what they like.
fn decode_repeatedly(path: &str) -> Option<String> {
    let mut current = path.to_owned();
    for _ in 0..=DECODING_ROUNDS {
        match percent_decode_str(&current).decode_utf8() {
            Ok(decoded) if decoded != current => current = decoded.into_owned(),
            Ok(_) => return Some(current),
            Err(_) => return None,
        }
    }
    None
}

/// Removes dot segments (RFC 3986 section 5.2.4) and empty segments, also those with path parameters,
/// and reads `\` as `/`, as lenient servers do.
fn normalise(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    let ends_with_slash = path.ends_with(['/', '\\']);
    for segment in path.split(['/', '\\']) {
        match without_parameters(segment) {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            _ => segments.push(segment),
        }
    }
    let mut normalised = String::with_capacity(path.len());
    for segment in &segments {
        normalised.push('/');
        normalised.push_str(segment);
    }
    if normalised.is_empty() || ends_with_slash {
        normalised.push('/');
    }
    normalised
}

/// Servers that know path parameters (RFC 3986 section 3.3) resolve a segment by its name alone.
fn without_parameters(segment: &str) -> &str {
    segment.split_once(';').map_or(segment, |(name, _)| name)
}

fn is_dot_segment(segment: &str) -> bool {
    matches!(without_parameters(segment), "." | "..")
}

/// How a request reached the agent, which decides how its target is read.
#[derive(Debug, Clone, Copy)]
pub enum Reception<'a> {
    /// On the forward proxy itself: absolute-form, or CONNECT.
    Proxy,
    /// Inside a CONNECT tunnel to `target`; `scheme` is https where TLS was intercepted.
    Tunnel {
        /// The scheme spoken inside.
        scheme: Scheme,
        /// The tunnel's authority.
        target: &'a Target,
    },
    /// On a gateway for one destination.
    Gateway(&'a Destination),
}

impl EgressRequest {
    /// Reads a request head: what is asked, and the token that the head presents.
    pub fn parse(
        head: &Parts,
        reception: Reception<'_>,
    ) -> Result<(Self, Option<PresentedToken>), Refusal> {
        if head.method == Method::TRACE {
            return Err(Refusal::new(
                RefusalCode::MethodNotAllowed,
                "TRACE is not forwarded",
            ));
        }
        if head.method == Method::CONNECT && matches!(reception, Reception::Gateway(_)) {
            return Err(Refusal::new(
                RefusalCode::MethodNotAllowed,
                "a gateway opens no tunnels",
            ));
        }
        check_framing(&head.headers)?;
        let host = single_host(&head.headers)?;
        let (scheme, target) = match reception {
            Reception::Proxy => proxy_target(head, host)?,
            Reception::Tunnel { scheme, target } => {
                check_tunnel_authority(head, host, scheme, target)?;
                (scheme, target.clone())
            }
            Reception::Gateway(destination) => (destination.scheme, gateway_target(destination)?),
        };
        let path = match head.uri.path_and_query() {
            Some(path_and_query) if head.method != Method::CONNECT => path_and_query.path(),
            _ => "/",
        };
        let presented = presented_token(head, reception)?;
        let asked = Self {
            method: head.method.clone(),
            scheme,
            target,
            path: RequestPath::parse(path),
        };
        Ok((asked, presented))
    }
}

/// A body is framed in chunks, once, or not at all: other transfer codings (RFC 9112 section 7) would be
/// passed on without their name.
fn check_framing(headers: &HeaderMap) -> Result<(), Refusal> {
    if !headers.contains_key(TRANSFER_ENCODING) {
        return Ok(());
    }
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = codings
        .next()
        .is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
    match is_chunked && codings.next().is_none() {
        true => Ok(()),
        false => Err(Refusal::new(
            RefusalCode::MalformedRequest,
            "`Transfer-Encoding` is not `chunked` alone",
        )),
    }
}

/// The `Host` header, of which there is at most one (RFC 9112 section 3.2).
fn single_host(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refusal::new(
            RefusalCode::MalformedRequest,
            "the request has more than one `Host` header",
        ));
    }
    host.map(|host| {
        host.to_str().map_err(|_| {
            Refusal::new(
                RefusalCode::MalformedRequest,
                "the `Host` header is not ASCII text",
            )
        })
    })
    .transpose()
}

/// The target of an absolute-form or CONNECT request (RFC 9112 sections 3.2.2 and 3.2.3).
fn proxy_target(head: &Parts, host: Option<&str>) -> Result<(Scheme, Target), Refusal> {
    let authority = head.uri.authority().ok_or_else(|| {
        Refusal::new(
            RefusalCode::MalformedRequest,
            "a proxy takes absolute-form requests and CONNECT; the request has no authority",
        )
    })?;
    if head.method == Method::CONNECT {
        if head.uri.scheme().is_some() {
            return Err(Refusal::new(
                RefusalCode::MalformedRequest,
                "CONNECT names a URL, and takes a host and a port alone",
            ));
        }
        let target = Target::parse(authority.as_str(), None)?;
        return Ok((Scheme::Https, target));
    }
    let scheme = match head.uri.scheme_str() {
        Some("http") => Scheme::Http,
        Some("https") => Scheme::Https,
        _ => {
            return Err(Refusal::new(
                RefusalCode::MalformedRequest,
                "the request's scheme is neither `http` nor `https`",
            ));
        }
    };
    let target = Target::parse(authority.as_str(), Some(scheme.default_port()))?;
    if let Some(host) = host.filter(|host| *host != authority.as_str()) {
        same_authority(&Target::parse(host, Some(scheme.default_port()))?, &target)?;
    }
    Ok((scheme, target))
}

/// Inside a tunnel every authority that a request names is the tunnel's.
fn check_tunnel_authority(
    head: &Parts,
    host: Option<&str>,
    scheme: Scheme,
    target: &Target,
) -> Result<(), Refusal> {
    if head.method == Method::CONNECT {
        return Err(Refusal::new(
            RefusalCode::MalformedRequest,
            "a tunnel inside a tunnel is not opened",
        ));
    }
    if head
        .uri
        .scheme_str()
        .is_some_and(|named| named != scheme.as_str())
    {
        return Err(Refusal::new(
            RefusalCode::MalformedRequest,
            format!(
                "the request's scheme is not the tunnel's, `{}`",
                scheme.as_str()
            ),
        ));
    }
    let authority = head.uri.authority().map(Authority::as_str);
    if authority.is_none() && host.is_none() {
        return Err(Refusal::new(
            RefusalCode::MalformedRequest,
            "the request names no authority",
        ));
    }
    for named in [authority, host].into_iter().flatten() {
        same_authority(&Target::parse(named, Some(scheme.default_port()))?, target)?;
    }
    Ok(())
}

fn same_authority(named: &Target, target: &Target) -> Result<(), Refusal> {
    match named == target {
        true => Ok(()),
        false => Err(Refusal::new(
            RefusalCode::AuthorityMismatch,
            format!("the request names `{named}` and is for `{target}`"),
        )),
    }
}

fn gateway_target(destination: &Destination) -> Result<Target, Refusal> {
    let (Some(host), Some(port)) = (destination.hosts.first(), destination.ports.first()) else {
        return Err(Refusal::new(
            RefusalCode::DestinationNotConfigured,
            format!("destination `{}` has no host", destination.name),
        ));
    };
    Ok(Target {
        host: host.as_str().into(),
        port: *port,
    })
}

/// The token that a head presents: `Proxy-Authorization` with Bearer, or with Basic, whose password
/// it is; on a gateway, where `Proxy-Authorization` means nothing to clients, `Authorization` in the same forms.
fn presented_token(
    head: &Parts,
    reception: Reception<'_>,
) -> Result<Option<PresentedToken>, Refusal> {
    let name = match reception {
        Reception::Gateway(_) => AUTHORIZATION,
        Reception::Proxy | Reception::Tunnel { .. } => PROXY_AUTHORIZATION,
    };
    let mut values = head.headers.get_all(&name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Refusal::new(
            RefusalCode::MalformedRequest,
            format!("the request has more than one `{name}` header"),
        ));
    }
    let Some((scheme, credentials)) = value.to_str().ok().and_then(|text| text.split_once(' '))
    else {
        return Ok(None);
    };
    let credentials = credentials.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Some(PresentedToken::new(credentials.to_owned())));
    }
    if scheme.eq_ignore_ascii_case("basic") {
        // RFC 7617 section 2: user-id ":" password.
        let password = base64::engine::general_purpose::STANDARD
            .decode(credentials)
            .ok()
            .map(Zeroizing::new)
            .and_then(|pair| {
                let (_, password) = std::str::from_utf8(&pair).ok()?.split_once(':')?;
                Some(password.to_owned())
            });
        return Ok(password
            .filter(|password| !password.is_empty())
            .map(PresentedToken::new));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each server may be the lenient one: what a pattern covers, it covers in every reading.
    #[test]
    fn no_reading_of_a_covered_path_leaves_its_pattern() {
        let is_covered = |path: &str| {
            RequestPath::parse(path).all_readings(|reading| reading.starts_with("/v1/"))
        };
        for covered in [
            "/v1/orders",
            "/v1/orders/",
            "/v1//orders",
            "/v1/./orders",
            "/v1/a/../orders",
            "/v1/a%2Fb",
            "/v1/a%252fb",
            "/v1/a\\b",
            "/v1/caf%C3%A9",
            "/v1/orders;v=2",
            "/v1/.hidden",
            "/v1/...",
        ] {
            assert!(is_covered(covered), "{covered}");
        }
        for escaping in [
            "/v1/../admin",
            "/v1/%2e%2e/admin",
            "/v1/%252e%252e/admin",
            "/v1/..%2fadmin",
            "/v1/..;/admin",
            "/v1//../admin",
            "/v1/;x/../admin",
            "/v1/%3bx/../admin",
            "/v1%2fadmin",
            // One segment here, two there: which one do the dots take away?
            "/v1/a%2fb/../../admin",
            "/v1/a%252fb/../../admin",
            "/v1/a\\b/../../admin",
            "/v1/a%5cb/../../admin",
            "/v1/a%2fb/..%3b/../admin",
            // An empty segment here, none there.
            "/v1/..//v1/",
            "/v1/../;x/v1/",
            "/v1/%2E%2e//v1//%ef%bc%8e%253ba%2e",
            // Dots here, a name there.
            "/v1/../admin/..;/v1/",
            "/v1/../admin/%2e%2e/v1/",
            "/v1/%252e%252e/admin/%252e%252e/../v1/",
            // The second round leaves no UTF-8, and another slash.
            "/v1/%252f..%2f%25admin",
            // The collection or the empty name in it.
            "/v1/;\\",
            "/v1/;%2f",
        ] {
            assert!(!is_covered(escaping), "{escaping}");
            assert!(RequestPath::parse(escaping).is_ambiguous(), "{escaping}");
        }
    }

    #[test]
    fn an_encoded_slash_stays_in_its_segment() {
        let path = RequestPath::parse("/public/a%2fread");
        assert_eq!(path.as_str(), "/public/a%2Fread");
        assert!(!path.all_readings(|reading| reading == "/public/a/read"));
    }

    #[test]
    fn a_path_that_is_encoded_over_too_often_matches_nothing() {
        let path = |rounds: usize| RequestPath::parse(&format!("/%{}41", "25".repeat(rounds)));
        for rounds in 0..DECODING_ROUNDS {
            assert!(
                path(rounds).all_readings(|path| path.starts_with('/')),
                "{rounds}"
            );
        }
        for rounds in [DECODING_ROUNDS, 9, 32_000] {
            assert!(path(rounds).is_ambiguous(), "{rounds}");
            assert!(
                !path(rounds).all_readings(|path| path.starts_with('/')),
                "{rounds}"
            );
        }
    }

    /// With the square of its length a mebibyte would take minutes.
    #[test]
    fn the_time_to_read_a_path_grows_with_its_length() {
        let start = std::time::Instant::now();
        for piece in [
            "%2F", "%2f", "%", "/", "/.", "/..", "\\", ";", "%252F", "/a%2F;",
        ] {
            let path = RequestPath::parse(&format!("/{}", piece.repeat((1 << 20) / piece.len())));
            assert!(path.as_str().starts_with('/'), "{piece}");
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(30));
    }
}
