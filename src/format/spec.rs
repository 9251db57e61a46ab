//! What a format is: one descriptor, which the command line, the plan, the kernels and the layouts read.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Codebook, ElementCode, FORMATS, Layout, ScaleCode};

/// A 4-bit format. Two are equal if their names are.
pub struct FormatSpec {
    /// Its name, as a recipe has it.
    pub name: &'static str,
    /// What it is, in a line of help.
    pub about: &'static str,
    /// The name that its library has for it: `quant_type` of bitsandbytes, the preset of compressed-tensors.
    pub library_name: &'static str,
    /// What codes stand for.
    #[doc(hidden)]
    pub element: ElementCode,
    /// What scales are stored as.
    #[doc(hidden)]
    pub scale: ScaleCode,
    /// Which elements share a scale.
    #[doc(hidden)]
    pub sharing: Sharing,
    /// The layouts it can be written in, the default first. Empty for formats of blocks, whose layout is bitsandbytes'.
    pub layouts: &'static [Layout],
}

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Blocks of consecutive elements of the flattened tensor: as many as the recipe's block size.
    Blocks,
    /// Groups of a row's columns: as many as the recipe's group size.
    Groups,
    /// Groups of so many of a row's columns.
    GroupsOf(u32),
}

impl FormatSpec {
    /// Its sixteen values, if codes stand for such.
    pub fn codebook(&self) -> Option<&'static Codebook> {
        match self.element {
            ElementCode::Codebook(codebook) => Some(codebook),
            _ => None,
        }
    }

    /// The names of all formats, for messages.
    pub fn names() -> String {
        FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ")
    }

    /// The names of those formats that `has` is true of, in words: `nf4 and fp4`.
    pub(crate) fn names_with(has: impl Fn(&FormatSpec) -> bool) -> String {
        let names: Vec<&str> = FORMATS.iter().filter(|format| has(format)).map(|format| format.name).collect();
        match &names[..] {
            [all @ .., before, last] => [all, &[&*format!("{before} and {last}")]].concat().join(", "),
            names => names.concat(),
        }
    }
}

impl FromStr for &'static FormatSpec {
    type Err = String;

    fn from_str(name: &str) -> Result<&'static FormatSpec, String> {
        let found = FORMATS.iter().find(|format| format.name == name).copied();
        found.ok_or_else(|| format!("unknown format {name:?}: expected one of {}", FormatSpec::names()))
    }
}

impl PartialEq for FormatSpec {
    fn eq(&self, other: &FormatSpec) -> bool {
        self.name == other.name
    }
}

impl Eq for FormatSpec {}

impl fmt::Debug for FormatSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Its name.
impl Serialize for FormatSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for &'static FormatSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for FormatSpec {
    fn schema_name() -> Cow<'static, str> {
        "Format".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names = FORMATS.iter().map(|format| json_schema!({"description": format.about, "const": format.name}));
        json_schema!({"description": "A 4-bit format.", "oneOf": names.collect::<Vec<_>>()})
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::dtype::FloatDtype;

    #[test]
    fn formats_are_told_apart_by_name() {
        let names: HashSet<&str> = FORMATS.iter().map(|format| format.name).collect();
        assert_eq!(names.len(), FORMATS.len());
        for format in FORMATS {
            let json = serde_json::to_string(format).unwrap();
            assert_eq!(json, format!("{:?}", format.name));
            assert_eq!(serde_json::from_str::<&FormatSpec>(&json).unwrap(), *format);
        }
    }

    #[test]
    fn unknown_formats_are_told_what_there_is() {
        let error = serde_json::from_str::<&FormatSpec>("\"nf5\"").unwrap_err().to_string();
        assert!(error.contains("unknown format \"nf5\": expected one of nf4, fp4, int4"), "{error}");
    }

    #[test]
    fn formats_of_blocks_are_as_bitsandbytes_stores_them() {
        for format in FORMATS {
            let blocks = format.sharing == Sharing::Blocks;
            let (codebook, f32) = (format.codebook().is_some(), ScaleCode::Float(FloatDtype::Float32));
            assert!(!blocks || codebook && format.scale == f32, "{format:?}");
            assert_eq!(blocks, format.layouts.is_empty(), "{format:?}");
            assert!(format.element != ElementCode::E4m3, "{format:?}: codes of four bits");
        }
    }
}
