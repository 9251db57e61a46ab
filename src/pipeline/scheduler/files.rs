//! Which of the files in progress a thread takes its next task from.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Scheduler, State, Task};
use crate::pipeline::FileOutcome;
use crate::plan::PlannedFile;
use crate::stats::{AbsmaxAccumulator, StatsAccumulator};
use crate::store::Sha256Hash;

/// An output file on its way.
#[derive(Default)]
pub(super) struct FileState {
    /// It was there before, and nothing of it is to be done.
    pub was_sealed: bool,
    /// It was its turn, and it isn't sealed.
    pub is_begun: bool,
    /// What comes next of it: a tensor, and how many of its bytes were handed out already.
    pub next: (usize, u64),
    /// Tasks of it that were handed out and aren't done.
    pub running: usize,
    pub tensors_left: usize,
    pub sha256: Option<Sha256Hash>,
    pub total: StatsAccumulator,
    pub total_absmax: AbsmaxAccumulator,
}

impl FileState {
    /// Of which nothing is there.
    pub(super) fn new(planned: &PlannedFile) -> FileState {
        let next = (planned.tensors.start, 0);
        FileState { next, tensors_left: planned.tensors.len(), ..FileState::default() }
    }

    /// Of which all is there.
    pub(super) fn sealed(planned: &PlannedFile, outcome: FileOutcome) -> FileState {
        let FileOutcome { sha256, total, total_absmax, .. } = outcome;
        let next = (planned.tensors.end, 0);
        FileState { was_sealed: true, next, sha256: Some(sha256), total, total_absmax, ..FileState::default() }
    }
}

impl Scheduler<'_> {
    /// Notes how far a file is written and hashed.
    pub(crate) fn reached(&self, file: usize, at: u64) {
        self.reached[file].store(at, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            // Not between a thread's look at the state and its waiting. There is room for about one more task.
            drop(self.lock());
            self.changed.notify_one();
        }
    }

    /// After a while, what comes next of each file in progress: tensor, and how many of its bytes were handed out; `None` once
    /// nothing more is read.
    pub(crate) fn soon(&self, after: Duration) -> Option<Vec<(usize, (usize, u64))>> {
        let state = self.lock();
        let mut state = self.ended.wait_timeout(state, after).unwrap_or_else(PoisonError::into_inner).0;
        let next = state.active.iter().map(|&file| (file, state.files[file].next));
        let next: Vec<_> = next.filter(|&(file, (tensor, _))| tensor < self.plan.files[file].tensors.end).collect();
        let is_read_out = next.is_empty() && state.next_file == self.plan.files.len();
        (self.goes_on(&mut state) && !is_read_out).then_some(next)
    }

    /// The file whose turn a task is, if it was handed out as part of one.
    pub(super) fn turn_of(&self, task: &Task) -> Option<usize> {
        match task {
            Task::Chunk { tensor, .. } | Task::Nested { tensor, .. } => Some(self.file_of[*tensor]),
            Task::Set { file, .. } => Some(*file),
            Task::Measure { .. } | Task::HashSource { .. } => None,
        }
    }

    /// Begins with further files, while fewer are in progress, and wait for the disk, than may.
    pub(super) fn fill_active(&self, state: &mut State) {
        let State { active, files, .. } = state;
        active.retain(|&file| files[file].next.0 < self.plan.files[file].tensors.end);
        while state.active.len() < self.context.budget.files
            && state.begun < self.most_begun
            && state.next_file < self.plan.files.len()
        {
            let file = state.next_file;
            state.next_file += 1;
            self.skip_taken(state, file);
            if state.files[file].next.0 < self.plan.files[file].tensors.end {
                state.active.push(file);
                state.files[file].is_begun = true;
                state.begun += 1;
            }
        }
    }

    /// Files in progress that can give a task: the one that the thread has in hand first, then those with the fewest threads.
    pub(super) fn by_preference(&self, state: &State, in_hand: Option<usize>) -> Vec<usize> {
        let mut files: Vec<usize> =
            state.active.iter().copied().filter(|&file| !self.is_far_ahead(state, file)).collect();
        files.sort_by_key(|&file| (Some(file) != in_hand, state.files[file].running, file));
        files
    }

    /// Whether more of a file is on its way than may wait to be written and hashed.
    fn is_far_ahead(&self, state: &State, file: usize) -> bool {
        let FileState { next: (tensor, offset), running, .. } = state.files[file];
        let planned = &self.plan.tensors[tensor];
        // What stands at the file's end waits anyway.
        let Some(first) = planned.outputs.iter().find(|output| !output.is_at_the_end()) else { return false };
        let ratio = offset as f64 / planned.source_len().max(1) as f64;
        let next = first.offset + (first.len as f64 * ratio) as u64;
        running > 0 && next > self.reached[file].load(Ordering::SeqCst) + self.context.budget.file_window()
    }

    /// Passes over tensors that were handed out with others of their set.
    pub(super) fn skip_taken(&self, state: &mut State, file: usize) {
        let end = self.plan.files[file].tensors.end;
        let mut tensor = state.files[file].next.0;
        while tensor < end && state.taken.remove(&tensor) {
            tensor += 1;
            state.files[file].next = (tensor, 0);
        }
    }

    /// Of the source's files, in their order, so many were handed out.
    pub(super) fn source_files_handed_out(&self, state: &State) -> usize {
        let next = state.active.iter().map(|&file| state.files[file].next.0);
        let further = self.plan.files.get(state.next_file).map(|file| file.tensors.start);
        let files = next.chain(further).filter_map(|tensor| Some(self.plan.tensors[tensor].read.spans().next()?.file));
        files.min().unwrap_or(self.source_files)
    }
}
