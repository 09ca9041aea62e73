//! `countersign revoke`: refuses a workload, a credential or a token from the next request on.

use std::io::Write;
use std::process::ExitCode;

use http::Method;
use serde_json::json;

use super::admin::{AdminArguments, readable};
use crate::admin::RevocationRequest;
use crate::policy::{Revoked, Selector};

/// Refuses a workload, a credential or a token from the next request on.
///
/// Held for `--for`, else until it is lifted; survives a reload, not a restart.
#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct RevokeArguments {
    /// Every workload with this attribute: `GROUP.NAME=VALUE`.
    #[arg(long, group = "what", value_name = "SELECTOR")]
    workload: Option<Selector>,
    /// Every use of a credential.
    #[arg(long, group = "what", value_name = "NAME")]
    credential: Option<String>,
    /// One token, by the SHA-256 of its bytes; whom it was for gets no other of its credential.
    #[arg(long, group = "what", value_name = "HEX", value_parser = sha256)]
    token_sha256: Option<String>,
    /// Ends the revocation with this id.
    #[arg(long, group = "what", value_name = "ID", conflicts_with = "duration")]
    lift: Option<String>,
    /// Lists the revocations in force.
    #[arg(long, group = "what", conflicts_with = "duration")]
    list: bool,
    /// How long: `30s`, `10m`, `1h`, `2d`.
    #[arg(long = "for", value_name = "DURATION", value_parser = seconds)]
    duration: Option<u64>,
    #[command(flatten)]
    admin: AdminArguments,
}

/// Revokes or lifts, and writes what came of it to `out`. Exit code 64 where the agent knows none
/// such, 69 where none answers.
pub fn run(arguments: &RevokeArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    let admin = &arguments.admin;
    if let Some(id) = &arguments.lift {
        // Our ids need no encoding; another text must not become another path.
        let id: String =
            percent_encoding::utf8_percent_encode(id, percent_encoding::NON_ALPHANUMERIC)
                .to_string()
                .replace("%2D", "-");
        let path = format!("/v1/revocations/{id}");
        return admin.ask(Method::DELETE, &path, None, out, errors, readable);
    }
    if arguments.list {
        return admin.ask(
            Method::GET,
            "/v1/revocations",
            None,
            out,
            errors,
            |value| match value.as_array().is_some_and(Vec::is_empty) {
                true => "nothing is revoked\n".to_owned(),
                false => readable(&json!({"revocations": value})),
            },
        );
    }
    let what = match (
        &arguments.workload,
        &arguments.credential,
        &arguments.token_sha256,
    ) {
        (Some(selector), _, _) => Revoked::Workload(selector.clone()),
        (_, Some(credential), _) => Revoked::Credential(credential.clone()),
        (_, _, Some(sha256)) => Revoked::TokenSha256(sha256.clone()),
        // The group is required.
        (None, None, None) => return ExitCode::from(super::output::EXIT_USAGE),
    };
    let request = json!(RevocationRequest {
        what,
        for_seconds: arguments.duration,
    });
    admin.ask(
        Method::POST,
        "/v1/revocations",
        Some(&request),
        out,
        errors,
        readable,
    )
}

fn sha256(text: &str) -> Result<String, String> {
    let is_hash = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match is_hash {
        true => Ok(text.to_ascii_lowercase()),
        false => Err("a SHA-256 has 64 hexadecimal digits".to_owned()),
    }
}

/// Reads `90s`, `10m`, `1h`, `2d`.
pub(super) fn seconds(text: &str) -> Result<u64, String> {
    let problem = || format!("`{text}` is no duration: write `30s`, `10m`, `1h` or `2d`");
    let (number, unit) = text
        .char_indices()
        .find(|(_, character)| !character.is_ascii_digit())
        .map(|(index, _)| text.split_at(index))
        .ok_or_else(problem)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Err(problem()),
    };
    number
        .parse::<u64>()
        .ok()
        .filter(|number| *number > 0)
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(problem)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(seconds("90s").unwrap(), 90);
        assert_eq!(seconds("1h").unwrap(), 3600);
        assert_eq!(seconds("2d").unwrap(), 172_800);
        for wrong in [
            "",
            "1",
            "h",
            "0s",
            "1w",
            "1h30m",
            "-1s",
            "99999999999999999999d",
        ] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
