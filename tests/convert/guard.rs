//! What config.json has to stop transformers where it would load 4-bit experts wrongly.

use prequant::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, Run, Tensor, serialize};

/// A layer's experts as the hub has those of the type: one by one, or fused.
fn moe(model_type: &str) -> Folder {
    let mut tensors = vec![Tensor::random("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[128, 128])];
    let random = |name: &str, shape: &[usize]| Tensor::random(&format!("model.layers.0.{name}"), Dtype::BF16, shape);
    match model_type {
        "granitemoe" => tensors.extend([
            random("block_sparse_moe.input_linear.weight", &[2, 256, 128]),
            random("block_sparse_moe.output_linear.weight", &[2, 128, 128]),
        ]),
        "llama4" => tensors.extend([
            random("feed_forward.experts.gate_up_proj", &[2, 128, 256]),
            random("feed_forward.experts.down_proj", &[2, 128, 128]),
        ]),
        "switch_transformers" => {
            for projection in ["wi", "wo"] {
                let name = format!("encoder.block.1.layer.1.mlp.experts.expert_0.{projection}.weight");
                tensors.push(Tensor::random(&name, Dtype::BF16, &[128, 128]));
            }
        }
        _ => {
            for expert in 0..2 {
                for projection in ["gate_proj", "up_proj", "down_proj"] {
                    tensors.push(random(&format!("mlp.experts.{expert}.{projection}.weight"), &[128, 128]));
                }
            }
        }
    }
    let folder = Folder::new(model_type);
    folder.write("model.safetensors", serialize(&tensors));
    folder
}

/// What the two keys are, and what is said.
fn guard(folder: &Folder, flags: &[&str]) -> (Value, Value, Run) {
    let run = folder.convert(&[flags, &["--force"]].concat()).ok();
    let mut config: Value = folder.read_json("config.json");
    let ratio = config["quantization_config"]["global_compression_ratio"].take();
    (config["experts_implementation"].take(), ratio, run)
}

fn verify(folder: &Folder, flags: &[&str]) -> Run {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("verify").arg(folder.destination()).args(flags))
}

const RANDOM: &str = "transformers would load random experts: use vLLM";
const MISREAD: &str = "transformers misreads NVFP4 experts: use vLLM";

#[test]
fn an_entry_of_quantization_config_stops_transformers_where_it_would_say_nothing() {
    for (model_type, format, expected) in [
        // Not put together.
        ("granitemoe", "int4", json!(RANDOM)),
        ("granitemoe", "mxfp4", json!(RANDOM)),
        ("granitemoe", "nvfp4", json!(RANDOM)),
        // Put together, of NVFP4 without the scales of scales.
        ("qwen3_moe", "int4", Value::Null),
        ("qwen3_moe", "mxfp4", Value::Null),
        ("qwen3_moe", "nvfp4", json!(MISREAD)),
        // A module for each expert.
        ("llama4", "int4", Value::Null),
        ("llama4", "nvfp4", Value::Null),
        // Linears that each expert has for itself.
        ("switch_transformers", "nvfp4", Value::Null),
        // By its own code.
        ("model_of_tomorrow", "nvfp4", Value::Null),
    ] {
        let folder = moe(model_type);
        let (key, found, run) = guard(&folder, &["--format", format]);
        assert_eq!((&key, &found), (&Value::Null, &expected), "{model_type} {format}");
        assert_eq!(run.stderr.contains("config.json has it stop"), !expected.is_null(), "{}", run.stderr);
        verify(&folder, &[]).ok();
        verify(&folder, &["--against", folder.source().to_str().unwrap()]).ok();
        let (_, found, run) = guard(&folder, &["--format", format, "--guard", "off"]);
        assert_eq!(found, Value::Null);
        assert_eq!(run.stderr.contains("nothing in config.json stops it"), !expected.is_null(), "{}", run.stderr);
        assert_eq!(folder.read_json("prequant.json")["recipe"]["guard"], "off");
    }
}

#[test]
fn dense_layers_and_experts_in_16_bits_need_none() {
    for flags in [&["--format", "nvfp4", "--exclude", "experts"][..], &["--guard", "strict", "--exclude", "experts"]] {
        let (key, ratio, run) = guard(&moe("qwen3_moe"), flags);
        assert_eq!((key, ratio), (Value::Null, Value::Null));
        assert!(!run.stderr.contains("transformers"), "{}", run.stderr);
    }
}

/// It stops at their shapes; what stops it if told to ignore these stops others, too.
#[test]
fn nf4_experts_have_a_guard_only_if_it_is_asked_for() {
    let folder = moe("qwen3_moe");
    for (flags, expected) in [
        (&[][..], Value::Null),
        (&["--guard", "auto"], Value::Null),
        (&["--guard", "off"], Value::Null),
        (&["--guard", "strict"], json!("prequant_loader")),
        (&["--guard", "strict", "--experts", "fuse"], json!("prequant_loader")),
    ] {
        let (key, _, run) = guard(&folder, flags);
        assert_eq!(key, expected, "{flags:?}");
        assert!(run.stderr.contains("import prequant_loader"), "{}", run.stderr);
        verify(&folder, &["--against", folder.source().to_str().unwrap()]).ok();
    }
}

#[test]
fn an_entry_that_prequant_does_not_write_is_a_difference() {
    let folder = moe("granitemoe");
    folder.convert(&["--format", "int4"]).ok();
    let config = String::from_utf8(folder.read("config.json")).unwrap().replace(RANDOM, "whatever");
    std::fs::write(folder.destination().join("config.json"), config).unwrap();
    let run = verify(&folder, &[]);
    assert!(run.stdout.contains("global_compression_ratio is \"whatever\""), "{} {}", run.stdout, run.stderr);
}
