//! What is planned with: the source's tensors, and what those decode to that are quantized themselves.
//!
//! Many models are published in eight or four bits only. Their weights decode to what the format's own library gives: see
//! docs/formats.md. Every kind of codes is found in `coded.rs`; what becomes of each is in a file of its own, but for the formats
//! that are written too, which the reader of converted checkpoints reads.

mod coded;
mod floats;

use std::collections::HashSet;

use crate::checkpoint::{Source, SourceFile, TensorInfo};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::read::{Input, SmallTensors, Span};
pub(crate) use coded::{Coded, CodedKind, CodedWeight};
use floats::Rules;

/// The source's tensors in their order, decoded where they are coded; scales are part of what they scale. Codes of four bits are
/// decoded if `four_bits` is set.
///
/// # Errors
/// When what a coded tensor decodes by is missing, or doesn't fit.
pub(crate) fn inputs(source: &Source, four_bits: bool) -> Result<Vec<Input>> {
    let (coded, rules, mut small) = (Coded::new(source), Rules::of(source), SmallTensors::new(source));
    let mut beside: HashSet<String> = HashSet::new();
    let mut inputs = Vec::new();
    for (file, source_file) in source.files.iter().enumerate() {
        for (tensor, info) in source_file.tensors.iter().enumerate() {
            let place = Span { file, tensor, offset: info.offset, len: info.len };
            match coded.weight(file, info).filter(|weight| four_bits || !weight.has_four_bits()) {
                Some(weight) => {
                    inputs.push(decoded(source, source_file, &coded, &rules, &mut small, &weight, place)?);
                    beside.extend(weight.names().skip(1).map(std::borrow::Cow::into_owned));
                }
                None => inputs.push(Input::as_stored(info, place)),
            }
        }
    }
    inputs.retain(|input| input.read.is_decoded() || !beside.contains(&input.name));
    match inputs.iter().find(|input| !input.read.is_decoded() && input.dtype == Dtype::F8_E4M3) {
        Some(input) => {
            let path = source.files[input.read.first_file()].location.path();
            Err(Error::malformed(path, format!("tensor {:?}: it is F8_E4M3, and its scales are missing", input.name)))
        }
        None => Ok(inputs),
    }
}

/// What a coded weight decodes to; `place` is that of its codes.
fn decoded<'a>(
    source: &'a Source,
    file: &SourceFile,
    coded: &Coded<'a>,
    rules: &Rules,
    small: &mut SmallTensors<'a>,
    weight: &CodedWeight<'a>,
    place: Span,
) -> Result<Input> {
    let info = weight.codes;
    match &weight.kind {
        CodedKind::Stored(stored) => {
            let decoded = stored.decoded(source, &coded.tensors, small, rules.model);
            decoded.unwrap_or_else(|| Err(Error::internal(format!("tensor {:?} is in no format", info.name))))
        }
        CodedKind::Fp8(scale) => floats::fp8(rules, info, place, *scale).map_err(|why| malformed(file, info, &why)),
        CodedKind::Fp4InBytes(scale) => {
            floats::fp4_in_bytes(rules, info, place, *scale).map_err(|why| malformed(file, info, &why))
        }
    }
}

fn malformed(file: &SourceFile, info: &TensorInfo, why: &str) -> Error {
    Error::malformed(file.location.path(), format!("tensor {:?}: {why}", info.name))
}
