//! Executing a plan: read, quantize, write and hash, on all cores, in bounded memory.
//!
//! Threads take tasks from one `Scheduler`: a run of whole blocks of a tensor, or all of a small one, is read and quantized
//! by one thread while it is in that core's cache, and handed to its output file's `FileStream`, which is written and hashed
//! front to back. Several output files are in progress at once, so that threads don't wait for each other's writes and
//! hashes; each reads its own place of the source. With a device the thread reads into a lane of it and sleeps while it
//! quantizes. One thread reads ahead, one has the disk catch up and gives finished files their names.

mod budget;
mod disk;
mod frontier;
mod lane_pool;
mod nonfinite;
mod open_files;
mod output_files;
mod read_ahead;
mod results;
mod scheduler;
mod source_files;
mod stream;
mod trace;
mod worker;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};

pub use budget::{Budget, Limits};
pub use trace::Trace;
pub(crate) use trace::{Span, Subject, ThreadTrace};

use crate::backend::Backend;
use crate::checkpoint::{Source, SourceFile};
use crate::error::{Error, Result};
use crate::plan::{Plan, PlannedFile};
use crate::stats::{AbsmaxAccumulator, Statistics, StatsAccumulator};
use crate::store::{ReadAt, Sha256Hash, memory_size};
use budget::lane_size;
use lane_pool::LanePool;
use open_files::OpenFiles;
use scheduler::{Scheduler, StopOnPanic};
use stream::FileStream;
use worker::Worker;

/// What is told while a plan is executed, from any thread.
pub trait Progress: Sync {
    /// Of `of` files, an earlier run had finished `files`, which are hashed again now.
    fn found(&self, files: usize, of: usize);
    /// `files` of them, made from `bytes` of the source, are as they should be and are kept.
    fn resumed(&self, files: usize, bytes: u64);
    /// `bytes` more of the source are done, all of `tensor`.
    fn advanced(&self, tensor: &str, bytes: u64);
    /// A file is written and hashed.
    fn sealed(&self, file: &str, len: u64);
    /// After a failure: `files` finished files are kept for the next run.
    fn kept(&self, files: usize);
    /// A checkpoint was replaced: `file` at the destination is no part of the new one, and isn't ours to remove.
    fn left(&self, file: &str) {
        let _ = file;
    }
}

/// Tells no one.
impl Progress for () {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {}
    fn kept(&self, _: usize) {}
}

/// What a plan is executed with; it decides nothing about the bytes.
#[derive(Clone, Copy)]
pub(crate) struct ExecutionContext<'a> {
    /// What quantizes.
    pub device: &'a dyn Backend,
    /// Threads and buffers.
    pub budget: Budget,
    /// Whether to hash the source's files.
    pub hash_source: bool,
    /// Set from outside to have it stop.
    pub interrupt: &'a AtomicBool,
    /// Who is told.
    pub progress: &'a dyn Progress,
    /// Where threads record what they do.
    pub trace: Option<&'a Trace>,
}

/// What is known once a plan is executed.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Of each tensor of the plan.
    pub tensors: Vec<TensorOutcome>,
    /// SHA-256 of each file of the plan.
    pub files: Vec<Sha256Hash>,
    /// SHA-256 of each of the source's files, if asked for.
    pub source_files: Option<Vec<Sha256Hash>>,
    /// Statistics of all quantized tensors together.
    pub total: Statistics,
}

/// What is known of a tensor once it is written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct TensorOutcome {
    /// SHA-256 of each of its outputs, in the plan's order.
    pub sha256: Box<[Sha256Hash]>,
    /// What quantizing it cost; `None` if it was kept.
    pub statistics: Option<Box<Statistics>>,
}

/// What is known of a file once it is written: all that the manifest needs of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FileOutcome {
    /// SHA-256 of the file.
    pub sha256: Sha256Hash,
    /// Of each of its tensors, in the plan's order.
    pub tensors: Vec<TensorOutcome>,
    /// Statistics of its quantized tensors together.
    pub total: StatsAccumulator,
    /// The same of their absmax, with double quantization.
    pub total_absmax: AbsmaxAccumulator,
}

/// Where the files of a plan go, or are.
pub(crate) trait Outputs: Sync {
    /// A file to be written.
    fn open(&self, file: &PlannedFile) -> Result<Arc<dyn Output + '_>>;
    /// `file` is written, hashed and synced.
    fn seal(&self, file: &PlannedFile, outcome: &FileOutcome) -> Result<()>;
    /// A whole file of the source is hashed.
    fn source_hashed(&self, file: &SourceFile, sha256: Sha256Hash) -> Result<()>;
}

/// A file of a plan.
pub(crate) trait Output: Send + Sync {
    /// Puts all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()>;
    /// Has the disk begin with `len` bytes from `offset` on. A hint: nothing depends on it.
    fn write_back(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }
    /// Waits until the file is on the disk.
    fn sync(&self) -> Result<()>;
    /// The file, for reading back.
    fn file(&self) -> &dyn ReadAt;
    /// Where it is.
    fn path(&self) -> &Path;
}

/// What every thread works from.
struct Execution<'a> {
    source: &'a Source,
    plan: &'a Plan,
    outputs: &'a dyn Outputs,
    context: ExecutionContext<'a>,
    /// The lanes on devices, if there are any.
    lanes: Option<LanePool<'a>>,
    streams: Vec<Mutex<Slot<'a>>>,
    /// What pieces that wait for their turn take, in all files.
    held: &'a AtomicUsize,
    /// Whether the source and what is made of it would fill the page cache with what nobody needs again soon.
    crowds_memory: bool,
}

/// An output file.
#[derive(Default)]
enum Slot<'a> {
    /// Nothing of it is there.
    #[default]
    Planned,
    Open(Arc<FileStream<'a>>),
    /// It is finished.
    Closed,
}

/// Executes `plan`: writes its files of weights to `outputs`. Files of which `sealed` has the outcome are there already.
///
/// # Errors
/// The first failure in the plan's order among those met before all threads had stopped.
///
/// # Panics
/// When a thread of it does; that is a defect.
pub(crate) fn run(
    source: &Source,
    plan: &Plan,
    outputs: &dyn Outputs,
    sealed: Vec<Option<FileOutcome>>,
    context: ExecutionContext<'_>,
) -> Result<Outcome> {
    run_in(memory_size(), source, plan, outputs, sealed, context)
}

/// The same on a machine with so many bytes of memory, if that is known.
fn run_in(
    memory: Option<u64>,
    source: &Source,
    plan: &Plan,
    outputs: &dyn Outputs,
    sealed: Vec<Option<FileOutcome>>,
    mut context: ExecutionContext<'_>,
) -> Result<Outcome> {
    let open_files = OpenFiles::new(context.budget.threads, context.budget.files);
    (context.budget.threads, context.budget.files) = (open_files.threads, open_files.in_progress);
    let streams = plan.files.iter().map(|_| Mutex::default()).collect();
    let lanes = context.budget.lanes.map(|budget| LanePool::new(context.device, budget));
    let held = AtomicUsize::new(0);
    let touched = plan.source_len().saturating_add(plan.output_len());
    let crowds_memory = memory.is_some_and(|memory| touched > memory / 2);
    let execution = Execution { source, plan, outputs, context, lanes, streams, held: &held, crowds_memory };
    let scheduler = Scheduler::new(plan, source.files.len(), sealed, open_files.outputs, context);
    thread::scope(|scope| {
        let _guard = StopOnPanic(&scheduler);
        let serve_disk = || execution.serve_disk(&scheduler, &ThreadTrace::new(context.trace, "disk", source, plan));
        let work = |is_first: bool| {
            // Where memory is short, fewer threads do; the first one must.
            match execution.check_memory() {
                Err(error) if is_first => scheduler.fail(0, error),
                Err(_) => {}
                Ok(()) => {
                    let trace = ThreadTrace::new(context.trace, "worker", source, plan);
                    Worker::new(&execution, &scheduler, &trace).work();
                }
            }
        };
        let disk = thread::Builder::new().spawn_scoped(scope, serve_disk).map(drop);
        // Where the system allows fewer threads, fewer do.
        let mut workers = 0..context.budget.threads;
        let first =
            workers.next().map_or(Ok(()), |_| thread::Builder::new().spawn_scoped(scope, move || work(true)).map(drop));
        if let Err(source) = disk.and(first) {
            return scheduler.fail(0, Error::Threads { source });
        }
        for _ in workers {
            if thread::Builder::new().spawn_scoped(scope, move || work(false)).is_err() {
                return;
            }
        }
        // Without it the threads wait for the disk themselves.
        let read_ahead = || {
            let trace = ThreadTrace::new(context.trace, "reader", source, plan);
            read_ahead::run(&execution, &scheduler, &trace);
        };
        let _ = thread::Builder::new().spawn_scoped(scope, read_ahead);
    });
    scheduler.into_outcome()
}

impl<'a> Execution<'a> {
    /// An output file, begun if it isn't yet.
    fn stream(&self, file: usize) -> Result<Arc<FileStream<'a>>> {
        let mut slot = self.streams[file].lock().unwrap_or_else(PoisonError::into_inner);
        let planned = &self.plan.files[file];
        match &*slot {
            Slot::Open(stream) => Ok(stream.clone()),
            Slot::Closed => Err(Error::internal(format!("{} is finished, and was to be written to", planned.name))),
            Slot::Planned => {
                let output = self.outputs.open(planned)?;
                let memory = self.context.budget.stream_memory(self.held);
                let stream = Arc::new(FileStream::new(self.plan, planned, output, memory));
                *slot = Slot::Open(stream.clone());
                Ok(stream)
            }
        }
    }

    /// Whether the system gives the memory that a thread's buffers take. They are then made zeroed, for which there is no call that
    /// may fail.
    fn check_memory(&self) -> Result<()> {
        let size = lane_size(self.plan, self.context.budget.chunk_elements);
        let len = self.context.device.cpu().lane_len(&size);
        let mut probe = Vec::<u8>::new();
        let reserved = usize::try_from(len).is_ok_and(|len| probe.try_reserve_exact(len).is_ok());
        // Or the compiler would see that nothing is done with it, and leave it out.
        std::hint::black_box(&mut probe);
        match reserved {
            true => Ok(()),
            false => Err(Error::OutOfMemory { purpose: "a thread's buffers", len }),
        }
    }

    /// Lets go of a file that is finished.
    fn close(&self, file: usize) {
        *self.streams[file].lock().unwrap_or_else(PoisonError::into_inner) = Slot::Closed;
    }
}

#[cfg(test)]
mod tests;
