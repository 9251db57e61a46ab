//! Checkpoints that another version wrote: 0.1.0's, of manifest schema 1, in `fixtures/converted-0.1.0` (see tests/net/converted.py).

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::prequant;
use crate::support::{Run, Tensor, contents, read_tensors, with_header};

/// A checkpoint as 0.1.0 wrote it.
fn converted_by_0_1_0(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/converted-0.1.0").join(name)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    contents(from).into_iter().for_each(|(name, bytes)| fs::write(to.join(name), bytes).unwrap());
}

fn run(arguments: &[&OsStr]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments))
}

fn against(folder: &Path, source: &Path) -> Run {
    run(&[
        "verify".as_ref(),
        folder.as_ref(),
        "--against".as_ref(),
        source.as_ref(),
        "--device".as_ref(),
        "cpu".as_ref(),
    ])
}

#[test]
fn what_0_1_0_wrote_is_verified_inspected_and_dequantized() {
    let temporary = tempfile::tempdir().unwrap();
    let names =
        fs::read_dir(converted_by_0_1_0("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: Vec<String> = names.filter(|name| !name.starts_with("source")).collect();
    assert_eq!(names.len(), 10);
    for name in names {
        let converted = converted_by_0_1_0(&name);
        run(&["verify".as_ref(), converted.as_ref()]).ok();
        let source = converted_by_0_1_0(if name == "mxfp4-gpt-oss" { "source-gpt-oss" } else { "source" });
        let said = against(&converted, &source);
        // Which of FP4's zeros an element gets has changed since.
        assert_eq!(said.code, i32::from(name == "fp4"), "{name}: {}", said.stderr);
        let said = said.stdout;
        assert_eq!(said.contains("its bytes aren't what"), name == "fp4", "{said}");
        assert!(said.contains("written by prequant 0.1.0 (manifest schema 1): compared tensor by tensor"), "{said}");
        let inspected = run(&["inspect".as_ref(), converted.as_ref()]).ok().stdout;
        let format = if name == "int4-asym" { "int4-asym" } else { name.split('-').next().unwrap() };
        assert!(inspected.contains(&format!("{format} ")), "{name}: {inspected}");
        run(&["dequantize".as_ref(), converted.as_ref(), temporary.path().join(&name).as_ref()]).ok();
    }
}

/// There and back gives the same weights, and a manifest of today.
#[test]
fn what_0_1_0_wrote_is_rewritten_with_other_experts() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, other, experts) in [("nf4", "nf4-fused", "fuse"), ("nf4-fused", "nf4", "keep")] {
        let to = temporary.path().join(name);
        prequant("convert", &converted_by_0_1_0(name), &to, &["--experts", experts, "--device", "cpu"]).ok();
        let [found, expected] = [&to, &converted_by_0_1_0(other)].map(|folder| read_tensors(folder));
        assert!(found == expected, "{name}: not what 0.1.0 gave with --experts {experts}");
        let manifest: Value = serde_json::from_slice(&fs::read(to.join("prequant.json")).unwrap()).unwrap();
        assert_eq!((&manifest["schema_version"], &manifest["recipe"]["experts"]), (&2.into(), &experts.into()));
        assert_eq!(manifest["recipe"].get("group_size"), None);
        run(&["verify".as_ref(), to.as_ref()]).ok();
    }
}

/// A rerun into what 0.1.0 finished neither takes it for its own nor replaces it unasked.
#[test]
fn what_0_1_0_wrote_is_not_taken_for_what_this_version_writes() {
    let temporary = tempfile::tempdir().unwrap();
    let to = temporary.path().join("converted");
    copy_folder(&converted_by_0_1_0("nf4"), &to);
    let source = converted_by_0_1_0("source");
    let words = ["prequant 0.1.0 (manifest schema 1) wrote", "--against", "--force"];
    prequant("convert", &source, &to, &["--device", "cpu"]).fails(3, &words);
    prequant("convert", &source, &to, &["--device", "cpu", "--force"]).ok();
    let again = prequant("convert", &source, &to, &["--device", "cpu"]).ok();
    assert!(again.stdout.contains("\"seconds\":0.0"), "{}", again.stdout);
}

/// Another version may order tensors otherwise; their bytes must be the same.
#[test]
fn tensors_in_another_order_are_the_same_and_other_bytes_are_named() {
    let temporary = tempfile::tempdir().unwrap();
    let to = temporary.path().join("converted");
    copy_folder(&converted_by_0_1_0("nf4"), &to);
    let source = converted_by_0_1_0("source");
    let ours = fs::read(to.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&ours).unwrap();
    let mut tensors: Vec<Tensor> = tensors
        .iter()
        .map(|(name, view)| Tensor::new(name, view.dtype(), view.shape(), view.data().to_vec()))
        .collect();
    write_weights(&to, &reversed(&tensors));
    assert!(fs::read(to.join("model.safetensors")).unwrap() != ours);
    against(&to, &source).ok();

    let changed = tensors.iter_mut().find(|tensor| tensor.name.ends_with("up_proj.weight")).unwrap();
    changed.data[3] ^= 1;
    let name = changed.name.clone();
    write_weights(&to, &reversed(&tensors));
    let said = against(&to, &source);
    assert_eq!(said.code, 1, "{}", said.stderr);
    assert!(said.stdout.contains(&format!("tensor \"{name}\": its bytes aren't what")), "{}", said.stdout);

    tensors.retain(|tensor| tensor.name != name);
    write_weights(&to, &reversed(&tensors));
    let said = against(&to, &source);
    assert_eq!(said.code, 1, "{}", said.stderr);
    assert!(said.stdout.contains(&format!("tensor \"{name}\": is missing")), "{}", said.stdout);
}

/// Clients may need a key that isn't about quantization.
#[test]
fn a_key_that_is_gone_from_another_versions_config_is_told() {
    let temporary = tempfile::tempdir().unwrap();
    let to = temporary.path().join("converted");
    copy_folder(&converted_by_0_1_0("nf4"), &to);
    let path = to.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(config.as_object_mut().unwrap().remove("num_hidden_layers").is_some());
    fs::write(&path, config.to_string()).unwrap();
    let said = against(&to, &converted_by_0_1_0("source"));
    assert_eq!(said.code, 1, "{}", said.stderr);
    assert!(said.stdout.contains("config.json: its num_hidden_layers isn't what"), "{}", said.stdout);
}

#[test]
fn another_source_of_another_versions_checkpoint_is_told() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    copy_folder(&converted_by_0_1_0("source"), &source);
    let path = source.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let (name, at) = {
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = metadata.tensors();
        let (name, info) = tensors.iter().find(|(name, _)| name.ends_with("up_proj.weight")).unwrap();
        ((*name).clone(), 8 + header + info.data_offsets.0)
    };
    let mut other = bytes.clone();
    other[at + 1] ^= 0x40; // a far larger number, or a far smaller one
    fs::write(&path, other).unwrap();
    let said = against(&converted_by_0_1_0("nf4"), &source);
    assert_eq!(said.code, 1, "{}", said.stderr);
    assert!(said.stdout.contains(&format!("tensor \"{name}")), "{}", said.stdout);
}

/// A file of `tensors`, the last one first.
fn reversed(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in tensors.iter().rev() {
        let (dtype, begin) = (format!("{:?}", tensor.dtype), data.len());
        data.extend(&tensor.data);
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    with_header(&Value::Object(header).to_string(), &data)
}

/// Puts other weights into a checkpoint, with manifest and checksums that agree.
fn write_weights(folder: &Path, weights: &[u8]) {
    const NAME: &str = "model.safetensors";
    fs::write(folder.join(NAME), weights).unwrap();
    let hash = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut manifest: Value = serde_json::from_slice(&fs::read(folder.join("prequant.json")).unwrap()).unwrap();
    for file in manifest["files"].as_array_mut().unwrap().iter_mut().filter(|file| file["name"] == NAME) {
        (file["size"], file["sha256"]) = (json!(weights.len()), json!(hash(weights)));
    }
    let manifest = serde_json::to_vec_pretty(&manifest).unwrap();
    fs::write(folder.join("prequant.json"), &manifest).unwrap();
    let sums = fs::read_to_string(folder.join("SHA256SUMS")).unwrap();
    let line = |line: &str| match line.split_once("  ").unwrap().1 {
        NAME => format!("{}  {NAME}\n", hash(weights)),
        "prequant.json" => format!("{}  prequant.json\n", hash(&manifest)),
        _ => format!("{line}\n"),
    };
    fs::write(folder.join("SHA256SUMS"), sums.lines().map(line).collect::<String>()).unwrap();
}
