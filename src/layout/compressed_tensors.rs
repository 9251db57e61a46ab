//! What a weight is in compressed-tensors' layout, which vLLM, SGLang and transformers read: the tensors in place of
//! `X.weight`, and config.json's part. As compressed-tensors 0.19.0 writes them.

use serde_json::{Value, json};

use crate::format::{GroupFormat, GroupScheme, GroupSize};
use crate::layout::{OutputDtype, OutputKind, OutputTensor};

/// Rows whose zero points share an i32.
pub const ZERO_POINT_ROWS: u64 = 8;

/// The tensors that a weight `[rows, columns]`, of whole groups, becomes.
pub fn output_tensors(scheme: &GroupScheme, shape: &[u64]) -> Vec<OutputTensor> {
    let &[rows, columns] = shape else { unreachable!("only matrices are quantized in groups") };
    let groups = columns / scheme.group_len(columns);
    let tensor = |kind, suffix, dtype, shape| OutputTensor { kind, suffix, dtype, shape };
    let codes = |dtype, columns| tensor(OutputKind::Packed, "_packed", dtype, vec![rows, columns]);
    let scale = |dtype| tensor(OutputKind::Scale, "_scale", dtype, vec![rows, groups]);
    match scheme.format {
        GroupFormat::Int4 | GroupFormat::Int4Asym => {
            let mut tensors = vec![
                codes(OutputDtype::I32, columns.div_ceil(8)),
                scale(OutputDtype::Source),
                tensor(OutputKind::Shape, "_shape", OutputDtype::I64, vec![2]),
            ];
            if scheme.format == GroupFormat::Int4Asym {
                let shape = vec![rows.div_ceil(ZERO_POINT_ROWS), groups];
                tensors.push(tensor(OutputKind::ZeroPoint, "_zero_point", OutputDtype::I32, shape));
            }
            tensors
        }
        GroupFormat::Mxfp4 => vec![codes(OutputDtype::U8, columns / 2), scale(OutputDtype::U8)],
        GroupFormat::Nvfp4 => vec![
            codes(OutputDtype::U8, columns / 2),
            scale(OutputDtype::F8E4M3),
            tensor(OutputKind::GlobalScale, "_global_scale", OutputDtype::F32, vec![1]),
        ],
    }
}

/// The content of [`OutputKind::Shape`].
pub fn shape_bytes(shape: &[u64]) -> Vec<u8> {
    shape.iter().flat_map(|dimension| dimension.to_le_bytes()).collect()
}

/// Zero points of rows of `per_row` groups, as they are stored: integers that hold those of eight rows, the first one's in the
/// lowest bits.
pub fn pack_zero_points(points: &[u8], per_row: usize, into: &mut Vec<u8>) {
    into.clear();
    for rows in points.chunks(per_row * ZERO_POINT_ROWS as usize) {
        into.extend((0..per_row).flat_map(|group| {
            let of_rows = rows.iter().skip(group).step_by(per_row).enumerate();
            of_rows.fold(0u32, |word, (row, &point)| word | u32::from(point) << (4 * row)).to_le_bytes()
        }));
    }
}

/// The inverse of [`pack_zero_points`]: appends those of the `rows` rows from `first` on.
pub fn unpack_zero_points(packed: &[u8], per_row: usize, first: u64, rows: u64, into: &mut Vec<u8>) {
    for row in first..first + rows {
        let words = packed[(row / ZERO_POINT_ROWS) as usize * per_row * 4..].chunks_exact(4).take(per_row);
        // Four rows' nibbles lie in two bytes.
        let nibble = (row % ZERO_POINT_ROWS) as usize;
        into.extend(words.map(|word| word[nibble / 2] >> (nibble % 2 * 4) & 15));
    }
}

/// config.json's `quantization_config`; `ignore` are the Linear modules left unquantized, by whole names or `re:` patterns.
pub fn quantization_config(scheme: &GroupScheme, ignore: &[String]) -> Value {
    let (name, format, kind) = match scheme.format {
        GroupFormat::Int4 => ("W4A16", "pack-quantized", "int"),
        GroupFormat::Int4Asym => ("W4A16_ASYM", "pack-quantized", "int"),
        GroupFormat::Mxfp4 => ("MXFP4A16", "mxfp4-pack-quantized", "float"),
        GroupFormat::Nvfp4 => ("NVFP4A16", "nvfp4-pack-quantized", "float"),
    };
    let (strategy, scale_dtype) = match (scheme.format, scheme.size) {
        (GroupFormat::Nvfp4, _) => ("tensor_group", Value::from("torch.float8_e4m3fn")),
        (GroupFormat::Mxfp4, _) => ("group", Value::from("torch.uint8")),
        (_, GroupSize::Columns(_)) => ("group", Value::Null),
        (_, GroupSize::Channel) => ("channel", Value::Null),
    };
    let group_size = match scheme.size {
        GroupSize::Columns(columns) => Value::from(columns),
        GroupSize::Channel => Value::Null,
    };
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
        "symmetric": scheme.format != GroupFormat::Int4Asym,
        "type": kind,
        "zp_dtype": if scheme.format == GroupFormat::Int4Asym { Value::from("torch.int8") } else { Value::Null },
    });
    let group = json!({
        "format": format,
        "input_activations": null,
        "output_activations": null,
        "targets": ["Linear"],
        "weights": weights,
    });
    json!({
        "config_groups": {name: group},
        "format": format,
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.19.0",
    })
}
