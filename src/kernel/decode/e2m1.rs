//! E2M1 floats times a scale: compressed-tensors 0.19.0's `nvfp4-pack-quantized` and `mxfp4-pack-quantized`, ModelOpt's
//! NVFP4, and gpt-oss's MXFP4 as transformers 5.23 decodes it.

use super::nibbles;
use super::scale::Scales;
use crate::format::TensorScale;
use crate::kernel::float8::{e4m3_value, power_of_two};

/// The values by code; the top bit is the sign.
const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The values of the sixteen codes in the `i`th group.
#[inline(always)]
pub(crate) fn values(scales: Scales<'_>, i: usize) -> [f32; 16] {
    if scales.is_two_to_128(i) {
        // transformers adds to the number's exponent (ldexp), so that only products overflow, not the power itself.
        return VALUES.map(|value| value * power_of_two(254) * 2.0);
    }
    nibbles::times(&VALUES, scales.of(i))
}

/// The values of groups whose scales are E4M3 floats.
pub(crate) struct Nvfp4 {
    /// By code, in units of the scale.
    values: [f32; 16],
    /// 1, or what scales are divided by.
    divisor: f32,
    /// 1, or what they are multiplied by.
    factor: f32,
}

impl Nvfp4 {
    pub(crate) fn new(tensor_scale: Option<TensorScale>) -> Nvfp4 {
        let (mut values, one) = (VALUES, 1.0);
        match tensor_scale {
            Some(TensorScale::Divisor(divisor)) => Nvfp4 { values, divisor, factor: one },
            Some(TensorScale::Factor(factor)) => {
                values[8] = 0.0; // ModelOpt has one zero only
                Nvfp4 { values, divisor: one, factor }
            }
            None => Nvfp4 { values, divisor: one, factor: one },
        }
    }

    /// The values of the sixteen codes in a group with this scale.
    #[inline(always)]
    pub(crate) fn values(&self, scale: u8) -> [f32; 16] {
        let scale = e4m3_value(scale) / self.divisor * self.factor;
        if scale.is_finite() { nibbles::times(&self.values, scale) } else { self.not_finite(scale) }
    }

    /// The one zero stays what it is.
    #[cold]
    fn not_finite(&self, scale: f32) -> [f32; 16] {
        let mut values = nibbles::times(&self.values, scale);
        if self.values[8].is_sign_positive() {
            values[8] = 0.0;
        }
        values
    }
}
