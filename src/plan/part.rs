//! Where a tensor's bytes come from.

use crate::dtype::FloatDtype;
use crate::format::Coding;

/// More experts than any model has: each becomes a part of its own, or several.
pub const MAX_EXPERTS: u64 = 1 << 16;

/// A run of bytes that a tensor is made of: some of a source tensor's, or what they decode to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Which of the source's files holds it.
    pub file: usize,
    /// Which of the file's tensors it is of.
    pub tensor: usize,
    /// The file offset of what it is read from.
    pub offset: u64,
    /// Bytes that it gives.
    pub len: u64,
    /// The matrix whose rows or columns it is; `None` for a run of bytes as they are stored.
    pub matrix: Option<Matrix>,
    /// How its elements are coded, if they are.
    pub coded: Option<Coded>,
}

/// Rows of a stored matrix, or of its transpose: every `step`th from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// As stored.
    pub rows: u64,
    /// As stored.
    pub columns: u64,
    /// Whether rows are meant of the transpose: the stored columns.
    pub transposed: bool,
    /// The first row that is taken.
    pub first: u64,
    /// From one row that is taken to the next.
    pub step: u64,
}

impl Matrix {
    /// All rows of the transpose of a stored matrix.
    pub fn transposed([rows, columns]: [u64; 2]) -> Matrix {
        Matrix { rows, columns, transposed: true, first: 0, step: 1 }
    }

    /// Elements of a row that is taken.
    pub fn row_len(&self) -> u64 {
        if self.transposed { self.rows } else { self.columns }
    }
}

/// Elements that stand in the file as codes and scales, in rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coded {
    /// What codes and scales mean.
    pub coding: Coding,
    /// What they decode to.
    pub dtype: FloatDtype,
    /// Elements of a row.
    pub columns: u64,
    /// Bytes of a row's codes.
    pub row_len: u64,
    /// Rows that share a scale.
    pub group_rows: u64,
    /// The scales: row by row, as many as a row has groups.
    pub scales: Place,
    /// The zero points: integers that hold those of eight rows.
    pub zero_points: Option<Place>,
    /// How the scales are coded themselves: double quantization.
    pub nested: Option<Nested>,
}

/// Scales that are codes, with an f32 for each 256 of them and a mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nested {
    /// The nested absmax.
    pub absmax: Place,
    /// The mean that was taken off absmax.
    pub offset: f32,
}

/// Bytes of a source tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which of the source's files holds it.
    pub file: usize,
    /// Which of the file's tensors it is of.
    pub tensor: usize,
    /// The file offset.
    pub offset: u64,
}

impl Coded {
    /// Scales of a row.
    pub fn scales_of_row(&self) -> u64 {
        self.columns.div_ceil(self.coding.group as u64)
    }

    /// Bytes of a scale as it is stored.
    pub fn scale_len(&self) -> u64 {
        if self.nested.is_some() { 1 } else { self.coding.scale_size(self.dtype) as u64 }
    }
}

impl Part {
    /// Bytes of an element that it gives, where that is known.
    fn element(&self, size: u64) -> u64 {
        self.coded.map_or(size, |coded| coded.dtype.size() as u64)
    }

    /// The `count` rows `first`, `first + step`, … of this part, which gives all of a matrix with elements of `size` bytes:
    /// `[rows, columns]`, if it isn't of one already.
    pub fn rows(&self, [rows, columns]: [u64; 2], size: u64, first: u64, step: u64, count: u64) -> Part {
        let all = self.matrix.unwrap_or(Matrix { rows, columns, transposed: false, first: 0, step: 1 });
        let matrix = Matrix { first: all.first + all.step * first, step: all.step * step, ..all };
        Part { len: count * matrix.row_len() * self.element(size), matrix: Some(matrix), ..*self }
    }

    /// The transpose of this part, which gives all of a matrix `[rows, columns]`.
    pub fn transposed(&self, matrix: [u64; 2]) -> Part {
        let matrix = match self.matrix {
            None => Some(Matrix::transposed(matrix)),
            Some(matrix) if matrix.transposed => None,
            Some(matrix) => Some(Matrix { transposed: true, ..matrix }),
        };
        Part { matrix, ..*self }
    }

    /// Of a part that gives `of` matrices of one size, one after the other, the one with this number.
    pub fn slice(&self, number: u64, of: u64) -> Part {
        let len = self.len / of;
        let Some(coded) = self.coded else { return Part { offset: self.offset + number * len, len, ..*self } };
        let elements = len / coded.dtype.size() as u64;
        let rows = elements / coded.columns;
        let scales = rows.div_ceil(coded.group_rows) * coded.scales_of_row() * coded.scale_len();
        let scales = Place { offset: coded.scales.offset + number * scales, ..coded.scales };
        let coded = Coded { scales, ..coded };
        Part { offset: self.offset + number * rows * coded.row_len, len, coded: Some(coded), ..*self }
    }

    /// The source tensors that it is read from: file and tensor.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, usize)> {
        let places = self.coded.map(|coded| [Some(coded.scales), coded.zero_points, coded.nested.map(|n| n.absmax)]);
        let beside = places.into_iter().flatten().flatten().map(|place| (place.file, place.tensor));
        std::iter::once((self.file, self.tensor)).chain(beside)
    }
}
