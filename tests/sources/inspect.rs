//! `inspect` says of any folder or file what it is.

use std::fs;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, LINEAR, Run, Tensor, llama, serialize};

fn inspect(path: &Path, flags: &[&str]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("inspect").arg(path).args(flags))
}

/// Both ways of saying it.
#[track_caller]
fn inspected(path: &Path) -> (String, Value) {
    let text = inspect(path, &[]).ok().stdout;
    (text, serde_json::from_str(&inspect(path, &["--json"]).ok().stdout).unwrap())
}

#[test]
fn a_checkpoint_is_named_with_dtypes_parameters_and_what_is_left_out() {
    let folder = Folder::new("llama");
    let buffer = Tensor::random("model.inv_freq", Dtype::F32, &[96 * 64 / 2]);
    folder.write("model.safetensors", serialize(&[llama(), vec![buffer]].concat()));
    folder.write("optimizer.pt", "x");
    let (text, json) = inspected(&folder.source());
    assert!(
        text.contains(": a checkpoint of transformers' layout (llama), one file of weights, not quantized\n"),
        "{text}"
    );
    let bf16 = 96 * 64 + 32 * 64 + 64;
    assert!(text.contains(&format!("hub       {} parameters", bf16 + 3072)), "{text}");
    assert!(text.contains("57.3 % BF16, 42.7 % F32") || text.contains("% BF16"), "{text}");
    assert!(text.contains("left out: optimizer.pt: the state of a training run"), "{text}");
    assert_eq!(json["hub_parameters"], json!({"total": bf16 + 3072, "by_dtype": {"BF16": bf16, "F32": 3072}}));
    assert_eq!(json["dtypes"]["F32"]["bytes"], 3072 * 4);
    let share = json["dtypes"]["BF16"]["share"].as_f64().unwrap() + json["dtypes"]["F32"]["share"].as_f64().unwrap();
    assert!((share - 1.0).abs() < 1e-9);
    assert_eq!((&json["quantized"], &json["layout"], &json["obstacle"]), (&Value::Null, &Value::Null, &Value::Null));
}

#[test]
fn a_converted_checkpoint_is_named_with_format_and_layout_and_counted_as_the_hub_does() {
    let weights = 96 * 64;
    for (flags, format, layout, counted) in [
        (&["--format", "nf4"][..], "nf4", "bitsandbytes", weights),
        (&["--format", "int4", "--group-size", "32"], "int4", "compressed-tensors", weights),
        (&["--format", "nvfp4"], "nvfp4", "compressed-tensors", weights),
        // The hub counts ModelOpt's codes by the byte, unless the config says how many bits they have.
        (&["--format", "nvfp4", "--layout", "modelopt"], "nvfp4", "modelopt", weights),
    ] {
        let folder = Folder::llama();
        folder.convert(flags).ok();
        let (text, json) = inspected(&folder.destination());
        assert!(
            text.contains("a checkpoint converted by prequant") && text.contains(&format!("quantized: {format}")),
            "{text}"
        );
        assert!(text.contains(&format!("quantized {format}, in the layout of {layout}")), "{text}");
        assert_eq!((json["quantized"].as_str(), json["layout"].as_str()), (Some(format), Some(layout)));
        assert_eq!(json["hub_parameters"]["total"], counted + 32 * 64 + 64, "{flags:?}: {json}");
        assert!(json["obstacle"].is_null() && json["warnings"] == json!([]), "{json}");
    }
}

#[test]
fn what_converting_would_warn_of_and_refuse_is_said() {
    let folder = Folder::new("some_new_model");
    folder.write("model.safetensors", serialize(&llama()));
    let (text, json) = inspected(&folder.source());
    assert!(
        text.contains("warning: this architecture wasn't compared") && json["warnings"].as_array().unwrap().len() == 1
    );

    let quantized = Folder::new("llama");
    let codes = Tensor::random(&LINEAR.replace(".weight", ".qweight"), Dtype::I32, &[8, 64]);
    quantized.write(
        "config.json",
        json!({"model_type": "llama", "quantization_config": {"quant_method": "never heard of"}}).to_string(),
    );
    quantized.write("model.safetensors", serialize(&[codes]));
    let (text, json) = inspected(&quantized.source());
    assert!(text.contains("quantized: never heard of") && text.contains("convert refuses it: "), "{text}");
    assert_eq!(json["obstacle"]["kind"], "already_quantized");

    let empty = Folder::new("llama");
    empty.write("model.safetensors", serialize(&[Tensor::new(LINEAR, Dtype::BF16, &[0], Vec::new())]));
    let (text, json) = inspected(&empty.source());
    assert!(text.contains("convert refuses it") && text.contains("ZeRO-3"), "{text}");
    assert_eq!(json["obstacle"]["kind"], "not_a_checkpoint");
}

#[test]
fn what_is_no_checkpoint_is_named_without_an_error() {
    let folder = Folder::new("unused");
    fs::remove_file(folder.source().join("config.json")).unwrap();
    folder.write("lora/adapter_config.json", r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base"}"#);
    folder.write("lora/adapter_model.safetensors", serialize(&llama()));
    folder.write("gguf/x-Q4_K_M.gguf", "GGUF\x03\0\0\0");
    folder.write("bin/config.json", "{}");
    folder.write("bin/pytorch_model.bin", "PK\x03\x04");
    folder.write("cache/snapshots/0123/config.json", "{}");
    folder.write("pipe/model_index.json", "{}");
    for (place, what) in [
        ("lora", "an adapter (LoRA) of \"org/base\", not a model"),
        ("gguf", "GGUF, llama.cpp's format (x-Q4_K_M.gguf)"),
        ("gguf/x-Q4_K_M.gguf", "GGUF, llama.cpp's format"),
        ("bin", "PyTorch weights, with no .safetensors file (pytorch_model.bin)"),
        ("bin/pytorch_model.bin", "not safetensors but torch.save's format"),
        ("bin/config.json", "a model's config"),
        ("cache", "a repository in the hub's cache, not a snapshot of it"),
        ("pipe", "a diffusers pipeline, several models that are used together"),
    ] {
        let (text, json) = inspected(&folder.source().join(place));
        assert!(text.contains(&format!(": {what}\n")) && text.contains("convert refuses it: "), "{place}: {text}");
        assert_eq!(json["what"], what);
        assert_eq!(json["obstacle"]["kind"], "not_a_checkpoint");
    }
}

#[test]
fn what_is_damaged_or_incomplete_is_still_an_error() {
    let folder = Folder::new("llama");
    folder.write("model.safetensors", &serialize(&llama())[..100]);
    inspect(&folder.source(), &[]).fails(3, &["model.safetensors", "truncated"]);
    let folder = Folder::new("llama");
    folder.write("model-00001-of-00002.safetensors", serialize(&llama()));
    inspect(&folder.source(), &[]).fails(3, &["shard 2 of 2"]);
    inspect(&folder.beside("nowhere"), &[]).fails(3, &["not found"]);
}

#[test]
fn a_diffusers_model_and_a_file_alone_are_named() {
    let folder = Folder::new("unused");
    folder.write("config.json", json!({"_class_name": "FluxTransformer2DModel"}).to_string());
    folder.write("diffusion_pytorch_model.safetensors", serialize(&llama()));
    assert!(inspected(&folder.source()).0.contains("a diffusers model (FluxTransformer2DModel), one file of weights"));
    fs::remove_file(folder.source().join("config.json")).unwrap();
    let file = folder.source().join("diffusion_pytorch_model.safetensors");
    assert!(inspected(&file).0.contains("safetensors without a model's config, one file of weights"));
}
