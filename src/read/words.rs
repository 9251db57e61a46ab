//! Codes and scales in other bytes: words of eight codes, changed one by one or dealt out to other words; bytes for bytes.

use std::fmt;
use std::sync::Arc;

use super::Read;

/// Words, each changed in the same way.
#[derive(Clone, Debug, PartialEq)]
pub struct Words {
    /// What gives them.
    pub(super) of: Box<Read>,
    /// What is done to each.
    pub(super) change: Change,
}

/// What is done to a word.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// 1 is added to each code, and what is too much for one carries into the next: how GPTQModel undoes what GPTQ's first version
    /// did to zero points.
    AddOnes,
    /// AWQ's codes 0, 4, 1, 5, 2, 6, 3, 7 stand where 0 to 7 are expected.
    FromAwq,
}

/// Where AWQ has code 0 to 7: the number of its nibble.
const AWQ_NIBBLES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Change {
    /// Changes whole words.
    pub(super) fn apply(self, words: &mut [u8]) {
        for bytes in words.as_chunks_mut().0 {
            let word = u32::from_le_bytes(*bytes);
            let changed = match self {
                Change::AddOnes => word.wrapping_add(0x1111_1111),
                Change::FromAwq => {
                    let codes = AWQ_NIBBLES.iter().enumerate();
                    codes.fold(0, |changed, (i, nibble)| changed | (word >> (4 * nibble) & 15) << (4 * i))
                }
            };
            *bytes = changed.to_le_bytes();
        }
    }
}

/// A matrix of codes whose words hold those of eight rows, row by row of what is stored; given as words that hold those of eight columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Nibbles {
    /// Words `[rows / 8, columns]`; row `8i + j` is in bits `4j` to `4j + 3`.
    pub(super) of: Box<Read>,
    pub(super) rows: u64,
    pub(super) columns: u64,
}

impl Nibbles {
    /// Bytes of a row: whole words.
    pub(super) fn row_len(&self) -> u64 {
        self.columns.div_ceil(8) * 4
    }

    /// Fills `into` with bytes of a row from byte `first` on: of the row number `which` of the eight that are in `words`.
    pub(super) fn row(&self, words: &[u8], which: usize, first: usize, into: &mut [u8]) {
        // A word's byte that has the row's code, and in which half.
        let (place, shift) = (which / 2, which % 2 * 4);
        let code = |column: usize| words.get(column * 4 + place).map_or(0, |byte| byte >> shift & 15);
        for (byte, columns) in into.iter_mut().zip((first * 2..).step_by(2)) {
            *byte = code(columns) | code(columns + 1) << 4;
        }
    }
}

/// Bytes, each in place of another.
#[derive(Clone, PartialEq)]
pub struct Mapped {
    /// What gives those.
    pub(super) of: Box<Read>,
    /// By byte.
    pub(super) table: Arc<[u8; 256]>,
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped").field("of", &self.of).finish_non_exhaustive()
    }
}

impl Read {
    /// Bytes, each in place of the one that a table has it for.
    pub fn mapped(self, table: [u8; 256]) -> Read {
        Read::Mapped(Mapped { of: Box::new(self), table: Arc::new(table) })
    }

    /// Words, each changed in the same way.
    ///
    /// # Panics
    /// When these aren't whole words; that is a defect.
    pub fn words(self, change: Change) -> Read {
        assert!(self.len().is_multiple_of(4), "not whole words");
        Read::Words(Words { of: Box::new(self), change })
    }

    /// Of words `[rows / 8, columns]` that hold the codes of eight rows, words that hold those of eight columns, row by row.
    ///
    /// # Panics
    /// When there are more or fewer words, or none; that is a defect.
    pub fn nibbles_by_row(self, rows: u64, columns: u64) -> Read {
        assert!(rows.is_multiple_of(8) && rows * columns > 0, "{rows} rows of {columns}");
        assert_eq!(self.len(), rows / 8 * columns * 4, "words of {rows} rows of {columns}");
        Read::Nibbles(Nibbles { of: Box::new(self), rows, columns })
    }
}
