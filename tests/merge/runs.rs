//! Runs of merging: stopped and resumed, done before, verified, into bases that are quantized.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prequant::{Options, Progress, Recipe, plan_merge};
use serde_json::json;

use crate::support::{Run, Tensor, contents};
use crate::{Case, assert_same, prequant};

/// Stops a run once a file is finished.
struct Stop(AtomicBool);

impl Progress for Stop {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn kept(&self, _: usize) {}
}

/// Merges into files of 10 kB until one is finished.
fn stop(case: &Case) {
    let options = Options { threads: 1, ..Options::default() };
    let merge = plan_merge(case.path("base"), case.path("adapter"), Recipe::floats(10_000), options).unwrap();
    let stop = Stop(AtomicBool::new(false));
    let error = merge.execute_until(&stop.0, case.path("merged"), &stop).unwrap_err();
    assert!(matches!(error, prequant::Error::Interrupted), "{error}");
    assert!(!case.path("merged/config.json").exists());
}

/// Merges in a process of its own, once nobody holds the folder: a process that another test began to start meanwhile has this one's
/// lock until it is the program that it is to become.
fn merge_after_stop(case: &Case, flags: &[&str]) -> Run {
    loop {
        let run = case.merge(&[&["--max-shard-size", "10kB"], flags].concat());
        if !run.stderr.contains(&format!("process {} is converting into it", std::process::id())) {
            return run;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_stopped_merge_is_resumed_to_the_same_bytes() {
    let case = Case::new("experts");
    stop(&case);
    let run = merge_after_stop(&case, &[]).ok();
    assert!(run.stderr.contains("resuming"), "{}", run.stderr);
    case.merge_to("at-once", &["--max-shard-size", "10kB"]).ok();
    assert!(contents(&case.path("merged")) == contents(&case.path("at-once")));
    assert_same(&case.tensors("merged"), &case.expected(), "resumed");
}

/// Killed after more and more time, wherever that is, until one comes to its end.
#[test]
fn a_killed_merge_comes_to_the_same_bytes() {
    let case = Case::new("experts");
    let flags = ["--max-shard-size", "3kB"];
    case.merge_to("at-once", &flags).ok();
    let expected = contents(&case.path("at-once"));
    let mut killed = 0;
    for time in (5..).step_by(5) {
        let folders = ["base", "adapter", "merged"].map(|name| case.path(name));
        let mut command = prequant("merge");
        let mut child = command.args(folders).args(flags).arg("--quiet").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(time));
        child.kill().unwrap();
        match child.wait().unwrap().success() {
            true => break,
            false => killed += 1,
        }
        assert!(!case.path("merged/config.json").exists() || case.path("merged/prequant.json").exists());
    }
    assert!(killed > 0);
    assert!(contents(&case.path("merged")) == expected);
}

#[test]
fn a_merge_of_another_adapter_is_not_resumed() {
    for change in ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "base/config.json"] {
        let case = Case::new("experts");
        stop(&case);
        let mut bytes = fs::read(case.path(change)).unwrap();
        match change.ends_with(".json") {
            true => bytes.extend(b"\n"),
            false => *bytes.last_mut().unwrap() ^= 1,
        }
        fs::write(case.path(change), bytes).unwrap();
        merge_after_stop(&case, &[]).fails(3, &["--restart"]);
        case.merge(&["--max-shard-size", "10kB", "--restart"]).ok();
    }
}

#[test]
fn a_dry_run_tells_what_is_merged_and_writes_nothing() {
    let case = Case::new("linears");
    let run = case.merge(&["--dry-run"]).ok();
    for words in
        ["21 tensors, 12 merged", "16.00 bits per weight overall", "nothing was written", "BF16 [48, 32]  copied"]
    {
        assert!(run.stdout.contains(words), "{words:?} in {}", run.stdout);
    }
    let run = case.merge(&["--dry-run", "--format", "nf4"]).ok();
    assert!(
        run.stdout.contains(" kept, 12 merged") && run.stdout.contains("bits per quantized weight"),
        "{}",
        run.stdout
    );
    assert!(!case.path("merged").exists());
}

#[test]
fn a_finished_merge_is_not_done_again_unless_something_changed() {
    let case = Case::new("linears");
    case.merge(&[]).ok();
    let run = case.merge(&[]).ok();
    assert!(run.stdout.contains("nothing to do"), "{}", run.stdout);
    case.change_adapter(|mut tensor| {
        tensor.data[0] ^= 1;
        Some(tensor)
    });
    case.merge(&[]).fails(3, &["adapter_model.safetensors", "its content has changed", "--force"]);
    case.merge(&["--force"]).ok();
}

#[test]
fn the_manifest_has_base_and_adapter_hashed_and_what_was_merged_into_what() {
    let case = Case::new("experts");
    case.merge(&[]).ok();
    let manifest = case.json("merged/prequant.json");
    assert_eq!(manifest["recipe"], json!({"unquantized": true, "max_shard_size": 5_000_000_000_u64}));
    let adapter = &manifest["source"]["adapter"];
    assert_eq!(adapter["file"]["name"], "adapter_model.safetensors");
    for hash in [&adapter["config_sha256"], &adapter["file"]["sha256"], &manifest["source"]["files"][0]["sha256"]] {
        assert_eq!(hash.as_str().map(str::len), Some(64), "{hash}");
    }
    assert!(adapter.get("decoded_from").is_none());
    let tensors = manifest["tensors"].as_array().unwrap();
    let names = |tensor: &serde_json::Value, key: &str| -> Vec<String> {
        let list = tensor[key].as_array().into_iter().flatten();
        list.map(|source| source["name"].as_str().unwrap().to_owned()).collect()
    };
    let down = "model.layers.0.mlp.experts.3.down_proj.weight";
    let record = tensors.iter().find(|tensor| tensor["outputs"][0]["name"] == down).unwrap();
    assert_eq!((record["reason"].as_str(), names(record, "sources")), (Some("merged"), vec![down.to_owned()]));
    let prefix = "base_model.model.model.layers.0.mlp.experts.lora_";
    let mut factors = names(record, "adapter");
    factors.sort();
    assert_eq!(factors, [format!("{prefix}A.weight"), format!("{prefix}B.weight")]);
    let norm = tensors.iter().find(|tensor| tensor["outputs"][0]["name"] == "model.norm.weight").unwrap();
    assert_eq!((norm["reason"].as_str(), norm.get("adapter")), (Some("copied"), None));
}

#[test]
fn a_merged_checkpoint_is_verified_and_merged_again_to_compare() {
    for flags in [&[][..], &["--format", "nf4"], &["--format", "int4", "--group-size", "channel"]] {
        let case = Case::new("experts");
        case.merge(flags).ok();
        let verify = |more: &[&str]| {
            let more = more.iter().map(|path| if path.starts_with("--") { path.into() } else { case.path(path) });
            Run::of(prequant("verify").arg(case.path("merged")).args(more))
        };
        verify(&[]).ok();
        verify(&["--against", "base", "adapter"]).ok();
        verify(&["--against", "base"]).fails(3, &["give base and adapter"]);
        case.change_adapter(|mut tensor| {
            tensor.data[1] ^= 0x40;
            Some(tensor)
        });
        let run = verify(&["--against", "base", "adapter"]);
        assert_eq!(run.code, 1, "{flags:?} {} {}", run.stdout, run.stderr);
        assert!(run.stdout.contains("isn't what converting the source gives"), "{}", run.stdout);
    }
}

#[test]
fn what_no_adapter_was_merged_into_is_not_verified_against_one() {
    let case = Case::new("linears");
    Run::of(prequant("convert").args(["base", "merged"].map(|name| case.path(name)))).ok();
    let against = ["base", "adapter"].map(|name| case.path(name));
    let run = Run::of(prequant("verify").arg(case.path("merged")).arg("--against").args(against));
    run.fails(3, &["no adapter was merged into it"]);
}

/// What the weights decode to is merged into, as decoding first does; the manifest says so.
#[test]
fn a_quantized_base_is_decoded_first_and_the_manifest_says_so() {
    for flags in [
        &["--format", "nf4"][..],
        &["--format", "nf4", "--experts", "fuse", "--double-quant"],
        &["--format", "int4", "--group-size", "channel"],
    ] {
        let case = Case::new("experts");
        Run::of(prequant("convert").args(["base", "quantized"].map(|name| case.path(name))).args(flags)).ok();
        Run::of(prequant("dequantize").args(["quantized", "decoded"].map(|name| case.path(name)))).ok();
        let merge = |base: &str, to: &str, flags: &[&str]| {
            let folders = [base, "adapter", to].map(|name| case.path(name));
            Run::of(prequant("merge").args(folders).args(flags)).ok()
        };
        merge("quantized", "merged", &[]);
        merge("decoded", "expected", &[]);
        let files = |folder: &str| {
            let mut files = contents(&case.path(folder));
            files.retain(|name, _| !["prequant.json", "SHA256SUMS"].contains(&name.as_str()));
            files
        };
        assert!(files("merged") == files("expected"), "{flags:?}");
        let manifest = case.json("merged/prequant.json");
        assert_eq!(manifest["source"]["adapter"]["decoded_from"], json!([flags[1]]));
        Run::of(prequant("verify").arg(case.path("merged"))).ok();
        merge("quantized", "again", &["--format", "nf4"]);
        merge("decoded", "straight", &["--format", "nf4"]);
        assert!(files("again") == files("straight"), "{flags:?}");
        Run::of(prequant("verify").arg(case.path("again"))).ok();
    }
}

/// A bias that goes with lora_B, and whole biases in place of the base's.
#[test]
fn whole_tensors_take_the_place_of_the_bases() {
    let case = Case::new("conv1d");
    let bias = "transformer.h.1.mlp.c_fc.bias";
    let (dtype, shape, _) = case.tensors("base")[bias].clone();
    let new = Tensor::random("bias", safetensors::Dtype::F32, &shape);
    let name = format!("base_model.model.{}", bias.replace("c_fc.", "c_fc.base_layer."));
    let data = new.data.clone();
    let mut tensors: Vec<Tensor> = case
        .tensors("adapter")
        .into_iter()
        .map(|(name, (dtype, shape, data))| Tensor::new(&name, dtype, &shape, data))
        .collect();
    tensors.push(Tensor { name, ..new });
    fs::write(case.path("adapter/adapter_model.safetensors"), crate::serialize(&tensors)).unwrap();
    case.merge(&[]).ok();
    let values = data.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
    let expected: Vec<u8> = values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect();
    assert_eq!(case.tensors("merged")[bias], (dtype, shape, expected));
}

#[test]
fn json_tells_what_was_merged_and_help_every_option() {
    let case = Case::new("linears");
    let run = case.merge(&["--json"]).ok();
    let answer: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&answer["recipe"]["unquantized"], &answer["summary"]["kept_tensors"]), (&json!(true), &json!(21)));
    let help = Run::of(prequant("merge").arg("--help")).ok().stdout;
    for option in ["BASE", "ADAPTER", "--format", "--experts", "--include", "--max-shard-size", "--memory", "--device"]
    {
        assert!(help.contains(option), "no {option} in {help}");
    }
    // Floats have no error to tell of, and nothing that is left unquantized.
    let said = case.merge_to("said", &[]).ok();
    assert!(
        !said.stderr.contains("aren't quantized") && !said.stdout.contains("SNR"),
        "{} {}",
        said.stderr,
        said.stdout
    );
    assert!(said.stdout.contains("21 tensors, 12 merged"), "{}", said.stdout);
}

/// A decoded checkpoint has nothing that decodes, and a merged one's experts can't be rewritten.
#[test]
fn what_was_merged_is_a_source_like_any_other() {
    let case = Case::new("experts");
    case.merge(&[]).ok();
    let folders = ["merged", "out"].map(|name| case.path(name));
    Run::of(prequant("dequantize").args(&folders)).fails(3, &["none of its weights is quantized"]);
    Run::of(prequant("convert").args(&folders).args(["--format", "int4", "--group-size", "channel"])).ok();
    Run::of(prequant("verify").arg(case.path("out")).arg("--against").arg(case.path("merged"))).ok();
    let run = Run::of(prequant("inspect").arg(case.path("merged"))).ok();
    assert!(run.stdout.contains("qwen3_moe"), "{}", run.stdout);

    case.merge_to("nf4", &["--format", "nf4"]).ok();
    let relaid =
        Run::of(prequant("convert").args(["nf4", "relaid"].map(|name| case.path(name))).args(["--experts", "fuse"]));
    relaid.fails(3, &["an adapter was merged into it", "merge base and adapter again"]);
    Run::of(prequant("dequantize").args(["nf4", "decoded"].map(|name| case.path(name)))).ok();
    assert!(case.tensors("decoded").keys().eq(case.tensors("base").keys()));
}
