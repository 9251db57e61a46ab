//! The layouts there are; [`crate::layout`] knows what each one writes.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{FORMATS, FormatSpec};

/// Names and shapes of the tensors that formats with groups become: who reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// compressed-tensors': vLLM's and transformers'.
    #[default]
    CompressedTensors,
    /// ModelOpt's.
    Modelopt,
    /// gpt-oss's own, of its experts in MXFP4.
    GptOss,
}

impl Layout {
    /// All that a format has, each one once.
    pub fn all() -> Vec<Layout> {
        let mut all: Vec<Layout> = Vec::new();
        for layout in FORMATS.iter().flat_map(|format| format.layouts) {
            if !all.contains(layout) {
                all.push(*layout);
            }
        }
        all
    }

    /// Its name, as a recipe has it.
    pub fn name(self) -> &'static str {
        match self {
            Layout::CompressedTensors => "compressed-tensors",
            Layout::Modelopt => "modelopt",
            Layout::GptOss => "gpt-oss",
        }
    }

    /// The formats that can be written in it, in words: `int4 and nvfp4`.
    pub fn formats(self) -> String {
        FormatSpec::names_with(|format| format.layouts.contains(&self))
    }

    /// What it is, in a line of help.
    pub fn about(self) -> &'static str {
        match self {
            Layout::CompressedTensors => "compressed-tensors': vLLM and transformers read it",
            Layout::Modelopt => "ModelOpt's: vLLM and axolotl's NVFP4 LoRA read it",
            Layout::GptOss => {
                "gpt-oss's own: its experts as its checkpoint on the hub has them, and all else in its dtype"
            }
        }
    }
}

impl FromStr for Layout {
    type Err = String;

    fn from_str(name: &str) -> Result<Layout, String> {
        let all = Layout::all();
        all.iter().find(|layout| layout.name() == name).copied().ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|layout| layout.name()).collect();
            format!("unknown layout {name:?}: expected one of {}", names.join(", "))
        })
    }
}
