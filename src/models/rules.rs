//! Keep or quantize: what a tensor is by the facts of the checkpoint's `model_type`s, or by its name and shape, and why.
//!
//! The decisions equal those of transformers' `load_in_4bit`, which makes a 4-bit module of every exact `nn.Linear` but
//! the output embedding, tied ones and those a model class keeps in f32. On top of it, 3-D expert tensors are
//! quantized, and routers, shared expert gates, classification heads and patch embeddings are always kept: they are
//! small, and they decide much.

use std::borrow::Cow;

use crate::checkpoint::{Config, Source};
use crate::models::caution::{self, Doubt};
use crate::models::diffusers;
use crate::models::evidence::Evidence;
use crate::models::experts::Hub;
use crate::models::facts::{Facts, Kind};
use crate::models::families::FAMILIES;
use crate::models::known::{Known, known};
use crate::models::names::match_end;
use crate::models::roles::{ModuleName, Role, is_fused_projection};

/// The decision about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// What the tensor is.
    pub role: Role,
    /// Whether it is quantized; otherwise it is kept in its dtype.
    pub quantize: bool,
    /// Whether the model makes, or may make, an `nn.Linear` (or `Conv1D`) of the tensor's module: if the tensor is
    /// kept, the module belongs in `llm_int8_skip_modules`.
    pub linear: bool,
    /// Whether the recipe asks for it by name, whatever else speaks against it.
    pub included: bool,
    /// Whether it is kept for want of certainty: a Linear that was taken for something else could be included.
    pub in_doubt: bool,
    /// A short sentence for people.
    pub reason: Cow<'static, str>,
}

impl Verdict {
    fn keep(role: Role, linear: bool, reason: &'static str) -> Verdict {
        Verdict { role, quantize: false, linear, included: false, in_doubt: false, reason: Cow::Borrowed(reason) }
    }

    fn quantize(role: Role, linear: bool, reason: &'static str) -> Verdict {
        Verdict { role, quantize: true, linear, included: false, in_doubt: false, reason: Cow::Borrowed(reason) }
    }

    /// Kept, although nothing is certain.
    fn doubt(Doubt { role, reason }: Doubt) -> Verdict {
        Verdict { role, quantize: false, linear: true, included: false, in_doubt: true, reason }
    }
}

/// The rules for one checkpoint.
#[derive(Debug)]
pub(crate) struct Rules<'s> {
    has_model_type: bool,
    /// What transformers says of the outermost `model_type`, if it has it.
    facts: Option<Facts>,
    /// diffusers' class, of a model of diffusers.
    diffusers_class: Option<String>,
    evidence: Evidence<'s>,
}

impl<'s> Rules<'s> {
    /// Rules for config.json's `model_type` and those of the configs nested in it, outermost first; empty when there
    /// is no config.
    pub(crate) fn new(model_types: &[&str]) -> Rules<'static> {
        let (has_model_type, facts) = (!model_types.is_empty(), Facts::new(model_types));
        Rules { has_model_type, facts, diffusers_class: None, evidence: Evidence::default() }
    }

    /// By what config.json says of the model.
    pub(crate) fn of_config(config: &Config) -> Rules<'static> {
        let rules = Rules::new(&config.model_types()).of_classes(&config.architectures());
        Rules { diffusers_class: config.class_name().map(str::to_owned), ..rules }
    }

    /// The same, for a checkpoint that was saved from the first of these classes.
    pub(crate) fn of_classes(self, architectures: &[&str]) -> Rules<'s> {
        Rules { facts: self.facts.map(|facts| facts.of_classes(architectures)), ..self }
    }

    /// The same, with what config.json's numbers and the shapes of the other tensors tell.
    pub(crate) fn of(source: &'s Source) -> Rules<'s> {
        let Some(config) = &source.config else { return Rules { evidence: Evidence::of(source), ..Rules::new(&[]) } };
        Rules { evidence: Evidence::of(source), ..Rules::of_config(config) }
    }

    /// Whether the architecture was compared, tensor by tensor, with what transformers makes of it.
    pub(crate) fn is_compared(&self) -> bool {
        self.facts.as_ref().is_some_and(Facts::of_outermost)
    }

    /// diffusers' class, of a model of diffusers.
    pub(crate) fn diffusers_class(&self) -> Option<&str> {
        self.diffusers_class.as_deref()
    }

    /// Whether some class of the type, or of one nested in it, has a tensor of this name.
    pub(crate) fn knows(&self, tensor: &str, shape: &[u64]) -> bool {
        self.facts.as_ref().is_some_and(|facts| !facts.kinds(tensor, shape.len()).is_empty())
    }

    /// Whether some class has tensors of this name as one expert's part of a parameter of all.
    pub(crate) fn is_part_of_fused(&self, tensor: &str, shape: &[u64]) -> bool {
        self.facts.as_ref().is_some_and(|facts| facts.kinds(tensor, shape.len()).contains(&Kind::Experts))
    }

    /// How many experts a layer has, by every config that says so.
    pub(crate) fn expert_counts(&self) -> Vec<u64> {
        self.evidence.experts()
    }

    /// Decides about the tensor called `name`, with the shape that the source's header gives.
    pub(crate) fn classify(&self, name: &str, shape: &[u64]) -> Verdict {
        let known = self.facts.as_ref().and_then(|facts| known(facts, name, shape));
        if shape.contains(&0) {
            let linear = known.is_some_and(|known| known.linear);
            return Verdict::keep(Role::Unknown, linear, "has no elements: nothing to quantize");
        }
        if let Some(known) = known {
            let Known { role, quantize, linear, reason } = known;
            return Verdict { role, quantize, linear, included: false, in_doubt: false, reason: Cow::Borrowed(reason) };
        }
        match name.strip_suffix(".weight") {
            Some(module) => self.weight(module, shape),
            None => bare_tensor(name, shape, &self.evidence.experts()),
        }
    }

    /// The names of the modules that the tensor belongs to, as the loaded model calls them: the spelling that
    /// `llm_int8_skip_modules` needs. More than one if the tensor is cut when loaded, or if classes nest it differently; the class
    /// that config.json names comes first.
    pub(crate) fn module_names(&self, tensor: &str) -> Vec<String> {
        let known = self.facts.as_ref().map(|facts| facts.modules(tensor)).unwrap_or_default();
        match known.is_empty() {
            true => vec![tensor.strip_suffix(".weight").unwrap_or(tensor).to_owned()],
            false => known,
        }
    }

    /// Linears that have no tensor on disk, as their weight is another's (a tied head): names of modules, or regular
    /// expressions where there is one in every layer.
    pub(crate) fn off_disk_modules(&self) -> Vec<String> {
        let spelled = |module: &&str| match module.contains('*') {
            true => regex::escape(module).replace("\\*", "\\d+"),
            false => (*module).to_owned(),
        };
        match &self.facts {
            Some(facts) if facts.of_outermost() => facts.off_disk().iter().map(spelled).collect(),
            _ => vec!["lm_head".to_owned()],
        }
    }

    /// Heads that classes of the same type have, under their modules' names, whether or not this checkpoint has them.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.facts.as_ref().map(Facts::heads).unwrap_or_default()
    }

    fn weight(&self, module: &str, shape: &[u64]) -> Verdict {
        let name = ModuleName::new(module);
        if name.owner.is_empty() {
            return Verdict::keep(Role::Unknown, false, "no module name to go by: kept in its dtype");
        }
        if name.is_norm() {
            return Verdict::keep(Role::Norm, false, "norm: kept in its dtype");
        }
        match shape[..] {
            [] | [_] => Verdict::keep(Role::OneDimensional, false, "has one dimension: kept in its dtype"),
            [rows, columns] => self.matrix(module, [rows, columns]),
            [_, _, _] if name.has("experts") || is_stacked(module) => fused_experts(),
            _ if name.is_patch_embedding() => {
                // Some releases of transformers flatten this convolution into a Linear when they load it.
                Verdict::keep(Role::PatchEmbedding, true, "patch embedding: kept in its dtype")
            }
            _ => Verdict::keep(Role::Convolution, false, "convolution: kept in its dtype"),
        }
    }

    /// A 2-D `weight`, by the names of its module and the modules around it, and by what the checkpoint tells.
    fn matrix(&self, module: &str, shape: [u64; 2]) -> Verdict {
        let name = &ModuleName::new(module);
        if name.is_shared_expert_gate() {
            return Verdict::keep(
                Role::SharedExpertGate,
                true,
                "shared expert gate: too small to be worth it, kept in its dtype",
            );
        }
        if name.is_router() {
            return Verdict::keep(Role::Router, true, "router: decides which experts run, kept in its dtype");
        }
        if name.is_patch_embedding() {
            return Verdict::keep(Role::PatchEmbedding, true, "patch embedding: kept in its dtype");
        }
        if name.is_output_head() && !(self.diffusers_class.is_some() && diffusers::is_projection(module)) {
            return Verdict::keep(Role::OutputHead, true, "output head: kept in its dtype");
        }
        if name.is_embedding() {
            return Verdict::keep(Role::Embedding, !self.is_compared(), "embedding: kept in its dtype");
        }
        if name.is_convolution() {
            return Verdict::keep(
                Role::Convolution,
                !self.is_compared(),
                "named like a convolution: kept in its dtype",
            );
        }
        let projection = self.diffusers_class.is_some() && diffusers::is_projection(module);
        match caution::doubt(module, shape, &self.evidence).filter(|_| !projection) {
            Some(doubt) => Verdict::doubt(doubt),
            None => self.linear(name),
        }
    }

    /// Whether torch's own attention owns it: its other weights are one parameter beside it.
    fn is_of_torch_attention(&self, name: &ModuleName) -> bool {
        name.whose_out_proj().is_some_and(|module| self.evidence.shape(&format!("{module}.in_proj_weight")).is_some())
    }

    fn linear(&self, name: &ModuleName) -> Verdict {
        if self.is_of_torch_attention(name) {
            let reason = "output projection of nn.MultiheadAttention, which isn't nn.Linear itself: kept in its dtype";
            return Verdict::keep(Role::Linear, true, reason);
        }
        if name.is_attention_of_torch() {
            let reason =
                "output projection of nn.MultiheadAttention, which reads the weight directly: kept in its dtype";
            return Verdict::keep(Role::Linear, false, reason);
        }
        if name.is_kept_by_transformers() {
            let reason = "transformers keeps it in f32 (_keep_in_fp32_modules) and never makes it 4-bit";
            return Verdict::keep(Role::Linear, true, reason);
        }
        if !self.has_model_type && name.may_be_conv1d() {
            let reason = "may be GPT-2's Conv1D, which stores [in, out]; kept, as there is no config.json to tell";
            return Verdict::keep(Role::Conv1d, true, reason);
        }
        if name.has("experts") {
            return Verdict::quantize(Role::ExpertLinear, false, "one expert's matrix");
        }
        if name.is_multi_token_prediction() {
            let reason = "2-D weight of a Linear in the multi-token prediction layer, which transformers doesn't load";
            return Verdict::quantize(Role::Linear, true, reason);
        }
        let reason = match self.is_compared() {
            true => "2-D weight of a Linear",
            false => "2-D weight named like a Linear's; this architecture hasn't been compared with transformers",
        };
        Verdict::quantize(Role::Linear, true, reason)
    }
}

/// Whether some family's checkpoints have experts of all numbers under a name that doesn't say so.
fn is_stacked(module: &str) -> bool {
    let name = format!("{module}.weight");
    FAMILIES.iter().flat_map(|family| family.experts).any(|parameter| match parameter.hub {
        Hub::Stacked(names) => names.iter().any(|end| match_end(&name, end).is_some()),
        Hub::PerExpert | Hub::Parameter => false,
    })
}

fn fused_experts() -> Verdict {
    Verdict::quantize(Role::FusedExperts, false, "3-D weight of all experts in the layer")
}

/// A tensor that isn't a module's `weight`: a bias, a bare parameter, a buffer. `experts`: how many a layer may have.
fn bare_tensor(name: &str, shape: &[u64], experts: &[u64]) -> Verdict {
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let (name, rank) = (ModuleName::new(module), shape.len());
    let is_bias = leaf.ends_with("bias");
    match (name.has("experts"), is_bias) {
        (true, true) => Verdict::keep(Role::ExpertBias, false, "expert bias: kept in its dtype"),
        (true, false) if rank == 3 && is_fused_projection(leaf) => fused_experts(),
        (_, true) => Verdict::keep(Role::Bias, false, "bias: kept in its dtype"),
        _ if rank <= 1 => Verdict::keep(Role::OneDimensional, false, "has one dimension: kept in its dtype"),
        _ if rank == 3 && (name.has("experts") || experts.contains(&shape[0])) => Verdict {
            // No module of its own.
            linear: false,
            ..Verdict::doubt(caution::unknown_experts())
        },
        _ => Verdict::keep(Role::Buffer, false, "parameter or buffer, not the weight of a Linear: kept in its dtype"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rank: usize) -> Vec<u64> {
        vec![64; rank]
    }

    #[track_caller]
    fn assert_verdict(model_type: &str, name: &str, rank: usize, role: Role, quantize: bool) {
        let verdict = Rules::new(&[model_type]).classify(name, &shape(rank));
        assert_eq!((verdict.role, verdict.quantize), (role, quantize), "{name}: {}", verdict.reason);
    }

    #[test]
    fn multi_token_prediction_keeps_norms_embeddings_and_heads_and_quantizes_linears() {
        let v3 = |rest: &str| format!("model.layers.61.{rest}.weight");
        assert_verdict("deepseek_v3", &v3("enorm"), 1, Role::Norm, false);
        assert_verdict("deepseek_v3", &v3("hnorm"), 1, Role::Norm, false);
        assert_verdict("deepseek_v3", &v3("shared_head.norm"), 1, Role::Norm, false);
        assert_verdict("deepseek_v3", &v3("shared_head.head"), 2, Role::OutputHead, false);
        assert_verdict("deepseek_v3", &v3("embed_tokens"), 2, Role::Embedding, false);
        assert_verdict("deepseek_v3", &v3("eh_proj"), 2, Role::Linear, true);
        assert_verdict("deepseek_v3", &v3("mlp.experts.7.up_proj"), 2, Role::ExpertLinear, true);
        assert_verdict("qwen3_next", "mtp.pre_fc_norm_embedding.weight", 1, Role::Norm, false);
        assert_verdict("qwen3_next", "mtp.fc.weight", 2, Role::Linear, true);
        assert_verdict("qwen3_next", "mtp.layers.0.mlp.gate.weight", 2, Role::Router, false);
    }

    #[test]
    fn fused_experts_are_told_from_their_biases_and_from_shared_experts() {
        assert_verdict("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", 3, Role::FusedExperts, true);
        assert_verdict("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", 2, Role::ExpertBias, false);
        assert_verdict(
            "qwen3_5_moe",
            "model.language_model.layers.0.mlp.experts.down_proj",
            3,
            Role::FusedExperts,
            true,
        );
        assert_verdict(
            "llama4",
            "language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight",
            2,
            Role::Linear,
            true,
        );
        assert_verdict("step3p7", "model.layers.4.moe.gate_proj.weight", 3, Role::FusedExperts, true);
        assert_verdict("mamba2", "backbone.layers.0.mixer.conv1d.weight", 3, Role::Convolution, false);
    }

    #[test]
    fn odd_names_and_shapes_are_kept_and_never_panic() {
        let rules = Rules::new(&["never-heard-of"]);
        for name in ["", ".", ".weight", "weight", "..weight", "experts", "a.weight.", "é.weight"] {
            for rank in [0, 1, 3, 4, 9] {
                assert!(!rules.classify(name, &shape(rank)).quantize, "{name:?} {rank}");
            }
            assert_eq!(rules.module_names(name).len(), 1);
        }
        assert!(!rules.classify("model.layers.0.mlp.up_proj.weight", &[0, 64]).quantize);
        assert!(!rules.classify(".weight", &[64, 64]).quantize);
    }

    #[test]
    fn skip_entries_are_spelled_as_modules_for_checkpoints_with_older_names() {
        let llava = Rules::new(&["llava", "llama", "clip_vision_model"]);
        let tensor = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight";
        assert_eq!(llava.module_names(tensor)[0], "model.vision_tower.encoder.layers.0.mlp.fc1");
        assert_eq!(llava.module_names("language_model.lm_head.weight"), ["lm_head"]);
        assert_eq!(llava.module_names("model.language_model.norm.weight"), ["model.language_model.norm"]);
        let qwen = Rules::new(&["qwen3_5_moe", "qwen3_5_moe_text"]).of_classes(&["Qwen3_5MoeForConditionalGeneration"]);
        let gate = "model.language_model.layers.0.mlp.shared_expert_gate";
        assert_eq!(qwen.module_names(&format!("{gate}.weight")), [gate, "model.layers.0.mlp.shared_expert_gate"]);
    }
}
