//! How each architecture's experts on disk become the model's own fused parameters, as data.
//!
//! In transformers 5 a layer's experts are 3-D parameters. The hub's checkpoints have them in other shapes, and
//! transformers' conversion mapping says how they are put together when they are loaded. `--experts fuse` does the same
//! beforehand. To cover another architecture, add its `model_type` to a row, or a row; `tests/plan/experts.rs` holds the
//! table against `tests/data/experts.json`, which `scripts/make experts` takes from transformers.

use crate::checkpoint::Config;

/// How the experts of some architectures are put together.
#[derive(Debug)]
pub struct Family {
    /// config.json's `model_type`s, of the model or of one nested in it.
    pub model_types: &'static [&'static str],
    /// The model's parameters for experts.
    pub fusions: &'static [Fusion],
}

/// A 3-D parameter for all experts of a layer, and what it is made of.
#[derive(Debug)]
pub struct Fusion {
    /// The tensors on disk: what their names end with, after a dot. `*` is an expert's number: such tensors are one expert's
    /// matrix `[rows, columns]`, others all experts' `[experts, rows, columns]`. Several are concatenated along the rows, expert by
    /// expert.
    pub sources: &'static [&'static str],
    /// What stands in the parameter's name for the source's.
    pub target: &'static str,
    /// Where checkpoints exist with rows and columns exchanged: what the model's shape is told by.
    pub transposed_unless: Option<Shape>,
}

/// The shape of a model's parameter, by the config's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `[experts, 2 * moe_intermediate_size, hidden_size]`.
    GateUp,
    /// `[experts, hidden_size, moe_intermediate_size]`.
    Down,
}

impl Shape {
    /// Whether a fused tensor of this `shape` has rows and columns exchanged, by the config's numbers.
    pub fn is_transposed(self, config: Option<&Config>, shape: &[u64]) -> Result<bool, String> {
        let number = |key: &str| {
            let values = config?.values();
            let nested = values.get("text_config").and_then(|text| text.get(key));
            nested.or_else(|| values.get(key)).and_then(serde_json::Value::as_u64)
        };
        let (Some(hidden), Some(intermediate)) = (number("hidden_size"), number("moe_intermediate_size")) else {
            return Err("config.json has no hidden_size or no moe_intermediate_size to tell its layout by".to_owned());
        };
        let expected = match self {
            Shape::GateUp => [intermediate.saturating_mul(2), hidden],
            Shape::Down => [hidden, intermediate],
        };
        match shape {
            [_, found @ ..] if found == expected => Ok(false),
            [_, found @ ..] if found == [expected[1], expected[0]] => Ok(true),
            found => {
                let [rows, columns] = expected;
                Err(format!(
                    "its shape is {found:?}, and config.json makes it [_, {rows}, {columns}] or [_, {columns}, {rows}]"
                ))
            }
        }
    }
}

const fn fusion(sources: &'static [&'static str], target: &'static str) -> Fusion {
    Fusion { sources, target, transposed_unless: None }
}

/// The rows.
pub const FAMILIES: &[Family] = &[
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
        fusions: &[
            fusion(&["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"], "mlp.experts.gate_up_proj"),
            fusion(&["mlp.experts.*.down_proj.weight"], "mlp.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["minimax", "minimax_m2", "mixtral", "phimoe"],
        fusions: &[
            fusion(
                &["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
                "mlp.experts.gate_up_proj",
            ),
            fusion(&["block_sparse_moe.experts.*.w2.weight"], "mlp.experts.down_proj"),
        ],
    },
    Family {
        // Where `experts` is, transformers says by renames that hold for other tensors too: they are left to it.
        model_types: &["deepseek_v4", "kimi_linear", "minimax_m3_vl", "mistral_large4_text"],
        fusions: &[
            fusion(&["experts.*.w1.weight", "experts.*.w3.weight"], "experts.gate_up_proj"),
            fusion(&["experts.*.w2.weight"], "experts.down_proj"),
        ],
    },
    Family {
        model_types: &["lfm2_moe"],
        fusions: &[
            fusion(
                &["feed_forward.experts.*.w1.weight", "feed_forward.experts.*.w3.weight"],
                "feed_forward.experts.gate_up_proj",
            ),
            fusion(&["feed_forward.experts.*.w2.weight"], "feed_forward.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["jamba"],
        fusions: &[
            fusion(
                &["feed_forward.experts.*.gate_proj.weight", "feed_forward.experts.*.up_proj.weight"],
                "feed_forward.experts.gate_up_proj",
            ),
            fusion(&["feed_forward.experts.*.down_proj.weight"], "feed_forward.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["nemotron_h"],
        fusions: &[
            fusion(&["mixer.experts.*.up_proj.weight"], "mixer.experts.up_proj"),
            fusion(&["mixer.experts.*.down_proj.weight"], "mixer.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["step3p7"],
        fusions: &[
            fusion(&["moe.gate_proj.weight", "moe.up_proj.weight"], "mlp.experts.gate_up_proj"),
            fusion(&["moe.down_proj.weight"], "mlp.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["granitemoe", "granitemoehybrid", "granitemoeshared"],
        fusions: &[
            fusion(&["block_sparse_moe.input_linear.weight"], "block_sparse_moe.experts.gate_up_proj"),
            fusion(&["block_sparse_moe.output_linear.weight"], "block_sparse_moe.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["qwen3_vl_moe"],
        fusions: &[
            Fusion {
                sources: &["mlp.experts.gate_up_proj"],
                target: "mlp.experts.gate_up_proj",
                transposed_unless: Some(Shape::GateUp),
            },
            Fusion {
                sources: &["mlp.experts.down_proj"],
                target: "mlp.experts.down_proj",
                transposed_unless: Some(Shape::Down),
            },
        ],
    },
    Family {
        // What is on disk is what the model has.
        model_types: &["gpt_oss", "qwen3_5_moe"],
        fusions: &[
            fusion(&["mlp.experts.gate_up_proj"], "mlp.experts.gate_up_proj"),
            fusion(&["mlp.experts.down_proj"], "mlp.experts.down_proj"),
        ],
    },
    Family {
        model_types: &["gemma4", "gemma4_text"],
        fusions: &[
            fusion(&["experts.gate_up_proj"], "experts.gate_up_proj"),
            fusion(&["experts.down_proj"], "experts.down_proj"),
        ],
    },
    Family {
        model_types: &["llama4", "llama4_text"],
        fusions: &[
            fusion(&["feed_forward.experts.gate_up_proj"], "feed_forward.experts.gate_up_proj"),
            fusion(&["feed_forward.experts.down_proj"], "feed_forward.experts.down_proj"),
        ],
    },
];

impl Fusion {
    /// What `name` is of the sources: what comes before the part that is replaced, which source, and which expert's (none
    /// if it is all experts').
    pub fn source_of<'n>(&self, name: &'n str) -> Option<(&'n str, usize, Option<usize>)> {
        self.sources.iter().enumerate().find_map(|(i, pattern)| {
            let (prefix, expert) = match_end(name, pattern)?;
            Some((prefix, i, expert))
        })
    }
}

/// Matches the end of `name`, part by part.
pub fn match_end<'n>(name: &'n str, pattern: &str) -> Option<(&'n str, Option<usize>)> {
    let (mut rest, mut expert) = (name, None);
    for expected in pattern.rsplit('.') {
        let part = rest.rsplit('.').next()?;
        if expected == "*" {
            // One spelling for each number, or two tensors could be the same expert's.
            expert = Some(part.parse().ok().filter(|number: &usize| number.to_string() == part)?);
        } else if part != expected {
            return None;
        }
        rest = rest[..rest.len() - part.len()].trim_end_matches('.');
    }
    Some((rest, expert))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_part_by_part_from_their_end() {
        let gate_up = &FAMILIES[0].fusions[0];
        let of = |name| gate_up.source_of(name);
        assert_eq!(of("model.layers.3.mlp.experts.12.up_proj.weight"), Some(("model.layers.3", 1, Some(12))));
        assert_eq!(of("mlp.experts.0.gate_proj.weight"), Some(("", 0, Some(0))));
        for other in [
            "model.layers.3.mlp.shared_experts.gate_proj.weight",
            "model.layers.3.mlp.experts.x.gate_proj.weight",
            "model.layers.3.mlp.experts.01.gate_proj.weight",
            "model.layers.3.mlp.experts.1.gate_proj.bias",
            "model.layers.3.xmlp.experts.1.gate_proj.weight",
            "experts.1.gate_proj.weight",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn no_model_type_is_in_two_rows() {
        let mut all: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
