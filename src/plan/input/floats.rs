//! Floats of eight and of four bits with a scale for each block of rows and columns, for each row, or for all of a weight.

use serde_json::Value;

use crate::checkpoint::{QUANT_CONFIG_NAME, Source, TensorInfo};
use crate::dtype::{self, Dtype, FloatDtype};
use crate::format::{Coding, ElementCode, Highest, ScaleCode};
use crate::layout::recognize;
use crate::read::{Decode, Input, MAX_EXPERTS, Read, Span};

/// The fewest columns that share a scale: with fewer, scales would take more room than what they scale.
const LEAST_COLUMNS: u64 = 16;

/// What decides how floats decode, of the whole source.
pub(super) struct Rules {
    /// The model's dtype.
    pub(super) model: FloatDtype,
    /// Rows and columns that share a scale, by config.json; DeepSeek-V3's where it doesn't say.
    block: [u64; 2],
    /// Whose rule it is where scales are called `weight_scale`.
    library: Library,
}

/// Whose rule.
#[derive(Clone, Copy, PartialEq)]
enum Library {
    /// Decodes to the dtype of 16-bit scales.
    CompressedTensors,
    /// Rounds scales to the model's dtype before it multiplies by them.
    Modelopt,
}

impl Rules {
    /// Of an opened source.
    pub(super) fn of(source: &Source) -> Rules {
        let config = source.config.as_ref().and_then(recognize::quantization_config).map(|(_, config)| config);
        let block = config.and_then(|config| config.get("weight_block_size")?.as_array());
        let block = match block.map(|block| block.iter().filter_map(Value::as_u64).collect::<Vec<_>>()).as_deref() {
            Some(&[rows, columns]) if rows > 0 && columns > 0 => [rows, columns],
            _ => [128, 128],
        };
        // Older versions of ModelOpt say it in a file of their own only.
        let is_modelopt = match config {
            Some(config) => config.get("quant_method").and_then(Value::as_str) == Some("modelopt"),
            None => source.left_out.iter().any(|left| left.name == QUANT_CONFIG_NAME),
        };
        let library = if is_modelopt { Library::Modelopt } else { Library::CompressedTensors };
        Rules { model: source.model_dtype(), block, library }
    }
}

/// E4M3 floats `[.., rows, columns]`.
///
/// # Errors
/// When their scales don't fit.
pub(super) fn fp8(rules: &Rules, info: &TensorInfo, codes: Span, scales: (Span, &TensorInfo)) -> Result<Input, String> {
    let (_, scale) = scales;
    let scale_code = scale_code(scale)?;
    let is_plain = scale.name.ends_with("_scale");
    let (scale_code, dtype) = match (scale_code, rules.library) {
        (ScaleCode::Float(FloatDtype::Float32), Library::Modelopt) if is_plain => (ScaleCode::RoundedF32, rules.model),
        (ScaleCode::Float(of_scales), Library::CompressedTensors) if is_plain && of_scales != FloatDtype::Float32 => {
            (scale_code, of_scales)
        }
        _ => (scale_code, rules.model),
    };
    decoded(rules, info, &info.shape, codes, scales, (ElementCode::E4m3, scale_code), dtype)
}

/// E4M3 floats that stand for themselves, of any shape.
///
/// # Errors
/// When they can't be decoded.
pub(super) fn cast(rules: &Rules, info: &TensorInfo, codes: Span) -> Result<Input, String> {
    let columns = info.shape.last().copied().unwrap_or(1);
    let (element, dtype, rows) = (ElementCode::E4m3, rules.model, codes.len / columns.max(1));
    let read = Read::decode(Decode {
        coding: Coding::new(element, ScaleCode::Float(FloatDtype::Float32), columns as usize),
        dtype,
        rows,
        columns,
        row_len: element.packed_row(columns),
        group_rows: rows,
        codes: Read::Bytes(codes),
        scales: Read::Literal(1f32.to_le_bytes().into()),
        zero_points: None,
        order: None,
        nested: None,
    })?;
    Ok(Input::decoded(info.name.clone(), info.shape.to_vec(), dtype, read))
}

/// E2M1 floats, two in a byte, the even column in its low half: `[.., rows, columns / 2]`.
///
/// # Errors
/// When their scales don't fit.
pub(super) fn fp4_in_bytes(
    rules: &Rules,
    info: &TensorInfo,
    codes: Span,
    scales: (Span, &TensorInfo),
) -> Result<Input, String> {
    let mut shape = info.shape.to_vec();
    if let Some(columns) = shape.last_mut() {
        *columns = columns.saturating_mul(2);
    }
    let scale_code = scale_code(scales.1)?;
    decoded(rules, info, &shape, codes, scales, (ElementCode::E2m1, scale_code), rules.model)
}

/// A weight of this shape with a scale for each block.
fn decoded(
    rules: &Rules,
    info: &TensorInfo,
    shape: &[u64],
    codes: Span,
    (scales, scale): (Span, &TensorInfo),
    (element, scale_code): (ElementCode, ScaleCode),
    dtype: FloatDtype,
) -> Result<Input, String> {
    let (matrices, rows, columns) = matrices(shape)?;
    let [group_rows, group] = block(rules, shape, scale)?;
    let coding = Coding::new(element, scale_code, group as usize);
    // Each matrix begins with a scale of its own, whole blocks or not.
    let matrix = |which: u64| {
        let (codes_len, scales_len) = (codes.len / matrices, scales.len / matrices);
        Read::decode(Decode {
            coding,
            dtype,
            rows,
            columns,
            row_len: element.packed_row(columns),
            group_rows,
            codes: Read::Bytes(codes.part(which * codes_len, codes_len)),
            scales: Read::Bytes(scales.part(which * scales_len, scales_len)),
            zero_points: None,
            order: None,
            nested: None,
        })
    };
    let all = (0..matrices).map(matrix).collect::<Result<Vec<_>, _>>()?;
    Ok(Input::decoded(info.name.clone(), shape, dtype, Read::concat(all)))
}

fn scale_code(scale: &TensorInfo) -> Result<ScaleCode, String> {
    match scale.dtype {
        Dtype::F8_E8M0 => Ok(ScaleCode::E8m0(Highest::Nan)),
        Dtype::U8 => Ok(ScaleCode::E8m0(Highest::Infinite)),
        other => FloatDtype::of(other)
            .map(ScaleCode::Float)
            .ok_or_else(|| format!("its scale {:?} is {other}: expected F32, BF16, F16, F8_E8M0 or U8", scale.name)),
    }
}

/// How many matrices a weight of this shape is, and the rows and columns of each.
fn matrices(shape: &[u64]) -> Result<(u64, u64, u64), String> {
    let &[ref outer @ .., rows, columns] = shape else {
        return Err(format!("codes with a shape of {shape:?}: expected a matrix"));
    };
    let matrices = dtype::elements(outer).unwrap_or(u64::MAX);
    if matrices > MAX_EXPERTS || shape.contains(&0) {
        return Err(format!("its shape is {shape:?}: more than {MAX_EXPERTS} matrices, or none with an element"));
    }
    Ok((matrices, rows, columns))
}

/// Rows and columns that share a scale: config.json's if scales are as many as that gives, or what they divide the weight into.
fn block(rules: &Rules, shape: &[u64], scale: &TensorInfo) -> Result<[u64; 2], String> {
    let (matrices, rows, columns) = matrices(shape)?;
    let outer = &shape[..shape.len() - 2];
    let grid = match &scale.shape[..] {
        // One for all, or one for each matrix.
        [] | [1] if matrices == 1 => [1, 1],
        each if each == outer => [1, 1],
        // One for each row.
        [before @ .., of_rows] if before == outer && *of_rows == rows => [rows, 1],
        // ModelOpt keeps the dimensions that it takes the largest magnitude of.
        [a, 1, b, 1] if outer.is_empty() => [*a, *b],
        [before @ .., a, b] if before == outer => [*a, *b],
        _ => [0, 0],
    };
    let of_config = [rows.div_ceil(rules.block[0]), columns.div_ceil(rules.block[1])];
    let evenly = grid.iter().zip([rows, columns]).all(|(&grid, all)| grid > 0 && all.is_multiple_of(grid));
    let found = match grid {
        grid if grid == of_config => rules.block,
        [a, b] if evenly => [rows / a, columns / b],
        _ => {
            return Err(format!(
                "its scale {:?} has the shape {:?}, which doesn't divide {shape:?} into blocks; expected {outer:?} and \
                 {of_config:?} for blocks of {:?}",
                scale.name, scale.shape, rules.block
            ));
        }
    };
    match found {
        [_, group] if group < LEAST_COLUMNS.min(columns) => {
            Err(format!("blocks of {group} columns: expected {LEAST_COLUMNS} or more"))
        }
        found => Ok(found),
    }
}
