//! Sums of f64 that don't depend on the order of their terms: exact, rounded once at the end.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Digits of 32 bits that cover every finite f64, and room above for 2^32 of them.
const DIGITS: usize = (1074 + 1024) / 32 + 3;

/// A sum of non-negative finite f64s, held as one long integer in units of 2^-1074 (Kulisch's accumulator).
#[derive(Clone)]
pub(crate) struct ExactSum {
    /// Base 2^32, least significant first, each with 32 bits of room for carries.
    digits: Box<[u64; DIGITS]>,
    /// Additions since the carries were last passed on.
    pending: u32,
}

impl ExactSum {
    /// Adds `x`.
    ///
    /// # Panics
    /// When `x` is negative (-0.0, too), infinite or NaN.
    pub(crate) fn add(&mut self, x: f64) {
        let bits = x.to_bits();
        assert!(bits < f64::INFINITY.to_bits(), "{x}: only non-negative finite terms");
        let (exponent, fraction) = ((bits >> 52) as usize, bits & ((1 << 52) - 1));
        // A subnormal has the least exponent, and no leading one.
        let (mantissa, shift) = if exponent == 0 { (fraction, 0) } else { (fraction | 1 << 52, exponent - 1) };
        let wide = u128::from(mantissa) << (shift % 32);
        for (i, digit) in self.digits[shift / 32..][..3].iter_mut().enumerate() {
            *digit += (wide >> (32 * i)) as u32 as u64;
        }
        self.count();
    }

    /// Adds another sum.
    pub(crate) fn merge(&mut self, other: &ExactSum) {
        let mut other = other.clone();
        other.carry();
        for (digit, more) in self.digits.iter_mut().zip(other.digits.iter()) {
            *digit += more;
        }
        self.count();
    }

    /// The sum, rounded to nearest, ties to even.
    pub(crate) fn value(&self) -> f64 {
        let mut sum = self.clone();
        sum.carry();
        let Some(top) = sum.digits.iter().rposition(|&digit| digit != 0) else { return 0.0 };
        // The three highest digits hold at least 65 bits; what is below matters only by being there.
        let low = top.saturating_sub(2);
        let window = sum.digits[low..=top].iter().rev().fold(0u128, |window, &digit| window << 32 | u128::from(digit));
        let sticky = sum.digits[..low].iter().any(|&digit| digit != 0);
        scaled(window | u128::from(sticky && low > 0), 32 * low as i32 - 1074)
    }

    fn count(&mut self) {
        self.pending += 1;
        if self.pending == u32::MAX - 1 {
            self.carry();
        }
    }

    fn carry(&mut self) {
        let mut carry = 0;
        for digit in self.digits.iter_mut() {
            let sum = *digit + carry;
            (*digit, carry) = (sum & u64::from(u32::MAX), sum >> 32);
        }
        self.pending = 0;
    }
}

/// `integer` · 2^`exponent`, rounded once.
fn scaled(integer: u128, exponent: i32) -> f64 {
    let bits = 128 - integer.leading_zeros() as i32;
    // An f64 has 53 bits, fewer where it is subnormal.
    let dropped = (bits - 53).max(-1074 - exponent).max(0);
    let (mut kept, rest) = (integer >> dropped, integer & ((1u128 << dropped) - 1));
    let half = if dropped == 0 { 1 } else { 1u128 << (dropped - 1) };
    if rest > half || (rest == half && dropped > 0 && kept & 1 == 1) {
        kept += 1;
    }
    let exponent = exponent + dropped;
    // kept is at most 2^53 and the result representable, so neither product rounds.
    let half_way = exponent / 2;
    kept as f64 * 2f64.powi(half_way) * 2f64.powi(exponent - half_way)
}

/// As the digits that aren't zero, each with its place.
impl Serialize for ExactSum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut sum = self.clone();
        sum.carry();
        serializer.collect_seq(sum.digits.iter().enumerate().filter(|(_, digit)| **digit != 0))
    }
}

impl<'de> Deserialize<'de> for ExactSum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut sum = ExactSum::default();
        for (place, digit) in Vec::<(usize, u32)>::deserialize(deserializer)? {
            let slot = sum.digits.get_mut(place).ok_or_else(|| serde::de::Error::custom("a digit out of place"))?;
            *slot = u64::from(digit);
        }
        Ok(sum)
    }
}

impl Default for ExactSum {
    fn default() -> Self {
        ExactSum { digits: Box::new([0; DIGITS]), pending: 0 }
    }
}

impl fmt::Debug for ExactSum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExactSum({:e})", self.value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(terms: &[f64]) -> f64 {
        let mut sum = ExactSum::default();
        terms.iter().for_each(|&x| sum.add(x));
        sum.value()
    }

    #[test]
    fn sums_are_rounded_once() {
        let ulp = f64::EPSILON;
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum(&[1.0, ulp / 2.0]), 1.0);
        assert_eq!(sum(&[1.0, ulp / 2.0, 1e-300]), 1.0 + ulp);
        assert_eq!(sum(&[1.0, ulp, ulp / 2.0]), 1.0 + 2.0 * ulp);
        assert_eq!(sum(&[1e16, 1.0, 1.0]), 1e16 + 2.0);
        assert_eq!(sum(&[5e-324; 3]), 1.5e-323);
        assert_eq!(sum(&[f64::MIN_POSITIVE, 5e-324]), f64::MIN_POSITIVE + 5e-324);
        assert_eq!(sum(&[f64::MAX / 2.0, f64::MAX / 2.0]), f64::MAX);
    }

    proptest! {
        #[test]
        fn one_term_is_itself(bits in 0..0x7ff0_0000_0000_0000u64) {
            prop_assert_eq!(sum(&[f64::from_bits(bits)]).to_bits(), bits);
        }

        #[test]
        fn a_sum_is_read_back_as_it_was_written(terms in prop::collection::vec(0..0x7f00_0000_0000_0000u64, 0..9)) {
            let mut sum = ExactSum::default();
            terms.iter().for_each(|&bits| sum.add(f64::from_bits(bits)));
            let json = serde_json::to_string(&sum).unwrap();
            let mut read: ExactSum = serde_json::from_str(&json).unwrap();
            read.add(1.5);
            sum.add(1.5);
            prop_assert_eq!(read.value(), sum.value());
        }

        #[test]
        fn integers_sum_exactly_in_any_order_and_split(mut terms in prop::collection::vec(0..1u64 << 40, 1..50), cut in 0usize..50) {
            let expected = terms.iter().sum::<u64>() as f64;
            let cut = cut % terms.len();
            let (mut left, mut right) = (ExactSum::default(), ExactSum::default());
            terms.iter().take(cut).for_each(|&x| left.add(x as f64));
            terms.iter().skip(cut).for_each(|&x| right.add(x as f64));
            right.merge(&left);
            prop_assert_eq!(right.value(), expected);
            terms.reverse();
            prop_assert_eq!(sum(&terms.iter().map(|&x| x as f64).collect::<Vec<_>>()), expected);
        }

        #[test]
        fn two_terms_round_as_the_machine_does(a in 0..0x7fe0_0000_0000_0000u64, b in 0..0x7fe0_0000_0000_0000u64) {
            let (a, b) = (f64::from_bits(a), f64::from_bits(b));
            prop_assert_eq!(sum(&[a, b]), a + b);
            prop_assert_eq!(sum(&[a, a * 1.1e-16]), a + a * 1.1e-16);
        }
    }
}
