//! The instruction sets of x86-64: the kernels' entry points.

use super::{Groups, avx2, avx512};
use crate::dtype::FloatDtype;
use crate::kernel::NonFinite;
use crate::kernel::block::x86;

/// [`crate::kernel::Kernel::quantize_groups`] with AVX2, FMA and F16C.
pub(crate) fn quantize_avx2(groups: Groups<'_>) -> Result<(), NonFinite> {
    assert!(x86::avx2_available());
    // SAFETY: the processor has the features, as just asserted.
    unsafe { avx2::quantize(groups) }
}

/// [`crate::kernel::Kernel::quantize_groups`] with AVX-512 F, BW, DQ and VL.
pub(crate) fn quantize_avx512(groups: Groups<'_>) -> Result<(), NonFinite> {
    assert!(x86::avx512_available());
    // SAFETY: the processor has the features, as just asserted.
    unsafe { avx512::quantize(groups) }
}

/// [`Kernel::absmax`](crate::kernel::Kernel::absmax) with AVX2.
pub(crate) fn absmax_avx2(source: &[u8], dtype: FloatDtype) -> Result<f32, NonFinite> {
    assert!(x86::avx2_available());
    // SAFETY: the processor has the features, as just asserted.
    unsafe { avx2::absmax(source, dtype) }
}
