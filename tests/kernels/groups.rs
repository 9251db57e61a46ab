//! Every kernel for groups against the specification: the same bytes, and figures the same to the bit.

use prequant::FloatDtype;
use prequant::internal::format::{Coding, ElementCode};
use prequant::internal::kernel::group::scalar;
use prequant::internal::kernel::{Kernel, NonFinite};

use crate::support::codings;
use crate::support::groups::{self, quantize};
use crate::support::weights::{self, DTYPES, Random, encode, largest, next_bf16s, next_f32s};

/// The schemes with the group sizes that each is used with; a whole row's, and odd ones, too.
fn schemes(source: &[u8], dtype: FloatDtype) -> Vec<(Coding, Vec<usize>)> {
    let absmax = scalar::absmax(source, dtype).unwrap_or(1.0);
    let global_scale = scalar::global_scale(absmax, dtype);
    let scale_2 = scalar::scale_2(absmax);
    let integers = vec![32, 64, 128, COLUMNS, 40, 20];
    vec![
        (codings::INT4, integers.clone()),
        (codings::INT4_ASYM, integers),
        (codings::nvfp4(global_scale), vec![16]),
        (codings::nvfp4(1.0), vec![16]),
        (codings::nvfp4_modelopt(scale_2), vec![16]),
        (codings::MXFP4, vec![32]),
    ]
}

/// Divisible by every group size.
const COLUMNS: usize = 640;

/// Asserts that every kernel does with rows of these elements what the specification does, in every dtype and scheme, from
/// every alignment.
fn assert_all_equal(elements: &[f32]) {
    for dtype in DTYPES {
        let mut source = encode(dtype, elements);
        source.truncate(source.len() / (COLUMNS * dtype.size()) * COLUMNS * dtype.size());
        assert!(!source.is_empty());
        for (scheme, sizes) in schemes(&source, dtype) {
            for group in sizes {
                let expected = quantize(Kernel::SCALAR, &source, dtype, COLUMNS, group, scheme);
                for (i, kernel) in Kernel::available().into_iter().enumerate() {
                    let unaligned = [&vec![0; i][..], &source].concat();
                    let found = quantize(kernel, &unaligned[i..], dtype, COLUMNS, group, scheme);
                    let case = format!("{} {dtype:?} {scheme:?} groups of {group}", kernel.name());
                    match (&found, &expected) {
                        (Ok(found), Ok(expected)) => {
                            assert_eq!(found.difference(expected), None, "{case}");
                        }
                        _ => assert_eq!(found.is_ok(), expected.is_ok(), "{case}"),
                    }
                }
            }
        }
    }
}

#[test]
fn kernels_equal_the_specification_on_random_and_heavy_tailed_weights() {
    let mut random = Random(1);
    let n = 24 * COLUMNS;
    assert_all_equal(&(0..n).map(|_| random.normal() * 0.02).collect::<Vec<_>>());
    assert_all_equal(&(0..n).map(|_| random.normal() / (random.uniform().abs() + 1e-4)).collect::<Vec<_>>());
    assert_all_equal(&(0..n).map(|_| random.any()).collect::<Vec<_>>());
    let exponent = |random: &mut Random| 2f32.powi((random.bits() % 40) as i32 - 30);
    let scales: Vec<f32> = (0..n / 16).map(|_| exponent(&mut random)).collect();
    assert_all_equal(&(0..n).map(|i| random.normal() * scales[i / 16]).collect::<Vec<_>>());
}

#[test]
fn kernels_equal_the_specification_on_adversarial_groups() {
    let mut random = Random(2);
    let mut pick =
        |from: &[f32]| (0..6 * COLUMNS).map(|_| from[random.bits() as usize % from.len()]).collect::<Vec<_>>();
    for from in groups::ADVERSARIAL {
        assert_all_equal(&pick(from));
    }
}

/// At and beside every border between codes, in groups whose scale is that of `top`.
#[test]
fn kernels_equal_the_specification_at_the_borders_between_codes() {
    let quarters: Vec<f32> = (-32..=32).map(|i| i as f32 / 4.0).collect();
    for scale in [1.0, 0.125, 0.0371, 3.7e-4, 1.0e4] {
        for next in [next_f32s, next_bf16s] {
            let mut elements: Vec<f32> = quarters.iter().flat_map(|quarter| next(quarter * scale)).collect();
            elements.resize(elements.len().next_multiple_of(COLUMNS), 0.0);
            for top in [6.0, 7.0, 7.5, 8.0] {
                let mut elements = elements.clone();
                elements.iter_mut().for_each(|x| *x = x.clamp(-top * scale, top * scale));
                elements.iter_mut().step_by(16).for_each(|x| *x = top * scale);
                assert_all_equal(&elements);
            }
        }
    }
}

#[test]
fn the_largest_magnitude_is_found_wherever_it_is() {
    for dtype in DTYPES {
        for n in [1, 31, 32, 33, 100, 640] {
            for place in 0..n {
                let mut elements = vec![0.25; n];
                elements[place] = -0.75;
                for kernel in Kernel::available() {
                    assert_eq!(kernel.absmax(&encode(dtype, &elements), dtype), Ok(0.75));
                }
            }
        }
        assert_eq!(Kernel::detect().absmax(&[], dtype), Ok(0.0));
    }
}

#[test]
fn every_f16_is_decoded_and_rounded_to() {
    // In groups of one magnitude each, so that all bits of the numbers matter.
    let all: Vec<f32> =
        (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f32()).filter(|x| x.is_finite()).collect();
    assert_all_equal(&all);
    let mut random = Random(3);
    let ratios: Vec<f32> =
        (0..64 * COLUMNS).map(|_| random.uniform() * 2f32.powi((random.bits() % 16) as i32)).collect();
    assert_all_equal(&ratios);
}

#[test]
fn what_is_not_finite_is_told_wherever_it_is() {
    for dtype in DTYPES {
        let clean = encode(dtype, &vec![0.25; 2 * COLUMNS]);
        for (bad, place) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().zip([0, 677, 2 * COLUMNS - 1]) {
            let mut source = clean.clone();
            let encoded = weights::encode_one(dtype, bad);
            source[place * dtype.size()..][..dtype.size()].copy_from_slice(&encoded);
            for kernel in Kernel::available() {
                for (scheme, sizes) in schemes(&clean, dtype) {
                    for group in sizes {
                        assert_eq!(quantize(kernel, &source, dtype, COLUMNS, group, scheme), Err(NonFinite));
                    }
                }
            }
            for kernel in Kernel::available() {
                assert_eq!(kernel.absmax(&source, dtype), Err(NonFinite));
            }
        }
        assert!(largest(dtype) > 1.0);
    }
}

/// Asserts that every kernel does with groups of these bf16 what the specification does.
fn assert_groups_equal(source: &[u8], group: usize, scheme: Coding, case: &str) {
    let dtype = FloatDtype::Bfloat16;
    let expected = quantize(Kernel::SCALAR, source, dtype, group, group, scheme).unwrap();
    for kernel in Kernel::available() {
        let found = quantize(kernel, source, dtype, group, group, scheme).unwrap();
        assert_eq!(found.difference(&expected), None, "{} {scheme:?} groups of {group}, {case}", kernel.name());
    }
}

/// The schemes, each with its shortest group, for tensors whose absmax is 1.
const SCHEMES: [(Coding, usize); 5] = [
    (codings::INT4, 32),
    (codings::INT4_ASYM, 32),
    (codings::nvfp4(2688.0), 16),
    (codings::nvfp4_modelopt(1.0 / 2688.0), 16),
    (codings::MXFP4, 32),
];

/// Vector kernels take so many at a time.
#[test]
fn any_number_of_groups_is_quantized() {
    let mut random = Random(5);
    let weights: Vec<f32> = (0..150 * 32).map(|_| random.uniform()).collect();
    for (scheme, group) in SCHEMES {
        for groups in 0..150 {
            let source = encode(FloatDtype::Bfloat16, &weights[..groups * group]);
            assert_groups_equal(&source, group, scheme, &format!("{groups} of them"));
        }
    }
}

#[test]
fn what_is_not_finite_is_told_in_every_group_of_a_batch() {
    for (scheme, group) in SCHEMES {
        let clean = encode(FloatDtype::Bfloat16, &vec![0.25; 70 * group]);
        for place in (0..70 * group).step_by(5) {
            for bits in [0x7f80u16, 0xff80, 0x7f81, 0xffff] {
                let mut source = clean.clone();
                source[2 * place..][..2].copy_from_slice(&bits.to_le_bytes());
                for kernel in Kernel::available() {
                    let found = quantize(kernel, &source, FloatDtype::Bfloat16, group, group, scheme);
                    assert_eq!(found, Err(NonFinite), "{} {scheme:?} {bits:#x} at {place}", kernel.name());
                }
            }
        }
    }
}

/// So that every scale is chosen: subnormal ones, the least and the greatest.
#[test]
fn every_bf16_is_a_groups_absmax() {
    let mut random = Random(6);
    for (scheme, group) in SCHEMES {
        let weights = |bits: u16| {
            let absmax = half::bf16::from_bits(bits).to_f32();
            let rest = (1..group).map(|_| absmax * random.uniform()).collect::<Vec<_>>();
            [&[if bits.is_multiple_of(2) { absmax } else { -absmax }], &rest[..]].concat()
        };
        let source = encode(FloatDtype::Bfloat16, &(0..0x7f80).flat_map(weights).collect::<Vec<_>>());
        assert_groups_equal(&source, group, scheme, "one for each bf16");
    }
}

/// Of a tensor that is larger than its scale says; a single group among many.
#[test]
fn a_group_far_beyond_its_scale_changes_no_other() {
    let mut random = Random(7);
    let weights: Vec<f32> = (0..130 * 16).map(|_| random.uniform()).collect();
    for scheme in [codings::nvfp4(448.0), codings::nvfp4_modelopt(1.0 / 448.0)] {
        for far in (0..130).step_by(3) {
            for by in [14.0, 15.9, 16.0, 16.1, 1e4, 1e30] {
                let mut weights = weights.clone();
                weights[far * 16..][..16].iter_mut().for_each(|x| *x *= by);
                weights[far * 16 + far % 16] = by;
                let source = encode(FloatDtype::Bfloat16, &weights);
                assert_groups_equal(&source, 16, scheme, &format!("group {far} by {by}"));
            }
        }
    }
}

/// A tensor's scale so small that nothing is left of its product with a group's.
#[test]
fn a_scale_of_zero_is_divided_by_alike() {
    let (mut random, dtype) = (Random(8), FloatDtype::Float32);
    let mut weights: Vec<f32> =
        (0..40 * 16).map(|_| f32::from_bits(random.bits() % 3) * random.uniform().signum()).collect();
    weights[5 * 16] = f32::from_bits(2688);
    let (source, scheme) = (encode(dtype, &weights), codings::nvfp4_modelopt(scalar::scale_2(weights[5 * 16])));
    let expected = quantize(Kernel::SCALAR, &source, dtype, 16, 16, scheme).unwrap();
    assert!(expected.figures[0].contains(&0), "no scale is zero");
    for kernel in Kernel::available() {
        let found = quantize(kernel, &source, dtype, 16, 16, scheme).unwrap();
        assert_eq!(found.difference(&expected), None, "{}", kernel.name());
    }
}

/// The sign of a code is that of the element over its scale, rounded: none where nothing is left of it.
#[test]
fn elements_that_round_to_zero_lose_their_sign() {
    let one = |sign: f32, exponent: i32, mantissa: i32| sign * 2f32.powi(exponent) * (1.0 + mantissa as f32 / 128.0);
    for (scheme, group) in SCHEMES {
        let mut weights = Vec::new();
        for exponent in -120..0 {
            for mantissa in [0, 1, 2, 63, 64, 65, 127] {
                for (top, sign) in [(2f32.powi(106), 1.0), (2f32.powi(107), -1.0), (2f32.powi(30), -1.0)] {
                    weights.extend([top, one(sign, exponent, mantissa), -0.0, one(-sign, exponent, mantissa)]);
                    weights.extend((4..group).map(|i| one(-1.0, exponent + i as i32 / 8, mantissa)));
                }
            }
        }
        assert_groups_equal(
            &encode(FloatDtype::Bfloat16, &weights),
            group,
            scheme,
            "small beside their group's absmax",
        );
    }
}

/// The figures mean what they say: against f64 arithmetic on what is decoded.
#[test]
fn figures_are_those_of_the_decoded_weights() {
    let mut random = Random(4);
    let weights: Vec<f32> = (0..4 * COLUMNS).map(|_| random.normal() * 0.02 + 0.003).collect();
    let source = encode(FloatDtype::Float32, &weights);
    for (scheme, sizes) in schemes(&source, FloatDtype::Float32) {
        let group = sizes[0];
        let found = quantize(Kernel::SCALAR, &source, FloatDtype::Float32, COLUMNS, group, scheme).unwrap();
        let [scales, signal, noise, worst] =
            found.figures.map(|f| f.into_iter().map(f32::from_bits).collect::<Vec<_>>());
        for (i, elements) in weights.chunks(group).enumerate() {
            let value = |j: usize| {
                let column = i * group + j;
                let code = found.packed[column / 2] >> (column % 2 * 4) & 15;
                let point = found.zero_points.get(i).map_or(8.0, |&point| f64::from(point));
                let float = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
                let float = if code < 8 { float } else { -float };
                f64::from(scales[i]) * if scheme.element == ElementCode::E2m1 { float } else { f64::from(code) - point }
            };
            let errors: Vec<f64> = elements.iter().enumerate().map(|(j, &x)| f64::from(x) - value(j)).collect();
            let scale = f64::from(scales[i]);
            let near = |figure: f32, expected: f64| (f64::from(figure) - expected).abs() <= 1e-5 * expected.max(1e-3);
            assert!(near(noise[i], errors.iter().map(|e| e * e).sum::<f64>() / (scale * scale)), "{scheme:?}");
            assert!(near(worst[i], errors.iter().fold(0.0, |w: f64, e| w.max(e.abs())) / scale), "{scheme:?}");
            let squares: f64 = elements.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!(near(signal[i], squares / (scale * scale)), "{scheme:?}");
        }
    }
}
