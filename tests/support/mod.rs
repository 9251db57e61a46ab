//! Small checkpoints, made and read back without the code under test.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorInfo, TensorView};
use tempfile::TempDir;

pub mod codings;
pub mod decisions;
pub mod groups;
pub mod recompute;
pub mod weights;

/// A Linear's name in a Llama.
pub const LINEAR: &str = "model.layers.0.mlp.up_proj.weight";

/// A tensor to be written: name, dtype, shape, bytes.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn new(name: &str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> Tensor {
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
    }

    /// Random finite numbers around zero.
    pub fn random(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
        let elements: usize = shape.iter().product();
        let mut state = name.bytes().fold(1u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3));
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let data = (0..elements).flat_map(|_| encode(dtype, next() * next() * 0.1)).collect();
        Tensor::new(name, dtype, shape, data)
    }
}

fn encode(dtype: Dtype, x: f32) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F32 => x.to_le_bytes().to_vec(),
        other => vec![x.to_bits() as u8; other.bitsize() / 8],
    }
}

/// The safetensors library's file of `tensors`.
pub fn serialize(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|t| (t.name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize(views, metadata).unwrap()
}

/// A file with a header of our choosing.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A folder with a checkpoint in it, and room for another beside it.
pub struct Folder {
    root: TempDir,
}

impl Folder {
    /// With config.json and nothing else.
    pub fn new(model_type: &str) -> Folder {
        let folder = Folder { root: TempDir::new().unwrap() };
        folder.write("config.json", format!("{{\n  \"model_type\": \"{model_type}\"\n}}\n"));
        folder
    }

    /// A Llama with one Linear, a head and a norm in one file.
    pub fn llama() -> Folder {
        let folder = Folder::new("llama");
        folder.write("model.safetensors", serialize(&llama()));
        folder
    }

    pub fn source(&self) -> PathBuf {
        self.root.path().join("source")
    }

    pub fn destination(&self) -> PathBuf {
        self.root.path().join("converted")
    }

    /// A path beside source and destination.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes a file of the source.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.source().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.destination().join(name)).unwrap()
    }

    pub fn read_json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// `prequant convert source converted FLAGS`.
    pub fn convert(&self, flags: &[&str]) -> Run {
        self.convert_from(&self.source(), flags)
    }

    pub fn convert_from(&self, source: &Path, flags: &[&str]) -> Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
        Run::of(command.arg("convert").arg(source).arg(self.destination()).args(flags))
    }

    /// The source's weights as a list of shards with their index.
    pub fn write_shards(&self, shards: &[Vec<Tensor>]) {
        let mut weight_map = serde_json::Map::new();
        for (i, tensors) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            self.write(&name, serialize(tensors));
            weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone().into())));
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        self.write("model.safetensors.index.json", index.to_string());
    }
}

/// A Linear, an output head and a norm.
pub fn llama() -> Vec<Tensor> {
    vec![
        Tensor::random(LINEAR, Dtype::BF16, &[96, 64]),
        Tensor::random("lm_head.weight", Dtype::BF16, &[32, 64]),
        Tensor::random("model.norm.weight", Dtype::BF16, &[64]),
    ]
}

/// How a command ended.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn of(command: &mut Command) -> Run {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Run { code: status.code().unwrap(), stdout: text(stdout), stderr: text(stderr) }
    }

    /// Insists on success.
    #[track_caller]
    pub fn ok(self) -> Run {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// Insists on an exit code, and on words in the one error.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert!(self.stderr.contains("error: "), "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in: {}", self.stderr);
        }
    }
}

/// A tensor as it was read: dtype, shape, bytes.
pub type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// All tensors of a folder's safetensors files, with their files.
pub fn read_tensors(folder: &Path) -> BTreeMap<String, (String, Stored)> {
    let mut tensors = BTreeMap::new();
    for name in file_names(folder).into_iter().filter(|name| name.ends_with(".safetensors")) {
        let bytes = fs::read(folder.join(&name)).unwrap();
        for (tensor, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let stored = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            assert!(tensors.insert(tensor.to_owned(), (name.clone(), stored)).is_none(), "{tensor} is in two files");
        }
    }
    tensors
}

/// Checks that a file of weights has its tensors one after the other, each where a reader that maps the file can take its
/// elements as they are, at a multiple of 64 bytes but for those at the file's end, and that the safetensors library would write the same names, dtypes, shapes and bytes.
pub fn assert_well_formed(file: &[u8]) {
    let (header_len, header) = SafeTensors::read_metadata(file).unwrap();
    let mut tensors: Vec<_> = header.tensors().into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    assert_eq!((8 + header_len) % 64, 0);
    let is_whole = |info: &TensorInfo| (info.data_offsets.1 - info.data_offsets.0).is_multiple_of(64);
    assert!(tensors.is_sorted_by_key(|(_, info)| !is_whole(info)), "{tensors:?}");
    for (name, info) in &tensors {
        let size = (info.dtype.bitsize() / 8).clamp(1, 8);
        assert_eq!(info.data_offsets.0 % size, 0, "{name}: {info:?}");
    }
    let end = tensors.last().map_or(0, |(_, info)| info.data_offsets.1);
    assert_eq!(8 + header_len + end, file.len());
    let read = SafeTensors::deserialize(file).unwrap();
    let tensors = read.iter().map(|(name, t)| Tensor::new(name, t.dtype(), t.shape(), t.data().to_vec()));
    let rewritten = serialize(&tensors.collect::<Vec<_>>());
    let rewritten = SafeTensors::deserialize(&rewritten).unwrap();
    assert_eq!(rewritten.names().len(), read.names().len());
    for (name, tensor) in read.iter() {
        let other = rewritten.tensor(name).unwrap();
        assert_eq!(
            (tensor.dtype(), tensor.shape(), tensor.data()),
            (other.dtype(), other.shape(), other.data()),
            "{name}"
        );
    }
}

/// The tensors of a golden file in a folder of `fixtures`.
pub fn goldens(folder: &str, file: &str) -> BTreeMap<String, Stored> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder).join(format!("{file}.safetensors"));
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let stored = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    tensors.iter().map(|(name, view)| (name.to_owned(), stored(view))).collect()
}

/// The names of all files in a folder and below, sorted.
pub fn file_names(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    names.sort();
    names
}

/// All files of a folder with their content.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    file_names(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
}
