//! Codes decoded, against what the reference libraries' own decoders give (`scripts/make goldens`,
//! `scripts/make group-goldens`, `scripts/make source-goldens`).

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use prequant::internal::format::{Codebook, Coding, ElementCode, FP4, Highest, NF4, ScaleCode, dynamic_map};
use prequant::internal::kernel::Kernel;
use prequant::internal::kernel::decode::{Order, Row, restore_absmax};
use prequant::{FloatDtype, FormatSpec};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};

use crate::support::weights::Random;
use crate::support::{codings, groups, weights};

const DTYPES: [(&str, FloatDtype); 3] =
    [("bf16", FloatDtype::Bfloat16), ("f16", FloatDtype::Float16), ("f32", FloatDtype::Float32)];

const BLOCK_FORMATS: [&FormatSpec; 2] = [&NF4, &FP4];

/// A golden file's tensor.
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn float_dtype(&self) -> FloatDtype {
        match self.dtype {
            Dtype::BF16 => FloatDtype::Bfloat16,
            Dtype::F16 => FloatDtype::Float16,
            Dtype::F32 => FloatDtype::Float32,
            other => panic!("{other:?}: not a float dtype"),
        }
    }

    fn f32(&self) -> f32 {
        f32::from_le_bytes(self.bytes[..].try_into().unwrap())
    }

    fn row(&self, row: usize, rows: usize) -> &[u8] {
        let size = self.bytes.len() / rows;
        &self.bytes[row * size..][..size]
    }
}

fn goldens(file: &str) -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(format!("{file}.safetensors"));
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        let tensor = Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
        (name.to_owned(), tensor)
    };
    tensors.iter().map(tensor).collect()
}

/// A whole row as it is stored.
#[derive(Clone, Copy)]
struct Stored<'a> {
    coding: Coding,
    dtype: FloatDtype,
    codes: &'a [u8],
    scales: &'a [u8],
    zero_points: &'a [u8],
}

impl Stored<'_> {
    /// Decodes `length` elements from column `first` on, which every kernel does alike.
    fn decode(self, first: usize, length: usize) -> Vec<u8> {
        let expected = self.decode_with(Kernel::SCALAR, first, length);
        for kernel in Kernel::available() {
            let found = self.decode_with(kernel, first, length);
            assert!(found == expected, "{} {:?}: {length} columns from {first} on", kernel.name(), self.coding);
        }
        expected
    }

    /// Given nothing but the bytes that these elements need.
    fn decode_with(self, kernel: Kernel, first: usize, length: usize) -> Vec<u8> {
        let Stored { coding, dtype, codes, scales, zero_points } = self;
        let mut into = vec![0xa5; length * dtype.size()];
        if length > 0 {
            let (last, group, size) = (first + length - 1, coding.group, coding.scale_size(dtype));
            let groups = first / group..last / group + 1;
            kernel.decode(Row {
                coding,
                dtype,
                first,
                codes: &codes[coding.code_byte(first)..=coding.code_byte(last)],
                scales: &scales[groups.start * size..groups.end * size],
                zero_points: if zero_points.is_empty() { &[] } else { &zero_points[groups] },
                order: None,
                into: &mut into,
            });
        }
        into
    }

    /// Compares the row and its parts with `expected`: every part of a short row, some of a long one.
    fn check(self, expected: &[u8], what: &str) {
        let size = self.dtype.size();
        let columns = expected.len() / size;
        let whole = self.decode(0, columns);
        for (column, (found, expected)) in whole.chunks(size).zip(expected.chunks(size)).enumerate() {
            assert!(same(found, expected, self.dtype), "{what}, column {column}: {found:x?}, expected {expected:x?}");
        }
        let step = (columns / 32) | 1;
        for first in (0..columns).step_by(step) {
            for end in (first..=columns).step_by(step) {
                let part = self.decode(first, end - first);
                assert!(part == whole[first * size..end * size], "{what}: columns {first} to {end} differ alone");
            }
        }
    }
}

/// Byte for byte; NaN is compared with NaN, since the references' bits are the processor's.
fn same(found: &[u8], expected: &[u8], dtype: FloatDtype) -> bool {
    let is_nan = |bytes: &[u8]| match dtype {
        FloatDtype::Bfloat16 => bf16::from_le_bytes([bytes[0], bytes[1]]).is_nan(),
        FloatDtype::Float16 => f16::from_le_bytes([bytes[0], bytes[1]]).is_nan(),
        FloatDtype::Float32 => f32::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
    };
    found == expected || is_nan(found) && is_nan(expected)
}

/// compressed-tensors' zero points, eight rows an i32, as one byte each: `[rows, groups]`.
fn unpack_zero_points(packed: &[u8], rows: usize, groups: usize) -> Vec<u8> {
    let place = |row: usize, group: usize| (packed[row / 8 * groups * 4 + group * 4 + row % 8 / 2], row % 2 * 4);
    let point = |(byte, shift): (u8, usize)| byte >> shift & 15;
    (0..rows).flat_map(|row| (0..groups).map(move |group| point(place(row, group)))).collect()
}

fn codebook(format: &FormatSpec) -> &'static Codebook {
    format.codebook().unwrap()
}

/// Every case of a group format, against compressed-tensors' `decompress`.
fn check_groups(format: &str) {
    let mut rows_checked = 0;
    for (source, dtype) in DTYPES {
        let tensors = goldens(&format!("group-goldens/{format}-{source}"));
        for key in tensors.keys().filter_map(|key| key.strip_suffix("/restored")) {
            let part = |kind: &str| tensors.get(&format!("{key}/{kind}"));
            let (restored, packed, scales) = (&tensors[&format!("{key}/restored")], part("packed"), part("scale"));
            let [rows, columns] = restored.shape[..] else { panic!("{key}: not a matrix") };
            let group = key.split_once("/g").unwrap().1.parse().unwrap_or(columns);
            let coding = match format {
                "nvfp4" => codings::nvfp4(part("global").unwrap().f32()),
                "mxfp4" => codings::MXFP4,
                _ => Coding { group, ..codings::INT4 },
            };
            let expected_dtype =
                if coding == (Coding { group, ..codings::INT4 }) { dtype } else { FloatDtype::Bfloat16 };
            assert_eq!(restored.float_dtype(), expected_dtype, "{source} {key}: dtype");
            let groups = columns.div_ceil(group);
            let points =
                part("zero_point").map_or(Vec::new(), |packed| unpack_zero_points(&packed.bytes, rows, groups));
            for row in 0..rows {
                let stored = Stored {
                    coding,
                    dtype: expected_dtype,
                    codes: packed.unwrap().row(row, rows),
                    scales: scales.unwrap().row(row, rows),
                    zero_points: &points[points.len() / rows * row..][..points.len() / rows],
                };
                stored.check(restored.row(row, rows), &format!("{format} {source} {key}, row {row}"));
                rows_checked += 1;
            }
        }
    }
    assert!(rows_checked > 100, "{rows_checked} rows checked");
}

#[test]
fn int4_is_decoded_as_compressed_tensors_does() {
    check_groups("int4");
}

#[test]
fn int4_with_zero_points_is_decoded_as_compressed_tensors_does() {
    check_groups("int4-asym");
}

#[test]
fn nvfp4_is_decoded_as_compressed_tensors_does() {
    check_groups("nvfp4");
}

#[test]
fn mxfp4_is_decoded_as_compressed_tensors_does() {
    check_groups("mxfp4");
}

#[test]
fn nf4_and_fp4_are_decoded_as_bitsandbytes_does() {
    let dequantized = goldens("goldens/dequantized");
    let mut cases = 0;
    for (format, (name, dtype)) in BLOCK_FORMATS.iter().flat_map(|&format| DTYPES.map(|dtype| (format, dtype))) {
        let prefix = format!("{}/{name}/", format.name);
        let stored = goldens(&format!("goldens/{}-{name}", format.name));
        for (key, expected) in &dequantized {
            let Some((case, size)) = key.strip_prefix(&prefix).and_then(|case| case.split_once("/b")) else { continue };
            let coding = codings::blocks(codebook(format), size.parse().unwrap());
            let [codes, scales] = ["packed", "absmax"].map(|part| &stored[&format!("{case}/b{size}/{part}")].bytes[..]);
            let row = Stored { coding, dtype, codes, scales, zero_points: &[] };
            assert_eq!(expected.float_dtype(), dtype, "{key}: dtype");
            row.check(&with_signed_zeros(expected, format, codes), key);
            cases += 1;
        }
    }
    assert!(cases >= 60, "{cases} cases");
}

/// What bitsandbytes decoded, as its kernels do it: odd lengths go another way, on which FP4's code 8 is 0 and not -0.
fn with_signed_zeros(expected: &Tensor, format: &FormatSpec, codes: &[u8]) -> Vec<u8> {
    let mut bytes = expected.bytes.clone();
    let size = expected.float_dtype().size();
    let elements = bytes.chunks_mut(size).zip(codes.iter().flat_map(|byte| [byte >> 4, byte & 15]));
    for (element, _) in elements.filter(|(_, code)| format == &FP4 && *code == 8) {
        element[size - 1] |= 0x80;
    }
    bytes
}

#[test]
fn double_quantized_weights_are_decoded_as_bitsandbytes_does() {
    let tensors = goldens("goldens/dequantized");
    for (format, (name, dtype)) in BLOCK_FORMATS.iter().flat_map(|&format| DTYPES.map(|dtype| (format, dtype))) {
        let part = |kind: &str| &tensors[&format!("{}/{name}/double/{kind}", format.name)];
        let (codes, offset) = (&part("absmax").bytes, part("nested_offset").f32());
        let mut absmax = vec![0; codes.len() * 4];
        restore_absmax(codes, &part("nested_absmax").bytes, (offset, dynamic_map().values()), 0, &mut absmax);
        let coding = codings::blocks(codebook(format), 32);
        let row = Stored { coding, dtype, codes: &part("packed").bytes, scales: &absmax, zero_points: &[] };
        row.check(&part("dequantized").bytes, &format!("{format:?} {name}"));
    }
}

#[test]
fn absmax_is_restored_as_bitsandbytes_does_from_any_entry_on() {
    let tensors = goldens("goldens/double-quant");
    for case in tensors.keys().filter_map(|key| key.strip_suffix("/restored")) {
        let part = |kind: &str| &tensors[&format!("{case}/{kind}")];
        let (codes, nested, expected) = (&part("codes").bytes, &part("nested_absmax").bytes, &part("restored").bytes);
        let entries = codes.len();
        for first in (0..entries).step_by(entries / 40 + 1) {
            for end in [first, entries.min(first + 1), entries.min(first + 300), entries] {
                let mut found = vec![0xa5; (end - first) * 4];
                let nested = &nested[first / 256 * 4..];
                restore_absmax(
                    &codes[first..end],
                    nested,
                    (part("nested_offset").f32(), dynamic_map().values()),
                    first,
                    &mut found,
                );
                assert!(found == expected[first * 4..end * 4], "{case}: entries {first} to {end}");
            }
        }
    }
}

#[test]
fn fp8_blocks_are_decoded_as_transformers_does() {
    let tensors = goldens("source-goldens/fp8");
    let kinds = ["f32", "bf16", "e8m0", "u8"];
    for case in tensors.keys().filter_map(|key| key.strip_suffix("/weight")) {
        let weight = &tensors[&format!("{case}/weight")];
        let [rows, columns] = weight.shape[..] else { panic!("{case}: not a matrix") };
        for ((kind, scale), (name, dtype)) in
            kinds.into_iter().zip(codings::FP8_SCALES).flat_map(|scale| DTYPES.map(|dtype| (scale, dtype)))
        {
            let (grid, expected) =
                (&tensors[&format!("{case}/{kind}/scale")], &tensors[&format!("{case}/{kind}/{name}")]);
            let coding = codings::fp8(columns / grid.shape[1], scale);
            for row in 0..rows {
                let scales = grid.row(row * grid.shape[0] / rows, grid.shape[0]);
                let stored = Stored { coding, dtype, codes: weight.row(row, rows), scales, zero_points: &[] };
                stored.check(expected.row(row, rows), &format!("{case}, {kind} scales, row {row}"));
            }
        }
    }
}

#[test]
fn gpt_oss_blocks_are_decoded_as_transformers_does() {
    let tensors = goldens("source-goldens/mxfp4");
    let [experts, rows, groups, _] = tensors["blocks"].shape[..] else { panic!("not blocks") };
    let columns = groups * 32;
    for (name, dtype) in DTYPES {
        // transformers gives [experts, columns, rows].
        let transposed: Vec<&[u8]> = tensors[name].bytes.chunks(dtype.size()).collect();
        for (expert, row) in (0..experts).flat_map(|expert| (0..rows).map(move |row| (expert, row))) {
            let elements = (0..columns).map(|column| transposed[(expert * columns + column) * rows + row]);
            let [codes, scales] =
                ["blocks", "scales"].map(|part| tensors[part].row(expert * rows + row, experts * rows));
            let stored = Stored { coding: codings::MXFP4_GPT_OSS, dtype, codes, scales, zero_points: &[] };
            stored.check(&elements.collect::<Vec<_>>().concat(), &format!("{name}, expert {expert}, row {row}"));
            // compressed-tensors' rule differs in the largest byte alone.
            if !scales.contains(&255) {
                let plain = Stored { coding: codings::MXFP4, ..stored };
                assert_eq!(plain.decode(0, columns), stored.decode(0, columns), "expert {expert}, row {row}");
            }
        }
    }
}

/// Codings with sizes that bytes and each other don't divide, too.
fn codings() -> impl Strategy<Value = Coding> {
    let sizes = || prop::sample::select(vec![1usize, 3, 16, 31, 32, 64, 128]);
    let scales = prop::sample::select(codings::FP8_SCALES.to_vec());
    prop_oneof![
        (prop::sample::select(BLOCK_FORMATS.to_vec()), sizes())
            .prop_map(|(format, block_size)| codings::blocks(codebook(format), block_size)),
        sizes().prop_map(|group| Coding { group, ..codings::INT4 }),
        (0.1f32..1e5).prop_map(codings::nvfp4),
        (1e-6f32..1.0).prop_map(codings::nvfp4_modelopt),
        Just(codings::MXFP4),
        Just(codings::MXFP4_GPT_OSS),
        (sizes(), scales).prop_map(|(block, scale)| codings::fp8(block, scale)),
    ]
}

proptest! {
    #[test]
    fn any_run_of_columns_is_the_rows_own(
        coding in codings(),
        dtype in prop::sample::select(weights::DTYPES.to_vec()),
        columns in 1usize..400,
        with_zero_points in any::<bool>(),
        seed in 1u64..,
        ends in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        let mut random = Random(seed);
        let mut bytes = |length: usize| (0..length).map(|_| (random.bits() >> 24) as u8).collect::<Vec<u8>>();
        let groups = columns.div_ceil(coding.group);
        let (codes, scales) = (bytes(columns), bytes(groups * coding.scale_size(dtype)));
        let zero_points = if with_zero_points { bytes(groups).iter().map(|byte| byte >> 4).collect() } else { vec![] };
        let row = Stored { coding, dtype, codes: &codes, scales: &scales, zero_points: &zero_points };
        let whole = row.decode(0, columns);
        let (a, b) = (ends.0.index(columns + 1), ends.1.index(columns + 1));
        let (first, end) = (a.min(b), a.max(b));
        prop_assert_eq!(row.decode(first, end - first), &whole[first * dtype.size()..end * dtype.size()]);
    }
}

/// Each column of a row whose groups stand in no order, alone in its group.
#[test]
fn columns_in_any_order_of_groups_decode_by_the_scale_of_theirs() {
    const GROUPS: usize = 3;
    let mut random = Random(11);
    let mut bytes = |length: usize| (0..length).map(|_| (random.bits() >> 24) as u8).collect::<Vec<u8>>();
    let (codes, points) = (bytes(50), bytes(GROUPS).iter().map(|byte| byte >> 4).collect::<Vec<u8>>());
    let of_columns: Vec<u32> = bytes(99).iter().map(|byte| u32::from(*byte) % GROUPS as u32).collect();
    for dtype in weights::DTYPES {
        let scales = weights::encode(dtype, &[0.5, -3.0, 0.001]);
        let size = dtype.size();
        for (first, length) in [(0, 99), (1, 98), (7, 20), (98, 1), (4, 0)] {
            let alone = (first..first + length).flat_map(|column| {
                let group = of_columns[column] as usize;
                let (scales, zero_points) = (&scales[group * size..][..size], &points[group..=group]);
                let coding = Coding { group: 99, ..codings::INT4_ASYM };
                Stored { coding, dtype, codes: &codes, scales, zero_points }.decode(column, 1)
            });
            let expected: Vec<u8> = alone.collect();
            for kernel in Kernel::available() {
                let mut into = vec![0xa5; length * size];
                let order = Some(Order { groups: GROUPS, of_columns: &of_columns[first..] });
                let (coding, codes) = (codings::INT4_ASYM, &codes[first / 2..]);
                kernel.decode(Row {
                    coding,
                    dtype,
                    first,
                    codes,
                    scales: &scales,
                    zero_points: &points,
                    order,
                    into: &mut into,
                });
                assert!(into == expected, "{} {dtype:?}: {length} columns from {first} on", kernel.name());
            }
        }
    }
}

/// Compares decoded weights with the squared error that the quantizer said it made, group by group.
fn assert_noise(weights: &[f32], decoded: &[u8], group: usize, figures: &[Vec<u32>; 4], what: &str) {
    let decoded: Vec<f32> = decoded.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
    for (i, (weights, decoded)) in weights.chunks(group).zip(decoded.chunks(group)).enumerate() {
        let [scale, noise] = [0, 2].map(|figure: usize| f64::from(f32::from_bits(figures[figure][i])));
        let squares = weights.iter().zip(decoded).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
        let (found, expected) = (squares.sum::<f64>(), noise * scale * scale);
        assert!((found - expected).abs() <= 1e-4 * expected, "{what}, group {i}: {found:e}, expected {expected:e}");
    }
}

#[test]
fn decoded_weights_are_as_far_off_as_the_quantizer_says() {
    let dtype = FloatDtype::Float32;
    let mut random = Random(3);
    let weights: Vec<f32> = (0..4096).map(|_| random.normal() * 0.02).collect();
    let source = weights::encode(dtype, &weights);
    for (format, size) in BLOCK_FORMATS.iter().flat_map(|&format| [32u32, 64, 4096].map(|size| (format, size))) {
        let stored = weights::quantize(Kernel::SCALAR, &source, dtype, size, codebook(format)).unwrap();
        let absmax: Vec<u8> = stored.figures[0].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let coding = codings::blocks(codebook(format), size as usize);
        let row = Stored { coding, dtype, codes: &stored.packed, scales: &absmax, zero_points: &[] };
        let decoded = row.decode(0, weights.len());
        assert_noise(&weights, &decoded, size as usize, &stored.figures, &format!("{format:?} {size}"));
    }
    let (global_scale, scale_2) = (20000.0, 4e-5);
    let of_formats = [
        Coding { group: 128, ..codings::INT4 },
        codings::INT4_ASYM,
        codings::nvfp4(global_scale),
        codings::nvfp4_modelopt(scale_2),
        codings::MXFP4,
    ];
    // No format's, yet.
    let elements = [ElementCode::Int { zero_point: false }, ElementCode::E2m1, ElementCode::Codebook(codebook(&NF4))];
    let scales = [
        ScaleCode::SourceFloat,
        ScaleCode::Float(FloatDtype::Bfloat16),
        ScaleCode::Float(FloatDtype::Float32),
        ScaleCode::E8m0(Highest::Infinite),
    ];
    let others = elements.into_iter().flat_map(|element| scales.map(|scale| Coding::new(element, scale, 32)));
    for coding in of_formats.into_iter().chain(others) {
        let columns = weights.len();
        let stored = groups::quantize(Kernel::SCALAR, &source, dtype, columns, coding.group, coding).unwrap();
        let (codes, scales, zero_points) = (&stored.packed[..], &stored.scales[..], &stored.zero_points[..]);
        let decoded = Stored { coding, dtype, codes, scales, zero_points }.decode(0, columns);
        assert_noise(&weights, &decoded, coding.group, &stored.figures, &format!("{coding:?}"));
    }
}
