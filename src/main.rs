//! Arguments, then configuration, then [`countersign::app`], then an exit code.

use std::process::ExitCode;

/// A request allocates some dozens of times, and its buffers outlive short calls.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    countersign::tls::install_cryptography_provider();
    countersign::cli::main()
}
