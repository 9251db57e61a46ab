//! `prequant.json`: what a converted checkpoint is, what it was made from, and the hash of every part.
//!
//! No time, host or path is in it: the same source and recipe give the same bytes on every machine.

mod read;
mod v1;

use std::collections::BTreeMap;
use std::io;

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};

pub(crate) use read::{read_part, read_records};

use crate::models::Role;
use crate::recipe::{ExpertLayout, Recipe};
use crate::stats::Statistics;
use crate::store::Sha256Hash;

/// The version of this schema; raised when a reader of the last one would misunderstand.
pub(crate) const SCHEMA_VERSION: u32 = 2;

/// A converted checkpoint's manifest.
///
/// It has a record for every tensor, which together are nearly all of it; [`ManifestHead`] is what is known without them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "prequant.json", description = "The manifest of a checkpoint quantized by prequant.")]
pub struct Manifest<Tensors = Vec<TensorRecord>> {
    /// The version of this schema.
    pub schema_version: u32,
    /// The version of the schema that it was read from, if that is an older one.
    #[serde(skip)]
    pub(crate) older_schema: Option<u32>,
    /// What made it.
    pub tool: Tool,
    /// The choices it was made with.
    pub recipe: Recipe,
    /// What it was made from.
    pub source: SourceRecord,
    /// The layout its experts had before they were rewritten. Statistics are those of then; tensors that
    /// changed have none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub relaid_from: Option<ExpertLayout>,
    /// The checkpoint in numbers.
    pub summary: Summary,
    /// What of the source isn't in the checkpoint, by name; absent if all is.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub left_out: Vec<LeftOutRecord>,
    /// Every file of the checkpoint but this one and SHA256SUMS, by name.
    pub files: Vec<FileRecord>,
    /// Every tensor of the source, in its order; one that was taken apart has an entry for each piece.
    pub tensors: Tensors,
}

/// A manifest of which the tensors' records aren't held.
pub type ManifestHead = Manifest<NotHeld>;

/// In place of records that aren't held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotHeld;

/// A program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

impl Tool {
    /// This program.
    pub fn this() -> Tool {
        Tool { name: env!("CARGO_PKG_NAME").to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

/// The checkpoint that was converted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SourceRecord {
    /// config.json's `model_type`, if there is one.
    pub model_type: Option<String>,
    /// SHA-256 of its config.json, where weights were decoded by what that says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub config_sha256: Option<Sha256Hash>,
    /// Its files of weights, by name.
    pub files: Vec<SourceFileRecord>,
    /// The adapter that was merged into it, if one was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
}

/// An adapter that was merged into the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterRecord {
    /// SHA-256 of its adapter_config.json.
    pub config_sha256: Sha256Hash,
    /// Its file of tensors.
    pub file: SourceFileRecord,
    /// The formats that weights of the source were in, if any was quantized: they were decoded, and what the adapter changes is what
    /// they decode to, not the weights that they were quantized from.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub decoded_from: Vec<String>,
}

/// A file of the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SourceFileRecord {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of its safetensors header, the 8-byte length included.
    pub header_sha256: Sha256Hash,
    /// SHA-256 of the whole file, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sha256: Option<Sha256Hash>,
}

/// A file of the converted checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileRecord {
    /// Its path below the checkpoint's folder.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of its content: what git-lfs and the hub call its oid.
    pub sha256: Sha256Hash,
}

/// A file of the source that wasn't copied, or a tensor of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeftOutRecord {
    /// The file's path below the source; a folder that was left out as a whole ends in a slash.
    pub name: String,
    /// The tensor, if only that was left out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tensor: Option<String>,
    /// Why.
    pub why: String,
}

/// The checkpoint in numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Tensors that are quantized; matrices that a fused one was taken apart into count one by one.
    pub quantized_tensors: u64,
    /// Tensors that are copied as they are, likewise.
    pub kept_tensors: u64,
    /// Elements of the quantized tensors.
    pub quantized_elements: u64,
    /// Elements of the kept ones.
    pub kept_elements: u64,
    /// Bits that a quantized element takes, its share of the statistics included.
    pub bits_per_quantized_weight: f64,
    /// Bits that an element takes over all tensors.
    pub bits_per_weight: f64,
    /// Statistics over all quantized tensors together.
    pub statistics: Statistics,
}

/// A tensor of the source, and how it was converted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TensorRecord {
    /// The tensors of the source that it is made of: scales of coded ones too.
    pub sources: Vec<SourceTensorRecord>,
    /// The tensors of the adapter that were merged into it; absent if none was.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub adapter: Vec<SourceTensorRecord>,
    /// What the tensor is.
    pub role: Role,
    /// Kept or quantized.
    pub decision: DecisionRecord,
    /// Why.
    pub reason: String,
    /// How exactly, if the source has it in 4 bits and its codes were carried over.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub carried: Option<Carried>,
    /// What was written for it.
    pub outputs: Vec<OutputRecord>,
    /// What quantizing it cost; absent if it was kept or carried over, or rewritten in another layout.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub statistics: Option<Statistics>,
}

/// A tensor as the source has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct SourceTensorRecord {
    /// Its name.
    pub name: String,
    /// The file that holds it.
    pub file: String,
    /// Its dtype, in safetensors' spelling.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
}

/// Keep or quantize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecisionRecord {
    /// Copied as it is.
    Keep,
    /// Quantized as the recipe says.
    Quantize,
}

/// How exactly a weight is what the source's codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Carried {
    /// To the last bit.
    Lossless,
    /// Its codes are the same, and some of its scales were rounded.
    ScalesRounded,
}

/// A tensor of the converted checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputRecord {
    /// Its name.
    pub name: String,
    /// The file that holds it.
    pub file: String,
    /// Its dtype, in safetensors' spelling.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// SHA-256 of its bytes.
    pub sha256: Sha256Hash,
}

impl SourceRecord {
    /// Its files of weights, and the adapter's.
    pub(crate) fn all_files(&self) -> impl Iterator<Item = &SourceFileRecord> {
        self.files.iter().chain(self.adapter.iter().map(|adapter| &adapter.file))
    }
}

impl TensorRecord {
    /// Whether it was quantized and has no element other than zero.
    pub fn is_all_zeros(&self) -> bool {
        self.statistics
            .as_ref()
            .is_some_and(|statistics| statistics.blocks > 0 && statistics.zero_blocks == statistics.blocks)
    }
}

impl<Tensors> Manifest<Tensors> {
    /// What wrote it, if that isn't this version.
    pub fn other_version(&self) -> Option<String> {
        let Tool { name, version } = &self.tool;
        match self.older_schema {
            Some(schema) => Some(format!("{name} {version} (manifest schema {schema})")),
            None => (self.tool != Tool::this()).then(|| format!("{name} {version}")),
        }
    }

    /// The same with other records, or none.
    pub(crate) fn with<Others>(self, tensors: Others) -> Manifest<Others> {
        let Manifest {
            schema_version, older_schema, tool, recipe, source, relaid_from, summary, left_out, files, ..
        } = self;
        Manifest { schema_version, older_schema, tool, recipe, source, relaid_from, summary, left_out, files, tensors }
    }
}

impl Manifest {
    /// Bytes that its records take in memory, by estimate.
    pub(crate) fn held_len(&self) -> u64 {
        // Of a vector, a name, a file's name and a dtype, what their allocations take beside their bytes.
        const ALLOCATIONS: usize = 4 * 24;
        let of_tensor =
            |name: &str, file: &str, shape: &[u64]| name.len() + file.len() + size_of_val(shape) + ALLOCATIONS;
        let of_record = |record: &TensorRecord| {
            let sources = record.sources.iter().map(|source| of_tensor(&source.name, &source.file, &source.shape));
            let outputs = record.outputs.iter().map(|output| of_tensor(&output.name, &output.file, &output.shape));
            // Vectors grow to twice of what they hold.
            let held =
                2 * size_of::<TensorRecord>() + 2 * size_of_val(&*record.sources) + 2 * size_of_val(&*record.outputs);
            held + record.reason.len() + sources.chain(outputs).sum::<usize>() + ALLOCATIONS
        };
        self.tensors.iter().map(of_record).sum::<usize>() as u64
    }

    /// The JSON Schema of the manifest; `schemas/prequant.schema.json` holds it.
    pub fn schema() -> Schema {
        schemars::schema_for!(Manifest)
    }
}

impl<Tensors: Serialize> Manifest<Tensors> {
    /// Writes the file's content.
    ///
    /// # Errors
    /// Those of `writer`.
    pub fn write_json(&self, mut writer: &mut dyn io::Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut writer, self)?;
        writer.write_all(b"\n")
    }
}

/// `SHA256SUMS`, as `sha256sum --check` takes it, by name.
pub(crate) fn sha256_sums<'a>(files: impl Iterator<Item = (&'a str, Sha256Hash)>) -> String {
    let by_name: BTreeMap<_, _> = files.collect();
    let line = |(name, hash): (&str, Sha256Hash)| match name.contains(['\\', '\n', '\r']) {
        // As sha256sum has it: a backslash says that the name is escaped.
        true => {
            let name = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
            format!("\\{hash}  {name}\n")
        }
        false => format!("{hash}  {name}\n"),
    };
    by_name.into_iter().map(line).collect()
}
