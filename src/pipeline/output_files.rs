//! The output file that a thread has in hand.

use std::sync::Arc;

use super::Execution;
use super::frontier::Watcher;
use super::scheduler::Scheduler;
use super::stream::FileStream;
use super::trace::{Span, Stamp, Subject, ThreadTrace};
use crate::error::{Error, Result};

/// Takes what a thread makes to its file.
pub(crate) struct OutputFiles<'j, 'a> {
    execution: &'j Execution<'a>,
    scheduler: &'j Scheduler<'a>,
    trace: &'j ThreadTrace<'a>,
    in_hand: Option<(usize, Arc<FileStream<'a>>)>,
}

impl<'j, 'a> OutputFiles<'j, 'a> {
    pub(crate) fn new(
        execution: &'j Execution<'a>,
        scheduler: &'j Scheduler<'a>,
        trace: &'j ThreadTrace<'a>,
    ) -> OutputFiles<'j, 'a> {
        OutputFiles { execution, scheduler, trace, in_hand: None }
    }

    /// The plan's file that is in hand.
    pub(crate) fn in_hand(&self) -> Option<usize> {
        self.in_hand.as_ref().map(|(file, _)| *file)
    }

    /// The thread's part of the trace.
    pub(crate) fn trace(&self) -> &ThreadTrace<'a> {
        self.trace
    }

    /// Turns to the plan's `file`th; what is put goes there.
    pub(crate) fn turn_to(&mut self, file: usize) -> Result<()> {
        if self.in_hand() != Some(file) {
            self.in_hand = Some((file, self.execution.stream(file)?));
        }
        Ok(())
    }

    /// Puts `bytes` at `offset` of the file in hand.
    pub(crate) fn put(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let none = || Error::internal(format!("{} bytes for an output file that isn't open", bytes.len()));
        let (file, stream) = self.in_hand.as_ref().ok_or_else(none)?;
        let watcher = Told { scheduler: self.scheduler, trace: self.trace, file: *file };
        if let Some(hashes) = stream.put(bytes, offset, &watcher)? {
            self.scheduler.hashed(*file, hashes);
        }
        Ok(())
    }
}

/// Tells the scheduler and the trace of a file.
struct Told<'s, 'a> {
    scheduler: &'s Scheduler<'a>,
    trace: &'s ThreadTrace<'a>,
    file: usize,
}

impl Watcher for Told<'_, '_> {
    fn reached(&self, at: u64) {
        self.scheduler.reached(self.file, at);
    }

    fn written(&self, offset: u64, len: u64) {
        self.scheduler.write_back(self.file, offset, len);
    }

    fn stopped(&self) -> bool {
        self.scheduler.stopped()
    }

    fn begin(&self) -> Stamp {
        self.trace.begin()
    }

    fn end(&self, begin: Stamp, span: Span, bytes: usize) {
        self.trace.end(begin, span, Subject::Output(self.file), bytes as u64);
    }
}
