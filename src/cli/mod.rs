//! The command line: one file for each verb.

pub mod admin;
pub mod audit;
pub mod ca;
pub mod completions;
pub mod credentials;
pub mod dev;
pub mod doctor;
pub mod exec;
pub mod failure;
pub mod keys;
pub mod man;
pub mod output;
pub mod own_agent;
pub mod policy;
pub mod presented;
pub mod revoke;
pub mod run;
pub mod schema;
pub mod status;
pub mod token;
pub mod validate;
pub mod wait;
pub mod whoami;
pub mod workload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::EXIT_USAGE;

/// A per-node agent that attests local workloads, decides by policy, and injects short-lived tokens
/// into their requests.
#[derive(Debug, Parser)]
#[command(name = "countersign", version, arg_required_else_help = true)]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Runs the agent until a signal.
    Run(run::RunArguments),
    /// Runs the agent with an embedded authorization server and API, to try it and to test against it.
    Dev(dev::DevArguments),
    /// Runs a command whose clients go through the agent.
    Exec(exec::ExecArguments),
    /// Prints an access token, where policy permits `issue`.
    Token(token::TokenArguments),
    /// Shows how the agent sees the caller, and by which evidence.
    Whoami(whoami::WhoamiArguments),
    /// Looks for what commonly breaks, and says what to do about it.
    Doctor(doctor::DoctorArguments),
    /// Blocks until an agent is ready.
    Wait(wait::WaitArguments),
    /// Writes the certificates that clients of the proxy load to standard output.
    Ca(ca::CaArguments),
    /// Reads a configuration and its policies and says everything that is wrong with them.
    Validate(validate::ValidateArguments),
    /// Prints the JSON Schema of the configuration.
    Schema(schema::SchemaArguments),
    /// Checks, tests and explains policies.
    Policy(policy::PolicyArguments),
    /// Shows the state of every part of a running agent.
    Status(status::StatusArguments),
    /// The tokens that a running agent holds.
    Credentials(credentials::CredentialsArguments),
    /// Refuses a workload, a credential or a token from the next request on.
    Revoke(revoke::RevokeArguments),
    /// Keys with which the agent signs its assertions.
    Keys(keys::KeysArguments),
    /// Verifies and shows audit files.
    Audit(audit::AuditArguments),
    /// Writes what a shell needs to complete verbs and options to standard output.
    Completions(completions::CompletionsArguments),
    /// Writes the manual page, in roff, to standard output.
    Man(man::ManArguments),
}

/// Runs the verb that the process's arguments name.
pub fn main() -> ExitCode {
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            let _ = error.print();
            return match error.use_stderr() {
                true => ExitCode::from(EXIT_USAGE),
                false => ExitCode::SUCCESS,
            };
        }
    };
    let (mut out, mut errors) = (std::io::stdout(), std::io::stderr());
    match command.verb {
        Verb::Run(arguments) => run::run(&arguments),
        Verb::Dev(arguments) => dev::run(&arguments),
        Verb::Exec(arguments) => exec::run(&arguments),
        Verb::Token(arguments) => token::run(&arguments, &mut out),
        Verb::Whoami(arguments) => whoami::run(&arguments, &mut out),
        Verb::Doctor(arguments) => doctor::run(&arguments, &mut out),
        Verb::Wait(arguments) => wait::run(&arguments, &mut out),
        Verb::Ca(arguments) => ca::run(&arguments, &mut out),
        Verb::Validate(arguments) => validate::run(&arguments, &mut out, &mut errors),
        Verb::Schema(arguments) => schema::run(&arguments, &mut out),
        Verb::Policy(arguments) => policy::run(&arguments, &mut out, &mut errors),
        Verb::Status(arguments) => status::run(&arguments, &mut out, &mut errors),
        Verb::Credentials(arguments) => credentials::run(&arguments, &mut out, &mut errors),
        Verb::Revoke(arguments) => revoke::run(&arguments, &mut out, &mut errors),
        Verb::Keys(arguments) => keys::run(&arguments, &mut out, &mut errors),
        Verb::Audit(arguments) => audit::run(&arguments, &mut out, &mut errors),
        Verb::Completions(arguments) => completions::run(&arguments, &mut out),
        Verb::Man(arguments) => man::run(&arguments, &mut out),
    }
}
