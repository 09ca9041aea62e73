//! A request's path: what `paths` are compared with covers every way in which a server may read it.

use countersign::request::RequestPath;
use http::uri::PathAndQuery;
use percent_encoding::percent_decode_str;

/// Behind it lies what was permitted.
const PERMITTED: &str = "/v1/";

pub fn run(input: &[u8]) {
    // What the HTTP parser does not take never comes so far.
    let Ok(target) = PathAndQuery::try_from(input) else {
        return;
    };
    let written = target.path();
    let path = RequestPath::parse(written);
    assert_eq!(path, RequestPath::parse(written));
    assert!(path.all_readings(|_| true) && !path.all_readings(|_| false));
    if !path.is_ambiguous() {
        let again = RequestPath::parse(path.as_str());
        assert_eq!(again.as_str(), path.as_str(), "one reading stays one");
    }
    if !path.all_readings(|reading| reading.starts_with(PERMITTED)) {
        return;
    }
    for reading in readings(written) {
        assert!(
            reading.starts_with(PERMITTED),
            "`{written}` is covered, and a server may read `{reading}`"
        );
    }
}

/// Every reading of the servers that are known to be lenient: decoded up to three times, before or after
/// dot segments are resolved, written or encoded ones, with `\` as `/`, without path parameters, with slashes merged.
fn readings(path: &str) -> Vec<String> {
    let mut decoded = vec![path.to_owned()];
    for round in 0..3 {
        let next = percent_decode_str(&decoded[round])
            .decode_utf8_lossy()
            .into_owned();
        decoded.push(next);
    }
    let mut readings = Vec::new();
    for text in decoded {
        for backslash in [false, true] {
            for parameters in [false, true] {
                for merged in [false, true] {
                    for encoded_dots in [false, true] {
                        let resolved = resolve(&text, backslash, parameters, merged, encoded_dots);
                        // One that resolves first and decodes afterwards.
                        readings.push(
                            percent_decode_str(&resolved)
                                .decode_utf8_lossy()
                                .into_owned(),
                        );
                        readings.push(with_unreserved_decoded(&resolved));
                    }
                }
            }
        }
    }
    readings
}

/// An encoded unreserved character is the character itself to every server (RFC 3986 section 6.2.2.2).
fn with_unreserved_decoded(path: &str) -> String {
    let mut decoded = String::new();
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, encoded) = rest.split_at(at);
        decoded.push_str(before);
        let digits = encoded
            .get(1..3)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match digits.map(char::from) {
            Some(character) if character.is_ascii_alphanumeric() || "-._~".contains(character) => {
                decoded.push(character);
                rest = &encoded[3..];
            }
            _ => {
                decoded.push('%');
                rest = &encoded[1..];
            }
        }
    }
    decoded + rest
}

/// RFC 3986 section 5.2.4, with a server's own ideas of what separates and what counts.
fn resolve(
    path: &str,
    backslash: bool,
    parameters: bool,
    merged: bool,
    encoded_dots: bool,
) -> String {
    let separated = match backslash {
        true => path.replace('\\', "/"),
        false => path.to_owned(),
    };
    let mut segments: Vec<&str> = Vec::new();
    for segment in separated.split('/').skip(1) {
        let name = match parameters {
            true => segment.split(';').next().unwrap_or_default(),
            false => segment,
        };
        let dots = match encoded_dots {
            true => percent_decode_str(name).decode_utf8_lossy(),
            false => name.into(),
        };
        match dots.as_ref() {
            "." => {}
            ".." => drop(segments.pop()),
            "" if merged => {}
            _ => segments.push(name),
        }
    }
    let ends_with_slash = separated.ends_with('/');
    let mut resolved: String = segments
        .iter()
        .map(|segment| format!("/{segment}"))
        .collect();
    if ends_with_slash && !resolved.ends_with('/') || resolved.is_empty() {
        resolved.push('/');
    }
    resolved
}
