//! prequant turns a bf16 Hugging Face safetensors checkpoint into a pre-quantized 4-bit one.
pub mod checkpoint;
pub mod convert;
pub mod error;
mod exact_sum;
pub mod format;
mod journal;
pub mod kernel;
pub mod manifest;
mod model_card;
pub mod pipeline;
pub mod plan;
mod relay;
mod resume;
pub mod stats;
pub mod units;
pub mod verify;
pub use error::{Error, Result};
pub use relay::recipe_of;
