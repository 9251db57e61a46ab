//! What is planned with: the source's tensors, and what those decode to that are quantized themselves.
//!
//! Many models are published in eight or four bits only. Their weights decode to what the format's own library gives: see
//! docs/formats.md. Every kind of codes is found in `coded.rs`; what becomes of each is in a file of its own, but for the formats
//! that are written too, which the reader of converted checkpoints reads.

mod coded;
mod floats;
mod integers;

use std::collections::HashSet;

use crate::checkpoint::{CONFIG_NAME, Source, SourceFile, TensorInfo};
use crate::dtype::Dtype;
use crate::error::{Error, Result, Warning};
use crate::read::{Input, SmallTensors, Span};
pub(crate) use coded::{Coded, CodedKind, CodedWeight};
use floats::Rules;
use integers::{Contents, Integers, Packing, Settings};

/// The source's tensors in their order, decoded where they are coded; scales are part of what they scale. Codes of four bits are
/// decoded if `four_bits` is set. Also what a user should know of how they decode.
///
/// # Errors
/// When what a coded tensor decodes by is missing, or doesn't fit.
pub(crate) fn inputs(source: &Source, four_bits: bool) -> Result<(Vec<Input>, Vec<Warning>)> {
    let mut decoder = Decoder::new(source);
    let mut beside: HashSet<String> = HashSet::new();
    let mut inputs = Vec::new();
    for (file, source_file) in source.files.iter().enumerate() {
        for (tensor, info) in source_file.tensors.iter().enumerate() {
            let place = Span { file, tensor, offset: info.offset, len: info.len };
            match decoder.coded.weight(file, info).filter(|weight| four_bits || !weight.has_four_bits()) {
                Some(weight) => {
                    inputs.push(decoder.decoded(source_file, &weight, place)?);
                    beside.extend(weight.names().skip(1).map(std::borrow::Cow::into_owned));
                }
                None => inputs.push(Input::as_stored(info, place)),
            }
        }
    }
    inputs.retain(|input| input.read.is_decoded() || !beside.contains(&*input.name));
    match inputs.iter().find(|input| !input.read.is_decoded() && input.dtype == Dtype::F8_E4M3) {
        Some(input) => {
            let path = source.files[input.read.first_file()].location.path();
            Err(Error::malformed(path, format!("tensor {:?}: it is F8_E4M3, and its scales are missing", input.name)))
        }
        None => Ok((inputs, decoder.warnings)),
    }
}

/// What coded weights of one source decode by.
struct Decoder<'a> {
    source: &'a Source,
    coded: Coded<'a>,
    rules: Rules,
    settings: Settings,
    small: SmallTensors<'a>,
    warnings: Vec<Warning>,
}

impl<'a> Decoder<'a> {
    fn new(source: &'a Source) -> Decoder<'a> {
        let (coded, small) = (Coded::new(source), SmallTensors::new(source));
        let (rules, settings) = (Rules::of(source), Settings::of(source));
        Decoder { source, coded, rules, settings, small, warnings: Vec::new() }
    }

    /// What a coded weight decodes to; `place` is that of its codes.
    fn decoded(&mut self, file: &SourceFile, weight: &CodedWeight<'a>, place: Span) -> Result<Input> {
        let info = weight.codes;
        match &weight.kind {
            CodedKind::Stored(stored) => {
                let decoded = stored.decoded(self.source, &self.coded.tensors, &mut self.small, self.rules.model);
                decoded.unwrap_or_else(|| Err(Error::internal(format!("tensor {:?} is in no format", info.name))))
            }
            CodedKind::Fp8(scale) => {
                floats::fp8(&self.rules, info, place, *scale).map_err(|why| malformed(file, info, &why))
            }
            CodedKind::Cast => {
                if self.warnings.is_empty() {
                    self.warnings.push(
                        format!("F8_E4M3 tensors, such as {:?}, have no scales: taken as cast, and decoded to what they are", info.name)
                            .into(),
                    );
                }
                floats::cast(&self.rules, info, place).map_err(|why| malformed(file, info, &why))
            }
            CodedKind::Fp4InBytes(scale) => {
                floats::fp4_in_bytes(&self.rules, info, place, *scale).map_err(|why| malformed(file, info, &why))
            }
            CodedKind::Integers(integers) => self.integers(file, info, integers),
        }
    }

    fn integers(&mut self, file: &SourceFile, info: &TensorInfo, integers: &Integers<'a>) -> Result<Input> {
        if let Some(format) = self.settings.unknown_format() {
            let why = format!(
                "its \"checkpoint_format\" is {format:?}: expected \"gptq\" or \"gptq_v2\", whose tensors are laid out in a way that \
                 is known"
            );
            return Err(Error::malformed(self.source.location.join(CONFIG_NAME).path(), why));
        }
        let (zeros, order) = integers.to_read();
        let order = order.map(|order| self.small.read(order)).transpose()?;
        let contents = Contents { zeros: self.small.read(zeros)?, order };
        let (version, contradicts) = self.settings.version(&contents.zeros);
        if contradicts && self.warnings.is_empty() && integers.packing == Packing::Gptq {
            self.warnings.push(
                format!(
                    "config.json's \"checkpoint_format\" contradicts the zero points: those of {:?} are stored as GPTQ's version \
                     {version:?} stores symmetric ones, and decode as such",
                    integers.module
                )
                .into(),
            );
        }
        integers.decoded(&self.settings, &contents, version).map_err(|why| malformed(file, info, &why))
    }
}

fn malformed(file: &SourceFile, info: &TensorInfo, why: &str) -> Error {
    Error::malformed(file.location.path(), format!("tensor {:?}: {why}", info.name))
}
