//! Formats with a scale for each group of a row's columns, and who reads them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Coding;
use crate::dtype::FloatDtype;
use crate::layout::{OutputTensor, compressed_tensors, gpt_oss, modelopt};

/// Columns that share a scale in INT4.
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
            "description": "Columns that share a scale in INT4; \"channel\" is all of a row's.",
            "enum": [32, 64, 128, "channel"],
        })
    }
}

/// Names and shapes of a quantized weight's tensors: who reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// compressed-tensors': vLLM's and transformers'.
    #[default]
    CompressedTensors,
    /// ModelOpt's, of NVFP4.
    Modelopt,
    /// gpt-oss's own, of its experts in MXFP4.
    GptOss,
}

impl Layout {
    /// All of them.
    pub const ALL: [Layout; 3] = [Layout::CompressedTensors, Layout::Modelopt, Layout::GptOss];

    /// Its name, as `--layout` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Layout::CompressedTensors => "compressed-tensors",
            Layout::Modelopt => "modelopt",
            Layout::GptOss => "gpt-oss",
        }
    }
}

/// What a group's codes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupFormat {
    /// Integers.
    Int4,
    /// Integers with a zero point a group.
    Int4Asym,
    /// E2M1 floats, with powers of two for scales.
    Mxfp4,
    /// E2M1 floats, with E4M3 floats for scales, and one scale more for the tensor.
    Nvfp4,
}

/// How weights are quantized in groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupScheme {
    /// The codes.
    pub format: GroupFormat,
    /// Columns that share a scale.
    pub size: GroupSize,
    /// The tensors they are put in.
    pub layout: Layout,
}

impl GroupScheme {
    /// Columns that share a scale in rows of so many.
    pub fn group_len(&self, columns: u64) -> u64 {
        match self.size {
            GroupSize::Columns(size) => size.into(),
            GroupSize::Channel => columns,
        }
    }

    /// Whether a piece of a weight must be whole rows: where a group is a row, or where zero points of several rows share an integer.
    /// Otherwise a piece may be any number of whole groups, which lie one after the other without padding.
    pub fn has_whole_rows(&self) -> bool {
        self.size == GroupSize::Channel || self.has_zero_points()
    }

    /// Whether codes are integers: eight to an i32, of which a row fills whole ones. E2M1 floats are two a byte.
    pub fn is_integer(&self) -> bool {
        matches!(self.format, GroupFormat::Int4 | GroupFormat::Int4Asym)
    }

    /// Bytes of a scale as it is stored.
    pub fn scale_size(&self, dtype: FloatDtype) -> usize {
        if self.is_integer() { dtype.size() } else { 1 }
    }

    /// Bytes of a row's codes.
    pub fn packed_row(&self, columns: u64) -> u64 {
        if self.is_integer() { columns.div_ceil(8) * 4 } else { columns.div_ceil(2) }
    }

    /// The end of the codes' name, after the weight's.
    pub fn codes_suffix(&self) -> &'static str {
        match self.layout {
            Layout::CompressedTensors => "_packed",
            Layout::Modelopt => "",
            Layout::GptOss => "_blocks",
        }
    }

    /// The end of the scales' name, after the weight's.
    pub fn scales_suffix(&self) -> &'static str {
        if self.layout == Layout::GptOss { "_scales" } else { "_scale" }
    }

    /// The end of the name of the one scale of all groups' scales, if the format has it.
    pub fn tensor_scale_suffix(&self) -> Option<&'static str> {
        match (self.format, self.layout) {
            (GroupFormat::Nvfp4, Layout::Modelopt) => Some("_scale_2"),
            (GroupFormat::Nvfp4, _) => Some("_global_scale"),
            _ => None,
        }
    }

    /// Whether groups have zero points.
    pub fn has_zero_points(&self) -> bool {
        self.format == GroupFormat::Int4Asym
    }

    /// What codes of rows of `columns` decode by; `tensor_scale` is what [`GroupScheme::tensor_scale_suffix`] names.
    pub fn coding(&self, columns: u64, tensor_scale: Option<f32>) -> Coding {
        let scale = tensor_scale.unwrap_or(1.0);
        match (self.format, self.layout) {
            (GroupFormat::Int4 | GroupFormat::Int4Asym, _) => Coding::Int { group: self.group_len(columns) as usize },
            (GroupFormat::Mxfp4, Layout::GptOss) => Coding::Mxfp4GptOss,
            (GroupFormat::Mxfp4, _) => Coding::Mxfp4,
            (GroupFormat::Nvfp4, Layout::Modelopt) => Coding::Nvfp4ModelOpt { scale_2: scale },
            (GroupFormat::Nvfp4, _) => Coding::Nvfp4 { global_scale: scale },
        }
    }

    /// The dtype that the format's own library decodes to, where scales have the dtype `scales` if they are floats of a
    /// weight's dtypes, and the model is in `model`.
    pub fn decoded_dtype(&self, scales: Option<FloatDtype>, model: FloatDtype) -> Option<FloatDtype> {
        match self.layout {
            _ if self.is_integer() => scales,
            Layout::CompressedTensors => Some(FloatDtype::Bfloat16),
            Layout::Modelopt | Layout::GptOss => Some(model),
        }
    }

    /// The tensors that a weight of whole groups becomes.
    pub fn output_tensors(&self, shape: &[u64]) -> Vec<OutputTensor> {
        match self.layout {
            Layout::CompressedTensors => compressed_tensors::output_tensors(self, shape),
            Layout::Modelopt => modelopt::output_tensors(self, shape),
            Layout::GptOss => gpt_oss::output_tensors(self, shape),
        }
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
