//! Checkpoints in bitsandbytes' layout that no manifest is of: what `save_pretrained` writes.

use std::path::PathBuf;
use std::process::Command;

use prequant::Dtype;
use serde_json::Value;

use crate::support::{Folder, Run, Tensor, read_tensors, serialize};

/// A converted checkpoint of a dense layer and two experts, as somebody else's: without manifest and checksums.
fn foreign(flags: &[&str]) -> Folder {
    let folder = Folder::new("qwen3_moe");
    let random = |name: &str, shape: &[usize]| Tensor::random(&format!("model.layers.0.{name}"), Dtype::BF16, shape);
    let mut tensors = vec![random("self_attn.q_proj.weight", &[96, 128]), random("input_layernorm.weight", &[128])];
    for expert in 0..2 {
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            tensors.push(random(&format!("mlp.experts.{expert}.{projection}.weight"), &[128, 128]));
        }
    }
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(flags).ok();
    folder
}

fn take_out_the_manifest(folder: &Folder) {
    for name in ["prequant.json", "SHA256SUMS"] {
        std::fs::remove_file(folder.destination().join(name)).unwrap();
    }
}

fn run(command: &str, folder: &Folder, flags: &[&str]) -> (Run, PathBuf) {
    let out = folder.beside(command);
    let _ = std::fs::remove_dir_all(&out);
    let mut process = Command::new(env!("CARGO_BIN_EXE_prequant"));
    (Run::of(process.arg(command).arg(folder.destination()).arg(&out).args(flags)), out)
}

#[test]
fn they_decode_as_with_their_manifest() {
    for flags in [
        &[][..],
        &["--block-size", "256"],
        &["--format", "fp4", "--double-quant"],
        &["--double-quant", "--block-size", "128", "--experts", "fuse"],
        &["--quant-storage", "bfloat16"],
    ] {
        let folder = foreign(flags);
        let (_, out) = run("dequantize", &folder, &["--quiet"]);
        let expected = read_tensors(&out);
        take_out_the_manifest(&folder);
        let (done, out) = run("dequantize", &folder, &[]);
        assert!(done.ok().stdout.contains("decoded from"), "{flags:?}");
        assert!(read_tensors(&out) == expected, "{flags:?}");
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"], Value::Null);
    }
}

#[test]
fn they_are_converted_if_that_is_asked_for() {
    let folder = foreign(&[]);
    let (_, decoded) = run("dequantize", &folder, &["--quiet"]);
    take_out_the_manifest(&folder);
    run("convert", &folder, &["--format", "int4"])
        .0
        .fails(3, &["bitsandbytes' codes in blocks of 64", "--dequantize-source"]);
    run("convert", &folder, &[]).0.fails(3, &["bitsandbytes", "--dequantize-source"]);
    let (done, out) = run("convert", &folder, &["--format", "int4", "--dequantize-source"]);
    done.ok();
    let expected = folder.beside("expected");
    let mut process = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(process.arg("convert").arg(decoded).arg(&expected).args(["--format", "int4"])).ok();
    assert!(read_tensors(&out) == read_tensors(&expected));
}

/// Something done to a checkpoint's tensors.
type Change<'c> = &'c dyn Fn(&mut Vec<Tensor>);

/// Tables, sizes of blocks and numbers of bytes that aren't the format's.
#[test]
fn what_is_otherwise_than_its_quant_state_is_refused() {
    let module = "model.layers.0.self_attn.q_proj.weight";
    let changes: [(&str, Change, &str); 5] = [
        (
            "another table",
            &|tensors| of(tensors, &format!("{module}.quant_map")).data[5] ^= 1,
            "other values than bitsandbytes gives codes",
        ),
        (
            "another size of blocks",
            &|tensors| replace(tensors, module, "\"blocksize\": 64", "\"blocksize\": 65"),
            "block size 65: expected",
        ),
        (
            "half as many columns",
            &|tensors| replace(tensors, module, "[96, 128]", "[96, 64]"),
            "its codes have 6144 bytes, expected 3072",
        ),
        (
            "another size of nested blocks",
            &|tensors| replace(tensors, module, "\"nested_blocksize\": 256", "\"nested_blocksize\": 128"),
            "nested_blocksize 128, expected 256",
        ),
        ("no JSON", &|tensors| replace(tensors, module, "{\"quant_type\"", "[\"quant_type\""), "its quant_state"),
    ];
    for (what, change, words) in changes {
        let folder = foreign(&["--double-quant"]);
        take_out_the_manifest(&folder);
        let mut tensors: Vec<Tensor> = read_tensors(&folder.destination())
            .into_iter()
            .map(|(name, (_, (dtype, shape, data)))| Tensor::new(&name, dtype, &shape, data))
            .collect();
        change(&mut tensors);
        std::fs::write(folder.destination().join("model.safetensors"), serialize(&tensors)).unwrap();
        let (failed, out) = run("dequantize", &folder, &[]);
        failed.fails(3, &[words, module]);
        assert!(!out.join("config.json").exists(), "{what}");
    }
}

fn of<'t>(tensors: &'t mut [Tensor], name: &str) -> &'t mut Tensor {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

/// Changes the text of a quant_state.
fn replace(tensors: &mut [Tensor], module: &str, from: &str, to: &str) {
    let state = of(tensors, &format!("{module}.quant_state.bitsandbytes__nf4"));
    let text = String::from_utf8(state.data.clone()).unwrap();
    assert!(text.contains(from), "{text}");
    let mut text = text.replace(from, to);
    text.truncate(state.data.len());
    state.data = format!("{text:<width$}", width = state.data.len()).into_bytes();
}
