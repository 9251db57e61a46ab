//! Checkpoints that tell a consistent lie, against their source; and damaged ones that are read again.

use std::path::{Path, PathBuf};
use std::process::Command;

use prequant::{DifferenceClass, Options, VerifyOptions, verify_against};
use serde_json::{Value, json};

use crate::mutations::{apply, copy};
use crate::support::{Folder, Run, contents};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe")
}

fn run(arguments: &[&str], from: &Path, to: &Path) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments).arg(from).arg(to))
}

/// The fixture in shards, and the same with its experts rewritten.
fn converted() -> Folder {
    let folder = Folder::new("qwen3_moe");
    run(&["convert", "--max-shard-size", "200kB"], &fixture(), &folder.beside("shards")).ok();
    run(
        &["convert", "--experts", "fuse", "--max-shard-size", "5GB"],
        &folder.beside("shards"),
        &folder.beside("relaid"),
    )
    .ok();
    folder
}

/// A changed copy.
fn changed(folder: &Folder, of: &str, operations: &[Value]) -> PathBuf {
    let to = folder.beside("changed");
    if to.exists() {
        std::fs::remove_dir_all(&to).unwrap();
    }
    copy(&folder.beside(of), &to);
    operations.iter().for_each(|operation| apply(&to, operation.as_array().unwrap()));
    to
}

const INDEX: &str = "model.safetensors.index.json";
const MANIFEST: &str = "prequant.json";

#[test]
fn against_its_source_no_lie_holds() {
    let folder = converted();
    let statistics = json!(["summary", "statistics", "relative_squared_error"]);
    let manifest: Value = serde_json::from_slice(&contents(&folder.beside("relaid"))[MANIFEST]).unwrap();
    let with_statistics = |record: &Value| record["statistics"].is_object();
    let stayed = manifest["tensors"].as_array().unwrap().iter().position(with_statistics).unwrap();
    for (of, class, operations) in [
        ("shards", "ok", vec![]),
        ("relaid", "ok", vec![]),
        ("shards", "edited", vec![json!(["append", "README.md", "more"]), json!(["seal"])]),
        ("shards", "edited", vec![json!(["write", "x.png", "x"]), json!(["seal", "more"])]),
        ("relaid", "edited", vec![json!(["write", ".gitattributes", "x"])]),
        ("shards", "damage", vec![json!(["write", "adapter_config.json", "{}"]), json!(["seal", "more"])]),
        ("relaid", "damage", vec![json!(["write", "chat_template.jinja", "{}"]), json!(["seal", "more"])]),
        ("shards", "damage", vec![json!(["append", "tokenizer.json", " "]), json!(["seal"])]),
        ("shards", "damage", vec![json!(["flip", "tokenizer.json", 100, 0])]),
        ("shards", "damage", vec![json!(["replace", "config.json", "1e-06", "1e-01"]), json!(["seal"])]),
        ("shards", "damage", vec![json!(["replace", INDEX, "\"total_size\": ", "\"total_size\": 9"])]),
        ("shards", "damage", vec![json!(["append", MANIFEST, "\n"]), json!(["sums"])]),
        ("shards", "damage", vec![json!(["set", MANIFEST, ["more"], 1]), json!(["sums"])]),
        ("shards", "damage", vec![json!(["set", MANIFEST, ["relaid_from"], "fuse"]), json!(["sums"])]),
        ("shards", "damage", vec![json!(["set", MANIFEST, ["relaid_from"], "keep"]), json!(["sums"])]),
        ("shards", "damage", vec![json!(["set", MANIFEST, statistics, 0.008]), json!(["sums"])]),
        ("relaid", "damage", vec![json!(["set", MANIFEST, statistics, 0.008]), json!(["sums"])]),
        ("relaid", "damage", vec![json!(["unset", MANIFEST, ["tensors", stayed, "statistics"]]), json!(["sums"])]),
        ("relaid", "damage", vec![json!(["flip", "model.safetensors", -5000, 3]), json!(["seal", "tensors"])]),
        (
            "shards",
            "damage",
            vec![
                json!(["remove", "generation_config.json"]),
                json!(["unset", MANIFEST, ["files", 3]]),
                json!(["sums"]),
            ],
        ),
    ] {
        let checkpoint = changed(&folder, of, &operations);
        let options = VerifyOptions { threads: 2, ..VerifyOptions::default() };
        let report = verify_against(&checkpoint, fixture(), Options::default(), options).unwrap();
        let found = match (report.count(DifferenceClass::Damage), report.count(DifferenceClass::Edited)) {
            (0, 0) => "ok",
            (0, _) => "edited",
            _ => "damage",
        };
        assert_eq!(found, class, "{of} {operations:?}: {:?}", report.differences);
    }
}

#[test]
fn what_no_client_loads_may_be_edited_unless_all_is_to_be_unchanged() {
    let folder = converted();
    let edited = changed(&folder, "shards", &[json!(["append", "README.md", "more"]), json!(["write", ".git/x", "x"])]);
    let verify =
        |flags: &[&str]| Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("verify").arg(&edited).args(flags));
    let found = verify(&[]).ok().stdout;
    assert!(found.contains("README.md: ") && found.contains(".git/: ") && found.contains("OK"), "{found}");
    assert_eq!(verify(&["--strict"]).code, 1);
    let json: Value = serde_json::from_str(&verify(&["--json"]).ok().stdout).unwrap();
    assert_eq!((&json["ok"], &json["differences"][0]["class"]), (&true.into(), &"edited".into()), "{json}");
    let json: Value = serde_json::from_str(&verify(&["--json", "--strict"]).stdout).unwrap();
    assert_eq!(json["ok"], false);
}

/// By dequantize and by a change of layout: nothing damaged is passed on under a manifest that vouches for it.
#[test]
fn what_is_read_again_must_be_what_the_manifest_says() {
    let folder = converted();
    let shard = "model-00003-of-00003.safetensors";
    let config = "config.json";
    let commands = [&["dequantize"][..], &["convert", "--experts", "fuse"]];
    for (word, operations) in [
        ("tokenizer.json", vec![json!(["flip", "tokenizer.json", 100, 0])]),
        ("tokenizer.json", vec![json!(["append", "tokenizer.json", " "])]),
        ("tokenizer.json", vec![json!(["remove", "tokenizer.json"])]),
        ("generation_config.json", vec![json!(["flip", "generation_config.json", 20, 0])]),
        (config, vec![json!(["replace", config, "1e-06", "1e-01"])]),
        (config, vec![json!(["set", config, ["quantization_config", "bnb_4bit_quant_type"], "fp4"]), json!(["seal"])]),
        (
            config,
            vec![json!(["set", config, ["quantization_config", "llm_int8_skip_modules"], ["q_proj"]]), json!(["seal"])],
        ),
        ("modeling_x.py", vec![json!(["write", "modeling_x.py", "import os"])]),
        ("model.safetensors.index.json", vec![json!(["set", INDEX, ["metadata", "more"], 1])]),
        (shard, vec![json!(["flip", shard, -5000, 1])]),
        (
            "quant_state",
            vec![json!(["replace", shard, "\"blocksize\": 64", "\"blocksize\": 32"]), json!(["seal", "tensors"])],
        ),
        (
            "quant_state",
            vec![
                json!(["replace", shard, "\"quant_type\": \"nf4", "\"quant_type\": \"fp4"]),
                json!(["seal", "tensors"]),
            ],
        ),
    ] {
        let from = changed(&folder, "shards", &operations);
        for (i, command) in commands.iter().enumerate() {
            let to = folder.beside(&format!("to{i}"));
            let run = run(command, &from, &to);
            assert_eq!(run.code, 3, "{command:?} {operations:?}: {}", run.stderr);
            assert!(run.stderr.contains(word), "{command:?} {operations:?}: {}", run.stderr);
            assert!(!to.join(config).exists());
            let _ = std::fs::remove_dir_all(to);
        }
    }
    let edited = changed(&folder, "shards", &[json!(["append", "README.md", "more"]), json!(["write", "x.png", "x"])]);
    for (i, command) in commands.iter().enumerate() {
        let run = run(command, &edited, &folder.beside(&format!("to{i}"))).ok();
        assert!(run.stderr.contains("README.md") && run.stderr.contains("x.png"), "{}", run.stderr);
    }
}

#[test]
fn a_manifest_that_sha256sums_contradicts_is_not_copied_from() {
    let folder = converted();
    for (of, command) in
        [("shards", &["convert", "--experts", "fuse"][..]), ("shards", &["dequantize"]), ("relaid", &["dequantize"])]
    {
        let set = json!(["set", "prequant.json", ["source", "model_type"], "mixtral"]);
        let at = changed(&folder, of, &[set]);
        run(command, &at, &folder.beside("made")).fails(3, &["prequant.json", "SHA256SUMS", "prequant verify"]);
        assert!(!folder.beside("made").exists());
        // Nothing speaks of it then.
        std::fs::remove_file(at.join("SHA256SUMS")).unwrap();
        run(&["dequantize"], &at, &folder.beside("made")).ok();
        std::fs::remove_dir_all(folder.beside("made")).unwrap();
    }
}
