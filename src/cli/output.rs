//! How a command ends: what it prints, and its exit code.

use std::process::{self, ExitCode};
use std::time::{Duration, Instant};
use std::{io, thread};

use prequant::{Error, ErrorKind};
use serde_json::{Value, json};

use super::{escape, hints, interrupt, streams};

/// The exit code for arguments that the command doesn't take.
const WRONG_USAGE: u8 = 2;

/// The exit code for an I/O or device failure.
pub const IO_FAILURE: u8 = 4;

/// How long the answer of a process that is being ended may take.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// To whom a report is addressed.
#[derive(Clone, Copy)]
pub enum Audience {
    People,
    Machines,
    /// `--quiet`.
    Nobody,
}

/// What a command that came to its end has to say.
pub struct Outcome {
    /// For standard output.
    pub output: String,
    /// What kept it from all that was asked.
    pub error: Option<Error>,
    /// The exit code if there was no error.
    pub code: u8,
}

/// Prints what a command has to say (to standard output, errors to standard error), and gives its exit code.
pub fn finish(result: Result<Outcome, Error>, json: bool) -> ExitCode {
    let outcome = result.unwrap_or_else(|error| {
        let output = if json { format!("{}\n", error_json(&error)) } else { String::new() };
        Outcome { output, error: Some(error), code: 0 }
    });
    // JSON spells out itself what a terminal would obey where it must, and is exact.
    let output = if json { outcome.output } else { escape::lines(&outcome.output).into_owned() };
    close(output, outcome.error.as_ref(), outcome.code)
}

/// Ends the process for an error that the command's own thread doesn't tell of.
pub fn end(error: &Error, json: bool) -> ! {
    let code = code_of(error);
    let output = if json { format!("{}\n", error_json(error)) } else { String::new() };
    let message = format!("error: {}", hints::shown_error(error));
    // On a thread of their own: a pipe that nobody reads would keep the process.
    let words = thread::Builder::new().spawn(move || {
        if streams::begin_answer() {
            let _ = streams::answer(&output);
            streams::tell(message);
        } else {
            thread::sleep(LAST_WORDS); // the process ends by itself if it can
        }
    });
    let begun = Instant::now();
    while words.as_ref().is_ok_and(|words| !words.is_finished()) && begun.elapsed() < LAST_WORDS {
        thread::sleep(Duration::from_millis(1));
    }
    process::exit(code.into())
}

/// Ends a command that was started with arguments that it doesn't take, or was asked for help only.
pub fn usage(message: &clap::Error, json: bool) -> ExitCode {
    let is_error = message.use_stderr();
    let code = if is_error { WRONG_USAGE } else { 0 };
    // In colors, if that is a terminal; with --json people are told on standard error.
    let written = match (is_error, json) {
        (true, _) => message.print().or(Ok(())),
        (false, false) => streams::unless_closed(message.print()),
        (false, true) => {
            streams::tell(message);
            Ok(())
        }
    };
    let text = message.to_string();
    let answer = match (json, is_error) {
        (false, _) => String::new(),
        (true, true) => failure_line("usage", text.trim_end().trim_start_matches("error: "), code),
        (true, false) => format!("{}\n", json!({"message": text})),
    };
    match written {
        Err(error) => unwritten(&error),
        Ok(()) => close(answer, None, code),
    }
}

/// Writes the answer, and tells of the error.
fn close(answer: String, error: Option<&Error>, code: u8) -> ExitCode {
    // Before anything of it is read, so that the two agree.
    let code = error.map_or(code, code_of);
    if !streams::begin_answer() {
        // The process is being ended, with another answer.
        loop {
            thread::park();
        }
    }
    if let Err(error) = streams::answer(&answer) {
        return unwritten(&error);
    }
    if let Some(error) = error {
        streams::tell(format_args!("error: {}", hints::shown_error(error)));
    }
    ExitCode::from(code)
}

fn unwritten(error: &io::Error) -> ExitCode {
    streams::tell(format_args!("error: can't write to standard output: {error}"));
    ExitCode::from(IO_FAILURE)
}

/// The exit code for an error, which is the signal's if one has come.
fn code_of(error: &Error) -> u8 {
    interrupt::exit_code().unwrap_or(exit_code(error.kind()))
}

/// The process's exit code: 2 wrong usage, 3 bad input, 4 I/O or device failure.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Pattern
        | ErrorKind::Options
        | ErrorKind::AmbiguousSkipEntry
        | ErrorKind::Memory
        | ErrorKind::DeviceMemory => WRONG_USAGE,
        ErrorKind::SourceMissing
        | ErrorKind::NotACheckpoint
        | ErrorKind::Malformed
        | ErrorKind::UnsupportedDtype
        | ErrorKind::QuantStorage
        | ErrorKind::AlreadyQuantized
        | ErrorKind::Relayout
        | ErrorKind::Adapter
        | ErrorKind::NonFinite
        | ErrorKind::Experts
        | ErrorKind::NothingToQuantize
        | ErrorKind::Destination
        | ErrorKind::Outdated
        | ErrorKind::SourceChanged
        | ErrorKind::JobChanged => 3,
        ErrorKind::NoSpace
        | ErrorKind::Io
        | ErrorKind::NoDevice
        | ErrorKind::Device
        | ErrorKind::OutOfMemory
        | ErrorKind::Internal
        | ErrorKind::Interrupted
        | ErrorKind::Stopped => IO_FAILURE,
    }
}

/// An error as machines read it.
pub fn error_json(error: &Error) -> Value {
    failure_json(error.kind().name(), &hints::error(error), code_of(error))
}

/// A failure as a line of JSON.
pub fn failure_line(kind: &str, message: &str, code: u8) -> String {
    format!("{}\n", failure_json(kind, message, code))
}

fn failure_json(kind: &str, message: &str, code: u8) -> Value {
    json!({"error": {"kind": kind, "message": message, "exit_code": code}})
}
