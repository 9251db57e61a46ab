//! Sources in the formats of other programs: what they convert to is what their weights, decoded here one by one, convert to.

use half::bf16;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, LINEAR, Run, Tensor, read_tensors, serialize};

/// Bytes without a pattern, the same each time.
pub fn noise(name: &str, len: usize) -> Vec<u8> {
    Tensor::random(name, Dtype::F32, &[len]).data.chunks(4).map(|bytes| bytes[1] ^ bytes[2]).collect()
}

/// bf16 numbers of a few magnitudes, as bytes and as numbers.
fn scales(name: &str, len: usize) -> (Vec<u8>, Vec<f32>) {
    let numbers = noise(name, len).into_iter().map(|byte| bf16::from_f32(1e-3 * (1.0 + f32::from(byte) / 64.0)));
    let numbers: Vec<bf16> = numbers.collect();
    (numbers.iter().flat_map(|x| x.to_le_bytes()).collect(), numbers.iter().map(|x| x.to_f32()).collect())
}

/// E2M1 floats by the book.
fn e2m1(code: u8) -> f32 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

fn bf16_tensor(name: &str, shape: &[usize], value: impl Fn(usize, usize) -> f32) -> Tensor {
    let all = (0..shape[0]).flat_map(|row| (0..shape[1]).map(move |column| (row, column)));
    let data = all.flat_map(|(row, column)| bf16::from_f32(value(row, column)).to_le_bytes()).collect();
    Tensor::new(name, Dtype::BF16, shape, data)
}

/// A weight as stored, and as it decodes.
pub type Coded = (Vec<Tensor>, Tensor);

/// compressed-tensors' INT4, with zero points or without; `shape_dtype` is that of its shape.
pub fn int4(name: &str, rows: usize, columns: usize, group: usize, asym: bool, shape_dtype: Dtype) -> Coded {
    let (words, groups) = (columns.div_ceil(8), columns / group);
    let codes = noise(name, rows * words * 4);
    let (scale_bytes, scale) = scales(&format!("{name} scales"), rows * groups);
    let points = noise(&format!("{name} points"), rows.div_ceil(8) * groups * 4);
    let point = |row: usize, group: usize| points[(row / 8 * groups + group) * 4 + row % 8 / 2] >> (row % 2 * 4) & 15;
    let decoded = bf16_tensor(name, &[rows, columns], |row, column| {
        let code = codes[row * words * 4 + column / 2] >> (column % 2 * 4) & 15;
        let zero = if asym { point(row, column / group) } else { 8 };
        (f32::from(code) - f32::from(zero)) * scale[row * groups + column / group]
    });
    let shape = [rows, columns].into_iter().flat_map(|dimension| match shape_dtype {
        Dtype::I32 => (dimension as u32).to_le_bytes().to_vec(),
        _ => (dimension as u64).to_le_bytes().to_vec(),
    });
    let mut stored = vec![
        Tensor::new(&format!("{name}_packed"), Dtype::I32, &[rows, words], codes.clone()),
        Tensor::new(&format!("{name}_scale"), Dtype::BF16, &[rows, groups], scale_bytes),
        Tensor::new(&format!("{name}_shape"), shape_dtype, &[2], shape.collect()),
    ];
    if asym {
        let name = format!("{name}_zero_point");
        stored.push(Tensor::new(&name, Dtype::I32, &[rows.div_ceil(8), groups], points.clone()));
    }
    (stored, decoded)
}

/// DeepSeek-V4's experts: two codes in an I8, and an exponent for each 32.
fn deepseek_fp4(module: &str, rows: usize, columns: usize) -> Coded {
    let codes = noise(module, rows * columns / 2);
    let exponents: Vec<u8> =
        noise(&format!("{module} scales"), rows * columns / 32).iter().map(|x| 115 + x % 8).collect();
    let decoded = bf16_tensor(&format!("{module}.weight"), &[rows, columns], |row, column| {
        let code = codes[(row * columns + column) / 2] >> (column % 2 * 4) & 15;
        e2m1(code) * 2f32.powi(i32::from(exponents[row * columns / 32 + column / 32]) - 127)
    });
    let stored = vec![
        Tensor::new(&format!("{module}.weight"), Dtype::I8, &[rows, columns / 2], codes.clone()),
        Tensor::new(&format!("{module}.scale"), Dtype::F8_E8M0, &[rows, columns / 32], exponents.clone()),
    ];
    (stored, decoded)
}

/// Two folders: the checkpoint as it is stored, and in bf16.
pub fn folders(model_type: &str, quantization: Value, weights: Vec<Coded>) -> (Folder, Folder) {
    let (coded, plain) = (Folder::new(model_type), Folder::new(model_type));
    let mut config = json!({"model_type": model_type, "dtype": "bfloat16"});
    plain.write("config.json", config.to_string());
    config["quantization_config"] = quantization;
    coded.write("config.json", config.to_string());
    let norm = Tensor::random("model.norm.weight", Dtype::BF16, &[64]);
    let (mut stored, mut decoded) = (vec![norm.clone()], vec![norm]);
    for (parts, weight) in weights {
        stored.extend(parts);
        decoded.push(weight);
    }
    coded.write("model.safetensors", serialize(&stored));
    plain.write("model.safetensors", serialize(&decoded));
    (coded, plain)
}

pub fn command(arguments: &[&std::ffi::OsStr]) -> Run {
    Run::of(std::process::Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments))
}

/// What both convert to is the same, and each output verifies against its source.
pub fn convert_alike(coded: &Folder, plain: &Folder, flags: &[&str]) {
    for format in [
        &["--format", "nf4"][..],
        &["--format", "int4", "--group-size", "64"],
        &["--format", "int4-asym", "--group-size", "32"],
        &["--format", "nvfp4", "--layout", "modelopt"],
        &["--format", "mxfp4"],
    ] {
        coded.convert(&[format, flags, &["--force"]].concat()).ok();
        plain.convert(&[format, &["--force"]].concat()).ok();
        let [found, expected] = [coded, plain].map(|folder| read_tensors(&folder.destination()));
        assert!(found.keys().eq(expected.keys()), "{format:?}");
        let different = found.iter().find(|(name, tensor)| tensor.1 != expected[*name].1);
        assert!(different.is_none(), "{format:?}: {}", different.unwrap().0);
        assert_eq!(coded.read_json("config.json"), plain.read_json("config.json"));
        let (destination, source) = (coded.destination(), coded.source());
        command(&["verify".as_ref(), destination.as_ref(), "--against".as_ref(), source.as_ref()]).ok();
    }
}

/// `prequant dequantize` gives the plain checkpoint's tensors, and its config.json.
pub fn dequantizes(coded: &Folder, plain: &Folder, words: &str) {
    let decoded = coded.beside("decoded");
    let run = command(&["dequantize".as_ref(), coded.source().as_ref(), decoded.as_ref()]).ok();
    assert!(run.stdout.contains(words), "{}", run.stdout);
    let [found, expected] = [decoded.clone(), plain.source()].map(|folder| read_tensors(&folder));
    assert!(found.keys().eq(expected.keys()));
    assert!(found.iter().all(|(name, tensor)| tensor.1 == expected[name].1));
    let config: Value = serde_json::from_slice(&std::fs::read(decoded.join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none());
}

/// Kimi-K2-Thinking: only experts are INT4, shapes are I32.
#[test]
fn int4_experts_of_compressed_tensors_convert_as_what_they_decode_to() {
    let name = |e: usize, part: &str| format!("model.layers.1.mlp.experts.{e}.{part}_proj.weight");
    let experts = (0..2).flat_map(|e| ["gate", "up", "down"].map(|part| (e, part)));
    let mut weights: Vec<Coded> =
        experts.map(|(e, part)| int4(&name(e, part), 64, 128, 32, false, Dtype::I32)).collect();
    weights.push(int4(LINEAR, 24, 96, 96, true, Dtype::I64));
    let config = json!({"quant_method": "compressed-tensors", "format": "pack-quantized"});
    let (coded, plain) = folders("kimi_k2", config, weights);
    coded.convert(&[]).fails(3, &["compressed-tensors", "if there is one", "--dequantize-source"]);
    convert_alike(&coded, &plain, &["--dequantize-source"]);
    dequantizes(&coded, &plain, "W4A16, W4A16_ASYM");
}

#[test]
fn deepseek_v4_experts_convert_as_what_they_decode_to() {
    let experts = ["w1", "w2", "w3"].map(|part| deepseek_fp4(&format!("layers.0.ffn.experts.0.{part}"), 64, 64));
    let config = json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]});
    let (coded, plain) = folders("deepseek_v4", config, experts.into());
    coded.convert(&[]).fails(3, &["fp8", "--dequantize-source"]);
    convert_alike(&coded, &plain, &["--dequantize-source", "--include", "experts"]);
    dequantizes(&coded, &plain, "FP4 (DeepSeek-V4)");
}

/// Eight bits need no flag; scales of inputs go.
#[test]
fn fp8_with_a_scale_for_a_tensor_or_a_row_converts_as_what_it_decodes_to() {
    let value = |byte: u8| {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
        let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
        if byte >> 7 == 1 { -magnitude } else { magnitude }
    };
    let fp8 = |module: &str, shape: &[usize]| {
        let codes: Vec<u8> = noise(module, 64 * 64).into_iter().map(|x| if x & 127 == 127 { 0 } else { x }).collect();
        let (bytes, scale) = scales(&format!("{module} scales"), shape.iter().product());
        let decoded = bf16_tensor(&format!("{module}.weight"), &[64, 64], |row, column| {
            value(codes[row * 64 + column]) * scale[if scale.len() == 1 { 0 } else { row }]
        });
        let stored = vec![
            Tensor::new(&format!("{module}.weight"), Dtype::F8_E4M3, &[64, 64], codes.clone()),
            Tensor::new(&format!("{module}.weight_scale"), Dtype::BF16, shape, bytes),
            Tensor::new(&format!("{module}.input_scale"), Dtype::BF16, &[1], vec![0, 0x3f]),
        ];
        (stored, decoded)
    };
    let weights = vec![
        fp8("model.layers.0.self_attn.o_proj", &[1]),
        fp8("model.layers.0.mlp.up_proj", &[64, 1]),
        fp8("model.layers.0.mlp.down_proj", &[64]),
        fp8("model.layers.1.mlp.down_proj", &[]),
    ];
    let config = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    let (coded, plain) = folders("llama", config, weights);
    convert_alike(&coded, &plain, &[]);
    dequantizes(&coded, &plain, "FP8");
}

/// What we write ourselves is read without its manifest, too.
#[test]
fn our_own_output_without_its_manifest_decodes_as_with_it() {
    let weights = vec![
        (Vec::new(), Tensor::random(LINEAR, Dtype::BF16, &[64, 128])),
        (Vec::new(), Tensor::random("model.layers.0.mlp.gate_proj.weight", Dtype::BF16, &[64, 128])),
    ];
    let (_, plain) = folders("llama", json!({}), weights);
    for flags in [
        &["--format", "int4", "--group-size", "channel"][..],
        &["--format", "int4-asym", "--group-size", "32"],
        &["--format", "nvfp4"],
        &["--format", "nvfp4", "--layout", "modelopt"],
        &["--format", "mxfp4"],
    ] {
        plain.convert(&[flags, &["--force"]].concat()).ok();
        let [with, without] = ["with", "without"].map(|name| plain.beside(name));
        let converted = plain.destination();
        command(&["dequantize".as_ref(), converted.as_ref(), with.as_ref(), "--force".as_ref()]).ok();
        std::fs::remove_file(converted.join("prequant.json")).unwrap();
        command(&["dequantize".as_ref(), converted.as_ref(), without.as_ref(), "--force".as_ref()]).ok();
        assert!(read_tensors(&with) == read_tensors(&without), "{flags:?}");
    }
}

#[test]
fn what_does_not_decode_is_named_with_what_was_found() {
    let (stored, _) = int4(LINEAR, 24, 96, 32, false, Dtype::I64);
    let config = json!({"quant_method": "compressed-tensors", "format": "pack-quantized"});
    let convert = |config: &Value, stored: &[Tensor]| {
        let (coded, _) =
            folders("llama", config.clone(), vec![(stored.to_vec(), Tensor::random("x", Dtype::BF16, &[1]))]);
        coded.convert(&["--dequantize-source"])
    };
    // Without its scales, the weight is in no format.
    convert(&config, &[stored[0].clone(), stored[2].clone()]).fails(3, &[LINEAR, "I32 [24, 12]", "_shape", "expected"]);
    // Integers of eight bits lie in the same tensors.
    let eight = Tensor::new(&stored[0].name, Dtype::I32, &[24, 24], vec![0; 24 * 96]);
    convert(&config, &[eight, stored[1].clone(), stored[2].clone()])
        .fails(3, &[LINEAR, "[24, 24]", "[24, 96]", "4 bits"]);
    // Scales that don't divide the rows.
    let scale = Tensor::new(&stored[1].name, Dtype::BF16, &[24, 7], vec![0; 24 * 14]);
    convert(&config, &[stored[0].clone(), scale, stored[2].clone()]).fails(3, &[LINEAR, "scales"]);
    let transforms = json!({"config_groups": {"R1": {"type": "hadamard"}}});
    let rotated = json!({"quant_method": "compressed-tensors", "transform_config": transforms});
    convert(&rotated, &stored).fails(3, &["config.json", "transform_config", "rotated"]);
    // Columns in another order than they are stored in.
    let order = Tensor::new(&format!("{LINEAR}_g_idx"), Dtype::I32, &[96], vec![0; 96 * 4]);
    convert(&config, &[&stored[..], &[order]].concat()).fails(3, &["weight_g_idx", "order"]);
    // Eight-bit integers are no FP4.
    let integers = [
        Tensor::new(LINEAR, Dtype::I8, &[24, 96], vec![1; 24 * 96]),
        Tensor::new(&format!("{LINEAR}_scale"), Dtype::F32, &[24, 1], vec![0; 96]),
    ];
    convert(&config, &integers).fails(3, &["already quantized"]);
}

/// Weights, norms and biases alike, as image models are published; a scale anywhere, and it is something else.
#[test]
fn floats_of_eight_bits_that_nothing_scales_are_what_they_are() {
    let norm = "model.layers.0.input_layernorm.weight";
    let e4m3 = |byte: u8| {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
        let magnitude = match exponent {
            0 => mantissa / 8.0 * 2f32.powi(-6),
            exponent => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if byte & 0x80 == 0 { magnitude } else { -magnitude }
    };
    // No NaN.
    let codes = |name: &str, len| noise(name, len).into_iter().map(|byte| byte & 0xbf).collect::<Vec<u8>>();
    let cast = |name: &str, shape: &[usize]| -> Coded {
        let codes = codes(name, shape.iter().product());
        let decoded = codes.iter().flat_map(|code| bf16::from_f32(e4m3(*code)).to_le_bytes()).collect();
        let stored = vec![Tensor::new(name, Dtype::F8_E4M3, shape, codes)];
        (stored, Tensor::new(name, Dtype::BF16, shape, decoded))
    };
    let weights = || vec![cast(LINEAR, &[64, 128]), cast(norm, &[128])];
    let (coded, plain) = folders("llama", Value::Null, weights());
    let run = coded.convert(&[]).ok();
    assert!(run.stderr.contains("have no scales: taken as cast"), "{}", run.stderr);
    convert_alike(&coded, &plain, &[]);
    let mut scaled = weights();
    scaled[0].0.push(Tensor::random("model.layers.0.mlp.other_scale", Dtype::F32, &[1]));
    folders("llama", Value::Null, scaled).0.convert(&[]).fails(3, &["already quantized", "F8_E4M3"]);
}
