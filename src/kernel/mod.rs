//! The numbers: quantizing runs of blocks to 4-bit codes, on whatever the machine has.
//!
//! The `scalar` modules of [`block`] and [`group`] are the specification. Every other kernel gives the same bytes and the same figures, faster. The choice is
//! made once, as a value ([`Kernel`]), and passed down.

#[cfg(target_arch = "x86_64")]
mod avx2;
pub(crate) mod block;
pub(crate) mod decode;
mod element;
mod figures;
pub(crate) mod float8;
pub(crate) mod group;
mod lanes;
pub(crate) mod low_rank;
mod rates;
pub(crate) mod sha256;

pub use figures::{BlockErrors, ErrorSums, Figures, SUMMED};

use crate::dtype::FloatDtype;
use crate::format::{BlockSize, Codebook};

/// What a kernel is given: whole blocks of one tensor, and where they go.
///
/// Only the last block of a tensor may be short, so only a run that ends its tensor may end in a short block.
pub struct Blocks<'a> {
    /// Elements as they stand in the file: little-endian, without any alignment.
    pub source: &'a [u8],
    /// The elements' dtype.
    pub dtype: FloatDtype,
    /// Elements in a block.
    pub block_size: BlockSize,
    /// The sixteen values and their thresholds.
    pub codebook: &'static Codebook,
    /// Out: two codes per byte, the even element's in the high nibble; `ceil(elements / 2)` bytes.
    pub packed: &'a mut [u8],
    /// Out: one figure per block; each slice has one entry per block.
    pub figures: BlockErrors<'a>,
}

/// A NaN or an infinity stands in the source; the outputs mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite;

/// A way to quantize on this machine's CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel(Isa);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isa {
    Scalar,
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// The specification itself, on any machine.
    pub const SCALAR: Kernel = Kernel(Isa::Scalar);

    /// Loops that compilers turn into vector instructions, on any machine.
    pub const PORTABLE: Kernel = Kernel(Isa::Portable);

    /// The fastest kernel this processor runs.
    pub fn detect() -> Kernel {
        Self::available().pop().unwrap_or(Self::SCALAR)
    }

    /// Every kernel this processor runs, slowest first.
    pub fn available() -> Vec<Kernel> {
        #[allow(unused_mut, reason = "other architectures have no more")]
        let mut kernels = vec![Self::SCALAR, Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if block::x86::avx2_available() {
                kernels.push(Kernel(Isa::Avx2));
            }
            if block::x86::avx512_available() {
                kernels.push(Kernel(Isa::Avx512));
            }
        }
        kernels
    }

    /// The instruction set's name, for people.
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Scalar => "scalar",
            Isa::Portable => "portable vectors",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "AVX-512",
        }
    }

    /// Quantizes a run of blocks.
    ///
    /// # Errors
    /// [`NonFinite`] when the source holds a NaN or an infinity; what was written then means nothing.
    ///
    /// # Panics
    /// When a slice's length is not what [`Blocks`] says.
    pub fn quantize(self, blocks: Blocks<'_>) -> Result<(), NonFinite> {
        blocks.check_lengths();
        match self.0 {
            Isa::Scalar => block::scalar::quantize(blocks),
            Isa::Portable => block::portable::quantize(blocks),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => block::x86::quantize_avx2(blocks),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => block::x86::quantize_avx512(blocks),
        }
    }
}

/// Quantizes a run of blocks even if they hold NaN or infinities; see `block::scalar::quantize_any`.
///
/// # Panics
/// When a slice's length is not what [`Blocks`] says.
pub fn quantize_any(blocks: Blocks<'_>) {
    blocks.check_lengths();
    block::scalar::quantize_any(blocks);
}

impl Blocks<'_> {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.source.len() / self.dtype.size()
    }

    fn check_lengths(&self) {
        let elements = self.elements();
        let blocks = elements.div_ceil(self.block_size.get());
        assert_eq!(self.source.len(), elements * self.dtype.size(), "source: not whole elements");
        assert_eq!(self.packed.len(), elements.div_ceil(2), "packed: length");
        let BlockErrors { absmax, signal, noise, worst } = &self.figures;
        assert!([absmax, signal, noise, worst].iter().all(|f| f.len() == blocks), "figures: length");
    }
}
