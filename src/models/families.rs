//! The families of architectures: one row each, with all that is particular to it.
//!
//! A row exists where experts are to be put together or taken apart, or where clients merge Linears of other names. What a
//! tensor is, and what its module is called, the rows don't say: that is in `data/facts.txt`. Every row is compared with
//! `data/experts.json` and `data/vllm.json`, which `scripts/make` takes from transformers and vLLM.
//! docs/add-an-architecture.md says how to add one.

use crate::models::experts::{Orientation, Shape, fused, one_by_one, stacked};
use crate::models::family::{Family, PLAIN};

/// The rows of the families that these `model_type`s are of, in their order.
pub(crate) fn families(model_types: &[&str]) -> impl Iterator<Item = &'static Family> {
    model_types.iter().filter_map(|name| FAMILIES.iter().find(|family| family.model_types.contains(name)))
}

/// A line for each model type whose config ties the head to the embedding unless it says otherwise; from `scripts/make
/// tied-by-default`.
const TIED_BY_DEFAULT: &str = include_str!("data/tied_by_default.txt");

/// Whether a model of the outermost of these types has its head tied where config.json says nothing of it.
pub(crate) fn ties_by_default(model_types: &[&str]) -> bool {
    model_types.first().is_some_and(|model_type| TIED_BY_DEFAULT.lines().any(|line| line == *model_type))
}

const GATE_UP: &[&str] = &["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"];
const DOWN: &[&str] = &["mlp.experts.*.down_proj.weight"];

/// A family that isn't here has no experts that can be fused or taken apart.
pub(crate) const FAMILIES: &[Family] = &[
    // Mixtures of experts.
    Family {
        model_types: &[
            "afmoe",
            "axk1",
            "axk2",
            "bailing_hybrid",
            "beam",
            "cohere2_moe",
            "deepseek_ocr2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "flex_olmo",
            "flint",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm5_next",
            "glm5_next_text",
            "glm_moe_dsa",
            "hunyuan_v1_moe",
            "hy_v3",
            "kimi_k25",
            "kolibri1",
            "laguna",
            "longcat_flash",
            "mellum",
            "mimo_v2_flash",
            "olmoe",
            "qwen2_moe",
            "qwen3_5_moe_text",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_omni_moe",
            "qwen3_omni_moe_text",
            "qwen3_omni_moe_thinker",
            "qwen4_exp_text",
            "solar_open",
        ],
        experts: &[one_by_one(GATE_UP, "mlp.experts.gate_up_proj"), one_by_one(DOWN, "mlp.experts.down_proj")],
        ..PLAIN
    },
    Family {
        model_types: &["mixtral", "minimax", "minimax_m2", "phimoe"],
        experts: &[
            one_by_one(
                &["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
                "mlp.experts.gate_up_proj",
            ),
            one_by_one(&["block_sparse_moe.experts.*.w2.weight"], "mlp.experts.down_proj"),
        ],
        ..PLAIN
    },
    Family {
        // Where `experts` is, transformers says by renames that hold for other tensors too: they are left to it.
        model_types: &["deepseek_v4", "kimi_linear", "minimax_m3_vl"],
        experts: &[
            one_by_one(&["experts.*.w1.weight", "experts.*.w3.weight"], "experts.gate_up_proj"),
            one_by_one(&["experts.*.w2.weight"], "experts.down_proj"),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["mistral_large4_text"],
        experts: &[
            one_by_one(&["experts.*.w1.weight", "experts.*.w3.weight"], "experts.gate_up_proj"),
            one_by_one(&["experts.*.w2.weight"], "experts.down_proj"),
        ],
        merged_linears: &[&["wq_a", "wkv_a_with_mqa"]],
        ..PLAIN
    },
    Family {
        model_types: &["lfm2_moe"],
        experts: &[
            one_by_one(
                &["feed_forward.experts.*.w1.weight", "feed_forward.experts.*.w3.weight"],
                "feed_forward.experts.gate_up_proj",
            ),
            one_by_one(&["feed_forward.experts.*.w2.weight"], "feed_forward.experts.down_proj"),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["jamba"],
        experts: &[
            one_by_one(
                &["feed_forward.experts.*.gate_proj.weight", "feed_forward.experts.*.up_proj.weight"],
                "feed_forward.experts.gate_up_proj",
            ),
            one_by_one(&["feed_forward.experts.*.down_proj.weight"], "feed_forward.experts.down_proj"),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["llama4", "llama4_text"],
        experts: &[
            fused(
                "feed_forward.experts.gate_up_proj",
                &["feed_forward.experts.*.gate_proj.weight", "feed_forward.experts.*.up_proj.weight"],
            )
            .lying(Orientation::Transposed),
            fused("feed_forward.experts.down_proj", &["feed_forward.experts.*.down_proj.weight"])
                .lying(Orientation::Transposed),
        ],
        single_when_quantized: true,
        ..PLAIN
    },
    Family {
        model_types: &["gemma4", "gemma4_text"],
        experts: &[
            fused("experts.gate_up_proj", &["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]),
            fused("experts.down_proj", &["experts.*.down_proj.weight"]),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["qwen3_5_moe"],
        experts: &[fused("mlp.experts.gate_up_proj", GATE_UP), fused("mlp.experts.down_proj", DOWN)],
        merged_linears: &[&["in_proj_qkv", "in_proj_z"], &["in_proj_b", "in_proj_a"]],
        ..PLAIN
    },
    Family {
        model_types: &["qwen3_vl_moe"],
        experts: &[
            fused("mlp.experts.gate_up_proj", GATE_UP).lying(Orientation::ByConfig(Shape::GateUp)),
            fused("mlp.experts.down_proj", DOWN).lying(Orientation::ByConfig(Shape::Down)),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["gpt_oss"],
        experts: &[
            fused("mlp.experts.gate_up_proj", GATE_UP).lying(Orientation::Transposed).interleaved(),
            fused("mlp.experts.down_proj", DOWN).lying(Orientation::Transposed),
            fused("mlp.experts.gate_up_proj_bias", &["mlp.experts.*.gate_proj.bias", "mlp.experts.*.up_proj.bias"])
                .lying(Orientation::Transposed)
                .interleaved(),
            fused("mlp.experts.down_proj_bias", &["mlp.experts.*.down_proj.bias"]).lying(Orientation::Transposed),
        ],
        gpt_oss_layout: true,
        ..PLAIN
    },
    Family {
        model_types: &["granitemoe", "granitemoehybrid", "granitemoeshared"],
        experts: &[
            stacked(
                &["block_sparse_moe.input_linear.weight"],
                "block_sparse_moe.experts.gate_up_proj",
                &["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
            ),
            stacked(
                &["block_sparse_moe.output_linear.weight"],
                "block_sparse_moe.experts.down_proj",
                &["block_sparse_moe.experts.*.w2.weight"],
            ),
        ],
        ..PLAIN
    },
    Family {
        // The hub has the last three, which transformers' class for the type doesn't load; one expert's are as vLLM has them.
        model_types: &["step3p5"],
        experts: &[
            fused("mlp.experts.gate_up_proj", &["moe.experts.*.gate_proj.weight", "moe.experts.*.up_proj.weight"]),
            fused("mlp.experts.down_proj", &["moe.experts.*.down_proj.weight"]),
            fused("moe.gate_proj.weight", &["moe.experts.*.gate_proj.weight"]),
            fused("moe.up_proj.weight", &["moe.experts.*.up_proj.weight"]),
            fused("moe.down_proj.weight", &["moe.experts.*.down_proj.weight"]),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["step3p7"],
        experts: &[
            // One expert's, as vLLM's Step3p5 has them.
            stacked(
                &["moe.gate_proj.weight", "moe.up_proj.weight"],
                "mlp.experts.gate_up_proj",
                &["moe.experts.*.gate_proj.weight", "moe.experts.*.up_proj.weight"],
            ),
            stacked(&["moe.down_proj.weight"], "mlp.experts.down_proj", &["moe.experts.*.down_proj.weight"]),
        ],
        ..PLAIN
    },
    Family {
        // No client has one expert's.
        model_types: &["aria_text"],
        experts: &[
            stacked(&["mlp.experts.fc1.weight"], "mlp.experts.gate_up_proj", &[]).lying(Orientation::Transposed),
            stacked(&["mlp.experts.fc2.weight"], "mlp.experts.down_proj", &[]).lying(Orientation::Transposed),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["nemotron_h"],
        experts: &[
            one_by_one(&["mixer.experts.*.up_proj.weight"], "mixer.experts.up_proj"),
            one_by_one(&["mixer.experts.*.down_proj.weight"], "mixer.experts.down_proj"),
        ],
        ..PLAIN
    },
    // Language models.
    Family {
        model_types: &["qwen3_5"],
        merged_linears: &[&["in_proj_qkv", "in_proj_z"], &["in_proj_b", "in_proj_a"]],
        ..PLAIN
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_model_type_is_in_two_rows() {
        let mut all: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
