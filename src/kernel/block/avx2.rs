//! The AVX2 kernel: 32 elements at a time, eight even or eight odd ones in a vector.

use std::arch::x86_64::*;

use super::vector::{CHUNK, Element, in_groups};
use crate::dtype::FloatDtype;
use crate::format::Codebook;
use crate::kernel::block::scalar::ABSMAX_FLOOR;
use crate::kernel::{BlockErrors, Blocks, NonFinite};

/// Blocks in a group: one for each lane of a vector of figures.
const GROUP: usize = 8;

/// Quantizes a run of blocks of `SIZE` elements.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize<E: Element, const SIZE: usize>(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    let lookup = Lookup::new(blocks.codebook);
    let mut lanes = Lanes::new();
    in_groups::<E, SIZE, GROUP>(blocks, |source, packed, figures| {
        quantize_group::<E, SIZE>(source, &lookup, &mut lanes, packed, figures)
    })
}

/// Quantizes up to [`GROUP`] whole blocks.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_group<E: Element, const SIZE: usize>(
    source: &[u8],
    lookup: &Lookup,
    lanes: &mut Lanes,
    packed: &mut [u8],
    figures: BlockErrors<'_>,
) -> Result<(), NonFinite> {
    let sources = || source.chunks_exact(SIZE * E::DTYPE.size());
    for (largest, source) in lanes.largest.iter_mut().zip(sources()) {
        *largest = _mm256_castsi256_ps(magnitudes::<E>(source));
    }
    let absmax = absmax::<E>(&lanes.largest);
    let finite = _mm256_cmp_ps::<_CMP_LT_OQ>(absmax, _mm256_set1_ps(f32::INFINITY));
    if _mm256_movemask_ps(finite) != 0xff {
        return Err(NonFinite);
    }
    let divisor = _mm256_max_ps(absmax, _mm256_set1_ps(ABSMAX_FLOOR));
    let reciprocals = to_array(_mm256_div_ps(_mm256_set1_ps(1.0), divisor));

    for (i, (source, packed)) in sources().zip(packed.chunks_exact_mut(SIZE / 2)).enumerate().take(GROUP) {
        let sums = quantize_block::<E, SIZE>(source, reciprocals[i], lookup, packed);
        (lanes.signal[i], lanes.noise[i], lanes.worst[i]) = (halve(sums.signal), halve(sums.noise), sums.worst);
    }
    let results = [
        (absmax, figures.absmax),
        (tree(&lanes.signal, |a, b| _mm256_add_ps(a, b)), figures.signal),
        (tree(&lanes.noise, |a, b| _mm256_add_ps(a, b)), figures.noise),
        (tree(&lanes.worst, |a, b| _mm256_max_ps(a, b)), figures.worst),
    ];
    for (result, figures) in results {
        figures.copy_from_slice(&to_array(result)[..figures.len()]);
    }
    Ok(())
}

/// Quantizes one whole block.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_block<E: Element, const SIZE: usize>(
    source: &[u8],
    reciprocal: f32,
    lookup: &Lookup,
    packed: &mut [u8],
) -> Sums {
    let reciprocal = _mm256_set1_ps(reciprocal);
    let mut sums = Sums::new();
    for (source, packed) in source.chunks_exact(CHUNK * E::DTYPE.size()).zip(packed.as_chunks_mut().0) {
        let (low, high) = source.split_at(source.len() / 2);
        let low = quantize_pairs::<E, 0>(low, reciprocal, lookup, &mut sums);
        let high = quantize_pairs::<E, 1>(high, reciprocal, lookup, &mut sums);
        store_bytes(lookup.codes(negated_bytes(low, high)), packed);
    }
    sums
}

/// Minus the ranks of eight pairs of elements, a pair in each lane: 16 times the even one's, plus the odd one's.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_pairs<E: Element, const HALF: usize>(
    source: &[u8],
    reciprocal: __m256,
    lookup: &Lookup,
    sums: &mut Sums,
) -> __m256i {
    let (even, odd) = load::<E>(source);
    let even = quantize_vector::<HALF, 0>(_mm256_mul_ps(even, reciprocal), lookup, sums);
    let odd = quantize_vector::<HALF, 1>(_mm256_mul_ps(odd, reciprocal), lookup, sums);
    _mm256_add_epi32(_mm256_slli_epi32::<4>(even), odd)
}

/// Minus the ranks of eight scaled elements.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_vector<const HALF: usize, const ODD: usize>(t: __m256, lookup: &Lookup, sums: &mut Sums) -> __m256i {
    let (minus_rank, value) = lookup.minus_rank_and_value(t);
    let (signal, noise) = (&mut sums.signal[HALF][ODD], &mut sums.noise[HALF][ODD]);
    let error = _mm256_sub_ps(t, value);
    *signal = _mm256_fmadd_ps(t, t, *signal);
    *noise = _mm256_fmadd_ps(error, error, *noise);
    sums.worst = _mm256_max_ps(sums.worst, _mm256_andnot_ps(_mm256_set1_ps(-0.0), error));
    minus_rank
}

/// The running sums of a block, by half of a chunk, even or odd, and lane.
struct Sums {
    signal: [[__m256; 2]; 2],
    noise: [[__m256; 2]; 2],
    worst: __m256,
}

impl Sums {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Sums {
        let zero = _mm256_setzero_ps();
        Sums { signal: [[zero; 2]; 2], noise: [[zero; 2]; 2], worst: zero }
    }
}

/// The first two steps of scalar.rs's tree: adds neighbours, then the upper half to the lower.
#[target_feature(enable = "avx2,fma,f16c")]
fn halve([low, high]: [[__m256; 2]; 2]) -> __m256 {
    _mm256_add_ps(_mm256_add_ps(low[0], low[1]), _mm256_add_ps(high[0], high[1]))
}

/// The vectors of a group whose lanes are still to be folded, one per block.
struct Lanes {
    largest: [__m256; GROUP],
    signal: [__m256; GROUP],
    noise: [__m256; GROUP],
    worst: [__m256; GROUP],
}

impl Lanes {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Lanes {
        let zeros = [_mm256_setzero_ps(); GROUP];
        Lanes { largest: zeros, signal: zeros, noise: zeros, worst: zeros }
    }
}

/// A codebook as tables for a binary search in registers: four comparisons, each of which gives (as 0 or -1) the next
/// bit of the rank.
///
/// Bits are gathered into minus the rank, of which a table is indexed with the low three bits, so tables are laid out
/// backwards.
struct Lookup {
    /// The middle threshold, and those in the middle of the half below and the half above it.
    middle: __m256,
    middle_below: __m256,
    middle_above: __m256,
    /// By minus the rank's first two bits: the third threshold to compare with; twice, for each half of a vector.
    thirds: __m256,
    /// By minus the rank's first three bits: the last threshold to compare with, and the values on its sides.
    fourths: __m256,
    values_below: __m256,
    values_above: __m256,
    /// By rank, in the low nibble and in the high one.
    codes: __m128i,
    high_codes: __m128i,
}

impl Lookup {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(codebook: &Codebook) -> Lookup {
        let thresholds = codebook.thresholds();
        let value = |rank: usize| codebook.values()[usize::from(codebook.code_of_rank[rank])];
        let codes = load_128(&codebook.code_of_rank);
        Lookup {
            middle: _mm256_set1_ps(thresholds[7]),
            middle_below: _mm256_set1_ps(thresholds[3]),
            middle_above: _mm256_set1_ps(thresholds[11]),
            thirds: backwards(|bits| thresholds[4 * (bits % 4) + 1]),
            fourths: backwards(|bits| thresholds[2 * bits]),
            values_below: backwards(|bits| value(2 * bits)),
            values_above: backwards(|bits| value(2 * bits + 1)),
            codes,
            high_codes: _mm_slli_epi16::<4>(codes),
        }
    }

    /// Minus the ranks of scaled elements, and the values that they decode to.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn minus_rank_and_value(&self, t: __m256) -> (__m256i, __m256) {
        let above = |threshold| _mm256_cmp_ps::<_CMP_GT_OQ>(t, threshold);
        let append = |bits, bit| _mm256_add_epi32(_mm256_add_epi32(bits, bits), _mm256_castps_si256(bit));

        let first = above(self.middle);
        let second = above(_mm256_blendv_ps(self.middle_below, self.middle_above, first));
        let bits = append(_mm256_castps_si256(first), second);
        let third = above(_mm256_permutevar_ps(self.thirds, bits));
        let bits = append(bits, third);
        let fourth = above(_mm256_permutevar8x32_ps(self.fourths, bits));
        let below_it = _mm256_permutevar8x32_ps(self.values_below, bits);
        let above_it = _mm256_permutevar8x32_ps(self.values_above, bits);
        (append(bits, fourth), _mm256_blendv_ps(below_it, above_it, fourth))
    }

    /// The codes of ranks, two per byte.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn codes(&self, ranks: __m128i) -> __m128i {
        let nibble = _mm_set1_epi8(0x0f);
        let (high, low) = (_mm_and_si128(_mm_srli_epi16::<4>(ranks), nibble), _mm_and_si128(ranks, nibble));
        _mm_or_si128(_mm_shuffle_epi8(self.high_codes, high), _mm_shuffle_epi8(self.codes, low))
    }
}

/// A table whose entry `i` is for the bits of which `i` is minus, modulo 8.
#[target_feature(enable = "avx2,fma,f16c")]
fn backwards(entry: impl Fn(usize) -> f32) -> __m256 {
    let table: [f32; 8] = std::array::from_fn(|i| entry(i.wrapping_neg() % 8));
    // SAFETY: the array is a vector's 32 bytes.
    unsafe { _mm256_loadu_ps(table.as_ptr()) }
}

/// Minus sixteen lanes between -255 and 0, as bytes.
#[target_feature(enable = "avx2,fma,f16c")]
fn negated_bytes(low: __m256i, high: __m256i) -> __m128i {
    // Packing goes by 128-bit halves: first the lower halves of `low` and `high`, then the upper ones.
    let words = _mm256_abs_epi16(_mm256_packs_epi32(low, high));
    let bytes = _mm256_packus_epi16(words, words);
    _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
}

/// Sixteen elements as f32: the even ones, the odd ones.
#[target_feature(enable = "avx2,fma,f16c")]
fn load<E: Element>(source: &[u8]) -> (__m256, __m256) {
    let vectors = source.as_chunks().0;
    match E::DTYPE {
        FloatDtype::Bfloat16 => {
            let pairs = load_bytes(&vectors[0]);
            let (even, odd) = (_mm256_slli_epi32::<16>(pairs), _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff)));
            (_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd))
        }
        FloatDtype::Float16 => {
            let pairs = load_bytes(&vectors[0]);
            let (even, odd) = (_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(pairs));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(even, odd));
            let (even, odd) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            (_mm256_cvtph_ps(even), _mm256_cvtph_ps(odd))
        }
        FloatDtype::Float32 => {
            let (low, high) = (load_bytes(&vectors[0]), load_bytes(&vectors[1]));
            let (low, high) = (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
            let in_order = |x| _mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(x));
            let (even, odd) = (_mm256_shuffle_ps::<0x88>(low, high), _mm256_shuffle_ps::<0xdd>(low, high));
            (_mm256_castpd_ps(in_order(even)), _mm256_castpd_ps(in_order(odd)))
        }
    }
}

/// The largest magnitudes of a block, by lane: bits of its dtype without the sign, whose order is the magnitudes'.
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitudes<E: Element>(block: &[u8]) -> __m256i {
    let mut largest = _mm256_setzero_si256();
    for bytes in block.as_chunks().0 {
        let bits = _mm256_and_si256(load_bytes(bytes), _mm256_set1_epi32(E::MAGNITUDE as i32));
        largest = max_bits::<E>(largest, bits);
    }
    largest
}

/// Each block's absmax; infinite or NaN when one of its elements is.
#[target_feature(enable = "avx2,fma,f16c")]
fn absmax<E: Element>(magnitudes: &[__m256; GROUP]) -> __m256 {
    let largest = _mm256_castps_si256(tree(magnitudes, |a, b| {
        _mm256_castsi256_ps(max_bits::<E>(_mm256_castps_si256(a), _mm256_castps_si256(b)))
    }));
    let of_pair = _mm256_max_epu16(largest, _mm256_srli_epi32::<16>(largest));
    match E::DTYPE {
        FloatDtype::Bfloat16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(of_pair)),
        FloatDtype::Float16 => {
            let of_pair = _mm256_and_si256(of_pair, _mm256_set1_epi32(0xffff));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(of_pair, of_pair));
            _mm256_cvtph_ps(_mm256_castsi256_si128(words))
        }
        FloatDtype::Float32 => _mm256_castsi256_ps(largest),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn max_bits<E: Element>(a: __m256i, b: __m256i) -> __m256i {
    match E::DTYPE {
        FloatDtype::Bfloat16 | FloatDtype::Float16 => _mm256_max_epu16(a, b),
        FloatDtype::Float32 => _mm256_max_epu32(a, b),
    }
}

/// scalar.rs's tree over the eight lanes left of each block: folds the upper half onto the lower until one is left.
///
/// Lane `i` of the result is block `i`'s. Each step halves the lanes of a block and the number of vectors.
#[target_feature(enable = "avx2,fma,f16c")]
fn tree(blocks: &[__m256; GROUP], fold: impl Fn(__m256, __m256) -> __m256) -> __m256 {
    let to_4 = |a, b| fold(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let to_2 = |a, b| fold(_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let to_1 = |a, b| fold(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
    let pair = |i: usize| to_4(blocks[i], blocks[4 + i]);
    to_1(to_2(pair(0), pair(1)), to_2(pair(2), pair(3)))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn to_array(vector: __m256) -> [f32; 8] {
    let mut array = [0.0; 8];
    // SAFETY: the array is a vector's 32 bytes.
    unsafe { _mm256_storeu_ps(array.as_mut_ptr(), vector) };
    array
}

#[target_feature(enable = "avx2,fma,f16c")]
fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array is a vector's 32 bytes; they need no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn load_128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array is a vector's 16 bytes; they need no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn store_bytes(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the array is a vector's 16 bytes; they need no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}
