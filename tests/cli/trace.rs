//! `--trace`: the file, and what its spans say.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{Folder, Run, Tensor, contents, file_names, llama, serialize};

fn prequant(arguments: &[&Path]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments))
}

/// A trace's events.
fn events(path: &Path) -> Vec<Value> {
    let trace: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    trace["traceEvents"].as_array().unwrap().clone()
}

#[test]
fn a_trace_names_the_process_and_replaces_what_was_at_its_path() {
    let folder = Folder::llama();
    let path = folder.beside("run.json");
    fs::write(&path, "x".repeat(100_000)).unwrap();
    folder.convert(&["--trace", path.to_str().unwrap()]).ok();
    assert_eq!(events(&path)[0]["args"]["name"], "prequant");
    folder.convert(&["--trace", path.to_str().unwrap()]).ok(); // finished already: nothing happens in it
    assert_eq!(events(&path).len(), 1);
}

#[test]
fn the_trace_of_a_run_that_fails_is_complete() {
    let folder = Folder::new("llama");
    let mut tensors = llama();
    tensors[0].data[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    folder.write("model.safetensors", serialize(&tensors));
    let path = folder.beside("run.json");
    folder.convert(&["--trace", path.to_str().unwrap()]).fails(3, &["NaN"]);
    assert_eq!(events(&path)[0]["args"]["name"], "prequant");
}

#[test]
fn a_trace_may_not_lie_in_the_source_or_the_destination() {
    let folder = Folder::llama();
    let before = contents(&folder.source());
    for path in [folder.source().join("model.safetensors"), folder.source().join("../source/new/trace.json")] {
        folder
            .convert(&["--trace", path.to_str().unwrap()])
            .fails(3, &[path.to_str().unwrap(), "choose a path outside"]);
    }
    let inside = folder.destination().join("trace.json");
    folder.convert(&["--trace", inside.to_str().unwrap()]).fails(3, &["choose a path outside"]);
    assert!(!folder.destination().exists());
    assert_eq!(contents(&folder.source()), before);

    folder.convert(&[]).ok();
    let (verify, trace) = (["verify", "--against"].map(Path::new), [Path::new("--trace"), &inside]);
    prequant(&[verify[0], &folder.destination(), verify[1], &folder.source(), trace[0], trace[1]])
        .fails(3, &["choose a path outside"]);
    let single = folder.source().join("model.safetensors");
    prequant(&[Path::new("convert"), &single, &folder.beside("other"), trace[0], &single])
        .fails(3, &["choose a path outside"]);
    assert_eq!(contents(&folder.source()), before);
}

#[test]
fn a_trace_that_cant_be_created_is_an_error_that_names_it_and_nothing_is_written() {
    let folder = Folder::llama();
    fs::write(folder.beside("file"), "").unwrap();
    let path = folder.beside("file/trace.json");
    folder.convert(&["--trace", path.to_str().unwrap()]).fails(4, &[path.to_str().unwrap(), "can't create the trace"]);
    assert!(!folder.destination().exists());
    folder.convert(&["--trace", folder.source().parent().unwrap().to_str().unwrap()]).fails(4, &["create the trace"]);
}

#[test]
fn nothing_is_traced_where_nothing_is_done() {
    let folder = Folder::llama();
    let path = folder.beside("run.json");
    folder.convert(&["--dry-run", "--trace", path.to_str().unwrap()]).fails(2, &["--trace", "--dry-run"]);
    folder.convert(&[]).ok();
    let verify = Command::new(env!("CARGO_BIN_EXE_prequant"))
        .args([Path::new("verify"), &folder.destination(), Path::new("--trace"), &path])
        .output();
    let stderr = String::from_utf8(verify.unwrap().stderr).unwrap();
    assert!(stderr.contains("--against"), "{stderr}");
    assert!(!path.exists());
}

/// Two files of weights: a Linear that is cut into many chunks, small ones, a head and norms that are copied.
fn checkpoint() -> Folder {
    let folder = Folder::new("llama");
    let mut tensors = llama();
    tensors.push(Tensor::random("model.layers.0.mlp.down_proj.weight", Dtype::BF16, &[1536, 1024]));
    let linear = |i| Tensor::random(&format!("model.layers.{i}.self_attn.q_proj.weight"), Dtype::BF16, &[64, 128]);
    folder.write_shards(&[tensors, (1..20).map(linear).collect()]);
    folder
}

/// A span: begin and end in nanoseconds.
#[derive(Debug)]
struct Span {
    name: String,
    begin: u64,
    end: u64,
    args: Value,
}

/// The spans of each thread in order of their beginning, those around others first.
fn spans(path: &Path) -> BTreeMap<u64, Vec<Span>> {
    let mut threads = BTreeMap::<u64, Vec<Span>>::new();
    for event in events(path).iter().filter(|event| event["ph"] == "X") {
        let nanos = |key: &str| (event[key].as_f64().unwrap() * 1000.0).round() as u64;
        let (name, begin) = (event["name"].as_str().unwrap().to_owned(), nanos("ts"));
        let span = Span { name, begin, end: begin + nanos("dur"), args: event["args"].clone() };
        threads.entry(event["tid"].as_u64().unwrap()).or_default().push(span);
    }
    threads.values_mut().for_each(|spans| spans.sort_by_key(|span| (span.begin, u64::MAX - span.end)));
    threads
}

fn check_nesting(threads: &BTreeMap<u64, Vec<Span>>) {
    for spans in threads.values() {
        let mut around: Vec<&Span> = Vec::new();
        for span in spans {
            around.retain(|outer| outer.end > span.begin);
            assert!(around.iter().all(|outer| span.end <= outer.end), "{span:?} overlaps with {around:?}");
            around.push(span);
        }
    }
}

/// Bytes of the spans of a name, by an argument.
fn bytes_by(threads: &BTreeMap<u64, Vec<Span>>, name: &str, key: &str) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    for span in threads.values().flatten().filter(|span| span.name == name) {
        if let Some(key) = span.args[key].as_str() {
            *bytes.entry(key.to_owned()).or_default() += span.args["bytes"].as_u64().unwrap();
        }
    }
    bytes
}

#[test]
fn spans_nest_and_account_for_every_byte_that_is_written() {
    let formats: [&[&str]; 4] = [&[], &["--double-quant"], &["--format", "nvfp4"], &["--format", "int4"]];
    for format in formats {
        for threads in ["1", "4"] {
            let folder = checkpoint();
            let path = folder.beside("run.json");
            let flags = [format, &["--threads", threads, "--hash-source", "--trace", path.to_str().unwrap()]].concat();
            folder.convert(&flags).ok();
            let threads = spans(&path);
            check_nesting(&threads);
            let weights = file_names(&folder.destination()).into_iter().filter(|name| name.ends_with(".safetensors"));
            let len = |name: &String| fs::metadata(folder.destination().join(name)).unwrap().len();
            let lens: BTreeMap<String, u64> = weights.map(|name| (name.clone(), len(&name))).collect();
            assert_eq!(bytes_by(&threads, "write", "file"), lens, "{flags:?}");
            let hashed = bytes_by(&threads, "hash", "file");
            let header = |name: &String| {
                let file = fs::read(folder.destination().join(name)).unwrap();
                8 + u64::from_le_bytes(file[..8].try_into().unwrap())
            };
            // The header is hashed when the file is begun.
            let is_hashed = |(name, len): (&String, &u64)| hashed[name] == len - header(name);
            assert!(lens.iter().all(is_hashed), "{flags:?}: {hashed:?}");
            let synced = bytes_by(&threads, "sync", "file");
            assert_eq!(synced.keys().collect::<Vec<_>>(), lens.keys().collect::<Vec<_>>(), "{flags:?}");
            let quantized = bytes_by(&threads, "quantize", "tensor");
            let linear = "model.layers.0.mlp.down_proj.weight";
            assert!(quantized[linear] >= 1536 * 1024 * 2, "{flags:?}: {quantized:?}");
            let read: u64 = bytes_by(&threads, "read", "source").values().sum();
            assert!(read >= 1536 * 1024 * 2, "{flags:?}: {read}");
        }
    }
}

#[test]
fn verifying_against_a_source_and_decoding_are_traced() {
    let folder = checkpoint();
    folder.convert(&[]).ok();
    let path = folder.beside("run.json");
    let (source, converted, decoded) = (folder.source(), folder.destination(), folder.beside("decoded"));
    let [verify, against, dequantize, trace] = ["verify", "--against", "dequantize", "--trace"].map(Path::new);
    for arguments in [[verify, &converted, against, &source].as_slice(), &[dequantize, &converted, &decoded]] {
        prequant(&[arguments, &[trace, &path]].concat()).ok();
        let threads = spans(&path);
        check_nesting(&threads);
        assert!(!bytes_by(&threads, "write", "file").is_empty(), "{arguments:?}");
    }
}
