//! The instruction sets of x86-64: whether the processor has them, and the kernels' entry points.

use super::{avx2, avx512};
use crate::dtype::FloatDtype;
use crate::kernel::element::{Bfloat16, Float16, Float32};
use crate::kernel::{Blocks, NonFinite};

/// Calls a kernel's copy for the dtype and the block size: lengths known to the compiler are worth a fifth of the time
/// of blocks of 64.
macro_rules! by_dtype_and_block_size {
    ($quantize:path, $blocks:ident) => {
        match $blocks.dtype {
            FloatDtype::Bfloat16 => by_dtype_and_block_size!($quantize, $blocks, Bfloat16),
            FloatDtype::Float16 => by_dtype_and_block_size!($quantize, $blocks, Float16),
            FloatDtype::Float32 => by_dtype_and_block_size!($quantize, $blocks, Float32),
        }
    };
    ($quantize:path, $blocks:ident, $element:ty) => {{
        use $quantize as quantize;
        match $blocks.block_size.get() {
            32 => quantize::<$element, 32>($blocks),
            64 => quantize::<$element, 64>($blocks),
            128 => quantize::<$element, 128>($blocks),
            256 => quantize::<$element, 256>($blocks),
            512 => quantize::<$element, 512>($blocks),
            1024 => quantize::<$element, 1024>($blocks),
            2048 => quantize::<$element, 2048>($blocks),
            _ => quantize::<$element, 4096>($blocks),
        }
    }};
}

/// Whether this processor runs [`quantize_avx2`].
pub(crate) fn avx2_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Whether this processor runs [`quantize_avx512`].
pub(crate) fn avx512_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// [`super::Kernel::quantize`] with AVX2, FMA and F16C.
pub(crate) fn quantize_avx2(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    assert!(avx2_available());
    // SAFETY: the processor has the features, as just asserted.
    unsafe { by_dtype_and_block_size!(avx2::quantize, blocks) }
}

/// [`super::Kernel::quantize`] with AVX-512 F, BW, DQ and VL.
pub(crate) fn quantize_avx512(blocks: Blocks<'_>) -> Result<(), NonFinite> {
    assert!(avx512_available());
    // SAFETY: the processor has the features, as just asserted.
    unsafe { by_dtype_and_block_size!(avx512::quantize, blocks) }
}
