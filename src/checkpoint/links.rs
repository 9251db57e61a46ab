//! Where links in a checkpoint's folder may lead. What is copied from behind a link ends in a folder that may be published, so
//! that a stranger's link must not reach files of this machine.

use std::path::{Path, PathBuf};

use crate::error::{Error, Hint, IoContext, Result};
use crate::store::{Kind, Location};

/// The folders that links of a checkpoint may lead to.
pub(crate) struct Reach {
    /// The checkpoint's own, resolved.
    root: PathBuf,
    /// The hub cache's `blobs`, if the folder is a snapshot there.
    blobs: Option<PathBuf>,
    /// Where links of weights lead, that may lead anywhere: a safetensors file is no secret of this machine's.
    weights: Vec<PathBuf>,
    /// Whether links may lead anywhere.
    anywhere: bool,
}

impl Reach {
    /// Of links in `folder`; `anywhere` if the user said so.
    ///
    /// # Errors
    /// When the folder can't be resolved.
    pub(crate) fn new(folder: &Location, anywhere: bool) -> Result<Reach> {
        let root = folder.resolve().at(folder.path(), "open it")?;
        let cache = root.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
        let blobs = cache.map(|cache| cache.join("blobs"));
        Ok(Reach { root, blobs, weights: Vec::new(), anywhere })
    }

    /// Notes where a file of weights is; others of the checkpoint may be beside it.
    ///
    /// # Errors
    /// When it isn't a file, or a link that leads nowhere.
    pub(crate) fn add_weights(&mut self, file: &Location) -> Result<()> {
        let target = resolve(file)?;
        check_is_file(file)?;
        if let Some(folder) = target.parent().filter(|_| !target.starts_with(&self.root)) {
            self.weights.push(folder.to_owned());
            self.weights.dedup();
        }
        Ok(())
    }

    /// Checks a file that is read as it is, or copied: `name` is its path below the checkpoint's folder.
    ///
    /// # Errors
    /// When it isn't a file, a link that leads nowhere, or one out of the folder.
    pub(crate) fn check(&self, file: &Location, name: &str) -> Result<()> {
        let target = resolve(file)?;
        check_is_file(file)?;
        let inside =
            target.starts_with(&self.root) || self.blobs.as_ref().is_some_and(|blobs| target.starts_with(blobs));
        if inside || self.anywhere || self.is_beside_weights(&target, name) || is_in_a_hub_cache(&target) {
            return Ok(());
        }
        let why = format!("a link out of the checkpoint's folder, to {}; put the file itself here", target.display());
        Err(Error::Malformed { path: file.path().to_owned(), why, hint: Some(Hint::FollowLinks) })
    }

    /// Whether all of the checkpoint lies elsewhere, and its folder holds links of the same names.
    fn is_beside_weights(&self, target: &Path, name: &str) -> bool {
        self.weights.iter().any(|folder| target == folder.join(name))
    }
}

/// `models--x--y/blobs/HASH` or `models--x--y/snapshots/REVISION/...`, anywhere.
fn is_in_a_hub_cache(target: &Path) -> bool {
    let names: Vec<_> = target.iter().map(|name| name.to_string_lossy()).collect();
    let is_hash = |name: &str| name.len() >= 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let at = names.iter().rposition(|name| name.starts_with("models--"));
    match at.map(|at| &names[at + 1..]) {
        Some([folder, hash]) => folder == "blobs" && is_hash(hash),
        Some([folder, _, _, ..]) => folder == "snapshots",
        _ => false,
    }
}

/// Where a file's links lead in the end.
fn resolve(file: &Location) -> Result<PathBuf> {
    let path = file.path();
    match file.resolve() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(broken(file)),
        other => other.at(path, "open it"),
    }
}

/// The error of a link that leads nowhere, or of a file that is gone.
pub(crate) fn broken(file: &Location) -> Error {
    let path = file.path();
    let why = match path.parent().and_then(Path::parent) {
        Some(snapshots) if snapshots.ends_with("snapshots") => {
            "a link of the hub's cache whose blob is gone: it was pruned, or its download cut off; download it again \
             (`hf download`)"
        }
        _ => "a link that leads nowhere: what it names isn't there; put the file itself here",
    };
    Error::malformed(path, why)
}

/// Opening a pipe or a device could wait for ever.
fn check_is_file(file: &Location) -> Result<()> {
    let path = file.path();
    match file.kind().at(path, "look at it")? {
        Some(Kind::File) => Ok(()),
        Some(Kind::Folder) => Err(Error::malformed(path, "not a regular file but a folder: expected a file of bytes")),
        Some(_) => Err(Error::malformed(path, crate::error::NotAFile.to_string())),
        None => Err(broken(file)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_hub_cache_are_told_by_their_paths() {
        let hash = "cd".repeat(20);
        for inside in [format!("/c/models--a--b/blobs/{hash}"), "/c/models--a--b/snapshots/main/x.json".to_owned()] {
            assert!(is_in_a_hub_cache(Path::new(&inside)), "{inside}");
        }
        for outside in ["/etc/passwd", "/c/models--a--b/secret", "/c/models--a--b/blobs/id_rsa", "/blobs/ab"] {
            assert!(!is_in_a_hub_cache(Path::new(outside)), "{outside}");
        }
    }
}
