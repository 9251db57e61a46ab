//! `--format int4`, `mxfp4` and `nvfp4`: checkpoints in compressed-tensors' layout, with the references' bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use prequant::FloatDtype;
use prequant::internal::kernel::Kernel;
use prequant::internal::kernel::group::scalar;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{self, Folder, Run, Stored, Tensor, codings, contents, groups, read_tensors, serialize};

/// A golden file's tensors; scripts/make group-goldens had llm-compressor write them.
fn goldens(file: &str) -> BTreeMap<String, Stored> {
    support::goldens("group-goldens", file)
}

pub(super) fn linear(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.up_proj.weight")
}

pub(super) fn stored(tensors: &BTreeMap<String, (String, Stored)>, name: &str) -> Stored {
    tensors.get(name).unwrap_or_else(|| panic!("no {name}")).1.clone()
}

/// Every golden weight of the dtype as a Linear of its own, but one that the reference writes zeros for.
fn check(format: &str, dtype: &str, group: &str, flags: &[&str]) {
    let (inputs, outputs) = (goldens(&format!("input-{dtype}")), goldens(&format!("{format}-{dtype}")));
    // f16's subnormal numbers and zeros have no exponent for the reference, and the largest numbers' overflows.
    let is_small = |group: &[u8]| scalar::absmax(group, FloatDtype::Float16).unwrap() < 2f32.powi(-14);
    let has_small = |case: &str| dtype == "f16" && inputs[case].2.chunks(64).any(is_small);
    let zeroed = |case: &str| format == "mxfp4" && (case == "huge" || has_small(case));
    let cases: Vec<&String> = inputs.keys().filter(|case| !zeroed(case)).collect();
    let weight = |(layer, case): (usize, &&String)| {
        let (dtype, shape, data) = &inputs[*case];
        Tensor::new(&linear(layer), *dtype, shape, data.clone())
    };
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&cases.iter().enumerate().map(weight).collect::<Vec<_>>()));
    folder.convert(&[&["--format", format], flags].concat()).ok();
    let found = read_tensors(&folder.destination());
    let mut quantized = 0;
    for (layer, case) in cases.iter().enumerate() {
        let (_, shape, _) = &inputs[*case];
        let Some(packed) = outputs.get(&format!("{case}/g{group}/packed")) else {
            assert_eq!(stored(&found, &linear(layer)), inputs[*case], "{case} is kept");
            continue;
        };
        assert_eq!(stored(&found, &format!("{}_packed", linear(layer))), *packed, "{format} {dtype} {case}");
        let scale = &outputs[&format!("{case}/g{group}/scale")];
        assert_eq!(stored(&found, &format!("{}_scale", linear(layer))), *scale, "{format} {dtype} {case}");
        if let Some(points) = outputs.get(&format!("{case}/g{group}/zero_point")) {
            assert_eq!(format, "int4-asym");
            assert_eq!(stored(&found, &format!("{}_zero_point", linear(layer))), *points, "{dtype} {case}");
        }
        if format.starts_with("int4") {
            let shape = shape.iter().flat_map(|&d| (d as u64).to_le_bytes()).collect();
            assert_eq!(stored(&found, &format!("{}_shape", linear(layer))), (Dtype::I64, vec![2], shape));
        }
        if format == "nvfp4" {
            let global = &outputs[&format!("{case}/g{group}/global")];
            assert_eq!(stored(&found, &format!("{}_global_scale", linear(layer))), *global, "{dtype} {case}");
        }
        quantized += 1;
    }
    let all = group == "channel";
    assert!(quantized > 10 && (quantized == cases.len()) == all, "{quantized} of {}", cases.len());
    verify(&folder, &[]).ok();
    verify(&folder, &["--against", folder.source().to_str().unwrap()]).ok();
}

pub(super) fn verify(folder: &Folder, flags: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(command.arg("verify").arg(folder.destination()).args(flags))
}

#[test]
fn int4_files_hold_the_references_bytes() {
    for dtype in ["bf16", "f16", "f32"] {
        check("int4", dtype, "128", &[]);
        check("int4", dtype, "64", &["--group-size", "64"]);
        check("int4", dtype, "32", &["--group-size", "32", "--max-shard-size", "3kB"]);
    }
}

#[test]
fn int4_files_with_zero_points_hold_the_references_bytes() {
    for dtype in ["bf16", "f16", "f32"] {
        check("int4-asym", dtype, "128", &[]);
        check("int4-asym", dtype, "32", &["--group-size", "32", "--max-shard-size", "3kB"]);
    }
}

#[test]
fn channel_wise_files_hold_the_references_bytes() {
    for dtype in ["bf16", "f16", "f32"] {
        check("int4", dtype, "channel", &["--group-size", "channel"]);
        check("int4-asym", dtype, "channel", &["--group-size", "channel"]);
    }
}

#[test]
fn mxfp4_files_hold_the_references_bytes() {
    for dtype in ["bf16", "f16", "f32"] {
        check("mxfp4", dtype, "32", &[]);
    }
}

#[test]
fn nvfp4_files_hold_the_references_bytes() {
    for dtype in ["bf16", "f16", "f32"] {
        check("nvfp4", dtype, "16", &[]);
    }
}

/// Names of modules, and the shard that each is in: those in a row share one global scale.
const SETS: [&[(&str, usize)]; 7] = [
    &[("self_attn.q_proj", 0), ("self_attn.k_proj", 1), ("self_attn.v_proj", 2)],
    &[("self_attn.o_proj", 0)],
    &[("mlp.experts.0.gate_proj", 2), ("mlp.experts.0.up_proj", 0)],
    &[("mlp.experts.1.up_proj", 1), ("mlp.experts.1.gate_proj", 1)],
    &[("mlp.experts.0.down_proj", 1)],
    &[("mlp.experts.1.down_proj", 2)],
    &[("mlp.shared_experts.gate_proj", 0), ("mlp.shared_experts.up_proj", 2)],
];

/// Among sets of all sizes, some longer than a chunk, in other shards than their partners.
#[test]
fn weights_that_are_put_together_share_a_global_scale() {
    let (columns, mut shards) = (1024, vec![Vec::new(), Vec::new(), Vec::new()]);
    let name = |layer: usize, module: &str| format!("model.layers.{layer}.{module}.weight");
    let mut weights = BTreeMap::new();
    for layer in 0..2 {
        for (i, &(module, shard)) in SETS.concat().iter().enumerate() {
            let rows = if module.ends_with("k_proj") { 2200 } else { 16 };
            let mut weight = Tensor::random(&name(layer, module), Dtype::BF16, &[rows, columns]);
            // Each with a largest element of its own.
            weight.data[34..36].copy_from_slice(&half::bf16::from_f32(0.2 + 0.01 * i as f32).to_le_bytes());
            weights.insert(weight.name.clone(), weight.clone());
            shards[shard].push(weight);
        }
    }
    let folder = Folder::new("deepseek_v3");
    folder.write_shards(&shards);
    let mut all = Vec::new();
    for flags in [&[][..], &["--threads", "1"], &["--threads", "5", "--memory", "24MiB"]] {
        // Queries have so few rows that no server's kernel takes them.
        let recipe = ["--format", "nvfp4", "--max-shard-size", "700kB", "--include", "_proj", "--force"];
        folder.convert(&[&recipe, flags].concat()).ok();
        all.push(contents(&folder.destination()));
    }
    assert!(all.iter().all(|files| *files == all[0]), "the same files, manifest included");
    verify(&folder, &["--against", folder.source().to_str().unwrap()]).ok();
    let found = read_tensors(&folder.destination());
    let bf16 = FloatDtype::Bfloat16;
    for (layer, set) in (0..2).flat_map(|layer| SETS.map(|set| (layer, set))) {
        let absmax = |module: &str| scalar::absmax(&weights[&name(layer, module)].data, bf16).unwrap();
        let largest = set.iter().map(|(module, _)| absmax(module)).fold(0.0, f32::max);
        let global_scale = scalar::global_scale(largest, bf16);
        for (module, _) in set {
            let weight = name(layer, module);
            let global = stored(&found, &format!("{weight}_global_scale"));
            assert_eq!(global, (Dtype::F32, vec![1], global_scale.to_le_bytes().to_vec()), "{weight}");
            let scheme = codings::nvfp4(global_scale);
            let expected = groups::quantize(Kernel::SCALAR, &weights[&weight].data, bf16, columns, 16, scheme).unwrap();
            assert!(stored(&found, &format!("{weight}_packed")).2 == expected.packed, "{weight}");
            assert!(stored(&found, &format!("{weight}_scale")).2 == expected.scales, "{weight}");
        }
    }
}

/// In the least memory a set's bytes could fit a thread's room for weights while its elements are more than the room for codes.
#[test]
fn weights_of_several_dtypes_that_share_a_scale_are_the_same_in_any_memory() {
    let folder = Folder::new("llama");
    let name = |module: &str| format!("model.layers.0.self_attn.{module}.weight");
    folder.write_shards(&[vec![
        Tensor::random(&name("q_proj"), Dtype::BF16, &[250, 368]),
        Tensor::random(&name("k_proj"), Dtype::F32, &[50, 368]),
    ]]);
    let mut all = Vec::new();
    for flags in [&[][..], &["--threads", "1", "--memory", "12.5MiB"]] {
        folder.convert(&[&["--format", "nvfp4", "--force"], flags].concat()).ok();
        all.push(contents(&folder.destination()));
    }
    assert!(all[0] == all[1]);
}

/// More than one chunk of a tensor, and its last one short: in rows, in groups, and with zero points of eight rows in one.
#[test]
fn large_weights_are_what_the_kernel_makes_of_them() {
    use codings::{INT4, INT4_ASYM, MXFP4};
    for (format, scheme, flags, columns, group) in [
        ("int4", INT4, &[][..], 4096, 128),
        ("int4", INT4, &["--group-size", "channel"], 4100, 4100),
        ("int4-asym", INT4_ASYM, &["--group-size", "64"], 4160, 64),
        ("int4-asym", INT4_ASYM, &["--group-size", "channel"], 4099, 4099),
        ("mxfp4", MXFP4, &[], 4096, 32),
    ] {
        let rows = 1299;
        let weight = Tensor::random(&linear(0), Dtype::BF16, &[rows, columns]);
        let folder = Folder::new("llama");
        folder.write("model.safetensors", serialize(std::slice::from_ref(&weight)));
        let expected =
            groups::quantize(Kernel::detect(), &weight.data, FloatDtype::Bfloat16, columns, group, scheme).unwrap();
        let mut all = Vec::new();
        for run in [&[][..], &["--threads", "1"], &["--memory", "24MiB", "--threads", "3"]] {
            folder.convert(&[&["--format", format, "--force"], flags, run].concat()).ok();
            let found = read_tensors(&folder.destination());
            assert!(
                stored(&found, &format!("{}_packed", linear(0))).2 == expected.packed,
                "{format} {flags:?} {run:?}"
            );
            assert!(stored(&found, &format!("{}_scale", linear(0))).2 == expected.scales, "{format} {flags:?} {run:?}");
            if scheme.has_zero_points() {
                let found = stored(&found, &format!("{}_zero_point", linear(0)));
                assert!(found.2 == packed_points(&expected.zero_points, columns / group), "{format} {flags:?} {run:?}");
            }
            all.push(contents(&folder.destination()));
        }
        assert!(all.iter().all(|files| *files == all[0]), "{format} {flags:?}: the same files, manifest included");
        let manifest = folder.read_json("prequant.json");
        let error = manifest["summary"]["statistics"]["relative_squared_error"].as_f64().unwrap();
        assert!((0.002..0.1).contains(&error), "{format} {flags:?}: {error}");
    }
}

/// Eight rows' zero points in a little-endian integer, nibble by nibble.
fn packed_points(points: &[u8], per_row: usize) -> Vec<u8> {
    let rows = points.len() / per_row;
    let mut packed = vec![0; rows.div_ceil(8) * per_row * 4];
    for (i, point) in points.iter().enumerate() {
        let (row, group) = (i / per_row, i % per_row);
        packed[(row / 8 * per_row + group) * 4 + row % 8 / 2] |= point << (row % 2 * 4);
    }
    packed
}

/// All of a small model as ModelOpt's own export has it, by digests that scripts/make modelopt-goldens took.
#[test]
fn modelopts_layout_is_its_own_tensor_by_tensor() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let text = std::fs::read_to_string(root.join("modelopt-goldens/tiny-qwen3-moe.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let folder = Folder::new("qwen3_moe");
    folder.convert_from(&root.join("tiny-qwen3-moe"), &["--format", "nvfp4", "--layout", "modelopt"]).ok();
    let manifest = folder.read_json("prequant.json");
    let records = manifest["tensors"].as_array().unwrap().iter();
    let outputs: BTreeMap<&str, &Value> = records
        .flat_map(|record| record["outputs"].as_array().unwrap())
        .map(|output| (output["name"].as_str().unwrap(), output))
        .collect();
    let expected = golden["tensors"].as_object().unwrap();
    assert!(outputs.keys().eq(expected.keys().collect::<std::collections::BTreeSet<_>>()), "the same names");
    for (name, expected) in expected {
        let dtype = match expected["dtype"].as_str().unwrap() {
            "bfloat16" => "BF16",
            "uint8" => "U8",
            "float8_e4m3fn" => "F8_E4M3",
            "float32" => "F32",
            other => panic!("{other}"),
        };
        assert_eq!(outputs[&**name]["dtype"], dtype, "{name}");
        assert_eq!(outputs[&**name]["shape"], expected["shape"], "{name}");
        assert_eq!(outputs[&**name]["sha256"], expected["sha256"], "{name}");
    }
    // The word for weights alone is another, which more clients take; it isn't ModelOpt that wrote it; and bits are told.
    let but_for_those = |value: &Value| {
        let mut value = value.clone();
        value["producer"] = Value::Null;
        let part = if value.get("quantization").is_some() { &mut value["quantization"] } else { &mut value };
        part["quant_algo"] = "NVFP4".into();
        value
    };
    let mut config = folder.read_json("config.json");
    assert_eq!(config["quantization_config"].as_object_mut().unwrap().remove("bits"), Some(4.into()));
    assert_eq!(but_for_those(&config["quantization_config"]), but_for_those(&golden["quantization_config"]));
    let beside = folder.read_json("hf_quant_config.json");
    assert_eq!(but_for_those(&beside), but_for_those(&golden["hf_quant_config"]));
    verify(&folder, &["--against", root.join("tiny-qwen3-moe").to_str().unwrap()]).ok();
}
