//! Double quantization: absmax, less its mean, to 8-bit codes of the dynamic map, in blocks of 256.
//!
//! Follows bitsandbytes' CUDA kernel (scale by the reciprocal, nearest entry, a tie goes to the lower one). Its CPU path
//! looks codes up in 65,536 bins and is coarser near zero.

use crate::format::{DynamicMap, NESTED_BLOCK_SIZE};

/// Quantizes `absmax - offset`, block by block.
///
/// `codes` has one byte an absmax; `nested_absmax` one f32 for every [`NESTED_BLOCK_SIZE`] of them, rounded up.
///
/// # Panics
/// When the slices' lengths don't fit each other.
pub fn quantize(absmax: &[f32], offset: f32, map: &DynamicMap, codes: &mut [u8], nested_absmax: &mut [f32]) {
    assert_eq!(absmax.len(), codes.len(), "codes: length");
    assert_eq!(absmax.len().div_ceil(NESTED_BLOCK_SIZE), nested_absmax.len(), "nested absmax: length");
    let blocks = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks_mut(NESTED_BLOCK_SIZE));
    for ((absmax, codes), nested) in blocks.zip(nested_absmax) {
        *nested = absmax.iter().fold(0.0, |largest: f32, x| largest.max((x - offset).abs()));
        let reciprocal = if *nested > 0.0 { (1.0 / *nested).min(f32::MAX) } else { 0.0 };
        for (x, code) in absmax.iter().zip(codes) {
            *code = map.nearest((x - offset) * reciprocal);
        }
    }
}

/// The absmax that a client restores from `code`: bitsandbytes' `dequantize_blockwise` plus the offset.
pub fn restore(code: u8, nested_absmax: f32, offset: f32, values: &[f32; 256]) -> f32 {
    values[usize::from(code)] * nested_absmax + offset
}
