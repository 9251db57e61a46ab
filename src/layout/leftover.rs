//! What says that weights are quantized which aren't: a config that stayed when they were cast back, and scales of weights that are
//! floats. Clients would multiply by such scales, or refuse; what holds is what the tensors are.

use std::collections::HashSet;

use crate::checkpoint::{LeftOut, Source, TensorInfo};
use crate::dtype::{Dtype, FloatDtype};
use crate::error::Result;
use crate::layout::recognize::{self, SourceQuantization};

/// How names of a quantized weight's parameters end, and what of the weight's own name stands before them.
const PARAMETERS: [(&str, &str); 14] = [
    (".weight_scale_inv", ".weight"),
    (".weight_scale_2", ".weight"),
    (".weight_scale", ".weight"),
    (".weight_global_scale", ".weight"),
    (".weight_zero_point", ".weight"),
    (".weight_shape", ".weight"),
    (".weight_g_idx", ".weight"),
    (".input_scale", ".weight"),
    (".input_global_scale", ".weight"),
    (".input_zero_point", ".weight"),
    (".activation_scale", ".weight"),
    (".SCB", ".weight"),
    (".qscale_weight", ".weight"),
    (".qscale_act", ".weight"),
];

/// Integers below this share of all bytes are tables and masks, not weights.
const INTEGER_SHARE: u64 = 20;

/// Takes out of an opened checkpoint what its tensors belie, and notes it.
///
/// # Errors
/// When config.json can't be written without what is taken out of it.
pub(crate) fn take_out(source: &mut Source) -> Result<()> {
    take_out_scales(source);
    let Some(config) = &source.config else { return Ok(()) };
    let Some(SourceQuantization { method, evidence }) = recognize::in_config(config) else { return Ok(()) };
    if is_coded(source) {
        return Ok(());
    }
    let places = recognize::places_in_config(config);
    let pruned = config.pruned(&places.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
    source.notes.push(
        format!(
            "config.json speaks of weights quantized with {method} ({evidence}), and there are none: left over from before they \
             were cast, and taken out"
        )
        .into(),
    );
    source.config = Some(pruned);
    Ok(())
}

/// Scales and the like of weights that are floats.
fn take_out_scales(source: &mut Source) {
    if !source.tensors().any(|(_, info)| is_parameter(&info.name)) {
        return;
    }
    let floats = source.tensors().filter(|(_, info)| FloatDtype::of(info.dtype).is_some());
    let floats: HashSet<&str> = floats.map(|(_, info)| &*info.name).collect();
    let is_stale = |info: &TensorInfo| {
        let of = PARAMETERS.iter().find_map(|(end, weight)| Some(format!("{}{weight}", info.name.strip_suffix(end)?)));
        let fused = info.name.strip_suffix("_scale_inv").filter(|_| info.name.contains("experts."));
        of.is_some_and(|weight| floats.contains(&*weight)) || fused.is_some_and(|weight| floats.contains(weight))
    };
    let places: HashSet<(usize, u64, u64)> =
        source.tensors().filter(|(_, info)| is_stale(info)).map(|(file, info)| (file, info.offset, info.len)).collect();
    let mut stale: Vec<LeftOut> = Vec::new();
    for (i, file) in source.files.iter_mut().enumerate().filter(|_| !places.is_empty()) {
        let (gone, kept) = std::mem::take(&mut file.tensors)
            .into_iter()
            .partition(|info| places.contains(&(i, info.offset, info.len)) && is_parameter(&info.name));
        file.tensors = kept;
        let gone: Vec<TensorInfo> = gone;
        stale.extend(gone.into_iter().map(|info| LeftOut {
            name: file.name.clone(),
            tensor: Some(info.name.to_string()),
            why: format!("the weight that it is of is a float: {} is left over from before it was cast", info.dtype),
        }));
    }
    if let Some(tensor) = stale.first().and_then(|first| first.tensor.as_deref()) {
        let note = format!(
            "{} scales and the like of weights that aren't quantized are left out, such as {tensor:?}: left over from before the \
             weights were cast",
            stale.len()
        );
        source.notes.push(note.into());
        source.left_out.extend(stale);
        source.left_out.sort_by(|a, b| (&a.name, &a.tensor).cmp(&(&b.name, &b.tensor)));
    }
}

/// Whether a name is one of a quantized weight's parameter.
fn is_parameter(name: &str) -> bool {
    PARAMETERS.iter().any(|(end, _)| name.ends_with(end)) || name.ends_with("_scale_inv")
}

/// Words in names of integers that aren't codes: masks and numbers of places.
const NO_CODES: [&str; 5] = ["mask", "bias", "ids", "index", "position"];

/// Whether some of the tensors are codes of weights, by their dtypes.
fn is_coded(source: &Source) -> bool {
    let matrices = || source.tensors().map(|(_, info)| info).filter(|info| info.shape.len() > 1);
    let is_small_float = |dtype: Dtype| dtype.bitsize() <= 8 && !matches!(dtype, Dtype::BOOL | Dtype::U8 | Dtype::I8);
    let is_integer =
        |dtype: Dtype| matches!(dtype, Dtype::U8 | Dtype::I8 | Dtype::U16 | Dtype::I16 | Dtype::U32 | Dtype::I32);
    let len = |is: &dyn Fn(&TensorInfo) -> bool| matrices().filter(|info| is(info)).map(|info| info.len).sum::<u64>();
    // Of whatever method: a module has codes in place of a weight, and beside them floats that they decode by.
    let weights: HashSet<&str> = matrices().filter_map(|info| info.name.strip_suffix(".weight")).collect();
    let floats = source.tensors().filter(|(_, info)| FloatDtype::of(info.dtype).is_some());
    let mut floats: Vec<&str> = floats.map(|(_, info)| &*info.name).filter(|name| !name.ends_with("bias")).collect();
    floats.sort_unstable();
    let has_floats = |module: &str| {
        let inside = format!("{module}.");
        let place = floats.partition_point(|name| *name < inside.as_str());
        floats.get(place).is_some_and(|name| name.starts_with(&inside))
    };
    let in_place_of_a_weight = |info: &TensorInfo| {
        let Some((module, own)) = info.name.rsplit_once('.') else { return false };
        let is_code = is_integer(info.dtype) && !NO_CODES.iter().any(|word| own.contains(word));
        is_code && !weights.contains(module) && has_floats(module)
    };
    let (integers, all) = (len(&|info| is_integer(info.dtype)), len(&|_| true));
    let by_name = |info: &TensorInfo| {
        let is_weight = info.name.ends_with("weight") && info.shape.len() > 1;
        is_integer(info.dtype) && (is_weight || SourceQuantization::by_name(&info.name).is_some())
    };
    matrices().any(|info| is_small_float(info.dtype))
        || source.tensors().any(|(_, info)| by_name(info))
        || matrices().any(in_place_of_a_weight)
        || integers > all / INTEGER_SHARE
}
