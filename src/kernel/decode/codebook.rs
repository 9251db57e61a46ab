//! Values of a codebook times absmax: bitsandbytes 0.50.2's `dequantize_4bit`.

use crate::format::Codebook;

/// The values of the sixteen codes, in units of absmax.
pub(crate) fn values(codebook: &Codebook) -> [f32; 16] {
    let mut values = codebook.values();
    if let Some(code) = codebook.negative_zero {
        values[usize::from(code)] = -0.0;
    }
    values
}
