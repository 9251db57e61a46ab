//! Decides how each tensor is converted and where it is written: a pure function of headers, config and recipe.
//!
//! Once a [`Plan`] stands, every output byte has its file and offset; executing it decides nothing any more.

mod carry;
mod clients;
mod decide;
mod fuse;
mod gaps;
mod groups;
mod guard;
mod input;
pub(crate) mod kept_modules;
mod layout;
mod names;
mod outputs;
mod rescale;
mod scale_sets;
mod scan;
pub(crate) mod source_quantization;
pub(crate) mod split;
mod warnings;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use layout::Part;
pub use layout::PlannedFile;
pub(crate) use outputs::{Outputs, PlacedOutput, PlannedOutput};

use crate::checkpoint::{CONFIG_NAME, Source, WEIGHTS_KEY};
use crate::dtype::Dtype;
use crate::dtype::FloatDtype;
use crate::error::{Error, Hint, Result, Warning};
use crate::format::{Codec, Layout};
use crate::layout::OutputKind;
use crate::layout::recognize;
use crate::manifest::Carried;
use crate::models::families::families;
use crate::models::{Role, Rules, Verdict};
use crate::read::Input;
use crate::read::Read;
use crate::recipe::Recipe;
use decide::Selection;
use guard::Danger;
use outputs::Alike;
use split::Decided;

/// What will be written, byte by byte.
#[derive(Debug)]
pub struct Plan {
    /// What was asked for.
    pub recipe: Recipe,
    /// What is written: one entry for every tensor of the source, for all that are fused into one, or for each matrix that one is
    /// taken apart into. In the source's order: files by name, tensors in the order of their bytes; what is fused stands where its
    /// first part does.
    pub tensors: Vec<PlannedTensor>,
    /// The files of weights to be written. Each holds the next run of `tensors`.
    pub files: Vec<PlannedFile>,
    /// Tensors that share a global scale, for formats that have one; each tensor is in one set at most.
    pub(crate) scale_sets: Vec<Vec<usize>>,
    /// The new config.json's text, if the source has one.
    pub(crate) config: Option<String>,
    /// Files that the format has beside config.json: name and content.
    pub(crate) side_files: Vec<(String, String)>,
    /// What the user should know before using the output.
    pub warnings: Vec<Warning>,
    /// Whether it begins with floats, whatever the source has: what says how that is quantized isn't kept.
    pub(crate) from_floats: bool,
}

/// A tensor and how it is converted.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    /// Its name in the output.
    pub name: Arc<str>,
    /// Its dtype, decoded if the source has it coded.
    pub dtype: Dtype,
    /// Its shape in the output, before quantizing.
    pub shape: Arc<[u64]>,
    /// Where its bytes come from.
    pub(crate) read: Read,
    /// What the tensor is.
    pub role: Role,
    /// Keep or quantize.
    pub decision: Decision,
    /// Why; a short sentence for people.
    pub reason: Cow<'static, str>,
    /// Whether it is kept because nothing says for certain what it is: a pattern of the recipe's `include` takes it.
    pub in_doubt: bool,
    /// What is written for it.
    pub(crate) outputs: Outputs,
}

/// Keep or quantize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Copied as it is.
    Keep,
    /// Quantized, from this dtype.
    Quantize(FloatDtype),
    /// The source's codes, copied so exactly.
    Carry(Carried),
}

impl PlannedTensor {
    fn new((input, verdict, decision): Decided, alike: &mut Alike<'_>) -> PlannedTensor {
        let Input { name, dtype, shape, read } = input;
        let Verdict { role, reason, in_doubt, .. } = verdict;
        let outputs = Outputs::default();
        let mut tensor = PlannedTensor { name, dtype, shape, read, role, decision, reason, in_doubt, outputs };
        tensor.outputs = alike.outputs(&tensor);
        tensor
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Elements of a row: of its last dimension.
    pub fn columns(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Whether it is quantized in the source, and decoded as it is read.
    pub fn is_decoded(&self) -> bool {
        self.read.is_decoded()
    }

    /// Whether an adapter is merged into it.
    pub fn is_adapted(&self) -> bool {
        self.read.adapters().next().is_some()
    }

    /// Bytes that it is made of, decoded.
    pub fn source_len(&self) -> u64 {
        self.read.len()
    }

    /// The dtype that it is quantized from, if it is.
    pub fn quantized_from(&self) -> Option<FloatDtype> {
        match self.decision {
            Decision::Quantize(dtype) => Some(dtype),
            Decision::Keep | Decision::Carry(_) => None,
        }
    }

    /// Whether it is in the recipe's format in the output: quantized, or carried over.
    pub fn is_quantized(&self) -> bool {
        self.decision != Decision::Keep
    }

    /// Whether its codes are the source's.
    pub fn is_carried(&self) -> bool {
        matches!(self.decision, Decision::Carry(_))
    }

    /// The output of this kind.
    ///
    /// # Panics
    /// When the tensor has no such output.
    pub fn output(&self, kind: OutputKind) -> &PlannedOutput {
        let found = self.outputs.alike().iter().find(|output| output.kind == Some(kind));
        found.expect("the codec gives this output")
    }

    /// Bytes of all that is written for it.
    pub fn output_len(&self) -> u64 {
        self.outputs.alike().iter().map(|output| output.len).sum()
    }
}

impl Plan {
    /// Plans the conversion of `source`.
    ///
    /// # Errors
    /// When a pattern of the recipe matches nothing, a tensor to be quantized isn't bf16, f16 or f32, nothing is left
    /// to quantize, or clients couldn't tell what is quantized from what is not.
    pub fn new(source: &Source, mut recipe: Recipe) -> Result<Plan> {
        // It is no part of the recipe where nothing was decoded because of it.
        recipe.dequantize_source = recipe.dequantize_source && source_quantization::has_four_bits(source);
        let codec = recipe.codec();
        let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
        let rules = Rules::of(source);
        let (decided, of_source) = decide(source, &recipe, &model_types, &rules)?;
        let linear: Vec<bool> = decided.iter().map(|(_, verdict, _)| verdict.linear).collect();
        let mut alike = Alike::new(&codec);
        let mut tensors: Vec<PlannedTensor> =
            decided.into_iter().map(|decided| PlannedTensor::new(decided, &mut alike)).collect();
        check_anything_quantized(source, &tensors, &recipe)?;
        let of_carried = carry::carry_over(source, &mut tensors, &codec)?;
        let weights = kept_modules::weights(&tensors, &linear);
        let kept_modules = match codec.layout() {
            None => kept_modules::bitsandbytes::list(&rules, &weights)?,
            Some(layout) => kept_modules::compressed_tensors::list(&rules, &weights, layout),
        };
        let danger = guard::danger(&recipe, &rules, &model_types, &tensors);
        let config = quantized_config(source, &recipe, &tensors, &kept_modules, danger)?;
        let mut warnings = warnings::of(source, &recipe, &rules, &tensors, &linear);
        warnings.extend(danger.map(|danger| guard::warning(danger, recipe.guard).into()));
        warnings.extend(of_source.into_iter().chain(of_carried));
        if recipe.fuses_experts() {
            tensors = fuse::fuse(source, &model_types, tensors, &mut alike)?;
        }
        names::check_are_free(source, &tensors)?;
        names::check_differ(source, &tensors, Some(Hint::Exclude))?;
        check_storage(source, &tensors, &codec)?;
        let files = layout::lay_out(&mut tensors, recipe.max_shard_size, source);
        let scale_sets = if codec.has_tensor_scale() { scale_sets::scale_sets(&tensors) } else { Vec::new() };
        let side_files = codec.side_file(&kept_modules).into_iter().collect();
        Ok(Plan { recipe, tensors, files, scale_sets, config, side_files, warnings, from_floats: false })
    }

    /// Plans the writing of `inputs` as they are, decoded; `recipe` tells how large files may be.
    ///
    /// # Errors
    /// When two have one name.
    pub fn decoded(source: &Source, recipe: Recipe, inputs: Vec<Input>, config: Option<String>) -> Result<Plan> {
        let codec = recipe.codec();
        let mut alike = Alike::new(&codec);
        let keep = |input: Input| {
            let reason = match (input.read.adapters().next().is_some(), input.read.is_decoded()) {
                (true, false) => "merged",
                (true, true) => "decoded and merged",
                (false, true) => "decoded",
                (false, false) => "copied",
            };
            let verdict = Verdict {
                role: Role::Unknown,
                quantize: false,
                linear: false,
                included: false,
                in_doubt: false,
                reason: reason.into(),
            };
            PlannedTensor::new((input, verdict, Decision::Keep), &mut alike)
        };
        let mut tensors: Vec<PlannedTensor> = Plan::unwrapped(source, inputs).into_iter().map(keep).collect();
        names::check_differ(source, &tensors, None)?;
        let files = layout::lay_out(&mut tensors, recipe.max_shard_size, source);
        let (scale_sets, side_files) = Default::default();
        let warnings = source.notes.clone();
        Ok(Plan { recipe, tensors, files, scale_sets, config, side_files, warnings, from_floats: true })
    }

    /// The tensors under their model's own names.
    pub(crate) fn unwrapped(source: &Source, mut inputs: Vec<Input>) -> Vec<Input> {
        for input in &mut inputs {
            if let Cow::Owned(name) = source.wrapper.unwrap(&input.name) {
                input.name = name.into();
            }
        }
        inputs
    }

    /// The dtype in which the scale of a set is computed: its tensors' own, or f32 where they differ.
    pub fn scale_dtype(&self, set: usize) -> FloatDtype {
        let mut dtypes = self.scale_sets[set].iter().filter_map(|&tensor| self.tensors[tensor].quantized_from());
        let first = dtypes.next().unwrap_or(FloatDtype::Float32);
        if dtypes.all(|dtype| dtype == first) { first } else { FloatDtype::Float32 }
    }

    /// Bytes of the files of weights.
    pub fn output_len(&self) -> u64 {
        self.files.iter().map(|file| file.len).sum()
    }

    /// Bytes of all tensors of the source.
    pub fn source_len(&self) -> u64 {
        self.tensors.iter().map(PlannedTensor::source_len).sum()
    }

    /// Whether experts are quantized in a layout that transformers doesn't load by itself.
    pub fn needs_loader(&self) -> bool {
        has_4_bit_experts(&self.recipe, &self.tensors)
    }

    /// That more than a tenth of the source's bytes stays unquantized, if it does, and the largest tensor of it.
    pub fn left_in_16_bits(&self) -> Option<Warning> {
        if self.recipe.quantizes() { warnings::left_in_16_bits(&self.tensors) } else { None }
    }

    /// What is kept in doubt: patterns that match the names of such tensors and of none that is decided otherwise but by a number
    /// in it, each with how many tensors and how many bytes of the source it takes.
    pub fn in_doubt(&self) -> Vec<(String, usize, u64)> {
        let mut patterns: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for tensor in self.tensors.iter().filter(|tensor| tensor.in_doubt) {
            let (tensors, bytes) = patterns.entry(pattern_of(&tensor.name)).or_default();
            (*tensors, *bytes) = (*tensors + 1, *bytes + tensor.source_len());
        }
        patterns.into_iter().map(|(pattern, (tensors, bytes))| (pattern, tensors, bytes)).collect()
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

/// Decides for each tensor, with fused experts taken apart where the format wants it; also what to know of how the source decodes.
fn decide(
    source: &Source,
    recipe: &Recipe,
    model_types: &[&str],
    rules: &Rules<'_>,
) -> Result<(Vec<Decided>, Vec<Warning>)> {
    let codec = recipe.codec();
    if codec.layout() == Some(Layout::GptOss) && !families(model_types).any(|family| family.gpt_oss_layout) {
        let (path, why) =
            (source.location.path().to_owned(), "the gpt-oss layout is for gpt_oss models only".to_owned());
        return Err(Error::NothingToQuantize { path, why, hint: Some(Hint::CompressedTensorsLayout) });
    }
    let mut selection = Selection::new(recipe)?;
    let mut decided = Vec::new();
    let (inputs, mut warnings) = input::inputs(source, recipe.dequantize_source || !codec.is_blocks())?;
    for input in Plan::unwrapped(source, inputs) {
        let mut verdict = selection.decide(rules, &input.name, &input.shape);
        clients::keep(&codec, model_types, rules, &input.name, &mut verdict);
        if !codec.is_blocks() {
            groups::check(source, model_types, &input, &codec, &mut verdict)?;
        }
        let decision = match (verdict.quantize, FloatDtype::of(input.dtype)) {
            (false, _) => Decision::Keep,
            (true, Some(_)) if !recipe.dequantize_source && carry::has_four_bits(&input.read) => {
                Decision::Carry(Carried::Lossless)
            }
            (true, Some(dtype)) => Decision::Quantize(dtype),
            (true, None) => {
                let path = source.files[input.read.first_file()].location.path().to_owned();
                return Err(Error::UnsupportedDtype { path, tensor: input.name.to_string(), dtype: input.dtype });
            }
        };
        decided.push((input, verdict, decision));
    }
    selection.check_patterns()?;
    clients::keep_odd_rows(&codec, &mut decided);
    let decided = match codec.layout() {
        None => decided,
        Some(Layout::GptOss) => {
            let transposed = decided.into_iter().map(|(input, verdict, decision)| match decision {
                // What products sum over in rows, of which MXFP4's groups are.
                Decision::Quantize(_) | Decision::Carry(_) => (input.transposed(), verdict, decision),
                Decision::Keep => (input, verdict, decision),
            });
            transposed.collect()
        }
        Some(_) => {
            let (decided, of_names) = split::split_experts(source, model_types, decided)?;
            warnings.extend(of_names);
            decided
        }
    };
    Ok((decided, warnings))
}

/// Codes must be whole elements of what they are stored as.
fn check_storage(source: &Source, tensors: &[PlannedTensor], codec: &Codec) -> Result<()> {
    let storage = codec.quant_storage();
    let len = |tensor: &PlannedTensor| codec.packed_len(tensor.elements(), tensor.columns());
    let mut quantized = tensors.iter().filter(|tensor| tensor.decision != Decision::Keep);
    let odd = quantized.find(|tensor| !len(tensor).is_multiple_of(storage.size()));
    odd.map_or(Ok(()), |tensor| {
        let path = source.files[tensor.read.first_file()].location.path().to_owned();
        Err(Error::QuantStorage { path, tensor: tensor.name.to_string(), len: len(tensor), storage: storage.name() })
    })
}

/// A regular expression for a name and those that differ from it in numbers only.
fn pattern_of(name: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let parts = name.split('.').map(|part| if is_number(part) { r"\d+".to_owned() } else { regex::escape(part) });
    format!("^{}$", parts.collect::<Vec<_>>().join(r"\."))
}

fn bits_per_element<'a>(tensors: impl Iterator<Item = &'a PlannedTensor>) -> f64 {
    let (bytes, elements) =
        tensors.fold((0, 0), |(bytes, elements), t| (bytes + t.output_len(), elements + t.elements()));
    bytes as f64 * 8.0 / (elements as f64).max(1.0)
}

fn check_anything_quantized(source: &Source, tensors: &[PlannedTensor], recipe: &Recipe) -> Result<()> {
    if tensors.iter().any(|tensor| tensor.decision != Decision::Keep) {
        return Ok(());
    }
    let (why, hint) = if recipe.only_experts {
        ("it has no experts that can be told by their names".to_owned(), Hint::ListAllTensors)
    } else {
        let matrix = tensors.iter().find(|tensor| tensor.role.is_expert() || tensor.role == Role::Linear);
        let first = matrix.map_or(String::new(), |tensor| format!(", such as {:?}: {}", tensor.name, tensor.reason));
        (format!("every tensor is kept{first}"), Hint::Include)
    };
    Err(Error::NothingToQuantize { path: source.location.path().to_owned(), why, hint: Some(hint) })
}

/// config.json with `quantization_config`, and what keeps transformers from loading 4-bit experts wrongly.
fn quantized_config(
    source: &Source,
    recipe: &Recipe,
    tensors: &[PlannedTensor],
    skip_modules: &[String],
    danger: Option<Danger>,
) -> Result<Option<String>> {
    let Some(config) = &source.config else { return Ok(None) };
    let of_config = ["dtype", "torch_dtype"].iter().find_map(|key| config.values().get(*key)?.as_str());
    let of_weights = tensors.iter().find_map(PlannedTensor::quantized_from).unwrap_or(FloatDtype::Bfloat16);
    let compute_dtype = of_config.and_then(FloatDtype::from_torch_name).unwrap_or(of_weights);
    let mut quantization_config = recipe.codec().quantization_config(compute_dtype, skip_modules);
    let guard = guard::put(danger, recipe.guard, &mut quantization_config);
    let mut entries = vec![("quantization_config", quantization_config)];
    entries.extend(guard);
    let mut gone = recognize::places_in_config(config);
    gone.push(vec![WEIGHTS_KEY]);
    config
        .edited(&entries, &gone.iter().map(Vec::as_slice).collect::<Vec<_>>())
        .map(Some)
        .map_err(|error| Error::malformed(source.location.join(CONFIG_NAME).path(), error.to_string()))
}

/// Whether experts are quantized in a layout that transformers doesn't load by itself.
fn has_4_bit_experts(recipe: &Recipe, tensors: &[PlannedTensor]) -> bool {
    let is_quantized = |tensor: &PlannedTensor| tensor.role.is_expert() && tensor.decision != Decision::Keep;
    recipe.codec().is_blocks() && tensors.iter().any(is_quantized)
}
