//! What the first bytes of a file say that it is, where that isn't what its name says: pointers and pages that a download left in
//! a file's place, other formats, byte order marks.

use std::fmt;
use std::path::Path;

use crate::error::{Error, IoContext, Result};
use crate::store::{Location, ReadAt};
use crate::units::Bytes;

/// Bytes that are enough to tell.
pub(crate) const ENOUGH: usize = 1024;

/// A pointer of git-lfs is shorter than this, by its specification.
const MAX_POINTER_LEN: u64 = 1024;

/// A page that a server sent in a file's place is shorter than this.
const MAX_PAGE_LEN: u64 = 1 << 20;

/// Something else than what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    /// git-lfs's stand-in for a file of this size.
    LfsPointer(Option<u64>),
    /// Xet's stand-in for a file.
    XetPointer,
    /// A page for browsers.
    Html,
    /// What a server answers that refuses, or doesn't have the file.
    Refusal,
    /// llama.cpp's format.
    Gguf,
    /// A zip archive, which is how torch.save writes.
    Zip,
    /// A Python pickle, which is how torch.save wrote.
    Pickle,
    /// Nothing but zeros.
    Zeros,
}

impl Foreign {
    /// What it is, and what to do about it.
    pub(crate) fn parts(self) -> (String, &'static str) {
        let login = "download it again; what is gated or private needs a login (`hf auth login`)";
        let (what, way_on) = match self {
            Foreign::LfsPointer(size) => {
                let size = size.map(|size| format!(" to {}", Bytes(size))).unwrap_or_default();
                let what = format!("a git-lfs pointer{size}, not the file itself");
                return (what, "run `git lfs pull`, or download it again");
            }
            Foreign::XetPointer => ("a Xet pointer, not the file itself", "download it again (`hf download`)"),
            Foreign::Html => ("an HTML page, not the file itself", login),
            Foreign::Refusal => ("a server's refusal, not the file itself", login),
            Foreign::Gguf => {
                ("GGUF, llama.cpp's format", "start from the safetensors checkpoint that it was made from")
            }
            Foreign::Zip | Foreign::Pickle => (
                "not safetensors but torch.save's format",
                "convert it to safetensors first (transformers' save_pretrained does)",
            ),
            Foreign::Zeros => ("nothing but zeros where it begins: a download that was cut off", "download it again"),
        };
        (what.to_owned(), way_on)
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, way_on) = self.parts();
        write!(f, "{what}; {way_on}")
    }
}

/// What the beginning of a file is, if that isn't what its name promises.
pub(crate) fn of(first: &[u8]) -> Option<Foreign> {
    let starts = |with: &str| first.starts_with(with.as_bytes());
    if starts("version https://git-lfs.github.com/spec/") || starts("version https://hawser.github.com/spec/") {
        let text = String::from_utf8_lossy(first);
        let size = text.lines().find_map(|line| line.strip_prefix("size ")?.trim().parse().ok());
        return Some(Foreign::LfsPointer(size));
    }
    match first {
        _ if starts("# xet version ") => Some(Foreign::XetPointer),
        _ if starts("GGUF") => Some(Foreign::Gguf),
        [b'P', b'K', 3, 4, ..] => Some(Foreign::Zip),
        [0x80, 2..=5, b'}' | b']' | b'c' | 0x8a | 0x95, ..] => Some(Foreign::Pickle),
        _ if first.len() == ENOUGH && first.iter().all(|byte| *byte == 0) => Some(Foreign::Zeros),
        _ => page(first),
    }
}

/// What a server sent in place of a file.
fn page(first: &[u8]) -> Option<Foreign> {
    let text = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first).trim_ascii_start();
    let starts = |with: &str| text.get(..with.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(with.as_bytes()));
    let text = String::from_utf8_lossy(text);
    if starts("<!doctype html") || starts("<html") {
        return Some(Foreign::Html);
    }
    let is_refusal = ["Entry not found", "Repository not found", "Invalid username or password", "Access to model "]
        .iter()
        .any(|words| starts(words))
        || (starts("<?xml") && text.contains("<Error>"))
        || (starts("{\"error\":\"") && text.len() < 512);
    is_refusal.then_some(Foreign::Refusal)
}

/// Reads a file's beginning; shorter if the file is.
///
/// # Errors
/// When the system refuses.
pub(crate) fn read(file: &dyn ReadAt, path: &Path) -> Result<Vec<u8>> {
    let mut first = vec![0; ENOUGH];
    let mut done = 0;
    while done < first.len() {
        match file.read_at(&mut first[done..], done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).at(path, "read it"),
        }
    }
    first.truncate(done);
    Ok(first)
}

/// Checks a file that will be copied as it is: nothing may have been left in its place.
///
/// # Errors
/// When it is a pointer or a page, or the system refuses.
pub(crate) fn check_copied(location: &Location, name: &str, len: u64) -> Result<()> {
    // A page may be meant, and text may quote one.
    let may_be_page = ![".html", ".htm", ".xhtml", ".md", ".txt"].iter().any(|end| name.ends_with(end));
    if len == 0 || len >= if may_be_page { MAX_PAGE_LEN } else { MAX_POINTER_LEN } {
        return Ok(());
    }
    let path = location.path();
    let first = read(&*location.open().at(path, "open it")?, path)?;
    match of(&first) {
        Some(found @ (Foreign::LfsPointer(_) | Foreign::XetPointer)) if len < MAX_POINTER_LEN => Err(is(path, found)),
        Some(found @ (Foreign::Html | Foreign::Refusal)) if may_be_page => Err(is(path, found)),
        _ => Ok(()),
    }
}

/// Checks the beginning of what should be JSON.
///
/// # Errors
/// When a byte order mark stands there, or it is something else.
pub(crate) fn check_json(first: &[u8], path: &Path) -> Result<()> {
    if first.starts_with(b"\xef\xbb\xbf") {
        let why = "it starts with a byte order mark (EF BB BF), which clients don't read as JSON: save it as UTF-8 without \
                   one";
        return Err(Error::malformed(path, why));
    }
    if first.starts_with(b"\xff\xfe") || first.starts_with(b"\xfe\xff") {
        let why = "not UTF-8 text: by its byte order mark it is UTF-16; save it as UTF-8";
        return Err(Error::malformed(path, why));
    }
    match of(first) {
        Some(found) => Err(is(path, found)),
        None => Ok(()),
    }
}

/// The error that says so.
pub(crate) fn is(path: &Path, found: Foreign) -> Error {
    Error::malformed(path, format!("it is {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_download_left_in_a_files_place_is_told() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4976698672\n";
        for (first, found) in [
            (&pointer[..], Foreign::LfsPointer(Some(4_976_698_672))),
            (b"version https://git-lfs.github.com/spec/v1\n", Foreign::LfsPointer(None)),
            (b"# xet version 0\nfilesize = 1\n", Foreign::XetPointer),
            (b"<!DOCTYPE html><html>", Foreign::Html),
            (b"\xef\xbb\xbf\r\n <HTML lang=en>", Foreign::Html),
            (b"Entry not found", Foreign::Refusal),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", Foreign::Refusal),
            (b"{\"error\":\"Repository not found\"}", Foreign::Refusal),
            (b"GGUF\x03\0\0\0", Foreign::Gguf),
            (b"PK\x03\x04", Foreign::Zip),
            (b"\x80\x02}q\0", Foreign::Pickle),
            (&[0; ENOUGH], Foreign::Zeros),
        ] {
            assert_eq!(of(first), Some(found), "{first:?}");
        }
    }

    #[test]
    fn what_is_meant_is_let_be() {
        for first in [&b""[..], b"{}", b"{\"a\": 1}", b"\x40\0\0\0\0\0\0\0{\"", b"version 1", b"# A model", b"\0\0"] {
            assert_eq!(of(first), None, "{first:?}");
        }
    }

    #[test]
    fn byte_order_marks_are_named() {
        let error = |first: &[u8]| check_json(first, Path::new("config.json")).unwrap_err().to_string();
        assert!(error(b"\xef\xbb\xbf{}").contains("a byte order mark"));
        assert!(error(b"\xff\xfe{\0").contains("UTF-16"));
        assert!(check_json(b"{}", Path::new("config.json")).is_ok());
    }
}
