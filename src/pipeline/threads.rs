//! Starting threads where the system may allow few.

use std::thread::{Builder, Scope, ScopedJoinHandle};

use crate::error::{Error, Result};

/// Starts `count` threads that do the same work; where the system allows fewer, fewer do it.
///
/// # Errors
/// When it allows none.
pub(crate) fn start_threads<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    count: usize,
    work: impl FnOnce() -> T + Copy + Send + 'scope,
) -> Result<Vec<ScopedJoinHandle<'scope, T>>> {
    let mut threads = Vec::with_capacity(count);
    for _ in 0..count {
        match Builder::new().spawn_scoped(scope, work) {
            Ok(thread) => threads.push(thread),
            Err(source) if threads.is_empty() => return Err(Error::Threads { source }),
            Err(_) => break,
        }
    }
    Ok(threads)
}
