//! Eight groups at a time with AVX2.
//!
//! What a group does once (choosing its scale, the last folds of its sums) costs more than its codes where groups are
//! short. Here it is done for eight at once, a group in each lane. Odd sizes and what is left over go to
//! [`super::vector`].

mod floats;
mod integers;
mod scales;

use std::arch::x86_64::*;

use super::batches::{self, Outcome};
use super::{Groups, vector};
use crate::dtype::FloatDtype;
use crate::format::{Coding, ElementCode, ScaleCode, TensorScale};
use crate::kernel::NonFinite;
use crate::kernel::avx2::*;
use crate::kernel::block::scalar;
use crate::kernel::element::{Bfloat16, Element, Float16, Float32};
use crate::kernel::group;
use crate::kernel::lanes::Fused;

/// [`crate::kernel::Kernel::quantize_groups`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize(groups: Groups<'_>) -> Result<(), NonFinite> {
    match groups.dtype {
        FloatDtype::Bfloat16 => by_coding::<Bfloat16>(groups),
        FloatDtype::Float16 => by_coding::<Float16>(groups),
        FloatDtype::Float32 => by_coding::<Float32>(groups),
    }
}

/// [`Kernel::absmax`](crate::kernel::Kernel::absmax).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn absmax(source: &[u8], dtype: FloatDtype) -> Result<f32, NonFinite> {
    let (vectors, rest) = source.as_chunks::<32>();
    let largest = match dtype {
        FloatDtype::Bfloat16 => absmax_of_vectors::<Bfloat16>(vectors.as_flattened()),
        FloatDtype::Float16 => absmax_of_vectors::<Float16>(vectors.as_flattened()),
        FloatDtype::Float32 => absmax_of_vectors::<Float32>(vectors.as_flattened()),
    };
    let rest = group::scalar::absmax(rest, dtype)?;
    if is_finite(largest) { Ok(to_array(largest).into_iter().fold(rest, f32::max)) } else { Err(NonFinite) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn absmax_of_vectors<E: Element>(source: &[u8]) -> __m256 {
    let max = |a, b| max_unsigned::<E>(a, b);
    of_pairs::<E>(largest(source, |a, b| max(a, magnitudes::<E>(b))), max)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn by_coding<E: Element>(groups: Groups<'_>) -> Result<(), NonFinite> {
    let Coding { element, scale, group, tensor_scale } = groups.coding;
    match (element, scale, group) {
        (ElementCode::E2m1, ScaleCode::E4m3, 16) => match tensor_scale {
            Some(TensorScale::Divisor(divisor)) => {
                let choose = |absmax| scales::nvfp4::<E>(absmax, divisor);
                in_batches::<{ floats::BATCH }>(groups, |batch| floats::quantize::<E, 8, false>(batch, choose))
            }
            Some(TensorScale::Factor(factor)) => {
                let choose = |absmax| scales::nvfp4_modelopt(absmax, factor);
                in_batches::<{ floats::BATCH }>(groups, |batch| floats::quantize::<E, 8, false>(batch, choose))
            }
            None => other(groups),
        },
        (ElementCode::E2m1, ScaleCode::E8m0(_), 32) => {
            let choose = |absmax| scales::mxfp4(absmax);
            in_batches::<{ floats::BATCH }>(groups, |batch| floats::quantize::<E, 16, true>(batch, choose))
        }
        (ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat, group) if group % scalar::LANES == 0 => {
            in_batches::<LANES>(groups, |batch| integers::quantize::<E, false>(batch))
        }
        (ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat, group) if group % scalar::LANES == 0 => {
            in_batches::<LANES>(groups, |batch| integers::quantize::<E, true>(batch))
        }
        _ => other(groups),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn in_batches<const BATCH: usize>(
    groups: Groups<'_>,
    quantize: impl Fn(&mut Groups<'_>) -> Result<Outcome, NonFinite>,
) -> Result<(), NonFinite> {
    batches::in_batches::<BATCH>(groups, quantize, |rest| other(rest))
}

/// What there is no code for here.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn other(groups: Groups<'_>) -> Result<(), NonFinite> {
    vector::quantize::<Fused>(groups)
}

/// The nearest number of the source's dtype, ties to even, of numbers that aren't NaN.
#[target_feature(enable = "avx2,fma,f16c")]
fn round<E: Element>(x: __m256) -> __m256 {
    match E::DTYPE {
        FloatDtype::Bfloat16 => {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
            _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(!0xffff)))
        }
        FloatDtype::Float16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)),
        FloatDtype::Float32 => x,
    }
}

/// The larger of a and the magnitude of b.
#[target_feature(enable = "avx2,fma,f16c")]
fn larger(a: __m256, b: __m256) -> __m256 {
    _mm256_max_ps(a, magnitude(b))
}

/// `values` where the mask has ones, `others` elsewhere.
#[target_feature(enable = "avx2,fma,f16c")]
fn select(mask: __m256, values: __m256, others: __m256) -> __m256 {
    _mm256_blendv_ps(others, values, mask)
}
