//! What a manifest tells of a conversion: its source, its tensors, and all of them together.

use std::collections::HashSet;

use serde::{Serialize, Serializer};

use crate::checkpoint::{Config, LeftOut, Source, SourceFile};
use crate::manifest::{
    AdapterRecord, DecisionRecord, FileRecord, LeftOutRecord, Manifest, OutputRecord, SCHEMA_VERSION, SourceFileRecord,
    SourceRecord, SourceTensorRecord, Summary, TensorRecord, Tool,
};
use crate::pipeline::{Outcome, TensorOutcome};
use crate::plan::{Decision, Plan, PlannedTensor};
use crate::read::Span;

/// The source of a plan, unless its files are hashed.
pub(crate) fn source(source: &Source, plan: &Plan) -> SourceRecord {
    let config = source.config.as_ref();
    let record = |file: &SourceFile| SourceFileRecord {
        name: file.name.clone(),
        size: file.identity.len,
        header_sha256: file.header_sha256,
        sha256: None,
    };
    let adapter = source.adapter.as_ref().zip(source.files.last()).map(|(adapter, file)| AdapterRecord {
        config_sha256: adapter.config_sha256,
        file: record(file),
        decoded_from: adapter.decoded_from.clone(),
    });
    SourceRecord {
        model_type: config.and_then(|config| config.model_types().first().map(|&name| name.to_owned())),
        config_sha256: config
            .filter(|_| plan.tensors.iter().any(|tensor| tensor.is_decoded() || tensor.is_carried()))
            .map(Config::sha256),
        files: source.own_files().iter().map(record).collect(),
        adapter,
    }
}

/// The records of a plan's tensors, made one by one when they are asked for: all of them take much more than what they are made of.
pub(crate) struct Records<'a> {
    source: &'a Source,
    plan: &'a Plan,
    /// Of each tensor of the plan.
    outcomes: &'a [TensorOutcome],
}

impl Records<'_> {
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// The name of the first tensor that is written for the one with this number.
    pub(crate) fn name(&self, number: usize) -> Option<String> {
        self.plan.tensors[number].output_names().next()
    }

    /// The record of the tensor with this number.
    pub(crate) fn get(&self, number: usize) -> TensorRecord {
        let file = self.plan.files.partition_point(|file| file.tensors.end <= number);
        tensor_record(self.source, &self.plan.tensors[number], &self.plan.files[file].name, &self.outcomes[number])
    }
}

impl Serialize for Records<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((0..self.len()).map(|number| self.get(number)))
    }
}

/// The manifest of a plan that came out so; `record` is its source's, and its files are `files`.
pub(crate) fn manifest<'a>(
    source: &'a Source,
    plan: &'a Plan,
    mut record: SourceRecord,
    files: Vec<FileRecord>,
    outcome: &'a Outcome,
) -> Manifest<Records<'a>> {
    let Outcome { tensors, source_files, total, .. } = outcome;
    let own = record.files.iter_mut().chain(record.adapter.as_mut().map(|adapter| &mut adapter.file));
    for (file, sha256) in own.zip(source_files.iter().flatten()) {
        file.sha256 = Some(*sha256);
    }
    let elements = |quantized: bool| {
        let chosen = plan.tensors.iter().filter(move |tensor| tensor.is_quantized() == quantized);
        chosen.fold((0, 0), |(tensors, elements), tensor| (tensors + 1, elements + tensor.elements()))
    };
    let ((quantized_tensors, quantized_elements), (kept_tensors, kept_elements)) = (elements(true), elements(false));
    Manifest {
        schema_version: SCHEMA_VERSION,
        older_schema: None,
        tool: Tool::this(),
        recipe: plan.recipe.clone(),
        source: record,
        relaid_from: None,
        summary: Summary {
            quantized_tensors,
            kept_tensors,
            quantized_elements,
            kept_elements,
            bits_per_quantized_weight: plan.bits_per_quantized_weight(),
            bits_per_weight: plan.bits_per_weight(),
            statistics: total.clone(),
        },
        left_out: left_out(source, files.iter().map(|file| file.name.as_str())),
        files,
        tensors: Records { source, plan, outcomes: tensors },
    }
}

/// What of a source isn't in a checkpoint of these files.
pub(crate) fn left_out<'a>(source: &Source, files: impl Iterator<Item = &'a str>) -> Vec<LeftOutRecord> {
    let files: HashSet<&str> = files.collect();
    // What is written anew under the same name isn't left out.
    let is_out = |left: &&LeftOut| left.tensor.is_some() || !files.contains(left.name.as_str());
    let record = |LeftOut { name, tensor, why }: &LeftOut| LeftOutRecord {
        name: name.clone(),
        tensor: tensor.clone(),
        why: why.clone(),
    };
    source.left_out.iter().filter(is_out).map(record).collect()
}

fn tensor_record(source: &Source, tensor: &PlannedTensor, file: &str, outcome: &TensorOutcome) -> TensorRecord {
    let outputs = tensor.outputs.alike().iter().zip(tensor.output_names()).zip(&outcome.sha256);
    TensorRecord {
        sources: source_tensors(source, tensor.read.spans()),
        adapter: source_tensors(source, tensor.read.adapters().map(|tensor| tensor.place)),
        role: tensor.role,
        decision: if tensor.is_quantized() { DecisionRecord::Quantize } else { DecisionRecord::Keep },
        reason: tensor.reason.clone().into_owned(),
        carried: if let Decision::Carry(carried) = tensor.decision { Some(carried) } else { None },
        outputs: outputs
            .map(|((output, name), sha256)| OutputRecord {
                name,
                file: file.to_owned(),
                dtype: output.dtype.to_string(),
                shape: output.shape.to_vec(),
                sha256: *sha256,
            })
            .collect(),
        statistics: outcome.statistics.as_deref().cloned(),
    }
}

/// The tensors that these bytes are of, each once.
fn source_tensors(source: &Source, spans: impl Iterator<Item = Span>) -> Vec<SourceTensorRecord> {
    let mut places: Vec<(usize, usize)> = Vec::new();
    for place in spans.map(|span| (span.file, span.tensor)) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let record = |(file, tensor): (usize, usize)| {
        let (file, info) = (&source.files[file], &source.files[file].tensors[tensor]);
        let (name, dtype, shape) = (info.name.to_string(), info.dtype.to_string(), info.shape.to_vec());
        SourceTensorRecord { name, file: file.name.clone(), dtype, shape }
    };
    places.into_iter().map(record).collect()
}
