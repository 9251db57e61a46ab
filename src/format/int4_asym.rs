//! INT4 with zero points.

use super::{ElementCode, FormatSpec, Layout, ScaleCode, Sharing};

/// compressed-tensors' W4A16_ASYM.
pub static INT4_ASYM: FormatSpec = FormatSpec {
    name: "int4-asym",
    about: "Integers with a scale and a zero point for each group: compressed-tensors' W4A16_ASYM",
    library_name: "W4A16_ASYM",
    element: ElementCode::Int { zero_point: true },
    scale: ScaleCode::SourceFloat,
    sharing: Sharing::Groups,
    layouts: &[Layout::CompressedTensors],
};
