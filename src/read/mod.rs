//! Where a tensor's bytes come from: an expression over bytes of the source, and its evaluator.
//!
//! The plan builds one [`Read`] a tensor; the executor fills its buffers from any range of it with an [`Evaluator`]. Neither
//! knows how the source's bytes are fetched: that is a closure's.

mod adapted;
mod decode;
mod evaluate;
mod input;
mod small;
mod tensors;
#[cfg(test)]
mod tests;
mod words;

use std::sync::Arc;

pub(crate) use adapted::{Adapted, AdapterTensor, Factor, HELD, MAX_RANK, Product};
pub(crate) use decode::{Decode, Nested};
pub(crate) use evaluate::Evaluator;
pub(crate) use input::{Input, MAX_EXPERTS};
pub(crate) use small::SmallTensors;
pub(crate) use tensors::Tensors;
pub(crate) use words::Change;
use words::{Mapped, Nibbles, Words};

use crate::error::{Error, Result};

/// Consecutive bytes of a source tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which of the source's files holds them.
    pub file: usize,
    /// Which of the file's tensors they belong to.
    pub tensor: usize,
    /// The file offset of the first.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

impl Span {
    /// `len` of these bytes, from byte `start` on.
    pub fn part(self, start: u64, len: u64) -> Span {
        assert!(start + len <= self.len, "{len} bytes from {start} on of {}", self.len);
        Span { offset: self.offset + start, len, ..self }
    }
}

/// An expression whose value is a run of bytes: a tensor's, or those of a part of it.
///
/// The constructors keep expressions short: a part of some bytes is fewer bytes, and a choice of columns of which rows are
/// taken is a choice of fewer columns.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    /// Bytes as they are stored.
    Bytes(Span),
    /// What codes and scales decode to.
    Decode(Box<Decode>),
    /// Bytes, each in place of another.
    Mapped(Mapped),
    /// Words of eight codes, each changed in the same way.
    Words(Words),
    /// Codes that words hold of eight rows, in words that hold those of eight columns.
    Nibbles(Nibbles),
    /// Runs of equal length at equal distances: rows of a matrix, or any one part.
    Rows(Rows),
    /// Columns of a matrix, each as a row; all of them are its transpose.
    Columns(Columns),
    /// One after the other.
    Concat(Vec<Read>),
    /// These bytes themselves.
    Literal(Arc<[u8]>),
    /// A matrix, with what an adapter makes of it.
    Adapted(Box<Adapted>),
}

/// See [`Read::Rows`]; all in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    of: Box<Read>,
    /// Where the first row starts.
    first: u64,
    /// Of a row.
    len: u64,
    /// From the start of one row to that of the next.
    step: u64,
    count: u64,
}

/// See [`Read::Columns`].
#[derive(Clone, Debug, PartialEq)]
pub struct Columns {
    /// A matrix, row by row.
    of: Box<Read>,
    shape: [u64; 2],
    /// Bytes of an element: 1, 2, 4 or 8.
    size: usize,
    /// The first column that is taken.
    first: u64,
    /// From one column that is taken to the next.
    step: u64,
    count: u64,
}

impl Read {
    /// One after the other.
    pub fn concat(parts: impl IntoIterator<Item = Read>) -> Read {
        let mut flat = Vec::new();
        for part in parts {
            match part {
                Read::Concat(parts) => flat.extend(parts),
                part => flat.push(part),
            }
        }
        match flat.len() {
            1 => flat.remove(0),
            _ => Read::Concat(flat),
        }
    }

    /// Bytes that it gives.
    pub fn len(&self) -> u64 {
        match self {
            Read::Bytes(span) => span.len,
            Read::Decode(decode) => decode.len(),
            Read::Mapped(mapped) => mapped.of.len(),
            Read::Words(words) => words.of.len(),
            Read::Nibbles(nibbles) => nibbles.rows * nibbles.row_len(),
            Read::Rows(rows) => rows.len * rows.count,
            Read::Columns(columns) => columns.column_len() * columns.count,
            Read::Concat(parts) => parts.iter().map(Read::len).sum(),
            Read::Literal(bytes) => bytes.len() as u64,
            Read::Adapted(adapted) => adapted.of.len(),
        }
    }

    /// Whether it gives nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Of `of` parts of equal length, one after the other, the one with this number.
    pub fn slice(&self, number: u64, of: u64) -> Read {
        let len = self.len() / of;
        self.range(number * len, len)
    }

    /// Of rows of `len` bytes the `count` rows `first`, `first + step`, …
    ///
    /// # Panics
    /// When there are fewer; that is a defect.
    pub fn rows(&self, len: u64, first: u64, step: u64, count: u64) -> Read {
        if step == 1 || count <= 1 {
            return self.range(first * len, count * len);
        }
        assert!((first + step * (count - 1) + 1) * len <= self.len(), "more rows than there are");
        match self {
            Read::Columns(columns) if columns.column_len() == len => columns.choose(first, step, count),
            Read::Decode(matrix) if matrix.has_rows(len) => Read::Decode(Box::new(matrix.rows(first, step, count))),
            Read::Adapted(matrix) => {
                matrix.rows(len, first, step, count).unwrap_or_else(|| self.every(len, first, step, count))
            }
            _ => self.every(len, first, step, count),
        }
    }

    /// A choice of rows that no shorter expression gives.
    fn every(&self, len: u64, first: u64, step: u64, count: u64) -> Read {
        Read::Rows(Rows { of: Box::new(self.clone()), first: first * len, len, step: step * len, count })
    }

    /// The transpose of what gives a matrix of `[rows, columns]` elements of `size` bytes.
    ///
    /// # Panics
    /// When it gives another; that is a defect.
    pub fn transposed(&self, shape: [u64; 2], size: usize) -> Read {
        let [rows, columns] = shape;
        assert_eq!(self.len(), rows * columns * size as u64, "not a matrix of {shape:?}, {size} bytes each");
        match self {
            Read::Columns(inner) if inner.is_transpose() && (inner.shape, inner.size) == ([columns, rows], size) => {
                (*inner.of).clone()
            }
            Read::Adapted(matrix) if let Some(transposed) = matrix.transposed(shape, size) => transposed,
            of => Read::Columns(Columns { of: Box::new(of.clone()), shape, size, first: 0, step: 1, count: columns }),
        }
    }

    /// `len` of its bytes, from byte `start` on.
    fn range(&self, start: u64, len: u64) -> Read {
        let all = self.len();
        assert!(start + len <= all, "{len} bytes from {start} on of {all}");
        if (start, len) == (0, all) {
            return self.clone();
        }
        match self {
            Read::Bytes(span) => Read::Bytes(span.part(start, len)),
            Read::Literal(bytes) => Read::Literal(bytes[start as usize..][..len as usize].into()),
            Read::Concat(parts) => concat_range(parts, start, len),
            Read::Decode(decode) => match decode.range(start, len) {
                Some(part) => Read::Decode(Box::new(part)),
                None => self.run(start, len),
            },
            Read::Columns(columns) => {
                let column = columns.column_len();
                match column > 0 && start.is_multiple_of(column) && len.is_multiple_of(column) {
                    true => columns.choose(start / column, 1, len / column),
                    false => self.run(start, len),
                }
            }
            Read::Rows(_) | Read::Mapped(_) | Read::Words(_) | Read::Nibbles(_) | Read::Adapted(_) => {
                self.run(start, len)
            }
        }
    }

    /// `len` of its bytes, from byte `start` on.
    ///
    /// # Panics
    /// When there are fewer; that is a defect.
    pub(crate) fn part(&self, start: u64, len: u64) -> Read {
        self.range(start, len)
    }

    /// The same expression over what `read` has for its bytes, of bytes that aren't decoded.
    ///
    /// # Errors
    /// When any of it is decoded or changed, which a checkpoint of floats has no use for.
    pub(crate) fn over(&self, read: &impl Fn(Span) -> Read) -> Result<Read> {
        Ok(match self {
            Read::Bytes(span) => read(*span),
            Read::Literal(_) => self.clone(),
            Read::Concat(parts) => Read::concat(parts.iter().map(|part| part.over(read)).collect::<Result<Vec<_>>>()?),
            Read::Rows(rows) => {
                let Rows { first, len, step, count, .. } = *rows;
                let of = rows.of.over(read)?;
                match first.checked_div(len).filter(|row| row * len == first && step.is_multiple_of(len)) {
                    Some(row) => of.rows(len, row, step / len, count),
                    None => Read::Rows(Rows { of: Box::new(of), first, len, step, count }),
                }
            }
            Read::Columns(columns) => {
                let Columns { shape, size, first, step, count, .. } = *columns;
                match columns.of.over(read)?.transposed(shape, size) {
                    all if columns.is_transpose() => all,
                    all => all.rows(columns.column_len(), first, step, count),
                }
            }
            Read::Decode(_) | Read::Mapped(_) | Read::Words(_) | Read::Nibbles(_) | Read::Adapted(_) => {
                return Err(Error::internal("a checkpoint of floats is read decoded or changed"));
            }
        })
    }

    /// A range that no shorter expression gives.
    fn run(&self, start: u64, len: u64) -> Read {
        Read::Rows(Rows { of: Box::new(self.clone()), first: start, len, step: len, count: 1 })
    }

    /// What it is put together from.
    pub fn parts(&self) -> &[Read] {
        match self {
            Read::Concat(parts) => parts,
            part => std::slice::from_ref(part),
        }
    }

    /// All bytes of the source that it is made of, in its order; codes before their scales. Not those of an adapter:
    /// [`Read::adapters`] has them.
    pub fn spans(&self) -> Box<dyn Iterator<Item = Span> + '_> {
        match self {
            Read::Bytes(span) => Box::new(std::iter::once(*span)),
            Read::Decode(decode) => Box::new(decode.spans()),
            Read::Mapped(mapped) => mapped.of.spans(),
            Read::Words(words) => words.of.spans(),
            Read::Nibbles(nibbles) => nibbles.of.spans(),
            Read::Rows(rows) => rows.of.spans(),
            Read::Columns(columns) => columns.of.spans(),
            Read::Concat(parts) => Box::new(parts.iter().flat_map(Read::spans)),
            Read::Literal(_) => Box::new(std::iter::empty()),
            Read::Adapted(adapted) => adapted.of.spans(),
        }
    }

    /// The source's file that its first bytes are in; the first file of what is made of none.
    pub fn first_file(&self) -> usize {
        self.spans().next().map_or(0, |span| span.file)
    }

    /// Whether any of it is decoded.
    pub fn is_decoded(&self) -> bool {
        match self {
            Read::Bytes(_) | Read::Literal(_) => false,
            Read::Decode(_) => true,
            Read::Mapped(mapped) => mapped.of.is_decoded(),
            Read::Words(words) => words.of.is_decoded(),
            Read::Nibbles(nibbles) => nibbles.of.is_decoded(),
            Read::Rows(rows) => rows.of.is_decoded(),
            Read::Columns(columns) => columns.of.is_decoded(),
            Read::Concat(parts) => parts.iter().any(Read::is_decoded),
            Read::Adapted(adapted) => adapted.of.is_decoded(),
        }
    }
}

/// A range of what `parts` give one after the other.
fn concat_range(parts: &[Read], start: u64, len: u64) -> Read {
    let (mut at, end) = (0, start + len);
    let mut chosen = Vec::new();
    for part in parts {
        let (from, to) = (start.max(at), end.min(at + part.len()));
        if from < to {
            chosen.push(part.range(from - at, to - from));
        }
        at += part.len();
    }
    Read::concat(chosen)
}

impl Columns {
    /// Bytes of a column.
    fn column_len(&self) -> u64 {
        self.shape[0] * self.size as u64
    }

    fn is_transpose(&self) -> bool {
        (self.first, self.step, self.count) == (0, 1, self.shape[1])
    }

    /// Of the columns that are taken the `count` columns `first`, `first + step`, …
    fn choose(&self, first: u64, step: u64, count: u64) -> Read {
        let (first, step) = (self.first + self.step * first, self.step * step);
        Read::Columns(Columns { first, step, count, ..self.clone() })
    }
}
