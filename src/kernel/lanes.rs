//! Arrays of lanes: their largest elements, and sums in scalar.rs's order, in loops that compilers turn into vector
//! instructions.

use super::block::scalar::LANES;
use super::element::Element;

/// How squares are added to sums, rounded once: what [`f32::mul_add`] does.
pub(super) trait AddSquares {
    /// Adds the square of each `x` to its sum; sums are not negative.
    fn add_squares<const N: usize>(sums: &mut [f32; N], x: &[f32; N]);
}

/// With the processor's own instruction.
pub(super) struct Fused;

/// In f64, where the processor has no instruction for it and [`f32::mul_add`] is a call of a function.
pub(super) struct InDouble;

/// The faster of the two wherever the compiler's target runs.
#[cfg(any(target_arch = "aarch64", target_feature = "fma"))]
pub(super) type Portable = Fused;
#[cfg(not(any(target_arch = "aarch64", target_feature = "fma")))]
pub(super) type Portable = InDouble;

impl AddSquares for Fused {
    #[inline(always)]
    fn add_squares<const N: usize>(sums: &mut [f32; N], x: &[f32; N]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = x.mul_add(*x, *sum);
        }
    }
}

impl AddSquares for InDouble {
    /// Squares are exact in f64, so that their sums are rounded twice: to f64, and to f32. That differs from rounding once
    /// only where the first comes to lie halfway between two numbers of f32: such sums, which are rare, are left to
    /// [`f32::mul_add`]. So are subnormal ones, where numbers of f32 are further apart.
    #[inline(always)]
    fn add_squares<const N: usize>(sums: &mut [f32; N], x: &[f32; N]) {
        let (mut rounded, mut doubtful) = ([0f32; N], [0u32; N]);
        for i in 0..N {
            let sum = f64::from(x[i]) * f64::from(x[i]) + f64::from(sums[i]);
            rounded[i] = sum as f32;
            let bits = rounded[i].to_bits();
            let is_halfway = sum.to_bits() as u32 & 0x1fff_ffff == 0x1000_0000;
            // The least normal number may have been rounded up to.
            let is_subnormal = (bits as i32) < 0x0080_0001 && bits != 0;
            doubtful[i] = u32::from(is_halfway) | u32::from(is_subnormal);
        }
        if doubtful.iter().fold(0, |any, doubtful| any | doubtful) == 0 {
            *sums = rounded;
        } else {
            one_by_one(sums, x);
        }
    }
}

#[cold]
#[inline(never)]
fn one_by_one<const N: usize>(sums: &mut [f32; N], x: &[f32; N]) {
    Fused::add_squares(sums, x);
}

/// The sign of elements that are looked at.
#[derive(Clone, Copy)]
pub(super) enum Of {
    Positive,
    Negative,
    Either,
}

/// The largest magnitude of whole arrays' elements; 0 if there is none. Infinite or NaN if one of them is.
#[inline(always)]
pub(super) fn largest<E: Element, const N: usize>(source: &[u8], of: Of) -> f32 {
    // Without the sign, or where it is that of the others, bits are in order as signed integers, from 0 on.
    let (flipped, kept) = match of {
        Of::Positive => (0, !0),
        Of::Negative => (i32::MIN, !0),
        Of::Either => (0, i32::MAX),
    };
    let bits = if E::SIZE == 2 {
        let (flipped, kept) = ((flipped >> 16) as i16, (kept >> 16) as i16);
        let mut largest = [0i16; N];
        for array in source.as_chunks().0.as_chunks::<N>().0 {
            let bits = array.map(|bytes| (i16::from_le_bytes(bytes) ^ flipped) & kept);
            largest = std::array::from_fn(|lane| largest[lane].max(bits[lane]));
        }
        i32::from(fold(largest, |a, b| a.max(b)))
    } else {
        let mut largest = [0i32; N];
        for array in source.as_chunks().0.as_chunks::<N>().0 {
            let bits = array.map(|bytes| (i32::from_le_bytes(bytes) ^ flipped) & kept);
            largest = std::array::from_fn(|lane| largest[lane].max(bits[lane]));
        }
        fold(largest, |a, b| a.max(b))
    };
    E::decode(&bits.to_le_bytes()[..E::SIZE])
}

/// The larger of two numbers that aren't NaN: one instruction, where `f32::max` is several.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// All lanes in one, the upper half onto the lower.
#[inline(always)]
pub(super) fn fold<T: Copy, const N: usize>(mut lanes: [T; N], with: impl Fn(T, T) -> T) -> T {
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
pub(super) fn tree_sum<const N: usize>(lanes: [f32; N]) -> f32 {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all exponents, some of few bits, which sums end halfway with.
    fn numbers() -> impl Iterator<Item = f32> {
        let mut state = 1u64;
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let bits = (state >> 32) as u32;
            let kept = [!0, 0xffff_f000, 0xfff0_0000, 0xff80_0000][(state >> 20) as usize % 4];
            f32::from_bits(bits & kept)
        })
    }

    fn check(sum: f32, x: f32) {
        let mut found = [sum; 4];
        InDouble::add_squares(&mut found, &[x; 4]);
        let expected = x.mul_add(x, sum);
        let same = found[0].to_bits() == expected.to_bits() || found[0].is_nan() && expected.is_nan();
        assert!(same, "{x:e}² + {sum:e} is {:e}, expected {expected:e}", found[0]);
    }

    #[test]
    fn squares_are_added_in_double_as_the_fused_instruction_does() {
        let mut numbers = numbers();
        for _ in 0..2_000_000 {
            let (x, sum) = (numbers.next().unwrap(), numbers.next().unwrap().abs());
            check(sum, x);
            // A sum of the square's size, so that bits of both matter.
            let near =
                f32::from_bits((x * x).to_bits().wrapping_add((sum.to_bits() % 64) << 22).wrapping_sub(32 << 22));
            check(near.abs(), x);
        }
    }

    #[test]
    fn squares_that_end_halfway_between_two_numbers_are_rounded_once() {
        // A sum of odd and even last place, and squares beside half of it, in f64 exactly half.
        for sum in [1.0f32, 1.0f32.next_up(), 2.0f32.next_down(), 1.5, f32::MIN_POSITIVE, f32::from_bits(3), 1e30] {
            let half = (sum.next_up() - sum) / 2.0;
            let root = half.sqrt();
            for x in [root.next_down(), root, root.next_up(), root * 3f32.sqrt(), -root, f32::from_bits(1), 0.0] {
                check(sum, x);
            }
        }
        for exponent in -75..64 {
            let x = 2f32.powi(exponent);
            for mantissa in [0, 1, 2, 3, 0x7f_ffff, 0x40_0000] {
                for distance in [-26, -25, -24, -2, -1, 0, 1, 22, 23, 24, 25, 26, 27, 48, 49] {
                    let power = 2f64.powi((2 * exponent + distance).clamp(-149, 127)) as f32;
                    check(f32::from_bits(power.to_bits() | mantissa), x);
                    check(f32::from_bits(power.to_bits() | mantissa), x.next_up());
                    check(f32::from_bits(power.to_bits() | mantissa), x.next_down());
                }
            }
        }
    }
}
