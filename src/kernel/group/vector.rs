//! [`super::scalar`]'s arithmetic on arrays of 32 elements, in loops that compilers turn into vector instructions. The
//! copies that are made for AVX2, AVX-512 and what every processor of an architecture has (NEON, say) differ in nothing
//! but the instructions. (bf16 has code of its own with AVX-512, in avx512/.)
//!
//! Groups are whole arrays, or one half (NVFP4's 16 columns); others are left to scalar.rs.

use super::Groups;
use super::scalar::{self, Chosen, Extent};
use crate::dtype::FloatDtype;
use crate::format::{Coding, ElementCode, Highest, ScaleCode};
use crate::kernel::block::scalar::LANES;
use crate::kernel::element::{Bfloat16, Element, Float16, Float32};
use crate::kernel::{BlockErrors, NonFinite};

/// f32's infinity, as bits: what isn't below has a NaN or an infinity in it.
const INFINITY: u32 = 0x7f80_0000;

/// Elements' codes as types, so that each has its own copy of the loops.
trait Code {
    /// Its elements and scales, known to the compiler.
    const ELEMENT: ElementCode;
    const SCALE: ScaleCode;
    /// Whether the least and the greatest element are needed, not the absmax alone.
    const SIGNED: bool;
    /// The value that stands for an element, in units of the scale and with the zero point in it; `ratio` is the element
    /// over the scale.
    fn value<E: Element>(ratio: f32, zero_point: f32) -> f32;
    /// A value's code.
    fn code(value: f32) -> u32;
    /// The same coding, as what it is known to be.
    #[inline(always)]
    fn known(coding: Coding) -> Coding {
        Coding { element: Self::ELEMENT, scale: Self::SCALE, ..coding }
    }
}

struct Integer;
struct AsymmetricInteger;
struct RoundedFloat;
struct Float;

#[inline(always)]
fn clamp_to_integer(x: f32) -> f32 {
    let x = if x < -8.0 { -8.0 } else { x };
    let x = if x > 7.0 { 7.0 } else { x };
    x.round_ties_even()
}

impl Code for Integer {
    const ELEMENT: ElementCode = ElementCode::Int { zero_point: false };
    const SCALE: ScaleCode = ScaleCode::SourceFloat;
    const SIGNED: bool = false;

    #[inline(always)]
    fn value<E: Element>(ratio: f32, _: f32) -> f32 {
        clamp_to_integer(E::round(ratio))
    }

    #[inline(always)]
    fn code(value: f32) -> u32 {
        // 2^23 + 8 + value has the integer in its lowest bits.
        (value + 8_388_616.0).to_bits() & 15
    }
}

impl Code for AsymmetricInteger {
    const ELEMENT: ElementCode = ElementCode::Int { zero_point: true };
    const SCALE: ScaleCode = ScaleCode::SourceFloat;
    const SIGNED: bool = true;

    #[inline(always)]
    fn value<E: Element>(ratio: f32, zero_point: f32) -> f32 {
        clamp_to_integer(E::round(E::round(ratio) + zero_point))
    }

    #[inline(always)]
    fn code(value: f32) -> u32 {
        Integer::code(value)
    }
}

#[inline(always)]
fn nearest_e2m1(x: f32) -> f32 {
    let magnitude = x.abs();
    let step = |is_above: bool, by: f32| if is_above { by } else { 0.0 };
    let value = step(magnitude > 0.25, 0.5)
        + step(magnitude >= 0.75, 0.5)
        + step(magnitude > 1.25, 0.5)
        + step(magnitude >= 1.75, 0.5)
        + step(magnitude > 2.5, 1.0)
        + step(magnitude >= 3.5, 1.0)
        + step(magnitude > 5.0, 2.0);
    // Zeros keep no sign; small negative numbers do.
    if x < 0.0 { -value } else { value }
}

#[inline(always)]
fn e2m1_code(value: f32) -> u32 {
    // Below 1 the codes count halves; from there on they are f32's exponent and first mantissa bit, counted from 1's.
    let (sign, magnitude) = (value.to_bits() >> 31, value.abs());
    let halves = (magnitude + 4_194_304.0).to_bits() & 1;
    let floating = (magnitude.to_bits() >> 22).wrapping_sub((127 << 1) - 2);
    sign << 3 | if magnitude < 1.0 { halves } else { floating }
}

impl Code for RoundedFloat {
    const ELEMENT: ElementCode = ElementCode::E2m1;
    const SCALE: ScaleCode = ScaleCode::E8m0(Highest::Infinite);
    const SIGNED: bool = false;

    #[inline(always)]
    fn value<E: Element>(ratio: f32, _: f32) -> f32 {
        nearest_e2m1(E::round(ratio))
    }

    #[inline(always)]
    fn code(value: f32) -> u32 {
        e2m1_code(value)
    }
}

impl Code for Float {
    const ELEMENT: ElementCode = ElementCode::E2m1;
    const SCALE: ScaleCode = ScaleCode::E4m3;
    const SIGNED: bool = false;

    #[inline(always)]
    fn value<E: Element>(ratio: f32, _: f32) -> f32 {
        nearest_e2m1(ratio)
    }

    #[inline(always)]
    fn code(value: f32) -> u32 {
        e2m1_code(value)
    }
}

/// [`crate::kernel::Kernel::quantize_groups`], inlined into a function with an instruction set.
#[inline(always)]
pub(super) fn quantize(groups: Groups<'_>) -> Result<(), NonFinite> {
    match groups.dtype {
        FloatDtype::Bfloat16 => by_coding::<Bfloat16>(groups),
        FloatDtype::Float16 => by_coding::<Float16>(groups),
        FloatDtype::Float32 => by_coding::<Float32>(groups),
    }
}

#[inline(always)]
fn by_coding<E: Element>(groups: Groups<'_>) -> Result<(), NonFinite> {
    let Coding { element, scale, group, .. } = groups.coding;
    match (element, scale, group % LANES, group) {
        (ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat, 0, _) => rows::<E, Integer, LANES>(groups),
        (ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat, 0, _) => {
            rows::<E, AsymmetricInteger, LANES>(groups)
        }
        (ElementCode::E2m1, ScaleCode::E8m0(_), 0, _) => rows::<E, RoundedFloat, LANES>(groups),
        (ElementCode::E2m1, ScaleCode::E4m3, _, 16) => rows::<E, Float, 16>(groups),
        _ => scalar::quantize(groups),
    }
}

/// [`Kernel::absmax`](crate::kernel::Kernel::absmax), inlined into a function with an instruction set.
#[inline(always)]
pub(super) fn absmax(source: &[u8], dtype: FloatDtype) -> Result<f32, NonFinite> {
    let whole = source.len() / (LANES * dtype.size()) * LANES * dtype.size();
    let extent = match dtype {
        FloatDtype::Bfloat16 => extent::<Bfloat16, Float, LANES>(&source[..whole]),
        FloatDtype::Float16 => extent::<Float16, Float, LANES>(&source[..whole]),
        FloatDtype::Float32 => extent::<Float32, Float, LANES>(&source[..whole]),
    };
    let rest = scalar::absmax(&source[whole..], dtype)?;
    extent.map(|extent| larger(extent.absmax, rest)).ok_or(NonFinite)
}

/// Groups of whole arrays of `N`: rows then follow each other without padding, and so do groups.
#[inline(always)]
fn rows<E: Element, C: Code, const N: usize>(groups: Groups<'_>) -> Result<(), NonFinite> {
    let Groups { source, coding, packed, scales, zero_points, figures, .. } = groups;
    let group = coding.group;
    let BlockErrors { absmax, signal, noise, worst } = figures;
    let scale_size = coding.scale_size(E::DTYPE);
    let each = source.chunks_exact(group * E::SIZE).zip(packed.chunks_exact_mut(group / 2));
    for (i, ((source, packed), scale)) in each.zip(scales.chunks_exact_mut(scale_size)).enumerate() {
        let extent = extent::<E, C, N>(source).ok_or(NonFinite)?;
        let chosen = Chosen::new(extent, E::DTYPE, C::known(coding), E::round);
        chosen.stored.write(E::DTYPE, scale);
        if C::SIGNED {
            zero_points[i] = (chosen.zero_point + 8.0) as u8;
        }
        absmax[i] = chosen.scale;
        (signal[i], noise[i], worst[i]) = codes::<E, C, N>(source, &chosen, packed);
    }
    Ok(())
}

/// What scales are chosen by; `None` with a NaN or an infinity.
#[inline(always)]
fn extent<E: Element, C: Code, const N: usize>(source: &[u8]) -> Option<Extent> {
    let (mut largest, mut least, mut greatest) = ([0u32; N], [0f32; N], [0f32; N]);
    for array in source.chunks_exact(N * E::SIZE) {
        for lane in 0..N {
            let x = E::decode(&array[lane * E::SIZE..][..E::SIZE]);
            largest[lane] = largest[lane].max(x.to_bits() & 0x7fff_ffff);
            if C::SIGNED {
                least[lane] = if x < least[lane] { x } else { least[lane] };
                greatest[lane] = if x > greatest[lane] { x } else { greatest[lane] };
            }
        }
    }
    let largest = fold(largest, |a, b| a.max(b));
    let (least, greatest) = match C::SIGNED {
        true => (fold(least, |a, b| if a < b { a } else { b }), fold(greatest, larger)),
        false => (0.0, 0.0),
    };
    (largest < INFINITY).then(|| Extent { absmax: f32::from_bits(largest), least, greatest })
}

/// Writes a group's codes; gives its signal, noise and worst.
#[inline(always)]
fn codes<E: Element, C: Code, const N: usize>(source: &[u8], chosen: &Chosen, packed: &mut [u8]) -> (f32, f32, f32) {
    let (mut signal, mut noise, mut worst) = ([0f32; N], [0f32; N], [0f32; N]);
    for (array, packed) in source.chunks_exact(N * E::SIZE).zip(packed.chunks_exact_mut(N / 2)) {
        let mut codes = [0u32; N];
        for lane in 0..N {
            let ratio = E::decode(&array[lane * E::SIZE..][..E::SIZE]) / chosen.scale;
            let value = C::value::<E>(ratio, chosen.zero_point);
            codes[lane] = C::code(value);
            let error = ratio - if C::SIGNED { value - chosen.zero_point } else { value };
            signal[lane] = ratio.mul_add(ratio, signal[lane]);
            noise[lane] = error.mul_add(error, noise[lane]);
            worst[lane] = larger(worst[lane], error.abs());
        }
        for (i, byte) in packed.iter_mut().enumerate() {
            *byte = (codes[2 * i] | codes[2 * i + 1] << 4) as u8;
        }
    }
    (tree_sum(signal), tree_sum(noise), fold(worst, larger))
}

/// The larger of two numbers that aren't NaN: one instruction, where `f32::max` is several.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// All lanes in one, the upper half onto the lower.
#[inline(always)]
fn fold<T: Copy, const N: usize>(mut lanes: [T; N], with: impl Fn(T, T) -> T) -> T {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = with(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// As scalar.rs's: neighbours first, then the upper half onto the lower. Lanes that there aren't are zeros, which add
/// nothing.
#[inline(always)]
fn tree_sum<const N: usize>(lanes: [f32; N]) -> f32 {
    let mut sums = [0f32; LANES / 2];
    for i in 0..N / 2 {
        sums[i] = lanes[2 * i] + lanes[2 * i + 1];
    }
    let mut half = N / 4;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
