//! E2M1 floats times an 8-bit scale: compressed-tensors 0.19.0's `nvfp4-pack-quantized` and `mxfp4-pack-quantized`,
//! ModelOpt's NVFP4, and gpt-oss's MXFP4 as transformers 5.23 decodes it.

use super::Coding;
use crate::kernel::float8::{e4m3_value, power_of_two};

/// E2M1's values by code; the top bit is the sign.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The values of the sixteen codes in a group with this scale.
#[inline(always)]
pub fn values(coding: Coding, scale: u8) -> [f32; 16] {
    let scale = match coding {
        Coding::Nvfp4 { global_scale } => e4m3_value(scale) / global_scale,
        Coding::Nvfp4ModelOpt { scale_2 } => e4m3_value(scale) * scale_2,
        // transformers adds to the number's exponent (ldexp), so that only products overflow, not the power itself.
        Coding::Mxfp4GptOss if scale == 255 => return E2M1.map(|value| value * power_of_two(254) * 2.0),
        _ => power_of_two(scale),
    };
    let mut values = E2M1.map(|value| value * scale);
    if let Coding::Nvfp4ModelOpt { .. } = coding {
        values[8] = 0.0; // ModelOpt has one zero only
    }
    values
}
