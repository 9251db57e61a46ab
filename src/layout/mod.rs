//! What a quantized weight is on disk: the tensors it becomes, their names and shapes, and config.json's part.

pub mod bitsandbytes;
pub mod compressed_tensors;
pub mod gpt_oss;
pub mod modelopt;
mod output;
pub mod recognize;

pub use bitsandbytes::{ParsedQuantState, QuantState, quant_state_bytes, quant_state_len};
pub use compressed_tensors::{ZERO_POINT_ROWS, shape_bytes};
pub use output::{OutputDtype, OutputKind, OutputTensor};
pub use recognize::{FP8_METHOD, MXFP4_METHOD, SourceQuantization};
