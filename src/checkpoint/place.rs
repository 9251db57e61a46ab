//! What a folder or a file is that isn't a checkpoint in safetensors: for errors that say so and show the way on, and for
//! `inspect`.

use std::collections::BTreeSet;

use super::weight_files::{INDEX_END, SAFETENSORS, some};
use super::{CONFIG_NAME, first_bytes, json_values};
use crate::error::{Error, IoContext, Result};
use crate::store::{Kind, Listing, Location};

/// The longest config that is read only to tell what a folder is.
const MAX_CONFIG_LEN: u64 = 1 << 20;

/// Something that prequant doesn't convert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// What it is, in a few words: `"a LoRA adapter"`.
    what: String,
    /// What to do about it.
    way_on: String,
}

impl Place {
    fn new(what: impl Into<String>, way_on: impl Into<String>) -> Place {
        Place { what: what.into(), way_on: way_on.into() }
    }

    /// What is at a place that isn't a checkpoint in safetensors, if that has a name.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub(crate) fn at(place: &Location) -> Result<Option<Place>> {
        let path = place.path();
        match place.kind().at(path, "look at it")? {
            Some(Kind::Folder) => of_folder(place, &place.list().at(path, "list it")?),
            Some(Kind::File) if !path.to_string_lossy().ends_with(SAFETENSORS) => of_file(place).map(Some),
            _ => Ok(None),
        }
    }

    /// What it is, in a few words.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    /// The error of a place that is none of a checkpoint.
    pub(crate) fn error(self, place: &Location) -> Error {
        let why = format!("it is {}; {}", self.what, self.way_on);
        Error::NotACheckpoint { path: place.path().to_owned(), why }
    }
}

/// A folder's content by name, as far as it tells what the folder is.
struct Content<'a> {
    place: &'a Location,
    files: BTreeSet<&'a str>,
    folders: BTreeSet<&'a str>,
}

impl Content<'_> {
    fn file(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    /// Files with one of these endings.
    fn ending(&self, ends: &[&str]) -> Vec<&str> {
        self.files.iter().copied().filter(|name| ends.iter().any(|end| name.ends_with(end))).collect()
    }

    /// Folders in it that hold a file called `name`.
    fn folders_with(&self, name: &str) -> Result<Vec<&str>> {
        let mut found = Vec::new();
        for folder in &self.folders {
            let file = self.place.join(folder).join(name);
            if file.exists().at(file.path(), "look at it")? {
                found.push(*folder);
            }
        }
        Ok(found)
    }

    fn path(&self, below: &str) -> String {
        self.place.join(below).path().display().to_string()
    }

    /// A string of a small JSON file; none if there is no such thing.
    fn string(&self, file: &str, key: &str) -> Result<Option<String>> {
        if !self.file(file) {
            return Ok(None);
        }
        let location = self.place.join(file);
        let text = location.read(MAX_CONFIG_LEN).at(location.path(), "read it")?;
        // Whatever else it is, the rest tells.
        let values = json_values::parse(&text).unwrap_or_default();
        Ok(values.get(key).and_then(|value| value.as_str()).map(str::to_owned))
    }
}

/// What a folder with these entries is, if it is something that has a name and isn't a checkpoint in safetensors.
///
/// # Errors
/// When the system refuses to tell.
pub(crate) fn of_folder(place: &Location, entries: &[Listing]) -> Result<Option<Place>> {
    let named = |is_folder: bool| {
        let entries = entries.iter().filter(move |entry| (entry.stat.kind == Kind::Folder) == is_folder);
        entries.filter_map(|entry| entry.name.to_str()).collect()
    };
    let content = Content { place, files: named(false), folders: named(true) };
    for tell in [hub_cache, pipeline, adapter, other_formats, of_training, holder] {
        if let Some(found) = tell(&content)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The hub's cache, or one repository in it.
fn hub_cache(content: &Content<'_>) -> Result<Option<Place>> {
    let repositories: Vec<&str> = content.folders.iter().copied().filter(|name| name.starts_with("models--")).collect();
    if !repositories.is_empty() && !content.file(CONFIG_NAME) {
        let way_on = format!(
            "give one model's snapshot, such as {}",
            content.path(&format!("{}/snapshots/REVISION", repositories[0]))
        );
        return Ok(Some(Place::new("a cache of the hub, with several repositories in it", way_on)));
    }
    let is_repository = content.folders.contains("snapshots") && !content.file(CONFIG_NAME);
    if !is_repository {
        return Ok(None);
    }
    let snapshots = content.place.join("snapshots");
    let mut revisions: Vec<String> = snapshots
        .list()
        .at(snapshots.path(), "list it")?
        .into_iter()
        .filter(|entry| entry.stat.kind == Kind::Folder)
        .filter_map(|entry| entry.name.into_string().ok())
        .collect();
    revisions.sort();
    let main = content.place.join("refs/main");
    let main = main.read_if_there(MAX_CONFIG_LEN).at(main.path(), "read it")?;
    let main = main.and_then(|text| String::from_utf8(text).ok()).map(|text| text.trim().to_owned());
    let way_on = match main.filter(|main| revisions.contains(main)).or_else(|| revisions.first().cloned()) {
        Some(revision) => format!("give its snapshot: {}", content.path(&format!("snapshots/{revision}"))),
        None => "no snapshot is in it: download the model again (`hf download`)".to_owned(),
    };
    Ok(Some(Place::new("a repository in the hub's cache, not a snapshot of it", way_on)))
}

/// Several models that are used together.
fn pipeline(content: &Content<'_>) -> Result<Option<Place>> {
    if !content.file("model_index.json") {
        return Ok(None);
    }
    let parts = content.folders_with(CONFIG_NAME)?;
    let class =
        content.string("model_index.json", "_class_name")?.map(|class| format!(" ({class})")).unwrap_or_default();
    let way_on = match parts.first() {
        Some(first) => {
            let first = if parts.contains(&"transformer") { "transformer" } else { first };
            format!("its models are in {}: convert these one by one, such as {}", some(&parts), content.path(first))
        }
        None => "its models are in folders of their own: convert these one by one".to_owned(),
    };
    Ok(Some(Place::new(format!("a diffusers pipeline{class}, several models that are used together"), way_on)))
}

/// A LoRA's or another adapter's matrices, without the model.
fn adapter(content: &Content<'_>) -> Result<Option<Place>> {
    let is_adapter = content.file("adapter_config.json")
        || !content.ending(&["adapter_model.safetensors", "adapter_model.bin"]).is_empty();
    if !is_adapter || content.file(CONFIG_NAME) {
        return Ok(None);
    }
    let kind = content.string("adapter_config.json", "peft_type")?.unwrap_or_else(|| "LoRA".to_owned());
    let base = content.string("adapter_config.json", "base_model_name_or_path")?;
    let of = base.as_ref().map(|base| format!(" of {base:?}")).unwrap_or_default();
    let kind = if kind == "LORA" { "LoRA".to_owned() } else { kind };
    Ok(Some(Place::new(
        format!("an adapter ({kind}){of}, not a model"),
        "merge it into its base model first (PEFT's merge_and_unload), save that with save_pretrained, and convert it; or convert \
         the base model, and load the adapter on top",
    )))
}

/// Weights in formats that aren't safetensors, and no others.
fn other_formats(content: &Content<'_>) -> Result<Option<Place>> {
    if !content.ending(&[SAFETENSORS]).is_empty() {
        return Ok(None);
    }
    let sharded = content.ending(&[".distcp", "_model_states.pt", "_optim_states.pt"]);
    let steps: Vec<&str> = content.folders.iter().copied().filter(|name| name.starts_with("global_step")).collect();
    if !steps.is_empty() || sharded.iter().any(|name| name.ends_with("_states.pt")) {
        return Ok(Some(Place::new(
            "a DeepSpeed checkpoint, divided among ranks",
            "put it together first (`zero_to_fp32.py` beside it), then convert the result",
        )));
    }
    if !sharded.is_empty() {
        return Ok(Some(Place::new(
            "a distributed checkpoint of torch (FSDP), divided among ranks",
            "put it together first (`accelerate merge-weights`), then convert the result",
        )));
    }
    let kinds: [(&[&str], &str, &str); 5] = [
        (
            &[".gguf", ".ggml"],
            "GGUF, llama.cpp's format",
            "start from the safetensors checkpoint that it was made from",
        ),
        (
            &[".bin", ".pt", ".pth", ".ckpt"],
            "PyTorch weights, with no .safetensors file",
            "convert them to safetensors first (transformers' save_pretrained does)",
        ),
        (&[".onnx"], "an ONNX model", "start from the safetensors checkpoint that it was made from"),
        (
            &[".h5", ".tflite"],
            "a TensorFlow model",
            "convert it to safetensors first (transformers' save_pretrained does)",
        ),
        (&[".msgpack"], "a Flax model", "convert it to safetensors first (transformers' save_pretrained does)"),
    ];
    Ok(kinds.into_iter().find_map(|(ends, what, way_on)| {
        let files = content.ending(ends);
        (!files.is_empty()).then(|| Place::new(format!("{what} ({})", some(&files)), way_on))
    }))
}

/// What trainers of their own formats write.
fn of_training(content: &Content<'_>) -> Result<Option<Place>> {
    let is_megatron = content.file("latest_checkpointed_iteration.txt");
    let what = if is_megatron { "a Megatron checkpoint" } else { return Ok(None) };
    Ok(Some(Place::new(what, "export it to Hugging Face's layout first, then convert the result")))
}

/// A folder with checkpoints in it.
fn holder(content: &Content<'_>) -> Result<Option<Place>> {
    if content.file(CONFIG_NAME) || !content.ending(&[SAFETENSORS]).is_empty() {
        return Ok(None);
    }
    let inside = content.folders_with(CONFIG_NAME)?;
    Ok(inside.first().map(|first| {
        Place::new(
            format!("a folder with others in it that have a config.json ({})", some(&inside)),
            format!("give one of these, such as {}", content.path(first)),
        )
    }))
}

/// What a file is that isn't called as safetensors are.
///
/// # Errors
/// When the system refuses to read it.
pub(crate) fn of_file(file: &Location) -> Result<Place> {
    let path = file.path();
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let first = first_bytes::read(&*file.open().at(path, "open it")?, path)?;
    if let Some(found) = first_bytes::of(&first) {
        let (what, way_on) = found.parts();
        return Ok(Place::new(what, way_on));
    }
    let give = "expected a folder, or a file whose name ends in .safetensors";
    Ok(match &*name {
        _ if name.ends_with(INDEX_END) => Place::new("an index of files of weights", "give the folder that it lies in"),
        CONFIG_NAME => Place::new("a model's config", "give the folder that it lies in, or one .safetensors file"),
        _ => Place::new("a file of another kind", give),
    })
}
