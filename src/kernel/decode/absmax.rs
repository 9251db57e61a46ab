//! What absmax is with double quantization.

use crate::format::NESTED_BLOCK_SIZE;
use crate::kernel::block::nested;

/// absmax as bitsandbytes restores it from double quantization, from entry `first` on, as little-endian f32.
///
/// `codes` begins with that entry, `nested_absmax` (f32, one for every [`NESTED_BLOCK_SIZE`] of them) with the block that
/// holds it; `offset` is the quant_state's `nested_offset`, `values` what the codes stand for: its `nested_quant_map`.
///
/// # Panics
/// When a slice is too short for `into`, or that is not whole entries.
pub fn restore_absmax(
    codes: &[u8],
    nested_absmax: &[u8],
    (offset, values): (f32, &[f32; 256]),
    first: usize,
    into: &mut [u8],
) {
    let (into, rest) = into.as_chunks_mut();
    assert!(rest.is_empty(), "into: not whole entries");
    assert!(codes.len() >= into.len(), "codes: length");
    for (i, (absmax, &code)) in into.iter_mut().zip(codes).enumerate() {
        let block = (first + i) / NESTED_BLOCK_SIZE - first / NESTED_BLOCK_SIZE;
        *absmax = nested::restore(code, f32_at(nested_absmax, block), offset, values).to_le_bytes();
    }
}

#[inline(always)]
fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes(bytes.as_chunks().0[i])
}
