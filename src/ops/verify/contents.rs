//! What files hold: their bytes, and the tensors that their headers and the manifest know.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, IoContext, Result};
use crate::ops::verify::hashing::{Job, Opened, hash_all};
use crate::ops::verify::headers::{ByFile, CheckedFile};
use crate::ops::verify::{Checkpoint, Options, Report, files, headers};

/// What a checkpoint's files are checked against, from any thread.
pub(super) struct Contents<'a> {
    checkpoint: &'a Checkpoint,
    by_file: &'a ByFile<'a>,
    report: Mutex<Report>,
}

/// Every file must be there, with its size and (but for `quick`) its hash; every tensor of the manifest must stand in its
/// file's header, and no other, and (but for `quick`) have its hash.
pub(super) fn check(checkpoint: &Checkpoint, options: Options<'_>, report: &mut Report) -> Result<()> {
    let by_file = headers::by_file(&checkpoint.manifest);
    let mut jobs = files::check_sizes(checkpoint, &by_file, options.quick, report)?;
    let contents = Contents { checkpoint, by_file: &by_file, report: Mutex::new(std::mem::take(report)) };
    if options.quick {
        for job in &jobs {
            if options.interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            contents.check_header(job)?;
        }
    } else {
        hash_all(&mut jobs, &contents, options)?;
    }
    *report = contents.report.into_inner().unwrap_or_else(PoisonError::into_inner);
    headers::check_index(checkpoint, &by_file, report)
}

impl<'a> Contents<'a> {
    /// Opens a file and checks its header. No file if there is nothing to hash, no header if it holds no tensors.
    pub(super) fn open(&self, job: &Job<'_>) -> Result<(Option<Opened<'a>>, Option<CheckedFile<'a>>)> {
        let header = self.check_header(job)?;
        let opened = match (&header, job.sha256) {
            (Some(header), _) => Some(Opened { bytes: header.reopen()?, tensors: header.tensors(&mut self.report()) }),
            (None, Some(_)) => {
                let location = self.checkpoint.folder.join(job.name);
                Some(Opened { bytes: location.open().at(location.path(), "open it")?, tensors: Vec::new() })
            }
            (None, None) => None,
        };
        Ok((opened, header))
    }

    fn check_header(&self, job: &Job<'_>) -> Result<Option<CheckedFile<'a>>> {
        let Some(expected) = self.by_file.get(job.name) else { return Ok(None) };
        let mut report = Report::default();
        let header = CheckedFile::open(self.checkpoint, job.name, expected, &mut report)?;
        let mut all = self.report();
        all.tensors += report.tensors;
        all.differences.append(&mut report.differences);
        Ok(header)
    }

    /// Checks the quant_states in a file, whose bytes were read a moment ago.
    pub(super) fn check_quant_states(&self, header: &CheckedFile<'_>) -> Result<()> {
        let mut report = Report::default();
        header.check_quant_states(&self.checkpoint.manifest, &mut report)?;
        self.report().differences.append(&mut report.differences);
        Ok(())
    }

    /// A file or a tensor in it isn't as it should be.
    pub(super) fn differ(&self, file: &str, tensor: Option<&str>, what: String) {
        self.report().differ(file, tensor, what);
    }

    /// A file's path, for messages.
    pub(super) fn path(&self, job: &Job<'_>) -> PathBuf {
        self.checkpoint.folder.join(job.name).path().to_owned()
    }

    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
