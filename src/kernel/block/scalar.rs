//! The specification: 4-bit blockwise quantization, as plainly as it can be said.
//!
//! Codes and absmax are bitsandbytes 0.50.2's (`quantize_4bit` on a CPU), byte for byte, for every finite input; the
//! golden tests hold it to that. All arithmetic is IEEE f32, rounded to nearest.
//!
//! The figures are ours. Within a block they are summed over 32 lanes, element i in lane i mod 32, each lane in order
//! with fused multiply-add, and the lanes then added pairwise in a fixed tree: an order that vector units can keep.

use half::{bf16, f16};

use crate::dtype::FloatDtype;
use crate::format::Codebook;
use crate::kernel::{BlockErrors, Blocks, NonFinite};

/// bitsandbytes divides by no less than this, so that the reciprocal of a subnormal absmax stays finite.
pub(crate) const ABSMAX_FLOOR: f32 = 1e-38;

/// Lanes of the figures' sums.
pub(crate) const LANES: usize = 32;

/// Quantizes a run of blocks; see [`Blocks`] for the layout and [`super::Kernel::quantize`] for the contract.
pub(crate) fn quantize(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    let size = blocks.block_size.get();
    let BlockErrors { absmax, signal, noise, worst } = blocks.figures;
    let sources = blocks.source.chunks(size * blocks.dtype.size());
    for (i, (source, packed)) in sources.zip(blocks.packed.chunks_mut(size / 2)).enumerate() {
        let block = quantize_block(source, blocks.dtype, size, blocks.codebook, packed)?;
        (absmax[i], signal[i], noise[i], worst[i]) = (block.absmax, block.signal, block.noise, block.worst);
    }
    Ok(())
}

/// Quantizes a run of blocks whatever is in them, as bitsandbytes does: the absmax of a block with a NaN is NaN, that of
/// one with an infinity infinite. In the first all codes are the highest value's; in the second the infinities' are, and
/// finite elements have the code of 0.0. Their figures are zeros.
pub(crate) fn quantize_any(blocks: Blocks<'_>) {
    let size = blocks.block_size.get();
    let BlockErrors { absmax, signal, noise, worst } = blocks.figures;
    let sources = blocks.source.chunks(size * blocks.dtype.size());
    for (i, (source, packed)) in sources.zip(blocks.packed.chunks_mut(size / 2)).enumerate() {
        let block = encode_block(source, blocks.dtype, size, blocks.codebook, packed);
        absmax[i] = block.absmax;
        let figures = (block.signal, block.noise, block.worst);
        (signal[i], noise[i], worst[i]) = if block.absmax.is_finite() { figures } else { (0.0, 0.0, 0.0) };
    }
}

/// The figures of one block; see [`BlockErrors`].
pub(crate) struct BlockFigures {
    pub absmax: f32,
    pub signal: f32,
    pub noise: f32,
    pub worst: f32,
}

/// Quantizes one block, whole or (the tensor's last) short.
pub(crate) fn quantize_block(
    source: &[u8],
    dtype: FloatDtype,
    block_size: usize,
    codebook: &Codebook,
    packed: &mut [u8],
) -> Result<BlockFigures, NonFinite> {
    let finite = source.chunks_exact(dtype.size()).all(|bytes| decode(bytes, dtype).is_finite());
    if finite { Ok(encode_block(source, dtype, block_size, codebook, packed)) } else { Err(NonFinite) }
}

fn encode_block(
    source: &[u8],
    dtype: FloatDtype,
    block_size: usize,
    codebook: &Codebook,
    packed: &mut [u8],
) -> BlockFigures {
    let elements = || source.chunks_exact(dtype.size()).map(|bytes| decode(bytes, dtype));
    let largest =
        elements().fold(0.0, |largest: f32, x| if x.is_nan() { f32::NAN } else { max_or_nan(largest, x.abs()) });
    // bitsandbytes scales whole blocks by the reciprocal, and divides (and stores the floored absmax) in a short one.
    let short = source.len() < block_size * dtype.size();
    let divisor = max_or_nan(largest, ABSMAX_FLOOR);
    let reciprocal = 1.0 / divisor;
    let absmax = if short { divisor } else { largest };

    let (thresholds, values) = (codebook.thresholds(), codebook.values());
    let mut sums = Lanes::default();
    packed.fill(codebook.zero_code()); // the pad of an odd tail
    for (i, x) in elements().enumerate() {
        let t = if short { x / divisor } else { x * reciprocal };
        let rank = thresholds.iter().filter(|&&threshold| t > threshold || t.is_nan()).count();
        let code = codebook.code_of_rank[rank];
        let byte = &mut packed[i / 2];
        *byte = if i % 2 == 0 { code << 4 | *byte & 0x0f } else { *byte & 0xf0 | code };
        sums.add(i % LANES, t, values[usize::from(code)]);
    }
    let (signal, noise, worst) = sums.finish();
    BlockFigures { absmax, signal, noise, worst }
}

/// The greater; NaN if the first is.
fn max_or_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() { a } else { a.max(b) }
}

/// One element, little-endian, as f32; exact.
pub fn decode(bytes: &[u8], dtype: FloatDtype) -> f32 {
    match (dtype, bytes) {
        (FloatDtype::Bfloat16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (FloatDtype::Float16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (FloatDtype::Float32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => unreachable!("callers split the source into whole elements"),
    }
}

/// The running sums of a block, by lane.
#[derive(Default)]
pub(crate) struct Lanes {
    signal: [f32; LANES],
    noise: [f32; LANES],
    worst: f32,
}

impl Lanes {
    pub(crate) fn add(&mut self, lane: usize, t: f32, value: f32) {
        let error = t - value;
        self.signal[lane] = t.mul_add(t, self.signal[lane]);
        self.noise[lane] = error.mul_add(error, self.noise[lane]);
        self.worst = self.worst.max(error.abs());
    }

    /// Signal, noise and worst.
    pub(crate) fn finish(self) -> (f32, f32, f32) {
        (tree_sum(self.signal), tree_sum(self.noise), self.worst)
    }
}

/// Adds neighbours first (0+1, 2+3, …), then folds the upper half onto the lower until one is left.
fn tree_sum(lanes: [f32; LANES]) -> f32 {
    let mut sums: [f32; LANES / 2] = std::array::from_fn(|i| lanes[2 * i] + lanes[2 * i + 1]);
    let mut half = sums.len() / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
