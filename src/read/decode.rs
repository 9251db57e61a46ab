//! Elements that stand in the source as codes and scales.

use std::ops::Range;

use super::{Read, Span};
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::{Coding, NESTED_BLOCK_SIZE, dynamic_map};
use crate::kernel::Kernel;
use crate::kernel::decode::{Order, Row, restore_absmax};
use crate::layout::compressed_tensors::{ZERO_POINT_ROWS, unpack_zero_points};

/// Bytes of a column's group in [`Decode::order`].
const ORDER_LEN: u64 = 4;

/// A matrix of codes, and what they decode by.
#[derive(Clone, Debug, PartialEq)]
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
    pub codes: Read,
    /// The scales: row by row, as many as a row has groups.
    pub scales: Read,
    /// The zero points, packed as compressed-tensors does it.
    pub zero_points: Option<Read>,
    /// The group of each column, an i32, where columns of one group don't stand together: GPTQ's group order. Of integers only.
    pub order: Option<Read>,
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
    /// The 256 f32 that codes stand for, if those aren't bitsandbytes' own of today.
    pub table: Option<Span>,
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
        let check = |what: &str, found: u64, rows: Option<u64>, each: Option<u64>| {
            let expected = rows.zip(each).and_then(|(rows, each)| rows.checked_mul(each));
            match expected {
                Some(expected) if found == expected => Ok(()),
                Some(expected) => Err(format!("its {what} have {found} bytes, expected {expected}")),
                None => Err(format!("its {} rows of {} are past all bounds", self.rows, self.columns)),
            }
        };
        let size = self.dtype.size() as u64;
        if self.columns.checked_mul(size).and_then(|row| row.checked_mul(self.rows)).is_none() {
            return Err(format!("its {} rows of {} are past all bounds", self.rows, self.columns));
        }
        check("codes", self.codes.len(), rows, Some(self.row_len))?;
        let scale_rows = rows.map(|rows| rows.div_ceil(self.group_rows));
        check("scales", self.scales.len(), scale_rows, per_row.checked_mul(self.scale_len()))?;
        if let Some(order) = &self.order {
            check("groups of columns", order.len(), Some(1), self.columns.checked_mul(ORDER_LEN))?;
        }
        if let Some(points) = &self.zero_points {
            check("zero points", points.len(), Some(self.rows.div_ceil(ZERO_POINT_ROWS)), per_row.checked_mul(4))?;
        }
        if let Some(nested) = self.nested {
            let blocks = self.rows.checked_mul(per_row).map(|scales| scales.div_ceil(NESTED_BLOCK_SIZE as u64));
            check("nested scales", nested.absmax.len, blocks, Some(4))?;
        }
        Ok(())
    }

    /// A range of whole rows with scales of their own, as a matrix itself.
    pub(super) fn range(&self, start: u64, len: u64) -> Option<Decode> {
        let row = self.bytes_of_row();
        if self.zero_points.is_some() || self.order.is_some() || self.nested.is_some() || row == 0 {
            return None;
        }
        let (first, rows) = (start / row, len / row);
        let whole = start.is_multiple_of(row) && len.is_multiple_of(row) && first.is_multiple_of(self.group_rows);
        let scale_row = self.scales_of_row() * self.scale_len();
        whole.then(|| Decode {
            rows,
            codes: self.codes.range(first * self.row_len, rows * self.row_len),
            scales: self.scales.range(first / self.group_rows * scale_row, rows.div_ceil(self.group_rows) * scale_row),
            ..self.clone()
        })
    }

    /// Whether its rows are of so many bytes, with scales of their own and nothing that several share.
    pub(super) fn has_rows(&self, len: u64) -> bool {
        let is_alone = self.zero_points.is_none() && self.order.is_none() && self.nested.is_none();
        is_alone && self.group_rows == 1 && len == self.bytes_of_row()
    }

    /// Of such rows the `count` rows `first`, `first + step`, …
    pub(super) fn rows(&self, first: u64, step: u64, count: u64) -> Decode {
        let codes = self.codes.rows(self.row_len, first, step, count);
        let scales = self.scales.rows(self.scales_of_row() * self.scale_len(), first, step, count);
        Decode { rows: count, codes, scales, ..self.clone() }
    }

    /// All that it is made of.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        let beside = [Some(&self.scales), self.zero_points.as_ref(), self.order.as_ref()];
        let parts = std::iter::once(&self.codes).chain(beside.into_iter().flatten());
        parts
            .flat_map(Read::spans)
            .chain(self.nested.iter().flat_map(|nested| std::iter::once(nested.absmax).chain(nested.table)))
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

/// Fills a slice with what an expression gives from a byte on.
pub(super) type Fill<'f> = dyn FnMut(&Read, u64, &mut [u8]) -> Result<()> + 'f;

/// Codes and scales of a run; kept from run to run.
#[derive(Default)]
pub(super) struct Codes {
    codes: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
    /// What scales and zero points are made of.
    raw: Vec<u8>,
    nested: Vec<u8>,
    table: Vec<u8>,
    order: Vec<u32>,
}

/// A matrix to be decoded, and what with.
#[derive(Clone, Copy)]
pub(super) struct Decoding<'m> {
    pub(super) matrix: &'m Decode,
    pub(super) kernel: Kernel,
}

impl Codes {
    /// Fills `into` with what the matrix decodes to from byte `offset` on.
    pub(super) fn read(&mut self, of: Decoding<'_>, offset: u64, into: &mut [u8], source: &mut Fill<'_>) -> Result<()> {
        let matrix = of.matrix;
        let size = matrix.dtype.size();
        let (first, skipped) = (offset / size as u64, (offset % size as u64) as usize);
        // Of an element at either end, what is in `into`.
        let head = if skipped == 0 { 0 } else { (size - skipped).min(into.len()) };
        let (begin, into) = into.split_at_mut(head);
        let (whole, end) = into.split_at_mut(into.len() / size * size);
        if !begin.is_empty() {
            begin.copy_from_slice(&self.element(of, first, source)?[skipped..][..head]);
        }
        let first = first + u64::from(head > 0);
        if !whole.is_empty() {
            self.elements(of, first, whole, source)?;
        }
        if !end.is_empty() {
            let element = self.element(of, first + (whole.len() / size) as u64, source)?;
            end.copy_from_slice(&element[..end.len()]);
        }
        Ok(())
    }

    fn element(&mut self, of: Decoding<'_>, which: u64, source: &mut Fill<'_>) -> Result<[u8; 4]> {
        let mut element = [0; 4];
        self.elements(of, which, &mut element[..of.matrix.dtype.size()], source)?;
        Ok(element)
    }

    /// Fills `into` with whole elements, from the one with the number `first` on.
    fn elements(&mut self, of: Decoding<'_>, first: u64, into: &mut [u8], source: &mut Fill<'_>) -> Result<()> {
        let Decoding { matrix, kernel } = of;
        let size = matrix.dtype.size();
        let last = first + (into.len() / size) as u64 - 1;
        let [first, last] = [first, last].map(|element| (element / matrix.columns, element % matrix.columns));
        let begin = matrix.code_at(first);
        fill(&mut self.codes, &matrix.codes, begin..matrix.code_at(last) + 1, source)?;
        self.read_order(matrix, source)?;
        // Of several rows, all scales; likewise where any column may be in any group.
        let (first_scale, last_scale) = match first.0 == last.0 && matrix.order.is_none() {
            true => (matrix.scale_at(first), matrix.scale_at(last)),
            false => (matrix.scale_at((first.0, 0)), matrix.scale_at((last.0, matrix.columns - 1))),
        };
        self.read_scales(matrix, first_scale, last_scale + 1, source)?;
        self.read_zero_points(matrix, first.0, last.0, source)?;
        let scale_len = matrix.coding.scale_size(matrix.dtype);
        let mut left = into;
        for row in first.0..=last.0 {
            let start = (row, if row == first.0 { first.1 } else { 0 });
            let count = (matrix.columns - start.1).min((left.len() / size) as u64);
            let (here, rest) = left.split_at_mut(count as usize * size);
            let is_ordered = matrix.order.is_some();
            let of_group = if is_ordered { (row, 0) } else { start };
            let point = (row - first.0) * matrix.scales_of_row() + matrix.group_of(of_group.1);
            kernel.decode(Row {
                coding: matrix.coding,
                dtype: matrix.dtype,
                first: start.1 as usize,
                codes: &self.codes[(matrix.code_at(start) - begin) as usize..],
                scales: &self.scales[(matrix.scale_at(of_group) - first_scale) as usize * scale_len..],
                zero_points: self.zero_points.get(point as usize..).unwrap_or_default(),
                order: is_ordered.then(|| Order {
                    groups: matrix.scales_of_row() as usize,
                    of_columns: &self.order[start.1 as usize..],
                }),
                into: here,
            });
            left = rest;
        }
        Ok(())
    }

    fn read_scales(&mut self, matrix: &Decode, first: u64, end: u64, source: &mut Fill<'_>) -> Result<()> {
        let len = end - first;
        let stored = first * matrix.scale_len()..end * matrix.scale_len();
        let Some(Nested { absmax, offset, table }) = matrix.nested else {
            return fill(&mut self.scales, &matrix.scales, stored, source);
        };
        let block = NESTED_BLOCK_SIZE as u64;
        let blocks = first / block..end.div_ceil(block);
        fill(&mut self.raw, &matrix.scales, stored, source)?;
        fill(&mut self.nested, &Read::Bytes(absmax), blocks.start * 4..blocks.end * 4, source)?;
        self.scales.resize(len as usize * size_of::<f32>(), 0);
        let mut values = dynamic_map().values();
        let mut own = [0.0; 256];
        if let Some(table) = table {
            fill(&mut self.table, &Read::Bytes(table), 0..table.len, source)?;
            own.iter_mut().zip(self.table.as_chunks().0).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
            values = &own;
        }
        restore_absmax(&self.raw, &self.nested, (offset, values), first as usize, &mut self.scales);
        Ok(())
    }

    /// The group of every column.
    fn read_order(&mut self, matrix: &Decode, source: &mut Fill<'_>) -> Result<()> {
        self.order.clear();
        let Some(stored) = &matrix.order else { return Ok(()) };
        fill(&mut self.raw, stored, 0..matrix.columns * ORDER_LEN, source)?;
        self.order.extend(self.raw.as_chunks().0.iter().map(|group| u32::from_le_bytes(*group)));
        // The plan looked at them.
        match self.order.iter().all(|group| u64::from(*group) < matrix.scales_of_row()) {
            true => Ok(()),
            false => Err(Error::internal("a column is in no group any more: the source changed while it was read")),
        }
    }

    /// One byte for each group of the rows from `first` to `last`.
    fn read_zero_points(&mut self, matrix: &Decode, first: u64, last: u64, source: &mut Fill<'_>) -> Result<()> {
        self.zero_points.clear();
        let Some(stored) = &matrix.zero_points else { return Ok(()) };
        let (begin, of_row) = (first / ZERO_POINT_ROWS, matrix.scales_of_row() * 4);
        let words = last / ZERO_POINT_ROWS + 1 - begin;
        fill(&mut self.raw, stored, begin * of_row..(begin + words) * of_row, source)?;
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

/// Fills a buffer with a range of what an expression gives.
fn fill(buffer: &mut Vec<u8>, of: &Read, range: Range<u64>, source: &mut Fill<'_>) -> Result<()> {
    buffer.resize((range.end - range.start) as usize, 0);
    source(of, range.start, buffer)
}
