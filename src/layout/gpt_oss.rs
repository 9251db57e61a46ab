//! What experts are in gpt-oss's own layout: MXFP4 blocks and their scales in place of a fused parameter, as its
//! checkpoint on the hub has them.

use std::borrow::Cow;

use serde_json::{Value, json};

use crate::format::Codec;
use crate::layout::{OutputDtype, OutputKind, OutputTensor};

/// The tensors that experts `[experts, rows, columns]` become; columns are what products sum over.
pub fn output_tensors(codec: &Codec, shape: &[u64]) -> Vec<OutputTensor> {
    let &[experts, rows, columns] = shape else { unreachable!("only fused experts are quantized in this layout") };
    let group = codec.block_len(columns);
    let tensor =
        |kind, suffix, shape| OutputTensor { kind, suffix: Cow::Borrowed(suffix), dtype: OutputDtype::U8, shape };
    vec![
        tensor(OutputKind::Packed, "_blocks", vec![experts, rows, columns / group, group / 2]),
        tensor(OutputKind::Scale, "_scales", vec![experts, rows, columns / group]),
    ]
}

/// config.json's `quantization_config`; `kept` are the modules left unquantized.
pub fn quantization_config(kept: &[String]) -> Value {
    json!({"modules_to_not_convert": kept, "quant_method": "mxfp4"})
}
