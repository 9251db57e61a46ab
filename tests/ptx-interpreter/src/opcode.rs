//! What each arithmetic instruction computes. Registers are 64 bits wide here; narrower numbers are zero-extended.

use half::f16;

/// What an operand must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Pred,
    B16,
    /// 32 bits of any kind.
    B32,
    /// An integer of 32 bits.
    I32,
    F32,
    B64,
    F64,
}

impl Type {
    /// By its name after the dot.
    pub fn named(name: &str) -> Option<Type> {
        Some(match name {
            "pred" => Type::Pred,
            "b16" | "u16" | "s16" => Type::B16,
            "b32" => Type::B32,
            "u32" | "s32" => Type::I32,
            "f32" => Type::F32,
            "b64" | "u64" | "s64" => Type::B64,
            "f64" => Type::F64,
            _ => return None,
        })
    }

    /// In bits; 1 for a predicate.
    pub fn bits(self) -> u32 {
        match self {
            Type::Pred => 1,
            Type::B16 => 16,
            Type::B32 | Type::I32 | Type::F32 => 32,
            Type::B64 | Type::F64 => 64,
        }
    }

    /// Whether an operand of this type may be a register that was declared as `declared`.
    pub fn takes(self, declared: Type) -> bool {
        self == declared || self.bits() == declared.bits() && (self == Type::B32 || declared == Type::B32)
    }
}

pub(crate) type Unary = (Type, Type, fn(u64) -> u64);
pub(crate) type Binary = ([Type; 3], fn(u64, u64) -> u64);
pub(crate) type Ternary = ([Type; 4], fn(u64, u64, u64) -> u64);
pub(crate) type Quaternary = ([Type; 5], fn(u64, u64, u64, u64) -> u64);

fn float(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

/// An f32's bits; every NaN is the one that GPUs make.
fn bits(x: f32) -> u64 {
    if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) }
}

fn double(x: u64) -> f64 {
    f64::from_bits(x)
}

/// An f64's bits; every NaN is the one that GPUs make.
fn double_bits(x: f64) -> u64 {
    if x.is_nan() { 0x7fff_ffff_ffff_ffff } else { x.to_bits() }
}

/// An f16's bits, to the nearest; every NaN is the one that GPUs make.
fn half(x: f32) -> u16 {
    if x.is_nan() { 0x7fff } else { f16::from_f32(x).to_bits() }
}

fn unordered(a: u64, b: u64) -> bool {
    float(a).is_nan() || float(b).is_nan()
}

fn low(x: u64) -> u64 {
    x & 0xffff_ffff
}

/// The greater by PTX's rules: a NaN is passed over, and -0.0 is below 0.0.
fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || b > a || (a == b && a.is_sign_negative()) { b } else { a }
}

fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a }
}

/// The instruction with one source of this name.
pub(crate) fn unary(opcode: &str) -> Option<Unary> {
    use Type::*;
    Some(match opcode {
        "mov.b32" => (B32, B32, |a| a),
        "mov.u32" => (I32, I32, |a| a),
        "mov.pred" => (Pred, Pred, |a| a),
        "mov.f32" => (F32, F32, |a| a),
        "mov.u64" | "cvta.to.global.u64" => (B64, B64, |a| a),
        "mov.f64" => (F64, F64, |a| a),
        "cvt.f64.f32" => (F64, F32, |a| double_bits(f64::from(float(a)))),
        "abs.f32" => (F32, F32, |a| a & 0x7fff_ffff),
        "neg.f32" => (F32, F32, |a| a ^ 1 << 31),
        "not.pred" => (Pred, Pred, |a| a ^ 1),
        "rcp.rn.f32" => (F32, F32, |a| bits(1.0 / float(a))),
        "cvt.f32.f16" => (F32, B16, |a| bits(f16::from_bits(a as u16).to_f32())),
        "cvt.rn.f16.f32" => (B16, F32, |a| u64::from(half(float(a)))),
        "cvt.rn.f32.u32" => (F32, I32, |a| bits(a as u32 as f32)),
        "cvt.rni.f32.f32" => (F32, F32, |a| bits(float(a).round_ties_even())),
        // Numbers out of range give the nearest one that isn't, and NaN 0.
        "cvt.rni.s32.f32" => (I32, F32, |a| low(float(a).round_ties_even() as i32 as u64)),
        "cvt.rzi.s32.f32" => (I32, F32, |a| low(float(a) as i32 as u64)),
        "cvt.u16.u32" => (B16, I32, |a| a & 0xffff),
        "cvt.u32.u16" => (I32, B16, |a| a),
        "cvt.u32.u64" => (I32, B64, low),
        "cvt.u64.u32" => (B64, I32, |a| a),
        _ => return None,
    })
}

/// The instruction with two sources of this name.
pub(crate) fn binary(opcode: &str) -> Option<Binary> {
    use Type::*;
    let (floats, doubles, integers, longs) = ([F32; 3], [F64; 3], [I32; 3], [B64; 3]);
    Some(match opcode {
        "add.rn.f32" => (floats, |a, b| bits(float(a) + float(b))),
        "sub.rn.f32" => (floats, |a, b| bits(float(a) - float(b))),
        "mul.rn.f32" => (floats, |a, b| bits(float(a) * float(b))),
        "div.rn.f32" => (floats, |a, b| bits(float(a) / float(b))),
        "add.rn.f64" => (doubles, |a, b| double_bits(double(a) + double(b))),
        "mul.rn.f64" => (doubles, |a, b| double_bits(double(a) * double(b))),
        "max.f32" => (floats, |a, b| bits(max(float(a), float(b)))),
        "min.f32" => (floats, |a, b| bits(min(float(a), float(b)))),
        "add.s16" => ([B16; 3], |a, b| a.wrapping_add(b) & 0xffff),
        "add.s32" => (integers, |a, b| low(a.wrapping_add(b))),
        "sub.s32" => (integers, |a, b| low(a.wrapping_sub(b))),
        "max.u32" => (integers, u64::max),
        "min.u32" => (integers, u64::min),
        "max.s32" => (integers, |a, b| low((a as i32).max(b as i32) as u64)),
        "min.s32" => (integers, |a, b| low((a as i32).min(b as i32) as u64)),
        "mul.wide.u32" => ([B64, I32, I32], |a, b| a * b),
        "add.s64" => (longs, u64::wrapping_add),
        "mul.lo.s64" => (longs, u64::wrapping_mul),
        "and.b32" => ([B32; 3], |a, b| a & b),
        "or.b32" => ([B32; 3], |a, b| a | b),
        "and.b64" => (longs, |a, b| a & b),
        "or.b64" => (longs, |a, b| a | b),
        "and.pred" => ([Pred; 3], |a, b| a & b),
        "or.pred" => ([Pred; 3], |a, b| a | b),
        "xor.pred" => ([Pred; 3], |a, b| a ^ b),
        "shl.b32" => ([B32, B32, I32], |a, b| if b < 32 { low(a << b) } else { 0 }),
        "shr.u32" => (integers, |a, b| if b < 32 { a >> b } else { 0 }),
        "shr.s32" => (integers, |a, b| low((a as i32 >> b.min(31)) as u64)),
        "shl.b64" => ([B64, B64, I32], |a, b| if b < 64 { a << b } else { 0 }),
        "shr.u64" => ([B64, B64, I32], |a, b| if b < 64 { a >> b } else { 0 }),
        _ => return comparison(opcode),
    })
}

/// `setp`. Float comparisons are false if an operand is NaN, but for those that end in `u`.
fn comparison(opcode: &str) -> Option<Binary> {
    use Type::*;
    let (floats, integers, longs) = ([Pred, F32, F32], [Pred, I32, I32], [Pred, B64, B64]);
    Some(match opcode {
        "setp.gt.f32" => (floats, |a, b| u64::from(float(a) > float(b))),
        "setp.ge.f32" => (floats, |a, b| u64::from(float(a) >= float(b))),
        "setp.le.f32" => (floats, |a, b| u64::from(float(a) <= float(b))),
        "setp.lt.f32" => (floats, |a, b| u64::from(float(a) < float(b))),
        "setp.eq.f32" => (floats, |a, b| u64::from(float(a) == float(b))),
        "setp.leu.f32" => (floats, |a, b| u64::from(unordered(a, b) || float(a) <= float(b))),
        "setp.geu.f32" => (floats, |a, b| u64::from(unordered(a, b) || float(a) >= float(b))),
        "setp.gtu.f32" => (floats, |a, b| u64::from(unordered(a, b) || float(a) > float(b))),
        "setp.gt.f64" => ([Pred, F64, F64], |a, b| u64::from(double(a) > double(b))),
        "setp.eq.b32" => ([Pred, B32, B32], |a, b| u64::from(a == b)),
        "setp.eq.s32" => (integers, |a, b| u64::from(a == b)),
        "setp.ne.s32" => (integers, |a, b| u64::from(a != b)),
        "setp.lt.u32" => (integers, |a, b| u64::from(a < b)),
        "setp.le.u32" => (integers, |a, b| u64::from(a <= b)),
        "setp.gt.u32" => (integers, |a, b| u64::from(a > b)),
        "setp.ge.u32" => (integers, |a, b| u64::from(a >= b)),
        "setp.lt.s32" => (integers, |a, b| u64::from((a as i32) < b as i32)),
        "setp.gt.s32" => (integers, |a, b| u64::from(a as i32 > b as i32)),
        "setp.ge.s32" => (integers, |a, b| u64::from(a as i32 >= b as i32)),
        "setp.lt.u64" => (longs, |a, b| u64::from(a < b)),
        "setp.gt.u64" => (longs, |a, b| u64::from(a > b)),
        "setp.ge.u64" => (longs, |a, b| u64::from(a >= b)),
        "setp.le.u64" => (longs, |a, b| u64::from(a <= b)),
        _ => return None,
    })
}

/// The instruction with three sources of this name.
pub(crate) fn ternary(opcode: &str) -> Option<Ternary> {
    use Type::*;
    let select = |a, b, p| if p != 0 { a } else { b };
    Some(match opcode {
        "fma.rn.f32" => ([F32; 4], |a, b, c| bits(float(a).mul_add(float(b), float(c)))),
        "fma.rn.f64" => ([F64; 4], |a, b, c| double_bits(double(a).mul_add(double(b), double(c)))),
        "mad.lo.s32" => ([I32; 4], |a, b, c| low(a.wrapping_mul(b).wrapping_add(c))),
        "selp.b16" => ([B16, B16, B16, Pred], select),
        "selp.b32" => ([B32, B32, B32, Pred], select),
        "selp.u32" => ([I32, I32, I32, Pred], select),
        "selp.f32" => ([F32, F32, F32, Pred], select),
        "selp.f64" => ([F64, F64, F64, Pred], select),
        _ => return None,
    })
}

/// The instruction with four sources of this name.
pub(crate) fn quaternary(opcode: &str) -> Option<Quaternary> {
    use Type::*;
    // Positions and lengths are a byte. What doesn't fit is left out.
    let insert = |a: u64, b: u64, position: u64, len: u64| {
        let (position, len) = (position & 255, (len & 255).min(32));
        let mask = if position < 32 { low(((1 << len) - 1) << position) } else { 0 };
        b & !mask | if mask == 0 { 0 } else { a << position & mask }
    };
    (opcode == "bfi.b32").then_some(([B32, B32, B32, I32, I32], insert))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two(opcode: &str, a: f32, b: f32) -> f32 {
        let (_, f) = binary(opcode).unwrap();
        float(f(u64::from(a.to_bits()), u64::from(b.to_bits())))
    }

    fn compare(opcode: &str, a: f32, b: f32) -> bool {
        two(opcode, a, b).to_bits() == 1
    }

    #[test]
    fn max_and_min_pass_over_nan_and_order_zeros() {
        for (a, b) in [(f32::NAN, 2.0), (2.0, f32::NAN)] {
            assert_eq!(two("max.f32", a, b), 2.0);
            assert_eq!(two("min.f32", a, b), 2.0);
        }
        assert_eq!(two("max.f32", f32::NAN, -f32::NAN).to_bits(), 0x7fff_ffff);
        for (a, b) in [(0.0, -0.0), (-0.0, 0.0)] {
            assert_eq!(two("max.f32", a, b).to_bits(), 0);
            assert_eq!(two("min.f32", a, b).to_bits(), 1 << 31);
        }
    }

    #[test]
    fn comparisons_with_nan_are_false_but_for_unordered_ones() {
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::NAN, f32::NAN)] {
            for opcode in ["setp.gt.f32", "setp.ge.f32", "setp.le.f32", "setp.lt.f32", "setp.eq.f32"] {
                assert!(!compare(opcode, a, b), "{opcode}");
            }
            for opcode in ["setp.leu.f32", "setp.geu.f32", "setp.gtu.f32"] {
                assert!(compare(opcode, a, b), "{opcode}");
            }
        }
        assert!(compare("setp.geu.f32", 1.0, 1.0) && !compare("setp.gtu.f32", 1.0, 1.0));
        assert!(compare("setp.eq.f32", 0.0, -0.0));
        assert!(compare("setp.leu.f32", 1.0, 1.0) && !compare("setp.leu.f32", 2.0, 1.0));
    }

    #[test]
    fn subnormals_are_kept() {
        let tiny = f32::from_bits(1);
        assert_eq!(two("add.rn.f32", tiny, tiny).to_bits(), 2);
        assert_eq!(two("mul.rn.f32", 1e-38, 0.5).to_bits(), (1e-38f32 * 0.5).to_bits());
        let (_, _, widen) = unary("cvt.f32.f16").unwrap();
        assert_eq!(float(widen(1)), 2f32.powi(-24));
    }

    #[test]
    fn fma_rounds_once() {
        let (_, fma) = ternary("fma.rn.f32").unwrap();
        let x = 1.0 + f32::EPSILON;
        let b = |x: f32| u64::from(x.to_bits());
        assert_eq!(float(fma(b(x), b(x), b(-(1.0 + 2.0 * f32::EPSILON)))), f32::EPSILON * f32::EPSILON);
    }

    #[test]
    fn doubles_keep_what_floats_round() {
        let (_, _, widen) = unary("cvt.f64.f32").unwrap();
        let (_, multiply) = binary("mul.rn.f64").unwrap();
        let x = widen(u64::from((1.0 + f32::EPSILON).to_bits()));
        let epsilon = f64::from(f32::EPSILON);
        assert_eq!(double(multiply(x, x)), 1.0 + 2.0 * epsilon + epsilon * epsilon);
        assert_eq!(double(widen(1)), 2f64.powi(-149));
        let (_, greater) = binary("setp.gt.f64").unwrap();
        assert_eq!((greater(f64::NAN.to_bits(), 0), greater(x, x), greater(x, 0)), (0, 0, 1));
    }

    #[test]
    fn shifts_past_the_width_give_zero() {
        for (opcode, by) in [("shl.b32", 32), ("shr.u32", 33), ("shl.b64", 64), ("shr.u64", 70)] {
            assert_eq!(binary(opcode).unwrap().1(5, by), 0, "{opcode}");
        }
        assert_eq!(binary("shl.b32").unwrap().1(3, 31), 1 << 31);
        assert_eq!(binary("shr.s32").unwrap().1(0x8000_0000, 40), 0xffff_ffff);
    }

    fn one(opcode: &str, a: f32) -> u64 {
        unary(opcode).unwrap().2(u64::from(a.to_bits()))
    }

    #[test]
    fn conversions_round_ties_to_even_and_hold_at_the_ends() {
        for (x, nearest, cut) in [(2.5, 2, 2), (3.5, 4, 3), (-2.5, -2, -2), (-0.7, -1, 0), (1e10, i32::MAX, i32::MAX)] {
            assert_eq!(one("cvt.rni.s32.f32", x) as u32 as i32, nearest, "{x}");
            assert_eq!(one("cvt.rzi.s32.f32", x) as u32 as i32, cut, "{x}");
        }
        assert_eq!(one("cvt.rni.s32.f32", f32::NAN), 0);
        assert_eq!(float(one("cvt.rni.f32.f32", -0.5)).to_bits(), 1 << 31);
        assert_eq!(float(unary("cvt.rn.f32.u32").unwrap().2(0xffff_ffff)), 4_294_967_296.0);
    }

    #[test]
    fn f32_to_f16_overflows_to_infinity_and_keeps_subnormals() {
        let cases = [(1.0, 0x3c00), (65519.0, 0x7bff), (65520.0, 0x7c00), (-1e9, 0xfc00), (-0.0, 0x8000)];
        let small = [(2f32.powi(-24), 1), (2f32.powi(-25), 0), (1.5 * 2f32.powi(-24), 2), (f32::NAN, 0x7fff)];
        for (x, expected) in cases.into_iter().chain(small) {
            assert_eq!(one("cvt.rn.f16.f32", x), expected, "{x:e}");
        }
    }

    #[test]
    fn bit_fields_are_inserted_as_far_as_they_fit() {
        let insert = |a, b, position, len| quaternary("bfi.b32").unwrap().1(a, b, position, len);
        assert_eq!(insert(0xab, 0x1111_1111, 4, 4), 0x1111_11b1);
        assert_eq!(insert(0xab, 0x1111_1111, 28, 8), 0xb111_1111);
        assert_eq!(insert(0xffff_ffff, 0x1111_1111, 32, 8), 0x1111_1111);
        assert_eq!(insert(0xffff_ffff, 0x1111_1111, 0, 0), 0x1111_1111);
        assert_eq!(insert(0x89ab_cdef, 0, 0, 255), 0x89ab_cdef);
    }
}
