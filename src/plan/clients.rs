//! Linears that stay in 16 bits for the sake of who reads the format.
//!
//! NF4 and FP4 are trained with: what transformers' code reads raw is kept. Formats with groups are served: vision towers, audio
//! encoders and projectors are kept, as servers have no 4-bit parameters for them; so is what vLLM's code makes a plain Linear
//! of, and what no 4-bit kernel takes. The recipe's `include` brings any of them back.

use std::collections::HashMap;

use super::scale_sets::{Merged, merged};
use super::split::Decided;
use super::{Decision, PlannedTensor};
use crate::error::{Hint, Warning};
use crate::format::{Codec, Layout};
use crate::models::{Role, Rules, Verdict, diffusers, kept_for_training, towers};

/// Rows that vLLM's 4-bit kernels take at a time (Marlin's smallest tile); so many must divide what it makes one Linear of.
const KERNEL_ROWS: u64 = 64;

/// Keeps a Linear that clients of the format need in 16 bits.
pub(in crate::plan) fn keep(
    codec: &Codec,
    model_types: &[&str],
    rules: &Rules<'_>,
    tensor: &str,
    verdict: &mut Verdict,
) {
    let linear = matches!(verdict.role, Role::Linear | Role::ExpertLinear);
    if !verdict.quantize || verdict.included || !linear {
        return;
    }
    let Some(module) = tensor.strip_suffix(".weight") else { return };
    let why = match codec.layout() {
        None if rules.diffusers_class().is_some_and(|class| diffusers::is_kept_in_f32(class, module)) => {
            Some("diffusers keeps it in f32 (_keep_in_fp32_modules) and never makes it 4-bit".to_owned())
        }
        None if !kept_for_training::any(model_types) => None,
        None => {
            let names = rules.module_names(tensor);
            let mut names = names.iter().map(String::as_str).chain([module]);
            let reader = names.find_map(|module| kept_for_training::reader(model_types, module));
            reader.map(|reader| format!("not read as a 4-bit weight by transformers: {reader}"))
        }
        // It holds experts only.
        Some(Layout::GptOss) => None,
        Some(layout @ (Layout::CompressedTensors | Layout::Modelopt)) => {
            not_served(layout, model_types, rules.is_compared(), module)
        }
    };
    if let Some(why) = why {
        (verdict.quantize, verdict.reason) = (false, format!("{why}; kept in its dtype").into());
    }
}

/// Why servers have no 4-bit parameter for it; `known`: transformers has the model's type.
fn not_served(layout: Layout, model_types: &[&str], known: bool, module: &str) -> Option<String> {
    if let Some(tower) = towers::tower_of(model_types, known, module) {
        return Some(format!("{tower}: vision, audio and what joins them to the language model is served in 16 bits"));
    }
    if let Some(draft) = model_types.iter().find(|name| PLAIN_DRAFTS.contains(name)) {
        return Some(format!("vLLM makes plain Linears of a {draft} draft model's"));
    }
    // vLLM takes it for 16 bits in ModelOpt's layout, as ModelOpt has it.
    let of_modelopt = layout == Layout::Modelopt && (module == "mtp.fc" || module.ends_with(".mtp.fc"));
    (of_modelopt || is_plain_in_vllm(module))
        .then(|| "joins a multi-token prediction layer's inputs, a plain Linear in vLLM".to_owned())
}

/// The `model_type`s of draft models whose Linears vLLM makes plain ones (its models/medusa.py and mlp_speculator.py).
const PLAIN_DRAFTS: [&str; 2] = ["medusa", "mlp_speculator"];

/// What vLLM's multi-token prediction models make an `nn.Linear` of, whatever the checkpoint's format.
fn is_plain_in_vllm(module: &str) -> bool {
    let has = |part: &str| module.split('.').any(|found| found == part);
    // `centroids` is Gemma 4's.
    has("eh_proj")
        || has("centroids")
        || has("mtp_linear_proj")
        || (has("mtp_layers") && module.ends_with(".input_proj"))
}

/// Linears that become one when they are loaded: those beside each other that vLLM merges, or one alone.
type Set = (String, Vec<usize>);

/// The dense Linears among `tensors` by what is made one of them, each set with the sum of its rows. Where a checkpoint has some
/// of a set only, nothing is known of the whole.
fn sets<'a>(tensors: impl Iterator<Item = (&'a str, Role, &'a [u64])>) -> Vec<(Set, u64)> {
    let mut places: HashMap<Merged<'a>, usize> = HashMap::new();
    let mut sets: Vec<(Set, u64, usize)> = Vec::new();
    for (i, (name, role, shape)) in tensors.enumerate() {
        let (Role::Linear, [rows, _]) = (role, shape) else { continue };
        let (next, with) = (sets.len(), merged(name));
        let place = with.map_or(next, |with| *places.entry(with).or_insert(next));
        match sets.get_mut(place) {
            Some(((_, members), sum, _)) => {
                members.push(i);
                *sum += rows;
            }
            None => sets.push(((name.to_owned(), vec![i]), *rows, with.map_or(1, |(_, names)| names.len()))),
        }
    }
    let whole = sets.into_iter().filter(|((_, members), _, of)| members.len() == *of);
    whole.map(|(set, rows, _)| (set, rows)).collect()
}

/// Keeps Linears that vLLM merges into one of so many rows that no 4-bit kernel takes it.
pub(super) fn keep_odd_rows(codec: &Codec, decided: &mut [Decided]) {
    if codec.is_blocks() || codec.layout() == Some(Layout::GptOss) {
        return;
    }
    let all = decided.iter().map(|(input, verdict, _)| (&*input.name, verdict.role, &*input.shape));
    for ((_, members), rows) in sets(all).into_iter().filter(|((_, members), rows)| members.len() > 1 && is_odd(*rows))
    {
        for i in members {
            let (_, verdict, decision) = &mut decided[i];
            if verdict.quantize && !verdict.included {
                let why = format!("{rows} rows with what vLLM merges it with, not a multiple of {KERNEL_ROWS}");
                verdict.reason = format!("{why}: no 4-bit kernel takes them; kept in its dtype").into();
                (verdict.quantize, *decision) = (false, Decision::Keep);
            }
        }
    }
}

fn is_odd(rows: u64) -> bool {
    !rows.is_multiple_of(KERNEL_ROWS)
}

/// A Linear of its own that no kernel takes: other servers may pad it.
pub(super) fn odd_rows_warning(codec: &Codec, tensors: &[PlannedTensor]) -> Option<Warning> {
    if codec.is_blocks() || codec.layout() == Some(Layout::GptOss) {
        return None;
    }
    let quantized = tensors.iter().filter(|tensor| tensor.decision != Decision::Keep && tensor.role == Role::Linear);
    let mut odd = quantized.filter(|tensor| merged(&tensor.name).is_none() && is_odd(tensor.shape[0]));
    let first = odd.next()?;
    let more = match odd.count() {
        0 => String::new(),
        more => format!(", and {more} more,"),
    };
    let (name, rows) = (&first.name, first.shape[0]);
    let message = format!(
        "{name:?} ({rows} rows){more} can't be served by vLLM: its 4-bit kernels take multiples of {KERNEL_ROWS} rows"
    );
    Some(Warning { message, hint: Some(Hint::Exclude) })
}

/// Names of modules that vLLM cuts by columns where there is more than one GPU; all others are cut by rows, or not at all.
const CUT_BY_COLUMNS: &[&str] = &["c_proj", "dense_4h_to_h", "down_proj", "fc2", "o_proj", "out_proj", "w2", "wo"];

/// What can't be cut for two GPUs: rows of a set, or columns of what is cut by columns.
pub(super) fn tensor_parallel_warning(codec: &Codec, tensors: &[PlannedTensor]) -> Option<Warning> {
    if codec.is_blocks() || codec.layout() == Some(Layout::GptOss) {
        return None;
    }
    let quantized = tensors.iter().filter(|tensor| tensor.decision != Decision::Keep);
    let uncut = |columns: u64| {
        let group = codec.block_len(columns);
        // One scale for the whole row is every part's.
        group < columns && !columns.is_multiple_of(2 * group)
    };
    let last =
        |name: &str| name.strip_suffix(".weight").and_then(|module| module.rsplit('.').next().map(str::to_owned));
    let by_columns = |name: &str| last(name).is_some_and(|last| CUT_BY_COLUMNS.contains(&last.as_str()));
    let dense: Vec<&PlannedTensor> = quantized.filter(|tensor| tensor.role == Role::Linear).collect();
    let all = dense.iter().map(|tensor| (&*tensor.name, tensor.role, &*tensor.shape));
    let rows = sets(all).into_iter().filter(|((name, members), rows)| {
        let merged = members.len() > 1 && !is_replicated(name);
        merged && !rows.is_multiple_of(2 * KERNEL_ROWS)
    });
    let mut found: Vec<(String, String)> =
        rows.map(|((name, _), rows)| (name, format!("{rows} rows with what vLLM merges it with"))).collect();
    let columns = dense.iter().filter(|tensor| by_columns(&tensor.name) && uncut(tensor.columns()));
    found.extend(columns.map(|tensor| (tensor.name.to_string(), format!("{} columns", tensor.columns()))));
    let (name, what) = found.first()?;
    let more = if found.len() > 1 { format!(", and {} more", found.len() - 1) } else { String::new() };
    Some(format!("{name:?} ({what}){more} can't be halved: vLLM can't serve it with tensor parallelism of 2").into())
}

/// Low-rank projections of latent attention are whole on every GPU.
fn is_replicated(name: &str) -> bool {
    [".q_a_proj.", ".kv_a_proj_with_mqa.", ".wq_a."].iter().any(|part| name.contains(part))
}
