//! SHA256SUMS: what `sha256sum --check` would tell must be what the manifest tells.

use std::collections::HashSet;
use std::io;

use crate::checkpoint::{MANIFEST_NAME, SUMS_NAME};
use crate::error::{Error, IoContext, Result};
use crate::manifest::sha256_sums;
use crate::ops::verify::report::DifferenceClass;
use crate::ops::verify::{Checkpoint, Report};

/// SHA256SUMS must say of every file what the manifest says, of the manifest what it is, and nothing else.
pub(super) fn check(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
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
    let (lines, needed): (HashSet<&str>, HashSet<&str>) = (found.lines().collect(), expected.lines().collect());
    for line in needed.difference(&lines) {
        let what = match name_of(line) {
            MANIFEST_NAME => format!("its SHA-256 is {}, not what {SUMS_NAME} has", checkpoint.manifest_sha256),
            _ => format!("{SUMS_NAME} and {MANIFEST_NAME} don't have the same SHA-256"),
        };
        report.differ(name_of(line), None, what);
    }
    let names: HashSet<&str> = needed.iter().map(|line| name_of(line)).collect();
    for line in lines.difference(&needed).filter(|line| !names.contains(name_of(line))) {
        let what = format!("it has more than a line for each file of the manifest: {:?}", shortened(line));
        report.differ_as(DifferenceClass::of(name_of(line)), SUMS_NAME, None, what);
    }
    if lines == needed {
        report.differ(SUMS_NAME, None, "it has its lines in another order, or more than once, or other line ends");
    }
    Ok(())
}

/// The file that a line is of.
fn name_of(line: &str) -> &str {
    line.split_once("  ").map_or(line, |(_, name)| name)
}

/// A line's first characters: it may be anything.
fn shortened(line: &str) -> String {
    line.chars().take(200).collect()
}
