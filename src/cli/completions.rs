//! `countersign completions`: what a shell needs to complete verbs and options.

use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

/// Writes what a shell needs to complete verbs and options to standard output.
#[derive(Debug, Clone, clap::Args)]
pub struct CompletionsArguments {
    /// The shell.
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Writes the script to `out`.
pub fn run(arguments: &CompletionsArguments, out: &mut dyn Write) -> ExitCode {
    let mut command = super::Command::command();
    let name = command.get_name().to_owned();
    // Into memory first: the generator panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    match out.write_all(&script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
