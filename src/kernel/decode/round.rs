//! f32 to the bytes of an element: the nearest number, ties to even. NaN is the dtype's plain one.

/// As bits; magnitudes above are NaN.
const INFINITY: u32 = 0x7f80_0000;

/// bfloat16: the upper half of the rounded bits.
#[inline(always)]
pub(crate) fn bfloat16(x: f32) -> [u8; 2] {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let half = if is_nan(bits) { 0x7fc0 } else { rounded };
    (half as u16).to_le_bytes()
}

/// IEEE half precision.
#[inline(always)]
pub(crate) fn float16(x: f32) -> [u8; 2] {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // The exponent's bias is 112 less; a carry out of the mantissa raises it, up to infinity.
    let normal = (magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13).wrapping_sub(112 << 10);
    // f32's last place at 0.5 is f16's subnormal step.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    let number = if magnitude < 0x4780_0000 { finite } else { 0x7c00 } | bits >> 16 & 0x8000;
    let half = if is_nan(bits) { 0x7e00 } else { number };
    (half as u16).to_le_bytes()
}

/// IEEE single precision.
#[inline(always)]
pub(crate) fn float32(x: f32) -> [u8; 4] {
    let bits = x.to_bits();
    let plain = if is_nan(bits) { 0x7fc0_0000 } else { bits };
    plain.to_le_bytes()
}

#[inline(always)]
fn is_nan(bits: u32) -> bool {
    bits & 0x7fff_ffff > INFINITY
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// Every upper half of an f32, with lower halves at and beside the ties.
    fn numbers() -> impl Iterator<Item = f32> {
        const LOWER: [u32; 9] = [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff];
        (0..1u32 << 16).flat_map(|upper| LOWER.map(|lower| f32::from_bits(upper << 16 | lower)))
    }

    #[test]
    fn numbers_are_rounded_to_nearest_even() {
        for x in numbers().filter(|x| !x.is_nan()) {
            assert_eq!(bfloat16(x), bf16::from_f32(x).to_le_bytes(), "{x:e}");
            assert_eq!(float16(x), f16::from_f32(x).to_le_bytes(), "{x:e}");
            assert_eq!(float32(x), x.to_le_bytes(), "{x:e}");
        }
    }

    #[test]
    fn every_nan_is_the_plain_one() {
        for x in numbers().filter(|x| x.is_nan()) {
            assert_eq!((bfloat16(x), float16(x)), (0x7fc0u16.to_le_bytes(), 0x7e00u16.to_le_bytes()));
            assert_eq!(float32(x), 0x7fc0_0000u32.to_le_bytes());
        }
    }
}
