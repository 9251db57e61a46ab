//! Tests of rules and rows against every tensor of the models in `../data/architectures.json`, as transformers sees it.

use serde_json::Value;

use crate::models::experts::ExpertParameter;
use crate::models::families::families;
use crate::models::names::match_end;
use crate::models::{Role, Rules};

const GOLDEN: &str = include_str!("../data/architectures.json");

/// A tensor as transformers sees it.
struct Row {
    name: String,
    rank: usize,
    kind: String,
    skipped: bool,
    rearranged: bool,
    modules: Vec<String>,
    parameters: Vec<String>,
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
        parameters: value.get("parameters").map(strings).unwrap_or_default(),
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
        &["classifier.weight", "classifier.out_proj.weight", "cls.seq_relationship.weight", "pre_classifier.weight"],
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
    starts.is_match(module) || module.ends_with(entry)
}

#[test]
fn decisions_equal_transformers_for_every_tensor_of_every_architecture() {
    let mut wrong = Vec::new();
    for class in golden() {
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
        let mut entries: Vec<String> = linears().filter(kept).flat_map(|row| rules.module_names(&row.name)).collect();
        entries.extend(rules.off_disk_modules());
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

#[test]
fn experts_are_named_as_one_of_their_familys_forms() {
    for class in golden() {
        let model_types: Vec<&str> = class.model_types.iter().map(String::as_str).collect();
        let parameters = || families(&model_types).flat_map(|family| family.experts);
        for row in class.rows.iter().filter(|row| row.kind == "expert") {
            let sources = parameters().filter_map(ExpertParameter::fusion).flat_map(|fusion| fusion.sources);
            let one_by_one = parameters().flat_map(|parameter| parameter.per_expert);
            let mut names = sources.chain(one_by_one);
            assert!(names.any(|end| match_end(&row.name, end).is_some()), "{} {}", class.name, row.name);
            for made in &row.parameters {
                let mut fusions = parameters().filter_map(ExpertParameter::fusion);
                let fusion = fusions.find(|fusion| fusion.source_of(&row.name).is_some()).unwrap();
                assert!(match_end(made, fusion.target).is_some(), "{} {made}: {fusion:?}", class.name);
            }
        }
    }
}
