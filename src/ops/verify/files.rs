//! The manifest's files: whether they are there, and their sizes.

use std::collections::HashSet;
use std::io;

use crate::checkpoint::{MANIFEST_NAME, is_whole_model};
use crate::error::{IoContext, Result};
use crate::manifest::FileRecord;
use crate::ops::verify::headers::index_name;
use crate::ops::verify::jobs::Job;
use crate::ops::verify::records::is_inside;
use crate::ops::verify::{Checkpoint, Report};
use crate::store::Kind;

/// Every file must be there, with its size. Returns those that can be hashed, and those whose tensors can.
pub(super) fn check_sizes<'a>(checkpoint: &'a Checkpoint, quick: bool, report: &mut Report) -> Result<Vec<Job<'a>>> {
    let mut jobs = Vec::new();
    for record in &checkpoint.manifest.files {
        if !is_inside(&record.name) {
            report.differ(MANIFEST_NAME, None, format!("names a file outside of its folder: {:?}", record.name));
        }
        // What wrote an older schema had other rules of what is copied.
        if checkpoint.manifest.older_schema.is_none() && misleads(checkpoint, &record.name) {
            let what = "is called like all of the model's weights, and holds none of the manifest's tensors";
            report.differ(&record.name, None, what);
        }
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

/// Whether clients could load a file in place of the weights that the manifest is about. No conversion copies such a one.
fn misleads(checkpoint: &Checkpoint, name: &str) -> bool {
    let records = &checkpoint.records;
    is_whole_model(name) && !records.has_tensors_in(name) && name != index_name(records)
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
