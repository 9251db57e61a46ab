//! Writing a checkpoint's weights back as floats: for merging adapters, or a look.
//!
//! What is read is a checkpoint that prequant converted, whose manifest tells what is what; or one that another program quantized
//! and whose tensors tell. Decoding is an execution of a plan like any other, in which all tensors are kept and some are read
//! decoded.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::backend::Cpu;
use crate::checkpoint::{CONFIG_NAME, MANIFEST_NAME, SUMS_NAME, Source, WEIGHTS_KEY};
use crate::converted::Converted;
use crate::error::{Error, Result, Warning};
use crate::layout::bitsandbytes::EXPERTS_KEY;
use crate::layout::{leftover, recognize};
use crate::manifest::{FileRecord, LeftOutRecord, Manifest};
use crate::ops::job::write::{Job, write_sums};
use crate::ops::options::Options;
use crate::ops::recorded_source;
use crate::ops::records;
use crate::ops::relayout;
use crate::pipeline::{Budget, Progress};
use crate::plan::{Plan, source_quantization, split};
use crate::read::Input;
use crate::recipe::Recipe;
use crate::store::Location;

/// What config.json says because of the weights as they were stored, besides how they were quantized.
const CONFIG_KEYS: [&str; 2] = [EXPERTS_KEY, WEIGHTS_KEY];

/// The decoding of a quantized checkpoint, planned to the last byte and not begun.
#[derive(Debug)]
pub struct Dequantization {
    /// What is decoded.
    source: Source,
    /// What will be written.
    pub plan: Plan,
    /// The memory it takes.
    pub budget: Budget,
    /// How it is done.
    pub options: Options,
    /// The source's, if prequant converted it.
    manifest: Option<Manifest>,
}

/// Plans the decoding of `converted`; reads headers and what is one number a tensor, and writes nothing.
///
/// # Errors
/// When nothing in it is quantized, or not in a way that decodes; or it isn't what its manifest says.
pub fn plan(converted: impl Into<Location>, max_shard_size: u64, mut options: Options) -> Result<Dequantization> {
    let mut source = Source::open_with(converted, options.follow_links)?;
    let Floats { inputs, warnings, config, manifest } = Floats::of(&mut source)?;
    if !inputs.iter().any(|input| input.read.is_decoded()) {
        return Err(nothing_decodes(&source));
    }
    let recipe = manifest.as_ref().map_or_else(Recipe::default, |manifest| manifest.recipe.clone());
    let recipe = Recipe { max_shard_size, ..recipe };
    let mut plan = Plan::decoded(&source, recipe, inputs, config)?;
    plan.warnings.extend(warnings);
    options.hash_source = manifest.is_some(); // what is read must be what its manifest says
    let limits = options.limits(&source, manifest.as_ref().map_or(0, Manifest::held_len));
    let budget = Budget::new(&plan, limits, &Cpu::detect())?;
    Ok(Dequantization { source, plan, budget, options, manifest })
}

/// A checkpoint's tensors as floats, whatever they are stored as.
pub(crate) struct Floats {
    /// Every tensor; coded ones decoded.
    pub inputs: Vec<Input>,
    /// What should be known of them.
    pub warnings: Vec<Warning>,
    /// config.json without what says how weights are stored.
    pub config: Option<String>,
    /// The checkpoint's manifest, if prequant quantized it: what is read must be what that says.
    pub manifest: Option<Manifest>,
}

impl Floats {
    /// Those of an opened checkpoint.
    ///
    /// # Errors
    /// When it is quantized in a way that doesn't decode, or it isn't what its manifest says.
    pub(crate) fn of(source: &mut Source) -> Result<Floats> {
        let manifest = relayout::manifest_of(&source.location)?.filter(|manifest| manifest.recipe.quantizes());
        let (inputs, mut warnings) = match &manifest {
            Some(manifest) => {
                let (inputs, left_apart) = inputs(source, manifest)?;
                let warning = || {
                    "experts that the source had fused stay one by one: they aren't what this version would take them apart into, \
                     and its model may take them only fused"
                };
                (inputs, left_apart.then(|| warning().into()).into_iter().collect())
            }
            None => {
                leftover::take_out(source)?;
                source_quantization::check_decodes(source)?;
                source_quantization::inputs(source)?
            }
        };
        if let Some(manifest) = &manifest {
            warnings.extend(recorded_source::check(source, manifest)?);
        }
        let config = source.config.as_ref().map(|config| {
            let mut gone = recognize::places_in_config(config);
            gone.extend(CONFIG_KEYS.map(|key| vec![key]));
            config.edited(&[], &gone.iter().map(Vec::as_slice).collect::<Vec<_>>())
        });
        let config = config
            .transpose()
            .map_err(|error| Error::malformed(source.location.join(CONFIG_NAME).path(), error.to_string()))?;
        Ok(Floats { inputs, warnings, config, manifest })
    }
}

impl Dequantization {
    /// What of the source won't be in the checkpoint, but for its manifest and checksums.
    pub fn left_out(&self) -> Vec<LeftOutRecord> {
        let written = self.plan.files.iter().map(|file| file.name.as_str());
        let mut left_out = records::left_out(&self.source, written);
        left_out.retain(|left| ![MANIFEST_NAME, SUMS_NAME].contains(&left.name.as_str()));
        left_out
    }

    /// The recipe by which the source was converted, if prequant converted it.
    pub fn converted_by(&self) -> Option<&Recipe> {
        self.manifest.as_ref().map(|manifest| &manifest.recipe)
    }

    /// What the source's coded weights are in, by the names of their formats' libraries; for a source that another program
    /// quantized.
    pub fn formats(&self) -> Vec<&'static str> {
        source_quantization::formats(&self.source)
    }

    /// Writes the checkpoint to `destination`; returns its files. Resumes where an earlier run was stopped, and publishes at the
    /// end, as [`Conversion::execute`](crate::Conversion::execute) does.
    ///
    /// # Errors
    /// Those of reading and writing; when the source isn't what its manifest says.
    pub fn execute(&self, destination: impl AsRef<Path>, progress: &dyn Progress) -> Result<Vec<FileRecord>> {
        self.execute_until(&AtomicBool::new(false), destination, progress)
    }

    /// As [`Dequantization::execute`]; stops soon after `interrupt` is set.
    ///
    /// # Errors
    /// The same, and [`Error::Interrupted`].
    pub fn execute_until(
        &self,
        interrupt: &AtomicBool,
        destination: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Vec<FileRecord>> {
        self.execute_at(interrupt, &destination.as_ref().into(), progress)
    }

    /// The same, whatever store the destination is in.
    #[doc(hidden)]
    pub fn execute_at(
        &self,
        interrupt: &AtomicBool,
        destination: &Location,
        progress: &dyn Progress,
    ) -> Result<Vec<FileRecord>> {
        let Dequantization { source, plan, budget, options, manifest } = self;
        let job = Job { source, plan, budget: *budget, device: &Cpu::detect(), options, manifest: manifest.as_ref() };
        job.run(interrupt, destination, progress, |staging, files, _| {
            write_sums(staging, files.iter())?;
            let names = files.iter().map(|file| file.name.clone()).chain([SUMS_NAME.to_owned()]).collect();
            Ok((names, files))
        })
    }
}

fn nothing_decodes(source: &Source) -> Error {
    let why = format!(
        "none of its weights is quantized: give a checkpoint that prequant converted, with its {MANIFEST_NAME}, or one that is \
         quantized in a format it reads"
    );
    Error::NotACheckpoint { path: source.location.path().to_owned(), why }
}

/// Every tensor of the manifest, decoded; experts that were fused are so again. Also whether some can't be.
fn inputs(source: &Source, manifest: &Manifest) -> Result<(Vec<Input>, bool)> {
    let mut converted = Converted::new(source, manifest)?;
    let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
    let (mut inputs, mut left_apart) = (Vec::new(), false);
    // What one tensor of the source was taken apart into stands together.
    for records in manifest.tensors.chunk_by(|a, b| a.sources == b.sources) {
        let matrices = records.iter().map(|record| converted.weight(record)).collect::<Result<Vec<_>>>()?;
        let was_fused = records[0].sources.first().filter(|_| matrices.len() > 1);
        let joined = was_fused.map(|fused| split::join(source, &model_types, &fused.name, &fused.shape, &matrices));
        left_apart |= joined == Some(None);
        match joined.flatten() {
            Some(joined) => inputs.push(joined),
            None => inputs.extend(matrices),
        }
    }
    Ok((inputs, left_apart))
}
