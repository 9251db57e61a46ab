//! Codes decoded, against what the reference libraries' own decoders give (`scripts/make-goldens`,
//! `scripts/make-group-goldens`, `scripts/make-source-goldens`).

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use prequant::format::FloatDtype;
use prequant::kernel::decode::{Coding, Row, decode};
use safetensors::{Dtype, SafeTensors};

const DTYPES: [(&str, FloatDtype); 3] =
    [("bf16", FloatDtype::Bfloat16), ("f16", FloatDtype::Float16), ("f32", FloatDtype::Float32)];

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
    /// Decodes `length` elements from column `first` on, given nothing but the bytes that these need.
    fn decode(self, first: usize, length: usize) -> Vec<u8> {
        let Stored { coding, dtype, codes, scales, zero_points } = self;
        let mut into = vec![0xa5; length * dtype.size()];
        if length > 0 {
            let (last, group, size) = (first + length - 1, coding.group(), coding.scale_size(dtype));
            let groups = first / group..last / group + 1;
            decode(Row {
                coding,
                dtype,
                first,
                codes: &codes[coding.code_byte(first)..=coding.code_byte(last)],
                scales: &scales[groups.start * size..groups.end * size],
                zero_points: if zero_points.is_empty() { &[] } else { &zero_points[groups] },
                into: &mut into,
            });
        }
        into
    }

    /// Holds the row and its parts against `expected`: every part of a short row, some of a long one.
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

/// Byte for byte; NaN is held against NaN, since the references' bits are the processor's.
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
                "nvfp4" => {
                    let bytes = &part("global").unwrap().bytes;
                    Coding::Nvfp4 { global_scale: f32::from_le_bytes(bytes[..].try_into().unwrap()) }
                }
                "mxfp4" => Coding::Mxfp4,
                _ => Coding::Int { group },
            };
            let expected_dtype = if coding == (Coding::Int { group }) { dtype } else { FloatDtype::Bfloat16 };
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
