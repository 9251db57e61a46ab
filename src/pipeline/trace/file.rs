//! The file of a trace, and the JSON in it: <https://perfetto.dev/docs/getting-started/other-formats#chrome-json-format>.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process;
use std::time::Duration;

use crate::store::{Location, WriteAt, write_all_at};

/// What follows the last event.
const END: &[u8] = b"\n]}\n";

/// An array of events that is complete after every append: the next one overwrites its end.
pub(super) struct TraceFile {
    file: Box<dyn WriteAt>,
    /// Without [`END`].
    len: u64,
}

impl TraceFile {
    /// Creates the file, with what names the process.
    pub(super) fn create(location: &Location) -> io::Result<TraceFile> {
        let mut file = TraceFile { file: location.create(0)?, len: 0 };
        let (version, process) = (env!("CARGO_PKG_VERSION"), process::id());
        let begin = format!(
            "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"tool\":\"prequant {version}\"}},\"traceEvents\":[\n\
             {{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":{process},\"tid\":0,\"args\":{{\"name\":\"prequant\"}}}}"
        );
        file.append(&mut begin.into_bytes())?;
        Ok(file)
    }

    /// Appends events, each with the comma before it.
    pub(super) fn append(&mut self, events: &mut Vec<u8>) -> io::Result<()> {
        let len = events.len();
        events.extend(END);
        match write_all_at(&*self.file, events, self.len) {
            Ok(()) => {
                self.len += len as u64;
                Ok(())
            }
            Err(error) => {
                // A part of them may be there. JSON may end with blanks; where nothing was written, these fail as well.
                let mut blank = END.to_vec();
                blank.resize(events.len(), b' ');
                let _ = write_all_at(&*self.file, &blank, self.len);
                Err(error)
            }
        }
    }
}

/// Says what a thread is called.
pub(super) fn thread_event(json: &mut Vec<u8>, thread: u32, role: &str) {
    let process = process::id();
    put(
        json,
        format_args!(
            ",\n{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":{process},\"tid\":{thread},\"args\":{{\"name\":"
        ),
    );
    string(json, &format!("{role} {thread}"));
    put(json, format_args!("}}}}"));
}

/// A span being written.
pub(super) struct Event<'j> {
    json: &'j mut Vec<u8>,
}

impl<'j> Event<'j> {
    /// Times are in microseconds, with nanoseconds as decimals.
    pub(super) fn begin(json: &'j mut Vec<u8>, name: &str, thread: u32, begin: Duration, len: Duration) -> Event<'j> {
        let process = process::id();
        let micros = |time: Duration| (time.as_micros(), time.subsec_nanos() % 1000);
        let ((begin, begin_nanos), (len, len_nanos)) = (micros(begin), micros(len));
        put(
            json,
            format_args!(
                ",\n{{\"name\":\"{name}\",\"ph\":\"X\",\"pid\":{process},\"tid\":{thread},\
                 \"ts\":{begin}.{begin_nanos:03},\"dur\":{len}.{len_nanos:03},\"args\":{{"
            ),
        );
        Event { json }
    }

    /// An argument that a source chose the value of.
    pub(super) fn text(&mut self, key: &str, value: &str) {
        put(self.json, format_args!("\"{key}\":"));
        string(self.json, value);
        self.json.push(b',');
    }

    /// A file's name, if there is a file.
    pub(super) fn name(&mut self, key: &str, path: Option<&Path>) {
        if let Some(name) = path.and_then(Path::file_name) {
            self.text(key, &name.to_string_lossy());
        }
    }

    pub(super) fn end(self, bytes: u64) {
        put(self.json, format_args!("\"bytes\":{bytes}}}}}"));
    }
}

// A vector takes all that is written to it.

fn string(json: &mut Vec<u8>, text: &str) {
    let _ = serde_json::to_writer(json, text);
}

fn put(json: &mut Vec<u8>, text: fmt::Arguments<'_>) {
    let _ = json.write_fmt(text);
}
