//! The safetensors header, by the format's own library: its dtypes, its checks, its text. Ours are the limits before
//! anything is allocated, names that stand in a header twice, and errors that say which tensor of which file is wrong.
//!
//! A file is `u64` length, that many bytes of JSON, then the tensors' bytes without holes
//! (<https://huggingface.co/docs/safetensors>, "Format").

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Metadata as Checked, TensorInfo as LibraryEntry};
use serde::Deserialize;
use serde::de::{self, Deserializer};

use super::first_bytes;
use crate::dtype::{self, Dtype, byte_len};
use crate::error::{Error, IoContext, Result};
use crate::json_text::{Failure, JsonText};
use crate::shape::Shapes;
use crate::store::{HashingReader, Sha256Hash};

/// The longest header that is read: the safetensors library's own limit.
pub(crate) const MAX_HEADER_LEN: u64 = 100_000_000;

/// Bytes before the JSON.
pub(super) const LENGTH_FIELD: u64 = 8;

/// Tensors that the library checks at once: it takes a copy of what it checks.
const CHECKED_AT_ONCE: usize = 1 << 12;

/// The key that names no tensor.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// The key in it that says which framework's layout the tensors have.
pub(crate) const FORMAT_KEY: &str = "format";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: Arc<str>,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Arc<[u64]>,
    /// The file offset of its first byte.
    pub offset: u64,
    /// Its size in bytes.
    pub len: u64,
}

/// A checked header: the tensors lie in the file one after the other and end with it.
#[derive(Clone, Debug)]
pub struct Header {
    /// The tensors, in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// What stands in it beside them, `__metadata__`.
    pub metadata: Metadata,
    /// SHA-256 of the length field and the JSON.
    pub sha256: Sha256Hash,
    /// Bytes of the length field and the JSON.
    pub len: u64,
}

/// A header's `__metadata__`: text by key.
pub(crate) type Metadata = BTreeMap<String, String>;

impl Header {
    /// Reads and checks the header of `file`, which is `file_len` bytes long. `path` is for errors.
    ///
    /// The JSON is parsed as it is read: a header takes the memory of its tensors, not that of its text too.
    pub fn read(file: &mut impl Read, file_len: u64, path: &Path) -> Result<Header> {
        if file_len < LENGTH_FIELD {
            let why = format!(
                "{file_len} bytes are too few for a safetensors file, which starts with an 8-byte length: it is \
                 truncated, or a placeholder of git-lfs; download it again"
            );
            return Err(Error::malformed(path, why));
        }
        let mut file = HashingReader::new(file);
        let mut length_field = [0; LENGTH_FIELD as usize];
        file.read_exact(&mut length_field).at(path, "read its header")?;
        let json_len = u64::from_le_bytes(length_field);
        if let Err(error) = check_length(json_len, file_len, path) {
            return Err(foreign(&length_field, &mut file, path)?.unwrap_or(error));
        }
        let data_start = LENGTH_FIELD + json_len;

        let mut text = JsonText::new(file.by_ref().take(json_len), 0);
        let parsed = parse(&mut text);
        let is_at_end = text.is_at_end();
        let (read, sha256) = file.finish();
        let (mut entries, metadata) = match parsed {
            Ok(parsed) => parsed,
            Err(NoHeader { failure: Failure::Io(error), .. }) => return Err(error).at(path, "read its header"),
            Err(_) if is_at_end && read < data_start => {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).at(path, "read its header");
            }
            Err(NoHeader { tensor, failure: Failure::Json(error) }) => {
                let tensor = tensor.map(|name| format!("tensor {name:?}: ")).unwrap_or_default();
                let why = format!("its header is not a safetensors header: {tensor}{error}");
                return Err(Error::malformed(path, why));
            }
        };
        entries.sort_by_key(|entry| entry.data_offsets);
        // The library says whether a header is valid; what is wrong with it, and where, is ours to tell.
        let checked = data_len(&entries);
        if !checked.as_ref().is_ok_and(|len| data_start.checked_add(*len) == Some(file_len)) {
            let why = defect(&entries, data_start, file_len);
            let why = why.or_else(|| checked.err());
            return Err(Error::malformed(path, why.unwrap_or_else(|| "its tensors don't fill the file".to_owned())));
        }
        let tensors = entries.into_iter().map(|Entry { name, dtype, shape, data_offsets: (begin, end) }| TensorInfo {
            name,
            dtype,
            shape,
            offset: data_start + begin,
            len: end - begin,
        });
        let mut tensors: Vec<TensorInfo> = tensors.collect();
        tensors.shrink_to_fit();
        Ok(Header { tensors, metadata, sha256, len: data_start })
    }
}

/// What the file is that began so, if it is something else than safetensors that has a name.
fn foreign(begin: &[u8], file: &mut impl Read, path: &Path) -> Result<Option<Error>> {
    let mut first = begin.to_vec();
    let most = (first_bytes::ENOUGH - first.len()) as u64;
    file.take(most).read_to_end(&mut first).at(path, "read its header")?;
    Ok(first_bytes::of(&first).map(|found| first_bytes::is(path, found)))
}

/// A tensor as the header has it.
struct Entry {
    name: Arc<str>,
    dtype: Dtype,
    shape: Arc<[u64]>,
    data_offsets: (u64, u64),
}

/// Bytes of all tensors, if the library finds them valid in this order. It is given a part of them at a time, as a file of its
/// own, and no names, which tell it nothing.
fn data_len(entries: &[Entry]) -> Result<u64, String> {
    let mut start = 0;
    for part in entries.chunks(CHECKED_AT_ONCE) {
        let nameless = part.iter().map(|Entry { dtype, shape, data_offsets: (begin, end), .. }| {
            let shift = |offset: u64| usize::try_from(offset.wrapping_sub(start)).unwrap_or(usize::MAX);
            let shape = shape.iter().map(|&dimension| usize::try_from(dimension).unwrap_or(usize::MAX)).collect();
            (String::new(), LibraryEntry { dtype: *dtype, shape, data_offsets: (shift(*begin), shift(*end)) })
        });
        let checked = Checked::new(None, nameless.collect()).map_err(|error| error.to_string())?;
        start = start.checked_add(checked.data_len() as u64).ok_or("its tensors end past 2^64")?;
    }
    Ok(start)
}

fn check_length(json_len: u64, file_len: u64, path: &Path) -> Result<()> {
    let why = if json_len == 0 {
        "its header is empty: not a safetensors file".to_owned()
    } else if json_len > MAX_HEADER_LEN {
        format!("its header claims {json_len} bytes, more than {MAX_HEADER_LEN}: not a safetensors file, or damaged")
    } else if json_len > file_len - LENGTH_FIELD {
        format!("its header claims {json_len} bytes and the file has {file_len}: it is truncated; download it again")
    } else {
        return Ok(());
    };
    Err(Error::malformed(path, why))
}

/// What is wrong with entries in the order of their offsets, if anything: dtype, shape and offsets of each must agree,
/// and their bytes fill the file from `data_start` to its end, without holes or overlaps.
fn defect(entries: &[Entry], data_start: u64, file_len: u64) -> Option<String> {
    let mut position = data_start;
    for Entry { name, dtype, shape, data_offsets: (begin, end) } in entries {
        let Some(expected) = byte_len(*dtype, shape) else {
            return Some(format!("tensor {name:?} of {dtype} {shape:?} is not a whole number of bytes below 2^64"));
        };
        let Some(len) = end.checked_sub(*begin) else {
            return Some(format!("tensor {name:?} has data_offsets [{begin}, {end}]: they are reversed"));
        };
        if len != expected {
            return Some(format!(
                "tensor {name:?} of {dtype} {shape:?} takes {expected} bytes, but its data_offsets [{begin}, {end}] \
                 give {len}"
            ));
        }
        let Some(offset) = data_start.checked_add(*begin) else {
            return Some(format!("tensor {name:?} has data_offsets [{begin}, {end}]: past 2^64"));
        };
        if offset != position {
            let what = if offset > position { "a hole before it" } else { "an overlap with the tensor before it" };
            return Some(format!("tensor {name:?} starts at byte {offset}, expected {position}: {what}"));
        }
        let Some(end) = offset.checked_add(len).filter(|&end| end <= file_len) else {
            return Some(format!(
                "tensor {name:?} ends {len} bytes from byte {offset}, past the file's {file_len}: the file is \
                 truncated; download it again"
            ));
        };
        position = end;
    }
    let ends_early = || format!("its tensors end at byte {position}, but the file has {file_len}: it is damaged");
    (position != file_len).then(ends_early)
}

/// Why a header isn't one, and the tensor at whose entry that shows, if at one's.
struct NoHeader {
    tensor: Option<String>,
    failure: Failure,
}

/// The entries in their own order, and `__metadata__`. The library's own type reads them into maps, which lose a name that stands
/// there twice.
fn parse(text: &mut JsonText<impl Read>) -> Result<(Vec<Entry>, Metadata), NoHeader> {
    let (mut entries, mut metadata, mut at) = (Vec::new(), None::<Metadata>, None);
    let mut shapes = Shapes::default();
    let parsed = text.object("an object of tensors by name", &mut |name, text| {
        if name != METADATA_KEY {
            at = Some(name);
            let RawEntry { dtype, shape, data_offsets } = text.value()?;
            let (name, shape) = (at.take().unwrap_or_default().into(), shapes.get(&shape));
            entries.push(Entry { name, dtype, shape, data_offsets });
        } else if metadata.replace(text.value()?).is_some() {
            return Err(text.defect(&format!("the key {METADATA_KEY:?} stands in it twice")));
        }
        Ok(())
    });
    let checked = parsed.and_then(|()| match twice(&entries) {
        Some(name) => Err(text.defect(&format!("tensor {name:?} stands in it twice"))),
        None => text.end(),
    });
    checked.map(|()| (entries, metadata.unwrap_or_default())).map_err(|failure| NoHeader { tensor: at, failure })
}

/// A name that two of the entries have.
fn twice(entries: &[Entry]) -> Option<&str> {
    let mut names: Vec<&str> = entries.iter().map(|entry| &*entry.name).collect();
    names.sort_unstable();
    names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

/// The library's entry, with an error that tells of a dtype which it doesn't have.
#[derive(Deserialize)]
struct RawEntry {
    #[serde(deserialize_with = "known_dtype")]
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

fn known_dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
    let name = String::deserialize(deserializer)?;
    dtype::named(&name).ok_or_else(|| de::Error::custom(format!("dtype {name:?}, which this version doesn't know")))
}

/// Puts tensors in the order that the safetensors library writes them in: by dtype, the widest first, then by name.
pub(crate) fn sort_canonically(tensors: &mut [TensorInfo]) {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}
