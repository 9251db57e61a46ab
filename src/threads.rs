//! Work shared among threads, of which the system may start fewer than asked for.

use std::panic::resume_unwind;
use std::thread;

/// Runs `work` on `threads` threads at once, this one among them, and returns what each of them does. Where the system
/// starts no further thread, those that there are do it all: `work` takes what it does from a queue.
pub(crate) fn share<T: Send>(threads: usize, work: impl Fn() -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> =
            (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        let mut results = vec![work()];
        results.extend(others.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))));
        results
    })
}

/// Runs `aside` on a thread of its own, beside `work` on this one; where the system starts none, `aside` comes first.
pub(crate) fn beside<A: Send, B>(aside: impl Fn() -> A + Sync, work: impl FnOnce() -> B) -> (A, B) {
    thread::scope(|scope| match thread::Builder::new().spawn_scoped(scope, &aside) {
        Ok(thread) => {
            let result = work();
            (thread.join().unwrap_or_else(|panic| resume_unwind(panic)), result)
        }
        Err(_) => (aside(), work()),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_that_is_queued_is_done_once_by_any_number_of_threads() {
        for threads in [0, 1, 2, 7] {
            let next = AtomicUsize::new(0);
            let take =
                || std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < 1000)).collect();
            let taken: Vec<Vec<usize>> = share(threads, take);
            assert!(taken.len() <= threads.max(1));
            let mut all = taken.concat();
            all.sort_unstable();
            assert_eq!(all, Vec::from_iter(0..1000));
        }
    }

    #[test]
    fn both_sides_give_their_result() {
        assert_eq!(beside(|| "aside", || "here"), ("aside", "here"));
    }
}
