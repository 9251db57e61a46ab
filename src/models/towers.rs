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

/// Words of such names where nothing is known of the model.
const WORDS: &[&str] = &[
    "acoustic",
    "aligner",
    "audio",
    "clip",
    "connector",
    "dino",
    "dinov2",
    "image",
    "images",
    "img",
    "perceiver",
    "pixel",
    "projector",
    "qformer",
    "resampler",
    "siglip",
    "speech",
    "video",
    "vision",
    "visual",
    "vit",
    "whisper",
];

/// Words of a language model that sees or hears itself.
const OF_LANGUAGE_MODELS: &[&str] = &["decoder", "gpt", "language", "llm", "lm", "text"];

/// The part of a module's name that says that it is in such a tower, in a model of these types, if one does. Where transformers doesn't
/// know the model (`known`), words say so in what is around its layers.
pub(crate) fn tower_of<'m>(model_types: &[&str], known: bool, module: &'m str) -> Option<&'m str> {
    let listed = listed_tower(model_types, module);
    listed.or_else(|| if known { None } else { named_tower(module) })
}

/// By the words of names before the first number: what is in a language model's layers isn't a tower of its own.
fn named_tower(module: &str) -> Option<&str> {
    let is_number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
    let around = module.rsplit_once('.')?.0.split('.').take_while(|part| !is_number(part));
    let has =
        |part: &str, words: &[&str]| part.split('_').any(|word| words.iter().any(|of| of.eq_ignore_ascii_case(word)));
    let mut around = around.filter(|part| !has(part, OF_LANGUAGE_MODELS));
    around.find(|part| has(part, WORDS))
}

/// By the names that are known.
fn listed_tower<'m>(model_types: &[&str], module: &'m str) -> Option<&'m str> {
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
            assert_eq!(tower_of(&["never-heard-of"], true, module), Some(tower), "{module}");
        }
        for module in ["model.language_model.layers.0.mlp.up_proj", "model.layers.0.visualize.up_proj", "lm_head"] {
            assert_eq!(tower_of(&["qwen3_vl"], true, module), None, "{module}");
        }
        // In most models an encoder is no ear.
        let encoder = "encoder.layers.0.attn.to_q";
        assert_eq!(tower_of(&["granite_speech"], true, encoder), Some("encoder"));
        assert_eq!(tower_of(&["t5"], true, encoder), None);
    }

    #[test]
    fn where_nothing_is_known_of_the_model_words_tell_towers() {
        for (module, tower) in [
            ("image_encoder.layers.0.fc1", Some("image_encoder")),
            ("model.speech_encoder.blocks.3.attn.q_proj", Some("speech_encoder")),
            ("vit.layers.0.fc1", Some("vit")),
            ("perceiver.proj", Some("perceiver")),
            ("img_projector.0", Some("img_projector")),
            ("audio_lm.layers.0.mlp.up_proj", None),
            ("model.layers.0.mlp.vision_mlp.gate_proj", None),
            ("model.vitality.layers.0.up_proj", None),
            ("vision", None),
        ] {
            assert_eq!(tower_of(&["never-heard-of"], false, module), tower, "{module}");
            assert_eq!(tower_of(&["llama"], true, module), None, "{module}");
        }
    }
}
