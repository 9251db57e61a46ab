//! E4M3 floats times a block's scale, as in DeepSeek-V3's checkpoints: transformers 5.23's `Fp8Dequantize`.
//!
//! A row's last block may be short. transformers takes the block's size from the scales' grid, and so refuses such weights
//! or, where the grid happens to divide them, cuts them into even blocks.

use super::Run;
use super::scale::Scales;
use crate::kernel::float8::e4m3_value;

/// Decodes blocks of codes.
#[inline(always)]
pub(crate) fn decode<const SIZE: usize>(run: Run<'_, SIZE>, scales: Scales<'_>, round: impl Fn(f32) -> [u8; SIZE]) {
    let groups = run.groups();
    let Run { mut codes, mut into, .. } = run;
    for (i, columns) in groups.enumerate() {
        let scale = scales.of(i);
        let (elements, rest) = into.split_at_mut(columns.len());
        for (element, &code) in elements.iter_mut().zip(codes) {
            *element = round(e4m3_value(code) * scale);
        }
        (codes, into) = (&codes[columns.len()..], rest);
    }
}
