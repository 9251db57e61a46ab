//! Which of a module's parameters each of its wrappers is of.
//!
//! PEFT wraps a module once for each of its parameters that is targeted, in the order in which the model's class defines them: the
//! first is innermost, and its tensors are called `experts.base_layer.lora_A`; the last one's are called `experts.lora_A`. Where
//! parameters are parametrized, as 4-bit ones are, it wraps them in the order of their names instead. Shapes tell which it was.

/// Parameters of experts in the order in which transformers' classes define them.
const IN_ORDER: [&str; 8] = [
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
    "weight",
];

/// Puts parameters in the order in which a class defines them.
pub(super) fn sort(parameters: &mut [String]) {
    let place = |name: &String| IN_ORDER.iter().position(|known| known == name).unwrap_or(IN_ORDER.len());
    parameters.sort_by_key(place);
}

/// The parameter of each wrapper, outermost first, by the order in which they were wrapped; `fits` tells whether a wrapper's tensors
/// can be a parameter's. Also whether it was the order of their names. None if neither fits.
pub(super) fn assign(
    parameters: usize,
    fits: impl Fn(usize, usize) -> bool,
    by_name: &[usize],
) -> Option<(Vec<usize>, bool)> {
    let defined: Vec<usize> = (0..parameters).rev().collect();
    let named: Vec<usize> = by_name.iter().rev().copied().collect();
    let all_fit = |order: &[usize]| order.iter().enumerate().all(|(wrapper, parameter)| fits(wrapper, *parameter));
    if all_fit(&defined) {
        return Some((defined, false));
    }
    all_fit(&named).then_some((named, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_parameter_is_innermost_unless_shapes_say_otherwise() {
        // gate_up_proj and down_proj, whose names are in the other order.
        assert_eq!(assign(2, |_, _| true, &[1, 0]), Some((vec![1, 0], false)));
        assert_eq!(assign(2, |wrapper, parameter| wrapper != parameter, &[1, 0]), Some((vec![1, 0], false)));
        assert_eq!(assign(2, |wrapper, parameter| wrapper == parameter, &[1, 0]), Some((vec![0, 1], true)));
        assert_eq!(assign(2, |wrapper, _| wrapper == 0, &[1, 0]), None);
        assert_eq!(assign(1, |_, _| true, &[0]), Some((vec![0], false)));
    }

    #[test]
    fn parameters_are_sorted_as_classes_define_them() {
        let mut names = ["down_proj", "gate_up_proj"].map(str::to_owned);
        sort(&mut names);
        assert_eq!(names, ["gate_up_proj", "down_proj"]);
    }
}
