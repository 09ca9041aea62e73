//! `countersign status`: the state of every part of a running agent.

use std::io::Write;
use std::process::ExitCode;

use http::Method;

use super::admin::{AdminArguments, readable};

/// Shows the state of every part of a running agent.
#[derive(Debug, Clone, clap::Args)]
pub struct StatusArguments {
    #[command(flatten)]
    admin: AdminArguments,
}

/// Writes the status to `out`. Exit code 69 where no agent answers.
pub fn run(arguments: &StatusArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    arguments
        .admin
        .ask(Method::GET, "/v1/status", None, out, errors, readable)
}
