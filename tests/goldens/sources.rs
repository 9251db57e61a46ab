//! What quantized sources decode to, against the libraries that stored them: `scripts/make source-goldens`, `compressed-sources`,
//! `modelopt-sources` and `gptq-sources` had these decode whole checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use prequant::{Options, plan_dequantize};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

/// What begins the names of decoded weights in a golden file.
const DECODED: &str = "decoded:";

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A file's metadata `config`, and its tensors.
fn read(path: &Path) -> (Option<String>, BTreeMap<String, Tensor>) {
    let bytes = fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let config = header.metadata().as_ref().and_then(|metadata| metadata.get("config").cloned());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: TensorView<'_>| Tensor {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    (config, file.iter().map(|(name, view)| (name.to_owned(), tensor(view))).collect())
}

/// The golden files of a folder that hold a checkpoint.
fn checkpoints(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder);
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.retain(|path| read(path).0.is_some());
    paths
}

/// Decodes the checkpoint in a golden file; every tensor of the outcome must be what the library gave. Returns how many were coded.
fn check(path: &Path) -> usize {
    let (config, tensors) = read(path);
    let (expected, stored): (BTreeMap<_, _>, BTreeMap<_, _>) =
        tensors.into_iter().partition(|(name, _)| name.starts_with(DECODED));
    let root = TempDir::new().unwrap();
    let (source, destination) = (root.path().join("source"), root.path().join("decoded"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("config.json"), config.unwrap()).unwrap();
    let views = stored
        .iter()
        .map(|(name, tensor)| (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap()));
    fs::write(source.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();

    let plan = plan_dequantize(&source, u64::MAX, Options::default()).unwrap();
    plan.execute(&destination, &()).unwrap();
    let (_, found) = read(&destination.join("model.safetensors"));
    let names: Vec<&str> = expected.keys().map(|name| &name[DECODED.len()..]).collect();
    assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), names, "{path:?}");
    for (name, expected) in &expected {
        let name = &name[DECODED.len()..];
        let found = &found[name];
        assert_eq!((found.dtype, &found.shape), (expected.dtype, &expected.shape), "{path:?}: {name}");
        let different = found.bytes.iter().zip(&expected.bytes).position(|(a, b)| a != b);
        assert_eq!(different, None, "{path:?}: {name}");
    }
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(destination.join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none(), "{path:?}");
    expected.len()
}

#[test]
fn compressed_tensors_checkpoints_decode_as_it_decompresses_them() {
    let checked: Vec<usize> = checkpoints("compressed-sources").iter().map(|path| check(path)).collect();
    assert_eq!(checked, [12, 12, 5, 5, 5, 1, 3]);
}

#[test]
fn modelopt_checkpoints_decode_as_it_dequantizes_them() {
    let checked: Vec<usize> = checkpoints("modelopt-sources").iter().map(|path| check(path)).collect();
    assert_eq!(checked, [2, 2, 2, 3, 3, 3]);
}

#[test]
fn gptq_and_awq_checkpoints_decode_as_gptqmodel_dequantizes_them() {
    let checked: Vec<usize> = checkpoints("gptq-sources").iter().map(|path| check(path)).collect();
    assert_eq!(checked, [3; 10]);
}

#[test]
fn deepseek_v4_decodes_as_transformers_dequantizes_it() {
    let checked: Vec<usize> = checkpoints("source-goldens").iter().map(|path| check(path)).collect();
    assert_eq!(checked, [2]);
}
