//! The AVX2 kernel: 32 elements at a time, eight even or eight odd ones in a vector.

use std::arch::x86_64::*;

use super::vector::{CHUNK, in_groups};
use crate::format::Codebook;
use crate::kernel::avx2::*;
use crate::kernel::block::scalar::ABSMAX_FLOOR;
use crate::kernel::element::Element;
use crate::kernel::{BlockErrors, Blocks, NonFinite};

/// Blocks in a group: one for each lane of a vector of figures.
const GROUP: usize = LANES;

/// Quantizes a run of blocks of `SIZE` elements.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize<E: Element, const SIZE: usize>(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    let lookup = Lookup::new(blocks.codebook);
    let mut lanes = Lanes::new();
    in_groups::<E, GROUP>(SIZE, blocks, |source, packed, figures| {
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
    for (lanes, source) in lanes.largest.iter_mut().zip(sources()) {
        *lanes = largest(source, |a, b| max_unsigned::<E>(a, magnitudes::<E>(b)));
    }
    let max = |a, b| max_unsigned::<E>(a, b);
    let absmax = of_pairs::<E>(integer_tree(&lanes.largest, max), max);
    if !is_finite(absmax) {
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
        store_16(lookup.codes(low, high), packed);
    }
    sums
}

/// Minus the ranks of eight pairs of elements, in 16 bits each: of four even ones, the four odd ones, and so on.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_pairs<E: Element, const HALF: usize>(
    source: &[u8],
    reciprocal: __m256,
    lookup: &Lookup,
    sums: &mut Sums,
) -> __m256i {
    let [even, odd] = halves::<E>(load::<E>(source));
    let even = quantize_vector::<HALF, 0>(_mm256_mul_ps(even, reciprocal), lookup, sums);
    let odd = quantize_vector::<HALF, 1>(_mm256_mul_ps(odd, reciprocal), lookup, sums);
    let bits = _mm256_packs_epi32(even.bits, odd.bits);
    let last = _mm256_packs_epi32(even.last, odd.last);
    _mm256_add_epi16(_mm256_add_epi16(bits, bits), last)
}

/// Adds eight scaled elements to the sums.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_vector<const HALF: usize, const ODD: usize>(t: __m256, lookup: &Lookup, sums: &mut Sums) -> MinusRank {
    let (minus_rank, value) = lookup.minus_rank_and_value(t);
    let (signal, noise) = (&mut sums.signal[HALF][ODD], &mut sums.noise[HALF][ODD]);
    let error = _mm256_sub_ps(t, value);
    *signal = _mm256_fmadd_ps(t, t, *signal);
    *noise = _mm256_fmadd_ps(error, error, *noise);
    sums.worst = _mm256_max_ps(sums.worst, magnitude(error));
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
    largest: [__m256i; GROUP],
    signal: [__m256; GROUP],
    noise: [__m256; GROUP],
    worst: [__m256; GROUP],
}

impl Lanes {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Lanes {
        let zeros = [_mm256_setzero_ps(); GROUP];
        Lanes { largest: [_mm256_setzero_si256(); GROUP], signal: zeros, noise: zeros, worst: zeros }
    }
}

/// A codebook as tables for a search in registers: comparisons with the middle threshold and those in the middle of the
/// halves give the rank's first two bits, two more comparisons the others.
///
/// A comparison gives 0 or -1. Bits are gathered into minus the rank, of which tables are indexed with the low bits, so
/// they are laid out backwards.
struct Lookup {
    /// The fourth, the eighth and the twelfth threshold.
    quarters: [__m256; 3],
    /// By minus the rank's first two bits: the third threshold to compare with; twice, for each half of a vector.
    thirds: __m256,
    /// By minus the rank's first three bits: the last threshold to compare with, the value below it, and the bits in which
    /// that above it differs.
    fourths: __m256,
    values: __m256,
    differences: __m256,
    /// By minus the rank, modulo 16; twice.
    codes: __m256i,
}

/// Minus the ranks of eight elements: twice the first three bits, and the last.
struct MinusRank {
    bits: __m256i,
    last: __m256i,
}

impl Lookup {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(codebook: &Codebook) -> Lookup {
        let thresholds = codebook.thresholds();
        let value = |rank: usize| codebook.values()[usize::from(codebook.code_of_rank[rank])];
        let codes: [u8; 16] = std::array::from_fn(|i| codebook.code_of_rank[i.wrapping_neg() % 16]);
        Lookup {
            quarters: [3, 7, 11].map(|rank| _mm256_set1_ps(thresholds[rank])),
            thirds: backwards(|bits| thresholds[4 * (bits % 4) + 1]),
            fourths: backwards(|bits| thresholds[2 * bits]),
            values: backwards(|bits| value(2 * bits)),
            differences: backwards(|bits| f32::from_bits(value(2 * bits).to_bits() ^ value(2 * bits + 1).to_bits())),
            codes: _mm256_broadcastsi128_si256(load_16(&codes)),
        }
    }

    /// Minus the ranks of scaled elements, and the values that they decode to.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn minus_rank_and_value(&self, t: __m256) -> (MinusRank, __m256) {
        let above = |threshold| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(t, threshold));
        let [first, second, third] = self.quarters;
        let bits = _mm256_add_epi32(_mm256_add_epi32(above(first), above(third)), above(second));
        let third = above(_mm256_permutevar_ps(self.thirds, bits));
        let bits = _mm256_add_epi32(_mm256_add_epi32(bits, bits), third);
        let last = above(_mm256_permutevar8x32_ps(self.fourths, bits));
        let value = _mm256_permutevar8x32_ps(self.values, bits);
        let difference = _mm256_permutevar8x32_ps(self.differences, bits);
        let value = _mm256_xor_ps(value, _mm256_and_ps(difference, _mm256_castsi256_ps(last)));
        (MinusRank { bits, last }, value)
    }

    /// The codes of ranks as [`quantize_pairs`] gives them, two per byte.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn codes(&self, low: __m256i, high: __m256i) -> __m128i {
        let ranks = _mm256_and_si256(_mm256_packs_epi16(low, high), _mm256_set1_epi8(0x0f));
        let codes = _mm256_shuffle_epi8(self.codes, ranks);
        // Of eight codes, four of even elements and the four of odd ones, which come to lie beside each other.
        let pairs = _mm256_or_si256(_mm256_slli_epi16::<4>(codes), _mm256_srli_epi64::<32>(codes));
        let in_order = _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6);
        _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(pairs, in_order))
    }
}

/// A table whose entry `i` is for the bits of which `i` is minus, modulo 8.
#[target_feature(enable = "avx2,fma,f16c")]
fn backwards(entry: impl Fn(usize) -> f32) -> __m256 {
    from_array(&std::array::from_fn(|i| entry(i.wrapping_neg() % 8)))
}
