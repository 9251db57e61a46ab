//! The files beside the weights: tokenizer, generation config, chat templates, licence, code, parts of the model that aren't its
//! weights' files. Each is copied, or left out with a reason.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use super::links::{self, Reach};
use super::weight_files::{SAFETENSORS, some};
use super::{CONFIG_NAME, LeftOut, SourceFile, first_bytes, parts};
use crate::error::{Error, IoContext, Result};
use crate::store::{Kind, Listing, Location};

/// Folders deeper than this aren't looked into.
const MAX_DEPTH: usize = 64;

/// More side files than this are no part of a checkpoint.
const MAX_FILES: usize = 10_000;

/// A file to be copied as it is.
#[derive(Clone, Debug)]
pub struct SideFile {
    /// Its path below the source, with forward slashes.
    pub name: String,
    /// Where it is.
    pub location: Location,
    /// Its size in bytes.
    pub len: u64,
}

/// What lies beside the weights.
pub(crate) struct Beside {
    /// What is copied, by name.
    pub files: Vec<SideFile>,
    /// What isn't, by name.
    pub left_out: Vec<LeftOut>,
    /// What should be known of them.
    pub notes: Vec<String>,
}

/// All files below `root` but its `weights` and what is made of them, in folders that aren't links; in those too if `follow`.
///
/// # Errors
/// When something can't be copied that should be: a pointer in its place, a link out of the folder, a name that isn't UTF-8.
pub(crate) fn find(root: &Location, weights: &[SourceFile], reach: &Reach, follow: bool) -> Result<Beside> {
    let taken = weights.iter().map(|file| file.name.as_str()).collect();
    let (files, left_out, notes) = Default::default();
    let mut walk = Walk { taken, reach, follow, above: Vec::new(), found: Beside { files, left_out, notes } };
    walk.folder(root, "", 0)?;
    let mut found = walk.found;
    found.leave_out_same_weights(weights)?;
    found.files.sort_by(|a, b| a.name.cmp(&b.name));
    found.note_names_that_differ_in_case();
    Ok(found)
}

struct Walk<'a> {
    /// Files of weights that are read.
    taken: HashSet<&'a str>,
    reach: &'a Reach,
    follow: bool,
    /// The folders that are being looked into, resolved: a link may lead back to one.
    above: Vec<PathBuf>,
    found: Beside,
}

impl Walk<'_> {
    fn folder(&mut self, folder: &Location, prefix: &str, depth: usize) -> Result<()> {
        self.above.push(folder.resolve().at(folder.path(), "open it")?);
        let mut entries = folder.list().at(folder.path(), "list it")?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        for entry in entries {
            let location = folder.join(&entry.name);
            let Some(name) = entry.name.to_str() else {
                return Err(Error::malformed(location.path(), "its name is not UTF-8: rename it"));
            };
            let name = format!("{prefix}{name}");
            match entry.stat.kind {
                Kind::Folder => self.subfolder(&location, &name, &entry, depth)?,
                _ => self.file(location, name, &entry)?,
            }
            if self.found.files.len() > MAX_FILES {
                let why = format!("more than {MAX_FILES} files lie in it beside the weights: is it the right folder?");
                return Err(Error::malformed(folder.path(), why));
            }
        }
        self.above.pop();
        Ok(())
    }

    fn subfolder(&mut self, location: &Location, name: &str, entry: &Listing, depth: usize) -> Result<()> {
        let why = match parts::why_folder_left_out(name) {
            Some(why) => why,
            None if depth >= MAX_DEPTH => "a folder in too many others",
            None if entry.is_link && !self.follow => "a link to a folder",
            None if entry.is_link && self.above.contains(&location.resolve().at(location.path(), "open it")?) => {
                "a link to a folder that it lies in"
            }
            None => return self.folder(location, &format!("{name}/"), depth + 1),
        };
        self.leave_out(format!("{name}/"), why);
        Ok(())
    }

    fn file(&mut self, location: Location, name: String, entry: &Listing) -> Result<()> {
        if self.taken.contains(name.as_str()) || name == CONFIG_NAME {
            return Ok(());
        }
        match (parts::why_left_out(&name), entry.stat.kind) {
            (Some(why), _) => self.leave_out(name, why),
            (None, Kind::File) => {
                self.reach.check(&location, &name)?;
                first_bytes::check_copied(&location, &name, entry.stat.len)?;
                self.found.files.push(SideFile { name, location, len: entry.stat.len });
            }
            (None, Kind::BrokenLink) => return Err(links::broken(&location)),
            (None, Kind::Folder | Kind::Other) => {
                self.leave_out(name, "not a regular file: a pipe, a device or a socket")
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, name: String, why: &str) {
        self.found.left_out.push(LeftOut { name, tensor: None, why: why.to_owned() });
    }
}

impl Beside {
    /// Of files of weights beside the model's own, those that hold nothing else than it are left out; others are parts.
    fn leave_out_same_weights(&mut self, weights: &[SourceFile]) -> Result<()> {
        let is_in_root = |file: &SideFile| file.name.ends_with(SAFETENSORS) && !file.name.contains('/');
        if !self.files.iter().any(is_in_root) {
            return Ok(());
        }
        let own = weights.iter().flat_map(|file| &file.tensors).map(|tensor| (&*tensor.name, &*tensor.shape));
        let own: HashSet<(&str, &[u64])> = own.collect();
        let (mut parts, mut same) = (Vec::new(), Vec::new());
        for file in std::mem::take(&mut self.files) {
            let is_same = is_in_root(&file) && {
                let opened = SourceFile::open(file.name.clone(), file.location.clone())?;
                opened.tensors.iter().all(|tensor| own.contains(&(&*tensor.name, &*tensor.shape)))
            };
            if is_same { same.push(file) } else { parts.push(file) }
        }
        self.files = parts;
        self.left_out.extend(same.into_iter().map(|file| LeftOut {
            name: file.name,
            tensor: None,
            why: "its tensors are the model's, which are converted from other files".to_owned(),
        }));
        let unlisted = self.files.iter().filter(|file| is_in_root(file)).map(|file| file.name.clone());
        let unlisted: Vec<String> = unlisted.collect();
        if !unlisted.is_empty() {
            self.notes.push(format!(
                "{} {} not among the files that the model's own weights are in: copied unquantized",
                some(&unlisted),
                if unlisted.len() == 1 { "is" } else { "are" }
            ));
        }
        Ok(())
    }

    fn note_names_that_differ_in_case(&mut self) {
        let mut by_case: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for file in &self.files {
            by_case.entry(file.name.to_lowercase()).or_default().push(&file.name);
        }
        let alike = by_case.into_values().filter(|names| names.len() > 1);
        self.notes.extend(alike.map(|names| {
            format!(
                "{} differ in case alone: where that makes no difference, one takes the other's place",
                some(&names)
            )
        }));
    }
}

/// Whether a file's being there has vLLM and others load it together with the model's weights, unless an index says otherwise.
pub(crate) fn needs_an_index(files: &[SideFile]) -> bool {
    files.iter().any(|file| file.name.ends_with(SAFETENSORS) && !file.name.contains('/'))
}
