//! A store that answers in small pieces, and fails once: for tests of what happens then.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Identity, Listing, ReadAt, Stat, Store, WriteAt};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What is at a path can't be told.
    Stat,
    /// What lies in a folder can't be told.
    List,
    /// A file can't be opened.
    Open,
    /// Reading fails.
    Read,
    /// A file ends before its end.
    EndOfFile,
    /// Writing fails.
    Write,
    /// There is no room left.
    StorageFull,
    /// A sync fails.
    Sync,
}

/// The most that it reads at once, and the most that it writes.
const READ: usize = 1000;
const WRITE: usize = 777;

/// Another store, with a fault.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    trigger: Arc<Trigger>,
}

struct Trigger {
    fault: Fault,
    /// The fault happens when this goes from 1 to 0.
    countdown: AtomicUsize,
    /// Only calls at these paths count.
    at: Box<dyn Fn(&Path) -> bool + Send + Sync>,
}

impl FaultyStore {
    /// `inner`, with a `fault` once [`FaultyStore::arm`] has said when.
    pub fn new(inner: Arc<dyn Store>, fault: Fault) -> FaultyStore {
        Self::only_at(inner, fault, |_| true)
    }

    /// As [`FaultyStore::new`]; calls count at paths that `at` is true of, which it is asked at each.
    pub fn only_at(
        inner: Arc<dyn Store>,
        fault: Fault,
        at: impl Fn(&Path) -> bool + Send + Sync + 'static,
    ) -> FaultyStore {
        FaultyStore { inner, trigger: Arc::new(Trigger { fault, countdown: AtomicUsize::new(0), at: Box::new(at) }) }
    }

    /// The `k`th call from now on that the fault could happen in fails.
    pub fn arm(&self, k: usize) {
        self.trigger.countdown.store(k, Ordering::Relaxed);
    }
}

impl Trigger {
    fn is_time(&self, fault: Fault, path: &Path) -> bool {
        let count = |left: usize| left.checked_sub(1);
        fault == self.fault
            && (self.at)(path)
            && self.countdown.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count) == Ok(1)
    }

    fn check(&self, fault: Fault, path: &Path) -> io::Result<()> {
        match self.is_time(fault, path) {
            true if fault == Fault::StorageFull => Err(io::ErrorKind::StorageFull.into()),
            true => Err(io::Error::from_raw_os_error(5)), // EIO
            false => Ok(()),
        }
    }
}

impl fmt::Debug for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trigger").field(&self.fault).field(&self.countdown).finish()
    }
}

impl Store for FaultyStore {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        self.trigger.check(Fault::Open, path)?;
        let file = self.inner.open(path)?;
        Ok(Box::new(FaultyFile { file, path: path.to_owned(), trigger: self.trigger.clone() }))
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn WriteAt>> {
        let file = self.inner.create(path, len)?;
        Ok(Box::new(FaultyFile { file, path: path.to_owned(), trigger: self.trigger.clone() }))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.trigger.check(Fault::Stat, path)?;
        self.inner.stat(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Listing>> {
        self.trigger.check(Fault::List, folder)?;
        self.inner.list(folder)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.inner.resolve(path)
    }

    fn local<'p>(&self, path: &'p Path) -> Option<&'p Path> {
        self.inner.local(path)
    }
}

struct FaultyFile<F: ?Sized> {
    path: PathBuf,
    trigger: Arc<Trigger>,
    file: Box<F>,
}

impl<F: ReadAt + ?Sized> ReadAt for FaultyFile<F> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.trigger.check(Fault::Read, &self.path)?;
        if self.trigger.is_time(Fault::EndOfFile, &self.path) {
            return Ok(0);
        }
        let len = buffer.len().min(READ);
        self.file.read_at(&mut buffer[..len], offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        self.file.identity()
    }
}

impl<F: WriteAt + ?Sized> WriteAt for FaultyFile<F> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.trigger.check(Fault::Write, &self.path)?;
        self.trigger.check(Fault::StorageFull, &self.path)?;
        self.file.write_at(&bytes[..bytes.len().min(WRITE)], offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.trigger.check(Fault::Sync, &self.path)?;
        self.file.sync()
    }
}
