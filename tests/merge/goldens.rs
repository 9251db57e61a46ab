//! What is merged against PEFT's own results in f64, rounded once.

use serde_json::json;

use crate::support::Tensor;
use crate::{CASES, Case, assert_same, fixture, prequant};
use crate::{Run, support};

#[test]
fn every_case_is_merged_to_the_bits_of_peft_in_f64_rounded_once() {
    let folders = std::fs::read_dir(fixture("")).unwrap().count();
    assert_eq!(folders, CASES.len());
    for name in CASES {
        let case = Case::new(name);
        case.merge(&[]).ok();
        assert_same(&case.tensors("merged"), &case.expected(), name);
        assert_eq!(case.json("merged/config.json"), case.json("base/config.json"), "{name}");
    }
}

#[test]
fn kernels_threads_and_memory_decide_nothing() {
    for name in ["linears", "gpt-oss", "mixtral"] {
        let case = Case::new(name);
        case.merge(&[]).ok();
        let expected = support::contents(&case.path("merged"));
        for (i, flags) in [&["--threads", "1"][..], &["--threads", "7"], &["--memory", "24MiB"]].iter().enumerate() {
            let to = format!("again-{i}");
            case.merge_to(&to, flags).ok();
            assert!(support::contents(&case.path(&to)) == expected, "{name} {flags:?}");
        }
    }
}

/// Experts' tensors as they are named where PEFT wrapped parameters by their names, as it does with parametrized ones.
#[test]
fn parameters_wrapped_in_the_order_of_their_names_are_told_by_their_shapes() {
    for name in ["experts", "gpt-oss"] {
        let case = Case::new(name);
        case.change_adapter(|tensor| {
            let name = match tensor.name.contains("experts.base_layer.") {
                true => tensor.name.replace("experts.base_layer.", "experts."),
                false => tensor.name.replace("experts.lora", "experts.base_layer.lora"),
            };
            Some(Tensor { name, ..tensor })
        });
        let run = case.merge(&[]).ok();
        assert!(run.stderr.contains("wrapped by their names"), "{}", run.stderr);
        assert_same(&case.tensors("merged"), &case.expected(), name);
    }
}

/// transformers 4's adapters have a pair for each expert's Linear, named as the hub's tensors are.
#[test]
fn pairs_of_each_experts_linears_are_merged_into_the_hubs_tensors() {
    let case = Case::new("experts");
    let weight = "model.layers.0.mlp.experts.2.up_proj.weight";
    let (dtype, shape, _) = case.tensors("base")[weight].clone();
    let [a, b] = ["A", "B"].map(|which| {
        let shape = if which == "A" { [2, shape[1]] } else { [shape[0], 2] };
        let module = weight.strip_suffix(".weight").unwrap();
        Tensor::random(&format!("base_model.model.{module}.lora_{which}.weight"), safetensors::Dtype::F32, &shape)
    });
    std::fs::write(case.path("adapter/adapter_model.safetensors"), support::serialize(&[a, b])).unwrap();
    case.set("target_parameters", json!(null));
    case.merge(&[]).ok();
    let (base, merged) = (case.tensors("base"), case.tensors("merged"));
    assert_eq!(merged[weight].0, dtype);
    let changed: Vec<&String> = base.keys().filter(|name| base[*name] != merged[*name]).collect();
    assert_eq!(changed, [weight]);
}

#[test]
fn a_base_with_other_prefixes_is_found_and_told() {
    let case = Case::new("linears");
    case.change("base/model.safetensors", |tensor| {
        Some(Tensor { name: tensor.name.replace("model.", "language.model."), ..tensor })
    });
    case.set("alpha_pattern", case.json("adapter/adapter_config.json")["alpha_pattern"].clone());
    let run = case.merge(&[]).ok();
    assert!(run.stderr.contains("begin otherwise than the base's"), "{}", run.stderr);
    let merged = case.tensors("merged").into_iter();
    let merged = merged.map(|(name, stored)| (name.replace("language.model.", "model."), stored)).collect();
    assert_same(&merged, &case.expected(), "other prefixes");
}

/// Straight to a format: every file but the manifest, which has another source, as if the merged checkpoint had been converted.
#[test]
fn a_format_gives_the_bytes_of_merging_and_then_converting() {
    for (name, flags) in [
        ("linears", &["--format", "nf4"][..]),
        ("experts", &["--format", "nf4", "--double-quant", "--experts", "fuse"]),
        ("experts", &["--format", "int4", "--group-size", "channel"]),
        ("fused-experts", &["--format", "nf4", "--max-shard-size", "20kB"]),
        ("fused-experts", &["--format", "nvfp4", "--include", "experts"]),
        ("gpt-oss", &["--format", "mxfp4", "--layout", "gpt-oss", "--include", "experts"]),
        ("gpt-oss", &["--format", "int4", "--group-size", "channel"]),
        ("granite", &["--format", "fp4"]),
        ("mixtral", &["--format", "int4-asym", "--group-size", "32"]),
        ("rslora", &["--format", "nf4"]),
    ] {
        let case = Case::new(name);
        case.merge(&[]).ok();
        let folders = [case.path("merged"), case.path("converted")];
        let converted = Run::of(prequant("convert").args(folders).args(flags));
        let straight = case.merge_to("straight", flags);
        assert_eq!(straight.code, converted.code, "{name} {flags:?}: {} {}", straight.stderr, converted.stderr);
        converted.ok();
        let files = |folder: &str| {
            let mut files = support::contents(&case.path(folder));
            files.retain(|name, _| !["prequant.json", "SHA256SUMS"].contains(&name.as_str()));
            files
        };
        let (straight, converted) = (files("straight"), files("converted"));
        assert!(straight.keys().eq(converted.keys()), "{name} {flags:?}: {:?}", straight.keys());
        let differing: Vec<&String> = straight.keys().filter(|file| straight[*file] != converted[*file]).collect();
        assert!(differing.is_empty(), "{name} {flags:?}: {differing:?}");
        let manifest = case.json("straight/prequant.json");
        assert!(manifest["source"]["adapter"]["file"]["sha256"].is_string(), "{manifest}");
    }
}
