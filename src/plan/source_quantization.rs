//! Which quantized sources are converted: DeepSeek-V3's FP8 in blocks, and gpt-oss's MXFP4 experts on request.

use std::collections::HashSet;

use crate::checkpoint::Source;
use crate::dtype::Dtype;
use crate::error::{Error, Hint, Result, Setting};
use crate::layout::gpt_oss::{BLOCKS, SCALES};
use crate::layout::recognize::{self, FP8_SCALE};
use crate::layout::{FP8_METHOD, MXFP4_METHOD, SourceQuantization};
use crate::recipe::Recipe;

/// # Errors
/// When the source is quantized, and not as FP8 blocks; or as gpt-oss's experts, and the recipe doesn't have it decoded.
pub(crate) fn check(source: &Source, recipe: &Recipe) -> Result<()> {
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
    let fp8: HashSet<&str> = fp8.map(|(_, info)| &*info.name).collect();
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
