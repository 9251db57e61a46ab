//! E2M1 floats times a scale: compressed-tensors 0.19.0's `nvfp4-pack-quantized` and `mxfp4-pack-quantized`, ModelOpt's
//! NVFP4, and gpt-oss's MXFP4 as transformers 5.23 decodes it.

use super::scale::Scales;
use crate::format::TensorScale;
use crate::kernel::float8::power_of_two;

/// The values by code; the top bit is the sign.
const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The values of the sixteen codes in the `i`th group.
#[inline(always)]
pub(crate) fn values(scales: Scales<'_>, i: usize) -> [f32; 16] {
    if scales.is_two_to_128(i) {
        // transformers adds to the number's exponent (ldexp), so that only products overflow, not the power itself.
        return VALUES.map(|value| value * power_of_two(254) * 2.0);
    }
    let scale = scales.of(i);
    let mut values = VALUES.map(|value| value * scale);
    if let Some(TensorScale::Factor(_)) = scales.coding.tensor_scale {
        values[8] = 0.0; // ModelOpt has one zero only
    }
    values
}
