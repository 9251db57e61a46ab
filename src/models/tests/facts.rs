//! Tests of rules and rows against every class of every model type, as `../data/facts.txt` has them from transformers. What becomes
//! of the modules' lists is tested beside these (`plan/kept_modules`).

use std::collections::BTreeSet;

use crate::models::experts::ExpertParameter;
use crate::models::facts::{self, Kind};
use crate::models::families::{FAMILIES, families};
use crate::models::names::match_end;
use crate::models::{Role, Rules, Verdict};

/// A name with a layer's and an expert's number for every `*`.
fn numbered(name: &str) -> String {
    name.replace('*', "3")
}

fn shape(rank: usize) -> Vec<u64> {
    vec![64; rank]
}

/// Each tensor of a class, with its number of dimensions and its kinds: more than one if layers differ.
fn tensors(known: &facts::Known) -> Vec<(String, usize, Vec<Kind>)> {
    let of_name = |(name, kinds): &(String, Vec<(Kind, usize)>)| {
        let ranks: BTreeSet<usize> = kinds.iter().map(|(_, rank)| *rank).collect();
        let of_rank = |rank| kinds.iter().filter(|(_, of)| *of == rank).map(|(kind, _)| *kind).collect();
        ranks.into_iter().map(|rank| (numbered(name), rank, of_rank(rank))).collect::<Vec<_>>()
    };
    known.tensors.iter().flat_map(of_name).collect()
}

fn rules(known: &facts::Known) -> Rules<'static> {
    Rules::new(&[known.model_type]).of_classes(&[known.class])
}

/// Linears that load_in_4bit quantizes and we keep by intent, for these roles.
const ALWAYS_KEPT: [Role; 4] = [Role::Router, Role::SharedExpertGate, Role::OutputHead, Role::PatchEmbedding];

#[test]
fn what_is_quantized_is_what_transformers_makes_4_bit_and_experts_in_every_class_of_every_type() {
    let (mut wrong, mut quantized) = (Vec::new(), 0);
    for known in facts::all() {
        let rules = rules(&known);
        for (name, rank, kinds) in tensors(&known) {
            let verdict = rules.classify(&name, &shape(rank));
            let is_quantizable = kinds.iter().all(|kind| matches!(kind, Kind::Linear | Kind::Experts));
            quantized += usize::from(verdict.quantize);
            if verdict.quantize != (is_quantizable && !ALWAYS_KEPT.contains(&verdict.role)) {
                wrong.push(format!("{} {} {name}: {kinds:?}, {verdict:?}", known.model_type, known.class));
            }
        }
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
    assert!(quantized > 10_000, "{quantized}");
}

/// The role of a matrix of this kind, and whether transformers makes a Linear of it; where names decide, what they said.
fn expected(kind: Kind, verdict: &Verdict) -> (Role, bool) {
    match kind {
        Kind::Linear | Kind::Cut | Kind::Fp32 | Kind::Tied => (verdict.role, true),
        Kind::Head | Kind::Labels | Kind::Last => (Role::OutputHead, true),
        Kind::InRouter => (Role::Router, true),
        Kind::Conv1d => (Role::Conv1d, true),
        Kind::Subclass => (Role::Linear, false),
        Kind::Embedding => (Role::Embedding, false),
        Kind::Router => (Role::Router, false),
        Kind::Experts => (Role::ExpertLinear, false),
        Kind::Convolution | Kind::Parameter | Kind::Buffer | Kind::Bias => {
            (verdict.role, verdict.linear && verdict.quantize)
        }
    }
}

#[test]
fn what_is_a_linear_may_be_listed_and_nothing_else_and_roles_agree_with_kinds() {
    let mut wrong = Vec::new();
    for known in facts::all() {
        let rules = rules(&known);
        for (name, rank, kinds) in tensors(&known).into_iter().filter(|(_, rank, _)| *rank == 2) {
            let verdict = rules.classify(&name, &shape(rank));
            let [kind] = kinds[..] else { continue };
            let (role, is_linear) = expected(kind, &verdict);
            if verdict.linear != is_linear || verdict.role != role {
                wrong.push(format!("{} {} {name}: {kind:?}, {verdict:?}", known.model_type, known.class));
            }
        }
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn experts_are_named_as_one_of_their_familys_forms_and_become_its_parameters() {
    let (mut wrong, mut compared) = (BTreeSet::new(), 0);
    for known in facts::all() {
        let parameters = || families(std::slice::from_ref(&known.model_type)).flat_map(|family| family.experts);
        let ends = || {
            let sources = parameters().filter_map(ExpertParameter::fusion).flat_map(|fusion| fusion.sources);
            sources.chain(parameters().flat_map(|of| of.per_expert)).copied().chain(parameters().map(|of| of.parameter))
        };
        for (name, rank, _) in tensors(&known).into_iter().filter(|(.., kinds)| kinds.contains(&Kind::Experts)) {
            compared += usize::from(ends().next().is_some());
            if ends().next().is_some() && !ends().any(|end| match_end(&name, end).is_some()) {
                wrong.insert(format!("{} {name} of {rank} dimensions", known.model_type));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(compared > 200, "{compared}");
}

#[test]
fn a_number_that_decides_what_a_tensor_becomes_is_told_from_those_of_layers() {
    let modules = |model_type: &str, tensor: &str| Rules::new(&[model_type]).module_names(tensor)[0].clone();
    let transcribe = |number| format!("perception.encoder.asr_encoder.layers.17.ffn.net.{number}.weight");
    let become_of = |number| modules("nemo_speechlm", &transcribe(number));
    assert_eq!(become_of(0), "model.audio_tower.asr_encoder.layers.17.mlp.fc1");
    assert_eq!(become_of(3), "model.audio_tower.asr_encoder.layers.17.mlp.fc2");
    // A number that stays is a module's own name, and that of a layer isn't bound to the default config's.
    assert_eq!(modules("d_fine", "model.decoder.layers.11.fc2.weight"), "model.decoder.layers.11.mlp.layers.1");
    let backbone = modules("rf_detr", "backbone.0.encoder.encoder.encoder.layer.23.mlp.fc1.weight");
    assert!(backbone.ends_with("backbone.backbone.encoder.layer.23.mlp.fc1"), "{backbone}");
}

#[test]
fn a_tensor_belongs_to_several_modules_only_where_its_rows_are_cut() {
    let mut wrong = BTreeSet::new();
    for known in facts::all() {
        let facts = facts::Facts::new(&[known.model_type]).unwrap().of_classes(&[known.class]).of_first();
        for (name, rank, kinds) in tensors(&known) {
            let modules = facts.modules(&name);
            if modules.len() > 1 && !kinds.contains(&Kind::Cut) {
                wrong.insert(format!(
                    "{} {} {name} of {rank} dimensions, {kinds:?}: {modules:?}",
                    known.model_type, known.class
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn types_with_rows_are_transformers() {
    let known: BTreeSet<&str> = facts::all().map(|known| known.model_type).collect();
    let not_built = include_str!("../data/not-built.txt");
    for model_type in FAMILIES.iter().flat_map(|family| family.model_types) {
        let is_listed = not_built.lines().any(|line| line.split([' ', ':']).next() == Some(*model_type));
        assert!(known.contains(model_type) || is_listed, "{model_type}");
    }
}
