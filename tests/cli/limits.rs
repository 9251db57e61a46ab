//! Limits that the system sets to the process: open files, the size of files, memory.

use std::process::Command;

use prequant::Dtype;
use serde_json::Value;

use crate::support::{Folder, Run, Tensor, contents};

/// Runs the command in a shell with these limits, as `-n 64`.
fn limited(limits: &str, arguments: &[&str]) -> Run {
    let mut shell = Command::new("bash");
    let script = format!("ulimit {limits} || exit 99; exec \"$0\" \"$@\"");
    Run::of(shell.args(["-c", &script, env!("CARGO_BIN_EXE_prequant")]).args(arguments))
}

/// As many files as tensors, with this.
const MANY_FILES: [&str; 2] = ["--max-shard-size", "2kB"];

fn with_tensors(count: usize) -> Folder {
    let folder = Folder::new("llama");
    let tensor = |i| Tensor::random(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::BF16, &[32, 64]);
    folder.write_shards(&[(0..count).map(tensor).collect()]);
    folder
}

#[test]
fn more_output_files_than_may_be_open_are_written_in_one_run() {
    let folder = with_tensors(300);
    let source = folder.source();
    folder.convert(&MANY_FILES).ok();
    let expected = contents(&folder.destination());
    assert!(expected.len() > 300, "{}", expected.len());
    for (limit, threads) in [(32, "2"), (64, "2"), (64, "40"), (256, "200")] {
        let to = folder.beside(&format!("limit{limit}-{threads}"));
        let paths = [source.to_str().unwrap(), to.to_str().unwrap()];
        let threads = ["--threads", threads, "--memory", "2GiB"];
        let arguments = [&["convert"], &paths[..], &MANY_FILES[..], &threads[..]].concat();
        limited(&format!("-n {limit}"), &arguments).ok();
        assert_eq!(contents(&to), expected, "{limit} open files");
        limited(&format!("-n {limit}"), &["verify", paths[1], "--against", paths[0]]).ok();
    }
}

#[test]
fn a_limit_on_open_files_that_is_too_low_is_named() {
    let folder = Folder::llama();
    let (source, to) = (folder.source(), folder.destination());
    let run = limited("-n 8", &["convert", source.to_str().unwrap(), to.to_str().unwrap()]);
    // The least that a shell's child, a loader and a resumable run take together isn't much more.
    if run.code != 0 {
        run.fails(4, &["open files"]);
    }
}

#[test]
fn a_file_that_grows_past_the_limit_is_an_error_that_names_it() {
    let folder = with_tensors(64);
    let (source, to) = (folder.source(), folder.destination());
    let paths = [source.to_str().unwrap(), to.to_str().unwrap()];
    // In units of 1 KiB: less than the weights, more than the records.
    let arguments = ["convert", paths[0], paths[1]];
    limited("-f 48", &arguments).fails(4, &["model", ".safetensors", "ulimit -f"]);
    assert!(!to.join("config.json").exists());
    let answer = limited("-f 48", &[&arguments[..], &["--json"]].concat());
    let answer: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!((&answer["error"]["kind"], &answer["error"]["exit_code"]), (&"io".into(), &4.into()));
    // The same command resumes.
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments)).ok();
}

/// From where the command only just starts, to where there is enough: no signal, no panic, and the same result where there is one.
#[test]
fn failed_allocations_end_with_the_exit_code_for_failures() {
    let folder = with_tensors(64);
    let source = folder.source();
    folder.convert(&[]).ok();
    let expected = contents(&folder.destination());
    let starts = |kilobytes: &usize| {
        let mut shell = Command::new("bash");
        let script = format!("ulimit -v {kilobytes}; exec \"$0\" --version");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_prequant")]).output().unwrap().status.success()
    };
    let least = (1..500).map(|step| step * 4_000).find(starts).expect("the command starts in 2 GB");
    let (mut failed, mut done) = (0, 0);
    for step in 0..60 {
        let kilobytes = least + step * 4_000;
        let to = folder.beside(&format!("of-{kilobytes}"));
        let paths = [source.to_str().unwrap(), to.to_str().unwrap()];
        let run = limited(&format!("-v {kilobytes}"), &["convert", paths[0], paths[1], "--threads", "4", "--json"]);
        let answer: Value = serde_json::from_str(&run.stdout)
            .unwrap_or_else(|error| panic!("{kilobytes} kB: {error}: {:?}, {}", run.stdout, run.stderr));
        match run.code {
            0 => {
                done += 1;
                assert_eq!(contents(&to), expected, "{kilobytes} kB");
            }
            4 => {
                failed += 1;
                assert_eq!(answer["error"]["exit_code"], 4, "{answer}");
                assert!(run.stderr.contains("error: "), "{kilobytes} kB: {}", run.stderr);
                assert!(!to.join("config.json").exists(), "{kilobytes} kB");
            }
            code => panic!("{kilobytes} kB: exit code {code}: {}", run.stderr),
        }
    }
    assert!(failed > 0 && done > 0, "{failed} failed, {done} done, from {least} kB on");
}

#[test]
fn a_config_is_in_the_memory_that_is_allowed_or_refused() {
    let folder = Folder::llama();
    let config = |value: &str| folder.write("config.json", format!("{{\"model_type\": \"llama\", \"x\": {value}}}"));
    // What is made of so many values takes fifty times the text.
    config(&format!("[{}0]", "[],".repeat(2_000_000)));
    folder.convert(&["--memory", "64MiB"]).fails(3, &["config.json", "more than 524288 values"]);
    config(&format!("\"{}\"", "x".repeat(20 << 20)));
    folder.convert(&["--memory", "64MiB"]).fails(2, &["--memory 64MiB is too small", "at least 1"]);
    folder.convert(&[]).ok();
}
