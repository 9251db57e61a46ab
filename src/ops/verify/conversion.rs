//! What verifying against a source converts: into whatever compares it, and nothing is written.

use crate::error::{Error, IoContext, Result};
use crate::manifest::FileRecord;
use crate::ops::model_card;
use crate::ops::quantize::Conversion;
use crate::ops::verify::Options;
use crate::pipeline;
use crate::pipeline::{ExecutionContext, Outputs, Progress};
use crate::store::hash_range;

/// Converts into `outputs`.
pub(crate) fn execute(
    conversion: &Conversion,
    outputs: &dyn Outputs,
    options: Options<'_>,
) -> Result<pipeline::Outcome> {
    let context = ExecutionContext {
        device: &*conversion.device.backend,
        budget: conversion.budget,
        hash_source: conversion.options.hash_source,
        interrupt: options.interrupt,
        progress: &Told { hashed: options.hashed },
        trace: conversion.options.trace.as_deref(),
    };
    let sealed = vec![None; conversion.plan.files.len()];
    pipeline::run(&conversion.source, &conversion.plan, outputs, sealed, context)
}

/// The records of what lies beside the source's weights and is copied as it is: all but the model card, if that changes.
pub(crate) fn side_file_records(conversion: &Conversion) -> Result<Vec<FileRecord>> {
    let mut buffer = vec![0; 1 << 16];
    let card = model_card::changed(&conversion.source, &conversion.plan)?;
    let sides = conversion.source.side_files.iter().filter(|side| card.is_none() || side.name != model_card::NAME);
    sides
        .map(|side| {
            let path = side.location.path();
            let file = side.location.open().at(path, "open it")?;
            let hash = hash_range(&*file, 0, side.len, &mut buffer, || true).at(path, "read it")?;
            Ok(FileRecord { name: side.name.clone(), size: side.len, sha256: hash.ok_or(Error::Stopped)? })
        })
        .collect()
}

struct Told<'a> {
    hashed: &'a (dyn Fn(u64) + Sync),
}

impl Progress for Told<'_> {
    fn found(&self, _: usize, _: usize) {}

    fn resumed(&self, _: usize, _: u64) {}

    fn advanced(&self, _: &str, bytes: u64) {
        (self.hashed)(bytes);
    }

    fn sealed(&self, _: &str, _: u64) {}

    fn kept(&self, _: usize) {}
}
