//! The families of architectures: one row each, with all that is particular to it.
//!
//! A row exists where names and shapes don't tell a tensor, where experts are to be put together or taken apart, where
//! modules are called otherwise than their tensors, or where a Linear has no tensor of its own. Every row is compared
//! with `data/architectures.json` and `data/experts.json`, which `scripts/make` takes from transformers.
//! docs/add-an-architecture.md says how to add one.

use crate::models::experts::{Orientation, Shape, fused, one_by_one, stacked};
use crate::models::family::{Family, PLAIN, keep, not_exactly_linear, quantize};
use crate::models::names::{NO_RENAMES, Renames};
use crate::models::roles::Role;

/// The rows of the families that these `model_type`s are of, in their order.
pub(crate) fn families(model_types: &[&str]) -> impl Iterator<Item = &'static Family> {
    model_types.iter().filter_map(|name| FAMILIES.iter().find(|family| family.model_types.contains(name)))
}

/// Outermost `model_type`s whose every tensor was compared with transformers.
pub(crate) fn compared() -> impl Iterator<Item = &'static str> {
    include_str!("data/compared.txt").lines()
}

const GATE_UP: &[&str] = &["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"];
const DOWN: &[&str] = &["mlp.experts.*.down_proj.weight"];

const SPLIT: &str =
    "split into several Linears when the model is loaded, which a 4-bit tensor can't be: kept in its dtype";
const CONV1D: &str =
    "Conv1D stores [in, out], 4-bit modules [out, in], and prequant doesn't transpose it: kept in its dtype";

/// A family that isn't here is fully told by names and shapes, and has no experts that can be fused or taken apart.
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
        model_types: &["mixtral", "minimax", "minimax_m2"],
        experts: &[
            one_by_one(
                &["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
                "mlp.experts.gate_up_proj",
            ),
            one_by_one(&["block_sparse_moe.experts.*.w2.weight"], "mlp.experts.down_proj"),
        ],
        renames: Renames { parts: &[(".block_sparse_moe.", ".mlp.")], ..NO_RENAMES },
        ..PLAIN
    },
    Family {
        model_types: &["phimoe"],
        experts: &[
            one_by_one(
                &["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
                "mlp.experts.gate_up_proj",
            ),
            one_by_one(&["block_sparse_moe.experts.*.w2.weight"], "mlp.experts.down_proj"),
        ],
        renames: Renames { parts: &[(".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router.")], ..NO_RENAMES },
        ..PLAIN
    },
    Family {
        // Where `experts` is, transformers says by renames that hold for other tensors too: they are left to it.
        model_types: &["deepseek_v4", "minimax_m3_vl"],
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
        model_types: &["kimi_linear"],
        experts: &[
            one_by_one(&["experts.*.w1.weight", "experts.*.w3.weight"], "experts.gate_up_proj"),
            one_by_one(&["experts.*.w2.weight"], "experts.down_proj"),
        ],
        renames: Renames {
            parts: &[
                (".block_sparse_moe.", ".mlp."),
                (".self_attn.f_a_proj.", ".self_attn.forget_gate.f_a_proj."),
                (".self_attn.f_b_proj.", ".self_attn.forget_gate.f_b_proj."),
            ],
            ..NO_RENAMES
        },
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
        // ForCausalLM loads the same file without the wrapper's part of the names.
        renames: Renames { also: &[(".model.language_model.", ".model.")], ..NO_RENAMES },
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
        model_types: &["step3p7"],
        experts: &[
            stacked(&["moe.gate_proj.weight", "moe.up_proj.weight"], "mlp.experts.gate_up_proj", &[]),
            stacked(&["moe.down_proj.weight"], "mlp.experts.down_proj", &[]),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["nemotron_h"],
        experts: &[
            one_by_one(&["mixer.experts.*.up_proj.weight"], "mixer.experts.up_proj"),
            one_by_one(&["mixer.experts.*.down_proj.weight"], "mixer.experts.down_proj"),
        ],
        renames: Renames { starts: &[("backbone.", "model.")], ..NO_RENAMES },
        ..PLAIN
    },
    // Language models.
    Family {
        model_types: &["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"],
        exceptions: &[
            keep(".c_attn.", Role::Conv1d, CONV1D),
            keep(".q_attn.", Role::Conv1d, CONV1D),
            keep(".c_proj.", Role::Conv1d, CONV1D),
            keep(".c_fc.", Role::Conv1d, CONV1D),
        ],
        ..PLAIN
    },
    Family {
        model_types: &["falcon"],
        exceptions: &[not_exactly_linear(
            ".h.",
            "FalconLinear: transformers makes 4-bit modules of nn.Linear itself only, not of subclasses; kept in its dtype",
        )],
        ..PLAIN
    },
    Family {
        model_types: &["gpt_neox"],
        renames: Renames { starts: &[("embed_out.", "lm_head.")], ..NO_RENAMES },
        ..PLAIN
    },
    Family {
        model_types: &["qwen3_5"],
        renames: Renames { also: &[(".model.language_model.", ".model.")], ..NO_RENAMES },
        merged_linears: &[&["in_proj_qkv", "in_proj_z"], &["in_proj_b", "in_proj_a"]],
        ..PLAIN
    },
    Family {
        model_types: &["zamba2"],
        exceptions: &[keep(
            ".shared_transformer.",
            Role::Linear,
            "tied between layers: transformers doesn't make it 4-bit by default",
        )],
        off_disk: &["lm_head", r"model\.layers\.\d+\.shared_transformer"],
        ..PLAIN
    },
    // Encoders, and encoders with decoders.
    Family {
        model_types: &["t5", "mt5", "umt5", "pop2piano", "udop"],
        exceptions: &[keep(
            ".wo.",
            Role::Linear,
            "transformers keeps `wo` in f32 (_keep_in_fp32_modules) and never makes it 4-bit",
        )],
        ..PLAIN
    },
    Family {
        model_types: &["bert", "deberta-v2", "deberta", "albert", "electra", "roberta", "xlm-roberta", "mpnet"],
        off_disk: &["cls.predictions.decoder", "predictions.decoder", "lm_head.decoder", "generator_lm_head"],
        ..PLAIN
    },
    Family { model_types: &["distilbert"], off_disk: &["vocab_projector"], ..PLAIN },
    Family { model_types: &["modernbert"], off_disk: &["decoder"], ..PLAIN },
    Family {
        model_types: &["nomic_bert"],
        exceptions: &[keep(".Wqkv.", Role::Linear, SPLIT)],
        renames: Renames {
            parts: &[
                (".encoder.layers.", ".layers."),
                (".attn.out_proj.", ".self_attn.o_proj."),
                (".fc11.", ".up_proj."),
                (".fc12.", ".gate_proj."),
                (".fc2.", ".down_proj."),
            ],
            splits: &[(".attn.Wqkv.", &[".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."])],
            ..NO_RENAMES
        },
        ..PLAIN
    },
    Family { model_types: &["whisper"], off_disk: &["proj_out"], ..PLAIN },
    // Vision towers.
    Family {
        model_types: &["clip"],
        exceptions: &[keep(
            ".text_projection.",
            Role::OutputHead,
            "the model's last parameter, which transformers doesn't make 4-bit by default",
        )],
        ..PLAIN
    },
    Family {
        model_types: &["siglip", "siglip2", "siglip_text_model"],
        exceptions: &[quantize(".text_model.head.", "2-D weight of a Linear: the text tower's projection")],
        ..PLAIN
    },
    Family {
        model_types: &["vit", "deit", "ijepa", "vit_msn", "vit_mae"],
        renames: Renames {
            parts: &[
                (".encoder.layer.", ".layers."),
                (".attention.attention.query.", ".attention.q_proj."),
                (".attention.attention.key.", ".attention.k_proj."),
                (".attention.attention.value.", ".attention.v_proj."),
                (".attention.output.dense.", ".attention.o_proj."),
                (".intermediate.dense.", ".mlp.fc1."),
                (".output.dense.", ".mlp.fc2."),
            ],
            ..NO_RENAMES
        },
        ..PLAIN
    },
    Family {
        model_types: &["dinov2", "dinov2_with_registers"],
        exceptions: &[keep(".mlp.weights_in.", Role::Linear, SPLIT)],
        renames: Renames {
            parts: &[
                (".attention.attention.query.", ".attention.q_proj."),
                (".attention.attention.key.", ".attention.k_proj."),
                (".attention.attention.value.", ".attention.v_proj."),
                (".attention.output.dense.", ".attention.o_proj."),
                (".mlp.weights_out.", ".mlp.down_proj."),
            ],
            splits: &[(".mlp.weights_in.", &[".mlp.gate_proj.", ".mlp.up_proj."])],
            ..NO_RENAMES
        },
        ..PLAIN
    },
    Family {
        model_types: &["dinov3_vit"],
        renames: Renames { starts: &[("layer.", "model.layer.")], ..NO_RENAMES },
        ..PLAIN
    },
    // A language model and a vision or audio tower in a wrapper.
    Family {
        // Their checkpoints may be older than the wrapper's own `model.`.
        model_types: &[
            "aria",
            "aya_vision",
            "gemma3",
            "got_ocr2",
            "internvl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "mllama",
            "paligemma",
            "qwen2_audio",
            "vipllava",
        ],
        renames: Renames {
            starts: &[
                ("model.", "model."),
                ("lm_head.", "lm_head."),
                ("language_model.lm_head.", "lm_head."),
                ("language_model.model.", "model.language_model."),
                ("", "model."),
            ],
            parts: &[(".vision_tower.vision_model.", ".vision_tower.")],
            ..NO_RENAMES
        },
        ..PLAIN
    },
    Family {
        model_types: &["qwen2_vl", "qwen2_5_vl"],
        renames: Renames {
            starts: &[
                ("model.language_model.", "model.language_model."),
                ("model.visual.", "model.visual."),
                ("model.", "model.language_model."),
                ("visual.", "model.visual."),
            ],
            ..NO_RENAMES
        },
        ..PLAIN
    },
    Family {
        model_types: &["blip-2"],
        exceptions: &[keep(
            ".qformer.",
            Role::Linear,
            "transformers keeps the Q-Former in f32 (_keep_in_fp32_modules) and never makes it 4-bit",
        )],
        off_disk: &["language_model.lm_head"],
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
