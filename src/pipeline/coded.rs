//! Reading elements that stand in the file as codes and scales.

use crate::error::Result;
use crate::format::NESTED_BLOCK_SIZE;
use crate::kernel::decode::{Row, decode, restore_absmax};
use crate::layout::ZERO_POINT_ROWS;
use crate::plan::{Coded, Nested, Place};

/// Codes and scales of a run; kept from run to run.
#[derive(Default)]
pub struct Scratch {
    codes: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
    /// What scales and zero points are made of.
    raw: Vec<u8>,
    nested: Vec<u8>,
}

/// Fills `into` with the elements from `first` on of a matrix whose codes begin at `codes`. `read` fills a slice with the
/// bytes at a place.
pub fn read(
    coded: &Coded,
    codes: Place,
    first: u64,
    into: &mut [u8],
    scratch: &mut Scratch,
    mut read: impl FnMut(Place, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let size = coded.dtype.size();
    let last = first + (into.len() / size) as u64 - 1;
    let [first, last] = [first, last].map(|element| (element / coded.columns, element % coded.columns));
    let begin = code_at(coded, first);
    fill(&mut scratch.codes, code_at(coded, last) + 1 - begin, |bytes| read(at(codes, begin), bytes))?;
    // Of several rows, all scales.
    let (first_scale, last_scale) = match first.0 == last.0 {
        true => (scale_at(coded, first), scale_at(coded, last)),
        false => (scale_at(coded, (first.0, 0)), scale_at(coded, (last.0, coded.columns - 1))),
    };
    scratch.read_scales(coded, first_scale, last_scale + 1, &mut read)?;
    scratch.read_zero_points(coded, first.0, last.0, &mut read)?;
    let scale_len = coded.coding.scale_size(coded.dtype);
    let mut left = into;
    for row in first.0..=last.0 {
        let start = (row, if row == first.0 { first.1 } else { 0 });
        let count = (coded.columns - start.1).min((left.len() / size) as u64);
        let (here, rest) = left.split_at_mut(count as usize * size);
        let point = (row - first.0) * coded.scales_of_row() + group_of(coded, start.1);
        decode(Row {
            coding: coded.coding,
            dtype: coded.dtype,
            first: start.1 as usize,
            codes: &scratch.codes[(code_at(coded, start) - begin) as usize..],
            scales: &scratch.scales[(scale_at(coded, start) - first_scale) as usize * scale_len..],
            zero_points: scratch.zero_points.get(point as usize..).unwrap_or_default(),
            into: here,
        });
        left = rest;
    }
    Ok(())
}

/// The byte that holds an element's code, counted from the matrix's first.
fn code_at(coded: &Coded, (row, column): (u64, u64)) -> u64 {
    row * coded.row_len + coded.coding.code_byte(column as usize) as u64
}

/// The scale of an element, counted from the matrix's first.
fn scale_at(coded: &Coded, (row, column): (u64, u64)) -> u64 {
    row / coded.group_rows * coded.scales_of_row() + group_of(coded, column)
}

fn group_of(coded: &Coded, column: u64) -> u64 {
    column / coded.coding.group as u64
}

fn at(place: Place, offset: u64) -> Place {
    Place { offset: place.offset + offset, ..place }
}

fn fill(buffer: &mut Vec<u8>, len: u64, read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
    buffer.resize(len as usize, 0);
    read(buffer)
}

impl Scratch {
    fn read_scales(
        &mut self,
        coded: &Coded,
        first: u64,
        end: u64,
        read: &mut impl FnMut(Place, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let (place, len) = (at(coded.scales, first * coded.scale_len()), (end - first) * coded.scale_len());
        let Some(Nested { absmax, offset }) = coded.nested else {
            return fill(&mut self.scales, len, |bytes| read(place, bytes));
        };
        let block = NESTED_BLOCK_SIZE as u64;
        let blocks = first / block..end.div_ceil(block);
        fill(&mut self.raw, len, |bytes| read(place, bytes))?;
        let nested = (blocks.end - blocks.start) * 4;
        fill(&mut self.nested, nested, |bytes| read(at(absmax, blocks.start * 4), bytes))?;
        self.scales.resize(len as usize * size_of::<f32>(), 0);
        restore_absmax(&self.raw, &self.nested, offset, first as usize, &mut self.scales);
        Ok(())
    }

    /// One byte for each group of the rows from `first` to `last`.
    fn read_zero_points(
        &mut self,
        coded: &Coded,
        first: u64,
        last: u64,
        read: &mut impl FnMut(Place, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.zero_points.clear();
        let Some(place) = coded.zero_points else { return Ok(()) };
        let (groups, begin) = (coded.scales_of_row(), first / ZERO_POINT_ROWS);
        let words = last / ZERO_POINT_ROWS + 1 - begin;
        fill(&mut self.raw, words * groups * 4, |bytes| read(at(place, begin * groups * 4), bytes))?;
        for row in first..=last {
            let of_row = &self.raw[((row / ZERO_POINT_ROWS - begin) * groups * 4) as usize..];
            // Four rows' nibbles lie in two bytes.
            let nibble = (row % ZERO_POINT_ROWS) as usize;
            let points = of_row.chunks_exact(4).take(groups as usize);
            self.zero_points.extend(points.map(|word| word[nibble / 2] >> (nibble % 2 * 4) & 15));
        }
        Ok(())
    }
}
