//! Linears that clients merge into one when they load them (vLLM's packed_modules_mapping), by their modules' last names.
//!
//! These names mean the same in every family that has them, so they are looked up without one. `tests/vllm.rs`
//! compares them with `data/vllm.json`.

use crate::models::families::FAMILIES;

/// Names of modules beside each other that become one; families add names of their own to these.
const COMMON: &[&[&str]] = &[
    &["q_proj", "k_proj", "v_proj"],
    &["query", "key", "value"],
    &["gate_proj", "up_proj"],
    &["w1", "w3"],
    &["q_a_proj", "kv_a_proj_with_mqa"],
];

/// All sets of names.
pub(crate) fn sets() -> impl Iterator<Item = &'static [&'static str]> {
    COMMON.iter().chain(FAMILIES.iter().flat_map(|family| family.merged_linears)).copied()
}

/// The set that a module of this last name is merged with.
pub(crate) fn set_of(name: &str) -> Option<&'static [&'static str]> {
    sets().find(|names| names.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_in_two_different_sets() {
        for names in sets() {
            assert!(names.iter().all(|name| set_of(name) == Some(names)), "{names:?}");
        }
    }
}
