//! [`super::super::scalar::Chosen::new`] for eight groups of E2M1 codes.

use std::arch::x86_64::*;

use super::{round, select};
use crate::kernel::element::Element;

/// The scales of the groups that the lanes hold.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    /// As they are stored: a byte in each lane.
    pub stored: __m256i,
    /// What decoding multiplies by.
    pub scale: __m256,
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nvfp4<E: Element>(absmax: __m256, global_scale: f32) -> Scales {
    let global_scale = _mm256_set1_ps(global_scale);
    let wanted = _mm256_mul_ps(global_scale, round::<E>(_mm256_div_ps(absmax, _mm256_set1_ps(6.0))));
    let byte = e4m3(_mm256_min_ps(wanted, _mm256_set1_ps(448.0)));
    let is_zero = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
    let stored = _mm256_blendv_epi8(byte, e4m3(_mm256_set1_ps(0.125)), is_zero);
    Scales { stored, scale: _mm256_div_ps(e4m3_value(stored), global_scale) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nvfp4_modelopt(absmax: __m256, scale_2: f32) -> Scales {
    let wanted = _mm256_div_ps(absmax, _mm256_set1_ps(6.0 * scale_2));
    let is_zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(wanted, _mm256_setzero_ps());
    let clamped = _mm256_min_ps(_mm256_max_ps(wanted, _mm256_set1_ps(1.0 / 512.0)), _mm256_set1_ps(448.0));
    let stored = e4m3(select(is_zero, _mm256_set1_ps(1.0), clamped));
    Scales { stored, scale: _mm256_mul_ps(e4m3_value(stored), _mm256_set1_ps(scale_2)) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn mxfp4(absmax: __m256) -> Scales {
    let rounded = _mm256_add_epi32(_mm256_castps_si256(absmax), _mm256_set1_epi32(1 << 21));
    let (two, exponent) = (_mm256_set1_epi32(2), _mm256_srli_epi32::<23>(rounded));
    let stored = _mm256_sub_epi32(_mm256_max_epi32(exponent, two), two);
    let scale = _mm256_max_epi32(_mm256_slli_epi32::<23>(stored), _mm256_set1_epi32(1 << 22));
    Scales { stored, scale: _mm256_castsi256_ps(scale) }
}

/// One over MXFP4's scales; exact.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn reciprocals(scales: &Scales) -> __m256 {
    let exponent = _mm256_sub_epi32(_mm256_set1_epi32(254), scales.stored);
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
}

/// scalar.rs's `e4m3`.
#[target_feature(enable = "avx2,fma,f16c")]
fn e4m3(x: __m256) -> __m256i {
    let is_subnormal = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(1.0 / 64.0));
    // 2^23, whose ulp is 1, leaves the nearest integer in the low bits.
    let units = _mm256_set1_ps(8_388_608.0);
    let sum = _mm256_add_ps(_mm256_mul_ps(x, _mm256_set1_ps(512.0)), units);
    let subnormal = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_castps_si256(units));
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<20>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7_ffff - (120 << 23)));
    _mm256_blendv_epi8(_mm256_srli_epi32::<20>(rounded), subnormal, _mm256_castps_si256(is_subnormal))
}

/// The value of E4M3 floats that are neither negative nor NaN.
#[target_feature(enable = "avx2,fma,f16c")]
fn e4m3_value(byte: __m256i) -> __m256 {
    let is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), byte);
    let subnormal = _mm256_mul_ps(_mm256_cvtepi32_ps(byte), _mm256_set1_ps(1.0 / 512.0));
    let normal = _mm256_slli_epi32::<20>(_mm256_add_epi32(byte, _mm256_set1_epi32(120 << 3)));
    select(_mm256_castsi256_ps(is_subnormal), subnormal, _mm256_castsi256_ps(normal))
}
