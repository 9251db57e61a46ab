//! What codes and scales decode to.

use super::BlockFormat;

/// How a row of a matrix is stored, and what its elements decode to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Coding {
    /// bitsandbytes': the whole tensor is one row; scales are absmax, f32.
    Blocks {
        /// The codebook.
        format: BlockFormat,
        /// Elements that share an absmax.
        block_size: usize,
    },
    /// Integers less a zero point, if there are any, times a scale of the dtype that they decode to.
    Int {
        /// Columns that share a scale.
        group: usize,
    },
    /// E2M1 floats times an E4M3 scale over `global_scale`, in groups of 16.
    Nvfp4 {
        /// What scales were multiplied by.
        global_scale: f32,
    },
    /// E2M1 floats times an E4M3 scale times `scale_2`, in groups of 16.
    Nvfp4ModelOpt {
        /// The tensor's own scale.
        scale_2: f32,
    },
    /// E2M1 floats times a power of two, in groups of 32.
    Mxfp4,
    /// E4M3 floats times a scale.
    Fp8 {
        /// Columns that share a scale.
        block: usize,
        /// The scales' dtype.
        scale: ScaleDtype,
    },
}

/// The dtype of [`Coding::Fp8`]'s scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleDtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Powers of two: 2^(byte - 127).
    E8m0,
}
