//! `countersign schema`: the JSON Schema of a configuration file.

use std::io::Write;
use std::process::ExitCode;

use super::output::OutputFormat;

/// Prints the JSON Schema of a configuration file.
#[derive(Debug, Clone, clap::Args)]
pub struct SchemaArguments {
    /// The form of the answer, which is JSON in either.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Writes the schema to `out`.
pub fn run(_arguments: &SchemaArguments, out: &mut dyn Write) -> ExitCode {
    match writeln!(out, "{:#}", crate::config::schema()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
