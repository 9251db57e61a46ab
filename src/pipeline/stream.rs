//! An output file that is written and hashed from its first byte to its last, by whichever thread has the next piece.
//!
//! The thread that brings the piece at the frontier writes and hashes it out of its own buffer, and then whatever waits
//! behind it. A piece that comes early waits in memory; if there is no room, it is written where it belongs, and read back
//! once the frontier gets there. So no thread waits for another here, and no order of pieces takes more memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Output;
use super::frontier::{FileHashes, Frontier, Piece, SMALL, Watcher};
use super::trace::Span;
use crate::error::Result;
use crate::kernel::sha256::{FREE, Sha256Stream, second_stream_cost};
use crate::plan::{Part, Plan, PlannedFile, PlannedTensor};
use crate::store::Sha256Hash;

/// A file of the plan, being written.
pub(crate) struct FileStream<'a> {
    planned: &'a PlannedFile,
    tensors: &'a [PlannedTensor],
    output: Arc<dyn Output + 'a>,
    /// The outputs of the file's tensors, in the order of their bytes.
    parts: Arc<[Part]>,
    memory: StreamMemory<'a>,
    /// Whether the thread at the frontier is faster where others hash tensors for it.
    hashes_apart: bool,
    /// Held by the thread that writes ahead of the frontier: two writers of a file are as fast as any number.
    early_writer: Mutex<()>,
    state: Mutex<State<'a>>,
}

/// Memory for pieces that wait.
#[derive(Clone, Copy)]
pub(crate) struct StreamMemory<'a> {
    /// Bytes of a file's pieces; no piece waits in memory that lies further ahead than this.
    pub window: usize,
    /// Bytes of all files' pieces.
    pub of_all: usize,
    /// What all files' pieces take now.
    pub held: &'a AtomicUsize,
    /// Bytes of small pieces that are gathered before they are written, and of a file that are read back at once.
    pub buffer: usize,
}

/// What a piece that waits takes beside its bytes, about.
const PIECE: usize = 128;

/// A piece of fewer bytes waits however far ahead it lies: writing it by itself would cost more.
const TINY: usize = 4 << 10;

#[derive(Default)]
struct State<'a> {
    /// The first byte that isn't hashed, as far as the others know.
    reached: u64,
    /// Pieces ahead of the frontier, by their first byte.
    waiting: BTreeMap<u64, Piece>,
    /// What they take.
    held: usize,
    /// Ranges, by their first byte, that are in the file, not hashed, and no longer in memory.
    written: BTreeMap<u64, u64>,
    /// Taken by the thread that moves it.
    frontier: Option<Box<Frontier<'a>>>,
}

/// What comes at the frontier.
enum Next {
    Piece(Piece),
    /// So many bytes that are in the file.
    Written(u64),
}

impl<'a> FileStream<'a> {
    /// A file of `plan`, of which nothing is written.
    pub(crate) fn new(
        plan: &'a Plan,
        planned: &'a PlannedFile,
        output: Arc<dyn Output + 'a>,
        memory: StreamMemory<'a>,
    ) -> FileStream<'a> {
        let tensors = &plan.tensors[planned.tensors.clone()];
        let parts: Arc<[Part]> = Part::all(tensors).into();
        let frontier = Some(Box::new(Frontier::new(tensors, parts.clone(), memory.buffer)));
        let state = Mutex::new(State { reached: planned.header_len, frontier, ..State::default() });
        let early_writer = Mutex::new(());
        let hashes_apart = second_stream_cost() >= FREE;
        FileStream { planned, tensors, output, parts, memory, hashes_apart, early_writer, state }
    }

    /// The file.
    pub(crate) fn output(&self) -> &dyn Output {
        &*self.output
    }

    /// Takes `bytes` of an output, which belong at `offset`; gives the hashes once the file is complete.
    ///
    /// # Errors
    /// Those of the disk; [`Error::Stopped`](crate::error::Error::Stopped).
    pub(crate) fn put(&self, bytes: &[u8], offset: u64, watcher: &dyn Watcher) -> Result<Option<FileHashes>> {
        let mut state = self.lock();
        let is_next = offset == state.reached && state.frontier.is_some();
        if !is_next && !bytes.is_empty() {
            state = self.put_early(state, bytes, offset, watcher)?;
        }
        let Some(mut frontier) = state.frontier.take() else { return Ok(None) };
        let mut next = if is_next { None } else { state.next() };
        drop(state);
        frontier.pass_header(self.planned, self.output(), watcher)?;
        if is_next {
            frontier.pass(self.output(), bytes, watcher)?;
        }
        loop {
            match &next {
                Some(Next::Piece(piece)) => frontier.pass_piece(self.output(), piece, watcher)?,
                Some(Next::Written(len)) => frontier.read_back(self.output(), *len, watcher)?,
                None => {}
            }
            watcher.reached(frontier.at());
            let mut state = self.lock();
            state.reached = frontier.at();
            if let Some(Next::Piece(piece)) = next.take() {
                self.let_go(&mut state, piece.bytes.len());
            }
            if frontier.at() == self.planned.len {
                drop(state);
                return frontier.finish(self.output(), watcher).map(Some);
            }
            next = state.next();
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
        let window = self.memory.window as u64;
        let is_near = offset + bytes.len() as u64 <= state.reached + window || bytes.len() <= TINY;
        if !is_near || !self.hold(&mut state, bytes.len()) {
            drop(state);
            self.write_early(bytes, offset, watcher)?;
            let mut state = self.lock();
            state.leave_in_file(offset, bytes.len() as u64);
            return Ok(state);
        }
        // The thread at the frontier is behind: this one does for it what it can.
        let helps = offset > state.reached + window / 4 && state.frontier.is_none() && bytes.len() >= SMALL;
        drop(state);
        let hashes = helps && self.hashes_apart && self.is_whole(offset, bytes.len());
        let sha256 = hashes.then(|| hash(bytes, watcher));
        let is_written = match self.early_writer.try_lock() {
            Ok(_writer) if helps => self.write_early(bytes, offset, watcher).map(|()| true)?,
            _ => false,
        };
        let piece = Piece { bytes: bytes.to_vec(), is_written, sha256 };
        let mut state = self.lock();
        state.waiting.insert(offset, piece);
        Ok(state)
    }

    /// Takes memory for a piece of so many bytes, if there is some.
    fn hold(&self, state: &mut State<'a>, len: usize) -> bool {
        let (len, StreamMemory { window, of_all, held, .. }) = (len + PIECE, self.memory);
        if state.held + len > window {
            return false;
        }
        if held.fetch_add(len, Ordering::Relaxed) + len > of_all {
            held.fetch_sub(len, Ordering::Relaxed);
            return false;
        }
        state.held += len;
        true
    }

    fn let_go(&self, state: &mut State<'a>, len: usize) {
        state.held -= len + PIECE;
        self.memory.held.fetch_sub(len + PIECE, Ordering::Relaxed);
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

    /// What was put where the frontier is.
    fn next(&mut self) -> Option<Next> {
        match self.waiting.remove(&self.reached) {
            Some(piece) => Some(Next::Piece(piece)),
            None => self.written.remove(&self.reached).map(Next::Written),
        }
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
