//! Fused experts split: clients of formats with groups load one matrix per expert and projection.

use std::collections::HashSet;
use std::sync::Arc;

use super::Decision;
use crate::checkpoint::{MAX_HEADER_LEN, Source};
use crate::dtype::byte_len;
use crate::error::{Error, Hint, Result, Warning};
use crate::models::Role;
use crate::models::Verdict;
use crate::models::expert_layouts;
use crate::models::experts::{ExpertParameter, Orientation, Split};
use crate::models::families::families;
use crate::models::names::match_end;
use crate::read::Read;
use crate::read::{Input, MAX_EXPERTS};

/// A tensor and the decision on it.
pub(crate) type Decided = (Input, Verdict, Decision);

/// Splits a layer's fused experts wherever one of them is quantized and leaves all other tensors unchanged.
///
/// Also what to know of the names that they get.
///
/// # Errors
/// When their layout isn't known.
pub(crate) fn split_experts(
    source: &Source,
    model_types: &[&str],
    tensors: Vec<Decided>,
) -> Result<(Vec<Decided>, Option<Warning>)> {
    let splits = Splits::new(model_types);
    let mut layers: HashSet<String> = HashSet::new();
    let mut warning = None;
    for (input, verdict, decision) in &tensors {
        if *decision == Decision::Keep || verdict.role != Role::FusedExperts {
            continue;
        }
        let (prefix, _) = splits.of(&input.name).ok_or_else(|| unknown(source, model_types, input))?;
        layers.insert(prefix.to_owned());
        if warning.is_none() && !splits.are_names_known(&input.name) {
            warning = Some(names_warning(&input.name));
        }
    }
    let mut all = Vec::with_capacity(tensors.len());
    for (input, verdict, decision) in tensors {
        match splits.of(&input.name).filter(|(prefix, _)| layers.contains(*prefix)) {
            None => all.push((input, verdict, decision)),
            Some((prefix, split)) => {
                let inputs = split.apply(source, prefix, &input)?;
                all.extend(inputs.into_iter().map(|input| (input, of_one(&verdict, decision), decision)));
            }
        }
    }
    Ok((all, warning))
}

/// That nobody was asked what clients call what a tensor is split into.
fn names_warning(name: &str) -> Warning {
    let message = format!(
        "{name:?} and its like become one tensor per expert, named as llm-compressor names them: no client's names for this \
         architecture's experts are known"
    );
    Warning { message, hint: None }
}

/// Columns of each matrix that fused experts are split into.
///
/// # Errors
/// When their layout isn't known.
pub(crate) fn columns(source: &Source, model_types: &[&str], input: &Input) -> Result<u64> {
    let splits = Splits::new(model_types);
    let (_, split) = splits.of(&input.name).ok_or_else(|| unknown(source, model_types, input))?;
    split.layout(source, input).map(|layout| layout.columns)
}

/// Whether it is known how fused experts of this name lie.
pub(crate) fn is_known(model_types: &[&str], name: &str) -> bool {
    Splits::new(model_types).of(name).is_some()
}

/// Joins the matrices that a fused tensor was split into, in the order and orientation that it had them in.
pub(crate) fn join(
    source: &Source,
    model_types: &[&str],
    name: &str,
    shape: &[u64],
    matrices: &[Input],
) -> Option<Input> {
    let splits = Splits::new(model_types);
    let (prefix, split) = splits.of(name)?;
    let dtype = matrices.first()?.dtype;
    let read = Read::concat(matrices.iter().map(|matrix| matrix.read.clone()));
    let one_by_one = Input { name: name.into(), dtype, shape: shape.into(), read };
    let layout = split.layout(source, &one_by_one).ok()?;
    let expected = (0..layout.experts).flat_map(|expert| split.targets.iter().map(move |target| (expert, target)));
    let names = expected.map(|(expert, target)| split.name(prefix, expert, target));
    // First that the shape is of so many bytes: its numbers may be anything.
    let is_whole = byte_len(dtype, shape) == Some(one_by_one.read.len())
        && names.eq(matrices.iter().map(|matrix| &*matrix.name))
        && matrices.iter().all(|matrix| matrix.dtype == dtype && split.is_one(matrix, &layout));
    let experts = matrices.chunks(split.targets.len());
    let joined = || Read::concat(experts.map(|matrices| split.whole(matrices, &layout)));
    is_whole.then(|| Input { read: joined(), ..one_by_one.clone() })
}

/// The verdict on one of the matrices, from that on all.
fn of_one(verdict: &Verdict, decision: Decision) -> Verdict {
    let role = if verdict.role == Role::FusedExperts { Role::ExpertLinear } else { verdict.role };
    let reason = match decision {
        Decision::Keep => verdict.reason.clone(),
        Decision::Quantize(_) | Decision::Carry(_) => {
            "one expert's matrix, split from the layer's fused experts".into()
        }
    };
    Verdict { role, reason, ..verdict.clone() }
}

fn unknown(source: &Source, model_types: &[&str], input: &Input) -> Error {
    let model = model_types.first().map_or("without a config.json".to_owned(), |name| format!("of {name:?}"));
    let why =
        format!("the layout of the fused experts {model} isn't known, and this format needs one tensor per expert");
    Error::Experts {
        path: source.files[input.read.first_file()].location.path().to_owned(),
        tensor: input.name.to_string(),
        why,
        hint: Some(Hint::Exclude),
    }
}

/// What can be split in one checkpoint.
struct Splits {
    /// By the rows of its families: into what clients call one expert's matrices.
    of_families: Vec<Split>,
    /// By what transformers' classes say: nobody was asked what clients call them.
    of_classes: Vec<Split>,
}

impl Splits {
    fn new(model_types: &[&str]) -> Splits {
        let parameters = families(model_types).flat_map(|family| family.experts);
        let of_families = parameters.flat_map(ExpertParameter::splits).collect();
        Splits { of_families, of_classes: expert_layouts::splits(model_types) }
    }

    /// What comes before the part of the name that is replaced, and by what.
    fn of<'n>(&self, name: &'n str) -> Option<(&'n str, &Split)> {
        let mut all = self.of_families.iter().chain(&self.of_classes);
        all.find_map(|split| Some((match_end(name, split.fused)?.0, split)))
    }

    /// Whether clients' names for what it is split into are known.
    fn are_names_known(&self, name: &str) -> bool {
        self.of_families.iter().any(|split| match_end(name, split.fused).is_some())
    }
}

/// How the matrices in a fused tensor lie, expert by expert.
struct Matrices {
    experts: u64,
    /// The last two dimensions as stored.
    stored: [u64; 2],
    transposed: bool,
    /// Of all matrices of an expert.
    rows: u64,
    columns: u64,
}

impl Split {
    /// How the matrices lie in a tensor.
    fn layout(&self, source: &Source, input: &Input) -> Result<Matrices> {
        let error = |why: String| {
            let path = source.files[input.read.first_file()].location.path().to_owned();
            let why = format!("its shape is {:?}: {why}", input.shape);
            Err(Error::Experts { path, tensor: input.name.to_string(), why, hint: Some(Hint::Exclude) })
        };
        let (experts, stored) = match input.shape[..] {
            // A bias is one row; transposed, each of its elements is one.
            [experts, elements] if input.name.ends_with("bias") => (experts, [1, elements]),
            [experts, rows, columns] if !input.name.ends_with("bias") => (experts, [rows, columns]),
            _ => return error("not the dimensions of fused experts".to_owned()),
        };
        if !input.dtype.bitsize().is_multiple_of(8) {
            return error(format!("elements of {} bits, which can't be taken apart", input.dtype.bitsize()));
        }
        if experts > MAX_EXPERTS || stored.contains(&0) {
            return error(format!("more than {MAX_EXPERTS} experts, or no elements"));
        }
        if experts * input.name.len() as u64 > MAX_HEADER_LEN {
            return error("its experts' names alone are more than a header holds".to_owned());
        }
        let transposed = match self.orientation {
            Orientation::Rows => false,
            Orientation::Transposed => true,
            Orientation::ByConfig(shape) => match shape.is_transposed(source.config.as_ref(), &input.shape) {
                Ok(transposed) => transposed,
                Err(why) => return error(why),
            },
        };
        let [rows, columns] = if transposed { [stored[1], stored[0]] } else { stored };
        let count = self.targets.len() as u64;
        if !rows.is_multiple_of(count) {
            return error(format!("{rows} rows don't divide into {count} matrices"));
        }
        Ok(Matrices { experts, stored, transposed, rows, columns })
    }

    /// The matrices of all experts.
    fn apply(&self, source: &Source, prefix: &str, input: &Input) -> Result<Vec<Input>> {
        let Matrices { experts, stored, transposed, rows, columns } = self.layout(source, input)?;
        let rows_of_one = rows / self.targets.len() as u64;
        let shape: Arc<[u64]> =
            if input.shape.len() == 2 { [rows_of_one].into() } else { [rows_of_one, columns].into() };
        let mut inputs = Vec::new();
        for expert in 0..experts {
            let read = input.read.slice(expert, experts);
            let read = if transposed { read.transposed(stored, input.element_size()) } else { read };
            for (which, target) in (0..).zip(self.targets) {
                let name = self.name(prefix, expert, target);
                let read = self.matrix(&read, [rows, columns], input.element_size(), which);
                inputs.push(Input { name: name.into(), dtype: input.dtype, shape: shape.clone(), read });
            }
        }
        Ok(inputs)
    }

    /// What one of an expert's matrices is called.
    fn name(&self, prefix: &str, expert: u64, target: &str) -> String {
        let end = target.replace('*', &expert.to_string());
        if prefix.is_empty() { end } else { format!("{prefix}.{end}") }
    }

    /// Whether a tensor has as many bytes as one of an expert's matrices.
    fn is_one(&self, matrix: &Input, layout: &Matrices) -> bool {
        let elements = layout.rows / self.targets.len() as u64 * layout.columns;
        byte_len(matrix.dtype, &[elements]) == Some(matrix.read.len())
    }

    /// An expert as the fused tensor has it, from its matrices: what [`Split::apply`] takes apart.
    fn whole(&self, matrices: &[Input], layout: &Matrices) -> Read {
        let (count, columns) = (matrices.len() as u64, layout.columns);
        let (rows, size) = (layout.rows / count, matrices[0].element_size());
        let reads = matrices.iter().map(|matrix| matrix.read.clone());
        // Rows that alternate are columns that do in the transpose, and there they are elements.
        let (read, is_transpose) = if self.interleaved {
            let transposes = Read::concat(reads.map(|read| read.transposed([rows, columns], size)));
            (transposes.transposed([count, columns * rows], size), true)
        } else {
            (Read::concat(reads), false)
        };
        match (is_transpose, layout.transposed) {
            (false, true) => read.transposed([layout.rows, columns], size),
            (true, false) => read.transposed([columns, layout.rows], size),
            (false, false) | (true, true) => read,
        }
    }

    /// The rows of one of an expert's matrices.
    fn matrix(&self, all: &Read, [rows, columns]: [u64; 2], size: usize, which: u64) -> Read {
        let count = self.targets.len() as u64;
        let (first, step) = if self.interleaved { (which, count) } else { (which * (rows / count), 1) };
        all.rows(columns * size as u64, first, step, rows / count)
    }
}
