//! What a conversion would do with each tensor, from `--dry-run --json`.

use std::collections::BTreeMap;

use safetensors::tensor::Dtype;
use serde_json::Value;

use super::{Folder, Tensor, serialize};

/// A tensor's decision and the reason for it.
pub type Decisions = BTreeMap<String, (bool, String)>;

/// bf16 tensors of these shapes, each with random numbers.
pub fn tensors<'a>(shapes: impl IntoIterator<Item = (&'a str, &'a [usize])>) -> Vec<Tensor> {
    shapes.into_iter().map(|(name, shape)| Tensor::random(name, Dtype::BF16, shape)).collect()
}

/// A folder with this config and these tensors in one file.
pub fn folder(config: &Value, tensors: &[Tensor]) -> Folder {
    let folder = Folder::new("replaced");
    folder.write("config.json", config.to_string());
    folder.write("model.safetensors", serialize(tensors));
    folder
}

/// What `--dry-run --json` says.
pub fn dry_run(folder: &Folder, flags: &[&str]) -> Value {
    let run = folder.convert(&[&["--dry-run", "--json", "--force"], flags].concat()).ok();
    serde_json::from_str(&run.stdout).unwrap()
}

/// For each tensor whether it is quantized, and why or why not.
pub fn decisions(folder: &Folder, flags: &[&str]) -> Decisions {
    let report = dry_run(folder, flags);
    let decision = |tensor: &Value| {
        let text = |key: &str| tensor[key].as_str().unwrap().to_owned();
        (text("name"), (text("decision") == "quantize", text("reason")))
    };
    report["tensors"].as_array().unwrap().iter().map(decision).collect()
}

/// The names of the tensors that are quantized.
pub fn quantized(folder: &Folder, flags: &[&str]) -> Vec<String> {
    decisions(folder, flags).into_iter().filter(|(_, (quantized, _))| *quantized).map(|(name, _)| name).collect()
}

/// Insists that these tensors are kept, each with these words among its reasons, and that these are quantized.
#[track_caller]
pub fn assert_decided(decisions: &Decisions, kept: &[(&str, &str)], quantized: &[&str]) {
    for (name, words) in kept {
        let (quantized, reason) = decisions.get(*name).unwrap_or_else(|| panic!("no {name}"));
        assert!(!quantized && reason.contains(words), "{name}: {quantized} {reason}");
    }
    for name in quantized {
        let (quantized, reason) = decisions.get(*name).unwrap_or_else(|| panic!("no {name}"));
        assert!(quantized, "{name}: {reason}");
    }
}

/// A dense decoder layer of this hidden size, with all that belongs to a Llama's.
pub fn dense(prefix: &str, hidden: usize) -> Vec<Tensor> {
    let mut all = Vec::new();
    let half = hidden / 2;
    for (end, shape) in [
        ("self_attn.q_proj", &[hidden, hidden][..]),
        ("self_attn.k_proj", &[half, hidden]),
        ("self_attn.v_proj", &[half, hidden]),
        ("self_attn.o_proj", &[hidden, hidden]),
        ("mlp.gate_proj", &[2 * hidden, hidden]),
        ("mlp.up_proj", &[2 * hidden, hidden]),
        ("mlp.down_proj", &[hidden, 2 * hidden]),
        ("input_layernorm", &[hidden]),
        ("post_attention_layernorm", &[hidden]),
    ] {
        all.push(Tensor::random(&format!("{prefix}layers.0.{end}.weight"), Dtype::BF16, shape));
    }
    all
}
