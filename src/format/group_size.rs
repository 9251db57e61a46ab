//! Group sizes, where a format leaves the choice.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Columns that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupSize {
    /// So many: 32, 64 or 128.
    Columns(u32),
    /// All of a row's.
    Channel,
}

const EXPECTED: &str = "expected 32, 64, 128 or channel";

impl TryFrom<u32> for GroupSize {
    type Error = &'static str;

    fn try_from(columns: u32) -> Result<GroupSize, &'static str> {
        match columns {
            32 | 64 | 128 => Ok(GroupSize::Columns(columns)),
            _ => Err(EXPECTED),
        }
    }
}

impl Default for GroupSize {
    /// 128 columns.
    fn default() -> Self {
        GroupSize::Columns(128)
    }
}

impl FromStr for GroupSize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<GroupSize, &'static str> {
        match text {
            "channel" => Ok(GroupSize::Channel),
            _ => text.parse::<u32>().map_err(|_| EXPECTED)?.try_into(),
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupSize::Columns(columns) => columns.fmt(f),
            GroupSize::Channel => f.write_str("channel"),
        }
    }
}

/// A number, or "channel".
impl Serialize for GroupSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            GroupSize::Columns(columns) => serializer.serialize_u32(*columns),
            GroupSize::Channel => serializer.serialize_str("channel"),
        }
    }
}

impl<'de> Deserialize<'de> for GroupSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Columns(u32),
            Name(String),
        }
        let size = match Either::deserialize(deserializer)? {
            Either::Columns(columns) => columns.try_into(),
            Either::Name(name) => name.parse(),
        };
        size.map_err(de::Error::custom)
    }
}

impl JsonSchema for GroupSize {
    fn schema_name() -> Cow<'static, str> {
        "GroupSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Columns that share a scale; \"channel\" is all of a row's.",
            "enum": [32, 64, 128, "channel"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_sizes_are_read_as_they_are_written() {
        for (text, json) in [("32", "32"), ("64", "64"), ("128", "128"), ("channel", "\"channel\"")] {
            let size: GroupSize = text.parse().unwrap();
            assert_eq!(size.to_string(), text);
            assert_eq!(serde_json::to_string(&size).unwrap(), json);
            assert_eq!(serde_json::from_str::<GroupSize>(json).unwrap(), size);
        }
        for text in ["", "0", "16", "96", "256", "-1", "Channel", "99999999999"] {
            assert_eq!(text.parse::<GroupSize>(), Err(EXPECTED), "{text}");
        }
        for json in ["96", "\"row\"", "null", "1.5", "-32"] {
            assert!(serde_json::from_str::<GroupSize>(json).is_err(), "{json}");
        }
    }
}
