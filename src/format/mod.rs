//! The 4-bit formats: block size rules, codebooks, the tensors one weight becomes, and config.json's
//! `quantization_config`.
//!
//! Nothing here sees a file or runs over weights: it is what bitsandbytes would call "the quantization state", as
//! values. Facts are bitsandbytes 0.50.2's and compressed-tensors 0.19.0's, compared with their own output by tests.

mod block_size;
mod codebook;
mod coding;
mod dynamic_map;
mod group;

pub use block_size::BlockSize;
pub use codebook::{Codebook, FP4, NF4};
pub use coding::{Coding, ScaleDtype};
pub use dynamic_map::{DynamicMap, dynamic_map};
pub use group::{GroupFormat, GroupScheme, GroupSize, Layout};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dtype::FloatDtype;
use crate::layout::{OutputTensor, bitsandbytes, compressed_tensors, gpt_oss, modelopt};

/// Entries of absmax that share one nested absmax in double quantization.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// A 4-bit format that `convert` can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// 4-bit NormalFloat (QLoRA): sixteen quantiles of a normal distribution.
    Nf4,
    /// bitsandbytes' 4-bit float: sign and one of eight magnitudes.
    Fp4,
    /// Integers from -8 to 7 and a scale for each group of columns (compressed-tensors' W4A16).
    Int4,
    /// The same with a zero point for each group (compressed-tensors' W4A16_ASYM).
    Int4Asym,
    /// E2M1 floats and a power of two for each 32 columns (compressed-tensors' MXFP4A16).
    Mxfp4,
    /// E2M1 floats, an E4M3 scale for each 16 columns and one for the tensor (compressed-tensors' NVFP4A16).
    Nvfp4,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 6] =
        [Format::Nf4, Format::Fp4, Format::Int4, Format::Int4Asym, Format::Mxfp4, Format::Nvfp4];

    /// Its name, as `--format` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Nf4 => "nf4",
            Format::Fp4 => "fp4",
            Format::Int4 => "int4",
            Format::Int4Asym => "int4-asym",
            Format::Mxfp4 => "mxfp4",
            Format::Nvfp4 => "nvfp4",
        }
    }
}

/// A format of bitsandbytes'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    /// See [`Format::Nf4`].
    Nf4,
    /// See [`Format::Fp4`].
    Fp4,
}

impl BlockFormat {
    /// The name clients know: `quant_type` in a quant_state, `bnb_4bit_quant_type` in config.json.
    pub fn name(self) -> &'static str {
        match self {
            BlockFormat::Nf4 => "nf4",
            BlockFormat::Fp4 => "fp4",
        }
    }

    /// The end of the quant_state tensor's name, after the weight's.
    pub fn quant_state_suffix(self) -> &'static str {
        match self {
            BlockFormat::Nf4 => ".quant_state.bitsandbytes__nf4",
            BlockFormat::Fp4 => ".quant_state.bitsandbytes__fp4",
        }
    }

    /// The format's sixteen values and the thresholds between them.
    pub fn codebook(self) -> &'static Codebook {
        match self {
            BlockFormat::Nf4 => &NF4,
            BlockFormat::Fp4 => &FP4,
        }
    }
}

/// How weights are quantized: everything that decides a quantized tensor's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Blocks of consecutive elements with a codebook: bitsandbytes'.
    Blocks(BlockScheme),
    /// Groups of a row's columns.
    Groups(GroupScheme),
}

impl Scheme {
    /// Consecutive elements that share one scale in rows of `columns`.
    pub fn block_len(&self, columns: u64) -> u64 {
        match self {
            Scheme::Blocks(scheme) => scheme.block_size.get() as u64,
            Scheme::Groups(scheme) => scheme.group_len(columns),
        }
    }

    /// Bytes of the codes of so many elements, in rows of `columns`: whole rows where these are padded.
    pub fn packed_len(&self, elements: u64, columns: u64) -> u64 {
        match self {
            Scheme::Groups(scheme) if scheme.has_whole_rows() => elements / columns * scheme.packed_row(columns),
            _ => elements.div_ceil(2),
        }
    }

    /// The scheme, if it is of blocks.
    pub fn blocks(&self) -> Option<&BlockScheme> {
        match self {
            Scheme::Blocks(scheme) => Some(scheme),
            Scheme::Groups(_) => None,
        }
    }

    /// config.json's `quantization_config`: what tells a client how to load the weights.
    ///
    /// `compute_dtype` is the dtype that matrix products run in; `kept` are the Linear modules left unquantized, all of
    /// them.
    pub fn quantization_config(&self, compute_dtype: FloatDtype, kept: &[String]) -> Value {
        match self {
            Scheme::Blocks(scheme) => bitsandbytes::quantization_config(scheme, compute_dtype, kept),
            Scheme::Groups(scheme) => match scheme.layout {
                Layout::CompressedTensors => compressed_tensors::quantization_config(scheme, kept),
                Layout::Modelopt => modelopt::quantization_config(scheme, kept),
                Layout::GptOss => gpt_oss::quantization_config(kept),
            },
        }
    }

    /// The key of [`Scheme::quantization_config`] that lists what is kept.
    pub fn kept_modules_key(&self) -> &'static str {
        match self {
            Scheme::Blocks(_) => "llm_int8_skip_modules",
            Scheme::Groups(scheme) if scheme.layout == Layout::GptOss => "modules_to_not_convert",
            Scheme::Groups(_) => "ignore",
        }
    }

    /// A file that the format has beside config.json: name and content.
    pub fn side_file(&self, kept: &[String]) -> Option<(String, String)> {
        match self {
            Scheme::Groups(scheme) if scheme.layout == Layout::Modelopt => {
                Some((modelopt::CONFIG_NAME.to_owned(), modelopt::config_text(scheme, kept)))
            }
            _ => None,
        }
    }

    /// Whether weights that clients put together share a scale.
    pub fn shares_scales(&self) -> bool {
        matches!(self, Scheme::Groups(scheme) if scheme.tensor_scale_suffix().is_some())
    }

    /// The tensors that a weight of `shape` becomes.
    pub fn output_tensors(&self, dtype: FloatDtype, shape: &[u64]) -> Vec<OutputTensor> {
        match self {
            Scheme::Blocks(scheme) => bitsandbytes::output_tensors(scheme, dtype, shape),
            Scheme::Groups(scheme) => scheme.output_tensors(shape),
        }
    }
}

/// How bitsandbytes quantizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockScheme {
    /// NF4 or FP4.
    pub format: BlockFormat,
    /// Consecutive elements that share one absmax.
    pub block_size: BlockSize,
    /// Whether absmax is itself quantized, to 8 bits ("double" or "nested" quantization).
    pub double_quant: bool,
}
