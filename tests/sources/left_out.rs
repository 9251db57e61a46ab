//! Every file of a source is copied, converted or named with the reason why not: in the output, the dry run, the manifest and by
//! verify.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, Run, Tensor, file_names, llama, read_tensors, serialize};

fn verify(folder: &Folder, flags: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("verify").arg(folder.destination()).args(flags))
}

fn left_out(value: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    value["left_out"].as_array().into_iter().flatten().map(|left| (text(&left["name"]), text(&left["why"]))).collect()
}

/// Converts, and insists that each file of the source is accounted for in every place.
#[track_caller]
fn assert_nothing_is_silent(folder: &Folder) {
    let dry: Value = serde_json::from_str(&folder.convert(&["--dry-run", "--json"]).ok().stdout).unwrap();
    let dry_text = folder.convert(&["--dry-run"]).ok().stdout;
    let text = folder.convert(&[]).ok().stdout;
    let manifest = folder.read_json("prequant.json");
    let out = left_out(&manifest);
    assert_eq!(left_out(&dry), out, "the dry run says the same");
    let verified = verify(folder, &[]).ok().stdout;
    for (name, why) in &out {
        for text in [&dry_text, &text, &verified] {
            assert!(text.contains(&format!("left out: {name}: {why}")), "{name} isn't named in: {text}");
        }
    }
    let named = |list: &Value| -> BTreeSet<String> {
        list.as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap().to_owned()).collect()
    };
    let (written, read) = (named(&manifest["files"]), named(&manifest["source"]["files"]));
    for name in file_names(&folder.source()) {
        let is_out =
            out.iter().any(|(left, _)| *left == name || left.ends_with('/') && name.starts_with(left.as_str()));
        assert!(written.contains(&name) || read.contains(&name) || is_out, "{name} is left out in silence");
        assert!(!(is_out && written.contains(&name)), "{name} is there");
        if written.contains(&name) && !name.ends_with("config.json") && name != "model.safetensors" {
            let is_index = name.ends_with(".index.json");
            assert!(is_index || folder.read(&name) == std::fs::read(folder.source().join(&name)).unwrap(), "{name}");
        }
    }
    verify(folder, &["--against", folder.source().to_str().unwrap()]).ok();
}

fn has(folder: &Folder, name: &str) -> bool {
    folder.destination().join(name).exists()
}

#[test]
fn parts_of_a_model_that_are_not_safetensors_are_copied() {
    let folder = Folder::llama();
    let parts = [
        "spk_dict.pt",
        "token2wav/flow.pt",
        "token2wav/hift.pt",
        "token2wav/campplus.onnx",
        "token2wav/flow.yaml",
        "voices.npz",
        "modeling_step_audio_2.py",
        "LICENSE file.txt",
        "a/b/c/d/e/f/g/h/i/j/deep.txt",
        "empty.txt",
    ];
    parts.iter().for_each(|name| folder.write(name, if *name == "empty.txt" { "" } else { "PK\x03\x04 part" }));
    folder.write("whisper-large-v3/config.json", "{}");
    let nested = serialize(&[Tensor::random("a.weight", Dtype::BF16, &[8, 8])]);
    folder.write("whisper-large-v3/model.safetensors", &nested);
    assert_nothing_is_silent(&folder);
    assert!(parts.iter().all(|name| has(&folder, name)));
    assert!(folder.read("whisper-large-v3/model.safetensors") == nested);
}

#[test]
fn other_formats_of_the_same_weights_and_what_training_left_are_named() {
    let folder = Folder::llama();
    let out = [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "x-Q4_K_M.gguf",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "checkpoint-500/model.safetensors",
        ".gitattributes",
        ".cache/huggingface/x.lock",
        "SHA256SUMS",
    ];
    out.iter().for_each(|name| folder.write(name, "x"));
    folder.write("original/params.json", "{}");
    folder.write("trainer_state.json", "{}");
    assert_nothing_is_silent(&folder);
    assert!(out.iter().filter(|name| **name != "SHA256SUMS").all(|name| !has(&folder, name)));
    assert!(has(&folder, "original/params.json") && has(&folder, "trainer_state.json"));
}

/// Like granite-speech's: it lies in the model's folder and belongs to it.
#[test]
fn an_adapter_beside_its_model_is_copied() {
    let folder = Folder::new("granite_speech");
    folder.write_shards(&[llama()]);
    folder.write("adapter_config.json", json!({"peft_type": "LORA", "base_model_name_or_path": "."}).to_string());
    let lora = Tensor::random("base_model.model.language_model.q_proj.lora_A.weight", Dtype::BF16, &[8, 64]);
    let adapter = serialize(&[lora]);
    folder.write("adapter_model.safetensors", &adapter);
    assert_nothing_is_silent(&folder);
    assert!(folder.read("adapter_model.safetensors") == adapter && has(&folder, "adapter_config.json"));
}

/// vLLM loads all files of weights where no index says which.
#[test]
fn a_file_that_the_index_does_not_list_is_copied_and_kept_out_of_the_outputs_index() {
    let folder = Folder::new("qwen3_next");
    folder.write_shards(&[llama()]);
    let mtp = serialize(&[Tensor::random("mtp.fc.weight", Dtype::BF16, &[64, 128])]);
    folder.write("mtp.safetensors", &mtp);
    let run = folder.convert(&[]).ok();
    assert!(run.stderr.contains("mtp.safetensors is not among the files"), "{}", run.stderr);
    assert!(folder.read("mtp.safetensors") == mtp);
    let index = folder.read_json("model.safetensors.index.json");
    let map = index["weight_map"].as_object().unwrap();
    assert!(map.values().all(|file| file == "model.safetensors") && !map.contains_key("mtp.fc.weight"));
    verify(&folder, &[]).ok();
    verify(&folder, &["--against", folder.source().to_str().unwrap()]).ok();

    let back = folder.beside("back");
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("dequantize").arg(folder.destination()).arg(&back)).ok();
    assert!(read_tensors(&back).contains_key("mtp.fc.weight"));
    assert!(Path::new(&back).join("model.safetensors.index.json").exists());
}

#[test]
fn a_file_with_nothing_but_the_models_own_tensors_is_left_out() {
    let folder = Folder::llama();
    folder.write("copy of it.safetensors", serialize(&llama()));
    folder.write("model.fp16.safetensors", serialize(&llama()));
    folder.write("consolidated.safetensors", serialize(&llama()));
    assert_nothing_is_silent(&folder);
    assert!(!has(&folder, "copy of it.safetensors") && !has(&folder, "consolidated.safetensors"));
}

#[test]
fn names_that_differ_in_case_alone_are_both_copied_and_warned_of() {
    let folder = Folder::llama();
    folder.write("README.md", "---\nlicense: mit\n---\n# A\n");
    folder.write("readme.md", "# b\n");
    let run = folder.convert(&[]).ok();
    assert!(run.stderr.contains("README.md, readme.md differ in case alone"), "{}", run.stderr);
    assert_eq!(folder.read("readme.md"), b"# b\n");
    assert_eq!(folder.read("README.md"), b"---\nlicense: mit\n---\n# A\n");
}

#[test]
fn what_is_no_file_is_named() {
    let folder = Folder::llama();
    let pipe = folder.source().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let run = folder.convert(&[]).ok();
    assert!(run.stdout.contains("left out: pipe: not a regular file"), "{}", run.stdout);
}

#[test]
fn manifests_that_say_nothing_of_it_are_still_read() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    assert!(folder.read_json("prequant.json").get("left_out").is_none(), "nothing was left out");
    verify(&folder, &[]).ok();
}

/// What git and the hub leave in a folder isn't the same for everyone who has the source.
#[test]
fn verifying_against_a_source_does_not_compare_what_is_hidden() {
    let folder = Folder::llama();
    folder.write(".gitattributes", "x");
    folder.write("optimizer.pt", "x");
    folder.convert(&[]).ok();
    let source = folder.source();
    std::fs::remove_file(source.join(".gitattributes")).unwrap();
    verify(&folder, &["--against", source.to_str().unwrap()]).ok();
    std::fs::remove_file(source.join("optimizer.pt")).unwrap();
    let run = verify(&folder, &["--against", source.to_str().unwrap()]);
    assert!(run.code == 1 && run.stdout.contains("what it says was left out"), "{}", run.stdout);
}
