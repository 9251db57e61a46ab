//! Tests of what names alone say, as for an architecture that nobody knows, against what transformers makes of every class of
//! every type that it has.

use std::collections::BTreeSet;

use crate::models::facts::{self, Kind};
use crate::models::{Role, Rules};

/// Matrices that are no Linears, or that clients must have in 16 bits: names must not take them for certain Linears.
fn must_be_kept(kind: Kind) -> bool {
    matches!(kind, Kind::Embedding | Kind::Conv1d | Kind::Router | Kind::InRouter | Kind::Head | Kind::Labels)
}

/// Last names of matrices that only a model's code tells from Linears: too few of hundreds to doubt all of that name.
const ONLY_CODE_TELLS: &[&str] = &["query"];

fn last_name(tensor: &str) -> &str {
    let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
    module.rsplit('.').find(|part| *part != "*" && !part.bytes().all(|byte| byte.is_ascii_digit())).unwrap_or(module)
}

#[test]
fn names_alone_take_no_table_head_or_router_for_a_linear_and_doubt_few_linears() {
    let rules = Rules::new(&["never_heard_of"]);
    let (mut wrong, mut linears, mut kept) = (BTreeSet::new(), 0, 0);
    for known in facts::all() {
        for (name, kinds) in &known.tensors {
            for (kind, rank) in kinds.iter().filter(|(_, rank)| *rank == 2) {
                let verdict = rules.classify(&name.replace('*', "3"), &vec![64; *rank]);
                if must_be_kept(*kind) && verdict.quantize && !ONLY_CODE_TELLS.contains(&last_name(name)) {
                    wrong.insert(format!("{} {name}: {kind:?}", known.model_type));
                }
                if matches!(kind, Kind::Linear | Kind::Experts) {
                    (linears, kept) = (linears + 1, kept + usize::from(!verdict.quantize));
                    let says_so = verdict.quantize || verdict.in_doubt || verdict.role != Role::Unknown;
                    assert!(says_so, "{} {name}: {verdict:?}", known.model_type);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {linears}, {kept} kept: {wrong:#?}", wrong.len());
    assert!(kept * 8 < linears, "{kept} of {linears} Linears are kept");
}
