//! `--quant-storage`: the codes' bytes, as tensors of another dtype.

use std::path::Path;
use std::process::Command;

use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{Folder, Run, Tensor, contents, read_tensors, serialize};

const STORAGES: [(&str, Dtype, usize); 3] =
    [("bfloat16", Dtype::BF16, 2), ("float16", Dtype::F16, 2), ("float32", Dtype::F32, 4)];

fn run(arguments: &[&str]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Attention and the experts of a layer.
fn model() -> Folder {
    let mut tensors = vec![Tensor::random("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[24, 48])];
    for expert in 0..4 {
        for projection in ["gate", "up", "down"] {
            let name = format!("model.layers.0.mlp.experts.{expert}.{projection}_proj.weight");
            tensors.push(Tensor::random(&name, Dtype::BF16, &[32, 32]));
        }
    }
    let folder = Folder::new("qwen3_moe");
    folder.write("model.safetensors", serialize(&tensors));
    folder
}

#[test]
fn only_the_dtype_of_codes_is_another() {
    let folder = model();
    for (flags, layout) in [(&["--double-quant"][..], "keep"), (&["--format", "fp4"], "keep"), (&[], "fuse")] {
        let flags = [flags, &["--experts", layout, "--force"]].concat();
        folder.convert(&flags).ok();
        let plain = read_tensors(&folder.destination());
        let decoded = folder.beside("decoded");
        run(&[&["dequantize", text(&folder.destination()), text(&decoded), "--force"][..]].concat()).ok();
        for (name, dtype, size) in STORAGES {
            folder.convert(&[&flags[..], &["--quant-storage", name]].concat()).ok();
            let stored = read_tensors(&folder.destination());
            assert!(stored.keys().eq(plain.keys()));
            let mut codes = 0;
            for (tensor, (file, expected)) in &plain {
                let (found_file, found) = &stored[tensor];
                assert!(found_file == file && found.2 == expected.2, "{tensor}");
                if plain.contains_key(&format!("{tensor}.quant_map")) {
                    codes += 1;
                    assert_eq!((found.0, &found.1[..]), (dtype, &[expected.2.len() / size, 1][..]));
                } else {
                    assert_eq!((found.0, &found.1), (expected.0, &expected.1));
                }
            }
            assert_eq!(codes, if layout == "keep" { 13 } else { 3 });
            let config = folder.read_json("config.json");
            assert_eq!(config["quantization_config"]["bnb_4bit_quant_storage"], name);
            assert_eq!(folder.read_json("prequant.json")["recipe"]["quant_storage"], name);
            let destination = folder.destination();
            run(&["verify", text(&destination)]).ok();
            run(&["verify", text(&destination), "--against", text(&folder.source())]).ok();
            let again = folder.beside("decoded again");
            run(&["dequantize", text(&destination), text(&again), "--force"]).ok();
            let weights = |folder: &Path| contents(folder).remove("model.safetensors");
            assert!(weights(&again) == weights(&decoded), "{name}");
        }
    }
}

#[test]
fn experts_are_laid_out_otherwise_in_the_same_dtype() {
    let folder = model();
    folder.convert(&["--experts", "fuse", "--quant-storage", "bfloat16"]).ok();
    let (kept, fused) = (folder.beside("kept"), folder.beside("fused"));
    run(&["convert", text(&folder.source()), text(&kept), "--quant-storage", "bfloat16"]).ok();
    run(&["convert", text(&kept), text(&fused), "--experts", "fuse"]).ok();
    let weights = |folder: &Path| contents(folder).remove("model.safetensors").unwrap();
    assert!(weights(&fused) == weights(&folder.destination()));
    run(&["verify", text(&fused), "--against", text(&folder.source())]).ok();
}

#[test]
fn codes_that_are_no_whole_elements_are_an_error() {
    let folder = Folder::new("llama");
    let odd = Tensor::random("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[3, 4]);
    folder.write("model.safetensors", serialize(&[odd]));
    for name in ["bfloat16", "float16"] {
        folder.convert(&["--quant-storage", name, "--force"]).ok();
    }
    folder
        .convert(&["--quant-storage", "float32", "--force"])
        .fails(3, &["q_proj.weight", "6 bytes", "float32", "--exclude"]);
    folder.convert(&["--quant-storage", "int8"]).fails(2, &["int8", "uint8, bfloat16, float16, float32"]);
    folder.convert(&["--format", "int4", "--quant-storage", "bfloat16"]).fails(2, &["--quant-storage", "nf4 and fp4"]);
}

#[test]
fn it_is_recognized_for_what_it_is() {
    let folder = model();
    folder.convert(&["--quant-storage", "bfloat16"]).ok();
    let shown = run(&["inspect", text(&folder.destination()), "--json"]).ok();
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    let shown = shown.to_string();
    assert!(shown.contains("nf4") && shown.contains("bitsandbytes"), "{shown}");
}
