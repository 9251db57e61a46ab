//! Bad input, where `errors.rs` doesn't look: values that are not finite anywhere, links, and odd files.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use safetensors::tensor::Dtype;

use crate::support::{self, Folder, Tensor, contents, llama, serialize};

/// Converting fails with these words, and no destination is left.
#[track_caller]
fn refused(folder: &Folder, code: i32, flags: &[&str], words: &[&str]) {
    folder.convert(flags).fails(code, words);
    assert!(!folder.destination().exists(), "the destination is there");
}

/// The bytes of a value that isn't finite, by its name in errors.
fn not_finite(dtype: Dtype, name: &str) -> Vec<u8> {
    let value: f32 = name.parse().unwrap();
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn poison(tensor: &mut Tensor, at: usize, name: &str) {
    let value = not_finite(tensor.dtype, name);
    tensor.data[at * value.len()..][..value.len()].copy_from_slice(&value);
}

#[test]
fn a_value_that_is_not_finite_is_named_in_any_tensor_dtype_and_shape_by_any_number_of_threads() {
    let shapes: [&[usize]; 3] = [&[129, 65], &[2, 67, 33], &[1, 70_001]];
    let dtypes = [Dtype::BF16, Dtype::F16, Dtype::F32];
    let good = || {
        let tensors = (0..3).map(|i| {
            let name = match shapes[i].len() {
                3 => format!("model.layers.{i}.mlp.experts.gate_up_proj"),
                _ => format!("model.layers.{i}.mlp.up_proj.weight"),
            };
            Tensor::random(&name, dtypes[i], shapes[i])
        });
        tensors.collect::<Vec<_>>()
    };
    for which in 0..3 {
        for (value, threads) in [("NaN", "1"), ("inf", "4"), ("-inf", "4")] {
            let mut tensors = good();
            let elements: usize = shapes[which].iter().product();
            for at in [elements / 2, elements / 2 + 1, elements - 1] {
                poison(&mut tensors[which], at, value);
            }
            let folder = Folder::new("qwen3_moe");
            folder.write("model.safetensors", serialize(&tensors));
            let found = format!("holds 3 values that are not finite, the first ({value}) at element {}", elements / 2);
            let words = ["model.safetensors", &tensors[which].name, &found, "--exclude"];
            refused(&folder, 3, &["--threads", threads], &words);
        }
    }
}

#[test]
fn of_several_bad_tensors_the_first_is_named_whatever_the_threads() {
    let tensors = (0..12).map(|i| {
        let mut tensor = Tensor::random(&format!("model.layers.{i:02}.mlp.up_proj.weight"), Dtype::BF16, &[64, 64]);
        if i == 3 || i == 4 || i == 11 {
            poison(&mut tensor, 4095 - i, "NaN");
        }
        tensor
    });
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&tensors.collect::<Vec<_>>()));
    for threads in ["1", "2", "8"] {
        for _ in 0..5 {
            refused(&folder, 3, &["--threads", threads], &["layers.03.", "1 values", "element 4092"]);
        }
    }
}

#[test]
fn nothing_is_followed_out_of_the_folder() {
    let shards: Vec<Vec<Tensor>> = llama().into_iter().map(|tensor| vec![tensor]).collect();
    for name in ["config.json", "model.safetensors.index.json", "tokenizer.json", "nested/template.jinja"] {
        let folder = Folder::new("llama");
        folder.write_shards(&shards);
        folder.write("tokenizer.json", "{}");
        folder.write("nested/template.jinja", "");
        let (link, secret) = (folder.source().join(name), folder.beside("secret"));
        fs::rename(&link, &secret).unwrap();
        symlink(&secret, &link).unwrap();
        refused(&folder, 3, &[], &[name, "a link out of the checkpoint's folder", "secret"]);
    }
}

#[test]
fn a_linked_folder_beside_the_weights_is_not_copied() {
    let folder = Folder::llama();
    fs::create_dir(folder.beside("private")).unwrap();
    fs::write(folder.beside("private/key"), "secret").unwrap();
    symlink(folder.beside("private"), folder.source().join("linked")).unwrap();
    folder.convert(&[]).ok();
    let names: Vec<String> = contents(&folder.destination()).into_keys().collect();
    assert_eq!(names, ["SHA256SUMS", "config.json", "model.safetensors", "prequant.json"]);
}

#[test]
fn side_files_that_cannot_be_copied_are_named_before_anything_is_written() {
    let dangling = Folder::llama();
    symlink("nowhere", dangling.source().join("tokenizer.json")).unwrap();
    refused(&dangling, 3, &[], &["tokenizer.json", "a link that leads nowhere"]);

    let latin = Folder::llama();
    fs::write(latin.source().join(std::ffi::OsStr::from_bytes(b"caf\xe9.txt")), "x").unwrap();
    refused(&latin, 3, &[], &["not UTF-8", "rename it"]);
}

#[test]
fn quantized_sources_are_told_by_their_tensors_in_a_single_file_and_in_a_later_shard_too() {
    let quantized = [
        ("bitsandbytes", "model.x.weight.absmax", Dtype::F32),
        ("GPTQ or AWQ", "model.x.qzeros", Dtype::I32),
        ("FP8 in blocks", "model.x.weight_scale_inv", Dtype::F32),
        ("MXFP4", "model.layers.0.mlp.experts.down_proj_blocks", Dtype::U8),
        ("F8_E5M2", "model.x.weight", Dtype::F8_E5M2),
    ];
    for (method, name, dtype) in quantized {
        let foreign = Tensor::random(name, dtype, &[2, 4]);
        let folder = Folder::new("llama");
        folder.write_shards(&[llama(), vec![foreign]]);
        let words = ["already quantized with", method, name, "bf16 checkpoint"];
        refused(&folder, 3, &[], &[&["model-00002-of-00002.safetensors"], &words[..]].concat());

        let shard = folder.source().join("model-00002-of-00002.safetensors");
        fs::remove_file(folder.source().join("config.json")).unwrap();
        folder.convert_from(&shard, &[]).fails(3, &words);
        assert!(!folder.destination().exists());
    }
}

#[test]
fn an_index_that_is_no_index_is_refused() {
    for (content, words) in [
        ("", "not an index"),
        ("[]", "not an index"),
        (r#"{"weight_map": []}"#, "not an index"),
        (r#"{"weight_map": {"a": 1}}"#, "not an index"),
        (r#"{"weight_map": {"a": ""}}"#, "expected the name of a file"),
        (r#"{"weight_map": {"a": "../model.safetensors"}}"#, "expected the name of a file"),
    ] {
        let folder = Folder::llama();
        folder.write("model.safetensors.index.json", content);
        refused(&folder, 3, &[], &[words]);
    }
}

#[test]
fn a_folder_or_a_file_of_another_kind_in_a_files_place_is_refused() {
    let folder = Folder::new("llama");
    fs::create_dir(folder.source().join("model.safetensors")).unwrap();
    folder.convert(&[]).fails(3, &["model.safetensors"]);
    let config = Folder::llama();
    fs::remove_file(config.source().join("config.json")).unwrap();
    fs::create_dir(config.source().join("config.json")).unwrap();
    let run = config.convert(&[]);
    assert!(matches!(run.code, 3 | 4) && run.stderr.contains("config.json"), "{}", run.stderr);
    assert!(!folder.destination().exists() && !config.destination().exists());
}

#[test]
fn a_weight_without_elements_or_with_odd_rank_is_kept() {
    let shapes: [&[usize]; 4] = [&[0, 64], &[64], &[2, 2, 2, 2], &[]];
    let odd = shapes.iter().enumerate();
    let odd: Vec<Tensor> =
        odd.map(|(i, s)| Tensor::random(&format!("model.layers.{i}.q_proj.weight"), Dtype::BF16, s)).collect();
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&[llama(), odd.clone()].concat()));
    folder.convert(&[]).ok();
    let stored = support::read_tensors(&folder.destination());
    for Tensor { name, dtype, shape, data } in odd {
        assert_eq!(stored[&name].1, (dtype, shape, data));
    }
}

#[test]
fn patterns_are_wrong_when_even_one_of_them_does_nothing() {
    let folder = Folder::llama();
    refused(&folder, 2, &["--exclude", "norm", "--exclude", "typo"], &["--exclude \"typo\""]);
    refused(&folder, 2, &["--include", "lm_head", "--include", "["], &["--include \"[\""]);
    refused(&folder, 3, &["--exclude", "."], &["nothing to quantize"]);
}
