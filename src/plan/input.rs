//! What is planned with: the source's tensors, and what those decode to that are quantized themselves.
//!
//! DeepSeek-V3's weights are FP8 with a scale for each block of 128 by 128; gpt-oss's experts are MXFP4. Their hubs have no
//! others. They decode to what transformers' own dequantization gives.

mod fp8;
mod mxfp4;

use std::collections::HashSet;

use crate::checkpoint::{Source, SourceFile, TensorInfo};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::layout::gpt_oss::{BLOCKS, SCALES};
use crate::layout::recognize::{FP8_INPUT_SCALES, FP8_SCALE};
use crate::read::{Input, Span, Tensors};
use crate::recipe::Recipe;

/// The source's tensors in their order, decoded where they are coded; scales are part of what they scale.
///
/// # Errors
/// When a coded tensor's scales are missing, or don't fit.
pub(crate) fn inputs(source: &Source, recipe: &Recipe) -> Result<Vec<Input>> {
    let places = Tensors::new(source);
    let mut beside: HashSet<(usize, usize)> = HashSet::new();
    let mut inputs = Vec::new();
    for (file, source_file) in source.files.iter().enumerate() {
        for (tensor, info) in source_file.tensors.iter().enumerate() {
            let place = Span { file, tensor, offset: info.offset, len: info.len };
            let decoded = decoded(source, recipe, &places, place, info);
            match decoded.map_err(|why| malformed(source_file, info, &why))? {
                Some(input) => {
                    let spans = input.read.spans().map(|span| (span.file, span.tensor));
                    beside.extend(spans.filter(|found| *found != (file, tensor)));
                    let module = info.name.strip_suffix(".weight").unwrap_or(&info.name);
                    let scales = FP8_INPUT_SCALES.iter().filter_map(|end| places.get(&format!("{module}{end}")));
                    beside.extend(scales.map(|(place, _)| (place.file, place.tensor)));
                    inputs.push(input);
                }
                None => inputs.push(Input::as_stored(info, place)),
            }
        }
    }
    inputs.retain(|input| {
        input.read.is_decoded() || !input.read.spans().any(|span| beside.contains(&(span.file, span.tensor)))
    });
    Ok(inputs)
}

/// What a tensor decodes to, if it is coded.
fn decoded(
    source: &Source,
    recipe: &Recipe,
    places: &Tensors<'_>,
    place: Span,
    info: &TensorInfo,
) -> Result<Option<Input>, String> {
    let dtype = source.model_dtype();
    match (info.dtype, info.name.strip_suffix(BLOCKS)) {
        (Dtype::F8_E4M3, _) => {
            let scale = format!("{}{FP8_SCALE}", info.name);
            let scale =
                places.get(&scale).ok_or_else(|| format!("it is F8_E4M3, and its scales (\"{scale}\") are missing"))?;
            fp8::decoded(source, info, place, scale, dtype).map(Some)
        }
        (Dtype::U8, Some(name)) if recipe.dequantize_source => {
            let scales = format!("{name}{SCALES}");
            let scales = places.get(&scales).ok_or_else(|| format!("{name:?}'s scales (\"{scales}\") are missing"))?;
            mxfp4::decoded(name, info, place, scales, dtype).map(Some)
        }
        _ => Ok(None),
    }
}

fn malformed(file: &SourceFile, info: &TensorInfo, why: &str) -> Error {
    Error::malformed(file.location.path(), format!("tensor {:?}: {why}", info.name))
}
