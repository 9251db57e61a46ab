//! What isn't tensors, as a conversion done now would write it: the list of files, and the manifest.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use crate::checkpoint::{CONFIG_NAME, FileClass, MANIFEST_NAME};
use crate::error::{IoContext, Result};
use crate::manifest::{FileRecord, LeftOutRecord, Manifest, TensorRecord};
use crate::ops::job::write::write_index_of;
use crate::ops::model_card;
use crate::ops::quantize::Conversion;
use crate::ops::records::Records;
use crate::ops::relayout;
use crate::ops::verify::conversion::side_file_records;
use crate::ops::verify::{Checkpoint, Difference, Report};
use crate::pipeline::Outcome;
use crate::recipe::ExpertLayout;
use crate::store::{HashingWriter, Sha256Hash};

/// The records of all files but weights and index that converting gives: config.json, side files, the model card, and what the
/// format has beside them.
pub(super) fn other_files(conversion: &Conversion) -> Result<Vec<FileRecord>> {
    let plan = &conversion.plan;
    let of_text = |name: &str, text: &[u8]| FileRecord {
        name: name.to_owned(),
        size: text.len() as u64,
        sha256: Sha256Hash::of(text),
    };
    let mut files = side_file_records(conversion)?;
    files.extend(plan.config.iter().map(|text| of_text(CONFIG_NAME, text.as_bytes())));
    files.extend(plan.side_files.iter().map(|(name, text)| of_text(name, text.as_bytes())));
    let card = model_card::changed(&conversion.source, plan)?.filter(|card| !card.is_empty());
    files.extend(card.map(|card| of_text(model_card::NAME, &card)));
    Ok(files)
}

/// The records of all files that converting gives, by name.
fn files(conversion: &Conversion, outcome: &Outcome) -> Result<Vec<FileRecord>> {
    let plan = &conversion.plan;
    let mut files = other_files(conversion)?;
    files.extend(plan.files.iter().zip(&outcome.files).map(|(file, sha256)| FileRecord {
        name: file.name.clone(),
        size: file.len,
        sha256: *sha256,
    }));
    if let Some(name) = conversion.job().index_name() {
        let mut hasher = HashingWriter::new(io::sink());
        write_index_of(plan, &mut hasher).at(name.as_ref(), "write it")?;
        let (size, sha256) = hasher.finish();
        files.push(FileRecord { name: name.to_owned(), size, sha256 });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

/// The manifest's files must be `expected`, no more and no fewer, and what is on disk must be, too; but for those that are compared
/// elsewhere.
pub(super) fn compare_files(
    conversion: &Conversion,
    expected: &[FileRecord],
    checkpoint: &Checkpoint,
    elsewhere: &HashSet<&str>,
    report: &mut Report,
) -> Result<()> {
    const OTHER: &str = "isn't what converting the source gives";
    let is_compared = |file: &&FileRecord| !elsewhere.contains(file.name.as_str());
    let listed = checkpoint.manifest.files.iter().filter(is_compared);
    let mut listed: BTreeMap<&str, &FileRecord> = listed.map(|file| (file.name.as_str(), file)).collect();
    for file in expected.iter().filter(is_compared) {
        // These were compared byte by byte.
        let is_weights = conversion.plan.files.iter().any(|planned| planned.name == file.name);
        match listed.remove(file.name.as_str()) {
            None => report.differ(&file.name, None, "is not in the manifest, though converting the source gives it"),
            Some(record) if record != file => report.differ(&file.name, None, OTHER),
            Some(_) if is_weights => {}
            Some(_) if checkpoint.hash_of(&file.name)? == Some(file.sha256) => {}
            Some(_) => report.differ(&file.name, None, OTHER),
        }
    }
    for name in listed.into_keys() {
        report.differ(name, None, "is in the manifest, though converting the source doesn't give it");
    }
    Ok(())
}

/// All but the bytes of tensors must be what converting gives: files, and what the manifest says of them and of tensors.
pub(super) fn compare(
    conversion: &Conversion,
    outcome: Outcome,
    checkpoint: &Checkpoint,
    different: &[Difference],
    report: &mut Report,
) -> Result<()> {
    let found = &checkpoint.manifest;
    // A file with other bytes is told already, and its hash may be that of what was found.
    let names: HashSet<&str> = different.iter().map(|difference| difference.file.as_str()).collect();
    let mut files = files(conversion, &outcome)?;
    compare_files(conversion, &files, checkpoint, &names, report)?;
    // What people may edit is compared, and no more is made of it.
    let is_loaded = |file: &FileRecord| FileClass::of(&file.name) == FileClass::Loaded;
    files.retain(is_loaded);
    files.extend(found.files.iter().filter(|file| !is_loaded(file)).cloned());
    files.sort_by(|a, b| a.name.cmp(&b.name));

    let outcome = conversion.relaid(outcome);
    let mut expected = conversion.manifest(files, &outcome);
    if found.relaid_from.is_none() && of_the_model(&found.left_out) != of_the_model(&expected.left_out) {
        report.differ(MANIFEST_NAME, None, "what it says was left out isn't what converting the source leaves out");
    }
    expected.left_out.clone_from(&found.left_out);
    let tensors: HashSet<&str> = different.iter().filter_map(|difference| difference.tensor.as_deref()).collect();
    match found.relaid_from {
        None => compare_in_order(&expected, checkpoint, &tensors, report)?,
        Some(from) => compare_relaid(conversion, from, &expected, checkpoint, &tensors, report)?,
    }
    let same = found.source == expected.source && found.summary == expected.summary && found.tool == expected.tool;
    if !same {
        report.differ(MANIFEST_NAME, None, "isn't what converting the source with this version gives");
    }
    let is_told = report.differences.iter().any(|difference| FileClass::of(&difference.file) == FileClass::Loaded);
    if found.relaid_from.is_none() && !is_told && different.is_empty() {
        let mut hasher = HashingWriter::new(io::sink());
        expected.write_json(&mut hasher).at(MANIFEST_NAME.as_ref(), "write it")?;
        if hasher.finish().1 != checkpoint.manifest_sha256 {
            report.differ(MANIFEST_NAME, None, "its text isn't what converting the source with this version gives");
        }
    }
    Ok(())
}

/// What was left out, but for what git and the hub leave in a folder: that isn't the same for everyone who has the source.
fn of_the_model(left_out: &[LeftOutRecord]) -> Vec<&LeftOutRecord> {
    let is_hidden = |record: &&LeftOutRecord| record.name.split('/').any(|part| part.starts_with('.'));
    left_out.iter().filter(|record| !is_hidden(record)).collect()
}

/// Records must be those that a manifest made now would have, one after the other.
fn compare_in_order(
    expected: &Manifest<Records<'_>>,
    checkpoint: &Checkpoint,
    different: &HashSet<&str>,
    report: &mut Report,
) -> Result<()> {
    let mut count = 0;
    checkpoint.records.all(&mut |found| {
        let expected = (count < expected.tensors.len()).then(|| expected.tensors.get(count));
        compare_records(&found, expected, different, report);
        count += 1;
    })?;
    check_count(count, expected, report);
    Ok(())
}

fn check_count(count: usize, expected: &Manifest<Records<'_>>, report: &mut Report) {
    let expected = expected.tensors.len();
    if count < expected {
        let what = format!("it has records of {count} tensors, and converting the source gives {expected}");
        report.differ(MANIFEST_NAME, None, what);
    }
}

/// Tensors that were rewritten in another layout have no statistics, all others do; and the order within the source's files may not
/// have survived.
fn compare_relaid(
    conversion: &Conversion,
    from: ExpertLayout,
    expected: &Manifest<Records<'_>>,
    checkpoint: &Checkpoint,
    different: &HashSet<&str>,
    report: &mut Report,
) -> Result<()> {
    let Some(stayed) = relayout::same_in(&conversion.source, &conversion.plan, from)? else {
        report.differ(MANIFEST_NAME, None, "its relaid_from is the layout that it has");
        return Ok(());
    };
    let numbers: HashMap<String, usize> =
        (0..expected.tensors.len()).filter_map(|i| Some((expected.tensors.name(i)?, i))).collect();
    let mut count = 0;
    checkpoint.records.all(&mut |found| {
        let number = found.outputs.first().and_then(|output| numbers.get(&output.name).copied());
        let record = number.map(|number| {
            let record = expected.tensors.get(number);
            let statistics = record.statistics.filter(|_| stayed.contains(&*conversion.plan.tensors[number].name));
            TensorRecord { statistics, ..record }
        });
        compare_records(&found, record, different, report);
        count += 1;
    })?;
    check_count(count, expected, report);
    Ok(())
}

/// A record must be what a manifest made now would have in its place, if anything. The hashes of tensors with other bytes may be those
/// of what was found.
fn compare_records(
    found: &TensorRecord,
    expected: Option<TensorRecord>,
    different: &HashSet<&str>,
    report: &mut Report,
) {
    let Some(expected) = expected else {
        let name = found.sources.first().map(|source| source.name.as_str());
        return report.differ(MANIFEST_NAME, name, "its record isn't what converting the source gives");
    };
    let mut sources = expected.sources.iter().map(|source| source.name.as_str());
    if expected.outputs.iter().any(|output| different.contains(output.name.as_str())) {
        // Of what was put together the first part is named, too.
        for name in sources.filter(|name| !different.contains(name)).take(1) {
            report.differ(MANIFEST_NAME, Some(name), "its bytes aren't what converting the source gives");
        }
    } else if *found != expected {
        report.differ(MANIFEST_NAME, sources.next(), "its record isn't what converting the source gives");
    }
}
