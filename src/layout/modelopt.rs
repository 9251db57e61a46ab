//! What a weight is in ModelOpt's layout of NVFP4, and the two places that say so.

use std::borrow::Cow;

use serde_json::{Value, json};

use crate::dtype::FloatDtype;
use crate::error::Result;
use crate::format::Codec;
use crate::layout::reader::number;
use crate::layout::{OutputDtype, OutputKind, OutputTensor, Stored, StoredWeight};

/// The key of the modules left unquantized.
pub(crate) const KEPT_MODULES: &str = "ignore";
/// The key of what wrote the checkpoint.
pub(crate) const PRODUCER: &str = "producer";
/// The key of a code's bits. ModelOpt itself doesn't write it; counters of parameters, the hub's among them, take a byte of two codes
/// for one parameter without it. 0.1.0 didn't write it either.
pub(crate) const BITS: &str = "bits";

/// The end of the name of the scales, after the weight's.
pub(crate) const SCALE: &str = "_scale";
/// The same of the scale of all scales.
pub(crate) const TENSOR_SCALE: &str = "_scale_2";

/// The tensors that a weight `[rows, columns]`, of whole groups, becomes; the codes keep its name.
pub(crate) fn output_tensors(codec: &Codec, shape: &[u64]) -> Vec<OutputTensor> {
    let &[rows, columns] = shape else { unreachable!("only matrices are quantized in groups") };
    let tensor = |kind, suffix, dtype, shape| OutputTensor { kind, suffix: Cow::Borrowed(suffix), dtype, shape };
    let groups = columns / codec.block_len(columns);
    vec![
        tensor(OutputKind::Packed, "", OutputDtype::U8, vec![rows, columns / 2]),
        tensor(OutputKind::Scale, SCALE, OutputDtype::F8E4M3, vec![rows, groups]),
        tensor(OutputKind::GlobalScale, TENSOR_SCALE, OutputDtype::Float(FloatDtype::Float32), vec![]),
    ]
}

/// What a weight's tensors say of it; clients decode to the model's dtype.
///
/// # Errors
/// When one is missing, or isn't what the others want.
pub(crate) fn read(codec: &Codec, weight: &mut dyn StoredWeight, model: FloatDtype) -> Result<Stored> {
    let codes = weight.info(OutputKind::Packed)?;
    let &[rows, packed] = &codes.shape[..] else {
        return Err(weight.malformed(format!("{:?} has the shape {:?}", codes.name, codes.shape)));
    };
    let scale = number(weight, OutputKind::GlobalScale)?;
    let shape = vec![rows, packed.saturating_mul(2)];
    Stored::of_rows(weight, shape, model, |columns| codec.coding(columns, Some(scale)))
}

/// What clients tell the format by. ModelOpt's own word for weights alone is `W4A16_NVFP4`; with this one axolotl takes it too, and
/// vLLM sees from `config_groups` that no inputs are quantized.
const QUANT_ALGO: &str = "NVFP4";

/// config.json's `quantization_config`; `ignore` are the modules left unquantized.
pub(crate) fn quantization_config(codec: &Codec, ignore: &[String]) -> Value {
    let weights = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": codec.block_len(0)});
    json!({
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        (KEPT_MODULES): ignore,
        "quant_algo": QUANT_ALGO,
        (PRODUCER): producer(),
        "quant_method": "modelopt",
        (BITS): 4,
    })
}

/// The content of [`QUANT_CONFIG_NAME`](crate::checkpoint::QUANT_CONFIG_NAME).
pub(crate) fn config_text(codec: &Codec, ignore: &[String]) -> String {
    let quantization = json!({
        "quant_algo": QUANT_ALGO,
        "kv_cache_quant_algo": null,
        "group_size": codec.block_len(0),
        "exclude_modules": ignore,
    });
    format!("{:#}\n", json!({(PRODUCER): producer(), "quantization": quantization}))
}

fn producer() -> Value {
    json!({"name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION")})
}
