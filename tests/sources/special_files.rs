//! Pipes, devices and links to them: nothing waits for them or reads them to an end that they don't have.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Folder, Run, contents, llama, serialize};

/// Longer than any run on a tiny checkpoint, and shorter than anyone would wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs prequant; fails if it doesn't come to an end.
#[track_caller]
fn run(arguments: &[&Path]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    let mut child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{arguments:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn make_pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// What stands in a file's place.
fn stand_ins() -> [fn(&Path); 2] {
    [make_pipe, |path| symlink("/dev/zero", path).unwrap()]
}

/// A copy of a checkpoint's folder with something else in the place of one file.
fn with_stand_in(folder: &Folder, from: &Path, name: &str, make: fn(&Path)) -> std::path::PathBuf {
    let copy = folder.beside("copy");
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir(&copy).unwrap();
    for (name, content) in contents(from) {
        fs::write(copy.join(name), content).unwrap();
    }
    let _ = fs::remove_file(copy.join(name));
    make(&copy.join(name));
    copy
}

fn sharded() -> Folder {
    let folder = Folder::new("llama");
    folder.write_shards(&[llama()[..1].to_vec(), llama()[1..].to_vec()]);
    folder.write("tokenizer.json", "{}");
    folder.write("README.md", "# A\n");
    folder
}

#[test]
fn what_is_no_file_in_a_sources_files_place_is_an_error_that_names_it() {
    let folder = sharded();
    let names = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"];
    for (name, make) in names.iter().flat_map(|name| stand_ins().map(|make| (name, make))) {
        let copy = with_stand_in(&folder, &folder.source(), name, make);
        for command in ["convert", "inspect"] {
            let out = folder.beside("out");
            let arguments = [Path::new(command), &copy, &out];
            run(&arguments[..if command == "convert" { 3 } else { 2 }]).fails(3, &[name, "not a regular file"]);
            assert!(!out.exists());
        }
    }
}

#[test]
fn a_single_file_that_is_a_pipe_is_refused() {
    let folder = Folder::new("llama");
    let pipe = folder.source().join("model.safetensors");
    make_pipe(&pipe);
    run(&[Path::new("convert"), &pipe, &folder.destination()]).fails(3, &["model.safetensors"]);
}

#[test]
fn verifying_never_waits_for_a_pipe_or_an_endless_file() {
    let folder = sharded();
    folder.convert(&["--max-shard-size", "3kB"]).ok();
    let names = contents(&folder.destination()).into_keys();
    for (name, make) in names.flat_map(|name| stand_ins().map(|make| (name.clone(), make))) {
        let copy = with_stand_in(&folder, &folder.destination(), &name, make);
        for quick in [false, true] {
            let mut arguments = vec![Path::new("verify"), &copy];
            arguments.extend(quick.then_some(Path::new("--quick")));
            let run = run(&arguments);
            // No client loads the model card: that it is another is said, and no more.
            let codes: &[i32] = if name == "README.md" { &[0] } else { &[1, 3] };
            assert!(codes.contains(&run.code), "{name}: {} {}", run.code, run.stderr);
            assert!(name == "prequant.json" || (run.stdout + &run.stderr).contains(&name), "{name} isn't named");
        }
    }
}

#[test]
fn a_manifest_that_is_a_pipe_keeps_no_command_waiting() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    for make in stand_ins() {
        let copy = with_stand_in(&folder, &folder.destination(), "prequant.json", make);
        let out = folder.beside("out");
        for command in ["convert", "dequantize"] {
            assert_eq!(run(&[Path::new(command), &copy, &out]).code, 3, "{command}");
        }
        run(&[Path::new("convert"), &folder.source(), &copy]).fails(3, &["exists and isn't empty"]);
    }
}

/// As `/proc` has them: files that say they have no bytes, and have more than any memory.
#[test]
fn a_file_is_read_no_further_than_its_limit_whatever_its_size_is_said_to_be() {
    let folder = Folder::llama();
    let config = fs::File::create(folder.source().join("config.json")).unwrap();
    config.set_len((64 << 20) + 1).unwrap();
    folder.convert(&[]).fails(3, &["config.json", "67108865 bytes are too many", "67108864 at most"]);
    let folder = Folder::new("llama");
    folder.write("model-00001-of-00001.safetensors", serialize(&llama()));
    let index = fs::File::create(folder.source().join("model.safetensors.index.json")).unwrap();
    index.set_len((256 << 20) + 1).unwrap();
    folder.convert(&[]).fails(3, &["index.json", "268435457 bytes are too many"]);
}

/// Fused experts in 4 bits add a section to the model card, so that it is read whole.
#[test]
fn a_model_card_of_any_length_is_copied_and_only_a_short_one_is_added_to() {
    let folder = Folder::llama();
    let card = vec![b'x'; 9 << 20];
    folder.write("README.md", &card);
    folder.convert(&[]).ok();
    assert!(folder.read("README.md") == card);

    let experts = Folder::new("qwen3_moe");
    let name = "model.layers.0.mlp.experts.0.up_proj.weight";
    let expert = crate::support::Tensor::random(name, safetensors::Dtype::BF16, &[64, 64]);
    experts.write("model.safetensors", serialize(&[expert]));
    experts.write("README.md", &card);
    experts.convert(&[]).fails(3, &["README.md", "9437184 bytes are too many"]);
}
