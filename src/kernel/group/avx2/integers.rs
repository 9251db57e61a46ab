//! Integer codes, with or without zero points: groups of whole vectors, one after the other, whose lanes are folded for
//! eight groups together.

use std::arch::x86_64::*;

use super::super::scalar::epsilon;
use super::{Groups, NonFinite, Outcome, larger, round, select};
use crate::dtype::FloatDtype;
use crate::kernel::avx2::*;
use crate::kernel::block::scalar;
use crate::kernel::element::Element;

/// Quantizes [`LANES`] groups of whole chunks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn quantize<E: Element, const ASYMMETRIC: bool>(batch: &mut Groups<'_>) -> Result<Outcome, NonFinite> {
    let Scales { scale, zero_point } = scales::<E, ASYMMETRIC>(batch.source)?;
    let (scales, zero_points) = (to_array(scale), to_array(zero_point));
    let zeros = [_mm256_setzero_ps(); LANES];
    let (mut signal, mut noise, mut worst) = (zeros, zeros, zeros);
    let sources = batch.source.chunks_exact(batch.coding.group * E::SIZE);
    for (i, (source, packed)) in
        sources.zip(batch.packed.chunks_exact_mut(batch.coding.group / 2)).enumerate().take(LANES)
    {
        let sums = codes::<E, ASYMMETRIC>(source, scales[i], zero_points[i], packed);
        (signal[i], noise[i], worst[i]) = (halve(sums.signal), halve(sums.noise), sums.worst);
    }
    let figures = &mut batch.figures;
    figures.absmax.copy_from_slice(&scales);
    figures.signal.copy_from_slice(&to_array(tree(&signal, |a, b| _mm256_add_ps(a, b))));
    figures.noise.copy_from_slice(&to_array(tree(&noise, |a, b| _mm256_add_ps(a, b))));
    figures.worst.copy_from_slice(&to_array(tree(&worst, |a, b| _mm256_max_ps(a, b))));
    store_scales::<E>(scale, batch.scales);
    for (stored, point) in batch.zero_points.iter_mut().zip(zero_points) {
        *stored = (point + 8.0) as u8;
    }
    Ok(Outcome::Quantized)
}

/// The scales and zero points of the groups that the lanes hold.
struct Scales {
    scale: __m256,
    zero_point: __m256,
}

/// scalar.rs's `Chosen::new`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn scales<E: Element, const ASYMMETRIC: bool>(source: &[u8]) -> Result<Scales, NonFinite> {
    if ASYMMETRIC {
        return asymmetric_scales::<E>(source);
    }
    let max = |a, b| max_unsigned::<E>(a, b);
    let absmax = of_groups::<E>(source, |a, b| max(a, magnitudes::<E>(b)))?;
    let scale = round::<E>(_mm256_div_ps(absmax, _mm256_set1_ps(7.5)));
    Ok(Scales { scale: or_epsilon::<E>(scale), zero_point: _mm256_setzero_ps() })
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn asymmetric_scales<E: Element>(source: &[u8]) -> Result<Scales, NonFinite> {
    // As signed numbers, what isn't negative comes last and in order; as unsigned ones, what is negative does.
    let greatest = of_groups::<E>(source, |a, b| max_signed::<E>(a, b))?;
    let least = of_groups::<E>(source, |a, b| max_unsigned::<E>(a, b))?;
    let least = _mm256_min_ps(least, _mm256_setzero_ps());
    let scale = round::<E>(_mm256_div_ps(round::<E>(_mm256_sub_ps(greatest, least)), _mm256_set1_ps(15.0)));
    let ratio = _mm256_div_ps(least, scale);
    let code = code(round::<E>(_mm256_sub_ps(_mm256_set1_ps(-8.0), round::<E>(ratio))));
    let point = _mm256_sub_ps(_mm256_castsi256_ps(code), _mm256_set1_ps(CODE_8));
    let is_number = _mm256_cmp_ps::<_CMP_ORD_Q>(ratio, ratio);
    Ok(Scales { scale: or_epsilon::<E>(scale), zero_point: _mm256_and_ps(is_number, point) })
}

/// The larger of elements, by the order of their bits as signed numbers.
#[target_feature(enable = "avx2,fma,f16c")]
fn max_signed<E: Element>(a: __m256i, b: __m256i) -> __m256i {
    if E::SIZE == 2 { _mm256_max_epi16(a, b) } else { _mm256_max_epi32(a, b) }
}

/// The largest of each group's elements, by an order of their bits; no less than 0.
///
/// # Errors
/// [`NonFinite`] when one is infinite or NaN.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn of_groups<E: Element>(source: &[u8], max: impl Fn(__m256i, __m256i) -> __m256i) -> Result<__m256, NonFinite> {
    let mut lanes = [_mm256_setzero_si256(); LANES];
    for (lanes, group) in lanes.iter_mut().zip(source.chunks_exact(source.len() / LANES)) {
        *lanes = largest(group, &max);
    }
    let largest = of_pairs::<E>(integer_tree(&lanes, &max), &max);
    if is_finite(largest) { Ok(largest) } else { Err(NonFinite) }
}

/// The dtype's epsilon in place of 0.
#[target_feature(enable = "avx2,fma,f16c")]
fn or_epsilon<E: Element>(scale: __m256) -> __m256 {
    let is_zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(scale, _mm256_setzero_ps());
    select(is_zero, _mm256_set1_ps(epsilon(E::DTYPE)), scale)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn store_scales<E: Element>(scale: __m256, stored: &mut [u8]) {
    let vectors = stored.as_chunks_mut().0;
    match E::DTYPE {
        FloatDtype::Bfloat16 => {
            let halves = _mm256_srli_epi32::<16>(_mm256_castps_si256(scale));
            let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
            store_16(_mm_packus_epi32(low, high), &mut vectors[0]);
        }
        FloatDtype::Float16 => store_16(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scale), &mut vectors[0]),
        FloatDtype::Float32 => {
            let scale = _mm256_castps_si256(scale);
            store_16(_mm256_castsi256_si128(scale), &mut vectors[0]);
            store_16(_mm256_extracti128_si256::<1>(scale), &mut vectors[1]);
        }
    }
}

/// The running sums of a group, by half of a chunk, even or odd, and lane.
struct Sums {
    signal: [[__m256; 2]; 2],
    noise: [[__m256; 2]; 2],
    worst: __m256,
}

/// Writes a group's codes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn codes<E: Element, const ASYMMETRIC: bool>(source: &[u8], scale: f32, zero_point: f32, packed: &mut [u8]) -> Sums {
    let (scale, zero_point) = (_mm256_set1_ps(scale), _mm256_set1_ps(zero_point));
    let origin = _mm256_add_ps(_mm256_set1_ps(CODE_8), zero_point);
    let zero = _mm256_setzero_ps();
    let mut sums = Sums { signal: [[zero; 2]; 2], noise: [[zero; 2]; 2], worst: zero };
    for (source, packed) in source.chunks_exact(scalar::LANES * E::SIZE).zip(packed.as_chunks_mut().0) {
        let mut bytes = [_mm256_setzero_si256(); 2];
        for (half, source) in source.chunks_exact(scalar::LANES / 2 * E::SIZE).enumerate() {
            let mut codes = [_mm256_setzero_si256(); 2];
            for (i, x) in halves::<E>(load::<E>(source)).into_iter().enumerate() {
                let t = _mm256_div_ps(x, scale);
                let rounded = round_small::<E>(t);
                let shifted = if ASYMMETRIC { round_small::<E>(_mm256_add_ps(rounded, zero_point)) } else { rounded };
                codes[i] = code(shifted);
                let error = _mm256_sub_ps(t, _mm256_sub_ps(_mm256_castsi256_ps(codes[i]), origin));
                sums.signal[half][i] = _mm256_fmadd_ps(t, t, sums.signal[half][i]);
                sums.noise[half][i] = _mm256_fmadd_ps(error, error, sums.noise[half][i]);
                sums.worst = larger(sums.worst, error);
            }
            let [even, odd] = codes;
            bytes[half] = _mm256_add_epi32(even, _mm256_slli_epi32::<4>(odd));
        }
        store_16(pack(bytes), packed);
    }
    sums
}

/// The low bytes of sixteen lanes.
#[target_feature(enable = "avx2,fma,f16c")]
fn pack([low, high]: [__m256i; 2]) -> __m128i {
    let byte = |x| _mm256_and_si256(x, _mm256_set1_epi32(0xff));
    // Packing goes by 128-bit halves: first the lower halves of `low` and `high`, then the upper ones.
    let words = _mm256_packus_epi32(byte(low), byte(high));
    let bytes = _mm256_packus_epi16(words, words);
    _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
}

/// The first two steps of scalar.rs's tree: adds neighbours, then the upper half to the lower.
#[target_feature(enable = "avx2,fma,f16c")]
fn halve([low, high]: [[__m256; 2]; 2]) -> __m256 {
    _mm256_add_ps(_mm256_add_ps(low[0], low[1]), _mm256_add_ps(high[0], high[1]))
}

/// 1.5 * 2^23, whose ulp is 1, and the code of 0.
const CODE_8: f32 = 12_582_920.0;

/// The code of the nearest integer from -8 to 7, ties to even, in the low byte; as f32, the integer and [`CODE_8`].
#[target_feature(enable = "avx2,fma,f16c")]
fn code(x: __m256) -> __m256i {
    let clamped = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-8.0)), _mm256_set1_ps(7.0));
    _mm256_castps_si256(_mm256_add_ps(clamped, _mm256_set1_ps(CODE_8)))
}

/// [`round`], in fewer instructions: of numbers that are less than 2^64, and where the dtype's subnormals needn't be told
/// from 0, nor what overflows it from the largest.
#[target_feature(enable = "avx2,fma,f16c")]
fn round_small<E: Element>(x: __m256) -> __m256 {
    // 1.5 * 2^`bits` times the number's power of two, where f32 has so many bits more: an ulp of it is one of the dtype.
    let bits = match E::DTYPE {
        FloatDtype::Bfloat16 => 16,
        FloatDtype::Float16 => 13,
        FloatDtype::Float32 => return x,
    };
    let power = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7f80_0000));
    let units = _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(bits << 23 | 0x0040_0000)));
    _mm256_sub_ps(_mm256_add_ps(x, units), units)
}
