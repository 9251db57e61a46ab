//! The tables that the GPU's kernels read, made from the CPU's own.

use crate::format::{Codebook, dynamic_map};

/// Bins that [-1, 1] is split into.
const BINS: usize = 32;

/// A bin that is twice as wide as this could hold two of NF4's thresholds.
const BINS_PER_UNIT: f32 = 15.49;

/// 2^21, where an f32's last bit is worth a quarter, and half of the bins.
const MAGIC: f32 = 2_097_152.0 + 16.0;

/// A codebook so laid out that the rank of an element takes no search: `struct Table` of kernels.cu, in f32s' bits.
///
/// The bin of an element never falls as the element grows, so thresholds of lower bins are less than it and those of higher
/// bins are not; only its own bin's threshold has to be compared. Where thresholds share a bin (FP4's three around zero),
/// all but the first are *extra*: compared always, and left out of `base`. Ranks and codes are held times 4: as what they
/// look up lies in bytes from a table's start.
#[derive(Debug)]
struct Table {
    threshold: [u32; BINS],
    base: [u32; BINS],
    value: [u32; 16],
    code: [u32; 16],
    extra: [u32; 2],
}

/// The bin of an element scaled to [-1, 1]; as kernels.cu has it.
fn bin(t: f32) -> usize {
    t.mul_add(BINS_PER_UNIT, MAGIC).to_bits() as usize / 4 % BINS
}

impl Table {
    fn new(codebook: &Codebook) -> Table {
        let mut threshold = [None; BINS];
        let mut extra = Vec::new();
        for t in codebook.thresholds() {
            match &mut threshold[bin(t)] {
                free @ None => *free = Some(t),
                Some(_) => extra.push(t),
            }
        }
        let below = |bin: usize| 4 * threshold[..bin].iter().flatten().count() as u32;
        let value = |rank: usize| codebook.value_bits[usize::from(codebook.code_of_rank[rank])];
        extra.resize(2, f32::INFINITY);
        Table {
            threshold: threshold.map(|t| t.unwrap_or(f32::INFINITY).to_bits()),
            base: std::array::from_fn(below),
            value: std::array::from_fn(value),
            code: codebook.code_of_rank.map(|code| 4 * u32::from(code)),
            extra: [extra[0].to_bits(), extra[1].to_bits()],
        }
    }

    fn words(&self) -> Vec<u32> {
        [&self.threshold[..], &self.base, &self.value, &self.code, &self.extra].concat()
    }
}

/// The table of a codebook, as the kernels read it.
pub fn codebook_table(codebook: &Codebook) -> Vec<u32> {
    Table::new(codebook).words()
}

/// The midpoints of the dynamic map, as the kernels read them.
pub fn dynamic_map_table() -> Vec<u32> {
    dynamic_map().midpoints().map(f32::to_bits).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{fp4, nf4};

    /// What kernels.cu does with the table.
    fn rank(table: &Table, t: f32) -> usize {
        let above = |bits: u32| u32::from(t > f32::from_bits(bits));
        let bin = bin(t);
        (table.base[bin] / 4 + above(table.threshold[bin]) + above(table.extra[0]) + above(table.extra[1])) as usize
    }

    #[test]
    fn the_table_ranks_every_element_as_the_thresholds_do() {
        for book in [&nf4::CODEBOOK, &fp4::CODEBOOK] {
            let table = Table::new(book);
            let thresholds = book.thresholds();
            let plain = |t: f32| thresholds.iter().filter(|&&threshold| t > threshold).count();
            let around = |t: f32| [t.next_down(), t, t.next_up()];
            let edges = thresholds.into_iter().chain([0.0, -1.0, 1.0, 1.000_001, -1.000_001]).flat_map(around);
            // Every f32 with these 20 leading bits that is at most one, and the edges of the bins between them.
            let grid =
                (0..=0x3f80_0000u32).step_by(1 << 12).flat_map(|bits| [bits, bits | 1 << 31]).map(f32::from_bits);
            for t in edges.chain(grid) {
                assert_eq!(rank(&table, t), plain(t), "{t:e}");
            }
        }
    }

    #[test]
    fn tables_fit_in_what_is_set_aside_for_them() {
        let words = 2 * codebook_table(&nf4::CODEBOOK).len() + dynamic_map_table().len();
        assert!((words * size_of::<u32>()) as u64 <= crate::backend::cuda::TABLE_BYTES);
    }

    #[test]
    fn nf4_has_no_extra_thresholds_and_codes_by_rank() {
        let table = Table::new(&nf4::CODEBOOK);
        assert_eq!(table.extra.map(f32::from_bits), [f32::INFINITY; 2]);
        assert_eq!(table.code, std::array::from_fn(|rank| 4 * rank as u32));
    }

    #[test]
    fn ranks_stay_in_the_table_even_for_what_is_no_number() {
        for book in [&nf4::CODEBOOK, &fp4::CODEBOOK] {
            let table = Table::new(book);
            let any = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e9, -1e9];
            assert!(any.into_iter().all(|t| rank(&table, t) < 16));
        }
    }
}
