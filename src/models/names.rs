//! Names of tensors on disk, of modules in the loaded model, and how clients match them.

/// Steps from a tensor's module on disk to the model's modules, as transformers' conversion mapping takes them.
#[derive(Debug)]
pub(crate) struct Renames {
    /// At most one is applied: the first that the name starts with. A pair of equals guards against the next ones.
    pub starts: &'static [(&'static str, &'static str)],
    /// All are applied, in order, to `.module.name.`
    pub parts: &'static [(&'static str, &'static str)],
    /// A part that several modules are cut from when the model is loaded, and their names.
    pub splits: &'static [(&'static str, &'static [&'static str])],
    /// Further spellings: the same checkpoint is loaded by classes that nest it differently.
    pub also: &'static [(&'static str, &'static str)],
}

/// Modules are called as their tensors are.
pub(crate) const NO_RENAMES: Renames = Renames { starts: &[], parts: &[], splits: &[], also: &[] };

impl Renames {
    /// The modules that `module`, as a tensor on disk names it, is in the loaded model.
    pub(crate) fn modules(&self, module: &str) -> Vec<String> {
        let mut dotted = format!("{module}.");
        if let Some((from, to)) = self.starts.iter().find(|(from, _)| dotted.starts_with(from)) {
            dotted.replace_range(..from.len(), to);
        }
        dotted.insert(0, '.');
        for (from, to) in self.parts {
            dotted = dotted.replacen(from, to, 1);
        }
        let mut names = vec![dotted.clone()];
        if let Some((from, targets)) = self.splits.iter().find(|(from, _)| dotted.contains(from)) {
            names = targets.iter().map(|to| dotted.replacen(from, to, 1)).collect();
        }
        let further = self.also.iter().filter(|(from, _)| dotted.contains(from));
        names.extend(further.map(|(from, to)| dotted.replacen(from, to, 1)));
        names.iter().map(|name| name[1..name.len() - 1].to_owned()).collect()
    }
}

/// Whether `name` ends with `pattern`, part by part: what comes before it, and the number in place of its `*`.
pub(crate) fn match_end<'n>(name: &'n str, pattern: &str) -> Option<(&'n str, Option<usize>)> {
    let (mut rest, mut expert) = (name, None);
    for expected in pattern.rsplit('.') {
        let part = rest.rsplit('.').next()?;
        if expected == "*" {
            // One spelling for each number, or two tensors could be the same expert's.
            expert = Some(part.parse().ok().filter(|number: &usize| number.to_string() == part)?);
        } else if part != expected {
            return None;
        }
        rest = rest[..rest.len() - part.len()].trim_end_matches('.');
    }
    Some((rest, expert))
}

/// Whether transformers takes `entry` of `llm_int8_skip_modules`, a plain module's name, to mean `module` too: it
/// does for what is inside, and for every name that ends like it (`classifier` skips `pre_classifier`).
#[cfg(test)]
pub(crate) fn skip_entry_matches(entry: &str, module: &str) -> bool {
    let inside = |rest: &str| rest.is_empty() || rest.starts_with('.');
    module.ends_with(entry) || module.strip_prefix(entry).is_some_and(inside)
}
