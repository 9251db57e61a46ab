//! Reading ahead: one thread waits for the disk, so that those that compute don't.
//!
//! The system reads files ahead by itself, but it gives up where several threads read one, each a piece of its own.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::Execution;
use super::scheduler::{Scheduler, StopOnPanic};
use super::source_files::OpenFile;
use super::trace::{self, Subject, ThreadTrace};
use crate::read::{Read, Span};

/// Bytes of the source that are read ahead, of all files in progress together.
const AHEAD: u64 = 64 << 20;

/// Bytes that the system is asked for at once.
const PIECE: u64 = 2 << 20;

/// Bytes of an output file's part of the source that were handed out last, and may still be being read.
const BEHIND: u64 = 64 << 20;

/// While something is read from the disk; and while everything is in memory.
const INTERVALS: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(20)];

/// Reads ahead of what is handed out, and lets go of what was read from the disk, if there is much of it.
pub(super) fn run<'a>(execution: &Execution<'a>, scheduler: &Scheduler<'a>, trace: &ThreadTrace<'a>) {
    let _guard = StopOnPanic(scheduler);
    let mut ahead = ReadAhead { execution, scheduler, trace, files: HashMap::new() };
    let mut interval = INTERVALS[0];
    while let Some(files) = scheduler.soon(interval) {
        let share = AHEAD / files.len().max(1) as u64;
        ahead.forget_others(&files);
        let any_read = files.into_iter().fold(false, |any, (file, next)| ahead.follow(file, next, share) | any);
        interval = INTERVALS[usize::from(!any_read)];
    }
    ahead.forget_others(&[]);
}

struct ReadAhead<'j, 'a> {
    execution: &'j Execution<'a>,
    scheduler: &'j Scheduler<'a>,
    trace: &'j ThreadTrace<'a>,
    /// Output files in progress.
    files: HashMap<usize, Place<'j, 'a>>,
}

/// Where reading ahead has come to in one output file's part of the source.
struct Place<'j, 'a> {
    source: OpenFile<'j, 'a>,
    /// The tensor whose bytes come next, and those of them that weren't asked for.
    tensor: usize,
    pieces: VecDeque<Span>,
    /// Bytes asked for, by tensor, and all of them.
    asked: VecDeque<(usize, u64)>,
    asked_len: u64,
    /// What was read from the disk, by tensor.
    read: VecDeque<(usize, Span)>,
}

impl ReadAhead<'_, '_> {
    /// Keeps `share` bytes ahead of a file's `next`; tells whether the disk was asked for any.
    fn follow(&mut self, file: usize, (tensor, offset): (usize, u64), share: u64) -> bool {
        let plan = self.execution.plan;
        let end = plan.files[file].tensors.end;
        let mut place = self.files.remove(&file).unwrap_or_else(|| Place::new(self.execution));
        if place.tensor < tensor {
            (place.tensor, place.pieces) = (tensor, pieces(&plan.tensors[tensor].read));
        }
        while let Some((_, len)) = place.asked.front().filter(|(asked, _)| *asked < tensor) {
            place.asked_len -= len;
            place.asked.pop_front();
        }
        let planned = &plan.tensors[tensor];
        let part = offset as f64 / planned.source_len().max(1) as f64;
        let handed_out = (stored_len(&planned.read) as f64 * part) as u64;
        let mut any_read = false;
        while place.asked_len < share + handed_out && !self.scheduler.stopped() {
            let Some(span) = place.pieces.pop_front() else {
                if place.tensor + 1 >= end {
                    break;
                }
                place.tensor += 1;
                place.pieces = pieces(&plan.tensors[place.tensor].read);
                continue;
            };
            any_read |= place.ask(span, self.trace);
        }
        if self.execution.crowds_memory {
            place.let_go(tensor, BEHIND);
        }
        self.files.insert(file, place);
        any_read
    }

    /// Drops the places in files of which everything was handed out.
    fn forget_others(&mut self, files: &[(usize, (usize, u64))]) {
        let is_left = |file: &usize| files.iter().any(|(other, _)| other == file);
        let done: Vec<usize> = self.files.keys().copied().filter(|file| !is_left(file)).collect();
        for mut place in done.into_iter().filter_map(|file| self.files.remove(&file)).collect::<Vec<_>>() {
            if self.execution.crowds_memory {
                place.let_go(usize::MAX, 0);
            }
        }
    }
}

impl<'j, 'a> Place<'j, 'a> {
    fn new(execution: &'j Execution<'a>) -> Place<'j, 'a> {
        let (pieces, asked, read) = Default::default();
        Place { source: OpenFile::new(execution), tensor: 0, pieces, asked, asked_len: 0, read }
    }

    /// Asks the disk for bytes that aren't in memory; tells whether there are any. Whoever reads them later says what is wrong,
    /// if anything is.
    fn ask(&mut self, span: Span, trace: &ThreadTrace<'_>) -> bool {
        match self.asked.back_mut() {
            Some((last, len)) if *last == self.tensor => *len += span.len,
            _ => self.asked.push_back((self.tensor, span.len)),
        }
        self.asked_len += span.len;
        let Ok(file) = self.source.get(span.file) else { return false };
        let is_cached = file.is_cached(span.offset) && file.is_cached(span.offset + span.len.saturating_sub(1));
        if !is_cached {
            let begin = trace.begin();
            file.will_read(span.offset, span.len);
            trace.end(begin, trace::Span::Fetch, Subject::Tensor(self.tensor), span.len);
            self.read.push_back((self.tensor, span));
        }
        !is_cached
    }

    /// Lets go of what was read from the disk for tensors before `tensor`, but for the last bytes, so many.
    fn let_go(&mut self, tensor: usize, keep: u64) {
        let before = self.read.iter().take_while(|(read, _)| *read < tensor);
        let mut len = before.map(|(_, span)| span.len).sum::<u64>();
        while len > keep
            && let Some((_, span)) = self.read.pop_front()
        {
            len -= span.len;
            if let Ok(file) = self.source.get(span.file) {
                file.will_not_read(span.offset, span.len);
            }
        }
    }
}

fn stored_len(read: &Read) -> u64 {
    read.spans().map(|span| span.len).sum()
}

/// What of the source is read, in pieces of at most [`PIECE`] bytes.
fn pieces(read: &Read) -> VecDeque<Span> {
    let cut = |span: Span| {
        let starts = (0..span.len).step_by(PIECE as usize);
        starts.map(move |start| Span { offset: span.offset + start, len: PIECE.min(span.len - start), ..span })
    };
    read.spans().flat_map(cut).collect()
}
