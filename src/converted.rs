//! An opened checkpoint as weights: each one's codes with all that belongs to them.
//!
//! [`Converted`] reads what prequant wrote, by its manifest; [`weights`] puts together what any program wrote, by names and dtypes.

use std::collections::HashSet;

use crate::checkpoint::{MANIFEST_NAME, Source, TensorInfo};
use crate::dtype::FloatDtype;
use crate::error::{Error, Hint, Result};
use crate::format::Codec;
use crate::layout::bitsandbytes::{self, MAX_QUANT_STATE};
use crate::layout::{OutputKind, OutputTensor, Stored, StoredFormat, StoredWeight};
use crate::manifest::{DecisionRecord, Manifest, OutputRecord, TensorRecord};
use crate::read::{Decode, Input, MAX_EXPERTS, Nested, Read, SmallTensors, Span, Tensors};

/// A checkpoint that prequant converted: its files hold the tensors that its manifest lists, and no others.
pub(crate) struct Converted<'a> {
    source: &'a Source,
    codec: Codec,
    tensors: Tensors<'a>,
    small: SmallTensors<'a>,
}

impl<'a> Converted<'a> {
    /// Compares the headers with the manifest.
    ///
    /// # Errors
    /// When they differ.
    pub(crate) fn new(source: &'a Source, manifest: &'a Manifest) -> Result<Converted<'a>> {
        let (codec, tensors) = (manifest.recipe.codec(), Tensors::new(source));
        let converted = Converted { source, codec, tensors, small: SmallTensors::new(source) };
        let mut recorded = HashSet::new();
        for output in manifest.tensors.iter().flat_map(|record| &record.outputs) {
            converted.check(output)?;
            recorded.insert(output.name.as_str());
        }
        match converted.tensors.names().filter(|name| !recorded.contains(name)).min() {
            Some(name) => Err(converted.malformed(format!("there are more tensors than it lists, first {name:?}"))),
            None if recorded.is_empty() => Err(converted.malformed("it lists no tensor".to_owned())),
            None => Ok(converted),
        }
    }

    /// Whether a tensor is there as the manifest has it.
    fn check(&self, output: &OutputRecord) -> Result<()> {
        let (_, info) = self.tensor(&output.name)?;
        difference(info, output).map_or(Ok(()), |what| Err(self.malformed(format!("{:?} {what}", info.name))))
    }

    /// A tensor of the files.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) fn tensor(&self, name: &str) -> Result<(Span, &'a TensorInfo)> {
        self.tensors.get(name).ok_or_else(|| self.malformed(format!("{name:?} is missing from the files")))
    }

    /// What a record of the manifest is of, decoded.
    ///
    /// # Errors
    /// When its tensors aren't what the recipe wants.
    pub(crate) fn weight(&mut self, record: &TensorRecord) -> Result<Input> {
        let first = record.outputs.first().ok_or_else(|| self.malformed("a tensor without outputs".to_owned()))?;
        let (codes, info) = self.tensor(&first.name)?;
        if record.decision == DecisionRecord::Keep {
            return Ok(Input::as_stored(info, codes));
        }
        let suffix = self.codec.suffix(OutputKind::Packed).unwrap_or_default();
        let name = first.name.strip_suffix(&*suffix);
        let name = name.ok_or_else(|| self.malformed(format!("{:?} doesn't end in {suffix:?}", first.name)))?;
        let (source, model) = (self.source, self.source.model_dtype());
        let malformed = |why: String| malformed(source, format!("weight {name:?}: {why}"));
        let Converted { codec, tensors, small, .. } = self;
        let parts = codec.tensors();
        Weight { name, codec, parts, tensors, small, own_table: false, malformed: &malformed }.decoded(model)
    }

    /// The content of a quant_state.
    ///
    /// # Errors
    /// When there is none of this name, it is longer than any, or the system refuses to read.
    pub(crate) fn quant_state(&mut self, name: &str) -> Result<Vec<u8>> {
        let (span, info) = self.tensor(name)?;
        few(span, info, MAX_QUANT_STATE).map_err(|why| self.malformed(why))?;
        self.small.read(span)
    }

    fn malformed(&self, why: String) -> Error {
        malformed(self.source, why)
    }
}

fn malformed(source: &Source, why: String) -> Error {
    let why = format!("{why}: the files aren't what the manifest says");
    let path = source.location.join(MANIFEST_NAME).path().to_owned();
    Error::Malformed { path, why, hint: Some(Hint::Verify) }
}

/// What a tensor's header says otherwise than the manifest.
pub(crate) fn difference(found: &TensorInfo, expected: &OutputRecord) -> Option<String> {
    let is_same = found.dtype.to_string() == expected.dtype && *found.shape == *expected.shape;
    let (dtype, shape) = (&expected.dtype, &expected.shape);
    (!is_same).then(|| format!("is {} {:?}, expected {dtype} {shape:?}", found.dtype, found.shape))
}

/// Whether a tensor has no more bytes than may be read whole.
fn few(span: Span, info: &TensorInfo, most: u64) -> Result<(), String> {
    match span.len {
        len if len > most => Err(format!("{:?} has {len} bytes, expected {most} at most", info.name)),
        _ => Ok(()),
    }
}

/// A quantized weight, whoever wrote it: the one reader of all layouts.
struct Weight<'w, 'a> {
    name: &'w str,
    codec: &'w Codec,
    /// What it consists of.
    parts: Vec<OutputTensor>,
    tensors: &'w Tensors<'a>,
    small: &'w mut SmallTensors<'a>,
    /// Whether it has a table of its own for what the codes of scales stand for.
    own_table: bool,
    /// The error that it isn't what it should be.
    malformed: &'w dyn Fn(String) -> Error,
}

impl<'a> Weight<'_, 'a> {
    /// What it decodes to; `model` is the model's dtype.
    fn decoded(mut self, model: FloatDtype) -> Result<Input> {
        let codec = *self.codec;
        let stored = codec.read(&mut self, model)?;
        let read = self.decode(&stored)?;
        if stored.transposed && stored.shape[0] > MAX_EXPERTS {
            return Err((self.malformed)(format!("{} experts, expected {MAX_EXPERTS} at most", stored.shape[0])));
        }
        let input = Input::decoded(self.name.to_owned(), stored.shape, stored.dtype, read);
        Ok(if stored.transposed { input.transposed() } else { input })
    }

    fn tensor(&self, kind: OutputKind) -> Result<(Span, &'a TensorInfo)> {
        let Some(part) = self.parts.iter().find(|part| part.kind == kind) else {
            return Err((self.malformed)(format!("its format has no {kind:?}")));
        };
        let name = format!("{}{}", self.name, part.suffix);
        self.tensors.get(&name).ok_or_else(|| (self.malformed)(format!("{name:?} is missing from the files")))
    }

    fn decode(&self, stored: &Stored) -> Result<Read> {
        let codec = self.codec;
        let span = |kind| self.tensor(kind).map(|(span, _)| span);
        let nested = match stored.nested_offset {
            Some(offset) => {
                let table = self.own_table.then(|| span(OutputKind::NestedQuantMap)).transpose()?;
                Some(Nested { absmax: span(OutputKind::NestedAbsmax)?, offset, table })
            }
            None => None,
        };
        let read = Read::decode(Decode {
            coding: stored.coding,
            dtype: stored.dtype,
            rows: stored.rows,
            columns: stored.columns,
            row_len: codec.packed_row(stored.columns),
            group_rows: 1,
            codes: Read::Bytes(span(OutputKind::Packed)?),
            scales: Read::Bytes(span(if codec.is_blocks() { OutputKind::Absmax } else { OutputKind::Scale })?),
            zero_points: codec.has_zero_points().then(|| span(OutputKind::ZeroPoint).map(Read::Bytes)).transpose()?,
            order: None,
            nested,
        });
        read.map_err(|why| (self.malformed)(format!("a shape of {:?}, and {why}", stored.shape)))
    }
}

impl StoredWeight for Weight<'_, '_> {
    fn info(&self, kind: OutputKind) -> Result<&TensorInfo> {
        self.tensor(kind).map(|(_, info)| info)
    }

    fn bytes(&mut self, kind: OutputKind, most: u64) -> Result<Vec<u8>> {
        let (span, info) = self.tensor(kind)?;
        few(span, info, most).map_err(self.malformed)?;
        self.small.read(span)
    }

    fn malformed(&self, why: String) -> Error {
        (self.malformed)(why)
    }
}

/// A weight of a checkpoint that any program may have written.
#[derive(Debug)]
pub(crate) struct FoundWeight<'a> {
    /// Its name.
    pub name: &'a str,
    /// The number of the file that its codes are in.
    pub file: usize,
    /// Its 4-bit format with its layout, if it is in one of ours.
    pub codec: Option<Codec>,
    /// Its codes, or all of it.
    pub codes: &'a TensorInfo,
    /// What belongs to the codes.
    pub beside: Vec<&'a TensorInfo>,
}

impl FoundWeight<'_> {
    /// What it decodes to, if it is in one of our formats; `model` is the model's dtype.
    ///
    /// # Errors
    /// When its tensors don't fit each other.
    pub(crate) fn decoded<'a>(
        &self,
        source: &'a Source,
        tensors: &Tensors<'a>,
        small: &mut SmallTensors<'a>,
        model: FloatDtype,
    ) -> Option<Result<Input>> {
        let (codec, path) = (self.codec.as_ref()?, source.files[self.file].location.path());
        let malformed = |why: String| Error::malformed(path, format!("tensor {:?}: {why}", self.codes.name));
        let (name, parts) = (self.name, codec.tensors());
        let mut weight = Weight { name, codec, parts, tensors, small, own_table: false, malformed: &malformed };
        let own = bitsandbytes::codec_of(codec, &mut weight)
            .and_then(|codec| Ok((codec, bitsandbytes::has_other_nested_values(&codec, &mut weight)?)));
        Some(own.and_then(|(codec, own_table)| Weight { codec: &codec, own_table, ..weight }.decoded(model)))
    }
}

/// All weights of a checkpoint, with their tensors put together; from headers only.
pub(crate) fn weights(source: &Source) -> Vec<FoundWeight<'_>> {
    let (tensors, formats) = (Tensors::new(source), StoredFormat::all());
    let found = source.tensors().map(|(file, codes)| {
        let plain = || FoundWeight { name: &codes.name, file, codec: None, codes, beside: Vec::new() };
        stored_weight(&formats, &tensors, file, codes).unwrap_or_else(plain)
    });
    let mut weights: Vec<FoundWeight<'_>> = found.collect();
    let parts: HashSet<&str> = weights.iter().flat_map(|weight| &weight.beside).map(|info| &*info.name).collect();
    weights.retain(|weight| !parts.contains(&*weight.codes.name));
    weights
}

/// The weight in one of our formats whose codes a tensor is.
pub(crate) fn stored_weight<'a>(
    formats: &[StoredFormat],
    tensors: &Tensors<'a>,
    file: usize,
    codes: &'a TensorInfo,
) -> Option<FoundWeight<'a>> {
    let find = |name: &str| tensors.get(name).map(|(_, info)| info);
    let weights = formats.iter().filter_map(|stored| {
        let (name, beside) = stored.parts(codes, find)?;
        Some(FoundWeight { name, file, codec: Some(stored.codec), codes, beside })
    });
    // One format's tensors can be some of another's.
    weights.max_by_key(|weight| weight.beside.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Metadata, SourceFile};
    use crate::dtype::{Dtype, byte_len};
    use crate::format::{CodecOptions, FORMATS, Layout};
    use crate::store::{Identity, Location, Sha256Hash};

    /// A checkpoint with these tensors.
    fn checkpoint(tensors: Vec<TensorInfo>) -> Source {
        let (location, name) = (Location::from("checkpoint"), "model.safetensors".to_owned());
        let identity = Identity { len: 0, version: String::new(), sha256: None };
        let header_sha256 = Sha256Hash([0; 32]);
        let metadata = Metadata::new();
        let file = SourceFile { name, location: location.clone(), identity, header_sha256, metadata, tensors };
        Source::of_files(location, vec![file], None)
    }

    /// Two formats whose tensors can't be told apart fail here.
    #[test]
    fn weights_of_every_format_and_layout_are_found_as_what_they_are() {
        for format in FORMATS {
            let layouts = if format.layouts.is_empty() { &[Layout::CompressedTensors][..] } else { format.layouts };
            for (&layout, double_quant) in layouts.iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                let codec = format.codec(CodecOptions { layout, double_quant, ..CodecOptions::default() });
                let shape: &[u64] = if layout == Layout::GptOss { &[2, 16, 256] } else { &[16, 256] };
                let tensors = codec.output_tensors(FloatDtype::Bfloat16, shape).into_iter();
                let tensors = tensors.map(|tensor| {
                    let (name, dtype) = (format!("a_proj.weight{}", tensor.suffix), tensor.dtype.dtype(Dtype::BF16));
                    let len = byte_len(dtype, &tensor.shape).unwrap();
                    TensorInfo { name: name.into(), dtype, shape: tensor.shape.into(), offset: 0, len }
                });
                let source = checkpoint(tensors.collect());
                let found = weights(&source);
                let formats: Vec<_> = found.iter().map(|weight| weight.codec.map(|codec| codec.format)).collect();
                assert_eq!(formats, [Some(*format)], "{format:?} {layout:?}: {found:?}");
            }
        }
    }
}
