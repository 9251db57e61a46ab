//! The text of a safetensors header, written piece by piece: of any length, in little memory.

use std::collections::BTreeMap;

use serde::Serialize;

use super::header::{FORMAT_KEY, LENGTH_FIELD, METADATA_KEY, Metadata};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The first tensor of a file that is written starts at a multiple of this, and all that follow, but for those at the file's end: a
/// multiple of every dtype's size, for readers that map the file, and a block of SHA-256, so that a file and its tensors have the
/// same blocks.
pub(crate) const ALIGNMENT: u64 = 64;

/// Bytes that are handed on at once, about.
const PIECE: usize = 1 << 15;

/// A header in the making: entries in the order of their bytes, spelled as the safetensors library spells them.
pub(crate) struct HeaderText {
    /// What isn't handed on yet.
    text: Vec<u8>,
    /// Bytes before it, without the length field.
    before: u64,
    /// Where the next tensor's bytes start.
    position: u64,
}

#[derive(Serialize)]
struct Entry<'a> {
    dtype: Dtype,
    shape: &'a [u64],
    data_offsets: (u64, u64),
}

impl HeaderText {
    /// Bytes before the JSON, which are its length.
    pub(crate) const LENGTH_FIELD: u64 = LENGTH_FIELD;

    /// More bytes of JSON than a header without entries has.
    pub(crate) const LEAST: u64 = 128;

    /// Of no entries yet; beside them stands `metadata`, and that the tensors' layout is PyTorch's.
    pub(crate) fn new(metadata: &Metadata) -> HeaderText {
        let mut text = Vec::with_capacity(2 * PIECE);
        text.push(b'{');
        put(&mut text, METADATA_KEY);
        text.push(b':');
        let own = (FORMAT_KEY, "pt");
        let all: BTreeMap<&str, &str> = metadata.iter().map(|(key, text)| (&**key, &**text)).chain([own]).collect();
        put(&mut text, &all);
        HeaderText { text, before: 0, position: 0 }
    }

    /// Bytes that `metadata` takes, at most.
    pub(crate) fn len_of_metadata(metadata: &Metadata) -> u64 {
        let mut text = Vec::new();
        put(&mut text, metadata);
        text.len() as u64
    }

    /// Adds a tensor of `len` bytes behind the others.
    ///
    /// # Errors
    /// Those of `take`, which is handed the text so far from time to time.
    pub(crate) fn entry(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        len: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let end = self.position.checked_add(len);
        let end = end.ok_or_else(|| Error::internal(format!("the tensors before {name:?} end past 2^64")))?;
        self.text.push(b',');
        put(&mut self.text, name);
        self.text.push(b':');
        put(&mut self.text, &Entry { dtype, shape, data_offsets: (self.position, end) });
        self.position = end;
        match self.text.len() >= PIECE {
            true => self.hand_on(take),
            false => Ok(()),
        }
    }

    /// Ends it: with spaces, so that the first tensor starts at a multiple of [`ALIGNMENT`].
    ///
    /// # Errors
    /// Those of `take`, which is handed the rest.
    pub(crate) fn end(mut self, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.text.push(b'}');
        let len = LENGTH_FIELD + self.before + self.text.len() as u64;
        let spaces = len.next_multiple_of(ALIGNMENT) - len;
        self.text.extend((0..spaces).map(|_| b' '));
        self.hand_on(take)
    }

    /// Bytes that adding a tensor and those before it takes, of any name in two parts: what [`HeaderText::entry`] would write.
    fn entry_len(name: [&str; 2], dtype_len: u64, shape: &[u64], offsets: (u64, u64)) -> u64 {
        const FIXED: u64 = r#","":{"dtype":"","shape":[],"data_offsets":[,]}"#.len() as u64;
        let escaped = |byte: u8| match byte {
            b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 1,
            0..0x20 => 5,
            _ => 0,
        };
        let name_len = |part: &str| part.len() as u64 + part.bytes().map(escaped).sum::<u64>();
        let shape_len = shape.iter().map(|&dimension| digits(dimension) + 1).sum::<u64>().saturating_sub(1);
        let names = name.into_iter().map(name_len).sum::<u64>();
        FIXED + names + dtype_len + shape_len + digits(offsets.0) + digits(offsets.1)
    }

    /// More bytes than an entry takes whose name is made up of these parts, in a file of at most so many bytes of tensors.
    pub(crate) fn most(name: [&str; 2], shape: &[u64], bytes: u64) -> u64 {
        // The longest dtype, and all that is the same for each entry.
        const FIXED: u64 = r#","":{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]}"#.len() as u64;
        // A control character is written as a backslash and five more.
        let escaped = |byte: &u8| matches!(byte, 0..0x20 | b'"' | b'\\' | 0x7f);
        let name_len = |part: &str| part.len() as u64 + 5 * part.bytes().filter(escaped).count() as u64;
        let shape_len: u64 = shape.iter().map(|&dimension| digits(dimension) + 1).sum();
        FIXED + name.into_iter().map(name_len).sum::<u64>() + shape_len + 2 * digits(bytes)
    }

    fn hand_on(&mut self, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        take(&self.text)?;
        self.before += self.text.len() as u64;
        self.text.clear();
        Ok(())
    }
}

/// The length of a header in the making, with that of what is before its JSON.
pub(crate) struct HeaderLen {
    len: u64,
    position: u64,
    /// Dtypes whose names' lengths are known: a file has few.
    dtypes: Vec<(Dtype, u64)>,
}

impl HeaderLen {
    /// As [`HeaderText::new`].
    pub(crate) fn new(metadata: &Metadata) -> HeaderLen {
        let begin = HeaderText::new(metadata).text.len() as u64;
        HeaderLen { len: LENGTH_FIELD + begin, position: 0, dtypes: Vec::new() }
    }

    /// As [`HeaderText::entry`], of a name in two parts.
    pub(crate) fn entry(&mut self, name: [&str; 2], dtype: Dtype, shape: &[u64], len: u64) {
        let dtype_len = match self.dtypes.iter().find(|(known, _)| *known == dtype) {
            Some((_, len)) => *len,
            None => {
                let mut text = Vec::new();
                put(&mut text, &dtype);
                let len = text.len() as u64 - 2;
                self.dtypes.push((dtype, len));
                len
            }
        };
        let end = self.position.saturating_add(len);
        self.len += HeaderText::entry_len(name, dtype_len, shape, (self.position, end));
        self.position = end;
    }

    /// As [`HeaderText::end`].
    pub(crate) fn end(self) -> u64 {
        (self.len + 1).next_multiple_of(ALIGNMENT)
    }
}

/// Digits of a number.
fn digits(number: u64) -> u64 {
    u64::from(number.checked_ilog10().unwrap_or(0)) + 1
}

/// Appends a value as JSON.
fn put(text: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    serde_json::to_writer(text, value).expect("writing to memory");
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::{Metadata, TensorInfo};

    use super::*;
    use crate::dtype::byte_len;

    /// All of a header's JSON.
    fn text_of(tensors: &[(&str, Dtype, &[u64])]) -> Vec<u8> {
        let mut header = HeaderText::new(&BTreeMap::new());
        let mut all = Vec::new();
        let mut take = |text: &[u8]| {
            all.extend_from_slice(text);
            Ok(())
        };
        for (name, dtype, shape) in tensors {
            header.entry(name, *dtype, shape, byte_len(*dtype, shape).unwrap(), &mut take).unwrap();
        }
        header.end(&mut take).unwrap();
        all
    }

    #[test]
    fn a_header_is_written_as_the_library_writes_it() {
        let mut tensors: Vec<(&str, Dtype, &[u64])> = vec![
            ("a \"quoted\" name", Dtype::F32, &[3, 5]),
            ("größe", Dtype::BF16, &[]),
            ("none", Dtype::U8, &[0, 7]),
            ("four bits", Dtype::F4, &[6]),
        ];
        let names: Vec<String> = (0..2_000).map(|i| format!("model.layers.{i}.mlp.up_proj.weight")).collect();
        tensors.extend(names.iter().map(|name| (name.as_str(), Dtype::F16, &[64, 64][..])));
        let mut end = 0;
        let entries = tensors.iter().map(|&(name, dtype, shape)| {
            let begin = end;
            end += byte_len(dtype, shape).unwrap() as usize;
            let shape = shape.iter().map(|&dimension| dimension as usize).collect();
            (name.to_owned(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
        });
        let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
        let expected = serde_json::to_vec(&Metadata::new(Some(format), entries.collect()).unwrap()).unwrap();
        let found = text_of(&tensors);
        assert!((LENGTH_FIELD + found.len() as u64).is_multiple_of(ALIGNMENT));
        assert_eq!(found.trim_ascii_end(), expected);
    }

    #[test]
    fn a_header_is_as_long_as_its_text() {
        let all: String = ('\0'..'\u{100}').collect();
        let shapes: [&[u64]; 5] = [&[], &[0], &[1, 10, 99], &[100, 9], &[1_000_000_007, 3]];
        let dtypes = [Dtype::F8_E4M3FNUZ, Dtype::BF16, Dtype::F64, Dtype::BOOL];
        let names = ["", "a", "größe", all.as_str()];
        let mut tensors = Vec::new();
        for (name, dtype) in names.into_iter().flat_map(|name| dtypes.map(|dtype| (name, dtype))) {
            tensors.extend(shapes.map(|shape| (name, dtype, shape)));
            let mut len = HeaderLen::new(&BTreeMap::new());
            for (name, dtype, shape) in &tensors {
                let cut = name.char_indices().nth(1).map_or(0, |(at, _)| at);
                len.entry([&name[..cut], &name[cut..]], *dtype, shape, byte_len(*dtype, shape).unwrap());
            }
            assert_eq!(len.end(), LENGTH_FIELD + text_of(&tensors).len() as u64);
        }
    }

    #[test]
    fn an_entry_never_takes_more_than_was_reckoned() {
        let names = ["", "a", "größe", "quoted \" \\ \u{1}\u{1f}\n\t\u{7f}\u{2028}", &"long".repeat(99)];
        let shapes: [&[u64]; 4] = [&[], &[0], &[1, 10, 99], &[1_000_000_007]];
        for (name, shape) in names.into_iter().flat_map(|name| shapes.map(|shape| (name, shape))) {
            for dtype in [Dtype::F8_E4M3FNUZ, Dtype::BF16, Dtype::F64] {
                let (all, less) =
                    (text_of(&[("x", dtype, &[3]), (name, dtype, shape)]), text_of(&[("x", dtype, &[3])]));
                let most = HeaderText::most(["", name], shape, byte_len(dtype, shape).unwrap() + 64);
                // Less what both end with.
                assert!(all.trim_ascii_end().len() as u64 <= less.trim_ascii_end().len() as u64 + most, "{name:?}");
                assert!(less.len() as u64 <= HeaderText::LEAST + HeaderText::most(["x", ""], &[3], 64));
            }
        }
    }
}
