//! Resuming a conversion that was stopped: which of its finished files can be kept.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::checkpoint::{Source, Staging};
use crate::error::{Error, IoContext, Result};
use crate::ops::job::journal;
use crate::pipeline::{ExecutionContext, FileOutcome, Span, Subject, TensorOutcome, ThreadTrace};
use crate::plan::{Plan, PlannedTensor};
use crate::store::hash_range;
use crate::threads;

/// Bytes of a sealed file that are read at once.
const BUFFER: usize = 1 << 20;

/// The outcome of each of the plan's files that an earlier run sealed and that still is what it was then, by its hash.
pub(crate) fn sealed_files(
    staging: &Staging,
    source: &Source,
    plan: &Plan,
    context: ExecutionContext<'_>,
) -> Result<Vec<Option<FileOutcome>>> {
    let noted = plan.files.iter().map(|file| journal::read_sealed(staging, &file.name)).collect::<Result<Vec<_>>>()?;
    let found = noted.iter().flatten().count();
    if found > 0 {
        context.progress.found(found, plan.files.len());
    }
    let trusted = Mutex::new(vec![None; plan.files.len()]);
    let next = AtomicUsize::new(0);
    let check = || -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        let trace = ThreadTrace::new(context.trace, "resume", source, plan);
        while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < noted.len()) {
            let Some(outcome) = &noted[i] else { continue };
            let begin = trace.begin();
            let unchanged = is_unchanged(staging, plan, i, outcome, context, &mut buffer);
            trace.end(begin, Span::Hash, Subject::Output(i), plan.files[i].len);
            if unchanged? {
                trusted.lock().unwrap_or_else(PoisonError::into_inner)[i] = Some(outcome.clone());
            }
        }
        Ok(())
    };
    threads::share(context.budget.threads.min(found), check).into_iter().collect::<Result<()>>()?;
    let trusted = trusted.into_inner().unwrap_or_else(PoisonError::into_inner);
    if found > 0 {
        let kept = || plan.files.iter().zip(&trusted).filter(|(_, outcome)| outcome.is_some());
        let tensors = kept().flat_map(|(file, _)| &plan.tensors[file.tensors.clone()]);
        context.progress.resumed(kept().count(), tensors.map(|tensor| tensor.source_len()).sum());
    }
    Ok(trusted)
}

fn is_unchanged(
    staging: &Staging,
    plan: &Plan,
    file: usize,
    outcome: &FileOutcome,
    context: ExecutionContext<'_>,
    buffer: &mut [u8],
) -> Result<bool> {
    let planned = &plan.files[file];
    let tensors = &plan.tensors[planned.tensors.clone()];
    let location = staging.ready(&planned.name);
    let path = location.path();
    if !location.is_file().at(path, "look at it")? {
        return Ok(false);
    }
    let file = location.open().at(path, "open it")?;
    let len = file.identity().at(path, "look at it")?.len;
    let is_whole = |(tensor, outcome): (&PlannedTensor, &TensorOutcome)| {
        let has_statistics = outcome.statistics.is_some() == tensor.quantized_from().is_some();
        outcome.sha256.len() == tensor.outputs.len() && has_statistics
    };
    if len != planned.len
        || outcome.tensors.len() != tensors.len()
        || !tensors.iter().zip(&outcome.tensors).all(is_whole)
    {
        return Ok(false);
    }
    let keep_going = || !context.interrupt.load(Ordering::Relaxed);
    let hash = hash_range(&*file, 0, len, buffer, keep_going).at(path, "read it back")?;
    hash.map(|hash| hash == outcome.sha256).ok_or(Error::Interrupted)
}
