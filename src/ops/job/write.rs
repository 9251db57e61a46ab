//! Writing a planned checkpoint to a destination: all files to a staging folder, which is published in one last step.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::AtomicBool;

use crate::backend::Backend;
use crate::checkpoint::{
    CONFIG_NAME, MANIFEST_NAME, STAGING_NAME, SUMS_NAME, Source, Staging, free_space, needs_an_index, write_index,
};
use crate::error::{Error, Hint, IoContext, Result};
use crate::manifest::{FileRecord, Manifest, ManifestHead, sha256_sums};
use crate::ops::job::journal::JobFingerprint;
use crate::ops::job::staged::{Staged, write};
use crate::ops::job::{replace, resume, side_files};
use crate::ops::model_card;
use crate::ops::options::Options;
use crate::ops::recorded_source;
use crate::pipeline;
use crate::pipeline::{Budget, ExecutionContext, FileOutcome, Outcome, Progress};
use crate::plan::{Plan, PlannedTensor};
use crate::store::Location;
use crate::threads;
use crate::units::Bytes;

/// A plan to be written, and all that it takes.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    /// What is read.
    pub source: &'a Source,
    /// What is written.
    pub plan: &'a Plan,
    /// The memory it takes.
    pub budget: Budget,
    /// What quantizes.
    pub device: &'a dyn Backend,
    /// How it is done.
    pub options: &'a Options,
    /// The source's manifest, if it has one that it must agree with.
    pub manifest: Option<&'a Manifest>,
}

impl Job<'_> {
    /// Bytes that the destination must have room for: weights, side files, and the manifest by estimate.
    pub(crate) fn disk_needed(&self) -> u64 {
        let side_files: u64 = self.source.side_files.iter().map(|file| file.len).sum();
        let outputs: usize = self.plan.tensors.iter().map(|tensor| tensor.outputs.len()).sum();
        let manifest = (self.plan.tensors.len() * 800 + outputs * 400 + (64 << 10)) as u64;
        self.plan.output_len() + side_files + manifest
    }

    /// The name of the index, if one is written: of several files of weights, or of one beside others that aren't the model's
    /// own. Without an index vLLM and others load all that are there.
    pub(crate) fn index_name(&self) -> Option<&'static str> {
        (self.plan.files.len() > 1 || needs_an_index(&self.source.side_files)).then_some(self.source.naming().index)
    }

    /// Whether it can be written to `destination`: that is a place for it, and there is room.
    pub(crate) fn check_destination(&self, destination: &Location) -> Result<()> {
        self.check_place(destination)?;
        self.check_space(destination, &[])
    }

    /// Whether `destination` is a place for it.
    fn check_place(&self, destination: &Location) -> Result<()> {
        let checked = Staging::check(destination, &self.source.location, self.options.force);
        match checked {
            Ok(()) => return replace::check(destination, &self.names()),
            Err(Error::Destination { .. }) => {}
            Err(_) => return checked,
        }
        match written_by_another(destination)? {
            Some(version) => {
                let why = format!("{version} wrote the checkpoint there, and this is {}", env!("CARGO_PKG_VERSION"));
                Err(Error::Destination { path: destination.path().to_owned(), why, hint: Some(Hint::ReplaceOther) })
            }
            None => checked,
        }
    }

    /// The files that it will write, as far as they are loaded with weights.
    fn names(&self) -> BTreeSet<String> {
        let weights = self.plan.files.iter().map(|file| file.name.clone());
        let index = self.index_name().map(str::to_owned);
        let config = self.plan.config.as_ref().map(|_| CONFIG_NAME.to_owned());
        let others = self.source.side_files.iter().map(|file| file.name.clone());
        weights.chain(index).chain(config).chain(others).collect()
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

    /// Writes all files to a staging folder, has `finish` add what it will and say what is published, and publishes it.
    pub(crate) fn run<T>(
        &self,
        interrupt: &AtomicBool,
        destination: &Location,
        progress: &dyn Progress,
        finish: impl FnOnce(&Staging, Vec<FileRecord>, Outcome) -> Result<(Vec<String>, T)>,
    ) -> Result<T> {
        let Options { hash_source, force, ref trace, .. } = *self.options;
        self.check_place(destination)?;
        if !is_there(&destination.join(STAGING_NAME))? {
            self.check_space(destination, &[])?;
        }
        let staging = Staging::take(destination, &self.source.location, force)?;
        let (device, trace) = (self.device, trace.as_deref());
        let context = ExecutionContext { device, budget: self.budget, hash_source, interrupt, progress, trace };
        let files = self.write_files(&staging, context);
        match files.and_then(|(files, outcome)| finish(&staging, files, outcome)) {
            Ok((names, result)) => {
                let replaced = staging.replaces();
                let old = if replaced { replace::listed(destination)? } else { BTreeSet::new() };
                staging.publish(&names, old)?;
                if replaced {
                    let published = names.into_iter().collect();
                    replace::left(destination, &published)?.iter().for_each(|file| progress.left(file));
                }
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
        let (source, plan) = (self.source, self.plan);
        let marks = source.marks()?;
        let sealed = self.take_up(staging, context)?;
        self.check_space(staging.destination(), &sealed)?;
        let (side_files, outcome) = threads::beside(
            || side_files::copy(source, plan, staging),
            || pipeline::run(source, plan, &Staged { staging }, sealed, context),
        );
        let outcome = outcome?;
        let mut files = side_files?;
        source.check_unchanged(&marks)?;
        if let Some(manifest) = self.manifest {
            recorded_source::check_read(source, manifest, &outcome, &files)?;
        }
        files.extend(plan.files.iter().zip(&outcome.files).map(|(file, sha256)| FileRecord {
            name: file.name.clone(),
            size: file.len,
            sha256: *sha256,
        }));
        if let Some(config) = &plan.config {
            files.push(write(staging, CONFIG_NAME, |file| file.write_all(config.as_bytes()))?);
        }
        if let Some(name) = self.index_name() {
            files.push(write(staging, name, |file| write_index_of(plan, file))?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((files, outcome))
    }

    /// Takes up what an earlier run left in the staging folder, or begins; returns which of the plan's files are finished.
    fn take_up(&self, staging: &Staging, context: ExecutionContext<'_>) -> Result<Vec<Option<FileOutcome>>> {
        let (source, plan) = (self.source, self.plan);
        let job = JobFingerprint::new(source, plan);
        let resumed = job.take_up(staging, self.options.restart)?;
        staging.remove_partial();
        staging.unpublish()?;
        staging.make_folders()?;
        let weights = plan.files.iter().map(|file| file.name.as_str());
        let names = weights.chain(source.side_files.iter().map(|file| file.name.as_str()));
        let others = [model_card::NAME, CONFIG_NAME, source.naming().index, MANIFEST_NAME, SUMS_NAME];
        staging.check_names(names.chain(others))?;
        match resumed {
            true => resume::sealed_files(staging, source, plan, context),
            false => Ok(vec![None; plan.files.len()]),
        }
    }
}

/// The index of a plan's tensors.
pub(crate) fn write_index_of(plan: &Plan, file: &mut dyn io::Write) -> io::Result<()> {
    let total_size = plan.tensors.iter().map(PlannedTensor::output_len).sum();
    write_index(plan.names_in_order(), total_size, file)
}

/// The version that wrote the checkpoint at `destination`, if that is another than this one.
fn written_by_another(destination: &Location) -> Result<Option<String>> {
    let manifest = destination.join(MANIFEST_NAME);
    if !manifest.is_file().at(manifest.path(), "look at it")? {
        return Ok(None);
    }
    match ManifestHead::read_head(&manifest) {
        Ok(manifest) => Ok(manifest.other_version()),
        Err(Error::Malformed { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether anything is there.
pub(crate) fn is_there(place: &Location) -> Result<bool> {
    place.exists().at(place.path(), "look at it")
}

/// SHA256SUMS, in the staging folder.
pub(crate) fn write_sums<'a>(staging: &Staging, files: impl Iterator<Item = &'a FileRecord>) -> Result<()> {
    let sums = sha256_sums(files.map(|file| (file.name.as_str(), file.sha256)));
    staging.write(SUMS_NAME, |file| file.write_all(sums.as_bytes())).map(|_| ())
}
