//! Integer codes, with or without zero points: groups of whole vectors, one after the other, whose lanes are folded for
//! sixteen groups together.

use std::arch::x86_64::*;

use super::{Groups, LANES, NonFinite, Outcome, finite, halves, larger, load, of_pairs, round, store_16, to_array};
use crate::kernel::block::avx512::tree;

/// Quantizes [`LANES`] groups of whole vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn quantize<const ASYMMETRIC: bool>(batch: &mut Groups<'_>) -> Result<Outcome, NonFinite> {
    let Scales { scale, zero_point } = scales::<ASYMMETRIC>(batch.source)?;
    let (scales, zero_points) = (to_array(scale), to_array(zero_point));
    let zeros = [_mm512_setzero_ps(); LANES];
    let (mut signal, mut noise, mut worst) = (zeros, zeros, zeros);
    let sources = batch.source.chunks_exact(batch.coding.group * 2);
    for (i, (source, packed)) in
        sources.zip(batch.packed.chunks_exact_mut(batch.coding.group / 2)).enumerate().take(LANES)
    {
        let sums = codes::<ASYMMETRIC>(source, scales[i], zero_points[i], packed);
        signal[i] = _mm512_add_ps(sums.signal[0], sums.signal[1]);
        noise[i] = _mm512_add_ps(sums.noise[0], sums.noise[1]);
        worst[i] = sums.worst;
    }
    let figures = &mut batch.figures;
    figures.absmax.copy_from_slice(&scales);
    figures.signal.copy_from_slice(&to_array(tree(&signal, |a, b| _mm512_add_ps(a, b))));
    figures.noise.copy_from_slice(&to_array(tree(&noise, |a, b| _mm512_add_ps(a, b))));
    figures.worst.copy_from_slice(&to_array(tree(&worst, |a, b| _mm512_max_ps(a, b))));
    for (stored, scale) in batch.scales.as_chunks_mut().0.iter_mut().zip(scales) {
        *stored = ((scale.to_bits() >> 16) as u16).to_le_bytes();
    }
    for (stored, point) in batch.zero_points.iter_mut().zip(zero_points) {
        *stored = (point + 8.0) as u8;
    }
    Ok(Outcome::Quantized)
}

/// The scales and zero points of the groups that the lanes hold.
struct Scales {
    scale: __m512,
    zero_point: __m512,
}

/// scalar.rs's `Chosen::new`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn scales<const ASYMMETRIC: bool>(source: &[u8]) -> Result<Scales, NonFinite> {
    if ASYMMETRIC {
        return asymmetric_scales(source);
    }
    let magnitudes = _mm512_set1_epi32(0x7fff_7fff);
    let absmax = largest(source, |a, b| _mm512_max_epu16(a, _mm512_and_si512(b, magnitudes)));
    let scale = round(_mm512_div_ps(finite(absmax)?, _mm512_set1_ps(7.5)));
    Ok(Scales { scale: or_epsilon(scale), zero_point: _mm512_setzero_ps() })
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn asymmetric_scales(source: &[u8]) -> Result<Scales, NonFinite> {
    // As signed numbers, what isn't negative comes last and in order; as unsigned ones, what is negative does.
    let greatest = finite(largest(source, |a, b| _mm512_max_epi16(a, b)))?;
    let least = finite(largest(source, |a, b| _mm512_max_epu16(a, b)))?;
    let least = _mm512_min_ps(least, _mm512_setzero_ps());
    let scale = round(_mm512_div_ps(round(_mm512_sub_ps(greatest, least)), _mm512_set1_ps(15.0)));
    let ratio = _mm512_div_ps(least, scale);
    let point = to_integer(round(_mm512_sub_ps(_mm512_set1_ps(-8.0), round(ratio)))).0;
    let is_number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(ratio, ratio);
    Ok(Scales { scale: or_epsilon(scale), zero_point: _mm512_maskz_mov_ps(is_number, point) })
}

/// The largest of each group's elements, by an order of 16 bits; no less than 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn largest(source: &[u8], max: impl Fn(__m512i, __m512i) -> __m512i) -> __m512 {
    let mut lanes = [_mm512_setzero_ps(); LANES];
    for (lanes, group) in lanes.iter_mut().zip(source.chunks_exact(source.len() / LANES)) {
        let mut largest = _mm512_setzero_si512();
        for bytes in group.as_chunks().0 {
            largest = max(largest, load(bytes));
        }
        *lanes = _mm512_castsi512_ps(largest);
    }
    let max_of_lanes = |a, b| _mm512_castsi512_ps(max(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    of_pairs(_mm512_castps_si512(tree(&lanes, max_of_lanes)), &max)
}

/// bf16's epsilon in place of 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn or_epsilon(scale: __m512) -> __m512 {
    let is_zero = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(scale, _mm512_setzero_ps());
    _mm512_mask_mov_ps(scale, is_zero, _mm512_set1_ps(1.0 / 128.0))
}

/// The running sums of a group, by even or odd, and lane.
struct Sums {
    signal: [__m512; 2],
    noise: [__m512; 2],
    worst: __m512,
}

/// Writes a group's codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn codes<const ASYMMETRIC: bool>(source: &[u8], scale: f32, zero_point: f32, packed: &mut [u8]) -> Sums {
    let (scale, zero_point) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero_point));
    let zero = _mm512_setzero_ps();
    let mut sums = Sums { signal: [zero; 2], noise: [zero; 2], worst: zero };
    for (source, packed) in source.as_chunks().0.iter().zip(packed.as_chunks_mut().0) {
        let mut codes = [_mm512_setzero_si512(); 2];
        for (i, x) in halves(load(source)).into_iter().enumerate() {
            let t = _mm512_div_ps(x, scale);
            let rounded = round_small(t);
            let shifted = if ASYMMETRIC { round_small(_mm512_add_ps(rounded, zero_point)) } else { rounded };
            let value;
            (value, codes[i]) = to_integer(shifted);
            let value = if ASYMMETRIC { _mm512_sub_ps(value, zero_point) } else { value };
            let error = _mm512_sub_ps(t, value);
            sums.signal[i] = _mm512_fmadd_ps(t, t, sums.signal[i]);
            sums.noise[i] = _mm512_fmadd_ps(error, error, sums.noise[i]);
            sums.worst = larger(sums.worst, error);
        }
        let [even, odd] = codes;
        // Bits of `even` where the mask has ones, of `odd` elsewhere.
        let odd = _mm512_slli_epi32::<4>(odd);
        let bytes = _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(0x0f), even, odd);
        store_16(_mm512_cvtepi32_epi8(bytes), packed);
    }
    sums
}

/// The nearest integer from -8 to 7, ties to even; and, in the low byte, 8 more.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn to_integer(x: __m512) -> (__m512, __m512i) {
    // 1.5 * 2^23, whose ulp is 1, and 8.
    let units = _mm512_set1_ps(12_582_920.0);
    let clamped = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-8.0)), _mm512_set1_ps(7.0));
    let sum = _mm512_add_ps(clamped, units);
    (_mm512_sub_ps(sum, units), _mm512_castps_si512(sum))
}

/// [`round`], in fewer instructions: of numbers that are less than 2^64, and where bf16's subnormals needn't be told from 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn round_small(x: __m512) -> __m512 {
    // 1.5 * 2^16 times the number's power of two: an ulp of it is one of the bf16.
    let (exponent, one_and_half) = (_mm512_set1_epi32(0x7f80_0000), _mm512_set1_epi32(0x0040_0000));
    let power = _mm512_ternarylogic_epi32::<0xea>(_mm512_castps_si512(x), exponent, one_and_half);
    let units = _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_set1_epi32(16 << 23)));
    _mm512_sub_ps(_mm512_add_ps(x, units), units)
}
