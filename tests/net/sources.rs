//! Small sources of every kind, made the same each time.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{Tensor, read_tensors, serialize};

/// Name and options of a conversion.
pub type Recipe = (&'static str, &'static [&'static str]);

pub const RECIPES: &[Recipe] = &[
    ("nf4", &["--format", "nf4"]),
    ("nf4 double-quant", &["--format", "nf4", "--double-quant"]),
    ("fp4", &["--format", "fp4"]),
    ("int4", &["--format", "int4"]),
    ("int4 32", &["--format", "int4", "--group-size", "32"]),
    ("int4 channel", &["--format", "int4", "--group-size", "channel"]),
    ("int4-asym", &["--format", "int4-asym"]),
    ("int4-asym 32", &["--format", "int4-asym", "--group-size", "32"]),
    ("nvfp4", &["--format", "nvfp4"]),
    ("nvfp4 modelopt", &["--format", "nvfp4", "--layout", "modelopt"]),
    ("mxfp4", &["--format", "mxfp4"]),
    ("mxfp4 gpt-oss", &["--format", "mxfp4", "--layout", "gpt-oss"]),
];

/// One of each kind of scales, for what differs from another source in names alone.
const FEW: &[Recipe] = &[
    ("nf4", &["--format", "nf4"]),
    ("int4 32", &["--format", "int4", "--group-size", "32"]),
    ("nvfp4", &["--format", "nvfp4"]),
];

/// The same without NF4.
const OF_GROUPS: &[Recipe] = &[FEW[1], FEW[2]];

/// What else an output depends on.
const OPTIONS: &[Recipe] = &[
    ("block-size 32", &["--block-size", "32", "--only-experts"]),
    ("block-size 4096", &["--block-size", "4096", "--double-quant"]),
    ("include", &["--include", r"layers\.0\.mlp\.gate|lm_head", "--exclude", "down_proj"]),
    ("hash-source", &["--hash-source", "--max-shard-size", "90kB"]),
    ("int4 only-experts", &["--format", "int4-asym", "--only-experts", "--max-shard-size", "90kB"]),
];

pub struct Source {
    pub name: &'static str,
    pub path: PathBuf,
    /// Options of every conversion of it.
    pub flags: &'static [&'static str],
    pub recipes: &'static [Recipe],
}

/// All sources, written below `root`.
pub fn all(root: &Path) -> Vec<Source> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    let whole = |name, flags, recipes| Source { name, path: fixture.clone(), flags, recipes };
    let write = |name: &'static str, config: Value, shards: &[Vec<Tensor>]| {
        let path = root.join("sources").join(name);
        write(&path, &config, shards);
        Source { name, path, flags: &[], recipes: RECIPES }
    };
    let model = |model_type: &str| json!({"model_type": model_type, "dtype": "bfloat16"});
    let quantized =
        |model_type: &str, by: Value| json!({"model_type": model_type, "dtype": "bfloat16", "quantization_config": by});
    let fp8_blocks =
        json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]});
    let few = |source: Source| Source { recipes: FEW, ..source };
    let method = |method: &str| quantized("llama", json!({"quant_method": method}));
    let coded = [
        ("compressed-tensors", &coded(int4)),
        ("modelopt", &coded(nvfp4)),
        ("gptq", &coded(gptq)),
        ("awq", &coded(awq)),
        ("fp8 rows", &coded(fp8_rows)),
    ]
    .map(|(name, tensors)| few(write(name, method(name.split(' ').next().unwrap()), tensors)));
    let decoded = coded.iter().filter_map(|source| {
        let name = DECODED.iter().find(|name| name.starts_with(source.name))?;
        Some(Source { name, path: source.path.clone(), flags: &["--dequantize-source"], recipes: OF_GROUPS })
    });
    let decoded: Vec<Source> = decoded.collect();
    let one_file = root.join("sources/one.safetensors");
    fs::create_dir_all(root.join("sources")).unwrap();
    fs::write(&one_file, serialize(&odd())).unwrap();
    let plain = vec![
        whole("bf16", &["--max-shard-size", "150kB"], RECIPES),
        whole("options", &[], OPTIONS),
        write("f16", json!({"model_type": "qwen3_moe", "dtype": "float16"}), &part_of(&fixture, Dtype::F16)),
        Source {
            flags: &["--max-shard-size", "60kB"],
            ..write("f32", json!({"model_type": "qwen3_moe", "dtype": "float32"}), &part_of(&fixture, Dtype::F32))
        },
        write("fp8", quantized("deepseek_v3", fp8_blocks), &fp8_model()),
        Source {
            flags: &["--dequantize-source"],
            ..write("mxfp4", quantized("gpt_oss", json!({"quant_method": "mxfp4"})), &mxfp4_model())
        },
        write("tail", model("llama"), &[odd()]),
        Source { name: "one file", path: one_file, flags: &[], recipes: FEW },
        write("qwen3.5", model("qwen3_5_moe"), &fused("model.language_model.", "mlp", [64, 96], [96, 32])),
        write("gpt-oss", model("gpt_oss"), &fused("model.", "mlp", [96, 64], [32, 96])),
        few(write("llama4", model("llama4"), &fused("language_model.model.", "feed_forward", [96, 64], [32, 96]))),
        few(write(
            "qwen3-vl",
            json!({"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 96, "moe_intermediate_size": 32}}),
            &fused("model.language_model.", "mlp", [96, 64], [96, 32]),
        )),
        few(write("mixtral", model("mixtral"), &mixtral())),
        few(write("granite", model("granitemoe"), &granite())),
        few(write("step", model("step3p7"), &step())),
    ];
    plain.into_iter().chain(coded).chain(decoded).collect()
}

/// Sources of other programs' codes, which are carried over or refused without the option.
const DECODED: &[&str] = &["compressed-tensors, decoded", "modelopt, decoded", "gptq, decoded", "awq, decoded"];

/// A layer whose weights are stored so, beside what isn't.
fn coded(weight: fn(&str, usize, usize) -> Vec<Tensor>) -> Vec<Vec<Tensor>> {
    let module = |end: &str| format!("model.layers.0.{end}");
    let shapes = [
        ("self_attn.q_proj", 64, 96),
        ("mlp.gate_proj", 128, 96),
        ("mlp.up_proj", 128, 96),
        ("mlp.down_proj", 96, 128),
    ];
    let mut all: Vec<Tensor> =
        shapes.iter().flat_map(|(end, rows, columns)| weight(&module(end), *rows, *columns)).collect();
    all.extend([random("model.norm.weight", &[96]), random("lm_head.weight", &[33, 96])]);
    vec![all]
}

/// Numbers of a few magnitudes.
fn scales(dtype: Dtype, name: &str, shape: &[usize]) -> Tensor {
    let numbers = (0..shape.iter().product()).map(|i: usize| 1e-3 * (1.0 + (i % 11) as f32 / 7.0));
    let data = match dtype {
        Dtype::F16 => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
    };
    Tensor::new(name, dtype, shape, data)
}

/// compressed-tensors' INT4 in groups of 32.
fn int4(module: &str, rows: usize, columns: usize) -> Vec<Tensor> {
    let name = |end: &str| format!("{module}.weight_{end}");
    let shape = [rows, columns].into_iter().flat_map(|dimension| (dimension as u64).to_le_bytes()).collect();
    vec![
        Tensor::new(&name("packed"), Dtype::I32, &[rows, columns / 8], noise(module, rows * columns / 2)),
        scales(Dtype::BF16, &name("scale"), &[rows, columns / 32]),
        Tensor::new(&name("shape"), Dtype::I64, &[2], shape),
    ]
}

/// ModelOpt's NVFP4; gate and up have different global scales.
fn nvfp4(module: &str, rows: usize, columns: usize) -> Vec<Tensor> {
    let name = format!("{module}.weight");
    let block = noise(&name, rows * columns / 16).into_iter().map(|byte| 0x30 + byte % 32).collect();
    let global: f32 = if module.ends_with("up_proj") { 3e-4 } else { 4e-4 };
    vec![
        Tensor::new(&name, Dtype::U8, &[rows, columns / 2], noise(module, rows * columns / 2)),
        Tensor::new(&format!("{name}_scale"), Dtype::F8_E4M3, &[rows, columns / 16], block),
        Tensor::new(&format!("{name}_scale_2"), Dtype::F32, &[], global.to_le_bytes().to_vec()),
    ]
}

/// GPTQ's first version, symmetric, in groups of 32.
fn gptq(module: &str, rows: usize, columns: usize) -> Vec<Tensor> {
    let (name, groups) = (|end: &str| format!("{module}.{end}"), columns / 32);
    let order = (0..columns).flat_map(|column| (column as i32 / 32).to_le_bytes()).collect();
    vec![
        Tensor::new(&name("qweight"), Dtype::I32, &[columns / 8, rows], noise(module, rows * columns / 2)),
        Tensor::new(&name("qzeros"), Dtype::I32, &[groups, rows / 8], vec![0x77; groups * rows / 2]),
        scales(Dtype::F16, &name("scales"), &[groups, rows]),
        Tensor::new(&name("g_idx"), Dtype::I32, &[columns], order),
    ]
}

/// AWQ, in groups of 32.
fn awq(module: &str, rows: usize, columns: usize) -> Vec<Tensor> {
    let (name, groups) = (|end: &str| format!("{module}.{end}"), columns / 32);
    vec![
        Tensor::new(&name("qweight"), Dtype::I32, &[columns, rows / 8], noise(module, rows * columns / 2)),
        Tensor::new(&name("qzeros"), Dtype::I32, &[groups, rows / 8], noise(&name("zeros"), groups * rows / 2)),
        scales(Dtype::F16, &name("scales"), &[groups, rows]),
    ]
}

/// FP8 with a scale for each row.
fn fp8_rows(module: &str, rows: usize, columns: usize) -> Vec<Tensor> {
    let name = format!("{module}.weight");
    let codes = noise(module, rows * columns).into_iter().map(|byte| if byte & 0x7f == 0x7f { 0 } else { byte });
    vec![
        Tensor::new(&name, Dtype::F8_E4M3, &[rows, columns], codes.collect()),
        scales(Dtype::BF16, &format!("{name}_scale"), &[rows, 1]),
    ]
}

fn write(path: &Path, config: &Value, shards: &[Vec<Tensor>]) {
    fs::create_dir_all(path).unwrap();
    fs::write(path.join("config.json"), serde_json::to_string_pretty(config).unwrap()).unwrap();
    if let [tensors] = shards {
        fs::write(path.join("model.safetensors"), serialize(tensors)).unwrap();
        return;
    }
    let mut weight_map = BTreeMap::new();
    for (i, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        fs::write(path.join(&name), serialize(tensors)).unwrap();
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(path.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// The first layer of a bf16 checkpoint in another dtype, in two shards.
fn part_of(fixture: &Path, dtype: Dtype) -> Vec<Vec<Tensor>> {
    let convert = |bytes: &[u8]| {
        let value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        if dtype == Dtype::F16 { f16::from_f32(value).to_le_bytes().to_vec() } else { value.to_le_bytes().to_vec() }
    };
    let mut shards = vec![Vec::new(), Vec::new()];
    let skipped = [".layers.1.", ".experts.3.", ".experts.4.", ".experts.5.", ".experts.6.", ".experts.7."];
    let tensors = read_tensors(fixture).into_iter();
    let tensors = tensors.filter(|(name, _)| !skipped.iter().any(|part| name.contains(part)));
    for (i, (name, (_, (_, shape, data)))) in tensors.enumerate() {
        let data = data.chunks(2).flat_map(convert).collect();
        shards[i % 2].push(Tensor::new(&name, dtype, &shape, data));
    }
    shards
}

fn random(name: &str, shape: &[usize]) -> Tensor {
    Tensor::random(name, Dtype::BF16, shape)
}

/// Bytes without a pattern.
fn noise(name: &str, len: usize) -> Vec<u8> {
    Tensor::random(name, Dtype::F32, &[len]).data.chunks(4).map(|bytes| bytes[1] ^ bytes[2]).collect()
}

/// Shapes that no block or group divides, dtypes beside each other, and what no rule quantizes.
fn odd() -> Vec<Tensor> {
    let name = |layer: usize, end: &str| format!("model.layers.{layer}.{end}");
    vec![
        random("model.embed_tokens.weight", &[33, 96]),
        random("lm_head.weight", &[33, 96]),
        random("model.norm.weight", &[96]),
        random(&name(0, "self_attn.q_proj.weight"), &[7, 96]),
        random(&name(0, "self_attn.q_proj.bias"), &[7]),
        random(&name(0, "self_attn.k_proj.weight"), &[13, 75]),
        random(&name(0, "self_attn.v_proj.weight"), &[3, 256]),
        random(&name(0, "self_attn.o_proj.weight"), &[1, 33]),
        random(&name(0, "mlp.up_proj.weight"), &[41, 128]),
        Tensor::random(&name(0, "mlp.down_proj.weight"), Dtype::F32, &[31, 80]),
        Tensor::random(&name(1, "mlp.down_proj.weight"), Dtype::F16, &[31, 160]),
        random(&name(1, "mlp.up_proj.weight"), &[5, 16_416]),
        // All zeros, and none at all.
        Tensor::new(&name(1, "mlp.gate_proj.weight"), Dtype::BF16, &[4, 64], vec![0; 512]),
        Tensor::new(&name(1, "self_attn.q_proj.weight"), Dtype::BF16, &[0, 64], Vec::new()),
        random(&name(1, "conv.weight"), &[8, 3, 4]),
        Tensor::new("model.position_ids", Dtype::I64, &[4], (0..32).collect()),
        Tensor::new("model.mask", Dtype::BOOL, &[3], vec![0, 1, 1]),
    ]
}

/// A weight in FP8, and its scales in blocks of 128 x 128.
fn fp8(name: &str, rows: usize, columns: usize) -> [Tensor; 2] {
    let codes = noise(name, rows * columns).into_iter().map(|byte| if byte & 0x7f == 0x7f { 0 } else { byte });
    let grid = [rows.div_ceil(128), columns.div_ceil(128)];
    let scales = (0..grid[0] * grid[1]).flat_map(|i| (1e-3 * (1.0 + i as f32 / 7.0)).to_le_bytes());
    [
        Tensor::new(name, Dtype::F8_E4M3, &[rows, columns], codes.collect()),
        Tensor::new(&format!("{name}_scale_inv"), Dtype::F32, &grid, scales.collect()),
    ]
}

/// Blocks that are cut short, experts, and scales in another shard than their weights.
fn fp8_model() -> Vec<Vec<Tensor>> {
    let name = |end: &str| format!("model.layers.0.{end}.weight");
    let mut all = vec![
        fp8(&name("self_attn.o_proj"), 160, 256),
        fp8(&name("self_attn.kv_a_proj_with_mqa"), 144, 160),
        fp8(&name("mlp.shared_experts.up_proj"), 32, 128),
    ];
    for e in 0..3 {
        all.push(fp8(&name(&format!("mlp.experts.{e}.gate_proj")), 64, 160));
        all.push(fp8(&name(&format!("mlp.experts.{e}.up_proj")), 64, 160));
        all.push(fp8(&name(&format!("mlp.experts.{e}.down_proj")), 160, 64));
    }
    let (mut codes, mut scales): (Vec<Tensor>, Vec<Tensor>) =
        all.into_iter().map(|[codes, scale]| (codes, scale)).unzip();
    codes.push(random("model.norm.weight", &[160]));
    scales.push(random(&name("mlp.gate"), &[3, 160]));
    vec![codes, scales]
}

/// gpt-oss's own experts with their biases, and attention in bf16.
fn mxfp4_model() -> Vec<Vec<Tensor>> {
    let mxfp4 = |name: &str, [experts, rows, columns]: [usize; 3]| {
        let groups = columns / 32;
        let scales = noise(&format!("{name} scales"), experts * rows * groups).iter().map(|x| 115 + x % 8).collect();
        let blocks = noise(name, experts * rows * columns / 2);
        [
            Tensor::new(&format!("{name}_blocks"), Dtype::U8, &[experts, rows, groups, 16], blocks),
            Tensor::new(&format!("{name}_scales"), Dtype::U8, &[experts, rows, groups], scales),
        ]
    };
    let name = |end: &str| format!("model.layers.0.{end}");
    let [a, b] = mxfp4(&name("mlp.experts.gate_up_proj"), [3, 128, 96]);
    let [c, d] = mxfp4(&name("mlp.experts.down_proj"), [3, 96, 64]);
    let rest = vec![
        d,
        random(&name("mlp.experts.gate_up_proj_bias"), &[3, 128]),
        random(&name("mlp.experts.down_proj_bias"), &[3, 96]),
        random(&name("mlp.router.weight"), &[3, 96]),
        random(&name("self_attn.q_proj.weight"), &[64, 96]),
        random(&name("self_attn.sinks"), &[4]),
    ];
    vec![vec![a, b, c], rest]
}

/// Experts that are fused on disk in shapes `[_, gate_up]` and `[_, down]`, in two layers that lie in a shard each.
fn fused(prefix: &str, block: &str, gate_up: [usize; 2], down: [usize; 2]) -> Vec<Vec<Tensor>> {
    let layer = |i: usize| {
        let name = |end: &str| format!("{prefix}layers.{i}.{end}");
        let experts = |end: &str| name(&format!("{block}.experts.{end}"));
        let mut tensors = vec![
            random(&experts("gate_up_proj"), &[3, gate_up[0], gate_up[1]]),
            random(&experts("down_proj"), &[3, down[0], down[1]]),
            random(&name("self_attn.q_proj.weight"), &[32, 64]),
        ];
        if prefix == "model." {
            tensors.push(random(&experts("gate_up_proj_bias"), &[3, gate_up[1]]));
            tensors.push(random(&experts("down_proj_bias"), &[3, down[1]]));
        }
        tensors
    };
    (0..2).map(layer).collect()
}

/// More experts than digits, dealt out to three shards; a count of weights that isn't even.
fn mixtral() -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new(); 3];
    for e in 0..11 {
        for (part, shape) in [("w1", [11, 32]), ("w2", [32, 11]), ("w3", [11, 32])] {
            shards[e % 3].push(random(&format!("model.layers.0.block_sparse_moe.experts.{e}.{part}.weight"), &shape));
        }
    }
    shards[0].push(random("model.layers.0.block_sparse_moe.gate.weight", &[11, 32]));
    shards
}

fn granite() -> Vec<Vec<Tensor>> {
    let name = |end: &str| format!("model.layers.0.block_sparse_moe.{end}.weight");
    vec![vec![random(&name("input_linear"), &[3, 64, 96]), random(&name("output_linear"), &[3, 96, 32])]]
}

fn step() -> Vec<Vec<Tensor>> {
    let name = |end: &str| format!("model.layers.4.moe.{end}_proj.weight");
    vec![vec![
        random(&name("gate"), &[3, 32, 64]),
        random(&name("up"), &[3, 32, 64]),
        random(&name("down"), &[3, 64, 32]),
    ]]
}
