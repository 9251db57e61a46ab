//! FP4: a sign and one of eight magnitudes.

use super::{Codebook, ElementCode, FormatSpec, ScaleCode, Sharing};
use crate::dtype::FloatDtype;

/// bitsandbytes' 4-bit float.
pub static FP4: FormatSpec = FormatSpec {
    name: "fp4",
    about: "bitsandbytes' 4-bit float",
    library_name: "fp4",
    element: ElementCode::Codebook(&CODEBOOK),
    scale: ScaleCode::Float(FloatDtype::Float32),
    sharing: Sharing::Blocks,
    layouts: &[],
};

/// FP4: code `m` for magnitude `m`, `8 + m` for its negative; magnitudes are not in the order of their codes.
///
/// Codes 0 and 8 both decode to 0.0. As in bitsandbytes' CUDA kernels (`dQuantizeFP4`), elements less than zero get code 8, others,
/// -0.0 among them, code 0: hence a threshold just below zero. bitsandbytes 0.50.2 on a CPU does it the other way round.
pub static CODEBOOK: Codebook = Codebook {
    threshold_bits: [
        0xbf555556, 0xbf155556, 0xbed55556, 0xbe955556, 0xbe555556, 0xbdb00000, 0xbb2aaaab, 0x80000001, 0x3b2aaaab,
        0x3db00000, 0x3e555556, 0x3e955556, 0x3ed55556, 0x3f155556, 0x3f555556,
    ],
    code_of_rank: [11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3],
    value_bits: [
        0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000, 0x00000000,
        0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
    ],
    negative_zero: Some(8),
};
