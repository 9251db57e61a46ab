//! Adapters that can't be merged, or not into this base: each is refused with what is wrong by name.

use serde_json::json;

use crate::support::Tensor;
use crate::{CONFIG, Case, WEIGHTS};

const Q_PROJ: &str = "base_model.model.model.layers.0.self_attn.q_proj";

#[track_caller]
fn refuses(case: &Case, words: &[&str]) {
    case.merge(&[]).fails(3, words);
    assert!(!case.path("merged/config.json").exists());
}

#[test]
fn other_kinds_of_adapters_are_refused_by_name() {
    for (key, value, words) in [
        ("peft_type", json!("IA3"), &["\"IA3\"", CONFIG][..]),
        ("use_dora", json!(true), &["DoRA", CONFIG]),
        ("trainable_token_indices", json!([1, 2]), &["trainable tokens"]),
        ("init_lora_weights", json!("pissa"), &["pissa", "path_initial_model_for_weight_conversion"]),
        ("r", json!("four"), &["\"r\" has \"four\"; expected a number"]),
    ] {
        let case = Case::new("linears");
        case.set(key, value);
        refuses(&case, words);
    }
    let case = Case::new("linears");
    case.change_adapter(|tensor| {
        let name = tensor.name.replace("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector");
        Some(Tensor { name, ..tensor })
    });
    refuses(&case, &["lora_magnitude_vector", "DoRA"]);
}

#[test]
fn every_tensor_must_be_understood() {
    let case = Case::new("linears");
    case.change_adapter(|tensor| (tensor.name != format!("{Q_PROJ}.lora_B.weight")).then_some(tensor));
    refuses(&case, &[WEIGHTS, &format!("\"{Q_PROJ}.lora_A.weight\""), "lora_B that goes with it is missing"]);

    let case = Case::new("linears");
    case.change_adapter(|tensor| {
        Some(Tensor { name: tensor.name.replace("0.self_attn.q_", "9.self_attn.q_"), ..tensor })
    });
    refuses(&case, &["layers.9.self_attn.q_proj", "the base has no"]);

    let case = Case::new("rslora");
    case.change_adapter(|tensor| Some(Tensor { name: tensor.name.replace("lm_head", "other_head"), ..tensor }));
    refuses(&case, &["other_head.weight", "the base has no"]);

    let case = Case::new("experts");
    case.set("target_parameters", json!(["mlp.experts.down_proj"]));
    refuses(&case, &["2 pairs of tensors", "down_proj"]);

    let case = Case::new("experts");
    case.set("target_parameters", json!(null));
    refuses(&case, &["\"target_parameters\"", "experts"]);
}

#[test]
fn shapes_that_do_not_fit_are_told_with_what_was_expected() {
    let case = Case::new("linears");
    case.set("rank_pattern", json!({r".*\.(up|down)_proj": 8, "q_proj": 3}));
    refuses(&case, &["layers.1.self_attn.q_proj.lora_A.weight", "its shape is [2, 32]; expected [3, 32]"]);

    let case = Case::new("experts");
    case.set("r", json!(4));
    case.change_adapter(|tensor| tensor.name.contains("experts").then_some(tensor));
    refuses(&case, &["experts.lora_A.weight", "expected [16, 24]"]);

    let case = Case::new("rslora");
    case.change_adapter(|tensor| match tensor.name.contains("lm_head") {
        true => Some(Tensor { shape: vec![tensor.shape[1], tensor.shape[0]], ..tensor }),
        false => Some(tensor),
    });
    refuses(&case, &["lm_head.weight", "its shape is [32, 48]; expected [48, 32]"]);
}

#[test]
fn numbers_that_are_not_finite_are_refused_with_their_place() {
    let case = Case::new("linears");
    case.change_adapter(|mut tensor| {
        if tensor.name == format!("{Q_PROJ}.lora_B.weight") {
            tensor.data[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        Some(tensor)
    });
    refuses(&case, &["q_proj.lora_B.weight", "NaN at element 10"]);

    let case = Case::new("rslora");
    case.set("lora_alpha", json!(1e9));
    refuses(&case, &["overflows float16"]);
}

#[test]
fn folders_that_are_no_adapters_are_told() {
    let case = Case::new("linears");
    std::fs::remove_file(case.path(&format!("adapter/{CONFIG}"))).unwrap();
    refuses(&case, &["not an adapter", CONFIG]);
    let case = Case::new("linears");
    std::fs::rename(case.path(&format!("adapter/{WEIGHTS}")), case.path("adapter/adapter_model.bin")).unwrap();
    refuses(&case, &["adapter_model.bin", "pickle"]);
    let case = Case::new("linears");
    std::fs::remove_dir_all(case.path("adapter")).unwrap();
    refuses(&case, &["adapter: not found"]);
}

#[test]
fn options_of_a_format_need_one() {
    let case = Case::new("linears");
    let run = case.merge(&["--block-size", "32"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("--format"), "{}", run.stderr);
}
