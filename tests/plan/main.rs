//! What is decided, against what transformers and vLLM do.

#[path = "../support/mod.rs"]
mod support;

mod experts;
mod vllm;
