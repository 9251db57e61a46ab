//! E2M1 codes: groups of 16 (NVFP4) or 32 (MXFP4), transposed so that a vector has two neighbours of each group and the
//! groups' sums need no folding across lanes.

use std::arch::x86_64::*;

use super::scales::{Scales, reciprocals};
use super::{Groups, LANES, NonFinite, Outcome, finite, halves, larger, load, of_pairs, store, store_16, to_array};

/// Elements over their scale that are at least this large have no place in [`E2m1`]'s tables. Only a `global_scale` far
/// from what the absmax asks for makes them.
const RATIO_LIMIT: f32 = 16.0;

/// Groups in a batch: several vectors of scales, so that the divisions behind one are not waited for alone.
pub(super) const BATCH: usize = LANES * VECTORS;

const VECTORS: usize = 4;

/// Quantizes [`BATCH`] groups of `2 * PAIRS` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn quantize<const PAIRS: usize, const POWERS_OF_TWO: bool>(
    batch: &mut Groups<'_>,
    choose: impl Fn(__m512) -> Scales,
) -> Result<Outcome, NonFinite> {
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut largest) = ([[zero; PAIRS]; VECTORS], [zero; VECTORS]);
    for (i, source) in batch.source.chunks_exact(LANES * PAIRS * 4).enumerate().take(VECTORS) {
        pairs[i] = transposed(source);
        for &pairs in &pairs[i] {
            largest[i] = _mm512_max_epu16(largest[i], _mm512_and_si512(pairs, _mm512_set1_epi32(0x7fff_7fff)));
        }
    }
    let mut scales = [Scales { stored: zero, scale: _mm512_setzero_ps() }; VECTORS];
    let mut usual = 0xffff;
    for (largest, scales) in largest.into_iter().zip(&mut scales) {
        let absmax = finite(of_pairs(largest, |a, b| _mm512_max_epu16(a, b)))?;
        *scales = choose(absmax);
        let limit = _mm512_mul_ps(scales.scale, _mm512_set1_ps(RATIO_LIMIT));
        usual &= _mm512_cmp_ps_mask::<_CMP_LT_OQ>(absmax, limit);
    }
    if usual != 0xffff {
        return Ok(Outcome::Unusual);
    }
    for (i, (pairs, scales)) in pairs.iter().zip(&scales).enumerate() {
        codes::<PAIRS, POWERS_OF_TWO>(pairs, scales, &mut batch.part(i * LANES..(i + 1) * LANES));
    }
    Ok(Outcome::Quantized)
}

/// Writes everything of groups that have their scales.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn codes<const PAIRS: usize, const POWERS_OF_TWO: bool>(
    pairs: &[__m512i; PAIRS],
    scales: &Scales,
    batch: &mut Groups<'_>,
) {
    let e2m1 = E2m1::new(POWERS_OF_TWO);
    // Multiplying by a power of two rounds as dividing by its reciprocal does.
    let divisor = if POWERS_OF_TWO { reciprocals(scales) } else { scales.scale };
    let divide = |x| if POWERS_OF_TWO { _mm512_mul_ps(x, divisor) } else { _mm512_div_ps(x, divisor) };
    let (mut signal, mut noise) = ([_mm512_setzero_ps(); PAIRS], [_mm512_setzero_ps(); PAIRS]);
    let (mut worst, mut codes) = (_mm512_setzero_ps(), [_mm512_setzero_si512(); 4]);
    for k in (0..PAIRS).rev() {
        let [even, odd] = halves(pairs[k]);
        let ratios = [divide(even), divide(odd)];
        let (even, odd) = (e2m1.code(ratios[0]), e2m1.code(ratios[1]));
        let errors = [_mm512_sub_ps(ratios[0], e2m1.value(even)), _mm512_sub_ps(ratios[1], e2m1.value(odd))];
        signal[k] = sum_of_squares(ratios);
        noise[k] = sum_of_squares(errors);
        worst = larger(larger(worst, errors[0]), errors[1]);
        // Bits of `even` where the mask has ones, of `odd` elsewhere.
        let byte = _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(0x0f), even, odd);
        codes[k / 4] = _mm512_or_si512(_mm512_slli_epi32::<8>(codes[k / 4]), byte);
    }
    store_codes::<PAIRS>(codes, batch.packed);
    let (scale_bytes, _) = batch.scales.as_chunks_mut();
    store_16(_mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(group_order(), scales.stored)), &mut scale_bytes[0]);
    let add = |a, b| _mm512_add_ps(a, b);
    let figures = &mut batch.figures;
    for (figure, into) in [
        (scales.scale, &mut *figures.absmax),
        (fold(signal, add), figures.signal),
        (fold(noise, add), figures.noise),
        (worst, figures.worst),
    ] {
        into.copy_from_slice(&to_array(_mm512_permutexvar_ps(group_order(), figure)));
    }
}

/// The first step of scalar.rs's tree. Each of its lanes has one element, whose square is rounded before it is added.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sum_of_squares([even, odd]: [__m512; 2]) -> __m512 {
    _mm512_add_ps(_mm512_mul_ps(even, even), _mm512_mul_ps(odd, odd))
}

/// The other steps: the upper half onto the lower until one is left.
#[inline(always)]
fn fold<T: Copy, const PAIRS: usize>(mut pairs: [T; PAIRS], with: impl Fn(T, T) -> T) -> T {
    let mut half = PAIRS / 2;
    while half > 0 {
        for i in 0..half {
            pairs[i] = with(pairs[i], pairs[i + half]);
        }
        half /= 2;
    }
    pairs[0]
}

/// Tables from which E2M1 codes and values are looked up.
///
/// All borders between codes are a quarter of a power of two apart, and at a border the code with the even mantissa is
/// taken. So the magnitude's bits, less one ulp where its own first mantissa bit is even, have the code in their exponent
/// and first two mantissa bits.
struct E2m1 {
    /// By the exponent's low three bits and two of the mantissa: magnitudes from 2 to 32, and from 1/8 to 2.
    codes: [__m512i; 2],
    /// By code.
    values: __m512,
    /// What is below is negative.
    below: __m512,
}

impl E2m1 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn new(of_mxfp4: bool) -> E2m1 {
        // MXFP4's elements are rounded to bf16 before they are coded. Only what rounds to zero is changed by that.
        let below = if of_mxfp4 { 0x8000_8000_u32 as i32 } else { 0 };
        // In both nibbles of the low byte: packing takes either.
        let twice = |codes| _mm512_or_si512(codes, _mm512_slli_epi32::<4>(codes));
        E2m1 {
            codes: [
                twice(_mm512_setr_epi32(4, 5, 5, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7)),
                twice(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4)),
            ],
            values: _mm512_setr_ps(
                0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
            ),
            below: _mm512_castsi512_ps(_mm512_set1_epi32(below)),
        }
    }

    /// The codes of elements over their scale, in both nibbles of each lane's low byte.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn code(&self, t: __m512) -> __m512i {
        // Nothing below 1/4 differs from this.
        let magnitude = _mm512_castps_si512(larger(t, _mm512_set1_ps(0.1875)));
        let is_even = _mm512_andnot_si512(_mm512_srli_epi32::<22>(magnitude), _mm512_set1_epi32(1));
        let key = _mm512_sub_epi32(magnitude, is_even);
        let code = _mm512_permutex2var_epi32(self.codes[0], _mm512_srli_epi32::<21>(key), self.codes[1]);
        let is_negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(t, self.below);
        _mm512_mask_or_epi32(code, is_negative, code, _mm512_set1_epi32(0x88))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn value(&self, code: __m512i) -> __m512 {
        _mm512_permutexvar_ps(code, self.values)
    }
}

/// For each group, the lane that [`transposed`] has it in; and the other way round.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn group_order() -> __m512i {
    _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
}

/// Vector `k` has each group's elements `2k` and `2k + 1`, group `4 * i + j` in lane `4 * j + i`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn transposed<const PAIRS: usize>(source: &[u8]) -> [__m512i; PAIRS] {
    let (vectors, _) = source.as_chunks();
    let zero = _mm512_setzero_si512();
    // Each group's quarters (or halves): one of four groups to a vector, by quarter and by which four.
    let mut quarters = [[zero; 4]; 4];
    for i in 0..LANES / 4 {
        let of_four_groups = if PAIRS == 16 {
            let vector = |j: usize| load(&vectors[4 * i + j]);
            transposed_quarters([vector(0), vector(1), vector(2), vector(3)])
        } else {
            let (low, high) = (load(&vectors[2 * i]), load(&vectors[2 * i + 1]));
            [_mm512_shuffle_i32x4::<0x88>(low, high), _mm512_shuffle_i32x4::<0xdd>(low, high), zero, zero]
        };
        for (quarter, of_four_groups) in quarters.iter_mut().zip(of_four_groups) {
            quarter[i] = of_four_groups;
        }
    }
    let mut pairs = [zero; PAIRS];
    for (pairs, quarter) in pairs.as_chunks_mut().0.iter_mut().zip(quarters) {
        *pairs = transposed_lanes(quarter);
    }
    pairs
}

/// Vector `i`'s quarter `j` in vector `j`'s quarter `i`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transposed_quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (low_ab, high_ab) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
    let (low_cd, high_cd) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
    [
        _mm512_shuffle_i32x4::<0x88>(low_ab, low_cd),
        _mm512_shuffle_i32x4::<0xdd>(low_ab, low_cd),
        _mm512_shuffle_i32x4::<0x88>(high_ab, high_cd),
        _mm512_shuffle_i32x4::<0xdd>(high_ab, high_cd),
    ]
}

/// Within each quarter: vector `i`'s lane `j` in vector `j`'s lane `i`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transposed_lanes([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (low_ab, high_ab) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (low_cd, high_cd) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(low_ab, low_cd),
        _mm512_unpackhi_epi64(low_ab, low_cd),
        _mm512_unpacklo_epi64(high_ab, high_cd),
        _mm512_unpackhi_epi64(high_ab, high_cd),
    ]
}

/// Writes codes, of which each lane of vector `i` has eight, from pair `4 * i` on, of the group that [`transposed`] says.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn store_codes<const PAIRS: usize>(codes: [__m512i; 4], packed: &mut [u8]) {
    let (packed, _) = packed.as_chunks_mut();
    if PAIRS == 16 {
        let in_order = transposed_lanes(codes);
        for (packed, codes) in packed.iter_mut().zip(in_order) {
            store(codes, packed);
        }
        return;
    }
    let first_half = _mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 1, 17, 5, 21, 9, 25, 13, 29);
    let second_half = _mm512_add_epi32(first_half, _mm512_set1_epi32(2));
    store(_mm512_permutex2var_epi32(codes[0], first_half, codes[1]), &mut packed[0]);
    store(_mm512_permutex2var_epi32(codes[0], second_half, codes[1]), &mut packed[1]);
}
