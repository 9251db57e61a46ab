//! What is left in tensors' names when a model is saved from inside a wrapper: torch.compile's, DDP's, FSDP's and
//! Lightning's prefixes, and a LoRA
//! adapter that wasn't merged.

use std::borrow::Cow;

/// Parts of names that only wrappers write, wherever they stand.
const PARTS: [&str; 4] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// What PEFT puts around a Linear that has adapters; no wrapper where these are there too.
const OF_PEFT: &str = "base_layer";

/// In the names of all kinds of adapters' matrices.
const ADAPTERS: [&str; 6] = ["lora", "hada_", "lokr_", "ia3_", "oft_", "vera_"];

/// Prefixes that wrappers write before every name, and a model may have of its own before some.
const PREFIXES: [&str; 2] = ["base_model.model.", "module."];

/// Parts of names that an adapter writes, which is none of the model's own.
const OF_ADAPTERS: [&str; 8] = [
    ".lora_A.default.",
    ".lora_B.default.",
    ".lora_embedding_A.",
    ".lora_embedding_B.",
    ".lora_magnitude_vector.",
    ".modules_to_save.default.",
    ".hada_w1_a.",
    ".lokr_w1.",
];

/// The names that a wrapper left something in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wrapper {
    /// Parts that stand in some name.
    parts: Vec<&'static str>,
    /// The prefixes that all names begin with, outermost first.
    prefixes: Vec<&'static str>,
}

impl Wrapper {
    /// What is left in these names.
    pub(crate) fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Wrapper {
        let mut found = Wrapper { parts: parts(names.clone()), prefixes: Vec::new() };
        if names.clone().next().is_none() {
            return found;
        }
        loop {
            let is_before_all = |prefix: &&&str| {
                let all = [&found.prefixes.concat(), **prefix].concat();
                names.clone().all(|name| without(&found.parts, name).starts_with(&all))
            };
            match PREFIXES.iter().find(is_before_all) {
                Some(prefix) => found.prefixes.push(prefix),
                None => return found,
            }
        }
    }

    /// A name without what the wrapper left in it.
    pub(crate) fn unwrap<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let plain = without(&self.parts, name);
        let prefix = self.prefixes.concat();
        match plain.strip_prefix(&prefix) {
            Some(rest) if !prefix.is_empty() => rest.to_owned().into(),
            _ => plain,
        }
    }

    /// What is left, in words; none if nothing is.
    pub(crate) fn found(&self) -> Option<String> {
        let parts = self.parts.iter().map(|part| format!("{part}."));
        let all: Vec<String> = parts.chain(self.prefixes.iter().map(|&text| text.to_owned())).collect();
        (!all.is_empty()).then(|| all.join(" and "))
    }
}

/// The parts of wrappers that stand in some of these names.
fn parts<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<&'static str> {
    let stands =
        |part: &&str| names.clone().any(|name| name.contains(part) && name.split('.').any(|each| each == *part));
    let mut found: Vec<&'static str> = PARTS.into_iter().filter(stands).collect();
    let is_adapters = |name: &str| ADAPTERS.iter().any(|adapter| name.contains(adapter));
    if stands(&OF_PEFT) && !names.clone().any(is_adapters) {
        found.push(OF_PEFT);
    }
    found
}

fn without<'a>(parts: &[&str], name: &'a str) -> Cow<'a, str> {
    if !parts.iter().any(|part| name.contains(part)) {
        return name.into();
    }
    name.split('.').filter(|part| !parts.contains(part)).collect::<Vec<_>>().join(".").into()
}

/// The first of these names that an adapter wrote which isn't merged into the model.
///
/// Some models have LoRA matrices of their own (Phi-4-multimodal's `lora_A.speech`): these aren't called as PEFT calls an
/// adapter that was given no name.
pub(crate) fn unmerged<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let wrapped = names.clone().any(|name| name.starts_with(PREFIXES[0]));
    let is_adapters = |name: &&str| {
        let is_lora = name.contains(".lora_A.") || name.contains(".lora_B.") || name.contains(".base_layer.");
        OF_ADAPTERS.iter().any(|part| name.contains(part)) || (wrapped && is_lora)
    };
    names.clone().find(is_adapters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_unwrapped(names: &[&str], expected: &[&str]) {
        let wrapper = Wrapper::of(names.iter().copied());
        let found: Vec<Cow<'_, str>> = names.iter().map(|name| wrapper.unwrap(name)).collect();
        assert_eq!(found, expected);
        assert_eq!(wrapper.found().is_some(), names != expected);
    }

    #[test]
    fn what_wrappers_wrote_is_taken_out_of_names() {
        assert_unwrapped(
            &["_orig_mod.model.a.weight", "_orig_mod.lm_head.weight"],
            &["model.a.weight", "lm_head.weight"],
        );
        assert_unwrapped(&["model._orig_mod.a.weight", "b.weight"], &["model.a.weight", "b.weight"]);
        assert_unwrapped(&["module.a.weight", "module.b"], &["a.weight", "b"]);
        assert_unwrapped(&["module._orig_mod.a", "module._orig_mod.b"], &["a", "b"]);
        assert_unwrapped(&["_forward_module.module.a", "_forward_module.module.b"], &["a", "b"]);
        assert_unwrapped(&["_orig_mod.module.a", "_orig_mod.module.b"], &["a", "b"]);
        assert_unwrapped(&["base_model.model.model.a", "base_model.model.b"], &["model.a", "b"]);
        assert_unwrapped(&["a.q.base_layer.weight", "a.norm.weight"], &["a.q.weight", "a.norm.weight"]);
        assert_unwrapped(&["layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q"], &["layers.0.q"]);
    }

    #[test]
    fn a_models_own_names_stay() {
        let with_lora = &["q.base_layer.weight", "q.lora_A.speech.weight"][..];
        for names in [
            with_lora,
            &["module.a", "b"],
            &["my_orig_mod.a", "x_orig_mod"],
            &["model.a"],
            &["base_model.model_x"],
            &[],
        ] {
            assert_unwrapped(names, names);
        }
    }

    #[test]
    fn adapters_that_are_not_merged_are_told_from_a_models_own_low_rank_matrices() {
        let found = |names: &[&'static str]| unmerged(names.iter().copied());
        let peft =
            ["base_model.model.a.weight", "base_model.model.q.base_layer.weight", "base_model.model.q.lora_A.x.weight"];
        assert_eq!(found(&peft), Some(peft[1]));
        assert_eq!(found(&["q.base_layer.weight", "q.lora_A.default.weight"]), Some("q.lora_A.default.weight"));
        assert_eq!(found(&["q.base_layer.weight", "q.lora_A.speech.weight", "q.lora_B.vision.weight"]), None);
        assert_eq!(found(&["base_model.model.a.weight"]), None);
    }
}
