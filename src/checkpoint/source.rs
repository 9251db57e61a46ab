//! Opening a checkpoint: which files it has, and all their headers. No weight is read.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::thread;

use super::index::Index;
use super::side_files::{self, SideFile};
use super::{CONFIG_NAME, Config, Header, INDEX_NAME, MANIFEST_NAME, TensorInfo};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::store::{Identity, Kind, Listing, Location, ReadAt, Reader, Sha256Hash, Stat};

/// Headers that are read at the same time.
const OPEN_AT_ONCE: usize = 8;

/// A checkpoint whose headers are read and checked.
#[derive(Debug)]
pub struct Source {
    /// The folder or the file, as given.
    pub location: Location,
    /// The files of weights, by name.
    pub files: Vec<SourceFile>,
    /// config.json, if the source is a folder or has one beside it.
    pub config: Option<Config>,
    /// What else is in the folder; none if the source is one file.
    pub side_files: Vec<SideFile>,
}

/// A safetensors file.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// Its name, without the folder.
    pub name: String,
    /// Where it is.
    pub location: Location,
    /// What it was known by when its header was read.
    pub identity: Identity,
    /// SHA-256 of its header, length field included.
    pub header_sha256: Sha256Hash,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
}

impl Source {
    /// The dtype that quantized weights are decoded to where they don't say: the model's, or bf16, as transformers does.
    pub fn model_dtype(&self) -> FloatDtype {
        self.config.as_ref().and_then(Config::dtype).unwrap_or(FloatDtype::Bfloat16)
    }

    /// Opens a checkpoint's folder, or a single safetensors file; quantized or not.
    ///
    /// # Errors
    /// When it isn't there, isn't a checkpoint, or is damaged as far as headers tell.
    pub fn open(place: impl Into<Location>) -> Result<Source> {
        let place = place.into();
        let path = place.path();
        let kind = match place.stat() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::SourceMissing { path: path.to_owned() });
            }
            other => other.at(path, "open it")?.kind,
        };
        let source = if kind == Kind::Folder { open_folder(&place)? } else { open_file(&place, kind)? };
        source.check_names_differ()?;
        Ok(source)
    }

    /// Bytes of the safetensors files at a place, before anything of them is read; 0 if it can't be told.
    pub fn len_of_weights(place: &Location) -> u64 {
        let is_weights = |entry: &Listing| Path::new(&entry.name).extension().is_some_and(|name| name == "safetensors");
        match (place.stat(), place.list()) {
            (Ok(Stat { kind: Kind::File, len }), _) => len,
            (_, Ok(entries)) => entries.iter().filter(|entry| is_weights(entry)).map(|entry| entry.stat.len).sum(),
            _ => 0,
        }
    }

    /// All tensors with the file they are in: files by name, tensors in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo)> {
        self.files.iter().enumerate().flat_map(|(i, file)| file.tensors.iter().map(move |tensor| (i, tensor)))
    }

    /// # Errors
    /// When two tensors have one name.
    pub fn check_names_differ(&self) -> Result<()> {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (file, tensor) in self.tensors() {
            if let Some(other) = seen.insert(&tensor.name, file) {
                let (name, other) = (&tensor.name, &self.files[other].name);
                let why = format!("tensor {name:?} is also in {other:?}: are these files of one checkpoint?");
                return Err(Error::malformed(self.files[file].location.path(), why));
            }
        }
        Ok(())
    }
}

fn open_folder(folder: &Location) -> Result<Source> {
    let config_path = folder.join(CONFIG_NAME);
    let has_config = is_there(&config_path)?;
    if !has_config && !is_there(&folder.join(MANIFEST_NAME))? {
        let why = "it has no config.json; give the .safetensors file itself to convert weights without a model";
        return Err(Error::NotACheckpoint { path: folder.path().to_owned(), why: why.to_owned() });
    }
    let config = match has_config {
        true => {
            check_is_inside(folder, &config_path)?;
            Some(Config::read(&config_path)?)
        }
        false => None, // what was made of one file without it
    };
    let index_path = folder.join(INDEX_NAME);
    let files = if is_there(&index_path)? {
        check_is_inside(folder, &index_path)?;
        let index = Index::read(&index_path)?;
        let missing = |name: &str| format!("names {name:?}, which isn't beside it: download that file too");
        let names: Vec<String> = index.files().into_iter().map(str::to_owned).collect();
        for name in &names {
            if !is_there(&folder.join(name))? {
                return Err(Error::malformed(index_path.path(), missing(name)));
            }
        }
        let files = open_all(folder, &names)?;
        index.check(index_path.path(), files.iter().map(|file| (file.name.as_str(), file.tensors.as_slice())))?;
        files
    } else {
        open_all(folder, &files_without_index(folder)?)?
    };
    let side_files = side_files::find(folder)?;
    side_files.iter().try_for_each(|file| check_is_inside(folder, &file.location))?;
    Ok(Source { location: folder.clone(), files, config, side_files })
}

fn is_there(place: &Location) -> Result<bool> {
    place.exists().at(place.path(), "look at it")
}

fn open_file(place: &Location, kind: Kind) -> Result<Source> {
    let path = place.path();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if kind != Kind::File || !name.ends_with(".safetensors") {
        let why = "expected a folder, or a file whose name ends in .safetensors".to_owned();
        return Err(Error::NotACheckpoint { path: path.to_owned(), why });
    }
    let config_path = place.with_file_name(CONFIG_NAME);
    let has_config = config_path.is_file().at(config_path.path(), "look at it")?;
    let config = if has_config { Some(Config::read(&config_path)?) } else { None };
    let file = SourceFile::open(name.to_owned(), place.clone())?;
    Ok(Source { location: place.clone(), files: vec![file], config, side_files: Vec::new() })
}

/// Opens files by name, several at once: on a network disk it is waiting that takes the time.
fn open_all(folder: &Location, names: &[String]) -> Result<Vec<SourceFile>> {
    let each = names.len().div_ceil(OPEN_AT_ONCE).max(1);
    thread::scope(|scope| {
        let open = |names: &[String]| names.iter().map(|name| open_inside(folder, name)).collect::<Result<Vec<_>>>();
        let threads: Vec<_> = names.chunks(each).map(|names| scope.spawn(move || open(names))).collect();
        let parts = threads.into_iter().map(|thread| thread.join().unwrap_or(Err(Error::Stopped)));
        parts.collect::<Result<Vec<_>>>().map(|parts| parts.into_iter().flatten().collect())
    })
}

/// Opens a file of the folder; a link must lead to where this checkpoint's files are.
fn open_inside(folder: &Location, name: &str) -> Result<SourceFile> {
    let location = folder.join(name);
    check_is_inside(folder, &location)?;
    SourceFile::open(name.to_owned(), location)
}

impl SourceFile {
    /// Opens it and reads its header.
    ///
    /// # Errors
    /// When the system refuses, or the header isn't one of safetensors.
    pub(crate) fn open(name: String, location: Location) -> Result<SourceFile> {
        let path = location.path();
        let file = location.open().at(path, "open it")?;
        let identity = file.identity().at(path, "look at it")?;
        let header = Header::read(&mut Reader::new(&*file), identity.len, path)?;
        let Header { sha256: header_sha256, tensors, .. } = header;
        Ok(SourceFile { name, location, identity, header_sha256, tensors })
    }

    /// Opens the file anew, for its weights.
    ///
    /// # Errors
    /// When it isn't what it was when its header was read.
    pub fn reopen(&self) -> Result<Box<dyn ReadAt>> {
        let path = self.location.path();
        let file = self.location.open().at(path, "open it")?;
        let identity = file.identity().at(path, "look at it")?;
        if identity == self.identity {
            return Ok(file);
        }
        let why = match (identity.len, self.identity.len) {
            (now, then) if now != then => format!("it has {now} bytes, and had {then}"),
            _ => "it was written to since its header was read".to_owned(),
        };
        Err(Error::SourceChanged { path: path.to_owned(), why })
    }
}

/// A file must be a regular one; a link may lead elsewhere in the folder, or, in the hub's cache, from
/// `snapshots/REVISION` to `blobs`.
fn check_is_inside(folder: &Location, file: &Location) -> Result<()> {
    let path = file.path();
    let target = file.resolve().at(path, "open it")?;
    let root = folder.resolve().at(folder.path(), "open it")?;
    // Opening a pipe or a device could wait for ever.
    if !file.is_file().at(path, "look at it")? {
        return Err(Error::malformed(path, "not a regular file"));
    }
    let cache = root.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
    if target.starts_with(&root) || cache.is_some_and(|cache| target.starts_with(cache.join("blobs"))) {
        return Ok(());
    }
    let why = format!("a link out of the checkpoint's folder, to {}; put the file itself here", target.display());
    Err(Error::malformed(path, why))
}

/// The files that make up a checkpoint without an index: `model.safetensors`, or shards, or what there is.
fn files_without_index(folder: &Location) -> Result<Vec<String>> {
    let is_weights = |name: &String| name.ends_with(".safetensors") && !name.starts_with('.');
    let entries = folder.list().at(folder.path(), "list it")?.into_iter();
    let names = entries.filter_map(|entry| entry.name.into_string().ok());
    let mut names: Vec<String> = names.filter(is_weights).collect();
    names.sort();
    if names.iter().any(|name| name == "model.safetensors") {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let of_model = |name: &String| name.starts_with("model");
    // Mistral's own layout of the same weights, and LoRA's, lie beside a model's files at times.
    let other = |name: &String| name.starts_with("consolidated") || name.starts_with("adapter");
    if names.iter().any(of_model) {
        names.retain(of_model);
    } else {
        names.retain(|name| !other(name));
    }
    if names.is_empty() {
        let why = "it has no .safetensors file; convert .bin or .pt weights to safetensors first (transformers' \
                   save_pretrained does)";
        return Err(Error::NotACheckpoint { path: folder.path().to_owned(), why: why.to_owned() });
    }
    check_all_shards(folder.path(), &names)?;
    Ok(names)
}

/// `model-00002-of-00003.safetensors` says how many there are.
fn check_all_shards(folder: &Path, names: &[String]) -> Result<()> {
    let expected = names.iter().find_map(|name| {
        let stem = name.strip_suffix(".safetensors")?;
        let (_, count) = stem.rsplit_once("-of-")?;
        count.parse::<usize>().ok()
    });
    match expected {
        Some(expected) if expected != names.len() => {
            let why = format!(
                "its shards' names say {expected} files, and {} are there (no {INDEX_NAME} tells more); download the \
                 others",
                names.len()
            );
            Err(Error::NotACheckpoint { path: folder.to_owned(), why })
        }
        _ => Ok(()),
    }
}
