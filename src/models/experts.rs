//! A layer's experts as the hub's checkpoints have them and as the model does: one description, read both ways.
//!
//! In transformers 5 a layer's experts are a few 3-D parameters. Checkpoints on the hub have the same numbers in other
//! shapes, mostly a tensor per expert and projection. [`ExpertParameter::fusion`] puts them together as transformers
//! does when it loads a checkpoint; [`ExpertParameter::splits`] takes a parameter apart, for formats
//! whose clients want a tensor per expert. Which family has which is in [`super::families`].

use crate::checkpoint::Config;
use crate::models::names::match_end;

/// One of the model's parameters for all experts of a layer. Names are ends of tensors' names, after a dot.
#[derive(Debug)]
pub(crate) struct ExpertParameter {
    /// The model's name for it.
    pub parameter: &'static str,
    /// The names of one expert's matrices, `*` being its number, in the order of their rows in the parameter. Empty if
    /// no client knows such names.
    pub per_expert: &'static [&'static str],
    /// What the hub's checkpoints have.
    pub hub: Hub,
    /// How the matrices lie in a tensor of all experts.
    pub orientation: Orientation,
    /// Whether the matrices' rows alternate (gate, up, gate, up, ...) rather than follow each other.
    pub interleaved: bool,
}

/// What the hub's checkpoints have.
#[derive(Debug)]
pub(crate) enum Hub {
    /// A tensor per expert and projection.
    PerExpert,
    /// The model's own parameter.
    Parameter,
    /// Tensors of all experts under these names; several are concatenated along the rows, expert by expert.
    Stacked(&'static [&'static str]),
}

/// What the last two dimensions of a tensor of all experts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Orientation {
    /// Rows and columns, as in an `nn.Linear`.
    Rows,
    /// Columns and rows.
    Transposed,
    /// Rows and columns in the model, either in checkpoints: config.json tells by the shape.
    ByConfig(Shape),
}

/// The shape of a model's parameter, by the config's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `[experts, 2 * moe_intermediate_size, hidden_size]`.
    GateUp,
    /// `[experts, hidden_size, moe_intermediate_size]`.
    Down,
}

/// How a parameter is made of the hub's tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fusion {
    /// The tensors on disk. Those with a `*` are one expert's matrix `[rows, columns]`, others all experts'
    /// `[experts, rows, columns]`; several are concatenated along the rows, expert by expert.
    pub sources: &'static [&'static str],
    /// What stands in the parameter's name for the source's.
    pub target: &'static str,
    /// Where checkpoints exist with rows and columns exchanged: the shape that isn't.
    pub transposed_unless: Option<Shape>,
}

/// How a tensor of all experts is taken apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Split {
    /// The tensor of all experts.
    pub fused: &'static str,
    /// What stands in its name for one expert's matrices.
    pub targets: &'static [&'static str],
    /// How the matrices lie.
    pub orientation: Orientation,
    /// Whether their rows alternate.
    pub interleaved: bool,
}

/// Experts that the hub has one by one: the tensors of one expert, and the model's parameter.
pub(crate) const fn one_by_one(per_expert: &'static [&'static str], parameter: &'static str) -> ExpertParameter {
    let (hub, orientation) = (Hub::PerExpert, Orientation::Rows);
    ExpertParameter { parameter, per_expert, hub, orientation, interleaved: false }
}

/// Experts that the hub has as the model does, and what one expert's matrices are called.
pub(crate) const fn fused(parameter: &'static str, per_expert: &'static [&'static str]) -> ExpertParameter {
    let (hub, orientation) = (Hub::Parameter, Orientation::Rows);
    ExpertParameter { parameter, per_expert, hub, orientation, interleaved: false }
}

/// Experts that the hub has in tensors of all experts, but not the model's.
pub(crate) const fn stacked(
    names: &'static [&'static str],
    parameter: &'static str,
    per_expert: &'static [&'static str],
) -> ExpertParameter {
    let (hub, orientation) = (Hub::Stacked(names), Orientation::Rows);
    ExpertParameter { parameter, per_expert, hub, orientation, interleaved: false }
}

impl ExpertParameter {
    /// The same with matrices that lie so.
    pub(crate) const fn lying(self, orientation: Orientation) -> ExpertParameter {
        ExpertParameter { orientation, ..self }
    }

    /// The same with rows that alternate between the matrices.
    pub(crate) const fn interleaved(self) -> ExpertParameter {
        ExpertParameter { interleaved: true, ..self }
    }

    /// Towards the model. Biases are left alone: they aren't quantized, and where experts have some the hub has them as the model
    /// does.
    pub(crate) fn fusion(&'static self) -> Option<Fusion> {
        let sources = match self.hub {
            Hub::PerExpert => self.per_expert,
            Hub::Parameter => std::slice::from_ref(&self.parameter),
            Hub::Stacked(names) => names,
        };
        let transposed_unless = match self.orientation {
            Orientation::ByConfig(shape) => Some(shape),
            Orientation::Rows | Orientation::Transposed => None,
        };
        (!self.parameter.ends_with("bias")).then_some(Fusion { sources, target: self.parameter, transposed_unless })
    }

    /// Towards a tensor per expert and projection: of each tensor that a checkpoint has, or of none.
    pub(crate) fn splits(&self) -> Vec<Split> {
        let ExpertParameter { per_expert, orientation, interleaved, .. } = *self;
        let split = |fused, targets| Split { fused, targets, orientation, interleaved };
        match self.hub {
            _ if per_expert.is_empty() => Vec::new(),
            Hub::PerExpert | Hub::Parameter => vec![split(self.parameter, per_expert)],
            Hub::Stacked([name]) => vec![split(name, per_expert)],
            // Each is of all experts, and of one of the matrices.
            Hub::Stacked(names) => names.iter().zip(per_expert.chunks(1)).map(|(name, one)| split(name, one)).collect(),
        }
    }
}

impl Fusion {
    /// What `name` is of the sources: what comes before the part that is replaced, which source, and which expert's (none
    /// if it is all experts').
    pub(crate) fn source_of<'n>(&self, name: &'n str) -> Option<(&'n str, usize, Option<usize>)> {
        self.sources.iter().enumerate().find_map(|(i, pattern)| {
            let (prefix, expert) = match_end(name, pattern)?;
            Some((prefix, i, expert))
        })
    }
}

impl Shape {
    /// Whether a fused tensor of this `shape` has rows and columns exchanged, by the config's numbers.
    pub(crate) fn is_transposed(self, config: Option<&Config>, shape: &[u64]) -> Result<bool, String> {
        let number = |key: &str| {
            let values = config?.values();
            let nested = values.get("text_config").and_then(|text| text.get(key));
            nested.or_else(|| values.get(key)).and_then(serde_json::Value::as_u64)
        };
        let (Some(hidden), Some(intermediate)) = (number("hidden_size"), number("moe_intermediate_size")) else {
            return Err("config.json has no hidden_size or no moe_intermediate_size to tell its layout by".to_owned());
        };
        let expected = match self {
            Shape::GateUp => [intermediate.saturating_mul(2), hidden],
            Shape::Down => [hidden, intermediate],
        };
        match shape {
            [_, found @ ..] if found == expected => Ok(false),
            [_, found @ ..] if found == [expected[1], expected[0]] => Ok(true),
            found => {
                let [rows, columns] = expected;
                Err(format!(
                    "its shape is {found:?}, and config.json makes it [_, {rows}, {columns}] or [_, {columns}, {rows}]"
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &[&str] = &["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"];
    static GATE_UP: ExpertParameter = one_by_one(SOURCES, "mlp.experts.gate_up_proj");

    #[test]
    fn names_are_matched_part_by_part_from_their_end() {
        let fusion = GATE_UP.fusion().unwrap();
        let of = |name| fusion.source_of(name);
        assert_eq!(of("model.layers.3.mlp.experts.12.up_proj.weight"), Some(("model.layers.3", 1, Some(12))));
        assert_eq!(of("mlp.experts.0.gate_proj.weight"), Some(("", 0, Some(0))));
        for other in [
            "model.layers.3.mlp.shared_experts.gate_proj.weight",
            "model.layers.3.mlp.experts.x.gate_proj.weight",
            "model.layers.3.mlp.experts.01.gate_proj.weight",
            "model.layers.3.mlp.experts.1.gate_proj.bias",
            "model.layers.3.xmlp.experts.1.gate_proj.weight",
            "experts.1.gate_proj.weight",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn both_readings_are_of_one_description() {
        let (fusion, splits) = (GATE_UP.fusion().unwrap(), GATE_UP.splits());
        assert_eq!((fusion.sources, fusion.target), (splits[0].targets, splits[0].fused));
        static BIAS: ExpertParameter = fused("experts.down_proj_bias", &["experts.*.down_proj.bias"]);
        assert!(BIAS.fusion().is_none());
        assert_eq!(BIAS.splits()[0].targets, BIAS.per_expert);
        static APART: ExpertParameter = stacked(&["moe.gate.weight", "moe.up.weight"], "experts.gate_up_proj", SOURCES);
        assert_eq!(APART.fusion().unwrap().sources.len(), 2);
        let apart = APART.splits();
        assert_eq!(apart.iter().map(|split| split.fused).collect::<Vec<_>>(), ["moe.gate.weight", "moe.up.weight"]);
        assert!(apart.iter().map(|split| split.targets).eq(SOURCES.chunks(1)), "a matrix of each expert in each");
        static NAMELESS: ExpertParameter = stacked(&["moe.gate.weight"], "experts.gate_proj", &[]);
        assert!(NAMELESS.splits().is_empty());
    }
}
