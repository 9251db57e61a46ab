//! Converting a checkpoint: open, plan, execute, seal.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use crate::backend::{Backend, Cpu};
use crate::checkpoint::{
    CONFIG_NAME, Config, INDEX_NAME, MANIFEST_NAME, OutputFile, STAGING_NAME, SUMS_NAME, SideFile, Source, Staging,
    free_space, write_index,
};
use crate::error::{Error, Hint, IoContext, Result};
use crate::layout::recognize;
use crate::manifest::{
    DecisionRecord, FileRecord, Manifest, OutputRecord, SCHEMA_VERSION, SourceFileRecord, SourceRecord,
    SourceTensorRecord, Summary, TensorRecord, Tool, sha256_sums,
};
use crate::ops::job::Staged;
use crate::ops::job::journal::JobFingerprint;
use crate::ops::job::resume;
use crate::ops::model_card;
use crate::ops::relayout;
use crate::ops::relayout::Relayout;
use crate::pipeline;
use crate::pipeline::{Budget, ExecutionContext, FileOutcome, Limits, Outcome, Progress, TensorOutcome, Trace};
use crate::plan::{Plan, PlannedTensor, input};
use crate::recipe::{ExpertLayout, Recipe};
use crate::store::{HashingReader, Location, Reader, Sha256Hash};
use crate::units::Bytes;

/// How to convert: what decides nothing about the output's bytes.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most memory to use, in bytes.
    pub memory: u64,
    /// Threads to use.
    pub threads: usize,
    /// What quantizes.
    pub device: Arc<dyn Backend>,
    /// The most memory to use of each device, in bytes.
    pub device_memory: u64,
    /// Whether the manifest gets the SHA-256 of the source's files.
    pub hash_source: bool,
    /// Whether to replace a checkpoint at the destination.
    pub force: bool,
    /// Whether to discard what an earlier, unfinished run left there.
    pub restart: bool,
    /// Where to record what each thread does, if anywhere. Failing to is no error of the run: [`Trace::check`] tells of it.
    pub trace: Option<Arc<Trace>>,
}

impl Default for Options {
    /// 256 MiB here and on a device, all cores, the processor with its fastest kernel.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Options {
            memory: 256 << 20,
            threads,
            device: Arc::new(Cpu::detect()),
            device_memory: 256 << 20,
            hash_source: false,
            force: false,
            restart: false,
            trace: None,
        }
    }
}

/// A conversion that is planned to the last byte and not begun.
#[derive(Debug)]
pub struct Conversion {
    /// What is converted.
    pub(crate) source: Source,
    /// What will be written.
    pub plan: Plan,
    /// The memory it takes.
    pub budget: Budget,
    /// How it is done.
    pub options: Options,
    /// The relayout, if the source is a converted checkpoint whose experts are rewritten.
    relayout: Option<Relayout>,
    /// The manifest of the source, if it is a converted checkpoint that is decoded.
    dequantized: Option<Manifest>,
}

/// Opens `source` and plans its conversion; reads headers only, and writes nothing.
///
/// If `source` is a converted checkpoint itself and `recipe` is its own but for the layout of its experts, these are laid
/// out anew: bytes are copied, and nothing is quantized. [`recipe_of`](crate::recipe_of) gives its recipe.
///
/// # Errors
/// When the source is no checkpoint or damaged, or the recipe doesn't fit it; or a device has too little memory free.
pub fn plan(source: impl Into<Location>, recipe: Recipe, mut options: Options) -> Result<Conversion> {
    let source = Source::open(source)?;
    let manifest = match recognize::of(&source) {
        Some(_) => relayout::manifest_of(&source.location)?,
        None => None,
    };
    let (plan, relayout) = match manifest.filter(|manifest| manifest.recipe.codec().is_blocks()) {
        None => {
            input::check_quantization(&source, &recipe)?;
            (Plan::new(&source, recipe)?, None)
        }
        Some(manifest) => {
            let (plan, relayout) = Relayout::new(&source, manifest, recipe)?;
            options.hash_source = true; // what is read must be what its manifest says
            (plan, Some(relayout))
        }
    };
    let Options { memory, threads, device_memory, .. } = options;
    let budget = Budget::new(&plan, Limits { memory, threads, device_memory }, &*options.device)?;
    options.device.prepare(&plan.recipe.codec(), budget.device_peak())?;
    Ok(Conversion { source, plan, budget, options, relayout, dequantized: None })
}

impl Conversion {
    /// The decoding of a converted checkpoint, by a plan that decodes.
    pub(crate) fn dequantize(source: Source, plan: Plan, manifest: Manifest, options: Options) -> Result<Conversion> {
        let Options { memory, threads, device_memory, .. } = options;
        let budget = Budget::new(&plan, Limits { memory, threads, device_memory }, &*options.device)?;
        Ok(Conversion { source, plan, budget, options, relayout: None, dequantized: Some(manifest) })
    }

    /// The tensors of the source and the decision for each. It is `plan`, unless that only copies a converted checkpoint's
    /// parts to their new places.
    pub fn decisions(&self) -> &Plan {
        self.relayout.as_ref().map_or(&self.plan, |relayout| &relayout.plan)
    }

    /// The layout that a converted checkpoint's experts have, if they are rewritten.
    pub fn relaid_from(&self) -> Option<ExpertLayout> {
        self.relayout.as_ref().map(|relayout| relayout.from)
    }

    /// How many files of weights the source has, and how many others.
    pub fn source_files(&self) -> (usize, usize) {
        (self.source.files.len(), self.source.side_files.len())
    }

    /// Bytes of the source's tensors as they are stored.
    pub fn stored_len(&self) -> u64 {
        self.source.tensors().map(|(_, info)| info.len).sum()
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
        let side_files: u64 = self.source.side_files.iter().map(|file| file.len).sum();
        let outputs: usize = self.plan.tensors.iter().map(|tensor| tensor.outputs.len()).sum();
        let manifest = (self.plan.tensors.len() * 800 + outputs * 400 + (64 << 10)) as u64;
        self.plan.output_len() + side_files + manifest
    }

    /// Whether the conversion can be written to `destination`: it is a place for it, and there is room.
    pub fn check_destination(&self, destination: impl AsRef<Path>) -> Result<()> {
        let destination = &destination.as_ref().into();
        self.check_place(destination)?;
        self.check_space(destination, &[])
    }

    /// Whether `destination` is a place for it.
    fn check_place(&self, destination: &Location) -> Result<()> {
        let checked = Staging::check(destination, &self.source.location, self.options.force);
        let Err(Error::Destination { .. }) = checked else { return checked };
        let there = Manifest::read(&destination.join(MANIFEST_NAME)).ok();
        match there.as_ref().and_then(Manifest::other_version) {
            Some(version) => {
                let why = format!("{version} wrote the checkpoint there, and this is {}", env!("CARGO_PKG_VERSION"));
                Err(Error::Destination { path: destination.path().to_owned(), why, hint: Some(Hint::ReplaceOther) })
            }
            None => checked,
        }
    }

    /// Whether there is room for all but the files that are `sealed` already.
    fn check_space(&self, destination: &Location, sealed: &[Option<FileOutcome>]) -> Result<()> {
        let there = self.plan.files.iter().zip(sealed).filter(|(_, sealed)| sealed.is_some());
        let needed = self.disk_needed() - there.map(|(file, _)| file.len).sum::<u64>();
        match free_space(destination)? {
            Some(available) if available < needed => {
                let (needed, available) = (Bytes(needed).to_string(), Bytes(available).to_string());
                Err(Error::NoSpace { path: destination.path().to_owned(), needed, available })
            }
            _ => Ok(()),
        }
    }

    /// The manifest in `destination`, if it is of this very conversion, finished: same tool, recipe, config.json and
    /// source, by the sizes and headers of its files. Nothing more is looked at; `verify` does that.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub fn finished(&self, destination: impl AsRef<Path>) -> Result<Option<Manifest>> {
        let destination = &Location::from(destination.as_ref());
        let location = destination.join(MANIFEST_NAME);
        let is_file = location.is_file().at(location.path(), "look at it")?;
        if !is_file || is_there(&destination.join(STAGING_NAME))? {
            return Ok(None);
        }
        let manifest = match Manifest::read(&location) {
            Ok(manifest) => manifest,
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(_) => return Ok(None), // of nothing that this version writes
        };
        let hashed = manifest.source.files.iter().any(|file| file.sha256.is_some());
        let mut source = manifest.source.clone();
        if self.relayout.is_none() {
            source.files.iter_mut().for_each(|file| file.sha256 = None);
        }
        let same_source = source == self.source_record()
            && manifest.relaid_from == self.relaid_from()
            && (self.relayout.is_some() || hashed == self.options.hash_source);
        let config_of = |manifest: &Manifest| manifest.files.iter().find(|f| f.name == CONFIG_NAME).map(|f| f.sha256);
        let same_config = config_of(&manifest) == self.plan.config.as_ref().map(|text| Sha256Hash::of(text.as_bytes()));
        let same_recipe = manifest.other_version().is_none() && manifest.recipe == self.plan.recipe;
        let same = same_source && same_config && same_recipe;
        if same {
            Staging::tidy(destination);
        }
        Ok(same.then_some(manifest))
    }

    /// Writes the checkpoint to `destination` and returns its manifest; resumes where an earlier run was stopped. Until all
    /// of it is written, synced and hashed, nothing there can be taken for a checkpoint.
    pub fn execute(&self, destination: impl AsRef<Path>, progress: &dyn Progress) -> Result<Manifest> {
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
    ) -> Result<Manifest> {
        self.execute_at(interrupt, &destination.as_ref().into(), progress)
    }

    /// The same, whatever store the destination is in.
    #[doc(hidden)]
    pub fn execute_at(
        &self,
        interrupt: &AtomicBool,
        destination: &Location,
        progress: &dyn Progress,
    ) -> Result<Manifest> {
        self.carry_out(interrupt, destination, progress, |staging, files, outcome| {
            let manifest = self.finish(staging, files, outcome)?;
            Ok((published_names(&manifest), manifest))
        })
    }

    /// Writes the files that a decoding gives, and SHA256SUMS; returns what was written. As [`Conversion::execute_until`] otherwise.
    ///
    /// # Errors
    /// Those of reading and writing; [`Error::Interrupted`]; when the source isn't what its manifest says.
    pub fn dequantize_until(
        &self,
        interrupt: &AtomicBool,
        destination: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Vec<FileRecord>> {
        self.dequantize_at(interrupt, &destination.as_ref().into(), progress)
    }

    /// The same, whatever store the destination is in.
    #[doc(hidden)]
    pub fn dequantize_at(
        &self,
        interrupt: &AtomicBool,
        destination: &Location,
        progress: &dyn Progress,
    ) -> Result<Vec<FileRecord>> {
        self.carry_out(interrupt, destination, progress, |staging, files, _| {
            write_sums(staging, files.iter())?;
            let names = files.iter().map(|file| file.name.clone()).chain([SUMS_NAME.to_owned()]).collect();
            Ok((names, files))
        })
    }

    /// Writes all files to a staging folder, has `finish` add what it will and say what is published, and publishes it.
    fn carry_out<T>(
        &self,
        interrupt: &AtomicBool,
        destination: &Location,
        progress: &dyn Progress,
        finish: impl FnOnce(&Staging, Vec<FileRecord>, Outcome) -> Result<(Vec<String>, T)>,
    ) -> Result<T> {
        let Options { ref device, hash_source, force, .. } = self.options;
        self.check_place(destination)?;
        if !is_there(&destination.join(STAGING_NAME))? {
            self.check_space(destination, &[])?;
        }
        let staging = Staging::take(destination, &self.source.location, force)?;
        let (device, trace) = (&**device, self.options.trace.as_deref());
        let context = ExecutionContext { device, budget: self.budget, hash_source, interrupt, progress, trace };
        let files = self.write_files(&staging, context);
        match files.and_then(|(files, outcome)| finish(&staging, files, outcome)) {
            Ok((names, result)) => {
                staging.publish(&names)?;
                Ok(result)
            }
            Err(error) => {
                // Another job's files are not ours to tidy.
                if !matches!(error, Error::JobChanged { .. }) {
                    progress.kept(staging.abandon());
                }
                Err(error)
            }
        }
    }

    /// Weights, side files, config.json and index, in the staging folder.
    fn write_files(&self, staging: &Staging, context: ExecutionContext<'_>) -> Result<(Vec<FileRecord>, Outcome)> {
        let (source, plan) = (&self.source, &self.plan);
        let job = JobFingerprint::new(source, &plan.recipe, self.dequantized.is_some());
        let resumed = job.take_up(staging, self.options.restart)?;
        staging.remove_partial();
        let weights = plan.files.iter().map(|file| file.name.as_str());
        let names: Vec<&str> = weights.chain(source.side_files.iter().map(|file| file.name.as_str())).collect();
        staging.unpublish(names.iter().copied())?;
        staging.check_names(names.into_iter().chain([
            model_card::NAME,
            CONFIG_NAME,
            INDEX_NAME,
            MANIFEST_NAME,
            SUMS_NAME,
        ]))?;
        let sealed = match resumed {
            true => resume::sealed_files(staging, plan, context)?,
            false => vec![None; plan.files.len()],
        };
        self.check_space(staging.destination(), &sealed)?;
        let (outcome, side_files) = thread::scope(|scope| {
            let side_files = scope.spawn(|| copy_side_files(self, staging));
            let outputs = Staged { staging };
            let outcome = pipeline::run(source, plan, &outputs, sealed, context);
            (outcome, side_files.join().unwrap_or(Err(Error::Stopped)))
        });
        let outcome = outcome?;
        if let Some(manifest) = self.relayout.as_ref().map(|relayout| &relayout.manifest).or(self.dequantized.as_ref())
        {
            relayout::check_source(source, manifest, &outcome)?;
        }
        let mut files = side_files?;
        files.extend(plan.files.iter().zip(&outcome.files).map(|(file, sha256)| FileRecord {
            name: file.name.clone(),
            size: file.len,
            sha256: *sha256,
        }));
        if let Some(config) = &plan.config {
            files.push(write(staging, CONFIG_NAME, |file| file.write_all(config.as_bytes()))?);
        }
        if plan.files.len() > 1 {
            files.push(write(staging, INDEX_NAME, |file| self.write_index(file))?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((files, outcome))
    }

    /// Manifest and checksums, in the staging folder.
    fn finish(&self, staging: &Staging, files: Vec<FileRecord>, outcome: Outcome) -> Result<Manifest> {
        let manifest = self.manifest(files, outcome);
        let record = write(staging, MANIFEST_NAME, |file| manifest.write_json(file))?;
        write_sums(staging, manifest.files.iter().chain([&record]))?;
        Ok(manifest)
    }

    fn write_index(&self, file: &mut dyn io::Write) -> io::Result<()> {
        let outputs = self.plan.files.iter().flat_map(|file| {
            let tensors = self.plan.tensors[file.tensors.clone()].iter();
            tensors.flat_map(move |tensor| output_names(tensor).map(move |name| (name, file.name.as_str())))
        });
        let weight_map: Vec<(String, &str)> = outputs.collect();
        let total_size = self.plan.tensors.iter().map(PlannedTensor::output_len).sum();
        write_index(weight_map.iter().map(|(tensor, file)| (tensor.as_str(), *file)), total_size, file)
    }

    /// The source, as a manifest has it unless its files are hashed.
    fn source_record(&self) -> SourceRecord {
        if let Some(relayout) = &self.relayout {
            return relayout.manifest.source.clone();
        }
        let config = self.source.config.as_ref();
        let files = self.source.files.iter().map(|file| SourceFileRecord {
            name: file.name.clone(),
            size: file.identity.len,
            header_sha256: file.header_sha256,
            sha256: None,
        });
        SourceRecord {
            model_type: config.and_then(|config| config.model_types().first().map(|&name| name.to_owned())),
            config_sha256: config
                .filter(|_| self.plan.tensors.iter().any(PlannedTensor::is_decoded))
                .map(Config::sha256),
            files: files.collect(),
        }
    }

    /// The manifest of a conversion that came out so.
    pub(crate) fn manifest(&self, files: Vec<FileRecord>, outcome: Outcome) -> Manifest {
        let (source, plan, outcome) = match &self.relayout {
            Some(relayout) => (&relayout.origin, &relayout.plan, relayout.outcome(outcome)),
            None => (&self.source, &self.plan, outcome),
        };
        let Outcome { tensors, source_files, total, .. } = outcome;
        let elements = |quantized: bool| {
            let chosen = plan.tensors.iter().filter(move |tensor| tensor.quantized_from().is_some() == quantized);
            chosen.fold((0, 0), |(tensors, elements), tensor| (tensors + 1, elements + tensor.elements()))
        };
        let ((quantized_tensors, quantized_elements), (kept_tensors, kept_elements)) =
            (elements(true), elements(false));
        let mut hashed_files = self.source_record().files;
        for (file, sha256) in hashed_files.iter_mut().zip(source_files.into_iter().flatten()) {
            file.sha256 = Some(sha256);
        }
        let written = plan.files.iter().flat_map(|file| file.tensors.clone().map(move |i| (i, &file.name)));
        Manifest {
            schema_version: SCHEMA_VERSION,
            older_schema: None,
            tool: Tool::this(),
            recipe: plan.recipe.clone(),
            source: SourceRecord { files: hashed_files, ..self.source_record() },
            relaid_from: self.relaid_from(),
            summary: Summary {
                quantized_tensors,
                kept_tensors,
                quantized_elements,
                kept_elements,
                bits_per_quantized_weight: plan.bits_per_quantized_weight(),
                bits_per_weight: plan.bits_per_weight(),
                statistics: total,
            },
            files,
            tensors: written
                .zip(tensors)
                .map(|((i, file), outcome)| tensor_record(source, &plan.tensors[i], file, outcome))
                .collect(),
        }
    }
}

fn is_there(place: &Location) -> Result<bool> {
    place.exists().at(place.path(), "look at it")
}

fn tensor_record(source: &Source, tensor: &PlannedTensor, file: &str, outcome: TensorOutcome) -> TensorRecord {
    let outputs = tensor.outputs.iter().zip(output_names(tensor)).zip(outcome.sha256);
    TensorRecord {
        sources: source_tensors(source, tensor),
        role: tensor.role,
        decision: if tensor.quantized_from().is_some() { DecisionRecord::Quantize } else { DecisionRecord::Keep },
        reason: tensor.reason.clone().into_owned(),
        outputs: outputs
            .map(|((output, name), sha256)| OutputRecord {
                name,
                file: file.to_owned(),
                dtype: output.dtype.to_string(),
                shape: output.shape.clone(),
                sha256,
            })
            .collect(),
        statistics: outcome.statistics,
    }
}

/// The tensors that it is made of, each once.
fn source_tensors(source: &Source, tensor: &PlannedTensor) -> Vec<SourceTensorRecord> {
    let mut places: Vec<(usize, usize)> = Vec::new();
    for place in tensor.read.spans().map(|span| (span.file, span.tensor)) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let record = |(file, tensor): (usize, usize)| {
        let (file, info) = (&source.files[file], &source.files[file].tensors[tensor]);
        let (name, dtype, shape) = (info.name.clone(), info.dtype.to_string(), info.shape.clone());
        SourceTensorRecord { name, file: file.name.clone(), dtype, shape }
    };
    places.into_iter().map(record).collect()
}

fn output_names(tensor: &PlannedTensor) -> impl Iterator<Item = String> {
    tensor.outputs.iter().map(|output| format!("{}{}", tensor.name, output.suffix))
}

fn write_sums<'a>(staging: &Staging, files: impl Iterator<Item = &'a FileRecord>) -> Result<()> {
    let sums = sha256_sums(files.map(|file| (file.name.as_str(), file.sha256)));
    staging.write(SUMS_NAME, |file| file.write_all(sums.as_bytes())).map(|_| ())
}

/// All files of the checkpoint.
fn published_names(manifest: &Manifest) -> Vec<String> {
    let files = manifest.files.iter().map(|file| file.name.clone());
    files.chain([MANIFEST_NAME.to_owned(), SUMS_NAME.to_owned()]).collect()
}

fn write(
    staging: &Staging,
    name: &str,
    content: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
) -> Result<FileRecord> {
    let (size, sha256) = staging.write(name, content)?;
    Ok(FileRecord { name: name.to_owned(), size, sha256 })
}

/// Copies what lies beside the weights, as it is; the model card may be another.
fn copy_side_files(conversion: &Conversion, staging: &Staging) -> Result<Vec<FileRecord>> {
    let mut buffer = vec![0; 1 << 16];
    let card = model_card::changed(&conversion.source, &conversion.plan, conversion.dequantized.is_some())?;
    let files = conversion.source.side_files.iter();
    let files = files.filter(|side| card.is_none() || side.name != model_card::NAME);
    let mut records: Vec<FileRecord> = files
        .map(|side| {
            let sha256 = copy(side, staging.ready(&side.name), &mut buffer)?;
            Ok(FileRecord { name: side.name.clone(), size: side.len, sha256 })
        })
        .collect::<Result<_>>()?;
    if let Some(card) = card.filter(|card| !card.is_empty()) {
        records.push(write(staging, model_card::NAME, |file| file.write_all(&card))?);
    }
    let made = conversion.plan.side_files.iter();
    let made = made.map(|(name, text)| write(staging, name, |file| file.write_all(text.as_bytes())));
    records.extend(made.collect::<Result<Vec<_>>>()?);
    Ok(records)
}

/// Copies a file as it is; returns its hash.
fn copy(side: &SideFile, to: Location, buffer: &mut [u8]) -> Result<Sha256Hash> {
    let path = side.location.path();
    let file = side.location.open().at(path, "open it")?;
    let len = file.identity().at(path, "look at it")?.len;
    if len != side.len {
        let why = format!("it has {len} bytes, and had {}", side.len);
        return Err(Error::SourceChanged { path: path.to_owned(), why });
    }
    let (mut from, to) = (HashingReader::new(Reader::new(&*file)), OutputFile::create(to, len)?);
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(buffer.len() as u64) as usize;
        from.read_exact(&mut buffer[..piece]).at(path, "read it")?;
        to.write_at(&buffer[..piece], done)?;
        done += piece as u64;
    }
    to.sync()?;
    Ok(from.finish().1)
}
