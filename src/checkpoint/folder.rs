//! Opening a checkpoint's folder.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::index::Index;
use super::links::Reach;
use super::side_files::{self, Beside};
use super::weight_files::{self, INDEX_END, Naming, SAFETENSORS, WeightFiles, some};
use super::{CONFIG_NAME, Config, LeftOut, MANIFEST_NAME, Source, SourceFile, duplicates, place};
use crate::error::{Error, IoContext, Result, Warning};
use crate::store::{Listing, Location};
use crate::threads;

/// Headers that are read at the same time.
const OPEN_AT_ONCE: usize = 8;

/// Opens it; with `follow_links` links beside the weights may lead anywhere, to folders too.
///
/// # Errors
/// When it isn't a checkpoint, or is damaged as far as headers tell.
pub(super) fn open(folder: &Location, follow_links: bool) -> Result<Source> {
    let entries = folder.list().at(folder.path(), "list it")?;
    let present: BTreeSet<String> = entries.iter().filter_map(|entry| entry.name.to_str()).map(str::to_owned).collect();
    check_is_a_checkpoint(folder, &entries, &present)?;
    let config = open_config(folder, &present)?;
    check_has_weights(folder, &present)?;
    let chosen = weight_files::choose(folder, &present, config.as_ref())?;
    let reach = reach(folder, config.as_ref(), &chosen, follow_links)?;
    let Weights { files, left_out, mut notes } = open_weights(folder, config.as_ref(), chosen)?;
    let beside = side_files::find(folder, &files, &reach, follow_links)?;
    let Beside { files: side_files, left_out: mut all_left_out, notes: of_files } = beside;
    notes.extend(of_files.into_iter().map(Warning::from));
    all_left_out.extend(left_out);
    all_left_out.sort_by(|a, b| (&a.name, &a.tensor).cmp(&(&b.name, &b.tensor)));
    Ok(Source { side_files, left_out: all_left_out, notes, ..Source::of_files(folder.clone(), files, config) })
}

/// # Errors
/// When it is something else that has a name.
fn check_is_a_checkpoint(folder: &Location, entries: &[Listing], present: &BTreeSet<String>) -> Result<()> {
    let has_config = present.contains(CONFIG_NAME) || present.contains(MANIFEST_NAME);
    if has_config && has_weights(present) {
        return Ok(());
    }
    place::of_folder(folder, entries)?.map_or(Ok(()), |found| Err(found.error(folder)))
}

fn check_has_weights(folder: &Location, present: &BTreeSet<String>) -> Result<()> {
    if has_weights(present) {
        return Ok(());
    }
    let why = "it has no .safetensors file; convert weights in other formats to safetensors first (transformers' \
               save_pretrained does)";
    Err(Error::NotACheckpoint { path: folder.path().to_owned(), why: why.to_owned() })
}

fn has_weights(present: &BTreeSet<String>) -> bool {
    present.iter().any(|name| name.ends_with(SAFETENSORS) || name.ends_with(INDEX_END))
}

/// Where links may lead, with those of config.json and the index checked.
fn reach(folder: &Location, config: Option<&Config>, chosen: &WeightFiles, anywhere: bool) -> Result<Reach> {
    let mut reach = Reach::new(folder, anywhere)?;
    for name in &chosen.names {
        reach.add_weights(&folder.join(name))?;
    }
    let has_index = chosen.index.is_some() || chosen.also.is_some();
    let index_name = index_name(config);
    for name in [config.map(|_| CONFIG_NAME), has_index.then_some(&*index_name)].into_iter().flatten() {
        reach.check(&folder.join(name), name)?;
    }
    Ok(reach)
}

/// Files of weights, each name in one of them.
struct Weights {
    files: Vec<SourceFile>,
    left_out: Vec<LeftOut>,
    notes: Vec<Warning>,
}

fn open_weights(folder: &Location, config: Option<&Config>, chosen: WeightFiles) -> Result<Weights> {
    let index_name = index_name(config);
    let WeightFiles { names, index, also, notes } = chosen;
    let mut notes: Vec<Warning> = notes.into_iter().map(Warning::from).collect();
    let mut files = open_all(folder, &names)?;
    if let Some(index) = &index {
        notes.extend(check_index(folder, &files, index, &index_name)?);
    }
    if let Some(shards) = also {
        notes.push(compare_with_shards(folder, &files, &shards, &index_name)?.into());
    }
    let left_out = duplicates::take_once(&mut files, index.as_ref())?;
    if let Some(first) = left_out.first() {
        let (count, name) = (left_out.len(), first.tensor.as_deref().unwrap_or_default());
        let note =
            format!("{count} of its tensors are in two files, with the same bytes, such as {name:?}: taken once");
        notes.push(note.into());
    }
    Ok(Weights { files, left_out, notes })
}

/// Whether each tensor is where the index says; those in two files are looked at later. Returns what it doesn't list.
fn check_index(folder: &Location, files: &[SourceFile], index: &Index, name: &str) -> Result<Option<Warning>> {
    let listed = files.iter().map(|file| (file.name.as_str(), file.tensors.as_slice()));
    let unlisted = index.check(folder.join(name).path(), listed)?;
    Ok(unlisted.map(|(count, first)| {
        format!("{name} doesn't list {count} of its files' tensors, such as {first:?}: they are kept").into()
    }))
}

/// config.json; none in what was made of one file without it.
fn open_config(folder: &Location, present: &BTreeSet<String>) -> Result<Option<Config>> {
    let location = folder.join(CONFIG_NAME);
    match (present.contains(CONFIG_NAME), present.contains(MANIFEST_NAME)) {
        (true, _) => Config::read(&location).map(Some),
        (false, true) => Ok(None),
        (false, false) => {
            let why = "it has no config.json; give the .safetensors file itself to convert weights without a model";
            Err(Error::NotACheckpoint { path: folder.path().to_owned(), why: why.to_owned() })
        }
    }
}

/// The name of the index that speaks of the weights.
fn index_name(config: Option<&Config>) -> String {
    let named = config.and_then(Config::weights_name).filter(|name| name.ends_with(INDEX_END));
    named.unwrap_or(Naming::of(config).index).to_owned()
}

/// A single file and shards that both are whole must be one model; returns what is to be known of it.
fn compare_with_shards(folder: &Location, single: &[SourceFile], shards: &Index, index_name: &str) -> Result<String> {
    let names: Vec<String> = shards.files().into_iter().map(str::to_owned).collect();
    let name = &single[0].name;
    let shards = match open_all(folder, &names) {
        Ok(shards) => shards,
        Err(Error::Malformed { path, .. }) => {
            return Ok(format!(
                "{index_name} lists shards beside {name} of which {} is damaged: {name} is converted, which clients take first",
                path.file_name().unwrap_or_default().to_string_lossy()
            ));
        }
        Err(error) => return Err(error),
    };
    match duplicates::first_difference(single, &shards)? {
        None => Ok(format!("{name} holds the same as the shards that {index_name} lists: it alone is read")),
        Some(what) => {
            let why = format!(
                "both {name} and the shards that {index_name} lists ({}) are whole, and they differ: {what}. Clients take {name} \
                 first; move away what isn't the model",
                some(&names)
            );
            Err(Error::NotACheckpoint { path: folder.path().to_owned(), why })
        }
    }
}

/// Opens files by name, several at once: on a network disk it is waiting that takes the time.
///
/// # Errors
/// Of files that can't be opened, that of the first.
fn open_all(folder: &Location, names: &[String]) -> Result<Vec<SourceFile>> {
    let next = AtomicUsize::new(0);
    let open = || {
        let mut opened = Vec::new();
        while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < names.len()) {
            let file = SourceFile::open(names[i].clone(), folder.join(&names[i]));
            let failed = file.is_err();
            opened.push((i, file));
            if failed {
                break;
            }
        }
        opened
    };
    let mut opened = threads::share(OPEN_AT_ONCE.min(names.len()), open).into_iter().flatten().collect::<Vec<_>>();
    opened.sort_by_key(|(i, _)| *i);
    opened.into_iter().map(|(_, file)| file).collect()
}
