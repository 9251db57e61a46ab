//! Files: which there are, and their sizes.

use std::collections::HashSet;
use std::io;

use crate::checkpoint::{FileClass, MANIFEST_NAME, SUMS_NAME};
use crate::error::{Error, IoContext, Result};
use crate::manifest::{FileRecord, sha256_sums};
use crate::ops::verify::jobs::Job;
use crate::ops::verify::records::is_inside;
use crate::ops::verify::{Checkpoint, Report};
use crate::store::Kind;

/// SHA256SUMS must say of every file what the manifest says, and of the manifest what it is.
pub(crate) fn check_sums(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let files = checkpoint.manifest.files.iter().map(|file| (file.name.as_str(), file.sha256));
    let expected = sha256_sums(files.chain([(MANIFEST_NAME, checkpoint.manifest_sha256)]));
    let location = checkpoint.folder.join(SUMS_NAME);
    // Of a longer one the lines that are right don't matter.
    let most = 2 * expected.len() as u64 + (1 << 20);
    let found = match location.read(most).at(location.path(), "read it") {
        Ok(found) => found,
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            report.differ(SUMS_NAME, None, "it is missing");
            return Ok(());
        }
        Err(Error::Malformed { why, .. }) => {
            report.differ(SUMS_NAME, None, why);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    report.files += 2; // itself and the manifest
    if found == expected.as_bytes() {
        return Ok(());
    }
    let found = String::from_utf8_lossy(&found);
    let lines: HashSet<&str> = found.lines().collect();
    let mut named = false;
    for line in expected.lines().filter(|line| !lines.contains(line)) {
        let name = line.split_once("  ").map_or(line, |(_, name)| name);
        let what = match name {
            MANIFEST_NAME => format!("its SHA-256 is {}, not what {SUMS_NAME} has", checkpoint.manifest_sha256),
            _ => format!("{SUMS_NAME} and {MANIFEST_NAME} don't have the same SHA-256"),
        };
        report.differ(name, None, what);
        named = true;
    }
    if !named {
        report.differ(SUMS_NAME, None, "it has more than a line for each file of the manifest");
    }
    Ok(())
}

/// Every file's name must stay inside the folder, and no file that clients could load may be there that the manifest doesn't know.
pub(crate) fn check_names(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let known: HashSet<&str> = checkpoint.manifest.files.iter().map(|file| file.name.as_str()).collect();
    for name in known.iter().filter(|name| !is_inside(name)) {
        report.differ(MANIFEST_NAME, None, format!("names a file outside of its folder: {name:?}"));
    }
    for entry in checkpoint.folder.list().at(checkpoint.folder.path(), "list it")? {
        let name = entry.name.to_string_lossy().into_owned();
        let is_ours = [MANIFEST_NAME, SUMS_NAME].contains(&name.as_str());
        let is_extra = entry.stat.kind == Kind::File && !is_ours && !known.contains(name.as_str());
        if is_extra && FileClass::of(&name) == FileClass::Loaded {
            report.differ(&name, None, "is not in the manifest, and clients could load it");
        }
    }
    Ok(())
}

/// Every file must be there, with its size. Returns those that can be hashed, and those whose tensors can.
pub(super) fn check_sizes<'a>(checkpoint: &'a Checkpoint, quick: bool, report: &mut Report) -> Result<Vec<Job<'a>>> {
    let mut jobs = Vec::new();
    for record in &checkpoint.manifest.files {
        report.files += 1;
        report.bytes += if quick { 0 } else { record.size };
        let (name, len) = (record.name.as_str(), record.size);
        match size_difference(checkpoint, record)? {
            None => jobs.push(Job { name, len, sha256: Some(record.sha256) }),
            Some(Unsound { what, len }) => {
                report.differ(name, None, what);
                jobs.extend(len.filter(|_| checkpoint.records.has_tensors_in(name)).map(|len| Job {
                    name,
                    len,
                    sha256: None,
                }));
            }
        }
    }
    let known: HashSet<&str> = checkpoint.manifest.files.iter().map(|record| record.name.as_str()).collect();
    for file in checkpoint.records.files().filter(|file| !known.contains(file)) {
        report.differ(file, None, "it holds tensors, but is not among the manifest's files");
    }
    Ok(jobs)
}

/// What is wrong with a file, and its size if it is one.
struct Unsound {
    what: String,
    len: Option<u64>,
}

fn size_difference(checkpoint: &Checkpoint, record: &FileRecord) -> Result<Option<Unsound>> {
    let unsound = |what: &str| Ok(Some(Unsound { what: what.to_owned(), len: None }));
    if !is_inside(&record.name) {
        return unsound("not looked at: its name leads out of the folder");
    }
    let location = checkpoint.folder.join(&record.name);
    let path = location.path();
    let stat = match location.stat() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return unsound("it is missing"),
        other => other.at(path, "look at it")?,
    };
    if stat.kind != Kind::File {
        return unsound("it is not a regular file");
    }
    location.open().at(path, "open it")?;
    let what = format!("it has {} bytes, expected {}", stat.len, record.size);
    Ok((stat.len != record.size).then_some(Unsound { what, len: Some(stat.len) }))
}
