//! Tensors that one thread hashes one after the other, apart from their file.

use std::ops::Range;
use std::sync::Arc;

use super::Hashing;
use super::active_file::ActiveFile;
use super::shared_file::{CHUNK, Chunk};
use crate::error::Result;
use crate::kernel::sha256::{Sha256Stream, update_two};
use crate::store::Sha256Hash;

/// A run of tensors, and how far they are hashed.
pub(super) struct Lane<'a> {
    file: Arc<ActiveFile<'a>>,
    /// Those that aren't done; the first is being hashed.
    tensors: Range<usize>,
    stream: Sha256Stream,
    /// The offset in the file that comes next.
    at: u64,
    /// The chunk that was read last, and its number.
    chunk: Option<(u64, Chunk)>,
}

impl<'a> Lane<'a> {
    pub(super) fn new(file: Arc<ActiveFile<'a>>, tensors: Range<usize>) -> Lane<'a> {
        let at = file.tensors[tensors.start].place.start;
        file.file.count_lane(true);
        Lane { file, tensors, stream: Sha256Stream::new(), at, chunk: None }
    }

    fn is_done(&self) -> bool {
        self.tensors.is_empty()
    }

    /// How many bytes of the tensor are in memory, once the next of them are.
    fn read(&mut self) -> Result<usize> {
        let number = self.at / CHUNK;
        if self.chunk.as_ref().is_none_or(|(held, _)| *held != number) {
            self.give_back();
            self.chunk = Some((number, self.file.file.chunk(number)?));
        }
        let end = self.file.tensors[self.tensors.start].place.end.min((number + 1) * CHUNK);
        Ok((end - self.at) as usize)
    }

    /// The tensor's stream, and the next bytes for it: as many as [`read`](Self::read) says, or fewer.
    fn next(&mut self, len: usize) -> (&mut Sha256Stream, &[u8]) {
        let start = (self.at % CHUNK) as usize;
        let chunk = self.chunk.as_ref().map_or(&[][..], |(_, chunk)| chunk);
        (&mut self.stream, &chunk[start..start + len])
    }

    /// So many bytes were hashed.
    fn advance(&mut self, len: usize, hashing: &Hashing<'a>) {
        self.at += len as u64;
        let tensor = &self.file.tensors[self.tensors.start];
        if self.at < tensor.place.end {
            return;
        }
        let hash = Sha256Hash(std::mem::take(&mut self.stream).finish());
        hashing.compare(self.file.job, Some(&tensor.name), hash, tensor.sha256);
        self.tensors.start += 1;
        if !self.is_done() {
            self.at = self.file.tensors[self.tensors.start].place.start;
        }
    }

    fn give_back(&mut self) {
        self.chunk.take().into_iter().for_each(|(_, chunk)| self.file.file.give_back(chunk));
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.give_back();
        self.file.file.count_lane(false);
    }
}

impl<'a> Hashing<'a> {
    /// Hashes the tensors of a lane, and of a second one beside it as long as no other thread has time for those.
    pub(super) fn hash_tensors(&self, lane: Lane<'a>) -> Result<()> {
        let mut lanes = vec![lane];
        loop {
            self.check_going()?;
            lanes.retain(|lane| !lane.is_done());
            if lanes.len() == 1 {
                lanes.extend(self.second_lane());
            }
            match &mut lanes[..] {
                [] => return Ok(()),
                [lane] => {
                    let len = lane.read()?;
                    let (stream, bytes) = lane.next(len);
                    stream.update(bytes);
                    lane.advance(len, self);
                }
                [one, other, ..] => {
                    let len = one.read()?.min(other.read()?);
                    let ((a, bytes_a), (b, bytes_b)) = (one.next(len), other.next(len));
                    update_two(a, bytes_a, b, bytes_b);
                    one.advance(len, self);
                    other.advance(len, self);
                }
            }
        }
    }
}
