//! How a layer's experts lie in transformers' own parameters, for families without a row: by what its classes say of themselves, or do.
//!
//! Such checkpoints can be split as those of the families that have one. What one expert's matrices are called then, no client
//! says: they get the names that llm-compressor gives them.

use super::experts::{ExpertParameter, Hub, Orientation, Split, fused};
use super::families::families;

/// A line for each layout, with the model types that have it; from `scripts/make expert-layouts`.
const LAYOUTS: &str = include_str!("data/expert_layouts.txt");

/// transformers' names for them.
const PARAMETERS: &[ExpertParameter] = &[
    fused("experts.gate_up_proj", &["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]),
    fused("experts.up_proj", &["experts.*.up_proj.weight"]),
    fused("experts.down_proj", &["experts.*.down_proj.weight"]),
];

/// The biases beside them, each element of which is a row.
const BIASES: &[ExpertParameter] = &[
    fused("experts.gate_up_proj_bias", &["experts.*.gate_proj.bias", "experts.*.up_proj.bias"]),
    fused("experts.up_proj_bias", &["experts.*.up_proj.bias"]),
    fused("experts.down_proj_bias", &["experts.*.down_proj.bias"]),
];

/// How the experts of the first of these types that transformers has any of are taken apart; nothing if their classes don't say how
/// they lie.
pub(crate) fn splits(model_types: &[&str]) -> Vec<Split> {
    let Some(layout) = model_types.iter().find_map(|model_type| layout_of(model_type)) else { return Vec::new() };
    let (transposed, interleaved) = (layout.starts_with("transposed"), layout.ends_with("interleaved"));
    let orientation = if transposed { Orientation::Transposed } else { Orientation::Rows };
    let matrices = PARAMETERS.iter().flat_map(ExpertParameter::splits).map(|split| Split { orientation, ..split });
    let biases = BIASES.iter().flat_map(ExpertParameter::splits);
    let biases = biases.map(|split| Split { orientation: Orientation::Transposed, ..split });
    // One matrix alone alternates with none.
    let alternating = |split: Split| Split { interleaved: interleaved && split.targets.len() > 1, ..split };
    let mut all: Vec<Split> = matrices.chain(biases).map(alternating).collect();
    let hub =
        families(model_types).flat_map(|family| family.experts).filter(|parameter| parameter.per_expert.is_empty());
    all.extend(hub.filter_map(|parameter| on_the_hub(parameter, &all)).collect::<Vec<_>>());
    all
}

/// The same of a parameter that the hub has under another name.
fn on_the_hub(parameter: &ExpertParameter, own: &[Split]) -> Option<Split> {
    let Hub::Stacked([name]) = parameter.hub else { return None };
    let split = own.iter().find(|split| parameter.parameter.ends_with(split.fused))?;
    let around = parameter.parameter.strip_suffix(split.fused)?;
    Some(Split { fused: name.strip_prefix(around)?, ..*split })
}

/// Whether a model of these types has its experts' parameters as `[experts, in, out]`, as far as their classes say so.
pub(crate) fn is_transposed(model_types: &[&str]) -> bool {
    let layout = model_types.iter().find_map(|model_type| layout_of(model_type));
    layout.is_some_and(|layout| layout.starts_with("transposed"))
}

fn layout_of(model_type: &str) -> Option<&'static str> {
    let lines = LAYOUTS.lines().filter_map(|line| line.split_once(": ")).filter(|(layout, _)| !layout.starts_with('#'));
    let mut lines = lines.filter(|(_, types)| types.split(' ').any(|found| found == model_type));
    lines.next().map(|(layout, _)| layout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::families::FAMILIES;

    #[test]
    fn families_with_a_row_lie_as_their_classes_say() {
        let mut compared = 0;
        for family in FAMILIES {
            let weights = family.experts.iter().filter(|parameter| !parameter.parameter.ends_with("bias"));
            let fused = weights.filter(|parameter| matches!(parameter.hub, Hub::Parameter));
            for (parameter, model_type) in fused.flat_map(|p| family.model_types.iter().map(move |t| (p, t))) {
                let mut own = splits(&[model_type]).into_iter();
                // Llama 4's class runs by its own code.
                let Some(own) = own.find(|split| parameter.parameter.ends_with(split.fused)) else { continue };
                let row = parameter.splits()[0];
                // Checkpoints have either where config.json tells.
                let alike = own.orientation == row.orientation || matches!(row.orientation, Orientation::ByConfig(_));
                assert!(alike && own.targets.len() == row.targets.len(), "{model_type}: {own:?} {row:?}");
                assert_eq!(own.interleaved, row.interleaved && row.targets.len() > 1, "{model_type}");
                compared += 1;
            }
        }
        assert!(compared >= 8, "{compared}");
    }

    #[test]
    fn types_whose_classes_do_not_say_how_experts_lie_have_no_layout() {
        for model_type in ["never-heard-of", "jetmoe", "llama", "#", "rows"] {
            assert!(splits(&[model_type]).is_empty(), "{model_type}");
        }
        assert_eq!(splits(&["llama", "hy_v4"]).len(), 6, "a wrapper's own type says nothing");
    }
}
