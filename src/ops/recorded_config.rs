//! config.json of a converted checkpoint: it must tell clients what the manifest says.

use serde_json::Value;

use crate::checkpoint::Config;
use crate::dtype::FloatDtype;
use crate::layout::compressed_tensors::{GUARD_KEY, MISREAD_EXPERTS, RANDOM_EXPERTS};
use crate::layout::modelopt;
use crate::manifest::Manifest;
use crate::ops::kept_modules::KeptModules;

/// What config.json says otherwise than the manifest, and what it lists as left unquantized: that is to be compared with the tensors.
pub(crate) fn differences<Tensors>(config: &Config, manifest: &Manifest<Tensors>) -> (Vec<String>, KeptModules) {
    let found = config.values().get("quantization_config");
    if !manifest.recipe.quantizes() {
        let what = || "has a quantization_config, and nothing is quantized".to_owned();
        return (found.map(|_| what()).into_iter().collect(), KeptModules::default());
    }
    let Some(found) = found else {
        return (vec!["has no quantization_config".to_owned()], KeptModules::default());
    };
    let codec = manifest.recipe.codec();
    let expected = codec.quantization_config(FloatDtype::Bfloat16, &[]);
    let mut differences = Vec::new();
    for (key, expected) in expected.as_object().into_iter().flatten() {
        if key == modelopt::BITS && found.get(key).is_none() {
            continue;
        }
        let found = found.get(key).unwrap_or(&Value::Null);
        let is_guard = key == GUARD_KEY && [RANDOM_EXPERTS, MISREAD_EXPERTS].iter().any(|why| found == why);
        if !codec.other_keys().contains(&key.as_str()) && found != expected && !is_guard {
            differences.push(format!("quantization_config's {key} is {found}, expected {expected}"));
        }
    }
    (differences, KeptModules::of(config, found, codec))
}
