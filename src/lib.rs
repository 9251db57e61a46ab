//! prequant turns a bf16 Hugging Face safetensors checkpoint into a pre-quantized 4-bit one.
pub mod format;
pub mod kernel;
pub mod plan;
