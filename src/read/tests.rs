//! The evaluator against one that holds every value whole.

use proptest::prelude::*;

use super::*;
use crate::dtype::FloatDtype;
use crate::format::{
    CodecOptions, Coding, ElementCode, Highest, NESTED_BLOCK_SIZE, NF4, NVFP4, ScaleCode, dynamic_map,
};
use crate::kernel::Kernel;
use crate::kernel::decode::{Order, Row, restore_absmax};

/// A source in which no two bytes near each other are alike.
fn source_bytes(span: Span) -> Vec<u8> {
    let seed = (span.file * 7 + span.tensor) as u64;
    (span.offset..span.offset + span.len)
        .map(|at| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8)
        .collect()
}

fn fetch(span: Span, into: &mut [u8]) -> crate::error::Result<()> {
    assert_eq!(span.len, into.len() as u64, "all of a span is fetched");
    into.copy_from_slice(&source_bytes(span));
    Ok(())
}

/// An expression in words; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Words {
    Bytes(u64, u64),
    Literal(Vec<u8>),
    Decode {
        kind: u8,
        rows: u64,
        columns: u64,
        f32: bool,
        at: u64,
    },
    /// The same with blocks enough for several nested ones.
    LongDecode {
        kind: u8,
        columns: u64,
        f32: bool,
    },
    Rows(Box<Words>, [u64; 4]),
    Transposed(Box<Words>, [u64; 2]),
    Slice(Box<Words>, [u64; 2]),
    /// Whole words of what there is, changed; codes of eight rows dealt out by row.
    Changed(Box<Words>, bool),
    Nibbles(Box<Words>, u64),
    Concat(Vec<Words>),
}

fn words() -> impl Strategy<Value = Words> {
    let leaf = prop_oneof![
        (0u64..1000, 1u64..200).prop_map(|(offset, len)| Words::Bytes(offset, len)),
        prop::collection::vec(any::<u8>(), 1..40).prop_map(Words::Literal),
        (0u8..8, 1u64..12, 1u64..5, any::<bool>(), 0u64..1000)
            .prop_map(|(kind, rows, columns, f32, at)| Words::Decode { kind, rows, columns, f32, at }),
    ];
    // Small: a byte from within choices of choices may take all that they choose from.
    let small = leaf.prop_recursive(4, 12, 3, |inner| {
        let of = inner.clone().prop_map(Box::new);
        prop_oneof![
            (of.clone(), any::<[u64; 4]>()).prop_map(|(of, numbers)| Words::Rows(of, numbers)),
            (of.clone(), any::<[u64; 2]>()).prop_map(|(of, numbers)| Words::Transposed(of, numbers)),
            (of.clone(), any::<[u64; 2]>()).prop_map(|(of, numbers)| Words::Slice(of, numbers)),
            prop::collection::vec(inner, 1..4).prop_map(Words::Concat),
            (of.clone(), any::<bool>()).prop_map(|(of, awq)| Words::Changed(of, awq)),
            (of, any::<u64>()).prop_map(|(of, rows)| Words::Nibbles(of, rows)),
        ]
    });
    let long = (0u8..2, 10u64..40, any::<bool>());
    let long = long.prop_map(|(kind, columns, f32)| Words::LongDecode { kind, columns, f32 });
    let slice = (long, any::<[u64; 2]>()).prop_map(|(of, numbers)| Words::Slice(Box::new(of), numbers));
    prop_oneof![7 => small, 1 => slice]
}

/// One of the numbers that divide `all`.
fn divisor(all: u64, which: u64) -> u64 {
    let divisors: Vec<u64> = (1..=all).filter(|number| all.is_multiple_of(*number)).collect();
    divisors[(which % divisors.len() as u64) as usize]
}

/// The expression, and what it gives.
fn build(words: &Words) -> (Read, Vec<u8>) {
    match words {
        Words::Bytes(offset, len) => {
            let span = Span { file: 1, tensor: 2, offset: *offset, len: *len };
            (Read::Bytes(span), source_bytes(span))
        }
        Words::Literal(bytes) => (Read::Literal(bytes.clone().into()), bytes.clone()),
        Words::Decode { kind, rows, columns, f32, at } => {
            let decode = coded(*kind, *rows, *columns, *f32, *at);
            let expected = decoded(&decode);
            (Read::decode(decode).unwrap(), expected)
        }
        Words::LongDecode { kind, columns, f32 } => {
            let decode = coded(*kind, 139, *columns, *f32, 0);
            let expected = decoded(&decode);
            (Read::decode(decode).unwrap(), expected)
        }
        Words::Rows(of, [len, first, step, count]) => {
            let (read, all) = build(of);
            let len = divisor(all.len() as u64, *len);
            let (there, step) = (all.len() as u64 / len, 1 + step % 3);
            let first = first % there;
            let count = 1 + count % ((there - first - 1) / step + 1);
            let row = |i: u64| &all[((first + i * step) * len) as usize..][..len as usize];
            (read.rows(len, first, step, count), (0..count).flat_map(row).copied().collect())
        }
        Words::Transposed(of, [size, rows]) => {
            let (read, all) = build(of);
            let sizes = [1, 2, 4, 8].map(|size| if all.len().is_multiple_of(size) { size } else { 1 });
            let size = sizes[(size % 4) as usize];
            let rows = divisor((all.len() / size) as u64, *rows);
            let columns = (all.len() / size) as u64 / rows;
            let element = |row: u64, column: u64| &all[(row * columns + column) as usize * size..][..size];
            let transposed =
                (0..columns).flat_map(|column| (0..rows).flat_map(move |row| element(row, column))).copied();
            (read.transposed([rows, columns], size), transposed.collect())
        }
        Words::Slice(of, [number, parts]) => {
            let (read, all) = build(of);
            let parts = divisor(all.len() as u64, *parts);
            let (number, len) = (number % parts, all.len() as u64 / parts);
            (read.slice(number, parts), all[(number * len) as usize..][..len as usize].to_vec())
        }
        Words::Changed(of, awq) => {
            let (read, all) = whole_words(of);
            let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            let changed = all.chunks(4).map(word).map(|word| match awq {
                true => {
                    [0, 4, 1, 5, 2, 6, 3, 7].iter().rev().fold(0, |all, nibble| all << 4 | word >> (4 * nibble) & 15)
                }
                false => word.wrapping_add(0x1111_1111),
            });
            let change = if *awq { Change::FromAwq } else { Change::AddOnes };
            (read.words(change), changed.flat_map(u32::to_le_bytes).collect())
        }
        Words::Nibbles(of, rows) => {
            let (read, all) = whole_words(of);
            let rows = 8 * divisor((all.len() / 4) as u64, *rows);
            let columns = all.len() * 2 / rows as usize;
            let code = |row: usize, column: usize| match column < columns {
                true => all[(row / 8 * columns + column) * 4 + row % 8 / 2] >> (row % 2 * 4) & 15,
                false => 0,
            };
            let bytes = columns.div_ceil(8) * 4;
            let given = (0..rows as usize).flat_map(|row| (0..bytes).map(move |byte| (row, byte * 2)));
            let given = given.map(|(row, column)| code(row, column) | code(row, column + 1) << 4).collect();
            (read.nibbles_by_row(rows, columns as u64), given)
        }
        Words::Concat(parts) => {
            let (parts, all): (Vec<Read>, Vec<Vec<u8>>) = parts.iter().map(build).unzip();
            (Read::concat(parts), all.concat())
        }
    }
}

/// As many whole words as an expression gives, four bytes more where it has none.
fn whole_words(words: &Words) -> (Read, Vec<u8>) {
    let (read, mut all) = build(words);
    let len = all.len() / 4 * 4;
    if len == 0 {
        let bytes = [1, 2, 0xf4, 8];
        let read = Read::concat([read, Read::Literal(bytes.into())]);
        return (read.rows(4, 0, 1, 1), [&all[..], &bytes].concat()[..4].to_vec());
    }
    all.truncate(len);
    (read.rows(len as u64, 0, 1, 1), all)
}

/// A matrix of each coding, of whole groups or not where the coding allows it.
fn coded(kind: u8, rows: u64, columns: u64, f32: bool, at: u64) -> Decode {
    let dtype = if f32 { FloatDtype::Float32 } else { FloatDtype::Bfloat16 };
    let scale = if f32 { ScaleCode::Float(FloatDtype::Float32) } else { ScaleCode::E8m0(Highest::Infinite) };
    let (coding, rows, columns, row_len) = match kind {
        0 | 1 => {
            let elements = rows * columns * 7 + 3;
            (NF4.codec(CodecOptions::default()).coding(elements, None), 1, elements, elements.div_ceil(2))
        }
        2 | 3 | 7 => (
            Coding::new(ElementCode::Int { zero_point: kind != 2 }, ScaleCode::SourceFloat, 32),
            rows,
            columns * 32,
            columns * 16,
        ),
        4 => (NVFP4.codec(CodecOptions::default()).coding(columns, Some(3.0)), rows, columns * 16, columns * 8),
        5 => (Coding::new(ElementCode::E2m1, ScaleCode::E8m0(Highest::Finite), 32), rows, columns * 32, columns * 16),
        _ => (Coding::new(ElementCode::E4m3, scale, 16), rows, columns * 13 + 1, columns * 13 + 1),
    };
    let (nested, has_points, group_rows) = (kind == 1, matches!(kind, 3 | 7), if kind == 6 { 3 } else { 1 });
    let per_row = columns.div_ceil(coding.group as u64);
    let scale_len = if nested { 1 } else { coding.scale_size(dtype) as u64 };
    let span = |tensor: usize, len: u64| Span { file: 0, tensor, offset: at + 100_000 * tensor as u64, len };
    Decode {
        coding,
        dtype,
        rows,
        columns,
        row_len,
        group_rows,
        codes: Read::Bytes(span(0, rows * row_len)),
        scales: Read::Bytes(span(1, rows.div_ceil(group_rows) * per_row * scale_len)),
        zero_points: has_points.then(|| Read::Bytes(span(2, rows.div_ceil(8) * per_row * 4))),
        order: (kind == 7).then(|| Read::Literal(order(columns, per_row).flat_map(u32::to_le_bytes).collect())),
        nested: nested.then(|| Nested {
            absmax: span(3, (rows * per_row).div_ceil(NESTED_BLOCK_SIZE as u64) * 4),
            offset: 0.25,
            table: None,
        }),
    }
}

/// The group of each column, of which none stand together.
fn order(columns: u64, groups: u64) -> impl Iterator<Item = u32> {
    (0..columns).map(move |column| (column * 7 % groups) as u32)
}

/// What stands in the source, or is said in the expression.
fn plain(read: &Read) -> Vec<u8> {
    match read {
        Read::Bytes(span) => source_bytes(*span),
        Read::Literal(bytes) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// All that a matrix decodes to, row by row.
fn decoded(matrix: &Decode) -> Vec<u8> {
    let &Decode { coding, dtype, rows, columns, row_len, group_rows, .. } = matrix;
    let per_row = columns.div_ceil(coding.group as u64) as usize;
    let (codes, mut scales) = (plain(&matrix.codes), plain(&matrix.scales));
    if let Some(Nested { absmax, offset, .. }) = matrix.nested {
        let mut restored = vec![0; scales.len() * 4];
        restore_absmax(&scales, &source_bytes(absmax), (offset, dynamic_map().values()), 0, &mut restored);
        scales = restored;
    }
    let packed = matrix.zero_points.as_ref().map(plain);
    let of_columns: Vec<u32> = order(columns, per_row as u64).collect();
    let order = matrix.order.as_ref().map(|_| Order { groups: per_row, of_columns: &of_columns });
    let row_of = |row: u64| {
        let points = packed.as_ref().map(|packed| {
            let word = |group: usize| (row as usize / 8 * per_row + group) * 4;
            let integer = |group| u32::from_le_bytes(packed[word(group)..][..4].try_into().unwrap());
            (0..per_row).map(|group| (integer(group) >> (row % 8 * 4) & 15) as u8).collect::<Vec<_>>()
        });
        let mut into = vec![0; columns as usize * dtype.size()];
        let scales = &scales[(row / group_rows) as usize * per_row * coding.scale_size(dtype)..];
        let codes = &codes[(row * row_len) as usize..];
        let zero_points = points.as_deref().unwrap_or_default();
        Kernel::SCALAR.decode(Row { coding, dtype, first: 0, codes, scales, zero_points, order, into: &mut into });
        into
    };
    (0..rows).flat_map(row_of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_range_of_every_expression_is_what_the_whole_has_there(
        words in words(),
        ranges in prop::collection::vec(any::<(u64, u64)>(), 8),
    ) {
        let (read, expected) = build(&words);
        prop_assert_eq!(read.len(), expected.len() as u64, "{:?}", read);
        let mut evaluator = Evaluator::new(Kernel::detect());
        let whole = (0, expected.len() as u64);
        for (start, end) in ranges.into_iter().chain([whole]) {
            let [start, end] = [start, end].map(|at| (at % (expected.len() as u64 + 1)) as usize);
            let (start, end) = (start.min(end), start.max(end));
            let mut into = vec![0xaa; end - start];
            evaluator.read(&read, start as u64, &mut into, &mut fetch).unwrap();
            prop_assert!(into == expected[start..end], "{}..{} of {:?}", start, end, read);
        }
    }
}

#[test]
fn stored_bytes_go_straight_to_where_they_are_wanted() {
    let span = Span { file: 0, tensor: 0, offset: 100, len: 1000 };
    let mut into = vec![0; 300];
    let (place, mut fetched) = (into.as_ptr(), Vec::new());
    let read = Read::Bytes(span).slice(1, 2);
    let mut fetch = |span: Span, bytes: &mut [u8]| {
        assert_eq!(bytes.as_ptr(), place);
        fetched.push(span);
        Ok(())
    };
    Evaluator::new(Kernel::detect()).read(&read, 50, &mut into, &mut fetch).unwrap();
    assert_eq!(fetched, [Span { offset: 650, len: 300, ..span }]);
}

/// The parts of an expression stand where its whole would be; so few of them that plans stay small.
#[test]
fn expressions_of_parts_are_short() {
    let bytes = Read::Bytes(Span { file: 0, tensor: 0, offset: 0, len: 480 });
    assert!(matches!(bytes.rows(16, 3, 1, 4), Read::Bytes(Span { offset: 48, len: 64, .. })));
    assert_eq!(bytes.transposed([10, 24], 2).transposed([24, 10], 2), bytes);
    let columns = bytes.transposed([10, 24], 2).rows(20, 1, 2, 12).rows(20, 2, 3, 2);
    let Read::Columns(Columns { first: 5, step: 6, count: 2, of, .. }) = columns else { panic!("{columns:?}") };
    assert_eq!(*of, bytes);
    let matrix = Read::decode(coded(6, 9, 2, false, 0)).unwrap();
    assert!(matches!(matrix.slice(1, 3), Read::Decode(part) if part.rows == 3));
    assert!(matches!(matrix.slice(1, 9), Read::Rows(_)), "a row without scales of its own");
}

#[test]
fn matrices_larger_than_a_tile_are_transposed_in_pieces() {
    for (rows, columns, step) in [(150, 1000, 2), (3, 70_000, 1), (1, 70_001, 3), (70_001, 2, 1)] {
        let stored = Span { file: 0, tensor: 0, offset: 3, len: rows * columns * 2 };
        let bytes = source_bytes(stored);
        let count = (columns - 1) / step;
        let read = Read::Bytes(stored).transposed([rows, columns], 2).rows(rows * 2, 1, step, count);
        let element = |row: u64, column: u64| &bytes[(row * columns + column) as usize * 2..][..2];
        let chosen = (0..count).map(|i| 1 + i * step);
        let expected: Vec<u8> =
            chosen.flat_map(|column| (0..rows).flat_map(move |row| element(row, column))).copied().collect();
        let all = expected.len();
        for (start, end) in [(0, all), (2, all - 2), (all / 2 - 3, all / 2), (all / 3, all / 3 * 2)] {
            let mut into = vec![0; end - start];
            Evaluator::new(Kernel::detect()).read(&read, start as u64, &mut into, &mut fetch).unwrap();
            assert!(into == expected[start..end], "{rows}x{columns}: {start}..{end}");
        }
    }
}

#[test]
fn lengths_that_do_not_fit_each_other_are_named() {
    let longer = |read: &Read| match read {
        Read::Bytes(span) => Read::Bytes(Span { len: span.len + 1, ..*span }),
        other => panic!("{other:?}"),
    };
    let matrix = coded(1, 2, 2, false, 0);
    let nested = matrix.nested.map(|nested| {
        let absmax = Span { len: nested.absmax.len + 1, ..nested.absmax };
        Nested { absmax, ..nested }
    });
    let points = coded(3, 2, 2, false, 0);
    let order = Some(Read::Literal([0; 4].into()));
    for (decode, what) in [
        (Decode { codes: longer(&matrix.codes), ..matrix.clone() }, "codes have"),
        (Decode { scales: longer(&matrix.scales), ..matrix.clone() }, "its scales have"),
        (Decode { nested, ..matrix.clone() }, "nested scales have"),
        (Decode { zero_points: points.zero_points.as_ref().map(longer), ..points.clone() }, "zero points have"),
        (Decode { order, ..points }, "groups of columns have 4 bytes, expected 256"),
        (Decode { rows: u64::MAX, ..matrix }, "past all bounds"),
    ] {
        let error = Read::decode(decode).unwrap_err();
        assert!(error.contains(what), "{error}");
    }
}
