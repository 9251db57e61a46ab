//! What a conversion writes: equal to a plain recomputation, and the same bytes however it is done.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use prequant::internal::backend::Cpu;
use prequant::internal::format::{FP4, NESTED_BLOCK_SIZE, NF4, Scales, dynamic_map, nf4};
use prequant::internal::kernel::block::nested;
use prequant::internal::kernel::{BlockErrors, Blocks, Kernel};
use prequant::internal::layout::{QuantState, quant_state_bytes};
use prequant::internal::ops::quantize::plan;
use prequant::{BlockSize, DecisionRecord, FloatDtype, Manifest, Options, Progress, Recipe, RecipeOptions};
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use crate::support::{Folder, LINEAR, Stored, Tensor, assert_well_formed, contents, llama, read_tensors, serialize};

/// Nobody watches.
pub struct Unseen;

impl Progress for Unseen {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn kept(&self, _: usize) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {}
}

/// How a conversion is done, which must not matter.
#[derive(Clone, Copy, Debug)]
struct How {
    threads: usize,
    chunk_elements: usize,
    kernel: Kernel,
}

fn convert(source: &Path, destination: &Path, recipe: &Recipe, how: How) -> Manifest {
    let options = Options { threads: how.threads, device: Arc::new(Cpu::new(how.kernel)).into(), ..Options::default() };
    let mut conversion = plan(source, recipe.clone(), options).unwrap();
    conversion.budget = conversion.budget.with_chunk_elements(how.chunk_elements);
    conversion.execute(destination, &Unseen).unwrap();
    Manifest::parse(&std::fs::read(destination.join("prequant.json")).unwrap()).unwrap()
}

/// A whole tensor at once, by the specification: its outputs by suffix.
fn recompute(tensor: &Tensor, dtype: FloatDtype, recipe: &Recipe) -> BTreeMap<String, Stored> {
    let codec = recipe.codec();
    let Scales::Blocks { codebook, size, double_quant, .. } = codec.scales else { panic!("blocks") };
    let elements = tensor.data.len() / dtype.size();
    let blocks = elements.div_ceil(size.get());
    let mut packed = vec![0; elements.div_ceil(2)];
    let [mut absmax, mut signal, mut noise, mut worst] = std::array::from_fn(|_| vec![0f32; blocks]);
    let figures = BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
    let source = &tensor.data;
    let blocks = Blocks { source, dtype, block_size: size, codebook, packed: &mut packed, figures };
    Kernel::SCALAR.quantize(blocks).unwrap();

    let floats = |values: &[f32]| -> Stored {
        (Dtype::F32, vec![values.len()], values.iter().flat_map(|x| x.to_le_bytes()).collect())
    };
    let bytes = |bytes: Vec<u8>| -> Stored { (Dtype::U8, vec![bytes.len()], bytes) };
    let mut outputs: BTreeMap<String, Stored> = BTreeMap::new();
    outputs.insert(String::new(), (Dtype::U8, vec![packed.len(), 1], packed));
    outputs.insert(".quant_map".to_owned(), floats(&codebook.values()));
    let mut nested_offset = 0.0;
    if double_quant {
        nested_offset = (absmax.iter().map(|&x| f64::from(x)).sum::<f64>() / absmax.len() as f64) as f32;
        let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0f32; absmax.len().div_ceil(NESTED_BLOCK_SIZE)]);
        nested::quantize(&absmax, nested_offset, dynamic_map(), &mut codes, &mut nested);
        outputs.insert(".absmax".to_owned(), bytes(codes));
        outputs.insert(".nested_absmax".to_owned(), floats(&nested));
        outputs.insert(".nested_quant_map".to_owned(), floats(dynamic_map().values()));
    } else {
        outputs.insert(".absmax".to_owned(), floats(&absmax));
    }
    let shape: Vec<u64> = tensor.shape.iter().map(|&d| d as u64).collect();
    let state = quant_state_bytes(&QuantState { codec: &codec, dtype, shape: &shape, nested_offset });
    outputs.insert(format!(".quant_state.bitsandbytes__{}", codec.format.name), bytes(state));
    outputs
}

fn float_dtype(dtype: Dtype) -> FloatDtype {
    match dtype {
        Dtype::BF16 => FloatDtype::Bfloat16,
        Dtype::F16 => FloatDtype::Float16,
        _ => FloatDtype::Float32,
    }
}

/// All tensors that a conversion of `tensors` must give.
fn expected(tensors: &[Tensor], manifest: &Manifest) -> BTreeMap<String, Stored> {
    let quantized = |name: &str| {
        let record = manifest.tensors.iter().find(|record| record.sources[0].name == name).unwrap();
        record.decision == DecisionRecord::Quantize
    };
    let mut expected = BTreeMap::new();
    for tensor in tensors {
        if quantized(&tensor.name) {
            let outputs = recompute(tensor, float_dtype(tensor.dtype), &manifest.recipe);
            expected.extend(outputs.into_iter().map(|(suffix, stored)| (format!("{}{suffix}", tensor.name), stored)));
        } else {
            expected.insert(tensor.name.clone(), (tensor.dtype, tensor.shape.clone(), tensor.data.clone()));
        }
    }
    expected
}

/// A weight's shape: 2-D or fused 3-D; some are several chunks long, most are small and odd.
fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        6 => (1..70usize, 1..90usize).prop_map(|(a, b)| vec![a, b]),
        2 => (1..5usize, 1..40usize, 1..50usize).prop_map(|(a, b, c)| vec![a, b, c]),
        1 => (1..4usize, 65_500..65_600usize).prop_map(|(a, b)| vec![a, b]),
        1 => Just(vec![3, 257, 331]),
    ]
}

fn quantizable() -> impl Strategy<Value = Vec<(Vec<usize>, Dtype)>> {
    let dtype = prop::sample::select(vec![Dtype::BF16, Dtype::F16, Dtype::F32]);
    prop::collection::vec((shapes(), dtype), 1..6)
}

/// Weights to be quantized, and tensors that are kept: of many dtypes, a scalar, an empty one.
fn checkpoint(weights: &[(Vec<usize>, Dtype)]) -> Vec<Tensor> {
    let weights = weights.iter().enumerate().map(|(i, (shape, dtype))| {
        let name = match shape.len() {
            3 => format!("model.layers.{i}.mlp.experts.gate_up_proj"),
            _ => format!("model.layers.{i}.mlp.experts.7.up_proj.weight"),
        };
        Tensor::random(&name, *dtype, shape)
    });
    let kept = [
        Tensor::random("lm_head.weight", Dtype::BF16, &[33, 7]),
        Tensor::random("model.norm.weight", Dtype::F32, &[65_600 * 2]),
        Tensor::random("model.scalar", Dtype::F64, &[]),
        Tensor::random("model.ids", Dtype::I64, &[3]),
        Tensor::random("model.mask", Dtype::BOOL, &[5]),
        Tensor::random("model.empty.weight", Dtype::F16, &[0, 4]),
    ];
    weights.chain(kept).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn bytes_depend_on_source_and_recipe_alone(
        weights in quantizable(),
        block_size in prop::sample::select(vec![32u32, 64, 128, 256, 512, 1024, 2048, 4096]),
        format in prop::sample::select(vec![&NF4, &FP4]),
        double_quant: bool,
        shards in 1..4usize,
        max_shard_size in prop::sample::select(vec![1, 5_000, 100_000, 5_000_000_000]),
        threads in 1..9usize,
        chunk_elements in prop::sample::select(vec![1, 100_000, 200_000, 1 << 21]),
    ) {
        let tensors = checkpoint(&weights);
        let folder = Folder::new("qwen3_moe");
        folder.write_shards(&tensors.chunks(tensors.len().div_ceil(shards)).map(<[_]>::to_vec).collect::<Vec<_>>());
        let options = RecipeOptions {
            format: Some(format),
            block_size: Some(BlockSize::try_from(block_size).unwrap()),
            double_quant: Some(double_quant),
            max_shard_size: Some(max_shard_size),
            ..RecipeOptions::default()
        };
        let recipe = options.build().unwrap();

        let plain = How { threads: 1, chunk_elements: 1 << 21, kernel: Kernel::SCALAR };
        let manifest = convert(&folder.source(), &folder.destination(), &recipe, plain);
        let stored: BTreeMap<_, _> =
            read_tensors(&folder.destination()).into_iter().map(|(name, (_, stored))| (name, stored)).collect();
        let expected = expected(&tensors, &manifest);
        prop_assert_eq!(stored.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (name, tensor) in &expected {
            prop_assert!(stored[name] == *tensor, "{} differs", name);
        }

        let reference = contents(&folder.destination());
        for (i, kernel) in Kernel::available().into_iter().enumerate() {
            let other = folder.beside(&format!("other-{i}"));
            convert(&folder.source(), &other, &recipe, How { threads, chunk_elements, kernel });
            let files = contents(&other);
            prop_assert_eq!(files.keys().collect::<Vec<_>>(), reference.keys().collect::<Vec<_>>());
            for (name, content) in &files {
                prop_assert!(*content == reference[name], "{} differs with {}", name, kernel.name());
            }
        }
    }
}

#[test]
fn statistics_say_what_decoding_shows() {
    for double_quant in [false, true] {
        let folder = Folder::new("llama");
        let mut tensor = Tensor::random(LINEAR, Dtype::F32, &[77, 130]);
        tensor.data[..64 * 4].fill(0);
        folder.write("model.safetensors", serialize(std::slice::from_ref(&tensor)));
        let flags: &[&str] = if double_quant { &["--double-quant"] } else { &[] };
        folder.convert(flags).ok();
        let manifest: Manifest = serde_json::from_slice(&folder.read("prequant.json")).unwrap();
        let statistics = manifest.tensors[0].statistics.clone().unwrap();
        assert_eq!(manifest.summary.statistics, statistics, "of one tensor and of all");

        let plain = recompute(&tensor, FloatDtype::Float32, &Recipe::default());
        let floats = |bytes: &[u8]| -> Vec<f64> {
            bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
        };
        let (absmax, source) = (floats(&plain[".absmax"].2), floats(&tensor.data));
        let values = nf4::CODEBOOK.values();
        let decoded: Vec<f64> = (0..source.len())
            .map(|i| {
                let byte = plain[""].2[i / 2];
                let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                f64::from(values[usize::from(code)]) * absmax[i / 64]
            })
            .collect();
        let errors = || source.iter().zip(&decoded).map(|(x, y)| x - y);
        let relative = errors().map(|e| e * e).sum::<f64>() / source.iter().map(|x| x * x).sum::<f64>();
        let close = |ours: f64, theirs: f64| assert!((ours / theirs - 1.0).abs() < 1e-5, "{ours:e} {theirs:e}");
        close(statistics.relative_squared_error, relative);
        close(statistics.snr_db.unwrap(), -10.0 * relative.log10());
        close(statistics.max_absolute_error, errors().fold(0.0, |most, e| most.max(e.abs())));
        close(statistics.absmax.mean, absmax.iter().sum::<f64>() / absmax.len() as f64);
        assert_eq!(f64::from(statistics.absmax.min), 0.0);
        close(f64::from(statistics.absmax.max), absmax.iter().copied().fold(0.0, f64::max));
        assert_eq!((statistics.blocks, statistics.zero_blocks), (absmax.len() as u64, 1));
        assert_eq!(statistics.double_quantization.is_some(), double_quant);
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_manifest_has_every_file_and_tensor_with_its_hash() {
    let folder = Folder::new("llama");
    let shards: Vec<Vec<Tensor>> = llama().into_iter().map(|tensor| vec![tensor]).collect();
    folder.write_shards(&shards);
    folder.write("tokenizer.json", "{}");
    folder.convert(&["--max-shard-size", "3kB", "--hash-source"]).ok();
    let json = String::from_utf8(folder.read("prequant.json")).unwrap();
    let manifest: Manifest = serde_json::from_str(&json).unwrap();

    let there = contents(&folder.destination());
    let listed: Vec<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    let others = ["SHA256SUMS", "prequant.json"];
    assert_eq!(listed, there.keys().filter(|name| !others.contains(&name.as_str())).collect::<Vec<_>>());
    for file in &manifest.files {
        let content = &there[&file.name];
        assert_eq!((file.size, file.sha256.to_string()), (content.len() as u64, hex(content)), "{}", file.name);
    }
    let sums = there.iter().filter(|(name, _)| *name != "SHA256SUMS");
    let sums: String = sums.map(|(name, content)| format!("{}  {name}\n", hex(content))).collect();
    assert_eq!(String::from_utf8_lossy(&there["SHA256SUMS"]), sums);

    let stored = read_tensors(&folder.destination());
    let outputs: Vec<_> = manifest.tensors.iter().flat_map(|tensor| &tensor.outputs).collect();
    assert_eq!(outputs.len(), stored.len());
    for output in outputs {
        let (file, (dtype, shape, data)) = &stored[&output.name];
        let shape: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
        assert_eq!((&output.file, &output.dtype, &output.shape), (file, &format!("{dtype:?}"), &shape));
        assert_eq!(output.sha256.to_string(), hex(data), "{}", output.name);
    }
    for file in &manifest.source.files {
        let content = std::fs::read(folder.source().join(&file.name)).unwrap();
        let header = 8 + u64::from_le_bytes(content[..8].try_into().unwrap()) as usize;
        assert_eq!((file.size, file.header_sha256.to_string()), (content.len() as u64, hex(&content[..header])));
        assert_eq!(file.sha256.map(|hash| hash.to_string()), Some(hex(&content)));
    }
    let root = folder.beside("");
    assert!(!json.contains(root.to_str().unwrap()), "a path is in the manifest");
}

/// Takes out the cases that the feature `test-format` adds: it isn't for users.
fn without_test_format(schema: &mut serde_json::Value) {
    match schema {
        serde_json::Value::Object(object) => object.values_mut().for_each(without_test_format),
        serde_json::Value::Array(cases) => {
            cases.iter_mut().for_each(without_test_format);
            cases.retain(|case| !case.to_string().contains("\"mxint4\""));
        }
        _ => {}
    }
}

#[test]
fn the_schema_is_in_step_with_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/prequant.schema.json");
    let mut schema = serde_json::to_value(Manifest::schema()).unwrap();
    without_test_format(&mut schema);
    let schema = serde_json::to_string_pretty(&schema).unwrap() + "\n";
    if std::env::var_os("PREQUANT_UPDATE_SCHEMA").is_some() {
        std::fs::write(&path, &schema).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == schema, "run `PREQUANT_UPDATE_SCHEMA=1 cargo test` and commit schemas/prequant.schema.json");
}

#[test]
fn files_are_what_the_safetensors_library_reads_whatever_the_names() {
    let folder = Folder::new("llama");
    let names = ["model.é\"\\\n.weight", "z", "a.weight", "B"];
    let extra = names.iter().map(|name| Tensor::random(name, Dtype::BF16, &[3])).collect();
    folder.write("model.safetensors", serialize(&[llama(), extra].concat()));
    folder.convert(&[]).ok();
    assert_well_formed(&folder.read("model.safetensors"));
    let stored = read_tensors(&folder.destination());
    for name in names {
        assert!(stored.contains_key(name), "{name:?}");
    }
}

#[test]
fn shards_keep_to_their_size_and_a_weights_parts_together() {
    let folder = Folder::new("llama");
    let weights =
        (0..9).map(|i| Tensor::random(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::BF16, &[64, 64]));
    folder.write("model.safetensors", serialize(&weights.collect::<Vec<_>>()));
    folder.convert(&["--max-shard-size", "6kB"]).ok();
    let stored = read_tensors(&folder.destination());
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, (file, (_, _, data))) in &stored {
        *sizes.entry(file).or_default() += data.len();
        let weight = &name[..name.find(".weight").unwrap() + ".weight".len()];
        assert_eq!(*file, stored[weight].0, "{name} isn't with its weight");
    }
    let names: Vec<String> = (1..=5).map(|i| format!("model-{i:05}-of-00005.safetensors")).collect();
    assert_eq!(sizes.keys().collect::<Vec<_>>(), names.iter().collect::<Vec<_>>());
    assert!(sizes.values().all(|&size| size <= 6_000), "{sizes:?}");
    let index = folder.read_json("model.safetensors.index.json");
    let map: BTreeMap<String, String> = serde_json::from_value(index["weight_map"].clone()).unwrap();
    assert_eq!(map, stored.iter().map(|(name, (file, _))| (name.clone(), file.clone())).collect());
    assert_eq!(index["metadata"]["total_size"], sizes.values().sum::<usize>());
}
