//! Vision towers, audio encoders, and what joins them to a language model.

/// A line for each model type whose config has one of its own for what sees or hears: the type, and what the towers and the
/// modules that hand on their outputs are called. The first line, of `*`, has names that say so in any model. From `scripts/make
/// linears`.
const TOWERS: &str = include_str!("data/towers.txt");

/// The same of well-known models whose code isn't transformers': InternVL, MiniCPM, Janus, Molmo, Ovis, Phi-3, Keye, Step.
const OF_REMOTE_CODE: &[&str] = &[
    "aligner",
    "apm",
    "audio_projection_layer",
    "mlp1",
    "mlp_AR",
    "resampler",
    "vision_backbone",
    "vision_embed_tokens",
    "visual_tokenizer",
    "vit_large_projector",
    "vpm",
];

/// The part of a module's name that says that it is in such a tower, in a model of these types, if one does.
pub(crate) fn tower_of<'m>(model_types: &[&str], module: &'m str) -> Option<&'m str> {
    let of_types =
        |line: &&str| line.split(' ').next().is_some_and(|first| first == "*" || model_types.contains(&first));
    let names = TOWERS.lines().filter(of_types).flat_map(|line| line.split(' ').skip(1));
    let names: Vec<&str> = names.chain(OF_REMOTE_CODE.iter().copied()).collect();
    module.split('.').find(|part| names.iter().any(|name| name.eq_ignore_ascii_case(part)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn towers_and_projectors_are_told_from_language_models() {
        for (module, tower) in [
            ("visual.blocks.0.mlp.gate_proj", "visual"),
            ("model.visual.merger.mlp.0", "visual"),
            ("vision_model.model.layers.0.self_attn.q_proj", "vision_model"),
            ("vision_tower.encoder.layers.0.mlp.fc1", "vision_tower"),
            ("multi_modal_projector.linear_1", "multi_modal_projector"),
            ("thinker.audio_tower.layers.0.fc1", "audio_tower"),
            ("mlp1.3", "mlp1"),
            ("vpm.encoder.layers.0.mlp.fc1", "vpm"),
        ] {
            assert_eq!(tower_of(&["never-heard-of"], module), Some(tower), "{module}");
        }
        for module in ["model.language_model.layers.0.mlp.up_proj", "model.layers.0.visualize.up_proj", "lm_head"] {
            assert_eq!(tower_of(&["qwen3_vl"], module), None, "{module}");
        }
        // In most models an encoder is no ear.
        let encoder = "encoder.layers.0.attn.to_q";
        assert_eq!(tower_of(&["granite_speech"], encoder), Some("encoder"));
        assert_eq!(tower_of(&["t5"], encoder), None);
    }
}
