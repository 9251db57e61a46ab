//! Reading a matrix that is stored with rows and columns exchanged.

use crate::error::Result;

/// Fills `into` with the elements from `first` on of the transpose of a stored matrix `[rows, columns]`, whose elements are
/// `size` bytes. `read` fills a slice with the bytes at an offset of the matrix.
///
/// Only as much of a stored row is held at once as `into` has use for.
pub fn read(
    [rows, columns]: [u64; 2],
    size: usize,
    first: u64,
    into: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let end = first + (into.len() / size) as u64;
    // The transpose's rows that the elements lie in: columns of the stored matrix.
    let (first_column, end_column) = (first / rows, end.div_ceil(rows).min(columns));
    let mut run = vec![0; (end_column - first_column) as usize * size];
    for row in 0..rows {
        read((row * columns + first_column) * size as u64, &mut run)?;
        for (column, element) in (first_column..).zip(run.chunks_exact(size)) {
            let place = column * rows + row;
            if (first..end).contains(&place) {
                into[(place - first) as usize * size..][..size].copy_from_slice(element);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_of_a_transpose_is_read() {
        for (rows, columns, size) in [(1, 1, 2), (3, 5, 2), (5, 3, 4), (1, 7, 2), (7, 1, 4)] {
            let stored: Vec<u8> = (0..rows * columns * size).map(|i| i as u8).collect();
            let element = |row: usize, column: usize| &stored[(row * columns + column) * size..][..size];
            let transposed: Vec<u8> =
                (0..columns).flat_map(|c| (0..rows).flat_map(move |r| element(r, c)).copied()).collect();
            for first in 0..rows * columns {
                for end in first + 1..=rows * columns {
                    let mut into = vec![0; (end - first) * size];
                    let from_stored = |at: u64, run: &mut [u8]| {
                        run.copy_from_slice(&stored[at as usize..][..run.len()]);
                        Ok(())
                    };
                    read([rows as u64, columns as u64], size, first as u64, &mut into, from_stored).unwrap();
                    assert_eq!(into, transposed[first * size..end * size], "{rows}x{columns}, {first}..{end}");
                }
            }
        }
    }
}
