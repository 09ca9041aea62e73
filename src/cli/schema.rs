//! `countersign schema`: the JSON Schema of a configuration file.

use std::io::Write;
use std::process::ExitCode;

/// Prints the JSON Schema of a configuration file.
#[derive(Debug, Clone, clap::Args)]
pub struct SchemaArguments {}

/// Writes the schema to `out`.
pub fn run(_arguments: &SchemaArguments, out: &mut dyn Write) -> ExitCode {
    match writeln!(out, "{:#}", crate::config::schema()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
