//! Fusing: all of a layer's experts become the model's own 3-D parameters.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::names::first_duplicate;
use super::outputs::{Alike, Outputs};
use super::{Decision, PlannedTensor};
use crate::checkpoint::Source;
use crate::error::{Error, Hint, Result};
use crate::models::Role;
use crate::models::experts::{ExpertParameter, Fusion};
use crate::models::families::families;
use crate::read::Read;

/// Fuses the experts that are to be quantized and leaves all other tensors unchanged. A fused tensor takes the place of
/// the first it is made of.
///
/// # Errors
/// When the expert layout isn't known, an expert is missing, or they differ in shape, dtype or decision.
pub(crate) fn fuse(
    source: &Source,
    model_types: &[&str],
    tensors: Vec<PlannedTensor>,
    alike: &mut Alike<'_>,
) -> Result<Vec<PlannedTensor>> {
    let parameters = families(model_types).flat_map(|family| family.experts);
    let fusions: Vec<Fusion> = parameters.filter_map(ExpertParameter::fusion).collect();
    let groups = groups(source, model_types, &fusions, &tensors)?;
    let mut fused: HashMap<usize, PlannedTensor> = HashMap::new();
    let mut taken: HashSet<usize> = HashSet::new();
    for group in &groups {
        let members = || group.members.values().copied();
        if members().all(|i| tensors[i].decision == Decision::Keep) {
            continue;
        }
        let mut tensor = group.fuse(source, &tensors)?;
        tensor.outputs = alike.outputs(&tensor);
        fused.insert(members().min().unwrap_or_default(), tensor);
        taken.extend(members());
    }
    let tensors = tensors.into_iter().enumerate();
    let tensors: Vec<PlannedTensor> = tensors
        .filter_map(|(i, tensor)| fused.remove(&i).or_else(|| (!taken.contains(&i)).then_some(tensor)))
        .collect();
    match first_duplicate(&tensors, |tensor| vec![tensor.name.to_string()]) {
        Some((tensor, _)) => {
            let why = "the source has a tensor of this name beside the experts that would be fused into it";
            Err(error(source, tensor, why.to_owned()))
        }
        None => Ok(tensors),
    }
}

/// The tensors that make up one parameter.
struct Group<'a> {
    /// What the parameter's name begins with.
    prefix: &'a str,
    fusion: Fusion,
    /// Places among the tensors, by expert and by which of the fusion's sources it is.
    members: BTreeMap<(Option<usize>, usize), usize>,
}

/// All groups, in the order of their first members.
fn groups<'a>(
    source: &Source,
    model_types: &[&str],
    fusions: &[Fusion],
    tensors: &'a [PlannedTensor],
) -> Result<Vec<Group<'a>>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    let mut places: HashMap<(&str, &str), usize> = HashMap::new();
    for (i, tensor) in tensors.iter().enumerate() {
        let found = fusions.iter().find_map(|fusion| Some((*fusion, fusion.source_of(&tensor.name)?)));
        let Some((fusion, (prefix, which, expert))) = found else {
            let is_experts = tensor.role.is_expert() || is_of_one_expert(&tensor.name);
            if is_experts && tensor.decision != Decision::Keep {
                return Err(unknown(source, model_types, tensor));
            }
            continue;
        };
        let place = *places.entry((prefix, fusion.target)).or_insert_with(|| {
            groups.push(Group { prefix, fusion, members: BTreeMap::new() });
            groups.len() - 1
        });
        groups[place].members.insert((expert, which), i);
    }
    Ok(groups)
}

/// Whether a tensor is one expert's by its name, whatever else is known of it.
fn is_of_one_expert(name: &str) -> bool {
    let mut parts = name.split('.').skip_while(|part| *part != "experts").skip(1);
    parts.next().is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// An error about an expert's tensor, with the way out.
fn error(source: &Source, tensor: &PlannedTensor, why: String) -> Error {
    let (path, tensor) = (source.files[tensor.read.first_file()].location.path().to_owned(), tensor.name.to_string());
    Error::Experts { path, tensor, why, hint: Some(Hint::KeepExperts) }
}

fn unknown(source: &Source, model_types: &[&str], tensor: &PlannedTensor) -> Error {
    let known = families(model_types).any(|family| !family.experts.is_empty());
    let why = match (model_types.first(), known) {
        (Some(model_type), false) => format!("the expert layout of {model_type:?} isn't known"),
        (Some(model_type), true) => format!("{model_type:?} has no experts with this name, as far as is known"),
        (None, _) => "there is no config.json to tell the model by".to_owned(),
    };
    error(source, tensor, why)
}

impl Group<'_> {
    /// The parameter, without its outputs.
    fn fuse(&self, source: &Source, tensors: &[PlannedTensor]) -> Result<PlannedTensor> {
        self.check(source, tensors)?;
        let first = self.first(tensors);
        let stacked = self.members.keys().next().is_some_and(|(expert, _)| expert.is_none());
        let experts =
            if stacked { first.shape[0] } else { self.members.len() as u64 / self.fusion.sources.len() as u64 };
        let matrices: Vec<[u64; 2]> = (0..self.fusion.sources.len()).map(|i| matrix(self.member(tensors, i))).collect();
        let transposed = self.is_transposed(source, first)?;
        let rows: u64 = matrices.iter().map(|[rows, _]| rows).sum();
        let columns = matrices[0][1];
        let size = first.dtype.bitsize() / 8;
        let matrix = |expert: u64, i: usize| {
            let read = self.member(tensors, i).read.slice(expert, experts);
            if transposed { read.transposed(matrices[i], size) } else { read }
        };
        let read = if stacked && matrices.len() == 1 && !transposed {
            first.read.clone()
        } else if stacked {
            Read::concat(
                (0..experts)
                    .flat_map(|expert| (0..matrices.len()).map(move |i| (expert, i)))
                    .map(|(e, i)| matrix(e, i)),
            )
        } else {
            Read::concat(self.members.values().map(|&i| tensors[i].read.clone()))
        };
        Ok(PlannedTensor {
            name: self.name(self.fusion.target).into(),
            dtype: first.dtype,
            shape: if transposed { [experts, columns, rows].into() } else { [experts, rows, columns].into() },
            read,
            role: Role::FusedExperts,
            decision: first.decision,
            reason: "3-D weight of all experts in the layer".into(),
            in_doubt: false,
            outputs: Outputs::default(),
        })
    }

    /// A name of the group that ends so.
    fn name(&self, end: &str) -> String {
        if self.prefix.is_empty() { end.to_owned() } else { format!("{}.{end}", self.prefix) }
    }

    /// The first expert's tensor of source `which`, or all experts'.
    fn member<'t>(&self, tensors: &'t [PlannedTensor], which: usize) -> &'t PlannedTensor {
        let expert = self.members.keys().next().and_then(|(expert, _)| *expert);
        &tensors[self.members[&(expert, which)]]
    }

    fn first<'t>(&self, tensors: &'t [PlannedTensor]) -> &'t PlannedTensor {
        &tensors[*self.members.values().next().expect("a group has members")]
    }

    /// Whether every expert has every matrix, and they are alike.
    fn check(&self, source: &Source, tensors: &[PlannedTensor]) -> Result<()> {
        self.check_complete(source, tensors)?;
        for (&(expert, which), &i) in &self.members {
            let rank = if expert.is_some() { 2 } else { 3 };
            self.check_member(tensors, &tensors[i], which, rank).map_err(|why| error(source, &tensors[i], why))?;
        }
        Ok(())
    }

    fn check_complete(&self, source: &Source, tensors: &[PlannedTensor]) -> Result<()> {
        let matrices = self.fusion.sources.len();
        let last = self.members.keys().next_back().and_then(|(expert, _)| *expert);
        let experts = last.map_or(1, |last| last.saturating_add(1));
        if self.members.len() >= experts.saturating_mul(matrices) {
            return Ok(());
        }
        let mut all = (0..experts).flat_map(|e| (0..matrices).map(move |which| (last.map(|_| e), which)));
        let (expert, which) = all.find(|key| !self.members.contains_key(key)).unwrap_or_default();
        let name = self.fusion.sources[which].replace('*', &expert.unwrap_or_default().to_string());
        Err(error(source, self.first(tensors), format!("{:?} is missing", self.name(&name))))
    }

    /// Whether a tensor goes with the group's first and with the others of its source.
    fn check_member(
        &self,
        tensors: &[PlannedTensor],
        tensor: &PlannedTensor,
        which: usize,
        rank: usize,
    ) -> Result<(), String> {
        let (first, like) = (self.first(tensors), self.member(tensors, which));
        let found = &tensor.shape;
        if found.len() != rank {
            return Err(format!("its shape is {found:?}; expected {rank} dimensions"));
        }
        let columns_fit = matrix(tensor)[1] == matrix(first)[1] && (rank == 2 || found[0] == first.shape[0]);
        if *found != like.shape || !columns_fit {
            let other = if *found == like.shape { first } else { like };
            return Err(format!("its shape {found:?} doesn't fit {:?} of {:?}", other.shape, other.name));
        }
        if tensor.dtype != first.dtype {
            let (found, expected) = (tensor.dtype, first.dtype);
            return Err(format!("it is {found} and {:?} is {expected}; a fused tensor has one dtype", first.name));
        }
        if tensor.decision != first.decision {
            let why = format!("it would be fused with {:?}, but only one of them is quantized", first.name);
            return Err(format!("{why}: exclude all experts of the layer or none"));
        }
        Ok(())
    }

    /// Whether the matrices are stored with rows and columns exchanged, as transformers decides it: by the shape.
    fn is_transposed(&self, source: &Source, tensor: &PlannedTensor) -> Result<bool> {
        let Some(shape) = self.fusion.transposed_unless else { return Ok(false) };
        shape.is_transposed(source.config.as_ref(), &tensor.shape).map_err(|why| error(source, tensor, why))
    }
}

/// Rows and columns of one expert's matrix.
fn matrix(tensor: &PlannedTensor) -> [u64; 2] {
    match tensor.shape[..] {
        [.., rows, columns] => [rows, columns],
        _ => [0, 0],
    }
}
