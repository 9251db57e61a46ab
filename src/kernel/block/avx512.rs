//! The AVX-512 kernel: 32 elements at a time, the 16 even ones in one vector and the 16 odd ones in another.

use std::arch::x86_64::*;

use super::vector::{CHUNK, in_groups};
use crate::dtype::FloatDtype;
use crate::format::Codebook;
use crate::kernel::block::scalar::ABSMAX_FLOOR;
use crate::kernel::element::Element;
use crate::kernel::{BlockErrors, Blocks, NonFinite};

/// Blocks in a group: one for each lane of a vector of figures.
const GROUP: usize = 16;

/// Quantizes a run of blocks of `SIZE` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn quantize<E: Element, const SIZE: usize>(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    let lookup = Lookup::new(blocks.codebook);
    let mut lanes = Lanes::new();
    in_groups::<E, GROUP>(SIZE, blocks, |source, packed, figures| {
        quantize_group::<E, SIZE>(source, &lookup, &mut lanes, packed, figures)
    })
}

/// Quantizes up to [`GROUP`] whole blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_group<E: Element, const SIZE: usize>(
    source: &[u8],
    lookup: &Lookup,
    lanes: &mut Lanes,
    packed: &mut [u8],
    figures: BlockErrors<'_>,
) -> Result<(), NonFinite> {
    let sources = || source.chunks_exact(SIZE * E::DTYPE.size());
    for (largest, source) in lanes.largest.iter_mut().zip(sources()) {
        *largest = _mm512_castsi512_ps(magnitudes::<E>(source));
    }
    let absmax = absmax::<E>(&lanes.largest);
    if _mm512_cmpge_epu32_mask(_mm512_castps_si512(absmax), _mm512_set1_epi32(f32::INFINITY.to_bits() as i32)) != 0 {
        return Err(NonFinite);
    }
    let divisor = _mm512_max_ps(absmax, _mm512_set1_ps(ABSMAX_FLOOR));
    let reciprocals = to_array(_mm512_div_ps(_mm512_set1_ps(1.0), divisor));

    for (i, (source, packed)) in sources().zip(packed.chunks_exact_mut(SIZE / 2)).enumerate().take(GROUP) {
        let sums = quantize_block::<E, SIZE>(source, reciprocals[i], lookup, packed);
        (lanes.signal[i], lanes.noise[i], lanes.worst[i]) = (halve(sums.signal), halve(sums.noise), sums.worst);
    }
    let results = [
        (absmax, figures.absmax),
        (tree(&lanes.signal, |a, b| _mm512_add_ps(a, b)), figures.signal),
        (tree(&lanes.noise, |a, b| _mm512_add_ps(a, b)), figures.noise),
        (tree(&lanes.worst, |a, b| _mm512_max_ps(a, b)), figures.worst),
    ];
    for (result, figures) in results {
        figures.copy_from_slice(&to_array(result)[..figures.len()]);
    }
    Ok(())
}

/// Quantizes one whole block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_block<E: Element, const SIZE: usize>(
    source: &[u8],
    reciprocal: f32,
    lookup: &Lookup,
    packed: &mut [u8],
) -> Sums {
    let reciprocal = _mm512_set1_ps(reciprocal);
    let mut sums = Sums::new();
    for (source, packed) in source.chunks_exact(CHUNK * E::DTYPE.size()).zip(packed.as_chunks_mut().0) {
        let (even, odd) = load::<E>(source);
        let even = quantize_vector::<0>(_mm512_mul_ps(even, reciprocal), lookup, &mut sums);
        let odd = quantize_vector::<1>(_mm512_mul_ps(odd, reciprocal), lookup, &mut sums);
        // The even element's code in the high nibble: bits of `even` where the mask has ones, of `odd` elsewhere.
        let bytes = _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(0xf0), even, odd);
        store_bytes(_mm512_cvtepi32_epi8(bytes), packed);
    }
    sums
}

/// The codes of sixteen scaled elements, in both nibbles of each lane's low byte.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_vector<const ODD: usize>(t: __m512, lookup: &Lookup, sums: &mut Sums) -> __m512i {
    /// vrangeps: the larger absolute value, its sign cleared.
    const MAX_ABS: i32 = 0b10_11;
    let code = lookup.code(t);
    let error = _mm512_sub_ps(t, _mm512_permutexvar_ps(code, lookup.values));
    sums.signal[ODD] = _mm512_fmadd_ps(t, t, sums.signal[ODD]);
    sums.noise[ODD] = _mm512_fmadd_ps(error, error, sums.noise[ODD]);
    sums.worst = _mm512_range_ps::<MAX_ABS>(sums.worst, error);
    code
}

/// The running sums of a block, by even or odd, and lane.
struct Sums {
    signal: [__m512; 2],
    noise: [__m512; 2],
    worst: __m512,
}

impl Sums {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new() -> Sums {
        let zero = _mm512_setzero_ps();
        Sums { signal: [zero; 2], noise: [zero; 2], worst: zero }
    }
}

/// The first step of scalar.rs's tree: adds neighbours.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn halve([even, odd]: [__m512; 2]) -> __m512 {
    _mm512_add_ps(even, odd)
}

/// The vectors of a group whose lanes are still to be folded, one per block.
struct Lanes {
    largest: [__m512; GROUP],
    signal: [__m512; GROUP],
    noise: [__m512; GROUP],
    worst: [__m512; GROUP],
}

impl Lanes {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new() -> Lanes {
        let zeros = [_mm512_setzero_ps(); GROUP];
        Lanes { largest: zeros, signal: zeros, noise: zeros, worst: zeros }
    }
}

/// A codebook as tables for in-register lookup.
///
/// The line is cut into bins so narrow that no bin holds two thresholds; an element's bin then says which two codes are
/// left, and one comparison decides. Bins contain their lower edge, so that a threshold just below it (of 0.0 in FP4) needs no
/// comparison: what is greater is in the next bin.
struct Lookup {
    /// By bin: the threshold within, or infinity.
    thresholds: [__m512; 2],
    /// By bin: the code up to the threshold in byte 0 and the one above it in byte 1, both in both nibbles.
    codes: [__m512i; 2],
    /// By code.
    values: __m512,
}

impl Lookup {
    const BINS: u32 = 32;
    /// Bins are narrower than the least distance between thresholds (that at an edge aside), yet few enough that those of
    /// all elements, from -16 (t = -1) to 15 (t = 1), differ modulo [`Lookup::BINS`].
    const BINS_PER_UNIT: f32 = 15.4;
    /// -16, modulo [`Lookup::BINS`].
    const LOWEST_BIN: u32 = 16;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(codebook: &Codebook) -> Lookup {
        let thresholds = codebook.thresholds();
        let bins =
            |x: [f32; 15]| to_array(_mm512_castsi512_ps(bin(from_slice(&x)))).map(|bin| bin.to_bits() % Self::BINS);
        let (bins, next_bins) = (bins(thresholds), bins(thresholds.map(f32::next_up)));

        let (mut threshold_of_bin, mut codes_of_bin) = ([f32::INFINITY; Self::BINS as usize], [0; Self::BINS as usize]);
        let both_nibbles = |rank: usize| i32::from(codebook.code_of_rank[rank]) * 0x11;
        let mut rank = 0;
        for bin in (0..Self::BINS).map(|i| (i + Self::LOWEST_BIN) % Self::BINS) {
            let at = bin as usize;
            codes_of_bin[at] = both_nibbles(rank);
            while rank < thresholds.len() && bins[rank] == bin {
                if next_bins[rank] == bin {
                    assert!(threshold_of_bin[at] == f32::INFINITY, "two thresholds in a bin");
                    threshold_of_bin[at] = thresholds[rank];
                    codes_of_bin[at] |= both_nibbles(rank + 1) << 8;
                }
                rank += 1;
            }
        }
        assert!(rank == thresholds.len(), "a threshold beyond the bins");
        let halves = |table: [f32; Self::BINS as usize]| [from_slice(&table[..16]), from_slice(&table[16..])];
        Lookup {
            thresholds: halves(threshold_of_bin),
            codes: halves(codes_of_bin.map(|codes| f32::from_bits(codes as u32))).map(|half| _mm512_castps_si512(half)),
            values: from_slice(&codebook.values()),
        }
    }

    /// The codes of scaled elements, in both nibbles of each lane's low byte.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn code(&self, t: __m512) -> __m512i {
        let bin = bin(t);
        let threshold = _mm512_permutex2var_ps(self.thresholds[0], bin, self.thresholds[1]);
        let codes = _mm512_permutex2var_epi32(self.codes[0], bin, self.codes[1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(t, threshold);
        _mm512_mask_srli_epi32::<8>(codes, above, codes)
    }
}

/// The bin of each element, in the low five bits: floor(t * BINS_PER_UNIT), exactly.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn bin(t: __m512) -> __m512i {
    /// 1.5 * 2^23, whose ulp is 1: rounding the sum with a small number down leaves a whole number in the low bits.
    const UNITS: f32 = 12582912.0;
    const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let (scale, units) = (_mm512_set1_ps(Lookup::BINS_PER_UNIT), _mm512_set1_ps(UNITS));
    _mm512_castps_si512(_mm512_fmadd_round_ps::<DOWN>(t, scale, units))
}

/// 32 elements as f32: the even ones, the odd ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load<E: Element>(chunk: &[u8]) -> (__m512, __m512) {
    let vectors = chunk.as_chunks().0;
    match E::DTYPE {
        FloatDtype::Bfloat16 => {
            let pairs = load_bytes(&vectors[0]);
            let (even, odd) = (_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
            (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
        }
        FloatDtype::Float16 => {
            let pairs = load_bytes(&vectors[0]);
            let (even, odd) = (_mm512_cvtepi32_epi16(pairs), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(pairs)));
            (_mm512_cvtph_ps(even), _mm512_cvtph_ps(odd))
        }
        FloatDtype::Float32 => {
            let (low, high) = (load_bytes(&vectors[0]), load_bytes(&vectors[1]));
            let (low, high) = (_mm512_castsi512_ps(low), _mm512_castsi512_ps(high));
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
            (_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high))
        }
    }
}

/// The largest magnitudes of a block, by lane: bits of its dtype without the sign, whose order is the magnitudes'.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn magnitudes<E: Element>(block: &[u8]) -> __m512i {
    let mut largest = _mm512_setzero_si512();
    for bytes in block.as_chunks().0 {
        let bits = _mm512_and_si512(load_bytes(bytes), _mm512_set1_epi32(E::MAGNITUDE as i32));
        largest = max_bits::<E>(largest, bits);
    }
    largest
}

/// Each block's absmax; infinite or NaN when one of its elements is.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn absmax<E: Element>(magnitudes: &[__m512; GROUP]) -> __m512 {
    let largest = _mm512_castps_si512(tree(magnitudes, |a, b| {
        _mm512_castsi512_ps(max_bits::<E>(_mm512_castps_si512(a), _mm512_castps_si512(b)))
    }));
    let of_pair = _mm512_max_epu16(largest, _mm512_srli_epi32::<16>(largest));
    match E::DTYPE {
        FloatDtype::Bfloat16 => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(of_pair)),
        FloatDtype::Float16 => _mm512_cvtph_ps(_mm512_cvtepi32_epi16(of_pair)),
        FloatDtype::Float32 => _mm512_castsi512_ps(largest),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn max_bits<E: Element>(a: __m512i, b: __m512i) -> __m512i {
    match E::DTYPE {
        FloatDtype::Bfloat16 | FloatDtype::Float16 => _mm512_max_epu16(a, b),
        FloatDtype::Float32 => _mm512_max_epu32(a, b),
    }
}

/// scalar.rs's tree over the sixteen lanes of each block: folds the upper half onto the lower until one is left.
///
/// Lane `i` of the result is block `i`'s. Each step halves the lanes of a block and the number of vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn tree(blocks: &[__m512; GROUP], fold: impl Fn(__m512, __m512) -> __m512) -> __m512 {
    let to_8 = |a, b| fold(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let to_4 = |a, b| fold(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let to_2 = |a, b| fold(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
    let to_1 = |a, b| fold(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
    // The steps leave block 4j + i in lane 4i + j, so the blocks are taken in that order.
    let quarter = |i: usize| to_4(to_8(blocks[i], blocks[4 + i]), to_8(blocks[8 + i], blocks[12 + i]));
    to_1(to_2(quarter(0), quarter(1)), to_2(quarter(2), quarter(3)))
}

/// The vector of up to sixteen numbers, zeros after them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn from_slice(numbers: &[f32]) -> __m512 {
    let mut array = [0.0; 16];
    array[..numbers.len()].copy_from_slice(numbers);
    // SAFETY: the array is a vector's 64 bytes.
    unsafe { _mm512_loadu_ps(array.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn to_array(vector: __m512) -> [f32; 16] {
    let mut array = [0.0; 16];
    // SAFETY: the array is a vector's 64 bytes.
    unsafe { _mm512_storeu_ps(array.as_mut_ptr(), vector) };
    array
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load_bytes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array is a vector's 64 bytes; they need no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn store_bytes(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the array is a vector's 16 bytes; they need no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}
