//! What headers say beside their tensors: kept, as far as it is still true.

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::support::{Folder, Run, Tensor, llama};

fn with_metadata(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Vec<u8> {
    let views = tensors.iter().map(|t| (t.name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    let metadata = metadata.iter().map(|&(key, text)| (key.to_owned(), text.to_owned())).collect();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

fn metadata_of(file: &[u8]) -> Vec<(String, String)> {
    let (_, header) = safetensors::SafeTensors::read_metadata(file).unwrap();
    let mut found: Vec<(String, String)> = header.metadata().clone().unwrap().into_iter().collect();
    found.sort();
    found
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|&(key, text)| (key.to_owned(), text.to_owned())).collect()
}

/// As ComfyUI's all-in-one files have it.
#[test]
fn what_a_single_file_says_of_its_model_is_kept() {
    let folder = Folder::new("unused");
    let tensors = [
        Tensor::random("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", Dtype::BF16, &[192, 64]),
        Tensor::random("first_stage_model.encoder.conv_in.weight", Dtype::F32, &[8, 3, 3, 3]),
    ];
    std::fs::remove_file(folder.source().join("config.json")).unwrap();
    let said = [("modelspec.architecture", "flux-1-dev"), ("modelspec.title", "x"), ("modelspec.hash_sha256", "0xabc")];
    folder.write("aio.safetensors", with_metadata(&tensors, &said));
    let run = folder.convert_from(&folder.source().join("aio.safetensors"), &["--max-shard-size", "5kB"]).ok();
    assert!(run.stderr.contains("no config.json beside the weights"), "{}", run.stderr);
    assert!(run.stderr.contains("not kept of its headers' __metadata__: modelspec.hash_sha256"), "{}", run.stderr);
    for name in crate::support::file_names(&folder.destination()).iter().filter(|name| name.ends_with(".safetensors")) {
        let kept = [("format", "pt"), ("modelspec.architecture", "flux-1-dev"), ("modelspec.title", "x")];
        assert_eq!(metadata_of(&folder.read(name)), pairs(&kept), "{name}");
    }
    let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
    verify.arg("verify").arg(folder.destination()).arg("--against").arg(folder.source().join("aio.safetensors"));
    Run::of(&mut verify).ok();
}

#[test]
fn of_several_files_what_they_agree_on_is_kept() {
    let folder = Folder::new("llama");
    let tensors = llama();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    folder.write(names[0], with_metadata(&tensors[..1], &[("format", "mlx"), ("a", "1"), ("b", "2"), ("only", "x")]));
    folder.write(names[1], with_metadata(&tensors[1..], &[("format", "pt"), ("a", "1"), ("b", "3")]));
    let run = folder.convert(&[]).ok();
    assert!(run.stderr.contains("not kept of its headers' __metadata__: b ("), "{}", run.stderr);
    let kept = [("a", "1"), ("format", "pt"), ("only", "x")];
    assert_eq!(metadata_of(&folder.read("model.safetensors")), pairs(&kept));
}

#[test]
fn more_than_a_header_should_carry_is_not_kept_and_said_so() {
    let folder = Folder::new("llama");
    let long = "x".repeat(1 << 20);
    folder.write("model.safetensors", with_metadata(&llama(), &[("workflow", &long)]));
    let run = folder.convert(&[]).ok();
    assert!(run.stderr.contains("__metadata__ has more than 1048576 bytes"), "{}", run.stderr);
    assert_eq!(metadata_of(&folder.read("model.safetensors")), pairs(&[("format", "pt")]));
}
