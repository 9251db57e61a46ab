//! config.json of a converted checkpoint: it must tell clients what the manifest says.

use serde_json::Value;

use crate::checkpoint::Config;
use crate::dtype::FloatDtype;
use crate::layout::OutputKind;
use crate::manifest::{DecisionRecord, Manifest};
use crate::models::Rules;
use crate::plan::kept_modules::{bitsandbytes, compressed_tensors};

/// What config.json says otherwise.
pub(crate) fn differences(config: &Config, manifest: &Manifest) -> Vec<String> {
    let Some(found) = config.values().get("quantization_config") else {
        return vec!["has no quantization_config".to_owned()];
    };
    let codec = manifest.recipe.codec();
    let expected = codec.quantization_config(FloatDtype::Bfloat16, &[]);
    let mut differences = Vec::new();
    for (key, expected) in expected.as_object().into_iter().flatten() {
        let found = found.get(key).unwrap_or(&Value::Null);
        if !codec.other_keys().contains(&key.as_str()) && found != expected {
            differences.push(format!("quantization_config's {key} is {found}, expected {expected}"));
        }
    }
    differences.extend(kept_module(config, manifest, found));
    differences
}

/// No module that is quantized may be among those that clients are told to leave alone.
fn kept_module(config: &Config, manifest: &Manifest, found: &Value) -> Option<String> {
    let codec = manifest.recipe.codec();
    let key = codec.kept_modules_key();
    let listed = found.get(key).and_then(|list| list.as_array());
    let listed: Vec<&str> = listed.into_iter().flatten().filter_map(|entry| entry.as_str()).collect();
    let quantized = manifest.tensors.iter().filter(|tensor| tensor.decision == DecisionRecord::Quantize);
    let rules = Rules::new(&config.model_types());
    let clash = match codec.layout() {
        None => {
            let weights: Vec<&str> = quantized.flat_map(|tensor| &tensor.sources).map(|s| s.name.as_str()).collect();
            bitsandbytes::clash(&rules, &listed, &weights)
        }
        Some(layout) => {
            let suffix = codec.suffix(OutputKind::Packed).unwrap_or_default();
            let codes = quantized.filter_map(|tensor| tensor.outputs.first()?.name.strip_suffix(&*suffix));
            compressed_tensors::clash(&rules, layout, &listed, &codes.collect::<Vec<_>>())
        }
    };
    clash.map(|(entry, module)| format!("{key} has {entry:?}, but {module:?} is quantized"))
}
