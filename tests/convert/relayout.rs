//! `convert` on a converted checkpoint: its experts in another layout, the bytes those of converting the source so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, Run, Tensor, contents, serialize};

/// Experts of two layers, and what is kept or quantized whatever the layout.
fn tensors() -> Vec<Tensor> {
    let mut tensors = Vec::new();
    for layer in 0..2 {
        let name = |end: &str| format!("model.layers.{layer}.{end}.weight");
        tensors.push(Tensor::random(&name("self_attn.q_proj"), Dtype::BF16, &[24, 40]));
        tensors.push(Tensor::random(&name("mlp.gate"), Dtype::BF16, &[11, 32]));
        for e in 0..11 {
            for (projection, shape) in [("gate", [16, 32]), ("up", [16, 32]), ("down", [32, 16])] {
                let name = name(&format!("mlp.experts.{e}.{projection}_proj"));
                tensors.push(Tensor::random(&name, Dtype::BF16, &shape));
            }
        }
    }
    tensors
}

fn convert(from: &Path, to: &Path, flags: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("convert").arg(from).arg(to).args(flags))
}

fn verify(folder: &Path, flags: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("verify").arg(folder).args(flags))
}

/// A source that is converted in both layouts, with the same flags.
struct Both {
    folder: Folder,
}

impl Both {
    fn new(model_type: &str, tensors: &[Tensor], flags: &[&str]) -> Both {
        let folder = Folder::new(model_type);
        folder.write("model.safetensors", serialize(tensors));
        folder.write("README.md", "a model");
        let both = Both { folder };
        for layout in ["keep", "fuse"] {
            convert(&both.folder.source(), &both.path(layout), &[&["--experts", layout], flags].concat()).ok();
        }
        both
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.beside(name)
    }

    /// Lays the one out as the other, and compares all files but the manifest and its own checksum.
    fn check(&self, from: &str, to: &str, flags: &[&str]) -> Value {
        let relaid = self.path(&format!("{from} as {to}"));
        convert(&self.path(from), &relaid, &[&["--experts", to, "--force"], flags].concat()).ok();
        let (mut found, mut expected) = (contents(&relaid), contents(&self.path(to)));
        let manifests = [&mut found, &mut expected].map(|files| {
            files.remove("SHA256SUMS").unwrap();
            let manifest: Value = serde_json::from_slice(&files.remove("prequant.json").unwrap()).unwrap();
            manifest
        });
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        assert!(found == expected, "{from} as {to}, {flags:?}");
        verify(&relaid, &[]).ok();
        verify(&relaid, &["--against", self.folder.source().to_str().unwrap()]).ok();
        let [mut found, mut expected] = manifests;
        assert_eq!(found["relaid_from"], from);
        assert_eq!(found["summary"]["statistics"], self.manifest(from)["summary"]["statistics"]);
        for manifest in [&mut found, &mut expected] {
            manifest.as_object_mut().unwrap().remove("relaid_from");
            manifest["summary"].as_object_mut().unwrap().remove("statistics");
            for tensor in manifest["tensors"].as_array_mut().unwrap() {
                let name = tensor["outputs"][0]["name"].as_str().unwrap().to_owned();
                if name.contains(".experts.") || name.contains(".moe.") {
                    tensor.as_object_mut().unwrap().remove("statistics");
                }
            }
        }
        assert_eq!(found, expected);
        found
    }

    fn manifest(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name).join("prequant.json")).unwrap()).unwrap()
    }
}

#[test]
fn the_bytes_are_those_of_converting_the_source_in_that_layout() {
    for flags in [&[][..], &["--block-size", "32", "--format", "fp4"], &["--only-experts", "--block-size", "512"]] {
        let both = Both::new("qwen3_moe", &tensors(), flags);
        both.check("keep", "fuse", &[]);
        both.check("keep", "fuse", &["--threads", "1", "--memory", "32MiB"]);
        both.check("fuse", "keep", &[]);
    }
}

#[test]
fn there_and_back_is_where_it_began() {
    let both = Both::new("qwen3_moe", &tensors(), &[]);
    both.check("keep", "fuse", &[]);
    convert(&both.path("keep as fuse"), &both.path("back"), &["--experts", "keep"]).ok();
    let weights = |name: &str| fs::read(both.path(name).join("model.safetensors")).unwrap();
    assert!(weights("back") == weights("keep"));
    verify(&both.path("back"), &["--against", both.folder.source().to_str().unwrap()]).ok();
}

#[test]
fn shards_can_be_of_another_size() {
    let both = Both::new("qwen3_moe", &tensors(), &[]);
    let sharded = both.path("sharded");
    convert(&both.path("keep"), &sharded, &["--experts", "fuse", "--max-shard-size", "6kB"]).ok();
    convert(&both.folder.source(), &both.path("fresh"), &["--experts", "fuse", "--max-shard-size", "6kB"]).ok();
    let (found, expected) = (contents(&sharded), contents(&both.path("fresh")));
    assert!(found.len() > 6, "shards");
    for (name, bytes) in found.iter().filter(|(name, _)| !["prequant.json", "SHA256SUMS"].contains(&name.as_str())) {
        assert!(expected[name] == *bytes, "{name}");
    }
    convert(&sharded, &both.path("whole"), &["--experts", "keep", "--max-shard-size", "1GB"]).ok();
    let weights = |name: &str| fs::read(both.path(name).join("model.safetensors")).unwrap();
    assert!(weights("whole") == weights("keep"));
}

#[test]
fn stacked_projections_are_taken_apart_and_put_together() {
    let stacked = ["gate", "up"]
        .map(|p| Tensor::random(&format!("model.layers.4.moe.{p}_proj.weight"), Dtype::BF16, &[3, 4, 16]));
    let both = Both::new("step3p7", &stacked, &[]);
    both.check("keep", "fuse", &[]);
    both.check("fuse", "keep", &[]);
}

#[test]
fn a_run_that_has_finished_is_not_done_again() {
    let both = Both::new("qwen3_moe", &tensors(), &[]);
    let relaid = both.path("relaid");
    convert(&both.path("keep"), &relaid, &["--experts", "fuse"]).ok();
    let again = convert(&both.path("keep"), &relaid, &["--experts", "fuse"]).ok();
    assert!(again.stdout.contains("already converted from this source"), "{}", again.stdout);
    // A conversion of the source gives the same weights and more of a manifest: it isn't that one.
    convert(&both.folder.source(), &relaid, &["--experts", "fuse"]).fails(3, &["--force"]);
}

#[test]
fn dry_run_tells_of_the_tensors_that_it_comes_to() {
    let both = Both::new("qwen3_moe", &tensors(), &[]);
    let run = convert(&both.path("keep"), &both.path("none"), &["--experts", "fuse", "--dry-run"]).ok();
    for words in ["mlp.experts.gate_up_proj", "[11, 32, 32]", "rewritten in the other layout", "6 tensors in nf4"] {
        assert!(run.stdout.contains(words), "no {words:?} in {}", run.stdout);
    }
    assert!(!both.path("none").exists());
}

#[test]
fn what_would_need_quantizing_again_is_refused() {
    let both = Both::new("qwen3_moe", &tensors(), &[]);
    let refused = |from: &str, flags: &[&str], words: &[&str]| {
        convert(&both.path(from), &both.path("none"), flags).fails(3, words);
        assert!(!both.path("none").exists());
    };
    refused("keep", &[], &["keep", "already converted", "--experts fuse"]);
    refused("fuse", &["--experts", "fuse"], &["already converted", "--experts keep"]);
    refused("keep", &["--experts", "fuse", "--format", "fp4"], &["other options", "bf16"]);
    refused("keep", &["--experts", "fuse", "--block-size", "32"], &["other options"]);
    refused("keep", &["--experts", "fuse", "--exclude", "q_proj"], &["other options"]);

    let refused = |model_type: &str, tensors: &[Tensor], flags: &[&str], words: &[&str]| {
        let both = Both::new(model_type, tensors, flags);
        convert(&both.path("keep"), &both.path("none"), &["--experts", "fuse"]).fails(3, words);
        convert(&both.path("fuse"), &both.path("none"), &["--experts", "keep"]).fails(3, words);
    };
    refused("qwen3_moe", &tensors(), &["--double-quant"], &["double quantization", "bf16"]);
    refused("qwen3_moe", &tensors(), &["--block-size", "1024"], &["512 weights", "blocks of 1024"]);
    let name = "model.language_model.layers.0.mlp.experts.gate_up_proj";
    let config = json!({"model_type": "qwen3_vl_moe", "hidden_size": 64, "moe_intermediate_size": 16});
    let folder = Folder::new("");
    folder.write("config.json", config.to_string());
    folder.write("model.safetensors", serialize(&[Tensor::random(name, Dtype::BF16, &[3, 64, 32])]));
    folder.convert(&[]).ok();
    convert(&folder.destination(), &folder.beside("none"), &["--experts", "fuse"]).fails(3, &[name, "transposed"]);
}

#[test]
fn what_is_not_as_its_manifest_says_is_refused() {
    let both = Both::new("qwen3_moe", &tensors(), &[]);
    let keep = both.path("keep");
    let refused = |words: &[&str]| {
        convert(&keep, &both.path("none"), &["--experts", "fuse"]).fails(3, words);
        assert!(!both.path("none").join("prequant.json").exists());
    };
    let weights = fs::read(keep.join("model.safetensors")).unwrap();
    let mut damaged = weights.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(keep.join("model.safetensors"), &damaged).unwrap();
    refused(&["model.safetensors", "prequant.json", "SHA-256"]);
    fs::write(keep.join("model.safetensors"), &weights).unwrap();

    let text = fs::read_to_string(keep.join("prequant.json")).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut manifest: Value = serde_json::from_str(&text).unwrap();
        change(&mut manifest);
        fs::write(keep.join("prequant.json"), manifest.to_string()).unwrap();
    };
    with(&|m| m["tensors"][0]["sources"][0]["dtype"] = json!("BF17"));
    refused(&["prequant.json", "dtype"]);
    with(&|m| m["tensors"][0]["sources"][0]["shape"] = json!([u64::MAX, u64::MAX]));
    refused(&["prequant.json", "shape"]);
    with(&|m| {
        // In no file too much, but in both together.
        let mut other = m["source"]["files"][0].clone();
        other["name"] = json!("other.safetensors");
        m["source"]["files"].as_array_mut().unwrap().push(other);
        for (i, file) in [(0, "model.safetensors"), (1, "other.safetensors"), (2, "other.safetensors")] {
            let source = &mut m["tensors"][i]["sources"][0];
            (source["dtype"], source["shape"], source["file"]) = (json!("U8"), json!([1u64 << 62]), json!(file));
        }
    });
    refused(&["prequant.json", "shape"]);
    with(&|m| m["tensors"][0]["sources"][0]["file"] = json!("../other"));
    refused(&["prequant.json", "file"]);
    with(&|m| m["tensors"][0]["sources"][0]["shape"] = json!([2, 2]));
    refused(&["would convert its source otherwise"]);
    with(&|m| m["tensors"][0]["decision"] = json!("keep"));
    refused(&["would convert its source otherwise"]);
    with(&|m| m["tensors"].as_array_mut().unwrap().truncate(3));
    refused(&["prequant.json", "more tensors"]);
    fs::remove_file(keep.join("prequant.json")).unwrap();
    refused(&["already quantized"]);
}
