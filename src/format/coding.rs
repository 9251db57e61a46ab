//! What stored codes and scales mean.

use super::Codebook;
use crate::dtype::FloatDtype;

/// How the elements of a row are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Coding {
    /// bitsandbytes'. A row is the whole tensor, flattened; scales are absmax, f32, one a block; the even element is in the
    /// high half of a byte.
    Blocks {
        /// What codes stand for.
        codebook: &'static Codebook,
        /// Elements that share one absmax.
        block_size: usize,
    },
    /// Integers of four bits, stored with 8 added, times a scale of the dtype decoded to. With zero points, one byte of 0 to
    /// 15 a group, that is what is taken off in place of 8.
    Int {
        /// Columns that share a scale.
        group: usize,
    },
    /// E2M1 floats in groups of 16, times an E4M3 scale over the tensor's.
    Nvfp4 {
        /// What scales are divided by.
        global_scale: f32,
    },
    /// The same as ModelOpt stores it: scales are multiplied by the tensor's.
    Nvfp4ModelOpt {
        /// What scales are multiplied by.
        scale_2: f32,
    },
    /// E2M1 floats in groups of 32, times a power of two (E8M0). The byte 255 is infinity.
    Mxfp4,
    /// The same in gpt-oss's blocks; differs in the byte 255, which is 2^128: the half of it is still a number.
    Mxfp4GptOss,
    /// E4M3 floats, one a byte, times their block's scale.
    Fp8 {
        /// Columns that share a scale.
        block: usize,
        /// How scales are stored.
        scale: ScaleDtype,
    },
}

/// How the scales of [`Coding::Fp8`] are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleDtype {
    /// IEEE single precision, little-endian.
    F32,
    /// bfloat16, little-endian.
    Bf16,
    /// Powers of two in safetensors' own dtype: 2^(byte - 127), and 255 is NaN.
    E8m0,
    /// The same as plain bytes, which clients raise two to: 255 is infinity.
    U8,
}

impl Coding {
    /// Elements that share a scale.
    pub fn group(self) -> usize {
        match self {
            Coding::Blocks { block_size, .. } => block_size,
            Coding::Int { group } => group,
            Coding::Nvfp4 { .. } | Coding::Nvfp4ModelOpt { .. } => 16,
            Coding::Mxfp4 | Coding::Mxfp4GptOss => 32,
            Coding::Fp8 { block, .. } => block,
        }
    }

    /// Bytes of a scale, for elements decoded to `dtype`.
    pub fn scale_size(self, dtype: FloatDtype) -> usize {
        match self {
            Coding::Blocks { .. } | Coding::Fp8 { scale: ScaleDtype::F32, .. } => 4,
            Coding::Int { .. } => dtype.size(),
            Coding::Fp8 { scale: ScaleDtype::Bf16, .. } => 2,
            _ => 1,
        }
    }

    /// The byte of a row that holds the code of `column`.
    pub fn code_byte(self, column: usize) -> usize {
        if matches!(self, Coding::Fp8 { .. }) { column } else { column / 2 }
    }
}
