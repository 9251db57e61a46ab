//! What is hashed, and who knows what it should be.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::store::{ReadAt, Sha256Hash};

/// A file to be hashed.
pub(super) struct Job<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// Its size.
    pub len: u64,
    /// What its SHA-256 should be; none if it is known to differ, and only its tensors are of interest.
    pub sha256: Option<Sha256Hash>,
}

/// A tensor to be hashed.
pub(super) struct TensorJob {
    /// Its name.
    pub name: Arc<str>,
    /// Where it is in its file; not empty.
    pub place: Range<u64>,
    /// What its SHA-256 should be.
    pub sha256: Sha256Hash,
}

impl TensorJob {
    /// Its size.
    pub(super) fn len(&self) -> u64 {
        self.place.end - self.place.start
    }
}

/// A file's content.
pub(super) struct Opened {
    /// The open file.
    pub bytes: Box<dyn ReadAt>,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<TensorJob>,
}

/// What a checkpoint's files hold, asked from any thread.
pub(super) trait Contents: Sync {
    /// Opens a file; none if there is nothing to hash in it.
    fn open(&self, job: &Job<'_>) -> Result<Option<Opened>>;
    /// All of a file was read a moment ago.
    fn hashed(&self, job: &Job<'_>) -> Result<()>;
    /// A file or a tensor in it isn't as it should be.
    fn differ(&self, file: &str, tensor: Option<&str>, what: String);
    /// A file's path, for messages.
    fn path(&self, job: &Job<'_>) -> PathBuf;
}
