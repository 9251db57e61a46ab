//! Executing a plan: read, quantize, write and hash, on all cores, in bounded memory.
//!
//! Threads take tasks from one [`Scheduler`]: a run of whole blocks of a tensor is read, quantized and written at the
//! offset that the plan has for it, by the same thread and while it is in that core's cache. No order is kept between
//! tasks, since no output depends on one. When the last tensor of a file is written, the file is synced and hashed
//! (whole, and tensor by tensor) out of the page cache, ahead of quantizing what comes next.

mod budget;
mod nonfinite;
mod scheduler;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub use budget::Budget;

use crate::checkpoint::{OutputFile, Sha256Hash, Source, Staging};
use crate::error::Result;
use crate::kernel::Kernel;
use crate::plan::Plan;
use crate::stats::Statistics;
use scheduler::Scheduler;
use worker::Worker;

/// What is told while a plan is executed, from any thread.
pub trait Progress: Sync {
    /// `bytes` more of the source are done, all of `tensor`.
    fn advanced(&self, tensor: &str, bytes: u64);
    /// A file is written and hashed.
    fn sealed(&self, file: &str, len: u64);
}

/// What is known once a plan is executed.
#[derive(Debug)]
pub struct Outcome {
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
#[derive(Clone, Debug, Default)]
pub struct TensorOutcome {
    /// SHA-256 of each of its outputs, in the plan's order.
    pub sha256: Vec<Sha256Hash>,
    /// What quantizing it cost; `None` if it was kept.
    pub statistics: Option<Statistics>,
}

/// What every thread works from.
struct Job<'a> {
    source: &'a Source,
    plan: &'a Plan,
    staging: &'a Staging,
    kernel: Kernel,
    budget: Budget,
    progress: &'a dyn Progress,
    outputs: Vec<Mutex<Option<Arc<OutputFile>>>>,
}

/// Executes `plan`: writes its files of weights into `staging`, synced, under their own names.
///
/// # Errors
/// The first failure in the plan's order among those met before all threads had stopped.
///
/// # Panics
/// When a thread of it does; that is a defect.
pub fn run(
    source: &Source,
    plan: &Plan,
    staging: &Staging,
    kernel: Kernel,
    budget: Budget,
    hash_source: bool,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let outputs = plan.files.iter().map(|_| Mutex::default()).collect();
    let job = Job { source, plan, staging, kernel, budget, progress, outputs };
    let scheduler = Scheduler::new(plan, source.files.len(), &budget, hash_source);
    thread::scope(|scope| {
        for _ in 0..budget.threads {
            scope.spawn(|| Worker::new(&job).work(&scheduler));
        }
        scope.spawn(|| job.sync_finished_files(&scheduler));
    });
    scheduler.into_outcome()
}

impl Job<'_> {
    /// The output file, created if it isn't yet.
    fn output(&self, file: usize) -> Result<Arc<OutputFile>> {
        let mut slot = self.outputs[file].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(output) = &*slot {
            return Ok(output.clone());
        }
        let planned = &self.plan.files[file];
        let output = OutputFile::create(self.staging.path(&partial_name(&planned.name)), planned.len)?;
        output.write_at(&planned.header, 0)?;
        Ok(slot.insert(Arc::new(output)).clone())
    }

    /// Gives a written, hashed and synced file its name.
    fn seal(&self, file: usize) -> Result<()> {
        let planned = &self.plan.files[file];
        let output = self.outputs[file].lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(output) = output {
            output.rename(&self.staging.path(&planned.name))?;
        }
        self.progress.sealed(&planned.name, planned.len);
        Ok(())
    }

    /// Has the disk catch up with the files while other threads hash them.
    fn sync_finished_files(&self, scheduler: &Scheduler<'_>) {
        while let Some(file) = scheduler.next_to_sync() {
            match self.output(file).and_then(|output| output.sync()) {
                Ok(()) => scheduler.synced(file),
                Err(error) => scheduler.fail(self.plan.files[file].tensors.start, error),
            }
        }
    }
}

/// A file's name while it is written.
fn partial_name(name: &str) -> String {
    format!("{name}.partial")
}
