//! The fault table of `docs/errors.md`, read by the tests that prove it.

use std::time::{Duration, SystemTime};

use super::faulty_authorization_server::Fault;

/// A row of the table.
#[derive(Debug)]
pub struct FaultRow {
    /// The first column.
    pub name: String,
    /// What the faulty server does.
    pub fault: Fault,
    /// The status while a token is cached.
    pub cached_status: u16,
    /// The status while none is.
    pub status: u16,
    /// The code while none is.
    pub code: String,
    /// The cause label while none is.
    pub cause: String,
    /// How many requests reach the token endpoint for one caller.
    pub token_requests: usize,
}

/// Every row, in order.
pub fn fault_table() -> Vec<FaultRow> {
    let document = include_str!("../../docs/errors.md");
    let (_, after) = document.split_once("<!-- faults:begin -->").unwrap();
    let (table, _) = after.split_once("<!-- faults:end -->").unwrap();
    table
        .trim()
        .lines()
        .skip(2)
        .map(|line| {
            let cells: Vec<&str> = line
                .trim_matches('|')
                .split('|')
                .map(|cell| cell.trim())
                .collect();
            let [name, cached, status, code, cause, token_requests] = cells.as_slice() else {
                panic!("a row of the fault table has {} cells", cells.len());
            };
            FaultRow {
                name: (*name).to_owned(),
                fault: fault_named(name),
                cached_status: cached.parse().unwrap(),
                status: status.parse().unwrap(),
                code: code.trim_matches('`').to_owned(),
                cause: cause.trim_matches('`').to_owned(),
                token_requests: token_requests.parse().unwrap(),
            }
        })
        .collect()
}

fn fault_named(name: &str) -> Fault {
    let in_a_minute = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
    match name {
        "connection refused" => Fault::Refused,
        "connection reset" => Fault::Reset,
        "status 500" => Fault::Status(500, None),
        "status 429, `Retry-After` in seconds" => Fault::Status(429, Some("60".to_owned())),
        "status 429, `Retry-After` as a date" => Fault::Status(429, Some(in_a_minute)),
        "empty 200" => Fault::Empty,
        "HTML" => Fault::Html,
        "truncated answer" => Fault::Truncated,
        "endless answer" => Fault::Endless,
        "CR LF in the token" => Fault::LineEndInToken,
        "unknown `token_type`" => Fault::UnknownTokenType,
        "redirect" => Fault::Redirect,
        "hang" => Fault::Hang,
        "drip" => Fault::Drip,
        "`invalid_client`" => Fault::Error(401, "invalid_client"),
        "`invalid_grant`" => Fault::Error(400, "invalid_grant"),
        "`invalid_scope`" => Fault::Error(400, "invalid_scope"),
        unknown => panic!("the fault table names an unknown fault `{unknown}`"),
    }
}
