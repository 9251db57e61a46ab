//! What a tensor is by its name, whatever the model: the words that module names are made of.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a tensor is, as far as its name, shape and the checkpoint's `model_type`s tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The 2-D weight of an `nn.Linear` (or of a subclass of it, then kept).
    Linear,
    /// One expert's 2-D matrix, under the hub's per-expert name.
    ExpertLinear,
    /// The matrices of all experts of a layer, 3-D.
    FusedExperts,
    /// Biases of experts, fused or not.
    ExpertBias,
    /// A table looked up by token, position or kind.
    Embedding,
    /// Scores over a vocabulary or over classes.
    OutputHead,
    /// The scale of a normalization.
    Norm,
    /// A bias.
    Bias,
    /// Decides which experts run.
    Router,
    /// Scales the shared expert's output.
    SharedExpertGate,
    /// The weight of a convolution.
    Convolution,
    /// The first projection of image patches, convolution or Linear.
    PatchEmbedding,
    /// A weight of transformers' `Conv1D`, stored as [in, out].
    Conv1d,
    /// Any other tensor with one dimension or none.
    OneDimensional,
    /// A buffer or a bare parameter: not a module's `weight`.
    Buffer,
    /// Nothing is known but that it has no place among the others.
    Unknown,
}

impl Role {
    /// Whether a recipe for experts only quantizes this tensor.
    pub fn is_expert(self) -> bool {
        matches!(self, Role::ExpertLinear | Role::FusedExperts)
    }
}

/// A module's name, by its parts: `model.layers.0.mlp.gate` is owned by `gate`, within `mlp`.
pub(super) struct ModuleName<'a> {
    whole: &'a str,
    pub(super) owner: &'a str,
    parent: &'a str,
}

impl<'a> ModuleName<'a> {
    pub(super) fn new(whole: &'a str) -> ModuleName<'a> {
        let mut parts = whole.rsplit('.');
        ModuleName { whole, owner: parts.next().unwrap_or(""), parent: parts.next().unwrap_or("") }
    }

    pub(super) fn has(&self, part: &str) -> bool {
        self.whole.split('.').any(|candidate| candidate == part)
    }

    pub(super) fn is_norm(&self) -> bool {
        let owner = self.owner.to_ascii_lowercase();
        owner.contains("norm") || owner == "ln" || owner.starts_with("ln_") || owner.ends_with("_ln")
    }

    /// `mlp.gate` decides about experts; `mlp.gate_proj` is SwiGLU's and a Linear like others.
    pub(super) fn is_router(&self) -> bool {
        matches!(self.owner, "gate" | "wg") || self.owner.ends_with("router") || self.parent == "router"
    }

    pub(super) fn is_shared_expert_gate(&self) -> bool {
        matches!(self.owner, "shared_expert_gate" | "shared_experts_gate")
    }

    pub(super) fn is_patch_embedding(&self) -> bool {
        let says_so = |part: &str| part.starts_with("patch_embed") || matches!(part, "patch_conv" | "patchifier");
        self.whole.split('.').any(says_so)
    }

    pub(super) fn is_output_head(&self) -> bool {
        let by_owner = matches!(
            self.owner,
            // The skip entry `classifier` matches DistilBERT's `pre_classifier` too, so that both are kept.
            "classifier"
                | "pre_classifier"
                | "embed_out"
                | "lm_head"
                | "qa_outputs"
                | "score"
                | "seq_relationship"
                | "vocab_projector"
        );
        // Names that mean other things further inside a model.
        let at_root = matches!(self.whole, "head" | "output" | "decoder" | "proj_out" | "classifier.out_proj");
        let of_head = self.owner == "decoder" && matches!(self.parent, "predictions" | "lm_head");
        let of_extra_token = self.owner == "head" && self.parent == "shared_head";
        by_owner || at_root || of_head || of_extra_token || self.owner.ends_with("lm_head")
    }

    pub(super) fn is_embedding(&self) -> bool {
        let owner = self.owner.to_ascii_lowercase();
        let known = matches!(owner.as_str(), "wte" | "wpe" | "shared" | "relative_attention_bias");
        let ends = ["embed", "embedding", "embeddings"].iter().any(|end| owner.ends_with(end));
        known || ends || owner.starts_with("embed_")
    }

    pub(super) fn is_convolution(&self) -> bool {
        let owner = self.owner.trim_end_matches(|c: char| c.is_ascii_digit() || c == 'd' || c == '_');
        owner == "conv" || owner.ends_with("_conv")
    }

    /// SigLIP's pooling head: torch's fast path reads this weight without calling the module.
    /// The module that it is the output projection of, by its name.
    pub(super) fn whose_out_proj(&self) -> Option<&'a str> {
        self.whole.strip_suffix(".out_proj")
    }

    pub(super) fn is_attention_of_torch(&self) -> bool {
        self.whole == "head.attention.out_proj" || self.whole.ends_with(".head.attention.out_proj")
    }

    /// The sparse attention indexer's (deepseek_v32, glm_moe_dsa).
    pub(super) fn is_kept_by_transformers(&self) -> bool {
        self.owner == "weights_proj" && self.parent == "indexer"
    }

    pub(super) fn may_be_conv1d(&self) -> bool {
        let gpt2 = matches!(self.parent, "attn" | "mlp" | "crossattention") && self.has("h");
        gpt2 && matches!(self.owner, "c_attn" | "q_attn" | "c_proj" | "c_fc")
    }

    pub(super) fn is_multi_token_prediction(&self) -> bool {
        self.whole.starts_with("mtp.") || self.owner == "eh_proj"
    }
}

/// Whether a bare parameter of this name, inside `experts`, has the matrices of all of them.
pub(super) fn is_fused_projection(leaf: &str) -> bool {
    let leaf = leaf.strip_suffix("_weight").unwrap_or(leaf);
    matches!(leaf, "gate_up_proj" | "gate_proj" | "up_proj" | "down_proj" | "w1" | "w2" | "w3" | "w13")
}
