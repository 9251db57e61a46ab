//! Reading manifests, of this version's schema and of older ones. A record is read for every tensor, and held only by who wants it.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufReader, Read};
use std::marker::PhantomData;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{
    FileRecord, LeftOutRecord, Manifest, ManifestHead, NotHeld, SCHEMA_VERSION, SourceRecord, SourceTensorRecord,
    Summary, TensorRecord, Tool, v1,
};
use crate::error::{Error, IoContext, Result};
use crate::recipe::ExpertLayout;
use crate::store::{HashingReader, Location, ReadAt, Reader, Sha256Hash};

/// Bytes that are read at once.
const BUFFER: usize = 1 << 16;

/// Takes each record, with the bytes of the file that hold it.
type Each<'a, T> = &'a mut dyn FnMut(T, Range<u64>);

impl Manifest {
    /// The manifest in a file, whichever version of prequant up to this one wrote it.
    ///
    /// # Errors
    /// When it can't be read, is no manifest, or a newer version's.
    pub fn read(location: &Location) -> Result<Manifest> {
        let mut tensors = Vec::new();
        let (head, _) = read_records(location, &mut |record, _| tensors.push(record))?;
        Ok(head.with(tensors))
    }

    /// A manifest's text.
    ///
    /// # Errors
    /// Why it is none that this version reads.
    pub fn parse(json: &[u8]) -> Result<Manifest, String> {
        let mut tensors = Vec::new();
        let read = read(|| json, &mut |record, _| tensors.push(record)).map_err(|error| error.to_string())?;
        read.map(|(head, _)| head.with(tensors))
    }
}

impl ManifestHead {
    /// As [`Manifest::read`], without holding the tensors' records.
    ///
    /// # Errors
    /// The same.
    pub fn read_head(location: &Location) -> Result<ManifestHead> {
        Ok(read_records::<IgnoredAny>(location, &mut |_, _| ())?.0)
    }

    /// Of the manifest that lies there, how many quantized tensors have no element other than zero, and what the first is made of.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn matrices_of_zeros(location: &Location) -> Result<(u64, Option<SourceTensorRecord>)> {
        let (mut count, mut first) = (0, None);
        read_records::<TensorRecord>(location, &mut |record, _| {
            if record.is_all_zeros() {
                count += 1;
                first = first.take().or_else(|| record.sources.into_iter().next());
            }
        })?;
        Ok((count, first))
    }
}

/// Hands on each tensor's record, or what `T` takes of it. Gives the rest of the manifest, and the file's SHA-256.
///
/// # Errors
/// As [`Manifest::read`]; what was handed on until then is void.
pub(crate) fn read_records<T: DeserializeOwned>(
    location: &Location,
    each: Each<'_, T>,
) -> Result<(ManifestHead, Sha256Hash)> {
    let path = location.path();
    let file = location.open().at(path, "open it")?;
    read(|| Reader::new(&*file), each).at(path, "read it")?.map_err(|why| Error::malformed(path, why))
}

/// Hands on the records in a part of a manifest: whole ones with commas between them, where [`read_records`] found them.
///
/// # Errors
/// The system's, or that there are no such records.
pub(crate) fn read_part<T: DeserializeOwned>(
    file: &dyn ReadAt,
    part: Range<u64>,
    each: &mut dyn FnMut(T),
) -> io::Result<()> {
    let records = BufReader::with_capacity(BUFFER, Reader::at(file, part.start).take(part.end - part.start));
    let mut list = serde_json::Deserializer::from_reader((&b"["[..]).chain(records).chain(&b"]"[..]));
    Records { each: &mut |record, _| each(record), position: &Cell::new(0) }.deserialize(&mut list)?;
    Ok(list.end()?)
}

/// What tells how to read the rest.
#[derive(Deserialize)]
struct Version {
    schema_version: u32,
    tool: Tool,
}

/// Reads it as what this version or an older one writes; if it isn't that, finds out why.
fn read<T: DeserializeOwned, R: Read>(
    from_start: impl Fn() -> R,
    each: Each<'_, T>,
) -> io::Result<Result<(ManifestHead, Sha256Hash), String>> {
    let position = Cell::new(0);
    let parsed = parse(from_start(), &position, Parts { each, position: &position })?;
    if let Ok((Found { schema_version: Some(1..=SCHEMA_VERSION), .. }, _)) = parsed {
        return Ok(parsed.and_then(|(found, sha256)| Ok((found.head().map_err(not_a_manifest)?, sha256))));
    }
    let Version { schema_version, tool } = match parse(from_start(), &position, PhantomData)? {
        Ok((version, _)) => version,
        Err(why) => return Ok(Err(why)),
    };
    Ok(Err(match parsed {
        Err(why) if (1..=SCHEMA_VERSION).contains(&schema_version) => why,
        // A newer one's, which may have anything else where this version knows what to expect.
        _ => format!(
            "{} {} wrote it, with schema version {schema_version}; this is {} and reads versions 1 to {SCHEMA_VERSION}: use \
             the version that wrote it, or a newer one",
            tool.name,
            tool.version,
            env!("CARGO_PKG_VERSION"),
        ),
    }))
}

fn not_a_manifest(why: impl fmt::Display) -> String {
    format!("not a manifest: {why}")
}

/// A value with the SHA-256 of its text, or why it isn't one.
fn parse<'de, S: DeserializeSeed<'de>>(
    input: impl Read,
    position: &Cell<u64>,
    seed: S,
) -> io::Result<Result<(S::Value, Sha256Hash), String>> {
    position.set(0);
    let mut reader = Counted::new(HashingReader::new(input), position);
    let mut deserializer = serde_json::Deserializer::from_reader(&mut reader);
    let value = seed.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    drop(deserializer);
    match value {
        Err(error) if error.is_io() => Err(error.into()),
        Err(error) => Ok(Err(not_a_manifest(error))),
        Ok(value) => {
            io::copy(&mut reader, &mut io::sink())?;
            Ok(Ok((value, reader.reader.finish().1)))
        }
    }
}

/// Tells how many bytes were taken of what it reads ahead. The parser takes them one by one.
struct Counted<'a, R> {
    reader: R,
    /// What was read ahead, from `taken` to `filled`.
    ahead: Box<[u8]>,
    taken: usize,
    filled: usize,
    position: &'a Cell<u64>,
}

impl<'a, R> Counted<'a, R> {
    fn new(reader: R, position: &'a Cell<u64>) -> Counted<'a, R> {
        Counted { reader, ahead: vec![0; BUFFER].into(), taken: 0, filled: 0, position }
    }
}

impl<R: Read> Read for Counted<'_, R> {
    #[inline]
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.filled {
            self.filled = self.reader.read(&mut self.ahead)?;
            self.taken = 0;
        }
        let len = into.len().min(self.filled - self.taken);
        into[..len].copy_from_slice(&self.ahead[self.taken..self.taken + len]);
        self.taken += len;
        self.position.set(self.position.get() + len as u64);
        Ok(len)
    }
}

/// Takes a manifest apart.
struct Parts<'a, T> {
    each: Each<'a, T>,
    position: &'a Cell<u64>,
}

/// What a manifest has beside the records.
#[derive(Default)]
struct Found {
    schema_version: Option<u32>,
    tool: Option<Tool>,
    /// Older versions' are other than this one's.
    recipe: Option<Value>,
    source: Option<SourceRecord>,
    relaid_from: Option<Option<ExpertLayout>>,
    summary: Option<Summary>,
    left_out: Option<Vec<LeftOutRecord>>,
    files: Option<Vec<FileRecord>>,
    tensors: Option<()>,
}

impl Found {
    fn head(self) -> Result<ManifestHead, String> {
        let recipe = needed(self.recipe, "recipe")?;
        let (recipe, older_schema) = match needed(self.schema_version, "schema_version")? {
            1 => (parsed::<v1::FlatRecipe>(recipe)?.recipe()?, Some(1)),
            _ => (parsed(recipe)?, None),
        };
        needed(self.tensors, "tensors")?;
        Ok(Manifest {
            schema_version: SCHEMA_VERSION,
            older_schema,
            tool: needed(self.tool, "tool")?,
            recipe,
            source: needed(self.source, "source")?,
            relaid_from: self.relaid_from.flatten(),
            summary: needed(self.summary, "summary")?,
            left_out: self.left_out.unwrap_or_default(),
            files: needed(self.files, "files")?,
            tensors: NotHeld,
        })
    }
}

fn needed<T>(field: Option<T>, name: &str) -> Result<T, String> {
    field.ok_or_else(|| format!("missing field `{name}`"))
}

fn parsed<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| error.to_string())
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Parts<'_, T> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Parts<'_, T> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let Parts { each, position } = self;
        let mut found = Found::default();
        while let Some(key) = map.next_key::<String>()? {
            let is_first = match key.as_str() {
                "schema_version" => found.schema_version.replace(map.next_value()?).is_none(),
                "tool" => found.tool.replace(map.next_value()?).is_none(),
                "recipe" => found.recipe.replace(map.next_value()?).is_none(),
                "source" => found.source.replace(map.next_value()?).is_none(),
                "relaid_from" => found.relaid_from.replace(map.next_value()?).is_none(),
                "summary" => found.summary.replace(map.next_value()?).is_none(),
                "left_out" => found.left_out.replace(map.next_value()?).is_none(),
                "files" => found.files.replace(map.next_value()?).is_none(),
                "tensors" => found.tensors.replace(map.next_value_seed(Records { each, position })?).is_none(),
                _ => map.next_value::<IgnoredAny>().map(|_| true)?,
            };
            if !is_first {
                return Err(de::Error::custom(format!("duplicate field `{key}`")));
            }
        }
        Ok(found)
    }
}

/// Hands on the records of a list, one after the other.
struct Records<'a, T> {
    each: Each<'a, T>,
    position: &'a Cell<u64>,
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Records<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Records<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tensors")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut records: A) -> Result<(), A::Error> {
        while let Some((record, place)) = records.next_element_seed(Placed(self.position, PhantomData))? {
            (self.each)(record, place);
        }
        Ok(())
    }
}

/// A record with its place: the parser has read its first byte when it turns to it, and none behind it when it is done.
struct Placed<'a, T>(&'a Cell<u64>, PhantomData<T>);

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Placed<'_, T> {
    type Value = (T, Range<u64>);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(T, Range<u64>), D::Error> {
        let start = self.0.get().saturating_sub(1);
        T::deserialize(deserializer).map(|record| (record, start..self.0.get()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::manifest::TensorRecord;
    use crate::store::MemoryStore;

    /// A manifest with records of these texts.
    fn manifest(records: &[String], between: &str) -> String {
        let statistics = r#"{"blocks":0,"zero_blocks":0,"nonfinite_blocks":0,"absmax":{"min":0,"mean":0,"max":0},
            "relative_squared_error":0,"snr_db":null,"max_absolute_error":0}"#;
        let recipe = serde_json::to_string(&crate::recipe::Recipe::default()).unwrap();
        format!(
            r#"{{"schema_version":2,"tool":{{"name":"prequant","version":"9"}},"tensors":[{between}{}{between}],
            "recipe":{recipe},"source":{{"model_type":null,"files":[]}},"files":[],"later":[{{}}],
            "summary":{{"quantized_tensors":1,"kept_tensors":0,"quantized_elements":1,"kept_elements":0,
            "bits_per_quantized_weight":4,"bits_per_weight":4,"statistics":{statistics}}}}}"#,
            records.join(&format!("{between},{between}")),
        )
    }

    fn record(i: usize) -> String {
        let name = format!("größe \\\"{i}\\\" ]}}{{[");
        format!(r#"{{"sources":[],"role":"linear","decision":"keep","reason":"{name}","outputs":[]}}"#)
    }

    #[test]
    fn records_are_found_again_where_they_were_said_to_be() {
        let records: Vec<String> = (0..700).map(record).collect();
        for between in ["", " ", "\n    "] {
            let text = manifest(&records, between);
            let location = Location::new(Arc::new(MemoryStore::default()), "prequant.json");
            let file = location.create(text.len() as u64).unwrap();
            crate::store::write_all_at(&*file, text.as_bytes(), 0).unwrap();
            let mut places = Vec::new();
            let mut all = Vec::new();
            let (head, sha256) = read_records(&location, &mut |record: TensorRecord, place| {
                places.push(place);
                all.push(record);
            })
            .unwrap();
            assert_eq!((head.tool.version.as_str(), sha256), ("9", Sha256Hash::of(text.as_bytes())));
            let of_places: Vec<&str> =
                places.iter().map(|place| &text[place.start as usize..place.end as usize]).collect();
            assert_eq!(of_places, records);
            let mut part = Vec::new();
            let place = places[3].start..places[650].end;
            read_part(&*location.open().unwrap(), place, &mut |record: TensorRecord| part.push(record)).unwrap();
            assert_eq!(part, all[3..=650]);
            let broken = places[3].start + 1..places[650].end;
            let read = read_part(&*location.open().unwrap(), broken, &mut |_: TensorRecord| ());
            assert!(read.is_err());
        }
    }

    #[test]
    fn what_is_no_manifest_is_told_apart_from_what_a_newer_version_wrote() {
        let whole = manifest(&[record(0)], "");
        assert!(Manifest::parse(whole.as_bytes()).is_ok_and(|manifest| manifest.tensors.len() == 1));
        let why = |text: String| Manifest::parse(text.as_bytes()).unwrap_err();
        assert!(why(whole.replace("schema_version\":2", "schema_version\":3")).contains("schema version 3"));
        let newer = whole
            .replace("schema_version\":2", "schema_version\":3")
            .replace("[{\"sources\"", "{\"all\":[{\"sources\"");
        assert!(why(newer).starts_with("not a manifest"));
        assert!(why(whole.replace("\"summary\"", "\"total\"")).contains("missing field `summary`"));
        assert!(why(whole.replace("\"later\":[{}]", "\"files\":[]")).contains("duplicate field `files`"));
        assert!(why(whole + "x").contains("trailing characters"));
    }
}
