//! E2M1 codes: groups of 16 (NVFP4) or 32 (MXFP4), transposed so that a vector has one element of each group and the
//! groups' sums need no folding across lanes.

use std::arch::x86_64::*;

use super::scales::{Scales, reciprocals};
use super::{Groups, NonFinite, Outcome, larger};
use crate::dtype::FloatDtype;
use crate::kernel::avx2::*;
use crate::kernel::element::Element;

/// Quantizes [`LANES`] groups of `2 * PAIRS` elements.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn quantize<E: Element, const PAIRS: usize, const POWERS_OF_TWO: bool>(
    batch: &mut Groups<'_>,
    choose: impl Fn(__m256) -> Scales,
) -> Result<Outcome, NonFinite> {
    let pairs = transposed::<E, PAIRS>(batch.source);
    let max = |a, b| max_unsigned::<E>(a, b);
    let mut largest = _mm256_setzero_si256();
    for pair in pairs {
        for elements in &pair[..E::SIZE / 2] {
            largest = max(largest, magnitudes::<E>(*elements));
        }
    }
    let absmax = of_pairs::<E>(largest, max);
    if !is_finite(absmax) {
        return Err(NonFinite);
    }
    let scales = choose(absmax);
    // Dividing by zero is left to scalar.rs, which tells what is NaN then.
    let is_zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(scales.scale, _mm256_setzero_ps());
    if _mm256_movemask_ps(is_zero) != 0 {
        return Ok(Outcome::Unusual);
    }
    codes::<E, PAIRS, POWERS_OF_TWO>(&pairs, &scales, batch);
    Ok(Outcome::Quantized)
}

/// Writes everything of groups that have their scales.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn codes<E: Element, const PAIRS: usize, const POWERS_OF_TWO: bool>(
    pairs: &[Pairs; PAIRS],
    scales: &Scales,
    batch: &mut Groups<'_>,
) {
    let e2m1 = E2m1::new::<E>(POWERS_OF_TWO);
    // Multiplying by a power of two rounds as dividing by its reciprocal does.
    let divisor = if POWERS_OF_TWO { reciprocals(scales) } else { scales.scale };
    let divide = |x| if POWERS_OF_TWO { _mm256_mul_ps(x, divisor) } else { _mm256_div_ps(x, divisor) };
    let zero = _mm256_setzero_ps();
    let (mut signal, mut noise, mut worst) = ([zero; PAIRS], [zero; PAIRS], zero);
    let mut bytes = [_mm256_setzero_si256(); PAIRS];
    for k in 0..PAIRS {
        let [even, odd] = halves::<E>(pairs[k]);
        let (even, odd) = (e2m1.quantize(divide(even)), e2m1.quantize(divide(odd)));
        // Each lane of scalar.rs's sums has one element, whose square is rounded before it is added.
        let add_squares = |a, b| _mm256_add_ps(_mm256_mul_ps(a, a), _mm256_mul_ps(b, b));
        signal[k] = add_squares(even.ratio, odd.ratio);
        noise[k] = add_squares(even.error, odd.error);
        worst = larger(larger(worst, even.error), odd.error);
        bytes[k] = _mm256_add_epi32(even.code, _mm256_slli_epi32::<4>(odd.code));
    }
    store_codes::<PAIRS>(bytes, batch.packed);
    batch.scales.copy_from_slice(&low_bytes(scales.stored));
    let figures = &mut batch.figures;
    figures.absmax.copy_from_slice(&to_array(scales.scale));
    figures.signal.copy_from_slice(&to_array(fold(signal)));
    figures.noise.copy_from_slice(&to_array(fold(noise)));
    figures.worst.copy_from_slice(&to_array(worst));
}

/// scalar.rs's tree after its first step: the upper half onto the lower until one is left.
#[target_feature(enable = "avx2,fma,f16c")]
fn fold<const PAIRS: usize>(mut pairs: [__m256; PAIRS]) -> __m256 {
    let mut half = PAIRS / 2;
    while half > 0 {
        for i in 0..half {
            pairs[i] = _mm256_add_ps(pairs[i], pairs[i + half]);
        }
        half /= 2;
    }
    pairs[0]
}

/// What rounds to E2M1.
struct E2m1 {
    /// What is below is negative.
    below: __m256,
}

/// Elements over their scale.
struct Quantized {
    ratio: __m256,
    /// The ratio less what its code stands for; of negative ratios, the other way round.
    error: __m256,
    /// In the low byte, modulo 256; above it are other things.
    code: __m256i,
}

impl E2m1 {
    /// Steps that are added for the power of 1, so that the low byte has the code: 2 * (127 + 22) and this are 512. An even
    /// number leaves ties as they are.
    const ORIGIN: i32 = 214;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new<E: Element>(of_mxfp4: bool) -> E2m1 {
        // MXFP4's elements are rounded to their dtype before they are coded. Only what rounds to zero is changed by that: up
        // to half the least number.
        let below = match E::DTYPE {
            FloatDtype::Bfloat16 if of_mxfp4 => f32::from_bits(0x8000_8000),
            FloatDtype::Float16 if of_mxfp4 => f32::from_bits(0xb300_0000),
            _ => 0.0,
        };
        E2m1 { below: _mm256_set1_ps(below) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn quantize(&self, ratio: __m256) -> Quantized {
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
        Quantized { ratio, error, code: _mm256_add_epi32(code, sign) }
    }
}

/// Vector `k` has the elements `2k` and `2k + 1` of group `i` in lane `i`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn transposed<E: Element, const PAIRS: usize>(source: &[u8]) -> [Pairs; PAIRS] {
    let zero = _mm256_setzero_si256();
    let mut pairs = [[zero; 2]; PAIRS];
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

/// Writes codes, of which each lane's low byte has a pair of one group.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_codes<const PAIRS: usize>(bytes: [__m256i; PAIRS], packed: &mut [u8]) {
    let mut words = [_mm256_setzero_si256(); 4];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = word_of_bytes(*bytes);
    }
    let (packed, _) = packed.as_chunks_mut();
    let both = |x| [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)];
    if PAIRS == 16 {
        for (i, group) in transposed_lanes(words).into_iter().enumerate() {
            let [low, high] = both(group);
            store_16(low, &mut packed[i]);
            store_16(high, &mut packed[i + 4]);
        }
        return;
    }
    let [first, second, ..] = words;
    for (i, groups) in
        [_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second)].into_iter().enumerate()
    {
        let [low, high] = both(groups);
        store_16(low, &mut packed[i]);
        store_16(high, &mut packed[i + 2]);
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
