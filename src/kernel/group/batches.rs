//! Runs of groups cut into batches, as many as a vector kernel takes at once.

use std::ops::Range;

use super::{Groups, NonFinite, scalar};
use crate::kernel::BlockErrors;

/// How a batch ended.
pub(super) enum Outcome {
    Quantized,
    /// Its numbers are beyond what the vector code was made for.
    Unusual,
}

/// Hands `BATCH` groups at a time to `quantize`, the last few to `rest`, and unusual ones to scalar.rs.
#[inline(always)]
pub(super) fn in_batches<const BATCH: usize>(
    mut groups: Groups<'_>,
    quantize: impl Fn(&mut Groups<'_>) -> Result<Outcome, NonFinite>,
    rest: impl Fn(Groups<'_>) -> Result<(), NonFinite>,
) -> Result<(), NonFinite> {
    let (count, whole) = (groups.figures.absmax.len(), groups.figures.absmax.len() / BATCH * BATCH);
    for first in (0..whole).step_by(BATCH) {
        let mut batch = groups.part(first..first + BATCH);
        if let Outcome::Unusual = quantize(&mut batch)? {
            scalar::quantize(batch)?;
        }
    }
    rest(groups.part(whole..count))
}

impl Groups<'_> {
    /// Some of the groups, each as a row. Only where rows have no padding.
    #[inline(always)]
    pub(super) fn part(&mut self, groups: Range<usize>) -> Groups<'_> {
        let Groups { source, dtype, coding, .. } = *self;
        let group = coding.group;
        let each = |size: usize| groups.start * size..groups.end * size;
        let points = if self.zero_points.is_empty() { 0 } else { 1 };
        let BlockErrors { absmax, signal, noise, worst } = &mut self.figures;
        Groups {
            source: &source[each(group * dtype.size())],
            dtype,
            columns: group,
            coding,
            packed: &mut self.packed[each(group / 2)],
            scales: &mut self.scales[each(coding.scale_size(dtype))],
            zero_points: &mut self.zero_points[each(points)],
            figures: BlockErrors {
                absmax: &mut absmax[each(1)],
                signal: &mut signal[each(1)],
                noise: &mut noise[each(1)],
                worst: &mut worst[each(1)],
            },
        }
    }
}
