//! The records of a staging folder. Each ends with a SHA-256 over its name and content, and gets its name once it is on
//! the disk: one that is torn, altered or another's is as good as none, and what it told of is done again.

use std::io::{self, Write};
use std::path::Path;

use super::disk;
use crate::error::Result;
use crate::store::{HashingWriter, Sha256Hash};

/// The end of a record's name until it is written.
const UNFINISHED: &str = ".unfinished";

/// Writes and syncs the record called `name` in `folder`. Its name lasts once the folder is synced.
pub(super) fn write(folder: &Path, name: &str, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let path = folder.join(name);
    let unfinished = folder.join(format!("{name}{UNFINISHED}"));
    disk::make_parents(folder, &path)?;
    disk::write(&unfinished, |file| {
        let mut hashing = HashingWriter::new(file);
        content(&mut hashing)?;
        let (_, hash) = hashing.finish();
        hashing.write_all(last_line(name, hash).as_bytes())
    })?;
    disk::rename(&unfinished, &path, "give it its name")
}

/// The content of the record called `name`; `None` if there is none, or it isn't what was written.
pub(super) fn read(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let Some(mut bytes) = disk::read_if_there(&folder.join(name))? else { return Ok(None) };
    let end = last_line(name, Sha256Hash::of(&[])).len();
    let Some((content, last)) = bytes.len().checked_sub(end).map(|len| bytes.split_at(len)) else { return Ok(None) };
    if last != last_line(name, Sha256Hash::of(content)).as_bytes() {
        return Ok(None);
    }
    bytes.truncate(bytes.len() - end);
    Ok(Some(bytes))
}

/// What ends a record whose content has this hash. A name has no zero byte, so it can't pass for part of the hash.
fn last_line(name: &str, content: Sha256Hash) -> String {
    format!("\n{}", Sha256Hash::of(&[name.as_bytes(), &[0], &content.0].concat()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_record_that_is_torn_altered_or_of_another_name_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(read(folder, "one").unwrap(), None);
        write(folder, "one", |file| file.write_all(b"some content")).unwrap();
        assert_eq!(read(folder, "one").unwrap().as_deref(), Some(&b"some content"[..]));
        let path = folder.join("one");
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(read(folder, "one").unwrap(), None, "{len} bytes");
        }
        for i in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[i] ^= 1;
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(folder, "one").unwrap(), None, "byte {i}");
        }
        fs::write(folder.join("two"), whole).unwrap();
        assert_eq!(read(folder, "two").unwrap(), None);
    }
}
