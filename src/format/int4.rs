//! INT4: integers from -8 to 7.

use super::{ElementCode, FormatSpec, Layout, ScaleCode, Sharing};

/// compressed-tensors' W4A16.
pub static INT4: FormatSpec = FormatSpec {
    name: "int4",
    about: "Integers with a scale for each group of columns: compressed-tensors' W4A16",
    library_name: "W4A16",
    element: ElementCode::Int { zero_point: false },
    scale: ScaleCode::SourceFloat,
    sharing: Sharing::Groups,
    layouts: &[Layout::CompressedTensors],
};
