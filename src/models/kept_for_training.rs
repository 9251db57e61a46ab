//! Linears whose weight transformers' own code reads, or casts its input to the dtype of: they can't be bitsandbytes' 4-bit
//! modules, whose weight is packed codes. `scripts/make linears` finds them in the source of every model type.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;

const LIST: &str = include_str!("data/kept_for_training.json");

/// Of each model type: the end of a module's name, and what reads its weight.
static KEPT: LazyLock<HashMap<String, Vec<(String, String)>>> = LazyLock::new(|| {
    #[derive(Deserialize)]
    struct List {
        kept: HashMap<String, HashMap<String, String>>,
    }
    let List { kept } = serde_json::from_str(LIST).expect("scripts/make linears writes it");
    kept.into_iter().map(|(model_type, modules)| (model_type, modules.into_iter().collect())).collect()
});

/// What reads the weight of `module`, in a model of these types: a function, with the class and the method that calls it.
pub(crate) fn reader(model_types: &[&str], module: &str) -> Option<&'static str> {
    let rows = model_types.iter().filter_map(|name| KEPT.get(*name)).flatten();
    let mut found = rows.filter(|(end, _)| ends_with(module, end));
    found.next().map(|(_, reader)| reader.as_str())
}

/// Whether anything is read so in a model of these types.
pub(crate) fn any(model_types: &[&str]) -> bool {
    model_types.iter().any(|name| KEPT.contains_key(*name))
}

/// Whether a module's name, numbers aside, ends with these parts; a single part is the whole name. `*` ends a part that ends in
/// a number.
fn ends_with(module: &str, end: &str) -> bool {
    let mut parts = module.rsplit('.').filter(|part| !part.bytes().all(|byte| byte.is_ascii_digit()));
    let mut expected = end.rsplit('.');
    let matches = expected.all(|expected| {
        parts.next().is_some_and(|part| match expected.strip_suffix('*') {
            Some(start) => part.strip_prefix(start).is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit())),
            None => part == expected,
        })
    });
    matches && (end.contains('.') || parts.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mambas_output_projection_is_told_from_attentions() {
        let reads = |model_type: &str, module: &str| reader(&[model_type], module);
        assert!(reads("nemotron_h", "backbone.layers.0.mixer.out_proj").unwrap().contains("conv1d"));
        assert_eq!(reads("nemotron_h", "backbone.layers.2.mixer.o_proj"), None);
        assert_eq!(reads("llama", "model.layers.0.mixer.out_proj"), None);
        assert_eq!(reads("bamba", "model.layers.0.self_attn.out_proj"), None);
        assert!(reader(&["nothing", "jamba"], "model.layers.0.mamba.dt_proj").is_some());
    }

    #[test]
    fn ends_are_matched_part_by_part() {
        for (module, end, expected) in [
            ("a.b.c", "b.c", true),
            ("a.b.0.c", "b.c", true),
            ("a.xb.c", "b.c", false),
            ("c", "b.c", false),
            ("proj", "proj", true),
            ("attn.proj", "proj", false),
            ("m.expert_12.wo", "expert_*.wo", true),
            ("m.expert_a.wo", "expert_*.wo", false),
        ] {
            assert_eq!(ends_with(module, end), expected, "{module} {end}");
        }
    }

    /// What is kept because mixers of this kind are trained by one fused kernel, whoever uses them.
    #[test]
    fn every_model_type_with_a_fused_mamba_kernel_is_listed() {
        for model_type in ["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2", "mamba"] {
            let ends = &KEPT[model_type];
            assert!(ends.iter().any(|(end, _)| end.ends_with(".out_proj")), "{model_type}");
        }
        for model_type in ["mamba", "falcon_mamba", "jamba"] {
            for name in ["dt_proj", "x_proj"] {
                assert!(KEPT[model_type].iter().any(|(end, _)| end.ends_with(name)), "{model_type} {name}");
            }
        }
    }
}
