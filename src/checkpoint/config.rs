//! config.json: what the model is, and the place where clients learn that it is quantized.

use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{first_bytes, json_values};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::store::{Location, Sha256Hash};

/// The largest config that is read, or any other JSON beside the weights: real ones are a few KB, tokenizers some MB.
pub(crate) const MAX_JSON_LEN: u64 = 64 << 20;

/// How often a config's text is held at once: as it was read, parsed, edited, to be written, in buffers that grew by doubling.
const TEXTS: u64 = 9;

/// Where a config names the weights' file.
pub(crate) const WEIGHTS_KEY: &str = "transformers_weights";

/// A model's config: its text, which is written back as it was, and its values.
#[derive(Clone, Debug)]
pub struct Config {
    text: String,
    values: Map<String, Value>,
    /// How many values there are, at every depth.
    count: usize,
    /// Of the text as it was read.
    sha256: Sha256Hash,
}

impl Config {
    /// Reads and checks the config that lies there.
    pub fn read(location: &Location) -> Result<Config> {
        let path = location.path();
        Self::parse(location.read(MAX_JSON_LEN).at(path, "read it")?, path)
    }

    /// As [`Config::read`], from memory; `path` is for errors.
    pub fn parse(bytes: Vec<u8>, path: &Path) -> Result<Config> {
        first_bytes::check_json(&bytes, path)?;
        let text = String::from_utf8(bytes).map_err(|_| Error::malformed(path, "not UTF-8 text"))?;
        let parsed = without_python_floats(&text);
        let no_object = |error: serde_json::Error| Error::malformed(path, format!("not a JSON object: {error}"));
        let count = json_values::count(parsed.as_bytes()).map_err(no_object)?;
        let values = serde_json::from_str(&parsed).map_err(no_object)?;
        let sha256 = Sha256Hash::of(text.as_bytes());
        Ok(Config { text, values, count, sha256 })
    }

    /// The same without what stands at these paths: a key, and keys of the objects in it.
    ///
    /// # Errors
    /// When it isn't JSON any more, which can't be.
    pub(crate) fn pruned(&self, gone: &[&[&str]]) -> Result<Config> {
        let internal = |error: serde_json::Error| Error::internal(format!("editing a model's config: {error}"));
        let text = self.edited(&[], gone).map_err(internal)?;
        let values = serde_json::from_str(&without_python_floats(&text)).map_err(internal)?;
        Ok(Config { text, values, count: self.count, sha256: self.sha256 })
    }

    /// Bytes of memory that it takes at most: its values, its text, and what is made of it to be written.
    pub(crate) fn held_len(&self) -> u64 {
        json_values::held_len(self.count) + TEXTS * self.text.len() as u64
    }

    /// SHA-256 of the file's text.
    pub fn sha256(&self) -> Sha256Hash {
        self.sha256
    }

    /// The values, with Python's `Infinity` and `NaN` as any number.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// `model_type` of the model and of the models nested in it, outermost first, each once.
    pub fn model_types(&self) -> Vec<&str> {
        let nested = self.values.values().filter_map(Value::as_object);
        let all = std::iter::once(&self.values).chain(nested);
        let mut types = Vec::new();
        for model_type in all.filter_map(|config| config.get("model_type")?.as_str()) {
            if !types.contains(&model_type) {
                types.push(model_type);
            }
        }
        types
    }

    /// diffusers' name of the model's class; a model with one is diffusers'.
    pub fn class_name(&self) -> Option<&str> {
        self.values.get("_class_name")?.as_str()
    }

    /// The file of weights or the index that transformers loads, where that isn't the usual one.
    pub(crate) fn weights_name(&self) -> Option<&str> {
        self.values.get(WEIGHTS_KEY)?.as_str()
    }

    /// The classes that the checkpoint was saved from, as it names them.
    pub fn architectures(&self) -> Vec<&str> {
        let names = self.values.get("architectures").and_then(Value::as_array);
        names.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// The dtype of the model's weights, `dtype` or `torch_dtype`, if it is one of those that are quantized.
    pub fn dtype(&self) -> Option<FloatDtype> {
        let of = |values: &Map<String, Value>| {
            let name = ["dtype", "torch_dtype"].iter().find_map(|key| values.get(*key)?.as_str())?;
            FloatDtype::from_torch_name(name)
        };
        of(&self.values).or_else(|| of(self.values.get("text_config")?.as_object()?))
    }

    /// The text with each value at its key, in place of what was there. All other values keep their spelling, and the keys
    /// their order; where they are sorted, they stay so.
    pub fn with(&self, new: &[(&str, Value)]) -> Result<String, serde_json::Error> {
        self.edited(new, &[])
    }

    /// The text without these keys.
    pub fn without(&self, keys: &[&str]) -> Result<String, serde_json::Error> {
        let paths: Vec<[&str; 1]> = keys.iter().map(|&key| [key]).collect();
        self.edited(&[], &paths.iter().map(|path| &path[..]).collect::<Vec<_>>())
    }

    /// As [`Config::with`], and without what stands at the paths `gone`: a key, and keys of the objects in it.
    pub fn edited(&self, new: &[(&str, Value)], gone: &[&[&str]]) -> Result<String, serde_json::Error> {
        let parsed = without_python_floats(&self.text);
        // The parsed text differs from the true one inside numbers only, not in where things are.
        let spelled = |raw: &RawValue| {
            let begin = raw.get().as_ptr().addr() - parsed.as_ptr().addr();
            self.text[begin..begin + raw.get().len()].to_owned()
        };
        let mut entries = entries(&parsed, gone, &spelled, 1)?;
        entries.retain(|(name, _)| new.iter().all(|(key, _)| name != *key));
        let sorted = entries.is_sorted_by(|a, b| a.0 <= b.0);
        for (key, value) in new {
            let place = if sorted { entries.partition_point(|(name, _)| name.as_str() < *key) } else { entries.len() };
            let value = serde_json::to_string_pretty(value)?.replace('\n', "\n  ");
            entries.insert(place, ((*key).to_owned(), value));
        }
        Ok(object(&entries, 0) + "\n")
    }
}

/// An object's keys and their values as they are spelled, without what stands at the paths `gone`. `depth` is how many
/// objects its entries are in.
fn entries(
    text: &str,
    gone: &[&[&str]],
    spelled: &dyn Fn(&RawValue) -> String,
    depth: usize,
) -> Result<Vec<(String, String)>, serde_json::Error> {
    let RawObject(raw) = serde_json::from_str(text)?;
    let mut kept = Vec::new();
    for (name, raw) in raw {
        let below: Vec<&[&str]> = gone
            .iter()
            .filter_map(|path| path.split_first().filter(|(key, _)| **key == name))
            .map(|(_, rest)| rest)
            .collect();
        match below.iter().any(|rest| rest.is_empty()) {
            true => {}
            false if below.is_empty() => kept.push((name, spelled(raw))),
            false => {
                let value = entries(raw.get(), &below, spelled, depth + 1);
                kept.push((name, value.map_or_else(|_| spelled(raw), |inner| object(&inner, depth))));
            }
        }
    }
    Ok(kept)
}

/// An object of these entries that stands in `depth` others.
fn object(entries: &[(String, String)], depth: usize) -> String {
    if entries.is_empty() {
        return "{}".to_owned();
    }
    let indent = "  ".repeat(depth);
    let lines: Vec<String> =
        entries.iter().map(|(name, value)| format!("{indent}  {}: {value}", Value::from(name.as_str()))).collect();
    format!("{{\n{}\n{indent}}}", lines.join(",\n"))
}

/// An object whose values keep their text.
struct RawObject<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for RawObject<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> serde::de::Visitor<'de> for Entries {
            type Value = RawObject<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<RawObject<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(RawObject(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Python writes floats that JSON has no word for; each becomes a number of the same length.
fn without_python_floats(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let (mut rest, mut in_string) = (text, false);
    while let Some(c) = rest.chars().next() {
        let taken = match c {
            '\\' if in_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            '"' => {
                in_string = !in_string;
                1
            }
            'I' if !in_string && rest.starts_with("Infinity") => {
                plain.push_str("10000000");
                rest = &rest["Infinity".len()..];
                continue;
            }
            'N' if !in_string && rest.starts_with("NaN") => {
                plain.push_str("100");
                rest = &rest["NaN".len()..];
                continue;
            }
            _ => c.len_utf8(),
        };
        plain.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(text: &str) -> Config {
        let values = serde_json::from_str(&without_python_floats(text)).unwrap();
        Config { text: text.to_owned(), values, count: 0, sha256: Sha256Hash::of(text.as_bytes()) }
    }

    #[test]
    fn values_keep_their_spelling() {
        let text = "{\n  \"eps\": 1e-06,\n  \"limit\": [\n    0.0,\n    Infinity\n  ],\n  \"name\": \"NaN \\\" Infinity\"\n}\n";
        let with = config(text).with(&[("quantization_config", json!({"a": 1}))]).unwrap();
        assert_eq!(with, text.replace("\n}\n", ",\n  \"quantization_config\": {\n    \"a\": 1\n  }\n}\n"));
    }

    #[test]
    fn a_key_goes_to_its_place_and_replaces_what_was_there() {
        let with = |text: &str| config(text).with(&[("b", json!(2))]).unwrap();
        assert_eq!(with(r#"{"a": -Infinity, "c": NaN}"#), "{\n  \"a\": -Infinity,\n  \"b\": 2,\n  \"c\": NaN\n}\n");
        assert_eq!(with(r#"{"c": 1, "b": null, "a": 3}"#), "{\n  \"c\": 1,\n  \"a\": 3,\n  \"b\": 2\n}\n");
        assert_eq!(with("{}"), "{\n  \"b\": 2\n}\n");
        let both = config(r#"{"a": 1, "z": 2, "d": 0}"#).with(&[("b", json!(3)), ("a", json!(4))]).unwrap();
        assert_eq!(both, "{\n  \"z\": 2,\n  \"d\": 0,\n  \"b\": 3,\n  \"a\": 4\n}\n");
    }

    #[test]
    fn keys_are_taken_out_and_all_else_stays() {
        let without = |text: &str| config(text).without(&["b", "x"]).unwrap();
        assert_eq!(without(r#"{"a": 1e-06, "b": {"a": 1}, "c": NaN}"#), "{\n  \"a\": 1e-06,\n  \"c\": NaN\n}\n");
        assert_eq!(without(r#"{"b": 1}"#), "{}\n");
    }

    #[test]
    fn a_key_in_an_object_is_taken_out_of_it_alone() {
        let text = r#"{"a": 1e-06, "text": {"b": {"x": Infinity}, "q": 1, "c": [NaN]}, "q": 2}"#;
        let edited =
            config(text).edited(&[("n", json!(0))], &[&["text", "q"], &["text", "none"], &["a", "x"]]).unwrap();
        let expected = "{\n  \"a\": 1e-06,\n  \"text\": {\n    \"b\": {\"x\": Infinity},\n    \"c\": [NaN]\n  },\n  \"q\": 2,\n  \"n\": 0\n}\n";
        assert_eq!(edited, expected);
        assert_eq!(config(r#"{"t": {"q": 1}}"#).edited(&[], &[&["t", "q"]]).unwrap(), "{\n  \"t\": {}\n}\n");
    }

    #[test]
    fn nested_models_are_found_outermost_first() {
        let config = config(r#"{"text_config": {"model_type": "llama"}, "vision_config": {}, "model_type": "llava"}"#);
        assert_eq!(config.model_types(), ["llava", "llama"]);
    }
}
