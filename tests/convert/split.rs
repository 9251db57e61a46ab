//! Fused experts in formats that want them one by one: the right rows of the right experts under the right names.

use prequant::FloatDtype;
use prequant::internal::kernel::Kernel;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::support::{self, Folder, Tensor, codings, groups, read_tensors, serialize};

const EXPERTS: usize = 3;

/// How a model's fused experts lie on disk.
struct Layout {
    model_type: &'static str,
    config: &'static str,
    tensors: &'static [Fused],
}

/// Fused name, shape, and what it becomes; whether the last two dimensions are exchanged, and whether rows are interleaved.
type Fused = (&'static str, [usize; 3], &'static [&'static str], bool, bool);

const LAYOUTS: &[Layout] = &[
    Layout {
        model_type: "qwen3_5_moe",
        config: "",
        tensors: &[
            (
                "model.language_model.layers.0.mlp.experts.gate_up_proj",
                [EXPERTS, 64, 128],
                &[
                    "model.language_model.layers.0.mlp.experts.*.gate_proj",
                    "model.language_model.layers.0.mlp.experts.*.up_proj",
                ],
                false,
                false,
            ),
            (
                "model.language_model.layers.0.mlp.experts.down_proj",
                [EXPERTS, 128, 32],
                &["model.language_model.layers.0.mlp.experts.*.down_proj"],
                false,
                false,
            ),
        ],
    },
    Layout {
        model_type: "qwen3_moe",
        config: "",
        tensors: &[(
            "model.layers.0.mlp.experts.gate_up_proj",
            [EXPERTS, 64, 128],
            &["model.layers.0.mlp.experts.*.gate_proj", "model.layers.0.mlp.experts.*.up_proj"],
            false,
            false,
        )],
    },
    Layout {
        model_type: "mixtral",
        config: "",
        tensors: &[(
            "model.layers.0.mlp.experts.gate_up_proj",
            [EXPERTS, 64, 128],
            &["model.layers.0.block_sparse_moe.experts.*.w1", "model.layers.0.block_sparse_moe.experts.*.w3"],
            false,
            false,
        )],
    },
    Layout {
        model_type: "aria_text",
        config: "",
        tensors: &[
            (
                "model.layers.0.mlp.experts.fc1.weight",
                [EXPERTS, 128, 64],
                &["model.layers.0.mlp.experts.*.gate_proj", "model.layers.0.mlp.experts.*.up_proj"],
                true,
                false,
            ),
            (
                "model.layers.0.mlp.experts.fc2.weight",
                [EXPERTS, 32, 128],
                &["model.layers.0.mlp.experts.*.down_proj"],
                true,
                false,
            ),
        ],
    },
    Layout {
        model_type: "step3p5",
        config: "",
        tensors: &[
            (
                "model.layers.0.moe.up_proj.weight",
                [EXPERTS, 32, 128],
                &["model.layers.0.moe.experts.*.up_proj"],
                false,
                false,
            ),
            (
                "layers.0.mlp.experts.gate_up_proj",
                [EXPERTS, 64, 128],
                &["layers.0.moe.experts.*.gate_proj", "layers.0.moe.experts.*.up_proj"],
                false,
                false,
            ),
        ],
    },
    Layout {
        model_type: "llama4",
        config: "",
        tensors: &[
            (
                "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
                [EXPERTS, 128, 64],
                &[
                    "language_model.model.layers.1.feed_forward.experts.*.gate_proj",
                    "language_model.model.layers.1.feed_forward.experts.*.up_proj",
                ],
                true,
                false,
            ),
            (
                "language_model.model.layers.1.feed_forward.experts.down_proj",
                [EXPERTS, 32, 128],
                &["language_model.model.layers.1.feed_forward.experts.*.down_proj"],
                true,
                false,
            ),
        ],
    },
    Layout {
        model_type: "gpt_oss",
        config: "",
        tensors: &[
            (
                "model.layers.0.mlp.experts.gate_up_proj",
                [EXPERTS, 128, 64],
                &["model.layers.0.mlp.experts.*.gate_proj", "model.layers.0.mlp.experts.*.up_proj"],
                true,
                true,
            ),
            (
                "model.layers.0.mlp.experts.down_proj",
                [EXPERTS, 32, 128],
                &["model.layers.0.mlp.experts.*.down_proj"],
                true,
                false,
            ),
        ],
    },
    Layout {
        model_type: "qwen3_vl_moe",
        config: ", \"text_config\": {\"hidden_size\": 128, \"moe_intermediate_size\": 32}",
        tensors: &[
            (
                "model.language_model.layers.0.mlp.experts.gate_up_proj",
                [EXPERTS, 128, 64],
                &[
                    "model.language_model.layers.0.mlp.experts.*.gate_proj",
                    "model.language_model.layers.0.mlp.experts.*.up_proj",
                ],
                true,
                false,
            ),
            (
                "model.language_model.layers.0.mlp.experts.down_proj",
                [EXPERTS, 128, 32],
                &["model.language_model.layers.0.mlp.experts.*.down_proj"],
                false,
                false,
            ),
        ],
    },
    Layout {
        model_type: "granitemoe",
        config: "",
        tensors: &[
            (
                "model.layers.0.block_sparse_moe.input_linear.weight",
                [EXPERTS, 64, 128],
                &["model.layers.0.block_sparse_moe.experts.*.w1", "model.layers.0.block_sparse_moe.experts.*.w3"],
                false,
                false,
            ),
            (
                "model.layers.0.block_sparse_moe.output_linear.weight",
                [EXPERTS, 128, 32],
                &["model.layers.0.block_sparse_moe.experts.*.w2"],
                false,
                false,
            ),
        ],
    },
    Layout {
        model_type: "step3p7",
        config: "",
        tensors: &[
            (
                "model.layers.4.moe.gate_proj.weight",
                [EXPERTS, 32, 128],
                &["model.layers.4.moe.experts.*.gate_proj"],
                false,
                false,
            ),
            (
                "model.layers.4.moe.up_proj.weight",
                [EXPERTS, 32, 128],
                &["model.layers.4.moe.experts.*.up_proj"],
                false,
                false,
            ),
            (
                "model.layers.4.moe.down_proj.weight",
                [EXPERTS, 128, 32],
                &["model.layers.4.moe.experts.*.down_proj"],
                false,
                false,
            ),
        ],
    },
    // Without rows of their own: as their classes in transformers say.
    Layout {
        model_type: "hy_v4",
        config: "",
        tensors: &[
            (
                "model.layers.1.mlp.experts.gate_up_proj",
                [EXPERTS, 64, 128],
                &["model.layers.1.mlp.experts.*.gate_proj", "model.layers.1.mlp.experts.*.up_proj"],
                false,
                false,
            ),
            (
                "model.layers.1.mlp.experts.down_proj",
                [EXPERTS, 128, 32],
                &["model.layers.1.mlp.experts.*.down_proj"],
                false,
                false,
            ),
        ],
    },
    Layout {
        model_type: "openai_privacy_filter",
        config: "",
        tensors: &[(
            "model.layers.1.mlp.experts.gate_up_proj",
            [EXPERTS, 128, 64],
            &["model.layers.1.mlp.experts.*.gate_proj", "model.layers.1.mlp.experts.*.up_proj"],
            true,
            false,
        )],
    },
];

/// One expert's matrices, element by element: rows, columns and bytes.
fn matrices(
    tensor: &Tensor,
    expert: usize,
    count: usize,
    transposed: bool,
    interleaved: bool,
) -> Vec<(usize, usize, Vec<u8>)> {
    let size = tensor.dtype.bitsize() / 8;
    let (a, b) = (tensor.shape[1], tensor.shape[2]);
    let (rows, columns) = if transposed { (b, a) } else { (a, b) };
    let element = |row: usize, column: usize| {
        let (i, j) = if transposed { (column, row) } else { (row, column) };
        &tensor.data[((expert * a + i) * b + j) * size..][..size]
    };
    let of = |which: usize| {
        let each = rows / count;
        let rows = (0..each).map(|i| if interleaved { i * count + which } else { which * each + i });
        (
            each,
            columns,
            rows.flat_map(|row| (0..columns).flat_map(move |column| element(row, column).to_vec())).collect(),
        )
    };
    (0..count).map(of).collect()
}

#[test]
fn every_expert_has_its_own_rows_under_its_own_name() {
    for (layout, dtype) in LAYOUTS.iter().flat_map(|layout| [(layout, Dtype::BF16), (layout, Dtype::F32)]) {
        let folder = Folder::new(layout.model_type);
        let config = format!("{{\"model_type\": \"{}\"{}}}", layout.model_type, layout.config);
        folder.write("config.json", config);
        let tensors: Vec<Tensor> =
            layout.tensors.iter().map(|(name, shape, ..)| Tensor::random(name, dtype, shape)).collect();
        folder.write("model.safetensors", serialize(&tensors));
        folder.convert(&["--format", "int4", "--group-size", "32"]).ok();
        let found = read_tensors(&folder.destination());
        let float = if dtype == Dtype::BF16 { FloatDtype::Bfloat16 } else { FloatDtype::Float32 };
        let mut names = 0;
        for (tensor, (_, _, targets, transposed, interleaved)) in tensors.iter().zip(layout.tensors) {
            for expert in 0..EXPERTS {
                let matrices = matrices(tensor, expert, targets.len(), *transposed, *interleaved);
                for (target, (rows, columns, data)) in targets.iter().zip(matrices) {
                    let name = target.replace('*', &expert.to_string());
                    let expected = groups::quantize(Kernel::SCALAR, &data, float, columns, 32, codings::INT4).unwrap();
                    let (_, (_, shape, packed)) = &found[&format!("{name}.weight_packed")];
                    assert_eq!(*shape, [rows, columns / 8], "{name}");
                    assert!(*packed == expected.packed, "{name}");
                    assert!(found[&format!("{name}.weight_scale")].1.2 == expected.scales, "{name}");
                    names += 3;
                }
            }
        }
        assert_eq!(found.len(), names, "{}: nothing else", layout.model_type);
        let source = folder.source();
        let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        support::Run::of(verify.arg("verify").arg(folder.destination()).arg("--against").arg(source)).ok();
    }
}

#[test]
fn names_that_no_client_is_known_to_have_are_warned_of() {
    let name = "model.layers.1.mlp.experts.down_proj";
    for (model_type, is_known) in [("hy_v4", false), ("aria_text", false), ("qwen3_moe", true)] {
        let folder = Folder::new(model_type);
        folder.write("model.safetensors", serialize(&[Tensor::random(name, Dtype::BF16, &[2, 64, 32])]));
        let warned = |flags: &[&str]| folder.convert(flags).ok().stderr.contains("no client's names");
        assert_eq!(warned(&["--format", "int4", "--group-size", "32"]), !is_known, "{model_type}");
        assert!(!warned(&["--force"]), "{model_type}: left as they are");
    }
}

#[test]
fn shared_experts_in_one_parameter_are_kept_with_the_reason() {
    let name = |part: &str| format!("model.layers.1.mlp.{part}.down_proj");
    let tensors = ["experts", "shared_experts"].map(|part| Tensor::random(&name(part), Dtype::BF16, &[2, 64, 32]));
    let folder = Folder::new("inkling_text");
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--format", "int4", "--group-size", "32"]).ok();
    let found = read_tensors(&folder.destination());
    assert!(found.contains_key(&name("shared_experts")), "{:?}", found.keys());
    assert!(found.contains_key(&format!("{}.weight_packed", name("experts.1"))), "{:?}", found.keys());
    let manifest = folder.read_json("prequant.json").to_string();
    assert!(manifest.contains("shared experts in one parameter"), "{manifest}");
}

/// gpt-oss's biases go where their matrices do.
#[test]
fn biases_of_fused_experts_are_taken_apart_like_them() {
    let name = |end: &str| format!("model.layers.0.mlp.experts.{end}");
    let numbers = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        (0..count).flat_map(|i| half::bf16::from_f32(i as f32).to_le_bytes()).collect::<Vec<u8>>()
    };
    let tensor = |end: &str, shape: &[usize]| Tensor::new(&name(end), Dtype::BF16, shape, numbers(shape));
    let tensors = [
        Tensor::random(&name("gate_up_proj"), Dtype::BF16, &[2, 32, 6]),
        tensor("gate_up_proj_bias", &[2, 6]),
        tensor("down_proj_bias", &[2, 32]),
        Tensor::random(&name("down_proj"), Dtype::BF16, &[2, 3, 32]),
    ];
    let folder = Folder::new("gpt_oss");
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--format", "mxfp4"]).ok();
    let found = read_tensors(&folder.destination());
    let floats = |name: &str| {
        let (_, (_, shape, bytes)) = &found[name];
        let values: Vec<f32> = bytes.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        (shape.clone(), values)
    };
    assert_eq!(floats(&name("1.gate_proj.bias")), (vec![3], vec![6.0, 8.0, 10.0]));
    assert_eq!(floats(&name("1.up_proj.bias")), (vec![3], vec![7.0, 9.0, 11.0]));
    assert_eq!(floats(&name("0.down_proj.bias")).1, (0..32).map(|i| i as f32).collect::<Vec<_>>());
    // Three columns are no group of 32: these stay bf16, but apart like the others.
    assert_eq!(floats(&name("1.down_proj.weight")).0, [32, 3]);
    assert!(!found.contains_key(&name("down_proj")) && !found.contains_key(&name("down_proj_bias")));
    let manifest = folder.read_json("prequant.json");
    let reason = |tensor: &str| {
        let records = manifest["tensors"].as_array().unwrap().iter();
        let mut records = records.filter(|record| record["outputs"][0]["name"] == tensor);
        records.next().unwrap()["reason"].as_str().unwrap().to_owned()
    };
    assert!(reason(&name("1.down_proj.weight")).contains("3 columns"));
    let ignore: Vec<String> =
        serde_json::from_value(folder.read_json("config.json")["quantization_config"]["ignore"].clone()).unwrap();
    assert_eq!(ignore, [&name("0.down_proj")[..], &name("1.down_proj"), "lm_head"]);
}

#[test]
fn fused_experts_share_nvfp4s_global_scale_expert_by_expert() {
    let folder = Folder::new("gpt_oss");
    let name = |end: &str| format!("model.layers.0.mlp.experts.{end}");
    let mut gate_up = Tensor::random(&name("gate_up_proj"), Dtype::BF16, &[2, 32, 64]);
    for (expert, value) in [0.5f32, 0.75].into_iter().enumerate() {
        gate_up.data[(expert * 32 * 64 + 7) * 2..][..2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
    }
    folder.write("model.safetensors", serialize(&[gate_up]));
    folder.convert(&["--format", "nvfp4"]).ok();
    let found = read_tensors(&folder.destination());
    let scale = |end: &str| found[&format!("{}.weight_global_scale", name(end))].1.2.clone();
    assert_eq!(scale("0.gate_proj"), scale("0.up_proj"));
    assert_eq!(scale("1.gate_proj"), scale("1.up_proj"));
    assert_ne!(scale("0.gate_proj"), scale("1.gate_proj"));
}

#[test]
fn what_is_taken_apart_must_not_have_another_tensors_name() {
    let name = |end: &str| format!("model.layers.0.mlp.experts.{end}");
    let folder = Folder::new("qwen3_5_moe");
    let tensors = [
        Tensor::random(&name("gate_up_proj"), Dtype::BF16, &[2, 64, 128]),
        Tensor::random(&name("0.gate_proj.weight"), Dtype::BF16, &[32, 128]),
    ];
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--format", "int4"]).fails(3, &[&name("0.gate_proj.weight"), "two tensors"]);
}

#[test]
fn shapes_that_experts_cant_have_are_told() {
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    for shape in [[2, 32, 63], [70_000, 1, 2]] {
        let folder = Folder::new("gpt_oss");
        folder.write("model.safetensors", serialize(&[Tensor::random(name, Dtype::BF16, &shape)]));
        folder.convert(&["--format", "int4"]).fails(3, &[name, "--exclude"]);
    }
}

/// gpt-oss's own layout: rows of what products sum over, gate and up taking turns as they did.
#[test]
fn gpt_oss_layout_has_blocks_and_scales() {
    let name = |end: &str| format!("model.layers.0.{end}");
    let tensors = [
        Tensor::random(&name("mlp.experts.gate_up_proj"), Dtype::BF16, &[EXPERTS, 64, 96]),
        Tensor::random(&name("mlp.experts.gate_up_proj_bias"), Dtype::BF16, &[EXPERTS, 96]),
        Tensor::random(&name("self_attn.q_proj.weight"), Dtype::BF16, &[64, 64]),
    ];
    let folder = Folder::new("gpt_oss");
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--format", "mxfp4", "--layout", "gpt-oss"]).ok();
    let found = read_tensors(&folder.destination());
    assert_eq!(found.len(), 4);
    assert_eq!(found[&name("self_attn.q_proj.weight")].1.2, tensors[2].data);
    assert_eq!(found[&name("mlp.experts.gate_up_proj_bias")].1.2, tensors[1].data);
    let (_, (_, shape, blocks)) = &found[&name("mlp.experts.gate_up_proj_blocks")];
    let (_, (_, scales_shape, scales)) = &found[&name("mlp.experts.gate_up_proj_scales")];
    assert_eq!((&shape[..], &scales_shape[..]), (&[EXPERTS, 96, 2, 16][..], &[EXPERTS, 96, 2][..]));
    for expert in 0..EXPERTS {
        let (_, _, data) = matrices(&tensors[0], expert, 1, true, false).remove(0);
        let expected = groups::quantize(Kernel::SCALAR, &data, FloatDtype::Bfloat16, 64, 32, codings::MXFP4).unwrap();
        assert!(blocks[expert * 96 * 32..][..96 * 32] == expected.packed, "{expert}");
        assert!(scales[expert * 96 * 2..][..96 * 2] == expected.scales, "{expert}");
    }
    let quantization: Value = folder.read_json("config.json")["quantization_config"].clone();
    assert_eq!(quantization["quant_method"], "mxfp4");
    let kept: Vec<String> = serde_json::from_value(quantization["modules_to_not_convert"].clone()).unwrap();
    assert_eq!(kept, [&name("self_attn.q_proj")[..], "lm_head"]);
}

#[test]
fn gpt_oss_layout_is_for_all_experts_of_gpt_oss_alone() {
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let convert = |model_type: &str, shape: &[usize], flags: &[&str]| {
        let folder = Folder::new(model_type);
        let other = "model.layers.1.mlp.experts.gate_up_proj";
        let tensors = [Tensor::random(name, Dtype::BF16, shape), Tensor::random(other, Dtype::BF16, &[2, 32, 32])];
        folder.write("model.safetensors", serialize(&tensors));
        folder.convert(&[&["--format", "mxfp4", "--layout", "gpt-oss"], flags].concat())
    };
    convert("gpt_oss", &[2, 32, 32], &[]).ok();
    convert("qwen3_5_moe", &[2, 32, 32], &[]).fails(3, &["gpt_oss"]);
    convert("gpt_oss", &[2, 48, 32], &[]).fails(3, &[name, "32"]);
    convert("gpt_oss", &[2, 32, 32], &["--exclude", "layers.1"]).fails(3, &["layers.1", "all experts"]);
}
