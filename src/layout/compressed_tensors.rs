//! What a weight is in compressed-tensors' layout, which vLLM, SGLang and transformers read: the tensors in place of
//! `X.weight`, and config.json's part. As compressed-tensors 0.19.0 writes them.

use std::borrow::Cow;

use serde_json::{Value, json};

use crate::dtype::{Dtype, FloatDtype};
use crate::error::Result;
use crate::format::{Codec, Coding, ElementCode, GroupSize, ScaleCode, Scales, Sharing};
use crate::layout::reader::number;
use crate::layout::{OutputDtype, OutputKind, OutputTensor, Stored, StoredWeight};

/// The end of the codes' name, after the weight's.
pub(crate) const CODES: &str = "_packed";

/// The key of the modules left unquantized.
pub(crate) const KEPT_MODULES: &str = "ignore";

/// The key that stops transformers, whose compressed-tensors takes a number or null there; vLLM and SGLang don't read it.
pub(crate) const GUARD_KEY: &str = "global_compression_ratio";
/// What it is where transformers would make experts up. Its error shows 50 characters of it.
pub(crate) const RANDOM_EXPERTS: &str = "transformers would load random experts: use vLLM";
/// What it is where transformers would load NVFP4 experts without their global scales.
pub(crate) const MISREAD_EXPERTS: &str = "transformers misreads NVFP4 experts: use vLLM";

/// Rows whose zero points share an i32.
pub(crate) const ZERO_POINT_ROWS: u64 = 8;

/// The tensors that a weight `[rows, columns]`, of whole groups, becomes.
pub(crate) fn output_tensors(codec: &Codec, shape: &[u64]) -> Vec<OutputTensor> {
    let &[rows, columns] = shape else { unreachable!("only matrices are quantized in groups") };
    let groups = columns / codec.block_len(columns);
    let tensor = |kind, suffix, dtype, shape| OutputTensor { kind, suffix: Cow::Borrowed(suffix), dtype, shape };
    let (codes, per_element) = match codec.format.element {
        ElementCode::Int { .. } => (OutputDtype::I32, 8),
        ElementCode::E2m1 | ElementCode::Codebook(_) => (OutputDtype::U8, 2),
        ElementCode::E4m3 => (OutputDtype::F8E4M3, 1),
    };
    let scale = match codec.format.scale {
        ScaleCode::Float(dtype) => OutputDtype::Float(dtype),
        ScaleCode::RoundedF32 => OutputDtype::Float(FloatDtype::Float32),
        ScaleCode::SourceFloat => OutputDtype::Source,
        ScaleCode::E4m3 => OutputDtype::F8E4M3,
        ScaleCode::E8m0(_) => OutputDtype::U8,
    };
    let mut tensors = vec![
        tensor(OutputKind::Packed, CODES, codes, vec![rows, columns.div_ceil(per_element)]),
        tensor(OutputKind::Scale, "_scale", scale, vec![rows, groups]),
    ];
    if is_integer(codec) {
        tensors.push(tensor(OutputKind::Shape, "_shape", OutputDtype::I64, vec![2]));
    }
    if codec.has_zero_points() {
        let shape = vec![rows.div_ceil(ZERO_POINT_ROWS), groups];
        tensors.push(tensor(OutputKind::ZeroPoint, "_zero_point", OutputDtype::I32, shape));
    }
    if codec.has_tensor_scale() {
        tensors.push(tensor(
            OutputKind::GlobalScale,
            "_global_scale",
            OutputDtype::Float(FloatDtype::Float32),
            vec![1],
        ));
    }
    tensors
}

/// What a weight's tensors say of it: integers have their scales' dtype, and their shape in a tensor of its own; all else is bf16.
///
/// # Errors
/// When one is missing, or isn't what the others want.
pub(crate) fn read(codec: &Codec, weight: &mut dyn StoredWeight) -> Result<Stored> {
    let (codes, scale) = (weight.info(OutputKind::Packed)?, weight.info(OutputKind::Scale)?);
    let &[rows, packed] = &codes.shape[..] else {
        return Err(weight.malformed(format!("{:?} has the shape {:?}", codes.name, codes.shape)));
    };
    let dtype = match codec.format.scale {
        ScaleCode::SourceFloat => FloatDtype::of(scale.dtype)
            .ok_or_else(|| weight.malformed(format!("{:?} is {}", scale.name, scale.dtype)))?,
        ScaleCode::Float(_) | ScaleCode::RoundedF32 | ScaleCode::E4m3 | ScaleCode::E8m0(_) => FloatDtype::Bfloat16,
    };
    let groups = scale.shape.last().copied();
    let shape = if is_integer(codec) { shape(weight, [rows, packed])? } else { vec![rows, packed.saturating_mul(2)] };
    let scale = if codec.has_tensor_scale() { Some(number(weight, OutputKind::GlobalScale)?) } else { None };
    let stored = Stored::of_rows(weight, shape, dtype, |columns| codec.coding(columns, scale))?;
    match groups {
        // The group's size is in no tensor; who wrote it chose it.
        Some(groups @ 1..) if codec.format.sharing == Sharing::Groups => {
            let columns = stored.columns;
            if !columns.is_multiple_of(groups) {
                return Err(weight
                    .malformed(format!("its scales are {groups} for each row, which don't divide {columns} columns")));
            }
            Ok(Stored { coding: Coding { group: (columns / groups) as usize, ..stored.coding }, ..stored })
        }
        _ => Ok(stored),
    }
}

/// The shape of a weight of integers, of which a row's codes fill `packed` whole words.
fn shape(weight: &mut dyn StoredWeight, [rows, packed]: [u64; 2]) -> Result<Vec<u64>> {
    let is_short = weight.info(OutputKind::Shape)?.dtype == Dtype::I32;
    let bytes = weight.bytes(OutputKind::Shape, 16)?;
    let shape: Vec<u64> = match is_short {
        true => bytes.as_chunks().0.iter().map(|dimension| u32::from_le_bytes(*dimension).into()).collect(),
        false => bytes.as_chunks().0.iter().map(|dimension| u64::from_le_bytes(*dimension)).collect(),
    };
    match shape[..] {
        [of_shape, columns] if of_shape == rows && columns.div_ceil(8) == packed => Ok(shape),
        _ => Err(weight.malformed(format!(
            "its codes have the shape {:?} and its weight_shape says {shape:?}: expected eight codes of 4 bits in each word",
            [rows, packed]
        ))),
    }
}

/// Whether codes are integers, whose number in a row is in a tensor of its own.
pub(crate) fn is_integer(codec: &Codec) -> bool {
    matches!(codec.format.element, ElementCode::Int { .. })
}

/// The content of [`OutputKind::Shape`].
pub(crate) fn shape_bytes(shape: &[u64]) -> Vec<u8> {
    shape.iter().flat_map(|dimension| dimension.to_le_bytes()).collect()
}

/// Zero points of rows of `per_row` groups, as they are stored: integers that hold those of eight rows, the first one's in the
/// lowest bits.
pub(crate) fn pack_zero_points(points: &[u8], per_row: usize, into: &mut Vec<u8>) {
    into.clear();
    for rows in points.chunks(per_row * ZERO_POINT_ROWS as usize) {
        into.extend((0..per_row).flat_map(|group| {
            let of_rows = rows.iter().skip(group).step_by(per_row).enumerate();
            of_rows.fold(0u32, |word, (row, &point)| word | u32::from(point) << (4 * row)).to_le_bytes()
        }));
    }
}

/// The inverse of [`pack_zero_points`]: appends those of the `rows` rows from `first` on.
pub(crate) fn unpack_zero_points(packed: &[u8], per_row: usize, first: u64, rows: u64, into: &mut Vec<u8>) {
    for row in first..first + rows {
        let words = packed[(row / ZERO_POINT_ROWS) as usize * per_row * 4..].chunks_exact(4).take(per_row);
        // Four rows' nibbles lie in two bytes.
        let nibble = (row % ZERO_POINT_ROWS) as usize;
        into.extend(words.map(|word| word[nibble / 2] >> (nibble % 2 * 4) & 15));
    }
}

/// The library's name for how weights of these codes are packed.
fn compressor(codec: &Codec) -> &'static str {
    use ScaleCode::{E4m3, E8m0, Float, RoundedF32, SourceFloat};
    match (codec.format.element, codec.format.scale) {
        (ElementCode::Int { .. }, SourceFloat | Float(_) | E8m0(_)) => "pack-quantized",
        (ElementCode::E2m1, E4m3) => "nvfp4-pack-quantized",
        (ElementCode::E2m1, E8m0(_)) => "mxfp4-pack-quantized",
        (ElementCode::Int { .. }, E4m3)
        | (ElementCode::Int { .. } | ElementCode::E2m1, RoundedF32)
        | (ElementCode::E2m1, SourceFloat | Float(_))
        | (ElementCode::Codebook(_) | ElementCode::E4m3, _) => {
            unreachable!("{:?} can't be put in this layout: tests refuse such a format", codec.format)
        }
    }
}

/// config.json's `quantization_config`; `ignore` are the Linear modules left unquantized, by whole names or `re:` patterns.
pub(crate) fn quantization_config(codec: &Codec, ignore: &[String]) -> Value {
    let format = compressor(codec);
    let scale_dtype = match codec.format.scale {
        ScaleCode::E4m3 => Value::from("torch.float8_e4m3fn"),
        ScaleCode::E8m0(_) => Value::from("torch.uint8"),
        ScaleCode::Float(_) | ScaleCode::RoundedF32 | ScaleCode::SourceFloat => Value::Null,
    };
    let (strategy, group_size) = match codec.scales {
        Scales::Groups { size: GroupSize::Channel, .. } => ("channel", Value::Null),
        _ if codec.has_tensor_scale() => ("tensor_group", Value::from(codec.block_len(0))),
        _ => ("group", Value::from(codec.block_len(0))),
    };
    let has_zero_points = codec.has_zero_points();
    let weights = json!({
        "actorder": null,
        "block_structure": null,
        "dynamic": false,
        "group_size": group_size,
        "num_bits": 4,
        "observer": null,
        "observer_kwargs": {},
        "scale_dtype": scale_dtype,
        "strategy": strategy,
        "symmetric": !has_zero_points,
        "type": if is_integer(codec) { "int" } else { "float" },
        "zp_dtype": if has_zero_points { Value::from("torch.int8") } else { Value::Null },
    });
    let group = json!({
        "format": format,
        "input_activations": null,
        "output_activations": null,
        "targets": ["Linear"],
        "weights": weights,
    });
    json!({
        "config_groups": {codec.format.library_name: group},
        "format": format,
        "global_compression_ratio": null,
        (KEPT_MODULES): ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.19.0",
    })
}
