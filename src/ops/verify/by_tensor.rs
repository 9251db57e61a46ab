//! A checkpoint that another version wrote, compared with what this one makes of its source: tensor by tensor, wherever in
//! its files they are. What may differ between versions, docs/manifest.md says: the order of tensors, and words.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::checkpoint::{CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, Source, SourceFile, TensorInfo, parse_json};
use crate::error::{IoContext, Result};
use crate::layout::compressed_tensors::GUARD_KEY;
use crate::layout::modelopt::{BITS, PRODUCER};
use crate::manifest::{Manifest, OutputRecord, TensorRecord};
use crate::models::Rules;
use crate::ops::model_card;
use crate::ops::quantize::Conversion;
use crate::ops::records::Records;
use crate::ops::verify::conversion::execute;
use crate::ops::verify::{Checkpoint, Options, Report, fresh};
use crate::pipeline::{FileOutcome, Output, Outputs};
use crate::plan::{Plan, PlannedFile};
use crate::store::{Identity, Location, ReadAt, Sha256Hash, read_exact_at};

/// Converts again, and reports what differs.
///
/// # Errors
/// Those of reading and converting.
pub(crate) fn compare(
    conversion: &Conversion,
    checkpoint: &Checkpoint,
    options: Options<'_>,
    report: &mut Report,
) -> Result<()> {
    let found = Source::open(checkpoint.folder.clone())?;
    let rearranged = Rearranged::new(&found, &conversion.plan, report)?;
    let outcome = execute(conversion, &rearranged, options)?;
    let differing = rearranged.differing.into_inner().unwrap_or_else(PoisonError::into_inner);
    for (name, file) in &differing {
        report.differ(file, Some(name), "its bytes aren't what converting the source gives");
    }
    compare_config(conversion, checkpoint, report)?;
    compare_files(conversion, checkpoint, report)?;
    let outcome = conversion.relaid(outcome);
    compare_records(&conversion.manifest(Vec::new(), &outcome), checkpoint, &differing, report)
}

/// What lies beside the weights must be the same: the model card by what it says, other files byte by byte.
fn compare_files(conversion: &Conversion, checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let card = model_card::changed(&conversion.source, &conversion.plan)?;
    let found = checkpoint.read(model_card::NAME)?.unwrap_or_default();
    let card = card.filter(|card| model_card::says_the_same(&found, card)).map(|_| model_card::NAME);
    // By their content, elsewhere.
    let made = conversion.plan.side_files.iter().map(|(name, _)| name.as_str());
    let weights = checkpoint.records.files();
    let elsewhere: HashSet<&str> = made.chain(card).chain(weights).chain([CONFIG_NAME, INDEX_NAME]).collect();
    fresh::compare_files(conversion, &fresh::other_files(conversion)?, checkpoint, &elsewhere, report)
}

/// What clients load by must be the same; of `config.json`'s other keys, all that converting the source gives.
fn compare_config(conversion: &Conversion, checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let made = conversion.plan.side_files.iter().map(|(name, text)| (name.as_str(), text));
    for (name, text) in made.chain(conversion.plan.config.iter().map(|text| (CONFIG_NAME, text))) {
        let parse = |text: &[u8]| parse_json(text).ok();
        let found = checkpoint.read(name)?.and_then(|text| parse(&text));
        let (Some(mut found), Some(mut expected)) = (found, parse(text.as_bytes())) else {
            report.differ(name, None, "it is missing, or not JSON");
            continue;
        };
        let is_config = name == CONFIG_NAME;
        let part = |value: &mut Value| if is_config { value["quantization_config"].take() } else { value.take() };
        let [mut of_found, mut of_expected] = [part(&mut found), part(&mut expected)];
        [&mut of_found, &mut of_expected].into_iter().filter_map(Value::as_object_mut).for_each(|object| {
            object.shift_remove(PRODUCER); // names the version
        });
        if let Some(object) = of_expected.as_object_mut() {
            // What 0.1.0 didn't write.
            if of_found.get(BITS).is_none() {
                object.shift_remove(BITS);
            }
            if of_found.get(GUARD_KEY).is_some_and(Value::is_null) {
                object.insert(GUARD_KEY.to_owned(), Value::Null);
            }
        }
        if is_config {
            without_other_heads(&mut of_expected, &of_found, conversion);
        }
        if of_found != of_expected {
            report.differ(name, None, "it tells clients otherwise than what converting the source gives");
        }
        let keys = expected.as_object().into_iter().flatten();
        for (key, _) in keys.filter(|(key, expected)| found.get(key) != Some(*expected)) {
            report.differ(name, None, format!("its {key} isn't what converting the source gives"));
        }
    }
    Ok(())
}

/// Takes out of the list of kept modules what older versions didn't list: heads of the model's other classes, which have no tensor.
fn without_other_heads(expected: &mut Value, found: &Value, conversion: &Conversion) {
    let key = conversion.plan.recipe.codec().kept_modules_key();
    let heads = Rules::of(&conversion.source).heads();
    let is_found = |entry: &Value| found[key].as_array().is_some_and(|list| list.contains(entry));
    let is_other = |entry: &Value| entry.as_str().is_some_and(|name| heads.iter().any(|head| head == name));
    if let Some(list) = expected.get_mut(key).and_then(Value::as_array_mut) {
        list.retain(|entry| is_found(entry) || !is_other(entry));
    }
}

/// Sources, decisions and tensors must be the same, by their names; `differing` are those whose bytes aren't, and whose hashes may be
/// those of what was found.
fn compare_records(
    expected: &Manifest<Records<'_>>,
    checkpoint: &Checkpoint,
    differing: &BTreeMap<String, String>,
    report: &mut Report,
) -> Result<()> {
    if checkpoint.manifest.source != expected.source {
        report.differ(MANIFEST_NAME, None, "it was made from another source: names, sizes or headers of files differ");
    }
    let records = &expected.tensors;
    let mut numbers: HashMap<String, usize> =
        (0..records.len()).filter_map(|number| Some((records.name(number)?, number))).collect();
    let is_comparable =
        |record: &TensorRecord| !record.outputs.iter().any(|output| differing.contains_key(&output.name));
    checkpoint.records.all(&mut |found| {
        let name = found.outputs.first().map(|output| output.name.as_str()).unwrap_or_default();
        let expected = numbers.remove(name).map(|number| records.get(number));
        if is_comparable(&found) && expected.as_ref().is_none_or(is_comparable) {
            let what = record_difference(&found, expected.as_ref());
            what.into_iter().for_each(|what| report.differ(MANIFEST_NAME, Some(name), what));
        }
    })?;
    for (name, _) in numbers.iter().filter(|(_, number)| is_comparable(&records.get(**number))) {
        report.differ(MANIFEST_NAME, Some(name), "has no record, though converting the source gives it");
    }
    Ok(())
}

/// What a record has otherwise than the one that is expected, if one is.
fn record_difference(found: &TensorRecord, expected: Option<&TensorRecord>) -> Option<&'static str> {
    let is_same = |(a, b): (&OutputRecord, &OutputRecord)| {
        (&a.name, &a.dtype, &a.shape, a.sha256) == (&b.name, &b.dtype, &b.shape, b.sha256)
    };
    match expected {
        None => Some("has a record, though converting the source doesn't give it"),
        Some(expected) if found.sources != expected.sources => Some("is recorded to be of other sources"),
        Some(expected) if found.decision != expected.decision => Some("is recorded with another decision"),
        Some(expected)
            if found.outputs.len() != expected.outputs.len()
                || !found.outputs.iter().zip(&expected.outputs).all(is_same) =>
        {
            Some("is recorded with other tensors than converting the source gives")
        }
        Some(_) => None,
    }
}

/// The tensors that are there, as if they were where this version would write them.
struct Rearranged {
    /// Those of each of the plan's files by the offsets that they would have.
    spans: BTreeMap<String, Vec<Span>>,
    /// Tensors whose bytes differ, with their files.
    differing: Mutex<BTreeMap<String, String>>,
}

/// A tensor that is there.
#[derive(Clone)]
struct Span {
    /// Where it would be.
    start: u64,
    len: u64,
    /// Where it is.
    offset: u64,
    opened: Arc<dyn ReadAt>,
    location: Location,
    name: String,
    file: String,
}

impl Rearranged {
    /// Finds the plan's tensors; those that aren't there as planned are differences.
    fn new(found: &Source, plan: &Plan, report: &mut Report) -> Result<Rearranged> {
        let opened: Vec<Arc<dyn ReadAt>> =
            found.files.iter().map(|file| Ok(file.reopen()?.into())).collect::<Result<_>>()?;
        let mut there: BTreeMap<&str, (usize, &TensorInfo)> =
            found.tensors().map(|(file, info)| (&*info.name, (file, info))).collect();
        let mut spans: BTreeMap<String, Vec<Span>> = BTreeMap::new();
        for planned in &plan.files {
            let of_file = spans.entry(planned.name.clone()).or_default();
            for tensor in &plan.tensors[planned.tensors.clone()] {
                for output in tensor.outputs.iter() {
                    let name = format!("{}{}", tensor.name, output.suffix);
                    let Some((file, info)) = there.remove(name.as_str()) else {
                        report.differ(&planned.name, Some(&name), "is missing, though converting the source gives it");
                        continue;
                    };
                    let file_name = &found.files[file].name;
                    if info.dtype != output.dtype || *info.shape != *output.shape {
                        let what = format!(
                            "is {} {:?}, and converting the source gives {} {:?}",
                            info.dtype, info.shape, output.dtype, output.shape
                        );
                        report.differ(file_name, Some(&name), what);
                        continue;
                    }
                    of_file.push(Span {
                        start: output.offset,
                        len: output.len,
                        offset: info.offset,
                        opened: opened[file].clone(),
                        location: found.files[file].location.clone(),
                        name,
                        file: file_name.clone(),
                    });
                }
            }
            of_file.sort_by_key(|span| span.start);
        }
        for (name, (file, _)) in there {
            report.differ(&found.files[file].name, Some(name), "isn't among what converting the source gives");
        }
        Ok(Rearranged { spans, differing: Mutex::default() })
    }
}

impl Outputs for Rearranged {
    fn open(&self, file: &PlannedFile) -> Result<Arc<dyn Output + '_>> {
        let spans = self.spans.get(&file.name).map_or(&[][..], Vec::as_slice);
        Ok(Arc::new(View { len: file.len, name: file.name.clone(), spans, differing: &self.differing }))
    }

    fn seal(&self, _: &PlannedFile, _: &FileOutcome) -> Result<()> {
        Ok(())
    }

    fn source_hashed(&self, _: &SourceFile, _: Sha256Hash) -> Result<()> {
        Ok(())
    }
}

/// One of the plan's files, made up of what is there.
struct View<'a> {
    len: u64,
    name: String,
    spans: &'a [Span],
    differing: &'a Mutex<BTreeMap<String, String>>,
}

impl View<'_> {
    /// What is at an offset, and how many bytes of it follow: a tensor, or none where a header would be or a tensor is
    /// missing.
    fn at(&self, offset: u64) -> (Option<&Span>, u64) {
        let next = self.spans.partition_point(|span| span.start + span.len <= offset);
        match self.spans.get(next) {
            Some(span) if span.start <= offset => (Some(span), span.start + span.len - offset),
            next => (None, next.map_or(self.len, |span| span.start).saturating_sub(offset)),
        }
    }
}

impl ReadAt for View<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let (span, rest) = self.at(offset);
        let len = buffer.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
        match span {
            Some(span) => span.opened.read_at(&mut buffer[..len], span.offset + (offset - span.start)),
            None => {
                buffer[..len].fill(0);
                Ok(len)
            }
        }
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity { len: self.len, version: String::new(), sha256: None })
    }
}

impl Output for View<'_> {
    /// Compares.
    fn write_at(&self, mut bytes: &[u8], mut offset: u64) -> Result<()> {
        while !bytes.is_empty() {
            let (span, rest) = self.at(offset);
            // The plan writes inside of its files, so something follows.
            let len = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX)).max(1);
            let (here, others) = bytes.split_at(len);
            if let Some(span) = span {
                let mut found = vec![0; len];
                let place = span.offset + (offset - span.start);
                read_exact_at(&*span.opened, &mut found, place).at(span.location.path(), "read it")?;
                if found != here {
                    let mut differing = self.differing.lock().unwrap_or_else(PoisonError::into_inner);
                    differing.insert(span.name.clone(), span.file.clone());
                }
            }
            (bytes, offset) = (others, offset + len as u64);
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn file(&self) -> &dyn ReadAt {
        self
    }

    fn path(&self) -> &Path {
        Path::new(&self.name)
    }
}
