//! What a weight is in ModelOpt's layout of NVFP4, and the two places that say so.

use std::borrow::Cow;

use serde_json::{Value, json};

use crate::dtype::FloatDtype;
use crate::format::Codec;
use crate::layout::{OutputDtype, OutputKind, OutputTensor};

/// The file beside config.json that says how weights are quantized.
pub const CONFIG_NAME: &str = "hf_quant_config.json";

/// The tensors that a weight `[rows, columns]`, of whole groups, becomes; the codes keep its name.
pub fn output_tensors(codec: &Codec, shape: &[u64]) -> Vec<OutputTensor> {
    let &[rows, columns] = shape else { unreachable!("only matrices are quantized in groups") };
    let tensor = |kind, suffix, dtype, shape| OutputTensor { kind, suffix: Cow::Borrowed(suffix), dtype, shape };
    let groups = columns / codec.block_len(columns);
    vec![
        tensor(OutputKind::Packed, "", OutputDtype::U8, vec![rows, columns / 2]),
        tensor(OutputKind::Scale, "_scale", OutputDtype::F8E4M3, vec![rows, groups]),
        tensor(OutputKind::GlobalScale, "_scale_2", OutputDtype::Float(FloatDtype::Float32), vec![]),
    ]
}

/// What clients tell the format by. ModelOpt's own word for weights alone is `W4A16_NVFP4`; with this one axolotl takes it too, and
/// vLLM sees from `config_groups` that no inputs are quantized.
const QUANT_ALGO: &str = "NVFP4";

/// config.json's `quantization_config`; `ignore` are the modules left unquantized.
pub fn quantization_config(codec: &Codec, ignore: &[String]) -> Value {
    let weights = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": codec.block_len(0)});
    json!({
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": ignore,
        "quant_algo": QUANT_ALGO,
        "producer": producer(),
        "quant_method": "modelopt",
    })
}

/// The content of [`CONFIG_NAME`].
pub fn config_text(codec: &Codec, ignore: &[String]) -> String {
    let quantization = json!({
        "quant_algo": QUANT_ALGO,
        "kv_cache_quant_algo": null,
        "group_size": codec.block_len(0),
        "exclude_modules": ignore,
    });
    format!("{:#}\n", json!({"producer": producer(), "quantization": quantization}))
}

fn producer() -> Value {
    json!({"name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION")})
}
