//! The sixteen values of NF4 and FP4, and the thresholds that choose between them.
//!
//! All numbers are f32 bit patterns, read from bitsandbytes 0.50.2's own tables: a decimal that goes through f64 on its
//! way changes some by one ulp. Thresholds are its f32 midpoints between neighbouring values.

/// A 4-bit codebook, in the one shape that every kernel works from.
///
/// An element `t`, scaled to [-1, 1] by its block's absmax, has `rank` = the number of thresholds it is strictly greater
/// than, and is stored as `code_of_rank[rank]`, which decodes to `values[code]`.
#[derive(Debug)]
pub struct Codebook {
    /// Fifteen thresholds as f32 bits, ascending.
    pub threshold_bits: [u32; 15],
    /// The 4-bit code of each rank.
    pub code_of_rank: [u8; 16],
    /// The decoded value of each code, as f32 bits: `quant_map` in the file.
    pub value_bits: [u32; 16],
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

    /// The code of 0.0: what zero blocks and the pad of an odd tail hold.
    pub fn zero_code(&self) -> u8 {
        let rank = self.thresholds().iter().filter(|&&t| 0.0 > t).count();
        self.code_of_rank[rank]
    }
}

/// NF4 (Dettmers et al., QLoRA, appendix E): the codes are in the order of their values.
pub static NF4: Codebook = Codebook {
    threshold_bits: [
        0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64862,
        0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf, 0x3f5c89da,
    ],
    code_of_rank: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    value_bits: [
        0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff,
        0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
    ],
};

/// FP4: code `m` for magnitude `m`, `8 + m` for its negative; magnitudes are not in the order of their codes.
///
/// Codes 0 and 8 both decode to 0.0. bitsandbytes 0.50.2 sorts them as 0, then 8, so that elements just above zero get
/// code 8 and those just below get code 0; the bytes follow it.
pub static FP4: Codebook = Codebook {
    threshold_bits: [
        0xbf555556, 0xbf155556, 0xbed55556, 0xbe955556, 0xbe555556, 0xbdb00000, 0xbb2aaaab, 0x00000000, 0x3b2aaaab,
        0x3db00000, 0x3e555556, 0x3e955556, 0x3ed55556, 0x3f155556, 0x3f555556,
    ],
    code_of_rank: [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
    value_bits: [
        0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000, 0x00000000,
        0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_the_f32_midpoints_between_neighbouring_values() {
        for book in [&NF4, &FP4] {
            let by_rank = book.code_of_rank.map(|code| book.values()[usize::from(code)]);
            for (rank, threshold) in book.thresholds().iter().enumerate() {
                assert_eq!(((by_rank[rank] + by_rank[rank + 1]) / 2.0).to_bits(), threshold.to_bits(), "rank {rank}");
            }
        }
    }

    #[test]
    fn zero_decodes_to_zero() {
        assert_eq!((NF4.zero_code(), FP4.zero_code()), (7, 0));
        assert_eq!(NF4.values()[7], 0.0);
    }
}
