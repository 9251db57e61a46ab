//! Files open at once: so few that the system's limit is never met, however many files a plan has.

use crate::store::descriptors_left;

/// Output files that are begun and not sealed, at most. A disk that syncs slowly would let any number of them pile up.
const MOST_OUTPUTS: usize = 64;

/// Descriptors for what isn't counted here: records, side files, a trace, what libraries open meanwhile.
const RESERVED: usize = 24;

/// How many files of each kind may be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenFiles {
    /// Threads, each of which has a file of the source open.
    pub threads: usize,
    /// Output files in progress; for each, a file of the source is open for reading ahead.
    pub in_progress: usize,
    /// Output files that are begun and not sealed.
    pub outputs: usize,
}

impl OpenFiles {
    /// As many as are wanted, or as the process may open. A quarter of what it may is left: to files that are opened before their turn,
    /// for a tensor that shares its scale with another's.
    pub(super) fn new(threads: usize, in_progress: usize) -> OpenFiles {
        OpenFiles::within(descriptors_left().unwrap_or(usize::MAX), threads, in_progress)
    }

    fn within(left: usize, threads: usize, in_progress: usize) -> OpenFiles {
        let quarter = left.saturating_sub(RESERVED) / 4;
        OpenFiles {
            threads: threads.min(quarter).max(1),
            in_progress: in_progress.min(quarter / 2).max(1),
            outputs: MOST_OUTPUTS.min(quarter + quarter / 2).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_limit_changes_nothing_for_a_usual_machine() {
        let usual = OpenFiles { threads: 64, in_progress: 16, outputs: MOST_OUTPUTS };
        assert_eq!(OpenFiles::within(1000, 64, 16), usual);
        assert_eq!(OpenFiles::within(usize::MAX, 64, 16), usual);
    }

    #[test]
    fn all_together_stay_below_the_limit() {
        for left in 32..2000 {
            let OpenFiles { threads, in_progress, outputs } = OpenFiles::within(left, 512, 16);
            // The source's files that threads have, those for reading ahead, the outputs.
            assert!(threads + in_progress + outputs <= left - RESERVED, "{left}");
            assert!(threads >= 1 && in_progress >= 1 && outputs >= in_progress, "{left}");
        }
    }

    #[test]
    fn something_is_tried_even_where_hardly_anything_may_be_open() {
        assert_eq!(OpenFiles::within(0, 8, 8), OpenFiles { threads: 1, in_progress: 1, outputs: 1 });
    }
}
