//! Which files the model is in: a single file beside an index, shards without one, tensors in two files or in no list.

use std::fs;

use safetensors::Dtype;
use serde_json::json;

use crate::support::{Folder, LINEAR, Tensor, llama, read_tensors, serialize};

const INDEX: &str = "model.safetensors.index.json";

/// The same names and shapes as a Llama's with other bytes.
fn other_llama() -> Vec<Tensor> {
    let mut tensors = llama();
    tensors[0].data[0] ^= 1;
    tensors
}

fn two_shards(tensors: &[Tensor]) -> Folder {
    let folder = Folder::new("llama");
    folder.write_shards(&[tensors[..1].to_vec(), tensors[1..].to_vec()]);
    folder
}

fn index(files: &[(&str, &[Tensor])]) -> String {
    let map =
        files.iter().flat_map(|(file, tensors)| tensors.iter().map(move |tensor| (tensor.name.clone(), json!(file))));
    json!({"metadata": {"total_size": 1}, "weight_map": map.collect::<serde_json::Map<_, _>>()}).to_string()
}

/// The output is what converting these tensors in one file gives.
#[track_caller]
fn assert_converts_as(folder: &Folder, tensors: &[Tensor]) {
    let plain = Folder::new("llama");
    plain.write("model.safetensors", serialize(tensors));
    plain.convert(&[]).ok();
    let of = |folder: &Folder| {
        let tensors = read_tensors(&folder.destination()).into_iter();
        tensors.map(|(name, (_, stored))| (name, stored)).collect::<Vec<_>>()
    };
    assert!(of(folder) == of(&plain));
}

fn warning(folder: &Folder, words: &[&str]) {
    let run = folder.convert(&[]).ok();
    for word in words {
        assert!(run.stderr.contains("warning: ") && run.stderr.contains(word), "no {word:?} in: {}", run.stderr);
    }
}

#[test]
fn a_single_file_and_shards_that_differ_are_refused_by_name() {
    let folder = two_shards(&llama());
    folder.write("model.safetensors", serialize(&other_llama()));
    folder
        .convert(&[])
        .fails(3, &["model.safetensors", INDEX, "model-00001-of-00002.safetensors", "other bytes", LINEAR]);
    let folder = two_shards(&llama());
    folder.write("model.safetensors", serialize(&llama()[1..]));
    folder.convert(&[]).fails(3, &["only one has tensor", LINEAR]);
    assert!(!folder.destination().exists());
}

#[test]
fn a_single_file_and_shards_that_hold_the_same_are_one_model() {
    let folder = two_shards(&llama());
    folder.write("model.safetensors", serialize(&llama()));
    warning(&folder, &["model.safetensors holds the same as the shards"]);
    assert_converts_as(&folder, &llama());
    let sources = folder.read_json("prequant.json")["source"]["files"].clone();
    assert_eq!(sources.as_array().unwrap().len(), 1, "{sources}");
    let left_out = folder.read_json("prequant.json")["left_out"].to_string();
    assert!(left_out.contains("model-00001-of-00002.safetensors"), "{left_out}");
}

#[test]
fn a_single_file_is_taken_where_an_index_lists_shards_that_are_gone_or_damaged() {
    let folder = two_shards(&llama());
    folder.write("model.safetensors", serialize(&other_llama()));
    fs::remove_file(folder.source().join("model-00002-of-00002.safetensors")).unwrap();
    warning(&folder, &[INDEX, "aren't there (model-00002-of-00002.safetensors)", "model.safetensors is converted"]);
    assert_converts_as(&folder, &other_llama());

    let folder = two_shards(&llama());
    folder.write("model.safetensors", serialize(&other_llama()));
    folder.write("model-00002-of-00002.safetensors", &serialize(&llama()[1..])[..100]);
    warning(&folder, &["model-00002-of-00002.safetensors is damaged", "model.safetensors is converted"]);
    assert_converts_as(&folder, &other_llama());

    let folder = two_shards(&llama());
    folder.write("model.safetensors", &serialize(&llama())[..100]);
    folder.convert(&[]).fails(3, &["model.safetensors", "truncated"]);
}

#[test]
fn an_index_of_the_single_file_itself_is_no_other_set() {
    let folder = Folder::llama();
    folder.write(INDEX, index(&[("model.safetensors", &llama())]));
    let run = folder.convert(&[]).ok();
    assert!(!run.stderr.contains(INDEX), "{}", run.stderr);
}

#[test]
fn a_missing_shard_is_named_however_many_other_files_there_are() {
    let folder = Folder::new("llama");
    for (i, tensor) in llama().iter().take(2).enumerate() {
        folder.write(&format!("model-0000{}-of-00003.safetensors", i + 1), serialize(std::slice::from_ref(tensor)));
    }
    folder.write("model_extra.safetensors", serialize(&[Tensor::random("extra.proj.weight", Dtype::BF16, &[64, 64])]));
    folder.convert(&[]).fails(3, &["shard 3 of 3", "download"]);
}

#[test]
fn files_of_two_models_are_named() {
    let folder = Folder::new("custom_dit");
    folder.write("dit.safetensors", serialize(&[Tensor::random("blocks.0.attn.qkv.weight", Dtype::BF16, &[64, 64])]));
    folder.write("vae.safetensors", serialize(&[Tensor::random("decoder.mid.proj.weight", Dtype::BF16, &[64, 64])]));
    folder.convert(&[]).fails(3, &["dit.safetensors, vae.safetensors", "aren't one model", "give the one to convert"]);
}

#[test]
fn numbered_files_without_a_count_are_taken_together_and_said_so() {
    let folder = Folder::new("llama");
    for (i, tensor) in llama().iter().enumerate() {
        folder.write(&format!("model-0000{}.safetensors", i + 1), serialize(std::slice::from_ref(tensor)));
    }
    warning(&folder, &["model-00001.safetensors, model-00002.safetensors", "are taken for all of the model"]);
    assert_converts_as(&folder, &llama());
}

#[test]
fn an_index_may_name_files_with_dots_and_in_subfolders_of_the_checkpoint() {
    let folder = Folder::new("llama");
    let tensors = llama();
    folder.write("weights/a.safetensors", serialize(&tensors[..1]));
    folder.write("b.safetensors", serialize(&tensors[1..]));
    folder.write(INDEX, index(&[("./weights//a.safetensors", &tensors[..1]), ("./b.safetensors", &tensors[1..])]));
    for flags in [&["--hash-source"][..], &["--force"]] {
        folder.convert(flags).ok();
        assert_converts_as(&folder, &tensors);
    }
    let names: Vec<String> = crate::support::file_names(&folder.destination());
    assert!(names.iter().all(|name| !name.contains("weights")), "{names:?}");
    for outside in ["../b.safetensors", "weights/../../b.safetensors", "/b.safetensors", "weights\\a.safetensors"] {
        folder.write(INDEX, index(&[(outside, &tensors)]));
        folder.convert(&["--force"]).fails(3, &["index.json", "in this folder or below it"]);
    }
}

#[test]
fn tensors_that_the_index_does_not_list_are_kept_and_said_so() {
    let folder = Folder::new("llama");
    let buffer = Tensor::random("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[64]);
    let all = [llama(), vec![buffer.clone()]].concat();
    folder.write("model-00001-of-00001.safetensors", serialize(&all));
    folder.write(INDEX, index(&[("model-00001-of-00001.safetensors", &llama())]));
    warning(&folder, &[INDEX, "doesn't list 1 of", &buffer.name]);
    assert_converts_as(&folder, &all);
}

#[test]
fn a_tensor_in_two_shards_is_taken_once_if_it_is_the_same() {
    let tensors = llama();
    let twice = |second: Tensor, indexed: bool| {
        let folder = Folder::new("llama");
        folder.write("model-00001-of-00002.safetensors", serialize(&tensors[..2]));
        folder.write("model-00002-of-00002.safetensors", serialize(&[tensors[2].clone(), second]));
        if indexed {
            let (first, last) = (
                ("model-00001-of-00002.safetensors", &tensors[..2]),
                ("model-00002-of-00002.safetensors", &tensors[2..]),
            );
            folder.write(INDEX, index(&[first, last]));
        }
        folder
    };
    for indexed in [false, true] {
        let folder = twice(tensors[1].clone(), indexed);
        warning(&folder, &["1 of its tensors are in two files", "lm_head.weight"]);
        assert_converts_as(&folder, &tensors);
        let left_out = folder.read_json("prequant.json")["left_out"][0].clone();
        assert_eq!(left_out["tensor"], "lm_head.weight", "{left_out}");
        assert_eq!(left_out["name"], "model-00002-of-00002.safetensors");

        let mut other = tensors[1].clone();
        *other.data.last_mut().unwrap() ^= 1;
        let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        twice(other, indexed).convert(&[]).fails(3, &["lm_head.weight", files[0], files[1], "other bytes"]);
    }
}

#[test]
fn the_file_that_config_json_names_is_taken() {
    let folder = Folder::new("llama");
    folder.write("config.json", r#"{"model_type": "llama", "transformers_weights": "weights.safetensors"}"#);
    folder.write("weights.safetensors", serialize(&llama()));
    folder.write("model.safetensors", serialize(&other_llama()));
    warning(&folder, &["transformers_weights", "weights.safetensors"]);
    assert_converts_as(&folder, &llama());
    assert!(folder.read_json("config.json").get("transformers_weights").is_none(), "the output has the usual name");
    folder.write("config.json", r#"{"model_type": "llama", "transformers_weights": "../weights.safetensors"}"#);
    folder.convert(&["--force"]).fails(3, &["config.json", "in this folder or below it"]);
}

#[test]
fn one_shard_given_alone_is_said_to_be_one() {
    let folder = two_shards(&llama());
    let run = folder.convert_from(&folder.source().join("model-00001-of-00002.safetensors"), &[]).ok();
    assert!(run.stderr.contains("one of 2 shards"), "{}", run.stderr);
}

#[test]
fn a_diffusers_models_files_keep_their_names() {
    let folder = Folder::new("unused");
    let linear = |name: &str| Tensor::random(name, Dtype::BF16, &[128, 64]);
    let tensors =
        ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.ff.net.0.proj.weight", "proj_out.weight"]
            .map(linear);
    folder.write("config.json", r#"{"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.35.0"}"#);
    let names =
        ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"];
    folder.write(names[0], serialize(&tensors[..2]));
    folder.write(names[1], serialize(&tensors[2..]));
    let index_name = "diffusion_pytorch_model.safetensors.index.json";
    folder.write(index_name, index(&[(names[0], &tensors[..2]), (names[1], &tensors[2..])]));
    let run = folder.convert(&["--max-shard-size", "5kB"]).ok();
    assert!(
        run.stderr.contains("a diffusers model (FluxTransformer2DModel): no model of diffusers was compared"),
        "{}",
        run.stderr
    );
    let written = crate::support::file_names(&folder.destination());
    let weights: Vec<&String> = written.iter().filter(|name| name.contains("safetensors")).collect();
    assert!(
        weights.iter().all(|name| name.starts_with("diffusion_pytorch_model")) && weights.len() == 4,
        "{weights:?}"
    );
    assert!(
        folder.read_json(index_name)["weight_map"]
            .as_object()
            .unwrap()
            .values()
            .all(|file| weights.contains(&&file.as_str().unwrap().to_owned()))
    );
    let config = folder.read_json("config.json");
    assert_eq!(config["_class_name"], "FluxTransformer2DModel");
    for against in [false, true] {
        let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        verify.arg("verify").arg(folder.destination());
        if against {
            verify.arg("--against").arg(folder.source());
        }
        crate::support::Run::of(&mut verify).ok();
    }
    let again = folder.convert(&["--max-shard-size", "5kB"]).ok();
    assert!(again.stdout.contains("already converted"), "{}", again.stdout);
    let int4 = folder.convert(&["--force", "--format", "int4", "--group-size", "32"]).ok();
    assert!(int4.stderr.contains("diffusers isn't known to load this layout"), "{}", int4.stderr);

    let single = Folder::new("unused");
    single.write("config.json", r#"{"_class_name": "FluxTransformer2DModel"}"#);
    single.write("diffusion_pytorch_model.safetensors", serialize(&tensors));
    single.convert(&[]).ok();
    assert!(single.destination().join("diffusion_pytorch_model.safetensors").exists());
}
