//! Filling a buffer with a range of what an expression gives.

use super::adapted::Factors;
use super::decode::{Codes, Decoding};
use super::words::{Nibbles, Words};
use super::{Columns, Decode, Read, Rows, Span};
use crate::error::Result;
use crate::kernel::Kernel;

/// Bytes of a matrix that are held at once while columns of it are read.
const TILE: usize = 128 << 10;

/// Fills a slice with the source's bytes, all of a span.
pub(crate) type Fetch<'f> = dyn FnMut(Span, &mut [u8]) -> Result<()> + 'f;

/// What evaluates expressions; keeps its buffers from one to the next.
///
/// It holds a tile of [`TILE`] bytes for each transpose within another, codes and scales of at most the run that is
/// asked for, and [`super::HELD`] bytes of an adapter's factors.
pub(crate) struct Evaluator {
    pub(super) kernel: Kernel,
    tiles: Vec<Vec<u8>>,
    codes: Codes,
    pub(super) factors: Factors,
}

impl Evaluator {
    /// Decodes with this kernel.
    pub(crate) fn new(kernel: Kernel) -> Evaluator {
        Evaluator { kernel, tiles: Vec::new(), codes: Codes::default(), factors: Factors::default() }
    }

    /// Fills `into` with what `read` gives from byte `offset` on.
    ///
    /// # Errors
    /// Those of `fetch`.
    ///
    /// # Panics
    /// When it gives fewer bytes; that is a defect.
    pub(crate) fn read(&mut self, read: &Read, offset: u64, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        match read {
            Read::Bytes(span) => fetch(span.part(offset, into.len() as u64), into),
            Read::Decode(decode) => self.decode(decode, offset, into, fetch),
            Read::Mapped(mapped) => {
                self.read(&mapped.of, offset, into, fetch)?;
                into.iter_mut().for_each(|byte| *byte = mapped.table[usize::from(*byte)]);
                Ok(())
            }
            Read::Words(words) => self.words(words, offset, into, fetch),
            Read::Nibbles(nibbles) => self.nibbles(nibbles, offset, into, fetch),
            Read::Rows(rows) => self.rows(rows, offset, into, fetch),
            Read::Columns(columns) => match columns.size {
                1 => self.columns::<1>(columns, offset, into, fetch),
                2 => self.columns::<2>(columns, offset, into, fetch),
                4 => self.columns::<4>(columns, offset, into, fetch),
                8 => self.columns::<8>(columns, offset, into, fetch),
                size => unreachable!("no dtype has elements of {size} bytes"),
            },
            Read::Concat(parts) => self.concat(parts, offset, into, fetch),
            Read::Literal(bytes) => {
                into.copy_from_slice(&bytes[offset as usize..][..into.len()]);
                Ok(())
            }
            Read::Adapted(adapted) => self.adapted(adapted, offset, into, fetch),
        }
    }

    /// What codes stand for; they may be expressions of their own.
    fn decode(&mut self, matrix: &Decode, offset: u64, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        let mut codes = std::mem::take(&mut self.codes);
        let of = Decoding { matrix, kernel: self.kernel };
        let read = codes.read(of, offset, into, &mut |read, at, bytes| self.read(read, at, bytes, fetch));
        self.codes = codes;
        read
    }

    /// Whole words, of which the first and the last may be wanted in part.
    fn words(&mut self, words: &Words, offset: u64, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        let (skipped, end) = ((offset % 4) as usize, offset + into.len() as u64);
        let mut whole = self.tiles.pop().unwrap_or_default();
        whole.resize((end.next_multiple_of(4) - (offset - skipped as u64)) as usize, 0);
        self.read(&words.of, offset - skipped as u64, &mut whole, fetch)?;
        words.change.apply(&mut whole);
        into.copy_from_slice(&whole[skipped..][..into.len()]);
        self.tiles.push(whole);
        Ok(())
    }

    /// As many stored rows at once as a tile holds.
    fn nibbles(&mut self, nibbles: &Nibbles, offset: u64, into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        let (row_len, stored_row) = (nibbles.row_len(), nibbles.columns * 4);
        let end = offset + into.len() as u64;
        let at_once = (TILE as u64 / stored_row).max(1);
        let mut tile = self.tiles.pop().unwrap_or_default();
        let mut row = offset / row_len;
        while row * row_len < end {
            // Rows that stand in the same stored ones.
            let stored = row / 8..((row / 8 + at_once) * 8).min((end - 1) / row_len + 1).div_ceil(8);
            tile.resize(((stored.end - stored.start) * stored_row) as usize, 0);
            self.read(&nibbles.of, stored.start * stored_row, &mut tile, fetch)?;
            for (words, first) in tile.chunks_exact(stored_row as usize).zip((stored.start * 8..).step_by(8)) {
                for row in first.max(row)..(first + 8).min((end - 1) / row_len + 1) {
                    let (begin, from) = (row * row_len, (row * row_len).max(offset));
                    let to = (begin + row_len).min(end);
                    let into = &mut into[(from - offset) as usize..(to - offset) as usize];
                    nibbles.row(words, (row - first) as usize, (from - begin) as usize, into);
                }
            }
            row = stored.end * 8;
        }
        self.tiles.push(tile);
        Ok(())
    }

    fn concat(&mut self, parts: &[Read], mut offset: u64, mut into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        for part in parts {
            let len = part.len();
            if offset >= len {
                offset -= len;
                continue;
            }
            let (here, rest) = into.split_at_mut((len - offset).min(into.len() as u64) as usize);
            self.read(part, offset, here, fetch)?;
            (offset, into) = (0, rest);
            if into.is_empty() {
                break;
            }
        }
        assert!(into.is_empty(), "{} bytes more than there are", into.len());
        Ok(())
    }

    /// Each row in one piece; all in one where they follow each other.
    fn rows(&mut self, rows: &Rows, offset: u64, mut into: &mut [u8], fetch: &mut Fetch<'_>) -> Result<()> {
        let (mut row, mut skipped) = (offset / rows.len, offset % rows.len);
        while !into.is_empty() {
            let rest = if rows.step == rows.len { u64::MAX } else { rows.len - skipped };
            let (here, next) = into.split_at_mut(rest.min(into.len() as u64) as usize);
            self.read(&rows.of, rows.first + row * rows.step + skipped, here, fetch)?;
            (into, row, skipped) = (next, row + 1, 0);
        }
        Ok(())
    }

    /// A few stored rows at a time, of which only what `into` has use for is read.
    fn columns<const SIZE: usize>(
        &mut self,
        columns: &Columns,
        offset: u64,
        mut into: &mut [u8],
        fetch: &mut Fetch<'_>,
    ) -> Result<()> {
        let column_len = columns.column_len();
        let mut at = offset;
        // As many columns as a tile's row holds.
        let width = (TILE as u64 / (columns.step * SIZE as u64)).max(1);
        let mut tile = self.tiles.pop().unwrap_or_default();
        while !into.is_empty() {
            let end = (at / column_len + width) * column_len;
            let (here, rest) = into.split_at_mut((end - at).min(into.len() as u64) as usize);
            self.strip::<SIZE>(columns, at, here, &mut tile, fetch)?;
            (at, into) = (at + here.len() as u64, rest);
        }
        self.tiles.push(tile);
        Ok(())
    }

    /// Some columns whose stored rows are read tile by tile.
    fn strip<const SIZE: usize>(
        &mut self,
        columns: &Columns,
        offset: u64,
        into: &mut [u8],
        tile: &mut Vec<u8>,
        fetch: &mut Fetch<'_>,
    ) -> Result<()> {
        let (size, [rows, row_len]) = (SIZE as u64, columns.shape);
        let column_len = columns.column_len();
        let (end, step) = (offset + into.len() as u64, columns.step as usize * SIZE);
        // The columns that the bytes are in, and the run of a stored row that has them all.
        let taken = offset / column_len..end.div_ceil(column_len);
        let begin = columns.first + taken.start * columns.step;
        let run = (taken.end - taken.start - 1) as usize * step + SIZE;
        let height = (TILE / run).clamp(1, 64).min(rows as usize);
        tile.resize(height * run, 0);
        for top in (0..rows).step_by(height) {
            let tile = &mut tile[..height.min((rows - top) as usize) * run];
            for (row, run) in (top..).zip(tile.chunks_exact_mut(run)) {
                self.read(&columns.of, (row * row_len + begin) * size, run, fetch)?;
            }
            for (i, which) in taken.clone().enumerate() {
                let place = which * column_len + top * size;
                let elements = tile.chunks_exact(run).map(|run| &run[i * step..][..SIZE]);
                gather::<SIZE>(elements, place, into, offset);
            }
        }
        Ok(())
    }
}

/// Puts elements where they are from byte `place` on, as far as that is in `into`, which starts at byte `offset`.
fn gather<'t, const SIZE: usize>(
    elements: impl ExactSizeIterator<Item = &'t [u8]>,
    place: u64,
    into: &mut [u8],
    offset: u64,
) {
    let end = offset + into.len() as u64;
    if place >= offset && place + (elements.len() * SIZE) as u64 <= end {
        let into = &mut into[(place - offset) as usize..];
        into.chunks_exact_mut(SIZE).zip(elements).for_each(|(into, element)| into.copy_from_slice(element));
        return;
    }
    for (i, element) in elements.enumerate() {
        let place = place + (i * SIZE) as u64;
        // Of an element at either end of `into`, what is in it.
        let (from, to) = (place.max(offset), (place + SIZE as u64).min(end));
        if from < to {
            let bytes = &element[(from - place) as usize..(to - place) as usize];
            into[(from - offset) as usize..(to - offset) as usize].copy_from_slice(bytes);
        }
    }
}
