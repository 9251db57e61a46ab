//! Progress: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use prequant::{Bytes, Plan, Progress};

use super::escape;
use super::streams::tell;
use super::words::count;

/// Without a terminal, a line at least this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How progress is shown.
#[derive(Clone, Copy)]
pub enum Style {
    Bar,
    Lines,
    Silent,
}

impl Style {
    /// A bar if standard error is a terminal.
    pub fn of_stderr() -> Style {
        if std::io::stderr().is_terminal() { Style::Bar } else { Style::Lines }
    }
}

/// Shows a conversion's progress on standard error.
pub struct Reporter {
    style: Style,
    bar: ProgressBar,
    total: u64,
    lines: Mutex<Lines>,
}

struct Lines {
    start: Instant,
    last: Instant,
    done: u64,
}

impl Reporter {
    pub fn new(style: Style, plan: &Plan) -> Reporter {
        let total = plan.source_len();
        let bar = if matches!(style, Style::Bar) { ProgressBar::new(total) } else { ProgressBar::hidden() };
        let template = "{bar:30} {percent:>3}% {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}, {eta} left  {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let now = Instant::now();
        Reporter { style, bar, total, lines: Mutex::new(Lines { start: now, last: now, done: 0 }) }
    }

    /// A line above the bar.
    fn say(&self, line: &str) {
        let line = &*escape::line(line);
        match self.style {
            Style::Silent => {}
            Style::Bar if !self.bar.is_finished() => self.bar.println(line),
            Style::Bar | Style::Lines => tell(line),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Progress for Reporter {
    fn found(&self, files: usize, of: usize) {
        self.say(&format!("resuming: verifying {files} of {} from an earlier run", count(of, "file")));
    }

    fn resumed(&self, files: usize, bytes: u64) {
        self.say(&format!("{files} verified, skipping {} of the source", Bytes(bytes)));
        self.bar.inc(bytes);
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).done += bytes;
    }

    fn kept(&self, files: usize) {
        self.bar.finish_and_clear();
        if files > 0 {
            self.say(&format!(
                "{} kept; run the same command again to resume, or a different one with --restart",
                count(files, "finished file")
            ));
        }
    }

    fn left(&self, file: &str) {
        self.say(&format!("left as it was, and no part of the checkpoint: {file}"));
    }

    fn advanced(&self, tensor: &str, bytes: u64) {
        match self.style {
            Style::Silent => {}
            Style::Bar => {
                // Shown ten times a second at most, so not worth a copy of the name each time.
                let tensor = escape::line(tensor);
                if self.bar.message() != *tensor {
                    self.bar.set_message(tensor.into_owned());
                }
                self.bar.inc(bytes);
            }
            Style::Lines => {
                let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.done += bytes;
                if lines.last.elapsed() >= LINE_EVERY {
                    lines.last = Instant::now();
                    let seconds = lines.start.elapsed().as_secs_f64();
                    let (done, total) = (Bytes(lines.done), Bytes(self.total));
                    let percent = 100 * lines.done / self.total.max(1);
                    let left = seconds * (self.total - lines.done) as f64 / lines.done.max(1) as f64;
                    let rate = Bytes((lines.done as f64 / seconds) as u64);
                    let tensor = escape::line(tensor);
                    tell(format_args!("{percent} % ({done} of {total}), {rate}/s, {left:.0} s left, {tensor}"));
                }
            }
        }
    }

    fn sealed(&self, file: &str, len: u64) {
        self.say(&format!("wrote {file} ({})", Bytes(len)));
    }
}
