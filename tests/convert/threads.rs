//! Where the system allows fewer threads than a conversion would start.

use std::process::{Command, Output};

use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{Folder, Tensor, contents};

/// Threads that are asked for.
const THREADS: &str = "16";

/// Bytes of address space that each thread's stack takes here.
const STACK: u64 = 1 << 30;

/// Runs the tool with no more address space than so many stacks and `beside` bytes take.
fn with_room_for(stacks: u64, beside: u64, arguments: &[&str]) -> Output {
    let limit = (stacks * STACK + beside) >> 10;
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -v {limit} && exec \"$0\" \"$@\"")).arg(env!("CARGO_BIN_EXE_prequant"));
    // One heap for all threads: each would reserve address space for its own otherwise.
    command.args(arguments).env("RUST_MIN_STACK", STACK.to_string()).env("MALLOC_ARENA_MAX", "1");
    command.output().unwrap()
}

fn folder() -> Folder {
    let folder = Folder::new("llama");
    let weight = |i| Tensor::random(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::BF16, &[64, 128]);
    // Several headers are read at once, too.
    folder.write_shards(&(0..40).map(weight).collect::<Vec<_>>().chunks(5).map(<[Tensor]>::to_vec).collect::<Vec<_>>());
    folder.write("tokenizer.json", "{}");
    folder
}

#[test]
fn fewer_threads_do_the_same() {
    let folder = folder();
    let [source, destination, trace] =
        [folder.source(), folder.destination(), folder.beside("trace.json")].map(|path| path.display().to_string());
    let options = ["--device", "cpu", "--threads", THREADS, "--max-shard-size", "12kB", "--quiet"];
    let convert = ["convert", &source, &destination, "--trace", &trace];
    let output = with_room_for(6, STACK / 2, &[&convert[..], &options].concat());
    assert!(output.status.success(), "{output:?}");

    let events: Value = serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    let names = events["traceEvents"].as_array().unwrap().iter().filter_map(|event| event["args"]["name"].as_str());
    let workers = names.filter(|name| name.starts_with("worker")).count();
    assert!((1..10).contains(&workers), "{workers} threads");

    let output = with_room_for(4, STACK / 2, &["verify", &destination, "--threads", THREADS]);
    assert!(output.status.success(), "{output:?}");
    let (few, all) = (contents(&folder.destination()), folder.beside("all"));
    let convert = ["convert", &source, all.to_str().unwrap()];
    let output = Command::new(env!("CARGO_BIN_EXE_prequant")).args([&convert[..], &options].concat()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(few == contents(&all));
}

#[test]
fn without_any_it_is_an_error() {
    let folder = folder();
    let (source, destination) = (folder.source(), folder.destination());
    let convert = ["convert", source.to_str().unwrap(), destination.to_str().unwrap(), "--device", "cpu"];
    // One for the tool itself, which listens for signals, and one of the two that a conversion can't do without.
    let output = with_room_for(2, STACK / 2, &convert);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("can't start a thread"), "{message}");
    assert!(!destination.join("config.json").exists());
}
