//! Shared by the vector kernels, which are [`super::scalar`]'s arithmetic, 8 (AVX2) or 16 (AVX-512) elements at a time; or
//! 32 in portable.rs, block by block.
//!
//! The first two take a group of blocks, as many as a vector has lanes, through three passes, each one of scalar.rs's steps:
//! absmax and reciprocals; codes and running sums; the tree that adds the sums' lanes. A group shares one division and
//! one transposing tree a figure, which would cost more than the codes if each (short) block had its own.
//!
//! Elements come in pairs: the even ones in one vector, the odd ones in another. A pair shares a byte of the output and
//! is added first in the tree, so both fall out of whole-vector operations.

use crate::kernel::block::scalar;
use crate::kernel::element::Element;
use crate::kernel::{BlockErrors, Blocks, NonFinite};

/// Elements that the kernels take at a time: one for each lane of scalar.rs's sums.
pub(super) const CHUNK: usize = 32;

/// Hands whole blocks of `size` elements, at most `GROUP` at a time, to `quantize_group`, and a short last block to scalar.rs.
#[inline(always)]
pub(super) fn in_groups<E: Element, const GROUP: usize>(
    size: usize,
    blocks: Blocks<'_>,
    mut quantize_group: impl FnMut(&[u8], &mut [u8], BlockErrors<'_>) -> Result<(), NonFinite>,
) -> Result<(), NonFinite> {
    let block_bytes = size * E::SIZE;
    let Blocks { mut source, mut packed, mut figures, codebook, .. } = blocks;
    while source.len() >= block_bytes {
        let blocks = GROUP.min(source.len() / block_bytes);
        let (group_source, group_packed, group_figures);
        (group_source, source) = source.split_at(blocks * block_bytes);
        (group_packed, packed) = packed.split_at_mut(blocks * size / 2);
        (group_figures, figures) = figures.split_at(blocks);
        quantize_group(group_source, group_packed, group_figures)?;
    }
    if !source.is_empty() {
        let block = scalar::quantize_block(source, E::DTYPE, size, codebook, packed)?;
        let BlockErrors { absmax, signal, noise, worst } = figures;
        (absmax[0], signal[0], noise[0], worst[0]) = (block.absmax, block.signal, block.noise, block.worst);
    }
    Ok(())
}

impl<'a> BlockErrors<'a> {
    /// The figures of the first `blocks` blocks, and those of the others.
    fn split_at(self, blocks: usize) -> (BlockErrors<'a>, BlockErrors<'a>) {
        let (absmax, absmax_rest) = self.absmax.split_at_mut(blocks);
        let (signal, signal_rest) = self.signal.split_at_mut(blocks);
        let (noise, noise_rest) = self.noise.split_at_mut(blocks);
        let (worst, worst_rest) = self.worst.split_at_mut(blocks);
        (
            BlockErrors { absmax, signal, noise, worst },
            BlockErrors { absmax: absmax_rest, signal: signal_rest, noise: noise_rest, worst: worst_rest },
        )
    }
}
