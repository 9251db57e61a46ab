//! What files hold: their bytes, and the tensors that their headers and the manifest know.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, IoContext, Result};
use crate::ops::global_scales::GlobalScales;
use crate::ops::kept_modules::KeptModules;
use crate::ops::verify::hashing::hash_all;
use crate::ops::verify::headers::CheckedFile;
use crate::ops::verify::jobs::{Contents, Job, Opened};
use crate::ops::verify::{Checkpoint, Options, Report, files};

/// What a checkpoint's files are checked against, from any thread.
struct Expected<'a> {
    checkpoint: &'a Checkpoint,
    kept: &'a KeptModules,
    report: Mutex<Report>,
    /// Headers of files that are being hashed, by the files' names.
    headers: Mutex<HashMap<String, CheckedFile>>,
    /// Those of NVFP4, over all files: what shares one may stand in two.
    global_scales: Mutex<GlobalScales>,
}

/// Every file must be there, with its size and (but for `quick`) its hash; every tensor of the manifest must stand in its
/// file's header, and no other, and (but for `quick`) have its hash. `kept` is told of what is quantized.
pub(super) fn check(
    checkpoint: &Checkpoint,
    kept: &KeptModules,
    options: Options<'_>,
    report: &mut Report,
) -> Result<()> {
    let mut jobs = files::check_sizes(checkpoint, options.quick, report)?;
    let report_so_far = Mutex::new(std::mem::take(report));
    let (headers, global_scales) = Default::default();
    let contents = Expected { checkpoint, kept, report: report_so_far, headers, global_scales };
    if options.quick {
        for job in &jobs {
            if options.interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            if let Some(header) = contents.check_header(job)? {
                contents.add_global_scales(&header)?;
            }
        }
    } else {
        hash_all(&mut jobs, &contents, options)?;
    }
    *report = std::mem::take(&mut *contents.report());
    report.warnings.extend(contents.global_scales().warning());
    Ok(())
}

impl Expected<'_> {
    fn check_header(&self, job: &Job<'_>) -> Result<Option<CheckedFile>> {
        if !self.checkpoint.records.has_tensors_in(job.name) {
            return Ok(None);
        }
        let mut report = Report::default();
        let mut quantized = self.kept.quantized();
        let header = CheckedFile::open(self.checkpoint, job.name, &mut report, &mut |record| quantized.add(record))?;
        quantized.check();
        let mut all = self.report();
        all.tensors += report.tensors;
        all.differences.append(&mut report.differences);
        Ok(header)
    }

    fn add_global_scales(&self, header: &CheckedFile) -> Result<()> {
        let mut found = Vec::new();
        header.global_scales(&self.checkpoint.manifest.recipe.codec(), &mut |weight, scale| {
            found.push((weight.to_owned(), scale));
        })?;
        let mut all = self.global_scales();
        found.iter().for_each(|(weight, scale)| all.add(weight, *scale));
        Ok(())
    }

    fn global_scales(&self) -> MutexGuard<'_, GlobalScales> {
        self.global_scales.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn headers(&self) -> MutexGuard<'_, HashMap<String, CheckedFile>> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents for Expected<'_> {
    /// Compares its header with the manifest first. There is nothing to hash in a file that holds no tensors and is known to differ.
    fn open(&self, job: &Job<'_>) -> Result<Option<Opened>> {
        let Some(header) = self.check_header(job)? else {
            let location = self.checkpoint.folder.join(job.name);
            let open = |_| location.open().at(location.path(), "open it");
            return Ok(job.sha256.map(open).transpose()?.map(|bytes| Opened { bytes, tensors: Vec::new() }));
        };
        let opened = Opened { bytes: header.reopen()?, tensors: header.tensors(&mut self.report()) };
        self.headers().insert(job.name.to_owned(), header);
        Ok(Some(opened))
    }

    /// Checks the quant_states and the global scales in it.
    fn hashed(&self, job: &Job<'_>) -> Result<()> {
        let header = self.headers().remove(job.name);
        let Some(header) = header else { return Ok(()) };
        let mut report = Report::default();
        header.check_quant_states(self.checkpoint, &mut report)?;
        self.report().differences.append(&mut report.differences);
        self.add_global_scales(&header)
    }

    fn differ(&self, file: &str, tensor: Option<&str>, what: String) {
        self.report().differ(file, tensor, what);
    }

    fn path(&self, job: &Job<'_>) -> PathBuf {
        self.checkpoint.folder.join(job.name).path().to_owned()
    }
}
