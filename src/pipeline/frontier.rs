//! Where an output file has been written and hashed to: the file's own hash, and those of the tensors in it, in one pass.

use std::sync::Arc;

use super::Output;
use super::trace::{Span, Stamp};
use crate::error::{Error, IoContext, Result};
use crate::kernel::sha256::{Pairing, Sha256Stream};
use crate::plan::{Part, PlannedFile, PlannedTensor};
use crate::store::{Sha256Hash, read_exact_at};

/// Pieces below this are left to the thread at the frontier, which gathers them.
pub(super) const SMALL: usize = 128 << 10;

/// Bytes after which the disk is given what was written.
const WRITEBACK: u64 = 8 << 20;

/// What is written to again isn't given to the disk: any system's pages are this long, or shorter.
const PAGE: u64 = 64 << 10;

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
    pub tensors: Vec<Box<[Sha256Hash]>>,
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

/// The hashes of all bytes before it.
pub(super) struct Frontier<'a> {
    tensors: &'a [PlannedTensor],
    parts: Arc<[Part]>,
    /// The file's first byte that isn't hashed.
    at: u64,
    pairing: Pairing,
    file: Sha256Stream,
    /// Of the output that it is in.
    part: Sha256Stream,
    /// That output's place among the parts.
    next: usize,
    /// That output's bytes after it.
    left: u64,
    /// The hashes of the outputs before it, by tensor.
    hashes: Vec<Box<[Sha256Hash]>>,
    /// Bytes before it that aren't written yet.
    gathered: Vec<u8>,
    /// Bytes that are gathered, or read back at once.
    buffer: usize,
    /// How far the disk was given what is written.
    given: u64,
}

impl<'a> Frontier<'a> {
    /// At the file's first byte.
    pub(super) fn new(tensors: &'a [PlannedTensor], parts: Arc<[Part]>, buffer: usize) -> Frontier<'a> {
        let hashes = tensors.iter().map(|tensor| vec![Sha256Hash([0; 32]); tensor.outputs.len()].into()).collect();
        let left = parts.first().map_or(0, |part| part.of(tensors).len);
        let (file, part, pairing) = (Sha256Stream::new(), Sha256Stream::new(), Pairing::detect());
        let gathered = Vec::new();
        Frontier { tensors, parts, at: 0, pairing, file, part, next: 0, left, hashes, gathered, buffer, given: 0 }
    }

    /// Writes and hashes the header, if that isn't done yet.
    pub(super) fn pass_header(
        &mut self,
        planned: &PlannedFile,
        output: &dyn Output,
        watcher: &dyn Watcher,
    ) -> Result<()> {
        if self.at > 0 {
            return Ok(());
        }
        let (tensors, parts) = (self.tensors, self.parts.clone());
        planned.write_header(tensors, &parts, &mut |text| {
            self.write(output, text, watcher)?;
            self.file.update(text);
            self.at += text.len() as u64;
            self.give(watcher)
        })?;
        self.end_parts();
        Ok(())
    }

    /// The file's first byte that isn't hashed.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Writes and hashes the bytes that come next.
    pub(super) fn pass(&mut self, output: &dyn Output, bytes: &[u8], watcher: &dyn Watcher) -> Result<()> {
        self.write(output, bytes, watcher)?;
        self.hash(bytes, watcher);
        self.give(watcher)
    }

    /// The same for a piece that has waited.
    pub(super) fn pass_piece(&mut self, output: &dyn Output, piece: &Piece, watcher: &dyn Watcher) -> Result<()> {
        let Piece { bytes, is_written, sha256 } = piece;
        match is_written {
            true => self.write_gathered(output, 0, watcher)?,
            false => self.write(output, bytes, watcher)?,
        }
        match *sha256 {
            None => self.hash(bytes, watcher),
            Some(sha256) => {
                let begin = watcher.begin();
                self.file.update(bytes);
                watcher.end(begin, Span::Hash, bytes.len());
                self.at += bytes.len() as u64;
                self.end_part(sha256);
                self.end_parts();
            }
        }
        self.give(watcher)
    }

    /// Hashes the next `len` bytes, which are in the file.
    pub(super) fn read_back(&mut self, output: &dyn Output, len: u64, watcher: &dyn Watcher) -> Result<()> {
        self.write_gathered(output, 0, watcher)?;
        let mut buffer = vec![0; self.buffer.min(usize::try_from(len).unwrap_or(usize::MAX))];
        let end = self.at + len;
        while self.at < end {
            let piece = &mut buffer[..self.buffer.min(usize::try_from(end - self.at).unwrap_or(usize::MAX))];
            let begin = watcher.begin();
            read_exact_at(output.file(), piece, self.at).at(output.path(), "read it back")?;
            watcher.end(begin, Span::Read, piece.len());
            self.hash(piece, watcher);
            self.give(watcher)?;
        }
        Ok(())
    }

    /// The hashes, at the file's end.
    pub(super) fn finish(mut self: Box<Self>, output: &dyn Output, watcher: &dyn Watcher) -> Result<FileHashes> {
        self.write_gathered(output, 0, watcher)?;
        if self.next < self.parts.len() {
            return Err(Error::internal(format!(
                "{}: its end came before all of its tensors",
                output.path().display()
            )));
        }
        Ok(FileHashes { sha256: Sha256Hash(self.file.finish()), tensors: self.hashes })
    }

    /// Takes the bytes that come next into the hashes.
    fn hash(&mut self, mut bytes: &[u8], watcher: &dyn Watcher) {
        let (begin, len) = (watcher.begin(), bytes.len());
        self.at += bytes.len() as u64;
        while !bytes.is_empty() && self.left > 0 {
            let (here, rest) = bytes.split_at(bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX)));
            self.pairing.update(&mut self.file, here, &mut self.part, here);
            self.left -= here.len() as u64;
            bytes = rest;
            self.end_parts();
        }
        watcher.end(begin, Span::Hash, len);
    }

    /// Turns to the next output that has bytes, if all of this one's are hashed.
    fn end_parts(&mut self) {
        while self.left == 0 && self.next < self.parts.len() {
            let part = std::mem::take(&mut self.part);
            self.end_part(Sha256Hash(part.finish()));
        }
    }

    fn end_part(&mut self, sha256: Sha256Hash) {
        let Part { tensor, output } = self.parts[self.next];
        self.hashes[tensor as usize][output as usize] = sha256;
        self.next += 1;
        self.left = self.parts.get(self.next).map_or(0, |part| part.of(self.tensors).len);
    }

    /// Writes the bytes that come next, or gathers them.
    fn write(&mut self, output: &dyn Output, bytes: &[u8], watcher: &dyn Watcher) -> Result<()> {
        if bytes.len() < SMALL {
            self.gathered.extend_from_slice(bytes);
            return match self.gathered.len() >= self.buffer {
                true => self.write_gathered(output, bytes.len(), watcher),
                false => Ok(()),
            };
        }
        self.write_gathered(output, 0, watcher)?;
        let begin = watcher.begin();
        output.write_at(bytes, self.at)?;
        watcher.end(begin, Span::Write, bytes.len());
        Ok(())
    }

    /// Writes what is gathered; of that, so many bytes are not counted in [`Frontier::at`] yet.
    fn write_gathered(&mut self, output: &dyn Output, ahead: usize, watcher: &dyn Watcher) -> Result<()> {
        if !self.gathered.is_empty() {
            let begin = watcher.begin();
            output.write_at(&self.gathered, self.at + ahead as u64 - self.gathered.len() as u64)?;
            watcher.end(begin, Span::Write, self.gathered.len());
            self.gathered.clear();
        }
        Ok(())
    }

    /// Tells of what was written, from time to time.
    fn give(&mut self, watcher: &dyn Watcher) -> Result<()> {
        let written = (self.at - self.gathered.len() as u64) / PAGE * PAGE;
        if written.saturating_sub(self.given) >= WRITEBACK {
            watcher.written(self.given, written - self.given);
            self.given = written;
        }
        if watcher.stopped() { Err(Error::Stopped) } else { Ok(()) }
    }
}
