//! What the user should know before using the output.

use super::groups::NO_GROUPS;
use super::{Decision, PlannedTensor, clients, gaps, has_4_bit_experts, scale_sets};
use crate::checkpoint::{Config, Source};
use crate::dtype::Dtype;
use crate::error::{Hint, Warning};
use crate::models::families;
use crate::models::{Role, Rules};
use crate::recipe::Recipe;
use crate::units::Bytes;

/// All warnings about a plan; `linear` says of each tensor whether the model makes, or may make, a Linear of it.
pub(super) fn of(
    source: &Source,
    recipe: &Recipe,
    rules: &Rules<'_>,
    tensors: &[PlannedTensor],
    linear: &[bool],
) -> Vec<Warning> {
    let mut warnings: Vec<Warning> = source.notes.clone();
    let quantized = || tensors.iter().zip(linear).filter(|(tensor, _)| tensor.decision != Decision::Keep);
    if source.config.is_none() {
        warnings.push("no config.json beside the weights: rules go by names alone, and clients need one".into());
    } else if let Some(class) = source.config.as_ref().and_then(Config::class_name) {
        let message =
            format!("a diffusers model ({class}): no model of diffusers was compared, rules go by names and shapes");
        warnings.push(Warning { message, hint: Some(Hint::ListTensors) });
        if !recipe.codec().is_blocks() {
            warnings.push("diffusers isn't known to load this layout: nf4 and fp4 it loads".into());
        }
    } else if !rules.is_compared() {
        let message = "this architecture wasn't compared with transformers' own".to_owned();
        warnings.push(Warning { message, hint: Some(Hint::ListTensors) });
    }
    if let Some((tensor, _)) = quantized().find(|(tensor, linear)| !**linear && !tensor.role.is_expert()) {
        let message = "matches an include pattern, but isn't a Linear's: plain transformers won't load it";
        warnings.push(format!("{:?} {message}", tensor.name).into());
    }
    if has_4_bit_experts(recipe, tensors) && recipe.codec().double_quant() && recipe.fuses_experts() {
        warnings.push(
            "double quantization over fused experts is less exact than expert by expert: all of a layer's experts share one \
             mean of absmax, and groups of 256 blocks straddle them; the manifest's statistics tell how much"
                .into(),
        );
    }
    warnings.extend(unknown_names(source, rules, tensors));
    warnings.extend(in_doubt(tensors));
    warnings.extend(gaps::warning(tensors.iter().map(|tensor| &*tensor.name), &rules.expert_counts()));
    warnings.extend(tied_head(source, tensors));
    let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
    warnings.extend(scale_sets::warnings(recipe, &model_types, tensors));
    warnings.extend(clients::odd_rows_warning(&recipe.codec(), tensors));
    warnings.extend(clients::tensor_parallel_warning(&recipe.codec(), tensors));
    if tensors.iter().any(|tensor| tensor.dtype == Dtype::F64) {
        warnings.push("it has F64 tensors, which are copied unchanged".into());
    }
    warnings
}

/// That no class of the model's type has any of what is quantized: a prefix is left in the names, or the type is another's.
fn unknown_names(source: &Source, rules: &Rules<'_>, tensors: &[PlannedTensor]) -> Option<Warning> {
    let model_type = *source.config.as_ref()?.model_types().first()?;
    // Experts that were split are under new names.
    let is_linear = |tensor: &&PlannedTensor| tensor.decision != Decision::Keep && tensor.role == Role::Linear;
    let mut quantized = tensors.iter().filter(is_linear).peekable();
    let first = quantized.peek()?.name.clone();
    let known = !rules.is_compared() || quantized.any(|tensor| rules.knows(&tensor.name, &tensor.shape));
    (!known).then(|| {
        format!(
            "no class of {model_type:?} has any of the Linears that are quantized, first {first:?}: transformers won't find them; \
             do their names have a prefix too many, or is the model_type another's?"
        )
        .into()
    })
}

/// How much is kept because nothing says for certain what it is.
fn in_doubt(tensors: &[PlannedTensor]) -> Option<Warning> {
    let kept: Vec<&PlannedTensor> = tensors.iter().filter(|tensor| tensor.in_doubt).collect();
    let bytes = Bytes(kept.iter().map(|tensor| tensor.source_len()).sum());
    let largest = kept.iter().max_by_key(|tensor| tensor.source_len())?;
    let message = match &kept[..] {
        [one] => format!("{:?} ({bytes}) is kept because it may be no Linear's ({})", one.name, one.why()),
        all => format!(
            "{} tensors ({bytes}) are kept because they may be no Linear's, the largest {:?} ({})",
            all.len(),
            largest.name,
            largest.why()
        ),
    };
    Some(Warning { message, hint: Some(Hint::IncludeDoubtful) })
}

/// A quantized head that config.json, or its absence there, ties to the embedding: some clients load the embedding in its place.
fn tied_head(source: &Source, tensors: &[PlannedTensor]) -> Option<Warning> {
    let config = source.config.as_ref()?;
    let tie = "tie_word_embeddings";
    let nested = config.values().values().filter_map(serde_json::Value::as_object);
    let ties = std::iter::once(config.values()).chain(nested).find_map(|config| config.get(tie)?.as_bool());
    let head = tensors.iter().find(|tensor| tensor.role == Role::OutputHead && tensor.decision != Decision::Keep)?;
    let who = match ties {
        Some(true) => "config.json",
        None if families::ties_by_default(&config.model_types()) => "this architecture, by default,",
        _ => return None,
    };
    let message = format!(
        "{:?} is quantized, but {who} ties it to the embedding, which some clients use in its place: \"{tie}\" must be false",
        head.name
    );
    Some(message.into())
}

/// A share of the source's bytes above which it is worth a word that they stay in 16 bits.
const NOTABLE: f64 = 0.1;

impl PlannedTensor {
    /// Its reason, without what follows from it.
    fn why(&self) -> &str {
        self.reason.trim_end_matches("kept in its dtype").trim_end_matches([' ', ':', ';', ','])
    }
}

/// That much of the checkpoint isn't quantized, and the largest tensor of it with the reason.
pub(super) fn left_in_16_bits(tensors: &[PlannedTensor]) -> Option<Warning> {
    let wide = |tensor: &&PlannedTensor| {
        tensor.decision == Decision::Keep && matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
    };
    let all: u64 = tensors.iter().map(PlannedTensor::source_len).sum();
    let kept: u64 = tensors.iter().filter(wide).map(PlannedTensor::source_len).sum();
    let share = kept as f64 / all.max(1) as f64;
    let largest = tensors.iter().filter(wide).max_by_key(|tensor| tensor.source_len()).filter(|_| share > NOTABLE)?;
    let (percent, size) = ((share * 100.0).round(), Bytes(largest.source_len()));
    let message = format!(
        "{percent} % of the source's bytes aren't quantized; the largest is {:?} ({size}): {}",
        largest.name,
        largest.why()
    );
    // Its columns decided, and fewer to a group divide them.
    let by_columns = largest.reason.contains(NO_GROUPS) && largest.shape.len() == 2;
    let smaller = [64, 32].into_iter().find(|size| by_columns && largest.columns().is_multiple_of(*size));
    Some(Warning { message, hint: smaller.map(Hint::GroupSize) })
}
