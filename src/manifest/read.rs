//! Reading manifests, of this version's schema and of older ones. A record is read for every tensor, and held only by who wants it.

use std::fmt;
use std::io::{self, Read};
use std::ops::Range;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use super::{
    FileRecord, LeftOutRecord, Manifest, ManifestHead, NotHeld, SCHEMA_VERSION, SourceRecord, SourceTensorRecord,
    Summary, TensorRecord, Tool, v1,
};
use crate::error::{Error, IoContext, Result};
use crate::json_text::{Failure, JsonText};
use crate::recipe::ExpertLayout;
use crate::store::{HashingReader, Location, ReadAt, Reader, Sha256Hash};

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
    let mut text = JsonText::new(Reader::at(file, part.start).take(part.end - part.start), part.start);
    let read = text.rest_of_list(&mut |text| text.value().map(&mut *each));
    read.map_err(|failure| match failure {
        Failure::Io(error) => error,
        Failure::Json(why) => io::Error::new(io::ErrorKind::InvalidData, why),
    })
}

/// What tells how to read the rest.
struct Version {
    schema_version: u32,
    tool: Tool,
}

/// Reads it as what this version or an older one writes; if it isn't that, finds out why.
fn read<T: DeserializeOwned, R: Read>(
    from_start: impl Fn() -> R,
    each: Each<'_, T>,
) -> io::Result<Result<(ManifestHead, Sha256Hash), String>> {
    let parsed = parse(&from_start, |text| found(text, each))?;
    if let Ok((Found { schema_version: Some(1..=SCHEMA_VERSION), .. }, _)) = parsed {
        return Ok(parsed.and_then(|(found, sha256)| Ok((found.head().map_err(not_a_manifest)?, sha256))));
    }
    let Version { schema_version, tool } = match parse(&from_start, version)? {
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

/// What `take` takes of a text, with the text's SHA-256; or why it isn't there.
fn parse<V, R: Read>(
    from_start: &impl Fn() -> R,
    take: impl FnOnce(&mut JsonText<HashingReader<R>>) -> Result<V, Failure>,
) -> io::Result<Result<(V, Sha256Hash), String>> {
    let mut text = JsonText::new(HashingReader::new(from_start()), 0);
    match take(&mut text).and_then(|value| text.end().map(|()| value)) {
        Ok(value) => Ok(Ok((value, text.into_reader().finish().1))),
        Err(Failure::Json(why)) => Ok(Err(not_a_manifest(why))),
        Err(Failure::Io(error)) => Err(error),
    }
}

/// Takes a field's value for the first time.
fn once<T: DeserializeOwned, R: Read>(
    field: &mut Option<T>,
    name: &str,
    text: &mut JsonText<R>,
) -> Result<(), Failure> {
    match field.replace(text.value()?) {
        None => Ok(()),
        Some(_) => Err(text.defect(&format!("duplicate field `{name}`"))),
    }
}

fn version<R: Read>(text: &mut JsonText<R>) -> Result<Version, Failure> {
    let (mut schema_version, mut tool) = (None, None);
    text.object("an object", &mut |name, text| match name.as_str() {
        "schema_version" => once(&mut schema_version, &name, text),
        "tool" => once(&mut tool, &name, text),
        _ => text.value::<IgnoredAny>().map(|_| ()),
    })?;
    let missing = |name| text.defect(&format!("missing field `{name}`"));
    let schema_version = schema_version.ok_or_else(|| missing("schema_version"))?;
    Ok(Version { schema_version, tool: tool.ok_or_else(|| missing("tool"))? })
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
    has_tensors: bool,
}

/// Takes a manifest apart.
fn found<T: DeserializeOwned, R: Read>(text: &mut JsonText<R>, each: Each<'_, T>) -> Result<Found, Failure> {
    let mut found = Found::default();
    text.object("an object", &mut |name, text| match name.as_str() {
        "schema_version" => once(&mut found.schema_version, &name, text),
        "tool" => once(&mut found.tool, &name, text),
        "recipe" => once(&mut found.recipe, &name, text),
        "source" => once(&mut found.source, &name, text),
        "relaid_from" => once(&mut found.relaid_from, &name, text),
        "summary" => once(&mut found.summary, &name, text),
        "left_out" => once(&mut found.left_out, &name, text),
        "files" => once(&mut found.files, &name, text),
        "tensors" if found.has_tensors => Err(text.defect("duplicate field `tensors`")),
        "tensors" => {
            found.has_tensors = true;
            text.list("a list of tensors", &mut |text| text.placed().map(|(record, place)| each(record, place)))
        }
        _ => text.value::<IgnoredAny>().map(|_| ()),
    })?;
    Ok(found)
}

impl Found {
    fn head(self) -> Result<ManifestHead, String> {
        let recipe = needed(self.recipe, "recipe")?;
        let (recipe, older_schema) = match needed(self.schema_version, "schema_version")? {
            1 => (parsed::<v1::FlatRecipe>(recipe)?.recipe()?, Some(1)),
            _ => (parsed(recipe)?, None),
        };
        needed(self.has_tensors.then_some(()), "tensors")?;
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
