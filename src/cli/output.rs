//! The forms in which a verb answers.

/// The form of a verb's answer on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// The exit code of a wrong configuration or policy (`EX_CONFIG` of sysexits.h).
pub const EXIT_CONFIGURATION: u8 = 78;
