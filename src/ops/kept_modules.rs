//! No module that is quantized may be among those that clients are told to leave alone.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::checkpoint::Config;
use crate::format::Codec;
use crate::layout::OutputKind;
use crate::manifest::{DecisionRecord, TensorRecord};
use crate::models::Rules;
use crate::plan::kept_modules::{bitsandbytes, compressed_tensors};

/// Names that are compared with the list at once.
const AT_ONCE: usize = 1 << 12;

/// The modules that config.json lists as left unquantized.
#[derive(Default)]
pub(crate) struct KeptModules {
    list: Option<List>,
    /// The first entry, by its place, that a client would take to mean a quantized module, and that module.
    clash: Mutex<Option<(usize, String)>>,
}

struct List {
    codec: Codec,
    rules: Rules<'static>,
    entries: Vec<String>,
    /// The end of the names of tensors that hold codes.
    suffix: Cow<'static, str>,
}

impl KeptModules {
    /// What a config's `quantization_config` lists.
    pub(crate) fn of(config: &Config, quantization: &Value, codec: Codec) -> KeptModules {
        let listed = quantization.get(codec.kept_modules_key()).and_then(Value::as_array);
        let entries = listed.into_iter().flatten().filter_map(|entry| entry.as_str().map(str::to_owned)).collect();
        let suffix = codec.suffix(OutputKind::Packed).unwrap_or_default();
        let list = List { codec, rules: Rules::of_config(config), entries, suffix };
        KeptModules { list: Some(list), clash: Mutex::default() }
    }

    /// Compares names as they come.
    pub(crate) fn quantized(&self) -> Quantized<'_> {
        Quantized { kept: self, names: Vec::new() }
    }

    /// What was found.
    pub(crate) fn difference(&self) -> Option<String> {
        let clash = self.clash.lock().unwrap_or_else(PoisonError::into_inner);
        let (List { codec, entries, .. }, (entry, module)) = (self.list.as_ref()?, clash.as_ref()?);
        let (key, entry) = (codec.kept_modules_key(), &entries[*entry]);
        Some(format!("{key} has {entry:?}, but {module:?} is quantized"))
    }
}

/// Names of quantized weights that aren't compared yet.
pub(crate) struct Quantized<'a> {
    kept: &'a KeptModules,
    names: Vec<String>,
}

impl Quantized<'_> {
    /// Takes what a record says is quantized.
    pub(crate) fn add(&mut self, record: &TensorRecord) {
        let Some(List { codec, suffix, entries, .. }) = &self.kept.list else { return };
        if record.decision != DecisionRecord::Quantize || entries.is_empty() {
            return;
        }
        match codec.layout() {
            None => self.names.extend(record.sources.iter().map(|source| source.name.clone())),
            Some(_) => {
                let codes = record.outputs.first().and_then(|output| output.name.strip_suffix(&**suffix));
                self.names.extend(codes.map(str::to_owned));
            }
        }
        if self.names.len() >= AT_ONCE {
            self.check();
        }
    }

    /// Compares those that are left.
    pub(crate) fn check(&mut self) {
        let Some(List { codec, rules, entries, .. }) = &self.kept.list else { return };
        let names = std::mem::take(&mut self.names);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let listed: Vec<&str> = entries.iter().map(String::as_str).collect();
        let clash = match codec.layout() {
            _ if names.is_empty() => None,
            None => bitsandbytes::clash(rules, &listed, &names),
            Some(layout) => compressed_tensors::clash(rules, layout, &listed, &names),
        };
        let Some((entry, module)) = clash else { return };
        let found = listed.iter().position(|listed| *listed == entry).map(|place| (place, module));
        let mut clash = self.kept.clash.lock().unwrap_or_else(PoisonError::into_inner);
        // Whichever thread was first.
        *clash = [clash.take(), found].into_iter().flatten().min();
    }
}
