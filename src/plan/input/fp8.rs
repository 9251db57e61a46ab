//! FP8 weights with a scale for each block of rows and columns, as they decode.

use serde_json::Value;

use crate::checkpoint::{Source, TensorInfo};
use crate::dtype::{self, Dtype, FloatDtype};
use crate::format::{Coding, ElementCode, Highest, ScaleCode};
use crate::layout::recognize;
use crate::read::{Decode, Input, MAX_EXPERTS, Read, Span};

/// The fewest columns that share a scale: with fewer, scales would take more room than what they scale.
const LEAST_COLUMNS: u64 = 16;

/// A weight `[.., rows, columns]` with a scale for each block.
///
/// # Errors
/// When its scales don't fit.
pub(super) fn decoded(
    source: &Source,
    info: &TensorInfo,
    codes: Span,
    (scales, scale): (Span, &TensorInfo),
    dtype: FloatDtype,
) -> Result<Input, String> {
    let scale_code = scale_code(scale)?;
    let (matrices, rows, columns) = matrices(info)?;
    let [group_rows, group] = block(source, info, scale)?;
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

fn scale_code(scale: &TensorInfo) -> Result<ScaleCode, String> {
    match scale.dtype {
        Dtype::F32 => Ok(ScaleCode::Float(FloatDtype::Float32)),
        Dtype::BF16 => Ok(ScaleCode::Float(FloatDtype::Bfloat16)),
        Dtype::F8_E8M0 => Ok(ScaleCode::E8m0(Highest::Nan)),
        Dtype::U8 => Ok(ScaleCode::E8m0(Highest::Infinite)),
        other => Err(format!("its scale {:?} is {other}: expected F32, BF16, F8_E8M0 or U8", scale.name)),
    }
}

/// How many matrices it is, and the rows and columns of each.
fn matrices(info: &TensorInfo) -> Result<(u64, u64, u64), String> {
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
    Ok((matrices, rows, columns))
}

/// Rows and columns that share a scale: config.json's if scales are as many as that gives, or what they divide the weight into.
fn block(source: &Source, info: &TensorInfo, scale: &TensorInfo) -> Result<[u64; 2], String> {
    let (matrices, rows, columns) = matrices(info)?;
    let outer = &info.shape[..info.shape.len() - 2];
    let grid = match &scale.shape[..] {
        // One for all.
        [] | [1] if matrices == 1 => [1, 1],
        [before @ .., rows, columns] if before == outer => [*rows, *columns],
        _ => [0, 0],
    };
    let block = block_of_config(source);
    let of_config = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    let evenly = grid.iter().zip([rows, columns]).all(|(&grid, all)| grid > 0 && all.is_multiple_of(grid));
    let found = match grid {
        grid if grid == of_config => block,
        [a, b] if evenly => [rows / a, columns / b],
        _ => {
            return Err(format!(
                "its scale {:?} has the shape {:?}, which doesn't divide {:?} into blocks; expected {outer:?} and \
                 {of_config:?} for blocks of {block:?}",
                scale.name, scale.shape, info.shape
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

/// Rows and columns that share a scale, by config.json; DeepSeek-V3's where it doesn't say.
fn block_of_config(source: &Source) -> [u64; 2] {
    let config = source.config.as_ref().and_then(recognize::quantization_config);
    let block = config.and_then(|(_, config)| config.get("weight_block_size")?.as_array());
    match block.map(|block| block.iter().filter_map(Value::as_u64).collect::<Vec<_>>()).as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 => [rows, columns],
        _ => [128, 128],
    }
}
