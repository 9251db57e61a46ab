//! The command line: arguments in, words and exit codes out.

mod convert;
mod dequantize;
mod device;
mod dry_run;
mod escape;
mod hints;
mod inspect;
mod interrupt;
mod left_out;
mod output;
mod progress;
mod summary;
mod trace;
mod verify;
mod words;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Turn a bf16 Hugging Face checkpoint into a 4-bit one: once, offline, in constant memory.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Convert(convert::Arguments),
    Dequantize(dequantize::Arguments),
    Verify(verify::Arguments),
    Inspect(inspect::Arguments),
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 a check found a difference; 2 wrong usage; 3 bad input; 4 I/O or device failure;
130 and 143 interrupted (SIGINT, SIGTERM).";

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    if let Err(error) = interrupt::listen() {
        eprintln!("error: can't listen for signals: {error}");
        return ExitCode::from(4);
    }
    match command {
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Dequantize(arguments) => dequantize::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}
