//! Whether a source is still what it was when its conversion began: a trainer may save its next checkpoint into the same
//! files meanwhile, with the same sizes and headers.

use super::{CONFIG_NAME, Source, SourceFile};
use crate::error::{Error, IoContext, Result};
use crate::store::{Identity, Location, Sha256Hash, hash_range};

/// What the files beside the weights are known by, at one time.
pub(crate) struct Marks(Vec<(Location, Identity)>);

impl Source {
    /// What the files beside the weights, and the index, are known by now.
    ///
    /// # Errors
    /// When one can't be opened.
    pub(crate) fn marks(&self) -> Result<Marks> {
        let index = self.location.join(self.naming().index);
        let has_index = index.is_file().at(index.path(), "look at it")?;
        let beside = self.side_files.iter().map(|file| file.location.clone());
        let places = beside.chain(has_index.then_some(index));
        places.map(|place| identity(&place).map(|mark| (place, mark))).collect::<Result<_>>().map(Marks)
    }

    /// Checks that every file is what it was: weights when their headers were read, config.json when it was, others when
    /// `marks` were taken.
    ///
    /// # Errors
    /// When one isn't.
    pub(crate) fn check_unchanged(&self, marks: &Marks) -> Result<()> {
        self.files.iter().try_for_each(SourceFile::check_unchanged)?;
        for (place, then) in &marks.0 {
            check(place, then, &identity(place)?)?;
        }
        if let Some(adapter) = &self.adapter {
            check_text(&adapter.config, adapter.config_sha256)?;
        }
        let Some(config) = &self.config else { return Ok(()) };
        let is_file = self.own_files().iter().any(|file| file.location.path() == self.location.path());
        let place = if is_file { self.location.with_file_name(CONFIG_NAME) } else { self.location.join(CONFIG_NAME) };
        check_text(&place, config.sha256())
    }
}

/// A small file must have the content that it had.
fn check_text(place: &Location, then: Sha256Hash) -> Result<()> {
    match place.sha256().at(place.path(), "read it") {
        Ok(now) if now == then => Ok(()),
        Err(error @ Error::Io { .. }) => Err(error),
        _ => Err(changed(place, "its content is another")),
    }
}

impl SourceFile {
    fn check_unchanged(&self) -> Result<()> {
        let file = self.reopen()?;
        let path = self.location.path();
        let mut len = [0; 8];
        crate::store::read_exact_at(&*file, &mut len, 0).at(path, "read it")?;
        // A file that is cut off or grew in the meantime isn't what was opened: its size says so above.
        let header_len = u64::from_le_bytes(len).saturating_add(8).min(self.identity.len);
        let hash = hash_range(&*file, 0, header_len, &mut [0; 1 << 16], || true).at(path, "read it")?;
        match hash {
            Some(hash) if hash == self.header_sha256 => Ok(()),
            _ => Err(changed(&self.location, "its header is another")),
        }
    }
}

fn identity(place: &Location) -> Result<Identity> {
    let file = place.open().at(place.path(), "open it")?;
    file.identity().at(place.path(), "look at it")
}

fn check(place: &Location, then: &Identity, now: &Identity) -> Result<()> {
    match (then.len, now.len) {
        (before, after) if before != after => Err(changed(place, &format!("it has {after} bytes, and had {before}"))),
        _ if then != now => Err(changed(place, "it was written to since the conversion began")),
        _ => Ok(()),
    }
}

fn changed(place: &Location, why: &str) -> Error {
    Error::SourceChanged { path: place.path().to_owned(), why: why.to_owned() }
}
