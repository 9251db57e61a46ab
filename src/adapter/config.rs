//! adapter_config.json: the kind of the adapter, its ranks and factors.

use regex::Regex;
use serde_json::{Map, Value};

use crate::checkpoint::{MAX_JSON_LEN, parse_json};
use crate::error::{Error, IoContext, Result, Warning};
use crate::store::{Location, Sha256Hash};

/// The file's name.
pub(crate) const ADAPTER_CONFIG_NAME: &str = "adapter_config.json";

/// What PEFT takes where nothing is said.
const DEFAULT_RANK: u64 = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// Settings that change what an adapter is, and what each is called. None of them is merged as plain LoRA.
const OTHER_KINDS: [(&str, &str); 10] = [
    ("use_dora", "DoRA"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "BD-LoRA"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("arrow_config", "Arrow"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("velora_config", "VeLoRA"),
    ("layer_replication", "layer replication"),
    ("trainable_token_indices", "trainable tokens"),
];

/// Ways to begin that change the base's weights: what they leave of an adapter fits the changed base only.
const CHANGES_BASE: [&str; 6] = ["pissa", "corda", "olora", "loftq", "lora_ga", "mica"];

/// Settings of training, of matching modules, and of loading: the tensors' names say what they led to.
const WITHOUT_EFFECT: [&str; 27] = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "unsloth_fixed",
    "unsloth_version",
];

/// What merging depends on.
const WITH_EFFECT: [&str; 7] =
    ["alpha_pattern", "fan_in_fan_out", "lora_alpha", "r", "rank_pattern", "target_parameters", "use_rslora"];

/// What an adapter's config says of merging it.
#[derive(Debug)]
pub(super) struct Config {
    rank: u64,
    alpha: f64,
    rank_pattern: Vec<(Regex, u64)>,
    alpha_pattern: Vec<(Regex, f64)>,
    use_rslora: bool,
    /// Whether the weights of modules that nothing is known of are stored as `[in, out]`.
    pub(super) fan_in_fan_out: bool,
    /// Ends of parameters' names.
    target_parameters: Vec<String>,
    /// What isn't known of it.
    pub(super) warnings: Vec<Warning>,
}

impl Config {
    /// Reads the file, and tells its hash.
    ///
    /// # Errors
    /// When it isn't what PEFT writes, or the adapter is of a kind that isn't merged.
    pub(super) fn read(location: &Location) -> Result<(Config, Sha256Hash)> {
        let path = location.path();
        let text = location.read(MAX_JSON_LEN).at(path, "read it")?;
        let values = match parse_json(&text) {
            Ok(Value::Object(values)) => values,
            Ok(_) => return Err(Error::malformed(path, "not a JSON object")),
            Err(error) => return Err(Error::malformed(path, format!("not JSON: {error}"))),
        };
        let config = Config::parse(&values).map_err(|why| Error::Adapter { path: path.to_owned(), why })?;
        Ok((config, Sha256Hash::of(&text)))
    }

    fn parse(values: &Map<String, Value>) -> Result<Config, String> {
        check_kind(values)?;
        let rank = number(values, "r", Value::as_u64)?.unwrap_or(DEFAULT_RANK);
        let alpha = number(values, "lora_alpha", Value::as_f64)?.unwrap_or(DEFAULT_ALPHA);
        let list = values.get("target_parameters").filter(|list| !list.is_null());
        let names = list.map(|list| {
            let names = list.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
            names.ok_or_else(|| format!("\"target_parameters\" is {list}; expected a list of names"))
        });
        let names = names.transpose()?.unwrap_or_default();
        let flag = |key: &str| match values.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(format!("{key:?} is {other}; expected true or false")),
        };
        Ok(Config {
            rank,
            alpha,
            rank_pattern: patterns(values, "rank_pattern", Value::as_u64)?,
            alpha_pattern: patterns(values, "alpha_pattern", Value::as_f64)?,
            use_rslora: flag("use_rslora")?,
            fan_in_fan_out: flag("fan_in_fan_out")?,
            target_parameters: names.into_iter().map(str::to_owned).collect(),
            warnings: unknown(values).into_iter().collect(),
        })
    }

    /// The rank of what is trained for the module, or the parameter, of this name.
    pub(super) fn rank(&self, name: &str) -> u64 {
        first_match(&self.rank_pattern, name).unwrap_or(self.rank)
    }

    /// The factor of its product.
    pub(super) fn scaling(&self, name: &str) -> f64 {
        let alpha = first_match(&self.alpha_pattern, name).unwrap_or(self.alpha);
        let rank = self.rank(name) as f64;
        if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank }
    }

    /// Own names of the parameters that are trained as such.
    pub(super) fn target_names(&self) -> impl Iterator<Item = &str> {
        self.target_parameters.iter().filter_map(|target| target.rsplit('.').next())
    }

    /// Whether a parameter is trained as such, by its full name.
    pub(super) fn targets(&self, parameter: &str) -> bool {
        self.target_parameters.iter().any(|target| {
            parameter.strip_suffix(target.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        })
    }
}

/// The first pattern's value that matches a name's end.
fn first_match<T: Copy>(patterns: &[(Regex, T)], name: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(name)).map(|(_, value)| *value)
}

/// # Errors
/// When it isn't plain LoRA.
fn check_kind(values: &Map<String, Value>) -> Result<(), String> {
    match values.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => {
            return Err(format!("its \"peft_type\" is {other:?}: only LoRA adapters (\"LORA\") can be merged"));
        }
        None => return Err("it has no \"peft_type\"; expected \"LORA\"".to_owned()),
    }
    if let Some((key, name)) = OTHER_KINDS.iter().find(|(key, _)| values.get(*key).is_some_and(is_set)) {
        return Err(format!(
            "its {key:?} is set: {name} can't be merged; merge it with PEFT's merge_and_unload, if that can"
        ));
    }
    let start = values.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    if CHANGES_BASE.iter().any(|changes| start.starts_with(changes)) {
        return Err(format!(
            "its \"init_lora_weights\" is {start:?}, which changes the base's weights: save it as plain LoRA first (PEFT's \
             save_pretrained with path_initial_model_for_weight_conversion)"
        ));
    }
    match values.get("bias").and_then(Value::as_str) {
        None | Some("none" | "all" | "lora_only") => {}
        Some(other) => return Err(format!("its \"bias\" is {other:?}; expected none, all or lora_only")),
    }
    Ok(())
}

/// Whether a setting is more than there.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// That there are settings of which nothing is known.
fn unknown(values: &Map<String, Value>) -> Option<Warning> {
    let is_known = |key: &str| {
        WITHOUT_EFFECT.contains(&key)
            || WITH_EFFECT.contains(&key)
            || OTHER_KINDS.iter().any(|(other, _)| *other == key)
    };
    let unknown: Vec<&str> =
        values.iter().filter(|(key, value)| !is_known(key) && is_set(value)).map(|(key, _)| key.as_str()).collect();
    (!unknown.is_empty()).then(|| {
        format!(
            "{ADAPTER_CONFIG_NAME} has settings that aren't known ({}): taken to have no effect on merging",
            unknown.join(", ")
        )
        .into()
    })
}

fn number<T: PartialOrd + From<u8>>(
    values: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, String> {
    match values.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => positive(value, key, read).map(Some),
    }
}

fn positive<T: PartialOrd + From<u8>>(
    value: &Value,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<T, String> {
    let found = read(value).filter(|number| key.contains("alpha") || *number > T::from(0));
    found.ok_or_else(|| format!("{key:?} has {value}; expected a number"))
}

/// Patterns in their order, as PEFT matches them: with a name's last parts, and all of them.
fn patterns<T: PartialOrd + From<u8>>(
    values: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Regex, T)>, String> {
    let patterns = match values.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(patterns)) => patterns,
        Some(other) => return Err(format!("{key:?} is {other}; expected an object")),
    };
    let pattern = |(pattern, value): (&String, &Value)| {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
        let regex = regex.map_err(|error| format!("{key:?}'s {pattern:?} isn't a regular expression here: {error}"))?;
        Ok((regex, positive(value, key, &read)?))
    };
    patterns.iter().map(pattern).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(values: Value) -> Result<Config, String> {
        Config::parse(values.as_object().unwrap())
    }

    #[test]
    fn ranks_and_factors_are_those_of_the_first_pattern_that_matches_a_names_end() {
        let config = parse(json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 6,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.(up|down)_proj": 16, "q_proj": 3},
            "alpha_pattern": {"self_attn.q_proj": 5, "^model.layers.0.mlp.up_proj": 32},
        }))
        .unwrap();
        let of = |name: &str| (config.rank(name), config.scaling(name));
        assert_eq!(of("model.layers.1.self_attn.q_proj"), (2, 2.5));
        assert_eq!(of("model.layers.11.self_attn.q_proj"), (3, 5.0 / 3.0));
        assert_eq!(of("model.layers.0.self_attn.xq_proj"), (4, 1.5));
        // As PEFT: `^` after the optional part matches at the name's start only.
        assert_eq!(of("model.layers.0.mlp.up_proj"), (16, 2.0));
        assert_eq!(of("language.model.layers.0.mlp.up_proj"), (16, 0.375));
        let rslora = parse(json!({"peft_type": "LORA", "r": 16, "lora_alpha": 8, "use_rslora": true})).unwrap();
        assert_eq!(rslora.scaling("q_proj"), 2.0);
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        for (key, value, word) in [
            ("peft_type", json!("IA3"), "IA3"),
            ("peft_type", json!(null), "peft_type"),
            ("use_dora", json!(true), "DoRA"),
            ("alora_invocation_tokens", json!([1]), "activated LoRA"),
            ("trainable_token_indices", json!([7]), "trainable tokens"),
            ("layer_replication", json!([[0, 2]]), "layer replication"),
            ("init_lora_weights", json!("pissa_niter_4"), "pissa_niter_4"),
            ("bias", json!("some"), "some"),
            ("r", json!(0), "\"r\" has 0"),
            ("r", json!(2.5), "\"r\" has 2.5"),
            ("use_rslora", json!("yes"), "yes"),
            ("rank_pattern", json!({"(": 2}), "regular expression"),
            ("target_parameters", json!("experts"), "target_parameters"),
        ] {
            let mut values = json!({"peft_type": "LORA"});
            values[key] = value;
            let error = parse(values).unwrap_err();
            assert!(error.contains(word), "{key}: {error}");
        }
        let plain =
            json!({"peft_type": "LORA", "use_dora": false, "kasa_config": null, "init_lora_weights": "gaussian"});
        assert!(parse(plain).unwrap().warnings.is_empty());
        let newer = parse(json!({"peft_type": "LORA", "use_more": true, "use_less": false})).unwrap();
        assert!(newer.warnings[0].message.contains("(use_more)"));
    }

    #[test]
    fn parameters_are_targeted_by_whole_ends_of_their_names() {
        let names = json!(["mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]);
        let config = parse(json!({"peft_type": "LORA", "target_parameters": names})).unwrap();
        assert!(config.targets("model.layers.3.mlp.experts.down_proj"));
        assert!(config.targets("model.layers.0.mlp.experts.gate_up_proj"));
        assert!(!config.targets("model.layers.1.mlp.experts.gate_up_proj"));
        assert!(!config.targets("model.layers.1.xmlp.experts.down_proj"));
    }
}
