//! `llm_int8_skip_modules`: every Linear that stays in its dtype, as clients call it, and nothing else.

use std::borrow::Cow;
use std::collections::HashSet;

use super::matching::Modules;
use super::{Weight, container};
use crate::error::{Error, Result};
use crate::models::{Role, Rules};

/// The list for these tensors.
///
/// # Errors
/// When a module that is kept is called as one that is quantized.
pub(crate) fn list(rules: &Rules, weights: &[Weight]) -> Result<Vec<String>> {
    let quantized = weights.iter().filter(|weight| weight.quantized);
    let quantized = Modules::new(quantized.flat_map(|weight| rules.module_names(weight.name)).collect());
    let quantized = Quantized { modules: quantized, of_diffusers: rules.diffusers_class().is_some() };
    let mut entries = Entries { quantized, seen: HashSet::new(), list: Vec::new() };
    // vLLM has Linears for routers and for experts one by one.
    let listed = |weight: &&Weight| weight.linear || matches!(weight.role, Role::ExpertLinear | Role::Router);
    for weight in weights.iter().filter(|weight| !weight.quantized).filter(listed) {
        let mut modules = rules.module_names(weight.name).into_iter();
        // The first is what the class of config.json calls it, others what further classes do.
        if let Some(module) = modules.next()
            && let Err(quantized) = entries.keep(weight.role, &module)
        {
            return Err(Error::AmbiguousSkipEntry { kept: module, quantized });
        }
        modules.for_each(|module| entries.keep(weight.role, &module).unwrap_or_default());
    }
    // A class that makes a head of its own would make it 4-bit, with no weight to load.
    for module in rules.off_disk_modules().iter().chain(&rules.heads()) {
        entries.add(module);
    }
    Ok(entries.list)
}

/// An entry of a skip list that clients would take to mean a quantized tensor's module, and that module.
pub(crate) fn clash(rules: &Rules, entries: &[&str], quantized: &[&str]) -> Option<(String, String)> {
    let modules = Modules::new(quantized.iter().flat_map(|tensor| rules.module_names(tensor)).collect());
    let modules = Quantized { modules, of_diffusers: rules.diffusers_class().is_some() };
    entries.iter().find_map(|entry| Some(((*entry).to_owned(), modules.skipped_by(entry)?.into_owned())))
}

/// The modules that are quantized, and whose rule it is which of them an entry means.
struct Quantized {
    modules: Modules,
    of_diffusers: bool,
}

impl Quantized {
    /// A module that an entry means.
    fn skipped_by(&self, entry: &str) -> Option<Cow<'_, str>> {
        match self.of_diffusers {
            true => self.modules.named(entry).map(Cow::Borrowed),
            false => self.modules.skipped_by(entry),
        }
    }
}

/// A list in the making.
struct Entries {
    quantized: Quantized,
    seen: HashSet<String>,
    list: Vec<String>,
}

impl Entries {
    /// Adds an entry for a module that is kept; for all experts of a layer, where none of them is quantized.
    ///
    /// # Errors
    /// The quantized module that any entry for it would match.
    fn keep(&mut self, role: Role, module: &str) -> std::result::Result<(), String> {
        let experts = container(module).filter(|_| role == Role::ExpertLinear);
        let experts = experts.filter(|experts| self.quantized.modules.inside(experts).is_none());
        if experts.is_some_and(|experts| self.add(experts)) {
            return Ok(());
        }
        if self.add(module) {
            return Ok(());
        }
        // Matches from a name's start, as a plain name does, but to its end; diffusers knows no expressions.
        let exactly = format!("{}$", regex::escape(module));
        match !self.quantized.of_diffusers && self.add(&exactly) {
            true => Ok(()),
            false => Err(self.quantized.skipped_by(module).unwrap_or_default().into_owned()),
        }
    }

    /// Adds an entry unless it would match a module that is quantized. Whether it is in the list.
    fn add(&mut self, entry: &str) -> bool {
        if self.seen.contains(entry) {
            return true;
        }
        let fits = self.quantized.skipped_by(entry).is_none();
        if fits {
            self.seen.insert(entry.to_owned());
            self.list.push(entry.to_owned());
        }
        fits
    }
}
