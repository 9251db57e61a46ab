//! How many parameters the hub's pages show for a checkpoint: not always what it has. The hub goes by names, dtypes and
//! `quantization_config`, as `parseSafetensorsMetadata` of npm's `@huggingface/hub` does; its rules are these.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::checkpoint::{Config, Source, TensorInfo};
use crate::dtype::{Dtype, elements};

/// Ends of names, after the last dot, of what belongs to a quantized weight, in any method.
const BESIDE_WEIGHTS: [&str; 11] = [
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "zero_point",
    "weight_shape",
    "weight_g_idx",
];

/// The same of bitsandbytes.
const BESIDE_BITSANDBYTES: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];

/// The same of GPTQ and AWQ.
const BESIDE_QWEIGHT: [&str; 3] = ["qzeros", "g_idx", "scales"];

/// Formats whose names tell their bits.
const BITS_OF_FORMATS: [(&str, u32); 7] =
    [("nvfp4", 4), ("mxfp4", 4), ("fp4", 4), ("int4", 4), ("uint4", 4), ("nf4", 4), ("int2", 2)];

/// Parameters by the dtype that they are stored in.
pub(crate) fn count(source: &Source) -> BTreeMap<String, u64> {
    let rules = Rules::of(source.config.as_ref());
    let mut by_dtype: BTreeMap<String, u64> = BTreeMap::new();
    for (_, info) in source.tensors() {
        let parameters = rules.parameters(info);
        if parameters > 0 {
            *by_dtype.entry(info.dtype.to_string()).or_default() += parameters;
        }
    }
    by_dtype
}

/// What a config says that the hub counts by.
struct Rules<'a> {
    quantization: Option<&'a Value>,
    method: String,
    expert_dtype: Option<&'a str>,
}

impl<'a> Rules<'a> {
    fn of(config: Option<&'a Config>) -> Rules<'a> {
        let get = |key: &str| {
            let values = config?.values();
            values.get(key).or_else(|| values.get("text_config")?.get(key))
        };
        let quantization = get("quantization_config").filter(|value| value.is_object());
        let method =
            quantization.and_then(|value| value.get("quant_method")?.as_str()).unwrap_or_default().to_lowercase();
        Rules { quantization, method, expert_dtype: get("expert_dtype").and_then(Value::as_str) }
    }

    fn parameters(&self, info: &TensorInfo) -> u64 {
        // Exponents alone are scales. What has no dimension isn't counted.
        if info.dtype == Dtype::F8_E8M0 || info.shape.is_empty() || self.is_beside_weights(info) {
            return 0;
        }
        let elements = elements(&info.shape).unwrap_or(0);
        match self.quantization {
            Some(config) => (elements as f64 * self.per_element(config, info)).round() as u64,
            None => elements,
        }
    }

    fn is_beside_weights(&self, info: &TensorInfo) -> bool {
        let Some(config) = self.quantization else { return false };
        let end = last_part(&info.name);
        if BESIDE_WEIGHTS.contains(&end) {
            return true;
        }
        match self.method.as_str() {
            "mxfp4" => info.dtype == Dtype::U8 && end.ends_with("_scales"),
            "bitsandbytes" => BESIDE_BITSANDBYTES.contains(&end) || end.starts_with("bitsandbytes__"),
            "gptq" | "awq" => BESIDE_QWEIGHT.contains(&end) && is_quantized(config, &info.name),
            _ => false,
        }
    }

    /// Parameters that an element stands for.
    fn per_element(&self, config: &Value, info: &TensorInfo) -> f64 {
        if !is_quantized(config, &info.name) {
            return 1.0;
        }
        let bits = config.get("bits").and_then(Value::as_u64);
        let in_4_bits = config.get("load_in_4bit").and_then(Value::as_bool) == Some(true);
        match (self.method.as_str(), info.dtype) {
            ("mxfp4", Dtype::U8) if info.name.contains("_blocks") => 2.0,
            ("gptq" | "awq", _) if last_part(&info.name) == "qweight" => (32 / bits.unwrap_or(4).clamp(1, 32)) as f64,
            ("gptq" | "awq", Dtype::U8) => match bits {
                Some(4) => 2.0,
                Some(2) => 4.0,
                _ => 1.0,
            },
            ("compressed-tensors", dtype) => packed(dtype, bits_of_group(config, &info.name)),
            ("fp8", dtype) => {
                let is_expert = info.name.contains(".experts.") && !info.name.contains("shared_experts");
                packed(dtype, self.expert_dtype.filter(|_| is_expert).and_then(bits_of_format))
            }
            ("bitsandbytes", Dtype::U8) if in_4_bits => 2.0,
            ("mxfp4" | "bitsandbytes", _) => 1.0,
            (_, Dtype::U8) if in_4_bits || bits == Some(4) => 2.0,
            _ => 1.0,
        }
    }
}

/// Numbers of so many bits in an integer of this dtype; 1 if it isn't one, or they aren't packed.
fn packed(dtype: Dtype, bits: Option<u32>) -> f64 {
    let is_integer = matches!(dtype, Dtype::U8 | Dtype::I8 | Dtype::U16 | Dtype::I16 | Dtype::U32 | Dtype::I32);
    let container = dtype.bitsize() as u32;
    match bits {
        Some(bits) if is_integer && bits > 0 && bits < container => f64::from(container) / f64::from(bits),
        _ => 1.0,
    }
}

/// Bits of compressed-tensors' weights of this name, if they are packed.
fn bits_of_group(config: &Value, name: &str) -> Option<u32> {
    let groups = config.get("config_groups").and_then(Value::as_object);
    let groups: Vec<&Value> = groups.into_iter().flat_map(|groups| groups.values()).collect();
    let bits =
        |group: &Value| group.get("weights")?.get("num_bits")?.as_u64().and_then(|bits| u32::try_from(bits).ok());
    let is_of = |group: &&&Value| {
        let targets = group.get("targets").and_then(Value::as_array);
        { targets.into_iter().flatten() }.filter_map(Value::as_str).any(|target| is_target(target, module(name)))
    };
    let group = groups.iter().find(is_of).copied();
    let format = group.and_then(|group| group.get("format")).or(config.get("format"))?.as_str()?.to_lowercase();
    if !format.ends_with("pack-quantized") {
        return None;
    }
    let any = || groups.iter().find_map(|group| bits(group).filter(|bits| *bits > 0));
    group.and_then(bits).or_else(any).or_else(|| bits_of_format(&format)).or(Some(4))
}

fn bits_of_format(format: &str) -> Option<u32> {
    let format = format.to_lowercase();
    BITS_OF_FORMATS.iter().find(|(name, _)| format.contains(name)).map(|(_, bits)| *bits)
}

/// Whether a tensor is quantized, as far as the lists of what isn't tell.
fn is_quantized(config: &Value, name: &str) -> bool {
    let list = |key: &str| config.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    if list("ignore").any(|target| is_target(target, module(name))) {
        return false;
    }
    !list("modules_to_not_convert").any(|pattern| match pattern.contains('*') {
        true => is_glob(pattern, name),
        false => name.contains(pattern),
    })
}

/// The name of the module that a tensor is of.
fn module(name: &str) -> &str {
    name.rfind(".weight").map_or(name, |at| &name[..at])
}

fn last_part(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, end)| end)
}

/// Whether compressed-tensors' target is of this module: a name, or a pattern of the few signs that the hub understands.
fn is_target(target: &str, module: &str) -> bool {
    let Some(pattern) = target.strip_prefix("re:") else { return target == module };
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let pattern = match pattern.strip_suffix('$') {
        Some(whole) => whole.to_owned(),
        None => format!("{pattern}.*"),
    };
    let glob = pattern.replace(".*", "*").replace("\\.", ".");
    !glob.contains(['\\', '+', '?', '(', ')', '[', ']', '{', '}', '|', '^', '$']) && is_glob(&glob, module)
}

/// Whether `text` is `pattern`, whose stars are anything.
fn is_glob(pattern: &str, text: &str) -> bool {
    let parts: Vec<&str> = pattern.split('*').collect();
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return false };
    if parts.len() == 1 {
        return pattern == text;
    }
    let middle = text.strip_prefix(first).and_then(|rest| rest.strip_suffix(last));
    let inner = &parts[1..parts.len() - 1];
    middle.is_some_and(|middle| {
        inner.iter().try_fold(middle, |rest, part| rest.find(part).map(|at| &rest[at + part.len()..])).is_some()
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn parameters(config: Value, name: &str, dtype: Dtype, shape: &[u64]) -> u64 {
        let config = Config::parse(config.to_string().into_bytes(), Path::new("config.json")).unwrap();
        let info = TensorInfo { name: name.into(), dtype, shape: shape.into(), offset: 0, len: 0 };
        Rules::of(Some(&config)).parameters(&info)
    }

    fn quantized(quantization: Value, name: &str, dtype: Dtype, shape: &[u64]) -> u64 {
        parameters(json!({"quantization_config": quantization}), name, dtype, shape)
    }

    #[test]
    fn floats_count_by_element_and_scalars_not_at_all() {
        assert_eq!(parameters(json!({}), "a.weight", Dtype::BF16, &[3, 5]), 15);
        assert_eq!(parameters(json!({}), "a.bias", Dtype::F32, &[]), 0);
        assert_eq!(parameters(json!({}), "a.weight_scale", Dtype::F32, &[4]), 4, "without a method it is a parameter");
        assert_eq!(parameters(json!({}), "a.scale", Dtype::F8_E8M0, &[4]), 0);
    }

    #[test]
    fn four_bit_codes_count_as_what_they_hold() {
        let bitsandbytes = || json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
        assert_eq!(quantized(bitsandbytes(), "a.weight", Dtype::U8, &[8, 1]), 16);
        assert_eq!(quantized(bitsandbytes(), "a.weight.absmax", Dtype::F32, &[8]), 0);
        assert_eq!(quantized(bitsandbytes(), "a.weight.quant_state.bitsandbytes__nf4", Dtype::U8, &[90]), 0);
        let gptq = || json!({"quant_method": "gptq", "bits": 4});
        assert_eq!(quantized(gptq(), "a.qweight", Dtype::I32, &[8, 16]), 1024);
        assert_eq!(quantized(gptq(), "a.scales", Dtype::F16, &[8]), 0);
        let mxfp4 = || json!({"quant_method": "mxfp4"});
        assert_eq!(quantized(mxfp4(), "mlp.experts.down_proj_blocks", Dtype::U8, &[2, 4, 3, 16]), 768);
        assert_eq!(quantized(mxfp4(), "mlp.experts.down_proj_scales", Dtype::U8, &[2, 4, 3]), 0);
        let packed = |bits| {
            let groups = json!({"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}});
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
        };
        assert_eq!(quantized(packed(4), "a.weight_packed", Dtype::I32, &[8, 2]), 128);
        assert_eq!(quantized(packed(3), "a.weight_packed", Dtype::I32, &[1, 3]), 32);
        assert_eq!(quantized(packed(4), "a.weight_shape", Dtype::I64, &[2]), 0);
        let named = json!({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"});
        assert_eq!(quantized(named, "a.weight_packed", Dtype::U8, &[4, 4]), 32);
        let fp8 = |expert_dtype| json!({"quantization_config": {"quant_method": "fp8"}, "expert_dtype": expert_dtype});
        assert_eq!(parameters(fp8("fp4"), "ffn.experts.0.w1.weight", Dtype::I8, &[4, 4]), 32);
        assert_eq!(parameters(fp8("fp4"), "ffn.shared_experts.w1.weight", Dtype::I8, &[4, 4]), 16);
        assert_eq!(parameters(fp8("fp8"), "ffn.experts.0.w1.weight", Dtype::F8_E4M3, &[4, 4]), 16);
        // A format that the hub doesn't know.
        assert_eq!(quantized(json!({"quant_method": "modelopt"}), "a.weight", Dtype::U8, &[4, 4]), 16);
    }

    #[test]
    fn what_is_listed_as_not_quantized_counts_by_element() {
        let config = || json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "modules_to_not_convert": ["lm_head", "vision*mlp"]});
        assert_eq!(quantized(config(), "model.lm_head.weight", Dtype::U8, &[8]), 8);
        assert_eq!(quantized(config(), "a.weight", Dtype::U8, &[8]), 16);
        let ignored =
            |ignore| json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [ignore]});
        for (ignore, is_ignored) in
            [("a.b", true), ("re:a.*", true), ("re:^a\\.b$", true), ("re:(a|b)", false), ("re:.*c$", false)]
        {
            let found = quantized(ignored(ignore), "a.b.weight", Dtype::I32, &[8]);
            assert_eq!(found, if is_ignored { 8 } else { 64 }, "{ignore}");
        }
        let nested =
            json!({"text_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}});
        assert_eq!(parameters(nested, "a.weight", Dtype::U8, &[8]), 16);
    }

    #[test]
    fn stars_match_anything_in_order() {
        for (pattern, text, expected) in [
            ("a*c", "abc", true),
            ("a*c", "ac", true),
            ("ab*bc", "abc", false),
            ("*b*", "abc", true),
            ("*b*d*", "abc", false),
            ("abc", "abc", true),
            ("*", "", true),
        ] {
            assert_eq!(is_glob(pattern, text), expected, "{pattern} {text}");
        }
    }
}
