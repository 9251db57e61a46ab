//! The output file that a thread has in hand.

use std::sync::Arc;

use super::Execution;
use super::scheduler::Scheduler;
use super::stream::{FileStream, Watcher};
use crate::error::{Error, Result};

/// Takes what a thread makes to its file.
pub(crate) struct OutputFiles<'j, 'a> {
    execution: &'j Execution<'a>,
    scheduler: &'j Scheduler<'a>,
    in_hand: Option<(usize, Arc<FileStream<'a>>)>,
}

impl<'j, 'a> OutputFiles<'j, 'a> {
    pub(crate) fn new(execution: &'j Execution<'a>, scheduler: &'j Scheduler<'a>) -> OutputFiles<'j, 'a> {
        OutputFiles { execution, scheduler, in_hand: None }
    }

    /// The plan's file that is in hand.
    pub(crate) fn in_hand(&self) -> Option<usize> {
        self.in_hand.as_ref().map(|(file, _)| *file)
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
        let watcher = Told { scheduler: self.scheduler, file: *file };
        if let Some(hashes) = stream.put(bytes, offset, &watcher)? {
            self.scheduler.hashed(*file, hashes);
        }
        Ok(())
    }
}

/// Tells the scheduler of a file.
struct Told<'s, 'a> {
    scheduler: &'s Scheduler<'a>,
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
}
