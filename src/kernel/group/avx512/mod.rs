//! bf16 with AVX-512: sixteen groups at a time.
//!
//! What a group does once (choosing its scale, the last folds of its sums) costs more than its codes where groups are
//! short. Here it is done for sixteen at once, a group in each lane. Other dtypes, odd sizes and what is left over go to
//! [`super::avx2`].

mod floats;
mod integers;
mod scales;

use std::arch::x86_64::*;

use super::batches::{self, Outcome};
use super::{Groups, avx2};
use crate::dtype::FloatDtype;
use crate::format::{Coding, ElementCode, ScaleCode, TensorScale};
use crate::kernel::NonFinite;
use crate::kernel::block::scalar;

/// A vector's lanes.
const LANES: usize = 16;

/// [`crate::kernel::Kernel::quantize_groups`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn quantize(groups: Groups<'_>) -> Result<(), NonFinite> {
    if groups.dtype != FloatDtype::Bfloat16 {
        return other(groups);
    }
    let Coding { element, scale, group, tensor_scale } = groups.coding;
    match (element, scale, group) {
        (ElementCode::E2m1, ScaleCode::E4m3, 16) => match tensor_scale {
            Some(TensorScale::Divisor(divisor)) => {
                let choose = |absmax| scales::nvfp4(absmax, divisor);
                in_batches::<{ floats::BATCH }>(groups, |batch| floats::quantize::<8, false>(batch, choose))
            }
            Some(TensorScale::Factor(factor)) => {
                let choose = |absmax| scales::nvfp4_modelopt(absmax, factor);
                in_batches::<{ floats::BATCH }>(groups, |batch| floats::quantize::<8, false>(batch, choose))
            }
            None => other(groups),
        },
        (ElementCode::E2m1, ScaleCode::E8m0(_), 32) => {
            let choose = |absmax| scales::mxfp4(absmax);
            in_batches::<{ floats::BATCH }>(groups, |batch| floats::quantize::<16, true>(batch, choose))
        }
        (ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat, group) if group % scalar::LANES == 0 => {
            in_batches::<LANES>(groups, |batch| integers::quantize::<false>(batch))
        }
        (ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat, group) if group % scalar::LANES == 0 => {
            in_batches::<LANES>(groups, |batch| integers::quantize::<true>(batch))
        }
        _ => other(groups),
    }
}

/// What there is no code for here: 256-bit vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline(never)]
fn other(groups: Groups<'_>) -> Result<(), NonFinite> {
    avx2::quantize(groups)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline]
fn in_batches<const BATCH: usize>(
    groups: Groups<'_>,
    quantize: impl Fn(&mut Groups<'_>) -> Result<Outcome, NonFinite>,
) -> Result<(), NonFinite> {
    batches::in_batches::<BATCH>(groups, quantize, |rest| other(rest))
}

/// The nearest bf16, ties to even, of numbers that aren't NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn round(x: __m512) -> __m512 {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(!0xffff)))
}

/// 32 elements as f32: the even ones, the odd ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn halves(pairs: __m512i) -> [__m512; 2] {
    let (even, odd) = (_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
    [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
}

/// What sixteen groups' even and odd elements have at most, as f32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn of_pairs(largest: __m512i, max: impl Fn(__m512i, __m512i) -> __m512i) -> __m512 {
    let largest = max(largest, _mm512_srli_epi32::<16>(largest));
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(largest))
}

/// # Errors
/// [`NonFinite`] when a lane is infinite or NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn finite(x: __m512) -> Result<__m512, NonFinite> {
    const NAN_OR_INFINITE: i32 = 0x99;
    if _mm512_fpclass_ps_mask::<NAN_OR_INFINITE>(x) == 0 { Ok(x) } else { Err(NonFinite) }
}

/// The larger absolute value, its sign cleared.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn larger(a: __m512, b: __m512) -> __m512 {
    _mm512_range_ps::<0b10_11>(a, b)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array is a vector's 64 bytes; they need no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn store(vector: __m512i, bytes: &mut [u8; 64]) {
    // SAFETY: the array is a vector's 64 bytes; they need no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn store_16(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the array is a vector's 16 bytes; they need no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn to_array(vector: __m512) -> [f32; LANES] {
    let mut array = [0.0; LANES];
    // SAFETY: the array is a vector's 64 bytes.
    unsafe { _mm512_storeu_ps(array.as_mut_ptr(), vector) };
    array
}
