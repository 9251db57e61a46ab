//! Which of a folder's files hold the model: as its clients choose them, and where they would guess, as the names say.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::index::{Index, MAX_INDEX_LEN, inside};
use super::{CONFIG_NAME, Config};
use crate::error::{Error, IoContext, Result};
use crate::store::Location;

/// How a library calls a model's files.
#[derive(Debug)]
pub(crate) struct Naming {
    /// Before `.safetensors` or a shard's number.
    pub stem: &'static str,
    /// The index.
    pub index: &'static str,
}

/// transformers and most others.
pub(crate) const TRANSFORMERS: &Naming = &Naming { stem: "model", index: super::INDEX_NAME };
/// diffusers.
pub(crate) const DIFFUSERS: &Naming =
    &Naming { stem: "diffusion_pytorch_model", index: "diffusion_pytorch_model.safetensors.index.json" };

impl Naming {
    /// That of a model with this config.
    pub(crate) fn of(config: Option<&Config>) -> &'static Naming {
        if config.is_some_and(|config| config.class_name().is_some()) { DIFFUSERS } else { TRANSFORMERS }
    }

    /// The name of output file `i` (from 0) of `count`.
    pub(crate) fn file(&self, i: usize, count: usize) -> String {
        match count {
            1 => format!("{}{SAFETENSORS}", self.stem),
            _ => format!("{}-{:05}-of-{count:05}{SAFETENSORS}", self.stem, i + 1),
        }
    }
}

/// The end of the name of a file of weights.
pub(crate) const SAFETENSORS: &str = ".safetensors";
/// The end of an index's name.
pub(crate) const INDEX_END: &str = ".safetensors.index.json";

/// Names that a message lists at most.
const NAMED: usize = 6;

/// The files that a model is in.
pub(crate) struct WeightFiles {
    /// Their paths below the folder, sorted.
    pub names: Vec<String>,
    /// The index that lists them.
    pub index: Option<Index>,
    /// Shards that are there as well, by an index of their own: the model only if they hold the same.
    pub also: Option<Index>,
    /// What should be known of the choice.
    pub notes: Vec<String>,
}

/// Chooses among the files called `present`, of the folder itself: a single file before an index, as transformers and diffusers
/// do, an index before names.
///
/// # Errors
/// When a file is missing, or several could be meant.
pub(crate) fn choose(folder: &Location, present: &BTreeSet<String>, config: Option<&Config>) -> Result<WeightFiles> {
    let folder = &Listed { folder, present };
    if let Some(name) = config.and_then(Config::weights_name) {
        return named_by_config(folder, name);
    }
    let naming = Naming::of(config);
    let single = naming.file(0, 1);
    let index = match present.contains(naming.index) {
        true => Some(Index::read(&folder.join(naming.index), MAX_INDEX_LEN)?),
        false => None,
    };
    match (present.contains(&single), index) {
        (true, Some(index)) if index.files() != BTreeSet::from([single.as_str()]) => {
            beside_shards(folder, single, naming.index, index)
        }
        (true, index) => Ok(WeightFiles { names: vec![single], index, also: None, notes: Vec::new() }),
        (false, Some(index)) => of_index(folder, naming.index, index),
        (false, None) => by_names(folder.folder.path(), present, naming.stem),
    }
}

/// A folder, and what lies in it.
struct Listed<'a> {
    folder: &'a Location,
    present: &'a BTreeSet<String>,
}

impl Listed<'_> {
    fn join(&self, name: &str) -> Location {
        self.folder.join(name)
    }

    /// Those of `names` that aren't there. A link that leads nowhere is: that is told of when it is opened.
    fn missing(&self, names: &[String]) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        for name in names.iter().filter(|name| !self.present.contains(*name)) {
            let place = self.join(name);
            if !name.contains('/') || !place.exists().at(place.path(), "look at it")? {
                missing.push(name.clone());
            }
        }
        Ok(missing)
    }
}

/// What config.json's `transformers_weights` says: a file, or an index.
fn named_by_config(folder: &Listed<'_>, name: &str) -> Result<WeightFiles> {
    let config = folder.join(CONFIG_NAME);
    let inside = inside(name).ok_or_else(|| {
        let why =
            format!("its transformers_weights is {name:?}: expected the name of a file in this folder or below it");
        Error::malformed(config.path(), why)
    })?;
    let mut found = match inside.ends_with(INDEX_END) {
        true => of_index(folder, &inside, Index::read(&folder.join(&inside), MAX_INDEX_LEN)?)?,
        false => WeightFiles { names: vec![inside], index: None, also: None, notes: Vec::new() },
    };
    found.notes.push(format!("the weights are those that config.json's transformers_weights names, {name:?}"));
    Ok(found)
}

/// The files of an index; all must be there.
fn of_index(folder: &Listed<'_>, index_name: &str, index: Index) -> Result<WeightFiles> {
    let index_path = folder.join(index_name);
    let names: Vec<String> = index.files().into_iter().map(str::to_owned).collect();
    match folder.missing(&names)?.first() {
        Some(name) => {
            let why = format!("names {name:?}, which isn't beside it: download that file too");
            Err(Error::malformed(index_path.path(), why))
        }
        None => Ok(WeightFiles { names, index: Some(index), also: None, notes: Vec::new() }),
    }
}

/// A single file beside an index of others.
fn beside_shards(folder: &Listed<'_>, single: String, index_name: &str, index: Index) -> Result<WeightFiles> {
    let shards: Vec<String> = index.files().into_iter().map(str::to_owned).collect();
    let gone = folder.missing(&shards)?;
    let mut found = WeightFiles { names: vec![single.clone()], index: None, also: None, notes: Vec::new() };
    if gone.is_empty() {
        found.also = Some(index);
    } else {
        found.notes.push(format!(
            "{index_name} lists files that aren't there ({}): {single} is converted, which clients take first",
            some(&gone)
        ));
    }
    Ok(found)
}

/// A shard's name, taken apart: `model-00002-of-00003.safetensors`, or without the count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub stem: String,
    pub number: u64,
    pub count: Option<u64>,
}

impl Shard {
    /// What a file's name says, if it is a shard's.
    pub(crate) fn of(name: &str) -> Option<Shard> {
        let name = name.strip_suffix(SAFETENSORS)?;
        let (name, count) = match name.rsplit_once("-of-") {
            Some((before, count)) if is_number(count) => (before, Some(count.parse().ok()?)),
            _ => (name, None),
        };
        let (stem, number) = name.rsplit_once(['-', '_', '.']).filter(|(_, number)| is_number(number))?;
        Some(Shard { stem: stem.to_owned(), number: number.parse().ok()?, count })
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Files by their number, which only one should have.
type Numbered<'a> = BTreeMap<u64, Vec<&'a String>>;

/// Without an index and a single file of the usual name: what the names say.
fn by_names(folder: &Path, present: &BTreeSet<String>, stem: &str) -> Result<WeightFiles> {
    // Mistral's own layout of the same weights, and adapters, lie beside a model's files at times.
    let is_other = |name: &str| name.starts_with("consolidated") || name.starts_with("adapter");
    let all: Vec<&String> =
        present.iter().filter(|name| name.ends_with(SAFETENSORS) && !name.starts_with('.')).collect();
    let own: Vec<&String> = all.iter().copied().filter(|name| !is_other(name)).collect();
    let own = if own.is_empty() { all } else { own };
    let mut sets: BTreeMap<(String, Option<u64>), Numbered<'_>> = BTreeMap::new();
    for name in &own {
        if let Some(Shard { stem, number, count }) = Shard::of(name) {
            sets.entry((stem, count)).or_default().entry(number).or_default().push(name);
        }
    }
    // A count in the name is certain; a number alone may be part of it.
    if sets.keys().any(|(_, count)| count.is_some()) {
        sets.retain(|(_, count), _| count.is_some());
    } else if sets.len() != 1 || sets.values().any(|set| set.values().map(Vec::len).sum::<usize>() < own.len()) {
        sets.clear();
    }
    if sets.len() > 1 && sets.keys().filter(|(of, _)| of == stem).count() == 1 {
        sets.retain(|(of, _), _| of == stem);
    }
    let chosen = sets.pop_first();
    match (chosen, &own[..]) {
        (Some(_), _) if !sets.is_empty() => Err(several(folder, &own)),
        (Some(((stem, count), set)), _) => shards(folder, &stem, count, set),
        (None, [one]) => Ok(WeightFiles { names: vec![(*one).clone()], index: None, also: None, notes: Vec::new() }),
        (None, _) => Err(several(folder, &own)),
    }
}

/// The files of one set: each number once, and all of them.
fn shards(folder: &Path, stem: &str, count: Option<u64>, set: BTreeMap<u64, Vec<&String>>) -> Result<WeightFiles> {
    let error = |why: String| Err(Error::NotACheckpoint { path: folder.to_owned(), why });
    if let Some(twice) = set.values().find(|names| names.len() > 1) {
        return error(format!("two files are the same shard by their names: {}; which one is meant?", some(twice)));
    }
    let first = if set.contains_key(&0) { 0 } else { 1 };
    let last = set.keys().next_back().copied().unwrap_or(first);
    let numbers = first..=count.map_or(last, |count| count.saturating_add(first).saturating_sub(1));
    if let Some((number, names)) = set.iter().find(|(number, _)| !numbers.contains(number)) {
        return error(format!("by its name {} is shard {number} of {}", some(names), count.unwrap_or_default()));
    }
    // A count is a stranger's number: as many may be missing as it likes.
    let gone = || numbers.clone().filter(|number| !set.contains_key(number));
    if gone().next().is_some() {
        let of = count.map(|count| format!(" of {count}")).unwrap_or_default();
        let listed: Vec<String> = gone().take(NAMED).map(|number| number.to_string()).collect();
        let more = if gone().nth(NAMED).is_some() { " and more" } else { "" };
        let what = if listed.len() == 1 { "a shard" } else { "shards" };
        return error(format!(
            "{what} of {stem:?} that the others' names speak of {} missing: shard {}{more}{of}; download what is missing",
            if listed.len() == 1 { "is" } else { "are" },
            listed.join(", "),
        ));
    }
    let names: Vec<String> = set.into_values().flatten().cloned().collect();
    let uncounted = count.is_none().then(|| {
        format!(
            "{} are taken for all of the model: neither an index nor their names say how many there are",
            some(&names)
        )
    });
    Ok(WeightFiles { names, index: None, also: None, notes: uncounted.into_iter().collect() })
}

fn several(folder: &Path, names: &[&String]) -> Error {
    let why = format!(
        "it has files of weights that aren't one model by their names, and no index: {}; give the one to convert",
        some(names)
    );
    Error::NotACheckpoint { path: folder.to_owned(), why }
}

/// The first of them, and how many more there are.
pub(crate) fn some(names: &[impl AsRef<str>]) -> String {
    let first: Vec<&str> = names.iter().take(NAMED).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(NAMED) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str]) -> Result<Vec<String>, String> {
        let present = names.iter().map(|&name| name.to_owned()).collect();
        by_names(Path::new("m"), &present, TRANSFORMERS.stem)
            .map(|found| found.names)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn shards_are_told_by_stem_number_and_count() {
        let shard = |name: &str| Shard::of(name).map(|shard| (shard.stem, shard.number, shard.count));
        assert_eq!(shard("model-00002-of-00003.safetensors"), Some(("model".to_owned(), 2, Some(3))));
        assert_eq!(shard("pytorch_model_1-of-2.safetensors"), Some(("pytorch_model".to_owned(), 1, Some(2))));
        assert_eq!(shard("model-00001.safetensors"), Some(("model".to_owned(), 1, None)));
        assert_eq!(shard("consolidated.00.safetensors"), Some(("consolidated".to_owned(), 0, None)));
        for other in ["model.safetensors", "model-of-3.safetensors", "model-00001-of-00002.bin", "-of-.safetensors"] {
            assert_eq!(shard(other), None, "{other}");
        }
    }

    #[test]
    fn a_whole_set_is_taken_and_what_is_not_of_it_left() {
        let two = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(chosen(&two).unwrap(), two);
        let with = |other: &str| chosen(&[two[0], two[1], other]).unwrap();
        for other in ["extra.safetensors", "adapter_model.safetensors", "consolidated.safetensors", "mtp-1.safetensors"]
        {
            assert_eq!(with(other), two, "{other}");
        }
        assert_eq!(with("draft-00001-of-00001.safetensors"), two);
        assert_eq!(chosen(&["m-0.safetensors", "m-1.safetensors"]).unwrap().len(), 2);
        assert_eq!(chosen(&["any name.safetensors", "notes.txt"]).unwrap(), ["any name.safetensors"]);
        assert_eq!(chosen(&["a-00000-of-00002.safetensors", "a-00001-of-00002.safetensors"]).unwrap().len(), 2);
    }

    #[test]
    fn a_missing_shard_is_named_whatever_else_is_there() {
        let error = |names: &[&str]| chosen(names).unwrap_err();
        let two_of_three = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"];
        assert!(error(&two_of_three).contains("shard 3 of 3"), "{}", error(&two_of_three));
        let masked = [&two_of_three[..], &["model_extra.safetensors"]].concat();
        assert!(error(&masked).contains("shard 3 of 3"), "{}", error(&masked));
        assert!(error(&["m-1.safetensors", "m-3.safetensors"]).contains("shard 2"));
        let many = "x-1-of-18446744073709551615.safetensors";
        assert!(error(&[many]).contains("shard 2, 3, 4"), "{}", error(&[many]));
        let twice = ["m-1-of-2.safetensors", "m-00001-of-2.safetensors", "m-2-of-2.safetensors"];
        assert!(error(&twice).contains("the same shard"));
    }

    #[test]
    fn files_that_are_not_one_model_are_named() {
        for names in [
            &["dit.safetensors", "vae.safetensors"][..],
            &["a-1-of-1.safetensors", "b-1-of-1.safetensors"],
            &["model-1-of-1.safetensors", "model-1-of-2.safetensors"],
            &["part-1.safetensors", "vae.safetensors"],
        ] {
            let error = chosen(names).unwrap_err();
            assert!(names.iter().all(|name| error.contains(name)) && error.contains("aren't one model"), "{error}");
        }
    }
}
