//! The files beside the weights, in the staging folder.

use std::io::Read;

use crate::checkpoint::{OutputFile, SideFile, Source, Staging};
use crate::error::{Error, IoContext, Result};
use crate::manifest::FileRecord;
use crate::ops::job::staged::write;
use crate::ops::model_card;
use crate::plan::Plan;
use crate::store::{HashingReader, Location, Reader, Sha256Hash, hash_range};

/// Copies what lies beside the weights, as it is; the model card may be another. Also writes what the plan has beside them.
pub(crate) fn copy(source: &Source, plan: &Plan, staging: &Staging) -> Result<Vec<FileRecord>> {
    let mut buffer = vec![0; 1 << 16];
    let card = model_card::changed(source, plan)?;
    let files = source.side_files.iter();
    let files = files.filter(|side| card.is_none() || side.name != model_card::NAME);
    let mut records: Vec<FileRecord> = files
        .map(|side| {
            let sha256 = copy_file(side, staging.ready(&side.name), &mut buffer)?;
            Ok(FileRecord { name: side.name.clone(), size: side.len, sha256 })
        })
        .collect::<Result<_>>()?;
    if let Some(card) = card.filter(|card| !card.is_empty()) {
        records.push(write(staging, model_card::NAME, |file| file.write_all(&card))?);
    }
    let made = plan.side_files.iter();
    let made = made.map(|(name, text)| write(staging, name, |file| file.write_all(text.as_bytes())));
    records.extend(made.collect::<Result<Vec<_>>>()?);
    Ok(records)
}

/// The hashes of the files that [`copy`] would write, by name.
pub(crate) fn hashes(source: &Source, plan: &Plan) -> Result<Vec<(String, Sha256Hash)>> {
    let mut buffer = vec![0; 1 << 16];
    let card = model_card::changed(source, plan)?;
    let mut hashes = Vec::new();
    for side in source.side_files.iter().filter(|side| card.is_none() || side.name != model_card::NAME) {
        let path = side.location.path();
        let file = side.location.open().at(path, "open it")?;
        let hash = hash_range(&*file, 0, side.len, &mut buffer, || true).at(path, "read it")?;
        hashes.extend(hash.map(|hash| (side.name.clone(), hash)));
    }
    let card = card.filter(|card| !card.is_empty()).map(|card| (model_card::NAME.to_owned(), Sha256Hash::of(&card)));
    let made = plan.side_files.iter().map(|(name, text)| ((*name).to_owned(), Sha256Hash::of(text.as_bytes())));
    hashes.extend(card.into_iter().chain(made));
    Ok(hashes)
}

/// Copies a file as it is; returns its hash.
fn copy_file(side: &SideFile, to: Location, buffer: &mut [u8]) -> Result<Sha256Hash> {
    let path = side.location.path();
    let file = side.location.open().at(path, "open it")?;
    let len = file.identity().at(path, "look at it")?.len;
    if len != side.len {
        let why = format!("it has {len} bytes, and had {}", side.len);
        return Err(Error::SourceChanged { path: path.to_owned(), why });
    }
    let (mut from, to) = (HashingReader::new(Reader::new(&*file)), OutputFile::create(to, len)?);
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(buffer.len() as u64) as usize;
        from.read_exact(&mut buffer[..piece]).at(path, "read it")?;
        to.write_at(&buffer[..piece], done)?;
        done += piece as u64;
    }
    if from.read(&mut buffer[..1]).at(path, "read it")? > 0 {
        let why = format!("it has more than the {len} bytes that it had");
        return Err(Error::SourceChanged { path: path.to_owned(), why });
    }
    to.sync()?;
    Ok(from.finish().1)
}
