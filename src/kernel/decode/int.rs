//! Integers times a scale: compressed-tensors 0.19.0's `pack-quantized`.

/// The values of the sixteen codes in a group with this scale, and the zero point that is taken off.
#[inline(always)]
pub(crate) fn values(scale: f32, zero_point: Option<u8>) -> [f32; 16] {
    let zero_point = zero_point.map_or(8.0, f32::from);
    std::array::from_fn(|code| (code as f32 - zero_point) * scale)
}
