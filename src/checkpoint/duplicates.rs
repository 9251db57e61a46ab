//! Tensors that two files hold under one name, as tied weights are saved at times: taken once if they are equal, byte for byte.

use std::collections::HashMap;

use super::index::Index;
use super::{LeftOut, SourceFile, TensorInfo};
use crate::error::{Error, IoContext, Result};
use crate::store::read_exact_at;

/// Bytes of each of two tensors that are read at once.
const BUFFER: usize = 1 << 20;

/// Leaves each name with one tensor: where the index says, or else the first. Returns what was left out.
///
/// # Errors
/// When two tensors of one name differ, or the system refuses to read them.
pub(crate) fn take_once(files: &mut [SourceFile], index: Option<&Index>) -> Result<Vec<LeftOut>> {
    let mut seen: HashMap<&str, (usize, usize)> = HashMap::new();
    let mut gone: Vec<(usize, usize)> = Vec::new();
    let mut left_out = Vec::new();
    for (file, tensor) in places(files) {
        let name = &*files[file].tensors[tensor].name;
        let Some(other) = seen.insert(name, (file, tensor)) else { continue };
        let here = (file, tensor);
        let is_listed =
            |place: (usize, usize)| index.and_then(|index| index.file_of(name)) == Some(files[place.0].name.as_str());
        let (kept, spare) = if is_listed(here) { (here, other) } else { (other, here) };
        check_are_equal(files, other, here)?;
        seen.insert(name, kept);
        gone.push(spare);
        left_out.push(LeftOut {
            name: files[spare.0].name.clone(),
            tensor: Some(name.to_owned()),
            why: format!("the same bytes as in {}", files[kept.0].name),
        });
    }
    gone.sort_unstable();
    for (file, tensor) in gone.into_iter().rev() {
        files[file].tensors.remove(tensor);
    }
    Ok(left_out)
}

fn places(files: &[SourceFile]) -> impl Iterator<Item = (usize, usize)> + use<'_> {
    files.iter().enumerate().flat_map(|(file, source)| (0..source.tensors.len()).map(move |tensor| (file, tensor)))
}

fn check_are_equal(files: &[SourceFile], a: (usize, usize), b: (usize, usize)) -> Result<()> {
    let [(file_a, info_a), (file_b, info_b)] =
        [a, b].map(|(file, tensor)| (&files[file], &files[file].tensors[tensor]));
    match difference((file_a, info_a), (file_b, info_b))? {
        None => Ok(()),
        Some(what) => {
            let why = format!(
                "tensor {:?} is also in {:?}, with {what}: are these files of one checkpoint?",
                info_b.name, file_a.name
            );
            Err(Error::malformed(file_b.location.path(), why))
        }
    }
}

/// In what two tensors differ, if they do; reads both as far as they are equal.
///
/// # Errors
/// When the system refuses.
pub(crate) fn difference(
    (file_a, a): (&SourceFile, &TensorInfo),
    (file_b, b): (&SourceFile, &TensorInfo),
) -> Result<Option<&'static str>> {
    if a.dtype != b.dtype {
        return Ok(Some("another dtype"));
    }
    if a.shape != b.shape {
        return Ok(Some("another shape"));
    }
    let (opened_a, opened_b) = (file_a.reopen()?, file_b.reopen()?);
    let most = BUFFER.min(usize::try_from(a.len).unwrap_or(BUFFER));
    let (mut bytes_a, mut bytes_b) = (vec![0; most], vec![0; most]);
    let mut done = 0;
    while done < a.len {
        let piece = usize::try_from(a.len - done).unwrap_or(most).min(most);
        let (bytes_a, bytes_b) = (&mut bytes_a[..piece], &mut bytes_b[..piece]);
        read_exact_at(&*opened_a, bytes_a, a.offset + done).at(file_a.location.path(), "read it")?;
        read_exact_at(&*opened_b, bytes_b, b.offset + done).at(file_b.location.path(), "read it")?;
        if bytes_a != bytes_b {
            return Ok(Some("other bytes"));
        }
        done += piece as u64;
    }
    Ok(None)
}

fn by_name(files: &[SourceFile]) -> HashMap<&str, (usize, usize)> {
    places(files).map(|(file, tensor)| (&*files[file].tensors[tensor].name, (file, tensor))).collect()
}

/// In what two sets of files differ as checkpoints, if they do: names, dtypes, shapes or bytes.
///
/// # Errors
/// When the system refuses to read.
pub(crate) fn first_difference(a: &[SourceFile], b: &[SourceFile]) -> Result<Option<String>> {
    let (in_a, in_b) = (by_name(a), by_name(b));
    let only_in = |these: &HashMap<&str, _>, those: &HashMap<&str, _>| {
        these.keys().filter(|name| !those.contains_key(**name)).min().map(|name| (*name).to_owned())
    };
    if let Some(name) = only_in(&in_a, &in_b).or_else(|| only_in(&in_b, &in_a)) {
        return Ok(Some(format!("only one has tensor {name:?}")));
    }
    for (file, tensor) in places(a) {
        let info = &a[file].tensors[tensor];
        let (other, at) = in_b[&*info.name];
        if let Some(what) = difference((&a[file], info), (&b[other], &b[other].tensors[at]))? {
            return Ok(Some(format!("{what} in tensor {:?}", info.name)));
        }
    }
    Ok(None)
}
