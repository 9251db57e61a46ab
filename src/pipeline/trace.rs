//! What every thread did and when, as a timeline that Perfetto and Chrome show: for finding out what a conversion waits for.
//!
//! A thread records its spans in a small buffer of its own and appends them to the file whenever that is full, so that the
//! trace of a run of any length takes a bounded amount of memory. Without a trace nothing is recorded, and no clock is read.

mod file;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::checkpoint::{Source, resolve};
use crate::error::{Error, IoContext, Result};
use crate::plan::Plan;
use crate::store::Location;
use file::TraceFile;

/// Spans that a thread keeps before it appends them to the file.
const BUFFERED: usize = 256;

/// Bytes of JSON that are appended at once, if no single event is longer.
const PIECE: usize = 32 << 10;

/// A timeline of a conversion, in the JSON form of Chrome's and Perfetto's trace viewers; see docs/tracing.md.
///
/// The file is complete JSON from its creation on, however the run ends.
pub struct Trace {
    location: Location,
    origin: Instant,
    /// Threads that have been traced.
    threads: AtomicU32,
    state: Mutex<State>,
}

struct State {
    file: TraceFile,
    /// What went wrong first. Nothing is written after it.
    failure: Option<io::Error>,
    failed: bool,
}

impl Trace {
    /// Creates the file at `path`, or empties it. It may not lie in any of the folders (or be any of the files) in `apart_from`:
    /// those that the traced run reads and writes.
    ///
    /// # Errors
    /// When it lies there, or can't be created.
    pub fn create(path: impl AsRef<Path>, apart_from: &[&Path]) -> Result<Trace> {
        let path = path.as_ref();
        let place = resolve(path)?;
        for folder in apart_from {
            if place.starts_with(resolve(folder)?) {
                let why = format!("a trace can't lie in {}, which the run reads or writes", folder.display());
                return Err(Error::destination(path, why + "; choose a path outside"));
            }
        }
        Trace::at(path.into())
    }

    fn at(location: Location) -> Result<Trace> {
        let file = TraceFile::create(&location).at(location.path(), "create the trace")?;
        let state = Mutex::new(State { file, failure: None, failed: false });
        Ok(Trace { location, origin: Instant::now(), threads: AtomicU32::new(0), state })
    }

    /// Says whether everything so far was written.
    ///
    /// # Errors
    /// The first failure to write, once. The file ends before it.
    pub fn check(&self) -> Result<()> {
        let failure = self.state.lock().unwrap_or_else(PoisonError::into_inner).failure.take();
        failure.map_or(Ok(()), Err).at(self.location.path(), "write the trace")
    }

    /// Appends events and empties the buffer.
    fn append(&self, events: &mut Vec<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.failed
            && let Err(error) = state.file.append(events)
        {
            state.failed = true;
            state.failure = Some(error);
        }
        events.clear();
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trace").field(&self.location).finish()
    }
}

/// What a thread does for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    /// Gets bytes of the source.
    Read,
    /// Has the disk bring bytes of the source into memory, ahead of who gets them.
    Fetch,
    /// Quantizes, or decodes, and gathers statistics.
    Quantize,
    /// Puts bytes into an output file.
    Write,
    /// Computes SHA-256.
    Hash,
    /// Has nothing to do until another thread is done with something.
    Wait,
    /// Waits until an output file is on the disk.
    Sync,
}

impl Span {
    fn name(self) -> &'static str {
        match self {
            Span::Read => "read",
            Span::Fetch => "fetch",
            Span::Quantize => "quantize",
            Span::Write => "write",
            Span::Hash => "hash",
            Span::Wait => "wait",
            Span::Sync => "sync",
        }
    }
}

/// What a span is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A tensor of the plan, and its output file.
    Tensor(usize),
    /// A file of the plan.
    Output(usize),
    /// A file of the source.
    Source(usize),
    /// Nothing in particular.
    None,
}

/// When a span began; empty if there is no trace.
#[derive(Clone, Copy, Debug, Default)]
#[must_use = "a span is recorded when it ends"]
pub(crate) struct Stamp(Option<Instant>);

/// One thread's part of a trace, or of none. What it has recorded is in the file once it is dropped.
pub(crate) struct ThreadTrace<'a>(Option<Recorder<'a>>);

struct Recorder<'a> {
    trace: &'a Trace,
    source: &'a Source,
    plan: &'a Plan,
    thread: u32,
    buffers: RefCell<Buffers>,
}

struct Buffers {
    spans: Vec<Recorded>,
    json: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Recorded {
    begin: Duration,
    len: Duration,
    span: Span,
    subject: Subject,
    bytes: u64,
}

impl<'a> ThreadTrace<'a> {
    /// For the calling thread, which the timeline calls `role` with a number.
    pub(crate) fn new(trace: Option<&'a Trace>, role: &str, source: &'a Source, plan: &'a Plan) -> ThreadTrace<'a> {
        ThreadTrace(trace.map(|trace| {
            let thread = trace.threads.fetch_add(1, Ordering::Relaxed) + 1;
            let mut json = Vec::with_capacity(PIECE);
            file::thread_event(&mut json, thread, role);
            let buffers = RefCell::new(Buffers { spans: Vec::with_capacity(BUFFERED), json });
            Recorder { trace, source, plan, thread, buffers }
        }))
    }

    /// Begins a span.
    pub(crate) fn begin(&self) -> Stamp {
        Stamp(self.0.as_ref().map(|_| Instant::now()))
    }

    /// Ends it: `bytes` of the subject were read, quantized (of the source), written or hashed. Spans that begin within others
    /// must end before them.
    pub(crate) fn end(&self, begin: Stamp, span: Span, subject: Subject, bytes: u64) {
        if let (Some(recorder), Stamp(Some(begin))) = (&self.0, begin) {
            let len = begin.elapsed();
            let begin = begin.saturating_duration_since(recorder.trace.origin);
            recorder.record(Recorded { begin, len, span, subject, bytes });
        }
    }
}

impl Recorder<'_> {
    fn record(&self, span: Recorded) {
        let mut buffers = self.buffers.borrow_mut();
        buffers.spans.push(span);
        if buffers.spans.len() == BUFFERED {
            self.flush(&mut buffers);
        }
    }

    fn flush(&self, Buffers { spans, json }: &mut Buffers) {
        for span in spans.drain(..) {
            self.event(json, &span);
            if json.len() >= PIECE {
                self.trace.append(json);
            }
        }
        if !json.is_empty() {
            self.trace.append(json);
        }
    }

    /// A span as an event: `,{...}`.
    fn event(&self, json: &mut Vec<u8>, recorded: &Recorded) {
        let Recorded { begin, len, span, subject, bytes } = *recorded;
        let mut event = file::Event::begin(json, span.name(), self.thread, begin, len);
        match subject {
            Subject::Tensor(tensor) => {
                if let Some(planned) = self.plan.tensors.get(tensor) {
                    event.text("tensor", &planned.name);
                    let source = self
                        .source
                        .files
                        .get(planned.read.first_file())
                        .filter(|_| matches!(span, Span::Read | Span::Fetch));
                    event.name("source", source.map(|file| file.location.path()));
                }
                let file = self.plan.files.partition_point(|file| file.tensors.end <= tensor);
                event.name("file", self.plan.files.get(file).map(|file| Path::new(&file.name)));
            }
            Subject::Output(file) => event.name("file", self.plan.files.get(file).map(|file| Path::new(&file.name))),
            Subject::Source(file) => event.name("source", self.source.files.get(file).map(|file| file.location.path())),
            Subject::None => {}
        }
        event.end(bytes);
    }
}

impl Drop for Recorder<'_> {
    fn drop(&mut self) {
        self.flush(&mut self.buffers.borrow_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use serde_json::Value;

    use super::*;
    use crate::recipe::Recipe;
    use crate::store::{Fault, FaultyStore, MemoryStore};

    fn planned() -> (Source, Plan) {
        let source = Source::open(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/tiny-qwen3-moe")).unwrap();
        let plan = Plan::new(&source, Recipe::default()).unwrap();
        (source, plan)
    }

    fn in_memory() -> Location {
        Location::new(Arc::new(MemoryStore::default()), "/trace.json")
    }

    /// The events of a file as it is now: `ph` is the phase, X for a span and M for a name.
    fn events(location: &Location, phase: &str) -> Vec<Value> {
        let mut trace: Value = serde_json::from_slice(&location.read(u64::MAX).unwrap()).unwrap();
        let Value::Array(events) = trace["traceEvents"].take() else { panic!("{trace}") };
        events.into_iter().filter(|event| event["ph"] == phase).collect()
    }

    fn record(thread: &ThreadTrace<'_>, spans: usize) {
        for i in 0..spans {
            thread.end(thread.begin(), Span::Write, Subject::Tensor(0), i as u64);
        }
    }

    #[test]
    fn each_span_tells_its_thread_tensor_file_and_bytes() {
        let ((source, plan), location) = (planned(), in_memory());
        let trace = Trace::at(location.clone()).unwrap();
        let last = plan.tensors.len() - 1;
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let thread = ThreadTrace::new(Some(&trace), "worker", &source, &plan);
                    let outer = thread.begin();
                    thread.end(thread.begin(), Span::Read, Subject::Tensor(last), 7);
                    thread.end(outer, Span::Wait, Subject::None, 0);
                    thread.end(thread.begin(), Span::Sync, Subject::Output(0), 9);
                    thread.end(thread.begin(), Span::Hash, Subject::Source(0), 11);
                });
            }
        });
        let mut threads: Vec<Value> =
            events(&location, "M").iter().map(|event| event["args"]["name"].clone()).collect();
        threads.sort_by_key(Value::to_string);
        assert_eq!(threads, ["prequant", "worker 1", "worker 2"]);
        for id in [1, 2] {
            let mut spans = events(&location, "X");
            spans.retain(|span| span["tid"] == id);
            let args = |name: &str| &spans.iter().find(|span| span["name"] == name).unwrap()["args"];
            let file = &plan.files.last().unwrap().name;
            assert_eq!(args("read")["tensor"], *plan.tensors[last].name);
            assert_eq!((&args("read")["file"], &args("read")["bytes"]), (&file.as_str().into(), &7.into()));
            assert!(args("read")["source"].is_string());
            assert_eq!(*args("wait"), serde_json::json!({"bytes": 0}));
            assert_eq!(*args("sync"), serde_json::json!({"file": plan.files[0].name, "bytes": 9}));
            assert!(args("hash")["source"].is_string());
            let time = |name: &str| {
                let span = spans.iter().find(|span| span["name"] == name).unwrap();
                (span["ts"].as_f64().unwrap(), span["ts"].as_f64().unwrap() + span["dur"].as_f64().unwrap())
            };
            let ((begin, end), (inner_begin, inner_end)) = (time("wait"), time("read"));
            assert!(begin <= inner_begin && inner_end <= end + 0.0005, "{spans:?}");
            assert!(end <= time("sync").0 + 0.0005, "{spans:?}");
        }
    }

    #[test]
    fn the_file_is_complete_while_threads_are_still_at_work() {
        let ((source, plan), location) = (planned(), in_memory());
        let trace = Trace::at(location.clone()).unwrap();
        assert_eq!(events(&location, "X").len(), 0);
        let (one, other) = [(); 2].map(|()| ThreadTrace::new(Some(&trace), "worker", &source, &plan)).into();
        record(&one, BUFFERED + 1);
        assert_eq!(events(&location, "X").len(), BUFFERED);
        record(&other, 2 * BUFFERED);
        assert_eq!(events(&location, "X").len(), 3 * BUFFERED);
        drop((one, other));
        assert_eq!(events(&location, "X").len(), 3 * BUFFERED + 1);
        trace.check().unwrap();
    }

    #[test]
    fn names_of_any_content_and_length_are_escaped_and_need_no_more_room_than_one_of_them() {
        let ((source, mut plan), location) = (planned(), in_memory());
        let name = "\"\\\n\u{1}\u{e9}".repeat(PIECE / 4);
        plan.tensors[0].name = name.clone().into();
        let trace = Trace::at(location.clone()).unwrap();
        let thread = ThreadTrace::new(Some(&trace), "worker", &source, &plan);
        record(&thread, BUFFERED);
        assert!(events(&location, "X").iter().all(|span| span["args"]["tensor"] == name));
        let held = thread.0.as_ref().unwrap().buffers.borrow().json.capacity();
        assert!(held < 10 * name.len(), "{held} bytes are held for a name of {}", name.len());
    }

    #[test]
    fn after_a_failure_to_write_the_file_ends_before_it_and_the_failure_is_told_once() {
        let (source, plan) = planned();
        for k in 1..60 {
            let store = Arc::new(FaultyStore::new(Arc::new(MemoryStore::default()), Fault::StorageFull));
            let location = Location::new(store.clone(), "/trace.json");
            let trace = Trace::at(location.clone()).unwrap();
            store.arm(k);
            let thread = ThreadTrace::new(Some(&trace), "worker", &source, &plan);
            record(&thread, 100 * BUFFERED);
            drop(thread);
            let error = trace.check().unwrap_err().to_string();
            assert!(error.starts_with("/trace.json: can't write the trace: "), "{error}");
            trace.check().unwrap();
            assert!(events(&location, "X").len() < 100 * BUFFERED);
        }
    }

    #[test]
    fn without_a_trace_no_clock_is_read_and_nothing_is_held() {
        let (source, plan) = planned();
        let thread = ThreadTrace::new(None, "worker", &source, &plan);
        assert!(thread.begin().0.is_none());
        thread.end(Stamp(Some(Instant::now())), Span::Quantize, Subject::None, 0);
        assert!(thread.0.is_none());
    }
}
