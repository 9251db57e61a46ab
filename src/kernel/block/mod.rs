//! Blocks of consecutive elements with one absmax: NF4 and FP4, and double quantization of absmax.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod nested;
pub(crate) mod portable;
pub(crate) mod scalar;
mod vector;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;
