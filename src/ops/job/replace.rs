//! Replacing a checkpoint: which files at the destination are ours to remove, and which aren't.
//!
//! A file there is removed only if the manifest of the checkpoint that is replaced lists it. Others are left and named; but
//! weights that no manifest lists would be loaded in place of the new ones, so that they must go first.

use std::collections::BTreeSet;

use crate::checkpoint::{CONFIG_NAME, DONE_NAME, MANIFEST_NAME, STAGING_NAME, SUMS_NAME, Staging};
use crate::error::{Error, IoContext, Result};
use crate::manifest::ManifestHead;
use crate::store::{Kind, Location};

/// Folders deeper than this aren't looked into.
const MAX_DEPTH: usize = 8;

/// Files of the checkpoint at `destination`, as its manifest lists them; none if it has none that can be read.
pub(crate) fn listed(destination: &Location) -> Result<BTreeSet<String>> {
    let location = destination.join(MANIFEST_NAME);
    if !location.is_file().at(location.path(), "look at it")? {
        return Ok(BTreeSet::new());
    }
    match ManifestHead::read_head(&location) {
        Ok(manifest) => {
            let files = manifest.files.into_iter().map(|file| file.name);
            Ok(files.chain([MANIFEST_NAME.to_owned(), SUMS_NAME.to_owned()]).collect())
        }
        Err(error @ Error::Io { .. }) => Err(error),
        Err(Error::Malformed { .. }) => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

/// Checks that nothing at `destination` would be loaded in place of, or beside, the files called `new`.
///
/// # Errors
/// When weights are there, or what tells of them, which are neither replaced nor listed by a manifest of ours.
pub(crate) fn check(destination: &Location, new: &BTreeSet<String>) -> Result<()> {
    let mut ours = listed(destination)?;
    ours.extend(Staging::known_files(destination)?);
    let is_foreign = |name: &String| misleads(name) && !new.contains(name) && !ours.contains(name);
    let foreign: Vec<String> = names(destination)?.into_iter().filter(is_foreign).collect();
    let Some(first) = foreign.first() else { return Ok(()) };
    let others = match foreign.len() - 1 {
        0 => String::new(),
        others => format!(" and {others} more"),
    };
    let why = format!(
        "{first:?}{others} would be loaded with the new checkpoint, and no manifest of prequant lists it, so that it isn't \
         removed: remove it, or choose another folder"
    );
    Err(Error::destination(destination.path(), why))
}

/// Files at `destination` that are none of `published`.
pub(crate) fn left(destination: &Location, published: &BTreeSet<String>) -> Result<Vec<String>> {
    Ok(names(destination)?.into_iter().filter(|name| !published.contains(name)).collect())
}

/// Whether a file of this name at a checkpoint's top has clients load other weights.
fn misleads(name: &str) -> bool {
    let is_weights = [".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json"];
    !name.contains('/') && (name == CONFIG_NAME || is_weights.iter().any(|end| name.ends_with(end)))
}

/// The files at `destination`, with forward slashes. Links aren't followed, and count as files.
fn names(destination: &Location) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    if destination.exists().at(destination.path(), "look at it")? {
        walk(destination, "", 0, &mut found)?;
    }
    Ok(found)
}

fn walk(folder: &Location, prefix: &str, depth: usize, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in folder.list().at(folder.path(), "list it")? {
        let name = format!("{prefix}{}", entry.name.to_string_lossy());
        let is_folder = entry.stat.kind == Kind::Folder && !entry.is_link;
        if is_folder && depth < MAX_DEPTH {
            if ![STAGING_NAME, DONE_NAME].contains(&name.as_str()) {
                walk(&folder.join(&entry.name), &format!("{name}/"), depth + 1, found)?;
            }
        } else {
            found.insert(name);
        }
    }
    Ok(())
}
