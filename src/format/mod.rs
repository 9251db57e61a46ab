//! The 4-bit formats: what each one is, in numbers and codes.
//!
//! [`FORMATS`] lists them; each has a file of its own. Nothing here sees a file, a tensor's name or a weight. Facts are
//! bitsandbytes 0.50.2's and compressed-tensors 0.19.0's, compared with their own output by tests.

mod block_size;
mod codebook;
mod codec;
mod codes;
mod dynamic_map;
pub mod fp4;
mod group_size;
mod int4;
mod int4_asym;
mod layout;
mod mxfp4;
#[cfg(feature = "test-format")]
mod mxint4;
pub mod nf4;
mod nvfp4;
mod quant_storage;
mod spec;

pub use block_size::BlockSize;
pub use codebook::Codebook;
pub use codec::{Codec, CodecOptions, Scales};
pub use codes::{Coding, ElementCode, Highest, ScaleCode, TensorScale};
pub(crate) use dynamic_map::DynamicMap;
pub use dynamic_map::dynamic_map;
pub use fp4::FP4;
pub use group_size::GroupSize;
pub use int4::INT4;
pub use int4_asym::INT4_ASYM;
pub use layout::Layout;
pub use mxfp4::MXFP4;
pub use nf4::NF4;
pub use nvfp4::NVFP4;
pub use quant_storage::QuantStorage;
pub use spec::{FormatSpec, Sharing};

/// Every format, in the order of help and documentation.
pub static FORMATS: &[&FormatSpec] = &[
    &NF4,
    &FP4,
    &INT4,
    &INT4_ASYM,
    &MXFP4,
    &NVFP4,
    #[cfg(feature = "test-format")]
    &mxint4::MXINT4,
];

/// Entries of absmax that share one nested absmax in double quantization.
pub const NESTED_BLOCK_SIZE: usize = 256;
