//! How clients match an entry of a list with a module's name; `data/matching.json`, `vllm.json` and `diffusers.json` have what
//! they themselves say.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::HashMap;

use regex::Regex;

use crate::models::diffusers;

/// Names of modules, forwards and backwards in order: those that begin and those that end alike lie together.
pub(super) struct Modules {
    names: Vec<String>,
    reversed: Vec<String>,
    /// Places in `names` by the name with `0` for each of its numbers, for rules that look everywhere in a name.
    alike: OnceCell<HashMap<String, Vec<usize>>>,
}

impl Modules {
    pub(super) fn new(mut names: Vec<String>) -> Modules {
        let mut reversed: Vec<String> = names.iter().map(|name| reverse(name)).collect();
        names.sort_unstable();
        names.dedup();
        reversed.sort_unstable();
        Modules { names, reversed, alike: OnceCell::new() }
    }

    /// A module that some release of transformers takes `entry` of `llm_int8_skip_modules` to mean: one that the entry, a
    /// regular expression, matches from its start (since 5.20 up to a border of its parts), or that ends with it.
    pub(super) fn skipped_by(&self, entry: &str) -> Option<Cow<'_, str>> {
        let backwards = reverse(entry);
        let place = self.reversed.partition_point(|name| *name < backwards);
        if let Some(name) = self.reversed.get(place).filter(|name| name.starts_with(&backwards)) {
            return Some(Cow::Owned(reverse(name)));
        }
        match is_plain(entry) {
            true => begins_with(&self.names, 0, entry.as_bytes()).map(Cow::Borrowed),
            false => self.matched_by(entry),
        }
    }

    /// A module that diffusers takes an entry of its list to mean.
    pub(super) fn named(&self, entry: &str) -> Option<&str> {
        self.names.iter().find(|module| diffusers::means(entry, module)).map(String::as_str)
    }

    /// A module that a regular expression matches from its start, as in `re:` entries of compressed-tensors and vLLM.
    pub(super) fn matched_by(&self, pattern: &str) -> Option<Cow<'_, str>> {
        // Clients would stop at an expression that is none.
        let regex = Regex::new(&format!("^(?:{pattern})")).ok()?;
        self.names.iter().find(|name| regex.is_match(name)).map(|name| Cow::Borrowed(&**name))
    }

    /// A module that vLLM takes an entry of `exclude_modules` to mean: one that it is part of, or that it matches as file names are;
    /// or ModelOpt, which goes by the latter.
    pub(super) fn excluded_by(&self, entry: &str) -> Option<Cow<'_, str>> {
        // vLLM makes two entries of such a one: the module itself, and what is in it.
        let part = entry.strip_suffix('*').filter(|part| !part.is_empty() && !part.ends_with('.')).unwrap_or(entry);
        let wildcards = [entry.to_owned(), part.to_owned(), format!("{part}.*")];
        let mut wildcards = wildcards.iter().filter(|_| entry.contains(['*', '?', '[']));
        let containing = self.containing(part).map(Cow::Borrowed);
        containing.or_else(|| wildcards.find_map(|entry| self.matched_by(&format!("{}$", from_wildcards(entry)))))
    }

    /// A module that `part` is anywhere in the name of.
    fn containing(&self, part: &str) -> Option<&str> {
        let alike = self.alike.get_or_init(|| {
            let mut alike: HashMap<String, Vec<usize>> = HashMap::new();
            for (place, name) in self.names.iter().enumerate() {
                alike.entry(without_numbers(name)).or_default().push(place);
            }
            alike
        });
        let any = without_numbers(part);
        let places = alike.iter().filter(|(name, _)| name.contains(&any)).flat_map(|(_, places)| places);
        // The first, whatever the map's order.
        places.copied().filter(|place| self.names[*place].contains(part)).min().map(|place| &*self.names[place])
    }

    /// Whether a module is called so.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.binary_search_by(|other| (**other).cmp(name)).is_ok()
    }

    /// A module that is inside another.
    pub(super) fn inside(&self, container: &str) -> Option<&str> {
        let start = format!("{container}.");
        let place = self.names.partition_point(|name| *name < start);
        self.names.get(place).filter(|name| name.starts_with(&start)).map(String::as_str)
    }
}

/// A name with `0` for each run of digits.
fn without_numbers(name: &str) -> String {
    let mut short = String::with_capacity(name.len());
    for c in name.chars() {
        match (c.is_ascii_digit(), short.ends_with('0')) {
            (true, true) => {}
            (true, false) => short.push('0'),
            (false, _) => short.push(c),
        }
    }
    short
}

/// The regular expression that Python's fnmatch makes of a pattern.
fn from_wildcards(pattern: &str) -> String {
    let mut expression = String::new();
    let mut rest = pattern;
    while let Some(first) = rest.chars().next() {
        let class = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')).filter(|(class, _)| !class.is_empty());
        rest = match (first, class) {
            ('*', _) => {
                expression += ".*";
                &rest[1..]
            }
            ('?', _) => {
                expression += ".";
                &rest[1..]
            }
            ('[', Some((class, after))) => {
                let (not, class) = class.strip_prefix('!').map_or(("", class), |class| ("^", class));
                let escaped = |c: char| if c == '-' { c.to_string() } else { regex::escape(&c.to_string()) };
                expression += &format!("[{not}{}]", class.chars().map(escaped).collect::<String>());
                after
            }
            _ => {
                let (literal, after) = rest.split_at(first.len_utf8());
                expression += &regex::escape(literal);
                after
            }
        };
    }
    expression
}

/// Whether an entry has nothing that means more in a regular expression than itself, but dots.
fn is_plain(entry: &str) -> bool {
    entry.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/'))
}

/// The first of the sorted `names`, alike up to `at`, that goes on as `entry`, whose dots stand for any byte.
fn begins_with<'n>(names: &'n [String], at: usize, entry: &[u8]) -> Option<&'n str> {
    let Some((&byte, rest)) = entry.split_first() else { return names.first().map(String::as_str) };
    let names = &names[names.partition_point(|name| name.len() <= at)..];
    let of = |name: &String| name.as_bytes()[at];
    if byte != b'.' {
        let (from, to) = (names.partition_point(|n| of(n) < byte), names.partition_point(|n| of(n) <= byte));
        return if from < to { begins_with(&names[from..to], at + 1, rest) } else { None };
    }
    let mut from = 0;
    while from < names.len() {
        let to = from + names[from..].partition_point(|n| of(n) <= of(&names[from]));
        if let Some(found) = begins_with(&names[from..to], at + 1, rest) {
            return Some(found);
        }
        from = to;
    }
    None
}

fn reverse(name: &str) -> String {
    name.chars().rev().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        modules: Vec<String>,
        /// By client, and by entry: the modules that it means.
        clients: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("data/matching.json")).unwrap()
    }

    #[test]
    fn an_entry_means_what_some_release_of_transformers_takes_it_to_mean() {
        let Golden { modules, clients } = golden();
        let of_transformers: Vec<_> = clients.iter().filter(|(client, _)| client.starts_with("transformers")).collect();
        assert_eq!(of_transformers.len(), 2);
        for entry in of_transformers[0].1.keys() {
            let theirs: BTreeSet<&String> = of_transformers.iter().flat_map(|(_, answers)| &answers[entry]).collect();
            let is_meant = |module: &&String| Modules::new(vec![(*module).clone()]).skipped_by(entry).is_some();
            assert_eq!(modules.iter().filter(is_meant).collect::<BTreeSet<_>>(), theirs, "{entry}");
            let found = Modules::new(modules.clone()).skipped_by(entry).map(Cow::into_owned);
            assert_eq!(found.is_some(), !theirs.is_empty(), "{entry}: {found:?}");
        }
    }

    #[test]
    fn patterns_and_names_mean_what_compressed_tensors_takes_them_to_mean() {
        let Golden { modules, clients } = golden();
        let (_, answers) = clients.iter().find(|(client, _)| client.starts_with("compressed-tensors")).unwrap();
        for (entry, theirs) in answers {
            let is_meant = |module: &&String| {
                let module = Modules::new(vec![(*module).clone()]);
                entry.strip_prefix("re:").map_or(module.has(entry), |pattern| module.matched_by(pattern).is_some())
            };
            assert_eq!(modules.iter().filter(is_meant).cloned().collect::<BTreeSet<_>>(), *theirs, "{entry}");
        }
    }

    #[derive(Deserialize)]
    struct OfVllm {
        layers: Vec<String>,
        ignore: BTreeMap<String, BTreeSet<String>>,
        exclude: BTreeMap<String, BTreeSet<String>>,
        wildcards: BTreeMap<String, BTreeSet<String>>,
    }

    fn of_vllm() -> OfVllm {
        serde_json::from_str(include_str!("data/vllm.json")).unwrap()
    }

    #[test]
    fn patterns_and_names_mean_what_vllm_takes_them_to_mean() {
        let OfVllm { layers, ignore, .. } = of_vllm();
        assert!(ignore.values().any(|theirs| theirs.len() > 1));
        for (entry, theirs) in ignore {
            let is_meant = |module: &&String| {
                let module = Modules::new(vec![(*module).clone()]);
                entry.strip_prefix("re:").map_or(module.has(&entry), |pattern| module.matched_by(pattern).is_some())
            };
            // What several Linears make is asked for by whole lists.
            let alone = |layer: &&String| !layer.ends_with("qkv_proj") && !layer.ends_with("gate_up_proj");
            assert_eq!(
                layers.iter().filter(alone).filter(is_meant).cloned().collect::<BTreeSet<_>>(),
                theirs,
                "{entry}"
            );
        }
    }

    #[test]
    fn an_excluded_name_means_what_vllm_or_modelopt_takes_it_to_mean() {
        let OfVllm { layers, exclude, wildcards, .. } = of_vllm();
        assert!(exclude.values().any(|theirs| theirs.len() > 1));
        for (entry, theirs) in exclude {
            let is_meant = |module: &&String| Modules::new(vec![(*module).clone()]).excluded_by(&entry).is_some();
            let ours = layers.iter().filter(|layer| !layer.ends_with(".experts")).filter(is_meant).cloned();
            assert_eq!(ours.collect::<BTreeSet<_>>(), &theirs | &wildcards[&entry], "{entry}");
            let all = Modules::new(layers.clone());
            assert_eq!(
                all.excluded_by(&entry).is_some(),
                !theirs.is_empty() || !wildcards[&entry].is_empty(),
                "{entry}"
            );
        }
    }

    #[test]
    fn an_entry_means_what_diffusers_takes_it_to_mean() {
        #[derive(Deserialize)]
        struct OfDiffusers {
            modules: Vec<String>,
            entries: BTreeMap<String, BTreeSet<String>>,
        }
        let OfDiffusers { modules, entries } = serde_json::from_str(include_str!("data/diffusers.json")).unwrap();
        assert!(entries.values().any(|theirs| theirs.len() > 1));
        for (entry, theirs) in entries {
            let is_meant = |module: &&String| Modules::new(vec![(*module).clone()]).named(&entry).is_some();
            assert_eq!(modules.iter().filter(is_meant).cloned().collect::<BTreeSet<_>>(), theirs, "{entry}");
        }
    }

    #[test]
    fn what_is_inside_a_module_is_found() {
        let modules = Modules::new(["a.b.c", "a.bc", "ab.c"].map(str::to_owned).to_vec());
        assert_eq!(modules.inside("a"), Some("a.b.c"));
        assert_eq!(modules.inside("a.b"), Some("a.b.c"));
        assert_eq!(modules.inside("a.b.c"), None);
        assert_eq!(modules.inside("b"), None);
    }
}
