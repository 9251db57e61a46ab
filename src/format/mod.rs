//! The 4-bit formats: block size rules, codebooks, the tensors one weight becomes, and config.json's
//! `quantization_config`.
//!
//! Nothing here sees a file or runs over weights: it is what bitsandbytes would call "the quantization state", as
//! values. Facts are bitsandbytes 0.50.2's, compared with its own output by the golden tests.

mod block_size;
mod bnb;
mod codebook;
mod dynamic_map;

pub use block_size::BlockSize;
pub use bnb::{NESTED_BLOCK_SIZE, OutputKind, OutputTensor, QuantState, output_tensors, quant_state_len};
pub use bnb::{ParsedQuantState, quant_state_bytes, quantization_config};
pub use codebook::{Codebook, FP4, NF4};
pub use dynamic_map::{DynamicMap, dynamic_map};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A 4-bit format that `convert` can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// 4-bit NormalFloat (QLoRA): sixteen quantiles of a normal distribution.
    Nf4,
    /// bitsandbytes' 4-bit float: sign and one of eight magnitudes.
    Fp4,
}

impl Format {
    /// The name clients know: `quant_type` in a quant_state, `bnb_4bit_quant_type` in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Format::Nf4 => "nf4",
            Format::Fp4 => "fp4",
        }
    }

    /// The end of the quant_state tensor's name, after the weight's.
    pub fn quant_state_suffix(self) -> &'static str {
        match self {
            Format::Nf4 => ".quant_state.bitsandbytes__nf4",
            Format::Fp4 => ".quant_state.bitsandbytes__fp4",
        }
    }

    /// The format's sixteen values and the thresholds between them.
    pub fn codebook(self) -> &'static Codebook {
        match self {
            Format::Nf4 => &NF4,
            Format::Fp4 => &FP4,
        }
    }
}

/// The floating-point dtypes that weights are quantized from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FloatDtype {
    /// bfloat16: the upper half of an f32.
    Bfloat16,
    /// IEEE half precision.
    Float16,
    /// IEEE single precision.
    Float32,
}

impl FloatDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            FloatDtype::Bfloat16 | FloatDtype::Float16 => 2,
            FloatDtype::Float32 => 4,
        }
    }

    /// The dtype that torch calls `name`.
    pub fn from_torch_name(name: &str) -> Option<FloatDtype> {
        [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32].into_iter().find(|d| d.torch_name() == name)
    }

    /// torch's name, as quant_state and config.json spell it.
    pub fn torch_name(self) -> &'static str {
        match self {
            FloatDtype::Bfloat16 => "bfloat16",
            FloatDtype::Float16 => "float16",
            FloatDtype::Float32 => "float32",
        }
    }
}

/// How weights are quantized: everything that decides a quantized tensor's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// NF4 or FP4.
    pub format: Format,
    /// Consecutive elements that share one absmax.
    pub block_size: BlockSize,
    /// Whether absmax is itself quantized, to 8 bits ("double" or "nested" quantization).
    pub double_quant: bool,
}
