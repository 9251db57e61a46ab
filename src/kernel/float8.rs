//! 8-bit floats, as f32; exact.

/// The value of an E4M3 float: subnormal numbers count 512ths, there are no infinities, and all ones are NaN.
#[inline(always)]
pub(crate) const fn e4m3_value(byte: u8) -> f32 {
    let magnitude = (byte & 0x7f) as u32;
    let number = match magnitude {
        0..8 => magnitude as f32 / 512.0,
        0x7f => f32::NAN,
        _ => f32::from_bits((magnitude + (120 << 3)) << 20),
    };
    f32::from_bits(number.to_bits() | ((byte & 0x80) as u32) << 24)
}

/// The value of an E8M0 float, 2^(byte - 127); 2^128, which 255 would be, is infinite.
#[inline(always)]
pub(crate) fn power_of_two(byte: u8) -> f32 {
    if byte == 0 { f32::from_bits(1 << 22) } else { f32::from_bits(u32::from(byte) << 23) }
}

/// The E4M3 float nearest to `x`, which is from 0 to 448; ties to even.
#[inline(always)]
pub(crate) fn e4m3(x: f32) -> u8 {
    if x < 1.0 / 64.0 {
        return (x * 512.0).round_ties_even() as u8; // subnormal; 8 is the least normal number
    }
    let bits = x.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    ((rounded >> 20) - (120 << 3)) as u8
}
