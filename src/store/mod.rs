//! Where bytes live. A store is one file here: it opens, creates, lists and looks at what is at a path; everything else
//! holds a [`Location`] and never learns which store that is in.

mod faulty;
mod hash;
mod local;
mod location;
mod memory;
mod open_files;

#[cfg(test)]
mod conformance;

use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use faulty::{Fault, FaultyStore};
pub use hash::Sha256Hash;
pub(crate) use hash::{HashingReader, HashingWriter, hash_range};
pub use local::LocalStore;
pub(crate) use local::memory_size;
pub use location::Location;
pub(crate) use location::is_no_file;
pub use memory::MemoryStore;
pub(crate) use open_files::descriptors_left;

/// A place that holds files by path. Its calls block; they may come from any thread.
pub trait Store: Debug + Send + Sync {
    /// Opens a file for reading. A folder can't be, nor anything else that isn't a file of a known length.
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>>;

    /// Creates a file of `len` bytes, and the folders above it. What was there before is overwritten.
    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn WriteAt>>;

    /// What is at a path, links followed.
    fn stat(&self, path: &Path) -> io::Result<Stat>;

    /// What lies in a folder, in no particular order.
    fn list(&self, folder: &Path) -> io::Result<Vec<Listing>>;

    /// Where links on the way to something lead in the end.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.stat(path).map(|_| path.to_owned())
    }

    /// The path in the file system, if that is what the store is: where staging and publishing can take place.
    fn local<'p>(&self, _: &'p Path) -> Option<&'p Path> {
        None
    }
}

/// An open file. As the system calls: short counts are allowed.
pub trait ReadAt: Send + Sync {
    /// Reads into `buffer` from `offset` on; 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// What the file is known by now.
    fn identity(&self) -> io::Result<Identity>;

    /// Says that `len` bytes from `offset` on will be read soon. A hint: nothing depends on it. It may take as long as reading them.
    fn will_read(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Whether the byte at `offset` can be had without waiting for a disk; true where that can't be told.
    fn is_cached(&self, offset: u64) -> bool {
        let _ = offset;
        true
    }

    /// Says that `len` bytes from `offset` on won't be read again. A hint.
    fn will_not_read(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }
}

/// A file being written, which can be read back.
pub trait WriteAt: ReadAt {
    /// Writes from `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;

    /// Has the disk begin with `len` written bytes from `offset` on, so that [`WriteAt::sync`] finds less to wait for. A hint.
    fn write_back(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Waits until what was written survives a crash.
    fn sync(&self) -> io::Result<()>;
}

/// What a file is known by without reading it. Two that are equal are taken for the same content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its size in bytes.
    pub len: u64,
    /// What changes whenever the content may have: the time of the last write, or the store's own version.
    pub version: String,
    /// SHA-256 of the content, where the store knows it.
    pub sha256: Option<Sha256Hash>,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What kind of thing it is.
    pub kind: Kind,
    /// Its size in bytes, if it is a file.
    pub len: u64,
}

/// What can be at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of a known length.
    File,
    /// What can be listed.
    Folder,
    /// A pipe, a device, a socket.
    Other,
    /// A link that leads nowhere; in listings only.
    BrokenLink,
}

/// One thing in a folder.
#[derive(Clone, Debug)]
pub struct Listing {
    /// Its name in the folder.
    pub name: OsString,
    /// What it is, links followed.
    pub stat: Stat,
    /// Whether it is a link.
    pub is_link: bool,
}

/// Reads all of `buffer`; `UnexpectedEof` if the file ends before.
pub fn read_exact_at(file: &dyn ReadAt, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes`.
pub(crate) fn write_all_at(file: &dyn WriteAt, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.write_at(&bytes[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads an open file from its beginning to its end.
pub(crate) struct Reader<'a> {
    file: &'a dyn ReadAt,
    position: u64,
}

impl<'a> Reader<'a> {
    /// At the beginning of `file`.
    pub(crate) fn new(file: &'a dyn ReadAt) -> Reader<'a> {
        Reader::at(file, 0)
    }

    /// At a position of `file`.
    pub(crate) fn at(file: &'a dyn ReadAt, position: u64) -> Reader<'a> {
        Reader { file, position }
    }
}

impl io::Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}
