//! What verifying found.

use serde::Serialize;

use crate::checkpoint::FileClass;
use crate::error::Warning;
use crate::manifest::LeftOutRecord;

/// What a difference means to those who load the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceClass {
    /// Clients load other bytes than were written, or something more, or what tells so can't be trusted.
    Damage,
    /// A file that no client loads was changed, added or removed: README.md, pictures, licenses, files of git and the hub.
    Edited,
}

impl DifferenceClass {
    /// Of a difference in the file at this path below the checkpoint's folder.
    pub(super) fn of(file: &str) -> DifferenceClass {
        match FileClass::of(file) {
            FileClass::Loaded => DifferenceClass::Damage,
            FileClass::ForPeople => DifferenceClass::Edited,
        }
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The file, below the checkpoint's folder; a folder's name ends in a slash.
    pub file: String,
    /// The tensor, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// What was found, and what was expected.
    pub what: String,
    /// What it means to those who load the checkpoint.
    pub class: DifferenceClass,
}

/// What verifying found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Files looked at.
    pub files: usize,
    /// Tensors of the output looked at.
    pub tensors: usize,
    /// Bytes hashed.
    pub bytes: u64,
    /// What wrote the checkpoint, if it was compared with its source and another version had written it: then tensors
    /// were compared, wherever they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub written_by: Option<String>,
    /// What of the source was left out when it was converted, by the manifest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOutRecord>,
    /// What readers get wrong, though it is as it was written.
    #[serde(skip)]
    pub warnings: Vec<Warning>,
    /// Everything that is not as it should be, by file; empty if all is well.
    pub differences: Vec<Difference>,
}

impl Report {
    /// Differences of this class.
    pub fn count(&self, class: DifferenceClass) -> usize {
        self.differences.iter().filter(|difference| difference.class == class).count()
    }

    /// Whether what clients load is as it was written; if `strict`, all else too.
    pub fn is_ok(&self, strict: bool) -> bool {
        self.count(DifferenceClass::Damage) == 0 && (!strict || self.differences.is_empty())
    }

    pub(super) fn differ(&mut self, file: &str, tensor: Option<&str>, what: impl Into<String>) {
        self.differ_as(DifferenceClass::of(file), file, tensor, what);
    }

    /// The same, if the class isn't that of the file.
    pub(super) fn differ_as(
        &mut self,
        class: DifferenceClass,
        file: &str,
        tensor: Option<&str>,
        what: impl Into<String>,
    ) {
        let (file, tensor) = (file.to_owned(), tensor.map(str::to_owned));
        self.differences.push(Difference { file, tensor, what: what.into(), class });
    }

    /// Puts differences in order, each once.
    pub(super) fn sort(&mut self) {
        self.differences.sort();
        self.differences.dedup();
    }
}
