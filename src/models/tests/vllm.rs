//! Tests of names that vLLM loads and merges, from `../data/vllm.json`.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::models::facts;
use crate::models::families::families;
use crate::models::merged_linears;

/// Sets that are left apart, and why.
const EXCEPTIONS: &[(&[&str], &str)] = &[
    (&["k", "q", "v"], "of vision towers and audio encoders, which serve in 16 bits"),
    (&["k_proj", "v_proj"], "within q, k and v: cross attention's query stands beside them and shares the scale too"),
    (&["k_proj", "q_proj"], "within q, k and v"),
    (&["b_proj", "k_proj", "q_proj", "v_proj"], "q, k and v share; the rest of linear attention's is small"),
    (
        &["b_proj", "f_a_proj", "k_proj", "q_proj", "v_proj"],
        "q, k and v share; the rest of linear attention's is small",
    ),
    (&["g_proj", "k_proj", "q_proj", "v_proj"], "q, k and v share; the rest of linear attention's is small"),
    (&["k_conv1d", "q_conv1d", "v_conv1d"], "convolutions, which are kept"),
    (&["fc1", "fc3"], "of vision towers"),
    (&["weights_proj", "wk"], "of sparse attention's indexer, whose weights_proj is kept"),
    (&["c_fc_0", "c_fc_1"], "of one architecture, EXAONE 3"),
    (&["dense_h_to_4h", "gate_proj"], "of one vision tower"),
    (&["key_net", "query_net", "value_net"], "of one audio model"),
    (&["key_net", "value_net"], "of one audio model"),
    (&["wk", "wq", "wv"], "of one vision tower"),
];

fn vllm() -> Value {
    serde_json::from_str(include_str!("../data/vllm.json")).unwrap()
}

#[test]
fn experts_taken_apart_are_named_as_vllm_loads_them() {
    let vllm = vllm();
    let mut compared = 0;
    for known in facts::all() {
        let Some(model) = vllm["models"].get(known.class) else { continue };
        let model_types = [known.model_type];
        for family in families(&model_types) {
            let weights = family.experts.iter().flat_map(|parameter| parameter.per_expert);
            let weights = weights.filter_map(|name| name.strip_suffix(".weight")?.rsplit('.').next());
            let weights: Vec<&str> = weights.collect();
            if !weights.is_empty() {
                assert_eq!(serde_json::json!(weights), model["experts"], "{model_types:?}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 10, "{compared}");
}

#[test]
fn what_vllm_puts_together_shares_a_scale_or_is_known_not_to() {
    let list = vllm();
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
    let shared: Vec<_> = merged_linears::sets().map(names).collect();
    let mut exceptions: Vec<_> = EXCEPTIONS.iter().map(|(set, _)| names(set)).collect();
    let mut known = 0;
    for fused in list["fused"].as_array().unwrap() {
        let members: BTreeSet<String> = serde_json::from_value(fused["members"].clone()).unwrap();
        if shared.contains(&members) {
            known += 1;
            continue;
        }
        let place = exceptions.iter().position(|set| *set == members);
        exceptions.remove(place.unwrap_or_else(|| panic!("vLLM puts {members:?} together")));
    }
    assert_eq!(exceptions, [], "no longer in the list");
    assert!(known >= 6, "{known}");
}
