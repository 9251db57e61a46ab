//! E4M3 floats times a block's scale, as in DeepSeek-V3's checkpoints: transformers 5.23's `Fp8Dequantize`.
//!
//! A row's last block may be short. transformers takes the block's size from the scales' grid, and so refuses such weights
//! or, where the grid happens to divide them, cuts them into even blocks.

use super::{Run, ScaleDtype};
use crate::kernel::float8::{E4M3_VALUES, power_of_two};

/// Decodes blocks of codes; `scale(i)` is that of the `i`th block of the run.
#[inline(always)]
pub fn decode<const SIZE: usize>(run: Run<'_, SIZE>, scale: impl Fn(usize) -> f32, round: impl Fn(f32) -> [u8; SIZE]) {
    let groups = run.groups();
    let Run { mut codes, mut into, .. } = run;
    for (i, columns) in groups.enumerate() {
        let scale = scale(i);
        let (elements, rest) = into.split_at_mut(columns.len());
        for (element, &code) in elements.iter_mut().zip(codes) {
            *element = round(E4M3_VALUES[usize::from(code)] * scale);
        }
        (codes, into) = (&codes[columns.len()..], rest);
    }
}

/// Scale `i` as f32; exact.
#[inline(always)]
pub fn scale(dtype: ScaleDtype, scales: &[u8], i: usize) -> f32 {
    match dtype {
        ScaleDtype::F32 => f32::from_le_bytes(scales.as_chunks().0[i]),
        ScaleDtype::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes(scales.as_chunks().0[i])) << 16),
        ScaleDtype::E8m0 if scales[i] == 255 => f32::NAN,
        ScaleDtype::E8m0 | ScaleDtype::U8 => power_of_two(scales[i]),
    }
}
