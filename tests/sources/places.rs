//! What isn't a checkpoint is named for what it is, with the way on.

use std::fs;

use safetensors::Dtype;
use serde_json::json;

use crate::support::{Folder, Tensor, llama, serialize};

/// A source without config.json.
fn bare(files: &[(&str, &[u8])]) -> Folder {
    let folder = Folder::new("unused");
    fs::remove_file(folder.source().join("config.json")).unwrap();
    files.iter().for_each(|(name, content)| folder.write(name, content));
    folder
}

#[track_caller]
fn refused(folder: &Folder, words: &[&str]) {
    folder.convert(&[]).fails(3, words);
    assert!(!folder.destination().exists());
}

#[test]
fn an_adapter_without_its_model_is_named_with_its_base() {
    let config = json!({"peft_type": "LORA", "r": 64, "base_model_name_or_path": "org/base"}).to_string();
    let lora = Tensor::random("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", Dtype::BF16, &[8, 64]);
    let folder =
        bare(&[("adapter_config.json", config.as_bytes()), ("adapter_model.safetensors", &serialize(&[lora]))]);
    folder.write("tokenizer_config.json", "{}");
    refused(&folder, &["an adapter (LoRA) of \"org/base\"", "merge it into its base model first"]);
}

#[test]
fn weights_in_other_formats_alone_are_named() {
    let gguf = bare(&[("model-Q4_K_M.gguf", b"GGUF\x03\0\0\0"), ("README.md", b"# x\n")]);
    refused(&gguf, &["GGUF, llama.cpp's format (model-Q4_K_M.gguf)", "safetensors checkpoint"]);
    gguf.convert_from(&gguf.source().join("model-Q4_K_M.gguf"), &[]).fails(3, &["GGUF, llama.cpp's format"]);
    for (name, what) in [
        ("pytorch_model.bin", "PyTorch weights"),
        ("model.onnx", "an ONNX model"),
        ("tf_model.h5", "a TensorFlow model"),
        ("flax_model.msgpack", "a Flax model"),
        ("global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt", "a DeepSpeed checkpoint"),
        ("__0_0.distcp", "a distributed checkpoint of torch"),
    ] {
        refused(&bare(&[(name, b"x")]), &[what]);
        let with_config = Folder::new("llama");
        with_config.write(name, "x");
        refused(&with_config, &[what]);
    }
}

#[test]
fn the_hubs_cache_is_named_with_the_snapshot_to_give() {
    let weights = serialize(&llama());
    let folder = bare(&[
        ("snapshots/0123abcd/config.json", b"{}"),
        ("snapshots/0123abcd/model.safetensors", &weights),
        ("snapshots/ffff/config.json", b"{}"),
        ("blobs/x", b""),
        ("refs/main", b"0123abcd"),
    ]);
    refused(&folder, &["a repository in the hub's cache", "snapshots/0123abcd"]);
    let cache = bare(&[("models--org--name/refs/main", b"0123abcd"), ("models--b--c/refs/main", b"")]);
    refused(&cache, &["a cache of the hub", "models--b--c/snapshots/"]);
}

#[test]
fn a_pipeline_is_named_with_its_parts() {
    let folder = bare(&[
        ("model_index.json", br#"{"_class_name": "FluxPipeline"}"#),
        ("transformer/config.json", b"{}"),
        ("vae/config.json", b"{}"),
    ]);
    refused(&folder, &["a diffusers pipeline (FluxPipeline)", "transformer, vae", "source/transformer"]);
}

#[test]
fn a_folder_of_checkpoints_is_named_with_one_of_them() {
    refused(
        &bare(&[("final/config.json", b"{}"), ("final/model.safetensors", b"")]),
        &["others in it", "source/final"],
    );
}

#[test]
fn a_save_of_zero_3_without_its_parameters_is_named() {
    let folder = Folder::new("llama");
    let empty = llama().into_iter().map(|tensor| Tensor::new(&tensor.name, tensor.dtype, &[0], Vec::new()));
    folder.write("model.safetensors", serialize(&empty.collect::<Vec<_>>()));
    folder.write("global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt", "x");
    refused(&folder, &["3 of its 3 tensors have no elements", "ZeRO-3", "zero_to_fp32.py"]);
}

#[test]
fn a_model_saved_with_an_adapter_that_is_not_merged_is_refused() {
    let linear = |name: &str| Tensor::random(name, Dtype::BF16, &[64, 64]);
    let wrapped = [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.weight",
    ];
    for names in [&wrapped[..], &["model.q_proj.base_layer.weight", "model.q_proj.lora_A.default.weight"]] {
        let folder = Folder::new("llama");
        folder.write("model.safetensors", serialize(&names.iter().map(|name| linear(name)).collect::<Vec<_>>()));
        refused(&folder, &["merge the adapter first", "merge_and_unload"]);
    }
}

#[test]
fn what_wrappers_left_in_names_is_taken_out_and_said_so() {
    for (prefix, middle) in
        [("_orig_mod.", ""), ("module.", ""), ("module._orig_mod.", ""), ("", "_orig_mod."), ("base_model.model.", "")]
    {
        let folder = Folder::new("llama");
        let rename = |mut tensor: Tensor| {
            tensor.name = format!("{prefix}{}", tensor.name.replace("model.", &format!("model.{middle}")));
            tensor
        };
        folder.write("model.safetensors", serialize(&llama().into_iter().map(rename).collect::<Vec<_>>()));
        let run = folder.convert(&[]).ok();
        assert!(run.stderr.contains("of a wrapper that the model was saved in"), "{}", run.stderr);
        let plain = Folder::llama();
        plain.convert(&[]).ok();
        let names =
            |folder: &Folder| crate::support::read_tensors(&folder.destination()).into_keys().collect::<Vec<_>>();
        assert_eq!(names(&folder), names(&plain));
        assert_eq!(folder.read_json("config.json"), plain.read_json("config.json"));
        for against in [false, true] {
            let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
            verify.arg("verify").arg(folder.destination());
            if against {
                verify.arg("--against").arg(folder.source());
            }
            crate::support::Run::of(&mut verify).ok();
        }
    }
}
