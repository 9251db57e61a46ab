//! Files in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Identity, Kind, Listing, ReadAt, Sha256Hash, Stat, Store, WriteAt};

/// Files by path; a folder is there as long as a file lies below it.
#[derive(Default)]
pub struct MemoryStore {
    files: Mutex<BTreeMap<PathBuf, Arc<MemoryFile>>>,
}

impl MemoryStore {
    /// Puts a file with this content at `path`.
    pub fn put(&self, path: impl Into<PathBuf>, content: Vec<u8>) {
        let sha256 = Some(Sha256Hash::of(&content));
        self.insert(&path.into(), MemoryFile { content: RwLock::new(content), writes: AtomicU64::new(0), sha256 });
    }

    fn insert(&self, path: &Path, file: MemoryFile) -> Arc<MemoryFile> {
        let file = Arc::new(file);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), file.clone());
        file
    }

    fn file(&self, path: &Path) -> io::Result<Arc<MemoryFile>> {
        if let Some(file) = self.files.lock().unwrap_or_else(PoisonError::into_inner).get(path) {
            return Ok(file.clone());
        }
        let is_folder = self.list(path).is_ok();
        Err(if is_folder { io::ErrorKind::IsADirectory } else { io::ErrorKind::NotFound }.into())
    }
}

impl Store for MemoryStore {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        Ok(Box::new(self.file(path)?))
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn WriteAt>> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let content = RwLock::new(vec![0; len]);
        Ok(Box::new(self.insert(path, MemoryFile { content, writes: AtomicU64::new(0), sha256: None })))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        match self.file(path) {
            Ok(file) => Ok(Stat { kind: Kind::File, len: file.identity()?.len }),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => Ok(Stat { kind: Kind::Folder, len: 0 }),
            Err(error) => Err(error),
        }
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Listing>> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut listings, mut folders) = (Vec::new(), BTreeSet::new());
        for (path, file) in files.iter() {
            let Ok(below) = path.strip_prefix(folder) else { continue };
            let mut names = below.components();
            let Some(name) = names.next().map(|name| name.as_os_str().to_owned()) else { continue };
            if names.next().is_none() {
                let stat = Stat { kind: Kind::File, len: file.identity()?.len };
                listings.push(Listing { name, stat, is_link: false });
            } else if folders.insert(name.clone()) {
                listings.push(Listing { name, stat: Stat { kind: Kind::Folder, len: 0 }, is_link: false });
            }
        }
        if listings.is_empty() {
            let is_file = files.contains_key(folder);
            return Err(if is_file { io::ErrorKind::NotADirectory } else { io::ErrorKind::NotFound }.into());
        }
        Ok(listings)
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.files.lock().unwrap_or_else(PoisonError::into_inner).keys()).finish()
    }
}

struct MemoryFile {
    content: RwLock<Vec<u8>>,
    /// How often it was written to.
    writes: AtomicU64,
    /// Of what it was made with.
    sha256: Option<Sha256Hash>,
}

impl ReadAt for Arc<MemoryFile> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        let rest = usize::try_from(offset).ok().and_then(|offset| content.get(offset..)).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn identity(&self) -> io::Result<Identity> {
        let len = self.content.read().unwrap_or_else(PoisonError::into_inner).len() as u64;
        let writes = self.writes.load(Ordering::Relaxed);
        Ok(Identity { len, version: writes.to_string(), sha256: self.sha256.filter(|_| writes == 0) })
    }
}

impl WriteAt for Arc<MemoryFile> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let begin = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end = begin.checked_add(bytes.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        if content.len() < end {
            content.resize(end, 0);
        }
        content[begin..end].copy_from_slice(bytes);
        self.writes.fetch_add(1, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
