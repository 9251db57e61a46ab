//! The command as users run it, where `command.rs` doesn't look: places to write to, and what is said to whom.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use prequant::Summary;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{Folder, Run, Tensor, contents, file_names, llama, serialize};

const FILES: [&str; 4] = ["SHA256SUMS", "config.json", "model.safetensors", "prequant.json"];

fn prequant(from: &Path, to: &Path, flags: &[&str]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("convert").arg(from).arg(to).args(flags))
}

/// A Llama with a NaN in its Linear.
fn diverged() -> Folder {
    let mut tensors = llama();
    tensors[0].data[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&tensors));
    folder
}

#[test]
fn an_empty_destination_is_filled_and_stays_empty_after_a_failure() {
    let folder = Folder::llama();
    fs::create_dir(folder.destination()).unwrap();
    folder.convert(&[]).ok();
    assert_eq!(file_names(&folder.destination()), FILES);

    let folder = diverged();
    fs::create_dir(folder.destination()).unwrap();
    folder.convert(&[]).fails(3, &["NaN"]);
    assert_eq!(fs::read_dir(folder.destination()).unwrap().count(), 0);
}

#[test]
fn a_destinations_folders_are_made() {
    let folder = Folder::llama();
    let to = folder.beside("out/tiny/nf4");
    prequant(&folder.source(), &to, &[]).ok();
    assert_eq!(file_names(&to), FILES);
}

#[test]
fn a_link_to_a_folder_is_a_destination_and_a_link_to_nothing_is_none() {
    let folder = Folder::llama();
    fs::create_dir(folder.beside("disk")).unwrap();
    symlink("disk", folder.destination()).unwrap();
    folder.convert(&[]).ok();
    assert_eq!(file_names(&folder.beside("disk")), FILES);
    assert!(folder.destination().is_symlink());

    let dangling = folder.beside("dangling");
    symlink("nowhere", &dangling).unwrap();
    prequant(&folder.source(), &dangling, &[]).fails(3, &["can't make a folder in it"]);
    assert!(dangling.is_symlink() && !folder.beside("nowhere").exists());
}

#[test]
fn a_destination_spelled_with_dots_is_the_folder_it_leads_to() {
    let folder = Folder::llama();
    let before = contents(&folder.source());
    for to in ["new/../source", "new/../source/inside", "new/sub/../../source"] {
        for flags in [&[][..], &["--force"]] {
            let run = prequant(&folder.source(), &folder.beside(to), flags);
            assert!(contents(&folder.source()) == before, "converting to {to} {flags:?} changed the source");
            run.fails(3, &["source"]);
        }
    }
}

#[test]
fn a_folder_in_use_is_left_alone_however_it_is_spelled() {
    let folder = Folder::llama();
    fs::create_dir(folder.destination()).unwrap();
    fs::write(folder.destination().join("config.json"), "mine").unwrap();
    for to in ["converted/.", "./converted", "source/../converted", "new/../converted"] {
        let run = prequant(&folder.source(), &folder.beside(to), &[]);
        assert_eq!(fs::read(folder.destination().join("config.json")).unwrap(), b"mine", "{to}: overwritten");
        assert_eq!(file_names(&folder.destination()), ["config.json"], "{to}");
        run.fails(3, &["--force"]);
    }
}

#[test]
fn quiet_prints_nothing_but_errors() {
    let folder = Folder::new("an_architecture_to_come");
    folder.write("model.safetensors", serialize(&llama()));
    for flags in [&["--quiet", "--dry-run"][..], &["-q"], &["-q", "--force", "--threads", "2"]] {
        let run = folder.convert(flags).ok();
        assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""), "{flags:?}");
    }
    let failed = folder.convert(&["--quiet", "--format", "fp4"]);
    assert_eq!((failed.stdout.as_str(), failed.stderr.lines().count()), ("", 1));
    failed.fails(3, &["--force"]);
}

#[test]
fn json_names_the_kind_of_every_failure() {
    let kind_of = |run: Run| {
        let lines = run.stdout.lines().count();
        let json: Value = serde_json::from_str(&run.stdout).unwrap_or_else(|_| panic!("not JSON: {}", run.stdout));
        let error = &json["error"];
        assert_eq!((lines, &error["exit_code"]), (1, &Value::from(run.code)));
        assert_eq!(format!("error: {}", error["message"].as_str().unwrap()), run.stderr.trim_end());
        error["kind"].as_str().unwrap().to_owned()
    };
    let llama_with = |flags: &[&str]| kind_of(Folder::llama().convert(&[&["--json", "--quiet"], flags].concat()));
    assert_eq!(llama_with(&["--include", "no such name"]), "pattern");
    assert_eq!(llama_with(&["--only-experts"]), "nothing_to_quantize");
    assert_eq!(llama_with(&["--memory", "1MiB"]), "memory");
    assert_eq!(llama_with(&["--dry-run", "--exclude", "("]), "pattern");
    assert_eq!(kind_of(diverged().convert(&["--json", "--quiet"])), "non_finite");

    let kind_with = |name: &str, content: &[u8]| {
        let folder = Folder::llama();
        folder.write(name, content);
        kind_of(folder.convert(&["--json"]))
    };
    let double = serialize(&[Tensor::random("model.layers.0.mlp.up_proj.weight", Dtype::F64, &[8, 8])]);
    assert_eq!(kind_with("model.safetensors", &double), "unsupported_dtype");
    assert_eq!(kind_with("model.safetensors", b"not a file of tensors"), "malformed");
    let gptq = serialize(&[Tensor::random("model.layers.0.mlp.up_proj.qweight", Dtype::I32, &[8, 8])]);
    assert_eq!(kind_with("model.safetensors", &gptq), "already_quantized");
    let nowhere = Folder::llama();
    assert_eq!(kind_of(nowhere.convert_from(&nowhere.beside("nowhere"), &["--json"])), "source_missing");
    assert_eq!(kind_of(Folder::new("llama").convert(&["--json"])), "not_a_checkpoint");
    assert_eq!(kind_of(nowhere.convert_from(&nowhere.beside("."), &["--json"])), "not_a_checkpoint");
    fs::write(nowhere.destination(), "a file").unwrap();
    assert_eq!(kind_of(nowhere.convert(&["--json"])), "destination");
}

#[test]
fn json_says_what_the_manifest_says() {
    let folder = Folder::new("an_architecture_to_come");
    folder.write("model.safetensors", serialize(&llama()));
    let run = folder.convert(&["--json", "--hash-source"]).ok();
    assert_eq!(run.stdout.lines().count(), 1);
    let said: Value = serde_json::from_str(&run.stdout).unwrap();
    let manifest = folder.read_json("prequant.json");
    assert_eq!((&said["recipe"], &said["files"]), (&manifest["recipe"], &manifest["files"]));
    let summary = |json: &Value| serde_json::from_value::<Summary>(json["summary"].clone()).unwrap();
    assert_eq!(summary(&said), summary(&manifest));
    assert!(said["warnings"][0].as_str().unwrap().contains("wasn't compared"));
}

#[test]
fn experts_are_kept_as_they_are_laid_out_by_default_and_by_name() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    let expected = contents(&folder.destination());
    folder.convert(&["--experts", "keep", "--force"]).ok();
    assert!(contents(&folder.destination()) == expected);
    folder.convert(&["--experts", "melt", "--force"]).fails(2, &["melt", "keep"]);
    assert!(contents(&folder.destination()) == expected);
}

#[test]
fn only_fused_experts_are_quantized_with_only_experts_and_their_biases_are_kept() {
    let layer = "model.layers.0";
    let folder = Folder::new("gpt_oss");
    let tensors = [
        Tensor::random(&format!("{layer}.mlp.experts.gate_up_proj"), Dtype::BF16, &[2, 16, 64]),
        Tensor::random(&format!("{layer}.mlp.experts.gate_up_proj_bias"), Dtype::BF16, &[2, 64]),
        Tensor::random(&format!("{layer}.mlp.router.weight"), Dtype::BF16, &[2, 16]),
        Tensor::random(&format!("{layer}.self_attn.q_proj.weight"), Dtype::BF16, &[16, 16]),
    ];
    folder.write("model.safetensors", serialize(&tensors));
    let run = folder.convert(&["--dry-run", "--only-experts", "--json"]).ok();
    let planned: Value = serde_json::from_str(&run.stdout).unwrap();
    let decisions = planned["tensors"].as_array().unwrap().iter();
    let quantized: Vec<&str> =
        decisions.filter(|t| t["decision"] == "quantize").map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(quantized, [tensors[0].name.as_str()]);
    folder.convert(&["--only-experts"]).ok();
    let skipped = folder.read_json("config.json")["quantization_config"]["llm_int8_skip_modules"].to_string();
    assert!(skipped.contains("self_attn.q_proj") && !skipped.contains("experts"), "{skipped}");
}

#[test]
fn a_dry_run_leaves_source_and_destination_as_they_are() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    let before = contents(folder.source().parent().unwrap());
    folder.convert(&["--dry-run", "--force"]).ok();
    folder.convert(&["--dry-run"]).fails(3, &["--force"]);
    prequant(&folder.source(), &folder.beside("a/b"), &["--dry-run"]).ok();
    assert!(contents(folder.source().parent().unwrap()) == before && !folder.beside("a").exists());
}

#[test]
fn every_option_in_the_help_is_explained() {
    let help = Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(["convert", "--help"])).ok().stdout;
    let lines: Vec<&str> = help.lines().collect();
    let options: Vec<usize> = (0..lines.len()).filter(|&i| lines[i].trim_start().starts_with('-')).collect();
    assert!(options.len() > 15, "{help}");
    for i in options {
        // Either on the option's own line, after its name, or on the next; a value's after a colon.
        let own = lines[i].trim_start().split("  ").nth(1).is_some() || lines[i].contains(": ");
        assert!(own || lines.get(i + 1).is_some_and(|next| next.starts_with("    ")), "{}", lines[i]);
    }
    let about = Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("--help")).ok().stdout;
    assert!(about.contains("convert") && about.contains("Exit codes"), "{about}");
}

#[test]
fn more_threads_than_work_or_cores_are_no_error() {
    let folder = Folder::llama();
    folder.convert(&["--threads", "1"]).ok();
    let expected = contents(&folder.destination());
    for threads in ["2", "64", "1000000"] {
        folder.convert(&["--force", "--threads", threads]).ok();
        assert!(contents(&folder.destination()) == expected, "{threads} threads");
    }
}
