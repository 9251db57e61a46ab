//! Keep or quantize: what a tensor is by its name, its shape and the checkpoint's `model_type`s, and why.
//!
//! The decisions equal those of transformers' `load_in_4bit`, which makes a 4-bit module of every exact `nn.Linear` but
//! the output embedding, tied ones and those a model class keeps in f32. On top of it, 3-D expert tensors are
//! quantized, and routers, shared expert gates, classification heads and patch embeddings are always kept: they are
//! small, and they decide much.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::models::architectures::{ARCHITECTURES, Architecture, COMPARED};

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
    /// Whether `--only-experts` leaves this tensor to be quantized.
    pub fn is_expert(self) -> bool {
        matches!(self, Role::ExpertLinear | Role::FusedExperts)
    }
}

/// The decision about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What the tensor is.
    pub role: Role,
    /// Whether it is quantized; otherwise it is kept in its dtype.
    pub quantize: bool,
    /// Whether the model makes, or may make, an `nn.Linear` (or `Conv1D`) of the tensor's module: if the tensor is
    /// kept, the module belongs in `llm_int8_skip_modules`.
    pub linear: bool,
    /// A short sentence for people.
    pub reason: Cow<'static, str>,
}

impl Verdict {
    fn keep(role: Role, linear: bool, reason: &'static str) -> Verdict {
        Verdict { role, quantize: false, linear, reason: Cow::Borrowed(reason) }
    }

    fn quantize(role: Role, linear: bool, reason: &'static str) -> Verdict {
        Verdict { role, quantize: true, linear, reason: Cow::Borrowed(reason) }
    }
}

/// The rules for one checkpoint.
#[derive(Clone, Debug)]
pub struct Rules {
    rows: Vec<&'static Architecture>,
    /// The row of the outermost `model_type`: the only one whose renames hold for whole names.
    outermost: Option<&'static Architecture>,
    has_model_type: bool,
    compared: bool,
}

impl Rules {
    /// Rules for config.json's `model_type` and those of the configs nested in it, outermost first; empty when there
    /// is no config.
    pub fn new(model_types: &[&str]) -> Rules {
        let row_of = |model_type: &&str| ARCHITECTURES.iter().find(|row| row.model_types.contains(model_type));
        Rules {
            rows: model_types.iter().filter_map(row_of).collect(),
            outermost: model_types.first().and_then(row_of),
            has_model_type: !model_types.is_empty(),
            compared: model_types.first().is_some_and(|first| COMPARED.contains(first)),
        }
    }

    /// Whether the architecture was compared, tensor by tensor, with what transformers makes of it.
    pub fn is_compared(&self) -> bool {
        self.compared
    }

    /// Decides about the tensor called `name`, with the shape that the source's header gives.
    pub fn classify(&self, name: &str, shape: &[u64]) -> Verdict {
        if shape.contains(&0) {
            return Verdict::keep(Role::Unknown, false, "has no element: nothing to quantize");
        }
        match name.strip_suffix(".weight") {
            Some(module) => self.weight(module, shape.len()),
            None => bare_tensor(name, shape.len()),
        }
    }

    /// The names of the modules that the tensor belongs to, as the loaded model calls them: the spelling that
    /// `llm_int8_skip_modules` needs. More than one if the tensor is cut when loaded, or if classes nest it differently.
    pub fn module_names(&self, tensor: &str) -> Vec<String> {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let Some(row) = self.outermost else { return vec![module.to_owned()] };
        let renames = &row.renames;
        let mut dotted = format!("{module}.");
        if let Some((from, to)) = renames.starts.iter().find(|(from, _)| dotted.starts_with(from)) {
            dotted.replace_range(..from.len(), to);
        }
        dotted.insert(0, '.');
        for (from, to) in renames.parts {
            dotted = dotted.replacen(from, to, 1);
        }
        let mut names = vec![dotted.clone()];
        if let Some((from, targets)) = renames.splits.iter().find(|(from, _)| dotted.contains(from)) {
            names = targets.iter().map(|to| dotted.replacen(from, to, 1)).collect();
        }
        let spelled_besides = renames.also.iter().filter(|(from, _)| dotted.contains(from));
        names.extend(spelled_besides.map(|(from, to)| dotted.replacen(from, to, 1)));
        names.iter().map(|name| name.trim_matches('.').to_owned()).collect()
    }

    /// Entries of `llm_int8_skip_modules` for Linears that may have no tensor on disk, as their weight is another's
    /// (a tied head). An entry that matches no module does no harm.
    pub fn off_disk_modules(&self) -> Vec<&'static str> {
        match self.outermost {
            Some(row) if !row.off_disk.is_empty() => row.off_disk.to_vec(),
            _ => ["lm_head"].into_iter().chain(self.rows.iter().flat_map(|row| row.off_disk).copied()).collect(),
        }
    }

    fn weight(&self, module: &str, rank: usize) -> Verdict {
        let name = ModuleName::new(module);
        if name.owner.is_empty() {
            return Verdict::keep(Role::Unknown, false, "no module's name to tell by: kept in its dtype");
        }
        if name.is_norm() {
            return Verdict::keep(Role::Norm, false, "norm: kept in its dtype");
        }
        match rank {
            0 | 1 => Verdict::keep(Role::OneDimensional, false, "has one dimension: kept in its dtype"),
            2 => self.exception(module).unwrap_or_else(|| self.matrix(&name)),
            3 if name.is_fused_experts() => fused_experts(),
            _ if name.is_patch_embedding() => {
                // Some releases of transformers flatten this convolution into a Linear when they load it.
                Verdict::keep(Role::PatchEmbedding, true, "patch embedding: kept in its dtype")
            }
            _ => Verdict::keep(Role::Convolution, false, "convolution: kept in its dtype"),
        }
    }

    /// What the table of architectures says against the names.
    fn exception(&self, module: &str) -> Option<Verdict> {
        let dotted = format!(".{module}.");
        let exception = self.rows.iter().flat_map(|row| row.exceptions).find(|row| dotted.contains(row.part))?;
        Some(Verdict {
            role: exception.role,
            quantize: !exception.keep,
            linear: exception.linear,
            reason: Cow::Borrowed(exception.reason),
        })
    }

    /// A 2-D `weight`, by the names of its module and the modules around it.
    fn matrix(&self, name: &ModuleName) -> Verdict {
        if name.is_shared_expert_gate() {
            return Verdict::keep(Role::SharedExpertGate, true, "shared expert's gate: too small to gain, kept");
        }
        if name.is_router() {
            return Verdict::keep(Role::Router, true, "router: decides which experts run, kept in its dtype");
        }
        if name.is_patch_embedding() {
            return Verdict::keep(Role::PatchEmbedding, true, "patch embedding: kept in its dtype");
        }
        if name.is_output_head() {
            return Verdict::keep(Role::OutputHead, true, "output head: kept in its dtype");
        }
        if name.is_embedding() {
            return Verdict::keep(Role::Embedding, !self.compared, "embedding: kept in its dtype");
        }
        if name.is_convolution() {
            return Verdict::keep(Role::Convolution, !self.compared, "convolution, by its name: kept in its dtype");
        }
        self.linear(name)
    }

    fn linear(&self, name: &ModuleName) -> Verdict {
        if name.is_attention_of_torch() {
            let reason = "output of nn.MultiheadAttention, which reads the weight itself: kept in its dtype";
            return Verdict::keep(Role::Linear, false, reason);
        }
        if name.is_kept_by_transformers() {
            let reason = "transformers keeps it in f32 (_keep_in_fp32_modules) and never makes it 4-bit";
            return Verdict::keep(Role::Linear, true, reason);
        }
        if !self.has_model_type && name.may_be_conv1d() {
            let reason = "GPT-2's name: may be a Conv1D, which stores [in, out]; kept, as no config.json tells";
            return Verdict::keep(Role::Conv1d, true, reason);
        }
        if name.has("experts") {
            return Verdict::quantize(Role::ExpertLinear, false, "matrix of one expert");
        }
        if name.is_multi_token_prediction() {
            let reason = "2-D weight of a Linear of the multi-token prediction layer, which plain transformers skips";
            return Verdict::quantize(Role::Linear, true, reason);
        }
        let reason = match self.compared {
            true => "2-D weight of a Linear",
            false => {
                "2-D weight, by its name and shape of a Linear: this architecture wasn't compared with transformers"
            }
        };
        Verdict::quantize(Role::Linear, true, reason)
    }
}

/// Whether transformers takes `entry` of `llm_int8_skip_modules`, a plain module's name, to mean `module` too: it
/// does for what is inside, and for every name that ends like it (`classifier` skips `pre_classifier`).
pub fn skip_entry_matches(entry: &str, module: &str) -> bool {
    let inside = |rest: &str| rest.is_empty() || rest.starts_with('.');
    module.ends_with(entry) || module.strip_prefix(entry).is_some_and(inside)
}

fn fused_experts() -> Verdict {
    Verdict::quantize(Role::FusedExperts, false, "matrices of all experts of the layer, 3-D")
}

/// A tensor that isn't a module's `weight`: a bias, a bare parameter, a buffer.
fn bare_tensor(name: &str, rank: usize) -> Verdict {
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let name = ModuleName::new(module);
    let is_bias = leaf.ends_with("bias");
    match (name.has("experts"), is_bias) {
        (true, true) => Verdict::keep(Role::ExpertBias, false, "bias of experts: kept in its dtype"),
        (true, false) if rank == 3 && is_fused_projection(leaf) => fused_experts(),
        (_, true) => Verdict::keep(Role::Bias, false, "bias: kept in its dtype"),
        _ if rank <= 1 => Verdict::keep(Role::OneDimensional, false, "has one dimension: kept in its dtype"),
        _ => Verdict::keep(Role::Buffer, false, "bare parameter or buffer, no Linear's weight: kept in its dtype"),
    }
}

fn is_fused_projection(leaf: &str) -> bool {
    matches!(leaf, "gate_up_proj" | "gate_proj" | "up_proj" | "down_proj" | "w1" | "w2" | "w3")
}

/// A module's name, by its parts: `model.layers.0.mlp.gate` is owned by `gate`, within `mlp`.
struct ModuleName<'a> {
    whole: &'a str,
    owner: &'a str,
    parent: &'a str,
}

impl<'a> ModuleName<'a> {
    fn new(whole: &'a str) -> ModuleName<'a> {
        let mut parts = whole.rsplit('.');
        ModuleName { whole, owner: parts.next().unwrap_or(""), parent: parts.next().unwrap_or("") }
    }

    fn has(&self, part: &str) -> bool {
        self.whole.split('.').any(|candidate| candidate == part)
    }

    fn is_norm(&self) -> bool {
        let owner = self.owner.to_ascii_lowercase();
        owner.contains("norm") || owner == "ln" || owner.starts_with("ln_") || owner.ends_with("_ln")
    }

    fn is_fused_experts(&self) -> bool {
        let granite = self.parent == "block_sparse_moe" && matches!(self.owner, "input_linear" | "output_linear");
        let step = self.parent == "moe" && matches!(self.owner, "gate_proj" | "up_proj" | "down_proj");
        granite || step || self.has("experts")
    }

    /// `mlp.gate` decides about experts; `mlp.gate_proj` is SwiGLU's and a Linear like others.
    fn is_router(&self) -> bool {
        matches!(self.owner, "gate" | "wg") || self.owner.ends_with("router") || self.parent == "router"
    }

    fn is_shared_expert_gate(&self) -> bool {
        matches!(self.owner, "shared_expert_gate" | "shared_experts_gate")
    }

    fn is_patch_embedding(&self) -> bool {
        let says_so = |part: &str| part.starts_with("patch_embed") || matches!(part, "patch_conv" | "patchifier");
        self.whole.split('.').any(says_so)
    }

    fn is_output_head(&self) -> bool {
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

    fn is_embedding(&self) -> bool {
        let owner = self.owner.to_ascii_lowercase();
        let known = matches!(owner.as_str(), "wte" | "wpe" | "shared" | "relative_attention_bias");
        let ends = ["embed", "embedding", "embeddings"].iter().any(|end| owner.ends_with(end));
        known || ends || owner.starts_with("embed_")
    }

    fn is_convolution(&self) -> bool {
        let owner = self.owner.trim_end_matches(|c: char| c.is_ascii_digit() || c == 'd' || c == '_');
        owner == "conv" || owner.ends_with("_conv")
    }

    /// SigLIP's pooling head: torch's fast path reads this weight without calling the module.
    fn is_attention_of_torch(&self) -> bool {
        self.whole == "head.attention.out_proj" || self.whole.ends_with(".head.attention.out_proj")
    }

    /// The sparse attention indexer's (deepseek_v32, glm_moe_dsa).
    fn is_kept_by_transformers(&self) -> bool {
        self.owner == "weights_proj" && self.parent == "indexer"
    }

    fn may_be_conv1d(&self) -> bool {
        let gpt2 = matches!(self.parent, "attn" | "mlp" | "crossattention") && self.has("h");
        gpt2 && matches!(self.owner, "c_attn" | "q_attn" | "c_proj" | "c_fc")
    }

    fn is_multi_token_prediction(&self) -> bool {
        self.whole.starts_with("mtp.") || self.owner == "eh_proj"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const GOLDEN: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/architectures.json"));

    /// A tensor as transformers sees it.
    struct Row {
        name: String,
        rank: usize,
        kind: String,
        skipped: bool,
        rearranged: bool,
        modules: Vec<String>,
    }

    impl Row {
        fn is_linear(&self) -> bool {
            matches!(self.kind.as_str(), "linear" | "conv1d_transposed")
        }

        /// What load_in_4bit makes 4-bit, and the experts.
        fn quantized_by_transformers(&self) -> bool {
            self.kind == "expert" || (self.kind == "linear" && !self.skipped && !self.rearranged)
        }
    }

    struct Class {
        name: String,
        model_types: Vec<String>,
        off_disk: Vec<String>,
        rows: Vec<Row>,
    }

    impl Class {
        fn rules(&self) -> Rules {
            Rules::new(&self.model_types.iter().map(String::as_str).collect::<Vec<_>>())
        }
    }

    fn strings(value: &Value) -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|item| item.as_str().map(numbered)).collect()
    }

    /// A layer and an expert for every `*`.
    fn numbered(name: &str) -> String {
        name.replace('*', "3")
    }

    fn golden() -> Vec<Class> {
        let document: Value = serde_json::from_str(GOLDEN).unwrap();
        let classes = document["architectures"].as_array().unwrap();
        classes
            .iter()
            .map(|class| Class {
                name: class["class"].as_str().unwrap().to_owned(),
                model_types: strings(&class["model_types"]),
                off_disk: strings(&class["off_disk"]),
                rows: class["tensors"].as_array().unwrap().iter().map(row).collect(),
            })
            .collect()
    }

    fn row(value: &Value) -> Row {
        let name = numbered(value["name"].as_str().unwrap());
        let modules = match value.get("modules") {
            Some(modules) => strings(modules),
            None => vec![name.strip_suffix(".weight").unwrap_or(&name).to_owned()],
        };
        Row {
            rank: value["rank"].as_u64().unwrap() as usize,
            kind: value["kind"].as_str().unwrap().to_owned(),
            skipped: value["skipped"].as_bool().unwrap_or(false),
            rearranged: value["rearranged"].as_bool().unwrap_or(false),
            modules,
            name,
        }
    }

    /// Linears that load_in_4bit quantizes and we keep by intent: role, and the ends of their names.
    const ALWAYS_KEPT: &[(Role, &[&str])] = &[
        (Role::SharedExpertGate, &["mlp.shared_expert_gate.weight"]),
        (
            Role::Router,
            &[
                "router.proj.weight",
                "router.gate.weight",
                "router.classifier.weight",
                "gate.wg.weight",
                "modality_router.weight",
            ],
        ),
        (
            Role::OutputHead,
            &[
                "classifier.weight",
                "classifier.out_proj.weight",
                "cls.seq_relationship.weight",
                "pre_classifier.weight",
            ],
        ),
        (
            Role::PatchEmbedding,
            &["embeddings.patch_embedding.weight", "patch_embedding.linear.weight", "patch_embedder.input_proj.weight"],
        ),
    ];

    /// What we mean to decide: as load_in_4bit, but for what is kept by intent.
    fn expected(row: &Row) -> bool {
        let by_intent = |(_, ends): &(Role, &[&str])| ends.iter().any(|end| row.name.ends_with(end));
        row.quantized_by_transformers() && !ALWAYS_KEPT.iter().any(by_intent)
    }

    fn mismatches(class: &Class, rules: &Rules) -> Vec<String> {
        let decided = class.rows.iter().map(|row| (row, rules.classify(&row.name, &shape(row.rank))));
        let wrong = decided.filter(|(row, verdict)| verdict.quantize != expected(row));
        wrong.map(|(row, verdict)| format!("{} {} ({}): {verdict:?}", class.name, row.name, row.kind)).collect()
    }

    fn shape(rank: usize) -> Vec<u64> {
        vec![64; rank]
    }

    /// transformers' should_convert_module, which matches an entry of llm_int8_skip_modules.
    fn skips(entry: &str, module: &str) -> bool {
        let starts = regex::Regex::new(&format!(r"^(?:{entry})(?:\.|$)")).unwrap();
        let matches = starts.is_match(module) || module.ends_with(entry);
        if !entry.contains('\\') {
            assert_eq!(skip_entry_matches(entry, module), matches, "{entry} {module}");
        }
        matches
    }

    #[test]
    fn decisions_equal_transformers_for_every_tensor_of_every_architecture() {
        let mut wrong = Vec::new();
        for class in golden() {
            assert!(class.rules().is_compared(), "{} isn't in COMPARED", class.model_types[0]);
            wrong.extend(mismatches(&class, &class.rules()));
        }
        assert!(wrong.is_empty(), "{} mismatches:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn what_is_kept_by_intent_is_kept_for_its_role() {
        for class in golden() {
            let rules = class.rules();
            for row in class.rows.iter().filter(|row| row.quantized_by_transformers() && !expected(row)) {
                let role = rules.classify(&row.name, &shape(row.rank)).role;
                let listed =
                    |(kept, ends): &(Role, &[&str])| *kept == role && ends.iter().any(|end| row.name.ends_with(end));
                assert!(ALWAYS_KEPT.iter().any(listed), "{} {}: {role:?}", class.name, row.name);
            }
        }
    }

    #[test]
    fn the_list_of_compared_architectures_is_the_golden_files() {
        let mut types: Vec<String> = golden().into_iter().map(|class| class.model_types[0].clone()).collect();
        types.sort();
        types.dedup();
        assert_eq!(types, COMPARED);
    }

    #[test]
    fn roles_agree_with_the_kinds_of_modules() {
        let mut wrong = Vec::new();
        for class in golden() {
            let rules = class.rules();
            for row in &class.rows {
                let role = rules.classify(&row.name, &shape(row.rank)).role;
                let agrees = match row.kind.as_str() {
                    "expert" => role.is_expert(),
                    "embedding" => role == Role::Embedding,
                    "bias" => matches!(role, Role::Bias | Role::ExpertBias),
                    "convolution" => matches!(role, Role::Convolution | Role::PatchEmbedding),
                    "conv1d_transposed" => role == Role::Conv1d,
                    _ => true,
                };
                if !agrees {
                    wrong.push(format!("{} {} ({}): {role:?}", class.name, row.name, row.kind));
                }
            }
        }
        assert!(wrong.is_empty(), "{} mismatches:\n{}", wrong.len(), wrong.join("\n"));
    }

    /// What names and shapes alone get wrong, with no config.json. Each is a fact no name tells.
    const NEEDS_A_MODEL_TYPE: &[(&str, &str)] = &[
        ("FalconForCausalLM", "Linears of a subclass look like Linears"),
        ("T5", "`wo` is kept in f32 by the class"),
        ("UMT5", "`wo` is kept in f32 by the class"),
        ("MT5", "`wo` is kept in f32 by the class"),
        ("Blip2ForConditionalGeneration", "the Q-Former is kept in f32 by the class"),
        ("Zamba2ForCausalLM", "tied blocks look like others"),
        ("CLIPModel", "text_projection is skipped only because it is the last parameter"),
        ("NomicBertModel", "Wqkv is cut in three by this class, not by ModernBERT"),
        ("GPTBigCodeForCausalLM", "GPT-2's names, but Linears: kept, which loses only size"),
        ("GPTNeoForCausalLM", "GPT-2's names, but Linears: kept, which loses only size"),
    ];

    #[test]
    fn names_and_shapes_alone_decide_as_transformers_but_for_a_few_architectures() {
        let rules = Rules::new(&[]);
        let mut wrong = Vec::new();
        for class in golden() {
            let found = mismatches(&class, &rules);
            match NEEDS_A_MODEL_TYPE.iter().any(|(name, _)| class.name.starts_with(name)) {
                true => {
                    assert!(!found.is_empty(), "{} no longer needs its model_type: take it off the list", class.name)
                }
                false => wrong.extend(found),
            }
        }
        assert!(wrong.is_empty(), "{} mismatches:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn every_kept_linear_is_named_as_one_and_its_modules_are_the_models() {
        let mut wrong = Vec::new();
        for class in golden() {
            let rules = class.rules();
            for row in class.rows.iter().filter(|row| row.is_linear()) {
                let verdict = rules.classify(&row.name, &shape(row.rank));
                let mut modules = rules.module_names(&row.name);
                modules.sort();
                if !verdict.linear || !row.modules.iter().all(|module| modules.contains(module)) {
                    wrong.push(format!("{} {}: {modules:?}, not {:?}; {verdict:?}", class.name, row.name, row.modules));
                }
            }
        }
        assert!(wrong.is_empty(), "{} mismatches:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn the_skip_list_matches_every_kept_linear_and_no_quantized_one() {
        let mut wrong = Vec::new();
        for class in golden() {
            let rules = class.rules();
            let linears = || class.rows.iter().filter(|row| row.is_linear());
            let kept = |row: &&Row| !rules.classify(&row.name, &shape(row.rank)).quantize;
            let mut entries: Vec<String> =
                linears().filter(kept).flat_map(|row| rules.module_names(&row.name)).collect();
            entries.extend(rules.off_disk_modules().into_iter().map(str::to_owned));
            let must_skip = linears().filter(kept).flat_map(|row| &row.modules).chain(&class.off_disk);
            for module in must_skip.filter(|module| !entries.iter().any(|entry| skips(entry, module))) {
                wrong.push(format!("{}: {module} isn't skipped", class.name));
            }
            for module in linears().filter(|row| !kept(row)).flat_map(|row| &row.modules) {
                if let Some(entry) = entries.iter().find(|entry| skips(entry, module)) {
                    wrong.push(format!("{}: {entry} skips {module}, which is quantized", class.name));
                }
            }
        }
        assert!(wrong.is_empty(), "{} mismatches:\n{}", wrong.len(), wrong.join("\n"));
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
        assert_eq!(llava.module_names(tensor), ["model.vision_tower.encoder.layers.0.mlp.fc1"]);
        assert_eq!(llava.module_names("language_model.lm_head.weight"), ["lm_head"]);
        assert_eq!(llava.module_names("model.language_model.norm.weight"), ["model.language_model.norm"]);
        let qwen = Rules::new(&["qwen3_5_moe", "qwen3_5_moe_text"]);
        let gate = "model.language_model.layers.0.mlp.shared_expert_gate";
        assert_eq!(qwen.module_names(&format!("{gate}.weight")), [gate, "model.layers.0.mlp.shared_expert_gate"]);
    }
}
