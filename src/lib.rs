//! prequant turns a bf16 Hugging Face safetensors checkpoint into a pre-quantized 4-bit one.
pub mod backend;
pub mod checkpoint;
pub mod dtype;
pub mod error;
pub mod format;
pub mod kernel;
pub mod layout;
pub mod manifest;
pub mod models;
pub mod ops;
pub mod pipeline;
pub mod plan;
pub mod read;
pub mod recipe;
pub mod stats;
pub mod store;
pub mod units;
pub use error::{Error, Result};
