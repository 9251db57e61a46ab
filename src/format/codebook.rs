//! Sixteen values, and the thresholds that choose between them.
//!
//! All numbers are f32 bit patterns, read from bitsandbytes 0.50.2's own tables: a decimal that goes through f64 on its
//! way changes some by one ulp. Thresholds are its f32 midpoints between neighbouring values; that between two zeros is where its
//! CUDA kernels have it.

/// A 4-bit codebook, in the one shape that every kernel works from.
///
/// An element `t`, scaled to [-1, 1] by its block's absmax, has `rank` = the number of thresholds it is strictly greater
/// than, and is stored as `code_of_rank[rank]`, which decodes to `values[code]`.
#[derive(Debug, PartialEq)]
pub struct Codebook {
    /// Fifteen thresholds as f32 bits, ascending.
    pub threshold_bits: [u32; 15],
    /// The 4-bit code of each rank.
    pub code_of_rank: [u8; 16],
    /// The decoded value of each code, as f32 bits: `quant_map` in the file.
    pub value_bits: [u32; 16],
    /// The code that bitsandbytes' kernels decode to -0.0, whose sign its table (`quant_map`) doesn't keep.
    pub negative_zero: Option<u8>,
}

impl Codebook {
    /// The thresholds as numbers.
    pub fn thresholds(&self) -> [f32; 15] {
        self.threshold_bits.map(f32::from_bits)
    }

    /// The decoded values by code, as numbers.
    pub fn values(&self) -> [f32; 16] {
        self.value_bits.map(f32::from_bits)
    }

    /// The code of an element scaled to [-1, 1], and the value that it decodes to.
    pub fn nearest(&self, t: f32) -> (u8, f32) {
        let rank = self.thresholds().iter().filter(|&&threshold| t > threshold).count();
        let code = self.code_of_rank[rank];
        (code, self.values()[usize::from(code)])
    }

    /// The code of 0.0: what zero blocks and the pad of an odd tail hold.
    pub fn zero_code(&self) -> u8 {
        let rank = self.thresholds().iter().filter(|&&t| 0.0 > t).count();
        self.code_of_rank[rank]
    }
}

#[cfg(test)]
mod tests {
    use crate::format::{fp4, nf4};

    #[test]
    fn thresholds_are_the_f32_midpoints_between_neighbouring_values() {
        for book in [&nf4::CODEBOOK, &fp4::CODEBOOK] {
            let by_rank = book.code_of_rank.map(|code| book.values()[usize::from(code)]);
            for (rank, threshold) in book.thresholds().iter().enumerate() {
                let (below, above) = (by_rank[rank], by_rank[rank + 1]);
                let midpoint = if below == above { 0f32.next_down() } else { (below + above) / 2.0 };
                assert_eq!(midpoint.to_bits(), threshold.to_bits(), "rank {rank}");
            }
        }
    }

    #[test]
    fn fp4_has_a_zero_for_what_is_less_and_one_for_what_is_not() {
        let code = |t: f32| fp4::CODEBOOK.nearest(t).0;
        assert_eq!([-0.002, -f32::MIN_POSITIVE, 0f32.next_down()].map(code), [8; 3]);
        assert_eq!([-0.0, 0.0, 0f32.next_up(), f32::MIN_POSITIVE, 0.002].map(code), [0; 5]);
        assert_eq!([-0.003, 0.003].map(code), [9, 1]);
    }

    #[test]
    fn zero_decodes_to_zero() {
        assert_eq!((nf4::CODEBOOK.zero_code(), fp4::CODEBOOK.zero_code()), (7, 0));
        assert_eq!(nf4::CODEBOOK.values()[7], 0.0);
    }
}
