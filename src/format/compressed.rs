//! What a weight is in compressed-tensors' layout, which vLLM, SGLang and transformers read: the tensors in place of
//! `X.weight`, and config.json's part. As compressed-tensors 0.19.0 writes them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{OutputDtype, OutputKind, OutputTensor};

/// Columns that share a scale in [`GroupScheme::Int4`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(with = "u32")]
pub struct GroupSize(Size);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Size {
    G32,
    G64,
    #[default]
    G128,
}

impl GroupSize {
    /// The number of columns.
    pub fn get(self) -> usize {
        match self.0 {
            Size::G32 => 32,
            Size::G64 => 64,
            Size::G128 => 128,
        }
    }
}

impl TryFrom<u32> for GroupSize {
    type Error = String;

    fn try_from(columns: u32) -> Result<GroupSize, String> {
        match columns {
            32 => Ok(GroupSize(Size::G32)),
            64 => Ok(GroupSize(Size::G64)),
            128 => Ok(GroupSize(Size::G128)),
            _ => Err("expected 32, 64 or 128".to_owned()),
        }
    }
}

impl From<GroupSize> for u32 {
    fn from(size: GroupSize) -> u32 {
        size.get() as u32
    }
}

impl FromStr for GroupSize {
    type Err = String;

    fn from_str(text: &str) -> Result<GroupSize, String> {
        text.parse().map_err(|_| "expected 32, 64 or 128".to_owned()).and_then(|columns: u32| columns.try_into())
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// Formats with a scale for each group of a row's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScheme {
    /// W4A16, symmetric.
    Int4(GroupSize),
    /// MXFP4A16.
    Mxfp4,
    /// NVFP4A16. Weights that clients put together share one global scale.
    Nvfp4,
}

impl GroupScheme {
    /// Columns that share a scale.
    pub fn group_len(self) -> usize {
        match self {
            GroupScheme::Int4(size) => size.get(),
            GroupScheme::Mxfp4 => 32,
            GroupScheme::Nvfp4 => 16,
        }
    }
}

/// The tensors that a weight `[rows, columns]`, of whole groups, becomes.
pub fn output_tensors(scheme: GroupScheme, shape: &[u64]) -> Vec<OutputTensor> {
    let (rows, columns) = match *shape {
        [rows, columns] => (rows, columns),
        _ => unreachable!("only matrices are quantized in groups"),
    };
    let groups = columns / scheme.group_len() as u64;
    let tensor = |kind, suffix, dtype, shape| OutputTensor { kind, suffix, dtype, shape };
    match scheme {
        GroupScheme::Int4(_) => vec![
            tensor(OutputKind::Packed, "_packed", OutputDtype::I32, vec![rows, columns / 8]),
            tensor(OutputKind::Scale, "_scale", OutputDtype::Source, vec![rows, groups]),
            tensor(OutputKind::Shape, "_shape", OutputDtype::I64, vec![2]),
        ],
        GroupScheme::Mxfp4 => vec![
            tensor(OutputKind::Packed, "_packed", OutputDtype::U8, vec![rows, columns / 2]),
            tensor(OutputKind::Scale, "_scale", OutputDtype::U8, vec![rows, groups]),
        ],
        GroupScheme::Nvfp4 => vec![
            tensor(OutputKind::Packed, "_packed", OutputDtype::U8, vec![rows, columns / 2]),
            tensor(OutputKind::Scale, "_scale", OutputDtype::F8E4M3, vec![rows, groups]),
            tensor(OutputKind::GlobalScale, "_global_scale", OutputDtype::F32, vec![1]),
        ],
    }
}

/// The content of [`OutputKind::Shape`].
pub fn shape_bytes(shape: &[u64]) -> Vec<u8> {
    shape.iter().flat_map(|dimension| dimension.to_le_bytes()).collect()
}

/// config.json's `quantization_config`; `ignore` are the Linear modules left unquantized, by whole names or `re:` patterns.
pub fn quantization_config(scheme: GroupScheme, ignore: &[String]) -> Value {
    let (name, format, kind) = match scheme {
        GroupScheme::Int4(_) => ("W4A16", "pack-quantized", "int"),
        GroupScheme::Mxfp4 => ("MXFP4A16", "mxfp4-pack-quantized", "float"),
        GroupScheme::Nvfp4 => ("NVFP4A16", "nvfp4-pack-quantized", "float"),
    };
    let (strategy, scale_dtype) = match scheme {
        GroupScheme::Int4(_) => ("group", Value::Null),
        GroupScheme::Mxfp4 => ("group", Value::from("torch.uint8")),
        GroupScheme::Nvfp4 => ("tensor_group", Value::from("torch.float8_e4m3fn")),
    };
    let weights = json!({
        "actorder": null,
        "block_structure": null,
        "dynamic": false,
        "group_size": scheme.group_len(),
        "num_bits": 4,
        "observer": null,
        "observer_kwargs": {},
        "scale_dtype": scale_dtype,
        "strategy": strategy,
        "symmetric": true,
        "type": kind,
        "zp_dtype": null,
    });
    let group = json!({
        "format": format,
        "input_activations": null,
        "output_activations": null,
        "targets": ["Linear"],
        "weights": weights,
    });
    json!({
        "config_groups": {name: group},
        "format": format,
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.19.0",
    })
}
