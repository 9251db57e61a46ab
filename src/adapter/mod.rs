//! LoRA adapters as PEFT saves them: what they say, and what they make of a base's tensors.
//!
//! PEFT 0.21.2 decides what is right: which parameter a tensor belongs to, its rank, its factor. An adapter is merged if all of its
//! tensors are understood; what isn't is an error that names it.

mod base;
mod config;
mod experts;
mod merge;
mod parameter;
mod tensors;

use crate::checkpoint::SourceFile;
use crate::error::{Error, IoContext, Result};
use crate::store::{Kind, Location, Sha256Hash};

pub(crate) use config::ADAPTER_CONFIG_NAME;
use config::Config;
pub(crate) use merge::merge;

/// The tensors of an adapter.
const WEIGHTS_NAME: &str = "adapter_model.safetensors";

/// What PEFT writes where it isn't told to use safetensors.
const PICKLE_NAME: &str = "adapter_model.bin";

/// An adapter whose config and header are read and checked.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// Its folder.
    pub location: Location,
    /// What adapter_config.json says.
    config: Config,
    /// Of that file.
    pub config_sha256: Sha256Hash,
    /// Its file of tensors.
    pub file: SourceFile,
}

impl Adapter {
    /// Opens an adapter's folder.
    ///
    /// # Errors
    /// When it is none, is of a kind that can't be merged, or is damaged as far as headers tell.
    pub(crate) fn open(location: impl Into<Location>) -> Result<Adapter> {
        let location = location.into();
        let path = location.path();
        let not_one = |why: String| Err(Error::Adapter { path: path.to_owned(), why });
        match location.kind().at(path, "open it")? {
            Some(Kind::Folder) => {}
            None => return not_one("not found; give the folder that PEFT saved the adapter in".to_owned()),
            Some(_) => return not_one(format!("not a folder; give the one that holds {ADAPTER_CONFIG_NAME}")),
        }
        let (config_place, weights) = (location.join(ADAPTER_CONFIG_NAME), location.join(WEIGHTS_NAME));
        if !config_place.is_file().at(config_place.path(), "look at it")? {
            return not_one(format!("not an adapter: it has no {ADAPTER_CONFIG_NAME}, which PEFT writes"));
        }
        let (config, config_sha256) = Config::read(&config_place)?;
        if !weights.is_file().at(weights.path(), "look at it")? {
            let pickle = location.join(PICKLE_NAME);
            return not_one(match pickle.is_file().at(pickle.path(), "look at it")? {
                true => format!(
                    "its tensors are in {PICKLE_NAME}, a pickle, which isn't read: save it with safe_serialization=True"
                ),
                false => format!("it has no {WEIGHTS_NAME}"),
            });
        }
        let file = SourceFile::open(WEIGHTS_NAME.to_owned(), weights)?;
        Ok(Adapter { location, config, config_sha256, file })
    }

    /// An error about one of its tensors.
    fn error(&self, tensor: &str, why: impl std::fmt::Display) -> Error {
        Error::Adapter { path: self.file.location.path().to_owned(), why: format!("tensor {tensor:?}: {why}") }
    }
}
