//! Linears that stay in 16 bits for the clients of a format.

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::coded_sources::command;
use crate::support::decisions::{assert_decided, decisions, dense, dry_run, folder, tensors};
use crate::support::{Folder, Tensor};

const NEMOTRON: &[(&str, &[usize])] = &[
    ("backbone.embeddings.weight", &[320, 128]),
    ("backbone.layers.0.mixer.in_proj.weight", &[640, 128]),
    ("backbone.layers.0.mixer.out_proj.weight", &[128, 256]),
    ("backbone.layers.0.mixer.conv1d.weight", &[640, 1, 4]),
    ("backbone.layers.0.norm.weight", &[128]),
    ("backbone.layers.1.mixer.q_proj.weight", &[128, 128]),
    ("backbone.layers.1.mixer.o_proj.weight", &[128, 128]),
];

fn skipped(folder: &Folder, key: &str) -> Vec<String> {
    let config: Value = folder.read_json("config.json");
    serde_json::from_value(config["quantization_config"][key].clone()).unwrap()
}

#[test]
fn what_training_kernels_read_raw_is_kept_in_formats_that_are_trained_with() {
    let folder = folder(&json!({"model_type": "nemotron_h"}), &tensors(NEMOTRON.iter().copied()));
    let kernel = "mamba2_split_conv1d_scan_combined";
    let others = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.1.mixer.o_proj.weight"];
    for format in ["nf4", "fp4"] {
        let decided = decisions(&folder, &["--format", format]);
        assert_decided(&decided, &[("backbone.layers.0.mixer.out_proj.weight", kernel)], &others);
    }
    let decided = decisions(&folder, &["--format", "int4"]);
    assert_decided(&decided, &[], &["backbone.layers.0.mixer.out_proj.weight"]);
    folder.convert(&[]).ok();
    assert!(skipped(&folder, "llm_int8_skip_modules").contains(&"model.layers.0.mixer.out_proj".to_owned()));
    let manifest = folder.read_json("prequant.json").to_string();
    assert!(manifest.contains(kernel), "the manifest says why");
    let decided = decisions(&folder, &["--include", r"mixer\.out_proj"]);
    assert_decided(&decided, &[], &["backbone.layers.0.mixer.out_proj.weight"]);
}

#[test]
fn selective_scans_read_three_projections_raw() {
    let shapes = [
        ("backbone.embeddings.weight", &[320, 128][..]),
        ("backbone.layers.0.mixer.in_proj.weight", &[512, 128]),
        ("backbone.layers.0.mixer.x_proj.weight", &[64, 256]),
        ("backbone.layers.0.mixer.dt_proj.weight", &[256, 32]),
        ("backbone.layers.0.mixer.out_proj.weight", &[128, 256]),
    ];
    for model_type in ["mamba", "falcon_mamba"] {
        let decided = decisions(&folder(&json!({"model_type": model_type}), &tensors(shapes)), &[]);
        let kept = ["x_proj", "dt_proj", "out_proj"].map(|name| format!("backbone.layers.0.mixer.{name}.weight"));
        let kept: Vec<(&str, &str)> = kept.iter().map(|name| (name.as_str(), "mamba_inner_fn")).collect();
        assert_decided(&decided, &kept, &["backbone.layers.0.mixer.in_proj.weight"]);
    }
}

/// Qwen2.5-VL's tower and its merger beside the language model.
fn with_a_tower() -> Vec<Tensor> {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("visual.blocks.0.attn.qkv.weight", &[384, 128][..]),
        ("visual.blocks.0.mlp.gate_proj.weight", &[3420, 128]),
        ("visual.blocks.0.mlp.down_proj.weight", &[128, 3420]),
        ("visual.merger.mlp.0.weight", &[512, 512]),
    ]));
    all
}

#[test]
fn towers_and_projectors_are_kept_in_formats_that_are_served() {
    let config = json!({"model_type": "qwen2_5_vl", "vision_config": {"model_type": "qwen2_5_vl"}});
    let tower = folder(&config, &with_a_tower());
    let kept = [
        ("visual.blocks.0.attn.qkv.weight", "served in 16 bits"),
        ("visual.blocks.0.mlp.gate_proj.weight", "served in 16 bits"),
        ("visual.merger.mlp.0.weight", "served in 16 bits"),
    ];
    for flags in [&["--format", "int4"][..], &["--format", "nvfp4", "--layout", "modelopt"], &["--format", "mxfp4"]] {
        assert_decided(&decisions(&tower, flags), &kept, &["model.layers.0.mlp.up_proj.weight"]);
    }
    assert_decided(&decisions(&tower, &["--format", "nf4"]), &[], &["visual.blocks.0.attn.qkv.weight"]);
    let decided = decisions(&tower, &["--format", "int4", "--include", r"^visual\.blocks.*qkv"]);
    assert_decided(&decided, &kept[1..], &["visual.blocks.0.attn.qkv.weight"]);
    tower.convert(&["--format", "int4"]).ok();
    assert!(skipped(&tower, "ignore").iter().any(|entry| entry.ends_with("visual.blocks.0.attn.qkv")));
    // Other architectures' towers, and those of none that is known.
    let mut all = dense("language_model.model.", 128);
    all.extend(tensors([
        ("vision_model.model.layers.0.mlp.fc1.weight", &[256, 128][..]),
        ("vision_model.vision_adapter.mlp.fc1.weight", &[128, 128]),
        ("audio_tower.layers.0.fc1.weight", &[256, 128]),
        ("multi_modal_projector.linear_1.weight", &[128, 128]),
    ]));
    for model_type in ["llama4", "never_heard_of"] {
        let decided = decisions(&folder(&json!({"model_type": model_type}), &all), &["--format", "int4"]);
        let kept = all.iter().map(|tensor| tensor.name.as_str()).filter(|name| !name.contains("language_model"));
        let kept: Vec<(&str, &str)> = kept.map(|name| (name, "served in 16 bits")).collect();
        assert_decided(&decided, &kept, &["language_model.model.layers.0.mlp.up_proj.weight"]);
    }
}

#[test]
fn words_tell_towers_where_nothing_is_known_of_the_model() {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("image_encoder.layers.0.attn.q_proj.weight", &[128, 128][..]),
        ("model.speech_encoder.blocks.0.mlp.fc1.weight", &[256, 128]),
        ("img_projector.linear_1.weight", &[128, 128]),
        ("model.layers.0.mlp.vision_mlp.up_proj.weight", &[256, 128]),
    ]));
    let folder = folder(&json!({"model_type": "never_heard_of", "vision_config": {}}), &all);
    let kept = [
        ("image_encoder.layers.0.attn.q_proj.weight", "image_encoder: vision, audio"),
        ("model.speech_encoder.blocks.0.mlp.fc1.weight", "speech_encoder: vision, audio"),
        ("img_projector.linear_1.weight", "img_projector: vision, audio"),
    ];
    let linears = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.vision_mlp.up_proj.weight"];
    assert_decided(&decisions(&folder, &["--format", "int4"]), &kept, &linears);
    assert_decided(&decisions(&folder, &["--format", "nf4"]), &[], &["image_encoder.layers.0.attn.q_proj.weight"]);
}

/// vLLM's Qwen3-Next makes it a plain Linear if the format is ModelOpt's NVFP4.
#[test]
fn modelopts_layout_keeps_what_joins_the_inputs_of_qwens_multi_token_prediction() {
    let mut all = dense("model.", 128);
    all.extend(tensors([("mtp.fc.weight", &[128, 256][..]), ("mtp.layers.0.self_attn.o_proj.weight", &[128, 128])]));
    let folder = folder(&json!({"model_type": "qwen3_next"}), &all);
    let decided = decisions(&folder, &["--format", "nvfp4", "--layout", "modelopt"]);
    assert_decided(&decided, &[("mtp.fc.weight", "vLLM")], &["mtp.layers.0.self_attn.o_proj.weight"]);
    assert_decided(&decisions(&folder, &["--format", "nvfp4"]), &[], &["mtp.fc.weight"]);
}

#[test]
fn a_name_in_modelopts_list_means_no_quantized_module_whose_name_goes_on() {
    let mut all = dense("model.", 128);
    let extended = "model.embed_tokens_extend.audio_embed.down_proj_for_speech.weight";
    all.extend(tensors([(extended, &[128, 128][..]), ("model.embed_tokens.weight", &[320, 128])]));
    let folder = folder(&json!({"model_type": "phi4_multimodal"}), &all);
    let flags = ["--format", "nvfp4", "--layout", "modelopt", "--include", "down_proj_for_speech"];
    assert_decided(&decisions(&folder, &flags), &[], &[extended]);
    folder.convert(&flags).ok();
    let entries = skipped(&folder, "ignore");
    assert!(entries.contains(&"model.embed_token[s]".to_owned()), "{entries:?}");
    // To vLLM a name means every module that it is part of.
    assert!(entries.iter().all(|entry| !extended.contains(entry.trim_end_matches('*'))), "{entries:?}");
    command(&["verify".as_ref(), folder.destination().as_ref()]).ok();
}

#[test]
fn what_joins_multi_token_predictions_inputs_is_kept_in_formats_that_are_served() {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("model.layers.1.eh_proj.weight", &[128, 256][..]),
        ("model.layers.1.self_attn.o_proj.weight", &[128, 128]),
    ]));
    let folder = folder(&json!({"model_type": "deepseek_v3", "num_hidden_layers": 1}), &all);
    let kept = [("model.layers.1.eh_proj.weight", "vLLM")];
    assert_decided(&decisions(&folder, &["--format", "int4"]), &kept, &["model.layers.1.self_attn.o_proj.weight"]);
    assert_decided(&decisions(&folder, &[]), &[], &["model.layers.1.eh_proj.weight"]);
}

/// vLLM's draft models of plain Linears have no 4-bit ones.
#[test]
fn draft_models_of_plain_linears_are_kept_in_formats_that_are_served() {
    let linears = ["0.0.linear.weight", "1.0.linear.weight"];
    let all = tensors(linears.map(|name| (name, &[128, 128][..])));
    for model_type in ["medusa", "mlp_speculator"] {
        let folder = folder(&json!({"model_type": model_type}), &all);
        folder.convert(&["--format", "int4"]).fails(3, &["nothing to quantize", model_type]);
        let flags = ["--format", "int4", "--include", r"^1\."];
        assert_decided(&decisions(&folder, &flags), &[(linears[0], "plain Linears")], &linears[1..]);
    }
}

/// A layer of linear attention with `heads` value heads.
fn linear_attention(heads: usize) -> Folder {
    let mut all = dense("model.language_model.", 256);
    let name = |name: &str| format!("model.language_model.layers.0.linear_attn.{name}.weight");
    let shapes = [
        ("in_proj_qkv", [768, 256]),
        ("in_proj_z", [384, 256]),
        ("in_proj_a", [heads, 256]),
        ("in_proj_b", [heads, 256]),
        ("out_proj", [256, 384]),
    ];
    all.extend(shapes.map(|(end, shape)| Tensor::random(&name(end), Dtype::BF16, &shape)));
    let config = json!({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}});
    folder(&config, &all)
}

#[test]
fn rows_that_no_kernel_takes_are_kept_with_all_that_is_merged_with_them() {
    let name = |name: &str| format!("model.language_model.layers.0.linear_attn.{name}.weight");
    let [a, b, z] = ["in_proj_a", "in_proj_b", "in_proj_z"].map(name);
    let why = "96 rows with what vLLM merges it with, not a multiple of 64";
    let decided = decisions(&linear_attention(48), &["--format", "int4"]);
    assert_decided(&decided, &[(&a, why), (&b, why)], &[&z]);
    assert_decided(&decisions(&linear_attention(48), &[]), &[], &[&a, &b]);
    assert_decided(&decisions(&linear_attention(32), &["--format", "int4"]), &[], &[&a, &b]);
    let decided = decisions(&linear_attention(48), &["--format", "int4", "--include", "in_proj_[ab]"]);
    assert_decided(&decided, &[], &[&a, &b]);
}

#[test]
fn what_two_gpus_cant_share_is_warned_of() {
    let warning = |heads: usize, flags: &[&str]| {
        let report = dry_run(&linear_attention(heads), flags);
        let warnings: Vec<String> = serde_json::from_value(report["warnings"].clone()).unwrap();
        warnings.into_iter().find(|warning| warning.contains("tensor parallelism"))
    };
    let said = warning(48, &["--format", "int4"]).unwrap();
    assert!(said.contains("linear_attn.out_proj") && said.contains("384 columns"), "{said}");
    let said = warning(32, &["--format", "int4", "--group-size", "32"]).unwrap();
    assert!(said.contains("in_proj_a") && said.contains("64 rows"), "{said}");
    assert_eq!(warning(64, &["--format", "int4", "--group-size", "32"]), None);
    assert_eq!(warning(48, &[]), None);
}

#[test]
fn a_linear_of_its_own_that_no_kernel_takes_is_warned_of() {
    let all = tensors([("model.layers.0.self_attn.o_proj.weight", &[96, 128][..])]);
    let odd = folder(&json!({"model_type": "llama"}), &all);
    let warned = |flags: &[&str]| dry_run(&odd, flags)["warnings"].to_string().contains("(96 rows) can't be served");
    assert!(warned(&["--format", "int4"]));
    assert!(!warned(&[]));
}
