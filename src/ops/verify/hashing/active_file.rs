//! A file that is being hashed, and which of its tensors are taken care of.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::shared_file::SharedFile;
use crate::ops::verify::jobs::{Job, TensorJob};

/// Tensors that a thread begins at once, in bytes, unless one alone has more.
const RUN: u64 = 1 << 20;

/// A file between its first byte and its last tensor.
pub(super) struct ActiveFile<'a> {
    pub job: &'a Job<'a>,
    pub file: SharedFile,
    /// In the order of their bytes.
    pub tensors: Vec<TensorJob>,
    begun: Mutex<Begun>,
}

/// Which tensors a thread has begun, or is done with.
struct Begun {
    tensors: Vec<bool>,
    /// All before this one are.
    first: usize,
    /// Bytes of those that aren't.
    rest: u64,
}

impl<'a> ActiveFile<'a> {
    pub(super) fn new(job: &'a Job<'a>, file: SharedFile, tensors: Vec<TensorJob>) -> ActiveFile<'a> {
        let rest = tensors.iter().map(TensorJob::len).sum();
        let begun = Mutex::new(Begun { tensors: vec![false; tensors.len()], first: 0, rest });
        ActiveFile { job, file, tensors, begun }
    }

    /// Bytes of tensors that no thread has begun.
    pub(super) fn rest(&self) -> u64 {
        self.begun().rest
    }

    /// Takes one tensor, unless another thread has.
    pub(super) fn begin(&self, tensor: usize) -> bool {
        let mut begun = self.begun();
        let is_free = !begun.tensors[tensor];
        if is_free {
            begun.begin(tensor, self.tensors[tensor].len());
        }
        is_free
    }

    /// Whether another thread has taken it.
    pub(super) fn is_begun(&self, tensor: usize) -> bool {
        self.begun().tensors[tensor]
    }

    /// Takes the next tensors that lie one after the other, if there are any near the front.
    pub(super) fn begin_run(&self) -> Option<Range<usize>> {
        let mut begun = self.begun();
        while begun.tensors.get(begun.first) == Some(&true) {
            begun.first += 1;
        }
        let start = begun.first;
        if !self.file.is_near(self.tensors.get(start)?.place.start) {
            return None;
        }
        let (mut end, mut len) = (start, 0);
        while begun.tensors.get(end) == Some(&false) && (len == 0 || len + self.tensors[end].len() <= RUN) {
            len += self.tensors[end].len();
            begun.begin(end, self.tensors[end].len());
            end += 1;
        }
        Some(start..end)
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Begun {
    fn begin(&mut self, tensor: usize, len: u64) {
        self.tensors[tensor] = true;
        self.rest -= len;
    }
}
