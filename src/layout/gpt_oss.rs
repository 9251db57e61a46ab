//! What experts are in gpt-oss's own layout: MXFP4 blocks and their scales in place of a fused parameter, as its
//! checkpoint on the hub has them.

use std::borrow::Cow;

use serde_json::{Value, json};

use crate::dtype::FloatDtype;
use crate::error::Result;
use crate::format::Codec;
use crate::layout::{OutputDtype, OutputKind, OutputTensor, Stored, StoredWeight};

/// The end of the blocks' name, after the experts'.
pub(crate) const BLOCKS: &str = "_blocks";
/// The same of the scales' name.
pub(crate) const SCALES: &str = "_scales";

/// The key of the modules left unquantized.
pub(crate) const KEPT_MODULES: &str = "modules_to_not_convert";

/// The tensors that experts `[experts, rows, columns]` become; columns are what products sum over.
pub(crate) fn output_tensors(codec: &Codec, shape: &[u64]) -> Vec<OutputTensor> {
    let &[experts, rows, columns] = shape else { unreachable!("only fused experts are quantized in this layout") };
    let group = codec.block_len(columns);
    let tensor =
        |kind, suffix, shape| OutputTensor { kind, suffix: Cow::Borrowed(suffix), dtype: OutputDtype::U8, shape };
    vec![
        tensor(OutputKind::Packed, BLOCKS, vec![experts, rows, columns / group, group / 2]),
        tensor(OutputKind::Scale, SCALES, vec![experts, rows, columns / group]),
    ]
}

/// Experts, rows and columns that blocks and scales of these shapes are of, if they fit each other.
pub(crate) fn shape_of(blocks: &[u64], scales: &[u64]) -> Option<[u64; 3]> {
    match *blocks {
        [experts, rows, groups, 16] if *scales == [experts, rows, groups] => {
            Some([experts, rows, groups.checked_mul(32)?])
        }
        _ => None,
    }
}

/// What a weight's tensors say of it; transformers decodes to the model's dtype, whose parameters have rows and columns exchanged.
///
/// # Errors
/// When one is missing, or they don't fit each other.
pub(crate) fn read(codec: &Codec, weight: &mut dyn StoredWeight, model: FloatDtype) -> Result<Stored> {
    let (blocks, scales) = (&weight.info(OutputKind::Packed)?.shape, &weight.info(OutputKind::Scale)?.shape);
    let shape = shape_of(blocks, scales).ok_or_else(|| {
        weight.malformed(format!("the shapes of its blocks and scales don't fit: {blocks:?} and {scales:?}"))
    })?;
    let stored = Stored::of_rows(weight, shape.to_vec(), model, |columns| codec.coding(columns, None))?;
    Ok(Stored { transposed: true, ..stored })
}

/// config.json's `quantization_config`; `kept` are the modules left unquantized.
pub(crate) fn quantization_config(kept: &[String]) -> Value {
    json!({(KEPT_MODULES): kept, "quant_method": "mxfp4"})
}
