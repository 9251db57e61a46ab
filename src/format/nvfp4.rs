//! NVFP4: E2M1 floats with E4M3 scales, and one scale more for the tensor.

use super::{ElementCode, FormatSpec, Layout, ScaleCode, Sharing};

/// compressed-tensors' NVFP4A16, and ModelOpt's NVFP4.
pub static NVFP4: FormatSpec = FormatSpec {
    name: "nvfp4",
    about: "4-bit floats with an 8-bit float for each 16 columns: compressed-tensors' NVFP4A16",
    library_name: "NVFP4A16",
    element: ElementCode::E2m1,
    scale: ScaleCode::E4m3,
    sharing: Sharing::GroupsOf(16),
    layouts: &[Layout::CompressedTensors, Layout::Modelopt],
};
