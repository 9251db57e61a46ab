//! About how fast kernels are: enough to tell whether a device would be worth its start.

use super::{Isa, Kernel};
use crate::format::{Codec, Coding, ElementCode, ScaleCode};

impl Kernel {
    /// Weights that one core quantizes per second, in rows of `columns`: what benches/kernels.rs has for bf16, to one digit.
    pub fn weights_per_second(self, codec: &Codec, columns: u64) -> f64 {
        let Coding { element, scale, .. } = codec.coding(columns, None);
        let [blocks, integers, nvfp4, mxfp4] = match self.0 {
            Isa::Scalar => [0.06e9, 0.03e9, 0.04e9, 0.06e9],
            Isa::Portable => [0.4e9, 0.5e9, 0.4e9, 0.4e9],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => [2e9, 3e9, 2e9, 3e9],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => [5e9, 3e9, 3e9, 5e9],
        };
        match (element, scale) {
            _ if codec.is_blocks() => blocks,
            (ElementCode::Int { .. }, _) => integers,
            (_, ScaleCode::E4m3) => nvfp4,
            _ => mxfp4,
        }
    }
}
