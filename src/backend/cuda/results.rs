//! Where a slot's results lie, on the device and here alike.

use std::ops::Range;

use crate::backend::{Run, row_len};
use crate::format::NESTED_BLOCK_SIZE;
use crate::kernel::SUMMED;

/// Bytes of three sums, and of a count, for every [`SUMMED`] blocks or groups.
const SUMS_LEN: usize = 3 * size_of::<f64>();

/// What comes back of a run, one after the other: codes, the sums of figures, scales (of blocks, their absmax), zero points and
/// the counts of blocks of zeros. Sums and scales start at multiples of 8.
#[derive(Clone, Copy, Debug)]
pub(super) struct Results {
    /// Blocks or groups.
    pub groups: usize,
    pub packed: usize,
    pub scales: usize,
    pub zero_points: usize,
}

impl Results {
    /// Of a run of blocks, or of whole rows of groups.
    pub(crate) fn new(run: &Run<'_>) -> Results {
        let groups = run.groups();
        if run.codec.is_blocks() {
            let packed = run.elements().div_ceil(2);
            return Results { groups, packed, scales: groups * size_of::<f32>(), zero_points: 0 };
        }
        let (coding, columns) = (run.coding(), row_len(run.codec, run.columns));
        let rows = run.elements() / columns;
        assert_eq!(run.elements(), rows * columns, "not whole rows");
        assert!(columns.is_multiple_of(coding.group), "group: divides columns");
        Results {
            groups,
            packed: rows * coding.packed_row(columns),
            scales: groups * coding.scale_size(run.dtype),
            zero_points: if coding.has_zero_points() { groups } else { 0 },
        }
    }

    /// For how many blocks or groups there is room in as many bytes as this gives, whatever the run: each has `group_len` bytes
    /// for scale and zero point.
    pub(crate) fn room(packed: usize, groups: usize, group_len: usize) -> usize {
        let most = Results { groups, packed, scales: groups * group_len, zero_points: 0 };
        most.len()
    }

    /// Sums of each figure.
    pub(crate) fn summed(&self) -> usize {
        self.groups.div_ceil(SUMMED)
    }

    pub(crate) fn sums_at(&self) -> usize {
        self.packed.next_multiple_of(size_of::<f64>())
    }

    pub(crate) fn scales_at(&self) -> usize {
        self.sums_at() + self.summed() * SUMS_LEN
    }

    pub(crate) fn zero_points_at(&self) -> usize {
        self.scales_at() + self.scales
    }

    pub(crate) fn zeros_at(&self) -> usize {
        self.zero_points_at() + self.zero_points
    }

    /// What is written of it: nothing between codes and sums.
    pub(crate) fn pieces(&self) -> [Range<usize>; 2] {
        match self.sums_at() == self.packed {
            true => [0..self.len(), 0..0],
            false => [0..self.packed, self.sums_at()..self.len()],
        }
    }

    /// All of it.
    pub(crate) fn len(&self) -> usize {
        self.zeros_at() + self.summed()
    }
}

/// One f32 for each nested block, then the codes: what `quantize_absmax` leaves behind.
pub(super) fn nested_len(count: usize) -> usize {
    count.div_ceil(NESTED_BLOCK_SIZE) * size_of::<f32>() + count
}
