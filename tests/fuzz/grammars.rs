//! What mutations seldom come upon: authorities and paths put together of the parts over which readers
//! differ. What must hold of them is what their fuzz targets say.

use proptest::prelude::*;

use crate::targets;

/// Parts of hosts and ports, in every base and notation.
const AUTHORITY: &[&str] = &[
    "a",
    "A",
    "example",
    "com",
    "localhost",
    "xn--",
    "xn--nxasmq6b",
    "127",
    "0177",
    "0x7f",
    "0X7F",
    "0",
    "1",
    "256",
    "2130706433",
    "4294967296",
    "169.254",
    ".",
    ".",
    ".",
    "..",
    ":",
    ":80",
    ":443",
    ":0",
    ":65536",
    ":+80",
    "[",
    "]",
    "[::1]",
    "[::ffff:7f00:1]",
    "[fe80::1%25eth0]",
    "@",
    "user@",
    "%",
    "%2e",
    "%00",
    "-",
    "_",
    "/",
    "\\",
    "?",
    "#",
    " ",
    "\t",
    "\u{3002}",
    "\u{ff10}",
    "\u{df}",
    "\0",
];

/// Parts of paths that some servers take for separators, dots or nothing.
const PATH: &[&str] = &[
    "/",
    "/",
    "/",
    "v1",
    "v1/",
    "v1/",
    "admin",
    "a",
    ".",
    "..",
    "..",
    "../",
    "...",
    "%2e",
    "%2E%2e",
    "%252e",
    "%25252e",
    "%2f",
    "%2F",
    "%252f",
    "\\",
    "%5c",
    "%255c",
    ";",
    ";x",
    "%3b",
    "%253b",
    ";x=../..",
    "//",
    "%00",
    "%20",
    "%c0%ae",
    "%ef%bc%8e",
    "%",
    "%2",
    "%zz",
    ":",
    "@",
    ",",
    "+",
    "~",
    "_",
    "-",
    "%25",
];

fn joined(parts: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(parts), 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50_000))]

    #[test]
    fn an_authority_of_any_parts_is_read_one_way_or_refused(authority in joined(AUTHORITY)) {
        (targets::named("authority").run)(authority.as_bytes());
    }

    #[test]
    fn a_path_of_any_parts_is_covered_in_every_reading_or_in_none(path in joined(PATH)) {
        (targets::named("request_path").run)(format!("/v1/{path}").as_bytes());
    }
}
