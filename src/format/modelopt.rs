//! What a weight is in ModelOpt's layout of NVFP4, and the two places that say so.

use serde_json::{Value, json};

use super::{GroupScheme, OutputDtype, OutputKind, OutputTensor};

/// The file beside config.json that says how weights are quantized.
pub const CONFIG_NAME: &str = "hf_quant_config.json";

/// The tensors that a weight `[rows, columns]`, of whole groups, becomes; the codes keep its name.
pub fn output_tensors(scheme: &GroupScheme, shape: &[u64]) -> Vec<OutputTensor> {
    let &[rows, columns] = shape else { unreachable!("only matrices are quantized in groups") };
    let tensor = |kind, suffix, dtype, shape| OutputTensor { kind, suffix, dtype, shape };
    let groups = columns / scheme.group_len(columns);
    vec![
        tensor(OutputKind::Packed, "", OutputDtype::U8, vec![rows, columns / 2]),
        tensor(OutputKind::Scale, "_scale", OutputDtype::F8E4M3, vec![rows, groups]),
        tensor(OutputKind::GlobalScale, "_scale_2", OutputDtype::F32, vec![]),
    ]
}

/// config.json's `quantization_config`; `ignore` are the modules left unquantized.
pub fn quantization_config(ignore: &[String]) -> Value {
    json!({"quant_method": "modelopt", "ignore": ignore})
}

/// The content of [`CONFIG_NAME`].
pub fn config_text(ignore: &[String]) -> String {
    format!("{:#}\n", json!({"quantization": {"exclude_modules": ignore}}))
}
