//! What is planned with: the source's tensors, and what those decode to that are quantized themselves.
//!
//! DeepSeek-V3's weights are FP8 with a scale for each block of 128 by 128; gpt-oss's experts are MXFP4. Their hubs have no
//! others. They decode to what transformers' own dequantization gives.

use std::collections::HashSet;

use serde_json::Value;

use crate::checkpoint::{Source, TensorInfo};
use crate::dtype::{self, Dtype, FloatDtype};
use crate::error::{Error, Hint, Result, Setting};
use crate::format::{Coding, ElementCode, Highest, ScaleCode};
use crate::layout::gpt_oss::{self, BLOCKS, SCALES};
use crate::layout::recognize::{self, FP8_INPUT_SCALES, FP8_SCALE};
use crate::layout::{FP8_METHOD, MXFP4_METHOD, SourceQuantization};
use crate::read::{Decode, Input, MAX_EXPERTS, Read, Span, Tensors};
use crate::recipe::Recipe;

/// The fewest columns that share a scale: with fewer, scales would take more room than what they scale.
const LEAST_FP8_BLOCK: u64 = 16;

/// # Errors
/// When the source is quantized, and not as FP8 blocks; or as gpt-oss's experts, and the recipe doesn't have it decoded.
pub(crate) fn check_quantization(source: &Source, recipe: &Recipe) -> Result<()> {
    let Some((path, SourceQuantization { method, evidence })) = recognize::of(source) else {
        return if recipe.dequantize_source {
            let (setting, why) = (Setting::DequantizeSource, "has no effect: the source isn't quantized".to_owned());
            Err(Error::Options { setting, value: None, why, hint: Some(Hint::Remove(setting)) })
        } else {
            Ok(())
        };
    };
    let ends = |end: &'static str| source.tensors().filter_map(move |(_, info)| info.name.strip_suffix(end));
    let method_is = |name: &str| {
        source.config.as_ref().and_then(SourceQuantization::in_config).is_none_or(|found| found.method == name)
    };
    // No tensor may be of another method.
    let only = |own: &str| {
        source.tensors().all(|(_, info)| SourceQuantization::by_name(&info.name).is_none_or(|method| method == own))
    };
    let fp8 = source.tensors().filter(|(_, info)| info.dtype == Dtype::F8_E4M3);
    let fp8: HashSet<&str> = fp8.map(|(_, info)| info.name.as_str()).collect();
    let has_fp8 = ends(FP8_SCALE).next().is_some() && ends(FP8_SCALE).all(|weight| fp8.contains(weight));
    let is_fp8 = has_fp8 && method_is("fp8") && only(FP8_METHOD);
    let is_mxfp4 = has_mxfp4_experts(source) && method_is("mxfp4") && only(MXFP4_METHOD);
    let hint = match (is_fp8, is_mxfp4, recipe.dequantize_source) {
        (true, false, _) | (false, true, true) => return Ok(()),
        (false, true, false) => Some(Hint::DequantizeSource),
        _ => None,
    };
    Err(Error::AlreadyQuantized { path, method, evidence, hint })
}

/// Whether experts are in MXFP4, as gpt-oss's.
pub(crate) fn has_mxfp4_experts(source: &Source) -> bool {
    let is = |name: &str, end| name.strip_suffix(end).is_some_and(|name| name.ends_with("_proj"));
    let has = |end| source.tensors().any(|(_, info)| is(&info.name, end));
    has(BLOCKS) && has(SCALES)
}

/// The source's tensors in their order, decoded where they are coded; scales are part of what they scale.
///
/// # Errors
/// When a coded tensor's scales are missing, or don't fit.
pub(crate) fn inputs(source: &Source, recipe: &Recipe) -> Result<Vec<Input>> {
    let places = Tensors::new(source);
    let dtype = source.model_dtype();
    let mut beside: HashSet<(usize, usize)> = HashSet::new();
    let mut inputs = Vec::new();
    for (file, source_file) in source.files.iter().enumerate() {
        for (tensor, info) in source_file.tensors.iter().enumerate() {
            let place = Span { file, tensor, offset: info.offset, len: info.len };
            let error = |why: String| {
                let why = format!("tensor {:?}: {why}", info.name);
                Err(Error::malformed(source_file.location.path(), why))
            };
            let decoded = match (info.dtype, info.name.strip_suffix(BLOCKS)) {
                (Dtype::F8_E4M3, _) => match places.get(&format!("{}{FP8_SCALE}", info.name)) {
                    Some(scale) => Some(fp8(source, info, place, scale, dtype)),
                    None => {
                        return error(format!(
                            "it is F8_E4M3, and its scales (\"{}{FP8_SCALE}\") are missing",
                            info.name
                        ));
                    }
                },
                (Dtype::U8, Some(name)) if recipe.dequantize_source => match places.get(&format!("{name}{SCALES}")) {
                    Some(scales) => Some(mxfp4(name, info, place, scales, dtype)),
                    None => return error(format!("{name:?}'s scales (\"{name}{SCALES}\") are missing")),
                },
                _ => None,
            };
            match decoded {
                Some(Ok(input)) => {
                    let spans = input.read.spans().map(|span| (span.file, span.tensor));
                    beside.extend(spans.filter(|found| *found != (file, tensor)));
                    let module = info.name.strip_suffix(".weight").unwrap_or(&info.name);
                    let scales = FP8_INPUT_SCALES.iter().filter_map(|end| places.get(&format!("{module}{end}")));
                    beside.extend(scales.map(|(place, _)| (place.file, place.tensor)));
                    inputs.push(input);
                }
                Some(Err(why)) => return error(why),
                None => inputs.push(Input::as_stored(info, place)),
            }
        }
    }
    inputs.retain(|input| {
        input.read.is_decoded() || !input.read.spans().any(|span| beside.contains(&(span.file, span.tensor)))
    });
    Ok(inputs)
}

/// Rows and columns that share a scale, by config.json; DeepSeek-V3's where it doesn't say.
fn block_of_config(source: &Source) -> [u64; 2] {
    let config = source.config.as_ref().and_then(|config| config.values().get("quantization_config"));
    let block = config.and_then(|config| config.get("weight_block_size")?.as_array());
    match block.map(|block| block.iter().filter_map(Value::as_u64).collect::<Vec<_>>()).as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 => [rows, columns],
        _ => [128, 128],
    }
}

/// An FP8 weight `[.., rows, columns]` with a scale for each block.
fn fp8(
    source: &Source,
    info: &TensorInfo,
    codes: Span,
    (scales, scale): (Span, &TensorInfo),
    dtype: FloatDtype,
) -> Result<Input, String> {
    let scale_code = match scale.dtype {
        Dtype::F32 => ScaleCode::Float(FloatDtype::Float32),
        Dtype::BF16 => ScaleCode::Float(FloatDtype::Bfloat16),
        Dtype::F8_E8M0 => ScaleCode::E8m0(Highest::Nan),
        Dtype::U8 => ScaleCode::E8m0(Highest::Infinite),
        other => return Err(format!("its scale {:?} is {other}: expected F32, BF16, F8_E8M0 or U8", scale.name)),
    };
    let &[ref outer @ .., rows, columns] = &info.shape[..] else {
        return Err(format!("FP8 with a shape of {:?}: expected a matrix", info.shape));
    };
    let matrices = dtype::elements(outer).unwrap_or(u64::MAX);
    if matrices > MAX_EXPERTS || info.shape.contains(&0) {
        return Err(format!(
            "its shape is {:?}: more than {MAX_EXPERTS} matrices, or none with an element",
            info.shape
        ));
    }
    let grid = match &scale.shape[..] {
        // One for all.
        [] | [1] if matrices == 1 => [1, 1],
        [before @ .., rows, columns] if before == outer => [*rows, *columns],
        _ => [0, 0],
    };
    let block = block_of_config(source);
    let of_config = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    let evenly = grid.iter().zip([rows, columns]).all(|(&grid, all)| grid > 0 && all > 0 && all.is_multiple_of(grid));
    let [group_rows, group] = match grid {
        grid if grid == of_config && rows > 0 && columns > 0 => block,
        [a, b] if evenly => [rows / a, columns / b],
        _ => {
            return Err(format!(
                "its scale {:?} has the shape {:?}, which doesn't divide {:?} into blocks; expected {outer:?} and \
                 {of_config:?} for blocks of {block:?}",
                scale.name, scale.shape, info.shape
            ));
        }
    };
    if group < LEAST_FP8_BLOCK.min(columns) {
        return Err(format!("blocks of {group} columns: expected {LEAST_FP8_BLOCK} or more"));
    }
    let coding = Coding::new(ElementCode::E4m3, scale_code, group as usize);
    // Each matrix begins with a scale of its own, whole blocks or not.
    let matrix = |which: u64| {
        let (codes_len, scales_len) = (codes.len / matrices, scales.len / matrices);
        Read::decode(Decode {
            coding,
            dtype,
            rows,
            columns,
            row_len: columns,
            group_rows,
            codes: codes.part(which * codes_len, codes_len),
            scales: scales.part(which * scales_len, scales_len),
            zero_points: None,
            nested: None,
        })
    };
    let all = (0..matrices).map(matrix).collect::<Result<Vec<_>, _>>()?;
    Ok(Input::decoded(info.name.clone(), info.shape.clone(), dtype, Read::concat(all)))
}

/// gpt-oss's experts: blocks `[experts, rows, groups, 16]` and scales `[experts, rows, groups]` decode to what transformers'
/// model has, `[experts, columns, rows]`.
fn mxfp4(
    name: &str,
    blocks: &TensorInfo,
    codes: Span,
    (scales, scale): (Span, &TensorInfo),
    dtype: FloatDtype,
) -> Result<Input, String> {
    let shape = gpt_oss::shape_of(&blocks.shape, &scale.shape).filter(|_| scale.dtype == Dtype::U8);
    let Some([experts, rows, columns]) = shape else {
        return Err(format!(
            "its shape is {:?} and {} {:?} that of its scales {:?}; expected [experts, rows, groups, 16] and U8 \
             [experts, rows, groups]",
            blocks.shape, scale.dtype, scale.shape, scale.name
        ));
    };
    if experts > MAX_EXPERTS || [experts, rows, columns].contains(&0) {
        return Err(format!(
            "its shape is {:?}: more than {MAX_EXPERTS} experts, or none with an element",
            blocks.shape
        ));
    }
    let decode = Decode {
        coding: Coding::new(ElementCode::E2m1, ScaleCode::E8m0(Highest::Finite), 32),
        dtype,
        rows: experts * rows,
        columns,
        row_len: columns / 2,
        group_rows: 1,
        codes,
        scales,
        zero_points: None,
        nested: None,
    };
    Ok(Input::decoded(name.to_owned(), vec![experts, rows, columns], dtype, Read::decode(decode)?).transposed())
}
