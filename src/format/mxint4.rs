//! MXINT4: INT4's integers with MXFP4's scales, for tests. No library reads it; it shows that a format of existing codes is
//! this file and its line in [`super::FORMATS`].

use super::{ElementCode, FormatSpec, Highest, Layout, ScaleCode, Sharing};

/// Integers from -8 to 7 with powers of two for scales.
pub(crate) static MXINT4: FormatSpec = FormatSpec {
    name: "mxint4",
    about: "Integers with a power of two for each 32 columns; for tests only",
    library_name: "MXINT4A16",
    element: ElementCode::Int { zero_point: false },
    scale: ScaleCode::E8m0(Highest::Infinite),
    sharing: Sharing::GroupsOf(32),
    layouts: &[Layout::CompressedTensors],
};
