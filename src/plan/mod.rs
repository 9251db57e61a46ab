//! What becomes of every tensor, and where it goes: a pure function of headers, config and recipe.
//!
//! Once a [`Plan`] stands, every output byte has its file and offset; executing it decides nothing any more.

pub mod architectures;
mod decide;
mod layout;
mod recipe;
pub mod rules;
pub mod skip_modules;

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::Value;

pub use layout::{PlannedFile, PlannedOutput};
pub use recipe::{ExpertLayout, NonFinitePolicy, Recipe};
pub use rules::Role;

use crate::checkpoint::{CONFIG_NAME, Dtype, Source, TensorInfo};
use crate::error::{Error, Result};
use crate::format::{FloatDtype, OutputKind, quantization_config};
use decide::Selection;
use rules::Rules;

/// What will be written, byte by byte.
#[derive(Debug)]
pub struct Plan {
    /// What was asked for.
    pub recipe: Recipe,
    /// Every tensor of the source: files by name, tensors in the order of their bytes.
    pub tensors: Vec<PlannedTensor>,
    /// The files of weights to be written. Each holds the next run of `tensors`.
    pub files: Vec<PlannedFile>,
    /// The new config.json's text, if the source has one.
    pub config: Option<String>,
    /// What the user should know before using the result; one sentence each.
    pub warnings: Vec<String>,
}

/// A source tensor and what becomes of it.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    /// Which of the source's files holds it.
    pub source_file: usize,
    /// Name, dtype, shape and place in that file.
    pub info: TensorInfo,
    /// What the tensor is.
    pub role: Role,
    /// Keep or quantize.
    pub decision: Decision,
    /// Why; a short sentence for people.
    pub reason: Cow<'static, str>,
    /// What is written for it.
    pub outputs: Vec<PlannedOutput>,
}

/// Keep or quantize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Copied as it is.
    Keep,
    /// Quantized, from this dtype.
    Quantize(FloatDtype),
}

impl PlannedTensor {
    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.info.shape.iter().product()
    }

    /// The dtype that it is quantized from, if it is.
    pub fn quantized_from(&self) -> Option<FloatDtype> {
        match self.decision {
            Decision::Quantize(dtype) => Some(dtype),
            Decision::Keep => None,
        }
    }

    /// The output of this kind, with its place among the outputs.
    ///
    /// # Panics
    /// When the tensor has no such output.
    pub fn output(&self, kind: OutputKind) -> &PlannedOutput {
        let found = self.outputs.iter().find(|output| output.kind == Some(kind));
        found.expect("the scheme gives this output")
    }

    /// Bytes of all that is written for it.
    pub fn output_len(&self) -> u64 {
        self.outputs.iter().map(|output| output.len).sum()
    }
}

impl Plan {
    /// Plans the conversion of `source`.
    ///
    /// # Errors
    /// When a pattern of the recipe matches nothing, a tensor to be quantized isn't bf16, f16 or f32, nothing is left
    /// to quantize, or clients couldn't tell what is quantized from what is not.
    pub fn new(source: &Source, recipe: Recipe) -> Result<Plan> {
        if recipe.double_quant && recipe.nonfinite == NonFinitePolicy::Keep {
            return Err(Error::Options {
                what: "--nonfinite keep with --double-quant",
                why: "one such value would spoil the scales of 256 blocks; leave one of them out",
            });
        }
        let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
        let rules = Rules::new(&model_types);
        let mut selection = Selection::new(&recipe, rules.clone())?;
        let (mut tensors, mut linear) = (Vec::new(), Vec::new());
        for (source_file, info) in source.tensors() {
            let verdict = selection.decide(&info.name, &info.shape);
            let decision = match (verdict.quantize, float_dtype(info.dtype)) {
                (false, _) => Decision::Keep,
                (true, Some(dtype)) => Decision::Quantize(dtype),
                (true, None) => {
                    let path = source.files[source_file].path.clone();
                    let (tensor, dtype) = (info.name.clone(), info.dtype.name());
                    return Err(Error::UnsupportedDtype { path, tensor, dtype });
                }
            };
            let outputs = layout::outputs(info, decision, &recipe.scheme());
            let (role, reason) = (verdict.role, verdict.reason);
            tensors.push(PlannedTensor { source_file, info: info.clone(), role, decision, reason, outputs });
            linear.push(verdict.linear);
        }
        selection.check_patterns()?;
        check_names_are_free(source, &tensors)?;
        check_anything_quantized(source, &tensors, &recipe)?;
        let skip_modules = skip_modules::list(&rules, &tensors, &linear)?;
        let config = quantized_config(source, &recipe, &tensors, &skip_modules)?;
        let warnings = warnings(source, &rules, &tensors, &linear);
        let files = layout::lay_out(&mut tensors, recipe.max_shard_size);
        Ok(Plan { recipe, tensors, files, config, warnings })
    }

    /// Bytes of the files of weights.
    pub fn output_len(&self) -> u64 {
        self.files.iter().map(|file| file.len).sum()
    }

    /// Bytes of all tensors of the source.
    pub fn source_len(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.info.len).sum()
    }

    /// The tensors to be quantized.
    pub fn quantized(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.tensors.iter().filter(|tensor| tensor.decision != Decision::Keep)
    }

    /// Bits that a quantized weight takes, its statistics included.
    pub fn bits_per_quantized_weight(&self) -> f64 {
        bits_per_element(self.quantized())
    }

    /// Bits that a weight takes over the whole checkpoint.
    pub fn bits_per_weight(&self) -> f64 {
        bits_per_element(self.tensors.iter())
    }
}

/// The dtype as one that weights are quantized from.
fn float_dtype(dtype: Dtype) -> Option<FloatDtype> {
    match dtype {
        Dtype::Bf16 => Some(FloatDtype::Bfloat16),
        Dtype::F16 => Some(FloatDtype::Float16),
        Dtype::F32 => Some(FloatDtype::Float32),
        _ => None,
    }
}

fn bits_per_element<'a>(tensors: impl Iterator<Item = &'a PlannedTensor>) -> f64 {
    let (bytes, elements) =
        tensors.fold((0, 0), |(bytes, elements), t| (bytes + t.output_len(), elements + t.elements()));
    bytes as f64 * 8.0 / (elements as f64).max(1.0)
}

/// What is written for a quantized weight must not have the name of another tensor.
fn check_names_are_free(source: &Source, tensors: &[PlannedTensor]) -> Result<()> {
    let parts = |tensor: &PlannedTensor| tensor.outputs.iter().map(|output| output.suffix).collect::<Vec<_>>();
    let Some(suffixes) = tensors.iter().find(|tensor| tensor.outputs.len() > 1).map(parts) else { return Ok(()) };
    let quantized: HashSet<&str> = tensors
        .iter()
        .filter(|tensor| tensor.decision != Decision::Keep)
        .map(|tensor| tensor.info.name.as_str())
        .collect();
    for tensor in tensors {
        let name = &tensor.info.name;
        let weight = suffixes.iter().filter(|s| !s.is_empty()).find_map(|suffix| name.strip_suffix(suffix));
        if let Some(weight) = weight.filter(|weight| quantized.contains(weight)) {
            let why = format!(
                "tensor {name:?} has a name that quantizing {weight:?} takes for a part of it: was the checkpoint \
                 quantized before? Keep the weight with --exclude"
            );
            return Err(Error::malformed(&source.files[tensor.source_file].path, why));
        }
    }
    Ok(())
}

fn check_anything_quantized(source: &Source, tensors: &[PlannedTensor], recipe: &Recipe) -> Result<()> {
    if tensors.iter().any(|tensor| tensor.decision != Decision::Keep) {
        return Ok(());
    }
    let why = if recipe.only_experts {
        "--only-experts was given, and it has no experts that can be told by their names; --dry-run without it shows \
         what there is"
    } else {
        "every tensor is kept; --include REGEX chooses tensors, and `prequant convert SRC DST --dry-run` shows the \
         reasons once one is chosen"
    };
    Err(Error::NothingToQuantize { path: source.path.clone(), why: why.to_owned() })
}

/// config.json with `quantization_config`.
fn quantized_config(
    source: &Source,
    recipe: &Recipe,
    tensors: &[PlannedTensor],
    skip_modules: &[String],
) -> Result<Option<String>> {
    let Some(config) = &source.config else { return Ok(None) };
    let of_config = ["dtype", "torch_dtype"].iter().find_map(|key| config.values().get(*key)?.as_str());
    let of_weights = tensors.iter().find_map(PlannedTensor::quantized_from).unwrap_or(FloatDtype::Bfloat16);
    let compute_dtype = of_config.and_then(FloatDtype::from_torch_name).unwrap_or(of_weights);
    let value: Value = quantization_config(&recipe.scheme(), compute_dtype, skip_modules);
    let text = config.with("quantization_config", &value);
    text.map(Some).map_err(|error| Error::malformed(&source.path.join(CONFIG_NAME), error.to_string()))
}

fn warnings(source: &Source, rules: &Rules, tensors: &[PlannedTensor], linear: &[bool]) -> Vec<String> {
    let mut warnings = Vec::new();
    let quantized = || tensors.iter().zip(linear).filter(|(tensor, _)| tensor.decision != Decision::Keep);
    if source.config.is_none() {
        warnings.push("no config.json beside the weights: rules go by names alone, and clients need one".to_owned());
    } else if !rules.is_compared() {
        warnings.push(
            "this architecture wasn't compared with transformers' own: look the decisions over with --dry-run"
                .to_owned(),
        );
    }
    if let Some((tensor, _)) = quantized().find(|(tensor, linear)| !**linear && !tensor.role.is_expert()) {
        warnings.push(format!(
            "{:?} was chosen by --include, but no Linear of the model takes it: plain transformers won't load it",
            tensor.info.name
        ));
    }
    if quantized().any(|(tensor, _)| tensor.role.is_expert()) {
        warnings.push(
            "experts are 4-bit: transformers 5 can't load them without a loader of its own, and with \
             ignore_mismatched_sizes=True it fills them with random numbers without an error"
                .to_owned(),
        );
    }
    let dtypes: Vec<Dtype> = tensors.iter().map(|tensor| tensor.info.dtype).collect();
    if dtypes.contains(&Dtype::F64) {
        warnings.push("it has F64 tensors, which are copied as they are".to_owned());
    }
    warnings
}
