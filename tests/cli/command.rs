//! The command as users run it.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, Run, Tensor, contents, file_names, llama, read_tensors, serialize};

const HEAD: &str = "lm_head.weight";

/// A Qwen3-MoE layer: one Linear, a router, two experts.
fn moe() -> Folder {
    let folder = Folder::new("qwen3_moe");
    let names = ["self_attn.q_proj", "mlp.gate", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"];
    let layer =
        names.iter().map(|name| Tensor::random(&format!("model.layers.0.{name}.weight"), Dtype::BF16, &[64, 64]));
    let head = Tensor::random(HEAD, Dtype::BF16, &[96, 64]);
    folder.write("model.safetensors", serialize(&layer.chain([head]).collect::<Vec<_>>()));
    folder
}

/// The quantized weights' names, without the layer's.
fn quantized(folder: &Folder) -> Vec<String> {
    let tensors = read_tensors(&folder.destination());
    let weights = tensors.keys().filter_map(|name| name.strip_suffix(".absmax"));
    weights.map(|name| name.trim_start_matches("model.layers.0.").trim_end_matches(".weight").to_owned()).collect()
}

fn skipped(folder: &Folder) -> Value {
    folder.read_json("config.json")["quantization_config"]["llm_int8_skip_modules"].clone()
}

#[test]
fn options_choose_what_is_quantized_and_the_skip_list_follows() {
    let layer = "model.layers.0";
    let cases = [
        (
            &[][..],
            vec!["mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "self_attn.q_proj"],
            vec!["lm_head", "G", "score"],
        ),
        (
            &["--only-experts"],
            vec!["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"],
            vec!["lm_head", "G", "Q", "score"],
        ),
        (&["--exclude", "experts"], vec!["self_attn.q_proj"], vec!["lm_head", "E", "G", "score"]),
        (
            &["--include", "lm_head", "--exclude", r"experts\.1"],
            vec!["lm_head", "mlp.experts.0.up_proj", "self_attn.q_proj"],
            vec!["E1", "G", "score"],
        ),
    ];
    for (flags, weights, skip) in cases {
        let folder = moe();
        folder.convert(flags).ok();
        assert_eq!(quantized(&folder), weights, "{flags:?}");
        let skip: Vec<String> = skip
            .into_iter()
            .map(|entry| match entry {
                "G" => format!("{layer}.mlp.gate"),
                "Q" => format!("{layer}.self_attn.q_proj"),
                "E" => format!("{layer}.mlp.experts"),
                "E1" => format!("{layer}.mlp.experts.1.up_proj"),
                other => other.to_owned(),
            })
            .collect();
        let mut listed: Vec<String> = serde_json::from_value(skipped(&folder)).unwrap();
        listed.sort();
        assert_eq!(listed, skip, "{flags:?}");
    }
}

#[test]
fn config_json_keeps_its_text_and_gets_the_keys_that_loaders_read() {
    let folder = Folder::llama();
    let config = "{\n  \"dtype\": \"float16\",\n  \"limit\": [\n    0.0,\n    Infinity\n  ],\n  \"model_type\": \"llama\",\n  \"rms_norm_eps\": 1e-06\n}\n";
    folder.write("config.json", config);
    folder.convert(&["--format", "fp4", "--double-quant"]).ok();
    let text = String::from_utf8(folder.read("config.json")).unwrap();
    let begin = text.find("  \"quantization_config\"").unwrap();
    let end = text.find("  \"rms_norm_eps\"").unwrap();
    assert_eq!(format!("{}{}", &text[..begin], &text[end..]), config);
    let value: Value = serde_json::from_str(&text.replace("Infinity", "1")).unwrap();
    let expected = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "score"],
    });
    assert_eq!(value["quantization_config"], expected);
}

#[test]
fn the_model_card_tells_how_4_bit_experts_are_loaded() {
    let folder = moe();
    let card = || String::from_utf8(folder.read("README.md")).unwrap();
    folder.convert(&[]).ok();
    assert!(card().starts_with("## Loading") && card().contains("import prequant_loader"), "{}", card());
    folder.write("README.md", "---\nlicense: mit\n---\n# A model\n");
    folder.convert(&["--force"]).ok();
    assert!(card().starts_with("---\nlicense: mit\n---\n# A model\n\n## Loading"), "{}", card());
    let verify = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
        Run::of(command.arg("verify").arg(folder.destination()).args(flags))
    };
    verify(&["--against", folder.source().to_str().unwrap()]).ok();
    folder.convert(&["--force", "--exclude", "experts"]).ok();
    assert_eq!(card(), "---\nlicense: mit\n---\n# A model\n");
}

#[test]
fn what_lies_beside_the_weights_comes_along_but_other_weights_do_not() {
    let folder = Folder::llama();
    let kept = [
        "tokenizer.json",
        "LICENSE",
        "modeling_x.py",
        "chat_templates/tool.jinja",
        "tokenizer.model",
        "modules.json",
        "2_Dense/model.safetensors",
    ];
    let left = [
        "pytorch_model.bin",
        "x.gguf",
        "original/consolidated.00.pth",
        ".gitattributes",
        ".cache/x",
        "onnx/model.onnx",
    ];
    for name in kept.iter().chain(&left) {
        folder.write(name, if *name == "modules.json" { r#"[{"path": ""}, {"path": "2_Dense"}]"# } else { name });
    }
    for name in ["prequant.json", "SHA256SUMS"] {
        folder.write(name, "of an earlier conversion");
    }
    folder.convert(&[]).ok();
    let there = contents(&folder.destination());
    for name in kept {
        assert_eq!(there[name], fs::read(folder.source().join(name)).unwrap(), "{name}");
    }
    let mut expected: Vec<String> = kept.iter().map(|&name| name.to_owned()).collect();
    expected.extend(["SHA256SUMS", "config.json", "model.safetensors", "prequant.json"].map(str::to_owned));
    expected.sort();
    assert_eq!(there.keys().cloned().collect::<Vec<_>>(), expected);
}

#[test]
fn a_source_is_a_folder_or_a_file_with_or_without_an_index_or_links() {
    let reference = Folder::llama();
    reference.convert(&[]).ok();
    let weights = read_tensors(&reference.destination());
    let tensors = llama();

    let no_index = Folder::new("llama");
    for (i, tensor) in tensors.iter().enumerate() {
        no_index.write(&format!("model-{:05}-of-00003.safetensors", i + 1), serialize(std::slice::from_ref(tensor)));
    }
    no_index.write("consolidated.safetensors", "Mistral's own layout");
    no_index.convert(&[]).ok();
    assert!(read_tensors(&no_index.destination()) == weights);

    let file = Folder::llama();
    file.write("tokenizer.json", "{}");
    file.convert_from(&file.source().join("model.safetensors"), &[]).ok();
    let names = ["SHA256SUMS", "config.json", "model.safetensors", "prequant.json"];
    assert_eq!(file_names(&file.destination()), names);

    let alone = Folder::llama();
    fs::remove_file(alone.source().join("config.json")).unwrap();
    let run = alone.convert_from(&alone.source().join("model.safetensors"), &[]).ok();
    assert!(run.stderr.contains("warning: no config.json beside the weights"), "{}", run.stderr);
    assert!(read_tensors(&alone.destination()) == weights);

    let cache = Folder::new("llama");
    for name in ["config.json", "model.safetensors"] {
        let (blob, link) = (format!("hub/blobs/of-{name}"), format!("hub/snapshots/rev/{name}"));
        cache.write(&blob, fs::read(reference.source().join(name)).unwrap());
        fs::create_dir_all(cache.source().join("hub/snapshots/rev")).unwrap();
        symlink(format!("../../blobs/of-{name}"), cache.source().join(link)).unwrap();
    }
    cache.convert_from(&cache.source().join("hub/snapshots/rev"), &[]).ok();
    assert!(read_tensors(&cache.destination()) == weights);
}

#[test]
fn a_dry_run_shows_each_decision_with_its_reason_and_writes_nothing() {
    let folder = moe();
    let run = folder.convert(&["--dry-run", "--exclude", "q_proj"]).ok();
    let line = |name: &str| run.stdout.lines().find(|line| line.contains(name)).unwrap().to_owned();
    for (name, decision, reason) in [
        ("experts.0.up_proj", "nf4 ", "one expert's matrix"),
        ("mlp.gate.", "keep", "router"),
        ("q_proj", "keep", "exclude pattern 'q_proj'"),
        (HEAD, "keep", "output head"),
    ] {
        assert!(line(name).starts_with(decision) && line(name).contains(reason), "{}", line(name));
    }
    assert!(run.stdout.contains("2 tensors in nf4 (block 64), 3 kept"), "{}", run.stdout);
    assert!(!folder.destination().exists());

    let planned: Value = serde_json::from_str(&folder.convert(&["--dry-run", "--json"]).ok().stdout).unwrap();
    assert!(!folder.destination().exists());
    folder.convert(&[]).ok();
    assert_eq!(planned["output_bytes"], folder.read("model.safetensors").len());
    assert_eq!(planned["tensors"].as_array().unwrap().len(), 5);
    assert_eq!(planned["obstacle"], Value::Null);
    let again = folder.convert(&["--dry-run", "--json", "--double-quant"]);
    assert_eq!(again.code, 3);
    assert_eq!(serde_json::from_str::<Value>(&again.stdout).unwrap()["obstacle"]["kind"], "destination");
}

#[test]
fn quiet_is_quiet_and_json_is_one_object() {
    let folder = moe();
    let run = folder.convert(&["--quiet"]).ok();
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
    let run = folder.convert(&["--json", "--force", "--quiet"]).ok();
    let json: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(run.stderr, "");
    assert_eq!((&json["summary"]["quantized_tensors"], &json["summary"]["kept_tensors"]), (&json!(3), &json!(2)));
    let failed = folder.convert(&["--json", "--format", "fp4"]);
    let json: Value = serde_json::from_str(&failed.stdout).unwrap();
    assert_eq!((&json["error"]["kind"], &json["error"]["exit_code"]), (&json!("destination"), &json!(3)));
    failed.fails(3, &["--force"]);
}

#[test]
fn the_last_lines_say_what_was_written_and_what_it_cost() {
    let run = moe().convert(&[]).ok();
    for words in ["3 tensors in nf4 (block 64), 2 kept", "bits per quantized weight", "SNR", "hashes included"] {
        assert!(run.stdout.contains(words), "no {words:?} in {}", run.stdout);
    }
    assert!(run.stderr.contains("wrote model.safetensors"), "{}", run.stderr);
    assert!(run.stderr.contains("needs prequant's loader"), "{}", run.stderr);
    let unknown = Folder::new("model_of_tomorrow");
    unknown.write("model.safetensors", serialize(&llama()));
    assert!(unknown.convert(&[]).ok().stderr.contains("wasn't compared with transformers"));
}

#[test]
fn force_replaces_the_checkpoint_and_leaves_other_files() {
    let folder = moe();
    folder.convert(&["--max-shard-size", "3kB"]).ok();
    fs::write(folder.destination().join("notes.txt"), "mine").unwrap();
    assert!(folder.destination().join("model.safetensors.index.json").exists());
    folder.convert(&["--force", "--format", "fp4"]).ok();
    let names = ["README.md", "SHA256SUMS", "config.json", "model.safetensors", "notes.txt", "prequant.json"];
    assert_eq!(file_names(&folder.destination()), names);
}

#[test]
fn a_finished_conversion_is_not_done_again() {
    let folder = moe();
    folder.convert(&[]).ok();
    let before = contents(&folder.destination());
    let run = folder.convert(&[]).ok();
    assert!(
        run.stdout.contains("already converted from this source with these options; nothing to do"),
        "{}",
        run.stdout
    );
    assert_eq!(folder.convert(&["--quiet"]).ok().stdout, "");
    for flags in [&["--format", "fp4"][..], &["--hash-source"], &["--exclude", "q_proj"]] {
        folder.convert(flags).fails(3, &["exists and isn't empty"]);
    }
    assert_eq!(contents(&folder.destination()), before);
}

/// The next training checkpoint has the same names, sizes and headers.
#[test]
fn a_finished_conversion_of_a_source_that_changed_is_an_error_that_names_what_changed() {
    let changed = |name: &str| format!("source/{name}: ");
    type Change = fn(&Folder);
    let changes: [(&str, Change); 5] = [
        ("config.json", |folder| folder.write("config.json", r#"{"model_type": "qwen3_moe", "dtype": "bfloat16"}"#)),
        ("README.md", |folder| folder.write("README.md", "another card")),
        ("added_tokens.json", |folder| folder.write("added_tokens.json", "{}")),
        ("tokenizer.json", |folder| fs::remove_file(folder.source().join("tokenizer.json")).unwrap()),
        ("model.safetensors", |folder| flip_last_byte(&folder.source().join("model.safetensors"))),
    ];
    for (name, change) in changes {
        let folder = moe();
        folder.write("tokenizer.json", "{}");
        folder.convert(&["--hash-source"]).ok();
        let before = contents(&folder.destination());
        let run = folder.convert(&["--hash-source"]).ok();
        assert!(!run.stdout.contains("not compared"), "{}", run.stdout);
        change(&folder);
        folder.convert(&["--hash-source"]).fails(3, &[&changed(name), "--force", "--restart"]);
        assert_eq!(contents(&folder.destination()), before, "{name}");
        folder.convert(&["--hash-source", "--restart"]).ok();
        assert_ne!(contents(&folder.destination()), before, "{name}");
    }
}

#[test]
fn a_finished_conversion_says_if_the_content_of_weights_was_not_compared() {
    let folder = moe();
    folder.convert(&[]).ok();
    flip_last_byte(&folder.source().join("model.safetensors"));
    let run = folder.convert(&[]).ok();
    assert!(run.stdout.contains("weights' content not compared"), "{}", run.stdout);
    fs::remove_file(folder.destination().join("model.safetensors")).unwrap();
    folder.convert(&[]).fails(3, &["converted/model.safetensors: it is missing", "--force"]);
    fs::write(folder.destination().join("model.safetensors"), "short").unwrap();
    folder.convert(&[]).fails(3, &["converted/model.safetensors: it has 5 bytes", "--force"]);
}

fn flip_last_byte(path: &std::path::Path) {
    let mut content = fs::read(path).unwrap();
    *content.last_mut().unwrap() ^= 0x80;
    fs::write(path, content).unwrap();
}

#[test]
fn force_removes_what_the_old_manifest_lists_and_names_the_rest() {
    let folder = moe();
    folder.write("added_tokens.json", "{}");
    folder.write("code/modeling.py", "pass");
    folder.convert(&["--max-shard-size", "3kB"]).ok();
    fs::write(folder.destination().join("notes.txt"), "mine").unwrap();
    fs::remove_file(folder.source().join("added_tokens.json")).unwrap();
    fs::remove_dir_all(folder.source().join("code")).unwrap();
    let run = folder.convert(&["--force"]).ok();
    let names = ["README.md", "SHA256SUMS", "config.json", "model.safetensors", "notes.txt", "prequant.json"];
    assert_eq!(file_names(&folder.destination()), names);
    assert!(run.stderr.contains("left as it was, and no part of the checkpoint: notes.txt"), "{}", run.stderr);
    // Weights of someone else's would be loaded too.
    fs::write(folder.destination().join("model-00001-of-00002.safetensors"), "theirs").unwrap();
    let before = contents(&folder.destination());
    folder.convert(&["--force"]).fails(3, &["model-00001-of-00002.safetensors", "remove it"]);
    assert_eq!(contents(&folder.destination()), before);
}

#[test]
fn a_run_that_was_killed_at_once_does_not_matter() {
    let folder = moe();
    folder.convert(&[]).ok();
    let expected = contents(&folder.destination());
    fs::remove_dir_all(folder.destination()).unwrap();
    let staging = folder.destination().join(".prequant-staging");
    fs::create_dir_all(&staging).unwrap();
    folder.convert(&["--threads", "1"]).ok();
    assert_eq!(contents(&folder.destination()), expected);
}

#[test]
fn the_fixture_converts() {
    let folder = Folder::new("unused");
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    let run = folder.convert_from(&fixture, &[]).ok();
    assert!(run.stdout.contains("56 tensors in nf4 (block 64), 13 kept"), "{}", run.stdout);
    assert!(read_tensors(&folder.destination()).contains_key("model.layers.1.mlp.experts.7.down_proj.weight.absmax"));
}

#[test]
fn help_names_every_option() {
    let run = Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(["convert", "--help"])).ok();
    for option in [
        "format",
        "block-size",
        "double-quant",
        "experts",
        "only-experts",
        "include",
        "exclude",
        "max-shard-size",
        "memory",
        "threads",
        "hash-source",
        "force",
        "dry-run",
        "json",
        "quiet",
    ] {
        assert!(run.stdout.contains(&format!("--{option}")), "{option}");
    }
}
