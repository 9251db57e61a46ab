//! NF4: the quantiles of a normal distribution.

use super::{Codebook, ElementCode, FormatSpec, ScaleCode, Sharing};
use crate::dtype::FloatDtype;

/// bitsandbytes' 4-bit NormalFloat.
pub static NF4: FormatSpec = FormatSpec {
    name: "nf4",
    about: "4-bit NormalFloat, as QLoRA uses it",
    library_name: "nf4",
    element: ElementCode::Codebook(&CODEBOOK),
    scale: ScaleCode::Float(FloatDtype::Float32),
    sharing: Sharing::Blocks,
    layouts: &[],
};

/// NF4 (Dettmers et al., QLoRA, appendix E): the codes are in the order of their values.
pub static CODEBOOK: Codebook = Codebook {
    threshold_bits: [
        0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64862,
        0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf, 0x3f5c89da,
    ],
    code_of_rank: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    value_bits: [
        0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff,
        0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
    ],
    negative_zero: None,
};
