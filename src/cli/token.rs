//! `countersign token`: an access token for a script, where policy permits `issue`.

use std::io::Write;
use std::process::ExitCode;

use http::Method;
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::OutputFormat;
use super::workload::{WorkloadArguments, ask_once};

/// Prints an access token, where policy permits `issue`.
#[derive(Debug, Clone, clap::Args)]
pub struct TokenArguments {
    /// The credential whose token is asked for.
    #[arg(long, value_name = "NAME")]
    pub credential: String,
    /// A scope, of those of the credential; may be repeated [default: all of them].
    #[arg(long = "scope", value_name = "SCOPE")]
    pub scopes: Option<Vec<String>>,
    #[command(flatten)]
    workload: WorkloadArguments,
    /// The token alone, or the whole answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Writes the token to `out`. Exit code 77 where policy or attestation refuses, 69 where the agent or
/// the authorization server is away.
pub fn run(arguments: &TokenArguments, out: &mut dyn Write) -> ExitCode {
    let body = json!({
        "credential": arguments.credential,
        "scopes": arguments.scopes,
    });
    let answer = match ask_once(&arguments.workload, Method::POST, "/v1/token", Some(&body)) {
        Ok(answer) => answer,
        Err(failure) => return failure.report(arguments.output, out),
    };
    let written = match arguments.output {
        OutputFormat::Json => writeln!(out, "{answer}"),
        OutputFormat::Text => match answer.get("access_token").and_then(Value::as_str) {
            Some(token) => writeln!(out, "{token}"),
            None => {
                return Failure::unavailable("the agent answers without a token")
                    .report(arguments.output, out);
            }
        },
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
