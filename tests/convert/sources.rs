//! Sources that are quantized themselves: FP8 in blocks, and gpt-oss's MXFP4 experts. What they convert to is what their
//! weights, decoded here one by one, convert to.

use half::bf16;
use safetensors::tensor::Dtype;
use serde_json::json;

use crate::support::{self, Folder, Tensor, read_tensors, serialize};

const LINEAR: &str = "model.layers.0.self_attn.o_proj.weight";

/// Bytes without a pattern, the same each time.
fn noise(name: &str, len: usize) -> Vec<u8> {
    Tensor::random(name, Dtype::F32, &[len]).data.chunks(4).map(|bytes| bytes[1] ^ bytes[2]).collect()
}

/// E4M3 floats by the book: sign, four bits of exponent (bias 7), three of mantissa.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -magnitude } else { magnitude }
}

/// A weight in FP8 with its scale in blocks of `block`, and the bf16 it stands for.
fn fp8(name: &str, rows: usize, columns: usize, block: [usize; 2]) -> [Tensor; 3] {
    let codes: Vec<u8> =
        noise(name, rows * columns).into_iter().map(|byte| if byte & 0x7f == 0x7f { 0 } else { byte }).collect();
    let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    let scales: Vec<f32> = (0..grid[0] * grid[1]).map(|i| 1e-3 * (1.0 + i as f32 / 7.0)).collect();
    let value = |i: usize| e4m3(codes[i]) * scales[i / columns / block[0] * grid[1] + i % columns / block[1]];
    let decoded = (0..codes.len()).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect();
    let scale = Tensor::new(
        &format!("{name}_scale_inv"),
        Dtype::F32,
        &grid,
        scales.iter().flat_map(|x| x.to_le_bytes()).collect(),
    );
    [
        Tensor::new(name, Dtype::F8_E4M3, &[rows, columns], codes.clone()),
        scale,
        Tensor::new(name, Dtype::BF16, &[rows, columns], decoded),
    ]
}

fn config(quantization: Option<serde_json::Value>, model_type: &str) -> String {
    let mut config = json!({"model_type": model_type, "dtype": "bfloat16"});
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    config.to_string()
}

fn fp8_config(block: [usize; 2]) -> serde_json::Value {
    json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block})
}

/// One of whole blocks, one with short ones at its edges as DeepSeek-V3's latent projections have, experts, and the larger part of
/// a chunk's length in a row.
#[test]
fn fp8_blocks_convert_as_what_they_decode_to() {
    let weights = [
        fp8(LINEAR, 256, 384, [128, 128]),
        fp8("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 576, 160, [128, 128]),
        fp8("model.layers.3.mlp.experts.0.gate_proj.weight", 128, 256, [128, 128]),
        fp8("model.layers.3.mlp.experts.0.up_proj.weight", 128, 256, [128, 128]),
        fp8("model.layers.0.mlp.up_proj.weight", 40, 70_016, [128, 128]),
    ];
    let other = Tensor::random("model.norm.weight", Dtype::BF16, &[128]);
    let (coded, plain) = (Folder::new("deepseek_v3"), Folder::new("deepseek_v3"));
    coded.write("config.json", config(Some(fp8_config([128, 128])), "deepseek_v3"));
    plain.write("config.json", config(None, "deepseek_v3"));
    let mut stored: Vec<Tensor> = weights.iter().flat_map(|[codes, scale, _]| [codes.clone(), scale.clone()]).collect();
    let mut decoded: Vec<Tensor> = weights.iter().map(|[_, _, decoded]| decoded.clone()).collect();
    stored.push(other.clone());
    decoded.push(other);
    coded.write("model.safetensors", serialize(&stored));
    plain.write("model.safetensors", serialize(&decoded));
    same_by_tensor(&coded, &plain);
}

/// What both convert to is the same, by all kinds of formats; the order within a file is that of the source's dtypes.
fn same_by_tensor(coded: &Folder, plain: &Folder) {
    same_in(coded, plain, FORMATS, &[]);
}

const FORMATS: &[&[&str]] = &[
    &["--format", "nf4"],
    &["--format", "nf4", "--double-quant"],
    &["--format", "int4", "--group-size", "32"],
    &["--format", "int4-asym", "--group-size", "channel"],
    &["--format", "nvfp4"],
    &["--format", "nvfp4", "--layout", "modelopt"],
    &["--format", "mxfp4"],
];

fn same_in(coded: &Folder, plain: &Folder, formats: &[&[&str]], flags: &[&str]) {
    for &format in formats {
        coded.convert(&[format, flags, &["--force"]].concat()).ok();
        plain.convert(&[format, &["--force"]].concat()).ok();
        let [found, expected] = [coded, plain].map(|folder| read_tensors(&folder.destination()));
        assert!(found.keys().eq(expected.keys()), "{format:?}");
        let different = found.iter().find(|(name, tensor)| tensor.1 != expected[*name].1);
        assert!(different.is_none(), "{format:?}: {}", different.unwrap().0);
        assert_eq!(coded.read_json("config.json"), plain.read_json("config.json"));
        let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        support::Run::of(verify.arg("verify").arg(coded.destination()).arg("--against").arg(coded.source())).ok();
        let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        support::Run::of(verify.arg("verify").arg(coded.destination())).ok();
    }
}

/// A fused parameter of experts that were FP8 each is what fusing their bf16 gives.
#[test]
fn fp8_experts_are_fused_as_what_they_decode_to() {
    let name = |e: usize, part: &str| format!("model.layers.0.mlp.experts.{e}.{part}_proj.weight");
    let all = (0..3).flat_map(|e| ["gate", "up", "down"].map(|part| fp8(&name(e, part), 128, 128, [128, 128])));
    let all: Vec<[Tensor; 3]> = all.collect();
    let (coded, plain) = (Folder::new("qwen3_moe"), Folder::new("qwen3_moe"));
    coded.write("config.json", config(Some(fp8_config([128, 128])), "qwen3_moe"));
    plain.write("config.json", config(None, "qwen3_moe"));
    let stored = all.iter().flat_map(|[codes, scale, _]| [codes.clone(), scale.clone()]);
    coded.write("model.safetensors", serialize(&stored.collect::<Vec<_>>()));
    plain.write("model.safetensors", serialize(&all.iter().map(|[.., decoded]| decoded.clone()).collect::<Vec<_>>()));
    let flags = ["--experts", "fuse"];
    let [found, expected] = [&coded, &plain].map(|folder| {
        folder.convert(&flags).ok();
        read_tensors(&folder.destination())
    });
    assert!(found == expected);
    let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
    support::Run::of(verify.arg("verify").arg(coded.destination())).ok();
}

/// Scales may lie in another shard, have other dtypes and blocks, and static scales of inputs beside them.
#[test]
fn fp8_scales_are_found_wherever_they_are() {
    let [codes, scale, decoded] = fp8(LINEAR, 128, 128, [32, 64]);
    let input_scale = Tensor::random("model.layers.0.self_attn.o_proj.activation_scale", Dtype::F32, &[1]);
    let (coded, plain) = (Folder::new("llama"), Folder::new("llama"));
    coded.write("config.json", config(Some(fp8_config([32, 64])), "llama"));
    plain.write("config.json", config(None, "llama"));
    coded.write_shards(&[vec![scale, input_scale], vec![codes]]);
    plain.write("model.safetensors", serialize(&[decoded]));
    same_by_tensor(&coded, &plain);
}

/// Experts that are fused in FP8: each has scales of its own, with a short block at its edge, kept or taken apart.
#[test]
fn fp8_matrices_of_one_tensor_have_scales_of_their_own() {
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let each: Vec<[Tensor; 3]> = (0..3).map(|e| fp8(&format!("{name}{e}"), 192, 256, [128, 128])).collect();
    let join = |which: usize, name: &str| {
        let data = each.iter().flat_map(|tensors| tensors[which].data.clone()).collect();
        let shape = [vec![3], each[0][which].shape.clone()].concat();
        Tensor::new(name, each[0][which].dtype, &shape, data)
    };
    let other = Tensor::random(LINEAR, Dtype::BF16, &[64, 64]);
    let (coded, plain) = (Folder::new("qwen3_moe"), Folder::new("qwen3_moe"));
    coded.write("config.json", config(Some(fp8_config([128, 128])), "qwen3_moe"));
    plain.write("config.json", config(None, "qwen3_moe"));
    let stored = [join(0, name), join(1, &format!("{name}_scale_inv")), other.clone()];
    coded.write("model.safetensors", serialize(&stored));
    plain.write("model.safetensors", serialize(&[join(2, name), other.clone()]));
    same_by_tensor(&coded, &plain);
    same_in(&coded, &plain, &[&["--exclude", "experts"]], &[]);
    let one = Tensor::new(&format!("{name}_scale_inv"), Dtype::F32, &[1], vec![0; 4]);
    coded.write("model.safetensors", serialize(&[join(0, name), one, other]));
    coded.convert(&["--force"]).fails(3, &[name, "[1]", "[3, 192, 256]"]);
}

/// FP8 or MXFP4 beside what is of another method doesn't make this one of theirs.
#[test]
fn other_methods_stay_refused_beside_what_can_be_decoded() {
    let [codes, scale, _] = fp8(LINEAR, 128, 128, [128, 128]);
    for (method, name) in [("gptq", "model.x.qweight"), ("compressed-tensors", "model.x.weight_packed")] {
        for quantization in [Some(json!({"quant_method": method})), None] {
            let folder = Folder::new("llama");
            folder.write("config.json", config(quantization, "llama"));
            let other = Tensor::random(name, Dtype::I32, &[8, 8]);
            folder.write("model.safetensors", serialize(&[codes.clone(), scale.clone(), other]));
            folder.convert(&[]).fails(3, &["already quantized"]);
        }
    }
}

#[test]
fn mxfp4_without_an_expert_is_an_error() {
    let name = "model.layers.0.mlp.experts.down_proj";
    let folder = Folder::new("gpt_oss");
    folder.write("config.json", config(Some(json!({"quant_method": "mxfp4"})), "gpt_oss"));
    let blocks = Tensor::new(&format!("{name}_blocks"), Dtype::U8, &[0, 4, 2, 16], Vec::new());
    let scales = Tensor::new(&format!("{name}_scales"), Dtype::U8, &[0, 4, 2], Vec::new());
    let plain = Tensor::new(name, Dtype::BF16, &[2, 32, 32], vec![0; 4096]);
    folder.write("model.safetensors", serialize(&[blocks, scales, plain.clone()]));
    folder.convert(&["--dequantize-source"]).fails(3, &[name, "[0, 4, 2, 16]"]);
    // Nor may what is decoded have another tensor's name.
    let [blocks, scales, _] = mxfp4(name, [2, 32, 32]);
    folder.write("model.safetensors", serialize(&[blocks, scales, plain]));
    folder.convert(&["--dequantize-source"]).fails(3, &[name, "two tensors"]);
}

#[test]
fn another_block_size_is_another_source() {
    let [codes, scale, _] = fp8(LINEAR, 192, 192, [128, 128]);
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&[codes, scale]));
    for (block, flags) in [([128, 128], &[][..]), ([96, 96], &["--force"])] {
        folder.write("config.json", config(Some(fp8_config(block)), "llama"));
        if !flags.is_empty() {
            folder.convert(&[]).fails(3, &["--force"]);
        }
        folder.convert(flags).ok();
        assert!(folder.convert(&[]).ok().stdout.contains("already converted from this source"));
    }
}

#[test]
fn fp8_without_fitting_scales_is_an_error() {
    let [codes, scale, _] = fp8(LINEAR, 256, 384, [128, 128]);
    let [other, other_scale, _] = fp8("model.layers.0.self_attn.q_proj.weight", 128, 128, [128, 128]);
    let short = Tensor::new(&scale.name, Dtype::F32, &[2, 5], vec![0; 40]);
    let of_other_dtype = Tensor::new(&scale.name, Dtype::I32, &scale.shape, scale.data.clone());
    for (tensors, words) in [
        (vec![codes.clone(), short], ["[2, 5]", "[256, 384]"]),
        (vec![codes.clone(), of_other_dtype], ["I32", "F32"]),
        (vec![codes.clone()], ["already quantized", "fp8"]),
        (vec![codes, other.clone(), other_scale.clone()], [LINEAR, "missing"]),
    ] {
        let folder = Folder::new("llama");
        folder.write("config.json", config(Some(fp8_config([128, 128])), "llama"));
        folder.write("model.safetensors", serialize(&tensors));
        folder.convert(&[]).fails(3, &words);
    }
}

#[test]
fn a_nan_in_fp8_is_told_with_its_place() {
    let [mut codes, scale, _] = fp8(LINEAR, 256, 384, [128, 128]);
    codes.data[1000] = 0x7f;
    let folder = Folder::new("llama");
    folder.write("config.json", config(Some(fp8_config([128, 128])), "llama"));
    folder.write("model.safetensors", serialize(&[codes, scale]));
    folder.convert(&[]).fails(3, &[LINEAR, "element 1000"]);
}

/// E2M1 floats by the book.
fn e2m1(code: u8) -> f32 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// gpt-oss's experts: blocks, scales, and the `[experts, columns, rows]` in bf16 that they stand for.
fn mxfp4(name: &str, [experts, rows, columns]: [usize; 3]) -> [Tensor; 3] {
    let groups = columns / 32;
    let blocks = noise(name, experts * rows * columns / 2);
    let scales: Vec<u8> =
        noise(&format!("{name} scales"), experts * rows * groups).iter().map(|x| 115 + x % 8).collect();
    let value = |expert: usize, row: usize, column: usize| {
        let i = (expert * rows + row) * columns + column;
        let code = blocks[i / 2] >> (i % 2 * 4) & 15;
        e2m1(code) * 2f32.powi(i32::from(scales[(expert * rows + row) * groups + column / 32]) - 127)
    };
    let decoded: Vec<u8> = (0..experts)
        .flat_map(|expert| (0..columns).flat_map(move |column| (0..rows).map(move |row| (expert, row, column))))
        .flat_map(|(expert, row, column)| bf16::from_f32(value(expert, row, column)).to_le_bytes())
        .collect();
    [
        Tensor::new(&format!("{name}_blocks"), Dtype::U8, &[experts, rows, groups, 16], blocks.clone()),
        Tensor::new(&format!("{name}_scales"), Dtype::U8, &[experts, rows, groups], scales.clone()),
        Tensor::new(name, Dtype::BF16, &[experts, columns, rows], decoded),
    ]
}

fn gpt_oss() -> (Folder, Folder) {
    let experts = "model.layers.0.mlp.experts";
    let weights =
        [mxfp4(&format!("{experts}.gate_up_proj"), [3, 128, 96]), mxfp4(&format!("{experts}.down_proj"), [3, 96, 64])];
    let bias = Tensor::random(&format!("{experts}.gate_up_proj_bias"), Dtype::BF16, &[3, 128]);
    let (coded, plain) = (Folder::new("gpt_oss"), Folder::new("gpt_oss"));
    coded.write("config.json", config(Some(json!({"quant_method": "mxfp4", "modules_to_not_convert": []})), "gpt_oss"));
    plain.write("config.json", config(None, "gpt_oss"));
    let stored = weights.iter().flat_map(|[blocks, scales, _]| [blocks.clone(), scales.clone()]).chain([bias.clone()]);
    coded.write("model.safetensors", serialize(&stored.collect::<Vec<_>>()));
    let decoded = weights.iter().map(|[_, _, decoded]| decoded.clone()).chain([bias]);
    plain.write("model.safetensors", serialize(&decoded.collect::<Vec<_>>()));
    (coded, plain)
}

#[test]
fn gpt_oss_experts_convert_as_what_they_decode_to() {
    let (coded, plain) = gpt_oss();
    coded.convert(&[]).fails(3, &["mxfp4", "--dequantize-source"]);
    let formats: &[&[&str]] = &[
        &["--format", "nf4"],
        &["--format", "fp4", "--experts", "fuse"],
        &["--format", "int4", "--group-size", "32"],
        &["--format", "nvfp4"],
        &["--format", "mxfp4"],
    ];
    same_in(&coded, &plain, formats, &["--dequantize-source"]);
    plain.convert(&["--force", "--dequantize-source"]).fails(2, &["--dequantize-source", "isn't quantized"]);
}

/// What MXFP4 holds it holds again: the same numbers, if not the same codes, come out of their own layout.
#[test]
fn mxfp4_experts_survive_their_own_format() {
    let (coded, _) = gpt_oss();
    coded.convert(&["--format", "mxfp4", "--layout", "gpt-oss", "--dequantize-source"]).ok();
    let manifest = coded.read_json("prequant.json");
    let error = manifest["summary"]["statistics"]["relative_squared_error"].as_f64().unwrap();
    assert!(error < 0.02, "{error}");
}
