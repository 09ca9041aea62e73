//! Why a verb did not do what it was asked: a message and an exit code.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use super::output::{EXIT_CONFIGURATION, EXIT_DENIED, EXIT_UNAVAILABLE, EXIT_USAGE};
use crate::client::{Answer, ClientError};
use crate::diagnostics::Diagnostics;

/// Why a verb failed.
#[derive(Debug)]
pub enum Failure {
    /// A configuration is wrong.
    Diagnostics(Diagnostics),
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
    pub fn refused(answer: &Answer) -> Self {
        let code = match answer.status.as_u16() {
            401 | 403 => EXIT_DENIED,
            400 | 404 => EXIT_USAGE,
            _ => EXIT_UNAVAILABLE,
        };
        Self::Message(code, answer.problem())
    }

    /// Prints it, and is the process's exit code.
    pub fn report(self) -> ExitCode {
        let mut errors = io::stderr();
        let (code, written) = match self {
            Self::Diagnostics(diagnostics) => (
                EXIT_CONFIGURATION,
                write!(errors, "{}", diagnostics.render(errors.is_terminal())),
            ),
            Self::Message(code, message) => (code, writeln!(errors, "countersign: {message}")),
        };
        // Where standard error is closed the exit code has to do.
        let _ = written;
        ExitCode::from(code)
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

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::unavailable(format!("{error}\n  next: {}", error.next()))
    }
}
