//! Opening a checkpoint: which files it has, and all their headers. No weight is read, but those that stand in it twice.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::header::{FORMAT_KEY, Metadata};
use super::side_files::SideFile;
use super::weight_files::{self, Naming, SAFETENSORS, some};
use super::wrappers::{self, Wrapper};
use super::{CONFIG_NAME, Config, Header, TensorInfo, folder, place};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result, Warning};
use crate::store::{Identity, Kind, Listing, Location, ReadAt, Reader, Sha256Hash};

/// The most bytes of headers' `__metadata__` that are kept: each output file has them all.
const MAX_METADATA_LEN: usize = 1 << 20;

/// Keys of `__metadata__` that are hashes of the file's own bytes.
const OF_THE_BYTES: [&str; 3] = ["modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"];

/// A checkpoint whose headers are read and checked.
#[derive(Debug)]
pub struct Source {
    /// The folder or the file, as given.
    pub location: Location,
    /// The files of weights, by name.
    pub files: Vec<SourceFile>,
    /// config.json, if the source is a folder or has one beside it.
    pub config: Option<Config>,
    /// What else is in the folder and copied; none if the source is one file.
    pub side_files: Vec<SideFile>,
    /// What is in the folder and isn't copied.
    pub(crate) left_out: Vec<LeftOut>,
    /// What `__metadata__` of the headers says, but for the framework.
    pub(crate) metadata: Arc<Metadata>,
    /// What should be known before using what is made of it.
    pub(crate) notes: Vec<Warning>,
    /// What tensors' names have of a wrapper that the model was saved in.
    pub(crate) wrapper: Wrapper,
    /// The adapter whose file stands behind the source's own, if one does.
    pub(crate) adapter: Option<AdapterPart>,
}

/// An adapter that is merged into a source: the last of the source's files is its.
#[derive(Clone, Debug)]
pub(crate) struct AdapterPart {
    /// Its adapter_config.json.
    pub config: Location,
    /// Of that file.
    pub config_sha256: Sha256Hash,
    /// The formats that the source's own weights are decoded from.
    pub decoded_from: Vec<String>,
}

/// A file of the source that isn't copied, or a tensor of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeftOut {
    /// The file's path below the source; a folder's ends in a slash.
    pub name: String,
    /// The tensor, if it is about one.
    pub tensor: Option<String>,
    /// Why.
    pub why: String,
}

/// A safetensors file.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// Its path below the source, with forward slashes.
    pub name: String,
    /// Where it is.
    pub location: Location,
    /// What it was known by when its header was read.
    pub identity: Identity,
    /// SHA-256 of its header, length field included.
    pub header_sha256: Sha256Hash,
    /// Its header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
}

impl Source {
    /// Files of weights without anything beside them.
    pub fn of_files(location: Location, files: Vec<SourceFile>, config: Option<Config>) -> Source {
        let (side_files, left_out, metadata, notes, wrapper) = Default::default();
        Source { location, files, config, side_files, left_out, metadata, notes, wrapper, adapter: None }
    }

    /// Its own files of weights: not an adapter's.
    pub(crate) fn own_files(&self) -> &[SourceFile] {
        &self.files[..self.files.len() - usize::from(self.adapter.is_some())]
    }

    /// The dtype that quantized weights are decoded to where they don't say: the model's, or bf16, as transformers does.
    pub fn model_dtype(&self) -> FloatDtype {
        self.config.as_ref().and_then(Config::dtype).unwrap_or(FloatDtype::Bfloat16)
    }

    /// Opens a checkpoint's folder, or a single safetensors file; quantized or not.
    ///
    /// # Errors
    /// When it isn't there, isn't a checkpoint, or is damaged as far as headers tell.
    pub fn open(place: impl Into<Location>) -> Result<Source> {
        Source::open_with(place, false)
    }

    /// As [`Source::open`]; with `follow_links` links beside the weights may lead anywhere, to folders too.
    ///
    /// # Errors
    /// The same.
    pub fn open_with(place: impl Into<Location>, follow_links: bool) -> Result<Source> {
        let mut source = Source::open_unchecked(&place.into(), follow_links)?;
        source.check_is_a_model()?;
        Ok(source)
    }

    /// Opens a checkpoint to look at it, whatever its tensors are: [`Source::check_is_a_model`] is the caller's.
    ///
    /// # Errors
    /// As [`Source::open`]'s otherwise.
    pub(crate) fn open_any(place: &Location) -> Result<Source> {
        Source::open_unchecked(place, false)
    }

    fn open_unchecked(place: &Location, follow_links: bool) -> Result<Source> {
        let path = place.path();
        let kind = match place.stat() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::SourceMissing { path: path.to_owned() });
            }
            other => other.at(path, "open it")?.kind,
        };
        let mut source = match kind {
            Kind::Folder => folder::open(place, follow_links)?,
            kind => open_file(place, kind)?,
        };
        source.read_names();
        source.read_metadata();
        Ok(source)
    }

    /// Bytes of the safetensors files at a place, before anything of them is read; 0 where none can be.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub fn len_of_weights(place: &Location) -> Result<u64> {
        let path = place.path();
        let is_weights =
            |entry: &&Listing| Path::new(&entry.name).extension().is_some_and(|name| name == "safetensors");
        match place.kind().at(path, "open it")? {
            Some(Kind::File) => Ok(place.stat().at(path, "open it")?.len),
            Some(Kind::Folder) => {
                let entries = place.list().at(path, "list it")?;
                Ok(entries.iter().filter(is_weights).map(|entry| entry.stat.len).sum())
            }
            Some(Kind::Other | Kind::BrokenLink) | None => Ok(0),
        }
    }

    /// All tensors with the file they are in: files by name, tensors in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo)> {
        self.files.iter().enumerate().flat_map(|(i, file)| file.tensors.iter().map(move |tensor| (i, tensor)))
    }

    /// How the files of what is made of it are called.
    pub(crate) fn naming(&self) -> &'static Naming {
        Naming::of(self.config.as_ref())
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

    fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.files.iter().flat_map(|file| file.tensors.iter().map(|tensor| &*tensor.name))
    }

    /// # Errors
    /// When its tensors are what a trainer holds of a model, not the model.
    pub(crate) fn check_is_a_model(&mut self) -> Result<()> {
        let error = |why: String| Err(Error::NotACheckpoint { path: self.location.path().to_owned(), why });
        if let Some(name) = wrappers::unmerged(self.names()) {
            return error(format!(
                "it was saved with an adapter that isn't merged (tensor {name:?}): merge the adapter first (PEFT's \
                 merge_and_unload), save the model with save_pretrained, and convert that"
            ));
        }
        let all = self.tensors().count();
        // The shape of what is on other ranks; other tensors without elements keep theirs.
        let empty: Vec<&str> =
            self.tensors().filter(|(_, info)| info.shape[..] == [0]).map(|(_, info)| &*info.name).collect();
        if all > 0 && 2 * empty.len() > all {
            return error(format!(
                "{} of its {all} tensors have no elements, such as {:?}: a save of DeepSpeed ZeRO-3 without its parameters; put \
                 them together first (`zero_to_fp32.py`, or stage3_gather_16bit_weights_on_model_save), then convert the result",
                empty.len(),
                empty[0],
            ));
        }
        if let Some(first) = empty.first() {
            let note =
                format!("{} of its tensors have no elements, such as {first:?}: copied as they are", empty.len());
            self.notes.push(note.into());
        }
        Ok(())
    }

    /// Finds what a wrapper left in names.
    pub(crate) fn read_names(&mut self) {
        self.wrapper = Wrapper::of(self.names());
        if let Some(found) = self.wrapper.found() {
            let note = format!(
                "tensors' names have {found:?} of a wrapper that the model was saved in: it is taken out of them"
            );
            self.notes.push(note.into());
        }
    }

    /// Puts together what the headers say beside their tensors.
    fn read_metadata(&mut self) {
        let mut dropped: BTreeSet<&str> = BTreeSet::new();
        let mut metadata = Metadata::new();
        for (key, text) in self.files.iter().flat_map(|file| &file.metadata).filter(|(key, _)| *key != FORMAT_KEY) {
            let differs = metadata.get(key).is_some_and(|other| other != text);
            if differs || OF_THE_BYTES.contains(&key.as_str()) {
                dropped.insert(key);
            } else {
                metadata.insert(key.clone(), text.clone());
            }
        }
        metadata.retain(|key, _| !dropped.contains(key.as_str()));
        if metadata.iter().map(|(key, text)| key.len() + text.len()).sum::<usize>() > MAX_METADATA_LEN {
            self.notes.push(
                format!("its headers' __metadata__ has more than {MAX_METADATA_LEN} bytes: it isn't kept").into(),
            );
            metadata.clear();
        }
        if !dropped.is_empty() {
            let named = some(&dropped.into_iter().collect::<Vec<_>>());
            let why = "a hash of the old bytes, or not the same in all files";
            self.notes.push(format!("not kept of its headers' __metadata__: {named} ({why})").into());
        }
        self.metadata = Arc::new(metadata);
    }
}

fn open_file(file: &Location, kind: Kind) -> Result<Source> {
    let path = file.path();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if kind != Kind::File {
        let why = "it is a pipe, a device or a socket; expected a folder, or a file whose name ends in .safetensors"
            .to_owned();
        return Err(Error::NotACheckpoint { path: path.to_owned(), why });
    }
    if !name.ends_with(SAFETENSORS) {
        return Err(place::of_file(file)?.error(file));
    }
    let config_path = file.with_file_name(CONFIG_NAME);
    let config = match config_path.kind().at(config_path.path(), "look at it")? {
        Some(Kind::File) => Some(Config::read(&config_path)?),
        _ => None,
    };
    let opened = SourceFile::open(name.to_owned(), file.clone())?;
    let mut source = Source::of_files(file.clone(), vec![opened], config);
    let shard = weight_files::Shard::of(name).filter(|shard| shard.count.is_some_and(|count| count > 1));
    if let Some(count) = shard.and_then(|shard| shard.count) {
        source
            .notes
            .push(format!("{name} is one of {count} shards by its name: the others' tensors aren't converted").into());
    }
    Ok(source)
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
        let Header { sha256: header_sha256, metadata, tensors, .. } = header;
        Ok(SourceFile { name, location, identity, header_sha256, metadata, tensors })
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
