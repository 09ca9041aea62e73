//! `countersign credentials list`: the tokens that a running agent holds, without the tokens.

use std::io::Write;
use std::process::ExitCode;

use http::Method;
use serde_json::Value;

use super::admin::{AdminArguments, on_one_line, table};

/// The tokens that a running agent holds.
#[derive(Debug, Clone, clap::Args)]
pub struct CredentialsArguments {
    #[command(subcommand)]
    verb: CredentialsVerb,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum CredentialsVerb {
    /// Lists identity, credential, expiry, last use and SHA-256 of each.
    List {
        #[command(flatten)]
        admin: AdminArguments,
    },
}

/// Writes the list to `out`. Exit code 69 where no agent answers.
pub fn run(
    arguments: &CredentialsArguments,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> ExitCode {
    let CredentialsVerb::List { admin } = &arguments.verb;
    admin.ask(Method::GET, "/v1/credentials", None, out, errors, list)
}

fn list(value: &Value) -> String {
    let rows: Vec<Vec<String>> = value
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| {
            [
                "identity",
                "credential",
                "expires_at",
                "last_used",
                "token_sha256",
                "failure",
            ]
            .into_iter()
            .map(|name| on_one_line(row.get(name).unwrap_or(&Value::Null)))
            .collect()
        })
        .collect();
    match rows.is_empty() {
        true => "no token was asked for yet\n".to_owned(),
        false => table(
            &[
                "IDENTITY",
                "CREDENTIAL",
                "EXPIRES",
                "LAST USED",
                "TOKEN SHA-256",
                "FAILURE",
            ],
            &rows,
        ),
    }
}
