//! Rewriting a converted checkpoint's experts, from one by one to fused or back: bytes change their place, and
//! nothing is quantized.
//!
//! The manifest tells the tensors that the checkpoint was made from, so the conversion can be planned again, in the
//! layout it has and in the one that is asked for. What both quantize is the same run of the same source tensor; that
//! says where in the converted files the codes and absmax of each run are.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use crate::checkpoint::{CONFIG_NAME, Config, MANIFEST_NAME, Source, SourceFile, TensorInfo, sort_canonically};
use crate::converted::Converted;
use crate::dtype::FloatDtype;
use crate::dtype::{self, byte_len};
use crate::error::{Error, Hint, IoContext, Result};
use crate::format::{BlockSize, Scales};
use crate::layout::bitsandbytes::ParsedQuantState;
use crate::layout::{OutputKind, QuantState, quant_state_bytes};
use crate::manifest::{DecisionRecord, Manifest, TensorRecord};
use crate::pipeline::{Outcome, TensorOutcome};
use crate::plan::{Decision, Outputs, PlacedOutput, Plan, PlannedFile, PlannedOutput, PlannedTensor};
use crate::read::{Read, Span};
use crate::recipe::{ExpertLayout, Recipe, RecipeOptions};
use crate::shape::Shapes;
use crate::store::{Identity, Kind, Location, Sha256Hash, is_no_file};

/// A converted checkpoint and what it becomes.
#[derive(Debug)]
pub(crate) struct Relayout {
    /// Its manifest.
    pub manifest: Manifest,
    /// How its experts are laid out.
    pub from: ExpertLayout,
    /// What it was made from, by its manifest: names, dtypes and shapes; offsets are made up.
    pub origin: Source,
    /// How that would be converted to the new layout.
    pub plan: Plan,
    /// For each tensor of `plan`, which record of the manifest is of the very same tensor.
    unchanged: Vec<Option<usize>>,
    /// Bytes that planning it took beside all that, by estimate.
    planning: u64,
}

/// The recipe of the converted checkpoint at `path`, if that is what it is, and its experts can be rewritten.
///
/// # Errors
/// When its manifest can't be read, or is of a newer version.
pub(crate) fn recipe_of(place: impl Into<Location>) -> Result<Option<Recipe>> {
    let place = place.into();
    let config = match Config::read(&place.join(CONFIG_NAME)) {
        Ok(config) => Some(config),
        // That it isn't there, or isn't a config, is an error of opening the source.
        Err(Error::Malformed { .. }) => None,
        Err(Error::Io { ref source, .. }) if is_no_file(source) => None,
        Err(error) => return Err(error),
    };
    if config.is_none_or(|config| !config.values().contains_key("quantization_config")) {
        return Ok(None);
    }
    let recipe = manifest_of(&place)?.map(|manifest| manifest.recipe);
    Ok(recipe.filter(|recipe| recipe.codec().is_blocks()))
}

/// The manifest of the converted checkpoint at `place`; none if there is nothing of its name.
pub(crate) fn manifest_of(place: &Location) -> Result<Option<Manifest>> {
    let location = place.join(MANIFEST_NAME);
    match location.kind().at(location.path(), "look at it")? {
        None | Some(Kind::BrokenLink) => Ok(None),
        Some(Kind::File) => Manifest::read(&location).map(Some),
        Some(Kind::Folder | Kind::Other) => {
            let why = "not a regular file, and a manifest is one; take it away if it isn't prequant's";
            Err(Error::malformed(location.path(), why.to_owned()))
        }
    }
}

impl Relayout {
    /// Plans it: the plan to execute, which copies, and what it comes to.
    ///
    /// # Errors
    /// When `recipe` asks for more than another layout or other shards, blocks straddle experts, or the files aren't what
    /// the manifest says.
    pub(crate) fn new(converted: &Source, manifest: Manifest, recipe: Recipe) -> Result<(Plan, Relayout)> {
        let path = converted.location.path();
        let from = if manifest.recipe.fuses_experts() { ExpertLayout::Fuse } else { ExpertLayout::Keep };
        check_recipe(path, &manifest.recipe, &recipe)?;
        let origin = origin(converted, &manifest)?;
        let old = Plan::new(&origin, manifest.recipe.clone())
            .map_err(|error| needs_the_source(converted, &manifest, error))?;
        check_manifest(path, &old, &manifest)?;
        let source = converted;
        let mut converted = Converted::new(source, &manifest)?;
        check_quant_states(source, &mut converted, &manifest, &old)?;
        let plan = Plan::new(&origin, recipe)?;
        let old_names: HashMap<&str, &PlannedTensor> = old.tensors.iter().map(|t| (&*t.name, t)).collect();
        let (records, is_old) =
            (records(&manifest), |t: &&PlannedTensor| old_names.get(&*t.name).is_some_and(|old| is_same(old, t)));
        let unchanged: Vec<Option<usize>> =
            plan.tensors.iter().map(|t| Some(records[&*Some(t).filter(is_old)?.name].0)).collect();
        let copies = Copies { path, old: &old, converted: &converted, runs: Runs::new(&old) };
        let mut tensors = Vec::new();
        let mut files = Vec::new();
        for file in &plan.files {
            let first = tensors.len();
            for i in file.tensors.clone() {
                tensors.extend(copies.of(&plan.tensors[i], unchanged[i].is_some(), &plan.recipe)?);
            }
            files.push(PlannedFile { tensors: first..tensors.len(), ..file.clone() });
        }
        let (config, warnings) = (plan.config.clone(), plan.warnings.clone());
        let (scale_sets, side_files) = Default::default();
        let recipe = plan.recipe.clone();
        let copying = Plan { recipe, tensors, files, scale_sets, config, side_files, warnings, from_floats: false };
        let planning = planning_len(&old, source);
        Ok((copying, Relayout { manifest, from, origin, plan, unchanged, planning }))
    }

    /// Bytes that it holds beside the copying plan, by estimate, and what planning it took.
    pub(crate) fn held_len(&self) -> u64 {
        let of_tensor = |tensor: &PlannedTensor| {
            let outputs = tensor.outputs.len() * (size_of::<u64>() + size_of::<Sha256Hash>());
            // What is planned, its name, what it came to and what the manifest says it was made from.
            size_of::<PlannedTensor>() + size_of::<TensorOutcome>() + outputs + 3 * tensor.name.len() + 512
        };
        self.manifest.held_len() + self.planning + self.plan.tensors.iter().map(of_tensor).sum::<usize>() as u64
    }

    /// What came of executing the copying plan, as the outcome of the other. Statistics are known of tensors that didn't
    /// change, and of all together.
    pub(crate) fn outcome(&self, copied: Outcome) -> Outcome {
        let mut hashes = copied.tensors.into_iter().flat_map(|tensor| tensor.sha256);
        let tensors = self.plan.tensors.iter().zip(&self.unchanged);
        let tensors = tensors
            .map(|(tensor, unchanged)| TensorOutcome {
                sha256: hashes.by_ref().take(tensor.outputs.len()).collect(),
                statistics: unchanged.and_then(|i| self.manifest.tensors[i].statistics.clone()).map(Box::new),
            })
            .collect();
        let total = self.manifest.summary.statistics.clone();
        Outcome { tensors, files: copied.files, source_files: None, total }
    }
}

/// Bytes that the plan of what is there takes, and what is looked up in it and in its files, by estimate.
fn planning_len(old: &Plan, converted: &Source) -> u64 {
    // An entry of a map, with the room that a map leaves.
    const ENTRY: usize = 64;
    let of_tensor = |tensor: &PlannedTensor| {
        let outputs = tensor.outputs.len() * size_of::<u64>() + 24;
        size_of::<PlannedTensor>() + outputs + size_of::<Run>() + 4 * ENTRY
    };
    // Where each one is, and that it is recorded.
    let looked_up = converted.tensors().count() * 2 * ENTRY;
    (old.tensors.iter().map(of_tensor).sum::<usize>() + looked_up) as u64
}

/// Only the layout and the shards can be others.
fn check_recipe(path: &Path, then: &Recipe, now: &Recipe) -> Result<()> {
    let error = |why: &str, hint| Err(Error::Relayout { path: path.to_owned(), why: why.to_owned(), hint });
    let (was, is) = (RecipeOptions::from(then.clone()), RecipeOptions::from(now.clone()));
    let (experts, max_shard_size) = (is.experts, is.max_shard_size);
    if (RecipeOptions { experts, max_shard_size, ..was.clone() }) != is {
        return error(
            "converted with other options, and can't be quantized again; leave them out to rewrite its experts, or start from \
             the bf16 checkpoint it was made from",
            None,
        );
    }
    if experts == was.experts {
        return match now.fuses_experts() {
            true => error("already converted, with fused experts", Some(Hint::SplitExperts)),
            false => error("already converted, with one tensor per expert", Some(Hint::FuseExperts)),
        };
    }
    Ok(())
}

/// An error of planning that comes of what the manifest doesn't have: codes of four bits are planned by what they are, too.
fn needs_the_source(converted: &Source, manifest: &Manifest, error: Error) -> Error {
    // A file that isn't there is the source's; what the system refuses otherwise is its own error.
    let is_of_the_system = matches!(&error, Error::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound);
    if !manifest.recipe.dequantize_source || is_of_the_system {
        return error;
    }
    let why = "it was made of weights in four bits, which rewriting its experts would have to read again: convert the source again \
               with the other layout of experts";
    Error::malformed(converted.location.join(MANIFEST_NAME).path(), why)
}

/// The checkpoint that the converted one was made from, as far as the manifest tells.
fn origin(converted: &Source, manifest: &Manifest) -> Result<Source> {
    let location = converted.location.join(MANIFEST_NAME);
    let path = location.path();
    let mut files: Vec<SourceFile> = Vec::new();
    for file in &manifest.source.files {
        let (name, location, header_sha256) = (file.name.clone(), location.clone(), file.header_sha256);
        let identity = Identity { len: file.size, version: String::new(), sha256: file.sha256 };
        let (metadata, tensors) = Default::default();
        files.push(SourceFile { name, location, identity, header_sha256, metadata, tensors });
    }
    let (mut total, mut shapes) = (0u64, Shapes::default());
    for tensor in manifest.tensors.iter().flat_map(|record| &record.sources) {
        let error = |what: &str| Error::malformed(path, format!("tensor {:?} of the source: {what}", tensor.name));
        let file = files.iter_mut().find(|file| file.name == tensor.file);
        let file = file.ok_or_else(|| error("its file isn't among the source's"))?;
        let dtype = dtype::named(&tensor.dtype).ok_or_else(|| error("a dtype that safetensors doesn't have"))?;
        let len = byte_len(dtype, &tensor.shape).ok_or_else(|| error("a shape past all bounds"))?;
        // Half of what there is: the plan adds what it writes beside them.
        total = total
            .checked_add(len)
            .filter(|&total| total <= u64::MAX / 2)
            .ok_or_else(|| error("a shape past all bounds"))?;
        let offset = file.tensors.last().map_or(0, |last| last.offset + last.len);
        let (name, shape) = (tensor.name.as_str().into(), shapes.get(&tensor.shape));
        file.tensors.push(TensorInfo { name, dtype, shape, offset, len });
    }
    // What was fused has lost its place: it is taken to have been where safetensors puts it.
    if manifest.recipe.fuses_experts() {
        for file in &mut files {
            sort_canonically(&mut file.tensors);
            let mut next = 0;
            for tensor in &mut file.tensors {
                tensor.offset = next;
                next += tensor.len;
            }
        }
    }
    let mut origin = Source::of_files(location, files, converted.config.clone());
    origin.check_names_differ()?;
    origin.read_names();
    origin.metadata = converted.metadata.clone(); // as it was kept when that was made
    Ok(origin)
}

/// The manifest's records with their places, by the name of what was written.
fn records(manifest: &Manifest) -> HashMap<&str, (usize, &TensorRecord)> {
    let named = |(i, record)| -> Option<_> {
        let record: &TensorRecord = record;
        Some((record.outputs.first()?.name.as_str(), (i, record)))
    };
    manifest.tensors.iter().enumerate().filter_map(named).collect()
}

/// Whether planning it now gives what is there.
fn check_manifest(path: &Path, plan: &Plan, manifest: &Manifest) -> Result<()> {
    let is_planned = |tensor: &PlannedTensor, record: &TensorRecord| {
        let outputs = tensor.outputs.alike().iter().zip(&record.outputs);
        (tensor.decision == Decision::Keep) == (record.decision == DecisionRecord::Keep)
            && tensor.outputs.len() == record.outputs.len()
            && { outputs }.all(|(output, record)| {
                record.name.strip_prefix(&*tensor.name) == Some(&*output.suffix)
                    && record.dtype == output.dtype.to_string()
                    && *record.shape == *output.shape
            })
    };
    let records = records(manifest);
    let mut tensors = plan.tensors.iter();
    let other =
        tensors.find(|tensor| !records.get(&*tensor.name).is_some_and(|(_, record)| is_planned(tensor, record)));
    if other.is_none() && plan.tensors.len() == manifest.tensors.len() {
        return Ok(());
    }
    let name = other.map_or(String::new(), |tensor| format!(", first {:?}", tensor.name));
    let why = format!(
        "this version ({}) would convert its source otherwise than {} did{name}; start from the bf16 checkpoint",
        env!("CARGO_PKG_VERSION"),
        manifest.tool.version,
    );
    Err(Error::Relayout { path: path.to_owned(), why, hint: None })
}

/// Whether the quant_states that are there are the manifest's and the plan's: some are copied, and clients decode by them.
fn check_quant_states(source: &Source, converted: &mut Converted<'_>, manifest: &Manifest, plan: &Plan) -> Result<()> {
    let codec = plan.recipe.codec();
    let suffix = codec.suffix(OutputKind::QuantState).unwrap_or_default();
    let outputs = manifest.tensors.iter().flat_map(|record| &record.outputs);
    let outputs = outputs.filter(|output| output.name.ends_with(&*suffix));
    let hashes: HashMap<&str, Sha256Hash> = outputs.map(|output| (output.name.as_str(), output.sha256)).collect();
    for tensor in &plan.tensors {
        let Decision::Quantize(dtype) = tensor.decision else { continue };
        let name = format!("{}{suffix}", tensor.name);
        let json = converted.quant_state(&name)?;
        let sha256 = Sha256Hash::of(&json);
        let what = match ParsedQuantState::parse(&json) {
            _ if hashes.get(name.as_str()) != Some(&sha256) => {
                Some(format!("its SHA-256 is {sha256}, which isn't {MANIFEST_NAME}'s"))
            }
            Err(error) => Some(error.to_string()),
            Ok(state) if state.shape[..] != tensor.shape[..] => {
                Some(format!("it says that the shape is {:?}, expected {:?}", state.shape, tensor.shape))
            }
            Ok(state) => state.differences(&codec, dtype).into_iter().next().map(|what| format!("it {what}")),
        };
        if let Some(what) = what {
            let file = &source.files[converted.tensor(&name)?.0.file];
            let why = format!("tensor {name:?}: {what}; download the file again, or convert the source again");
            return Err(Error::Malformed { path: file.location.path().to_owned(), why, hint: Some(Hint::Verify) });
        }
    }
    Ok(())
}

/// The names of the tensors of `plan`, which is of `source`, that are the very same where experts are laid out as `from`: relayout
/// leaves them alone. None if the plan has that layout itself.
///
/// # Errors
/// Those of planning.
pub(crate) fn same_in<'a>(source: &Source, plan: &'a Plan, from: ExpertLayout) -> Result<Option<HashSet<&'a str>>> {
    let own = RecipeOptions::from(plan.recipe.clone());
    if own.experts == Some(from) {
        return Ok(None);
    }
    let old = Plan::new(source, RecipeOptions { experts: Some(from), ..own }.build()?)?;
    let old: HashMap<&str, &PlannedTensor> = old.tensors.iter().map(|tensor| (&*tensor.name, tensor)).collect();
    let is_old = |tensor: &&PlannedTensor| old.get(&*tensor.name).is_some_and(|old| is_same(old, tensor));
    Ok(Some(plan.tensors.iter().filter(is_old).map(|tensor| &*tensor.name).collect()))
}

fn is_same(old: &PlannedTensor, new: &PlannedTensor) -> bool {
    (&old.read, &old.shape, old.decision) == (&new.read, &new.shape, new.decision)
}

/// The quantized runs of each tensor of the origin, by file and tensor, in the order of their bytes. Most tensors are one.
struct Runs(HashMap<(usize, usize), Vec<Run>>);

/// A run of an origin's tensor, and where it went.
struct Run {
    /// The plan's tensor.
    tensor: usize,
    /// Bytes of that tensor before it.
    at: u64,
    /// From its first byte in the source on.
    span: Span,
    /// Whether these are the bytes as they are stored.
    stored: bool,
}

impl Runs {
    fn new(plan: &Plan) -> Runs {
        let mut runs: HashMap<(usize, usize), Vec<Run>> = HashMap::new();
        for (tensor, planned) in plan.tensors.iter().enumerate() {
            let mut at = 0;
            for part in planned.read.parts() {
                let (len, stored) = (part.len(), matches!(part, Read::Bytes(_)));
                if let Some(first) = part.spans().next() {
                    let span = Span { len, ..first };
                    let of_tensor = runs.entry((span.file, span.tensor)).or_insert_with(|| Vec::with_capacity(1));
                    let run = Run { tensor, at, span, stored };
                    match of_tensor.binary_search_by_key(&span.offset, |other| other.span.offset) {
                        Ok(same) => of_tensor[same] = run,
                        Err(place) => of_tensor.insert(place, run),
                    }
                }
                at += len;
            }
        }
        Runs(runs)
    }

    /// Those that a part is made of, in order: the run, the part's first byte in it, and how many bytes of it.
    fn of(&self, part: Span) -> impl Iterator<Item = (&Run, u64, u64)> {
        let runs = self.0.get(&(part.file, part.tensor)).into_iter();
        let runs = runs.flatten().take_while(move |run| run.span.offset < part.offset + part.len);
        runs.filter_map(move |run| {
            let start = part.offset.max(run.span.offset);
            let end = (part.offset + part.len).min(run.span.offset + run.span.len);
            (start < end).then(|| (run, start - run.span.offset, end - start))
        })
    }
}

/// Where the bytes of a new tensor's outputs come from.
struct Copies<'a> {
    path: &'a Path,
    old: &'a Plan,
    converted: &'a Converted<'a>,
    runs: Runs,
}

impl Copies<'_> {
    /// A tensor to be copied for each of the tensor's outputs.
    fn of(&self, tensor: &PlannedTensor, unchanged: bool, recipe: &Recipe) -> Result<Vec<PlannedTensor>> {
        let Decision::Quantize(dtype) = tensor.decision else {
            return self.as_they_are(tensor);
        };
        if unchanged {
            return self.as_they_are(tensor);
        }
        let codec = &recipe.codec();
        let Scales::Blocks { size, double_quant, .. } = codec.scales else {
            return self.error(tensor, "groups are of experts one by one only".to_owned());
        };
        if double_quant {
            return self.error(tensor, "with double quantization its scales depend on the layout".to_owned());
        }
        let (packed, absmax) = self.parts(tensor, dtype, size)?;
        let Some((first, ..)) = tensor.read.spans().next().and_then(|span| self.runs.of(span).next()) else {
            return self.error(tensor, format!("{MANIFEST_NAME} doesn't tell where it is"));
        };
        let first = &self.old.tensors[first.tensor];
        let state = QuantState { codec, dtype, shape: &tensor.shape, nested_offset: 0.0 };
        let outputs = tensor.outputs.iter().map(|output| match output.kind {
            Some(OutputKind::Packed) => Ok(copy(tensor, output, packed.clone())),
            Some(OutputKind::Absmax) => Ok(copy(tensor, output, absmax.clone())),
            Some(OutputKind::QuantState) => Ok(copy(tensor, output, Read::Literal(quant_state_bytes(&state).into()))),
            _ => Ok(copy(tensor, output, Read::Bytes(self.span(first, &output)?))),
        });
        outputs.collect()
    }

    /// Copies of all outputs of a tensor that doesn't change.
    fn as_they_are(&self, tensor: &PlannedTensor) -> Result<Vec<PlannedTensor>> {
        let outputs = tensor.outputs.iter();
        outputs.map(|output| Ok(copy(tensor, output, Read::Bytes(self.span(tensor, &output)?)))).collect()
    }

    /// Where an output is in the converted files.
    fn span(&self, tensor: &PlannedTensor, output: &PlannedOutput) -> Result<Span> {
        self.converted.tensor(&format!("{}{}", tensor.name, output.suffix)).map(|(span, _)| span)
    }

    /// Where the codes and absmax of its runs are.
    fn parts(&self, tensor: &PlannedTensor, dtype: FloatDtype, size: BlockSize) -> Result<(Read, Read)> {
        let (mut packed, mut absmax) = (Vec::new(), Vec::new());
        for part in tensor.read.parts() {
            let &Read::Bytes(span) = part else {
                let coded = matches!(part, Read::Decode(_));
                let why = if coded { "its source was quantized itself" } else { "one layout has it transposed" };
                return self.error(tensor, why.to_owned());
            };
            let mut covered = 0;
            for (run, skipped, len) in self.runs.of(span) {
                if !run.stored {
                    return self.error(tensor, "one layout has it transposed".to_owned());
                }
                let block = size.get() as u64;
                let (first, elements) = ((run.at + skipped) / dtype.size() as u64, len / dtype.size() as u64);
                if !first.is_multiple_of(block) || !elements.is_multiple_of(block) {
                    let why = format!("its matrices of {elements} weights aren't whole blocks of {block}");
                    return self.error(tensor, why);
                }
                let old = &self.old.tensors[run.tensor];
                let (codes, scales) = (old.output(OutputKind::Packed), old.output(OutputKind::Absmax));
                packed.push(Read::Bytes(self.span(old, codes)?.part(first / 2, elements / 2)));
                absmax.push(Read::Bytes(self.span(old, scales)?.part(first / block * 4, elements / block * 4)));
                covered += len;
            }
            if covered != span.len {
                return self.error(tensor, format!("{MANIFEST_NAME} doesn't tell where all of it is"));
            }
        }
        Ok((Read::concat(packed), Read::concat(absmax)))
    }

    fn error<T>(&self, tensor: &PlannedTensor, why: String) -> Result<T> {
        let why = format!("tensor {:?}: {why}; start from the bf16 checkpoint it was made from", tensor.name);
        Err(Error::Relayout { path: self.path.to_owned(), why, hint: None })
    }
}

/// An output of a tensor as a tensor of its own, which is copied.
fn copy(tensor: &PlannedTensor, output: PlacedOutput<'_>, read: Read) -> PlannedTensor {
    let alone = PlannedOutput { kind: None, suffix: Cow::Borrowed(""), ..PlannedOutput::clone(&output) };
    let mut outputs = Outputs::new([alone].into());
    outputs.place(0, output.offset);
    PlannedTensor {
        name: format!("{}{}", tensor.name, output.suffix).into(),
        dtype: output.dtype,
        shape: output.shape.clone(),
        read,
        role: tensor.role,
        decision: Decision::Keep,
        reason: tensor.reason.clone(),
        in_doubt: tensor.in_doubt,
        outputs,
    }
}
