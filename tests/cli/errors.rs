//! Bad input: the exit code, an error that names the thing and the way out, and nothing left behind.

use std::fs;
use std::os::unix::fs::symlink;

use safetensors::tensor::Dtype;

use crate::support::{self, Folder, LINEAR, Tensor, contents, llama, read_tensors, serialize, with_header};

/// Converting fails with these words, and no destination is left.
#[track_caller]
fn refused(folder: &Folder, code: i32, flags: &[&str], words: &[&str]) {
    folder.convert(flags).fails(code, words);
    assert!(!folder.destination().exists(), "the destination is there");
}

/// A one-file checkpoint with this content is refused.
#[track_caller]
fn refused_file(content: Vec<u8>, words: &[&str]) {
    let folder = Folder::new("llama");
    folder.write("model.safetensors", content);
    refused(&folder, 3, &[], &[&["model.safetensors"], words].concat());
}

/// A one-file checkpoint with this header, and `data` zeros, is refused.
#[track_caller]
fn refused_header(header: &str, data: usize, words: &[&str]) {
    refused_file(with_header(header, &vec![0; data]), words);
}

#[test]
fn a_source_that_is_no_checkpoint_is_refused_with_what_is_missing() {
    let folder = Folder::new("llama");
    refused(&folder, 3, &[], &["source: not a checkpoint", "no .safetensors file"]);
    folder.write("pytorch_model.bin", "weights");
    refused(&folder, 3, &[], &["no .safetensors file", "save_pretrained"]);
    folder.convert_from(&folder.beside("nowhere"), &[]).fails(3, &["nowhere: not found", "folder"]);
    folder.convert_from(&folder.source().join("config.json"), &[]).fails(3, &["not a checkpoint", ".safetensors"]);

    let without_config = Folder::llama();
    fs::remove_file(without_config.source().join("config.json")).unwrap();
    refused(&without_config, 3, &[], &["no config.json", "give the .safetensors file itself"]);
}

#[test]
fn a_config_that_is_none_is_refused() {
    let folder = Folder::llama();
    for (content, words) in
        [("not json", "not a JSON object"), ("[]", "not a JSON object"), ("\"x\"", "not a JSON object")]
    {
        folder.write("config.json", content);
        refused(&folder, 3, &[], &["config.json", words]);
    }
    folder.write("config.json", [0xff, 0xfe]);
    refused(&folder, 3, &[], &["config.json", "not UTF-8"]);
    fs::File::create(folder.source().join("config.json")).unwrap().set_len(1 << 30).unwrap();
    refused(&folder, 3, &[], &["config.json", "1073741824 bytes are too many"]);
}

#[test]
fn damaged_files_are_refused_with_what_was_found_and_expected() {
    let whole = serialize(&llama());
    refused_file(whole[..whole.len() - 1].to_vec(), &["ends", "past the file's", "truncated; download it again"]);
    refused_file([&whole[..], &[0]].concat(), &["its tensors end at byte", "damaged"]);
    refused_file(b"version https://git-lfs".to_vec(), &["claims", "not a safetensors file"]);
    refused_file(vec![1, 2, 3], &["3 bytes are too few", "git-lfs"]);
    refused_file(0u64.to_le_bytes().to_vec(), &["its header is empty"]);
    refused_file((1u64 << 63).to_le_bytes().to_vec(), &["claims 9223372036854775808 bytes"]);
    refused_file(1000u64.to_le_bytes().to_vec(), &["claims 1000 bytes and the file has 8", "truncated"]);
    refused_file((100u64 << 20).to_le_bytes().to_vec(), &["claims 104857600 bytes, more than 100000000"]);
}

#[test]
fn headers_that_are_none_are_refused() {
    refused_header("not json", 0, &["not a safetensors header"]);
    refused_header("[]", 0, &["not a safetensors header"]);
    refused_header(r#"{"a":1}"#, 0, &["not a safetensors header"]);
    refused_header(&format!("{{\"a\":{}", "[".repeat(5000)), 0, &["not a safetensors header"]);
    refused_header(&format!("{{\"__metadata__\":{}", "{\"a\":".repeat(5000)), 0, &["not a safetensors header"]);
    let twice =
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    refused_header(twice, 2, &["tensor \"a\" stands in it twice"]);
    refused_header(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, &["\"__metadata__\" stands in it twice"]);
}

#[test]
fn tensors_whose_numbers_disagree_are_refused() {
    let header = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    refused_header(&header("Q4", "[1]", "[0,1]"), 1, &["\"a.weight\"", "dtype \"Q4\""]);
    refused_header(&header("F32", "[2]", "[0,4]"), 4, &["takes 8 bytes", "[0, 4] give 4"]);
    refused_header(&header("F32", "[1]", "[4,0]"), 4, &["[4, 0]: they are reversed"]);
    refused_header(&header("F32", "[1]", "[4,8]"), 8, &["starts at byte", "a hole before it"]);
    refused_header(&header("F32", "[1]", "[0,4]"), 3, &["past the file's", "truncated"]);
    refused_header(&header("F32", "[1]", "[18446744073709551612,18446744073709551616]"), 0, &["header"]);
    refused_header(&header("U8", "[4]", "[18446744073709551611,18446744073709551615]"), 0, &["past 2^64"]);
    refused_header(&header("F32", "[4294967296,4294967296]", "[0,0]"), 0, &["whole number of bytes below 2^64"]);
    refused_header(&header("F4", "[3]", "[0,1]"), 1, &["whole number of bytes"]);
    refused_header(&header("F32", "[-1]", "[0,4]"), 4, &["not a safetensors header"]);
    let overlap =
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
    refused_header(overlap, 6, &["\"b\"", "an overlap with the tensor before it"]);
}

#[test]
fn an_index_is_held_against_the_files() {
    let shards: Vec<Vec<Tensor>> = llama().into_iter().map(|tensor| vec![tensor]).collect();
    let index = |changes: &[(&str, &str)]| {
        let folder = Folder::new("llama");
        folder.write_shards(&shards);
        let path = folder.source().join("model.safetensors.index.json");
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (tensor, file) in changes {
            json["weight_map"][tensor] = (*file).into();
        }
        fs::write(path, json.to_string()).unwrap();
        folder
    };
    let refused = |changes: &[(&str, &str)], words: &[&str]| refused(&index(changes), 3, &[], words);
    refused(&[("x", "../../etc/passwd")], &["index.json", "\"../../etc/passwd\"", "expected the name of a file"]);
    refused(&[("x", "/etc/passwd")], &["index.json", "\"/etc/passwd\""]);
    refused(&[("x", "..")], &["index.json", "\"..\""]);
    refused(&[("x", "model-00009-of-00003.safetensors")], &["names \"model-00009-of-00003.safetensors\"", "download"]);
    refused(&[("x", "model-00001-of-00003.safetensors")], &["\"x\"", "which doesn't have it"]);
    refused(&[(LINEAR, "model-00002-of-00003.safetensors")], &[LINEAR, "is said to be in"]);

    let broken = index(&[]);
    broken.write("model.safetensors.index.json", "{}");
    broken.convert(&[]).fails(3, &["index.json", "weight_map"]);
    let outside = index(&[]);
    let (shard, elsewhere) = (outside.source().join("model-00001-of-00003.safetensors"), outside.beside("elsewhere"));
    fs::rename(&shard, &elsewhere).unwrap();
    symlink(&elsewhere, &shard).unwrap();
    outside.convert(&[]).ok(); // weights may lie anywhere
}

#[test]
fn a_tensor_in_two_files_or_a_missing_shard_is_refused_without_an_index_too() {
    let folder = Folder::new("llama");
    folder.write("model-00001-of-00002.safetensors", serialize(&llama()));
    refused(&folder, 3, &[], &["shard 2 of 2", "missing"]);
    let mut other = llama()[..1].to_vec();
    other[0].data[0] ^= 1;
    folder.write("model-00002-of-00002.safetensors", serialize(&other));
    refused(
        &folder,
        3,
        &[],
        &["model-00002-of-00002.safetensors", LINEAR, "also in \"model-00001-of-00002.safetensors\"", "other"],
    );
}

#[test]
fn a_linear_of_another_dtype_is_refused_unless_it_is_excluded() {
    for dtype in [Dtype::F64, Dtype::I8, Dtype::I32] {
        let folder = Folder::new("llama");
        let other = "model.layers.1.mlp.up_proj.weight";
        folder.write("model.safetensors", serialize(&[llama(), vec![Tensor::random(other, dtype, &[8, 8])]].concat()));
        refused(&folder, 3, &[], &["model.safetensors", other, "only BF16, F16 and F32", "--exclude"]);
        folder.convert(&["--exclude", "layers.1"]).ok();
    }
}

#[test]
fn quantized_sources_are_refused_by_name() {
    let by_tensor = [
        ("bitsandbytes NF4", "a.weight.quant_state.bitsandbytes__nf4", Dtype::U8),
        ("bitsandbytes FP4", "a.weight.quant_state.bitsandbytes__fp4", Dtype::U8),
        ("bitsandbytes AF4", "a.weight.quant_state.bitsandbytes__af4", Dtype::U8),
        ("LLM.int8()", "a.SCB", Dtype::F32),
        ("GPTQ or AWQ", "a.qweight", Dtype::I32),
        ("compressed-tensors", "a.weight_packed", Dtype::I32),
        ("FP8 in blocks", "a.weight_scale_inv", Dtype::F32),
        ("FP8 or integers", "a.weight_scale", Dtype::F32),
        ("NVFP4", "a.weight_scale_2", Dtype::F32),
        ("MXFP4", "mlp.experts.gate_up_proj_blocks", Dtype::U8),
    ];
    for (method, name, dtype) in by_tensor {
        let folder = Folder::new("llama");
        folder.write("model.safetensors", serialize(&[llama(), vec![Tensor::random(name, dtype, &[8])]].concat()));
        refused(&folder, 3, &[], &["model.safetensors", "already quantized with", method, name]);
    }
}

#[test]
fn nan_and_infinity_are_refused_with_tensor_index_and_count() {
    const ELEMENTS: usize = 300 * 4096;
    let (nan, infinity) = (0x7fc1u16.to_le_bytes(), 0xff80u16.to_le_bytes());
    for (at, flags) in
        [(0, &["--threads", "1"][..]), (777_777, &["--threads", "4"]), (ELEMENTS - 2, &["--memory", "16MiB"])]
    {
        let mut bad = Tensor::random("model.layers.1.mlp.up_proj.weight", Dtype::BF16, &[300, 4096]);
        bad.data[2 * at..][..2].copy_from_slice(&infinity);
        bad.data[2 * (ELEMENTS - 1)..].copy_from_slice(&nan);
        let folder = Folder::new("llama");
        folder.write("model.safetensors", serialize(&[llama(), vec![bad.clone()]].concat()));
        let first = format!("(-inf) at element {at}");
        refused(&folder, 3, flags, &["model.safetensors", &bad.name, "2 values", &first, "--exclude"]);
        folder.convert(&["--exclude", "layers.1"]).ok();
        refused_again(&folder);
    }
}

/// With `--double-quant` one bad value would spoil many blocks.
#[track_caller]
fn refused_again(folder: &Folder) {
    folder.convert(&["--force", "--nonfinite", "keep", "--double-quant"]).fails(2, &["--double-quant", "256 blocks"]);
}

#[test]
fn a_destination_that_is_in_use_is_left_alone() {
    let folder = Folder::llama();
    fs::create_dir(folder.destination()).unwrap();
    fs::write(folder.destination().join("precious"), "mine").unwrap();
    let before = contents(&folder.destination());
    folder.convert(&[]).fails(3, &["converted", "exists and isn't empty", "--force"]);
    assert_eq!(contents(&folder.destination()), before);

    fs::remove_dir_all(folder.destination()).unwrap();
    fs::write(folder.destination(), "a file").unwrap();
    folder.convert(&[]).fails(3, &["converted", "it is a file"]);
    folder.convert(&["--force"]).fails(3, &["converted", "it is a file"]);
    assert_eq!(fs::read(folder.destination()).unwrap(), b"a file");
}

#[test]
fn a_destination_that_cannot_be_written_to_is_refused() {
    let folder = Folder::llama();
    let to = std::path::Path::new("/proc/nowhere");
    let run = support::Run::of(
        std::process::Command::new(env!("CARGO_BIN_EXE_prequant")).arg("convert").arg(folder.source()).arg(to),
    );
    run.fails(3, &["/proc/nowhere: can't make a folder in it", "that you may write to"]);
}

#[test]
fn a_destination_must_not_overlap_the_source() {
    let folder = Folder::llama();
    let before = contents(&folder.source());
    let source = folder.source();
    symlink(&source, folder.beside("link")).unwrap();
    let file = source.join("model.safetensors");
    for (from, to, what) in [
        (&source, source.clone(), "the source itself"),
        (&source, source.join("inside/it"), "lies in the source"),
        (&source, folder.beside("link"), "the source itself"),
        (&source, folder.beside("link/../source/x"), "lies in the source"),
        (&source, folder.beside("."), "the source lies in it"),
        (&file, source.clone(), "the source lies in it"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        let run = support::Run::of(command.arg("convert").arg(from).arg(to).arg("--force"));
        run.fails(3, &[what]);
        assert_eq!(contents(&source), before);
    }
}

#[test]
fn a_failed_replacement_leaves_the_old_checkpoint_as_it_was() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    let before = contents(&folder.destination());
    let mut bad = Tensor::random(LINEAR, Dtype::F32, &[64, 64]);
    bad.data[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
    folder.write("model.safetensors", serialize(&[bad]));
    folder.convert(&["--force"]).fails(3, &["1 values that are not finite"]);
    assert_eq!(contents(&folder.destination()), before);
}

#[test]
fn what_does_not_fit_on_the_disk_is_refused_before_anything_is_written() {
    let folder = Folder::new("llama");
    let (rows, columns) = (1u64 << 22, 1u64 << 21);
    let len = 2 * rows * columns; // 16 TiB, sparse
    let header = format!(r#"{{"{LINEAR}":{{"dtype":"BF16","shape":[{rows},{columns}],"data_offsets":[0,{len}]}}}}"#);
    folder.write("model.safetensors", with_header(&header, &[]));
    let file = fs::File::options().write(true).open(folder.source().join("model.safetensors")).unwrap();
    if file.set_len(8 + header.len() as u64 + len).is_err() {
        println!("skipped: this file system has no files of 16 TiB");
        return;
    }
    refused(&folder, 4, &[], &["converted", "no space", "4.95 TB", "are free", "make room"]);
    let run = folder.convert(&["--dry-run"]);
    assert!(run.stdout.contains(LINEAR), "{}", run.stdout);
    run.fails(4, &["no space"]);
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let folder = Folder::llama();
    for (flags, words) in [
        (&["--block-size", "48"][..], &["48", "expected 32, 64"][..]),
        (&["--block-size", "8192"], &["8192"]),
        (&["--include", "nothing_like_it"], &["--include \"nothing_like_it\"", "matches no tensor"]),
        (&["--exclude", "nothing_like_it"], &["--exclude \"nothing_like_it\"", "matches no tensor"]),
        (&["--include", "norm"], &["--include \"norm\"", "can't be quantized"]),
        (&["--exclude", "("], &["--exclude \"(\"", "not a regular expression"]),
        (&["--memory", "1MiB"], &["--memory 1MiB is too small", "needs at least", "MiB"]),
        (&["--memory", "lots"], &["lots", "256MiB"]),
        (&["--threads", "0"], &["--threads"]),
        (&["--max-shard-size", "0"], &["at least one byte"]),
        (&["--format", "int3"], &["int3", "nf4"]),
        (&["--no-such-option"], &["--no-such-option"]),
    ] {
        refused(&folder, 2, flags, words);
    }
}

#[test]
fn double_quantization_of_a_huge_tensor_says_what_memory_it_takes() {
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&[Tensor::new(LINEAR, Dtype::BF16, &[4096, 4096], vec![0; 1 << 25])]));
    let flags = ["--double-quant", "--block-size", "32", "--memory", "13MiB"];
    refused(&folder, 2, &flags, &["--memory 13MiB is too small", "double quantization holds one f32 for every block"]);
}

#[test]
fn a_checkpoint_without_anything_to_quantize_is_refused() {
    let folder = Folder::llama();
    refused(&folder, 3, &["--only-experts"], &["nothing to quantize", "--only-experts"]);
    let gpt2 = Folder::new("gpt2");
    gpt2.write("model.safetensors", serialize(&[Tensor::random("h.0.attn.c_attn.weight", Dtype::F32, &[8, 24])]));
    refused(&gpt2, 3, &[], &["nothing to quantize", "--include"]);
}

/// As a plain name, "model.fc" would mean both.
#[test]
fn a_kept_module_whose_name_ends_a_quantized_ones_is_listed_as_a_pattern() {
    let folder = Folder::new("some_new_model");
    let names = ["model.fc.weight", "other.model.fc.weight"];
    folder.write("model.safetensors", serialize(&names.map(|name| Tensor::random(name, Dtype::BF16, &[8, 64]))));
    folder.convert(&["--exclude", "^model"]).ok();
    let skipped = folder.read_json("config.json")["quantization_config"]["llm_int8_skip_modules"].to_string();
    assert!(skipped.contains(r#""model\\.fc$""#), "{skipped}");
    assert!(read_tensors(&folder.destination()).contains_key("other.model.fc.weight.absmax"));
}
