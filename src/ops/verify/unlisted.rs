//! What lies in the folder beside the manifest's files: clients load many files because they are there.

use std::collections::HashSet;

use crate::checkpoint::{FileClass, MANIFEST_NAME, SUMS_NAME};
use crate::error::{IoContext, Result};
use crate::ops::verify::{Checkpoint, Report};
use crate::store::Kind;

/// No file may be there that the manifest doesn't know, in no folder. Folders of git or the hub are named, and not looked into.
pub(super) fn check(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let files = checkpoint.manifest.files.iter().map(|file| file.name.as_str());
    let known: HashSet<&str> = files.chain([MANIFEST_NAME, SUMS_NAME]).collect();
    let mut folders = vec![String::new()];
    while let Some(prefix) = folders.pop() {
        let folder = match prefix.as_str() {
            "" => checkpoint.folder.clone(),
            prefix => checkpoint.folder.join(prefix),
        };
        for entry in folder.list().at(folder.path(), "list it")? {
            let is_known = |name: &str| known.contains(format!("{prefix}{name}").as_str());
            if entry.name.to_str().is_some_and(is_known) {
                continue;
            }
            let name = format!("{prefix}{}", entry.name.to_string_lossy());
            let inside = format!("{name}/");
            match entry.stat.kind {
                Kind::Folder if FileClass::of(&inside) == FileClass::ForPeople => {
                    report.differ(&inside, None, "is not in the manifest; no client loads what is in it");
                }
                Kind::Folder if entry.is_link => {
                    report.differ(&inside, None, "is a link to a folder: what is in it isn't in the manifest");
                }
                Kind::Folder => folders.push(inside),
                _ => {
                    let what = match FileClass::of(&name) {
                        FileClass::Loaded => "is not in the manifest, and clients could load it",
                        FileClass::ForPeople => "is not in the manifest",
                    };
                    report.differ(&name, None, what);
                }
            }
        }
    }
    Ok(())
}
