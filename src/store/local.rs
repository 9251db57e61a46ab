//! The file system.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Identity, Kind, Listing, ReadAt, Stat, Store, WriteAt, read_exact_at};
use crate::error::NotAFile;

/// Bytes that are read at once to have them in memory.
const READ_AHEAD: u64 = 1 << 20;

/// Files and folders of the file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalStore;

impl Store for LocalStore {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        // Looked at before, since opening a device can set it going, and once more when it is open: by then it may be
        // another. Without waiting, since a pipe would until somebody writes to it.
        check_is_file(&path.metadata()?)?;
        let no_wait = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = File::options().read(true).custom_flags(no_wait).open(path)?;
        check_is_file(&file.metadata()?)?;
        Ok(Box::new(LocalFile(file)))
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn WriteAt>> {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        reserve(&file, len)?;
        Ok(Box::new(LocalFile(file)))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        Ok(stat_of(&path.metadata()?))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Listing>> {
        let listing = |entry: io::Result<fs::DirEntry>| {
            let entry = entry?;
            let is_link = entry.file_type()?.is_symlink();
            let stat = match entry.path().metadata() {
                Ok(metadata) => stat_of(&metadata),
                Err(error) if is_link && leads_nowhere(&error) => Stat { kind: Kind::BrokenLink, len: 0 },
                Err(error) => return Err(io::Error::new(error.kind(), format!("{:?}: {error}", entry.file_name()))),
            };
            Ok(Listing { name: entry.file_name(), stat, is_link })
        };
        fs::read_dir(folder)?.map(listing).collect()
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        path.canonicalize()
    }

    fn local<'p>(&self, path: &'p Path) -> Option<&'p Path> {
        Some(path)
    }
}

/// # Errors
/// When it is anything but a file of bytes: reading it might never end.
fn check_is_file(metadata: &Metadata) -> io::Result<()> {
    match stat_of(metadata).kind {
        Kind::File => Ok(()),
        Kind::Folder => Err(io::ErrorKind::IsADirectory.into()),
        Kind::Other | Kind::BrokenLink => Err(NotAFile.into()),
    }
}

/// Whether that is why a link can't be followed: what it names isn't there, or it leads to itself.
fn leads_nowhere(error: &io::Error) -> bool {
    let is_loop = error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    is_loop || matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn stat_of(metadata: &Metadata) -> Stat {
    let kind = match metadata {
        file if file.is_file() => Kind::File,
        folder if folder.is_dir() => Kind::Folder,
        _ => Kind::Other,
    };
    Stat { kind, len: if kind == Kind::File { metadata.len() } else { 0 } }
}

/// Bytes of a page of memory, and of the page cache.
const PAGE: usize = 4096;

/// What is copied to fewer bytes than this after where it is from, but for whole pages, takes five times as long on AMD's Zen 3:
/// the processor sees what it reads and what it wrote last at the same place of a page, and waits. It is 32 there.
const TOO_NEAR: usize = 64;

/// Bytes that are read at once where they must be moved.
const MOVED: usize = 128 << 10;

/// Whether the system copies slowly from `offset` of a file, which is at the same place in a page of the page cache, to `address`.
fn is_copied_slowly(address: usize, offset: u64) -> bool {
    (1..TOO_NEAR).contains(&(address.wrapping_sub(offset as usize) % PAGE))
}

struct LocalFile(File);

impl ReadAt for LocalFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if buffer.len() < PAGE || !is_copied_slowly(buffer.as_ptr().addr(), offset) {
            return self.0.read_at(buffer, offset);
        }
        // A little farther on, then moved here while it is in the cache.
        let end = buffer.len().min(MOVED + TOO_NEAR);
        let len = self.0.read_at(&mut buffer[TOO_NEAR..end], offset)?;
        buffer.copy_within(TOO_NEAR..TOO_NEAR + len, 0);
        Ok(len)
    }

    fn identity(&self) -> io::Result<Identity> {
        let metadata = self.0.metadata()?;
        let nanoseconds = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(Identity { len: metadata.len(), version: nanoseconds.to_string(), sha256: None })
    }

    fn will_read(&self, offset: u64, len: u64) {
        // The system takes a hint too, but brings in what it is told of in the smallest pages, one by one, which costs several
        // times what it does where it sees a file read from front to back.
        let (mut buffer, end) = (Vec::new(), offset.saturating_add(len));
        for offset in (offset..end).step_by(READ_AHEAD as usize) {
            let piece = READ_AHEAD.min(end - offset);
            if self.is_cached(offset) && self.is_cached(offset + piece - 1) {
                continue;
            }
            buffer.resize(piece as usize, 0);
            // Whoever reads it for its bytes meets the error.
            let _ = read_exact_at(self, &mut buffer, offset);
        }
    }

    fn is_cached(&self, offset: u64) -> bool {
        #[cfg(target_os = "linux")]
        {
            use rustix::io::{Errno, ReadWriteFlags, preadv2};
            let mut byte = [0];
            let read = preadv2(&self.0, &mut [io::IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT);
            // Other errors are those of file systems that don't know the flag.
            read != Err(Errno::AGAIN)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = offset;
            true
        }
    }

    fn will_not_read(&self, offset: u64, len: u64) {
        // The system may do with it what it likes.
        #[cfg(target_os = "linux")]
        if let Some(len) = std::num::NonZeroU64::new(len) {
            let _ = rustix::fs::fadvise(&self.0, offset, Some(len), rustix::fs::Advice::DontNeed);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }
}

impl WriteAt for LocalFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(bytes, offset)
    }

    fn write_back(&self, offset: u64, len: u64) {
        // Linux begins to write what is dirty in the range, and drops what isn't; that is little so soon after writing it.
        self.will_not_read(offset, len);
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}

/// Sets the length, and has the blocks allocated at once where the file system can: a full disk then shows early, and
/// the file is in one piece.
fn reserve(file: &File, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if len > 0 {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(len)
}

/// Bytes of this machine's memory; `None` where it doesn't tell.
pub(crate) fn memory_size() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let info = rustix::system::sysinfo();
        Some((info.totalram as u64).saturating_mul(u64::from(info.mem_unit)))
    }
    #[cfg(not(target_os = "linux"))]
    None
}
