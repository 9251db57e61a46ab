//! Group formats: what is compared.

use prequant::internal::format::{Codec, CodecOptions, INT4, INT4_ASYM, MXFP4, NVFP4, Sharing};
use prequant::internal::kernel::group::{scalar, tensor_scale};
use prequant::{FloatDtype, GroupSize, Layout};

/// The formats' names, for people.
pub const SCHEMES: [&str; 5] = ["int4", "int4-asym", "nvfp4", "nvfp4 (ModelOpt)", "mxfp4"];

/// Columns of rows that are groups.
const ROWS: [usize; 6] = [33, 512, 1000, 4096, 14336, 151_937];

/// At most `elements` weights and how they are quantized, by a number: codec, columns, and the scale that a plan would give
/// the tensor.
pub fn piece(
    name: &str,
    number: u64,
    elements: usize,
    dtype: FloatDtype,
    weights: &mut impl FnMut(usize) -> Vec<u8>,
) -> (Vec<u8>, Codec, u64, Option<f32>) {
    let number = number as usize;
    let (format, layout) = match name {
        "int4" => (&INT4, Layout::CompressedTensors),
        "int4-asym" => (&INT4_ASYM, Layout::CompressedTensors),
        "mxfp4" => (&MXFP4, Layout::CompressedTensors),
        "nvfp4" => (&NVFP4, Layout::CompressedTensors),
        _ => (&NVFP4, Layout::Modelopt),
    };
    let (columns, group_size) = match format.sharing {
        Sharing::Groups if number.is_multiple_of(2) => {
            (ROWS[number / 2 % ROWS.len()].min(elements), GroupSize::Channel)
        }
        Sharing::Groups => (1280, GroupSize::Columns([32, 64, 128, 160][number / 2 % 4])),
        _ => (1280, GroupSize::default()),
    };
    let codec = format.codec(CodecOptions { group_size, layout, ..CodecOptions::default() });
    let source = weights((elements / columns).max(1) * columns);
    let scale = codec.has_tensor_scale().then(|| {
        let absmax = scalar::absmax(&source, dtype).unwrap_or(1.0);
        tensor_scale(&codec, absmax, dtype)
    });
    (source, codec, columns as u64, scale)
}
