//! What codes are stored as.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::dtype::FloatDtype;

/// The dtype of tensors of packed codes, in bitsandbytes' layout. Their bytes are the same in all: FSDP1, which shards only
/// parameters of one dtype, needs them in that of the model's other parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum QuantStorage {
    /// A byte an element.
    #[default]
    Uint8,
    /// Two bytes an element.
    Bfloat16,
    /// Two bytes an element.
    Float16,
    /// Four bytes an element.
    Float32,
}

impl QuantStorage {
    /// All of them.
    pub const ALL: [QuantStorage; 4] =
        [QuantStorage::Uint8, QuantStorage::Bfloat16, QuantStorage::Float16, QuantStorage::Float32];

    /// torch's name of it, which is ours too.
    pub fn name(self) -> &'static str {
        match self {
            QuantStorage::Uint8 => "uint8",
            QuantStorage::Bfloat16 => "bfloat16",
            QuantStorage::Float16 => "float16",
            QuantStorage::Float32 => "float32",
        }
    }

    /// The float that it is; none for bytes.
    pub fn float(self) -> Option<FloatDtype> {
        match self {
            QuantStorage::Uint8 => None,
            QuantStorage::Bfloat16 => Some(FloatDtype::Bfloat16),
            QuantStorage::Float16 => Some(FloatDtype::Float16),
            QuantStorage::Float32 => Some(FloatDtype::Float32),
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> u64 {
        self.float().map_or(1, |dtype| dtype.size() as u64)
    }
}

impl fmt::Display for QuantStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for QuantStorage {
    type Err = String;

    fn from_str(name: &str) -> Result<QuantStorage, String> {
        let names = QuantStorage::ALL.map(QuantStorage::name).join(", ");
        let found = QuantStorage::ALL.into_iter().find(|storage| storage.name() == name);
        found.ok_or_else(|| format!("{name:?}: expected one of {names}"))
    }
}
