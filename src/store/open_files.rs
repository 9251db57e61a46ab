//! How many files the process may have open.

/// Descriptors that a process has by the time it works, where that can't be counted.
const USUAL: usize = 32;

/// Files that can be opened before the system refuses; `None` where it sets no limit.
pub(crate) fn descriptors_left() -> Option<usize> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current?;
    let taken = std::fs::read_dir("/dev/fd").map_or(USUAL, Iterator::count);
    Some(usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(taken))
}
