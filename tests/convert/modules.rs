//! Which weights are quantized and which modules config.json lists as kept, for checkpoints whose names mislead.

use std::process::Command;

use safetensors::tensor::Dtype;

use crate::support::{Folder, Run, Tensor, read_tensors};

/// A folder with a bf16 checkpoint of these names and shapes.
fn folder(config: &str, tensors: &[(&str, &[usize])]) -> Folder {
    let folder = Folder::new("llama");
    folder.write("config.json", config);
    let tensors = tensors.iter().map(|(name, shape)| Tensor::random(name, Dtype::BF16, shape));
    folder.write_shards(&[tensors.collect()]);
    folder
}

/// What a conversion lists as kept, and the weights that it quantizes. `verify` takes the result.
fn converted(folder: &Folder, flags: &[&str]) -> (Vec<String>, Vec<String>) {
    folder.convert(flags).ok();
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("verify").arg(folder.destination())).ok();
    let config = &folder.read_json("config.json")["quantization_config"];
    let listed = ["llm_int8_skip_modules", "ignore"].iter().find_map(|key| config[*key].as_array()).unwrap();
    let listed = listed.iter().map(|entry| entry.as_str().unwrap().to_owned()).collect();
    let tensors = read_tensors(&folder.destination());
    let quantized =
        tensors.keys().filter_map(|name| [".absmax", "_packed"].iter().find_map(|end| name.strip_suffix(end)));
    (listed, quantized.map(str::to_owned).collect())
}

#[test]
fn no_entry_is_the_beginning_of_a_quantized_modules_name() {
    let encoder = "model.embed_tokens_extend.audio_embed.encoder.encoders.0.feed_forward_in.gate_up_proj.weight";
    let bias = "model.embed_tokens_extend.audio_embed.encoder.relative_attention_bias_layer.bias_values.weight";
    let folder = folder(
        r#"{"model_type": "phi4_multimodal", "architectures": ["Phi4MultimodalForCausalLM"]}"#,
        &[
            ("model.embed_tokens.weight", &[96, 64]),
            ("model.layers.0.self_attn.o_proj.weight", &[64, 64]),
            (encoder, &[128, 64]),
            (bias, &[64, 64]),
        ],
    );
    let (listed, quantized) = converted(&folder, &[]);
    assert_eq!(quantized, [encoder, "model.layers.0.self_attn.o_proj.weight"]);
    assert!(listed.iter().all(|entry| !entry.contains("embed_tokens")), "{listed:?}");
}

#[test]
fn an_entry_that_would_mean_a_quantized_module_too_ends_with_its_own_name() {
    // A router that isn't known to be bare, beside a first layer's dense gate: `mlp.gate` begins `mlp.gate_proj`.
    let folder = folder(
        r#"{"model_type": "never-heard-of"}"#,
        &[
            ("model.layers.0.mlp.gate.weight", &[8, 64]),
            ("model.layers.0.mlp.gate_proj.weight", &[64, 64]),
            ("model.layers.0.self_attn.q_proj.weight", &[64, 64]),
        ],
    );
    let (listed, quantized) = converted(&folder, &[]);
    assert!(quantized.contains(&"model.layers.0.mlp.gate_proj.weight".to_owned()), "{quantized:?}");
    assert!(listed.contains(&r"model\.layers\.0\.mlp\.gate$".to_owned()), "{listed:?}");
}

#[test]
fn entries_have_the_loaded_models_names() {
    let folder = folder(
        r#"{"model_type": "ernie4_5_vl_moe", "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
            "text_config": {"model_type": "ernie4_5_vl_moe_text"}}"#,
        &[
            ("model.vision_model.patch_embed.proj.weight", &[64, 96]),
            ("model.vision_model.blocks.0.attn.qkv.weight", &[192, 64]),
            ("model.layers.0.self_attn.q_proj.weight", &[64, 64]),
        ],
    );
    let (listed, _) = converted(&folder, &[]);
    assert!(listed.contains(&"model.vision_tower.patch_embed.proj".to_owned()), "{listed:?}");
}

#[test]
fn tied_heads_are_listed_whatever_they_are_called_and_so_are_those_of_other_classes() {
    let folder = folder(
        r#"{"model_type": "biogpt", "architectures": ["BioGptForCausalLM"], "tie_word_embeddings": true}"#,
        &[("biogpt.embed_tokens.weight", &[96, 64]), ("biogpt.layers.0.fc1.weight", &[128, 64])],
    );
    let (listed, quantized) = converted(&folder, &[]);
    assert_eq!(quantized, ["biogpt.layers.0.fc1.weight"]);
    for head in ["output_projection", "score", "classifier"] {
        assert!(listed.contains(&head.to_owned()), "{head}: {listed:?}");
    }
}

#[test]
fn experts_that_are_modules_weights_are_experts_and_their_routers_are_listed_alone() {
    let tensors: &[(&str, &[usize])] = &[
        ("model.layers.0.mlp.input_linear.weight", &[4, 128, 64]),
        ("model.layers.0.mlp.router.layer.weight", &[4, 64]),
        ("model.layers.0.self_attention.experts.input_linear.weight", &[4, 64, 64]),
        ("model.layers.0.self_attention.experts.router.layer.weight", &[4, 64]),
        ("model.layers.0.self_attention.kv_proj.weight", &[128, 64]),
    ];
    let folder = folder(r#"{"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"]}"#, tensors);
    let (listed, quantized) = converted(&folder, &[]);
    let experts = [0, 2, 4].map(|i| tensors[i].0);
    assert_eq!(quantized, experts);
    for router in [1, 3].map(|i| tensors[i].0.strip_suffix(".weight").unwrap()) {
        assert!(listed.contains(&router.to_owned()), "{router}: {listed:?}");
    }
}

#[test]
fn embeddings_of_known_types_are_kept_whatever_they_are_called() {
    let name = "encoder.layers.0.attn.rel_pos_emb.weight";
    let folder = folder(
        r#"{"model_type": "granite_speech", "architectures": ["GraniteSpeechForConditionalGeneration"]}"#,
        &[(name, &[64, 64]), ("encoder.layers.0.attn.to_q.weight", &[64, 64])],
    );
    let (_, quantized) = converted(&folder, &[]);
    assert_eq!(quantized, ["encoder.layers.0.attn.to_q.weight"]);
}

#[test]
fn a_tower_of_which_nothing_is_quantized_is_one_pattern_in_a_long_list() {
    let layers = 0..40;
    let tower =
        layers.clone().flat_map(|i| ["fc1", "fc2"].map(|fc| format!("model.visual.blocks.{i}.mlp.{fc}.weight")));
    let gates = layers.clone().map(|i| format!("model.layers.{i}.mlp.shared_expert_gate.weight"));
    let linears = layers.map(|i| format!("model.layers.{i}.mlp.up_proj.weight"));
    let names: Vec<String> = tower.chain(gates).chain(linears).collect();
    let shapes: Vec<(&str, &[usize])> = names.iter().map(|name| (&**name, &[64, 64][..])).collect();
    let folder = folder(r#"{"model_type": "never-heard-of"}"#, &shapes);
    let (listed, quantized) = converted(&folder, &["--format", "int4", "--group-size", "32", "--exclude", "visual"]);
    assert_eq!(quantized.len(), 40);
    assert_eq!(listed, [r"re:(.*\.)?layers\.\d+\.mlp\.shared_expert_gate$", r"re:(.*\.)?visual\..*", "lm_head"]);
}

#[test]
fn a_diffusers_models_list_is_spelled_as_diffusers_reads_it() {
    let flux = folder(
        r#"{"_class_name": "FluxTransformer2DModel"}"#,
        &[
            ("transformer_blocks.0.attn.to_q.weight", &[64, 64]),
            ("single_transformer_blocks.0.attn.to_q.weight", &[64, 64]),
            ("single_transformer_blocks.0.proj_out.weight", &[64, 64]),
            ("proj_out.weight", &[64, 64]),
        ],
    );
    // transformers would take the one for the other's end; diffusers knows no expressions, which tell them apart there.
    let (listed, quantized) = converted(&flux, &["--exclude", "^transformer_blocks"]);
    assert!(listed.contains(&"transformer_blocks.0.attn.to_q".to_owned()), "{listed:?}");
    for name in ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out", "proj_out"] {
        assert!(quantized.contains(&format!("{name}.weight")), "{name}: {quantized:?}");
    }
    assert!(listed.iter().all(|entry| !entry.contains(['$', '\\'])), "{listed:?}");
    // A name that is another's last part can't be said alone.
    let run = flux.convert(&["--exclude", "^proj_out", "--force"]);
    run.fails(2, &["module \"proj_out\"", "\"single_transformer_blocks.0.proj_out\""]);

    let kept = folder(
        r#"{"_class_name": "MiniMaxH3Transformer3DModel"}"#,
        &[("proj_out.weight", &[128, 64]), ("blocks.0.attn1.to_q.weight", &[64, 64])],
    );
    assert_eq!(converted(&kept, &[]).1, ["blocks.0.attn1.to_q.weight"]);
    let why = crate::support::decisions::dry_run(&kept, &[]).to_string();
    assert!(why.contains("diffusers keeps it in f32"), "{why}");
}

#[test]
fn towers_that_are_models_of_their_own_share_names_which_no_list_has() {
    let folder = folder(
        r#"{"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {"model_type": "clip_text_model"}}"#,
        &[
            ("text_model.encoder.layers.0.mlp.fc1.weight", &[64, 64]),
            ("vision_model.encoder.layers.0.mlp.fc1.weight", &[64, 64]),
        ],
    );
    let (listed, quantized) = converted(&folder, &["--format", "int4", "--group-size", "32"]);
    assert_eq!(quantized, ["text_model.encoder.layers.0.mlp.fc1.weight"]);
    let fc1 = |entry: &&String| entry.ends_with("mlp.fc1");
    assert_eq!(listed.iter().filter(fc1).collect::<Vec<_>>(), ["vision_model.encoder.layers.0.mlp.fc1"]);
}

#[test]
fn a_head_that_is_tied_is_listed_in_every_layout() {
    for (format, extra) in [("nf4", &[][..]), ("int4", &["--group-size", "32"]), ("nvfp4", &["--layout", "modelopt"])] {
        let folder = folder(
            r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true}"#,
            &[("model.embed_tokens.weight", &[96, 64]), ("model.layers.0.mlp.up_proj.weight", &[128, 64])],
        );
        let (listed, quantized) = converted(&folder, &[&["--format", format], extra].concat());
        assert!(listed.contains(&"lm_head".to_owned()), "{format}: {listed:?}");
        assert_eq!(quantized.len(), usize::from(!extra.contains(&"modelopt")), "{format}");
    }
}
