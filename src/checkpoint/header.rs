//! The safetensors header: parsed, checked whole, and written in the library's own canonical form.
//!
//! A file is `u64` length, that many bytes of JSON, then the tensors' bytes without holes
//! (<https://huggingface.co/docs/safetensors>, "Format").

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use crate::dtype::Dtype;
use crate::error::{Error, IoContext, Result};
use crate::store::Sha256Hash;

/// The longest header that is read: the safetensors library's own limit.
pub const MAX_HEADER_LEN: u64 = 100_000_000;

/// Bytes before the JSON.
const LENGTH_FIELD: u64 = 8;

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

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The JSON object, in its own order; a key twice is an error.
struct RawHeader(Vec<(String, RawTensor)>);

impl Header {
    /// Reads and checks the header of `file`, which is `file_len` bytes long. `path` is for errors.
    pub fn read(file: &mut impl Read, file_len: u64, path: &Path) -> Result<Header> {
        if file_len < LENGTH_FIELD {
            let why = format!(
                "{file_len} bytes are too few for a safetensors file, which starts with an 8-byte length: it is \
                 truncated, or a placeholder of git-lfs; download it again"
            );
            return Err(Error::malformed(path, why));
        }
        let mut length_field = [0; LENGTH_FIELD as usize];
        file.read_exact(&mut length_field).at(path, "read its header")?;
        let json_len = u64::from_le_bytes(length_field);
        check_length(json_len, file_len, path)?;
        let mut json = vec![0; json_len as usize];
        file.read_exact(&mut json).at(path, "read its header")?;

        let RawHeader(raw) = serde_json::from_slice(&json)
            .map_err(|error| Error::malformed(path, format!("its header is not a safetensors header: {error}")))?;
        let data_start = LENGTH_FIELD + json_len;
        let mut tensors = raw
            .into_iter()
            .map(|(name, raw)| check_tensor(name, raw, data_start).map_err(|why| Error::malformed(path, why)))
            .collect::<Result<Vec<_>>>()?;
        tensors.sort_by_key(|tensor| (tensor.offset, tensor.len));
        check_contiguous(&tensors, data_start, file_len).map_err(|why| Error::malformed(path, why))?;
        let sha256 = Sha256::new().chain_update(length_field).chain_update(&json).finalize();
        Ok(Header { tensors, sha256: Sha256Hash(sha256.into()), len: data_start })
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

/// Dtype, shape and offsets of one entry must agree.
fn check_tensor(name: String, raw: RawTensor, data_start: u64) -> Result<TensorInfo, String> {
    let RawTensor { dtype, shape, data_offsets: (begin, end) } = raw;
    let Some(dtype) = Dtype::from_name(&dtype) else {
        return Err(format!("tensor {name:?} has dtype {dtype:?}, which this version doesn't know"));
    };
    let Some(expected) = dtype.byte_len(&shape) else {
        return Err(format!("tensor {name:?} of {dtype} {shape:?} is not a whole number of bytes below 2^64"));
    };
    let len = end
        .checked_sub(begin)
        .ok_or_else(|| format!("tensor {name:?} has data_offsets [{begin}, {end}]: they are reversed"))?;
    if len != expected {
        return Err(format!(
            "tensor {name:?} of {dtype} {shape:?} takes {expected} bytes, but its data_offsets [{begin}, {end}] \
             give {len}"
        ));
    }
    let offset = data_start
        .checked_add(begin)
        .ok_or_else(|| format!("tensor {name:?} has data_offsets [{begin}, {end}]: past 2^64"))?;
    Ok(TensorInfo { name, dtype, shape, offset, len })
}

/// No holes, no overlaps, and the last byte of the last tensor is the last of the file.
fn check_contiguous(tensors: &[TensorInfo], data_start: u64, file_len: u64) -> Result<(), String> {
    let mut position = data_start;
    for TensorInfo { name, offset, len, .. } in tensors {
        if *offset != position {
            let what = if *offset > position { "a hole before it" } else { "an overlap with the tensor before it" };
            return Err(format!("tensor {name:?} starts at byte {offset}, expected {position}: {what}"));
        }
        let end = offset.checked_add(*len).filter(|&end| end <= file_len);
        position = end.ok_or_else(|| {
            format!(
                "tensor {name:?} ends {len} bytes from byte {offset}, past the file's {file_len}: the file is \
                 truncated; download it again"
            )
        })?;
    }
    if position != file_len {
        return Err(format!("its tensors end at byte {position}, but the file has {file_len}: it is damaged"));
    }
    Ok(())
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors: Vec<(String, RawTensor)> = Vec::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name != "__metadata__" {
                        tensors.push((name, map.next_value()?));
                    } else if metadata.replace(map.next_value::<BTreeMap<String, String>>()?).is_some() {
                        return Err(serde::de::Error::custom("the key \"__metadata__\" stands in it twice"));
                    }
                }
                let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
                names.sort_unstable();
                if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
                    let message = format!("tensor {:?} stands in it twice", twice[0]);
                    return Err(serde::de::Error::custom(message));
                }
                Ok(RawHeader(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A tensor to be written: name, dtype, shape.
pub trait Described {
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
        self.dtype().byte_len(self.shape()).expect("a tensor below 2^64 bytes")
    }
}

/// Puts tensors in the order that the safetensors library writes them in: by dtype, the widest first, then by name.
pub fn sort_canonically<T: Described>(tensors: &mut [T]) {
    tensors.sort_by(|a, b| b.dtype().cmp(&a.dtype()).then_with(|| a.name().cmp(b.name())));
}

/// The length field and the JSON of a file that holds `tensors` in this order, as the safetensors library writes them.
pub fn header_bytes<T: Described>(tensors: &[T]) -> Vec<u8> {
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut position = 0;
    for tensor in tensors {
        let end = position + tensor.byte_len();
        let name = serde_json::Value::from(tensor.name()); // for its escapes
        let shape: Vec<String> = tensor.shape().iter().map(u64::to_string).collect();
        let (dtype, shape) = (tensor.dtype(), shape.join(","));
        write!(json, r#",{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{position},{end}]}}"#)
            .expect("writing to a String");
        position = end;
    }
    json.push('}');
    let mut bytes = json.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(LENGTH_FIELD as usize), b' ');
    let mut header = (bytes.len() as u64).to_le_bytes().to_vec();
    header.append(&mut bytes);
    header
}
