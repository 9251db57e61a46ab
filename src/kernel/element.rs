//! Source dtypes as types, so that each has its own copy of the kernels' loops.

use crate::dtype::FloatDtype;

/// A dtype that weights are quantized from.
pub(super) trait Element {
    const DTYPE: FloatDtype;
    const SIZE: usize;
    /// The bits that are not signs in four bytes of elements.
    const MAGNITUDE: u32;
    /// One element as f32, exact; `bytes` is `SIZE` long.
    fn decode(bytes: &[u8]) -> f32;
    /// The nearest number of this dtype, ties to even; infinite past the largest.
    fn round(x: f32) -> f32;
}

/// See [`FloatDtype::Bfloat16`].
pub(super) struct Bfloat16;
/// See [`FloatDtype::Float16`].
pub(super) struct Float16;
/// See [`FloatDtype::Float32`].
pub(super) struct Float32;

impl Element for Bfloat16 {
    const DTYPE: FloatDtype = FloatDtype::Bfloat16;
    const SIZE: usize = 2;
    const MAGNITUDE: u32 = 0x7fff_7fff;

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
    }
}

impl Element for Float16 {
    const DTYPE: FloatDtype = FloatDtype::Float16;
    const SIZE: usize = 2;
    const MAGNITUDE: u32 = 0x7fff_7fff;

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        let half = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        // Exponent and mantissa in f32's places; 2^112 makes up for the exponents' biases, subnormal numbers included.
        let magnitude = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
        // f16's highest exponent becomes f32's, without a branch, of which no vectors could be made.
        let highest = u32::from(half & 0x7c00 == 0x7c00).wrapping_neg() & f32::INFINITY.to_bits();
        f32::from_bits(magnitude.to_bits() | highest | (half & 0x8000) << 16)
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        let (bits, magnitude) = (x.to_bits(), x.abs());
        let normal = bits.wrapping_add(0xfff + (bits >> 13 & 1)) & 0xffff_e000;
        // f32's last place at 0.5 is f16's subnormal step.
        let subnormal = (magnitude + 0.5) - 0.5;
        let small = subnormal.to_bits() | bits & 0x8000_0000;
        let infinity = f32::INFINITY.to_bits() | bits & 0x8000_0000;
        let large = if normal & 0x7fff_ffff > 0x477f_e000 { infinity } else { normal };
        f32::from_bits(if magnitude < 6.103_515_6e-5 { small } else { large })
    }
}

impl Element for Float32 {
    const DTYPE: FloatDtype = FloatDtype::Float32;
    const SIZE: usize = 4;
    const MAGNITUDE: u32 = 0x7fff_ffff;

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }
}
