//! Scales as they are stored.

use super::round;
use crate::dtype::FloatDtype;
use crate::format::{Coding, Highest, ScaleCode, TensorScale};
use crate::kernel::block::scalar;
use crate::kernel::float8::{e4m3_value, power_of_two};

/// The scales of a run's groups.
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    pub coding: Coding,
    /// The dtype decoded to.
    pub dtype: FloatDtype,
    pub bytes: &'a [u8],
}

impl Scales<'_> {
    /// The `i`th as f32; exact but for the division by a [`TensorScale::Divisor`], and its like.
    #[inline(always)]
    pub(crate) fn of(self, i: usize) -> f32 {
        let Scales { coding, dtype, bytes } = self;
        match (coding.scale, coding.tensor_scale) {
            (ScaleCode::Float(FloatDtype::Float32), _) => f32::from_le_bytes(bytes.as_chunks().0[i]),
            (ScaleCode::RoundedF32, _) => rounded(f32::from_le_bytes(bytes.as_chunks().0[i]), dtype),
            (ScaleCode::Float(_) | ScaleCode::SourceFloat, _) => {
                let dtype = coding.scale.float_dtype(dtype);
                scalar::decode(&bytes[i * dtype.size()..][..dtype.size()], dtype)
            }
            (ScaleCode::E4m3, Some(TensorScale::Divisor(divisor))) => e4m3_value(bytes[i]) / divisor,
            (ScaleCode::E4m3, Some(TensorScale::Factor(factor))) => e4m3_value(bytes[i]) * factor,
            (ScaleCode::E4m3, None) => e4m3_value(bytes[i]),
            (ScaleCode::E8m0(Highest::Nan), _) if bytes[i] == 255 => f32::NAN,
            (ScaleCode::E8m0(_), _) => power_of_two(bytes[i]),
        }
    }

    /// Whether the `i`th is 2^128, which is no f32, and not infinite.
    #[inline(always)]
    pub(crate) fn is_two_to_128(self, i: usize) -> bool {
        self.coding.scale == ScaleCode::E8m0(Highest::Finite) && self.bytes[i] == 255
    }
}

/// The nearest number of a dtype.
#[inline(always)]
fn rounded(x: f32, dtype: FloatDtype) -> f32 {
    match dtype {
        FloatDtype::Bfloat16 => scalar::decode(&round::bfloat16(x), dtype),
        FloatDtype::Float16 => scalar::decode(&round::float16(x), dtype),
        FloatDtype::Float32 => x,
    }
}

/// What decoding multiplies by in each group, of scales as they are stored. Only devices bring back nothing but these.
///
/// # Panics
/// When `values` has another length than there are groups.
#[cfg(feature = "cuda")]
pub(crate) fn scale_values(coding: Coding, dtype: FloatDtype, bytes: &[u8], values: &mut [f32]) {
    assert_eq!(bytes.len(), values.len() * coding.scale_size(dtype), "scales: length");
    let of = |bytes: &[u8], i| Scales { coding, dtype, bytes }.of(i);
    if coding.scale_size(dtype) > 1 {
        values.iter_mut().enumerate().for_each(|(i, value)| *value = of(bytes, i));
        return;
    }
    let table: [f32; 256] = std::array::from_fn(|byte| of(&[byte as u8], 0));
    values.iter_mut().zip(bytes).for_each(|(value, &byte)| *value = table[usize::from(byte)]);
}
