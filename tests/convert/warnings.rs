//! What is said of checkpoints that convert, but not to what was meant.

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::decisions::{dense, dry_run, folder, tensors};
use crate::support::{Folder, Tensor};

fn warnings(report: &Value) -> Vec<String> {
    serde_json::from_value(report["warnings"].clone()).unwrap()
}

#[track_caller]
fn assert_warned(folder: &Folder, flags: &[&str], words: &[&str]) {
    let dry = warnings(&dry_run(folder, flags));
    let says = |warning: &String| words.iter().all(|word| warning.contains(word));
    assert!(dry.iter().any(says), "no {words:?} in {dry:#?}");
    let run = folder.convert(&[&["--force"], flags].concat()).ok();
    assert!(words.iter().all(|word| run.stderr.contains(word)), "{}", run.stderr);
}

#[track_caller]
fn assert_not_warned(folder: &Folder, flags: &[&str], word: &str) {
    let dry = warnings(&dry_run(folder, flags));
    assert!(dry.iter().all(|warning| !warning.contains(word)), "{dry:#?}");
}

fn moe(missing: &[&str]) -> Folder {
    let mut all: Vec<Tensor> =
        dense("model.", 128).into_iter().filter(|tensor| !tensor.name.contains(".mlp.")).collect();
    for expert in 0..4 {
        for name in ["gate_proj", "up_proj", "down_proj"] {
            let name = format!("model.layers.0.mlp.experts.{expert}.{name}.weight");
            if !missing.iter().any(|part| name.contains(part)) {
                all.push(Tensor::random(&name, Dtype::BF16, &[128, 128]));
            }
        }
    }
    folder(&json!({"model_type": "qwen3_moe", "num_experts": 4}), &all)
}

#[test]
fn gaps_in_experts_are_named() {
    assert_not_warned(&moe(&[]), &[], "missing");
    assert_warned(&moe(&["experts.3.", "experts.2.up"]), &[], &["missing", "experts.3", "\"up_proj.weight\" of"]);
}

#[test]
fn gaps_in_layers_are_named() {
    let mut all = dense("model.", 128);
    let third: Vec<Tensor> = dense("model.", 128)
        .into_iter()
        .map(|tensor| Tensor { name: tensor.name.replace("layers.0.", "layers.2."), ..tensor })
        .collect();
    all.extend(third);
    assert_warned(&folder(&json!({"model_type": "llama"}), &all), &[], &["model.layers.1;"]);
}

/// DBRX: a layer's experts are parameters without a module, which no client quantizes.
#[test]
fn the_largest_of_what_stays_in_16_bits_is_named_if_that_is_more_than_a_tenth() {
    let mut all = dense("transformer.", 128);
    all.extend(tensors([("transformer.blocks.0.ffn.experts.mlp.w1", &[2048, 128][..])]));
    let dbrx = folder(&json!({"model_type": "dbrx"}), &all);
    assert_warned(&dbrx, &[], &["% of the source's bytes", "\"transformer.blocks.0.ffn.experts.mlp.w1\" (524 kB)"]);
    let last = dbrx.convert(&["--force"]).ok().stderr;
    assert!(last.trim_end().lines().last().unwrap().contains("% of the source's bytes"), "{last}");
    assert_eq!(dbrx.convert(&["--force", "--quiet"]).ok().stderr, "");
    assert_not_warned(&folder(&json!({"model_type": "llama"}), &dense("model.", 128)), &[], "of the source's bytes");
}

#[test]
fn a_group_size_that_takes_what_stays_in_16_bits_is_offered() {
    let odd = folder(&json!({"model_type": "llama"}), &dense("model.", 320));
    assert_warned(&odd, &["--format", "int4"], &["% of the source's bytes", "320 columns", "use --group-size 64"]);
    assert_not_warned(&odd, &["--format", "int4", "--group-size", "64"], "--group-size");
}

#[test]
fn matrices_of_zeros_are_named() {
    let mut all = dense("model.", 128);
    let zeros = all.iter_mut().filter(|tensor| tensor.name.contains("mlp"));
    zeros.for_each(|tensor| tensor.data.fill(0));
    let run = folder(&json!({"model_type": "llama"}), &all).convert(&[]).ok();
    assert!(run.stderr.contains("3 matrices are all zeros"), "{}", run.stderr);
    assert!(run.stderr.contains("down_proj.weight\" in \"model.safetensors\" first"), "{}", run.stderr);
    let run = folder(&json!({"model_type": "llama"}), &dense("model.", 128)).convert(&[]).ok();
    assert!(!run.stderr.contains("zeros"), "{}", run.stderr);
}

#[test]
fn an_included_head_that_is_tied_is_warned_of() {
    let mut all = dense("model.", 128);
    all.extend(tensors([("model.embed_tokens.weight", &[320, 128][..]), ("lm_head.weight", &[320, 128])]));
    let include: &[&str] = &["--include", "lm_head"];
    let tied = folder(&json!({"model_type": "qwen3", "tie_word_embeddings": true}), &all);
    assert_warned(&tied, include, &["\"lm_head.weight\"", "ties it to the embedding"]);
    assert_not_warned(&tied, &[], "ties");
    assert_not_warned(&folder(&json!({"model_type": "qwen3", "tie_word_embeddings": false}), &all), include, "ties");
    let nested = json!({"model_type": "qwen3_5", "text_config": {"tie_word_embeddings": true}});
    assert_warned(&folder(&nested, &all), include, &["ties it to the embedding"]);
    // Where config.json says nothing, the class decides.
    for (model_type, is_tied) in [("gemma3_text", true), ("llama", false), ("never-heard-of", false)] {
        let mut config = json!({"model_type": model_type});
        let head = |config: &Value| folder(config, &all);
        match is_tied {
            true => assert_warned(&head(&config), include, &["by default", "ties it to the embedding"]),
            false => assert_not_warned(&head(&config), include, "ties"),
        }
        config["tie_word_embeddings"] = false.into();
        assert_not_warned(&head(&config), include, "ties it");
        assert_not_warned(&head(&json!({"model_type": model_type})), &[], "ties it");
    }
}

#[test]
fn names_that_no_class_of_the_type_has_are_warned_of() {
    let warned = |model_type: &str, prefix: &str, is_warned: bool| {
        let folder = folder(&json!({"model_type": model_type}), &dense(prefix, 128));
        match is_warned {
            true => assert_warned(&folder, &[], &["no class of \"llama\"", "model.model.layers.0", "prefix"]),
            false => assert_not_warned(&folder, &[], "no class of"),
        }
    };
    warned("llama", "model.model.", true);
    warned("llama", "model.", false);
    // A base model's own file.
    warned("llama", "", false);
    warned("never-heard-of", "model.model.", false);
}
