//! Weights whose codes the target holds as they are: copied into its layout, not quantized again.

use std::collections::HashMap;

use super::scan::Scan;
use super::{Decision, PlannedTensor, rescale, scale_sets};
use crate::checkpoint::Source;
use crate::error::{Error, Hint, Result, Warning};
use crate::format::{Codec, Coding, ElementCode, ScaleCode};
use crate::layout::OutputKind;
use crate::layout::compressed_tensors::{ZERO_POINT_ROWS, shape_bytes};
use crate::manifest::Carried;
use crate::read::{Decode, Read};

/// Whether what is read are codes of four bits.
pub(crate) fn has_four_bits(read: &Read) -> bool {
    read.is_decoded() && matrices(read).is_none_or(|all| all.iter().all(|one| one.coding.element != ElementCode::E4m3))
}

/// The matrices that an expression is of, one after the other, if it is of nothing else.
fn matrices(read: &Read) -> Option<Vec<&Decode>> {
    let all = read.parts().iter().map(|part| match part {
        Read::Decode(matrix) => Some(&**matrix),
        _ => None,
    });
    all.collect()
}

/// Puts the bytes of their outputs in place of what carried weights decode to; those that share a global scale get the same one.
///
/// # Errors
/// When the target doesn't hold what one of them decodes to.
pub(crate) fn carry_over(source: &Source, tensors: &mut [PlannedTensor], codec: &Codec) -> Result<Vec<Warning>> {
    let carried: Vec<usize> = (0..tensors.len()).filter(|&i| tensors[i].is_carried()).collect();
    for &i in &carried {
        if let Some(why) = why_not(source, &tensors[i], codec)? {
            return Err(refused(source, &tensors[i], why));
        }
    }
    let mut warnings = Vec::new();
    let mut scales: HashMap<usize, rescale::Rescaled> = HashMap::new();
    if codec.has_tensor_scale() && !carried.is_empty() {
        for set in scale_sets::sets(tensors) {
            if !set.iter().any(|&i| tensors[i].is_carried()) {
                continue;
            }
            if let Some(&other) = set.iter().find(|&&i| !tensors[i].is_carried()) {
                let why = format!(
                    "clients load it with {:?}, which isn't quantized, and both share a global scale",
                    tensors[other].name
                );
                return Err(refused(source, &tensors[set[0]], why));
            }
            let members: Vec<&Read> = set.iter().map(|&i| &tensors[i].read).collect();
            let rescaled = rescale::set(source, &members, codec)?;
            let rescaled = rescaled.map_err(|(member, why)| refused(source, &tensors[set[member]], why))?;
            scales.extend(set.into_iter().zip(rescaled));
        }
        warnings.extend(rescale::warning(scales.values()));
    }
    for i in carried {
        let tensor = &mut tensors[i];
        let from = tensor.read.parts().first().map(name_of).unwrap_or_default();
        let (how, parts) = match scales.remove(&i) {
            Some(rescaled) => (rescaled.carried, parts(tensor, Some(rescaled))),
            None => (Carried::Lossless, parts(tensor, None)),
        };
        tensor.decision = Decision::Carry(how);
        tensor.reason = match how {
            Carried::Lossless => format!("codes of the source's {from} carried over, lossless").into(),
            Carried::ScalesRounded => {
                format!("codes of the source's {from} carried over; scales rounded to the global scale of its set")
                    .into()
            }
        };
        tensor.read = Read::concat(parts);
    }
    Ok(warnings)
}

/// What the codes of a part are called.
fn name_of(part: &Read) -> String {
    match part {
        Read::Decode(matrix) => coding_name(&matrix.coding),
        _ => String::new(),
    }
}

fn coding_name(Coding { element, scale, group, .. }: &Coding) -> String {
    let name = match (element, scale) {
        (ElementCode::Int { zero_point: false }, _) => "INT4",
        (ElementCode::Int { zero_point: true }, _) => "INT4 with zero points",
        (ElementCode::E2m1, ScaleCode::E4m3) => "NVFP4",
        (ElementCode::E2m1, ScaleCode::E8m0(_)) => "MXFP4",
        (ElementCode::E2m1, _) => "FP4",
        (ElementCode::Codebook(_), _) => return format!("bitsandbytes' codes in blocks of {group}"),
        (ElementCode::E4m3, _) => "FP8",
    };
    format!("{name} in groups of {group}")
}

/// What is in the way of a weight's codes, if anything is. Zero points are read where it depends on them.
///
/// # Errors
/// Those of reading.
fn why_not(source: &Source, tensor: &PlannedTensor, codec: &Codec) -> Result<Option<String>> {
    let Some(all) = matrices(&tensor.read) else {
        return Ok(Some("its rows or columns stand in another order".to_owned()));
    };
    let target = codec.coding(tensor.columns(), None);
    for matrix in all {
        let coding = &matrix.coding;
        if !(is_stored_alike(matrix, tensor.columns(), codec) && has_the_scales(coding, &target)) {
            let order = if matrix.order.is_some() { ", in an order of their own" } else { "" };
            return Ok(Some(format!("it is {}{order}, and not {}", coding_name(coding), coding_name(&target))));
        }
        let fits = match (coding.element, target.element) {
            (ElementCode::Int { zero_point: true }, ElementCode::Int { zero_point: false }) => {
                has_zero_points_of_8(source, matrix)?
            }
            (ElementCode::Int { zero_point: false }, ElementCode::Int { zero_point: true }) => {
                matrix.rows.is_multiple_of(ZERO_POINT_ROWS)
            }
            (found, expected) => found == expected,
        };
        if !fits {
            return Ok(Some(format!("it is {}, and not {}", coding_name(coding), coding_name(&target))));
        }
    }
    Ok(None)
}

/// Whether codes lie as the target has them.
fn is_stored_alike(matrix: &Decode, columns: u64, codec: &Codec) -> bool {
    (matrix.columns, matrix.group_rows, matrix.row_len) == (columns, 1, codec.packed_row(columns))
        && matrix.order.is_none()
        && matrix.nested.is_none()
}

/// Whether the target can have its scales.
fn has_the_scales(coding: &Coding, target: &Coding) -> bool {
    let same_scale = match (coding.scale, target.scale) {
        (ScaleCode::SourceFloat, ScaleCode::SourceFloat) | (ScaleCode::E4m3, ScaleCode::E4m3) => true,
        (ScaleCode::E8m0(_), ScaleCode::E8m0(_)) => true,
        // Groups of 32 are two of 16.
        (ScaleCode::E8m0(_), ScaleCode::E4m3) => coding.group == 32,
        _ => false,
    };
    same_scale && (coding.group == target.group || target.scale == ScaleCode::E4m3)
}

/// Two zero points of 8, which is what integers without zero points stand for: GPTQ and AWQ store them all the same.
const ZERO_POINTS_OF_8: u8 = 0x88;

fn has_zero_points_of_8(source: &Source, matrix: &Decode) -> Result<bool> {
    match &matrix.zero_points {
        Some(points) => Scan::new(source).is_all(points, ZERO_POINTS_OF_8),
        None => Ok(true),
    }
}

/// Its zero points in compressed-tensors' layout; of integers without any, those that stand for the same.
fn zero_points(matrix: &Decode) -> Read {
    const PIECE: u64 = 1 << 16;
    if let Some(points) = &matrix.zero_points {
        return points.clone();
    }
    let len = matrix.rows / ZERO_POINT_ROWS * (matrix.columns / matrix.coding.group as u64) * 4;
    let piece = |len: u64| Read::Literal(vec![ZERO_POINTS_OF_8; len as usize].into());
    let (whole, rest) = (piece(PIECE.min(len)), len % PIECE);
    let pieces = (0..len / PIECE).map(|_| whole.clone());
    Read::concat(pieces.chain((rest > 0).then(|| piece(rest))))
}

fn refused(source: &Source, tensor: &PlannedTensor, why: String) -> Error {
    let path = source.files[tensor.read.first_file()].location.path().to_owned();
    let evidence = format!("tensor {:?}: {why}, so that its codes can't be carried over", tensor.name);
    let method = name_of(&tensor.read.parts()[0]);
    let method = if method.is_empty() { "4 bits".to_owned() } else { method };
    Error::AlreadyQuantized { path, method, evidence, hint: Some(Hint::DequantizeSource) }
}

/// The bytes of each of a weight's outputs.
fn parts(tensor: &PlannedTensor, rescaled: Option<rescale::Rescaled>) -> Vec<Read> {
    let all = matrices(&tensor.read).unwrap_or_default();
    let of_all = |part: &dyn Fn(&Decode) -> Option<Read>| Read::concat(all.iter().filter_map(|matrix| part(matrix)));
    let (scales, global) = match rescaled {
        Some(rescaled) => (Some(rescaled.scales), Some(rescaled.global)),
        None => (None, None),
    };
    let part = |kind| match kind {
        Some(OutputKind::Packed) => of_all(&|matrix| Some(matrix.codes.clone())),
        Some(OutputKind::Scale) => match &scales {
            Some(scales) => scales.clone(),
            None => of_all(&|matrix| Some(matrix.scales.clone())),
        },
        Some(OutputKind::ZeroPoint) => of_all(&|matrix| Some(zero_points(matrix))),
        Some(OutputKind::GlobalScale) => Read::Literal(global.unwrap_or(1.0).to_le_bytes().into()),
        Some(OutputKind::Shape) => Read::Literal(shape_bytes(&tensor.shape).into()),
        _ => unreachable!("formats of groups have no other parts"),
    };
    tensor.outputs.iter().map(|output| part(output.kind)).collect()
}
