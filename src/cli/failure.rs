//! Why a verb did not do what it was asked: a message and an exit code.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

use super::output::{EXIT_CONFIGURATION, EXIT_DENIED, EXIT_UNAVAILABLE, EXIT_USAGE, OutputFormat};
use crate::client::{Answer, ClientError};
use crate::diagnostics::Diagnostics;

/// Why a verb failed.
#[derive(Debug)]
pub enum Failure {
    /// A configuration is wrong, or cannot be had for now.
    Diagnostics(Diagnostics),
    /// An agent answered with a problem: the exit code, and the answer.
    Refused(u8, Box<Answer>),
    /// Something else, with its exit code.
    Message(u8, String),
}

impl Failure {
    /// The configuration cannot be used here.
    pub fn configuration(message: impl Into<String>) -> Self {
        Self::Message(EXIT_CONFIGURATION, message.into())
    }

    /// Something that is needed is away.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::Message(EXIT_UNAVAILABLE, message.into())
    }

    /// The command line is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Message(EXIT_USAGE, message.into())
    }

    /// What an agent's answer other than success means.
    pub fn refused(answer: Answer) -> Self {
        Self::Refused(exit_code_of(&answer), Box::new(answer))
    }

    /// Prints it in the form that was asked for, JSON to `out`; is the process's exit code.
    pub fn report(self, output: OutputFormat, out: &mut dyn Write) -> ExitCode {
        let mut errors = io::stderr();
        let written = match (output, &self) {
            (OutputFormat::Json, _) => writeln!(out, "{}", self.to_json()),
            (OutputFormat::Text, Self::Diagnostics(diagnostics)) => {
                write!(errors, "{}", diagnostics.render(errors.is_terminal()))
            }
            (OutputFormat::Text, Self::Refused(_, answer)) => {
                writeln!(errors, "countersign: {}", answer.problem())
            }
            (OutputFormat::Text, Self::Message(_, message)) => {
                writeln!(errors, "countersign: {message}")
            }
        };
        // Where it cannot be written the exit code has to do.
        let _ = written;
        ExitCode::from(self.exit_code())
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Diagnostics(diagnostics) if diagnostics.is_transient() => EXIT_UNAVAILABLE,
            Self::Diagnostics(_) => EXIT_CONFIGURATION,
            Self::Refused(code, _) | Self::Message(code, _) => *code,
        }
    }

    /// The agent's own problem, or `detail` with `next`; `diagnostics` of a configuration.
    fn to_json(&self) -> Value {
        match self {
            Self::Diagnostics(diagnostics) => json!({
                "detail": match diagnostics.is_transient() {
                    true => "what the configuration asks for cannot be had now",
                    false => "the configuration is not valid",
                },
                "diagnostics": diagnostics.to_json(),
            }),
            Self::Refused(_, answer) => answer.json(),
            Self::Message(_, message) => match message.split_once(NEXT) {
                Some((detail, next)) => json!({"detail": detail, "next": next}),
                None => json!({"detail": message}),
            },
        }
    }
}

/// What stands between a message and what to do about it.
const NEXT: &str = "\n  next: ";

/// The exit code that an agent's answer other than success has.
pub fn exit_code_of(answer: &Answer) -> u8 {
    match answer.status.as_u16() {
        401 | 403 => EXIT_DENIED,
        400 | 404 => EXIT_USAGE,
        _ => EXIT_UNAVAILABLE,
    }
}

impl From<Diagnostics> for Failure {
    fn from(diagnostics: Diagnostics) -> Self {
        Self::Diagnostics(diagnostics)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::unavailable(error.to_string())
    }
}

/// Of the workload API.
impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let next = error.next_for_workload_api();
        Self::unavailable(format!("{error}{NEXT}{next}"))
    }
}
