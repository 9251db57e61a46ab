//! Our bytes against those of llm-compressor 0.14.0.1 and compressed-tensors 0.19.0, as `scripts/make group-goldens` had
//! them written, and of ModelOpt 0.47.0, as `scripts/make modelopt-goldens` had.

use std::collections::BTreeMap;
use std::path::Path;

use prequant::FloatDtype;
use prequant::internal::format::{Coding, ScaleCode};
use prequant::internal::kernel::Kernel;
use prequant::internal::kernel::group::scalar;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use crate::support::codings;
use crate::support::groups::{Quantized, quantize};

const DTYPES: [(&str, FloatDtype); 3] =
    [("bf16", FloatDtype::Bfloat16), ("f16", FloatDtype::Float16), ("f32", FloatDtype::Float32)];

/// A golden file's tensors by name: shape and bytes.
fn goldens(file: &str) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    tensors(&format!("group-goldens/{file}"))
}

/// A fixture's tensors, likewise.
fn tensors(file: &str) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let bytes = std::fs::read(folder.join(format!("{file}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// Zero points `[rows, groups]` as compressed-tensors packs them: eight rows an i32.
fn pack_zero_points(points: &[u8], per_row: usize) -> Vec<u8> {
    let rows = points.len() / per_row;
    let words = (0..rows.div_ceil(8)).flat_map(|row| (0..per_row).map(move |group| (row * 8, group)));
    let word = |(row, group): (usize, usize)| {
        (row..rows.min(row + 8)).fold(0u32, |word, r| word | u32::from(points[r * per_row + group]) << (4 * (r - row)))
    };
    words.flat_map(|place| word(place).to_le_bytes()).collect()
}

/// Whether the reference writes zeros for this group of MXFP4: its exponent overflows the dtype, or is that of f16's
/// subnormal numbers or of zero.
fn is_lost(source: &[u8], dtype: FloatDtype) -> bool {
    let absmax = scalar::absmax(source, dtype).unwrap();
    match dtype {
        FloatDtype::Float16 => absmax < 2f32.powi(-14) || absmax >= 1.75 * 2f32.powi(15),
        _ => absmax >= 1.75 * 2f32.powi(127),
    }
}

/// The largest magnitude that a group of MXFP4 decodes to.
fn decoded(found: &Quantized, group: usize, size: usize) -> f64 {
    let code = found.packed[group * size / 2..][..size / 2].iter().flat_map(|byte| [byte & 7, byte >> 4 & 7]).max();
    let value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code.unwrap())];
    value * 2f64.powi(i32::from(found.scales[group]) - 127)
}

fn check(name: &str, plain: Coding) {
    Kernel::available().into_iter().for_each(|kernel| check_kernel(kernel, name, plain));
}

fn check_kernel(kernel: Kernel, name: &str, plain: Coding) {
    let (mut compared, mut lost) = (0, 0);
    let mut wrong = Vec::new();
    for (dtype_name, dtype) in DTYPES {
        let (inputs, outputs) = (goldens(&format!("input-{dtype_name}")), goldens(&format!("{name}-{dtype_name}")));
        for key in outputs.keys().filter_map(|key| key.strip_suffix("/packed")) {
            let (case, size) = key.split_once("/g").unwrap();
            let (shape, source) = &inputs[case];
            let columns = shape[1];
            let group = size.parse().unwrap_or(columns);
            let scheme = match plain {
                Coding { scale: ScaleCode::E4m3, .. } => {
                    let global_scale = scalar::global_scale(scalar::absmax(source, dtype).unwrap(), dtype);
                    let expected = &outputs[&format!("{key}/global")].1;
                    if global_scale.to_le_bytes()[..] != expected[..] {
                        wrong.push(format!("{dtype_name} {key}: global scale {global_scale}, expected {expected:x?}"));
                    }
                    codings::nvfp4(global_scale)
                }
                other => other,
            };
            let mut found = quantize(kernel, source, dtype, columns, group, scheme).unwrap();
            let mut outputs = outputs.clone();
            if scheme == codings::MXFP4 {
                for (i, source) in source.chunks(group * dtype.size()).enumerate().filter(|(_, s)| is_lost(s, dtype)) {
                    lost += 1;
                    let decoded = decoded(&found, i, group);
                    let largest = f64::from(scalar::absmax(source, dtype).unwrap());
                    assert!(decoded >= largest * 0.74 && decoded <= largest * 1.34, "{decoded} for {largest}");
                    let [packed, scale] = ["packed", "scale"].map(|kind| format!("{key}/{kind}"));
                    found.packed[i * group / 2..][..group / 2].fill(0);
                    assert!(outputs[&packed].1[i * group / 2..][..group / 2].iter().all(|byte| byte & 0x77 == 0));
                    outputs.get_mut(&packed).unwrap().1[i * group / 2..][..group / 2].fill(0);
                    found.scales[i] = outputs[&scale].1[i];
                }
            }
            let mut differ = |kind: &str, found: &[u8]| {
                let (_, expected) = &outputs[&format!("{key}/{kind}")];
                compared += found.len();
                let bytes = found.iter().zip(expected).filter(|(a, b)| a != b).count();
                if bytes > 0 || found.len() != expected.len() {
                    let first = found.iter().zip(expected).position(|(a, b)| a != b);
                    wrong.push(format!(
                        "{dtype_name} {key} {kind}: {bytes} of {} differ, first at {first:?}",
                        found.len()
                    ));
                }
            };
            differ("packed", &found.packed);
            differ("scale", &found.scales);
            if scheme.has_zero_points() {
                differ("zero_point", &pack_zero_points(&found.zero_points, columns / group));
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", kernel.name(), wrong.join("\n"));
    assert!(compared > 20_000, "{compared} bytes compared");
    assert!(lost < 100, "{lost} groups not compared");
}

#[test]
fn int4_is_the_references() {
    check("int4", codings::INT4);
}

#[test]
fn int4_asym_is_the_references() {
    check("int4-asym", codings::INT4_ASYM);
}

#[test]
fn nvfp4_is_the_references() {
    check("nvfp4", codings::nvfp4(0.0));
}

#[test]
fn mxfp4_is_the_references() {
    check("mxfp4", codings::MXFP4);
}

/// E2M1's values by code.
const FP4: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// NVFP4's codes times the scales that decoding multiplies by, in the source's dtype.
fn restored(found: &Quantized, dtype: FloatDtype) -> Vec<u8> {
    let codes = found.packed.iter().flat_map(|byte| [byte & 15, byte >> 4]);
    let values = codes.enumerate().map(|(i, code)| FP4[usize::from(code)] * f32::from_bits(found.figures[0][i / 16]));
    values.flat_map(|x| encode(x, dtype)).collect()
}

/// `x` rounded to a dtype, as bytes.
fn encode(x: f32, dtype: FloatDtype) -> Vec<u8> {
    match dtype {
        FloatDtype::Bfloat16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        FloatDtype::Float16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        FloatDtype::Float32 => x.to_le_bytes().to_vec(),
    }
}

#[test]
fn nvfp4_in_modelopts_layout_is_modelopts() {
    let mut compared = 0;
    for (dtype_name, dtype) in DTYPES {
        let mut inputs = goldens(&format!("input-{dtype_name}"));
        inputs.extend(tensors(&format!("modelopt-goldens/input-{dtype_name}")));
        let outputs = tensors(&format!("modelopt-goldens/nvfp4-{dtype_name}"));
        for (case, kernel) in outputs.keys().filter_map(|key| key.strip_suffix("/packed")).flat_map(each_kernel) {
            let (shape, source) = &inputs[case];
            let scale_2 = scalar::scale_2(kernel.absmax(source, dtype).unwrap());
            let scheme = codings::nvfp4_modelopt(scale_2);
            let found = quantize(kernel, source, dtype, shape[1], 16, scheme).unwrap();
            for (kind, found) in [
                ("scale_2", &scale_2.to_le_bytes().to_vec()),
                ("scale", &found.scales),
                ("packed", &found.packed),
                ("restored", &restored(&found, dtype)),
            ] {
                let (_, expected) = &outputs[&format!("{case}/{kind}")];
                let differ = found.iter().zip(expected).filter(|(a, b)| a != b).count();
                assert!(differ == 0, "{}, {dtype_name} {case}: {differ} bytes of {kind} differ", kernel.name());
                assert_eq!(found.len(), expected.len(), "{dtype_name} {case} {kind}");
                compared += found.len();
            }
        }
    }
    assert!(compared > 100_000, "{compared} bytes compared");
}

fn each_kernel(case: &str) -> impl Iterator<Item = (&str, Kernel)> {
    Kernel::available().into_iter().map(move |kernel| (case, kernel))
}

/// Those that share a `weight_scale_2` with a weight of a Qwen3-MoE.
fn fused(name: &str) -> Vec<String> {
    let sets = [&["q_proj", "k_proj", "v_proj"][..], &["gate_proj", "up_proj"], &["down_proj"], &["o_proj"]];
    let set = sets.into_iter().find(|set| set.iter().any(|part| name.ends_with(&format!(".{part}.weight")))).unwrap();
    let part = name.split('.').nth_back(1).unwrap();
    set.iter().map(|other| name.replace(part, other)).collect()
}

#[test]
fn a_checkpoint_in_modelopts_layout_is_modelopts_export() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/modelopt-goldens");
    let exported: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("tiny-qwen3-moe.json")).unwrap()).unwrap();
    let exported = exported["tensors"].as_object().unwrap();
    let mut sources = tensors("tiny-qwen3-moe/model-00001-of-00002");
    sources.extend(tensors("tiny-qwen3-moe/model-00002-of-00002"));
    let mut compared = 0;
    for (name, (shape, source)) in &sources {
        let check = |name: &str, dtype: &str, shape: &[usize], bytes: &[u8]| {
            let expected = &exported[name];
            assert_eq!((&expected["dtype"], &expected["shape"]), (&dtype.into(), &shape.into()), "{name}");
            let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(expected["sha256"], digest, "{name}");
        };
        compared += 1;
        if exported[name]["dtype"] == "bfloat16" {
            check(name, "bfloat16", shape, source);
            continue;
        }
        let fused = fused(name);
        let absmax = fused.iter().map(|name| scalar::absmax(&sources[name].1, FloatDtype::Bfloat16).unwrap());
        let scale_2 = scalar::scale_2(absmax.fold(0.0, f32::max));
        let scheme = codings::nvfp4_modelopt(scale_2);
        let found = quantize(Kernel::detect(), source, FloatDtype::Bfloat16, shape[1], 16, scheme).unwrap();
        check(name, "uint8", &[shape[0], shape[1] / 2], &found.packed);
        check(&format!("{name}_scale"), "float8_e4m3fn", &[shape[0], shape[1] / 16], &found.scales);
        check(&format!("{name}_scale_2"), "float32", &[], &scale_2.to_le_bytes());
        compared += 2;
    }
    assert_eq!(compared, exported.len());
}

#[test]
fn zeros_in_modelopts_layout_decode_to_zeros() {
    for kernel in Kernel::available() {
        let scheme = codings::nvfp4_modelopt(scalar::scale_2(0.0));
        let found = quantize(kernel, &[0; 128], FloatDtype::Bfloat16, 64, 16, scheme).unwrap();
        assert_eq!((found.packed, found.scales), (vec![0; 32], vec![0x38; 4]), "{}", kernel.name());
    }
}
