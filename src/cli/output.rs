//! How a command ends: what it prints, and its exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use prequant::Error;
use serde_json::{Value, json};

use super::interrupt;

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
            eprintln!("error: {}", message(&error));
            interrupt::exit_code().unwrap_or(ExitCode::from(error.exit_code()))
        }
        None => ExitCode::from(code),
    }
}

/// An error in words, with options named as they are typed.
fn message(error: &Error) -> String {
    match error {
        Error::Options { option, .. } => {
            format!("--{}", error.to_string().replacen(option, &option.replace('_', "-"), 1))
        }
        _ => error.to_string(),
    }
}

/// An error as machines read it.
pub fn error_json(error: &Error) -> Value {
    json!({"error": {"kind": error.kind(), "message": message(error), "exit_code": error.exit_code()}})
}
