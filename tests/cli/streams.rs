//! Standard output and standard error that can't be written to, and what is on standard output with `--json`.

use std::fs::File;
use std::io::{Write, pipe};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Folder, contents};

fn prequant(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    command.args(arguments);
    command
}

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reader is gone.
fn broken() -> Stdio {
    pipe().unwrap().1.into()
}

fn code(command: &mut Command) -> Option<i32> {
    command.status().unwrap().code()
}

/// What is on standard output is one JSON object. Its exit code, if it has one, is the process's.
#[track_caller]
fn json(command: &mut Command, expected: i32) -> Value {
    let output = command.stderr(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert!(value.is_object(), "{text}");
    assert_eq!(output.status.code(), Some(expected), "{text}");
    if let Some(error) = value.get("error") {
        assert_eq!(error["exit_code"], expected, "{text}");
        assert!(error["kind"].is_string() && !error["message"].as_str().unwrap().is_empty(), "{text}");
    }
    value
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_standard_error_that_cant_be_written_to_changes_nothing_else() {
    let folder = Folder::llama();
    folder.convert(&["--max-shard-size", "5kB"]).ok();
    let expected = contents(&folder.destination());
    let source = folder.source();
    for (i, stderr) in [full, broken, Stdio::null].into_iter().enumerate() {
        let to = folder.beside(&format!("copy{i}"));
        let mut convert = prequant(&["convert", text(&source), text(&to), "--max-shard-size", "5kB"]);
        assert_eq!(code(convert.stdout(Stdio::null()).stderr(stderr())), Some(0));
        assert_eq!(contents(&to), expected);
        let exits = |arguments: &[&str]| code(prequant(arguments).stdout(Stdio::null()).stderr(stderr()));
        assert_eq!(exits(&["verify", text(&to), "--against", text(&source)]), Some(0));
        assert_eq!(exits(&["dequantize", text(&to), text(&folder.beside(&format!("plain{i}")))]), Some(0));
        assert_eq!(exits(&["convert", "nowhere", text(&folder.beside("x"))]), Some(3));
        assert_eq!(exits(&["verify", "nowhere"]), Some(3));
        assert_eq!(exits(&["convert", "--nope"]), Some(2));
        assert_eq!(exits(&["convert", text(&source), text(&folder.beside("x")), "--include", "("]), Some(2));
    }
}

#[test]
fn a_full_standard_output_is_an_error_and_a_closed_one_the_end() {
    let folder = Folder::llama();
    let (source, to) = (folder.source(), folder.destination());
    let exits =
        |arguments: &[&str], stdout: fn() -> Stdio| code(prequant(arguments).stdout(stdout()).stderr(Stdio::null()));
    assert_eq!(exits(&["convert", text(&source), text(&to), "--json"], full), Some(4));
    for arguments in [&["verify", text(&to)][..], &["inspect", text(&to)], &["--help"], &["convert", "--help"]] {
        assert_eq!(exits(arguments, full), Some(4), "{arguments:?}");
        assert_eq!(exits(arguments, broken), Some(0), "{arguments:?}");
        let output = prequant(arguments).stdout(broken()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
}

#[test]
fn with_json_standard_output_is_one_object_however_the_command_ends() {
    let folder = Folder::llama();
    let (source, to, x) = (folder.source(), folder.destination(), folder.beside("x"));
    let convert = ["convert", text(&source), text(&to), "--json"];
    let into_x = ["convert", text(&source), text(&x), "--json"];
    let with = |more: &[&str]| prequant(&[&into_x[..], more].concat());
    for _ in 0..2 {
        json(&mut prequant(&convert), 0);
    }
    json(&mut prequant(&["verify", text(&to), "--json"]), 0);
    json(&mut with(&["--dry-run"]), 0);
    for wrong in [
        &["--nope"][..],
        &["--block-size", "63"],
        &["--threads", "0"],
        &["--json"],
        &["--json=yes"],
        &["--memory", "lots"],
        &["--memory", "1MB"],
        &["--include", "("],
        &["--include", "zzz"],
        &["one", "too", "many"],
    ] {
        json(&mut with(wrong), 2);
    }
    assert_eq!(json(&mut with(&["--nope"]), 2)["error"]["kind"], "usage");
    for wrong in [&["--json"][..], &["nope", "--json"], &["convert", "--json"], &["verify", "--json", "--quick"]] {
        json(&mut prequant(wrong), 2);
    }
    json(&mut prequant(&["convert", "--help", "--json"]), 0);
    for command in ["verify", "inspect"] {
        json(&mut prequant(&[command, "nowhere", "--json"]), 3);
    }
    json(with(&["--device", "cuda:7"]).env("CUDA_VISIBLE_DEVICES", ""), 4);
    std::fs::write(to.join("config.json"), "{}").unwrap();
    assert_eq!(json(&mut prequant(&["verify", text(&to), "--json"]), 1)["ok"], false);
    // A name that belongs to another argument doesn't ask for it.
    assert_eq!(prequant(&["inspect", "--", "--json"]).output().unwrap().stdout, b"");
}

/// Sends signals, and gives the exit code, none if it didn't listen yet, and what was on standard output.
fn signalled(mut child: Child, signals: usize) -> (Option<i32>, Value) {
    let begun = Instant::now();
    for _ in 0..signals {
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        std::thread::sleep(Duration::from_millis(20));
    }
    let code = child.wait().unwrap().code();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let output = child.wait_with_output().unwrap();
    (code, serde_json::from_slice(&output.stdout).unwrap_or_default())
}

/// Even one that hangs on a pipe that nobody reads, which is ended after a while, and at once by a second signal.
#[test]
fn with_json_an_interrupted_command_says_so() {
    let folder = Folder::llama();
    let (_reader, mut stderr) = pipe().unwrap();
    stderr.write_all(&[b'x'; 1 << 16]).unwrap(); // as much as it holds
    for signals in [1, 2] {
        let listened = (1..10).find_map(|attempt| {
            let to = folder.beside(&format!("to{signals}{attempt}"));
            let mut command = prequant(&["convert", text(&folder.source()), text(&to), "--json"]);
            let child = command.stdout(Stdio::piped()).stderr(stderr.try_clone().unwrap()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(200 * attempt));
            let (code, answer) = signalled(child, signals);
            code.map(|code| (code, answer))
        });
        let (code, answer) = listened.expect("it never listened");
        assert_eq!((code, &answer["error"]["exit_code"]), (130, &130.into()), "{answer}");
        assert_eq!(answer["error"]["kind"], "interrupted");
    }
}
