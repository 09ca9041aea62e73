//! Arguments, then configuration, then [`countersign::app`], then an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    countersign::tls::install_cryptography_provider();
    countersign::cli::main()
}
