//! SHA-256 of files and parts of files.

use std::borrow::Cow;
use std::fmt;
use std::io;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
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

impl Sha256Hash {
    /// Hands on its hexadecimal digits.
    fn with_digits<T>(&self, take: impl FnOnce(&str) -> T) -> T {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 64];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        take(str::from_utf8(&text).unwrap_or_default())
    }

    /// The hash of these hexadecimal digits.
    fn of_digits(text: &str) -> Option<Sha256Hash> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        (text.len() == 64).then_some(Sha256Hash(hash))
    }
}

impl fmt::Display for Sha256Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_digits(|digits| f.write_str(digits))
    }
}

impl fmt::Debug for Sha256Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Sha256Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.with_digits(|digits| serializer.serialize_str(digits))
    }
}

impl<'de> Deserialize<'de> for Sha256Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;

        impl Visitor<'_> for Digits {
            type Value = Sha256Hash;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a SHA-256")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Sha256Hash, E> {
                Sha256Hash::of_digits(text).ok_or_else(|| E::custom("not a SHA-256"))
            }
        }

        deserializer.deserialize_str(Digits)
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
