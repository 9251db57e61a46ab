//! Standard output and standard error. Neither can be relied on: a pipe's reader may be gone, a disk full, a terminal closed.
//! Nothing else in the command writes to them.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use super::escape;

/// Whether the command's answer was begun; there is one only.
static ANSWERED: AtomicBool = AtomicBool::new(false);

/// Prints a line for people on standard error. If it can't be written it is lost: no work ends for want of a reader.
pub fn tell(line: impl Display) {
    let line = format!("{line}\n"); // in one piece, whoever else writes
    let _ = io::stderr().write_all(escape::lines(&line).as_bytes());
}

/// Whether the caller is the one who answers: true once. All others leave standard output alone.
pub fn begin_answer() -> bool {
    !ANSWERED.swap(true, Ordering::Relaxed)
}

/// Writes to standard output. A reader that went away has read enough.
pub fn answer(text: &str) -> io::Result<()> {
    let mut output = io::stdout();
    unless_closed(output.write_all(text.as_bytes()).and_then(|()| output.flush()))
}

/// What was written, or needed no more writing, as nobody reads it.
pub fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
