//! [`super::super::scalar::Chosen::new`] for sixteen groups.

use std::arch::x86_64::*;

use super::round;

/// The scales of the groups that the lanes hold.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    /// As they are stored: a byte in each lane.
    pub stored: __m512i,
    /// What decoding multiplies by.
    pub scale: __m512,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn nvfp4(absmax: __m512, global_scale: f32) -> Scales {
    let global_scale = _mm512_set1_ps(global_scale);
    let wanted = _mm512_mul_ps(global_scale, round(_mm512_div_ps(absmax, _mm512_set1_ps(6.0))));
    let byte = e4m3(_mm512_min_ps(wanted, _mm512_set1_ps(448.0)));
    let is_zero = _mm512_testn_epi32_mask(byte, byte);
    let stored = _mm512_mask_mov_epi32(byte, is_zero, e4m3(_mm512_set1_ps(0.125)));
    Scales { stored, scale: _mm512_div_ps(e4m3_value(stored), global_scale) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn nvfp4_modelopt(absmax: __m512, scale_2: f32) -> Scales {
    let wanted = _mm512_div_ps(absmax, _mm512_set1_ps(6.0 * scale_2));
    let is_zero = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(wanted, _mm512_setzero_ps());
    let clamped = _mm512_min_ps(_mm512_max_ps(wanted, _mm512_set1_ps(1.0 / 512.0)), _mm512_set1_ps(448.0));
    let stored = e4m3(_mm512_mask_mov_ps(clamped, is_zero, _mm512_set1_ps(1.0)));
    let scale = _mm512_mul_ps(e4m3_value(stored), _mm512_set1_ps(scale_2));
    Scales { stored, scale }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn mxfp4(absmax: __m512) -> Scales {
    let rounded = _mm512_add_epi32(_mm512_castps_si512(absmax), _mm512_set1_epi32(1 << 21));
    let (two, exponent) = (_mm512_set1_epi32(2), _mm512_srli_epi32::<23>(rounded));
    let stored = _mm512_sub_epi32(_mm512_max_epi32(exponent, two), two);
    let scale = _mm512_max_epi32(_mm512_slli_epi32::<23>(stored), _mm512_set1_epi32(1 << 22));
    Scales { stored, scale: _mm512_castsi512_ps(scale) }
}

/// One over MXFP4's scales; exact.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn reciprocals(scales: &Scales) -> __m512 {
    let exponent = _mm512_sub_epi32(_mm512_set1_epi32(254), scales.stored);
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
}

/// scalar.rs's `e4m3`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn e4m3(x: __m512) -> __m512i {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let is_subnormal = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(1.0 / 64.0));
    let subnormal = _mm512_cvt_roundps_epi32::<NEAREST>(_mm512_mul_ps(x, _mm512_set1_ps(512.0)));
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7_ffff - (120 << 23)));
    _mm512_mask_mov_epi32(_mm512_srli_epi32::<20>(rounded), is_subnormal, subnormal)
}

/// The value of E4M3 floats that are neither negative nor NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn e4m3_value(byte: __m512i) -> __m512 {
    let is_subnormal = _mm512_cmplt_epi32_mask(byte, _mm512_set1_epi32(8));
    let subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(byte), _mm512_set1_ps(1.0 / 512.0));
    let normal = _mm512_slli_epi32::<20>(_mm512_add_epi32(byte, _mm512_set1_epi32(120 << 3)));
    _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), is_subnormal, subnormal)
}
