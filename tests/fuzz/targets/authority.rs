//! The authority of a CONNECT, a request target or a `Host`: one reading, and never another than a URL
//! library's.

use std::net::IpAddr;

use countersign::config::Scheme;
use countersign::request::Target;
use url::{Host, Url};

pub fn run(input: &[u8]) {
    let Ok(authority) = std::str::from_utf8(input) else {
        return;
    };
    let explicit = Target::parse(authority, None);
    for scheme in [Scheme::Http, Scheme::Https] {
        let Ok(target) = Target::parse(authority, Some(scheme.default_port())) else {
            assert!(explicit.is_err(), "a default port makes nothing worse");
            continue;
        };
        if let Ok(explicit) = &explicit {
            assert_eq!(
                *explicit, target,
                "a default port counts where none is written"
            );
        }
        holds(&target);
        assert_eq!(
            Target::parse(&target.to_string(), None).as_ref(),
            Ok(&target)
        );
        let written = target.to_authority(scheme);
        let read = Target::parse(&written, Some(scheme.default_port()));
        assert_eq!(read.as_ref(), Ok(&target), "`{written}`");
        reads_as_a_url_does(authority, scheme, &target);
    }
}

/// What a host can be: an address as the standard library writes it, or a name in lower case.
fn holds(target: &Target) {
    assert_ne!(target.port(), 0);
    let host = target.host();
    if let Some(address) = target.address() {
        assert_eq!(host, address.to_string());
        return;
    }
    assert!((1..=253).contains(&host.len()), "`{host}`");
    let is_of_names = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.');
    assert!(host.bytes().all(is_of_names), "`{host}`");
    // Resolvers read these as addresses: octal, hexadecimal, with fewer parts than four.
    let last = host.rsplit('.').next().unwrap_or_default();
    assert!(
        !last.bytes().all(|digit| digit.is_ascii_digit()) && !last.starts_with("0x")
            || last
                .strip_prefix("0x")
                .is_some_and(|digits| { digits.bytes().any(|digit| !digit.is_ascii_hexdigit()) }),
        "`{host}` is an address to somebody"
    );
}

/// The WHATWG reading of the same authority goes to the same place.
fn reads_as_a_url_does(authority: &str, scheme: Scheme, target: &Target) {
    let Ok(url) = Url::parse(&format!("{}://{authority}/", scheme.as_str())) else {
        // That reader looks into punycode, and refuses what is none.
        assert!(target.host().contains("xn--"), "only we read `{authority}`");
        return;
    };
    let host = match url.host() {
        Some(Host::Domain(name)) => name.strip_suffix('.').unwrap_or(name).to_owned(),
        Some(Host::Ipv4(address)) => IpAddr::V4(address).to_string(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).to_string(),
        None => String::new(),
    };
    assert_eq!(target.host(), host, "`{authority}`");
    assert_eq!(
        Some(target.port()),
        url.port_or_known_default(),
        "`{authority}`"
    );
}
