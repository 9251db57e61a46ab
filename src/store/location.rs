//! A place: a store and a path in it.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{HashingReader, Kind, Listing, LocalStore, ReadAt, Reader, Sha256Hash, Stat, Store, WriteAt};
use crate::error::TooLong;

/// A file or a folder in some store, there or not.
#[derive(Clone)]
pub struct Location {
    store: Arc<dyn Store>,
    path: PathBuf,
}

impl Location {
    /// What `store` has at `path`.
    pub fn new(store: Arc<dyn Store>, path: impl Into<PathBuf>) -> Location {
        Location { store, path: path.into() }
    }

    /// Its name, as messages print it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path in the file system, if it is there.
    pub fn local(&self) -> Option<&Path> {
        self.store.local(&self.path)
    }

    /// What is called `name` in it.
    pub fn join(&self, name: impl AsRef<Path>) -> Location {
        Location { store: self.store.clone(), path: self.path.join(name) }
    }

    /// What is called `name` beside it.
    pub fn with_file_name(&self, name: &str) -> Location {
        Location { store: self.store.clone(), path: self.path.with_file_name(name) }
    }

    /// Another path in the same store.
    pub fn at(&self, path: impl Into<PathBuf>) -> Location {
        Location { store: self.store.clone(), path: path.into() }
    }

    /// Opens the file for reading.
    pub fn open(&self) -> io::Result<Box<dyn ReadAt>> {
        self.store.open(&self.path)
    }

    /// Creates a file of `len` bytes, whatever was there before.
    pub fn create(&self, len: u64) -> io::Result<Box<dyn WriteAt>> {
        self.store.create(&self.path, len)
    }

    /// The whole file, if it has no more than `most` bytes.
    ///
    /// # Errors
    /// When it has more, by what the store says or as it turns out.
    pub fn read(&self, most: u64) -> io::Result<Vec<u8>> {
        let file = self.open()?;
        let len = file.identity()?.len;
        if len > most {
            return Err(TooLong { len, most }.into());
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(usize::try_from(len).unwrap_or(usize::MAX))?;
        Reader::new(&*file).take(most.saturating_add(1)).read_to_end(&mut bytes)?;
        match bytes.len() as u64 {
            len if len > most => Err(TooLong { len, most }.into()),
            _ => Ok(bytes),
        }
    }

    /// The SHA-256 of the whole file, which is read piece by piece.
    pub fn sha256(&self) -> io::Result<Sha256Hash> {
        let file = self.open()?;
        let mut reader = HashingReader::new(Reader::new(&*file));
        io::copy(&mut reader, &mut io::sink())?;
        Ok(reader.finish().1)
    }

    /// What is there, links followed.
    pub fn stat(&self) -> io::Result<Stat> {
        self.store.stat(&self.path)
    }

    /// What is there, links followed, if anything is.
    ///
    /// # Errors
    /// When the store can't tell: that isn't an answer.
    pub fn kind(&self) -> io::Result<Option<Kind>> {
        match self.stat() {
            Ok(stat) => Ok(Some(stat.kind)),
            Err(error) if is_no_file(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether anything is there.
    ///
    /// # Errors
    /// As [`Location::kind`]'s.
    pub fn exists(&self) -> io::Result<bool> {
        self.kind().map(|kind| kind.is_some())
    }

    /// Whether a file is there.
    ///
    /// # Errors
    /// As [`Location::kind`]'s.
    pub fn is_file(&self) -> io::Result<bool> {
        self.kind().map(|kind| kind == Some(Kind::File))
    }

    /// Whether a folder is there.
    ///
    /// # Errors
    /// As [`Location::kind`]'s.
    pub fn is_folder(&self) -> io::Result<bool> {
        self.kind().map(|kind| kind == Some(Kind::Folder))
    }

    /// The whole file, if one is there, and it has no more than `most` bytes.
    ///
    /// # Errors
    /// When one is, and can't be read.
    pub fn read_if_there(&self, most: u64) -> io::Result<Option<Vec<u8>>> {
        match self.read(most) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if is_no_file(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What lies in the folder.
    pub fn list(&self) -> io::Result<Vec<Listing>> {
        self.store.list(&self.path)
    }

    /// Where links on the way to it lead in the end.
    pub fn resolve(&self) -> io::Result<PathBuf> {
        self.store.resolve(&self.path)
    }
}

/// Whether the error says that there is no file: nothing, or a folder.
pub(crate) fn is_no_file(error: &io::Error) -> bool {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | IsADirectory)
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.fmt(f)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl From<PathBuf> for Location {
    /// In the file system.
    fn from(path: PathBuf) -> Location {
        Location::new(Arc::new(LocalStore), path)
    }
}

macro_rules! from_paths {
    ($($path:ty),*) => {$(
        impl From<$path> for Location {
            /// In the file system.
            fn from(path: $path) -> Location {
                PathBuf::from(path).into()
            }
        }
    )*};
}

from_paths!(&Path, &PathBuf, &str, String);

impl From<&Location> for Location {
    fn from(location: &Location) -> Location {
        location.clone()
    }
}
