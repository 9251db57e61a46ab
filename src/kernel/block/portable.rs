//! [`super::scalar`]'s arithmetic on arrays of 32 elements, in loops that compilers turn into vector instructions of
//! whatever a processor has.

use super::scalar::ABSMAX_FLOOR;
use super::vector::{CHUNK, in_groups};
use crate::dtype::FloatDtype;
use crate::format::Codebook;
use crate::kernel::element::{Bfloat16, Element, Float16, Float32};
use crate::kernel::lanes::{AddSquares, Of, Portable, fold, larger, largest, tree_sum};
use crate::kernel::{BlockErrors, Blocks, NonFinite};

/// [`crate::kernel::Kernel::quantize`].
pub(crate) fn quantize(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    match blocks.dtype {
        FloatDtype::Bfloat16 => quantize_elements::<Bfloat16>(blocks),
        FloatDtype::Float16 => quantize_elements::<Float16>(blocks),
        FloatDtype::Float32 => quantize_elements::<Float32>(blocks),
    }
}

fn quantize_elements<E: Element>(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    let lookup = Lookup::new(blocks.codebook);
    let size = blocks.block_size.get();
    in_groups::<E, 1>(size, blocks, |source, packed, figures| quantize_block::<E>(source, &lookup, packed, figures))
}

/// Quantizes one whole block.
fn quantize_block<E: Element>(
    source: &[u8],
    lookup: &Lookup,
    packed: &mut [u8],
    figures: BlockErrors<'_>,
) -> Result<(), NonFinite> {
    let absmax = largest::<E, CHUNK>(source, Of::Either);
    if !absmax.is_finite() {
        return Err(NonFinite);
    }
    let reciprocal = 1.0 / absmax.max(ABSMAX_FLOOR);
    let (mut signal, mut noise, mut worst) = ([0f32; CHUNK], [0f32; CHUNK], [0f32; CHUNK]);
    for (source, packed) in source.chunks_exact(CHUNK * E::SIZE).zip(packed.chunks_exact_mut(CHUNK / 2)) {
        let (mut t, mut errors) = ([0f32; CHUNK], [0f32; CHUNK]);
        for lane in 0..CHUNK {
            t[lane] = E::decode(&source[lane * E::SIZE..][..E::SIZE]) * reciprocal;
        }
        let ranks = lookup.ranks(&t);
        for lane in 0..CHUNK {
            errors[lane] = t[lane] - lookup.values[ranks[lane] as usize % 16];
        }
        for (pair, byte) in ranks.as_chunks().0.iter().zip(packed) {
            *byte = lookup.byte(*pair);
        }
        for lane in 0..CHUNK {
            worst[lane] = larger(worst[lane], errors[lane].abs());
        }
        Portable::add_squares(&mut signal, &t);
        Portable::add_squares(&mut noise, &errors);
    }
    figures.absmax[0] = absmax;
    (figures.signal[0], figures.noise[0], figures.worst[0]) = (tree_sum(signal), tree_sum(noise), fold(worst, larger));
    Ok(())
}

/// A codebook by rank.
struct Lookup {
    thresholds: [f32; 15],
    codes: [u8; 16],
    values: [f32; 16],
}

impl Lookup {
    fn new(codebook: &Codebook) -> Lookup {
        let values = codebook.code_of_rank.map(|code| codebook.values()[usize::from(code)]);
        Lookup { thresholds: codebook.thresholds(), codes: codebook.code_of_rank, values }
    }

    /// The number of thresholds that each element is greater than.
    #[inline(always)]
    fn ranks(&self, t: &[f32; CHUNK]) -> [u32; CHUNK] {
        let mut ranks = [0; CHUNK];
        for lane in 0..CHUNK {
            ranks[lane] = self.thresholds.iter().map(|&threshold| u32::from(t[lane] > threshold)).sum();
        }
        ranks
    }

    /// The codes of a pair of ranks.
    #[inline(always)]
    fn byte(&self, [even, odd]: [u32; 2]) -> u8 {
        self.codes[even as usize % 16] << 4 | self.codes[odd as usize % 16]
    }
}
