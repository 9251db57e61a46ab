//! The lists of every class of every model type, checked with clients' own matching over all of its modules.

use std::collections::HashSet;

use regex::Regex;

use super::{Weight, bitsandbytes, compressed_tensors};
use crate::format::{Codec, CodecOptions, FORMATS, Layout};
use crate::models::facts;
use crate::models::{Role, Rules, Verdict};
use crate::plan::clients;

/// One spelling of a class's tensors, with the number 3 wherever there is one, and what the rules make of each.
struct Spelled {
    rules: Rules<'static>,
    tensors: Vec<(String, Role, bool, bool)>,
}

impl Spelled {
    /// `native`: under the modules' names where there are others too.
    fn new(known: &facts::Known, native: bool) -> Spelled {
        let rules = Rules::new(&[known.model_type]).of_classes(&[known.class]);
        let mut named: Vec<(bool, String, usize)> = Vec::new();
        for (pattern, kinds) in &known.tensors {
            let name = pattern.replace('*', "3");
            let as_module = rules.module_names(&name)[0] == name.strip_suffix(".weight").unwrap_or(&name);
            named.extend(kinds.iter().map(|(_, rank)| (as_module != native, name.clone(), *rank)));
        }
        named.sort();
        named.dedup();
        let mut taken = HashSet::new();
        let mut tensors = Vec::new();
        for (_, name, rank) in named {
            // What several spellings have in common is one module.
            let modules = rules.module_names(&name);
            let expert = name.contains(".experts.");
            if !expert && modules.iter().any(|module| taken.contains(module)) {
                continue;
            }
            taken.extend(modules);
            let verdict = rules.classify(&name, &vec![64; rank]);
            tensors.push((name, verdict.role, verdict.quantize, verdict.linear));
        }
        Spelled { rules, tensors }
    }

    /// The same, without what clients of a format need in 16 bits.
    fn for_clients(mut self, model_type: &str, codec: &Codec) -> Spelled {
        for (name, role, quantized, linear) in &mut self.tensors {
            let (included, in_doubt, reason) = (false, false, "".into());
            let mut verdict =
                Verdict { role: *role, quantize: *quantized, linear: *linear, included, in_doubt, reason };
            clients::keep(codec, &[model_type], &self.rules, name, &mut verdict);
            *quantized = verdict.quantize;
        }
        self
    }

    fn weights(&self) -> Vec<Weight<'_>> {
        let all = self.tensors.iter();
        all.map(|(name, role, quantized, linear)| Weight { name, role: *role, quantized: *quantized, linear: *linear })
            .collect()
    }

    /// The modules of the class itself of all that is quantized, or of every Linear that is kept.
    fn modules(&self, quantized: bool) -> Vec<String> {
        let chosen = self.tensors.iter().filter(|(.., of, linear)| *of == quantized && (quantized || *linear));
        chosen.map(|(name, ..)| self.rules.module_names(name)[0].clone()).collect()
    }
}

fn spelled() -> impl Iterator<Item = (String, Spelled)> {
    facts::all().flat_map(|known| {
        let title = format!("{} {}", known.model_type, known.class);
        [false, true].map(|native| (title.clone(), Spelled::new(&known, native)))
    })
}

/// transformers' should_convert_module of 5.23, from the other side; without `borders` that of releases before 5.20.
fn skips(entry: &str, module: &str, borders: bool) -> bool {
    let regex = match borders {
        true => format!("^(?:{entry})(?:\\.|$)"),
        false => format!("^(?:{entry})"),
    };
    module.ends_with(entry) || Regex::new(&regex).unwrap().is_match(module)
}

fn is_ignored(entry: &str, module: &str) -> bool {
    match entry.strip_prefix("re:") {
        Some(pattern) => Regex::new(&format!("^(?:{pattern})")).unwrap().is_match(module),
        None => entry == module,
    }
}

/// What is wrong with a list, by a client's matching for what must be in it, and another for what mustn't.
fn faults(
    entries: &[String],
    spelled: &Spelled,
    off_disk: &[String],
    surely: impl Fn(&str, &str) -> bool,
    maybe: impl Fn(&str, &str) -> bool,
) -> Vec<String> {
    let kept = spelled.modules(false);
    let missed = kept.iter().chain(off_disk).filter(|module| !entries.iter().any(|entry| surely(entry, module)));
    let mut wrong: Vec<String> = missed.map(|module| format!("{module} isn't in the list")).collect();
    for module in spelled.modules(true) {
        let skipping = entries.iter().find(|entry| maybe(entry, &module));
        wrong.extend(skipping.map(|entry| format!("{entry} means {module}, which is quantized")));
    }
    wrong
}

#[test]
fn skip_lists_match_every_kept_linear_and_nothing_quantized_in_any_class_of_any_type() {
    let (mut wrong, mut lists) = (Vec::new(), 0);
    for (title, spelled) in spelled() {
        let off_disk: Vec<String> =
            spelled.rules.off_disk_modules().iter().map(|m| m.replace("\\d+", "3").replace('\\', "")).collect();
        match bitsandbytes::list(&spelled.rules, &spelled.weights()) {
            Ok(entries) => {
                lists += 1;
                let (surely, maybe) = (|e: &str, m: &str| skips(e, m, true), |e: &str, m: &str| skips(e, m, false));
                let quantized = spelled.modules(true);
                let off_disk: Vec<String> = off_disk.into_iter().filter(|module| !quantized.contains(module)).collect();
                let found = faults(&entries, &spelled, &off_disk, surely, maybe);
                wrong.extend(found.into_iter().map(|fault| format!("{title}: {fault}")));
            }
            Err(error) => wrong.push(format!("{title}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
    assert!(lists > 3000, "{lists}");
}

#[test]
fn ignore_lists_match_every_kept_linear_and_nothing_quantized_in_any_class_of_any_type() {
    let mut wrong = Vec::new();
    for (title, spelled) in spelled() {
        let entries = compressed_tensors::list(&spelled.rules, &spelled.weights(), Layout::CompressedTensors);
        let found = faults(&entries, &spelled, &[], is_ignored, is_ignored);
        wrong.extend(found.into_iter().map(|fault| format!("{title}: {fault}")));
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

/// As `verify` reads them, too; with towers kept, whose classes of their own share names.
#[test]
fn no_ignore_list_means_what_is_quantized_in_any_class_of_any_type() {
    let mut wrong = Vec::new();
    for layout in [Layout::CompressedTensors, Layout::Modelopt] {
        let nvfp4 = FORMATS.iter().find(|format| format.name == "nvfp4").unwrap();
        let codec = nvfp4.codec(CodecOptions { layout, ..CodecOptions::default() });
        for known in facts::all() {
            for native in [false, true] {
                let spelled = Spelled::new(&known, native).for_clients(known.model_type, &codec);
                let entries = compressed_tensors::list(&spelled.rules, &spelled.weights(), layout);
                let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
                let quantized = spelled.tensors.iter().filter(|(_, _, quantized, _)| *quantized);
                let quantized: Vec<&str> = quantized.map(|(name, ..)| name.as_str()).collect();
                let clash = compressed_tensors::clash(&spelled.rules, layout, &entries, &quantized);
                wrong.extend(
                    clash.map(|(entry, module)| {
                        format!("{} {}: {entry:?} means {module}", known.model_type, known.class)
                    }),
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}
