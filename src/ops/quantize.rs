//! Converting a checkpoint: open, plan, execute, seal.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::backend::{ChosenDevice, Opening, Work};
use crate::checkpoint::{MANIFEST_NAME, STAGING_NAME, SUMS_NAME, Source, Staging, free_space};
use crate::error::{Error, IoContext, Result};
use crate::layout::{leftover, recognize};
use crate::manifest::{FileRecord, LeftOutRecord, Manifest, ManifestHead, NotHeld, SourceRecord};
use crate::ops::job::finished::{Comparison, Finished};
use crate::ops::job::staged::write;
use crate::ops::job::write::{Job, is_there, write_sums};
use crate::ops::options::Options;
use crate::ops::recorded_source;
use crate::ops::records;
use crate::ops::records::Records;
use crate::ops::relayout;
use crate::ops::relayout::Relayout;
use crate::pipeline::{Budget, Outcome, Progress};
use crate::plan::{Plan, PlannedTensor, source_quantization};
use crate::recipe::{ExpertLayout, Recipe};
use crate::store::Location;

/// Bytes for each tensor that planning a merge takes beside the plan, by estimate.
const MERGING_PER_TENSOR: u64 = 1536;

/// The length of rows, before it is known.
const LIKELY_COLUMNS: u64 = 4096;

/// A conversion that is planned to the last byte and not begun.
#[derive(Debug)]
pub struct Conversion {
    /// What is converted.
    pub(crate) source: Source,
    /// What will be written.
    pub plan: Plan,
    /// The memory it takes.
    pub budget: Budget,
    /// What quantizes.
    pub device: ChosenDevice,
    /// How it is done.
    pub options: Options,
    /// What the source is.
    origin: Origin,
}

/// What a conversion begins with.
#[derive(Debug)]
pub(crate) enum Origin {
    /// A checkpoint that is quantized.
    Plain,
    /// A converted checkpoint whose experts are rewritten.
    Relaid(Box<Relayout>),
    /// A checkpoint into which an adapter is merged, with its manifest if prequant quantized it.
    Merged { base: Option<Box<Manifest>> },
}

/// Opens `source` and plans its conversion; reads headers only, and writes nothing.
///
/// If `source` is a converted checkpoint itself and `recipe` is its own but for the layout of its experts, these are laid
/// out anew: bytes are copied, and nothing is quantized. [`recipe_of`](crate::recipe_of) gives its recipe.
///
/// # Errors
/// When the source is no checkpoint or damaged, or the recipe doesn't fit it; or a device has too little memory free.
pub fn plan(source: impl Into<Location>, recipe: Recipe, mut options: Options) -> Result<Conversion> {
    let source = source.into();
    if !recipe.quantizes() {
        let (path, why) = (source.path().to_owned(), "the recipe leaves all weights as floats".to_owned());
        return Err(Error::NothingToQuantize { path, why, hint: None });
    }
    let opening = open_device(&source, &recipe, &options)?;
    let mut source = Source::open_with(source, options.follow_links)?;
    leftover::take_out(&mut source)?;
    let manifest = match recognize::of(&source) {
        Some(_) => relayout::manifest_of(&source.location)?,
        None => None,
    };
    let (plan, origin) = match manifest.filter(|manifest| manifest.recipe.codec().is_blocks()) {
        None => {
            source_quantization::check(&source, &recipe)?;
            (Plan::new(&source, recipe)?, Origin::Plain)
        }
        Some(manifest) if manifest.source.adapter.is_some() => {
            let why = "an adapter was merged into it, and its experts can't be rewritten; merge base and adapter again, with the other \
                       layout of experts";
            return Err(Error::Relayout { path: source.location.path().to_owned(), why: why.to_owned(), hint: None });
        }
        Some(manifest) => {
            let (mut plan, relayout) = Relayout::new(&source, manifest, recipe)?;
            plan.warnings.extend(recorded_source::check(&source, &relayout.manifest)?);
            options.hash_source = true; // what is read must be what its manifest says
            (plan, Origin::Relaid(Box::new(relayout)))
        }
    };
    Conversion::new(source, plan, opening, options, origin)
}

/// Begins to open what quantizes the checkpoint at `source`.
pub(crate) fn open_device(source: &Location, recipe: &Recipe, options: &Options) -> Result<Opening> {
    let codec = recipe.codec();
    options.device.begin(options.device_memory, || {
        let source_len = Source::len_of_weights(source)?;
        // As if all of it were 16-bit weights.
        let (weights, threads) = (source_len / 2, options.threads);
        Ok(Work { source_len, weights, codec: &codec, columns: LIKELY_COLUMNS, threads }.too_little().is_none())
    })
}

/// What quantizes this plan.
fn choose(opening: Opening, plan: &Plan, threads: usize) -> Result<ChosenDevice> {
    let codec = plan.recipe.codec();
    let columns = plan.quantized().next().map_or(LIKELY_COLUMNS, PlannedTensor::columns);
    let weights = plan.quantized().map(PlannedTensor::elements).sum();
    let work = Work { source_len: plan.source_len(), weights, codec: &codec, columns, threads };
    opening.finish(&work, |backend| plan.quantized().any(|tensor| backend.quantizes(&codec, tensor.columns())))
}

impl Conversion {
    /// A plan with what it is executed with.
    ///
    /// # Errors
    /// When the device can't be used, or there is too little memory.
    pub(crate) fn new(
        source: Source,
        plan: Plan,
        opening: Opening,
        options: Options,
        origin: Origin,
    ) -> Result<Conversion> {
        let device = choose(opening, &plan, options.threads)?;
        let beside = match &origin {
            Origin::Relaid(relayout) => relayout.held_len(),
            Origin::Merged { base } => {
                // Names that adapters have for tensors, and the plan of the floats that are quantized.
                let planning = MERGING_PER_TENSOR * source.tensors().count() as u64;
                planning + base.as_ref().map_or(0, |manifest| manifest.held_len())
            }
            Origin::Plain => 0,
        };
        let budget = Budget::new(&plan, options.limits(&source, beside), &*device.backend)?;
        if budget.lanes.is_some() {
            device.backend.prepare(&plan.recipe.codec(), budget.device_peak())?;
        }
        Ok(Conversion { source, plan, budget, device, options, origin })
    }

    fn relayout(&self) -> Option<&Relayout> {
        match &self.origin {
            Origin::Relaid(relayout) => Some(relayout),
            Origin::Plain | Origin::Merged { .. } => None,
        }
    }

    /// The tensors of the source and the decision for each. It is `plan`, unless that only copies a converted checkpoint's
    /// parts to their new places.
    pub fn decisions(&self) -> &Plan {
        self.relayout().map_or(&self.plan, |relayout| &relayout.plan)
    }

    /// The layout that a converted checkpoint's experts have, if they are rewritten.
    pub fn relaid_from(&self) -> Option<ExpertLayout> {
        self.relayout().map(|relayout| relayout.from)
    }

    /// How many files of weights the source has, and how many others.
    pub fn source_files(&self) -> (usize, usize) {
        (self.source.own_files().len(), self.source.side_files.len())
    }

    /// What lies beside the source's weights and is copied: paths below the source, and sizes.
    pub fn copied_files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.source.side_files.iter().map(|file| (file.name.as_str(), file.len))
    }

    /// What of the source won't be in the checkpoint: files, and tensors of files.
    pub fn left_out(&self) -> Vec<LeftOutRecord> {
        let Conversion { source, plan, .. } = self;
        let made = plan.side_files.iter().map(|(name, _)| name.as_str()).chain(self.job().index_name());
        records::left_out(source, plan.files.iter().map(|file| file.name.as_str()).chain(made))
    }

    /// Bytes of the source's tensors as they are stored.
    pub fn stored_len(&self) -> u64 {
        self.source.own_files().iter().flat_map(|file| &file.tensors).map(|info| info.len).sum()
    }

    /// Bytes that are free at `destination`; `None` if the file system keeps no count.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub fn disk_free(&self, destination: impl AsRef<Path>) -> Result<Option<u64>> {
        free_space(&destination.as_ref().into())
    }

    /// Bytes that the destination must have room for: weights, side files, and the manifest by estimate.
    pub fn disk_needed(&self) -> u64 {
        self.job().disk_needed()
    }

    /// Whether the conversion can be written to `destination`: it is a place for it, and there is room.
    pub fn check_destination(&self, destination: impl AsRef<Path>) -> Result<()> {
        self.job().check_destination(&destination.as_ref().into())
    }

    pub(crate) fn job(&self) -> Job<'_> {
        let Conversion { source, plan, budget, device, options, origin } = self;
        let manifest = match origin {
            Origin::Relaid(relayout) => Some(&relayout.manifest),
            Origin::Merged { base } => base.as_deref(),
            Origin::Plain => None,
        };
        Job { source, plan, budget: *budget, device: &*device.backend, options, manifest }
    }

    /// What `destination` holds, if that is this very conversion, finished: same tool and recipe, same source by the sizes and
    /// headers of its weights and the content of all its other files. The weights' content is compared where
    /// [`Options::hash_source`] is set and was then, or the store knows its hash; nothing else of what was written is looked
    /// at but that it is there, with its size: `verify` does that.
    ///
    /// # Errors
    /// [`Error::Outdated`] when it is that conversion of another content, or not all of it is there; when the system refuses to
    /// tell.
    pub fn finished(&self, destination: impl AsRef<Path>) -> Result<Option<Finished>> {
        let destination = &Location::from(destination.as_ref());
        let location = destination.join(MANIFEST_NAME);
        let is_file = location.is_file().at(location.path(), "look at it")?;
        if !is_file || is_there(&destination.join(STAGING_NAME))? {
            return Ok(None);
        }
        let manifest = match ManifestHead::read_head(&location) {
            Ok(manifest) => manifest,
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(_) => return Ok(None), // of nothing that this version writes
        };
        if !self.is_of_this_recipe(&manifest) {
            return Ok(None);
        }
        let record = &self.source_record();
        let (source, plan, threads) = (&self.source, &self.plan, self.options.threads);
        let comparison = Comparison { manifest: &manifest, destination, source, plan, record, threads };
        comparison.check()?;
        let weights_compared = self.relayout().is_none() && comparison.check_weights(self.options.hash_source)?;
        Staging::tidy(destination)?;
        Ok(Some(Finished { manifest, weights_compared }))
    }

    /// Whether a manifest is of a conversion with the same choices.
    fn is_of_this_recipe(&self, manifest: &ManifestHead) -> bool {
        let hashed = manifest.source.files.iter().any(|file| file.sha256.is_some());
        manifest.other_version().is_none()
            && manifest.recipe == self.plan.recipe
            && manifest.relaid_from == self.relaid_from()
            && (self.relayout().is_some() || hashed || !self.options.hash_source)
    }

    /// Writes the checkpoint to `destination` and returns its manifest, without the tensors' records; resumes where an earlier run was
    /// stopped. Until all of it is written, synced and hashed, nothing there can be taken for a checkpoint.
    pub fn execute(&self, destination: impl AsRef<Path>, progress: &dyn Progress) -> Result<ManifestHead> {
        self.execute_until(&AtomicBool::new(false), destination, progress)
    }

    /// As [`Conversion::execute`]; stops soon after `interrupt` is set.
    ///
    /// # Errors
    /// Those of reading and writing; [`Error::Interrupted`]. Files that are finished by then are kept for the next run.
    pub fn execute_until(
        &self,
        interrupt: &AtomicBool,
        destination: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<ManifestHead> {
        self.execute_at(interrupt, &destination.as_ref().into(), progress)
    }

    /// The same, whatever store the destination is in.
    #[doc(hidden)]
    pub fn execute_at(
        &self,
        interrupt: &AtomicBool,
        destination: &Location,
        progress: &dyn Progress,
    ) -> Result<ManifestHead> {
        self.job().run(interrupt, destination, progress, |staging, files, outcome| {
            let manifest = self.finish(staging, files, outcome)?;
            Ok((published_names(&manifest), manifest))
        })
    }

    /// Manifest and checksums, in the staging folder.
    fn finish(&self, staging: &Staging, files: Vec<FileRecord>, outcome: Outcome) -> Result<ManifestHead> {
        let outcome = self.relaid(outcome);
        let manifest = self.manifest(files, &outcome);
        let record = write(staging, MANIFEST_NAME, |file| manifest.write_json(file))?;
        let manifest = manifest.with(NotHeld);
        write_sums(staging, manifest.files.iter().chain([&record]))?;
        Ok(manifest)
    }

    /// The source, as a manifest has it unless its files are hashed.
    fn source_record(&self) -> SourceRecord {
        match self.relayout() {
            Some(relayout) => relayout.manifest.source.clone(),
            None => records::source(&self.source, &self.plan),
        }
    }

    /// What came of executing the plan, as the manifest has it.
    pub(crate) fn relaid(&self, outcome: Outcome) -> Outcome {
        match self.relayout() {
            None => outcome,
            Some(relayout) => relayout.outcome(outcome),
        }
    }

    /// The manifest of a conversion that came out so.
    pub(crate) fn manifest<'a>(&'a self, files: Vec<FileRecord>, outcome: &'a Outcome) -> Manifest<Records<'a>> {
        let record = self.source_record();
        let Some(relayout) = self.relayout() else {
            return records::manifest(&self.source, &self.plan, record, files, outcome);
        };
        let manifest = records::manifest(&relayout.origin, &relayout.plan, record, files, outcome);
        let left_out = relayout.manifest.left_out.clone();
        Manifest { relaid_from: Some(relayout.from), left_out, ..manifest }
    }
}

/// All files of the checkpoint.
fn published_names(manifest: &ManifestHead) -> Vec<String> {
    let files = manifest.files.iter().map(|file| file.name.clone());
    files.chain([MANIFEST_NAME.to_owned(), SUMS_NAME.to_owned()]).collect()
}
