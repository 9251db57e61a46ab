//! SHA-256 of files and parts of files.

use std::borrow::Cow;
use std::fmt;
use std::io;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::{ReadAt, read_exact_at};

/// A SHA-256, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256Hash(pub [u8; 32]);

impl Sha256Hash {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Sha256Hash {
        Sha256Hash(Sha256::digest(bytes).into())
    }
}

/// The hash of `len` bytes of `file` from `offset` on, read through `buffer`.
///
/// `keep_going` is asked before each read; once it says no, the answer is `None`.
///
/// # Errors
/// The system's; `UnexpectedEof` if the file ends before.
pub(crate) fn hash_range(
    file: &dyn ReadAt,
    offset: u64,
    len: u64,
    buffer: &mut [u8],
    mut keep_going: impl FnMut() -> bool,
) -> io::Result<Option<Sha256Hash>> {
    let mut hasher = Sha256::new();
    let mut done = 0;
    while done < len {
        if !keep_going() {
            return Ok(None);
        }
        let piece = buffer.len().min(usize::try_from(len - done).unwrap_or(usize::MAX));
        read_exact_at(file, &mut buffer[..piece], offset + done)?;
        hasher.update(&buffer[..piece]);
        done += piece as u64;
    }
    Ok(Some(Sha256Hash(hasher.finalize().into())))
}

/// Counts and hashes what it passes on.
pub(crate) struct HashingWriter<W> {
    inner: W,
    len: u64,
    hasher: Sha256,
}

impl<W> HashingWriter<W> {
    /// Passes on to `inner`.
    pub(crate) fn new(inner: W) -> Self {
        HashingWriter { inner, len: 0, hasher: Sha256::new() }
    }

    /// Length and hash of what was written so far.
    pub(crate) fn finish(&self) -> (u64, Sha256Hash) {
        (self.len, Sha256Hash(self.hasher.clone().finalize().into()))
    }
}

impl<W: io::Write> io::Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Counts and hashes what is read through it.
pub(crate) struct HashingReader<R> {
    inner: R,
    len: u64,
    hasher: Sha256,
}

impl<R> HashingReader<R> {
    /// Reads from `inner`.
    pub(crate) fn new(inner: R) -> Self {
        HashingReader { inner, len: 0, hasher: Sha256::new() }
    }

    /// Length and hash of what was read so far.
    pub(crate) fn finish(&self) -> (u64, Sha256Hash) {
        (self.len, Sha256Hash(self.hasher.clone().finalize().into()))
    }
}

impl<R: io::Read> io::Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.len += read as u64;
        Ok(read)
    }
}

impl fmt::Display for Sha256Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Sha256Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let digits = |i: usize| text.get(2 * i..2 * i + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let mut hash = [0; 32];
        for (i, byte) in hash.iter_mut().enumerate() {
            *byte = digits(i).ok_or_else(|| serde::de::Error::custom("not a SHA-256"))?;
        }
        if text.len() == 64 { Ok(Sha256Hash(hash)) } else { Err(serde::de::Error::custom("not a SHA-256")) }
    }
}

impl JsonSchema for Sha256Hash {
    fn schema_name() -> Cow<'static, str> {
        "Sha256".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "A SHA-256, in hexadecimal."})
    }
}
