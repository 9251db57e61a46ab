//! Group formats: what is compared.

use prequant::dtype::FloatDtype;
use prequant::format::{GroupFormat, GroupScheme, GroupSize, Layout, Scheme};
use prequant::kernel::group::{scalar, tensor_scale};

/// The formats' names, for people.
pub const SCHEMES: [&str; 5] = ["int4", "int4-asym", "nvfp4", "nvfp4 (ModelOpt)", "mxfp4"];

/// Columns of rows that are groups.
const ROWS: [usize; 6] = [33, 512, 1000, 4096, 14336, 151_937];

/// At most `elements` weights and how they are quantized, by a number: scheme, columns, and the scale that a plan would give
/// the tensor.
pub fn piece(
    name: &str,
    number: u64,
    elements: usize,
    dtype: FloatDtype,
    weights: &mut impl FnMut(usize) -> Vec<u8>,
) -> (Vec<u8>, Scheme, u64, Option<f32>) {
    let number = number as usize;
    let (format, layout) = match name {
        "int4" => (GroupFormat::Int4, Layout::CompressedTensors),
        "int4-asym" => (GroupFormat::Int4Asym, Layout::CompressedTensors),
        "mxfp4" => (GroupFormat::Mxfp4, Layout::CompressedTensors),
        "nvfp4" => (GroupFormat::Nvfp4, Layout::CompressedTensors),
        _ => (GroupFormat::Nvfp4, Layout::Modelopt),
    };
    let (columns, size) = match format {
        GroupFormat::Mxfp4 => (1280, GroupSize::Columns(32)),
        GroupFormat::Nvfp4 => (1280, GroupSize::Columns(16)),
        _ if number.is_multiple_of(2) => (ROWS[number / 2 % ROWS.len()].min(elements), GroupSize::Channel),
        _ => (1280, GroupSize::Columns([32, 64, 128, 160][number / 2 % 4])),
    };
    let source = weights((elements / columns).max(1) * columns);
    let scale = (format == GroupFormat::Nvfp4).then(|| {
        let absmax = scalar::absmax(&source, dtype).unwrap_or(1.0);
        tensor_scale(layout, absmax, dtype)
    });
    (source, Scheme::Groups(GroupScheme { format, size, layout }), columns as u64, scale)
}
