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
mod limits;
mod merge;
mod output;
mod progress;
mod quantize;
mod streams;
mod summary;
mod trace;
mod verify;
mod words;

use std::env;
use std::ffi::OsString;
use std::panic;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use prequant::Error;

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
    Merge(merge::Arguments),
    Verify(verify::Arguments),
    Inspect(inspect::Arguments),
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 a check found a difference; 2 wrong usage; 3 bad input; 4 I/O or device failure;
130 and 143 interrupted (SIGINT, SIGTERM).";

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let json = asks_for_json(env::args_os());
    let end = move || output::end(&Error::Interrupted, json);
    if let Err(source) = limits::listen(json).and_then(|()| interrupt::listen(end)) {
        let error = Error::Io { path: "signals".into(), action: "listen for them", source };
        return output::finish(Err(error), json);
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(message) => return output::usage(&message, json),
    };
    // Its words are told by then, and the exit code is one of the table's.
    let ran = panic::catch_unwind(|| match &arguments.command {
        Command::Convert(arguments) => convert::run(arguments),
        Command::Dequantize(arguments) => dequantize::run(arguments),
        Command::Merge(arguments) => merge::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
    });
    ran.unwrap_or_else(|_| output::finish(Err(Error::Internal { what: "a thread panicked".to_owned() }), json))
}

/// Whether the arguments ask for JSON, whatever else is wrong with them.
fn asks_for_json(arguments: impl Iterator<Item = OsString>) -> bool {
    let options = arguments.take_while(|argument| argument != "--");
    options.skip(1).any(|argument| argument == "--json" || argument.as_encoded_bytes().starts_with(b"--json="))
}
