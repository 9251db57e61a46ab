//! What the system does to a process that meets a limit: a refused open, a signal for a file that grows too large, an end without
//! a word for want of memory. Each becomes an error with its exit code.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::stdio::{stderr, stdout};
use signal_hook::consts::{SIGABRT, SIGXFSZ};
use signal_hook::{flag, low_level};

use super::{output, streams};

/// Files that the process asks to have open, where it may: more than any number of threads needs.
const OPEN_FILES: u64 = 4096;

/// How long another thread may take for its answer.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Raises the limit on open files, and listens for the signals that stand for other limits.
pub fn listen(json: bool) -> io::Result<()> {
    raise_open_files();
    // With a handler, whatever it does, the write fails instead, and its error names the file.
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    let answer = output::failure_line("aborted", ABORTED, output::IO_FAILURE);
    let answer = if json { answer } else { String::new() };
    let tell = move || {
        // Nothing can be done where they can't be written.
        let _ = rustix::io::write(stderr(), TOLD.as_bytes());
        if streams::begin_answer() {
            let _ = rustix::io::write(stdout(), answer.as_bytes());
        } else {
            // Another thread is answering, perhaps from here: the process must not end before it has.
            thread::sleep(LAST_WORDS);
        }
        low_level::exit(output::IO_FAILURE.into());
    };
    // SAFETY: what a handler may do in a thread that was stopped anywhere: it takes no lock, allocates and frees nothing. It swaps an
    // atomic, calls write with what was made beforehand, or nanosleep, and ends the process.
    unsafe { low_level::register(SIGABRT, tell) }?;
    Ok(())
}

/// What is said after the standard library's own line on what went wrong.
const ABORTED: &str = "out of memory, or a defect (standard error says which); allow the process more memory, or give it a smaller \
                       --memory and fewer --threads; the same command resumes the work";

/// The same as a line for people.
const TOLD: &str = concat!(
    "error: out of memory, or a defect (see the line above); allow the process more memory, or give it a smaller --memory and fewer ",
    "--threads; the same command resumes the work\n"
);

/// As far as the process itself may. The work keeps below whatever the limit is.
fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}
