//! An output file that is written and hashed from its first byte to its last, by whichever thread has the next piece.
//!
//! The thread that brings the piece at the frontier writes and hashes it out of its own buffer, and then whatever waits
//! behind it. A piece that comes early waits in memory; if there is no room, it is written where it belongs, and read back
//! once the frontier gets there. So no thread waits for another here, and no order of pieces takes more memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Output;
use super::frontier::{Frontier, Part};
use super::trace::{Span, Stamp};
use crate::error::Result;
use crate::kernel::sha256::Sha256Stream;
use crate::plan::{Plan, PlannedFile, PlannedTensor};
use crate::store::Sha256Hash;

/// Pieces below this are left to the thread at the frontier, which gathers them.
pub(super) const SMALL: usize = 128 << 10;

/// A file of the plan, being written.
pub(crate) struct FileStream<'a> {
    planned: &'a PlannedFile,
    tensors: &'a [PlannedTensor],
    output: Arc<dyn Output + 'a>,
    /// The outputs of the file's tensors, in the order of their bytes.
    parts: Arc<[Part]>,
    /// Bytes that may wait in memory.
    window: usize,
    /// The first byte that isn't hashed.
    reached: AtomicU64,
    /// Held by the thread that writes ahead of the frontier: two writers of a file are as fast as any number.
    early_writer: Mutex<()>,
    state: Mutex<State<'a>>,
}

#[derive(Default)]
struct State<'a> {
    /// Pieces ahead of the frontier, by their first byte.
    waiting: BTreeMap<u64, Piece>,
    /// Bytes of them.
    held: usize,
    /// Ranges, by their first byte, that are in the file, not hashed, and no longer in memory.
    written: BTreeMap<u64, u64>,
    /// Taken by the thread that moves it.
    frontier: Option<Box<Frontier<'a>>>,
}

/// A piece that waits, all of it of one output.
pub(super) struct Piece {
    pub bytes: Vec<u8>,
    /// Whether the file has it.
    pub is_written: bool,
    /// The hash of the output, if the piece is all of it and it is known.
    pub sha256: Option<Sha256Hash>,
}

/// What a file that is written hashes to.
#[derive(Debug)]
pub(crate) struct FileHashes {
    /// All of it.
    pub sha256: Sha256Hash,
    /// The outputs of each of its tensors.
    pub tensors: Vec<Vec<Sha256Hash>>,
}

/// Who is told while a file is written.
pub(crate) trait Watcher {
    /// All bytes before `at` are written and hashed.
    fn reached(&self, at: u64);
    /// So many bytes from an offset on have been written.
    fn written(&self, offset: u64, len: u64);
    /// Whether to stop.
    fn stopped(&self) -> bool;
    /// The calling thread begins with something.
    fn begin(&self) -> Stamp;
    /// It has done it, with so many bytes of the file.
    fn end(&self, begin: Stamp, span: Span, bytes: usize);
}

/// What comes at the frontier.
enum Next {
    Piece(Piece),
    /// So many bytes that are in the file.
    Written(u64),
}

impl<'a> FileStream<'a> {
    /// A file of `plan`, of which nothing is written; up to `window` bytes of it may wait in memory.
    pub(crate) fn new(
        plan: &'a Plan,
        planned: &'a PlannedFile,
        output: Arc<dyn Output + 'a>,
        window: usize,
    ) -> FileStream<'a> {
        let tensors = &plan.tensors[planned.tensors.clone()];
        let parts = Part::all(tensors);
        let frontier = Frontier::new(tensors, parts.clone(), planned.header(tensors));
        let reached = AtomicU64::new(planned.header_len);
        let state = Mutex::new(State { frontier: Some(Box::new(frontier)), ..State::default() });
        let early_writer = Mutex::new(());
        FileStream { planned, tensors, output, parts, window, reached, early_writer, state }
    }

    /// The file.
    pub(crate) fn output(&self) -> &dyn Output {
        &*self.output
    }

    /// The first byte that isn't hashed yet.
    pub(crate) fn reached(&self) -> u64 {
        self.reached.load(Ordering::Acquire)
    }

    /// Takes `bytes` of an output, which belong at `offset`; gives the hashes once the file is complete.
    ///
    /// # Errors
    /// Those of the disk; [`Error::Stopped`](crate::error::Error::Stopped).
    pub(crate) fn put(&self, bytes: &[u8], offset: u64, watcher: &dyn Watcher) -> Result<Option<FileHashes>> {
        let mut state = self.lock();
        let is_next = offset == self.reached() && state.frontier.is_some();
        if !is_next && !bytes.is_empty() {
            state = self.put_early(state, bytes, offset, watcher)?;
        }
        let Some(mut frontier) = state.frontier.take() else { return Ok(None) };
        let mut next = match is_next {
            true => None,
            false => state.next(self.reached()),
        };
        drop(state);
        if is_next {
            frontier.pass(self.output(), bytes, watcher)?;
        }
        loop {
            match next.take() {
                Some(Next::Piece(piece)) => frontier.pass_piece(self.output(), &piece, watcher)?,
                Some(Next::Written(len)) => frontier.read_back(self.output(), len, watcher)?,
                None => {}
            }
            self.reached.store(frontier.at(), Ordering::Release);
            watcher.reached(frontier.at());
            if frontier.at() == self.planned.len {
                return frontier.finish(self.output(), watcher).map(Some);
            }
            let mut state = self.lock();
            next = state.next(frontier.at());
            if next.is_none() {
                state.frontier = Some(frontier);
                return Ok(None);
            }
        }
    }

    /// Keeps a piece until the frontier gets there: in memory, or in the file.
    fn put_early<'s>(
        &'s self,
        mut state: MutexGuard<'s, State<'a>>,
        bytes: &[u8],
        offset: u64,
        watcher: &dyn Watcher,
    ) -> Result<MutexGuard<'s, State<'a>>> {
        let has_room = state.held + bytes.len() <= self.window;
        // The thread at the frontier is behind: this one does for it what it can.
        let is_far = offset > self.reached() + self.window as u64 / 4;
        let helps = has_room && is_far && state.frontier.is_none() && bytes.len() >= SMALL;
        state.held += if has_room { bytes.len() } else { 0 };
        drop(state);
        let sha256 = (helps && self.is_whole(offset, bytes.len())).then(|| hash(bytes, watcher));
        let is_written = match self.early_writer.try_lock() {
            Ok(_writer) if helps => self.write_early(bytes, offset, watcher).map(|()| true)?,
            _ => false,
        };
        if !has_room {
            self.write_early(bytes, offset, watcher)?;
        }
        let piece = has_room.then(|| Piece { bytes: bytes.to_vec(), is_written, sha256 });
        let mut state = self.lock();
        match piece {
            Some(piece) => drop(state.waiting.insert(offset, piece)),
            None => state.leave_in_file(offset, bytes.len() as u64),
        }
        Ok(state)
    }

    fn write_early(&self, bytes: &[u8], offset: u64, watcher: &dyn Watcher) -> Result<()> {
        let begin = watcher.begin();
        self.output.write_at(bytes, offset)?;
        watcher.end(begin, Span::Write, bytes.len());
        Ok(())
    }

    /// Whether an output has exactly these bytes.
    fn is_whole(&self, offset: u64, len: usize) -> bool {
        let next = self.parts.partition_point(|part| part.of(self.tensors).offset < offset);
        let here = self.parts[next..].iter().map(|part| part.of(self.tensors));
        here.take_while(|output| output.offset == offset).any(|output| output.len == len as u64)
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State<'_> {
    /// Adds a range to those that are in the file, in one with what it touches.
    fn leave_in_file(&mut self, mut offset: u64, mut len: u64) {
        len += self.written.remove(&(offset + len)).unwrap_or(0);
        if let Some((&before, &before_len)) = self.written.range(..offset).next_back()
            && before + before_len == offset
        {
            (offset, len) = (before, before_len + len);
        }
        self.written.insert(offset, len);
    }

    fn next(&mut self, at: u64) -> Option<Next> {
        if let Some(piece) = self.waiting.remove(&at) {
            self.held -= piece.bytes.len();
            return Some(Next::Piece(piece));
        }
        self.written.remove(&at).map(Next::Written)
    }
}

fn hash(bytes: &[u8], watcher: &dyn Watcher) -> Sha256Hash {
    let begin = watcher.begin();
    let mut stream = Sha256Stream::new();
    stream.update(bytes);
    let hash = Sha256Hash(stream.finish());
    watcher.end(begin, Span::Hash, bytes.len());
    hash
}

#[cfg(test)]
mod tests;
