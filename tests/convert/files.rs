//! What a conversion writes, where `conversion.rs` doesn't look: long tensors in little memory, tiny ones, every figure of
//! the manifest, caches and links as sources.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prequant::internal::backend::Cpu;
use prequant::internal::checkpoint::Source;
use prequant::internal::format::{FP4, MXFP4, NF4};
use prequant::internal::kernel::Kernel;
use prequant::internal::ops::quantize::plan;
use prequant::internal::ops::{dequantize, verify};
use prequant::internal::store::{Location, MemoryStore};
use prequant::{DecisionRecord, Manifest, Options, Progress, Recipe, RecipeOptions};
use safetensors::tensor::Dtype;

use crate::support::recompute::{Loss, Recomputed, recompute};
use crate::support::{
    Folder, LINEAR, Run, Stored, Tensor, assert_well_formed, contents, llama, read_tensors, serialize,
};

const SUMS: &str = "SHA256SUMS";
const MANIFEST: &str = "prequant.json";

fn manifest(folder: &Folder) -> Manifest {
    serde_json::from_slice(&folder.read(MANIFEST)).unwrap()
}

fn up_proj(layer: usize, dtype: Dtype, shape: &[usize]) -> Tensor {
    Tensor::random(&format!("model.layers.{layer}.mlp.up_proj.weight"), dtype, shape)
}

/// Insists that `tensor` was quantized to exactly its recomputation.
#[track_caller]
fn assert_quantized(stored: &BTreeMap<String, (String, Stored)>, tensor: &Tensor, plain: &Recomputed) {
    for (suffix, expected) in &plain.outputs {
        let name = format!("{}{suffix}", tensor.name);
        let (_, found) = &stored[&name];
        assert_eq!((&found.0, &found.1), (&expected.0, &expected.1), "{name}: dtype and shape");
        assert!(found.2 == expected.2, "{name}: bytes");
    }
    let written = stored.keys().filter(|name| name.starts_with(&tensor.name)).count();
    assert_eq!(written, plain.outputs.len(), "outputs of {}", tensor.name);
}

#[test]
fn tensors_longer_than_any_chunk_are_what_one_pass_gives_in_any_memory() {
    // More than one chunk of 2^21 elements, and more than one run of 2^16 absmax: neither divides the other.
    let tensors = [
        up_proj(0, Dtype::BF16, &[2099, 2053]),
        Tensor::random("model.layers.0.mlp.experts.gate_up_proj", Dtype::F16, &[3, 1031, 701]),
        up_proj(1, Dtype::F32, &[1, 2_097_153]),
    ];
    let folder = Folder::new("qwen3_moe");
    folder.write("model.safetensors", serialize(&tensors));
    for double_quant in [false, true] {
        let options = RecipeOptions {
            double_quant: Some(double_quant),
            block_size: Some(32.try_into().unwrap()),
            max_shard_size: Some(2_000_000),
            ..RecipeOptions::default()
        };
        let recipe = options.build().unwrap();
        let plain: Vec<Recomputed> = tensors.iter().map(|tensor| recompute(tensor, &recipe)).collect();
        let mut reference = None;
        for (threads, memory, kernel) in [
            (1, 256 << 20, Kernel::SCALAR),
            (8, 256 << 20, Kernel::detect()),
            (3, 14 << 20, Kernel::detect()), // room for one tensor's absmax at a time
        ] {
            let to = folder.beside(&format!("{double_quant}-{threads}"));
            let options = Options {
                threads,
                memory: Some(memory),
                device: Arc::new(Cpu::new(kernel)).into(),
                ..Options::default()
            };
            plan(folder.source(), recipe.clone(), options).unwrap().execute(&to, &Unseen).unwrap();
            let files = contents(&to);
            let reference = reference.get_or_insert_with(|| {
                let stored = read_tensors(&to);
                tensors.iter().zip(&plain).for_each(|(tensor, plain)| assert_quantized(&stored, tensor, plain));
                files.clone()
            });
            assert!(files == *reference, "double quantization {double_quant}, {threads} threads, {memory} bytes");
        }
    }
}

#[test]
fn tensors_shorter_than_a_block_are_quantized_like_any_other() {
    for (format, double_quant, block_size) in [("nf4", false, "4096"), ("fp4", true, "32"), ("nf4", true, "64")] {
        let dtypes = [Dtype::BF16, Dtype::F16, Dtype::F32];
        let shapes: [&[usize]; 6] = [&[1, 1], &[1, 2], &[3, 1], &[1, 31], &[11, 3], &[7, 13]];
        let cases = dtypes.iter().flat_map(|dtype| shapes.map(|shape| (*dtype, shape)));
        let mut tensors: Vec<Tensor> = cases.enumerate().map(|(i, (dtype, shape))| up_proj(i, dtype, shape)).collect();
        tensors.push(Tensor::random("model.layers.0.mlp.experts.down_proj", Dtype::BF16, &[1, 1, 1]));
        tensors.push(Tensor::new("model.layers.99.mlp.up_proj.weight", Dtype::F32, &[1, 1], vec![0; 4]));
        let folder = Folder::new("qwen3_moe");
        folder.write("model.safetensors", serialize(&tensors));
        let mut flags = vec!["--format", format, "--block-size", block_size];
        flags.extend(double_quant.then_some("--double-quant"));
        folder.convert(&flags).ok();
        let (stored, recipe) = (read_tensors(&folder.destination()), manifest(&folder).recipe);
        tensors.iter().for_each(|tensor| assert_quantized(&stored, tensor, &recompute(tensor, &recipe)));
    }
}

#[test]
fn statistics_are_those_of_a_plain_recomputation_for_each_tensor_and_for_all() {
    for format in [&NF4, &FP4] {
        for (block_size, double_quant) in [("32", true), ("64", false), ("512", true), ("4096", false)] {
            let mut zeros = up_proj(3, Dtype::F16, &[64, 200]);
            zeros.data[8192..][..8192].fill(0);
            let tensors = [
                up_proj(0, Dtype::BF16, &[97, 131]),
                up_proj(1, Dtype::F32, &[300, 257]),
                up_proj(2, Dtype::F16, &[1, 5]),
                zeros,
            ];
            let folder = Folder::new("llama");
            folder.write("model.safetensors", serialize(&tensors));
            let mut flags = vec!["--format", format.name, "--block-size", block_size, "--max-shard-size", "9kB"];
            flags.extend(double_quant.then_some("--double-quant"));
            folder.convert(&flags).ok();
            let manifest = manifest(&folder);
            let mut all = Loss::default();
            for tensor in &tensors {
                let record = manifest.tensors.iter().find(|record| record.sources[0].name == tensor.name).unwrap();
                let loss = recompute(tensor, &manifest.recipe).loss;
                let of = format!("{} in {} of {block_size}", tensor.name, format.name);
                loss.assert_is(record.statistics.as_ref().unwrap(), &of);
                all.add(&loss);
            }
            all.assert_is(&manifest.summary.statistics, "all tensors");
        }
    }
}

#[test]
fn every_shard_is_aligned_and_without_holes() {
    let kept = [
        (Dtype::BOOL, &[3][..]),
        (Dtype::U8, &[0]),
        (Dtype::I8, &[2, 3]),
        (Dtype::I16, &[1]),
        (Dtype::U16, &[]),
        (Dtype::F16, &[5]),
        (Dtype::I32, &[2, 0, 7]),
        (Dtype::U32, &[1]),
        (Dtype::C64, &[2]),
        (Dtype::F64, &[]),
        (Dtype::I64, &[1, 1, 1, 1]),
        (Dtype::U64, &[3]),
    ];
    let kept = kept.map(|(dtype, shape)| Tensor::random(&format!("model.buffer_{dtype:?}"), dtype, shape));
    let weights = (0..6).map(|i| up_proj(i, Dtype::BF16, &[40, 65]));
    let tensors: Vec<Tensor> = kept.iter().cloned().chain(weights).collect();
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--double-quant", "--max-shard-size", "6kB"]).ok();
    let files = contents(&folder.destination());
    let shards: Vec<&Vec<u8>> =
        files.iter().filter(|(name, _)| name.ends_with(".safetensors")).map(|(_, file)| file).collect();
    assert!(shards.len() > 2);
    shards.into_iter().for_each(|shard| assert_well_formed(shard));
    let stored = read_tensors(&folder.destination());
    for Tensor { name, dtype, shape, data } in kept {
        assert_eq!(stored[&name].1, (dtype, shape, data), "{name}");
    }
}

#[test]
fn a_kept_tensors_nan_is_copied_and_only_weights_are_held_to_be_finite() {
    let mut tensors = llama();
    tensors[1].data[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&[]).ok();
    assert!(read_tensors(&folder.destination())["lm_head.weight"].1.2 == tensors[1].data);
}

#[test]
fn the_manifest_reads_back_and_names_neither_place_nor_host() {
    let folder = Folder::llama();
    folder.convert(&["--exclude", "norm", "--include", "lm_head"]).ok();
    let written = folder.read(MANIFEST);
    let manifest = manifest(&folder);
    let mut again = Vec::new();
    manifest.write_json(&mut again).unwrap();
    assert!(again == written, "reading and writing it changes it");
    assert!(manifest.source.files.iter().all(|file| file.sha256.is_none()), "--hash-source wasn't given");
    let decisions = manifest.tensors.iter().map(|record| (record.sources[0].name.as_str(), record.decision));
    let expected = [
        (LINEAR, DecisionRecord::Quantize),
        ("lm_head.weight", DecisionRecord::Quantize),
        ("model.norm.weight", DecisionRecord::Keep),
    ];
    assert_eq!(decisions.collect::<BTreeMap<_, _>>(), expected.into());

    let text = String::from_utf8(written).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let places = [folder.beside(""), std::env::current_dir().unwrap(), std::env::temp_dir()];
    let places = places.iter().map(|place| place.to_str().unwrap());
    for word in places.chain(Some(host.trim()).filter(|host| host.len() > 3)) {
        assert!(!text.contains(word), "{word} is in the manifest");
    }
}

#[test]
fn the_source_path_and_how_it_is_spelled_change_no_byte() {
    let folder = Folder::llama();
    folder.write("tokenizer.json", "{}");
    folder.convert(&[]).ok();
    let expected = contents(&folder.destination());
    let copy = folder.beside("elsewhere/of another name");
    fs::create_dir_all(&copy).unwrap();
    for (name, content) in contents(&folder.source()) {
        fs::write(copy.join(name), content).unwrap();
    }
    let spellings = [(".", "../a"), ("./", "../b/"), ("../of another name", "../new/c"), ("../../source", "../d/./e")];
    for (from, to) in spellings {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
        Run::of(command.current_dir(&copy).args(["convert", from, to])).ok();
        assert!(contents(&copy.join(to)) == expected, "{from} {to}");
    }
}

#[test]
fn a_hub_cache_with_shards_index_and_side_files_as_links_becomes_plain_files() {
    let plain = Folder::new("llama");
    let shards: Vec<Vec<Tensor>> = llama().into_iter().map(|tensor| vec![tensor]).collect();
    plain.write_shards(&shards);
    plain.write("tokenizer.json", "{}");
    plain.convert(&[]).ok();

    let cache = Folder::new("unused");
    let snapshot = cache.source().join("models--x/snapshots/0123abc");
    fs::create_dir_all(&snapshot).unwrap();
    for (i, (name, content)) in contents(&plain.source()).into_iter().enumerate() {
        cache.write(&format!("models--x/blobs/{i}"), content);
        symlink(format!("../../blobs/{i}"), snapshot.join(name)).unwrap();
    }
    cache.convert_from(&snapshot, &[]).ok();
    assert!(contents(&cache.destination()) == contents(&plain.destination()));
    for entry in fs::read_dir(cache.destination()).unwrap() {
        let entry = entry.unwrap();
        assert!(entry.file_type().unwrap().is_file(), "{:?} is a link", entry.file_name());
    }
}

#[test]
fn one_output_file_has_no_index_though_the_source_had_one() {
    let folder = Folder::new("llama");
    folder.write_shards(&llama().into_iter().map(|tensor| vec![tensor]).collect::<Vec<_>>());
    folder.convert(&[]).ok();
    let names: Vec<String> = contents(&folder.destination()).into_keys().collect();
    assert_eq!(names, [SUMS, "config.json", "model.safetensors", MANIFEST]);
}

#[test]
fn sha256sum_accepts_the_checksums() {
    let folder = Folder::llama();
    folder.write("nested/a file with spaces.txt", "x");
    folder.convert(&["--max-shard-size", "3kB"]).ok();
    let mut command = Command::new("sha256sum");
    match command.args(["--check", "--strict", SUMS]).current_dir(folder.destination()).output() {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(_) => println!("skipped: no sha256sum here"),
    }
}

#[test]
fn a_tensor_under_the_name_of_anothers_output_is_refused_not_written_twice() {
    for (taken, flags) in [(".quant_map", &[][..]), (".nested_absmax", &["--double-quant"])] {
        let folder = Folder::new("llama");
        let other = Tensor::random(&format!("{LINEAR}{taken}"), Dtype::F32, &[16]);
        folder.write("model.safetensors", serialize(&[llama(), vec![other]].concat()));
        folder.convert(flags).fails(3, &[LINEAR, taken]);
        assert!(!folder.destination().exists());
    }
}

#[test]
fn side_files_may_have_any_name() {
    for name in ["job", "lock", "publishing", "model.safetensors.sealed", "notes.partial", "a b\u{e9}.txt"] {
        let folder = Folder::llama();
        folder.write(name, "mine");
        folder.convert(&[]).ok();
        assert_eq!(folder.read(name), b"mine", "{name}");
        assert!(manifest(&folder).files.iter().any(|file| file.name == name), "{name} isn't listed");
    }
}

#[test]
fn a_conversion_stopped_after_its_first_shard_goes_on_to_the_same_bytes_with_side_files_there() {
    let folder = Folder::new("llama");
    folder
        .write("model.safetensors", serialize(&(0..5).map(|i| up_proj(i, Dtype::BF16, &[64, 64])).collect::<Vec<_>>()));
    folder.write("tokenizer.json", "{}");
    folder.write("nested/LICENSE", "free");
    let recipe = Recipe { max_shard_size: 3000, ..Recipe::default() };
    let conversion = || plan(folder.source(), recipe.clone(), Options { threads: 1, ..Options::default() }).unwrap();
    let whole = folder.beside("whole");
    conversion().execute(&whole, &Unseen).unwrap();

    let stop = AtomicBool::new(false);
    let stopped = conversion().execute_until(&stop, folder.destination(), &StopAtSeal(&stop));
    assert_eq!(stopped.unwrap_err().kind().name(), "interrupted");
    conversion().execute(folder.destination(), &Unseen).unwrap();
    assert!(contents(&folder.destination()) == contents(&whole));
}

/// All files of a folder, in memory.
fn in_memory(folder: &Path) -> Location {
    let store = MemoryStore::default();
    contents(folder).into_iter().for_each(|(name, content)| store.put(Path::new("model").join(name), content));
    Location::new(Arc::new(store), "model")
}

#[test]
fn a_checkpoint_in_memory_gives_the_bytes_that_one_in_a_folder_gives() {
    let folder = Folder::new("llama");
    let shards = [0, 1].map(|i| vec![up_proj(i, Dtype::BF16, &[64, 64]), up_proj(i + 2, Dtype::F16, &[3, 50])]);
    folder.write_shards(&shards);
    folder.write("tokenizer.json", "{}");
    folder.write("nested/LICENSE", "free");
    let source = in_memory(&folder.source());
    for (i, format) in [&NF4, &MXFP4].into_iter().enumerate() {
        let options = RecipeOptions { format: Some(format), max_shard_size: Some(6000), ..RecipeOptions::default() };
        let recipe = options.build().unwrap();
        let options = Options { hash_source: true, ..Options::default() };
        let (there, here) = (folder.beside(&format!("from-folder-{i}")), folder.beside(&format!("from-memory-{i}")));
        plan(folder.source(), recipe.clone(), options.clone()).unwrap().execute(&there, &Unseen).unwrap();
        plan(&source, recipe.clone(), options.clone()).unwrap().execute(&here, &Unseen).unwrap();
        assert!(contents(&here) == contents(&there), "{format:?}");

        let (interrupt, hashed) = (AtomicBool::new(false), |_| ());
        let options =
            verify::Options { threads: 2, quick: false, interrupt: &interrupt, hashed: &hashed, planned: &|_| () };
        let converted = in_memory(&here);
        let report = verify::against(&converted, &source, Options::default(), options).unwrap();
        assert!(report.differences.is_empty(), "{:?}", report.differences);
        let (there, here) = (folder.beside(&format!("restored-{i}")), folder.beside(&format!("restored-memory-{i}")));
        for (from, to) in [(Location::from(folder.beside(&format!("from-folder-{i}"))), &there), (converted, &here)] {
            let decoding = dequantize::plan(from, 6000, Options::default()).unwrap();
            decoding.execute_until(&interrupt, to, &Unseen).unwrap();
        }
        assert!(contents(&here) == contents(&there), "{format:?}");
    }
    let nowhere = plan(&source, Recipe::default(), Options::default()).unwrap().execute_at(
        &AtomicBool::new(false),
        &source,
        &Unseen,
    );
    assert!(
        nowhere.unwrap_err().to_string().contains("model: a checkpoint can be written to a folder of the file system")
    );
}

#[test]
fn sources_elsewhere_are_refused_in_the_words_of_sources_here() {
    let source = |files: &[(&str, &str)]| {
        let store = MemoryStore::default();
        files.iter().for_each(|(name, content)| store.put(Path::new("model").join(name), content.as_bytes().to_vec()));
        Source::open(Location::new(Arc::new(store), "model")).unwrap_err().to_string()
    };
    assert!(source(&[]).starts_with("model: not found"));
    assert!(source(&[("config.json", "{}")]).starts_with("model: not a checkpoint: it has no .safetensors file"));
    let short = source(&[("config.json", "{}"), ("model.safetensors", "abc")]);
    assert!(short.starts_with("model/model.safetensors: 3 bytes are too few"), "{short}");
    assert!(
        source(&[("config.json", "[]"), ("model.safetensors", "")]).starts_with("model/config.json: not a JSON object")
    );
}

/// Nobody watches.
struct Unseen;

impl Progress for Unseen {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn kept(&self, _: usize) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {}
}

/// Stops the conversion at its first finished file.
struct StopAtSeal<'a>(&'a AtomicBool);

impl Progress for StopAtSeal<'_> {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn kept(&self, _: usize) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The file name that a path ends in is all that the manifest knows of it.
#[test]
fn a_single_file_converts_the_same_with_and_without_a_config_beside_it_but_for_the_config() {
    let with = Folder::llama();
    let file = with.source().join("model.safetensors");
    with.convert_from(&file, &[]).ok();
    let without = Folder::llama();
    fs::remove_file(without.source().join("config.json")).unwrap();
    without.convert_from(&without.source().join("model.safetensors"), &[]).ok();
    let weights = |folder: &Folder| folder.read("model.safetensors");
    assert!(weights(&with) == weights(&without));
    assert!(with.destination().join("config.json").exists());
    assert!(!without.destination().join("config.json").exists());
    assert_eq!(names_of_sources(&with), names_of_sources(&without));
}

fn names_of_sources(folder: &Folder) -> Vec<String> {
    let files = manifest(folder).source.files;
    assert!(files.iter().all(|file| Path::new(&file.name).components().count() == 1));
    files.into_iter().map(|file| file.name).collect()
}
