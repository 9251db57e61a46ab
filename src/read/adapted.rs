//! What an adapter makes of a matrix: a low-rank product is added to it, or other values replace it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::evaluate::Fetch;
use super::{Evaluator, Read, Span};
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::kernel::low_rank::{LowRank, narrow, widen};

/// The largest rank: a few columns of the right factor fit into what is held of it.
pub(crate) const MAX_RANK: u64 = 1 << 14;

/// Numbers that are held at once: of the right factor, the left one, and their product.
const RIGHT: usize = 1 << 17;
const LEFT: usize = 1 << 16;
const PRODUCT: usize = 1 << 16;

/// Rows and columns of the product that are computed at once, at most.
const ROWS: usize = 64;
const COLUMNS: usize = 1 << 14;

/// Elements of a factor that are read at once.
const RUN: usize = 1 << 14;

/// Bytes that merging takes beside what it reads and writes.
pub(crate) const HELD: usize = 8 * (RIGHT + LEFT + PRODUCT) + 12 * RUN;

/// See [`Read::Adapted`].
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// What gives the matrix.
    pub(super) of: Read,
    /// Its dtype, and that of what is given.
    dtype: FloatDtype,
    change: Change,
}

#[derive(Clone, Debug, PartialEq)]
enum Change {
    Add(Product),
    /// All elements, in the matrix's order.
    Replace(Arc<AdapterTensor>),
}

/// A tensor of an adapter.
#[derive(Debug, PartialEq)]
pub(crate) struct AdapterTensor {
    /// Its name.
    pub name: String,
    /// The file that holds it.
    pub path: Arc<Path>,
    /// All of its bytes.
    pub place: Span,
    /// Its dtype.
    pub dtype: FloatDtype,
}

/// A scaled product of two narrow matrices, of a whole matrix's shape.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Product {
    /// Of the product.
    pub rows: u64,
    /// Likewise.
    pub columns: u64,
    /// Terms of each of its sums.
    pub rank: u64,
    /// `[rows, rank]`.
    pub left: Factor,
    /// `[columns, rank]`; ones if there is none.
    pub right: Option<Factor>,
    /// What each sum is multiplied by.
    pub scaling: f64,
}

/// A narrow matrix that stands in a tensor, in elements of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Factor {
    /// The tensor.
    pub tensor: Arc<AdapterTensor>,
    /// Where its first element is.
    pub first: u64,
    /// From one element to that of the next row, or column, of the product.
    pub step: u64,
    /// From one element to that of the next term of a sum.
    pub rank_step: u64,
}

impl Factor {
    /// Of every `step`th row, or column, of the product, from `first` on.
    fn choose(&self, first: u64, step: u64) -> Factor {
        Factor { first: self.first + first * self.step, step: self.step * step, ..self.clone() }
    }
}

impl Read {
    /// A matrix of `dtype` with a product of its shape added to it.
    ///
    /// # Panics
    /// When the shapes differ; that is a defect.
    pub(crate) fn with_product(self, dtype: FloatDtype, product: Product) -> Read {
        assert_eq!(
            self.len(),
            product.rows * product.columns * dtype.size() as u64,
            "not a matrix of the product's shape"
        );
        Read::Adapted(Box::new(Adapted { of: self, dtype, change: Change::Add(product) }))
    }

    /// A tensor of `dtype` with other values in its place.
    ///
    /// # Panics
    /// When there are more or fewer of them; that is a defect.
    pub(crate) fn replaced(self, dtype: FloatDtype, by: Arc<AdapterTensor>) -> Read {
        let elements = |len: u64, dtype: FloatDtype| len / dtype.size() as u64;
        assert_eq!(elements(self.len(), dtype), elements(by.place.len, by.dtype), "values for each element");
        Read::Adapted(Box::new(Adapted { of: self, dtype, change: Change::Replace(by) }))
    }

    /// The tensors of adapters that it is made of beside the source's, each as often as it is read.
    pub(crate) fn adapters(&self) -> Box<dyn Iterator<Item = &Arc<AdapterTensor>> + '_> {
        match self {
            Read::Adapted(adapted) => Box::new(adapted.of.adapters().chain(adapted.tensors())),
            Read::Rows(rows) => rows.of.adapters(),
            Read::Columns(columns) => columns.of.adapters(),
            Read::Concat(parts) => Box::new(parts.iter().flat_map(Read::adapters)),
            Read::Mapped(mapped) => mapped.of.adapters(),
            Read::Words(words) => words.of.adapters(),
            Read::Nibbles(nibbles) => nibbles.of.adapters(),
            Read::Bytes(_) | Read::Decode(_) | Read::Literal(_) => Box::new(std::iter::empty()),
        }
    }
}

impl Adapted {
    fn tensors(&self) -> impl Iterator<Item = &Arc<AdapterTensor>> {
        let (first, second) = match &self.change {
            Change::Add(product) => (&product.left.tensor, product.right.as_ref().map(|right| &right.tensor)),
            Change::Replace(by) => (by, None),
        };
        std::iter::once(first).chain(second)
    }

    /// Its transpose, if it is a product of this shape that is added.
    pub(super) fn transposed(&self, [rows, columns]: [u64; 2], size: usize) -> Option<Read> {
        let Change::Add(product) = &self.change else { return None };
        let right = product.right.clone();
        let is_whole = (product.rows, product.columns) == (rows, columns) && self.dtype.size() == size;
        let left = right.filter(|_| is_whole)?;
        let right = Some(product.left.clone());
        let product = Product { rows: columns, columns: rows, left, right, ..*product };
        Some(self.of.transposed([rows, columns], size).with_product(self.dtype, product))
    }

    /// Of its rows, of `len` bytes each, the `count` rows `first`, `first + step`, …, if a product is added whose rows they are.
    pub(super) fn rows(&self, len: u64, first: u64, step: u64, count: u64) -> Option<Read> {
        let Change::Add(product) = &self.change else { return None };
        (len == product.columns * self.dtype.size() as u64).then(|| {
            let product = Product { rows: count, left: product.left.choose(first, step), ..product.clone() };
            self.of.rows(len, first, step, count).with_product(self.dtype, product)
        })
    }
}

/// Room for factors and their product; kept from one run to the next.
#[derive(Default)]
pub(super) struct Factors {
    left: Vec<f64>,
    right: Vec<f64>,
    product: Vec<f64>,
    bytes: Vec<u8>,
}

impl Evaluator {
    /// What is adapted, and then what the adapter makes of it.
    pub(super) fn adapted(
        &mut self,
        adapted: &Adapted,
        offset: u64,
        into: &mut [u8],
        fetch: &mut Fetch<'_>,
    ) -> Result<()> {
        let size = adapted.dtype.size();
        if !offset.is_multiple_of(size as u64) || !into.len().is_multiple_of(size) {
            return Err(Error::internal(format!("{} bytes from {offset} on aren't whole elements", into.len())));
        }
        let mut factors = std::mem::take(&mut self.factors);
        let first = offset / size as u64;
        let done = match &adapted.change {
            Change::Replace(by) => factors.replace(by, adapted.dtype, first, into, fetch),
            Change::Add(product) => self.read(&adapted.of, offset, into, fetch).and_then(|()| {
                let run = Run { product, dtype: adapted.dtype, first, kernel: self.kernel };
                run.add(&mut factors, into, fetch)
            }),
        };
        self.factors = factors;
        match done? {
            true => Ok(()),
            false => {
                let by = adapted.tensors().map(|tensor| format!("{:?}", tensor.name)).collect::<Vec<_>>().join(" and ");
                let path = adapted.tensors().next().map_or_else(Default::default, |tensor| tensor.path.to_path_buf());
                let dtype = adapted.dtype.torch_name();
                Err(Error::Adapter { path, why: format!("{by}: what they are merged into overflows {dtype}") })
            }
        }
    }
}

/// A run of a matrix's elements to which a product is added.
struct Run<'a> {
    product: &'a Product,
    dtype: FloatDtype,
    /// The first element of the run, row by row.
    first: u64,
    kernel: crate::kernel::Kernel,
}

impl Run<'_> {
    /// Adds the product to the elements in `into`: to what is in its first row, to all whole rows, to what is in its last. Returns
    /// whether none overflows.
    fn add(&self, factors: &mut Factors, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<bool> {
        let columns = self.product.columns;
        let (mut at, end) = (self.first, self.first + (into.len() / self.dtype.size()) as u64);
        let mut fits = true;
        while at < end {
            let (row, column) = (at / columns, at % columns);
            let (rows, width) = match end / columns - row {
                // It doesn't reach the next row's end, or doesn't begin with a whole one.
                0 => (1, end - at),
                _ if column > 0 => (1, columns - column),
                rows => (rows, columns),
            };
            let first = ((at - self.first) as usize) * self.dtype.size();
            let len = (rows * width) as usize * self.dtype.size();
            let here = &mut into[first..][..len];
            fits &= self.add_to(factors, row..row + rows, column..column + width, here, fetch)?;
            at += rows * width;
        }
        Ok(fits)
    }

    /// Adds the product to a rectangle of the matrix, whose rows follow each other in `into`.
    fn add_to(
        &self,
        factors: &mut Factors,
        rows: Range<u64>,
        columns: Range<u64>,
        into: &mut [u8],
        fetch: &mut Fetch<'_>,
    ) -> Result<bool> {
        let rank = self.product.rank as usize;
        let (all, size) = ((columns.end - columns.start) as usize, self.dtype.size());
        let width = (RIGHT / rank).clamp(1, COLUMNS).min(all);
        let height = (PRODUCT / width).clamp(4, ROWS).min((LEFT / rank).max(4));
        let mut fits = true;
        for left_of in (0..all).step_by(width) {
            let width = width.min(all - left_of);
            match &self.product.right {
                Some(right) => factors.load_right(right, columns.start + left_of as u64, width, rank, fetch)?,
                None => factors.right = vec![1.0; width * rank],
            }
            for (top, rows_here) in (rows.start..rows.end).step_by(height).zip(into.chunks_mut(height * all * size)) {
                let height = rows_here.len() / (all * size);
                factors.load_left(&self.product.left, top, height, rank, fetch)?;
                let Factors { left, right, product, .. } = factors;
                product.resize(height * width, 0.0);
                self.kernel.multiply(&LowRank { left, right, rank, scaling: self.product.scaling }, product);
                for (row, changes) in rows_here.chunks_exact_mut(all * size).zip(product.chunks_exact(width)) {
                    fits &= self.kernel.add(self.dtype, changes, &mut row[left_of * size..][..width * size]);
                }
            }
        }
        Ok(fits)
    }
}

impl Factors {
    /// Rows of the left factor, one after the other.
    fn load_left(&mut self, of: &Factor, first: u64, count: usize, rank: usize, fetch: &mut Fetch<'_>) -> Result<()> {
        let Factors { left, bytes, .. } = self;
        left.resize(count * rank, 0.0);
        load(of, first, [count, rank], bytes, fetch, &mut |i, k, value| left[i * rank + k] = value)
    }

    /// Columns of the product, as rows of the right factor: one for each term.
    fn load_right(&mut self, of: &Factor, first: u64, count: usize, rank: usize, fetch: &mut Fetch<'_>) -> Result<()> {
        let Factors { right, bytes, .. } = self;
        right.resize(count * rank, 0.0);
        load(of, first, [count, rank], bytes, fetch, &mut |j, k, value| right[k * count + j] = value)
    }

    /// A run of the values that replace others, from the element `first` on.
    fn replace(
        &mut self,
        by: &AdapterTensor,
        dtype: FloatDtype,
        first: u64,
        into: &mut [u8],
        fetch: &mut Fetch<'_>,
    ) -> Result<bool> {
        let Factors { left, bytes, .. } = self;
        let mut at = first;
        let mut fits = true;
        for into in into.chunks_mut(RUN * dtype.size()) {
            let count = into.len() / dtype.size();
            by.read(at, count, bytes, fetch)?;
            left.resize(count, 0.0);
            by.widen(at, 1, bytes, left)?;
            narrow(dtype, left, into);
            left.resize(count, 0.0);
            fits &= widen(dtype, into, left);
            at += count as u64;
        }
        Ok(fits)
    }
}

/// Reads `[rows or columns, terms]` elements of a factor in runs along the direction in which they are closer to each other, and
/// hands each on with its place.
fn load(
    of: &Factor,
    first: u64,
    [count, rank]: [usize; 2],
    bytes: &mut Vec<u8>,
    fetch: &mut Fetch<'_>,
    each: &mut dyn FnMut(usize, usize, f64),
) -> Result<()> {
    let begin = of.first + first * of.step;
    let by_rank = of.rank_step < of.step;
    let (outer, outer_step) = if by_rank { (count, of.step) } else { (rank, of.rank_step) };
    let (inner, step) = if by_rank { (rank, of.rank_step) } else { (count, of.step) };
    // As many elements of a run as are no further from each other than is read at once.
    let at_once = ((RUN as u64 - 1) / step.max(1) + 1) as usize;
    let mut values = Vec::new();
    for i in 0..outer {
        for from in (0..inner).step_by(at_once) {
            let taken = at_once.min(inner - from);
            let place = begin + i as u64 * outer_step + from as u64 * step;
            of.tensor.read(place, (taken - 1) * step as usize + 1, bytes, fetch)?;
            values.resize(taken, 0.0);
            of.tensor.widen(place, step as usize, bytes, &mut values)?;
            for (j, value) in (from..).zip(&values) {
                let (i, k) = if by_rank { (i, j) } else { (j, i) };
                each(i, k, *value);
            }
        }
    }
    Ok(())
}

impl AdapterTensor {
    /// Fills `bytes` with `count` elements, from the one with this number on.
    fn read(&self, first: u64, count: usize, bytes: &mut Vec<u8>, fetch: &mut Fetch<'_>) -> Result<()> {
        let size = self.dtype.size() as u64;
        bytes.resize(count * size as usize, 0);
        fetch(self.place.part(first * size, bytes.len() as u64), bytes)
    }

    /// Every `step`th of the elements in `bytes`, of which the first has this number.
    ///
    /// # Errors
    /// When one isn't finite.
    fn widen(&self, first: u64, step: usize, bytes: &[u8], into: &mut [f64]) -> Result<()> {
        let size = self.dtype.size();
        let all_finite = if step == 1 {
            widen(self.dtype, bytes, into)
        } else {
            let elements = bytes.chunks(size * step).zip(into.iter_mut());
            { elements }
                .fold(true, |all, (bytes, into)| widen(self.dtype, &bytes[..size], std::slice::from_mut(into)) && all)
        };
        if all_finite {
            return Ok(());
        }
        let at = into.iter().position(|value| !value.is_finite()).unwrap_or_default();
        let (place, value) = (first + (at * step) as u64, into[at]);
        let why = format!(
            "tensor {:?} holds {value} at element {place}: the adapter is damaged, or its training diverged; no model can be made \
             of it",
            self.name
        );
        Err(Error::Adapter { path: self.path.to_path_buf(), why })
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::Kernel;

    const EXPERTS: u64 = 3;
    const RANK: u64 = 2;
    const ROWS: u64 = 7;
    const COLUMNS: u64 = 5;

    /// A small number for each element of each file.
    fn number(file: usize, element: u64) -> f32 {
        let mixed = (element + 1000 * file as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        mixed as f32 / 32768.0 - 1.0
    }

    /// File 0 holds the experts' matrices in bf16, file 1 their A in f32, file 2 their B in bf16.
    fn fetch(span: Span, into: &mut [u8]) -> Result<()> {
        let size = if span.file == 1 { 4 } else { 2 };
        for (i, element) in into.chunks_mut(size).enumerate() {
            let value = number(span.file, span.offset / size as u64 + i as u64);
            match size {
                4 => element.copy_from_slice(&value.to_le_bytes()),
                _ => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            }
        }
        Ok(())
    }

    fn tensor(file: usize, elements: u64, dtype: FloatDtype) -> Arc<AdapterTensor> {
        let place = Span { file, tensor: 0, offset: 0, len: elements * dtype.size() as u64 };
        Arc::new(AdapterTensor { name: format!("tensor {file}"), path: Path::new("adapter").into(), place, dtype })
    }

    /// All experts' matrices, each with its product.
    fn experts() -> Read {
        let a = tensor(1, RANK * EXPERTS * COLUMNS, FloatDtype::Float32);
        let b = tensor(2, ROWS * RANK * EXPERTS, FloatDtype::Bfloat16);
        let len = ROWS * COLUMNS * 2;
        let matrices = Read::Bytes(Span { file: 0, tensor: 0, offset: 0, len: EXPERTS * len });
        Read::concat((0..EXPERTS).map(|expert| {
            let left = Factor { tensor: b.clone(), first: expert, step: RANK * EXPERTS, rank_step: EXPERTS };
            let right = Factor { tensor: a.clone(), first: expert * RANK * COLUMNS, step: 1, rank_step: COLUMNS };
            let product = Product { rows: ROWS, columns: COLUMNS, rank: RANK, left, right: Some(right), scaling: 0.3 };
            matrices.slice(expert, EXPERTS).with_product(FloatDtype::Bfloat16, product)
        }))
    }

    /// An element of an expert's matrix, as its definition has it.
    fn element(expert: u64, row: u64, column: u64) -> [u8; 2] {
        let base = bf16::from_f32(number(0, (expert * ROWS + row) * COLUMNS + column)).to_f64();
        let mut sum = 0.0;
        for k in 0..RANK {
            let b = bf16::from_f32(number(2, (row * RANK + k) * EXPERTS + expert)).to_f64();
            sum += b * f64::from(number(1, (expert * RANK + k) * COLUMNS + column));
        }
        let mut bytes = [0; 2];
        narrow(FloatDtype::Bfloat16, &[base + sum * 0.3], &mut bytes);
        bytes
    }

    fn evaluate(read: &Read, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        Evaluator::new(Kernel::detect()).read(read, offset, &mut bytes, &mut fetch).unwrap();
        bytes
    }

    fn whole() -> Vec<u8> {
        let all = (0..EXPERTS).flat_map(|expert| (0..ROWS).map(move |row| (expert, row)));
        all.flat_map(|(expert, row)| (0..COLUMNS).flat_map(move |column| element(expert, row, column))).collect()
    }

    #[test]
    fn each_experts_factors_are_found_in_tensors_of_all_experts() {
        assert_eq!(evaluate(&experts(), 0, EXPERTS * ROWS * COLUMNS * 2), whole());
        let mut names: Vec<String> = experts().adapters().map(|tensor| tensor.name.clone()).collect();
        names.dedup();
        assert_eq!(names.len(), 2 * EXPERTS as usize);
        assert!(experts().spans().all(|span| span.file == 0));
    }

    #[test]
    fn rows_and_transposes_are_products_themselves() {
        let matrix = experts().slice(1, EXPERTS);
        let row = COLUMNS * 2;
        let odd = matrix.rows(row, 1, 2, 3);
        assert!(matches!(odd, Read::Adapted(_)), "{odd:?}");
        let expected: Vec<u8> =
            [1, 3, 5].iter().flat_map(|&r| (0..COLUMNS).flat_map(move |c| element(1, r, c))).collect();
        assert_eq!(evaluate(&odd, 0, odd.len()), expected);
        let transposed = matrix.transposed([ROWS, COLUMNS], 2);
        assert!(matches!(transposed, Read::Adapted(_)), "{transposed:?}");
        let expected: Vec<u8> = (0..COLUMNS).flat_map(|c| (0..ROWS).flat_map(move |r| element(1, r, c))).collect();
        assert_eq!(evaluate(&transposed, 0, transposed.len()), expected);
        let columns = transposed.rows(ROWS * 2, 1, 3, 2);
        let expected: Vec<u8> = [1, 4].iter().flat_map(|&c| (0..ROWS).flat_map(move |r| element(1, r, c))).collect();
        assert_eq!(evaluate(&columns, 0, columns.len()), expected);
    }

    #[test]
    fn large_ranks_are_worked_on_in_pieces() {
        let (rows, columns, rank) = (9, 70, 3000);
        let a = tensor(1, rank * columns, FloatDtype::Float32);
        let b = tensor(2, rows * rank, FloatDtype::Bfloat16);
        let left = Factor { tensor: b, first: 0, step: rank, rank_step: 1 };
        let right = Some(Factor { tensor: a, first: 0, step: 1, rank_step: columns });
        let product = Product { rows, columns, rank, left, right, scaling: 0.01 };
        let base = Read::Bytes(Span { file: 0, tensor: 0, offset: 0, len: rows * columns * 2 });
        let read = base.with_product(FloatDtype::Bfloat16, product);
        let found = evaluate(&read, 0, read.len());
        for (place, found) in (0..).zip(found.chunks(2)) {
            let (row, column) = (place / columns, place % columns);
            let mut sum = 0.0;
            for k in 0..rank {
                let b = bf16::from_f32(number(2, row * rank + k)).to_f64();
                sum += b * f64::from(number(1, k * columns + column));
            }
            let mut expected = [0; 2];
            narrow(FloatDtype::Bfloat16, &[bf16::from_f32(number(0, place)).to_f64() + sum * 0.01], &mut expected);
            assert_eq!(found, expected, "{row} {column}");
        }
    }

    proptest! {
        #[test]
        fn any_run_of_elements_is_that_of_the_whole(first in 0u64..104, count in 0u64..105) {
            let count = count.min(EXPERTS * ROWS * COLUMNS - first);
            let found = evaluate(&experts(), first * 2, count * 2);
            prop_assert_eq!(found, &whole()[first as usize * 2..][..count as usize * 2]);
        }
    }
}
