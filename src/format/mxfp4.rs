//! MXFP4: E2M1 floats with powers of two for scales (OCP Microscaling).

use super::{ElementCode, FormatSpec, Highest, Layout, ScaleCode, Sharing};

/// compressed-tensors' MXFP4A16, and gpt-oss's own.
pub static MXFP4: FormatSpec = FormatSpec {
    name: "mxfp4",
    about: "4-bit floats with a power of two for each 32 columns: compressed-tensors' MXFP4A16",
    library_name: "MXFP4A16",
    element: ElementCode::E2m1,
    scale: ScaleCode::E8m0(Highest::Infinite),
    sharing: Sharing::GroupsOf(32),
    layouts: &[Layout::CompressedTensors, Layout::GptOss],
};
