//! gpt-oss's experts, as they decode.

use crate::checkpoint::TensorInfo;
use crate::dtype::{Dtype, FloatDtype};
use crate::format::{Coding, ElementCode, Highest, ScaleCode};
use crate::layout::gpt_oss;
use crate::read::{Decode, Input, MAX_EXPERTS, Read, Span};

/// Blocks `[experts, rows, groups, 16]` and scales `[experts, rows, groups]` of the experts called `name`, which decode to what
/// transformers' model has, `[experts, columns, rows]`.
pub(super) fn decoded(
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
