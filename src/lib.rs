//! prequant turns a bf16 Hugging Face safetensors checkpoint into a pre-quantized 4-bit one.
pub mod checkpoint;
pub mod error;
mod exact_sum;
pub mod format;
pub mod kernel;
pub mod plan;
pub mod stats;
pub use error::{Error, Result};
