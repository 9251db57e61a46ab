//! Vectors of eight, as the AVX2 kernels of blocks and groups take them: loading elements, largest magnitudes, folding lanes.
//!
//! Elements come in pairs: the even ones in one vector, the odd ones in another. A pair shares a byte of the output and is
//! added first in scalar.rs's tree, so both fall out of whole-vector operations.

use std::arch::x86_64::*;

use super::element::Element;
use crate::dtype::FloatDtype;

/// A vector's lanes.
pub(super) const LANES: usize = 8;

/// Two vectors of elements as they were loaded. Of 16 bits, a pair is in a lane of the first, and the second isn't used; of
/// 32 bits, the even elements are in the first and the odd ones in the second.
pub(super) type Pairs = [__m256i; 2];

/// Sixteen elements.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load<E: Element>(source: &[u8]) -> Pairs {
    let vectors = source.as_chunks().0;
    if E::SIZE == 2 {
        return [load_bytes(&vectors[0]), _mm256_setzero_si256()];
    }
    let (low, high) = (load_bytes(&vectors[0]), load_bytes(&vectors[1]));
    let (low, high) = (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
    let in_order = |x| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_castps_si256(x));
    [in_order(_mm256_shuffle_ps::<0x88>(low, high)), in_order(_mm256_shuffle_ps::<0xdd>(low, high))]
}

/// Pairs as f32: the even elements, the odd ones.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn halves<E: Element>(pairs: Pairs) -> [__m256; 2] {
    let [first, second] = pairs;
    match E::DTYPE {
        FloatDtype::Bfloat16 => {
            let (even, odd) = (_mm256_slli_epi32::<16>(first), _mm256_and_si256(first, _mm256_set1_epi32(!0xffff)));
            [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
        }
        FloatDtype::Float16 => {
            let (even, odd) = (_mm256_and_si256(first, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(first));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(even, odd));
            let (even, odd) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            [_mm256_cvtph_ps(even), _mm256_cvtph_ps(odd)]
        }
        FloatDtype::Float32 => [_mm256_castsi256_ps(first), _mm256_castsi256_ps(second)],
    }
}

/// The larger of elements, by the order of their bits as unsigned numbers; that of magnitudes, where signs are cleared.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn max_unsigned<E: Element>(a: __m256i, b: __m256i) -> __m256i {
    if E::SIZE == 2 { _mm256_max_epu16(a, b) } else { _mm256_max_epu32(a, b) }
}

/// Elements without their signs.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn magnitudes<E: Element>(elements: __m256i) -> __m256i {
    _mm256_and_si256(elements, _mm256_set1_epi32(E::MAGNITUDE as i32))
}

/// The largest of a block's elements, by lane; no less than 0.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn largest(block: &[u8], max: impl Fn(__m256i, __m256i) -> __m256i) -> __m256i {
    let vectors = block.as_chunks().0.iter();
    vectors.fold(_mm256_setzero_si256(), |largest, bytes| max(largest, load_bytes(bytes)))
}

/// The larger element of each lane, as f32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn of_pairs<E: Element>(largest: __m256i, max: impl Fn(__m256i, __m256i) -> __m256i) -> __m256 {
    if E::SIZE == 4 {
        return _mm256_castsi256_ps(largest);
    }
    let largest = max(largest, _mm256_srli_epi32::<16>(largest));
    halves::<E>([largest, largest])[0]
}

/// Whether no lane is infinite or NaN.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn is_finite(x: __m256) -> bool {
    let finite = _mm256_cmp_ps::<_CMP_LT_OQ>(magnitude(x), _mm256_set1_ps(f32::INFINITY));
    _mm256_movemask_ps(finite) == 0xff
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn magnitude(x: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)
}

/// scalar.rs's tree over the eight lanes of each block: folds the upper half onto the lower until one is left.
///
/// Lane `i` of the result is block `i`'s. Each step halves the lanes of a block and the number of vectors.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tree(blocks: &[__m256; LANES], fold: impl Fn(__m256, __m256) -> __m256) -> __m256 {
    let to_4 = |a, b| fold(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let to_2 = |a, b| fold(_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let to_1 = |a, b| fold(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
    let pair = |i: usize| to_4(blocks[i], blocks[4 + i]);
    to_1(to_2(pair(0), pair(1)), to_2(pair(2), pair(3)))
}

/// [`tree`] of integers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn integer_tree(blocks: &[__m256i; LANES], fold: impl Fn(__m256i, __m256i) -> __m256i) -> __m256i {
    let (float, integer) = (|x| _mm256_castsi256_ps(x), |x| _mm256_castps_si256(x));
    let to_4 = |a, b| fold(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b));
    let to_2 = |a, b| fold(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    let shuffled = |a, b| (_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
    let pair = |i: usize| to_4(blocks[i], blocks[4 + i]);
    let (even, odd) = shuffled(float(to_2(pair(0), pair(1))), float(to_2(pair(2), pair(3))));
    fold(integer(even), integer(odd))
}

/// The low bytes of the lanes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn low_bytes(lanes: __m256i) -> [u8; LANES] {
    let first = _mm256_setr_epi32(0x0c08_0400, -1, -1, -1, 0x0c08_0400, -1, -1, -1);
    let bytes = _mm256_shuffle_epi8(lanes, first);
    let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
    _mm_cvtsi128_si64(_mm_unpacklo_epi32(low, high)).to_le_bytes()
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn to_array(vector: __m256) -> [f32; LANES] {
    let mut array = [0.0; LANES];
    // SAFETY: the array is a vector's 32 bytes.
    unsafe { _mm256_storeu_ps(array.as_mut_ptr(), vector) };
    array
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn from_array(array: &[f32; LANES]) -> __m256 {
    // SAFETY: the array is a vector's 32 bytes.
    unsafe { _mm256_loadu_ps(array.as_ptr()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array is a vector's 32 bytes; they need no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array is a vector's 16 bytes; they need no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store_16(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the array is a vector's 16 bytes; they need no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}
