//! `prequant merge`: what adapters make of their bases, against PEFT's own results; adapters that can't be merged.

#[path = "../support/mod.rs"]
mod support;

mod goldens;
mod refused;
mod runs;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use support::{Run, Stored, Tensor, contents, goldens, read_tensors, serialize};

/// The cases of `fixtures/merge-goldens`.
const CASES: [&str; 11] = [
    "conv1d",
    "embedding",
    "experts",
    "fused-experts",
    "gpt-oss",
    "granite",
    "linears",
    "mixtral",
    "one-parameter",
    "renamed",
    "rslora",
];

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// A case's base and adapter, to be changed, and room for what is made of them.
struct Case {
    name: &'static str,
    root: TempDir,
}

impl Case {
    fn new(name: &'static str) -> Case {
        let (root, fixture) = (TempDir::new().unwrap(), fixture(name));
        for folder in ["base", "adapter"] {
            fs::create_dir(root.path().join(folder)).unwrap();
            for (file, bytes) in contents(&fixture.join(folder)) {
                fs::write(root.path().join(folder).join(file), bytes).unwrap();
            }
        }
        Case { name, root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// `prequant merge base adapter TO FLAGS`.
    fn merge_to(&self, to: &str, flags: &[&str]) -> Run {
        let folders = ["base", "adapter", to].map(|name| self.path(name));
        Run::of(prequant("merge").args(folders).args(flags))
    }

    fn merge(&self, flags: &[&str]) -> Run {
        self.merge_to("merged", flags)
    }

    fn tensors(&self, folder: &str) -> BTreeMap<String, Stored> {
        read_tensors(&self.path(folder)).into_iter().map(|(name, (_, stored))| (name, stored)).collect()
    }

    /// What PEFT gives.
    fn expected(&self) -> BTreeMap<String, Stored> {
        goldens(&format!("merge-goldens/{}", self.name), "merged")
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Changes the adapter's config.
    fn set(&self, key: &str, value: Value) {
        let name = format!("adapter/{CONFIG}");
        let mut config = self.json(&name);
        config[key] = value;
        fs::write(self.path(&name), config.to_string()).unwrap();
    }

    /// Writes the tensors of a folder's file otherwise.
    fn change(&self, file: &str, change: impl Fn(Tensor) -> Option<Tensor>) {
        let folder = self.path(file).parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let tensors = self.tensors(&folder).into_iter();
        let tensors = tensors.map(|(name, (dtype, shape, data))| Tensor::new(&name, dtype, &shape, data));
        let changed: Vec<Tensor> = tensors.filter_map(change).collect();
        fs::write(self.path(file), serialize(&changed)).unwrap();
    }

    fn change_adapter(&self, change: impl Fn(Tensor) -> Option<Tensor>) {
        self.change(&format!("adapter/{WEIGHTS}"), change);
    }
}

fn prequant(command: &str) -> Command {
    let mut prequant = Command::new(env!("CARGO_BIN_EXE_prequant"));
    prequant.arg(command);
    prequant
}

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/merge-goldens").join(case)
}

#[track_caller]
fn assert_same(found: &BTreeMap<String, Stored>, expected: &BTreeMap<String, Stored>, what: &str) {
    assert!(found.keys().eq(expected.keys()), "{what}: {:?}", found.keys());
    for (name, tensor) in expected {
        assert_eq!((found[name].0, &found[name].1), (tensor.0, &tensor.1), "{what} {name}");
        let size = tensor.0.bitsize() / 8;
        let differing = found[name].2.chunks(size).zip(tensor.2.chunks(size)).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "{what} {name}: {differing} of {} elements", tensor.2.len() / size);
    }
}
