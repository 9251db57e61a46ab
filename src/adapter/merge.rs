//! What an adapter makes of a base's tensors.
//!
//! A module's change is `B · A` times alpha / rank (or alpha / √rank), of a Linear as it is, of an embedding or a Conv1D transposed. For
//! a parameter of all experts, rows `e * rank ..` of A are expert e's, and columns `k * experts + e` of B are its k-th.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::base::{Base, Found, NotFound};
use super::parameter::Parameter;
use super::tensors::{Kind, Pair, Tensors};
use super::{Adapter, experts};
use crate::checkpoint::Source;
use crate::dtype::FloatDtype;
use crate::error::{Error, Result, Warning};
use crate::models::expert_layouts;
use crate::read::{AdapterTensor, Factor, Input, MAX_RANK, Product, Read, Span};

/// The base's tensors with the adapter merged into them, whose file is to be number `file` of the source's; and what to know of it.
///
/// # Errors
/// When a tensor of the adapter is of none of the base's, or doesn't fit it.
pub(crate) fn merge(
    source: &Source,
    inputs: Vec<Input>,
    adapter: &Adapter,
    file: usize,
) -> Result<(Vec<Input>, Vec<Warning>)> {
    let tensors = Tensors::of(adapter)?;
    let mut merging = Merging::new(source, &inputs, adapter, file);
    for (name, number) in &tensors.whole {
        merging.replace(name, *number)?;
    }
    for ((module, kind), pairs) in &tensors.pairs {
        match (kind, merging.parameters(module)) {
            (Kind::Matrix, parameters) if !parameters.is_empty() => merging.parameters_of(module, parameters, pairs)?,
            _ => merging.module(module, *kind, pairs)?,
        }
    }
    let (changes, warnings) = (merging.changes, merging.warnings);
    Ok((changed(inputs, changes), warnings))
}

/// What is done to a tensor of the base.
enum Change {
    Replace(Arc<AdapterTensor>),
    /// To the matrix of the expert with this number, or to all of it.
    Add(Option<u64>, Product),
}

/// The base's tensors, each with its changes.
fn changed(inputs: Vec<Input>, mut changes: HashMap<usize, Vec<Change>>) -> Vec<Input> {
    let change = |(number, mut input): (usize, Input)| {
        let Some(dtype) = FloatDtype::of(input.dtype) else { return input };
        let (mut of_experts, experts) = (HashMap::new(), input.shape.first().copied().unwrap_or_default());
        for change in changes.remove(&number).unwrap_or_default() {
            match change {
                Change::Replace(by) => input.read = input.read.replaced(dtype, by),
                Change::Add(None, product) => input.read = input.read.with_product(dtype, product),
                Change::Add(Some(expert), product) => drop(of_experts.insert(expert, product)),
            }
        }
        if !of_experts.is_empty() {
            let matrices = (0..experts).map(|expert| match of_experts.remove(&expert) {
                Some(product) => input.read.slice(expert, experts).with_product(dtype, product),
                None => input.read.slice(expert, experts),
            });
            input.read = Read::concat(matrices.collect::<Vec<_>>());
        }
        input
    };
    inputs.into_iter().enumerate().map(change).collect()
}

/// An adapter on its way into a base.
struct Merging<'a> {
    base: Base<'a>,
    adapter: &'a Adapter,
    file: usize,
    path: Arc<Path>,
    /// Whether transformers' class has experts' parameters as `[experts, in, out]`.
    transposed: bool,
    changes: HashMap<usize, Vec<Change>>,
    warnings: Vec<Warning>,
    /// Tensors that were replaced, each by one.
    replaced: BTreeSet<usize>,
}

impl<'a> Merging<'a> {
    fn new(source: &'a Source, inputs: &'a [Input], adapter: &'a Adapter, file: usize) -> Merging<'a> {
        let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
        let transposed = expert_layouts::is_transposed(&model_types);
        let path = adapter.file.location.path().into();
        let (changes, replaced) = Default::default();
        let warnings = adapter.config.warnings.clone();
        let base = Base::new(source, inputs);
        Merging { base, adapter, file, path, transposed, changes, warnings, replaced }
    }

    fn name(&self, number: usize) -> &'a str {
        &self.adapter.file.tensors[number].name
    }

    fn error(&self, number: usize, why: impl std::fmt::Display) -> Error {
        self.adapter.error(self.name(number), why)
    }

    fn shape_error(&self, number: usize, expected: &[u64], of: &str) -> Error {
        let found = &self.adapter.file.tensors[number].shape;
        self.error(number, format!("its shape is {found:?}; expected {expected:?}, for {of:?} of the base"))
    }

    /// A tensor of the adapter, to be read.
    fn tensor(&self, number: usize) -> Result<Arc<AdapterTensor>> {
        let info = &self.adapter.file.tensors[number];
        let dtype = FloatDtype::of(info.dtype)
            .ok_or_else(|| self.error(number, format!("it is {}; expected F32, BF16 or F16", info.dtype)))?;
        let place = Span { file: self.file, tensor: number, offset: info.offset, len: info.len };
        let (name, path) = (info.name.to_string(), self.path.clone());
        Ok(Arc::new(AdapterTensor { name, path, place, dtype }))
    }

    /// The base's tensor that is called so when it is loaded.
    fn find(&mut self, name: &str, for_tensor: usize) -> Result<usize> {
        let (found, is_elsewhere) = match self.base.find(name) {
            Ok((Found::Tensor(number), is_elsewhere)) => (number, is_elsewhere),
            Ok((Found::Pieces(_), _)) => {
                return Err(
                    self.error(for_tensor, format!("{name:?} is a parameter of all experts, of several tensors"))
                );
            }
            Err(NotFound(why)) => return Err(self.error(for_tensor, why)),
        };
        self.base.check_is_a_float(found).map_err(|why| self.error(for_tensor, why))?;
        if is_elsewhere {
            self.told_elsewhere(name, &self.base.inputs[found].name.clone());
        }
        Ok(found)
    }

    fn told_elsewhere(&mut self, name: &str, base: &str) {
        let is_told = self.warnings.iter().any(|warning| warning.message.starts_with("the adapter's names"));
        if !is_told {
            let what = format!(
                "the adapter's names begin otherwise than the base's: {name:?} is taken for {base:?}, and others likewise"
            );
            self.warnings.push(what.into());
        }
    }

    /// A whole tensor takes the place of the base's.
    fn replace(&mut self, name: &str, number: usize) -> Result<()> {
        let input = self.find(name, number)?;
        let expected = &self.base.inputs[input];
        if self.adapter.file.tensors[number].shape != expected.shape {
            return Err(self.shape_error(number, &expected.shape, &expected.name));
        }
        if !self.replaced.insert(input) {
            return Err(self.error(number, format!("another tensor of the adapter replaces {:?}, too", expected.name)));
        }
        let by = self.tensor(number)?;
        self.changes.entry(input).or_default().push(Change::Replace(by));
        Ok(())
    }

    /// The product of a Linear's, a Conv1D's or an embedding's factors.
    fn module(&mut self, module: &str, kind: Kind, pairs: &[Pair]) -> Result<()> {
        let &[pair] = pairs else {
            let number = pairs[pairs.len() - 1].a;
            let why = "it is of a wrapper around another, as parameters have in \"target_parameters\": none of these has its name";
            return Err(self.error(number, why));
        };
        let input = self.find(&format!("{module}.weight"), pair.a)?;
        let weight = &self.base.inputs[input];
        if self.base.is_cut(input) {
            let why = format!(
                "{:?}'s rows are put in other places when the model is loaded: merge it with PEFT",
                weight.name
            );
            return Err(self.error(pair.a, why));
        }
        let transposed = kind == Kind::Embedding || self.base.is_conv1d(input, self.adapter.config.fan_in_fan_out);
        let &[rows, columns] = &weight.shape[..] else {
            let why = format!("{:?} has the shape {:?}; only matrices can be merged into", weight.name, weight.shape);
            return Err(self.error(pair.a, why));
        };
        let [out, inner] = if transposed { [columns, rows] } else { [rows, columns] };
        let of = weight.name.clone();
        let rank = self.check_factors(pair, module, [out, inner], 1, &of)?;
        let scaling = self.adapter.config.scaling(module);
        let a = Factor { tensor: self.tensor(pair.a)?, first: 0, step: 1, rank_step: inner };
        let b = Factor { tensor: self.tensor(pair.b)?, first: 0, step: rank, rank_step: 1 };
        let (left, right) = if transposed { (a, b) } else { (b, a) };
        let product = Product { rows, columns, rank, left, right: Some(right), scaling };
        let changes = self.changes.entry(input).or_default();
        if changes.iter().any(|change| matches!(change, Change::Add(..))) {
            return Err(self.error(pair.a, format!("other tensors of the adapter are merged into {of:?}, too")));
        }
        changes.push(Change::Add(None, product));
        match pair.bias {
            Some(bias) => self.bias(module, bias, scaling),
            None => Ok(()),
        }
    }

    /// A trained bias is added to the module's own, as `lora_bias` has it.
    fn bias(&mut self, module: &str, number: usize, scaling: f64) -> Result<()> {
        let input = self.find(&format!("{module}.bias"), number)?;
        let expected = &self.base.inputs[input];
        if self.adapter.file.tensors[number].shape != expected.shape || expected.shape.len() != 1 {
            return Err(self.shape_error(number, &expected.shape, &expected.name));
        }
        let rows = expected.shape[0];
        let left = Factor { tensor: self.tensor(number)?, first: 0, step: 1, rank_step: 1 };
        let product = Product { rows, columns: 1, rank: 1, left, right: None, scaling };
        self.changes.entry(input).or_default().push(Change::Add(None, product));
        Ok(())
    }

    /// The parameters of a module that the adapter targets, by their own names, as its class defines them.
    fn parameters(&self, module: &str) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for own in self.adapter.config.target_names() {
            let full = format!("{module}.{own}");
            let is_targeted = self.adapter.config.targets(&full) && self.base.find(&full).is_ok();
            if is_targeted && !names.iter().any(|name| name == own) {
                names.push(own.to_owned());
            }
        }
        experts::sort(&mut names);
        names
    }

    /// The products of parameters that a module has itself.
    fn parameters_of(&mut self, module: &str, names: Vec<String>, pairs: &[Pair]) -> Result<()> {
        if let Some(bias) = pairs.iter().find_map(|pair| pair.bias) {
            return Err(self.error(bias, "it is of a parameter, which has no bias"));
        }
        if names.len() != pairs.len() {
            let why = format!(
                "the adapter has {} pairs of tensors for the parameters of {module:?}, and \"target_parameters\" has {} of them: {}",
                pairs.len(),
                names.len(),
                names.join(", ")
            );
            return Err(self.error(pairs[0].a, why));
        }
        let parameters = names
            .iter()
            .map(|own| self.parameter(&format!("{module}.{own}"), pairs[0].a))
            .collect::<Result<Vec<_>>>()?;
        let mut by_name: Vec<usize> = (0..names.len()).collect();
        by_name.sort_by_key(|parameter| &names[*parameter]);
        let fits = |wrapper: usize, parameter: usize| self.fits(pairs[wrapper], &parameters[parameter]);
        let (order, is_by_name) = experts::assign(parameters.len(), fits, &by_name).unwrap_or_else(|| {
            // The error is that of PEFT's own order.
            ((0..parameters.len()).rev().collect(), false)
        });
        if is_by_name && !self.warnings.iter().any(|warning| warning.message.contains("by their names")) {
            let what = format!(
                "the parameters of {module:?}, and others', were wrapped by their names rather than as the model defines them, as \
                 PEFT does where they are 4-bit: told by the shapes of the adapter's tensors"
            );
            self.warnings.push(what.into());
        }
        for (pair, parameter) in pairs.iter().zip(order) {
            self.experts(*pair, &parameters[parameter])?;
        }
        Ok(())
    }

    /// Whether the rows of each expert's matrix are its inputs. Of a single expert PEFT takes them for its outputs.
    fn has_inputs_in_rows(&self, parameter: &Parameter) -> bool {
        self.transposed && parameter.experts > 1
    }

    /// What its products are of: outputs and inputs.
    fn out_in(&self, parameter: &Parameter) -> [u64; 2] {
        let Parameter { rows, columns, .. } = *parameter;
        if self.has_inputs_in_rows(parameter) { [columns, rows] } else { [rows, columns] }
    }

    fn fits(&self, pair: Pair, parameter: &Parameter) -> bool {
        self.check_factors(pair, &parameter.name, self.out_in(parameter), parameter.experts, &parameter.name).is_ok()
    }

    /// Whether factors have the shapes that the base and the config ask for; returns their rank.
    fn check_factors(&self, pair: Pair, module: &str, [out, inner]: [u64; 2], experts: u64, of: &str) -> Result<u64> {
        let rank = self.adapter.config.rank(module);
        if rank > MAX_RANK {
            return Err(self.error(pair.a, format!("its rank is {rank} by the config; expected {MAX_RANK} at most")));
        }
        let ranks = rank.saturating_mul(experts);
        for (number, expected) in [(pair.a, [ranks, inner]), (pair.b, [out, ranks])] {
            if self.adapter.file.tensors[number].shape[..] != expected {
                return Err(self.shape_error(number, &expected, of));
            }
        }
        Ok(rank)
    }

    /// A parameter of the model, put together from what the base has of it.
    fn parameter(&mut self, name: &str, for_tensor: usize) -> Result<Parameter> {
        let (found, is_elsewhere) = match self.base.find(name) {
            Ok((found, is_elsewhere)) => (Parameter::of(&self.base, name, &found), is_elsewhere),
            Err(NotFound(why)) => return Err(self.error(for_tensor, why)),
        };
        let parameter = found.map_err(|why| self.error(for_tensor, why))?;
        if is_elsewhere {
            self.told_elsewhere(name, &self.base.inputs[parameter.parts[0].input].name.clone());
        }
        Ok(parameter)
    }

    /// The products of all experts' factors, each added where the base has that expert.
    fn experts(&mut self, pair: Pair, parameter: &Parameter) -> Result<()> {
        let [out, inner] = self.out_in(parameter);
        let rank = self.check_factors(pair, &parameter.name, [out, inner], parameter.experts, &parameter.name)?;
        let scaling = self.adapter.config.scaling(&parameter.name);
        let (a, b) = (self.tensor(pair.a)?, self.tensor(pair.b)?);
        let ranks = rank * parameter.experts;
        let has_inputs_in_rows = self.has_inputs_in_rows(parameter);
        for part in &parameter.parts {
            let of = part.expert.map_or(0..parameter.experts, |expert| expert..expert + 1);
            for expert in of {
                let a = Factor { tensor: a.clone(), first: expert * rank * inner, step: 1, rank_step: inner };
                let b = Factor { tensor: b.clone(), first: expert, step: ranks, rank_step: parameter.experts };
                let (mut of_rows, of_columns) = if has_inputs_in_rows { (a, b) } else { (b, a) };
                of_rows.first += part.first_row * of_rows.step;
                let (left, right) = if part.transposed { (of_columns, of_rows) } else { (of_rows, of_columns) };
                let [rows, columns] =
                    if part.transposed { [parameter.columns, part.rows] } else { [part.rows, parameter.columns] };
                let product = Product { rows, columns, rank, left, right: Some(right), scaling };
                let place = if part.expert.is_none() { Some(expert) } else { None };
                self.changes.entry(part.input).or_default().push(Change::Add(place, product));
            }
        }
        Ok(())
    }
}
