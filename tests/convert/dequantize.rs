//! `prequant dequantize`: what a converted checkpoint's codes stand for, as the formats' own libraries have it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use half::bf16;
use prequant::internal::ops::dequantize::plan;
use prequant::internal::store::{Fault, FaultyStore, LocalStore, Location};
use prequant::{Options, Progress};
use safetensors::tensor::Dtype;
use serde_json::json;

use crate::support::{self, Folder, LINEAR, Run, Stored, Tensor, contents, file_names, llama, read_tensors, serialize};

fn dequantize(folder: &Folder, flags: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("dequantize").arg(folder.destination()).arg(folder.beside("restored")).args(flags))
}

fn restored(folder: &Folder) -> BTreeMap<String, Stored> {
    read_tensors(&folder.beside("restored")).into_iter().map(|(name, (_, stored))| (name, stored)).collect()
}

/// Weights, and what llm-compressor makes of them.
fn goldens(file: &str) -> BTreeMap<String, Stored> {
    support::goldens("group-goldens", file)
}

fn linear(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.up_proj.weight")
}

/// Every golden weight: converted, and back. MXFP4's largest numbers overflow in the reference alone.
fn check(format: &str, dtype: &str, group: &str, flags: &[&str]) {
    let (inputs, outputs) = (goldens(&format!("input-{dtype}")), goldens(&format!("{format}-{dtype}")));
    let zeroed = |case: &str| format == "mxfp4" && (case == "huge" || dtype == "f16" && case == "subnormal");
    let cases: Vec<&String> = inputs.keys().filter(|case| !zeroed(case)).collect();
    let folder = Folder::new("llama");
    let weight = |(layer, case): (usize, &&String)| {
        let (dtype, shape, data) = &inputs[*case];
        Tensor::new(&linear(layer), *dtype, shape, data.clone())
    };
    folder.write("model.safetensors", serialize(&cases.iter().enumerate().map(weight).collect::<Vec<_>>()));
    folder.convert(&[&["--format", format], flags].concat()).ok();
    dequantize(&folder, &[]).ok();
    let found = restored(&folder);
    assert_eq!(found.len(), cases.len());
    for (layer, case) in cases.iter().enumerate() {
        let expected = outputs.get(&format!("{case}/g{group}/restored")).unwrap_or(&inputs[*case]);
        let stored = &found[&linear(layer)];
        assert_eq!((stored.0, &stored.1), (expected.0, &expected.1), "{format} {dtype} {case}");
        let size = stored.0.bitsize() / 8;
        let mut pairs = stored.2.chunks(size).zip(expected.2.chunks(size));
        assert!(pairs.all(|(a, b)| a == b || is_nan(a, stored.0) && is_nan(b, stored.0)), "{format} {dtype} {case}");
    }
}

/// A NaN's bits are the processor's choice in the reference.
fn is_nan(bytes: &[u8], dtype: Dtype) -> bool {
    match dtype {
        Dtype::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).is_nan(),
        Dtype::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).is_nan(),
        _ => f32::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
    }
}

#[test]
fn integers_decode_as_compressed_tensors_decompresses_them() {
    for dtype in ["bf16", "f16", "f32"] {
        check("int4", dtype, "128", &[]);
        check("int4", dtype, "channel", &["--group-size", "channel"]);
        check("int4-asym", dtype, "64", &["--group-size", "64"]);
        check("int4-asym", dtype, "channel", &["--group-size", "channel", "--max-shard-size", "5kB"]);
    }
}

#[test]
fn floats_decode_as_compressed_tensors_decompresses_them() {
    for dtype in ["bf16", "f16", "f32"] {
        check("nvfp4", dtype, "16", &[]);
    }
    for dtype in ["bf16", "f16", "f32"] {
        check("mxfp4", dtype, "32", &[]);
    }
}

/// In the model's dtype, as its config.json says.
#[test]
fn modelopts_layout_decodes_as_modelopt_dequantizes_it() {
    for (short, long) in [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")] {
        let outputs = support::goldens("modelopt-goldens", &format!("nvfp4-{short}"));
        let mut inputs = goldens(&format!("input-{short}"));
        inputs.extend(support::goldens("modelopt-goldens", &format!("input-{short}")));
        inputs.retain(|case, _| outputs.contains_key(&format!("{case}/restored")));
        assert!(inputs.len() > 5);
        let folder = Folder::new("llama");
        folder.write("config.json", json!({"model_type": "llama", "dtype": long}).to_string());
        let weights = inputs
            .iter()
            .enumerate()
            .map(|(layer, (_, (dtype, shape, data)))| Tensor::new(&linear(layer), *dtype, shape, data.clone()));
        folder.write("model.safetensors", serialize(&weights.collect::<Vec<_>>()));
        folder.convert(&["--format", "nvfp4", "--layout", "modelopt"]).ok();
        dequantize(&folder, &[]).ok();
        let found = restored(&folder);
        for (layer, case) in inputs.keys().enumerate() {
            assert!(found[&linear(layer)] == outputs[&format!("{case}/restored")], "{short} {case}");
        }
    }
}

/// Experts that were fused are so again, as they were: transposed or not, with rows that alternate or follow each other, biases too.
#[test]
fn fused_experts_are_put_together_again() {
    let (mlp, llama4) = ("mlp.experts", "feed_forward.experts");
    for (model_type, tensors) in [
        ("qwen3_5_moe", vec![(mlp, "gate_up_proj", &[3, 64, 96][..]), (mlp, "down_proj", &[3, 96, 32])]),
        ("llama4", vec![(llama4, "gate_up_proj", &[3, 96, 64]), (llama4, "down_proj", &[3, 32, 96])]),
        (
            "gpt_oss",
            vec![
                (mlp, "gate_up_proj", &[3, 96, 64]),
                (mlp, "gate_up_proj_bias", &[3, 64]),
                (mlp, "down_proj", &[3, 32, 96]),
                (mlp, "down_proj_bias", &[3, 96]),
            ],
        ),
    ] {
        let random = |(experts, end, shape): (&str, &str, &[usize])| {
            Tensor::random(&format!("model.layers.0.{experts}.{end}"), Dtype::BF16, shape)
        };
        let tensors: Vec<Tensor> = tensors.into_iter().map(random).collect();
        let folder = Folder::new(model_type);
        folder.write("model.safetensors", serialize(&tensors));
        folder.convert(&["--format", "int4", "--group-size", "32"]).ok();
        let run = dequantize(&folder, &[]).ok();
        assert!(!run.stderr.contains("warning"), "{}", run.stderr);
        let found = restored(&folder);
        assert_eq!(found.len(), tensors.len());
        for tensor in &tensors {
            let (dtype, shape, data) = &found[&tensor.name];
            assert_eq!((*dtype, shape), (Dtype::BF16, &tensor.shape));
            let float = |b: &[u8]| bf16::from_le_bytes([b[0], b[1]]).to_f32();
            let far = data.chunks(2).zip(tensor.data.chunks(2)).filter(|(a, b)| (float(a) - float(b)).abs() > 0.02);
            assert_eq!(far.count(), 0, "{}", tensor.name);
        }
    }
}

/// A manifest may claim that matrices of other sizes were one tensor: together they have its bytes, and each is another.
#[test]
fn matrices_that_no_fused_experts_were_taken_apart_into_stay_one_by_one() {
    let folder = Folder::new("gpt_oss");
    let name = |end: &str| format!("model.layers.0.mlp.experts.{end}");
    let tensors = [
        Tensor::random("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[64, 64]),
        Tensor::random(&name("0.gate_proj.weight"), Dtype::BF16, &[48, 32]),
        Tensor::random(&name("0.up_proj.weight"), Dtype::BF16, &[16, 32]),
    ];
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--format", "int4", "--group-size", "32", "--exclude", "experts"]).ok();
    let mut manifest = folder.read_json("prequant.json");
    let fused = json!({"name": name("gate_up_proj"), "shape": [1, 32, 64]});
    for record in manifest["tensors"].as_array_mut().unwrap() {
        let source = &mut record["sources"][0];
        if source["name"].as_str().unwrap().contains("experts") {
            source["name"] = fused["name"].clone();
            source["shape"] = fused["shape"].clone();
        }
    }
    std::fs::write(folder.destination().join("prequant.json"), manifest.to_string()).unwrap();
    std::fs::remove_file(folder.destination().join("SHA256SUMS")).unwrap();
    let run = dequantize(&folder, &[]);
    assert!(!run.stderr.contains("panicked") && [0, 3].contains(&run.code), "{}", run.stderr);
    if run.code == 0 {
        assert!(run.stderr.contains("stay one by one"), "{}", run.stderr);
    }
}

/// The bf16 that an f32 product rounds to.
fn bytes(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
}

/// bitsandbytes' weights by the book, with absmax as they are stored.
#[test]
fn nf4_and_fp4_decode_to_value_times_absmax() {
    for (format, fuse) in [("nf4", "keep"), ("fp4", "keep"), ("nf4", "fuse")] {
        let folder = Folder::new("qwen3_moe");
        let name = |expert: usize, part: &str| format!("model.layers.0.mlp.experts.{expert}.{part}_proj.weight");
        let experts = (0..2).flat_map(|expert| ["gate", "up", "down"].map(|part| name(expert, part)));
        let tensors: Vec<Tensor> = experts.map(|name| Tensor::random(&name, Dtype::BF16, &[64, 64])).collect();
        let odd = Tensor::random("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[3, 35]);
        folder.write("model.safetensors", serialize(&[tensors, vec![odd]].concat()));
        folder.convert(&["--format", format, "--experts", fuse]).ok();
        dequantize(&folder, &[]).ok();
        let (found, coded) = (restored(&folder), read_tensors(&folder.destination()));
        assert_eq!(found.len(), if fuse == "fuse" { 3 } else { 7 });
        for (name, (dtype, shape, data)) in &found {
            let floats = |suffix: &str| -> Vec<f32> {
                let (_, (_, _, data)) = &coded[&format!("{name}{suffix}")];
                data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            };
            let (values, absmax, codes) = (floats(".quant_map"), floats(".absmax"), &coded[name].1.2);
            let count: usize = shape.iter().product();
            let code = |i: usize| usize::from(codes[i / 2] >> (4 - i % 2 * 4) & 15);
            // FP4's code 8 is a zero with a sign.
            let sign = |i: usize| if format == "fp4" && code(i) == 8 { -1.0 } else { 1.0 };
            let value = |i: usize| values[code(i)] * sign(i) * absmax[i / 64];
            assert_eq!(*dtype, Dtype::BF16);
            assert!(*data == bytes((0..count).map(value)), "{format} {fuse} {name}");
        }
    }
}

#[test]
fn double_quantization_is_undone_first() {
    let folder = Folder::new("llama");
    let weight = Tensor::random(&linear(0), Dtype::F32, &[300, 640]);
    folder.write("model.safetensors", serialize(std::slice::from_ref(&weight)));
    folder.convert(&["--double-quant"]).ok();
    dequantize(&folder, &["--memory", "24MiB", "--threads", "3"]).ok();
    let found = &restored(&folder)[&linear(0)];
    let floats = |data: &[u8]| -> Vec<f64> {
        data.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
    };
    let (found, source) = (floats(&found.2), floats(&weight.data));
    let error: f64 = found.iter().zip(&source).map(|(a, b)| (a - b).powi(2)).sum();
    let relative = error / source.iter().map(|x| x * x).sum::<f64>();
    let expected =
        folder.read_json("prequant.json")["summary"]["statistics"]["relative_squared_error"].as_f64().unwrap();
    assert!((relative / expected - 1.0).abs() < 0.02, "{relative}, and the manifest says {expected}");
}

/// Rows and columns are the model's again, and what MXFP4 holds exactly comes back exactly.
#[test]
fn gpt_oss_layout_decodes_to_the_models_own() {
    let name = "model.layers.0.mlp.experts.down_proj";
    let value = |i: usize| [0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0][i * 7 % 8];
    let weight = Tensor::new(name, Dtype::BF16, &[2, 64, 48], bytes((0..2 * 64 * 48).map(value)));
    let folder = Folder::new("gpt_oss");
    folder.write("model.safetensors", serialize(std::slice::from_ref(&weight)));
    folder.convert(&["--format", "mxfp4", "--layout", "gpt-oss"]).ok();
    dequantize(&folder, &[]).ok();
    assert_eq!(restored(&folder)[name], (weight.dtype, weight.shape, weight.data));
}

#[test]
fn all_else_is_as_it_was_in_the_source() {
    let folder = Folder::new("qwen3_moe");
    let config = "{\n  \"eps\": 1e-06,\n  \"model_type\": \"qwen3_moe\"\n}\n";
    folder.write("config.json", config);
    folder.write("tokenizer.json", "{}");
    folder.write("README.md", "# A model\n");
    let expert = Tensor::random("model.layers.0.mlp.experts.0.up_proj.weight", Dtype::BF16, &[64, 64]);
    folder.write("model.safetensors", serialize(&[llama(), vec![expert]].concat()));
    folder.convert(&[]).ok();
    assert_ne!(folder.read("README.md"), b"# A model\n");
    let run = dequantize(&folder, &["--json", "--max-shard-size", "10kB"]).ok();
    let json: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    let files = contents(&folder.beside("restored"));
    assert_eq!(files["config.json"], config.as_bytes());
    assert_eq!(files["README.md"], b"# A model\n");
    assert_eq!(files["tokenizer.json"], b"{}");
    assert!(files.contains_key("model-00001-of-00004.safetensors") && !files.contains_key("prequant.json"));
    assert_eq!(json["files"].as_array().unwrap().len() + 1, files.len());
    let (found, source) = (restored(&folder), read_tensors(&folder.source()));
    for name in ["lm_head.weight", "model.norm.weight"] {
        assert_eq!(found[name], source[name].1);
    }
    assert!(found.iter().all(|(name, (dtype, shape, _))| (*dtype, shape) == (source[name].1.0, &source[name].1.1)));
    // It can be converted again, as any source.
    folder.convert_from(&folder.beside("restored"), &["--force", "--format", "int4", "--group-size", "32"]).ok();
}

#[test]
fn what_prequant_did_not_convert_is_refused() {
    let folder = Folder::llama();
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    let run = Run::of(command.arg("dequantize").arg(folder.source()).arg(folder.beside("restored")));
    run.fails(3, &["prequant.json"]);
    assert!(!folder.beside("restored").exists());
}

#[test]
fn a_manifest_that_tells_of_other_tensors_is_refused() {
    let folder = Folder::llama();
    folder.convert(&["--format", "int4", "--group-size", "32"]).ok();
    let manifest = folder.read_json("prequant.json");
    let path = folder.destination().join("prequant.json");
    let records = manifest["tensors"].as_array().unwrap();
    for tensors in [Vec::new(), records[1..].to_vec(), [records.clone(), records[..1].to_vec()].concat()] {
        let mut other = manifest.clone();
        other["tensors"] = tensors.into();
        std::fs::write(&path, other.to_string()).unwrap();
        let run = dequantize(&folder, &[]);
        assert_eq!(run.code, 3, "{}", run.stderr);
        assert!(!folder.beside("restored").exists());
    }
}

#[test]
fn a_checkpoint_of_one_file_without_a_config_is_decoded_too() {
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&llama()));
    std::fs::remove_file(folder.source().join("config.json")).unwrap();
    folder.convert_from(&folder.source().join("model.safetensors"), &["--format", "nvfp4"]).ok();
    dequantize(&folder, &[]).ok();
    assert_eq!(restored(&folder).len(), llama().len());
}

/// Absmax can't be restored without the mean that was taken off.
#[test]
fn a_quant_state_without_its_offset_is_refused() {
    let folder = Folder::llama();
    folder.convert(&["--double-quant"]).ok();
    let (path, key) = (folder.destination().join("model.safetensors"), b"nested_offset");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[at] = b'N';
    std::fs::write(&path, bytes).unwrap();
    dequantize(&folder, &[]).fails(3, &["prequant.json: weight", LINEAR, "its quant_state has no nested_offset"]);
    assert!(!folder.beside("restored").exists());
    let verified = Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("verify").arg(folder.destination()));
    assert_eq!(verified.code, 1, "{}", verified.stderr);
    assert!(verified.stdout.contains("don't agree on double quantization"), "{}", verified.stdout);
}

#[test]
fn damage_is_told_and_nothing_is_left() {
    let folder = Folder::llama();
    for damage in 0..3 {
        folder.convert(&["--force"]).ok();
        let (weights, manifest) =
            (folder.destination().join("model.safetensors"), folder.destination().join("prequant.json"));
        match damage {
            0 => {
                let mut bytes = std::fs::read(&weights).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                std::fs::write(&weights, bytes).unwrap();
            }
            1 => {
                let text = std::fs::read_to_string(&manifest).unwrap();
                std::fs::write(&manifest, text.replace(".absmax", ".absmin")).unwrap();
                let mut bytes = std::fs::read(&weights).unwrap();
                let at = bytes.windows(7).position(|window| window == b".absmax").unwrap();
                bytes[at..at + 7].copy_from_slice(b".absmin");
                std::fs::write(&weights, bytes).unwrap();
            }
            _ => {
                let mut json: serde_json::Value = folder.read_json("prequant.json");
                json["recipe"]["block_size"] = json!(32);
                std::fs::write(&manifest, json.to_string()).unwrap();
            }
        }
        let found = dequantize(&folder, &[]);
        found.fails(3, &["prequant.json"]);
        assert!(!folder.beside("restored").exists(), "{:?}", file_names(&folder.beside("restored")));
    }
}

#[test]
fn a_destination_with_something_in_it_is_refused_without_force() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    std::fs::create_dir(folder.beside("restored")).unwrap();
    std::fs::write(folder.beside("restored").join("mine"), "x").unwrap();
    dequantize(&folder, &[]).fails(3, &["--force"]);
    dequantize(&folder, &["--force"]).ok();
    assert!(folder.beside("restored").join("mine").exists());
}

/// A disk that is full for the last file, once another one is finished.
fn full_for_the_last_file(ready: PathBuf) -> Arc<FaultyStore> {
    let is_finished = move || {
        let mut ready = std::fs::read_dir(&ready).unwrap();
        ready.any(|entry| entry.unwrap().path().extension() == Some("safetensors".as_ref()))
    };
    let at = move |path: &Path| {
        let is_last = path.ends_with("model-00008-of-00008.safetensors");
        while is_last && !is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        is_last
    };
    let disk = Arc::new(FaultyStore::only_at(Arc::new(LocalStore), Fault::StorageFull, at));
    disk.arm(1);
    disk
}

struct Silent;

impl Progress for Silent {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {}
    fn kept(&self, _: usize) {}
}

#[test]
fn files_that_a_stopped_run_finished_are_kept() {
    let folder = Folder::new("llama");
    let weights: Vec<Tensor> = (0..8).map(|i| Tensor::random(&linear(i), Dtype::BF16, &[64, 64])).collect();
    folder.write("model.safetensors", serialize(&weights));
    folder.convert(&["--format", "nvfp4"]).ok();
    dequantize(&folder, &["--max-shard-size", "9kB"]).ok();
    let whole = contents(&folder.beside("restored"));
    let destination = folder.beside("stopped");
    let options = Options { threads: 2, ..Options::default() };
    let conversion = plan(folder.destination(), 9000, options).unwrap();
    let ready = destination.join(".prequant-staging/ready");
    let full = Location::new(full_for_the_last_file(ready.clone()), &*destination);
    let stopped = conversion.execute_at(&AtomicBool::new(false), &full, &Silent);
    assert!(stopped.unwrap_err().to_string().contains("make room"));
    let sealed = file_names(&ready);
    let sealed: Vec<_> = sealed.iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(!sealed.is_empty() && sealed.len() < 8, "{sealed:?}");
    assert!(!destination.join("config.json").exists() && !destination.join("SHA256SUMS").exists());
    // Another job's work isn't resumed.
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    let other = Run::of(command.arg("convert").arg(folder.source()).arg(&destination).args(["--format", "nvfp4"]));
    other.fails(3, &["unfinished conversion of something else"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    command.arg("dequantize").arg(folder.destination()).arg(&destination).args(["--max-shard-size", "9kB"]);
    let run = Run::of(&mut command).ok();
    assert!(run.stderr.contains(&format!("{} of 8", sealed.len())), "{}", run.stderr);
    assert!(contents(&destination) == whole);
}
