//! A file that several threads read: what one of them has read, the others find in memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{IoContext, Result};
use crate::store::{ReadAt, read_exact_at};

/// Bytes that are read at once; a file's last chunk has fewer. More than a few chunks would cost more than the calls that
/// they save: what is copied should still be in the cache when it is hashed.
pub(super) const CHUNK: u64 = 1 << 18;

/// Chunks from the file's front on that are kept in memory.
pub(super) const NEAR: u64 = 16;

/// Chunks behind the front that are kept for lanes, which are slower.
const BEHIND: u64 = 8;

/// Bytes from the front on that the store is told of, so that they are in the page cache when they are read.
const TOLD: u64 = 64 << 20;

/// Bytes that the store is told of at once.
const TELL: u64 = 8 << 20;

/// A chunk's bytes.
pub(super) type Chunk = Arc<Vec<u8>>;

/// An open file, its chunks near the front, and how far its front is: the place where its own hash stands.
pub(super) struct SharedFile {
    bytes: Box<dyn ReadAt>,
    /// For errors.
    path: PathBuf,
    len: u64,
    chunks: Mutex<Chunks>,
    /// A chunk was read, or reading it failed.
    read: Condvar,
    /// Where what the store was told of ends.
    told: AtomicU64,
}

struct Chunks {
    /// The chunk at which the front is; `u64::MAX` once it has passed the file's end.
    front: u64,
    /// Chunks near the front; none while a thread reads it.
    near: BTreeMap<u64, Option<Chunk>>,
    /// Threads that wait for one of them.
    waiting: usize,
    /// Lanes of tensors.
    lanes: usize,
    /// Buffers that nobody uses; the last was used last.
    spare: Vec<Vec<u8>>,
}

impl SharedFile {
    pub(super) fn new(bytes: Box<dyn ReadAt>, path: PathBuf, len: u64) -> SharedFile {
        let chunks = Mutex::new(Chunks { front: 0, near: BTreeMap::new(), waiting: 0, lanes: 0, spare: Vec::new() });
        SharedFile { bytes, path, len, chunks, read: Condvar::new(), told: AtomicU64::new(0) }
    }

    /// Chunks in the file.
    pub(super) fn count(&self) -> u64 {
        self.len.div_ceil(CHUNK)
    }

    /// The bytes of a chunk, in memory already or read now. They go back by [`SharedFile::give_back`].
    pub(super) fn chunk(&self, number: u64) -> Result<Chunk> {
        let mut chunks = self.lock();
        loop {
            match chunks.near.get(&number) {
                Some(Some(chunk)) => return Ok(chunk.clone()),
                Some(None) => {
                    chunks.waiting += 1;
                    chunks = self.read.wait(chunks).unwrap_or_else(PoisonError::into_inner);
                    chunks.waiting -= 1;
                }
                None => return self.read_chunk(chunks, number),
            }
        }
    }

    /// Reads a chunk that the front will need soon; `false` if all of them are there.
    pub(super) fn read_ahead(&self) -> Result<bool> {
        let chunks = self.lock();
        let end = chunks.front.saturating_add(NEAR).min(self.count());
        let Some(missing) = (chunks.front..end).find(|number| !chunks.near.contains_key(number)) else {
            return Ok(false);
        };
        let chunk = self.read_chunk(chunks, missing)?;
        self.give_back(chunk);
        Ok(true)
    }

    /// Tells the store what will be read soon.
    pub(super) fn tell_store(&self) {
        let end = self.near_end(TOLD).min(self.len);
        let mut told = self.told.load(Ordering::Relaxed);
        while told < end {
            let len = TELL.min(self.len - told);
            self.bytes.will_read(told, len);
            told += len;
        }
        self.told.store(told, Ordering::Relaxed);
    }

    /// The front has passed the file's end.
    pub(super) fn finish(&self) {
        self.advance(u64::MAX);
    }

    /// A thread begins to read the file apart from the front, or is done with that.
    pub(super) fn count_lane(&self, begins: bool) {
        let mut chunks = self.lock();
        chunks.lanes = if begins { chunks.lanes + 1 } else { chunks.lanes - 1 };
    }

    /// The front has passed all chunks before this one.
    pub(super) fn advance(&self, front: u64) {
        let mut chunks = self.lock();
        chunks.front = front;
        let first = chunks.first_kept();
        let kept = chunks.near.split_off(&first);
        for chunk in std::mem::replace(&mut chunks.near, kept).into_values().flatten() {
            chunks.keep_buffer(chunk);
        }
        if chunks.waiting > 0 {
            self.read.notify_all();
        }
    }

    /// A chunk isn't used any more.
    pub(super) fn give_back(&self, chunk: Chunk) {
        self.lock().keep_buffer(chunk);
    }

    /// Bytes that the front has still to pass.
    pub(super) fn rest(&self) -> u64 {
        self.len.saturating_sub(self.lock().front.saturating_mul(CHUNK))
    }

    /// Whether `offset` is behind the front, or so near to it that what is read there serves both.
    pub(super) fn is_near(&self, offset: u64) -> bool {
        offset < self.near_end(NEAR * CHUNK)
    }

    fn near_end(&self, len: u64) -> u64 {
        self.lock().front.saturating_mul(CHUNK).saturating_add(len)
    }

    fn read_chunk(&self, mut chunks: MutexGuard<'_, Chunks>, number: u64) -> Result<Chunk> {
        let is_near = (chunks.first_kept()..chunks.front.saturating_add(NEAR)).contains(&number);
        if is_near {
            chunks.near.insert(number, None);
        }
        let mut buffer = chunks.spare.pop().unwrap_or_default();
        drop(chunks);
        let start = number * CHUNK;
        buffer.resize(CHUNK.min(self.len.saturating_sub(start)) as usize, 0);
        let read = read_exact_at(&*self.bytes, &mut buffer, start).at(&self.path, "read it");
        let chunk = read.map(|()| Arc::new(buffer));
        if is_near {
            let mut chunks = self.lock();
            match &chunk {
                // Unless the front has passed it meanwhile.
                Ok(chunk) => drop(chunks.near.get_mut(&number).map(|place| *place = Some(chunk.clone()))),
                Err(_) => drop(chunks.near.remove(&number)),
            }
            if chunks.waiting > 0 {
                self.read.notify_all();
            }
        }
        chunk
    }

    fn lock(&self) -> MutexGuard<'_, Chunks> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Chunks {
    /// The first chunk that is kept in memory.
    fn first_kept(&self) -> u64 {
        self.front.saturating_sub(if self.lanes > 0 { BEHIND } else { 0 })
    }

    /// Has the buffer used again, if nobody else holds it.
    fn keep_buffer(&mut self, chunk: Chunk) {
        if self.spare.len() < (BEHIND + NEAR) as usize {
            self.spare.extend(Arc::try_unwrap(chunk));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::thread;

    use super::*;
    use crate::store::Identity;

    /// Bytes that tell where they are, and how often each chunk was read; one read fails.
    struct Counted {
        len: u64,
        reads: Vec<AtomicU64>,
        fails: Mutex<Option<u64>>,
    }

    impl ReadAt for Arc<Counted> {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            if self.fails.lock().unwrap().take_if(|chunk| *chunk == offset / CHUNK).is_some() {
                return Err(io::ErrorKind::Other.into());
            }
            self.reads[(offset / CHUNK) as usize].fetch_add(1, Ordering::Relaxed);
            buffer.fill((offset / CHUNK) as u8);
            Ok(buffer.len())
        }

        fn identity(&self) -> io::Result<Identity> {
            Ok(Identity { len: self.len, version: String::new(), sha256: None })
        }
    }

    fn file(chunks: u64, fails: Option<u64>) -> (Arc<Counted>, SharedFile) {
        let len = chunks * CHUNK - 5;
        let reads = (0..chunks).map(|_| AtomicU64::new(0)).collect();
        let bytes = Arc::new(Counted { len, reads, fails: Mutex::new(fails) });
        (bytes.clone(), SharedFile::new(Box::new(bytes), "file".into(), len))
    }

    fn check(file: &SharedFile, number: u64) {
        let chunk = file.chunk(number).unwrap();
        let len = if number + 1 == file.count() { CHUNK - 5 } else { CHUNK };
        assert!(chunk.len() as u64 == len && chunk.iter().all(|&byte| byte == number as u8), "chunk {number}");
        file.give_back(chunk);
    }

    #[test]
    fn threads_near_the_front_read_each_chunk_once() {
        let (bytes, file) = file(60, None);
        for front in (0..60).step_by(NEAR as usize) {
            thread::scope(|scope| {
                for step in [1, 3, 5, 7] {
                    let numbers = (0..NEAR).map(move |i| front + i * step % NEAR).filter(|number| *number < 60);
                    let file = &file;
                    scope.spawn(move || numbers.for_each(|number| check(file, number)));
                }
            });
            file.advance(front + NEAR);
        }
        assert!(bytes.reads.iter().all(|reads| reads.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn what_lies_behind_the_front_is_kept_for_lanes_and_else_read_again() {
        let (bytes, file) = file(40, None);
        let reads = |number: usize| bytes.reads[number].load(Ordering::Relaxed);
        (0..10).for_each(|number| check(&file, number));
        file.count_lane(true);
        file.advance(10);
        (10 - BEHIND..10).for_each(|number| check(&file, number));
        assert_eq!(reads(9), 1);
        check(&file, 0);
        assert_eq!(reads(0), 2);
        file.count_lane(false);
        file.finish();
        check(&file, 9);
        assert_eq!(reads(9), 2);
    }

    #[test]
    fn reading_ahead_ends_where_the_front_is_not_near() {
        let (bytes, file) = file(40, None);
        assert_eq!((0..).take_while(|_| file.read_ahead().unwrap()).count() as u64, NEAR);
        (0..NEAR).for_each(|number| check(&file, number));
        assert_eq!(bytes.reads.iter().map(|reads| reads.load(Ordering::Relaxed)).sum::<u64>(), NEAR);
        file.advance(40 - 3);
        assert_eq!((0..).take_while(|_| file.read_ahead().unwrap()).count(), 3);
        assert!((file.rest(), file.is_near(u64::MAX - 1)) == (3 * CHUNK - 5, false));
        file.finish();
        assert!((file.rest(), file.is_near(u64::MAX - 1)) == (0, true));
        assert!(!file.read_ahead().unwrap());
    }

    #[test]
    fn a_read_that_fails_is_an_error_for_one_thread_and_not_remembered() {
        let (_, file) = file(10, Some(4));
        let results = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| file.chunk(4).is_err())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(results.iter().filter(|failed| **failed).count(), 1);
        check(&file, 4);
    }
}
