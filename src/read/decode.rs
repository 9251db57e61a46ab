//! Elements that stand in the source as codes and scales.

use super::{Fetch, Read, Span};
use crate::dtype::FloatDtype;
use crate::error::Result;
use crate::format::{Coding, NESTED_BLOCK_SIZE};
use crate::kernel::Kernel;
use crate::kernel::decode::{Row, restore_absmax};
use crate::layout::compressed_tensors::{ZERO_POINT_ROWS, unpack_zero_points};

/// A matrix of codes, and what they decode by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decode {
    /// What codes and scales mean.
    pub coding: Coding,
    /// What they decode to.
    pub dtype: FloatDtype,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub columns: u64,
    /// Bytes of a row's codes.
    pub row_len: u64,
    /// Rows that share a scale.
    pub group_rows: u64,
    /// The codes, row by row.
    pub codes: Span,
    /// The scales: row by row, as many as a row has groups.
    pub scales: Span,
    /// The zero points, packed as compressed-tensors does it.
    pub zero_points: Option<Span>,
    /// How the scales are coded themselves: double quantization.
    pub nested: Option<Nested>,
}

/// Scales that are codes, with an f32 for each 256 of them and a mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nested {
    /// The nested absmax.
    pub absmax: Span,
    /// The mean that was taken off absmax.
    pub offset: f32,
}

impl Read {
    /// What codes and scales decode to.
    ///
    /// # Errors
    /// When one of them isn't as long as rows and columns want it; the sentence says which.
    pub fn decode(decode: Decode) -> Result<Read, String> {
        decode.check()?;
        Ok(Read::Decode(Box::new(decode)))
    }
}

impl Decode {
    /// Bytes that it gives.
    pub(super) fn len(&self) -> u64 {
        self.rows * self.bytes_of_row()
    }

    fn check(&self) -> Result<(), String> {
        let (rows, per_row) = (Some(self.rows), self.scales_of_row());
        let check = |what: &str, found: Span, rows: Option<u64>, each: Option<u64>| {
            let expected = rows.zip(each).and_then(|(rows, each)| rows.checked_mul(each));
            match expected {
                Some(expected) if found.len == expected => Ok(()),
                Some(expected) => Err(format!("its {what} have {} bytes, expected {expected}", found.len)),
                None => Err(format!("its {} rows of {} are past all bounds", self.rows, self.columns)),
            }
        };
        let size = self.dtype.size() as u64;
        if self.columns.checked_mul(size).and_then(|row| row.checked_mul(self.rows)).is_none() {
            return Err(format!("its {} rows of {} are past all bounds", self.rows, self.columns));
        }
        check("codes", self.codes, rows, Some(self.row_len))?;
        let scale_rows = rows.map(|rows| rows.div_ceil(self.group_rows));
        check("scales", self.scales, scale_rows, per_row.checked_mul(self.scale_len()))?;
        if let Some(points) = self.zero_points {
            check("zero points", points, Some(self.rows.div_ceil(ZERO_POINT_ROWS)), per_row.checked_mul(4))?;
        }
        if let Some(nested) = self.nested {
            let blocks = self.rows.checked_mul(per_row).map(|scales| scales.div_ceil(NESTED_BLOCK_SIZE as u64));
            check("nested scales", nested.absmax, blocks, Some(4))?;
        }
        Ok(())
    }

    /// A range of whole rows with scales of their own, as a matrix itself.
    pub(super) fn range(&self, start: u64, len: u64) -> Option<Decode> {
        let row = self.bytes_of_row();
        if self.zero_points.is_some() || self.nested.is_some() || row == 0 {
            return None;
        }
        let (first, rows) = (start / row, len / row);
        let whole = start.is_multiple_of(row) && len.is_multiple_of(row) && first.is_multiple_of(self.group_rows);
        let scale_row = self.scales_of_row() * self.scale_len();
        whole.then(|| Decode {
            rows,
            codes: self.codes.part(first * self.row_len, rows * self.row_len),
            scales: self.scales.part(first / self.group_rows * scale_row, rows.div_ceil(self.group_rows) * scale_row),
            ..*self
        })
    }

    /// All that it is made of.
    pub fn spans(&self) -> impl Iterator<Item = Span> + use<> {
        let beside = [Some(self.scales), self.zero_points, self.nested.map(|nested| nested.absmax)];
        std::iter::once(self.codes).chain(beside.into_iter().flatten())
    }

    /// Decoded.
    fn bytes_of_row(&self) -> u64 {
        self.columns * self.dtype.size() as u64
    }

    fn scales_of_row(&self) -> u64 {
        self.columns.div_ceil(self.coding.group as u64)
    }

    /// Bytes of a scale as it is stored.
    fn scale_len(&self) -> u64 {
        if self.nested.is_some() { 1 } else { self.coding.scale_size(self.dtype) as u64 }
    }

    /// The byte that holds an element's code.
    fn code_at(&self, (row, column): (u64, u64)) -> u64 {
        row * self.row_len + self.coding.code_byte(column as usize) as u64
    }

    /// The number of an element's scale.
    fn scale_at(&self, (row, column): (u64, u64)) -> u64 {
        row / self.group_rows * self.scales_of_row() + self.group_of(column)
    }

    fn group_of(&self, column: u64) -> u64 {
        column / self.coding.group as u64
    }
}

/// Codes and scales of a run; kept from run to run.
pub(super) struct Codes {
    kernel: Kernel,
    codes: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
    /// What scales and zero points are made of.
    raw: Vec<u8>,
    nested: Vec<u8>,
}

impl Codes {
    /// None yet.
    pub(super) fn new(kernel: Kernel) -> Codes {
        let [codes, scales, zero_points, raw, nested] = [const { Vec::new() }; 5];
        Codes { kernel, codes, scales, zero_points, raw, nested }
    }

    /// Fills `into` with what `matrix` decodes to from byte `offset` on.
    pub(crate) fn read(&mut self, matrix: &Decode, offset: u64, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        let size = matrix.dtype.size();
        let (first, skipped) = (offset / size as u64, (offset % size as u64) as usize);
        // Of an element at either end, what is in `into`.
        let head = if skipped == 0 { 0 } else { (size - skipped).min(into.len()) };
        let (begin, into) = into.split_at_mut(head);
        let (whole, end) = into.split_at_mut(into.len() / size * size);
        if !begin.is_empty() {
            begin.copy_from_slice(&self.element(matrix, first, fetch)?[skipped..][..head]);
        }
        let first = first + u64::from(head > 0);
        if !whole.is_empty() {
            self.elements(matrix, first, whole, fetch)?;
        }
        if !end.is_empty() {
            let element = self.element(matrix, first + (whole.len() / size) as u64, fetch)?;
            end.copy_from_slice(&element[..end.len()]);
        }
        Ok(())
    }

    fn element(&mut self, matrix: &Decode, which: u64, fetch: &mut Fetch<'_>) -> Result<[u8; 4]> {
        let mut element = [0; 4];
        self.elements(matrix, which, &mut element[..matrix.dtype.size()], fetch)?;
        Ok(element)
    }

    /// Fills `into` with whole elements, from the one with the number `first` on.
    fn elements(&mut self, matrix: &Decode, first: u64, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        let size = matrix.dtype.size();
        let last = first + (into.len() / size) as u64 - 1;
        let [first, last] = [first, last].map(|element| (element / matrix.columns, element % matrix.columns));
        let begin = matrix.code_at(first);
        fill(&mut self.codes, matrix.codes.part(begin, matrix.code_at(last) + 1 - begin), fetch)?;
        // Of several rows, all scales.
        let (first_scale, last_scale) = match first.0 == last.0 {
            true => (matrix.scale_at(first), matrix.scale_at(last)),
            false => (matrix.scale_at((first.0, 0)), matrix.scale_at((last.0, matrix.columns - 1))),
        };
        self.read_scales(matrix, first_scale, last_scale + 1, fetch)?;
        self.read_zero_points(matrix, first.0, last.0, fetch)?;
        let scale_len = matrix.coding.scale_size(matrix.dtype);
        let mut left = into;
        for row in first.0..=last.0 {
            let start = (row, if row == first.0 { first.1 } else { 0 });
            let count = (matrix.columns - start.1).min((left.len() / size) as u64);
            let (here, rest) = left.split_at_mut(count as usize * size);
            let point = (row - first.0) * matrix.scales_of_row() + matrix.group_of(start.1);
            self.kernel.decode(Row {
                coding: matrix.coding,
                dtype: matrix.dtype,
                first: start.1 as usize,
                codes: &self.codes[(matrix.code_at(start) - begin) as usize..],
                scales: &self.scales[(matrix.scale_at(start) - first_scale) as usize * scale_len..],
                zero_points: self.zero_points.get(point as usize..).unwrap_or_default(),
                into: here,
            });
            left = rest;
        }
        Ok(())
    }

    fn read_scales(&mut self, matrix: &Decode, first: u64, end: u64, fetch: &mut Fetch<'_>) -> Result<()> {
        let len = end - first;
        let stored = matrix.scales.part(first * matrix.scale_len(), len * matrix.scale_len());
        let Some(Nested { absmax, offset }) = matrix.nested else { return fill(&mut self.scales, stored, fetch) };
        let block = NESTED_BLOCK_SIZE as u64;
        let blocks = first / block..end.div_ceil(block);
        fill(&mut self.raw, stored, fetch)?;
        fill(&mut self.nested, absmax.part(blocks.start * 4, (blocks.end - blocks.start) * 4), fetch)?;
        self.scales.resize(len as usize * size_of::<f32>(), 0);
        restore_absmax(&self.raw, &self.nested, offset, first as usize, &mut self.scales);
        Ok(())
    }

    /// One byte for each group of the rows from `first` to `last`.
    fn read_zero_points(&mut self, matrix: &Decode, first: u64, last: u64, fetch: &mut Fetch<'_>) -> Result<()> {
        self.zero_points.clear();
        let Some(stored) = matrix.zero_points else { return Ok(()) };
        let (begin, of_row) = (first / ZERO_POINT_ROWS, matrix.scales_of_row() * 4);
        let words = last / ZERO_POINT_ROWS + 1 - begin;
        fill(&mut self.raw, stored.part(begin * of_row, words * of_row), fetch)?;
        let skipped = first - begin * ZERO_POINT_ROWS;
        unpack_zero_points(
            &self.raw,
            matrix.scales_of_row() as usize,
            skipped,
            last - first + 1,
            &mut self.zero_points,
        );
        Ok(())
    }
}

fn fill(buffer: &mut Vec<u8>, span: Span, fetch: &mut Fetch<'_>) -> Result<()> {
    buffer.resize(span.len as usize, 0);
    fetch(span, buffer)
}
