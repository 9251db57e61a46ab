//! Reads data/facts.txt.
//!
//! A line of `[modules]` is a module's content: `q_proj=L` is a module with a `weight` of that kind, `.bias_table=P` a
//! parameter, `mlp/7` a module whose content is line 7; a digit after the kind is the number of dimensions, if it isn't 2. A
//! line of `[names]` says which modules the tensors with other names belong to, or names tied modules. A line of `[classes]` has the
//! model's type, the class, and the lines of its content, other names and tied modules. `*` is any number, in a module's name that
//! at the `*` of the same place; a number that decides what a tensor becomes is itself. Equal lines are there once.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use super::Kind;

/// A class's tensors.
#[derive(Clone, Debug)]
pub(super) struct Class {
    pub(super) name: &'static str,
    root: Arc<Module>,
    /// By the tensor's module on disk, with `*` for all numbers.
    other_names: HashMap<Cow<'static, str>, Vec<Other>>,
    off_disk: &'static str,
}

/// What the tensors of a module's name, with `*` for a number, belong to.
#[derive(Clone, Debug)]
struct Other {
    on_disk: &'static str,
    modules: Vec<&'static str>,
}

/// A module's content, which is looked up for every tensor of a checkpoint: most have a few names only.
#[derive(Debug, Default)]
struct Module {
    inner: BTreeMap<&'static str, Arc<Module>>,
    /// By their modules' names.
    weights: BTreeMap<&'static str, Vec<(Kind, usize)>>,
    /// Other tensors by theirs.
    parameters: BTreeMap<&'static str, Vec<(Kind, usize)>>,
}

/// A tensor's name: that of a weight's module, or its own, and what is before it.
#[derive(Clone, Copy)]
struct Name<'t> {
    path: &'t str,
    own: &'t str,
    is_weight: bool,
}

/// The file by its lines.
struct Table {
    modules: Vec<&'static str>,
    names: Vec<&'static str>,
    classes: Vec<&'static str>,
}

fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        let (head, rest) = include_str!("../data/facts.txt").split_once("[modules]\n").unwrap_or_default();
        debug_assert!(head.starts_with("# What transformers"));
        let (modules, rest) = rest.split_once("[names]\n").unwrap_or_default();
        let (names, classes) = rest.split_once("[classes]\n").unwrap_or_default();
        let lines = |text: &'static str| text.lines().collect();
        Table { modules: lines(modules), names: lines(names), classes: lines(classes) }
    })
}

/// A type's classes in the file's order: those of the auto classes first.
pub(super) fn classes(model_type: &str) -> Vec<Class> {
    let mut read = HashMap::new();
    let of_type = table().classes.iter().filter_map(|line| line.strip_prefix(model_type)?.strip_prefix(' '));
    of_type.filter_map(|line| class(line, &mut read)).collect()
}

/// All types, each once.
#[cfg(test)]
pub(super) fn model_types() -> std::collections::BTreeSet<&'static str> {
    table().classes.iter().filter_map(|line| line.split(' ').next()).collect()
}

fn class(line: &'static str, read: &mut HashMap<usize, Arc<Module>>) -> Option<Class> {
    let mut fields = line.split(' ');
    let name = fields.next()?;
    let mut place = || fields.next()?.parse::<usize>().ok();
    let root = module(place()?, read)?;
    let mut names = || table().names.get(place()?).copied();
    Some(Class { name, root, other_names: other_names(names()?), off_disk: names()? })
}

fn other_names(line: &'static str) -> HashMap<Cow<'static, str>, Vec<Other>> {
    let mut all: HashMap<_, Vec<Other>> = HashMap::new();
    for (on_disk, modules) in line.split(' ').filter_map(|entry| entry.split_once('>')) {
        all.entry(pattern(on_disk)).or_default().push(Other { on_disk, modules: modules.split(',').collect() });
    }
    all
}

/// The content that a line describes, read once.
fn module(place: usize, read: &mut HashMap<usize, Arc<Module>>) -> Option<Arc<Module>> {
    if let Some(module) = read.get(&place) {
        return Some(module.clone());
    }
    let mut content = Module::default();
    for entry in table().modules.get(place)?.split(' ').filter(|entry| !entry.is_empty()) {
        if let Some((name, kinds)) = entry.split_once('=') {
            match name.strip_prefix('.') {
                Some(name) => content.parameters.insert(name, kinds_of(kinds)),
                None => content.weights.insert(name, kinds_of(kinds)),
            };
        } else {
            let (name, inner) = entry.split_once('/')?;
            content.inner.insert(name, module(inner.parse().ok()?, read)?);
        }
    }
    let content = Arc::new(content);
    read.insert(place, content.clone());
    Some(content)
}

/// Letters, each with the number of dimensions if it isn't 2.
fn kinds_of(letters: &str) -> Vec<(Kind, usize)> {
    let mut kinds: Vec<(Kind, usize)> = Vec::new();
    for letter in letters.chars() {
        match (letter.to_digit(10), kind(letter)) {
            (Some(rank), _) => kinds.iter_mut().next_back().into_iter().for_each(|last| last.1 = rank as usize),
            (None, Some(kind)) => kinds.push((kind, 2)),
            (None, None) => {}
        }
    }
    kinds
}

fn kind(letter: char) -> Option<Kind> {
    Some(match letter {
        'L' => Kind::Linear,
        'C' => Kind::Cut,
        'F' => Kind::Fp32,
        'H' => Kind::Head,
        'N' => Kind::Labels,
        'Z' => Kind::Last,
        'T' => Kind::Tied,
        'R' => Kind::InRouter,
        'O' => Kind::Conv1d,
        'S' => Kind::Subclass,
        'E' => Kind::Embedding,
        'Q' => Kind::Router,
        'X' => Kind::Experts,
        'V' => Kind::Convolution,
        'P' => Kind::Parameter,
        'U' => Kind::Buffer,
        'B' => Kind::Bias,
        _ => return None,
    })
}

pub(super) fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

/// A name with `*` for its numbers.
fn pattern(name: &str) -> Cow<'_, str> {
    if !name.split('.').any(is_number) {
        return Cow::Borrowed(name);
    }
    let parts: Vec<&str> = name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect();
    Cow::Owned(parts.join("."))
}

impl Other {
    /// The modules of a name, if it is one of these: `*` are the numbers that the name has in their places.
    fn modules(&self, name: &str) -> Option<Vec<String>> {
        let mut numbers = Vec::new();
        for (part, number) in self.on_disk.split('.').zip(name.split('.')) {
            match part {
                "*" => numbers.push(number),
                _ if part != number => return None,
                _ => {}
            }
        }
        let filled = |module: &&str| {
            let mut numbers = numbers.iter();
            let parts =
                module.split('.').map(|part| if part == "*" { numbers.next().copied().unwrap_or(part) } else { part });
            parts.collect::<Vec<_>>().join(".")
        };
        Some(self.modules.iter().map(filled).collect())
    }
}

fn module_of(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

/// The modules that a tensor belongs to in these classes, each once.
pub(super) fn modules(classes: &[Class], tensor: &str) -> Vec<String> {
    let (name, module) = (Name::of(tensor), module_of(tensor));
    let mut found: Vec<String> = Vec::new();
    let mut pattern_of_module = None;
    // Classes of a type share most of what they have: a part is looked into once.
    let mut last: Option<(&Module, bool)> = None;
    for class in classes {
        let Some((part, rest)) = class.root.first_part(name) else { continue };
        let has_it = match last {
            Some((other, has_it)) if std::ptr::eq(other, part) => has_it,
            _ => part.find(rest).is_some(),
        };
        last = Some((part, has_it));
        let mut add = |module: String| {
            if !found.contains(&module) {
                found.push(module);
            }
        };
        if !has_it {
            continue;
        }
        if class.other_names.is_empty() {
            add(module.to_owned());
            continue;
        }
        let pattern = pattern_of_module.get_or_insert_with(|| pattern(module));
        let others = class.other_names.get(pattern.as_ref()).map(Vec::as_slice).unwrap_or_default();
        match others.iter().find_map(|other| other.modules(module)) {
            Some(modules) => modules.into_iter().for_each(&mut add),
            None => add(module.to_owned()),
        }
    }
    found
}

impl<'t> Name<'t> {
    fn of(tensor: &'t str) -> Name<'t> {
        let module = tensor.strip_suffix(".weight");
        let (path, own) = module.unwrap_or(tensor).rsplit_once('.').unwrap_or(("", module.unwrap_or(tensor)));
        Name { path, own, is_weight: module.is_some() }
    }

    /// The path's first part, and those after it.
    fn first(self) -> (&'t str, &'t str) {
        let path = self.path.trim_start_matches('.');
        path.split_once('.').unwrap_or((path, ""))
    }
}

impl Module {
    /// What the first part of a name's path is, and the rest of the name; a number may be one of several.
    fn first_part<'t>(&self, name: Name<'t>) -> Option<(&Module, Name<'t>)> {
        let (part, path) = name.first();
        if part.is_empty() || is_number(part) {
            return Some((self, name));
        }
        Some((self.inner.get(part)?, Name { path, ..name }))
    }

    /// All that is known of a name.
    fn find(&self, name: Name<'_>) -> Option<&[(Kind, usize)]> {
        let (part, path) = name.first();
        if part.is_empty() {
            let tensors = if name.is_weight { &self.weights } else { &self.parameters };
            return spellings(name.own).find_map(|own| tensors.get(own)).map(Vec::as_slice);
        }
        spellings(part).find_map(|part| self.inner.get(part)?.find(Name { path, ..name }))
    }
}

/// A part of a name as the table may have it: a number as itself, or as any.
fn spellings(part: &str) -> impl Iterator<Item = &str> {
    [part].into_iter().chain(is_number(part).then_some("*"))
}

impl Class {
    pub(super) fn kinds(&self, tensor: &str, rank: usize) -> Vec<Kind> {
        let found = self.root.find(Name::of(tensor)).unwrap_or_default();
        found.iter().filter(|(_, of)| *of == rank).map(|(kind, _)| *kind).collect()
    }

    pub(super) fn off_disk(&self) -> impl Iterator<Item = &'static str> {
        self.off_disk.split(' ').filter(|module| !module.is_empty())
    }

    pub(super) fn heads(&self) -> Vec<String> {
        let is_head = |kinds: &[(Kind, usize)]| {
            kinds.iter().any(|(kind, _)| matches!(kind, Kind::Head | Kind::Labels | Kind::Last))
        };
        let heads = self.tensors().into_iter().filter(|(name, kinds)| is_head(kinds) && !name.contains('*'));
        heads.flat_map(|(name, _)| modules(std::slice::from_ref(self), &name)).collect()
    }

    /// Every tensor's name, with `*` for numbers.
    pub(super) fn tensors(&self) -> Vec<(String, &[(Kind, usize)])> {
        let mut all = Vec::new();
        let mut open = vec![(String::new(), &*self.root)];
        while let Some((prefix, module)) = open.pop() {
            open.extend(module.inner.iter().map(|(name, inner)| (format!("{prefix}{name}."), &**inner)));
            let weights = module.weights.iter().map(|(name, kinds)| (format!("{prefix}{name}.weight"), kinds));
            let parameters = module.parameters.iter().map(|(name, kinds)| (format!("{prefix}{name}"), kinds));
            all.extend(weights.chain(parameters).map(|(name, kinds)| (name, kinds.as_slice())));
        }
        all.sort_unstable();
        all
    }
}
