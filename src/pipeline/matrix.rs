//! Reading some rows of a stored matrix, or of its transpose.

use crate::error::Result;
use crate::plan::Matrix;

/// Bytes of stored rows that are held at once to be transposed.
const TILE: usize = 128 << 10;

/// Fills `into` with the elements from `first` on of the rows that `matrix` takes, one row after the other; elements are
/// `size` bytes. `read` fills a slice with the bytes at an offset of the stored matrix.
pub fn read(
    matrix: &Matrix,
    size: usize,
    first: u64,
    into: &mut [u8],
    read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    match (matrix.transposed, size) {
        (false, _) => rows(matrix, size, first, into, read),
        (true, 2) => columns::<2>(matrix, first, into, read),
        (true, 4) => columns::<4>(matrix, first, into, read),
        (true, _) => columns::<1>(matrix, first, into, read),
    }
}

/// Rows as they are stored, each in one piece; all in one where they follow each other.
fn rows(
    matrix: &Matrix,
    size: usize,
    first: u64,
    mut into: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let columns = matrix.columns;
    let (mut row, mut column) = (first / columns, first % columns);
    while !into.is_empty() {
        let at = ((matrix.first + row * matrix.step) * columns + column) * size as u64;
        let rest = if matrix.step == 1 { u64::MAX } else { (columns - column) * size as u64 };
        let (here, next) = into.split_at_mut(rest.min(into.len() as u64) as usize);
        read(at, here)?;
        (into, row, column) = (next, row + 1, 0);
    }
    Ok(())
}

/// Columns, each as a row: a few stored rows at a time, of which only what `into` has use for is read.
fn columns<const SIZE: usize>(
    matrix: &Matrix,
    first: u64,
    into: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (rows, end) = (matrix.rows, first + (into.len() / SIZE) as u64);
    // Of the rows taken, those that the elements lie in; and the run of a stored row that has them all.
    let taken = first / rows..end.div_ceil(rows);
    let begin = matrix.first + taken.start * matrix.step;
    let run = ((taken.end - taken.start - 1) * matrix.step + 1) as usize * SIZE;
    let height = (TILE / run).clamp(1, 64).min(rows as usize);
    let mut tile = vec![0; height * run];
    for top in (0..rows).step_by(height) {
        let tile = &mut tile[..height.min((rows - top) as usize) * run];
        for (row, run) in (top..).zip(tile.chunks_exact_mut(run)) {
            read((row * matrix.columns + begin) * SIZE as u64, run)?;
        }
        for (i, which) in taken.clone().enumerate() {
            let place = which * rows + top;
            let column = tile.chunks_exact(run).map(|run| &run[i * matrix.step as usize * SIZE..][..SIZE]);
            if place >= first && place + (tile.len() / run) as u64 <= end {
                let into = &mut into[(place - first) as usize * SIZE..];
                into.chunks_exact_mut(SIZE).zip(column).for_each(|(into, element)| into.copy_from_slice(element));
                continue;
            }
            for (place, element) in (place..).zip(column).filter(|(place, _)| (first..end).contains(place)) {
                into[(place - first) as usize * SIZE..][..SIZE].copy_from_slice(element);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The elements that `matrix` takes of a stored matrix, one by one.
    fn expected(stored: &[u8], matrix: &Matrix, size: usize, count: u64) -> Vec<u8> {
        let element = |row: u64, column: u64| {
            let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
            &stored[(row * matrix.columns + column) as usize * size..][..size]
        };
        let rows = (0..count).map(|i| matrix.first + i * matrix.step);
        rows.flat_map(|row| (0..matrix.row_len()).flat_map(move |column| element(row, column)).copied()).collect()
    }

    #[test]
    fn every_run_of_every_choice_of_rows_is_read() {
        for (rows, columns, size) in [(1, 1, 2), (3, 5, 2), (5, 3, 4), (1, 7, 2), (7, 1, 4), (4, 6, 1)] {
            let stored: Vec<u8> = (0..rows as usize * columns as usize * size).map(|i| i as u8).collect();
            for transposed in [false, true] {
                let all = if transposed { columns } else { rows };
                for (first, step) in [(0, 1), (0, 2), (1, 2), (1, 1), (2, 3)] {
                    let matrix = Matrix { rows, columns, transposed, first, step };
                    let count = if first < all { (all - first - 1) / step + 1 } else { 0 };
                    let expected = expected(&stored, &matrix, size, count);
                    let elements = (count * matrix.row_len()) as usize;
                    for (first, end) in (0..elements).flat_map(|i| (i + 1..=elements).map(move |j| (i, j))) {
                        let mut into = vec![0; (end - first) * size];
                        let from_stored = |at: u64, run: &mut [u8]| {
                            run.copy_from_slice(&stored[at as usize..][..run.len()]);
                            Ok(())
                        };
                        read(&matrix, size, first as u64, &mut into, from_stored).unwrap();
                        assert_eq!(into, expected[first * size..end * size], "{matrix:?}, {first}..{end}");
                    }
                }
            }
        }
    }

    #[test]
    fn matrices_larger_than_a_tile_are_transposed_in_pieces() {
        let (rows, columns) = (150u64, 1000u64);
        let stored: Vec<u8> = (0..rows * columns).flat_map(|i| (i as u16).wrapping_mul(40503).to_le_bytes()).collect();
        let matrix = Matrix { rows, columns, transposed: true, first: 1, step: 2 };
        let expected = expected(&stored, &matrix, 2, 500);
        for (first, end) in [(0, 75_000), (1, 74_999), (149, 151), (30_000, 60_077)] {
            let mut into = vec![0; (end - first) * 2];
            let from_stored = |at: u64, run: &mut [u8]| {
                run.copy_from_slice(&stored[at as usize..][..run.len()]);
                Ok(())
            };
            read(&matrix, 2, first as u64, &mut into, from_stored).unwrap();
            assert!(into == expected[first * 2..end * 2], "{first}..{end}");
        }
    }
}
