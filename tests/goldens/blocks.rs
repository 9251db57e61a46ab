//! Our bytes against bitsandbytes 0.50.2's own, as `scripts/make goldens` had it write them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use prequant::internal::format::{FP4, NESTED_BLOCK_SIZE, NF4, dynamic_map};
use prequant::internal::kernel::block::nested;
use prequant::internal::kernel::{BlockErrors, Blocks, Kernel, quantize_any};
use prequant::{BlockSize, FloatDtype, FormatSpec};
use safetensors::SafeTensors;

const DTYPES: [(&str, FloatDtype); 3] =
    [("bf16", FloatDtype::Bfloat16), ("f16", FloatDtype::Float16), ("f32", FloatDtype::Float32)];
const FORMATS: [&FormatSpec; 2] = [&NF4, &FP4];

/// A golden file's tensors by name, as bytes.
fn goldens(file: &str) -> BTreeMap<String, Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/goldens").join(format!("{file}.safetensors"));
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

fn bits(bytes: &[u8]) -> Vec<u32> {
    floats(bytes).into_iter().map(f32::to_bits).collect()
}

#[test]
fn tables_are_bitsandbytes_own() {
    let tables = goldens("tables");
    for format in FORMATS {
        let (name, codebook) = (format.name, format.codebook().unwrap());
        assert_eq!(bits(&tables[name]), codebook.value_bits, "{name}: values");
        assert_eq!(bits(&tables[&format!("{name}/thresholds")]), codebook.threshold_bits, "{name}: thresholds");
        assert_eq!(tables[&format!("{name}/code_of_rank")], codebook.code_of_rank, "{name}: codes");
    }
    assert_eq!(floats(&tables["dynamic"]), dynamic_map().values());
}

/// Codes and absmax of a whole tensor.
fn quantize(kernel: Kernel, source: &[u8], dtype: FloatDtype, format: &FormatSpec, size: u32) -> (Vec<u8>, Vec<u32>) {
    let block_size = BlockSize::try_from(size).unwrap();
    let elements = source.len() / dtype.size();
    let blocks = elements.div_ceil(block_size.get());
    let mut packed = vec![0; elements.div_ceil(2)];
    let [mut absmax, mut signal, mut noise, mut worst] = std::array::from_fn(|_| vec![0.0; blocks]);
    let figures = BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
    let codebook = format.codebook().unwrap();
    kernel.quantize(Blocks { source, dtype, block_size, codebook, packed: &mut packed, figures }).unwrap();
    (packed, absmax.into_iter().map(f32::to_bits).collect())
}

/// Every golden of a format and dtype, on every kernel; returns the block sizes met and the number of goldens.
fn check_format(format: &FormatSpec, dtype_name: &str, dtype: FloatDtype) -> (BTreeSet<u32>, usize) {
    let inputs = goldens(&format!("input-{dtype_name}"));
    let outputs = goldens(&format!("{}-{dtype_name}", format.name));
    let (mut sizes, mut compared) = (BTreeSet::new(), 0);
    for (name, packed) in outputs.iter().filter(|(name, _)| name.ends_with("/packed")) {
        let key = name.strip_suffix("/packed").unwrap();
        let (case, size) = key.rsplit_once("/b").unwrap();
        let size: u32 = size.parse().unwrap();
        let absmax = bits(&outputs[&format!("{key}/absmax")]);
        for kernel in Kernel::available() {
            let ours = quantize(kernel, &inputs[case], dtype, format, size);
            let what = format!("{} {dtype_name} {key}, {} kernel", format.name, kernel.name());
            assert_eq!(ours.0, *packed, "{what}: codes");
            assert_eq!(ours.1, absmax, "{what}: absmax");
        }
        sizes.insert(size);
        compared += 1;
    }
    (sizes, compared)
}

#[test]
fn every_kernel_gives_bitsandbytes_codes_and_absmax_for_every_case_dtype_format_and_block_size() {
    for format in FORMATS {
        for (name, dtype) in DTYPES {
            let (sizes, compared) = check_format(format, name, dtype);
            assert_eq!(sizes, [32, 64, 128, 256, 512, 1024, 2048, 4096].into());
            assert!(compared >= 8 * 15, "{} {name}: only {compared} goldens", format.name);
        }
    }
}

/// The mean that double quantization takes off, summed exactly enough and rounded once.
fn mean(absmax: &[f32]) -> f32 {
    (absmax.iter().copied().map(f64::from).sum::<f64>() / absmax.len() as f64) as f32
}

/// absmax, quantized and restored.
fn restore(absmax: &[f32]) -> Vec<f32> {
    let (offset, map) = (mean(absmax), dynamic_map());
    let mut codes = vec![0; absmax.len()];
    let mut nested_absmax = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
    nested::quantize(absmax, offset, map, &mut codes, &mut nested_absmax);
    let restored = codes.iter().enumerate();
    restored
        .map(|(i, &code)| nested::restore(code, nested_absmax[i / NESTED_BLOCK_SIZE], offset, map.values()))
        .collect()
}

/// The largest error and the errors' norm.
fn errors(absmax: &[f32], restored: &[f32]) -> (f64, f64) {
    let errors = absmax.iter().zip(restored).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
    let (largest, squares) = errors.fold((0f64, 0f64), |(most, sum), e| (most.max(e), sum + e * e));
    (largest, squares.sqrt())
}

#[test]
fn double_quantization_restores_absmax_at_least_as_closely_as_bitsandbytes() {
    let goldens = goldens("double-quant");
    let cases: Vec<&str> = goldens.keys().filter_map(|name| name.strip_suffix("/absmax")).collect();
    assert!(cases.len() > 5, "{cases:?}");
    for case in cases {
        let absmax = floats(&goldens[&format!("{case}/absmax")]);
        let (ours, theirs) = (restore(&absmax), floats(&goldens[&format!("{case}/restored")]));
        let ((our_worst, our_norm), (their_worst, their_norm)) = (errors(&absmax, &ours), errors(&absmax, &theirs));
        // Restoring takes an f32 product and an f32 sum, and each rounds: equal codes may differ by that much.
        let rounding = 2.0 * f64::from(f32::EPSILON) * f64::from(absmax.iter().copied().fold(0.0, f32::max));
        assert!(our_worst <= their_worst + rounding, "{case}: {our_worst:e} > {their_worst:e}");
        let rounding = rounding * (absmax.len() as f64).sqrt();
        assert!(our_norm <= their_norm + rounding, "{case}: {our_norm:e} > {their_norm:e}");
    }
}

#[test]
fn the_mean_of_absmax_is_bitsandbytes_offset_up_to_its_rounding() {
    let goldens = goldens("double-quant");
    for (name, offset) in goldens.iter().filter(|(name, _)| name.ends_with("/nested_offset")) {
        let absmax = floats(&goldens[&name.replace("nested_offset", "absmax")]);
        let (ours, theirs) = (mean(&absmax), floats(offset)[0]);
        // torch sums in f32.
        assert!((ours - theirs).abs() <= 1e-6 * theirs.abs(), "{name}: {ours:e} {theirs:e}");
    }
}

#[test]
fn equal_absmax_are_restored_exactly() {
    for value in [0.0f32, 1.5, 3.0e-3] {
        assert_eq!(restore(&[value; 300]), [value; 300]);
    }
}

/// What bitsandbytes' `quantize_4bit` wrote for [1, 2, ... 70] / 70 with -0.3 at 5, 0 at 6, and the bad value at 3 and 66.
#[test]
fn blocks_with_nan_or_infinity_are_bitsandbytes_own_when_they_are_kept() {
    let cases = [
        (&NF4, f32::NAN, vec![0xff; 35]),
        (&FP4, f32::NAN, vec![0x33; 35]),
        (&NF4, f32::INFINITY, [&[0x77, 0x7f][..], &[0x77; 31], &[0xf7, 0x77]].concat()),
        (&FP4, f32::NEG_INFINITY, [&[0x00, 0x03][..], &[0x00; 31], &[0x30, 0x00]].concat()),
    ];
    for (format, bad, expected) in cases {
        let mut elements: Vec<f32> = (1..=70).map(|i| i as f32 / 70.0).collect();
        (elements[3], elements[5], elements[6], elements[66]) = (bad, -0.3, 0.0, bad);
        let source: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut packed = vec![0; 35];
        let [mut absmax, mut signal, mut noise, mut worst] = [[7f32; 2]; 4];
        quantize_any(Blocks {
            source: &source,
            dtype: FloatDtype::Float32,
            block_size: BlockSize::default(),
            codebook: format.codebook().unwrap(),
            packed: &mut packed,
            figures: BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst },
        });
        assert_eq!(packed, expected, "{} {bad}", format.name);
        assert!(absmax.iter().all(|x| x.to_bits() == bad.abs().to_bits()), "{absmax:?}");
        assert_eq!([signal, noise, worst], [[0.0; 2]; 3]);
    }
}
