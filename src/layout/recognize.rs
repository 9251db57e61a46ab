//! Telling that a checkpoint is quantized already, and with what.

use std::borrow::Cow;
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::checkpoint::{CONFIG_NAME, Config, Source, SourceFile, TensorInfo};
use crate::dtype::Dtype;
use crate::layout::{bitsandbytes, compressed_tensors, gpt_oss, modelopt};

/// DeepSeek-V3's, as names give it away.
const FP8_METHOD: &str = "FP8 in blocks";
/// gpt-oss's, likewise.
const MXFP4_METHOD: &str = "MXFP4 (gpt-oss)";

/// The end of the name of an FP8 weight's scales in DeepSeek-V3, after the weight's.
const FP8_SCALE: &str = "_scale_inv";
/// How names of eight-bit floats end, and those of their scales: DeepSeek-V3's, DeepSeek-V4's, those of compressed-tensors and
/// ModelOpt, Mistral's.
pub(crate) const FP8_SCALES: &[(&str, &str)] =
    &[("", FP8_SCALE), (".weight", ".scale"), ("", modelopt::SCALE), (".weight", ".qscale_weight")];
/// What may stand beside coded weights for products with coded inputs; it has no meaning once the weight is decoded.
pub(crate) const INPUT_SCALES: [&str; 6] =
    [".activation_scale", ".input_scale", ".input_scale_ub", ".input_global_scale", ".input_zero_point", ".qscale_act"];

/// How names end that a method's checkpoints have and others don't: in two parts, the second a layout's own.
const ENDS: &[(&str, &str, &str)] = &[
    ("", "._weight_qdata", "torchao"),
    (".weight", "._data", "quanto"),
    ("", ".Qidxs", "QuIP#"),
    ("", ".SCB", "bitsandbytes LLM.int8()"),
    (".weight", compressed_tensors::CODES, "compressed-tensors"),
    (".weight", FP8_SCALE, FP8_METHOD),
    ("", ".qzeros", "GPTQ or AWQ"),
    ("", ".qweight", "GPTQ or AWQ"),
    ("_proj", gpt_oss::BLOCKS, MXFP4_METHOD),
    (".weight", modelopt::TENSOR_SCALE, "ModelOpt NVFP4"),
    (".weight", modelopt::SCALE, "FP8 or integers with scales"),
    ("", bitsandbytes::ABSMAX, "bitsandbytes"),
];

/// Of a tensor of codes, by its name: the weight's, and the tensors that codes of such a name decode by.
pub(crate) fn parts_of(name: &str) -> Option<(&str, &'static str)> {
    let parts = [
        (
            compressed_tensors::CODES,
            "_scale and _shape (INT4, I32), _scale F8_E4M3 for each 16 columns and _global_scale (NVFP4, U8), or _scale U8 for \
             each 32 columns (MXFP4, U8) of compressed-tensors",
        ),
        (
            ".qweight",
            ".qzeros I32 [groups, rows / 8] and .scales [groups, rows] of codes of 4 bits I32 [columns / 8, rows] (GPTQ) or [columns, \
             rows / 8] (AWQ, gemm)",
        ),
        (gpt_oss::BLOCKS, "_scales U8 [experts, rows, groups] of blocks U8 [experts, rows, groups, 16]"),
        (modelopt::TENSOR_SCALE, "U8 codes and a _scale F8_E4M3 for each 16 columns (ModelOpt's NVFP4)"),
    ];
    parts.into_iter().find_map(|(end, expected)| Some((name.strip_suffix(end)?, expected)))
}

/// How a checkpoint is quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceQuantization {
    /// The method's name.
    pub method: String,
    /// What gave it away.
    pub evidence: String,
}

impl SourceQuantization {
    fn new(method: &str, evidence: String) -> SourceQuantization {
        SourceQuantization { method: method.to_owned(), evidence }
    }

    /// The method that a tensor of this name belongs to.
    pub(crate) fn by_name(name: &str) -> Option<Cow<'static, str>> {
        if let Some((_, format)) = name.rsplit_once(bitsandbytes::QUANT_STATE)
            && format.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            return Some(format!("bitsandbytes {}", format.to_uppercase()).into());
        }
        let is_end = |before: &str, end: &str| name.strip_suffix(end).is_some_and(|name| name.ends_with(before));
        ENDS.iter().find(|(before, end, _)| is_end(before, end)).map(|&(.., method)| method.into())
    }
}

/// How a checkpoint is quantized, and the file that says so, if a config or a tensor says that it is.
pub(crate) fn of(source: &Source) -> Option<(PathBuf, SourceQuantization)> {
    let path = || source.location.join(CONFIG_NAME).path().to_owned();
    let config = source.config.as_ref().and_then(in_config).map(|found| (path(), found));
    let in_file = |file: &SourceFile| Some((file.location.path().to_owned(), in_tensors(&file.tensors)?));
    config.or_else(|| source.files.iter().find_map(in_file))
}

/// Where config.json says how weights are quantized, as paths of keys: at the top, or in the config of a model nested in it.
pub(crate) fn places_in_config(config: &Config) -> Vec<Vec<&str>> {
    const KEYS: [&str; 2] = ["quantization_config", "compression_config"];
    let has = |values: &Map<String, Value>, key: &str| values.get(key).is_some_and(Value::is_object);
    let at_the_top = KEYS.into_iter().filter(|key| has(config.values(), key)).map(|key| vec![key]);
    let nested = config.values().iter().filter_map(|(name, values)| Some((name.as_str(), values.as_object()?)));
    let nested = nested.filter(|(name, _)| !KEYS.contains(name));
    let nested = nested
        .flat_map(|(name, values)| KEYS.into_iter().filter(|key| has(values, key)).map(move |key| vec![name, key]));
    at_the_top.chain(nested).collect()
}

/// What config.json says of how weights are quantized, and where, as a path of keys.
pub(crate) fn quantization_config(config: &Config) -> Option<(Vec<&str>, &Value)> {
    let place = places_in_config(config).into_iter().next()?;
    let (first, rest) = place.split_first()?;
    let value = rest.iter().try_fold(config.values().get(*first)?, |value, key| value.get(key))?;
    Some((place, value))
}

/// The method that config.json names, and where it names it.
pub(crate) fn in_config(config: &Config) -> Option<SourceQuantization> {
    let (place, value) = quantization_config(config)?;
    let is_mlx = value.get("group_size").is_some() && value.get("bits").is_some();
    let unnamed = if is_mlx { "MLX, or another method that isn't named" } else { "an unnamed method" };
    let method = value.get("quant_method").and_then(Value::as_str).unwrap_or(unnamed);
    Some(SourceQuantization::new(method, format!("its \"{}\" says so", place.join("\".\""))))
}

/// The method that a tensor gives away, and how.
fn in_tensors(tensors: &[TensorInfo]) -> Option<SourceQuantization> {
    tensors.iter().find_map(|tensor| {
        let by_name = SourceQuantization::by_name(&tensor.name);
        let by_dtype = matches!(
            tensor.dtype,
            Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ | Dtype::F4 | Dtype::F8_E8M0
        );
        match by_name {
            Some(method) => Some(SourceQuantization::new(&method, format!("it has a tensor {:?}", tensor.name))),
            None if by_dtype => Some(SourceQuantization::new(
                &tensor.dtype.to_string(),
                format!("tensor {:?} has that dtype", tensor.name),
            )),
            None => None,
        }
    })
}
