//! `verify` and `inspect`: every difference is found, and nothing else is.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use prequant::Report;
use prequant::internal::ops::verify::{Options, verify};
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{Folder, LINEAR, Run, Tensor, contents, llama, serialize};

/// A converted Llama in three shards, with a side file.
fn converted() -> Folder {
    let folder = Folder::new("llama");
    folder.write("tokenizer.json", "{\"a\": 1}");
    let more = (1..4).map(|i| Tensor::random(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::F16, &[60, 64]));
    folder.write("model.safetensors", serialize(&llama().into_iter().chain(more).collect::<Vec<_>>()));
    folder.convert(&["--max-shard-size", "7kB"]).ok();
    folder
}

fn run(command: &str, folder: &Folder, flags: &[&str]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg(command).arg(folder.destination()).args(flags))
}

fn check(folder: &Folder) -> Report {
    let interrupt = AtomicBool::new(false);
    let options = Options { quick: false, threads: 2, interrupt: &interrupt, hashed: &|_| {}, planned: &|_| {} };
    verify(folder.destination(), options).unwrap()
}

/// Verifying finds a difference, exits with 1, and says all of the words.
#[track_caller]
fn differs(folder: &Folder, flags: &[&str], words: &[&str]) {
    let run = run("verify", folder, flags);
    assert_eq!(run.code, 1, "{}{}", run.stdout, run.stderr);
    for word in words {
        assert!(run.stdout.contains(word), "no {word:?} in: {}", run.stdout);
    }
}

#[test]
fn a_fresh_checkpoint_is_as_it_should_be() {
    let folder = converted();
    let found = run("verify", &folder, &[]).ok();
    assert!(found.stdout.contains("OK: 8 files, 18 tensors"), "{}", found.stdout);
    assert_eq!(run("verify", &folder, &["--quiet"]).ok().stdout, "");
    run("verify", &folder, &["--quick"]).ok();
    let json: Value = serde_json::from_str(&run("verify", &folder, &["--json"]).ok().stdout).unwrap();
    assert_eq!((&json["ok"], &json["differences"]), (&true.into(), &Value::Array(Vec::new())));
    let source = folder.source();
    run("verify", &folder, &["--against", source.to_str().unwrap()]).ok();
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let folder = converted();
    let files: Vec<(String, Vec<u8>)> = contents(&folder.destination()).into_iter().collect();
    let total: usize = files.iter().map(|(_, content)| content.len()).sum();
    let mut state = 42u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for round in 0..1000 {
        // Every other round takes any byte of all, the others any file, so that small files have their share.
        let (file, byte) = if round % 2 == 0 {
            let file = random(files.len());
            (file, random(files[file].1.len()))
        } else {
            let mut byte = random(total);
            let file = files.iter().position(|(_, content)| {
                let here = byte < content.len();
                byte -= if here { 0 } else { content.len() };
                here
            });
            (file.unwrap(), byte)
        };
        let (name, content) = &files[file];
        let (path, mut damaged) = (folder.destination().join(name), content.clone());
        damaged[byte] ^= 1 << random(8);
        fs::write(&path, &damaged).unwrap();
        let report = check(&folder);
        assert!(!report.differences.is_empty(), "bit in byte {byte} of {name}");
        fs::write(&path, content).unwrap();
    }
    assert_eq!(check(&folder).differences, []);
}

#[test]
fn differences_are_named_by_file_and_tensor() {
    let folder = converted();
    let whole = contents(&folder.destination());
    let restore =
        || whole.iter().for_each(|(name, content)| fs::write(folder.destination().join(name), content).unwrap());
    let change = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut content = whole[name].clone();
        change(&mut content);
        fs::write(folder.destination().join(name), content).unwrap();
    };
    let shard = "model-00001-of-00003.safetensors";
    let last = |content: &mut Vec<u8>| *content.last_mut().unwrap() ^= 1;
    change(shard, &last);
    differs(&folder, &[], &[shard, "its SHA-256 is", "tensor \"lm_head.weight\": its", "2 differences"]);
    let source = folder.source();
    differs(
        &folder,
        &["--against", source.to_str().unwrap()],
        &[shard, "isn't what converting the source gives, from byte"],
    );
    restore();
    change(shard, &|content| content.truncate(content.len() - 1));
    differs(&folder, &["--quick"], &[shard, "bytes, expected", "truncated"]);
    restore();
    change("tokenizer.json", &last);
    differs(&folder, &[], &["tokenizer.json: its SHA-256 is", "1 difference"]);
    restore();
    change("prequant.json", &|content| content.truncate(content.len() / 2));
    differs(&folder, &[], &["prequant.json: not a manifest"]);
    restore();
    change("SHA256SUMS", &|content| content.extend_from_slice(b"more\n"));
    differs(&folder, &[], &["SHA256SUMS: it has more than a line for each file"]);
    restore();
    change("config.json", &|content| {
        *content = String::from_utf8_lossy(content).replace("\"nf4\"", "\"fp4\"").into_bytes();
    });
    differs(&folder, &[], &["config.json: its SHA-256", "bnb_4bit_quant_type is \"fp4\", expected \"nf4\""]);
    restore();
    fs::remove_file(folder.destination().join(shard)).unwrap();
    differs(&folder, &["--quick"], &[shard, "it is missing"]);
    restore();
    fs::write(folder.destination().join("model-00004-of-00004.safetensors"), "").unwrap();
    differs(&folder, &["--quick"], &["model-00004-of-00004.safetensors", "not in the manifest"]);
}

/// Files of several buffers, so that threads share one: tensors that aren't begun, tensors that end inside of a buffer.
#[test]
fn any_number_of_threads_finds_the_same() {
    let folder = Folder::new("llama");
    let embedding = Tensor::random("model.embed_tokens.weight", Dtype::BF16, &[1500, 1024]);
    let name = |i| format!("model.layers.{i}.mlp.up_proj.weight");
    let linears = (0..60).map(|i| Tensor::random(&name(i), Dtype::BF16, &[200 + 8 * i, 1024]));
    folder.write("model.safetensors", serialize(&[embedding].into_iter().chain(linears).collect::<Vec<_>>()));
    for shard_size in ["1GB", "6MB"] {
        let destination = folder.beside(shard_size);
        let command = env!("CARGO_BIN_EXE_prequant");
        let convert = ["convert", "--max-shard-size", shard_size];
        Run::of(Command::new(command).args(convert).arg(folder.source()).arg(&destination)).ok();
        let all: u64 = sizes(&destination);
        let mut reports = Vec::new();
        for damaged in [false, true] {
            if damaged {
                damage(&destination);
            }
            for threads in [1, 2, 3, 8] {
                let hashed = AtomicU64::new(0);
                let count = |bytes| _ = hashed.fetch_add(bytes, Ordering::Relaxed);
                let report = verify(&destination, Options { threads, hashed: &count, ..Options::default() }).unwrap();
                assert_eq!(hashed.into_inner(), all);
                assert_eq!((report.bytes, report.differences.is_empty()), (all, !damaged), "{threads} threads");
                reports.push(serde_json::to_string(&report).unwrap());
            }
        }
        assert!(reports[..4].iter().all(|report| *report == reports[0]));
        assert!(reports[4..].iter().all(|report| *report == reports[4]), "{:?}", &reports[4..]);
        assert!(reports[4].matches("\"tensor\"").count() > 20, "{}", reports[4]);
    }
}

/// Bytes of all files that the manifest lists.
fn sizes(folder: &Path) -> u64 {
    let manifest: Value = serde_json::from_slice(&fs::read(folder.join("prequant.json")).unwrap()).unwrap();
    manifest["files"].as_array().unwrap().iter().map(|file| file["size"].as_u64().unwrap()).sum()
}

/// Flips a bit of every 300,000th byte of the files of weights.
fn damage(folder: &Path) {
    for (name, mut content) in contents(folder).into_iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        content.iter_mut().rev().step_by(300_000).for_each(|byte| *byte ^= 4);
        fs::write(folder.join(name), content).unwrap();
    }
}

/// As an attacker would: everything is in step but one thing.
#[test]
fn a_manifest_that_lies_is_found_out() {
    let lie = |from: &str, to: &str| {
        let folder = converted();
        let manifest = String::from_utf8(folder.read("prequant.json")).unwrap();
        assert!(manifest.contains(from), "{from}");
        fs::write(folder.destination().join("prequant.json"), manifest.replace(from, to)).unwrap();
        let sums = String::from_utf8(folder.read("SHA256SUMS")).unwrap();
        let hash = Run::of(Command::new("sha256sum").arg(folder.destination().join("prequant.json"))).ok().stdout;
        let line = sums.lines().find(|line| line.ends_with("prequant.json")).unwrap();
        let sums = sums.replace(line, &format!("{}  prequant.json", &hash[..64]));
        fs::write(folder.destination().join("SHA256SUMS"), sums).unwrap();
        folder
    };
    differs(&lie("\"dtype\": \"U8\"", "\"dtype\": \"I8\""), &[], &["is U8", "expected I8"]);
    differs(&lie("tokenizer.json", "../../etc/passwd"), &[], &["names a file outside of its folder"]);
    differs(&lie("\"block_size\": 64", "\"block_size\": 128"), &[], &["says (\"nf4\", 64,", "expected (\"nf4\", 128,"]);
    let newer = lie("\"schema_version\": 2", "\"schema_version\": 3");
    differs(&newer, &[], &["prequant.json: prequant 0.", "wrote it, with schema version 3", "or a newer one"]);
    for command in ["dequantize", "convert"] {
        let to = newer.beside("elsewhere");
        let run = Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg(command).arg(newer.destination()).arg(to));
        run.fails(3, &["prequant.json", "schema version 3", "or a newer one"]);
    }
    differs(&lie("up_proj.weight.quant_map", "up_proj.weight.quant_mop"), &["--quick"], &["quant_mop", "missing"]);
    differs(
        &lie("\"relative_squared_error\": 0.0", "\"relative_squared_error\": 0.1"),
        &[],
        &["prequant.json: ", "relative_squared_error"],
    );
    let renamed = lie("\"reason\": \"", "\"reason\": \"so ");
    run("verify", &renamed, &[]).ok();
    let source = renamed.source();
    differs(&renamed, &["--against", source.to_str().unwrap()], &["its record isn't what converting the source gives"]);
}

#[test]
fn another_source_is_told_from_the_right_one() {
    let folder = converted();
    let mut other = llama();
    other[0].data[5] ^= 1;
    let more = (1..4).map(|i| Tensor::random(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::F16, &[60, 64]));
    folder.write("model.safetensors", serialize(&other.into_iter().chain(more).collect::<Vec<_>>()));
    let source = folder.source();
    differs(&folder, &["--against", source.to_str().unwrap()], &[LINEAR, "its bytes aren't"]);
}

#[test]
fn folders_without_a_manifest_are_bad_input() {
    let folder = Folder::llama();
    fs::create_dir(folder.destination()).unwrap();
    run("verify", &folder, &[]).fails(3, &["no prequant.json"]);
    fs::create_dir(folder.destination().join(".prequant-staging")).unwrap();
    run("verify", &folder, &[]).fails(3, &["never finished"]);
}

#[test]
fn sha256sum_agrees() {
    let folder = converted();
    let sums = || {
        Command::new("sha256sum").args(["--check", "--status", "SHA256SUMS"]).current_dir(folder.destination()).status()
    };
    assert!(sums().unwrap().success());
    fs::write(folder.destination().join("tokenizer.json"), "{}").unwrap();
    assert!(!sums().unwrap().success());
}

#[test]
fn inspect_shows_weights_with_their_formats_and_sizes() {
    let folder = converted();
    let shown = run("inspect", &folder, &[]).ok().stdout;
    let line = |name: &str| shown.lines().find(|line| line.contains(name)).unwrap().to_owned();
    assert!(line(LINEAR).starts_with("nf4") && line("lm_head.weight").starts_with("BF16"), "{shown}");
    assert!(!shown.contains("quant_map"), "{shown}");
    let json: Value = serde_json::from_str(&run("inspect", &folder, &["--json"]).ok().stdout).unwrap();
    assert_eq!((&json["formats"]["nf4"]["tensors"], &json["model_type"]), (&4.into(), &"llama".into()));
    let source = Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("inspect").arg(folder.source())).ok();
    assert!(source.stdout.contains("16.00 bits per weight"), "{}", source.stdout);
}

/// Codes and all that belongs to them are one line, whatever the format.
#[test]
fn inspect_puts_the_parts_of_every_format_together() {
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    for (format, flags, bits) in [
        ("fp4", &["--double-quant"][..], 5.2..5.3),
        ("int4", &["--group-size", "32"], 4.5..4.6),
        ("int4-asym", &["--group-size", "32"], 4.6..4.7),
        ("mxfp4", &[], 4.25..4.26),
        ("nvfp4", &[], 4.5..4.6),
        ("nvfp4", &["--layout", "modelopt"], 4.5..4.6),
    ] {
        let folder = Folder::new("qwen3_moe");
        folder.convert_from(&fixture, &[&["--format", format], flags].concat()).ok();
        let json: Value = serde_json::from_str(&run("inspect", &folder, &["--json"]).ok().stdout).unwrap();
        let formats = json["formats"].as_object().unwrap();
        assert_eq!(formats.keys().collect::<Vec<_>>(), ["BF16", format], "{flags:?}");
        assert_eq!(json["tensors"].as_array().unwrap().len(), 69, "{format} {flags:?}");
        let (bytes, weights) = (&formats[format]["bytes"], &formats[format]["weights"]);
        let found = bytes.as_f64().unwrap() * 8.0 / weights.as_f64().unwrap();
        assert!(bits.contains(&found), "{format} {flags:?}: {found}");
    }
}
