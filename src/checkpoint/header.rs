//! The safetensors header, by the format's own library: its dtypes, its checks, its text. Ours are the limits before
//! anything is allocated, names that stand in a header twice, and errors that say which tensor of which file is wrong.
//!
//! A file is `u64` length, that many bytes of JSON, then the tensors' bytes without holes
//! (<https://huggingface.co/docs/safetensors>, "Format").

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufReader, Read};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo as Entry};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use crate::dtype::{self, Dtype, byte_len};
use crate::error::{Error, IoContext, Result};
use crate::store::{HashingReader, Sha256Hash};

/// The longest header that is read: the safetensors library's own limit.
pub(crate) const MAX_HEADER_LEN: u64 = 100_000_000;

/// Bytes before the JSON.
const LENGTH_FIELD: u64 = 8;

/// The first tensor of a file that is written starts at a multiple of this, and all that follow, but for those at the file's end: a
/// multiple of every dtype's size, for readers that map the file, and a block of SHA-256, so that a file and its tensors have the
/// same blocks.
pub(crate) const ALIGNMENT: u64 = 64;

/// What is read at once.
const BUFFER: usize = 1 << 16;

/// The key that names no tensor.
const METADATA_KEY: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// The file offset of its first byte.
    pub offset: u64,
    /// Its size in bytes.
    pub len: u64,
}

impl Described for TensorInfo {
    fn name(&self) -> &str {
        &self.name
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[u64] {
        &self.shape
    }
}

/// A checked header: the tensors lie in the file one after the other and end with it.
#[derive(Clone, Debug)]
pub struct Header {
    /// The tensors, in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// SHA-256 of the length field and the JSON.
    pub sha256: Sha256Hash,
    /// Bytes of the length field and the JSON.
    pub len: u64,
}

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
        check_length(json_len, file_len, path)?;
        let data_start = LENGTH_FIELD + json_len;

        let parsed = parse(BufReader::with_capacity(BUFFER, file.by_ref().take(json_len)));
        let (read, sha256) = file.finish();
        let mut entries = match parsed {
            Ok(entries) => entries,
            Err(NoHeader { error, .. }) if error.is_io() => {
                return Err(io::Error::from(error)).at(path, "read its header");
            }
            Err(NoHeader { error, .. }) if error.is_eof() && read < data_start => {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).at(path, "read its header");
            }
            Err(NoHeader { tensor, error }) => {
                let tensor = tensor.map(|name| format!("tensor {name:?}: ")).unwrap_or_default();
                let why = format!("its header is not a safetensors header: {tensor}{error}");
                return Err(Error::malformed(path, why));
            }
        };
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        // The library says whether a header is valid; what is wrong with it, and where, is ours to tell.
        // Names tell it nothing.
        let nameless = entries.iter().map(|(_, entry)| (String::new(), entry.clone()));
        let checked = Metadata::new(None, nameless.collect());
        let end = |metadata: &Metadata| data_start.checked_add(metadata.data_len() as u64);
        if !checked.as_ref().is_ok_and(|metadata| end(metadata) == Some(file_len)) {
            let why = defect(&entries, data_start, file_len);
            let why = why.or_else(|| Some(checked.err()?.to_string()));
            return Err(Error::malformed(path, why.unwrap_or_else(|| "its tensors don't fill the file".to_owned())));
        }
        let tensors = entries.into_iter().map(|(name, entry)| TensorInfo {
            name,
            dtype: entry.dtype,
            offset: data_start + entry.data_offsets.0 as u64,
            len: (entry.data_offsets.1 - entry.data_offsets.0) as u64,
            shape: entry.shape.into_iter().map(|dimension| dimension as u64).collect(),
        });
        Ok(Header { tensors: tensors.collect(), sha256, len: data_start })
    }
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
fn defect(entries: &[(String, Entry)], data_start: u64, file_len: u64) -> Option<String> {
    let mut position = data_start;
    for (name, Entry { dtype, shape, data_offsets: (begin, end) }) in entries {
        let dimensions: Vec<u64> = shape.iter().map(|&dimension| dimension as u64).collect();
        let Some(expected) = byte_len(*dtype, &dimensions) else {
            return Some(format!("tensor {name:?} of {dtype} {shape:?} is not a whole number of bytes below 2^64"));
        };
        let Some(len) = end.checked_sub(*begin).map(|len| len as u64) else {
            return Some(format!("tensor {name:?} has data_offsets [{begin}, {end}]: they are reversed"));
        };
        if len != expected {
            return Some(format!(
                "tensor {name:?} of {dtype} {shape:?} takes {expected} bytes, but its data_offsets [{begin}, {end}] \
                 give {len}"
            ));
        }
        let Some(offset) = data_start.checked_add(*begin as u64) else {
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
    error: serde_json::Error,
}

/// The entries in their own order, without `__metadata__`.
fn parse(json: impl Read) -> Result<Vec<(String, Entry)>, NoHeader> {
    let (mut entries, mut at) = (Vec::new(), None);
    let mut json = serde_json::Deserializer::from_reader(json);
    let parsed = Entries { entries: &mut entries, at: &mut at }.deserialize(&mut json).and_then(|()| json.end());
    parsed.map(|()| entries).map_err(|error| NoHeader { tensor: at, error })
}

/// Reads the JSON object. The library's own type reads it into maps, which lose a name that stands in it twice.
struct Entries<'a> {
    entries: &'a mut Vec<(String, Entry)>,
    /// The tensor whose entry is being read.
    at: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name != METADATA_KEY {
                *self.at = Some(name);
                let RawEntry { dtype, shape, data_offsets } = map.next_value()?;
                let entry = Entry { dtype, shape, data_offsets };
                self.entries.extend(self.at.take().map(|name| (name, entry)));
            } else if metadata.replace(map.next_value::<BTreeMap<String, String>>()?).is_some() {
                return Err(de::Error::custom(format!("the key {METADATA_KEY:?} stands in it twice")));
            }
        }
        let mut names: Vec<&str> = self.entries.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(twice) => Err(de::Error::custom(format!("tensor {:?} stands in it twice", twice[0]))),
            None => Ok(()),
        }
    }
}

/// The library's entry, with an error that tells of a dtype which it doesn't have.
#[derive(Deserialize)]
struct RawEntry {
    #[serde(deserialize_with = "known_dtype")]
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

fn known_dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
    let name = String::deserialize(deserializer)?;
    dtype::named(&name).ok_or_else(|| de::Error::custom(format!("dtype {name:?}, which this version doesn't know")))
}

/// A tensor to be written: name, dtype, shape.
pub(crate) trait Described {
    /// The tensor's name.
    fn name(&self) -> &str;
    /// Its dtype.
    fn dtype(&self) -> Dtype;
    /// Its shape.
    fn shape(&self) -> &[u64];

    /// Its size.
    ///
    /// # Panics
    /// Past 2^64 bytes; what comes from a checked header, and what is derived from it, is below.
    fn byte_len(&self) -> u64 {
        byte_len(self.dtype(), self.shape()).expect("a tensor below 2^64 bytes")
    }
}

/// Puts tensors in the order that the safetensors library writes them in: by dtype, the widest first, then by name.
pub(crate) fn sort_canonically<T: Described>(tensors: &mut [T]) {
    tensors.sort_by(|a, b| b.dtype().cmp(&a.dtype()).then_with(|| a.name().cmp(b.name())));
}

/// The length field and the JSON of a file that holds `tensors` in this order, as the safetensors library writes them, but for
/// spaces up to a multiple of [`ALIGNMENT`] where it has them up to a multiple of 8.
///
/// # Panics
/// When all together are past 2^64 bytes; a plan's aren't.
pub(crate) fn header_bytes<T: Described>(tensors: &[T]) -> Vec<u8> {
    let mut header = vec![0; LENGTH_FIELD as usize];
    serde_json::to_writer(&mut header, &HeaderJson(tensors)).expect("writing to memory");
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), b' ');
    let json_len = header.len() as u64 - LENGTH_FIELD;
    header[..LENGTH_FIELD as usize].copy_from_slice(&json_len.to_le_bytes());
    header
}

/// What the library's `Metadata` is written as, without a copy of every name and shape.
struct HeaderJson<'a, T>(&'a [T]);

#[derive(Serialize)]
struct EntryJson<'a> {
    dtype: Dtype,
    shape: &'a [u64],
    data_offsets: (u64, u64),
}

impl<T: Described> Serialize for HeaderJson<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1 + self.0.len()))?;
        map.serialize_entry(METADATA_KEY, &BTreeMap::from([("format", "pt")]))?;
        let mut end = 0;
        for tensor in self.0 {
            let begin = end;
            end += tensor.byte_len();
            let (dtype, shape, data_offsets) = (tensor.dtype(), tensor.shape(), (begin, end));
            map.serialize_entry(tensor.name(), &EntryJson { dtype, shape, data_offsets })?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_written_as_the_library_writes_it() {
        let tensor = |name: &str, dtype, shape: &[u64]| TensorInfo {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            offset: 0,
            len: 0,
        };
        let tensors = [
            tensor("a \"quoted\" name", Dtype::F32, &[3, 5]),
            tensor("größe", Dtype::BF16, &[]),
            tensor("none", Dtype::U8, &[0, 7]),
            tensor("four bits", Dtype::F4, &[6]),
        ];
        let mut end = 0;
        let entries = tensors.iter().map(|tensor| {
            let begin = end;
            end += tensor.byte_len() as usize;
            let shape = tensor.shape.iter().map(|&dimension| dimension as usize).collect();
            (tensor.name.clone(), Entry { dtype: tensor.dtype, shape, data_offsets: (begin, end) })
        });
        let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
        let expected = serde_json::to_vec(&Metadata::new(Some(format), entries.collect()).unwrap()).unwrap();
        let header = header_bytes(&tensors);
        let (length, json) = header.split_at(LENGTH_FIELD as usize);
        assert_eq!(u64::from_le_bytes(length.try_into().unwrap()), json.len() as u64);
        assert_eq!(json.trim_ascii_end(), expected);
    }
}
