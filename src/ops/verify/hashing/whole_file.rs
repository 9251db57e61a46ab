//! Hashing a file from its front to its end, and tensors of it on the way.

use std::sync::Arc;

use super::Hashing;
use super::active_file::ActiveFile;
use super::balance::{Work, hashes_both};
use super::shared_file::CHUNK;
use crate::error::Result;
use crate::kernel::sha256::{Sha256Stream, update_pair};
use crate::store::Sha256Hash;

/// Tensors below this are hashed by whichever thread passes them first.
const SMALL: u64 = 1 << 16;

/// The same once all files are begun: what threads that help had no time for yet.
const MEDIUM: u64 = 64 << 20;

/// A file's hash on its way, and the tensor's that is hashed with it.
struct Pass<'f, 'a> {
    file: &'f Arc<ActiveFile<'a>>,
    whole: Sha256Stream,
    /// The tensor that comes next, or in which the front is.
    tensor: usize,
    /// That tensor's hash, if this thread took it.
    stream: Option<Sha256Stream>,
}

impl<'a> Hashing<'a> {
    /// Hashes a file, with those of its tensors that this thread takes.
    pub(super) fn hash_file(&self, file: &Arc<ActiveFile<'a>>) -> Result<()> {
        let mut pass = Pass { file, whole: Sha256Stream::new(), tensor: 0, stream: None };
        for number in 0..file.file.count() {
            self.check_going()?;
            let chunk = file.file.chunk(number)?;
            if file.job.sha256.is_some() {
                (self.options.hashed)(chunk.len() as u64);
            }
            self.hash_chunk(&mut pass, number * CHUNK, &chunk);
            file.file.advance(number + 1);
            file.file.give_back(chunk);
            self.advanced(number + 1);
        }
        if let Some(expected) = file.job.sha256 {
            self.compare(file.job, None, Sha256Hash(pass.whole.finish()), expected);
        }
        Ok(())
    }

    /// The next bytes of the file, which are those from `start` on.
    fn hash_chunk(&self, pass: &mut Pass<'_, 'a>, start: u64, chunk: &[u8]) {
        let end = start + chunk.len() as u64;
        let mut at = start;
        while at < end {
            let tensor = pass.file.tensors.get(pass.tensor);
            let until = match tensor.map(|tensor| &tensor.place) {
                None => end,
                Some(place) if at < place.start => place.start,
                Some(place) => {
                    if at == place.start && self.takes(pass.file, pass.tensor) {
                        pass.stream = Some(Sha256Stream::new());
                    }
                    place.end
                }
            };
            let bytes = &chunk[(at - start) as usize..(until.min(end) - start) as usize];
            match &mut pass.stream {
                Some(stream) => update_pair(&mut pass.whole, stream, bytes),
                None => pass.whole.update(bytes),
            }
            at += bytes.len() as u64;
            if let Some(tensor) = tensor.filter(|tensor| at == tensor.place.end) {
                pass.tensor += 1;
                if let Some(stream) = pass.stream.take() {
                    self.compare(pass.file.job, Some(&tensor.name), Sha256Hash(stream.finish()), tensor.sha256);
                }
            }
        }
    }

    /// Whether this thread, which hashes the file, takes the tensor that comes next.
    fn takes(&self, file: &Arc<ActiveFile<'a>>, tensor: usize) -> bool {
        let len = file.tensors[tensor].len();
        let is_small = len < SMALL || self.threads == 1;
        (is_small || !file.is_begun(tensor) && self.is_soonest_done_with_the_file(file, len)) && file.begin(tensor)
    }

    fn is_soonest_done_with_the_file(&self, file: &Arc<ActiveFile<'a>>, len: u64) -> bool {
        let state = self.state();
        let waiting = &self.lens[state.begun..];
        // Long before the end there is nothing to balance. At the end, threads that have no file are ahead of this one.
        if waiting.len() > 4 * self.threads || waiting.is_empty() && len < MEDIUM {
            return true;
        }
        let extra = self.second_stream;
        let others = state.active.iter().filter(|other| !Arc::ptr_eq(other, file));
        let others = others.map(|other| other.file.rest()).filter(|rest| *rest > 0).collect();
        let tensors = state.active.iter().map(|file| file.rest()).chain(waiting.iter().copied()).sum();
        hashes_both(&Work { own: file.file.rest(), others, waiting, tensors, threads: self.threads, extra }, len)
    }
}
