//! Names and values out of a stranger's files reach a terminal spelled out; JSON has them as they are.

use std::fs;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;

use crate::support::{Folder, Run, Tensor, serialize};

/// Sets a window's title, clears the screen, turns the line around, and begins another one.
const EVIL: &str = "\u{1b}]0;mine\u{7}\u{1b}[2J\u{202e}\n";
const SPELLED: &str = r"\u{1b}]0;mine\u{7}\u{1b}[2J\u{202e}\n";

fn prequant(arguments: &[&Path]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments))
}

fn evil_linear(dtype: Dtype) -> Tensor {
    Tensor::random(&format!("{EVIL}model.layers.0.mlp.up_proj.weight"), dtype, &[64, 64])
}

fn folder_of(tensors: &[Tensor]) -> Folder {
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(tensors));
    folder
}

/// No character that a terminal obeys is in it but the ends of lines.
#[track_caller]
fn assert_plain(run: &Run) {
    for text in [&run.stdout, &run.stderr] {
        let obeyed = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!text.contains(obeyed), "{text:?}");
        // The name's own end of a line would begin one of the stranger's choice.
        assert!(!text.lines().any(|line| line.starts_with("model.layers")), "{text:?}");
    }
}

#[test]
fn tensors_names_are_spelled_out_by_every_command() {
    let folder = folder_of(&[evil_linear(Dtype::BF16)]);
    let (from, to) = (folder.source(), folder.destination());
    let (convert, dry) = (Path::new("convert"), Path::new("--dry-run"));
    for arguments in [&[Path::new("inspect"), &from][..], &[convert, &from, &to, dry]] {
        let run = prequant(arguments).ok();
        assert!(run.stdout.contains(SPELLED), "{}", run.stdout);
        assert_plain(&run);
    }
    assert_plain(&prequant(&[convert, &from, &to]).ok());
    assert_plain(&prequant(&[Path::new("verify"), &to]).ok());

    let mut weights = folder.read("model.safetensors");
    let last = weights.len() - 1;
    weights[last] ^= 1;
    fs::write(to.join("model.safetensors"), weights).unwrap();
    let differs = prequant(&[Path::new("verify"), &to]);
    assert!(differs.code == 1 && differs.stdout.contains(SPELLED), "{}", differs.stdout);
    assert_plain(&differs);
    let json = prequant(&[Path::new("verify"), &to, Path::new("--json")]);
    let report: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    let named = report["differences"].as_array().unwrap().iter().filter_map(|found| found["tensor"].as_str());
    assert!({ named }.any(|name| name.starts_with(EVIL)), "JSON is exact: {report}");
}

#[test]
fn errors_and_warnings_are_spelled_out_too() {
    let mut nan = evil_linear(Dtype::BF16);
    nan.data[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    for tensor in [nan, evil_linear(Dtype::I16)] {
        let run = folder_of(&[tensor]).convert(&[]);
        assert!(run.code == 3 && run.stderr.contains(SPELLED), "{}", run.stderr);
        assert_plain(&run);
    }
    let config = folder_of(&[Tensor::random("model.a_proj.weight", Dtype::F8_E4M3, &[64, 64])]);
    config.write("config.json", serde_json::json!({"quantization_config": {"quant_method": EVIL}}).to_string());
    let run = config.convert(&[]);
    assert!(run.code == 3 && run.stderr.contains(SPELLED), "{}", run.stderr);
    assert_plain(&run);
}

#[test]
fn names_of_files_are_spelled_out() {
    let folder = folder_of(&[evil_linear(Dtype::BF16)]);
    fs::rename(folder.source().join("model.safetensors"), folder.source().join(format!("{EVIL}.safetensors"))).unwrap();
    let file = fs::File::options().write(true).open(folder.source().join(format!("{EVIL}.safetensors"))).unwrap();
    file.set_len(100).unwrap();
    for command in ["inspect", "convert"] {
        let (from, to) = (folder.source(), folder.destination());
        let arguments = [Path::new(command), &from, &to];
        let run = prequant(&arguments[..if command == "convert" { 3 } else { 2 }]);
        assert!(run.code == 3 && run.stderr.contains(SPELLED), "{}", run.stderr);
        assert_plain(&run);
    }
}
