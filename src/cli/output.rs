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
/// The command line is wrong (`EX_USAGE` of sysexits).
pub const EXIT_USAGE: u8 = 64;
/// Something that is needed is away (`EX_UNAVAILABLE`).
pub const EXIT_UNAVAILABLE: u8 = 69;
/// Policy or attestation refused (`EX_NOPERM`).
pub const EXIT_DENIED: u8 = 77;
