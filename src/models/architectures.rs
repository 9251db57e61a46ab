//! What is particular to single architectures: facts about transformers' classes, as data.
//!
//! Most tensors are told by their name and shape (see `rules.rs`). A row here exists where that would be wrong, where
//! the modules are called otherwise than the tensors, or where a Linear has no tensor of its own. Held against
//! `tests/data/architectures.json`, which `scripts/make architectures` takes from transformers itself.

use crate::models::rules::Role;

/// One architecture's departures from the rules by name and shape.
#[derive(Debug)]
pub struct Architecture {
    /// config.json's `model_type`s the row is for.
    pub model_types: &'static [&'static str],
    /// 2-D weights that are kept (or are Linears) against their looks; the first match decides.
    pub exceptions: &'static [Exception],
    /// How a name on disk becomes a module's name, as transformers' conversion mapping does.
    pub renames: Renames,
    /// Modules with no tensor on disk that must not become 4-bit: tied Linears. Each entry is spelled as
    /// `llm_int8_skip_modules` takes it: a regex that matches from the start of a module's name, or a suffix of it.
    /// Empty where the only one is `lm_head`.
    pub off_disk: &'static [&'static str],
}

/// A part of a module's name, and what a 2-D weight with it in its name is.
#[derive(Debug)]
pub struct Exception {
    /// Looked for in `.module.name.`, so that dots stand for the borders of the parts; empty matches everything.
    pub part: &'static str,
    /// What the tensor is.
    pub role: Role,
    /// Whether it is kept; otherwise it is quantized.
    pub keep: bool,
    /// Whether the model makes an exact nn.Linear of it.
    pub linear: bool,
    /// A short sentence for people.
    pub reason: &'static str,
}

/// Steps from a tensor's module on disk to the model's modules.
#[derive(Debug)]
pub struct Renames {
    /// At most one is applied: the first that the name starts with. A pair of equals guards against the next ones.
    pub starts: &'static [(&'static str, &'static str)],
    /// All are applied, in order, to `.module.name.`
    pub parts: &'static [(&'static str, &'static str)],
    /// A part that several modules are cut from when the model is loaded, and their names.
    pub splits: &'static [(&'static str, &'static [&'static str])],
    /// Spellings to be given besides: the same checkpoint is loaded by classes that nest it differently.
    pub also: &'static [(&'static str, &'static str)],
}

const NO_RENAMES: Renames = Renames { starts: &[], parts: &[], splits: &[], also: &[] };

const fn keep(part: &'static str, role: Role, reason: &'static str) -> Exception {
    Exception { part, role, keep: true, linear: true, reason }
}

const fn not_exactly_linear(part: &'static str, reason: &'static str) -> Exception {
    Exception { part, role: Role::Linear, keep: true, linear: false, reason }
}

const fn quantize(part: &'static str, reason: &'static str) -> Exception {
    Exception { part, role: Role::Linear, keep: false, linear: true, reason }
}

const SPLIT: &str = "cut into several Linears when the model is loaded, which a 4-bit tensor can't be: kept";
const CONV1D: &str = "Conv1D stores [in, out] and 4-bit modules store [out, in]: kept, as it isn't transposed here";

/// Checkpoints that wrap a language model and a vision tower, saved before the wrapper had a `model.` of its own.
const WRAPPER_RENAMES: Renames = Renames {
    starts: &[
        ("model.", "model."),
        ("lm_head.", "lm_head."),
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("", "model."),
    ],
    parts: &[(".vision_tower.vision_model.", ".vision_tower.")],
    splits: &[],
    also: &[],
};

/// The rows. An architecture that isn't here is fully told by names and shapes.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_types: &["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"],
        exceptions: &[
            keep(".c_attn.", Role::Conv1d, CONV1D),
            keep(".q_attn.", Role::Conv1d, CONV1D),
            keep(".c_proj.", Role::Conv1d, CONV1D),
            keep(".c_fc.", Role::Conv1d, CONV1D),
        ],
        renames: NO_RENAMES,
        off_disk: &[],
    },
    Architecture {
        model_types: &["falcon"],
        exceptions: &[not_exactly_linear(
            ".h.",
            "FalconLinear, a subclass: transformers makes 4-bit modules of exact nn.Linear only, so kept",
        )],
        renames: NO_RENAMES,
        off_disk: &[],
    },
    Architecture {
        model_types: &["t5", "mt5", "umt5", "pop2piano", "udop"],
        exceptions: &[keep(
            ".wo.",
            Role::Linear,
            "transformers keeps `wo` in f32 (_keep_in_fp32_modules) and never makes it 4-bit",
        )],
        renames: NO_RENAMES,
        off_disk: &[],
    },
    Architecture {
        model_types: &["blip-2"],
        exceptions: &[keep(
            ".qformer.",
            Role::Linear,
            "transformers keeps the Q-Former in f32 (_keep_in_fp32_modules) and never makes it 4-bit",
        )],
        renames: NO_RENAMES,
        off_disk: &["language_model.lm_head"],
    },
    Architecture {
        model_types: &["zamba2"],
        exceptions: &[keep(
            ".shared_transformer.",
            Role::Linear,
            "tied between layers, which transformers' defaults keep out of 4-bit",
        )],
        renames: NO_RENAMES,
        off_disk: &["lm_head", r"model\.layers\.\d+\.shared_transformer"],
    },
    Architecture {
        model_types: &["clip"],
        exceptions: &[keep(
            ".text_projection.",
            Role::OutputHead,
            "projects into the shared space and is the model's last parameter, which transformers' defaults keep",
        )],
        renames: NO_RENAMES,
        off_disk: &[],
    },
    Architecture {
        model_types: &["siglip", "siglip2", "siglip_text_model"],
        exceptions: &[quantize(".text_model.head.", "2-D weight of a Linear: the text tower's projection")],
        renames: NO_RENAMES,
        off_disk: &[],
    },
    Architecture {
        model_types: &["nomic_bert"],
        exceptions: &[keep(".Wqkv.", Role::Linear, SPLIT)],
        renames: Renames {
            starts: &[],
            parts: &[
                (".encoder.layers.", ".layers."),
                (".attn.out_proj.", ".self_attn.o_proj."),
                (".fc11.", ".up_proj."),
                (".fc12.", ".gate_proj."),
                (".fc2.", ".down_proj."),
            ],
            splits: &[(".attn.Wqkv.", &[".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."])],
            also: &[],
        },
        off_disk: &[],
    },
    Architecture {
        model_types: &["vit", "deit", "ijepa", "vit_msn", "vit_mae"],
        exceptions: &[],
        renames: Renames {
            starts: &[],
            parts: &[
                (".encoder.layer.", ".layers."),
                (".attention.attention.query.", ".attention.q_proj."),
                (".attention.attention.key.", ".attention.k_proj."),
                (".attention.attention.value.", ".attention.v_proj."),
                (".attention.output.dense.", ".attention.o_proj."),
                (".intermediate.dense.", ".mlp.fc1."),
                (".output.dense.", ".mlp.fc2."),
            ],
            splits: &[],
            also: &[],
        },
        off_disk: &[],
    },
    Architecture {
        model_types: &["dinov2", "dinov2_with_registers"],
        exceptions: &[keep(".mlp.weights_in.", Role::Linear, SPLIT)],
        renames: Renames {
            starts: &[],
            parts: &[
                (".attention.attention.query.", ".attention.q_proj."),
                (".attention.attention.key.", ".attention.k_proj."),
                (".attention.attention.value.", ".attention.v_proj."),
                (".attention.output.dense.", ".attention.o_proj."),
                (".mlp.weights_out.", ".mlp.down_proj."),
            ],
            splits: &[(".mlp.weights_in.", &[".mlp.gate_proj.", ".mlp.up_proj."])],
            also: &[],
        },
        off_disk: &[],
    },
    Architecture {
        model_types: &["dinov3_vit"],
        exceptions: &[],
        renames: Renames { starts: &[("layer.", "model.layer.")], parts: &[], splits: &[], also: &[] },
        off_disk: &[],
    },
    Architecture {
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
        exceptions: &[],
        renames: WRAPPER_RENAMES,
        off_disk: &[],
    },
    Architecture {
        model_types: &["qwen2_vl", "qwen2_5_vl"],
        exceptions: &[],
        renames: Renames {
            starts: &[
                ("model.language_model.", "model.language_model."),
                ("model.visual.", "model.visual."),
                ("model.", "model.language_model."),
                ("visual.", "model.visual."),
            ],
            parts: &[],
            splits: &[],
            also: &[],
        },
        off_disk: &[],
    },
    Architecture {
        model_types: &["qwen3_5", "qwen3_5_moe"],
        exceptions: &[],
        // ForCausalLM loads the same file without the wrapper's part of the names.
        renames: Renames { starts: &[], parts: &[], splits: &[], also: &[(".model.language_model.", ".model.")] },
        off_disk: &[],
    },
    Architecture {
        model_types: &["mixtral", "minimax", "minimax_m2", "kimi_linear"],
        exceptions: &[],
        renames: Renames {
            starts: &[],
            parts: &[
                (".block_sparse_moe.", ".mlp."),
                (".self_attn.f_a_proj.", ".self_attn.forget_gate.f_a_proj."),
                (".self_attn.f_b_proj.", ".self_attn.forget_gate.f_b_proj."),
            ],
            splits: &[],
            also: &[],
        },
        off_disk: &[],
    },
    Architecture {
        model_types: &["phimoe"],
        exceptions: &[],
        renames: Renames {
            starts: &[],
            parts: &[(".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router.")],
            splits: &[],
            also: &[],
        },
        off_disk: &[],
    },
    Architecture {
        model_types: &["gpt_neox"],
        exceptions: &[],
        renames: Renames { starts: &[("embed_out.", "lm_head.")], parts: &[], splits: &[], also: &[] },
        off_disk: &[],
    },
    Architecture {
        model_types: &["nemotron_h"],
        exceptions: &[],
        renames: Renames { starts: &[("backbone.", "model.")], parts: &[], splits: &[], also: &[] },
        off_disk: &[],
    },
    Architecture {
        model_types: &["bert", "deberta-v2", "deberta", "albert", "electra", "roberta", "xlm-roberta", "mpnet"],
        exceptions: &[],
        renames: NO_RENAMES,
        off_disk: &["cls.predictions.decoder", "predictions.decoder", "lm_head.decoder", "generator_lm_head"],
    },
    Architecture { model_types: &["distilbert"], exceptions: &[], renames: NO_RENAMES, off_disk: &["vocab_projector"] },
    Architecture { model_types: &["modernbert"], exceptions: &[], renames: NO_RENAMES, off_disk: &["decoder"] },
    Architecture { model_types: &["whisper"], exceptions: &[], renames: NO_RENAMES, off_disk: &["proj_out"] },
];

/// Outermost `model_type`s whose every tensor was compared with transformers.
pub const COMPARED: &[&str] = &[
    "afmoe",
    "albert",
    "apertus",
    "arcee",
    "bamba",
    "bart",
    "bert",
    "blip-2",
    "bloom",
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "codegen",
    "cohere",
    "cohere2",
    "deberta-v2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dinov2",
    "dinov3_vit",
    "distilbert",
    "dots1",
    "electra",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v",
    "glm4v_moe",
    "glm_moe_dsa",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hubert",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "idefics3",
    "internvl",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4",
    "llama4_text",
    "llava",
    "llava_next",
    "llava_onevision",
    "longcat_flash",
    "m2m_100",
    "mamba",
    "mamba2",
    "marian",
    "mbart",
    "minimax",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "mllama",
    "modernbert",
    "mpnet",
    "mpt",
    "mt5",
    "nemotron",
    "nemotron_h",
    "nomic_bert",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "openai-gpt",
    "opt",
    "paligemma",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl",
    "qwen3_vl_moe",
    "recurrent_gemma",
    "roberta",
    "rwkv",
    "seed_oss",
    "siglip",
    "siglip2",
    "siglip_vision_model",
    "smollm3",
    "smolvlm",
    "solar_open",
    "stablelm",
    "starcoder2",
    "t5",
    "umt5",
    "vit",
    "wav2vec2",
    "whisper",
    "xlm-roberta",
    "zamba2",
];
