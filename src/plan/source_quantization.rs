//! Which quantized sources are converted: those whose coded weights are all of kinds that decode, and of four bits only on request.

use serde_json::Value;

use super::input::{self, Coded};
use crate::checkpoint::{CONFIG_NAME, Source, TensorInfo};
use crate::error::{Error, Hint, Result, Setting, Warning};
use crate::layout::SourceQuantization;
use crate::layout::recognize;
use crate::read::Input;
use crate::recipe::Recipe;

/// # Errors
/// When the source is quantized in a way that doesn't decode; or in four bits, and the recipe doesn't have it decoded.
pub(crate) fn check(source: &Source, recipe: &Recipe) -> Result<()> {
    let Some((path, SourceQuantization { method, evidence })) = recognize::of(source) else {
        return if recipe.dequantize_source {
            let (setting, why) = (Setting::DequantizeSource, "has no effect: the source isn't quantized".to_owned());
            Err(Error::Options { setting, value: None, why, hint: Some(Hint::Remove(setting)) })
        } else {
            Ok(())
        };
    };
    let hint = match decodes(source)? {
        // Formats of groups may hold the source's codes as they are; the plan finds out.
        true if recipe.dequantize_source || !recipe.codec().is_blocks() || !has_four_bits(source) => return Ok(()),
        true => Some(Hint::DequantizeSource),
        false => None,
    };
    Err(Error::AlreadyQuantized { path, method, evidence, hint })
}

/// # Errors
/// When the source is quantized in a way that doesn't decode.
pub(crate) fn check_decodes(source: &Source) -> Result<()> {
    match recognize::of(source) {
        Some((path, SourceQuantization { method, evidence })) if !decodes(source)? => {
            Err(Error::AlreadyQuantized { path, method, evidence, hint: None })
        }
        _ => Ok(()),
    }
}

/// The tensors of a source that no manifest is of, decoded where they are coded, and what to know of them.
///
/// # Errors
/// When what a coded tensor decodes by is missing, or doesn't fit.
pub(crate) fn inputs(source: &Source) -> Result<(Vec<Input>, Vec<Warning>)> {
    input::inputs(source, true)
}

/// The formats that weights are coded in, each once, by name.
pub(crate) fn formats(source: &Source) -> Vec<&'static str> {
    let coded = Coded::new(source);
    let mut formats = Vec::new();
    for weight in source.tensors().filter_map(|(file, info)| coded.weight(file, info)) {
        if !formats.contains(&weight.format()) {
            formats.push(weight.format());
        }
    }
    formats.sort_unstable();
    formats
}

/// Whether weights are coded in four bits.
pub(crate) fn has_four_bits(source: &Source) -> bool {
    let coded = Coded::new(source);
    let mut weights = source.tensors().filter_map(|(file, info)| coded.weight(file, info));
    weights.any(|weight| weight.has_four_bits())
}

/// Whether something is coded, and everything that is decodes.
///
/// # Errors
/// When parts of a weight are missing, or weights are stored rotated.
fn decodes(source: &Source) -> Result<bool> {
    check_is_not_rotated(source)?;
    check_is_in_order(source)?;
    let coded = Coded::new(source);
    let names = coded.names(source);
    for (file, info) in source.tensors() {
        let Some(method) = SourceQuantization::by_name(&info.name).filter(|_| !names.contains(&*info.name)) else {
            continue;
        };
        let Some(evidence) = incomplete(source, info) else { return Ok(false) };
        let path = source.files[file].location.path().to_owned();
        return Err(Error::AlreadyQuantized { path, method: method.into_owned(), evidence, hint: None });
    }
    Ok(!names.is_empty())
}

/// compressed-tensors' transforms and GPTQModel's rotations, whose inverse would have to be multiplied to what decodes.
fn check_is_not_rotated(source: &Source) -> Result<()> {
    let config = source.config.as_ref().and_then(recognize::quantization_config).map(|(_, config)| config);
    match config.and_then(rotation) {
        Some(key) => {
            let why = format!(
                "its {key:?} says that weights are stored rotated, and rotations aren't undone: start from a checkpoint without \
                 them"
            );
            Err(Error::malformed(source.location.join(CONFIG_NAME).path(), why))
        }
        None => Ok(()),
    }
}

/// What of a quantization config says that weights are stored rotated.
fn rotation(config: &Value) -> Option<&'static str> {
    let groups = config.get("transform_config").and_then(|transforms| transforms.get("config_groups")?.as_object());
    if groups.is_some_and(|groups| !groups.is_empty()) {
        return Some("transform_config");
    }
    let is_set = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(mode) => !mode.is_empty(),
        _ => true,
    };
    let meta = config.get("meta").and_then(|meta| meta.get("rotation"));
    config.get("rotation").into_iter().chain(meta).any(is_set).then_some("rotation")
}

/// compressed-tensors' own order of columns, of releases that wrote one: what decodes without it has other groups' scales.
fn check_is_in_order(source: &Source) -> Result<()> {
    let ordered = source.tensors().find(|(_, info)| info.name.ends_with(".weight_g_idx"));
    ordered.map_or(Ok(()), |(file, info)| {
        let why = format!(
            "tensor {:?} gives columns another order than they are stored in (activation ordering), which isn't decoded: start \
             from a checkpoint that was quantized without it",
            info.name
        );
        Err(Error::malformed(source.files[file].location.path(), why))
    })
}

/// What is wrong with a tensor whose name is that of codes which decode, but whose parts aren't what they should be.
fn incomplete(source: &Source, info: &TensorInfo) -> Option<String> {
    let (name, expected) = recognize::parts_of(&info.name)?;
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let beside = source.tensors().filter(|(_, other)| other.name.starts_with(module) && other.name != info.name);
    let mut found: Vec<String> =
        beside.map(|(_, other)| format!("{:?} {} {:?}", other.name, other.dtype, other.shape)).take(6).collect();
    if found.is_empty() {
        found.push("nothing".to_owned());
    }
    let (dtype, shape, found) = (info.dtype, &info.shape, found.join(", "));
    Some(format!("tensor {:?} is {dtype} {shape:?}, and beside it there is {found}; expected {expected}", info.name))
}
