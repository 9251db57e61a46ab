//! What stops transformers from loading experts wrongly and saying nothing.
//!
//! In compressed-tensors' layout it is an entry of `quantization_config` that transformers checks and that servers don't read: it
//! stops no one else, no option of `from_pretrained` passes it, and it outlives a config's being saved. bitsandbytes' layout has no
//! such entry, and needs it less: transformers alone stops at the shapes of 4-bit experts, unless it is told to ignore them. The key
//! that would stop it then, too, also stops clients that load the experts rightly (unsloth) or want no weights at all (`from_config`).

use serde_json::Value;

use super::{Decision, PlannedTensor};
use crate::format::Layout;
use crate::layout::bitsandbytes::{EXPERTS_GUARD, EXPERTS_KEY};
use crate::layout::compressed_tensors::{GUARD_KEY, MISREAD_EXPERTS, RANDOM_EXPERTS};
use crate::models::Rules;
use crate::models::experts::Hub;
use crate::models::families::families;
use crate::models::names::match_end;
use crate::recipe::{Guard, Recipe};

/// What transformers does with 4-bit experts of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Danger {
    /// Without prequant's loader, or unsloth: it stops at their shapes, or fills them with random numbers if told to ignore these.
    NeedsLoader,
    /// It doesn't put single experts together for this architecture: it fills the model's own with random numbers.
    RandomExperts,
    /// It puts them together without the scales of their scales.
    Misread,
}

/// What will happen to the experts that are quantized, if it isn't what should.
pub(super) fn danger(
    recipe: &Recipe,
    rules: &Rules<'_>,
    model_types: &[&str],
    tensors: &[PlannedTensor],
) -> Option<Danger> {
    let is_4_bit = |tensor: &&PlannedTensor| tensor.role.is_expert() && tensor.decision != Decision::Keep;
    let mut experts = tensors.iter().filter(is_4_bit).peekable();
    experts.peek()?;
    let mut experts = experts.map(|tensor| (&*tensor.name, &*tensor.shape));
    let codec = recipe.codec();
    match codec.layout() {
        None => Some(Danger::NeedsLoader),
        // transformers doesn't take ModelOpt's, and has gpt-oss's own.
        Some(Layout::Modelopt | Layout::GptOss) => None,
        // What isn't compared loads by its own code.
        Some(Layout::CompressedTensors) if !rules.is_compared() => None,
        Some(Layout::CompressedTensors) if families(model_types).any(|family| family.single_when_quantized) => None,
        Some(Layout::CompressedTensors) => {
            let mut is_fused = false;
            let is_found = |(name, shape)| {
                let is_part = is_put_together(model_types, name) || rules.is_part_of_fused(name, shape);
                is_fused |= is_part;
                is_part || rules.knows(name, shape)
            };
            match experts.all(is_found) {
                false => Some(Danger::RandomExperts),
                // Linears that each expert has for itself are read as all others.
                true => (is_fused && codec.has_tensor_scale()).then_some(Danger::Misread),
            }
        }
    }
}

/// Whether transformers makes a parameter of all experts out of tensors with this name and its like.
fn is_put_together(model_types: &[&str], name: &str) -> bool {
    let parameters = families(model_types).flat_map(|family| family.experts);
    let mut names = parameters.filter(|parameter| matches!(parameter.hub, Hub::PerExpert)).flat_map(|p| p.per_expert);
    names.any(|pattern| match_end(name, pattern).is_some())
}

/// Puts into config.json what stops transformers: into its `quantization_config`, or as a further entry, which is returned.
pub(super) fn put(
    danger: Option<Danger>,
    guard: Guard,
    quantization_config: &mut Value,
) -> Option<(&'static str, Value)> {
    let why = match (danger?, guard) {
        (_, Guard::Off) | (Danger::NeedsLoader, Guard::Auto) => return None,
        (Danger::NeedsLoader, Guard::Strict) => return Some((EXPERTS_KEY, EXPERTS_GUARD.into())),
        (Danger::RandomExperts, Guard::Auto | Guard::Strict) => RANDOM_EXPERTS,
        (Danger::Misread, Guard::Auto | Guard::Strict) => MISREAD_EXPERTS,
    };
    quantization_config[GUARD_KEY] = why.into();
    None
}

/// What the user should know of it.
pub(super) fn warning(danger: Danger, guard: Guard) -> String {
    let what = match danger {
        Danger::NeedsLoader => {
            "experts are 4-bit: transformers 5 needs prequant's loader for them (`import prequant_loader`), or unsloth"
        }
        Danger::RandomExperts => {
            "transformers doesn't put this architecture's single experts together: it would fill the model's with random numbers"
        }
        Danger::Misread => "transformers reads NVFP4 experts without their global scales, which makes them wrong",
    };
    let then = match (danger, guard) {
        (Danger::NeedsLoader, Guard::Auto | Guard::Off) => {
            "; alone it stops at their shapes, or fills them with random numbers if ignore_mismatched_sizes is set"
        }
        (Danger::NeedsLoader, Guard::Strict) => "; config.json's experts_implementation stops all that don't know them",
        (_, Guard::Off) => ", and nothing in config.json stops it; serve this with vLLM",
        (_, Guard::Auto | Guard::Strict) => "; config.json has it stop. Serve this with vLLM",
    };
    format!("{what}{then}")
}
