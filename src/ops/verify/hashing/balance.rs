//! Who hashes a tensor: the thread that hashes its file, in the same pass, or another one.
//!
//! One pass over both takes less work than two, as the bytes are read once and two streams share a core. But a file's own
//! hash can't be divided among threads: what is on the way with the longest file makes all others wait.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::kernel::sha256::FREE;

/// What the threads have still to do, in bytes.
pub(super) struct Work<'a> {
    /// Of the file that the tensor is in, for the file's own hash.
    pub own: u64,
    /// Of the files that other threads are hashing, likewise.
    pub others: Vec<u64>,
    /// Files that no thread has begun, the largest first.
    pub waiting: &'a [u64],
    /// Tensors that no thread has begun.
    pub tensors: u64,
    /// Threads.
    pub threads: usize,
    /// What a tensor's byte adds to hashing its file's; see [`second_stream_cost`](crate::kernel::sha256::second_stream_cost).
    pub extra: f64,
}

/// Whether the thread that hashes the file hashes the next tensor too, which has `len` bytes. It does unless all would be
/// done sooner if another thread did.
pub(super) fn hashes_both(work: &Work<'_>, len: u64) -> bool {
    let Work { own, others, waiting, tensors, threads, extra } = work;
    if *extra < FREE {
        return true;
    }
    // Threads by when they will have hashed their files; each then takes the largest that is waiting.
    let idle = threads.saturating_sub(1 + others.len());
    let busy = others.iter().copied().chain(std::iter::repeat_n(0, idle)).map(|load| (load, false));
    let mut loads: BinaryHeap<Reverse<(u64, bool)>> = busy.chain([(*own, true)]).map(Reverse).collect();
    for file in waiting.iter() {
        if let Some(mut first) = loads.peek_mut() {
            first.0.0 = first.0.0.saturating_add(*file);
        }
    }
    let sum = loads.iter().fold(0u64, |sum, Reverse((load, _))| sum.saturating_add(*load));
    let longest = loads.iter().map(|Reverse((load, _))| *load).max().unwrap_or(0);
    let this = loads.iter().find(|Reverse((_, is_this))| *is_this).map_or(0, |Reverse((load, _))| *load);
    let others_first = loads.iter().filter(|Reverse((_, is_this))| !is_this).map(|Reverse((load, _))| *load).min();
    // A tensor that is hashed apart from its file takes as long as a file.
    let evenly = sum.saturating_add(*tensors) / (*threads).max(1) as u64;
    // Left to others, it can't be done before one of them has time for it.
    let by_others = others_first.map_or(u64::MAX, |first| first.saturating_add(len));
    this.saturating_add((len as f64 * extra) as u64) <= longest.max(evenly).max(by_others)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// Files of these sizes, of which as many are being hashed as there are threads; none of their tensors are.
    fn work(files: &[u64], threads: usize) -> Work<'_> {
        let begun = threads.min(files.len());
        let (others, waiting) = (files[1..begun].to_vec(), &files[begun..]);
        Work { own: files[0], others, waiting, tensors: files.iter().sum(), threads, extra: 0.67 }
    }

    #[test]
    fn one_thread_does_all_in_one_pass() {
        assert!(hashes_both(&work(&[5000 * MB], 1), 3 * MB));
        assert!(hashes_both(&work(&[5000 * MB, 4000 * MB, MB], 1), 4000 * MB));
    }

    #[test]
    fn a_file_alone_is_hashed_ahead_of_its_tensors() {
        for threads in [2, 3, 16] {
            assert!(!hashes_both(&work(&[5000 * MB], threads), 3 * MB), "{threads} threads");
        }
    }

    #[test]
    fn a_file_alone_is_hashed_with_its_tensors_where_that_takes_no_longer() {
        for threads in [2, 16] {
            assert!(hashes_both(&Work { extra: 0.02, ..work(&[5000 * MB], threads) }, 3 * MB), "{threads} threads");
        }
    }

    #[test]
    fn as_many_files_as_threads_are_one_pass_each() {
        for files in [2, 4, 16, 160] {
            assert!(hashes_both(&work(&vec![1000 * MB; files], files.min(16)), 3 * MB), "{files} files");
        }
    }

    #[test]
    fn a_thread_with_more_files_than_the_others_leaves_tensors_to_them() {
        // Each of 16 threads has a file, and the first that is done will have another.
        let (others, waiting) = (vec![600 * MB; 15], &[1000 * MB][..]);
        let work = |own| Work { own, others: others.clone(), waiting, tensors: 10_500 * MB, threads: 16, extra: 0.67 };
        assert!(!hashes_both(&work(500 * MB), 3 * MB));
        assert!(hashes_both(&work(700 * MB), 3 * MB));
        // The last file of three, when both threads have done one.
        assert!(!hashes_both(&self::work(&[1000 * MB], 2), 3 * MB));
        // The larger of two.
        assert!(!hashes_both(&Work { tensors: 800 * MB, ..self::work(&[1000 * MB, 200 * MB], 2) }, 3 * MB));
    }

    #[test]
    fn a_file_alone_is_hashed_with_tensors_that_others_are_late_for() {
        let late = Work { own: 400 * MB, tensors: 500 * MB, ..work(&[5000 * MB], 2) };
        assert!(hashes_both(&late, 3 * MB));
    }

    #[test]
    fn a_large_tensor_is_begun_now_if_nobody_else_has_time_for_it() {
        let work = work(&[1000 * MB, 900 * MB], 2);
        assert!(hashes_both(&work, 1000 * MB));
    }
}
