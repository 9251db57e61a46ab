//! E2M1 codes: groups of 16 (NVFP4) or 32 (MXFP4), transposed so that a vector has one element of each group and the
//! groups' sums need no folding across lanes.

use std::arch::x86_64::*;

use super::scales::{Scales, reciprocals};
use super::{Groups, NonFinite, Outcome, larger};
use crate::kernel::avx2::*;
use crate::kernel::element::Element;

/// Groups in a batch: two vectors of scales, so that the divisions behind one are not waited for alone.
pub(super) const BATCH: usize = 2 * LANES;

/// Quantizes [`BATCH`] groups of `2 * PAIRS` elements.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn quantize<E: Element, const PAIRS: usize, const POWERS_OF_TWO: bool>(
    batch: &mut Groups<'_>,
    choose: impl Fn(__m256) -> Scales,
) -> Result<Outcome, NonFinite> {
    let (source, rest) = batch.source.split_at(batch.source.len() / 2);
    let pairs = [transposed::<E, PAIRS>(source), transposed::<E, PAIRS>(rest)];
    let absmax = [absmax::<E, PAIRS>(&pairs[0]), absmax::<E, PAIRS>(&pairs[1])];
    if !(is_finite(absmax[0]) && is_finite(absmax[1])) {
        return Err(NonFinite);
    }
    let scales = [choose(absmax[0]), choose(absmax[1])];
    // Dividing by zero is left to scalar.rs, which tells what is NaN then.
    let least = _mm256_min_ps(scales[0].scale, scales[1].scale);
    if _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(least, _mm256_setzero_ps())) != 0 {
        return Ok(Outcome::Unusual);
    }
    codes::<E, PAIRS, POWERS_OF_TWO>(&pairs[0], &scales[0], &mut batch.part(0..LANES));
    codes::<E, PAIRS, POWERS_OF_TWO>(&pairs[1], &scales[1], &mut batch.part(LANES..BATCH));
    Ok(Outcome::Quantized)
}

/// The largest magnitude of each group.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn absmax<E: Element, const PAIRS: usize>(pairs: &[Pairs; PAIRS]) -> __m256 {
    let max = |a, b| max_unsigned::<E>(a, b);
    let mut largest = _mm256_setzero_si256();
    for [first, second] in pairs {
        largest = max(largest, magnitudes::<E>(*first));
        if E::SIZE == 4 {
            largest = max(largest, magnitudes::<E>(*second));
        }
    }
    of_pairs::<E>(largest, max)
}

/// Writes everything of groups that have their scales.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn codes<E: Element, const PAIRS: usize, const POWERS_OF_TWO: bool>(
    pairs: &[Pairs; PAIRS],
    scales: &Scales,
    batch: &mut Groups<'_>,
) {
    let e2m1 = E2m1::<POWERS_OF_TWO>::new::<E>(scales);
    let (fours, _) = pairs.as_chunks();
    // scalar.rs's tree folds the upper half onto the lower.
    let (first, second) = (e2m1.quantize::<E>(&fours[0]), e2m1.quantize::<E>(&fours[1]));
    let sums = if PAIRS == 8 {
        store_codes_of_16([first.codes, second.codes], batch.packed);
        first.plus(&second)
    } else {
        let (third, fourth) = (e2m1.quantize::<E>(&fours[2]), e2m1.quantize::<E>(&fours[3]));
        store_codes_of_32([first.codes, second.codes, third.codes, fourth.codes], batch.packed);
        first.plus(&third).plus(&second.plus(&fourth))
    };
    batch.scales.copy_from_slice(&low_bytes(scales.stored));
    let figures = &mut batch.figures;
    figures.absmax.copy_from_slice(&to_array(scales.scale));
    figures.signal.copy_from_slice(&to_array(sum(sums.signal)));
    figures.noise.copy_from_slice(&to_array(sum(sums.noise)));
    figures.worst.copy_from_slice(&to_array(sums.worst));
}

/// What is made of four pairs of each group.
struct Four {
    signal: [__m256; 4],
    noise: [__m256; 4],
    worst: __m256,
    /// Two codes per byte.
    codes: __m256i,
}

impl Four {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn plus(&self, other: &Four) -> Four {
        Four {
            signal: add(self.signal, other.signal),
            noise: add(self.noise, other.noise),
            worst: _mm256_max_ps(self.worst, other.worst),
            codes: self.codes,
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add(a: [__m256; 4], b: [__m256; 4]) -> [__m256; 4] {
    [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1]), _mm256_add_ps(a[2], b[2]), _mm256_add_ps(a[3], b[3])]
}

/// The last steps of scalar.rs's tree.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum([a, b, c, d]: [__m256; 4]) -> __m256 {
    _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d))
}

/// What eight groups' elements are rounded to E2M1 by.
struct E2m1<const POWERS_OF_TWO: bool> {
    /// What elements are divided by; or, where that is a power of two, multiplied, which rounds as dividing does.
    divisor: __m256,
    /// Ratios below are negative.
    below: __m256,
}

impl<const POWERS_OF_TWO: bool> E2m1<POWERS_OF_TWO> {
    /// Steps that are added for the power of 1, so that the low byte has the code: 2 * (127 + 22) and this are 512. An even
    /// number leaves ties as they are.
    const ORIGIN: i32 = 214;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new<E: Element>(scales: &Scales) -> E2m1<POWERS_OF_TWO> {
        // MXFP4's elements are rounded to their dtype before they are coded. Only what rounds to zero is changed by that.
        let below = if POWERS_OF_TWO { -E::NOTHING } else { 0.0 };
        let divisor = if POWERS_OF_TWO { reciprocals(scales) } else { scales.scale };
        E2m1 { divisor, below: _mm256_set1_ps(below) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn quantize<E: Element>(&self, pairs: &[Pairs; 4]) -> Four {
        let zero = _mm256_setzero_ps();
        let (mut signal, mut noise, mut worst) = ([zero; 4], [zero; 4], zero);
        let mut bytes = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            let [even, odd] = halves::<E>(pairs[i]);
            let ratios = [self.ratio(even), self.ratio(odd)];
            let ((even, even_error), (odd, odd_error)) = (self.code(ratios[0]), self.code(ratios[1]));
            signal[i] = sum_of_squares(ratios);
            noise[i] = sum_of_squares([even_error, odd_error]);
            worst = larger(larger(worst, even_error), odd_error);
            bytes[i] = _mm256_add_epi32(even, _mm256_slli_epi32::<4>(odd));
        }
        Four { signal, noise, worst, codes: word_of_bytes(bytes) }
    }

    /// Elements over their scale.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn ratio(&self, x: __m256) -> __m256 {
        if POWERS_OF_TWO { _mm256_mul_ps(x, self.divisor) } else { _mm256_div_ps(x, self.divisor) }
    }

    /// The codes of ratios, in the low bytes modulo 256; and the ratios' errors, of either sign.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn code(&self, ratio: __m256) -> (__m256i, __m256) {
        let magnitude = magnitude(ratio);
        let clamped = _mm256_min_ps(magnitude, _mm256_set1_ps(6.0));
        // The power of two below the number, or 1. An ulp of 2^22 times that is the step between values here.
        let power = _mm256_and_ps(clamped, _mm256_set1_ps(f32::INFINITY));
        let power = _mm256_castps_si256(_mm256_max_ps(power, _mm256_set1_ps(1.0)));
        let steps = _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(22 << 23 | Self::ORIGIN)));
        let sum = _mm256_add_ps(clamped, steps);
        let error = _mm256_sub_ps(magnitude, _mm256_sub_ps(sum, steps));
        // The code is the number of steps, in the sum's low bits, and two for each doubling of the power.
        let sum = _mm256_castps_si256(sum);
        let code = _mm256_add_epi32(sum, _mm256_srli_epi32::<22>(sum));
        let is_negative = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(ratio, self.below));
        let sign = _mm256_and_si256(is_negative, _mm256_set1_epi32(8));
        (_mm256_add_epi32(code, sign), error)
    }
}

/// The first step of scalar.rs's tree. Each of its lanes has one element, whose square is rounded before it is added.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of_squares([even, odd]: [__m256; 2]) -> __m256 {
    _mm256_add_ps(_mm256_mul_ps(even, even), _mm256_mul_ps(odd, odd))
}

/// Vector `k` has the elements `2k` and `2k + 1` of group `i` in lane `i`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn transposed<E: Element, const PAIRS: usize>(source: &[u8]) -> [Pairs; PAIRS] {
    let mut pairs = [[_mm256_setzero_si256(); 2]; PAIRS];
    // Sixteen bytes of each group at a time.
    let (sixteens, _) = source.as_chunks::<16>();
    let per_group = PAIRS * E::SIZE / 8;
    for part in 0..per_group {
        let row = |group: usize| load_16(&sixteens[group * per_group + part]);
        let rows = |i: usize| _mm256_set_m128i(row(i + 4), row(i));
        let columns = transposed_lanes([rows(0), rows(1), rows(2), rows(3)]);
        if E::SIZE == 2 {
            for (pairs, column) in pairs[4 * part..].iter_mut().zip(columns) {
                pairs[0] = column;
            }
        } else {
            let [a, b, c, d] = columns;
            (pairs[2 * part], pairs[2 * part + 1]) = ([a, b], [c, d]);
        }
    }
    pairs
}

/// Within each half: vector `i`'s lane `j` in vector `j`'s lane `i`.
#[target_feature(enable = "avx2,fma,f16c")]
fn transposed_lanes([a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
    let (low_ab, high_ab) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (low_cd, high_cd) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(low_ab, low_cd),
        _mm256_unpackhi_epi64(low_ab, low_cd),
        _mm256_unpacklo_epi64(high_ab, high_cd),
        _mm256_unpackhi_epi64(high_ab, high_cd),
    ]
}

/// Writes the codes of groups of 16: eight bytes each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_codes_of_16([first, second]: [__m256i; 2], packed: &mut [u8]) {
    let (packed, _) = packed.as_chunks_mut();
    for (i, groups) in
        [_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second)].into_iter().enumerate()
    {
        store_16(_mm256_castsi256_si128(groups), &mut packed[i]);
        store_16(_mm256_extracti128_si256::<1>(groups), &mut packed[i + 2]);
    }
}

/// Writes the codes of groups of 32: sixteen bytes each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_codes_of_32(words: [__m256i; 4], packed: &mut [u8]) {
    let (packed, _) = packed.as_chunks_mut();
    for (i, groups) in transposed_lanes(words).into_iter().enumerate() {
        store_16(_mm256_castsi256_si128(groups), &mut packed[i]);
        store_16(_mm256_extracti128_si256::<1>(groups), &mut packed[i + 4]);
    }
}

/// The low bytes of four vectors' lanes in one vector's.
#[target_feature(enable = "avx2,fma,f16c")]
fn word_of_bytes([a, b, c, d]: [__m256i; 4]) -> __m256i {
    // Whatever is in the bytes above comes to lie in those of the next vector, or past the word.
    let pair = |low, high| {
        let low = _mm256_and_si256(low, _mm256_set1_epi32(0xff));
        _mm256_or_si256(low, _mm256_slli_epi32::<8>(high))
    };
    _mm256_blend_epi16::<0b1010_1010>(pair(a, b), _mm256_slli_epi32::<16>(pair(c, d)))
}
