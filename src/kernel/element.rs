//! Source dtypes as types, so that each has its own copy of the kernels' loops.

use crate::dtype::FloatDtype;

/// A dtype that weights are quantized from.
pub(super) trait Element {
    const DTYPE: FloatDtype;
    const SIZE: usize;
    /// The bits that are not signs in four bytes of elements.
    const MAGNITUDE: u32;
    /// The largest magnitude of which nothing is left when it is rounded to this dtype.
    const NOTHING: f32;
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
    const NOTHING: f32 = f32::from_bits(0x8000);

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
    const NOTHING: f32 = f32::from_bits(0x3300_0000);

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        let half = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        // Exponent and mantissa in f32's places; exponents' biases differ by 112. No branches, of which no vectors could be made,
        // and no subnormal f32, which processors are slow with: f16's are a difference of two normal numbers.
        let where_exponent = |is: bool, then: u32| u32::from(is).wrapping_neg() & then;
        let (is_lowest, is_highest) = (half & 0x7c00 == 0, half & 0x7c00 == 0x7c00);
        let exponent = (112 << 23) + where_exponent(is_lowest, 1 << 23) + where_exponent(is_highest, 112 << 23);
        let number = f32::from_bits(((half & 0x7fff) << 13) + exponent);
        let magnitude = number - f32::from_bits(where_exponent(is_lowest, 113 << 23));
        f32::from_bits(magnitude.to_bits() | (half & 0x8000) << 16)
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
    const NOTHING: f32 = 0.0;

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }
}
