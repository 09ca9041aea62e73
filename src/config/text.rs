//! The small languages inside configuration values: durations, sizes, addresses, hosts, templates.
//!
//! Each function takes the text as written and gives the value, or a [`Flaw`].

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderName;
use ipnet::IpNet;
use url::{Host, Url};

use super::{Bind, ExactUrl, Template, TemplatePart};

/// What is wrong with a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flaw {
    /// Stable code.
    pub(super) code: &'static str,
    /// The cause.
    pub(super) message: String,
    /// The next step.
    pub(super) next: String,
}

fn flaw<T>(
    code: &'static str,
    message: impl Into<String>,
    next: impl Into<String>,
) -> Result<T, Flaw> {
    Err(Flaw {
        code,
        message: message.into(),
        next: next.into(),
    })
}

/// `500ms`, `5s`, `10m`, `1h`, `7d`; longer than nothing.
pub(super) fn duration(text: &str) -> Result<Duration, Flaw> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let milliseconds_per_unit: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => 0,
    };
    let number = digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse::<u64>().ok())
        .flatten();
    match number.and_then(|number| number.checked_mul(milliseconds_per_unit)) {
        Some(milliseconds) if milliseconds > 0 => Ok(Duration::from_millis(milliseconds)),
        _ => flaw(
            "invalid_duration",
            format!("`{text}` is no duration"),
            "write a whole number above 0 and a unit: `500ms`, `5s`, `10m`, `1h` or `7d`",
        ),
    }
}

/// The size of a request head: from 8 KiB, which the HTTP/1 parser reads at least, to 1 MiB.
pub(super) fn head_size(text: &str) -> Result<u32, Flaw> {
    let bytes = size(text)?;
    match u32::try_from(bytes) {
        Ok(bytes) if (8 << 10..=1 << 20).contains(&bytes) => Ok(bytes),
        _ => flaw(
            "out_of_range",
            format!("`{text}` is out of range"),
            "write a size from `8KiB` to `1MiB`",
        ),
    }
}

/// `512B`, `64KiB`, `100MiB`, `1GiB`; in bytes, above 0.
pub(super) fn size(text: &str) -> Result<u64, Flaw> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let unit: u64 = match text.get(digits.len()..).unwrap_or_default() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => 0,
    };
    let number = digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse::<u64>().ok())
        .flatten();
    match number.and_then(|number| number.checked_mul(unit)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => flaw(
            "invalid_size",
            format!("`{text}` is no size"),
            "write a whole number above 0 and a unit: `512B`, `64KiB`, `100MiB` or `1GiB`",
        ),
    }
}

/// `127.0.0.1:7523`, `[::1]:7523` or `unix:/absolute/path`.
pub(super) fn bind(text: &str) -> Result<Bind, Flaw> {
    const NEXT: &str = "write `ADDRESS:PORT`, `[IPV6]:PORT` or `unix:/PATH`";
    if let Some(path) = text.strip_prefix("unix:") {
        return if !path.starts_with('/') {
            flaw(
                "invalid_address",
                format!("the socket path `{path}` is not absolute"),
                NEXT,
            )
        } else if path.len() > 107 {
            flaw(
                "invalid_address",
                format!(
                    "the socket path has {} bytes and the kernel takes 107",
                    path.len()
                ),
                "choose a shorter path",
            )
        } else {
            Ok(Bind::Unix(PathBuf::from(path)))
        };
    }
    match text.parse() {
        Ok(address) => Ok(Bind::Tcp(address)),
        Err(_) => flaw(
            "invalid_address",
            format!("`{text}` is no address to bind"),
            NEXT,
        ),
    }
}

/// `127.0.0.1:8443`: an address and a port other than 0.
pub(super) fn socket_address(text: &str) -> Result<SocketAddr, Flaw> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => flaw(
            "invalid_address",
            format!("`{text}` is no address and port"),
            "write `ADDRESS:PORT` or `[IPV6]:PORT`; a host name is not looked up here",
        ),
    }
}

/// `10.0.0.0/8`, or one address.
pub(super) fn network(text: &str) -> Result<IpNet, Flaw> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    match text.parse::<IpNet>() {
        Ok(network) if network.trunc() == network => Ok(network),
        Ok(network) => flaw(
            "invalid_network",
            format!("`{text}` has bits beyond its prefix"),
            format!("did you mean `{}`?", network.trunc()),
        ),
        Err(_) => flaw(
            "invalid_network",
            format!("`{text}` is no address range"),
            "write `ADDRESS/PREFIX`: `10.0.0.0/8`",
        ),
    }
}

/// A host name in lower case without a trailing dot, or an IP address without brackets.
pub(super) fn host(text: &str) -> Result<String, Flaw> {
    const CODE: &str = "invalid_host";
    if let Some((scheme, rest)) = text.split_once("://") {
        let rest = rest.split(['/', ':']).next().unwrap_or_default();
        return flaw(
            CODE,
            format!("the host `{text}` has a scheme"),
            format!("write `{rest}` here and `scheme: {scheme}` beside it"),
        );
    }
    if let Ok(address) = text
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
    {
        return Ok(address.to_string());
    }
    if text.contains('*') {
        return flaw(
            CODE,
            format!("the host `{text}` has a wildcard"),
            "write each host by its exact name",
        );
    }
    if let Some((name, port)) = text.rsplit_once(':')
        && port.bytes().all(|byte| byte.is_ascii_digit())
    {
        return flaw(
            CODE,
            format!("the host `{text}` has a port"),
            format!("write `{name}` here and `ports: [{port}]` beside it"),
        );
    }
    if text.contains('/') {
        return flaw(
            CODE,
            format!("the host `{text}` has a path"),
            "write the host alone here and the path under `paths`",
        );
    }
    let name = text.strip_suffix('.').unwrap_or(text);
    if !name.is_ascii() {
        return match Host::parse(name) {
            Ok(Host::Domain(ascii)) => flaw(
                CODE,
                format!("the host `{text}` is not ASCII"),
                format!("write its ASCII form `{ascii}`"),
            ),
            _ => flaw(
                CODE,
                format!("`{text}` is no host name"),
                "write its ASCII form",
            ),
        };
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let ends_in_number = name
        .rsplit('.')
        .next()
        .is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    if name.len() <= 253 && name.split('.').all(is_label) && !ends_in_number {
        Ok(name.to_ascii_lowercase())
    } else {
        flaw(
            CODE,
            format!("`{text}` is no host name"),
            "write a DNS name or an IP address",
        )
    }
}

/// Whether a URL holds a user or password: `https://USER@HOST`.
pub(super) fn has_user(text: &str) -> bool {
    text.split_once("://").is_some_and(|(_, rest)| {
        rest.split(['/', '?', '#'])
            .next()
            .is_some_and(|authority| authority.contains('@'))
    })
}

/// An `https` URL without query or fragment, as it stands.
pub(super) fn https_url(text: &str) -> Result<ExactUrl, Flaw> {
    const CODE: &str = "invalid_url";
    let Ok(parsed) = ExactUrl::parse(text) else {
        return flaw(
            CODE,
            format!("`{text}` is no URL"),
            "write `https://HOST[:PORT][/PATH]`",
        );
    };
    let url = parsed.url();
    if url.scheme() == "http" {
        return flaw(
            CODE,
            format!("`{text}` is not https: tokens and keys would be open to the network"),
            "write https; for a server on this machine give its certificate by `ca_file` and its address by `connect_to`",
        );
    }
    if url.scheme() != "https" || url.host_str().is_none() {
        return flaw(
            CODE,
            format!("`{text}` is no https URL"),
            "write `https://HOST[:PORT][/PATH]`",
        );
    }
    if url.query().is_some() || url.fragment().is_some() {
        return flaw(
            CODE,
            format!("`{text}` has a query or fragment"),
            "write `https://HOST[:PORT][/PATH]`",
        );
    }
    Ok(parsed)
}

/// An absolute URI without fragment (RFC 8707 section 2).
pub(super) fn resource(text: &str) -> Result<ExactUrl, Flaw> {
    match ExactUrl::parse(text) {
        Ok(url) if url.url().fragment().is_none() => Ok(url),
        _ => flaw(
            "invalid_url",
            format!("`{text}` is no resource indicator"),
            "write an absolute URI without fragment",
        ),
    }
}

/// `http://HOST:PORT`, nothing after it.
pub(super) fn proxy_url(text: &str) -> Result<Url, Flaw> {
    match Url::parse(text) {
        Ok(url)
            if url.scheme() == "http"
                && url.host_str().is_some_and(|host| !host.is_empty())
                && url.path() == "/"
                && url.query().is_none()
                && url.fragment().is_none() =>
        {
            Ok(url)
        }
        _ => flaw(
            "invalid_url",
            format!("`{text}` is no address of an HTTP proxy"),
            "write `http://HOST:PORT`, without user, path or query",
        ),
    }
}

/// An OTLP endpoint, as the URL to which traces are sent: `v1/traces` under it (OpenTelemetry protocol
/// exporter, "Endpoint URLs for OTLP/HTTP"). Spans say who asks for what, so that http is for collectors
/// on this machine.
pub(super) fn otlp_endpoint(text: &str) -> Result<Url, Flaw> {
    const CODE: &str = "invalid_url";
    const NEXT: &str =
        "write `https://HOST[:PORT]`, or `http://127.0.0.1:4318` for a collector on this machine";
    let Ok(mut url) = Url::parse(text) else {
        return flaw(CODE, format!("`{text}` is no URL"), NEXT);
    };
    let is_loopback = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if is_loopback => {}
        "http" => {
            return flaw(
                CODE,
                format!("`{text}` is not https: spans would be open to the network"),
                NEXT,
            );
        }
        _ => return flaw(CODE, format!("`{text}` is no http or https URL"), NEXT),
    }
    if url.query().is_some() || url.fragment().is_some() {
        return flaw(CODE, format!("`{text}` has a query or fragment"), NEXT);
    }
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(["v1", "traces"]);
    }
    Ok(url)
}

/// Text with `${GROUP.ATTRIBUTE}` holes.
pub(super) fn template(text: &str) -> Result<Template, Flaw> {
    const CODE: &str = "invalid_template";
    const NEXT: &str = "write a hole as `${GROUP.ATTRIBUTE}`: `${systemd.system_unit}`";
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        if !before.is_empty() {
            parts.push(TemplatePart::Literal(before.to_owned()));
        }
        let Some((hole, remaining)) = after.split_once('}') else {
            return flaw(CODE, format!("the hole `${{{after}` is not closed"), NEXT);
        };
        match hole.split_once('.') {
            Some((group, name)) if is_identifier(group) && is_identifier(name) => {
                parts.push(TemplatePart::Attribute {
                    group: group.to_owned(),
                    name: name.to_owned(),
                });
            }
            _ => return flaw(CODE, format!("`${{{hole}}}` names no attribute"), NEXT),
        }
        rest = remaining;
    }
    if !rest.is_empty() {
        parts.push(TemplatePart::Literal(rest.to_owned()));
    }
    if parts.is_empty() {
        return flaw(
            CODE,
            "the text is empty",
            "write a text, with or without holes",
        );
    }
    Ok(Template { parts })
}

/// A header that a credential may stand in: none that frames, routes or concerns one hop (RFC 9110
/// section 7.6.1), and none that the client speaks of itself.
pub(super) fn injection_header(text: &str) -> Result<HeaderName, Flaw> {
    const CODE: &str = "invalid_header";
    const REFUSED: [&str; 16] = [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "proxy-authenticate",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "content-type",
        "content-encoding",
        "host",
        "expect",
        "via",
        "forwarded",
    ];
    let Ok(name) = HeaderName::from_bytes(text.as_bytes()) else {
        return flaw(
            CODE,
            format!("`{text}` is no header name"),
            "write a header name: `authorization`",
        );
    };
    if REFUSED.contains(&name.as_str()) || name.as_str().starts_with("sec-websocket-") {
        return flaw(
            CODE,
            format!("the header `{name}` frames the message or concerns one hop"),
            "choose a header that only carries the credential: `authorization`",
        );
    }
    Ok(name)
}

/// A path pattern: begins with `/`; `*` stands within a segment, `**` is a whole segment.
pub(super) fn path_pattern(text: &str) -> Result<globset::Glob, Flaw> {
    const CODE: &str = "invalid_path_pattern";
    const NEXT: &str = "write `/v1/*` for one segment or `/v1/**` for all below";
    if !text.starts_with('/') {
        return flaw(
            CODE,
            format!("the pattern `{text}` does not begin with `/`"),
            NEXT,
        );
    }
    if let Some(character) = text
        .chars()
        .find(|character| "?#[]{}\\".contains(*character) || character.is_control())
    {
        return flaw(
            CODE,
            format!(
                "`{}` has no meaning in a path pattern",
                character.escape_default()
            ),
            NEXT,
        );
    }
    if text
        .split('/')
        .any(|segment| segment.contains("**") && segment != "**")
    {
        return flaw(
            CODE,
            format!("in `{text}` `**` is not a whole segment"),
            NEXT,
        );
    }
    if text
        .split('/')
        .any(|segment| segment == "." || segment == "..")
    {
        return flaw(
            CODE,
            format!("the pattern `{text}` has dot segments"),
            "write the path that they lead to",
        );
    }
    globset::GlobBuilder::new(text)
        .literal_separator(true)
        .backslash_escape(false)
        .build()
        .or_else(|_| flaw(CODE, format!("`{text}` is no path pattern"), NEXT))
}

/// One scope (RFC 6749 section 3.3).
pub(super) fn scope(text: &str) -> Result<String, Flaw> {
    let is_scope_character =
        |byte: u8| byte == 0x21 || (0x23..=0x5B).contains(&byte) || (0x5D..=0x7E).contains(&byte);
    if !text.is_empty() && text.bytes().all(is_scope_character) {
        Ok(text.to_owned())
    } else if text.contains(' ') {
        flaw(
            "invalid_scope",
            format!("`{text}` is more than one scope"),
            "write each as an item of its own",
        )
    } else {
        flaw(
            "invalid_scope",
            format!("`{}` is no scope", text.escape_debug()),
            "write printable ASCII without space, `\"` and `\\`",
        )
    }
}

/// A name of a listener, credential, destination, group or environment.
pub(super) fn name(text: &str) -> Result<String, Flaw> {
    let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=128).contains(&text.len())
        && text.bytes().all(is_name_byte)
        && text.starts_with(|character: char| character.is_ascii_alphanumeric())
    {
        Ok(text.to_owned())
    } else {
        flaw(
            "invalid_name",
            format!("`{}` is no name", text.escape_debug()),
            "write 1 to 128 letters, digits, `.`, `_` or `-`, the first a letter or digit",
        )
    }
}

/// An issuer's name: it becomes an attribute of `principal` in policies.
pub(super) fn issuer_name(text: &str) -> Result<String, Flaw> {
    const TAKEN: [&str; 20] = [
        "unix",
        "systemd",
        "container",
        "kubernetes",
        "spiffe",
        "oidc",
        "aws",
        "gcp",
        "azure",
        "environment",
        "evidence",
        "true",
        "false",
        "if",
        "then",
        "else",
        "in",
        "is",
        "like",
        "has",
    ];
    if TAKEN.contains(&text) {
        return flaw(
            "invalid_name",
            format!("`{text}` is taken: `principal.{text}` has a meaning of its own"),
            "choose another name",
        );
    }
    let is_name = text.starts_with(|character: char| character.is_ascii_lowercase())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if is_name && text.len() <= 64 {
        Ok(text.to_owned())
    } else {
        flaw(
            "invalid_name",
            format!(
                "`{}` is no attribute name, and policies say `principal.NAME`",
                text.escape_debug()
            ),
            "write lower-case letters, digits and `_`, the first a letter",
        )
    }
}

/// Letters, digits and `_`, the first no digit.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|character: char| character.is_ascii_alphabetic() || character == '_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Text that a header or form field can carry: not empty, no control characters.
pub(super) fn plain(text: &str) -> Result<String, Flaw> {
    if text.is_empty() || text.chars().any(char::is_control) {
        flaw(
            "invalid_text",
            format!(
                "`{}` is empty or holds control characters",
                text.escape_debug()
            ),
            "write a text on one line",
        )
    } else {
        Ok(text.to_owned())
    }
}

/// Permission bits in octal: `0660`.
pub(super) fn mode(text: &str) -> Result<u32, Flaw> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(mode),
        _ => flaw(
            "invalid_mode",
            format!("`{text}` are no permission bits"),
            "write three octal digits in quotes: `\"0660\"`",
        ),
    }
}

/// A level, or `tracing` directives.
pub(super) fn log_level(text: &str) -> Result<String, Flaw> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = LEVELS.contains(&text);
    let is_directives =
        text.contains('=') && tracing_subscriber::EnvFilter::builder().parse(text).is_ok();
    if is_level || is_directives {
        Ok(text.to_owned())
    } else {
        flaw(
            "invalid_log_level",
            format!("`{text}` is no log level"),
            crate::diagnostics::did_you_mean(text, LEVELS).unwrap_or_else(|| {
                "write `error`, `warn`, `info`, `debug`, `trace`, `off`, or directives: `info,countersign::policy=debug`".to_owned()
            }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("10m").unwrap(), Duration::from_secs(600));
        assert_eq!(duration("7d").unwrap(), Duration::from_secs(604_800));
        for wrong in [
            "",
            "5",
            "0s",
            "-1s",
            "1.5s",
            "5 s",
            "5S",
            "s",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(size("64KiB").unwrap(), 65_536);
        assert_eq!(size("100MiB").unwrap(), 104_857_600);
        for wrong in ["", "64", "64KB", "0B", "-1B", "1.5GiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn hosts_are_normalised() {
        assert_eq!(host("Orders.Example.COM.").unwrap(), "orders.example.com");
        assert_eq!(host("[::1]").unwrap(), "::1");
        assert_eq!(host("127.0.0.1").unwrap(), "127.0.0.1");
        assert_eq!(
            host("xn--mnchen-3ya.example").unwrap(),
            "xn--mnchen-3ya.example"
        );
        for wrong in [
            "",
            ".",
            "a..b",
            "a b",
            "-a.example",
            "a:b",
            "user@host",
            "1.2.3",
            "0x7f.1",
            "a.example\n",
        ] {
            assert!(host(wrong).is_err(), "{wrong}");
        }
        assert!(
            host("münchen.example")
                .unwrap_err()
                .next
                .contains("xn--mnchen-3ya.example")
        );
    }

    #[test]
    fn templates_have_literals_and_holes() {
        assert_eq!(
            template("svc-${systemd.system_unit}").unwrap().parts,
            [
                TemplatePart::Literal("svc-".to_owned()),
                TemplatePart::Attribute {
                    group: "systemd".to_owned(),
                    name: "system_unit".to_owned()
                },
            ]
        );
        for wrong in ["", "${", "${unix}", "${unix.}", "${a.b.c}", "${ unix.uid }"] {
            assert!(template(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_star_stays_in_its_segment() {
        let pattern = path_pattern("/v1/*/items").unwrap().compile_matcher();
        assert!(pattern.is_match("/v1/7/items"));
        assert!(!pattern.is_match("/v1/7/8/items"));
        let all = path_pattern("/v1/**").unwrap().compile_matcher();
        assert!(all.is_match("/v1/"));
        assert!(all.is_match("/v1/7/8"));
        assert!(!all.is_match("/v10"));
        assert!(path_pattern("/**").unwrap().compile_matcher().is_match("/"));
    }

    #[test]
    fn an_issuer_keeps_its_text() {
        assert_eq!(
            https_url("https://ci.example.com").unwrap().as_str(),
            "https://ci.example.com"
        );
        assert_eq!(
            https_url("https://ci.example.com/").unwrap().as_str(),
            "https://ci.example.com/"
        );
    }
}
