//! How a command ends: what it prints, and its exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use prequant::{Error, ErrorKind};
use serde_json::{Value, json};

use super::{hints, interrupt};

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
    let Outcome { output, error, code } = result.unwrap_or_else(|error| {
        let output = if json { format!("{}\n", error_json(&error)) } else { String::new() };
        Outcome { output, error: Some(error), code: 0 }
    });
    if let Err(error) = io::stdout().write_all(output.as_bytes())
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        eprintln!("error: can't write to standard output: {error}");
        return ExitCode::from(4);
    }
    match error {
        Some(error) => {
            eprintln!("error: {}", hints::error(&error));
            interrupt::exit_code().unwrap_or(ExitCode::from(exit_code(error.kind())))
        }
        None => ExitCode::from(code),
    }
}

/// The process's exit code: 2 wrong usage, 3 bad input, 4 I/O or device failure.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Pattern
        | ErrorKind::Options
        | ErrorKind::AmbiguousSkipEntry
        | ErrorKind::Memory
        | ErrorKind::DeviceMemory => 2,
        ErrorKind::SourceMissing
        | ErrorKind::NotACheckpoint
        | ErrorKind::Malformed
        | ErrorKind::UnsupportedDtype
        | ErrorKind::AlreadyQuantized
        | ErrorKind::Relayout
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
        | ErrorKind::Internal
        | ErrorKind::Interrupted
        | ErrorKind::Stopped => 4,
    }
}

/// An error as machines read it.
pub fn error_json(error: &Error) -> Value {
    let kind = error.kind();
    json!({"error": {"kind": kind.name(), "message": hints::error(error), "exit_code": exit_code(kind)}})
}
