//! Integers times a scale: compressed-tensors 0.19.0's `pack-quantized`.

use crate::dtype::FloatDtype;
use crate::kernel::block::scalar;

/// The values of the sixteen codes in group `i`.
#[inline(always)]
pub fn values(dtype: FloatDtype, scales: &[u8], zero_points: &[u8], i: usize) -> [f32; 16] {
    let scale = scalar::decode(&scales[i * dtype.size()..][..dtype.size()], dtype);
    let zero_point = zero_points.get(i).map_or(8.0, |&point| f32::from(point));
    std::array::from_fn(|code| (code as f32 - zero_point) * scale)
}
