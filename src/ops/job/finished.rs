//! Whether a destination holds this very conversion already, of the source as it is now.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::adapter::ADAPTER_CONFIG_NAME;
use crate::checkpoint::{CONFIG_NAME, MANIFEST_NAME, Source, SourceFile};
use crate::error::{Error, IoContext, Result};
use crate::manifest::{FileRecord, ManifestHead, SourceRecord};
use crate::ops::job::side_files;
use crate::plan::Plan;
use crate::store::{Location, Sha256Hash, hash_range};
use crate::threads;

/// Bytes of a file that are read at once.
const BUFFER: usize = 1 << 20;

/// A conversion that was finished earlier.
#[derive(Debug)]
pub struct Finished {
    /// Its manifest, without the tensors' records.
    pub manifest: ManifestHead,
    /// Whether the content of the source's weights was compared, rather than their sizes and headers.
    pub weights_compared: bool,
}

/// What a finished conversion is compared with.
pub(crate) struct Comparison<'a> {
    /// What was converted.
    pub manifest: &'a ManifestHead,
    /// Where that is.
    pub destination: &'a Location,
    /// What would be converted now.
    pub source: &'a Source,
    /// And how.
    pub plan: &'a Plan,
    /// The source as a manifest has it, its files not hashed.
    pub record: &'a SourceRecord,
    /// Threads to hash with.
    pub threads: usize,
}

impl Comparison<'_> {
    /// Checks all but the content of the source's weights.
    ///
    /// # Errors
    /// When the source isn't what was converted, or the destination isn't whole.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_weights_by_header()?;
        self.check_beside_weights()?;
        self.manifest.files.iter().try_for_each(|file| self.check_is_there(file))
    }

    /// Compares the content of the source's weights where the manifest has their hashes; returns whether it has.
    ///
    /// # Errors
    /// When a file has another content.
    pub(crate) fn check_weights(&self, hash: bool) -> Result<bool> {
        let noted = self.manifest.source.all_files().map(|file| file.sha256).collect::<Option<Vec<_>>>();
        let Some(noted) = noted else { return Ok(false) };
        let known: Vec<_> = self.source.files.iter().map(|file| file.identity.sha256).collect();
        if !hash && known.contains(&None) {
            return Ok(false);
        }
        let next = AtomicUsize::new(0);
        let compare = || -> Result<()> {
            let mut buffer = vec![0; BUFFER];
            while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < noted.len()) {
                let now = known[i].map_or_else(|| content_hash(&self.source.files[i], &mut buffer), Ok)?;
                if now != noted[i] {
                    return Err(self.changed(&self.source.files[i].name, "its content has changed since"));
                }
            }
            Ok(())
        };
        let results = threads::share(self.threads.min(noted.len()), compare);
        results.into_iter().collect::<Result<()>>().map(|()| true)
    }

    fn check_weights_by_header(&self) -> Result<()> {
        let (then, now) = (&self.manifest.source, self.record);
        for (then, now) in then.all_files().zip(now.all_files()) {
            if then.name != now.name {
                return Err(self.changed(&now.name, &format!("{} was in its place", then.name)));
            }
            if then.size != now.size {
                return Err(self.changed(&now.name, &format!("it has {} bytes, and had {}", now.size, then.size)));
            }
            if then.header_sha256 != now.header_sha256 {
                return Err(self.changed(&now.name, "its header has changed since"));
            }
        }
        if then.files.len() != now.files.len() {
            let why = format!("the source has {} files of weights, and had {}", now.files.len(), then.files.len());
            return Err(self.changed("", &why));
        }
        let of_adapter = |record: &SourceRecord| record.adapter.as_ref().map(|adapter| adapter.config_sha256);
        if of_adapter(then) != of_adapter(now) {
            return Err(self.changed(ADAPTER_CONFIG_NAME, "its content has changed since"));
        }
        if then.config_sha256 != now.config_sha256 || then.model_type != now.model_type {
            return Err(self.changed(CONFIG_NAME, "its content has changed since"));
        }
        Ok(())
    }

    /// config.json and all other files that are no weights, by their content.
    fn check_beside_weights(&self) -> Result<()> {
        let Comparison { manifest, source, plan, .. } = self;
        let config = plan.config.as_ref().map(|text| (CONFIG_NAME.to_owned(), Sha256Hash::of(text.as_bytes())));
        let beside = side_files::hashes(source, plan)?;
        let now: BTreeMap<String, Sha256Hash> = beside.into_iter().chain(config).collect();
        let is_beside = |file: &&FileRecord| {
            file.name != source.naming().index && !plan.files.iter().any(|planned| planned.name == file.name)
        };
        let then: BTreeMap<&str, Sha256Hash> =
            manifest.files.iter().filter(is_beside).map(|file| (file.name.as_str(), file.sha256)).collect();
        for (name, hash) in &now {
            match then.get(name.as_str()) {
                Some(before) if before == hash => {}
                Some(_) => return Err(self.changed(name, "its content has changed since")),
                None => return Err(self.changed(name, "it wasn't there")),
            }
        }
        match then.keys().find(|name| !now.contains_key(**name)) {
            Some(name) => Err(self.changed(name, "it is gone")),
            None => Ok(()),
        }
    }

    fn check_is_there(&self, file: &FileRecord) -> Result<()> {
        let location = self.destination.join(&file.name);
        let path = location.path();
        let is_file = location.is_file().at(path, "look at it")?;
        let len = if is_file { Some(location.stat().at(path, "look at it")?.len) } else { None };
        let why = match len {
            Some(len) if len == file.size => return Ok(()),
            Some(len) => format!("it has {len} bytes, and {} by {MANIFEST_NAME}: the checkpoint is damaged", file.size),
            None => format!("it is missing, and {MANIFEST_NAME} lists it: the checkpoint isn't whole"),
        };
        Err(Error::Outdated { path: path.to_owned(), why })
    }

    fn changed(&self, name: &str, why: &str) -> Error {
        let location = &self.source.location;
        let is_folder = self.source.own_files().iter().all(|file| file.location.path() != location.path());
        let of_adapter = self.source.adapter.as_ref().filter(|_| name.starts_with("adapter_"));
        let place = match of_adapter {
            Some(adapter) => adapter.config.with_file_name(name),
            None if is_folder && !name.is_empty() => location.join(name),
            None => location.clone(),
        };
        let destination = self.destination.path().display();
        Error::Outdated {
            path: place.path().to_owned(),
            why: format!("{destination} was converted from another content: {why}"),
        }
    }
}

fn content_hash(file: &SourceFile, buffer: &mut [u8]) -> Result<Sha256Hash> {
    let path = file.location.path();
    let hash = hash_range(&*file.reopen()?, 0, file.identity.len, buffer, || true).at(path, "read it")?;
    hash.ok_or(Error::Interrupted)
}
