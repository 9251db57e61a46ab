//! The `prequant` command.
#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "they panic where they can't write; cli/streams.rs doesn't"
)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
