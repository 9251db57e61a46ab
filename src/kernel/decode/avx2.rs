//! Decoding with AVX2: [`super`]'s loops, compiled for it, and outputs of two bytes looked up sixteen at a time.

use std::arch::x86_64::*;

use super::nibbles::LookUp;
use super::{Row, decode_by};
use crate::kernel::avx2::{load_16, store_16};
use crate::kernel::block::x86::avx2_available;

/// [`crate::kernel::Kernel::decode`].
pub(super) fn decode(row: Row<'_>) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn decode(row: Row<'_>) {
        decode_by::<Shuffles>(row);
    }
    assert!(avx2_available());
    // SAFETY: the processor has the features, as just asserted.
    unsafe { decode(row) }
}

/// Looks outputs up by shuffling a table's bytes. Only what [`decode`] calls may use it.
struct Shuffles;

impl LookUp for Shuffles {
    #[inline(always)]
    fn pairs<const SIZE: usize, const EVEN_HIGH: bool>(
        outputs: &[[u8; SIZE]; 16],
        codes: &[u8],
        into: &mut [[[u8; SIZE]; 2]],
    ) -> usize {
        let (Some(outputs), (codes, _)) = (two_bytes(outputs), codes.as_chunks()) else { return 0 };
        let (into, _) = into.as_flattened_mut().as_flattened_mut().as_chunks_mut();
        // SAFETY: `decode` asserted that the processor has the features.
        unsafe { pairs::<EVEN_HIGH>(outputs, codes, into) };
        codes.len() * 8
    }
}

/// The outputs, if they have two bytes.
#[inline(always)]
fn two_bytes<const SIZE: usize>(outputs: &[[u8; SIZE]; 16]) -> Option<&[u8; 32]> {
    outputs.as_flattened().try_into().ok()
}

/// The outputs of sixteen codes at a time.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn pairs<const EVEN_HIGH: bool>(outputs: &[u8; 32], codes: &[[u8; 8]], into: &mut [[u8; 32]]) {
    let (first, second) = outputs.split_at(16);
    let [first, second] = [first, second].map(|half| load_16(half.first_chunk().expect("16 bytes")));
    // The low bytes and the high bytes of all sixteen.
    let byte = _mm_set1_epi16(0xff);
    let low_bytes = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    let high_bytes = _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(second));
    for (codes, into) in codes.iter().zip(into) {
        let codes = _mm_cvtsi64_si128(i64::from_le_bytes(*codes));
        let nibble = _mm_set1_epi8(0x0f);
        let (low, high) = (_mm_and_si128(codes, nibble), _mm_and_si128(_mm_srli_epi16::<4>(codes), nibble));
        let codes = if EVEN_HIGH { _mm_unpacklo_epi8(high, low) } else { _mm_unpacklo_epi8(low, high) };
        let (low, high) = (_mm_shuffle_epi8(low_bytes, codes), _mm_shuffle_epi8(high_bytes, codes));
        let (begin, end) = into.split_at_mut(16);
        store_16(_mm_unpacklo_epi8(low, high), begin.first_chunk_mut().expect("16 bytes"));
        store_16(_mm_unpackhi_epi8(low, high), end.first_chunk_mut().expect("16 bytes"));
    }
}
