//! Files: which there are, their sizes, their hashes.

use std::collections::HashSet;
use std::io;
use std::path::{Component, Path};
use std::sync::atomic::Ordering;

use crate::checkpoint::{INDEX_NAME, MANIFEST_NAME, QUANT_CONFIG_NAME, SUMS_NAME};
use crate::error::{Error, IoContext, Result};
use crate::manifest::{FileRecord, sha256_sums};
use crate::ops::verify::{BUFFER, Checkpoint, Options, Report, on_threads};
use crate::store::{Kind, hash_range};

/// SHA256SUMS must say of every file what the manifest says, and of the manifest what it is.
pub(crate) fn check_sums(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let files = checkpoint.manifest.files.iter().map(|file| (file.name.as_str(), file.sha256));
    let expected = sha256_sums(files.chain([(MANIFEST_NAME, checkpoint.manifest_sha256)]));
    let location = checkpoint.folder.join(SUMS_NAME);
    let found = match location.read() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            report.differ(SUMS_NAME, None, "it is missing");
            return Ok(());
        }
        Err(error) => return Err(error).at(location.path(), "read it"),
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

/// Every file's name must stay inside the folder, and no weights may be there that the manifest doesn't know.
pub(crate) fn check_names(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let known: HashSet<&str> = checkpoint.manifest.files.iter().map(|file| file.name.as_str()).collect();
    for name in known.iter().filter(|name| !is_inside(name)) {
        report.differ(MANIFEST_NAME, None, format!("names a file outside of its folder: {name:?}"));
    }
    for entry in checkpoint.folder.list().at(checkpoint.folder.path(), "list it")? {
        let name = entry.name.to_string_lossy().into_owned();
        let is_weights = name.ends_with(".safetensors") || name == INDEX_NAME || name.ends_with(".bin");
        if is_weights && !known.contains(name.as_str()) {
            report.differ(&name, None, "is not in the manifest: weights too many");
        }
        if name == QUANT_CONFIG_NAME && !known.contains(name.as_str()) {
            report.differ(&name, None, "is not in the manifest: it speaks of other weights");
        }
    }
    Ok(())
}

/// Whether a name of the manifest stays inside the folder.
pub(crate) fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Every file must be there, with its size and (but for `quick`) its hash.
pub(crate) fn check_contents(checkpoint: &Checkpoint, options: Options<'_>, report: &mut Report) -> Result<()> {
    // The largest first, so that no thread is left with one of them at the end.
    let mut files: Vec<&FileRecord> = checkpoint.manifest.files.iter().collect();
    files.sort_by_key(|file| std::cmp::Reverse(file.size));
    let differences =
        on_threads(options.threads, &files, |file, buffer| file_difference(checkpoint, file, options, buffer))?;
    for (file, difference) in files.iter().zip(differences) {
        report.files += 1;
        report.bytes += if options.quick { 0 } else { file.size };
        if let Some(what) = difference {
            report.differ(&file.name, None, what);
        }
    }
    Ok(())
}

fn file_difference(
    checkpoint: &Checkpoint,
    record: &FileRecord,
    options: Options<'_>,
    buffer: &mut [u8],
) -> Result<Option<String>> {
    if !is_inside(&record.name) {
        return Ok(Some("not looked at: its name leads out of the folder".to_owned()));
    }
    let location = checkpoint.folder.join(&record.name);
    let path = location.path();
    let stat = match location.stat() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some("it is missing".to_owned())),
        other => other.at(path, "look at it")?,
    };
    if stat.kind != Kind::File {
        return Ok(Some("it is not a regular file".to_owned()));
    }
    let file = location.open().at(path, "open it")?;
    if stat.len != record.size {
        return Ok(Some(format!("it has {} bytes, expected {}", stat.len, record.size)));
    }
    if options.quick {
        return Ok(None);
    }
    let keep_going = || {
        (options.hashed)(record.size.min(BUFFER as u64));
        !options.interrupt.load(Ordering::Relaxed)
    };
    let hash = hash_range(&*file, 0, record.size, buffer, keep_going).at(path, "read it")?;
    let hash = hash.ok_or(Error::Interrupted)?;
    let differs = hash != record.sha256;
    Ok(differs.then(|| format!("its SHA-256 is {hash}, expected {}", record.sha256)))
}
