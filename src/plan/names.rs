//! Names of what is written: no two tensors may have one.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use super::{Decision, Plan, PlannedTensor};
use crate::checkpoint::Source;
use crate::error::{Error, Hint, Result};

impl Plan {
    /// The names of all that is written, in their order, each with that of its file. They are put together one by one: all of them
    /// take more than the rest of the plan.
    pub(crate) fn names_in_order(&self) -> impl Iterator<Item = (String, &str)> {
        let parts =
            |i: usize, output: u32| (&*self.tensors[i].name, &*self.tensors[i].outputs.alike()[output as usize].suffix);
        let all = self.tensors.iter().enumerate();
        let mut all: Vec<(u32, u32)> = all
            .flat_map(|(i, tensor)| (0..tensor.outputs.len()).map(move |output| (i as u32, output as u32)))
            .collect();
        all.sort_unstable_by(|a, b| compare_joined(parts(a.0 as usize, a.1), parts(b.0 as usize, b.1)));
        all.into_iter().map(move |(tensor, output)| {
            let (name, suffix) = parts(tensor as usize, output);
            let file = self.files.partition_point(|file| file.tensors.end <= tensor as usize);
            (format!("{name}{suffix}"), self.files[file].name.as_str())
        })
    }
}

impl PlannedTensor {
    /// The names of its outputs.
    pub(crate) fn output_names(&self) -> impl Iterator<Item = String> {
        self.outputs.alike().iter().map(|output| format!("{}{}", self.name, output.suffix))
    }
}

/// Compares two names, each in two parts.
fn compare_joined((a, a_end): (&str, &str), (b, b_end): (&str, &str)) -> Ordering {
    let common = a.len().min(b.len());
    let [(a, a_rest), (b, b_rest)] = [a, b].map(|first| first.as_bytes().split_at(common));
    let [a_end, b_end] = [a_end, b_end].map(str::as_bytes);
    // Most differ within the shorter first part, which is found at once.
    a.cmp(b).then_with(|| a_rest.iter().chain(a_end).cmp(b_rest.iter().chain(b_end)))
}

/// What is written for a quantized weight must not have the name of another tensor.
pub(super) fn check_are_free(source: &Source, tensors: &[PlannedTensor]) -> Result<()> {
    let Some(first) = tensors.iter().find(|tensor| tensor.outputs.len() > 1) else { return Ok(()) };
    let mut suffixes: Vec<&str> = first.outputs.alike().iter().map(|output| &*output.suffix).collect();
    suffixes.retain(|suffix| !suffix.is_empty());
    let part = |tensor: &PlannedTensor| suffixes.iter().any(|suffix| tensor.name.ends_with(suffix));
    let parts: Vec<&PlannedTensor> = tensors.iter().filter(|tensor| part(tensor)).collect();
    if parts.is_empty() {
        return Ok(());
    }
    let quantized: HashSet<&str> =
        tensors.iter().filter(|tensor| tensor.decision != Decision::Keep).map(|tensor| &*tensor.name).collect();
    for tensor in parts {
        let name = &tensor.name;
        let weight = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        if let Some(weight) = weight.filter(|weight| quantized.contains(weight)) {
            let why = format!(
                "tensor {name:?} has a name that quantizing {weight:?} takes for a part of it: was the checkpoint \
                 quantized before?"
            );
            return Err(malformed(source, tensor, why, Some(Hint::Exclude)));
        }
    }
    Ok(())
}

/// No two tensors may be written under one name; `hint` is what would avoid it.
pub(super) fn check_differ(source: &Source, tensors: &[PlannedTensor], hint: Option<Hint>) -> Result<()> {
    if !may_share_a_name(tensors) {
        return Ok(());
    }
    match first_duplicate(tensors, |tensor| tensor.output_names().collect()) {
        Some((tensor, name)) => {
            let why = format!("two tensors would be written as {name:?}: which one is meant?");
            Err(malformed(source, tensor, why, hint))
        }
        None => Ok(()),
    }
}

/// Whether two outputs could have one name. Of two that do, either both are of tensors with one name, or one tensor's name
/// is the other's and the beginning of a suffix: that is seen without putting a checkpoint's names together.
fn may_share_a_name(tensors: &[PlannedTensor]) -> bool {
    let names: HashSet<&str> = tensors.iter().map(|tensor| &*tensor.name).collect();
    let suffixes: HashSet<&str> =
        tensors.iter().flat_map(|tensor| tensor.outputs.alike()).map(|output| &*output.suffix).collect();
    let beginnings: HashSet<&str> =
        suffixes.iter().flat_map(|suffix| (1..=suffix.len()).filter_map(|len| suffix.get(..len))).collect();
    // By their last byte, as few end like a given name.
    let mut by_end: HashMap<u8, Vec<&str>> = HashMap::new();
    for (beginning, end) in beginnings.iter().filter_map(|beginning| Some((*beginning, *beginning.as_bytes().last()?)))
    {
        by_end.entry(end).or_default().push(beginning);
    }
    names.len() < tensors.len()
        || tensors.iter().any(|tensor| {
            let alike = tensor.name.as_bytes().last().and_then(|end| by_end.get(end)).into_iter().flatten();
            let mut ends = alike.filter_map(|beginning| tensor.name.strip_suffix(beginning));
            ends.any(|name| names.contains(name))
        })
}

/// The first tensor with a name that another one has already, and the name.
pub(super) fn first_duplicate(
    tensors: &[PlannedTensor],
    names: impl Fn(&PlannedTensor) -> Vec<String>,
) -> Option<(&PlannedTensor, String)> {
    let mut seen = HashSet::new();
    tensors.iter().find_map(|tensor| {
        let name = names(tensor).into_iter().find(|name| !seen.insert(name.clone()))?;
        Some((tensor, name))
    })
}

fn malformed(source: &Source, tensor: &PlannedTensor, why: String, hint: Option<Hint>) -> Error {
    Error::Malformed { path: source.files[tensor.read.first_file()].location.path().to_owned(), why, hint }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::checkpoint::{Metadata, SourceFile, TensorInfo};
    use crate::dtype::Dtype;
    use crate::models::Role;
    use crate::plan::{Outputs, PlannedOutput};
    use crate::read::{Input, Read, Span};
    use crate::recipe::Recipe;
    use crate::store::{Identity, Location, Sha256Hash};

    /// Decoding has no patterns: a way out that it can't take would be none.
    #[test]
    fn two_tensors_of_one_name_are_refused_with_a_way_out_that_the_operation_has() {
        let location = Location::from("source");
        let identity = Identity { len: 16, version: String::new(), sha256: None };
        let info = TensorInfo { name: "a".into(), dtype: Dtype::U8, shape: [4].into(), offset: 8, len: 4 };
        let input = || Input::as_stored(&info, Span { file: 0, tensor: 0, offset: 8, len: 4 });
        let name = "model.safetensors".to_owned();
        let header_sha256 = Sha256Hash([0; 32]);
        let file = SourceFile {
            name,
            location: location.clone(),
            identity,
            header_sha256,
            metadata: Metadata::new(),
            tensors: vec![info.clone()],
        };
        let source = Source::of_files(location, vec![file], None);
        let error = Plan::decoded(&source, Recipe::default(), vec![input(), input()], None).unwrap_err();
        assert!(error.to_string().contains("two tensors would be written as \"a\""), "{error}");
        assert_eq!(error.hints(), []);
        let plan = Plan::decoded(&source, Recipe::default(), vec![input()], None).unwrap();
        let twice = [plan.tensors[0].clone(), plan.tensors[0].clone()];
        let error = check_differ(&source, &twice, Some(Hint::Exclude)).unwrap_err();
        assert_eq!(error.hints(), [Hint::Exclude]);
    }

    fn tensor(name: &str, suffixes: &[&'static str]) -> PlannedTensor {
        let (dtype, shape): (_, Arc<[u64]>) = (Dtype::U8, [0].into());
        let output = |suffix: &&'static str| {
            let (suffix, shape) = ((*suffix).into(), shape.clone());
            PlannedOutput { kind: None, suffix, dtype, shape, len: 0 }
        };
        PlannedTensor {
            name: name.into(),
            dtype,
            shape: shape.clone(),
            read: Read::Literal(Arc::new([])),
            role: Role::Unknown,
            decision: Decision::Keep,
            reason: "".into(),
            in_doubt: false,
            outputs: Outputs::new(suffixes.iter().map(output).collect()),
        }
    }

    #[test]
    fn names_in_two_parts_are_in_the_order_of_the_whole_ones() {
        let parts = ["", "a", "a.", "a.b", "ab", "b", ".b", "ä", "\u{10000}"];
        let names: Vec<(&str, &str)> = parts.into_iter().flat_map(|name| parts.map(|end| (name, end))).collect();
        for (&a, &b) in names.iter().flat_map(|a| names.iter().map(move |b| (a, b))) {
            let [whole_a, whole_b] = [a, b].map(|(name, end)| format!("{name}{end}"));
            assert_eq!(compare_joined(a, b), whole_a.cmp(&whole_b), "{a:?} {b:?}");
        }
    }

    #[test]
    fn outputs_of_one_name_are_never_overlooked() {
        let names = ["a", "b", "a_s", "a_sc", "a_scale", "a_scale_2", "ab", "a_packed", "", "_s"];
        let suffixes: [&[&str]; 4] = [&[""], &["", "_scale"], &["_packed", "_scale", "_scale_2"], &["cale", "_sc"]];
        let all: Vec<PlannedTensor> =
            names.iter().flat_map(|name| suffixes.map(|suffixes| tensor(name, suffixes))).collect();
        let mut of_other_names = 0;
        for (i, a) in all.iter().enumerate() {
            for b in &all[..i] {
                let written = [a, b].map(|tensor| tensor.output_names());
                let [of_a, of_b] = written.map(|names| names.collect::<HashSet<String>>());
                let clash = !of_a.is_disjoint(&of_b);
                of_other_names += usize::from(clash && a.name != b.name);
                assert!(!clash || may_share_a_name(&[a.clone(), b.clone()]), "{of_a:?} and {of_b:?}");
            }
        }
        assert!(of_other_names > 10, "{of_other_names}");
        let weights = ["l.0.q", "l.0.k", "l.1.q"].map(|name| tensor(name, &["", ".absmax", ".quant_map"]));
        assert!(!may_share_a_name(&weights));
    }
}
