//! Scales of carried weights in NVFP4: those of a set get one global scale, the one of its largest weight.
//!
//! Some published checkpoints have other global scales for an expert's gate and its up, of which readers take one for both.

use super::scan::Scan;
use crate::checkpoint::Source;
use crate::error::{Result, Warning};
use crate::format::{Codec, Layout, ScaleCode, TensorScale};
use crate::kernel::float8::{e4m3, e4m3_value};
use crate::manifest::Carried;
use crate::read::{Decode, Read};

/// A weight's scales under its set's global scale.
pub(crate) struct Rescaled {
    /// E4M3, as many as the target has groups.
    pub scales: Read,
    /// The global scale, as the target's layout has it.
    pub global: f32,
    /// Whether they still are what they were.
    pub carried: Carried,
    /// Blocks whose scale was rounded.
    rounded: u64,
    /// Whether the global scale was another.
    changed: bool,
}

/// A member of a set, and why its codes can't be carried over.
type WhyNot = (usize, String);

/// What to know of weights whose global scale became another.
pub(crate) fn warning<'r>(all: impl Iterator<Item = &'r Rescaled>) -> Option<Warning> {
    let (weights, blocks) = all
        .filter(|rescaled| rescaled.changed)
        .fold((0u64, 0u64), |(weights, blocks), rescaled| (weights + 1, blocks + rescaled.rounded));
    (weights > 0).then(|| {
        format!(
            "weights that clients load with others had a global scale of their own ({weights} of them), which clients don't expect: they \
             got that of the largest, and {blocks} of their block scales were rounded"
        )
        .into()
    })
}

/// The scales of all members of a set.
///
/// # Errors
/// Those of reading. Inside: when a member's scales don't fit into the set's.
pub(crate) fn set(source: &Source, members: &[&Read], codec: &Codec) -> Result<Result<Vec<Rescaled>, WhyNot>> {
    let mut scan = Scan::new(source);
    let matrices: Vec<&Decode> = members
        .iter()
        .filter_map(|read| if let Read::Decode(matrix) = read { Some(&**matrix) } else { None })
        .collect();
    if matrices.len() < members.len() {
        return Ok(Err((0, "it is more than one matrix".to_owned())));
    }
    let is_mxfp4 = |matrix: &&Decode| matches!(matrix.coding.scale, ScaleCode::E8m0(_));
    match matrices.iter().filter(|matrix| is_mxfp4(matrix)).count() {
        0 => nvfp4(&mut scan, &matrices, codec),
        all if all == matrices.len() => mxfp4(&mut scan, &matrices, codec),
        _ => Ok(Err((0, "some of its set are MXFP4 and some NVFP4".to_owned()))),
    }
}

/// The global scale in the target's layout, of one in compressed-tensors', which scales are divided by; and whether it is exact.
fn global(codec: &Codec, divisor: f32) -> (f32, bool) {
    match codec.layout() {
        Some(Layout::Modelopt) => (1.0 / divisor, f64::from(1.0 / divisor) * f64::from(divisor) == 1.0),
        _ => (divisor, true),
    }
}

fn nvfp4(scan: &mut Scan<'_>, matrices: &[&Decode], codec: &Codec) -> Result<Result<Vec<Rescaled>, WhyNot>> {
    let mut divisors = Vec::new();
    for (i, matrix) in matrices.iter().enumerate() {
        // What block scales are divided by; of ModelOpt's factor the inverse, of which ratios are taken alone.
        let divisor = match matrix.coding.tensor_scale {
            Some(TensorScale::Divisor(divisor)) => f64::from(divisor),
            Some(TensorScale::Factor(factor)) => 1.0 / f64::from(factor),
            None => 1.0,
        };
        if !(divisor.is_finite() && divisor > 0.0) {
            return Ok(Err((i, format!("its global scale is {divisor}"))));
        }
        divisors.push(divisor);
    }
    let smallest = divisors.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = divisors.iter().position(|divisor| *divisor == smallest).unwrap_or_default();
    let (global, is_exact) = match (matrices[largest].coding.tensor_scale, codec.layout()) {
        // Its own, to the bit.
        (Some(TensorScale::Factor(factor)), Some(Layout::Modelopt)) => (factor, true),
        (Some(TensorScale::Factor(factor)), _) => (1.0 / factor, f64::from(1.0 / factor) * f64::from(factor) == 1.0),
        (Some(TensorScale::Divisor(divisor)), _) => self::global(codec, divisor),
        (None, _) => (1.0, true),
    };
    let mut all = Vec::new();
    for (i, (matrix, divisor)) in matrices.iter().zip(&divisors).enumerate() {
        let changed = *divisor != smallest;
        let ratio = smallest / divisor;
        let (mut scales, mut rounded) = (matrix.scales.clone(), 0);
        if changed {
            let table = rescaled(ratio);
            let counts = scan.counts(&matrix.scales)?;
            let counted = |is: &dyn Fn(u8) -> bool| {
                (0..=255u8).filter(|&byte| is(byte)).map(|byte| counts[usize::from(byte)]).sum::<u64>()
            };
            let lost = counted(&|byte| byte & 0x7f != 0 && table[usize::from(byte)] & 0x7f == 0);
            if lost > 0 {
                let why = format!("{lost} of its block scales would underflow to 0 under the global scale of its set");
                return Ok(Err((i, why)));
            }
            let value = |byte: u8| f64::from(e4m3_value(byte));
            rounded = counted(&|byte| byte & 0x7f != 0x7f && value(table[usize::from(byte)]) != value(byte) * ratio);
            scales = scales.mapped(table);
        }
        let carried = if rounded == 0 && is_exact { Carried::Lossless } else { Carried::ScalesRounded };
        all.push(Rescaled { scales, global, carried, rounded, changed });
    }
    Ok(Ok(all))
}

/// For each E4M3 byte, the one nearest to its value times `ratio`, which is 1 at most.
fn rescaled(ratio: f64) -> [u8; 256] {
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        match byte & 0x7f {
            0x7f => byte,
            magnitude => e4m3((f64::from(e4m3_value(magnitude)) * ratio) as f32) | byte & 0x80,
        }
    })
}

/// The span of exponents that E4M3's powers of two have: 2^-9 to 2^8.
const EXPONENTS: u8 = 17;

fn mxfp4(scan: &mut Scan<'_>, matrices: &[&Decode], codec: &Codec) -> Result<Result<Vec<Rescaled>, WhyNot>> {
    let (mut least, mut most) = (u8::MAX, 0);
    for (i, matrix) in matrices.iter().enumerate() {
        let Some([from, to]) = scan.exponents(matrix)? else { continue };
        (least, most) = (least.min(from), most.max(to));
        if most - least > EXPONENTS || most == u8::MAX {
            let why = format!("the exponents of its set span {}, and NVFP4's block scales {EXPONENTS}", most - least);
            return Ok(Err((i, why)));
        }
    }
    // The largest exponent becomes 2^8.
    let power = 135 - i32::from(if least > most { 127 } else { most });
    if power > 127 {
        return Ok(Err((0, "its numbers are too small for NVFP4's global scale".to_owned())));
    }
    let (global, _) = global(codec, 2f32.powi(power));
    let highest = i32::from(if least > most { 127 } else { most });
    // Groups of zeros may have any scale.
    let table = std::array::from_fn(|byte| {
        let exponent = (byte as i32 - highest + 8).clamp(-9, 8);
        if exponent >= -6 { ((exponent + 7) << 3) as u8 } else { 1 << (exponent + 9) }
    });
    let rescaled = |matrix: &&Decode| {
        let scales = matrix.scales.clone().mapped(table);
        let count = scales.len();
        let twice = Read::concat([scales.clone(), scales]).transposed([2, count], 1);
        Rescaled { scales: twice, global, carried: Carried::Lossless, rounded: 0, changed: false }
    };
    Ok(Ok(matrices.iter().map(rescaled).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_rounded_to_the_nearest_and_keep_sign_and_nan() {
        let table = rescaled(0.5);
        for byte in 0..0x7fu8 {
            let (wanted, found) = (f64::from(e4m3_value(byte)) / 2.0, f64::from(e4m3_value(table[usize::from(byte)])));
            let nearest = (0..0x7f).map(|byte| (f64::from(e4m3_value(byte)) - wanted).abs()).fold(f64::MAX, f64::min);
            assert_eq!((found - wanted).abs(), nearest, "{byte:#x}");
            assert_eq!(table[usize::from(byte | 0x80)], table[usize::from(byte)] | 0x80);
        }
        assert_eq!((table[0x7f], table[0xff], table[1]), (0x7f, 0xff, 0), "half of the least is a tie to even");
        assert!((0..=255).all(|byte| rescaled(1.0)[usize::from(byte)] == byte));
    }
}
